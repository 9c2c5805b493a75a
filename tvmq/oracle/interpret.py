"""A NumPy interpreter of Relax modules: float graphs, graphs with QDQ, and realized integer graphs (the oracle).

tvmq's own operators are computed by `tvmq_operators`; well-known float ones by `relax_operators`; anything else by TVM,
one operator at a time (`by_tvm`), so that what is computed is what TVM would run.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax

from tvmq import ir, ops
from tvmq.errors import ModelError
from tvmq.oracle import by_tvm, relax_operators, tvmq_operators
from tvmq.oracle.chains import Fused, fused_convolutions
from tvmq.quantize import numerics

Array = npt.NDArray[Any]
Value = Any  # an array, or a tuple of values
Watch = Callable[[str, Array], Array | None]
Fetch = Callable[[Mapping[Any, Value]], Value]


def run(module: tvm.IRModule, inputs: Sequence[Array], watch: Watch | None = None) -> tuple[Array, ...]:
    """Compute `main` on `inputs` once. See `Program.run`; make a `Program` to run a module often."""
    return Program(module).run(inputs, watch)


class Program:
    """A module ready to be interpreted: constants converted, operators looked up, last uses known.

    watched: the names of the tensors that `watch` wants to see; None means all. Where none is inside a float
    convolution and its followers, these are one step.
    """

    def __init__(self, module: tvm.IRModule, watched: Container[str] | None = None) -> None:
        self.params = list(ir.main(module).params)
        self.result = ir.main(module).body.body
        self.watched = watched
        fused = [] if watched is None else fused_convolutions(module, watched)
        ends = {chain.members[-1]: chain for chain in fused}
        inside = {member for chain in fused for member in chain.members[:-1]}
        bindings = [(var, value) for var, value in ir.bindings(module) if var not in inside]
        reads = [ends[var].operands if var in ends else tuple(ir.operands(value)) for var, value in bindings]
        dead = _dead_after(reads, ir.operands(self.result))
        self.steps = [
            _Step(var, str(var.name), value, dead.get(index, []), *_how(value, ends.get(var)))
            for index, (var, value) in enumerate(bindings)
        ]

    def run(self, inputs: Sequence[Array], watch: Watch | None = None) -> tuple[Array, ...]:
        """Compute the outputs; `watch(name, array)` sees the inputs and each tensor that a variable is bound to.

        What it returns, unless None, goes on in place of a tensor that was computed.
        """
        env: dict[Any, Value] = dict(zip(self.params, inputs, strict=True))
        watched = self.watched
        if watch:
            for var, array in env.items():
                if watched is None or var.name in watched:
                    watch(str(var.name), array)
        for step in self.steps:
            result = step.compute(step.name, [fetch(env) for fetch in step.fetches])
            env[step.var] = result
            seen = watch is not None and (watched is None or step.name in watched)
            if watch and seen and isinstance(result, np.ndarray) and not isinstance(step.value, relax.Var):
                other = watch(step.name, result)
                env[step.var] = result if other is None else other
            for var in step.dead:
                env.pop(var, None)
        outputs = _fetcher(self.result)(env)
        return outputs if isinstance(outputs, tuple) else (outputs,)


@dataclass(frozen=True)
class _Step:
    var: Any
    name: str
    value: Any
    dead: list[Any]
    fetches: list[Fetch]
    compute: Callable[[str, list[Value]], Value]


def _how(value: Any, fused: Fused | None) -> tuple[list[Fetch], Callable[[str, list[Value]], Value]]:
    """What is looked up for a binding, and how its value is computed from that."""
    if fused is not None:
        chain = fused
        return [_fetcher(operand) for operand in chain.operands], lambda _name, args: chain.compute(args)
    fetches = [_fetcher(arg) for arg in _args(value)]
    if isinstance(value, relax.Call):
        return fetches, lambda name, args: _compute(name, value, args)
    return fetches, lambda _name, args: args[0]


def evaluate(value: Any, env: Mapping[Any, Value]) -> Value:
    """The value of one bound expression."""
    args = [_fetcher(arg)(env) for arg in _args(value)]
    return _compute("a constant", value, args) if isinstance(value, relax.Call) else args[0]


def _args(value: Any) -> list[Any]:
    return list(value.args) if isinstance(value, relax.Call) else [value]


def _compute(name: str, call: Any, args: list[Value]) -> Value:
    try:
        result = _apply(call, args)
    except by_tvm.CannotCompile as error:
        raise ModelError(f"TVM cannot compile {error.operator} ({name})", seen=error.reason) from error
    # NumPy's arithmetic turns arrays of no dimension into scalars of another class.
    return np.asarray(result) if isinstance(result, np.generic) else result


def _apply(call: Any, args: list[Value]) -> Value:
    name = ir.op_name(call) if isinstance(call.op, tvm.ir.Op) else ""
    if name.startswith(ops.PREFIX):
        result = tvmq_operators.RULES[name.removeprefix(ops.PREFIX)](call, [numerics.widened(arg) for arg in args])
        out_dtype = ops.attributes(call)["out_dtype"]
        return numerics.to_half(result, out_dtype) if out_dtype in numerics.HALVES else result
    if name != "astype" and args and isinstance(args[0], np.ndarray) and args[0].dtype == numerics.BF16:
        # What is left are moves, and TVM compiles no bfloat16: moved as bits.
        return _apply(call, [args[0].view(np.uint16), *args[1:]]).view(numerics.BF16)
    if name in relax_operators.RULES and relax_operators.same_as_tvm(name, call, args):
        return relax_operators.RULES[name](call, args)
    return by_tvm.compute(call, args)


def _fetcher(expr: Any) -> Fetch:
    """A function that looks `expr` up in an environment; constants are converted once, here."""
    if isinstance(expr, relax.Var):
        return lambda env: env[expr]
    if ir.is_constant(expr):
        value = _shared(expr)
        return lambda env: value
    if isinstance(expr, relax.Tuple):
        fields = [_fetcher(field) for field in expr.fields]
        return lambda env: tuple(field(env) for field in fields)
    if isinstance(expr, relax.TupleGetItem):
        whole, index = _fetcher(expr.tuple_value), int(expr.index)
        return lambda env: whole(env)[index]
    return lambda env: expr  # a shape, a number


def _shared(constant: Any) -> Array:
    """The value of a constant, to be read only, without a copy: a large model's weights take most of the memory."""
    if not hasattr(constant.value, "numpy") or ir.dtype_of(constant) == "bfloat16":
        return ir.to_numpy(constant)
    return np.from_dlpack(constant.value)


def _dead_after(reads: Sequence[Iterable[Any]], results: Iterable[Any]) -> dict[int, list[Any]]:
    """Step -> the variables that nobody reads after it. reads: the variables that each step reads."""
    last = {operand: index for index, operands in enumerate(reads) for operand in operands}
    for operand in results:
        last.pop(operand, None)
    dead: dict[int, list[Any]] = {}
    for var, index in last.items():
        dead.setdefault(index, []).append(var)
    return dead
