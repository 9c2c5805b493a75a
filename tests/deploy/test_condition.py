"""The condition of a board: read from files as a Raspberry Pi and an x86 machine have them, here and over RPC."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from serving import NativeServing, Serving
from tvm import rpc

from tvmq.deploy import condition
from tvmq.deploy.address import Link
from tvmq.deploy.condition import EMULATED, Condition, from_json, read, warnings
from tvmq.deploy.emulate import EmulatedBoard
from tvmq.deploy.session import RemoteSession, connect
from tvmq.errors import DeviceError
from tvmq.measure import bundle_bench, chart, sustained_chart

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
    return files(root, **contents)


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
    assert from_json(json.dumps(found.to_dict())) == found


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
    assert found.before.allowed == condition.read().allowed
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


def test_the_native_runner_of_a_real_board_is_not_taken_for_an_emulated_one(native_runner: Path) -> None:
    with NativeServing(native_runner) as serving:
        session = connect(f"{serving.url}?secret=none")
        found = session.condition()
        session.close()
    assert (found.known, found.emulated) == (False, False)


@pytest.mark.emulated
def test_emulated_times_are_marked(board: EmulatedBoard, bundle_of: Callable[..., Path], tmp_path: Path) -> None:
    path = bundle_of("residual", target="raspberry-pi-4b")
    found = bundle_bench.run([path], board.url, threads=1, sustain_s=0.01, min_repeat_ms=1)
    assert str(found.before) == EMULATED
    assert found.warnings() == [EMULATED]
    assert all(row["emulated"] for row in found.rows())
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
