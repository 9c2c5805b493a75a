"""`tvmq board serve --tracker`: boards of a fleet, with a secret, at TVM's own tracker."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tvm
from servers import ALONE, Farm, Server
from serving import NativeServing, Serve, Serving, compile_runner, secret_file
from tvm.tirx.script.builder import ir as T
from waiting import PATIENCE_S, wait_until

from tvmq.cli import main
from tvmq.deploy.crosslink import linker
from tvmq.deploy.executor import load
from tvmq.deploy.session import connect
from tvmq.deploy.tracker import Tracker
from tvmq.errors import DeviceError, TuningError
from tvmq.kernels import builder
from tvmq.target import load_target
from tvmq.tune import candidate
from tvmq.tune.candidate import Timing
from tvmq.tune.fleet import Fleet, boards


@pytest.fixture(scope="module")
def farm() -> Iterator[Farm]:
    found = Farm()
    yield found
    found.close()


@pytest.fixture(scope="module", params=["python", "native"])
def serve(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Serve:
    """A board's server: `tvmq board serve`, or the native runner."""
    if request.param == "python":
        return Serving
    return functools.partial(NativeServing, compile_runner(tmp_path_factory.mktemp("runner")))


def registered(farm: Farm, key: str, *words: str, count: int = 1, serve: Serve = Serving) -> Serving:
    """Another board of `key`, once the tracker knows `count` of them."""
    serving = serve("--tracker", f"127.0.0.1:{farm.tracker.port}", "--key", key, *words)
    wait_until(lambda: Tracker("127.0.0.1", farm.tracker.port, PATIENCE_S).keys().count(key) == count)
    return serving


def test_an_emulated_board_is_not_tuned_on(serve: Serve) -> None:
    if serve is Serving:
        pytest.skip("a board with Python is never emulated")
    with serve("--emulated") as serving, pytest.raises(TuningError, match="no emulation: such times mean nothing"):
        boards(serving.url, Timing(1))


def test_a_board_of_a_tracker_asks_for_its_secret_too(
    farm: Farm, serve: Serve, tmp_path: Path, bundle_of: Callable[..., Path]
) -> None:
    secret = secret_file(tmp_path / "s")
    key = f"guarded-{type(serve).__name__}"
    device = f"tracker://127.0.0.1:{farm.tracker.port}/{key}"
    with registered(farm, key, "--secret", str(secret), serve=serve) as serving:
        executor = load(bundle_of("flatten_linear"), f"{device}?secret={secret}")
        inputs, outputs = executor.bundle.golden()
        np.testing.assert_array_equal(executor(*inputs)[0], outputs[0])
        executor.close()
        serving.wait_for("session of")
        # Without the tracker's word the right secret is not enough: the board may be somebody else's.
        with pytest.raises(DeviceError, match="expected a board with this secret"):
            connect(f"{serving.url}?secret={secret}")
        with pytest.raises(DeviceError, match="saw one that asks for a secret or a key"):
            connect(f"{device}?secret=none")
        serving.wait_for("refused: no secret")


def test_a_board_is_offered_again_after_each_session(farm: Farm, serve: Serve) -> None:
    key = f"open-{type(serve).__name__}"
    device = f"tracker://127.0.0.1:{farm.tracker.port}/{key}"
    with registered(farm, key, serve=serve) as serving:
        first = connect(device)
        assert first.fetch(first.tensor(np.arange(3))).tolist() == [0, 1, 2]
        with pytest.raises(DeviceError, match="expected an answer, saw none in 0.3 s"):
            connect(device, timeout_s=0.3)
        with pytest.raises(DeviceError, match="saw one that asks for a secret or a key.*a tracker owns it"):
            connect(serving.url)
        os.kill(serving.sessions()[0], signal.SIGKILL)
        serving.wait_for("ended by (SIGKILL|signal 9)")
        # The client that gave up is still in the tracker's line: its turn comes first, and passes.
        second = connect(device, PATIENCE_S)
        assert second.fetch(second.tensor(np.arange(3))).tolist() == [0, 1, 2]


def pause(folder: Path) -> Path:
    """A candidate that takes a board 200 ms, whatever else its processor does: 100 to warm up, 100 to be timed."""

    def emit(f: builder.Function) -> None:
        f.arguments(((1,), "float32"))
        T.evaluate(T.call_extern("int32", "usleep", 100_000))

    target = load_target("host")
    library = tvm.compile(builder.module({"pause": builder.function(emit)}), target=target.tvm_target())
    folder.mkdir()
    library.export_library(str(folder / candidate.LIBRARY), fcompile=linker(target.zig_triple))
    program = {"tensors": {"x": [[1], "float32"]}, "calls": [["pause", ["x"]]], "tiles": False}
    (folder / candidate.PROGRAM).write_text(json.dumps(program))
    return folder


@pytest.mark.slow
def test_three_boards_are_faster_than_one_and_lose_nothing_with_one(farm: Farm, tmp_path: Path) -> None:
    jobs, timing = [pause(tmp_path / "pause")] * 12, Timing(1, repeat=1, min_repeat_ms=0)
    with contextlib.ExitStack() as ends:
        servings = [ends.enter_context(registered(farm, "three", count=count)) for count in (1, 2, 3)]
        found = boards(f"tracker://127.0.0.1:{farm.tracker.port}/three", timing)
        ends.callback(lambda: [board.close() for board in found])
        elapsed = {}
        for count in (1, 3):
            start = time.monotonic()
            assert all(measured.seconds for _, measured in Fleet(found[:count], 60.0).time(jobs))
            elapsed[count] = time.monotonic() - start
        assert elapsed[1] / elapsed[3] >= 2.2
        fleet, places = Fleet(found, 60.0), {}
        for index, measured in fleet.time(jobs):
            assert measured.seconds, measured.error
            assert index not in places
            places[index] = measured.place
            if len(places) == 6:
                os.killpg(servings[0].pid, signal.SIGKILL)
        assert len(places) == 12
        assert (len(fleet.dropped), fleet.width) == (1, 2)


def test_tvm_s_own_server_knows_no_secret(tmp_path: Path) -> None:
    secret = secret_file(tmp_path / "s")
    server = Server(ALONE)
    try:
        with pytest.raises(DeviceError, match="expected a board with a secret, saw none; .secret=none after the"):
            connect(f"rpc://127.0.0.1:{server.port}?secret={secret}")
        session = connect(f"rpc://127.0.0.1:{server.port}?secret=none", PATIENCE_S)
        assert session.fetch(session.tensor(np.arange(3))).tolist() == [0, 1, 2]
        session.close()
    finally:
        server.kill()


@pytest.mark.parametrize("words", [["run"], ["verify"], ["bench", "--repeat", "2"]], ids=["run", "verify", "bench"])
def test_commands_take_a_board_of_the_tracker(
    farm: Farm, bundle_of: Callable[..., Path], words: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    device = f"tracker://127.0.0.1:{farm.tracker.port}/{words[0]}"
    with registered(farm, words[0]):
        assert main([*words, str(bundle_of("flatten_linear")), "--device", device, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["device"] == device


def test_run_lets_go_of_its_board(farm: Farm, bundle_of: Callable[..., Path]) -> None:
    with registered(farm, "one") as serving:
        device = f"tracker://127.0.0.1:{farm.tracker.port}/one"
        assert main(["run", str(bundle_of("flatten_linear")), "--device", device]) == 0
        serving.wait_for("session of")
