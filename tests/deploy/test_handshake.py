"""The handshake as a pure protocol: who gets in, and what is read of those who do not."""

from __future__ import annotations

import os
import random
import struct

import pytest

from tvmq.deploy import handshake
from tvmq.deploy.handshake import MAGIC, TVM_MAGIC, TVM_MISMATCH, Gate, Verdict, mac

SECRET = b"0123456789abcdef0123456789abcdef"
CLIENT = bytes(range(32))


def greet(gate: Gate, *said: bytes) -> tuple[list[bytes], Verdict | None, int]:
    """Replies, the verdict (None: it waits for more) and how many bytes were read."""
    greeting, stream, replies, read = gate.greet(), b"".join(said), [], 0
    reply, wanted = next(greeting)
    while True:
        if len(stream) - read < wanted:
            return replies, None, read
        data, read = stream[read : read + wanted], read + wanted
        try:
            reply, wanted = greeting.send(data)
            replies.append(reply)
        except StopIteration as ended:
            return replies, ended.value, read


def ticket_of(gate: Gate, secret: bytes = SECRET, key: str = "") -> tuple[bytes | None, Verdict]:
    greeting = gate.greet()
    next(greeting)
    greeting.send(MAGIC)
    server, wanted = greeting.send(CLIENT)
    assert (len(server), wanted) == (32, 32)
    with pytest.raises(StopIteration) as ended:
        greeting.send(mac(secret, b"client", server, CLIENT, key))
    verdict = ended.value.value
    if not verdict.refused:
        assert verdict.reply == mac(secret, b"server", server, CLIENT, key)
    return mac(secret, b"ticket", server, CLIENT, key).hex().encode(), verdict


def tvm(key: bytes) -> bytes:
    return TVM_MAGIC + struct.pack("<i", len(key)) + key


def test_the_secret_opens_one_session():
    gate = Gate(SECRET)
    ticket, verdict = ticket_of(gate)
    assert (verdict.refused, verdict.session) == ("", False)
    _, verdict, _ = greet(gate, tvm(b"client:" + ticket))
    assert verdict.session
    # A ticket that somebody else has seen is of no use.
    _, verdict, _ = greet(gate, tvm(b"client:" + ticket))
    assert (verdict.refused, verdict.reply, verdict.session) == ("a wrong ticket", TVM_MISMATCH, False)


def test_tickets_run_out_and_are_few():
    now = [0.0]
    gate = Gate(SECRET, clock=lambda: now[0])
    ticket, _ = ticket_of(gate)
    now[0] = handshake.TICKET_S + 1
    assert greet(gate, tvm(b"client:" + ticket))[1].refused == "a wrong ticket"
    for _ in range(handshake.MOST_TICKETS):
        assert not ticket_of(gate)[1].refused
    assert ticket_of(gate)[1].refused == "too many clients at once"
    now[0] *= 2
    assert not ticket_of(gate)[1].refused


@pytest.mark.parametrize("other", [SECRET[:-1] + b"e", b"", SECRET + b"0"])
def test_another_secret_opens_nothing(other):
    gate = Gate(SECRET)
    ticket, verdict = ticket_of(gate, other)
    assert (verdict.refused, verdict.reply) == ("a wrong secret", b"")
    assert greet(gate, tvm(b"client:" + ticket))[1].refused == "a wrong ticket"


def test_an_answer_to_another_challenge_is_none():
    gate = Gate(SECRET)
    answer = mac(SECRET, b"client", bytes(32), CLIENT, "")
    assert greet(gate, MAGIC, CLIENT, answer)[1].refused == "a wrong secret"


def test_what_the_server_proves_is_no_proof_of_a_client():
    """A client's answer cannot be had from the server itself."""
    one, two = os.urandom(32), os.urandom(32)
    assert len({mac(SECRET, role, one, two, "") for role in (b"client", b"server", b"ticket")}) == 3


def test_without_a_secret_nothing_is_read_of_a_tvm_client_but_its_length():
    _, verdict, read = greet(Gate(SECRET), tvm(b"client:" + bytes(500)))
    assert (verdict.refused, verdict.reply, read) == ("no secret", TVM_MISMATCH, 8)


def test_a_board_without_a_secret_says_so():
    assert greet(Gate(), MAGIC, CLIENT)[1].refused == "a secret, and this board has none"


@pytest.mark.parametrize(
    ("key", "refused", "seconds"),
    [
        (b"client:", "", 0.0),
        (b"client:anything", "", 0.0),
        (b"client: -timeout=2.5", "", 2.5),
        (b"client: -timeout=x", "", 0.0),
        (b"server:a", "no client of tvmq or TVM", 0.0),
        (b"", "no client of tvmq or TVM", 0.0),
        (b" ", "no client of tvmq or TVM", 0.0),
        (b"\xff" * 9, "no client of tvmq or TVM", 0.0),
    ],
)
def test_clients_of_tvm(key, refused, seconds):
    _, verdict, _ = greet(Gate(), tvm(key))
    assert (verdict.refused, verdict.seconds, verdict.session) == (refused, seconds, not refused)


@pytest.mark.parametrize("length", [-1, 1024, 2**31 - 1])
def test_a_length_that_no_client_has(length):
    _, verdict, read = greet(Gate(), TVM_MAGIC + struct.pack("<i", length) + bytes(2000))
    assert (verdict.refused, read) == ("no client of tvmq or TVM", 8)


def test_the_key_of_a_tracker_is_asked_for_too():
    gate = Gate(key="pi:1")
    assert greet(gate, tvm(b"client:pi:1"))[1].session
    assert greet(gate, tvm(b"client:pi:2"))[1].refused == "another key than the tracker's"
    gate = Gate(SECRET, key="pi:1")
    assert not ticket_of(gate, key="pi:1")[1].refused
    assert ticket_of(gate, key="pi:2")[1].refused == "a wrong secret"


@pytest.mark.parametrize("secret", [None, SECRET])
def test_noise_opens_nothing_and_reads_little(secret):
    noise, gate = random.Random(0), Gate(secret)
    beginnings = (
        b"",
        MAGIC,
        TVM_MAGIC,
        TVM_MAGIC + struct.pack("<i", 71),
        TVM_MAGIC + struct.pack("<i", 71) + b"client:",
    )
    for _ in range(20_000):
        said = noise.choice(beginnings if secret else beginnings[:3]) + noise.randbytes(noise.randrange(1200))
        _, verdict, read = greet(gate, said)
        assert read <= 8 + handshake.LONGEST_KEY
        assert verdict is None or (verdict.refused and not verdict.session)
