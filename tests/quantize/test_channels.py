"""Rescaled channels change nothing but how even they are; what cannot be rescaled is left alone."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from tvmq import ir
from tvmq.oracle import interpret
from tvmq.quantize import numerics
from tvmq.quantize.channels import Channels
from tvmq.quantize.equalize import equalize
from tvmq.quantize.refine import unused_algorithms
from tvmq.quantize.smooth import channel_maxima, smooth
from tvmq.recipe import Recipe

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

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 4, 3, padding=1)
        factors = 10.0 ** torch.linspace(-1.5, 1.5, 16)
        with torch.no_grad():
            self.a.weight *= factors[:, None, None, None]
            self.a.bias *= factors
            self.b.weight /= factors[None, :, None, None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(functional.relu(self.a(x)))


@pytest.mark.parametrize("algorithm", ["equalize", "smooth"])
def test_uneven_channels_become_even_and_accurate(make_a_case, algorithm: str) -> None:
    torch.manual_seed(0)
    case = make_a_case(Uneven(), (1, 4, 9, 9))
    module = equalize(case.module) if algorithm == "equalize" else smooth(case.module, case.batches, 0.5)
    (hidden,) = (str(var.name) for group in Channels(case.module).groups.values() for var in group.read)
    spreads = []
    for m in (case.module, module):
        largest = channel_maxima(m, case.batches, {hidden})[hidden]
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
    before, after = (channel_maxima(m, case.batches, {name})[name] for m in (case.module, module))
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


@pytest.mark.parametrize(
    ("name", "precision", "unused"),
    [
        ("residual", "int8", ()),
        ("clips", "int8", ("smooth",)),
        ("transformer", "int8-dynamic", ("bias_correction",)),
        ("transformer", "int8-weight", ("clip_weights", "bias_correction")),
    ],
)
def test_algorithms_that_find_nothing_to_do_are_named(model_of, name: str, precision: str, unused: tuple) -> None:
    case = model_of(name)
    recipe = Recipe(precision=precision, algorithms=["smooth", "clip_weights", "gptq", "bias_correction"])
    assert unused_algorithms(case.module, case.plan(recipe), recipe) == unused
