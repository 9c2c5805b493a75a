"""Device addresses, and how to reach what they name. The one place that knows how they are written.

    host                                this process
    rpc://HOST:PORT                     a board that serves TVM's RPC: `tvmq board serve`, or TVM's own server
    tracker://HOST:PORT/KEY             a board that TVM's tracker knows by KEY, as soon as one is free
    ssh://USER@HOST:PORT                a board that ssh reaches (see tvmq.deploy.ssh); else ssh's own USER, PORT

`?secret=FILE` after the others names the file of the secret that the board asks for (see tvmq.deploy.secret).
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as Late
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from tvm import rpc
from tvm.error import RPCError

from tvmq.deploy import patience
from tvmq.deploy.handshake import ticket
from tvmq.deploy.secret import find_secret
from tvmq.deploy.ssh import Tunnel
from tvmq.deploy.tracker import Tracker
from tvmq.errors import DeviceError

# Seconds to wait for a board to answer.
CONNECT_TIMEOUT = 10.0
FORMS = "host, rpc://HOST:PORT, tracker://HOST:PORT/KEY or ssh://USER@HOST"
# What TVM raises where the other end is gone, or said that something failed there.
LOST = (RPCError, RuntimeError, OSError)


@dataclass(frozen=True)
class Link:
    """An open connection to a board. remote: TVM's session. end: of what was made for the session, after it."""

    remote: Any
    end: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Rpc:
    """A board at host:port. secret: the file that the address names, "none", or None for the usual places."""

    host: str
    port: int
    secret: str | None = None

    @property
    def name(self) -> str:
        """The address without its options."""
        return f"rpc://{self.host}:{self.port}"

    def open(self, timeout_s: float) -> Link:
        """A session with the board. Raises DeviceError where none answers in `timeout_s` seconds."""
        return Link(_open(self.host, self.port, "", find_secret(self.secret), timeout_s))


@dataclass(frozen=True)
class Tracked:
    """Any board that the tracker at host:port knows by `key`. secret: as in `Rpc`, of the board."""

    host: str
    port: int
    key: str
    secret: str | None = None

    @property
    def name(self) -> str:
        """The address without its options."""
        return f"tracker://{self.host}:{self.port}/{self.key}"

    def count(self, timeout_s: float) -> int:
        """How many boards there are. Raises DeviceError where there is none, or no tracker."""
        tracker = Tracker(self.host, self.port, timeout_s)
        known = tracker.keys()
        if self.key not in known:
            seen = ", ".join(sorted(set(known))) or "no board at all"
            raise DeviceError(tracker.name, expected=f"boards of the key {self.key!r}", seen=seen)
        return known.count(self.key)

    def open(self, timeout_s: float) -> Link:
        """A session with a board of the key. Raises DeviceError where none is free in `timeout_s` seconds."""
        secret = find_secret(self.secret)
        self.count(timeout_s)
        host, port, word = Tracker(self.host, self.port, timeout_s).board(self.key)
        return Link(_open(host, port, word, secret, timeout_s))


@dataclass(frozen=True)
class Ssh:
    """A board that ssh reaches as `place`, HOST or USER@HOST. port: None for ssh's own choice."""

    place: str
    port: int | None = None

    @property
    def name(self) -> str:
        """The address."""
        return f"ssh://{self.place}" + ("" if self.port is None else f":{self.port}")

    def open(self, timeout_s: float) -> Link:
        """A session with a runner that is started there, and ended with it. Raises DeviceError, OutputError."""
        tunnel = Tunnel(self.name, self.place, self.port, timeout_s)
        try:
            return Link(_open(tunnel.host, tunnel.port, "", tunnel.secret, timeout_s), tunnel.close)
        except BaseException:  # Ctrl-C too must leave nothing there
            tunnel.close()
            raise


Address = Rpc | Tracked | Ssh


