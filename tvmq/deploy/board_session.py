"""One client's session on a board: TVM's RPC in a process and a folder of its own."""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path
from typing import Any, NoReturn

import tvm
import tvm_ffi

from tvmq.deploy import condition

# Linux: prctl(PR_SET_PDEATHSIG).
_PARENT_DEATH_SIGNAL = 1


def run(connection: int, folder: Path, seconds: float, parent: int) -> NoReturn:
    """Serve the client at the file descriptor `connection` until it leaves, or for `seconds` (0: without limit).

    Ends this process, which `parent` made for that: the session dies with the server, and with its last thread.
    """
    ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    # Ctrl-C at the terminal is the server's to handle.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    os.chdir(folder)
    _register(folder)
    code = 1
    try:
        tvm.get_global_func("rpc.ServerLoop")(connection)
        code = 0
    finally:
        # Not sys.exit: destructors of TVM's thread pool and of loaded libraries have no order to run in.
        os._exit(code)


def _register(folder: Path) -> None:
    """The functions that TVM's runtime and its client expect of a server."""

    def workpath(name: str) -> str:
        return str(folder / name)

    def upload(name: str, data: Any) -> None:
        # TVM's own does not look whether the disk took it all.
        (folder / name).write_bytes(bytes(data))

    def load_module(name: str) -> Any:
        return tvm.runtime.load_module(str(folder / name))

    for function in (workpath, upload, load_module):
        tvm_ffi.register_global_func(f"tvm.rpc.server.{function.__name__}", function, override=True)
    tvm_ffi.register_global_func("tvmq.board.files", _files, override=True)


def _files(*patterns: str) -> str:
    """The files of this machine that match, for who wants to know its condition."""
    return condition.pack(condition.gather(patterns))
