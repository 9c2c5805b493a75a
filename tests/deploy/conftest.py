"""The native runner of boards, compiled for this machine."""

from __future__ import annotations

from pathlib import Path

import pytest
from serving import compile_runner


@pytest.fixture(scope="session")
def native_runner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tvmq-runner` with the libraries of the installed TVM."""
    return compile_runner(tmp_path_factory.mktemp("runner"))
