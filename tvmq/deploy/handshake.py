"""Who may speak TVM's RPC to a board: a challenge before it, answered by those who know the secret.

A board without a secret greets as TVM's own servers do. One with a secret takes two connections; S and C are 32 random
bytes of server and client, K the key that a tracker gave (empty without one), and

    mac(role) = HMAC-SHA256(secret, role + S + C + K)

    client -> server  "tvmq" C                  first connection
    server -> client  S
    client -> server  mac("client")             compared in constant time; nothing else is ever read before it
    server -> client  mac("server")             so the client knows with whom it speaks
    client -> server  TVM's greeting, its key "client:" and mac("ticket") in hexadecimal      second connection

The secret never travels, a ticket is good for one session, and TVM's client opens that session by itself. What follows
is TVM's protocol, in the clear: the secret keeps strangers out, it hides nothing from those who tap the line.
"""

from __future__ import annotations

import hmac
import os
import socket
import struct
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field

from tvmq.errors import DeviceError

MAGIC = b"tvmq"
# tvm/rpc/base.py: RPC_MAGIC, and the code for a key that no server has.
TVM_MAGIC = struct.pack("<i", 0xFF271)
TVM_MISMATCH = struct.pack("<i", 0xFF271 + 2)
NONCE = PROOF = 32
# "client:" and a ticket.
TICKET_KEY = 7 + 2 * PROOF
# A key is a device name and a few options; a longer one is no TVM client.
LONGEST_KEY = 1023
# Seconds between the answer to a challenge and the session, and how many may be open.
TICKET_S = 10.0
MOST_TICKETS = 64


def mac(secret: bytes, role: bytes, server: bytes, client: bytes, key: str) -> bytes:
    """32 bytes that prove knowledge of the secret. role: b"client", b"server" or b"ticket"; server, client: nonces."""
    return hmac.digest(secret, role + server + client + key.encode(), "sha256")


@dataclass(frozen=True)
class Verdict:
    """What became of a greeting: `reply` is to be sent at the end. refused: why, "" where it was not.

    session: whether TVM's protocol follows on this connection, for at most `seconds` (0: without limit).
    """

    reply: bytes = b""
    refused: str = ""
    session: bool = False
    seconds: float = 0.0


# Yields what to send, and how many bytes to read then; is sent those bytes.
Greeting = Generator[tuple[bytes, int], bytes, Verdict]


@dataclass
class Gate:
    """The server's side. secret: None lets everybody in. key: what a tracker told its client to say; None without."""

    secret: bytes | None = None
    key: str | None = None
    clock: Callable[[], float] = time.monotonic
    _tickets: dict[bytes, float] = field(default_factory=dict)

    def greet(self) -> Greeting:
        """The greeting of one connection."""
        magic = yield b"", len(MAGIC)
        if magic == MAGIC and self.secret is not None:
            return (yield from self._challenge(self.secret))
        if magic == TVM_MAGIC:
            return (yield from self._tvm())
        return Verdict(refused="a secret, and this board has none" if magic == MAGIC else "no client of tvmq or TVM")

    def _challenge(self, secret: bytes) -> Greeting:
        client = yield b"", NONCE
        server, key = os.urandom(NONCE), self.key or ""
        proof = yield server, PROOF
        if not hmac.compare_digest(proof, mac(secret, b"client", server, client, key)):
            return Verdict(refused="a wrong secret")
        now = self.clock()
        self._tickets = {ticket: end for ticket, end in self._tickets.items() if end > now}
        if len(self._tickets) >= MOST_TICKETS:
            return Verdict(refused="too many clients at once")
        self._tickets[mac(secret, b"ticket", server, client, key)] = now + TICKET_S
        return Verdict(reply=mac(secret, b"server", server, client, key))

    def _tvm(self) -> Greeting:
        length = int.from_bytes((yield b"", 4), "little")
        if self.secret is not None and length != TICKET_KEY:
            return Verdict(TVM_MISMATCH, "no secret")
        if length > LONGEST_KEY:
            return Verdict(refused="no client of tvmq or TVM")
        words = (yield b"", length).split() or [b""]
        kind, _, name = words[0].partition(b":")
        if kind != b"client":
            return Verdict(TVM_MISMATCH, "no client of tvmq or TVM")
        if self.secret is not None and not self._redeem(name):
            return Verdict(TVM_MISMATCH, "a wrong ticket")
        if self.secret is None and self.key is not None and not hmac.compare_digest(name, self.key.encode()):
            return Verdict(TVM_MISMATCH, "another key than the tracker's")
        return Verdict(session=True, seconds=_seconds(words[1:]))

    def _redeem(self, name: bytes) -> bool:
        """Whether `name` is an open ticket, which it is no more then."""
        found = [ticket for ticket in self._tickets if hmac.compare_digest(ticket.hex().encode(), name)]
        return any(self._tickets.pop(ticket) > self.clock() for ticket in found)


def _seconds(options: list[bytes]) -> float:
    """A TVM client's "-timeout=SECONDS"; 0 where there is none."""
    for option in options:
        name, _, value = option.partition(b"=")
        if name == b"-timeout" and value.replace(b".", b"", 1).isdigit():
            return float(value)
    return 0.0


def welcome(name: str) -> bytes:
    """What TVM's client waits for before its session begins. name: of the board."""
    text = f"server:{name}".encode()
    return TVM_MAGIC + struct.pack("<i", len(text)) + text


def ticket(host: str, port: int, secret: bytes, key: str = "", timeout_s: float = 10.0) -> str:
    """The client's side: what TVM's client says as its key to the board at host:port. Raises OSError, DeviceError."""
    name, client = f"device rpc://{host}:{port}", os.urandom(NONCE)
    with socket.create_connection((host, port), timeout=timeout_s) as connection:
        deadline = time.monotonic() + timeout_s
        connection.sendall(MAGIC + client)
        server = _receive(connection, NONCE, deadline)
        if len(server) < NONCE:
            hint = "?secret=none after the address speaks to TVM's own servers and to boards without one"
            raise DeviceError(name, expected="a board with a secret", seen="none", hint=hint)
        connection.sendall(mac(secret, b"client", server, client, key))
        proof = _receive(connection, PROOF, deadline)
    if not hmac.compare_digest(proof, mac(secret, b"server", server, client, key)):
        seen = "another" if not proof else "a wrong answer"
        raise DeviceError(name, expected="a board with this secret", seen=seen, hint="is its file the board's?")
    return mac(secret, b"ticket", server, client, key).hex()


def _receive(connection: socket.socket, size: int, deadline: float) -> bytes:
    """`size` bytes; fewer where the other end closes. Raises TimeoutError."""
    data = b""
    while len(data) < size:
        connection.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            chunk = connection.recv(size - len(data))
        except ConnectionResetError:
            chunk = b""
        if not chunk:
            break
        data += chunk
    return data
