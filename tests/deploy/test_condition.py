"""The condition of a board: read from files as a Raspberry Pi and an x86 machine have them, here and over RPC."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from serving import NativeServing, Serving
from tvm import rpc

from tvmq.cli import render
from tvmq.deploy import condition
from tvmq.deploy.address import Link
from tvmq.deploy.condition import EMULATED, FILES, Condition, fastest, gather, pack, parse, read, unpack, warnings
from tvmq.deploy.emulate import EmulatedBoard
from tvmq.deploy.latency import latency
from tvmq.deploy.session import RemoteSession, connect
from tvmq.errors import DeviceError
from tvmq.measure import bundle_bench, chart, sustained_chart
from tvmq.measure.bundle_bench import BundleBench
from tvmq.measure.significance import compare

CALM = Condition(governors=("performance",), throttle_events=0, load=0.0, processors=4, allowed=(0, 1, 2, 3))


def files(root: Path, **contents: str) -> Path:
    """A root with files; `__` in a name stands for a slash."""
    for name, text in contents.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def pi(root: Path, word: str = "0", governor: str = "ondemand") -> Path:
    cpu = "sys__devices__system__cpu__cpu"
    contents = {f"{cpu}{i}__cpufreq__scaling_governor": governor for i in range(4)}
    contents |= {f"{cpu}{i}__cpufreq__scaling_cur_freq": str(600_000 + 100_000 * i) for i in range(4)}
    contents |= {f"{cpu}{i}__cpufreq__cpuinfo_max_freq": "1800000" for i in range(4)}
    contents |= {"sys__devices__platform__soc__soc:firmware__get_throttled": word}
    contents |= {"sys__class__thermal__thermal_zone0__temp": "48312", "proc__loadavg": "0.52 0.3 0.1 1/120 999"}
    contents |= {"sys__devices__system__cpu__present": "0-3", "proc__self__task__9__status": status("0-3")}
    return files(root, **contents)


def status(processors: str) -> str:
    """Of a thread, in part."""
    return f"Name:\tserver\nCpus_allowed:\tf\nCpus_allowed_list:\t{processors}\nMems_allowed:\t1"


def test_a_board_s_files_are_read(tmp_path: Path) -> None:
    found = read(pi(tmp_path, word="50005"))
    assert found.governors == ("ondemand",)
    assert found.mhz == (600, 700, 800, 900)
    assert found.max_mhz == (1800,) * 4
    assert found.temperature_c == 48.312
    assert found.throttled == found.throttled_since_boot == ("under-voltage", "throttled")
    assert (found.load, found.processors) == (0.52, 4)
    said = str(found)
    assert "governor ondemand; slowest clock 600 of 1800 MHz; temperature 48 degrees" in said
    assert "throttled under-voltage, throttled; load 0.52; processors 4" in said
    assert (found.allowed, found.threads) == ((0, 1, 2, 3), ("0-3",))
    assert json.loads(json.dumps(found.to_dict()))["threads"] == ["0-3"]


def test_files_travel_as_one_text(tmp_path: Path) -> None:
    found = gather(FILES, pi(tmp_path))
    assert unpack(pack(found)) == found
    assert parse(found) == read(tmp_path)
    assert unpack("") == {}
    assert unpack(pack({"a": "", "b": "two\nlines"})) == {"a": "", "b": "two\nlines"}


def test_threads_that_are_held_to_processors(tmp_path: Path) -> None:
    threads = {f"proc__self__task__{10 + i}__status": status(text) for i, text in enumerate(("3", "3", "0-1,4"))}
    found = read(files(pi(tmp_path), proc__self__task__9__status=status("2-3"), **threads))
    assert found.threads == ("2-3", "3", "0-1,4")
    assert found.allowed == (0, 1, 2, 3, 4)
    assert "processors 4, threads held to 2-3 and 3 and 0-1,4" in str(found)


def test_the_fastest_processors_come_first_and_of_equal_ones_the_last(tmp_path: Path) -> None:
    clocks = {
        f"sys__devices__system__cpu__cpu{i}__cpufreq__cpuinfo_max_freq": f"{khz}"
        for i, khz in enumerate((1800, 1800, 2400, 2400))
    }
    found = gather(FILES, files(pi(tmp_path), **clocks))
    assert fastest(found) == [3, 2, 1, 0]
    assert fastest({**found, "proc/self/task/9/status": status("0-2")}) == [2, 1, 0]
    assert fastest({}) == []


def test_ten_and_more_processors_are_in_their_order(tmp_path: Path) -> None:
    clocks = {f"sys__devices__system__cpu__cpu{i}__cpufreq__scaling_cur_freq": f"{1000 * i}" for i in range(12)}
    assert read(files(tmp_path, **clocks)).mhz == tuple(range(12))


def test_a_processor_that_counts_throttling(tmp_path: Path) -> None:
    cpu = "sys__devices__system__cpu__cpu"
    root = files(tmp_path, **{f"{cpu}{i}__thermal_throttle__core_throttle_count": str(i + 1) for i in range(2)})
    files(
        root,
        sys__class__thermal__cooling_device0__type="Processor",
        sys__class__thermal__cooling_device0__cur_state="2",
    )
    files(root, sys__class__thermal__cooling_device1__type="Fan", sys__class__thermal__cooling_device1__cur_state="1")
    found = read(root)
    assert found.throttle_events == 3
    assert found.throttled == ("cooling by Processor",)


def test_a_machine_that_tells_nothing(tmp_path: Path) -> None:
    found = read(files(tmp_path, sys__class__thermal__thermal_zone0__temp="no number"))
    assert (found.temperature_c, found.load, found.processors, found.throttle_events) == (None, None, None, None)
    assert "governor unknown; slowest clock unknown; temperature unknown; throttled unknown" in str(found)
    assert warnings(found, found) == []


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ({}, {"throttled": ("throttled",)}, "throttled meanwhile (throttled); cool it"),
        ({}, {"throttled_since_boot": ("frequency capped",)}, "throttled meanwhile (frequency capped)"),
        ({"throttle_events": 2}, {"throttle_events": 7}, "throttled meanwhile (5 times)"),
        ({"governors": ("ondemand",)}, {}, "governor ondemand: clocks move"),
        ({"load": 1.5}, {}, "a load of 1.50 before"),
    ],
)
def test_what_makes_a_measurement_doubtful_is_warned_of(before: dict, after: dict, said: str) -> None:
    (found,) = warnings(dataclasses.replace(CALM, **before), dataclasses.replace(CALM, **after))
    assert found.startswith("warning: ")
    assert said in found


def test_a_calm_board_is_not_warned_of() -> None:
    old = dataclasses.replace(CALM, throttled_since_boot=("throttled",), load=1.0)
    assert warnings(old, old) == [], "what was before is not of this measurement"


# --- over RPC -------------------------------------------------------------------------------------------------------


@pytest.fixture
def serving() -> Iterator[Serving]:
    with Serving() as running:
        yield running


def test_two_bundles_share_a_board_that_serves_one_session_at_a_time(
    serving: Serving, bundle_of: Callable[..., Path]
) -> None:
    paths = [bundle_of("residual")] * 2
    found = bundle_bench.run(paths, serving.url, threads=1, repeat=2, min_repeat_ms=1)
    assert [one.repeat for one in found.latencies] == [2, 2]
    assert found.before.known
    assert not found.before.emulated
    # The one thread is held to one of the processors.
    assert set(found.before.allowed) < {*condition.read().allowed, -1}
    assert len(found.before.allowed) == 1
    assert found.before.processors == condition.read().processors
    document = json.loads(json.dumps(found.to_dict()))
    assert set(document["condition"]) == {"before", "after"}
    connect(serving.url).close()


def test_a_lost_board_is_no_unknown_board(serving: Serving) -> None:
    session = connect(serving.url)
    serving.process.kill()
    serving.process.join()
    with pytest.raises(DeviceError, match="expected an answer"):
        session.condition()


class OfTvm:
    """The address of a session with TVM's functions and no others."""

    name = "rpc://a-board:9090"

    def open(self, timeout_s: float) -> Link:
        return Link(rpc.LocalSession())


