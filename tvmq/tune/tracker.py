"""TVM's RPC tracker, asked in its own protocol: TVM's client retries for a minute, whatever limit it is given.

A greeting of four bytes goes both ways; then each message is its length, an int32, and JSON.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm.rpc.base import RPC_TRACKER_MAGIC, TrackerCode, recvall, recvjson, sendjson

from tvmq.errors import DeviceError

_GREETING = struct.pack("<i", RPC_TRACKER_MAGIC)


@dataclass(frozen=True)
class Tracker:
    """The tracker at an address. timeout_s: seconds to wait for each answer."""

    host: str
    port: int
    timeout_s: float

    @property
    def name(self) -> str:
        """What it is called in errors."""
        return f"tracker tracker://{self.host}:{self.port}"

    def keys(self) -> list[str]:
        """The key of each board that it knows. Raises DeviceError."""
        summary = self._ask([TrackerCode.SUMMARY])
        return [str(server["key"]).removeprefix("server:") for server in summary["server_info"]]

    def board(self, key: str) -> tuple[str, int, str]:
        """Host and port of a free board of `key`, and the word that it lets in. Raises DeviceError."""
        host, port, word = self._ask([TrackerCode.REQUEST, key, "", 1])
        return str(host), int(port), str(word)

    def _ask(self, message: Sequence[Any]) -> Any:
        # A connection of its own for each: a tracker's answers come in the order of boards, not of askers.
        try:
            with socket.create_connection((self.host, self.port), self.timeout_s) as link:
                link.sendall(_GREETING)
                if recvall(link, len(_GREETING)) != _GREETING:
                    raise DeviceError(self.name, expected="a tracker", seen="a server of something else")
                sendjson(link, message)
                code, answer = recvjson(link)
        except TimeoutError as late:
            raise DeviceError(self.name, expected="an answer", seen=f"none in {self.timeout_s:g} s") from late
        except OSError as error:
            hint = "is it running, and the port open?"
            raise DeviceError(self.name, expected="an answer", seen=str(error), hint=hint) from error
        if code != TrackerCode.SUCCESS:
            raise DeviceError(self.name, expected="an answer", seen=f"code {code}")
        return answer
