"""Reading and rewriting the one dataflow block of a canonical module."""

import numpy as np
import pytest
import tvm
from tvm import relax

from tvmq import ir
from tvmq.oracle import interpret

op = relax.op
SHAPE = (2, 3)
X = np.arange(6, dtype=np.float32).reshape(SHAPE) - 2


def _module(build, *, shape: tuple[object, ...] = SHAPE) -> tvm.IRModule:
    """`build(builder, x)` binds and returns the outputs."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(shape, "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            output = builder.emit_output(build(builder, x))
        builder.emit_func_output(output)
    return builder.get()


def _chain(builder: relax.BlockBuilder, x: relax.Var) -> relax.Expr:
    y = builder.emit(op.nn.relu(x), "y")
    z = builder.emit(op.add(y, x), "z")
    return relax.Tuple([z, y])


def _names(module: tvm.IRModule) -> list[str]:
    return [str(var.name) for var, _ in ir.calls(module)]


class TestReading:
    def test_calls_and_outputs(self) -> None:
        module = _module(_chain)
        assert [(str(var.name), ir.op_name(call)) for var, call in ir.calls(module)] == [("y", "nn.relu"), ("z", "add")]
        assert [str(out.name) for out in ir.outputs(module)] == ["z", "y"]

    def test_one_output_without_a_tuple(self) -> None:
        module = _module(lambda builder, x: builder.emit(op.nn.relu(x), "y"))
        assert [ir.op_name(dict(ir.bindings(module))[out]) for out in ir.outputs(module)] == ["nn.relu"]

    def test_users(self) -> None:
        module = ir.rewrite(_module(_chain), lambda *_: None)
        readers = {
            str(var.name): [None if r is None else str(r.name) for r in rs] for var, rs in ir.users(module).items()
        }
        assert readers == {"x": ["y", "z"], "y": ["z", "outputs"], "z": ["outputs"], "outputs": [None]}

    def test_users_count_repeats(self) -> None:
        module = _module(lambda builder, x: builder.emit(op.add(x, x), "y"))
        assert len(ir.users(module)[ir.main(module).params[0]]) == 2

    def test_operands(self) -> None:
        a, b = (relax.Var(name, relax.TensorType(SHAPE, "float32")) for name in "ab")
        pair = relax.Var("p", relax.TupleType([a.ty, b.ty]))
        assert list(ir.operands(op.concat([a, b, a], 0))) == [a, b, a]
        assert list(ir.operands(relax.TupleGetItem(pair, 1))) == [pair]
        assert list(ir.operands(a)) == [a]
        assert list(ir.operands(ir.constant(X))) == []

    def test_is_call(self) -> None:
        relu = op.nn.relu(relax.Var("x", relax.TensorType(SHAPE, "float32")))
        assert ir.is_call(relu) and ir.is_call(relu, "add", "nn.relu")
        assert not ir.is_call(relu, "add") and not ir.is_call(relu.args[0]) and not ir.is_call(None)

    @pytest.mark.parametrize("shape", [(), (3,), (2, 0), (2, 3)])
    @pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int64", "int32", "int8", "uint8", "bool"])
    def test_constants_come_back_as_they_went(self, shape: tuple[int, ...], dtype: str) -> None:
        value = (np.arange(np.prod(shape, dtype=int)).reshape(shape) % 2).astype(dtype)
        constant = ir.constant(value)
        assert ir.is_constant(constant) and ir.shape_of(constant) == shape and ir.dtype_of(constant) == dtype
        back = ir.to_numpy(constant)
        assert back.dtype == value.dtype and back.shape == shape and (back == value).all()

    def test_constants_of_views(self) -> None:
        for view in (X.T, X[:, ::-1], X[::2], np.broadcast_to(np.float32(3), (2, 2))):
            assert (ir.to_numpy(ir.constant(view)) == view).all()

    def test_static(self) -> None:
        n = tvm.tirx.Var("n", "int64")
        assert ir.is_static(ir.constant(X))
        assert not ir.is_static(relax.Var("x", relax.TensorType((n, 3), "float32")))
        assert not ir.is_static(relax.Var("x", relax.TensorType(ndim=2, dtype="float32")))
        assert not ir.is_static(relax.Var("x", relax.TupleType([])))


class TestSubstitute:
    def test_in_every_kind_of_value(self) -> None:
        a, b, c = (relax.Var(name, relax.TensorType(SHAPE, "float32")) for name in "abc")
        pair = relax.Var("p", relax.TupleType([a.ty, b.ty]))
        assert ir.substitute(a, {a: c}).same_as(c) and ir.substitute(b, {a: c}).same_as(b)
        assert list(ir.operands(ir.substitute(op.concat([a, b], 0), {a: c}))) == [c, b]
        assert ir.substitute(relax.TupleGetItem(pair, 1), {pair: relax.Tuple([a, b])}).same_as(b)
        assert ir.substitute(relax.TupleGetItem(pair, 1), {}).tuple_value.same_as(pair)


class TestRewrite:
    def test_keeps_what_nobody_changes(self) -> None:
        module = ir.rewrite(_module(_chain), lambda *_: None)
        assert _names(module) == ["y", "z"]
        tvm.ir.assert_structural_equal(ir.rewrite(module, lambda *_: None), module, map_free_vars=True)
        relax.analysis.well_formed(module)

    def test_replaces_and_keeps_the_name(self) -> None:
        def visit(_state: ir.Rewrite, _name: str, value: object) -> object:
            return op.sigmoid(value.args[0]) if ir.is_call(value, "nn.relu") else None

        module = ir.rewrite(_module(_chain), visit)
        assert [(str(var.name), ir.op_name(call)) for var, call in ir.calls(module)] == [("y", "sigmoid"), ("z", "add")]
        relax.analysis.well_formed(module)

    def test_replaces_by_an_operand_and_drops_what_is_dead(self) -> None:
        module = ir.rewrite(
            _module(_chain), lambda _state, _name, value: value.args[0] if ir.is_call(value, "nn.relu") else None
        )
        assert _names(module) == ["z"]
        assert [str(out.name) for out in ir.outputs(module)] == ["z", "x"]

    def test_replaces_by_a_constant(self) -> None:
        module = ir.rewrite(_module(_chain), lambda _s, name, _v: ir.constant(X) if name == "z" else None)
        assert _names(module) == ["y"]
        np.testing.assert_array_equal(interpret.run(module, [X])[0], X)

    def test_nested_calls_are_bound_and_named(self) -> None:
        def visit(_state: ir.Rewrite, name: str, value: object) -> object:
            return op.sqrt(op.multiply(value.args[0], value.args[0])) if name == "y" else None

        module = ir.rewrite(_module(_chain), visit)
        assert _names(module) == ["y_multiply", "y", "z"]
        np.testing.assert_array_equal(interpret.run(module, [X])[1], np.abs(X))

    def test_nested_calls_inside_a_tuple(self) -> None:
        def visit(_state: ir.Rewrite, name: str, value: object) -> object:
            x = value.args[0]
            return (
                op.add(x, op.strided_slice(op.concat([x, op.negative(x)], 0), [0], [0], [2])) if name == "y" else None
            )

        module = ir.rewrite(_module(_chain), visit)
        assert [ir.op_name(call) for _, call in ir.calls(module)] == [
            "negative",
            "concat",
            "strided_slice",
            "add",
            "add",
        ]
        assert all(name.startswith("y_") for name in _names(module)[:3])
        np.testing.assert_array_equal(interpret.run(module, [X])[1], 2 * X)

    def test_clashing_names_are_made_unique(self) -> None:
        def visit(state: ir.Rewrite, name: str, value: object) -> object:
            return state.emit(op.nn.relu(state.emit(value, "x")), "x") if name == "y" else None

        assert _names(ir.rewrite(_module(_chain), visit)) == ["x_2", "x_3", "z"]

    def test_the_visitor_sees_new_and_old(self) -> None:
        seen = {}

        def visit(state: ir.Rewrite, name: str, value: object) -> object:
            if name == "y":
                return op.sigmoid(value.args[0])
            y = value.args[0]
            seen.update(op=ir.op_name(state.value(y)), old=str(state.old_of[y].name), now=str(state.current.name))
            return None

        ir.rewrite(_module(_chain), visit)
        assert seen == {"op": "sigmoid", "old": "y", "now": "z"}

    def test_parts_of_a_tuple(self) -> None:
        def build(builder: relax.BlockBuilder, x: relax.Var) -> relax.Expr:
            parts = builder.emit(op.split(x, 3, 1), "parts")
            return builder.emit(op.add(builder.emit(parts[0], "left"), builder.emit(parts[2], "right")), "sum")

        module = ir.rewrite(_module(build), lambda *_: None)
        np.testing.assert_array_equal(interpret.run(module, [X])[0], X[:, :1] + X[:, 2:])
        swapped = ir.rewrite(
            module,
            lambda state, name, value: (
                relax.Tuple([state.emit(op.negative(value.args[0]), "n")] * 3) if name == "parts" else None
            ),
        )
        assert "split" not in {ir.op_name(call) for _, call in ir.calls(swapped)}

    def test_one_output_becomes_a_tuple(self) -> None:
        module = ir.rewrite(_module(lambda builder, x: builder.emit(op.nn.relu(x), "y")), lambda *_: None)
        assert isinstance(ir.main(module).body.body.ty, relax.TupleType)

    def test_attributes_stay_and_parameters_are_added(self) -> None:
        module = _module(_chain)
        module = tvm.IRModule({"main": ir.main(module).with_attr("note", "kept")})

        def visit(state: ir.Rewrite, name: str, value: object) -> object:
            return op.add(value, state.parameter("extra", X)) if name == "z" else None

        module = ir.rewrite(module, visit)
        assert ir.main(module).attrs["note"] == "kept"
        assert [str(param.name) for param in ir.main(module).params] == ["x", "extra"]
        np.testing.assert_array_equal(interpret.run(module, [X, X])[0], np.maximum(X, 0) + 2 * X)
