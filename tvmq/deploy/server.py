"""The RPC server of `tvmq board serve`, for boards that have Python.

    accept -> greeting (all at once, none waits for another) -> queue -> session (one at a time) -> accept ...

Sessions are served one after the other, so that a measurement has the board for itself; each in a process and a folder
of its own, so that a crash of compiled code ends the session and not the server.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import selectors
import shutil
import signal
import socket
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tvmq.deploy.handshake import Gate, Greeting, Verdict, welcome
from tvmq.deploy.patience import Patience
from tvmq.deploy.tracker import Registration
from tvmq.errors import DeviceError

# A greeting is a few hundred bytes: this is for a line that loses packets.
GREETING_S = 5.0
# Greetings at a time, and clients that wait for their session; a new one takes the place of the oldest.
MOST_GUESTS = 32
# A client whose machine is off frees the board in a minute.
_PATIENCE = Patience()
NAME = "tvmq-board"
# Imported late: the server itself needs no TVM to greet, and to refuse.
_SESSION = "tvmq.deploy.board_session"


@dataclass
class _Guest:
    """A client before its session: what it has said, and what it is waited for."""

    connection: socket.socket
    peer: str
    greeting: Greeting
    deadline: float
    wanted: int = 0
    said: bytearray = field(default_factory=bytearray)
    verdict: Verdict | None = None


@dataclass
class _Running:
    """The session at work. ended: readable when its process is gone."""

    process: int
    peer: str
    folder: Path
    ended: int
    since: float


class Server:
    """A board's RPC server, which listens from now on. A context manager.

    port: 0 takes any free one. secret: None lets everybody in. say: is told a line of each session and each refusal.
    greeting_s: how long a client may take to greet. Raises DeviceError where it cannot listen.
    """

    def __init__(
        self,
        host: str,
        port: int,
        secret: bytes | None,
        say: Callable[[str], None],
        greeting_s: float = GREETING_S,
    ) -> None:
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            self._listener = socket.create_server((host, port), family=family, backlog=128)
        except OSError as error:
            raise DeviceError(f"cannot listen on {host}:{port}", seen=error.strerror or str(error)) from error
        self._listener.setblocking(False)
        self.host, self.port = host, int(self._listener.getsockname()[1])
        self._say, self._greeting_s = say, greeting_s
        self._gate = Gate(secret)
        self._guests: list[_Guest] = []
        self._waiting: deque[_Guest] = deque()
        self._running: _Running | None = None
        self._registration: Registration | None = None
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        # TVM would take half of the processors.
        os.environ.setdefault("TVM_NUM_THREADS", str(len(os.sched_getaffinity(0))))

    def register(self, host: str, port: int, key: str) -> None:
        """Offer the board at TVM's tracker at host:port under `key`: it serves those alone whom the tracker sends."""
        self._registration = Registration(host, port, key, self.port, self._say)

    @staticmethod
    def prepare() -> None:
        """Load TVM, which each session then has from the start."""
        importlib.import_module(_SESSION)

    def serve(self) -> None:
        """Serve until interrupted."""
        while True:
            self.turn()

    def turn(self, patience_s: float = 60.0) -> None:
        """Do what there is to do, or wait for that as long as `patience_s` seconds."""
        now = time.monotonic()
        timeout = min([patience_s, *(guest.deadline - now for guest in self._guests)])
        if self._registration is not None:
            self._registration.keep(free=self._running is None and not self._waiting)
            self._gate.key = self._registration.own_key
            timeout = min(timeout, self._registration.due_s)
        for key, _ in self._selector.select(max(timeout, 0.0)):
            key.data()
        for guest in [guest for guest in self._guests if guest.deadline <= time.monotonic()]:
            self._refuse(guest, f"no greeting in {self._greeting_s:g} s")
        while self._running is None and self._waiting:
            self._begin(self._waiting.popleft())

    def close(self) -> None:
        """End the session and all connections."""
        if self._registration is not None:
            self._registration.close()
        if self._running is not None:
            os.kill(self._running.process, signal.SIGKILL)
            self._end()
        for guest in [*self._guests, *self._waiting]:
            guest.connection.close()
        self._selector.close()
        self._listener.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- Greetings ----

    def _accept(self) -> None:
        try:
            connection, address = self._listener.accept()
        except OSError as error:  # it is gone already, or there are no more descriptors: then others must go first
            self._say(f"cannot accept: {error.strerror}")
            if self._guests:
                self._refuse(self._guests[0], "too many clients at once")
            return
        connection.setblocking(False)
        while len(self._guests) + len(self._waiting) >= MOST_GUESTS:
            self._refuse((self._guests or self._waiting)[0], "too many clients at once")
        deadline = time.monotonic() + self._greeting_s
        guest = _Guest(connection, f"{address[0]}:{address[1]}", self._gate.greet(), deadline)
        _, guest.wanted = next(guest.greeting)
        self._guests.append(guest)
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._listen(guest))

    def _listen(self, guest: _Guest) -> None:
        """Take what a guest says; never more than what it was asked for."""
        if guest.connection.fileno() < 0:  # it was refused since the selector spoke
            return
        try:
            data = guest.connection.recv(guest.wanted - len(guest.said))
            guest.said += data
            if guest.verdict is not None or not data:
                # A guest that waits for its session has nothing to say: it has gone, or is no client.
                self._refuse(guest, "it left" if not data else "it spoke before its turn")
            elif len(guest.said) == guest.wanted:
                self._answer(guest)
        except BlockingIOError:
            return
        except OSError as error:
            self._refuse(guest, error.strerror or str(error))

    def _answer(self, guest: _Guest) -> None:
        data, guest.said = bytes(guest.said), bytearray()
        try:
            reply, guest.wanted = guest.greeting.send(data)
        except StopIteration as ended:
            guest.verdict = ended.value
        else:
            guest.connection.sendall(reply)
            if guest.wanted:
                return
            return self._answer(guest)
        self._judge(guest, guest.verdict)
        return None

    def _judge(self, guest: _Guest, verdict: Verdict) -> None:
        guest.connection.sendall(verdict.reply)
        if verdict.refused:
            self._refuse(guest, verdict.refused)
        elif verdict.session:
            self._guests.remove(guest)
            self._waiting.append(guest)
            guest.wanted = 1
            self._renew()
        else:
            self._forget(guest)

    def _renew(self) -> None:
        if self._registration is not None:
            self._registration.renew()
            self._gate.key = self._registration.own_key

    def _refuse(self, guest: _Guest, why: str) -> None:
        self._say(f"{guest.peer} refused: {why}")
        self._forget(guest)

    def _forget(self, guest: _Guest) -> None:
        self._selector.unregister(guest.connection)
        guest.connection.close()
        (self._guests if guest in self._guests else self._waiting).remove(guest)

    # ---- Sessions ----

    def _begin(self, guest: _Guest) -> None:
        assert guest.verdict is not None
        self._selector.unregister(guest.connection)
        with guest.connection as connection, contextlib.ExitStack() as undo:
            try:
                connection.setblocking(True)
                _PATIENCE.apply(connection)
                folder = Path(tempfile.mkdtemp(prefix="tvmq-session-"))
                undo.callback(shutil.rmtree, folder, ignore_errors=True)
                connection.sendall(welcome(NAME))
                self._fork(guest, folder, guest.verdict.seconds)
                undo.pop_all()
            except OSError as error:  # no disk, no process, or a client that has left: the next may have more luck
                self._say(f"{guest.peer} refused: {error.strerror or error}")

    def _fork(self, guest: _Guest, folder: Path, seconds: float) -> None:
        session = importlib.import_module(_SESSION)
        ended, alive = os.pipe()
        server = os.getpid()
        process = os.fork()
        if process == 0:
            try:
                self._leave_all_but(guest.connection)
                session.run(guest.connection.fileno(), folder, seconds, server)
            finally:
                os._exit(1)
        # The session holds the other end until it ends, however it does.
        os.close(alive)
        self._running = _Running(process, guest.peer, folder, ended, time.monotonic())
        self._selector.register(ended, selectors.EVENT_READ, self._end)

    def _leave_all_but(self, connection: socket.socket) -> None:
        """In the session's process: what it inherited and has no business with."""
        self._selector.close()
        self._listener.close()
        if self._registration is not None:
            self._registration.close()
        for guest in [*self._guests, *self._waiting]:
            if guest.connection is not connection:
                guest.connection.close()

    def _end(self) -> None:
        running, self._running = self._running, None
        assert running is not None
        self._selector.unregister(running.ended)
        os.close(running.ended)
        _, status = os.waitpid(running.process, 0)
        shutil.rmtree(running.folder, ignore_errors=True)
        self._renew()
        how = ""
        if os.WIFSIGNALED(status):
            with contextlib.suppress(ValueError):
                how = f", ended by {signal.Signals(os.WTERMSIG(status)).name}"
        elif status != 0:
            how = ", ended by an error"
        self._say(f"{running.peer} session of {time.monotonic() - running.since:.1f} s{how}")
