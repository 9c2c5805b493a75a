"""Boards at work together: all of them, none lost without its candidate tried again, clear words."""

from __future__ import annotations

import functools
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import conv, integers, module_of, weights
from servers import Farm
from serving import closed_port
from tvm.rpc.base import RPC_TRACKER_MAGIC
from waiting import PATIENCE_S, is_alive, wait_until

from tvmq.deploy.tracker import Tracker
from tvmq.errors import DeviceError
from tvmq.kernels.lower import lower
from tvmq.target import load_target
from tvmq.tune import candidate
from tvmq.tune.candidate import Timing
from tvmq.tune.fleet import Fleet, RpcBoard, boards

JOBS = [Path(str(index)) for index in range(12)]


class Fake:
    """A board that is lost at its `last` candidate, which it keeps for itself where it `hangs`.

    after: what must have happened before it ends its first one; an event, or a barrier.
    """

    def __init__(
        self,
        name: str,
        last: int | None = None,
        hangs: bool = False,
        after: threading.Event | threading.Barrier | None = None,
    ) -> None:
        self.name, self.last, self.hangs, self.after = name, last, hangs, after
        self.did: list[str] = []
        self.at_last, self.closed = threading.Event(), threading.Event()

    def time(self, folder: Path) -> list[float]:
        if self.last is not None and len(self.did) >= self.last:
            self.at_last.set()
            if self.hangs:
                self.closed.wait()
            raise DeviceError(f"device {self.name}", seen="gone")
        if self.after is not None and not self.did:
            self.after.wait()
        if folder.name == "broken":
            raise DeviceError("candidate", seen="a crash")
        self.did.append(folder.name)
        return [float(folder.name)]

    def alive(self) -> bool:
        return self.last is None or len(self.did) < self.last

    def close(self) -> None:
        self.closed.set()


def running_threads(name: str) -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == name}


def results(fleet: Fleet, jobs=JOBS) -> dict[int, float]:
    return {index: measured.seconds[0] for index, measured in fleet.time(jobs) if measured.seconds}


def test_every_board_works_and_every_candidate_is_timed():
    # Each has a candidate before one of them has two.
    together = threading.Barrier(3)
    some = [Fake(f"b{i}", after=together) for i in range(3)]
    assert results(Fleet(some, PATIENCE_S)) == {index: float(index) for index in range(12)}
    assert all(board.did for board in some)


def test_a_lost_board_is_dropped_and_its_candidate_is_timed_elsewhere():
    lost = Fake("b", last=1)
    fleet = Fleet([Fake("a", after=lost.at_last), lost, Fake("c", after=lost.at_last)], PATIENCE_S)
    assert len(results(fleet)) == 12
    assert (fleet.dropped, fleet.width) == (["b"], 2)
    assert len(results(fleet)) == 12
    assert len(lost.did) == 1


def test_a_silent_board_is_lost_too():
    silent, now = Fake("silent", last=0, hangs=True), [0.0]
    fleet = Fleet([Fake("a", after=silent.at_last), silent], 8.0, lambda: now[0])
    found = {}
    for index, measured in fleet.time(JOBS):
        found[index] = measured.place
        # Only the silent board's candidate is left.
        now[0] = 9.0 if len(found) == 11 else now[0]
    assert set(found.values()) == {"a"} and len(found) == 12
    assert fleet.dropped == ["silent"]
    silent.close()


def test_a_board_that_was_given_up_is_lost_once():
    silent = Fake("silent", last=0, hangs=True)
    fleet = Fleet([silent], 8.0, lambda: 9.0 if silent.at_last.is_set() else 0.0)
    with pytest.raises(DeviceError, match="devices silent: expected an answer, saw none: all are lost"):
        list(fleet.time(JOBS))
    silent.close()
    wait_until(lambda: not running_threads("silent"))
    assert fleet.dropped == ["silent"]


def test_a_candidate_that_fails_is_no_loss_of_a_board():
    fleet = Fleet([Fake("a")], PATIENCE_S)
    found = dict(fleet.time([Path("1"), Path("broken"), Path("2")]))
    assert found[1].seconds == () and "a crash" in found[1].error
    assert not fleet.dropped


def test_a_candidate_that_loses_boards_is_given_up():
    class Fragile(Fake):
        lost = False

        def time(self, folder: Path) -> list[float]:
            self.lost = self.lost or folder.name == "0"
            if self.lost:
                raise DeviceError(f"device {self.name}", seen="gone")
            return [1.0]

        def alive(self) -> bool:
            return not self.lost

    fleet = Fleet([Fragile("a"), Fragile("b"), Fragile("c")], PATIENCE_S)
    found = dict(fleet.time(JOBS))
    assert "lost 2 boards" in found[0].error
    assert fleet.width == 1
    assert sum(bool(measured.seconds) for measured in found.values()) == 11


def test_without_a_board_left():
    fleet = Fleet([Fake("a", last=2), Fake("b", last=2)], PATIENCE_S)
    with pytest.raises(DeviceError, match="expected an answer, saw none: all are lost"):
        list(fleet.time(JOBS))