def parse(device: str) -> Address:
    """The address of a device other than "host". Raises DeviceError."""
    place, _, options = device.partition("?")
    scheme, _, rest = place.partition("://")
    secret = _secret(device, options)
    if scheme == "rpc" and "://" in place:
        expected = "rpc://HOST:PORT with a port from 1 to 65535"
        return Rpc(*_host_and_port(device, rest.rstrip("/"), expected), secret)
    if scheme == "tracker" and "://" in place:
        where, _, key = rest.partition("/")
        expected = "tracker://HOST:PORT/KEY"
        if not key:
            raise DeviceError(f"device {device!r}", expected=expected)
        return Tracked(*_host_and_port(device, where, expected), key, secret)
    if scheme == "ssh" and "://" in place:
        # What begins with a dash would be an option of ssh's.
        found = re.fullmatch(r"((?:[\w.][\w.-]*@)?[\w.][\w.-]*)(?::(\d{1,5}))?/?", rest)
        if found is None or options:
            raise DeviceError(f"device {device!r}", expected="ssh://HOST, ssh://USER@HOST or ssh://USER@HOST:PORT")
        return Ssh(found[1], int(found[2]) if found[2] else None)
    raise DeviceError(f"device {device!r}", expected=FORMS)


def host_and_port(text: str, what: str) -> tuple[str, int]:
    """The parts of "HOST:PORT" for the option `what`. Raises DeviceError."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise DeviceError(what, expected="HOST:PORT with a port from 1 to 65535", seen=text)
    return host.strip("[]"), int(port)


def _host_and_port(device: str, text: str, expected: str) -> tuple[str, int]:
    try:
        return host_and_port(text, "")
    except DeviceError as error:
        raise DeviceError(f"device {device!r}", expected=expected) from error


def _secret(device: str, options: str) -> str | None:
    given = dict(parse_qsl(options, keep_blank_values=True))
    secret = given.pop("secret", None)
    if given or secret == "":
        raise DeviceError(f"device {device!r}", expected="no option but ?secret=FILE", seen=options)
    return secret


def _open(host: str, port: int, key: str, secret: bytes | None, timeout_s: float) -> Any:
    """TVM's session with the board at host:port; `key`: what a tracker gave. Raises DeviceError."""
    name, busy = f"rpc://{host}:{port}", "is another client using it?"
    deadline = time.monotonic() + timeout_s
    running = "is the server running there, and the port open?"
    if secret is not None:
        try:
            key = ticket(host, port, secret, key, timeout_s)
        except TimeoutError as error:
            raise _no_server(name, f"no answer in {timeout_s:g} s", running) from error
        except OSError as error:
            raise _no_server(name, error.strerror or str(error), running) from error
    # TVM's own session_timeout ends a session that lasts longer, in the midst of a benchmark.
    answer = _connect(host, port, key, max(deadline - time.monotonic(), 0.1))
    if answer is None:
        raise _no_server(name, f"no answer in {timeout_s:g} s", busy)
    if isinstance(answer, Exception):
        said = reason(answer)
        if "cannot find server that matches key" in said:
            hint = "?secret=FILE after the address; or a tracker owns it: tracker://HOST:PORT/KEY"
            raise _no_server(name, "one that asks for a secret or a key", hint) from answer
        raise _no_server(name, said, running) from answer
    patience.limit(host, port)
    return answer


def _connect(host: str, port: int, key: str, timeout_s: float) -> Any:
    """TVM's session, or what TVM raises of LOST; None after `timeout_s` seconds."""
    answer: Future[Any] = Future()

    def run() -> None:
        found: Any
        try:
            found = rpc.connect(host, port, key)
        except LOST as error:
            found = error
        if answer.set_running_or_notify_cancel():
            answer.set_result(found)
        elif not isinstance(found, Exception):
            close(found)

    # TVM waits without limit for a server that is silent, or busy with another client.
    threading.Thread(target=run, daemon=True, name="tvmq-connect").start()
    try:
        return answer.result(timeout_s)
    except Late:
        # Given up, or answered in this very moment: a session is taken here or closed there, and never neither.
        return None if answer.cancel() else answer.result()


def close(session: Any) -> None:
    """End TVM's session, whatever still refers to it. Raises one of LOST where the other end is gone."""
    # The name that TVM's module of a session has for it.
    session._sess["CloseRPCConnection"]()


def _no_server(name: str, seen: str, hint: str) -> DeviceError:
    return DeviceError(f"device {name}", expected="a TVM RPC server", seen=seen, hint=hint)


def reason(error: BaseException) -> str:
    """The line of a TVM error that says what happened: the last one that is no frame of a traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("  ")]
    return lines[-1][:200] if lines else type(error).__name__
