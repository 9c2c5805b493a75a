"""Rescaled channels change nothing but how even they are; what cannot be rescaled is left alone."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
import tvm
from torch import nn
from torch.nn import functional

from tvmq import ir, pipeline
from tvmq.errors import CalibrationError
from tvmq.importer.load import import_model
from tvmq.oracle import interpret
from tvmq.quantize import numerics, refine
from tvmq.quantize.calibration import calibrate
from tvmq.quantize.channels import Channels
from tvmq.quantize.equalize import equalize, gain
from tvmq.quantize.least_noise import Division
from tvmq.quantize.refine import unused_algorithms
from tvmq.quantize.seen import channels_seen
from tvmq.quantize.smooth import divided, smooth
from tvmq.quantize.table import CalibrationTable
from tvmq.recipe import Recipe
from tvmq.recipe_rules import Rule

EQUALIZABLE = (
    "residual",
    "conv_bn_relu",
    "pools",
    "flatten_linear",
    "depthwise_separable",
    "transformer",
    "dead_channels",
)


def _assert_same(case, module) -> None:
    for got, want in zip(interpret.run(module, case.inputs), case.run(case.module), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize("name", EQUALIZABLE)
def test_equalizing_and_smoothing_change_no_result(model_of, name: str) -> None:
    case = model_of(name)
    _assert_same(case, equalize(case.module))
    _assert_same(case, smooth(case.module, case.batches, 0.5))


@pytest.mark.parametrize("name", ["residual", "conv_bn_relu", "flatten_linear"])
def test_any_positive_factors_change_no_result(model_of, name: str) -> None:
    case = model_of(name)
    channels = Channels(case.module)
    rng = np.random.default_rng(0)
    factors = {root: 2.0 ** rng.uniform(-4, 4, group.channels) for root, group in channels.groups.items()}
    assert factors
    _assert_same(case, channels.rescaled(factors))


def test_tensors_that_an_addition_joins_are_one_group(model_of) -> None:
    groups = Channels(model_of("residual").module).groups.values()
    # The stem's result is read by two branches; the first block's end is made by both, and added to the second's.
    assert sorted((len(g.makers), len(g.readers)) for g in groups) == [(1, 1), (1, 1), (1, 2)]


@pytest.mark.parametrize("name", ["clips", "activations", "returned_and_consumed", "forks", "split"])
def test_what_clips_or_leaves_the_graph_is_not_rescaled(model_of, name: str) -> None:
    case = model_of(name)
    outside = {str(out.name) for out in ir.outputs(case.module)}
    for group in Channels(case.module).groups.values():
        assert not outside & {str(var.name) for var in group.read}
    _assert_same(case, equalize(case.module))


class Uneven(nn.Module):
    """A block whose hidden channels differ by factors of up to 1000, undone by the layer that reads them."""

    def __init__(self, activation: Callable[[torch.Tensor], torch.Tensor] = functional.relu) -> None:
        super().__init__()
        self.activation = activation
        self.a, self.b = nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 4, 3, padding=1)
        factors = 10.0 ** torch.linspace(-1.5, 1.5, 16)
        with torch.no_grad():
            self.a.weight *= factors[:, None, None, None]
            self.a.bias *= factors
            self.b.weight /= factors[None, :, None, None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.activation(self.a(x)))


def test_the_gain_of_equalizing() -> None:
    even = np.ones(3)
    assert gain(even, even) == gain(2 * even, 3 * even) == 1
    # Each tensor is as wide as its widest channel: fifty times what both could be.
    assert gain(np.array([50.0, 1, 1]), np.array([1 / 50, 1, 1])) == pytest.approx(50)
    assert gain(np.array([50.0, 1, 1]), np.array([1 / 50, 50, 1])) == pytest.approx(50)
    assert gain(np.array([50.0, 1 / 50, 1]), np.array([1 / 50, 50, 1])) == pytest.approx(2500)
    # What is wide on both sides, dead, or read by nobody is not gained.
    assert gain(np.array([50.0, 1, 1]), np.array([50.0, 1, 1])) == 1
    assert gain(np.array([1.0, 0, 1]), np.array([1.0, 50, 1])) == gain(0 * even, even) == 1


@pytest.mark.parametrize("name", EQUALIZABLE)
def test_by_default_even_channels_are_left_alone(model_of, name: str) -> None:
    case = model_of(name)
    assert refine.reshaped(case.module, Recipe(precision="int8"), lambda: case.batches) == (case.module, {})


def test_by_default_uneven_channels_are_rescaled_where_they_are_read_as_integers(make_a_case) -> None:
    torch.manual_seed(0)
    case = make_a_case(Uneven(), (1, 4, 9, 9))

    def reshaped_by(**fields) -> tvm.IRModule:
        return refine.reshaped(case.module, Recipe(**fields), lambda: case.batches)[0]

    better = reshaped_by(precision="int8")
    assert better is not case.module
    _assert_same(case, better)
    reference, after = case.reference()[0], dataclasses.replace(case, module=better, known={})
    before, now = (numerics.sqnr_db(reference, c.run(c.realized())[0]) for c in (case, after))
    assert now > before + 10
    for fields in ({"precision": "int8", "algorithms": []}, {"precision": "int8-weight"}, {}):
        assert reshaped_by(**fields) is case.module
    assert reshaped_by(rules=[Rule("conv2d#0", "int8")]) is not case.module


PRELU = nn.PReLU(16)
with torch.no_grad():
    PRELU.weight.copy_(torch.linspace(-0.2, 0.9, 16))


@pytest.mark.parametrize(
    ("algorithm", "activation"),
    [
        ("equalize", functional.relu),
        ("equalize", functional.leaky_relu),
        ("equalize", PRELU),
        ("smooth", functional.relu),
    ],
)
def test_uneven_channels_become_even_and_accurate(make_a_case, algorithm: str, activation: Callable) -> None:
    torch.manual_seed(0)
    case = make_a_case(Uneven(activation), (1, 4, 9, 9))
    module = equalize(case.module) if algorithm == "equalize" else smooth(case.module, case.batches, 0.5)
    _assert_same(case, module)
    (hidden,) = (str(var.name) for group in Channels(case.module).groups.values() for var in group.read)
    spreads = []
    for m in (case.module, module):
        largest = channels_seen(m, case.batches, {hidden})[hidden].largest
        spreads.append(largest.max() / largest.min())
    assert spreads[0] > 300 and spreads[1] < 10
    reference = case.reference()[0]
    after = dataclasses.replace(case, module=module, known={})
    before, better = (
        numerics.sqnr_db(reference, c.run(c.realized(Recipe(precision="int8")))[0]) for c in (case, after)
    )
    assert better > before + 10


def test_smoothing_divides_outlying_channels_of_a_layer_norm(make_a_case) -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(16), nn.Linear(16, 8)
            with torch.no_grad():
                self.norm.weight[3] = 50.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.norm(x))

    case = make_a_case(Norm(), (2, 5, 16))
    module = smooth(case.module, case.batches, 0.5)
    _assert_same(case, module)
    (name,) = (str(var.name) for group in Channels(case.module).groups.values() for var in group.read)
    before, after = (channels_seen(m, case.batches, {name})[name].largest for m in (case.module, module))
    assert after.max() / np.median(after) < 0.3 * before.max() / np.median(before)


class PostNorm(nn.Module):
    """A layer norm with an outlying channel, read by two linear layers and by the addition after them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.gate, self.down = (
            nn.LayerNorm(16),
            nn.Linear(16, 8),
            nn.Linear(16, 8),
            nn.Linear(8, 16),
        )
        with torch.no_grad():
            self.norm.weight[3] = 50.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return y + self.down(functional.gelu(self.up(y)) + self.gate(y))


