"""TVM's tracker, asked in its own protocol: TVM's client retries for a minute, whatever limit it is given.

Boards offer themselves to it by key, and it gives one to each client that asks. A greeting of four bytes goes both
ways; then each message is its length, an int32, and JSON. A board says a new key of its own with each offer, which the
tracker passes on to the one client that it gives the board to.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvmq.errors import DeviceError

# tvm/rpc/base.py: RPC_TRACKER_MAGIC and TrackerCode.
_MAGIC = struct.pack("<i", 0x2F271)
_SUCCESS, _PUT, _REQUEST, _UPDATE, _SUMMARY, _PENDING = 0, 3, 4, 5, 6, 7
# As the tracker's own limit.
_LONGEST = 1 << 20
# A board looks this often whether its offer stands, and makes another where a client took it and did not come.
TICK_S = 2.0
_PATIENCE_TICKS = 3
# The board serves nobody while it waits for its tracker.
_BOARD_TIMEOUT_S = 2.0


class Connection:
    """A connection to the tracker at host:port. timeout_s: of each answer. Raises OSError, DeviceError."""

    def __init__(self, host: str, port: int, timeout_s: float) -> None:
        self.name = f"tracker tracker://{host}:{port}"
        self._socket = socket.create_connection((host, port), timeout=timeout_s)
        self._socket.sendall(_MAGIC)
        if self._receive(len(_MAGIC)) != _MAGIC:
            self.close()
            raise DeviceError(self.name, expected="a tracker", seen="a server of something else")

    def ask(self, *message: object) -> Any:
        """The answer to a message. Raises OSError, DeviceError."""
        text = json.dumps(message).encode()
        self._socket.sendall(struct.pack("<i", len(text)) + text)
        (size,) = struct.unpack("<i", self._receive(4))
        if not 0 < size <= _LONGEST:
            raise DeviceError(self.name, expected="an answer", seen=f"one of {size} bytes")
        try:
            return json.loads(self._receive(size))
        except ValueError as error:
            raise DeviceError(self.name, expected="an answer in JSON", seen=str(error)) from error

    def close(self) -> None:
        """Leave the tracker; it forgets what was offered over this connection."""
        self._socket.close()

    def _receive(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            chunk = self._socket.recv(size - len(data))
            if not chunk:
                raise ConnectionResetError("connection reset")
            data += chunk
        return data


@dataclass(frozen=True)
class Tracker:
    """The tracker at an address, for a client. timeout_s: seconds to wait for each answer."""

    host: str
    port: int
    timeout_s: float

    @property
    def name(self) -> str:
        """What it is called in errors."""
        return f"tracker tracker://{self.host}:{self.port}"

    def keys(self) -> list[str]:
        """The key of each board that it knows, at work or not. Raises DeviceError."""
        summary = self._ask(_SUMMARY)
        return [str(server["key"]).removeprefix("server:") for server in summary["server_info"]]

    def board(self, key: str) -> tuple[str, int, str]:
        """Host and port of a free board of `key`, and the word that it lets in; waits for one. Raises DeviceError."""
        host, port, word = self._ask(_REQUEST, key, "", 1)
        return str(host), int(port), str(word)

    def _ask(self, *message: object) -> Any:
        # A connection of its own for each: a tracker's answers come in the order of boards, not of askers.
        try:
            with contextlib.closing(Connection(self.host, self.port, self.timeout_s)) as connection:
                code, answer = connection.ask(*message)
        except TimeoutError as late:
            raise DeviceError(self.name, expected="an answer", seen=f"none in {self.timeout_s:g} s") from late
        except OSError as error:
            hint = "is it running, and the port open?"
            raise DeviceError(self.name, expected="an answer", seen=str(error), hint=hint) from error
        if code != _SUCCESS:
            raise DeviceError(self.name, expected="an answer", seen=f"code {code}")
        return answer


class Registration:
    """A board's place at a tracker, kept by calling `keep` every TICK_S seconds. say: told what goes wrong.

    `own_key` is what the next client says; it changes with each offer.
    """

    def __init__(self, host: str, port: int, key: str, board_port: int, say: Callable[[str], None]) -> None:
        self._place, self._key, self._board_port, self._say = (host, port), key, board_port, say
        self._tracker: Connection | None = None
        self._offered = False
        self._taken_ticks = 0
        self._next = 0.0
        self.own_key = ""
        self.renew()

    def renew(self) -> None:
        """A new key of its own: the old one has been used. It is offered when `keep` finds the board free."""
        self.own_key, self._offered, self._next = f"{self._key}:{secrets.token_hex(8)}", False, 0.0

    @property
    def due_s(self) -> float:
        """Seconds until `keep` has something to do."""
        return max(self._next - time.monotonic(), 0.0)

    def keep(self, free: bool) -> None:
        """Connect where that is lost, and offer the board where it is free."""
        if self.due_s > 0:
            return
        self._next = time.monotonic() + TICK_S
        try:
            if self._tracker is None:
                self._register()
            assert self._tracker is not None
            if free and self._offered:
                self._look(self._tracker)
            if free and not self._offered:
                self._tracker.ask(_PUT, self._key, (self._board_port, self.own_key), None)
                self._offered, self._taken_ticks = True, 0
        except (OSError, DeviceError) as error:
            if self._tracker is not None:
                self._tracker.close()
            self._tracker, self._offered = None, False
            self._say(f"no tracker at {self._place[0]}:{self._place[1]}: {error}; trying on")

    def close(self) -> None:
        """Leave the tracker."""
        if self._tracker is not None:
            self._tracker.close()

    def _register(self) -> None:
        self._tracker = Connection(*self._place, _BOARD_TIMEOUT_S)
        self._tracker.ask(_UPDATE, {"key": f"server:{self._key}", "addr": (None, self._board_port)})

    def _look(self, tracker: Connection) -> None:
        """Take the offer back where a client took it and did not come."""
        self._taken_ticks = 0 if self.own_key in tracker.ask(_PENDING) else self._taken_ticks + 1
        if self._taken_ticks >= _PATIENCE_TICKS:
            self.renew()
            self._next = time.monotonic() + TICK_S