def test_a_server_of_tvm_s_own_does_not_tell() -> None:
    found = RemoteSession(OfTvm()).condition()
    assert (found.known, found.emulated) == (False, False)
    assert "condition of the board: unknown" in str(found)


def test_the_native_runner_tells_what_the_board_says(native_runner: Path) -> None:
    with NativeServing(native_runner) as serving:
        session = connect(f"{serving.url}?secret=none")
        found, here = session.condition(), condition.read()
        session.close()
    assert (found.known, found.emulated) == (True, False)
    assert found.load is not None
    for name in ("processors", "allowed", "governors", "max_mhz"):
        assert getattr(found, name) == getattr(here, name)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one processor")
@pytest.mark.parametrize("count", [1, 2])
def test_threads_of_a_measurement_have_processors_of_their_own(
    native_runner: Path, bundle_of: Callable[..., Path], count: int
) -> None:
    last = sorted(os.sched_getaffinity(0))[-count:]
    with NativeServing(native_runner) as serving:
        found = bundle_bench.run([bundle_of("residual")], serving.url, threads=count, repeat=1, min_repeat_ms=1)
    assert found.before.allowed == found.after.allowed == tuple(last)
    assert f"threads held to {last[-1]}" in str(found.before) or count > 1


@pytest.mark.emulated
def test_emulated_times_are_marked(board: EmulatedBoard, bundle_of: Callable[..., Path], tmp_path: Path) -> None:
    path = bundle_of("residual", target="raspberry-pi-4b")
    found = bundle_bench.run([path], board.url, threads=1, sustain_s=0.01, min_repeat_ms=1)
    assert str(found.before) == EMULATED
    assert found.warnings() == [EMULATED]
    assert all(row["emulated"] for row in found.rows())
    assert all(row["emulated"] for row in found.to_dict()["sustained"])
    if chart.available():
        sustained_chart.draw(found, tmp_path / "plot.png")
        assert (tmp_path / "plot.png").stat().st_size > 1000


