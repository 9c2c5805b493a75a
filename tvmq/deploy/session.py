"""Where a bundle runs: this process, or a board behind TVM's RPC. One interface, so that an executor does not care."""

from __future__ import annotations

import os
import platform
import weakref
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import tvm

from tvmq.cpuinfo import host_features
from tvmq.deploy import condition as conditions
from tvmq.deploy.address import CONNECT_TIMEOUT, LOST, Address, close, parse, reason
from tvmq.deploy.bundle import LIBRARY, Bundle
from tvmq.deploy.condition import Condition
from tvmq.detect import detect_host
from tvmq.errors import DeviceError, IsaError
from tvmq.files import scratch_folder

Array = npt.NDArray[Any]
_T = TypeVar("_T")


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

    def fetch(self, tensor: Any) -> Array:
        """A tensor's values, in this process."""

    def call(self, action: Callable[[], _T]) -> _T:
        """The result of an action on the device. Raises DeviceError where the device is lost."""

    def configure_threads(self, count: int) -> int:
        """Size the device's thread pool; returns the number used."""

    def pin_threads(self, count: int) -> None:
        """For a measurement, before anything has run: hold `count` threads to the fastest processors of a board."""

    def condition(self) -> Condition:
        """What a measurement there depends on: clocks, temperature, load, ..."""

    def close(self) -> None:
        """Let go of the device, whatever still refers to it; a board then serves the next client."""


def connect(device: str, timeout_s: float = CONNECT_TIMEOUT) -> Session:
    """The session behind a device address: see tvmq.deploy.address. Raises DeviceError."""
    return LocalSession() if device == "host" else RemoteSession(parse(device), timeout_s)


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
        with scratch_folder() as folder:
            path = folder / LIBRARY
            path.write_bytes(bundle.members[LIBRARY])
            try:
                return tvm.runtime.load_module(str(path))
            except (RuntimeError, OSError) as error:
                hint = "does its file system let files run? set TMPDIR to another"
                raise DeviceError("this machine", expected=f"to load {path}", seen=reason(error), hint=hint) from error

    def tensor(self, array: Array) -> Any:
        """A tensor in this process."""
        return tvm.runtime.tensor(np.asarray(array, order="C"))

    def fetch(self, tensor: Any) -> Array:
        """A tensor's values."""
        return np.asarray(tensor.numpy())

    def call(self, action: Callable[[], _T]) -> _T:
        """The result of an action."""
        return action()

    def configure_threads(self, count: int) -> int:
        """`count` threads, or all real cores for 0."""
        cores = count or detect_host().cores
        # Mode -3 shares the listed processors among the threads. The modes that pick processors themselves pin the
        # calling thread to one, which would slow down everything else in this process.
        processors = [str(processor) for processor in sorted(os.sched_getaffinity(0))]
        tvm.get_global_func("runtime.config_threadpool")(-3, cores, processors, cores)
        return cores

    def pin_threads(self, count: int) -> None:
        """Nothing: this process's other threads would be held too."""

    def condition(self) -> Condition:
        """This machine's."""
        return conditions.read()

    def close(self) -> None:
        """Nothing to let go of."""


class RemoteSession:
    """A board that serves TVM's RPC; `name`: what errors call it, None for its address. Raises DeviceError."""

    def __init__(self, address: Address, timeout_s: float = CONNECT_TIMEOUT, name: str | None = None) -> None:
        self.name = name or address.name
        link = address.open(timeout_s)
        self.remote = link.remote
        # Also where nobody closes the session.
        self._end = weakref.finalize(self, link.end)
        self.device = self.remote.cpu(0)
        self._libraries: dict[str, Any] = {}

    def check(self, bundle: Bundle) -> None:
        """Nothing is known of the board before it runs code."""

    def load(self, bundle: Bundle) -> Any:
        """Upload the library and load it there, once: overwriting a library that is in use ends the session."""
        name = f"tvmq-{bundle.manifest['members'][LIBRARY]['sha256'][:16]}.so"
        if name not in self._libraries:
            self._libraries[name] = self._load(bundle, name)
        return self._libraries[name]

    def _load(self, bundle: Bundle, name: str) -> Any:
        triple = bundle.manifest["target"]["triple"]
        with scratch_folder() as folder:
            path = folder / name
            path.write_bytes(bundle.members[LIBRARY])
            self.call(lambda: self.remote.upload(str(path)))
        try:
            return self.remote.load_module(name)
        except LOST as error:
            expected, hint = f"to load a library for {triple}", "is the bundle's target this board?"
            raise DeviceError(f"device {self.name}", expected=expected, seen=reason(error), hint=hint) from error

    def tensor(self, array: Array) -> Any:
        """A tensor on the board."""
        return self.call(lambda: tvm.runtime.tensor(np.asarray(array, order="C"), self.device))

    def fetch(self, tensor: Any) -> Array:
        """A tensor's values."""
        return np.asarray(self.call(tensor.numpy))

    def call(self, action: Callable[[], _T]) -> _T:
        """The result of an action on the board. Raises DeviceError where it is lost."""
        try:
            return action()
        except LOST as error:
            hint = "reconnect and load again; code for another processor ends a board's server"
            raise DeviceError(f"device {self.name}", expected="an answer", seen=reason(error), hint=hint) from error

    def instructions(self, module: Any, name: str, *args: Any) -> int:
        """How many instructions a call of a function takes, on a board that counts them. Raises DeviceError."""
        return int(self.call(lambda: self.remote.get_function("tvmq.board.count")(module, name, *args)))

    def configure_threads(self, count: int) -> int:
        """`count` threads on the board; 0 leaves its own choice, and says so by returning 0."""
        if count:
            # Mode 1 prefers the fast cores of a machine that has two kinds.
            self.call(lambda: self.remote.get_function("runtime.config_threadpool")(1, count))
        return count

    def pin_threads(self, count: int) -> None:
        """Before anything runs, on a board that tells its processors: hold `count` threads to the fastest of them.

        Each is held to one; the first, which TVM leaves free among these, finds the one that is left.
        """
        cores = [] if self.emulated else conditions.fastest(self._files())
        if count and len(cores) >= count:
            names = self.call(lambda: self.remote.get_function("ffi.Array")(*map(str, cores[:count])))
            # Mode -2 gives each thread a processor of the list; the pool is as large as the list from the start.
            self.call(lambda: self.remote.get_function("runtime.config_threadpool")(-2, count, names, count))

    def condition(self) -> Condition:
        """The board's own; a server of TVM's does not tell. Raises DeviceError where the board is lost."""
        # An emulated board would tell of this machine.
        if self.emulated:
            return Condition(known=False, emulated=True)
        files = self._files()
        return conditions.parse(files) if files else Condition(known=False)

    @property
    def emulated(self) -> bool:
        """Whether the board is emulated: only such a board offers to count instructions."""
        return self._has("tvmq.board.count")

    def _files(self) -> dict[str, str]:
        """What tells the board's condition; empty where it does not tell."""
        if not self._has("tvmq.board.files"):
            return {}
        read = self.remote.get_function("tvmq.board.files")
        return conditions.unpack(str(self.call(lambda: read(*conditions.FILES))))

    def _has(self, name: str) -> bool:
        try:
            self.call(lambda: self.remote.get_function(name))
        except AttributeError:
            return False
        return True

    def close(self) -> None:
        """End the session. Does nothing where it has ended."""
        try:
            self.call(lambda: close(self.remote))
        finally:
            self._end()
