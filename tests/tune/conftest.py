"""Tuning tests use the kernels' harness and the boards' servers; no log of the machine's user is read or written."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path += [str(Path(__file__).parents[1] / name) for name in ("kernels", "deploy")]


@pytest.fixture(autouse=True)
def _no_user_logs(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data")))
