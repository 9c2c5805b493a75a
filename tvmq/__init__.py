"""tvmq: quantize, sparsify, tune, cross-compile, run and measure models for x86 and ARM CPUs on Apache TVM.

The names below are the public face. Each is imported when it is first used: TVM and PyTorch take seconds to load, and
`tvmq --help` needs neither.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tvmq._version import __version__

if TYPE_CHECKING:
    from tvmq.deploy.executor import Executor, OpTime, load
    from tvmq.deploy.latency import Latency
    from tvmq.errors import TvmqError
    from tvmq.importer.load import import_model
    from tvmq.measure.verify import verify
    from tvmq.model import Model, Signature, TensorSpec
    from tvmq.pipeline import compile_model as compile
    from tvmq.quantize.table import CalibrationTable
    from tvmq.recipe import Recipe
    from tvmq.target import Target, load_target
    from tvmq.tune.run import tune

__all__ = [
    "CalibrationTable",
    "Executor",
    "Latency",
    "Model",
    "OpTime",
    "Recipe",
    "Signature",
    "Target",
    "TensorSpec",
    "TvmqError",
    "__version__",
    "compile",
    "import_model",
    "load",
    "load_target",
    "tune",
    "verify",
]

# Where each public name is, and what it is called there.
_HOMES = {
    "CalibrationTable": ("tvmq.quantize.table", "CalibrationTable"),
    "Executor": ("tvmq.deploy.executor", "Executor"),
    "Latency": ("tvmq.deploy.latency", "Latency"),
    "Model": ("tvmq.model", "Model"),
    "OpTime": ("tvmq.deploy.executor", "OpTime"),
    "Recipe": ("tvmq.recipe", "Recipe"),
    "Signature": ("tvmq.model", "Signature"),
    "Target": ("tvmq.target", "Target"),
    "TensorSpec": ("tvmq.model", "TensorSpec"),
    "TvmqError": ("tvmq.errors", "TvmqError"),
    "compile": ("tvmq.pipeline", "compile_model"),
    "import_model": ("tvmq.importer.load", "import_model"),
    "load": ("tvmq.deploy.executor", "load"),
    "load_target": ("tvmq.target", "load_target"),
    "tune": ("tvmq.tune.run", "tune"),
    "verify": ("tvmq.measure.verify", "verify"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, there = _HOMES[name]
    value = getattr(importlib.import_module(module), there)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
