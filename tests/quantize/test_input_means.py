"""Means of what layers read: of however many samples, in batches of any size, from one pass over the data."""

from collections.abc import Iterator

import numpy as np
from tvm import relax

from tvmq import ir
from tvmq.graph.fusion import find_chains
from tvmq.quantize.calibration import calibrate
from tvmq.quantize.input_means import InputMeans
from tvmq.quantize.refine import means_for
from tvmq.recipe import Recipe
from tvmq.recipe_rules import Rule

op = relax.op
LAYOUTS = {"data_layout": "NHWC", "kernel_layout": "OHWI", "out_layout": "NHWC"}


def _two_readers(graph):
    """x [2, 4, 4, 3], read by a convolution and by a linear layer."""

    def body(emit, x):
        convolved = emit(op.nn.conv2d(x, ir.constant(np.ones((5, 3, 3, 3), np.float32)), padding=1, **LAYOUTS), "conv")
        linear = emit(op.matmul(x, ir.constant(np.ones((3, 5), np.float32))), "linear")
        return emit(op.add(convolved, linear), "sum")

    return graph(body, (2, 4, 4, 3))


def test_means_are_of_all_samples_in_batches_of_any_size(graph) -> None:
    chains = [chain for chain in find_chains(_two_readers(graph)) if chain.kind in ("conv2d", "matmul")]
    (read,) = {str(chain.x.name) for chain in chains}
    samples = np.random.default_rng(0).standard_normal((12, 4, 4, 3)).astype(np.float32)
    whole, parts = InputMeans(chains), InputMeans(chains)
    whole.see(read, samples)
    for start in range(12):
        parts.see(read, samples[start : start + 1])
        parts.see("another", samples)
    for chain in chains:
        want = samples.mean(axis=0, dtype=np.float64, keepdims=True)
        np.testing.assert_allclose(whole.of(chain), want, atol=1e-6)
        np.testing.assert_allclose(parts.of(chain), want, atol=1e-6)


def test_rows_of_linear_layers_are_alike(graph) -> None:
    def body(emit, x):
        return emit(op.matmul(x, ir.constant(np.ones((3, 5), np.float32))), "linear")

    (chain,) = (c for c in find_chains(graph(body, (2, 7, 3))) if c.kind == "matmul")
    means = InputMeans([chain])
    assert means.of(chain) is None
    rows = np.random.default_rng(0).standard_normal((2, 7, 3)).astype(np.float32)
    means.see(str(chain.x.name), rows)
    np.testing.assert_allclose(means.of(chain), rows.reshape(14, 3).mean(0, dtype=np.float64)[np.newaxis], atol=1e-6)


def test_only_recipes_that_want_means_gather_them(graph) -> None:
    module = _two_readers(graph)
    sample = np.ones((2, 4, 4, 3), np.float32)
    ruled = Recipe(precision="int8", algorithms=[], rules=[Rule("conv", algorithms=["bias_correction_analytic"])])
    recipes = {"auto": Recipe(precision="int8"), "ruled": ruled, "none": Recipe(precision="int8", algorithms=[])}
    chain = find_chains(module)[0]
    found = {}
    for name, recipe in recipes.items():
        means = means_for(module, recipe)
        means.see(str(chain.x.name), sample)
        found[name] = means.of(chain) is not None
    assert found == {"auto": True, "ruled": True, "none": False}


def test_errors_come_from_the_pass_that_finds_ranges(imported) -> None:
    model = imported("conv_bn_relu")
    shape = model.signature.inputs[0].shape
    read = []

    def stream() -> Iterator[np.ndarray]:
        for seed in range(9):
            read.append(seed)
            yield np.random.default_rng(seed).standard_normal(shape).astype(np.float32)

    table = calibrate(model, Recipe(precision="int8"), stream())
    assert read == list(range(9)) and table.samples == 9 and table.mean_errors
