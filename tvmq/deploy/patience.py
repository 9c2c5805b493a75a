"""How long one end of a connection waits for the other that has gone without a word: power lost, cable pulled.

A board that computes answers the probes of TCP all the same: its system does. TVM's client has no setting for them, so
its connection is looked up among this process's.
"""

from __future__ import annotations

import contextlib
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Patience:
    """idle_s: silence before the first probe. interval_s: between probes. probes: unanswered ones that end it.

    sent_s: how long what was sent may stay unread; 0: as long as the probes allow.
    """

    idle_s: int = 30
    interval_s: int = 10
    probes: int = 3
    sent_s: float = 0.0

    def apply(self, connection: socket.socket) -> None:
        """End `connection` with an error when it is over."""
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (
            (socket.TCP_KEEPIDLE, self.idle_s),
            (socket.TCP_KEEPINTVL, self.interval_s),
            (socket.TCP_KEEPCNT, self.probes),
            (socket.TCP_USER_TIMEOUT, round(1000 * self.sent_s)),
        ):
            connection.setsockopt(socket.IPPROTO_TCP, option, value)


# Of clients: a minute from the last word, whether they wait for the board or send to it.
CLIENT = Patience(sent_s=60.0)


def limit(host: str, port: int, patience: Patience = CLIENT) -> int:
    """Apply `patience` to this process's connections to host:port; returns how many there are. Linux only."""
    places = {info[4][:2] for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    return sum(_limit(number, places, patience) for number in _descriptors())


def _limit(number: int, places: set[Any], patience: Patience) -> bool:
    # It may be a file, closed by another thread meanwhile, or not connected.
    with contextlib.suppress(OSError):
        blocks = os.get_blocking(number)
        connection = socket.socket(fileno=number)
        try:
            if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.getpeername()[:2] in places:
                patience.apply(connection)
                return True
        finally:
            connection.detach()
            # Python's default time limit would have changed that.
            os.set_blocking(number, blocks)
    return False


def _descriptors() -> list[int]:
    try:
        return [int(path.name) for path in Path("/proc/self/fd").iterdir()]
    except OSError:  # no Linux
        return []
