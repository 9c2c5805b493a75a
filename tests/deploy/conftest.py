"""The native runner of boards, compiled for this machine; both kinds of servers; a secret."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from serving import NativeServing, Serve, Serving, compile_runner, secret_file


@pytest.fixture(scope="session")
def native_runner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tvmq-runner` with the libraries of the installed TVM."""
    return compile_runner(tmp_path_factory.mktemp("runner"))


@pytest.fixture(scope="module", params=["python", "native"])
def serve(request: pytest.FixtureRequest) -> Serve:
    """A board's server: `tvmq board serve`, or the native runner."""
    if request.param == "python":
        return Serving
    return functools.partial(NativeServing, request.getfixturevalue("native_runner"))


@pytest.fixture(scope="module")
def secret(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a secret that servers take."""
    return secret_file(tmp_path_factory.mktemp("secret") / "s")
