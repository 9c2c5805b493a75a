"""TVM's own tracker and servers, each a process group that ends with its test, however the test ends.

`tvm.rpc.Server` and `Tracker` leave theirs behind where psutil is missing or the test's process is killed, and such a
process holds the output of the whole run open.
"""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys

# Without PyTorch TVM starts in half of the time. 1 is PR_SET_PDEATHSIG; a session is a fork of its server.
_START = """
import ctypes, os, socket, sys
end_with_parent = lambda: ctypes.CDLL(None).prctl(1, 9)
end_with_parent()
os.register_at_fork(after_in_child=end_with_parent)
sys.modules["torch"] = None
listener = socket.create_server(("127.0.0.1", 0))
port = listener.getsockname()[1]
"""
_TRACKER = """
from tvm.rpc import tracker
print(port, flush=True)
tracker._tracker_server(listener, "")
"""
_BOARD = """
from tvm.rpc import server
print(port, flush=True)
server._listen_loop(listener, port, sys.argv[2], ("127.0.0.1", int(sys.argv[1])), None, None)
"""

# One that no tracker knows.
ALONE = """
from tvm.rpc import server
print(port, flush=True)
server._listen_loop(listener, port, "", None, None, None)
"""


class Server:
    """A process that listens at a port."""

    def __init__(self, program: str, *words: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START + program, *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    @functools.cached_property
    def port(self) -> int:
        """Where it listens, once it does: servers start at the same time."""
        return int(self.process.stdout.readline())

    def kill(self) -> None:
        """End it and its sessions."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()


class Farm:
    """A tracker and its boards; ends them."""

    def __init__(self) -> None:
        self.tracker = Server(_TRACKER)
        self.boards: list[Server] = []

    def add(self, key: str) -> Server:
        """Another board of `key`."""
        self.boards.append(Server(_BOARD, str(self.tracker.port), key))
        return self.boards[-1]

    def close(self) -> None:
        """End everything."""
        for server in (*self.boards, self.tracker):
            server.kill()
