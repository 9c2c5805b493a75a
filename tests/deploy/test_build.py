"""Compiling, checking on the spot, and what the manifest says of a product."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tvm

from tvmq import op_calls, ops
from tvmq.deploy import build
from tvmq.deploy.build import agrees, runs_here
from tvmq.deploy.bundle import read
from tvmq.deploy.exact import is_exact_graph, rounds_inexact
from tvmq.errors import CheckFailed, OutputError
from tvmq.oracle import interpret
from tvmq.target import load_target

F32 = np.float32


# --- agreement ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("want", "got", "exact", "expected"),
    [
        (np.array([1, 2], np.int8), np.array([1, 2], np.int8), True, True),
        (np.array([1, 2], np.int8), np.array([1, 3], np.int8), True, False),
        (np.array([1, 2], np.int8), np.array([1, 3], np.int8), False, True),
        (np.array([1, 2], np.int8), np.array([1, 4], np.int8), False, False),
        (np.array([0, 255], np.uint8), np.array([1, 254], np.uint8), False, True),
        (np.array([0, 255], np.uint8), np.array([255, 255], np.uint8), False, False),
        (np.array([1.0, 2.0], F32), np.array([1.0, 2.0000002], F32), True, False),
        (np.array([1.0, 2.0], F32), np.array([1.0, 2.001], F32), False, True),
        (np.array([1.0, 2.0], F32), np.array([1.0, 2.01], F32), False, False),
        (np.array([1.0, np.nan], F32), np.array([1.0, np.nan], F32), True, True),
        (np.array([1.0, np.nan], F32), np.array([1.0, 2.0], F32), False, False),
        (np.array([1.0, -np.inf], F32), np.array([1.0005, -np.inf], F32), False, True),
        (np.array([1.0, -np.inf], F32), np.array([3.0, -np.inf], F32), False, False),
        (np.array([1.0], F32), np.array([[1.0]], F32), False, False),
        (np.array([1.0], F32), np.array([1.0]), False, False),
        (np.array([3]), np.array([4]), True, False),
        (np.array([True]), np.array([False]), True, False),
        (np.zeros((0,), F32), np.zeros((0,), F32), True, True),
        (np.array(0.0, F32), np.array(0.0, F32), False, True),
    ],
)
def test_agreement(want: np.ndarray, got: np.ndarray, exact: bool, expected: bool) -> None:
    assert agrees(want, got, exact) is expected


@pytest.mark.parametrize(
    ("name", "exact"),
    [
        ("residual", True),
        ("concat", True),
        ("pools", True),
        ("split", True),
        ("activations", True),
        ("forks", True),
        ("broadcasts", False),
    ],
)
def test_which_integer_models_are_exact(bundle_of: Callable[..., Path], name: str, exact: bool) -> None:
    assert read(bundle_of(name)).manifest["exact"] is exact


def test_float_models_are_not_exact(bundle_of: Callable[..., Path]) -> None:
    assert read(bundle_of("residual", "fp32")).manifest["exact"] is False


def test_a_graph_that_only_moves_is_exact() -> None:
    from tvm import relax

    def graph(emit) -> tvm.IRModule:
        builder, x = relax.BlockBuilder(), relax.Var("x", relax.TensorType([2, 6], "float32"))
        with builder.function("main", [x]):
            with builder.dataflow():
                y = builder.emit_output(relax.Tuple([builder.emit(emit(x))]))
            builder.emit_func_output(y)
        return builder.get()

    assert is_exact_graph(graph(lambda x: relax.op.permute_dims(x)))
    assert is_exact_graph(graph(lambda x: relax.op.greater(x, relax.const(0.5))))
    assert not is_exact_graph(graph(lambda x: relax.op.exp(x)))
    assert not is_exact_graph(graph(lambda x: relax.op.sum(x)))
    integers = relax.Var("i", relax.TensorType([2], "int64"))
    builder = relax.BlockBuilder()
    with builder.function("main", [integers]):
        with builder.dataflow():
            y = builder.emit_output(relax.Tuple([builder.emit(relax.op.add(integers, integers))]))
        builder.emit_func_output(y)
    assert is_exact_graph(builder.get())


def test_where_floats_that_differ_a_little_are_rounded() -> None:
    """A sum in another order becomes another integer, or another bfloat16; exact results and float32 do not."""
    from tvm import relax

    def graph(*steps: Callable) -> tvm.IRModule:
        builder, x = relax.BlockBuilder(), relax.Var("x", relax.TensorType([2, 6], "float32"))
        with builder.function("main", [x]):
            with builder.dataflow():
                value = x
                for step in steps:
                    value = builder.emit(step(value))
                y = builder.emit_output(relax.Tuple([value]))
            builder.emit_func_output(y)
        return builder.get()

    def as_int8(x: relax.Expr) -> relax.Expr:
        return relax.op.astype(x, "int8")

    assert rounds_inexact(graph(relax.op.exp, as_int8))
    assert rounds_inexact(graph(relax.op.exp, relax.op.negative, lambda x: relax.op.astype(x, "bfloat16")))
    assert not rounds_inexact(graph(as_int8, lambda x: relax.op.astype(x, "float32"), relax.op.exp))

    def rounded(x: relax.Expr) -> relax.Expr:
        return op_calls.elementwise(x, (), (ops.Round(-3, 3),), out_shape=(2, 6), out_dtype="float32")

    assert rounds_inexact(graph(relax.op.exp, rounded)) and not rounds_inexact(graph(rounded, relax.op.exp))
    assert not rounds_inexact(graph(relax.op.exp))


# --- the check ------------------------------------------------------------------------------------------------------


@pytest.fixture
def product(imported: Callable, monkeypatch: pytest.MonkeyPatch) -> build.Product:
    """The product of a small integer model, caught on its way."""
    from samples import calibration_of

    from tvmq import pipeline
    from tvmq.recipe import Recipe

    caught = []

    class Stop(Exception):
        pass

    def compile_library(product: build.Product) -> bytes:
        caught.append(product)
        raise Stop

    model = imported("flatten_linear")
    with monkeypatch.context() as patch:
        patch.setattr(build, "compile_library", compile_library)
        with pytest.raises(Stop):
            pipeline.compile_model(model, "host", Recipe(precision="int8"), calibration_of(model), "never.tvmq")
    return caught[0]


def test_a_library_that_disagrees_is_not_written(product: build.Product) -> None:
    library = build.compile_library(product)
    expected = interpret.run(product.realized, product.model.example)
    build.check(product, library, expected)
    wrong = tuple(np.nextafter(y, np.float32(np.inf)) for y in expected)
    with pytest.raises(
        CheckFailed,
        match="disagrees with the oracle in output 0: expected equal bits, saw a difference of .*; this is a bug",
    ):
        build.check(product, library, wrong)


def test_what_cannot_run_here_is_not_checked(product: build.Product) -> None:
    other = dataclasses.replace(product, target=load_target("raspberry-pi-4b"))
    build.check(other, b"nothing", ())


def test_linking_that_fails_is_said(product: build.Product, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(OutputError, match="no module ziglang; install it"):
        build.compile_library(product)


def test_this_machine_runs_its_own_code() -> None:
    assert runs_here(load_target("host"))
    assert not runs_here(load_target("beaglebone"))
    assert not runs_here(load_target("graviton3")) or not runs_here(load_target("x86-64-avx2"))


# --- the report -----------------------------------------------------------------------------------------------------


def test_each_operator_has_a_row(bundle_of: Callable[..., Path]) -> None:
    manifest = read(bundle_of("transformer")).manifest
    rows = manifest["operators"]
    assert len({row["name"] for row in rows}) == len(rows)
    for row in rows:
        assert set(row) >= {"name", "path", "kind", "precision", "kernel", "reason"}
        assert row["reason"] or row["precision"] == "int8"
        assert row["kernel"]
    steps = {result["name"] for step in manifest["steps"] for result in step["results"]}
    assert {row["step"] for row in rows} - {""} <= steps


def test_paths_are_those_of_the_source_model(bundle_of: Callable[..., Path]) -> None:
    paths = {row["path"] for row in read(bundle_of("residual")).manifest["operators"] if row["kind"] == "conv2d"}
    assert "a2.1" in paths