def test_smoothing_gives_linear_readers_a_layer_norm_of_their_own(make_a_case) -> None:
    torch.manual_seed(0)
    case = make_a_case(PostNorm(), (2, 5, 16))
    module = smooth(case.module, case.batches, 0.5)
    _assert_same(case, module)
    norms = [var for var, call in ir.calls(module) if ir.is_call(call, "nn.layer_norm")]
    readers = [{ir.op_name(dict(ir.bindings(module))[reader]) for reader in ir.users(module)[var]} for var in norms]
    assert sorted(readers, key=sorted) == [{"add"}, {"matmul"}]
    reference = case.reference()[0]
    after = dataclasses.replace(case, module=module, known={})
    plain, smoothed = (
        numerics.sqnr_db(reference, c.run(c.realized(Recipe(precision="int8")))[0]) for c in (case, after)
    )
    assert smoothed > plain + 3


def test_by_default_outlying_channels_of_layer_norms_are_smoothed(make_a_case) -> None:
    torch.manual_seed(0)
    case = make_a_case(PostNorm(), (2, 5, 16))
    module, smoothed = refine.reshaped(case.module, Recipe(precision="int8"), lambda: case.batches)
    assert len(smoothed) == 1
    _assert_same(case, module)
    reference, after = case.reference()[0], dataclasses.replace(case, module=module, known={})
    before, now = (numerics.sqnr_db(reference, c.run(c.realized())[0]) for c in (case, after))
    assert now > before + 3
    # What was found goes into a table, and is all that is needed to do it again.
    again, _ = refine.reshaped(case.module, Recipe(precision="int8"), tuple, smoothed)
    np.testing.assert_array_equal(interpret.run(again, case.inputs)[0], interpret.run(module, case.inputs)[0])
    for recipe in (Recipe(precision="int8", algorithms=[]), Recipe()):
        assert refine.reshaped(case.module, recipe, lambda: case.batches) == (case.module, {})


