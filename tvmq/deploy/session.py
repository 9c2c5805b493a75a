"""Where a bundle runs: this process, or a board behind TVM's RPC. One interface, so that an executor does not care."""

from __future__ import annotations

import os
import platform
import tempfile
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import tvm
from tvm import rpc
from tvm.error import RPCError

from tvmq.cpuinfo import host_features
from tvmq.deploy.bundle import LIBRARY, Bundle
from tvmq.detect import detect_host
from tvmq.errors import DeviceError, IsaError

Array = npt.NDArray[Any]
# Seconds to wait for a board to answer.
CONNECT_TIMEOUT = 10.0


class Session(Protocol):
    """A device that can load libraries and hold tensors."""

    name: str
    device: Any

    def check(self, bundle: Bundle) -> None:
        """Raise IsaError where the device lacks what the bundle needs, as far as can be known beforehand."""

    def load(self, bundle: Bundle) -> Any:
        """The bundle's library on the device."""

    def tensor(self, array: Array) -> Any:
        """A tensor on the device."""

    def configure_threads(self, count: int) -> int:
        """Size the device's thread pool; returns the number used."""


def connect(device: str, timeout_s: float = CONNECT_TIMEOUT) -> Session:
    """The session behind a device address: "host" or "rpc://host:port". Raises DeviceError."""
    if device == "host":
        return LocalSession()
    if device.startswith("rpc://"):
        return RemoteSession(device, timeout_s)
    raise DeviceError(f"device {device!r}", expected="host or rpc://HOST:PORT")


class LocalSession:
    """This process."""

    def __init__(self) -> None:
        self.name = "host"
        self.device = tvm.cpu(0)

    def check(self, bundle: Bundle) -> None:
        """Compare the architecture and the instruction set features with this machine's."""
        arch = str(bundle.manifest["target"]["triple"]).split("-", maxsplit=1)[0]
        if arch != platform.machine():
            hint = "load it on a board: device='rpc://HOST:PORT'"
            raise IsaError(
                f"bundle for {bundle.manifest['target']['name']}",
                expected=f"a machine of type {arch}",
                seen=platform.machine(),
                hint=hint,
            )
        missing = sorted(set(bundle.required_features) - host_features())
        if missing:
            hint = "compile with -t host, or for a target that this machine covers"
            raise IsaError(
                f"bundle for {bundle.manifest['target']['name']}",
                expected=f"a CPU with {', '.join(missing)}",
                seen="one without",
                hint=hint,
            )

    def load(self, bundle: Bundle) -> Any:
        """Load the library through a temporary file, which the system keeps while it is mapped."""
        with tempfile.TemporaryDirectory(prefix="tvmq-") as folder:
            path = Path(folder) / LIBRARY
            path.write_bytes(bundle.members[LIBRARY])
            return tvm.runtime.load_module(str(path))

    def tensor(self, array: Array) -> Any:
        """A tensor in this process."""
        return tvm.runtime.tensor(np.asarray(array, order="C"))

    def configure_threads(self, count: int) -> int:
        """`count` threads, or all real cores for 0."""
        cores = count or detect_host().cores
        # Mode -3 shares the listed processors among the threads. The modes that pick processors themselves pin the
        # calling thread to one, which would slow down everything else in this process.
        processors = [str(processor) for processor in sorted(os.sched_getaffinity(0))]
        tvm.get_global_func("runtime.config_threadpool")(-3, cores, processors, cores)
        return cores


class RemoteSession:
    """A board that serves TVM's RPC."""

    def __init__(self, url: str, timeout_s: float) -> None:
        host, port = _address(url)
        self.name = url
        try:
            self.remote = rpc.connect(host, port, session_timeout=timeout_s)
        except (OSError, RPCError, RuntimeError) as error:
            hint = "is the server running there, and the port open?"
            raise DeviceError(
                f"device {url}", expected="a TVM RPC server", seen=_first_line(error), hint=hint
            ) from error
        self.device = self.remote.cpu(0)

    def check(self, bundle: Bundle) -> None:
        """Nothing is known of the board before it runs code."""

    def load(self, bundle: Bundle) -> Any:
        """Upload the library and load it there."""
        name = f"tvmq-{bundle.manifest['members'][LIBRARY]['sha256'][:16]}.so"
        try:
            with tempfile.TemporaryDirectory(prefix="tvmq-") as folder:
                path = Path(folder) / name
                path.write_bytes(bundle.members[LIBRARY])
                self.remote.upload(str(path))
            return self.remote.load_module(name)
        except (OSError, RPCError, RuntimeError) as error:
            seen = _first_line(error)
            raise DeviceError(f"device {self.name}", expected="to load the bundle's library", seen=seen) from error

    def tensor(self, array: Array) -> Any:
        """A tensor on the board."""
        return tvm.runtime.tensor(np.asarray(array, order="C"), self.device)

    def configure_threads(self, count: int) -> int:
        """`count` threads on the board; 0 leaves its own choice, and says so by returning 0."""
        if count:
            # Mode 1 prefers the fast cores of a machine that has two kinds.
            self.remote.get_function("runtime.config_threadpool")(1, count)
        return count


def _address(url: str) -> tuple[str, int]:
    host, _, port = url.removeprefix("rpc://").rstrip("/").rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise DeviceError(f"device {url!r}", expected="rpc://HOST:PORT with a port from 1 to 65535")
    return host, int(port)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0][:200] if text else type(error).__name__
