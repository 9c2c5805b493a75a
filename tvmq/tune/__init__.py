"""Tuning: what is free in kernels, decided by measuring; resumable, on this machine or on boards.

`tvmq.tune` is this folder and the function `run.tune`: importing a module of the folder makes Python bind the folder to
the name, so the folder can be called.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, *args: Any, **named: Any) -> Any:
        from tvmq.tune.run import tune

        return tune(*args, **named)


sys.modules[__name__].__class__ = _Callable
