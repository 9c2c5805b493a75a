"""Quantization on random graphs: what must hold for every graph, table and recipe."""

import dataclasses
import random

import numpy as np
import pytest
import tvm
from tvm import relax

from tvmq import ir
from tvmq.graph.fusion import find_chains
from tvmq.model import Signature, TensorSpec
from tvmq.oracle import interpret
from tvmq.quantize.annotate import annotate
from tvmq.quantize.calibrate import calibrate
from tvmq.quantize.numerics import sqnr_db
from tvmq.quantize.plan import make_plan
from tvmq.quantize.realize import realize
from tvmq.quantize.table import CalibrationTable
from tvmq.recipe import Recipe
from tvmq.recipe_rules import Rule
from tvmq.recipe_values import Precision

SHAPE = (2, 5, 5, 4)
op = relax.op
LAYOUT = {"layout": "NHWC", "out_layout": "NHWC"}
INF = float("inf")


class _Grower:
    """Grows a graph of tensors of SHAPE; each operator reads the last tensor, or one of the last few."""

    def __init__(self, seed: int, builder: relax.BlockBuilder, inputs: list) -> None:
        self.rng, self.numbers = random.Random(seed), np.random.default_rng(seed)
        self.emit, self.tensors = builder.emit, list(inputs)

    def grow(self) -> None:
        x = self.tensors[-1] if self.rng.random() < 0.65 else self.rng.choice(self.tensors[-4:])
        self.tensors.append(self.emit(self.rng.choice(self.OPERATORS)(self, x)))

    def some(self) -> object:
        return self.rng.choice(self.tensors)

    def constant(self, *shape: int, scale: float = 0.3) -> object:
        return relax.const((self.numbers.standard_normal(shape) * scale).astype(np.float32))

    def conv(self, x: object, channels: int = 4) -> object:
        size = self.rng.choice([1, 3])
        weight = self.constant(4, size, size, channels, scale=0.25)
        return op.nn.conv2d(x, weight, padding=(size // 2, size // 2), data_layout="NHWC", kernel_layout="OHWI")

    def concat(self, x: object) -> object:
        return self.conv(self.emit(op.concat([x, self.some()], 3)), 8)

    def pad_and_slice(self, x: object) -> object:
        padded = self.emit(op.nn.pad(x, [0, 0, 1, 1, 1, 1, 0, 0], "constant", self.rng.choice([0.0, 0.0, 1.0])))
        return op.strided_slice(padded, [1, 2], [0, 1], [5, 6])

    def average(self, x: object) -> object:
        counted = self.rng.random() < 0.5
        return op.nn.avg_pool2d(x, (3, 3), (1, 1), (1, 1), count_include_pad=counted, **LAYOUT)

    def limit(self, x: object) -> object:
        return op.clip(x, *self.rng.choice([(-0.3, 0.8), (-0.3, 6.0), (-0.2, INF), (-INF, 0.7), (-INF, INF)]))

    OPERATORS = (
        *(conv,) * 3,
        *(lambda g, x: op.add(x, g.constant(1, 1, 1, 4)),) * 2,
        *(lambda g, x: op.add(x, g.some()),) * 3,
        lambda g, x: op.add(x, g.constant()),
        lambda g, x: op.multiply(x, g.some()),
        lambda g, x: op.multiply(x, g.emit(op.sigmoid(g.emit(op.mean(x, [1, 2], True))))),
        lambda g, x: op.subtract(x, g.some()),
        lambda g, x: op.add(g.some(), g.emit(op.mean(x, [1, 2], True))),
        lambda _, x: op.nn.relu(x),
        lambda _, x: op.sigmoid(x),
        lambda _, x: op.nn.gelu(x),
        lambda _, x: op.nn.softmax(x, -1),
        lambda _, x: op.nn.max_pool2d(x, (3, 3), (1, 1), (1, 1), **LAYOUT),
        lambda g, x: op.permute_dims(g.emit(op.permute_dims(x, [0, 3, 1, 2])), [0, 2, 3, 1]),
        lambda g, x: op.reshape(g.emit(op.reshape(x, (2, 100))), SHAPE),
        lambda g, x: op.matmul(x, g.constant(4, 4, scale=0.5)),
        concat,
        pad_and_slice,
        average,
        limit,
    )


def _random_module(seed: int) -> tvm.IRModule:
    builder = relax.BlockBuilder()
    inputs = [relax.Var(name, relax.TensorType(SHAPE, "float32")) for name in "xy"[: 1 + seed % 2]]
    with builder.function("main", inputs):
        with builder.dataflow():
            grower = _Grower(seed, builder, inputs)
            for _ in range(grower.rng.randint(5, 25)):
                grower.grow()
            extra = [grower.some() for _ in range(grower.rng.choice([0, 0, 1, 2]))]
            out = builder.emit_output(relax.Tuple([grower.tensors[-1], *extra]))
        builder.emit_func_output(out)
    return ir.rewrite(builder.get(), lambda *_: None)


def _random_recipe(rng: random.Random, names: list[str]) -> Recipe:
    rules = [Rule(rng.choice(names), Precision.FP32) for _ in range(rng.choice([0, 0, 2]))]
    return Recipe(
        precision="int8",
        symmetric=rng.random() < 0.3,
        per_channel=rng.random() < 0.7,
        observer=rng.choice(["min_max", "percentile"]),
        rules=rules,
    )


def _edited(rng: random.Random, table: CalibrationTable) -> CalibrationTable:
    tensors = dict(table.tensors)
    for name in rng.sample(list(tensors), rng.choice([0, len(tensors) // 3])):
        if rng.random() < 0.5:
            tensors[name] = dataclasses.replace(tensors[name], keep_float=True)
        else:
            del tensors[name]
    return dataclasses.replace(table, tensors=tensors)


def _chains(module: tvm.IRModule) -> list[list[str]]:
    return [[str(member.name) for member in chain.members] for chain in find_chains(module)]


def _check(seed: int) -> None:
    module, rng = _random_module(seed), random.Random(seed)
    signature = Signature(tuple(TensorSpec(str(p.name), SHAPE, "float32") for p in ir.main(module).params), ())
    numbers = np.random.default_rng(seed)
    batches = [tuple(numbers.standard_normal(SHAPE).astype(np.float32) for _ in signature.inputs) for _ in range(2)]
    recipe = _random_recipe(rng, [str(var.name) for var, _ in ir.calls(module)] or ["none"])
    table = _edited(rng, calibrate(module, signature, batches, recipe))
    plan = make_plan(module, table, recipe, {})
    qdq = annotate(module, plan, recipe)

    # Fusion alone changes nothing.
    for a, b in zip(interpret.run(module, batches[0]), interpret.run(realize(module), batches[0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    # One decision an operator, a reason for each that is float.
    decided, fused = [d.name for d in plan.decisions], {name for chain in _chains(module) for name in chain[:-1]}
    assert sorted([*decided, *fused]) == sorted(str(var.name) for var, _ in ir.calls(module))
    assert all(bool(d.reason) == (d.precision is Precision.FP32) for d in plan.decisions)
    # No quantize inside a chain.
    assert _chains(qdq) == _chains(module)
    # The integer graph computes what its simulation does, in either storage.
    results = [interpret.run(realize(qdq, storage), batches[0]) for storage in ("int8", "uint8")]
    for simulated, a, b in zip(interpret.run(qdq, batches[0]), *results, strict=True):
        assert (a == b).all()
        assert a.shape == simulated.shape and a.dtype == np.float32
        assert sqnr_db(simulated, a) > 30
    # Nothing is left that the plan called integer.
    calls = {str(var.name): call for var, call in ir.calls(realize(qdq))}
    for d in plan.decisions:
        if d.kind in ("conv2d", "matmul") and d.name in calls:
            assert (ir.dtype_of(calls[d.name].args[1]) == "int8") == (d.precision is Precision.INT8), d
        if d.kind == "concat" and d.name in calls:
            assert ir.op_name(calls[d.name]) == ("tvmq.concat" if d.precision is Precision.INT8 else "concat"), d


@pytest.mark.parametrize("seed", range(40))
def test_random_graphs(seed: int):
    _check(seed)


@pytest.mark.slow
def test_many_random_graphs():
    for seed in range(1000, 2000):
        _check(seed)
