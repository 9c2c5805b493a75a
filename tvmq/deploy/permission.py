"""Leave to use matrix tiles, which Linux gives a process that asks: without it the first tile instruction ends it."""

from __future__ import annotations

from typing import Any

import numpy as np

from tvmq.deploy.bundle import Bundle
from tvmq.deploy.session import Session
from tvmq.errors import IsaError
from tvmq.kernels import tiles


def allow_tiles(bundle: Bundle, session: Session, library: Any) -> None:
    """Ask for tiles in the process that runs `library`, where `bundle` is for a target that has them.

    Raises IsaError where the system refuses.
    """
    if tiles.FEATURE in bundle.required_features:
        ask(session, library, f"bundle for {bundle.manifest['target']['name']}")


def ask(session: Session, library: Any, what: str) -> None:
    """Ask for tiles through `library`, which has `tiles.permission`, for `what`.

    Threads share the leave, those that are there already included. Raises IsaError where the system refuses.
    """
    answer = session.tensor(np.zeros(1, np.int32))
    session.call(lambda: library.get_function(tiles.PERMISSION, query_imports=True)(answer))
    if session.fetch(answer)[0] != 0:
        raise IsaError(
            what,
            expected=f"a system that lets processes use matrix tiles ({tiles.FEATURE})",
            seen="a refusal",
            hint="Linux has them from 5.16 on, and a hypervisor may withhold them; else compile for a target without",
        )
