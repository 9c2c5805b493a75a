"""Convnets with weights of few bits: compiled, run, verified, as small as they should be, and on a board."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import tvmq
from tvmq.cpuinfo import host_features
from tvmq.deploy import bundle as bundles
from tvmq.deploy.emulate import EmulatedBoard
from tvmq.errors import BundleError
from tvmq.pipeline import compile_model, realized_module
from tvmq.quantize import numerics
from tvmq.recipe import Recipe
from tvmq.recipe_rules import Rule
from tvmq.tune import whole


class Net(nn.Module):
    """A stem whose 27 inputs are no whole group, Winograd's convolution, a depthwise, a grouped and a pointwise one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide = nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1, bias=False)
        self.apart, self.grouped = nn.Conv2d(64, 64, 3, groups=64), nn.Conv2d(64, 64, 3, stride=2, groups=2)
        self.point, self.head = nn.Conv2d(64, 96, 1), nn.Linear(96, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = x + torch.relu(self.wide(x))
        x = torch.relu(self.point(self.grouped(torch.relu(self.apart(x)))))
        return self.head(x.mean((2, 3)))


# Weights of convolutions but the depthwise one, and of the head.
CONVOLUTIONS, HEAD = 64 * 27 + 64 * 576 + 64 * 288 + 96 * 64, 96 * 10
LOOKED_UP = Recipe(precision="int4-weight", weight_levels="codebook")


def pair() -> nn.Module:
    """Two layers."""
    return nn.Sequential(nn.Conv2d(32, 64, 1), nn.ReLU(), nn.Conv2d(64, 32, 1)).eval()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The bundle of the model for a recipe and a target."""
    torch.manual_seed(0)
    model = tvmq.import_model(Net().eval(), (torch.randn(1, 3, 12, 12),))
    folder = tmp_path_factory.mktemp("coded")
    known: dict[tuple[Recipe, str], Path] = {}

    def make(recipe: Recipe, target: str = "host") -> Path:
        if (recipe, target) not in known:
            path = folder / f"{len(known)}.tvmq"
            compile_model(model, target, recipe, None, path)
            known[recipe, target] = path
        return known[recipe, target]

    return make


@pytest.mark.parametrize("recipe", [Recipe(precision="int4-weight"), LOOKED_UP], ids=["int4", "codebook"])
def test_a_bundle_is_near_its_floats_verifies_and_is_small(made, recipe: Recipe) -> None:
    floats, few = (bundles.read(made(each)) for each in (Recipe(winograd=False), recipe))
    inputs, (reference,) = floats.golden()
    with tvmq.load(few) as executor:
        assert numerics.sqnr_db(reference, executor(*inputs)[0]) > 18
    found = tvmq.verify(few)
    assert found.ok, str(found)
    # Scales and panels that are not full take a sixth more at most; the least image has its parameters' bytes.
    sizes = [sum(array.nbytes for array in bundle.parameters().values()) for bundle in (floats, few)]
    saved = (4 - 1 / 2 * 7 / 6) * (CONVOLUTIONS + HEAD)
    assert sizes[0] - sizes[1] > saved
    assert made(Recipe(winograd=False)).stat().st_size - made(recipe).stat().st_size > 0.8 * saved


def test_a_report_says_what_becomes_of_each_layer(made) -> None:
    rows = bundles.read(made(LOOKED_UP)).manifest["operators"]
    once = "codebook levels, from a table; weights become float32 once, when the bundle is loaded"
    few = "its channels read one channel each: such few weights stay floats"
    found = [(row["precision"], row["reason"]) for row in rows if row["kind"] == "conv2d"]
    assert found == [("int4-weight", once)] * 2 + [("fp32", few)] + [("int4-weight", once)] * 2
    kernels = [row["kernel"] for row in rows if row["reason"] == once]
    assert all(kernel.startswith("f32-f32-conv2d-") for kernel in kernels)
    assert [row["reason"] for row in rows if row["kind"] == "matmul"] == ["codebook levels, from a table"]


def test_layers_among_others(made) -> None:
    rules = [Rule("stem", "fp32"), Rule("wide", "int8-weight"), Rule("point", group_size=64, weight_levels="log2")]
    recipe = Recipe(precision="int4-weight", rules=rules)
    rows = bundles.read(made(recipe)).manifest["operators"]
    found = [row["precision"] for row in rows if row["kind"] == "conv2d"]
    assert found == ["fp32", "int8-weight", "fp32", "int4-weight", "int4-weight"]
    assert tvmq.verify(made(recipe)).ok


def test_verify_finds_a_changed_weight(made) -> None:
    bundle = bundles.read(made(LOOKED_UP))
    name = next(entries[0]["parameter"] for entries in bundle.manifest["packed"].values() if len(entries) == 2)
    parameters = {key: array.copy() for key, array in bundle.parameters().items()}
    parameters[name].ravel()[:] ^= 0x77
    block, index = bundles.pack_parameters(parameters)
    changed = bundles.Bundle({**bundle.manifest, "parameters": index}, {**bundle.members, "params.bin": block})
    assert not tvmq.verify(changed).outputs_agree


def test_a_whole_model_can_be_timed() -> None:
    target, model = tvmq.load_target("host"), tvmq.import_model(pair(), (torch.zeros(1, 32, 8, 8),))
    realized = realized_module(model, target, LOOKED_UP).module
    (seconds,) = whole.latencies(realized, target, LOOKED_UP, [None]) or ()
    assert seconds > 0


def test_sizes_share_what_is_made_of_their_weights(tmp_path: Path) -> None:
    target = tvmq.load_target("x86-64-avx2")
    if missing := target.missing_features(host_features()):
        pytest.skip(f"this machine lacks {', '.join(missing)}")
    torch.manual_seed(0)
    net = pair()
    x = np.random.default_rng(0).standard_normal((2, 32, 8, 8)).astype(np.float32)
    sizes = tvmq.import_model(net, x[:1], dynamic="input:0=1,2")
    with tvmq.load(compile_model(sizes, target, LOOKED_UP, None, tmp_path / "m.tvmq").path) as executor:
        want = net(torch.from_numpy(x)).detach().numpy()
        by_kernel: dict[tuple[str, str], list[object]] = {}
        for count, program in enumerate(executor.bundle.programs(), 1):
            assert numerics.sqnr_db(want[:count], executor(x[:count])[0]) > 15
            for weight in program.manifest["prepared"]["weights"]:
                held = executor.tensors()[weight["name"]]
                by_kernel.setdefault((weight["kernel"], weight["name"]), []).append(held)
    assert sum(map(len, by_kernel.values())) == 4 > len(by_kernel)
    assert all(one is same[0] for same in by_kernel.values() for one in same)


def test_a_manifest_that_does_not_fit_its_parameters_is_refused(made) -> None:
    bundle = bundles.read(made(LOOKED_UP))
    prepared = bundle.manifest["prepared"]
    weights, count = prepared["weights"], prepared["parameters"]
    nobody = {"name": "w", "kernel": "k", "reads": ["nobody"]}
    for changed, said in (
        ({"parameters": 1, "weights": [nobody]}, "expected weights that are made of parameters"),
        ({"parameters": count - 1, "weights": weights}, "expected weights that are made of parameters"),
        ({"parameters": count, "weights": [*weights, {**weights[0], "name": "more"}]}, f"expected {len(weights)} w"),
    ):
        with pytest.raises(BundleError, match=f"prepared: {said}"):
            tvmq.load(bundles.Bundle({**bundle.manifest, "prepared": changed}, bundle.members))


@pytest.mark.emulated
def test_a_board_decodes_what_was_sent(made, board_root: Path) -> None:
    path = made(LOOKED_UP, "raspberry-pi-4b")
    assert len(bundles.read(path).manifest["prepared"]["weights"]) == 4
    with EmulatedBoard(board_root).start(cpu="cortex-a72") as board:
        found = tvmq.verify(path, board.url)
    assert found.ok, str(found)
