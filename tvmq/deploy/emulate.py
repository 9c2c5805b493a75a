"""An aarch64 board on this machine: qemu-user runs the RPC server in a prepared root.

    with EmulatedBoard(prepare()).start(cpu="cortex-a72") as board:
        remote = tvm.rpc.connect(board.host, board.port)

Only 127.0.0.1 is served: an RPC client may run any code. Sessions are served one after the other; a second client waits
until the first has closed. The board ends with this process, however this process ends.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from tvmq.deploy.board_root import RUNNER, TVMQ_FOLDER, default_cache, prepare, require_tools
from tvmq.deploy.counting import plugin
from tvmq.errors import DeviceError

__all__ = ["EmulatedBoard", "counting_board", "default_cache", "find_qemu", "prepare"]

HOST = "127.0.0.1"
# The server listens after 0.2 s on an idle two-core machine; this is for one that is swamped.
START_TIMEOUT_S = 60.0
# Killed processes are gone in milliseconds, unless they hang in the kernel.
STOP_TIMEOUT_S = 10.0


class EmulatedBoard:
    """One emulated board: `root` is made by `prepare`; `qemu_options` are qemu-aarch64's, e.g. ("-plugin", FILE).

    `host` is always 127.0.0.1; `port` is known once the board is started. A context manager that stops it.
    """

    host = HOST

    def __init__(self, root: Path, qemu_options: Sequence[str] = ()) -> None:
        self._root = root
        self._qemu_options = tuple(qemu_options)
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._port: int | None = None

    @property
    def port(self) -> int:
        """The TCP port of the RPC server. Raises DeviceError before `start` and after `stop`."""
        if self._port is None:
            raise DeviceError("the emulated board is not running", hint="start it")
        return self._port

    @property
    def url(self) -> str:
        """The board as tvmq's `device`: "rpc://127.0.0.1:PORT"."""
        return f"rpc://{self.host}:{self.port}"

    def start(self, cpu: str = "max", timeout_s: float = START_TIMEOUT_S, port: int = 0) -> EmulatedBoard:
        """Start the board as processor `cpu` (of `qemu-aarch64 -cpu help`) and wait until its server listens.

        `port`: 0 takes any free one.
        Raises DeviceError where qemu is missing, refuses, or the server does not listen within `timeout_s` seconds.
        """
        if self._process is not None:
            raise DeviceError("the emulated board is already running", hint="stop it first")
        command = board_command(self._root, cpu, self._qemu_options, port)
        self._folder = tempfile.TemporaryDirectory(prefix="tvmq-board-")
        try:
            self._process = _launch(command, Path(self._folder.name))
            self._port = _wait_for_port(self._process, _log(self._folder.name), timeout_s)
        except BaseException:  # Ctrl-C too must leave no process
            self.stop()
            raise
        return self

    def wait(self) -> None:
        """Until the server ends by itself, which is a fault. Raises DeviceError then."""
        if self._process is not None:
            code = self._process.wait()
            raise DeviceError("the emulated board has ended", seen=f"exit code {code}")

    def stop(self) -> None:
        """End the server and its sessions, and remove their files. Does nothing to a board that is not running."""
        process, self._process, self._port = self._process, None, None
        if process is not None:
            _kill_group(process)
        folder, self._folder = self._folder, None
        if folder is not None:
            folder.cleanup()

    def __enter__(self) -> EmulatedBoard:
        return self if self._process is not None else self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def find_qemu() -> str:
    """The command that runs aarch64 programs; the static one takes no plugins. Raises DeviceError."""
    for command in ("qemu-aarch64", "qemu-aarch64-static"):
        if found := shutil.which(command):
            return found
    require_tools({"qemu-aarch64": "qemu-user"})
    raise AssertionError("require_tools raised")


def counting_board(cache: Path | None = None) -> EmulatedBoard:
    """A board that counts its instructions: see `RemoteSession.instructions`. Raises as `prepare` does."""
    root = prepare(cache)
    return EmulatedBoard(root, ("-plugin", str(plugin(find_qemu(), cache))))


def board_command(root: Path, cpu: str, qemu_options: Sequence[str] = (), port: int = 0) -> list[str]:
    """The command line of a board: qemu, its options, the server in `root`, and the server's options."""
    runner = str(root / TVMQ_FOLDER / RUNNER)
    options = ["--secret", "none", "--host", HOST, "--port", str(port), "--until-stdin-closes", "--emulated"]
    return [find_qemu(), "-cpu", cpu, "-L", str(root), *qemu_options, runner, "serve", *options]


def board_environment() -> dict[str, str]:
    """The variables of programs under qemu: LD_* are of this machine, QEMU_* would come on top of our options."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("LD_", "QEMU_"))}


def _launch(command: list[str], folder: Path) -> subprocess.Popen[bytes]:
    environment = board_environment() | {"TMPDIR": str(folder)}
    # The write end of stdin is never written: the server ends when this process, and so the pipe, is gone.
    pipe = subprocess.PIPE
    with _log(folder).open("wb") as log:
        # A session of its own: Ctrl-C is for this process, and the group is one thing to kill.
        return subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=log, env=environment, cwd=folder, start_new_session=True
        )


def _log(folder: str | Path) -> Path:
    return Path(folder) / "board.log"


def _wait_for_port(process: subprocess.Popen[bytes], log: Path, timeout_s: float) -> int:
    """The port of the server's first line, "listening ADDRESS PORT"."""
    line = _first_line(process, time.monotonic() + timeout_s)
    words = line.split()
    if len(words) == 3 and words[0] == b"listening":
        return int(words[2])
    said = log.read_text(encoding="utf-8", errors="replace").split("\n")
    reason = next((text for text in reversed(said) if text.strip()), "")
    if process.poll() is None:
        raise DeviceError("the emulated board did not start", seen=f"no answer in {timeout_s:g} s {reason}".strip())
    raise DeviceError("the emulated board did not start", seen=reason or f"exit code {process.returncode}")


def _first_line(process: subprocess.Popen[bytes], deadline: float) -> bytes:
    """The first line of stdout; what there is of it where the process ends or `deadline` (time.monotonic) passes."""
    assert process.stdout is not None
    line = b""
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
        chunk = os.read(process.stdout.fileno(), 1024) if ready else b""
        if not chunk:
            if ready:  # end of file: it is ending, and its exit code and last words are about to be known
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=max(0.0, deadline - time.monotonic()))
            break
        line += chunk
    return line


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    # A server that has ended took its session with it; its group's number may by now be another's.
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    _wait_until_closed(process)
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def _wait_until_closed(process: subprocess.Popen[bytes]) -> None:
    # A session is no child of ours to wait for, but it holds the stdout it inherited until it is gone.
    assert process.stdout is not None
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
        if not os.read(process.stdout.fileno(), 1024):
            break
