"""A board's server in a process of its own, for tests: Python's, forked from one that has TVM loaded, or the runner's."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import tvm
import tvm_ffi.libinfo
from waiting import PATIENCE_S, wait_until

from tvmq.deploy.board_root import RUNNER, SOURCE
from tvmq.deploy.crosslink import zig_cc

SECRET = "0123456789abcdef0123456789abcdef"


def secret_file(path: Path, text: str = SECRET, mode: int = 0o600) -> Path:
    """A file with a secret."""
    path.write_text(text)
    path.chmod(mode)
    return path


def _context() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tvmq.cli", "tvmq.deploy.server", "tvmq.deploy.board_session"])
    return context


def _run(words: tuple[str, ...], log: str, environment: dict[str, str], limit: Callable[[], None] | None) -> None:
    # 1 is PR_SET_PDEATHSIG: the process that it is forked from ends with the tests, however these end.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(environment)
    tempfile.tempdir = None
    stream = os.open(log, os.O_WRONLY | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(stream, descriptor)
    if limit is not None:
        limit()
    from tvmq.cli import main

    sys.exit(main(["board", "serve", *words]))


class Serving:
    """`tvmq board serve` and `words`, started; a context manager that ends it. url: its address.

    limit: called in its process first. environment: variables that it has.
    """

    def __init__(self, *words: str, limit: Callable[[], None] | None = None, **environment: str) -> None:
        handle, log = tempfile.mkstemp(prefix="serving-")
        os.close(handle)
        self.log = Path(log)
        self.process = _context().Process(target=_run, args=(words, log, environment, limit), daemon=True)
        self.process.start()
        self.port = int(self.wait_for(r"rpc://\S+:(\d+) serves")[1])
        self.url = f"rpc://127.0.0.1:{self.port}"

    def said(self) -> str:
        """What it has said until now."""
        return self.log.read_text()

    def wait_for(self, pattern: str) -> re.Match[str]:
        """The first line that matches; the test fails where none comes."""
        wait_until(lambda: re.search(pattern, self.said(), re.MULTILINE) or not self.is_alive())
        found = re.search(pattern, self.said(), re.MULTILINE)
        assert found, self.said()
        return found

    def sessions(self) -> list[int]:
        """The processes of sessions."""
        return [int(child) for child in children(self.pid).read_text().split()]

    @property
    def pid(self) -> int | None:
        """Of the server."""
        return self.process.pid

    def is_alive(self) -> bool:
        """Whether the server runs."""
        return self.process.is_alive()

    def stop(self, number: int) -> int:
        """Send a signal; the exit code."""
        os.kill(self.process.pid, number)
        self.process.join(PATIENCE_S)
        assert self.process.exitcode is not None
        return self.process.exitcode

    def __enter__(self) -> Serving:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.join(PATIENCE_S)
        self.log.unlink()


class NativeServing(Serving):
    """`PROGRAM serve` and `words`, where they name no secret without one; like Serving otherwise."""

    def __init__(self, program: Path, *words: str, limit: Callable[[], None] | None = None, **environment: str) -> None:
        handle, log = tempfile.mkstemp(prefix="serving-")
        self.log = Path(log)
        secret = () if "--secret" in words else ("--secret", "none")
        self.runner = subprocess.Popen(
            [str(program), "serve", *secret, *words, "--until-stdin-closes"],
            stdin=subprocess.PIPE,
            stdout=handle,
            stderr=handle,
            env=os.environ | environment,
            preexec_fn=limit,  # noqa: PLW1509
        )
        os.close(handle)
        self.port = int(self.wait_for(r"^listening 127.0.0.1 (\d+)$")[1])
        self.url = f"rpc://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """Of the server."""
        return self.runner.pid

    def is_alive(self) -> bool:
        """Whether the server runs."""
        return self.runner.poll() is None

    def stop(self, number: int) -> int:
        """Send a signal; the exit code."""
        self.runner.send_signal(number)
        return self.runner.wait(PATIENCE_S)

    def __exit__(self, *_: object) -> None:
        self.runner.kill()
        self.runner.communicate(timeout=PATIENCE_S)
        self.log.unlink()


# Starts a server: the words of its command line, `limit`, and variables of its environment.
Serve = Callable[..., Serving]


def compile_runner(folder: Path, *options: str) -> Path:
    """The native runner for this machine in `folder`, with the libraries of the installed TVM."""
    folders = [Path(tvm.__file__).parent / "lib", Path(tvm_ffi.libinfo.find_libtvm_ffi()).parent]
    includes = (tvm_ffi.libinfo.find_include_path(), tvm_ffi.libinfo.find_dlpack_include_path())
    words = ["-O2", *options, *(f"-I{path}" for path in includes), str(SOURCE), "-Wl,--no-as-needed"]
    words += [word for path in folders for word in (f"-L{path}", f"-Wl,-rpath,{path}")]
    words += ["-ltvm_ffi", "-ltvm_runtime", "-ltvm_runtime_extra", "-Wl,--allow-shlib-undefined"]
    zig_cc("native", words, folder / RUNNER)
    (folder / RUNNER).chmod(0o755)
    return folder / RUNNER


def children(process: int | None) -> Path:
    """The file that names a process's children."""
    return Path(f"/proc/{process}/task/{process}/children")


@contextlib.contextmanager
def closed_port() -> Iterator[int]:
    """A port at which nobody listens, and which the system gives to nobody meanwhile."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def is_closed(connection: socket.socket) -> bool:
    """Whether the other end closes; it resets the connection where it has not read all that was said to it."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True
