"""The executor: inputs in every form, outputs, latency, profiles; on this machine and over RPC."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import tvmq
from tvmq.deploy.emulate import EmulatedBoard
from tvmq.deploy.executor import Executor, load
from tvmq.deploy.latency import latency
from tvmq.errors import DeviceError, SignatureError


@pytest.fixture(scope="module")
def executor(bundle_of: Callable[..., Path]) -> Executor:
    return load(bundle_of("residual"))


@pytest.fixture
def golden(executor: Executor) -> tuple[np.ndarray, np.ndarray]:
    (x,), (y,) = executor.bundle.golden()
    return x, y


# --- inputs and outputs ---------------------------------------------------------------------------------------------


def test_inputs_come_in_every_form(executor: Executor, golden: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = golden
    name = executor.signature.inputs[0].name
    strided = np.repeat(x, 2, axis=3)[..., ::2]
    for result in (
        executor(x),
        executor(torch.from_numpy(x)),
        executor({name: x}),
        executor(**{name: x}),
        executor(strided),
    ):
        assert isinstance(result, tuple)
        np.testing.assert_array_equal(result[0], y)


def test_it_has_the_habits_of_a_graph_executor(executor: Executor, golden: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = golden
    name = executor.signature.inputs[0].name
    for set_input in (
        lambda: executor.set_input(name, x),
        lambda: executor.set_input(0, x),
        lambda: executor.set_input(**{name: x}),
    ):
        set_input()
        with pytest.raises(SignatureError, match="expected a run before it"):
            executor.get_output(0)
        executor.run()
        np.testing.assert_array_equal(executor.get_output(0), y)
    # Running again changes nothing, and an output that was taken is the caller's.
    taken = executor.get_output(0)
    executor.set_input(name, np.zeros_like(x))
    executor.run()
    np.testing.assert_array_equal(taken, y)
    assert not np.array_equal(executor.get_output(0), y)


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ((np.zeros((1, 3, 8, 9), np.float32),), r"input 'x': expected shape \[1, 3, 9, 9\], saw \[1, 3, 8, 9\]"),
        ((np.zeros((3, 9, 9), np.float32),), r"saw \[3, 9, 9\]"),
        ((np.zeros((1, 3, 9, 9)),), r"expected dtype float32, saw float64; convert it with .astype\('float32'\)"),
        ((np.zeros((1, 3, 9, 9), np.int8),), "saw int8"),
        ((), "inputs: expected 1"),
        ((1, 2), "inputs: expected 1 .*, saw 2"),
        (({"y": 1},), r"inputs by name: expected \['x'\], saw \['y'\]"),
    ],
)
def test_a_wrong_input_is_one_line(executor: Executor, inputs: tuple, said: str) -> None:
    with pytest.raises(SignatureError, match=said) as caught:
        executor(*inputs)
    assert "\n" not in str(caught.value)


def test_names_and_indices_that_do_not_exist(executor: Executor, golden: tuple[np.ndarray, np.ndarray]) -> None:
    x, _ = golden
    with pytest.raises(SignatureError, match="set_input: expected one of x, saw 'z'"):
        executor.set_input("z", x)
    with pytest.raises(SignatureError, match="set_input: expected an index below 1, saw 1"):
        executor.set_input(1, x)
    executor(x)
    for index in (1, -1):
        with pytest.raises(SignatureError, match=f"get_output: expected an index below 1, saw {index}"):
            executor.get_output(index)


def test_running_without_inputs_names_them(bundle_of: Callable[..., Path]) -> None:
    with pytest.raises(SignatureError, match="expected every input set, saw nothing for x"):
        load(bundle_of("residual")).run()


def test_two_outputs_come_in_order(bundle_of: Callable[..., Path]) -> None:
    executor = load(bundle_of("returned_and_consumed"))
    inputs, outputs = executor.bundle.golden()
    for want, got in zip(outputs, executor(*inputs), strict=True):
        np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(executor.get_output(1), outputs[1])


def test_nan_inputs_do_not_end_the_process(executor: Executor, golden: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = golden
    assert executor(np.full_like(x, np.nan))[0].shape == y.shape
    assert executor(np.full_like(x, np.inf))[0].shape == y.shape


# --- models at the edges --------------------------------------------------------------------------------------------


class Edges(torch.nn.Module):
    """An input and a constant as outputs, an output twice, an integer, a boolean, a scalar, and parts of a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.linear = torch.nn.Embedding(11, 13), torch.nn.Linear(13, 6)
        self.register_buffer("table", torch.arange(5.0))

    def forward(self, x: torch.Tensor, i: torch.Tensor) -> tuple:
        y = self.linear(self.embed(i) + x)
        values, indices = torch.topk(y, 2)
        return x, self.table, y, y, i, y > 0, y.argmax(-1), y.mean(), values, indices, y.split(3, -1)[1]


