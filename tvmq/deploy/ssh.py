"""Boards that ssh reaches: the native runner is copied there, serves while it is used, and leaves nothing.

    connection 1   a folder, and the machine's type -> waits -> secret -> runner on the loopback interface
    connection 2   the pack's files, into that folder
    connection 3   ssh -L: a port here is the runner's

The first one's shell removes the folder when it ends, and it ends with its stdin: when `Tunnel.close` is called, when
this process dies, when the line breaks. A fresh secret goes through that stdin: no command line shows it.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import select
import shlex
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from tvmq.deploy.board_root import RUNNER
from tvmq.deploy.pack import FOLDER, board_archive
from tvmq.errors import DeviceError

# Copying 3 MB over a line of 0.5 Mbit/s takes 48 s.
COPY_TIMEOUT_S = 120.0
# A shell that has lost its stdin, and a runner that is told to stop, end in milliseconds.
STOP_TIMEOUT_S = 5.0
# No questions at a terminal; a line that is silent for 45 s is broken.
_OPTIONS = ("-T", "-o", "BatchMode=yes", "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=3")
# `read` takes a byte at a time, so that what follows the word is the runner's.
_SERVE = f"""\
folder=$(mktemp -d "${{TMPDIR:-/tmp}}/tvmq-board-XXXXXXXX") || exit 1
trap 'rm -rf "$folder"' EXIT
trap 'exit 1' HUP INT TERM
echo "tvmq-board $(uname -m) $folder"
read -r word || exit 1
TMPDIR="$folder" "$folder/{FOLDER}/{RUNNER}" serve --secret - --until-stdin-closes
"""


class Tunnel:
    """A runner on the machine `place` (HOST or USER@HOST) and a port here that leads to it, open from now on.

    host, port: of this end. secret: that it asks for. name: what errors call it. ssh_port: None for ssh's own choice.
    Raises DeviceError where ssh is missing or does not get there, or there is no runner for that machine.
    """

    host = "127.0.0.1"

    def __init__(self, name: str, place: str, ssh_port: int | None, timeout_s: float) -> None:
        if shutil.which("ssh") is None:
            hint = "on Debian: apt-get install openssh-client"
            raise DeviceError(f"device {name}", seen="no ssh on the PATH", hint=hint)
        self._name, self._place = name, place
        port = () if ssh_port is None else ("-p", str(ssh_port))
        self._command = ("ssh", *_OPTIONS, "-o", f"ConnectTimeout={max(1, round(timeout_s))}", *port)
        self.secret = secrets.token_hex(32).encode()
        # What the connections say on stderr.
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._connections: list[subprocess.Popen[bytes]] = []
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            self.port = self._open(timeout_s)
            undo.pop_all()

    def close(self) -> None:
        """End the runner and the connections; does nothing the second time."""
        # The tunnel first: the runner then has no client.
        while self._connections:
            _end(self._connections.pop())
        self._log.close()

    def _open(self, timeout_s: float) -> int:
        serving = self._start(_SERVE)
        machine, folder = self._words(serving, "tvmq-board", timeout_s)
        self._copy(board_archive(machine, f"device {self._name}"), folder)
        _send(serving, b"serve\n" + self.secret + b"\n")
        _, port = self._words(serving, "listening", timeout_s)
        with _reserved_port() as here:
            forward = ("-o", "ExitOnForwardFailure=yes", "-L", f"{self.host}:{here}:127.0.0.1:{port}")
            # ssh listens before it runs the command, which ends with our end of its stdin.
            self._words(self._start("echo tvmq-tunnel is open; exec cat", *forward), "tvmq-tunnel", timeout_s)
        return here

    def _start(self, script: str, *options: str) -> subprocess.Popen[bytes]:
        """Run `script` there, by sh, whatever the user's shell is."""
        command = [*self._command, *options, self._place, f"exec sh -c {shlex.quote(script)}"]
        pipe = subprocess.PIPE
        # Ctrl-C is for this process, which then closes the connections in their order.
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._log, start_new_session=True)
        self._connections.append(process)
        return process

    def _copy(self, archive: Path, folder: str) -> None:
        process = self._start(f"exec tar xzf - -C {shlex.quote(folder)}")
        try:
            process.communicate(archive.read_bytes(), timeout=COPY_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise self._failed("to copy the runner there", f"no end of it in {COPY_TIMEOUT_S:g} s") from error
        if process.returncode != 0:
            raise self._failed("to copy the runner there", f"exit code {process.returncode}")
        self._connections.remove(process)

    def _words(self, process: subprocess.Popen[bytes], first: str, timeout_s: float) -> tuple[str, str]:
        """The two words after `first` in the line that begins with it; a login may say other things before."""
        assert process.stdout is not None
        expected = "a board that ssh reaches" if first == "tvmq-board" else "a runner that serves"
        text, deadline = b"", time.monotonic() + 2 * timeout_s
        while (found := re.search(rf"^{first} (\S+) (.+)\n".encode(), text, re.MULTILINE)) is None:
            ready, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            chunk = os.read(process.stdout.fileno(), 4096) if ready else b""
            if not chunk:
                raise self._failed(expected, "no answer in time" if not ready else "the end of the connection")
            text += chunk
        return os.fsdecode(found[1]), os.fsdecode(found[2])

    def _failed(self, expected: str, seen: str) -> DeviceError:
        """What ssh or the board said last, else `seen`."""
        # Not `seek`: the connections write where this file's position is.
        log = self._log.fileno()
        text = os.pread(log, os.fstat(log).st_size, 0).decode(errors="replace")
        said = [line.strip() for line in text.splitlines() if line.strip()]
        hint = f"does this work: ssh {self._place} uname -m"
        return DeviceError(f"device {self._name}", expected=expected, seen=said[-1] if said else seen, hint=hint)


@contextlib.contextmanager
def _reserved_port() -> Iterator[int]:
    """A free port here that the system gives to nobody who asks for any; ssh, which asks for it, may listen there."""
    with socket.socket() as holder:
        # Two who say so share a port of which one at most listens.
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind((Tunnel.host, 0))
        yield int(holder.getsockname()[1])


def _send(process: subprocess.Popen[bytes], data: bytes) -> None:
    stdin: IO[bytes] | None = process.stdin
    assert stdin is not None
    with contextlib.suppress(BrokenPipeError):  # then its stdout ends too, and whoever reads that says why
        stdin.write(data)
        stdin.flush()


def _end(process: subprocess.Popen[bytes]) -> None:
    """Close its stdin, which ends what it runs there; kill what does not end."""
    with contextlib.suppress(BrokenPipeError):
        assert process.stdin is not None
        process.stdin.close()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()