def test_closing_leaves_the_rest_undone():
    board, now = Fake("a", last=1, hangs=True), [0.0]
    fleet = Fleet([board], 8.0, lambda: now[0])
    times = fleet.time(JOBS)
    next(times)
    board.at_last.wait()
    # It has been at its second candidate for too long to be waited for.
    now[0] = 9.0
    times.close()
    board.close()
    wait_until(lambda: not running_threads("a"))
    assert (board.did, fleet.dropped) == (["0"], ["a"])


# --- TVM's own servers ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def farm() -> Iterator[Farm]:
    found = Farm()
    yield found
    found.close()


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A port at which nobody answers."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        yield found


def boards_once_there(farm: Farm, key: str, count: int) -> list:
    """The boards, once the tracker knows them all; asking for them earlier would take those that there are."""
    tracker = Tracker("127.0.0.1", farm.tracker.port, PATIENCE_S)
    wait_until(lambda: tracker.keys().count(key) == count)
    return boards(f"tracker://127.0.0.1:{farm.tracker.port}/{key}", Timing(1, repeat=2), PATIENCE_S)


def each_gets_one(some: list[RpcBoard], monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on: no board has a second candidate before all have had one."""
    together, had = threading.Barrier(len(some)), set()

    def time(board: RpcBoard, folder: Path) -> list[float]:
        if board.name not in had:
            had.add(board.name)
            together.wait()
        return RpcBoard.time(board, folder)

    for board in some:
        monkeypatch.setattr(board, "time", functools.partial(time, board))


def test_boards_of_a_tracker_time_real_candidates_and_one_dies(farm, tmp_path, monkeypatch):
    first, _ = farm.add("pi"), farm.add("pi")
    target = load_target("host")
    case = conv("c", integers((1, 6, 6, 16), "uint8"), weights((32, 3, 3, 16)), zero_point=3)
    (choice,) = lower(module_of([case]), target).choices.values()
    folder = candidate.build(choice.task, choice.decision, target, tmp_path)
    fleet = Fleet(boards_once_there(farm, "pi", 2), PATIENCE_S)
    try:
        each_gets_one(fleet.boards, monkeypatch)
        found = [measured for _, measured in fleet.time([folder] * 4)]
        assert all(len(measured.seconds) == 2 and min(measured.seconds) > 0 for measured in found), found
        assert {measured.place for measured in found} == {"pi#0", "pi#1"}
        first.kill()
        each_gets_one(fleet.boards, monkeypatch)
        found = [measured for _, measured in fleet.time([folder] * 4)]
        assert all(measured.seconds for measured in found), found
        assert len(fleet.dropped) == 1
    finally:
        fleet.close()


def test_a_key_without_boards(farm):
    with pytest.raises(DeviceError, match=r"tracker tracker://127.0.0.1:\d+: expected boards of the key 'none'"):
        boards(f"tracker://127.0.0.1:{farm.tracker.port}/none", Timing(1))


def test_no_tracker_at_the_address():
    before = running_threads("tvmq-connect")
    with closed_port() as port:
        expected = f"tracker tracker://127.0.0.1:{port}: expected an answer, saw .* refused"
        with pytest.raises(DeviceError, match=expected):
            boards(f"tracker://127.0.0.1:{port}/pi", Timing(1))
    assert running_threads("tvmq-connect") <= before


def test_a_silent_tracker(listener):
    port = listener.getsockname()[1]
    with pytest.raises(DeviceError, match="expected an answer, saw none in 0.2 s"):
        boards(f"tracker://127.0.0.1:{port}/pi", Timing(1), timeout_s=0.2)


@pytest.mark.parametrize(
    ("said", "seen"),
    [
        (b"HTTP", "expected a tracker, saw a server of something else"),
        (b"", "saw connection reset"),
        (struct.pack("<ii7s", RPC_TRACKER_MAGIC, 7, b"[-1, 0]"), "saw code -1"),
    ],
)
def test_what_answers_is_no_tracker(listener, said, seen):
    def answer() -> None:
        link, _ = listener.accept()
        with link:
            link.recv(4)
            link.sendall(said)
            link.shutdown(socket.SHUT_WR)
            link.recv(100)

    thread = threading.Thread(target=answer)
    thread.start()
    with pytest.raises(DeviceError, match=seen):
        Tracker("127.0.0.1", listener.getsockname()[1], 9.0).keys()
    thread.join()


def test_servers_end_with_the_process_that_started_them(tmp_path):
    """Also where that is killed, and so has no time to end them."""
    program = "from servers import *; farm = Farm(); print(farm.tracker.process.pid, flush=True); input()"
    words = [sys.executable, "-c", program]
    with subprocess.Popen(words, stdin=-1, stdout=-1, cwd=Path(__file__).parent) as parent:
        tracker = int(parent.stdout.readline())
        assert Path(f"/proc/{tracker}").exists()
        parent.kill()
    wait_until(lambda: not is_alive(tracker))


@pytest.mark.parametrize("device", ["tracker://h:1", "tracker://h/k", "tracker://h:99999/k", "ssh://-h", "host"])
def test_addresses_that_are_none(device):
    with pytest.raises(
        DeviceError,
        match=r"expected (tracker://HOST:PORT/KEY|ssh://HOST, ssh://USER@HOST or|host, rpc://HOST:PORT, tracker)",
    ):
        boards(device, Timing(1))