@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_models_at_the_edges(precision: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Edges().eval()
    rng = np.random.default_rng(0)
    x, i = rng.standard_normal((2, 3, 13)).astype(np.float32), rng.integers(0, 11, (2, 3))
    model = tvmq.import_model(module, (torch.from_numpy(x), torch.from_numpy(i)))
    tvmq.compile(
        model, "host", tvmq.Recipe(precision=precision), [(x, i)] if precision == "int8" else None, tmp_path / "m.tvmq"
    )
    executor = load(tmp_path / "m.tvmq")
    results = executor(x, i)
    with torch.no_grad():
        wanted = [t.numpy() for t in module(torch.from_numpy(x), torch.from_numpy(i))]
    assert [(y.shape, y.dtype) for y in results] == [(y.shape, y.dtype) for y in wanted]
    for index in (0, 1, 4):
        np.testing.assert_array_equal(results[index], wanted[index])
    tolerance = 0.05 if precision == "int8" else 1e-5
    for index in (2, 3, 7, 8, 10):
        np.testing.assert_allclose(results[index], wanted[index], atol=tolerance)
    assert len(executor.profile()) >= 3
    assert tvmq.verify(tmp_path / "m.tvmq").ok
    with pytest.raises(SignatureError, match="input 'i': expected dtype int64, saw int32"):
        executor(x, i.astype(np.int32))


def test_an_identity(tmp_path: Path) -> None:
    model = tvmq.import_model(torch.nn.Identity(), (torch.ones(2, 3),))
    tvmq.compile(model, out=tmp_path / "m.tvmq")
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    executor = load(tmp_path / "m.tvmq")
    np.testing.assert_array_equal(executor(x)[0], x)
    assert executor.profile() == []
    assert tvmq.verify(tmp_path / "m.tvmq").ok


# --- time -----------------------------------------------------------------------------------------------------------


def test_a_benchmark_is_a_distribution(executor: Executor) -> None:
    result = executor.benchmark(repeat=5, number=2, min_repeat_ms=1)
    assert 0 < result.min_ms <= result.median_ms <= result.p90_ms <= result.max_ms
    assert result.min_ms <= result.mean_ms <= result.max_ms
    assert result.std_ms >= 0
    assert (result.repeat, result.number, result.threads) == (5, 2, executor.threads)
    assert set(result.to_dict()) >= {"mean_ms", "median_ms", "p90_ms", "min_ms", "max_ms", "std_ms"}
    assert re.match(r"[\d.]+ ms median, [\d.]+ p90 \(5 repeats, \d+ threads\)", str(result))


def test_the_statistics_are_numpys() -> None:
    result = latency([1.0, 2.0, 3.0, 4.0, 10.0], 1, 2)
    assert (result.mean_ms, result.median_ms, result.min_ms, result.max_ms) == (4.0, 3.0, 1.0, 10.0)
    assert result.p90_ms == pytest.approx(7.6)
    assert result.std_ms == pytest.approx(np.sqrt(10.0))


def test_threads_are_what_was_asked_for(bundle_of: Callable[..., Path]) -> None:
    one = load(bundle_of("residual"), threads=1)
    assert one.threads == 1
    (x,), (y,) = one.bundle.golden()
    np.testing.assert_array_equal(one(x)[0], y)
    assert load(bundle_of("residual")).threads >= 1


def test_a_profile_has_a_row_for_each_kernel(executor: Executor, golden: tuple[np.ndarray, np.ndarray]) -> None:
    rows = executor.profile(golden[0], repeat=2)
    assert all(row.ms > 0 for row in rows)
    assert {row.precision for row in rows} == {"int8", "fp32"}
    assert sum("conv2d" in row.kernel for row in rows) == 6
    assert [row.name for row in rows] == [
        step["results"][0]["name"] for step in executor.bundle.manifest["steps"] if step["symbol"]
    ]


# --- on a board -----------------------------------------------------------------------------------------------------


@pytest.mark.emulated
def test_an_executor_on_a_board(board: EmulatedBoard, bundle_of: Callable[..., Path]) -> None:
    executor = load(bundle_of("residual", target="raspberry-pi-4b"), board.url)
    (x,), (y,) = executor.bundle.golden()
    np.testing.assert_array_equal(executor(x)[0], y)
    executor.set_input(0, np.zeros_like(x))
    executor.run()
    assert not np.array_equal(executor.get_output(0), y)
    assert executor.threads == 4, "the target's cores"
    assert executor.benchmark(repeat=2, number=1, min_repeat_ms=0, warmup=1).median_ms > 0
    rows = executor.profile(x, repeat=1)
    assert sum("conv2d" in row.kernel for row in rows) == 6
    assert all(row.ms > 0 for row in rows)


@pytest.mark.emulated
def test_several_outputs_on_a_board(board: EmulatedBoard, bundle_of: Callable[..., Path]) -> None:
    executor = load(bundle_of("returned_and_consumed", target="raspberry-pi-4b"), board.url)
    inputs, outputs = executor.bundle.golden()
    for want, got in zip(outputs, executor(*inputs), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.emulated
def test_a_board_that_dies_is_one_line(board: EmulatedBoard, bundle_of: Callable[..., Path]) -> None:
    executor = load(bundle_of("residual", target="raspberry-pi-4b"), board.url)
    (x,), _ = executor.bundle.golden()
    executor(x)
    url = board.url
    board.stop()
    actions = [
        lambda: executor(x),
        lambda: executor.set_input(0, x),
        executor.run,
        lambda: executor.get_output(0),
        executor.benchmark,
        executor.profile,
    ]
    executor._outputs = executor._outputs or list(executor._parameters.values())
    for action in actions:
        with pytest.raises(DeviceError, match=f"device {url}: expected an answer, saw .*; reconnect") as caught:
            action()
        assert "\n" not in str(caught.value)


@pytest.mark.emulated
def test_code_for_another_processor_is_one_line(board_root: Path, bundle_of: Callable[..., Path]) -> None:
    """sdot on a processor without it: the server's session ends, and the client says so."""
    with EmulatedBoard(board_root).start(cpu="cortex-a72") as board:
        executor = load(bundle_of("residual", target="raspberry-pi-5"), board.url)
        with pytest.raises(DeviceError, match="code for another processor ends a board's server"):
            executor(*executor.bundle.golden()[0])
        # The next session is served.
        load(bundle_of("residual", target="raspberry-pi-4b"), board.url)