def test_a_table_of_smoothed_norms_gives_the_model_that_its_data_gave() -> None:
    torch.manual_seed(0)
    model = import_model(PostNorm().eval(), (torch.zeros(2, 5, 16),))
    rng = np.random.default_rng(0)
    batches = [rng.standard_normal((2, 5, 16)).astype(np.float32) for _ in range(6)]
    recipe = Recipe(precision="int8")
    table = CalibrationTable.from_json(calibrate(model, recipe, iter(batches)).to_json())
    by_table, by_data = (pipeline.quantize(model, recipe, given) for given in (table, batches))
    assert table.smoothed and by_data.table == by_table.table == table
    np.testing.assert_array_equal(by_table.simulate(batches[0])[0], by_data.simulate(batches[0])[0])


def test_what_channels_hold_is_seen_over_all_samples(make_a_case) -> None:
    case = make_a_case(PostNorm(), (2, 5, 16))
    norm = next(str(var.name) for var, call in ir.calls(case.module) if ir.is_call(call, "nn.layer_norm"))
    seen = channels_seen(case.module, case.batches, {norm})[norm]
    kept: list[np.ndarray] = []
    program = interpret.Program(case.module, {norm})
    for inputs in case.batches:
        program.run(inputs, lambda _, value: kept.append(value))
    rows = np.concatenate(kept).reshape(-1, 16)
    np.testing.assert_array_equal(seen.low, rows.min(axis=0))
    np.testing.assert_array_equal(seen.high, rows.max(axis=0))
    np.testing.assert_array_equal(seen.largest, np.abs(rows).max(axis=0))
    np.testing.assert_allclose(seen.variance, rows.astype(np.float64).var(axis=0), rtol=1e-9)


@pytest.mark.parametrize(
    ("name", "division", "said"),
    [
        ("norm", Division(np.ones(3)), "of a layer norm or .*, 16 channels, saw 3 numbers, the least 1"),
        ("norm", Division(np.zeros(16)), "saw 16 numbers, the least 0"),
        ("norm", Division(np.ones(16), (3,)), "expected copies of 0 channels, saw one of channel 3"),
        (
            "other",
            Division(np.ones(16)),
            "smoothed 'other': expected a number above 0 for each channel of .*, 0 channels",
        ),
    ],
)
def test_divisions_that_fit_no_tensor_are_refused(make_a_case, name: str, division: Division, said: str) -> None:
    case = make_a_case(PostNorm(), (2, 5, 16))
    norm = next(str(var.name) for var, call in ir.calls(case.module) if ir.is_call(call, "nn.layer_norm"))
    with pytest.raises(CalibrationError, match=said):
        divided(case.module, {norm if name == "norm" else name: division}, Recipe())


@pytest.mark.parametrize(
    ("name", "precision", "unused"),
    [
        ("residual", "int8", ()),
        ("clips", "int8", ("smooth",)),
        ("transformer", "int8-dynamic", ("bias_correction",)),
        ("transformer", "int8-weight", ("bias_correction",)),
    ],
)
def test_algorithms_that_find_nothing_to_do_are_named(model_of, name: str, precision: str, unused: tuple) -> None:
    case = model_of(name)
    recipe = Recipe(precision=precision, algorithms=["smooth", "clip_weights", "gptq", "bias_correction"])
    assert unused_algorithms(case.module, case.plan(recipe), recipe) == unused
