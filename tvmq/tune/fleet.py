"""Boards that time candidates over TVM's RPC: one at an address, or all of one key at TVM's tracker, at once.

    rpc://HOST:PORT              one board
    tracker://HOST:PORT/KEY      every board that the tracker knows by KEY

A board that is lost is dropped, and its candidate given to another; one that loses two boards has failed itself.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from tvmq.deploy.address import CONNECT_TIMEOUT, Address, Tracked, parse
from tvmq.deploy.session import RemoteSession
from tvmq.errors import DeviceError, TuningError, TvmqError
from tvmq.tune import candidate
from tvmq.tune.candidate import Timing
from tvmq.tune.runners import Measured

# How many boards a candidate may lose.
_LOSSES = 2
# Seconds that a lost board has to come back: other boards wait for its candidate.
_REOPEN_S = 3.0
# Seconds between looks at boards that are silent.
_LOOK = 0.2


class Board(Protocol):
    """One device."""

    timing: Timing

    @property
    def name(self) -> str:
        """What it is called in errors and events."""

    def time(self, folder: Path) -> list[float]:
        """Seconds of a candidate. Raises TvmqError where that fails; then `alive` says whose fault it was."""

    def alive(self) -> bool:
        """Whether the device answers; opens it again where it was lost."""

    def close(self) -> None:
        """Let go of it."""


class RpcBoard:
    """A TVM RPC server at an address, given `timeout_s` seconds to answer.

    Raises DeviceError where it does not, TuningError where it is an emulated board: compile would take its records.
    """

    def __init__(self, name: str, address: Address, timing: Timing, timeout_s: float) -> None:
        self.name, self._address, self.timing = name, address, timing
        self.session: RemoteSession | None = RemoteSession(address, timeout_s, name)
        if self.session.emulated:
            self.close()
            expected, hint = "a board that is no emulation: such times mean nothing", "tune on the board itself"
            raise TuningError(f"device {name}", expected=expected, seen="an emulated board", hint=hint)

    def time(self, folder: Path) -> list[float]:
        """See `Board`."""
        if self.session is None:
            raise DeviceError(f"device {self.name}", expected="an answer", seen="none")
        session, name = self.session, f"{folder.name}.so"
        session.configure_threads(self.timing.threads)
        session.call(lambda: session.remote.upload(str(folder / candidate.LIBRARY), name))
        library = session.call(lambda: session.remote.load_module(name))
        try:
            return candidate.run(folder, session, library, self.timing)
        finally:
            session.call(lambda: session.remote.remove(name))

    def alive(self) -> bool:
        """See `Board`."""
        try:
            self.close()
            self.session = RemoteSession(self._address, _REOPEN_S, self.name)
        except TvmqError:
            return False
        return True

    def close(self) -> None:
        """The server is free for others then."""
        session, self.session = self.session, None
        if session is not None:
            session.close()


def boards(device: str, timing: Timing, timeout_s: float = CONNECT_TIMEOUT) -> list[Board]:
    """The boards at an address. Raises DeviceError where there is none, TuningError where they are emulated."""
    address = parse(device)
    if not isinstance(address, Tracked):
        return [RpcBoard(address.name, address, timing, timeout_s)]
    count = address.count(timeout_s)
    return [RpcBoard(f"{address.key}#{index}", address, timing, timeout_s) for index in range(count)]


@dataclass
class _Seat:
    """A board at work: on which candidate, and since when."""

    board: Board
    job: int | None = None
    since: float = 0.0
    lost: bool = False


@dataclass
class Fleet:
    """Boards that time candidates at once; `dropped` names those that were lost. timeout_s: of one candidate."""

    boards: Sequence[Board]
    timeout_s: float
    clock: Callable[[], float] = time.monotonic
    dropped: list[str] = field(default_factory=list)
    remote = True

    def __post_init__(self) -> None:
        self._seats = [_Seat(board) for board in self.boards]
        # Of the seats, and of a round's end: a candidate is one board's at a time, and its result is told once.
        self._lock = threading.Lock()

    @property
    def timing(self) -> Timing:
        """How its boards time."""
        return self.boards[0].timing

    @timing.setter
    def timing(self, timing: Timing) -> None:
        for board in self.boards:
            board.timing = timing

    @property
    def width(self) -> int:
        """How many boards are left."""
        return sum(not seat.lost for seat in self._seats)

    def time(self, folders: Sequence[Path]) -> Iterator[tuple[int, Measured]]:
        """See `Runner`. Raises DeviceError where the last board is lost."""
        round_ = _Round(folders)
        for seat in self._seats:
            if not seat.lost:
                threading.Thread(target=self._work, args=(seat, round_), daemon=True, name=seat.board.name).start()
        try:
            for _ in folders:
                yield self._next(round_)
        finally:
            with self._lock:
                round_.closed.set()
            # Each finishes what it is at, as long as it is given time for that.
            while any(seat.job is not None and not self._late(seat) for seat in self._seats):
                time.sleep(_LOOK / 10)
            self._drop_late(round_)

    def close(self) -> None:
        """Let go of the boards."""
        for seat in self._seats:
            seat.board.close()

    def _next(self, round_: _Round) -> tuple[int, Measured]:
        while True:
            try:
                return round_.done.get(timeout=_LOOK)
            except queue.Empty:
                self._drop_late(round_)
                if self.width == 0 and round_.done.empty():
                    names = ", ".join(self.dropped)
                    raise DeviceError(f"devices {names}", expected="an answer", seen="none: all are lost") from None

    def _drop_late(self, round_: _Round) -> None:
        for seat in self._seats:
            if seat.job is not None and self._late(seat):
                self._drop(seat, round_, f"no answer in {self.timeout_s:g} s")

    def _late(self, seat: _Seat) -> bool:
        return seat.lost or self.clock() - seat.since > self.timeout_s

    def _work(self, seat: _Seat, round_: _Round) -> None:
        """One board: candidate after candidate, until there are none, or the board is lost."""
        while not seat.lost and not round_.closed.is_set():
            job = self._begin(seat, round_)
            if job is None:
                # Another board may be lost yet, and its candidate come back.
                round_.closed.wait(_LOOK / 10)
                continue
            try:
                result = Measured(tuple(seat.board.time(round_.folders[job])), "", seat.board.name)
            except TvmqError as error:
                if not seat.board.alive():
                    self._drop(seat, round_, str(error))
                    return
                result = Measured((), str(error), seat.board.name)
            self._end(seat, round_, job, result)

    def _begin(self, seat: _Seat, round_: _Round) -> int | None:
        """The next candidate, which is the board's from now on."""
        with self._lock:
            if seat.lost or round_.closed.is_set():
                return None
            # In this order: a seat with a candidate is late by its `since`.
            seat.since = self.clock()
            seat.job = round_.take()
            return seat.job

    def _end(self, seat: _Seat, round_: _Round, job: int, result: Measured) -> None:
        """Tell a result, unless it comes too late: its candidate is another board's then."""
        with self._lock:
            if not seat.lost:
                seat.job = None
                round_.done.put((job, result))

    def _drop(self, seat: _Seat, round_: _Round, why: str) -> None:
        """A board is lost, once: it gets no more candidates, and another board gets its."""
        with self._lock:
            if seat.lost:
                return
            job, seat.job, seat.lost = seat.job, None, True
            self.dropped.append(seat.board.name)
            if job is not None:
                round_.give_back(job, seat.board.name, why)


class _Round:
    """The candidates of one call of `Fleet.time`, whose lock is held while they are given out and taken back."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = folders
        self.done: queue.SimpleQueue[tuple[int, Measured]] = queue.SimpleQueue()
        self.closed = threading.Event()
        self._waiting = deque(range(len(folders)))
        self._losses = [0] * len(folders)

    def take(self) -> int | None:
        """The next candidate."""
        return self._waiting.popleft() if self._waiting else None

    def give_back(self, job: int, board: str, why: str) -> None:
        """A candidate whose board was lost: another try, or a failure."""
        self._losses[job] += 1
        if self._losses[job] < _LOSSES:
            self._waiting.appendleft(job)
        else:
            self.done.put((job, Measured((), f"lost {_LOSSES} boards: {why}", board)))