# --- warm-up --------------------------------------------------------------------------------------------------------


def test_it_is_warm_when_two_windows_agree() -> None:
    times = iter([9.0, 8.0, 7.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.0])
    assert bundle_bench.warm_up(lambda: next(times))
    assert list(times) == [2.0, 1.0], "the outlier of a window does not count"


def test_what_never_gets_steady_ends() -> None:
    times = iter(1.2**i for i in range(1000))
    assert not bundle_bench.warm_up(lambda: next(times))
    assert next(times) == 1.2**bundle_bench.MOST


def test_a_drift_is_the_last_tenth_beside_the_first() -> None:
    one = bundle_bench.Sustained("a", list(map(float, range(20))), [10.0] * 2 + [11.0] * 16 + [12.0] * 2)
    assert one.drift == pytest.approx(0.2)


def test_a_rest_comes_before_each_measurement() -> None:
    seen: list[object] = []
    measure = bundle_bench.rested(lambda: seen.append("measured") or 1.0, 2.5, seen.append)
    assert [measure(), measure()] == [1.0, 1.0]
    assert seen == [2.5, "measured", 2.5, "measured"]
    assert bundle_bench.rested(lambda: 3.0, 0.0, seen.append)() == 3.0
    assert len(seen) == 4


def test_every_figure_of_an_emulated_board_is_marked() -> None:
    before = Condition(known=False, emulated=True)
    times = (latency([1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 1.0], 1, 1), latency([2.0] * 7, 1, 1))
    compared = compare([(name, one.times_ms) for name, one in zip("ab", times, strict=True)])
    found = BundleBench("rpc://b:1", ("a", "b"), times, tuple(compared), (True,) * 2, before, before, 0.0, ())
    assert found.warnings() == [EMULATED]
    assert all(row["emulated"] for row in found.to_dict()["comparisons"])
    columns = render.latencies(found.rows()).columns
    for column in columns[1:6]:
        assert all(str(cell).endswith(render.EMULATED) for cell in column.cells), column.header
