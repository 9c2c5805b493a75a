"""The emulated board: prepared once in the user's cache, started for each test that asks for it (0.2 s)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tvmq.deploy.emulate import EmulatedBoard, prepare

NEEDED = ("qemu-aarch64", "apt-get", "dpkg-deb")


@pytest.fixture(scope="session")
def board_root() -> Path:
    missing = [tool for tool in NEEDED if shutil.which(tool) is None]
    if missing and not os.environ.get("CI"):
        pytest.skip(f"no {', '.join(missing)} on this machine")
    # On CI a missing tool fails here, in the words that a user would read.
    return prepare()


@pytest.fixture
def board(board_root: Path) -> Iterator[EmulatedBoard]:
    # Not shared: the traceback of a failed test holds its session open, and the server serves one at a time.
    with EmulatedBoard(board_root).start() as running:
        yield running
