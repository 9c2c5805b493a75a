"""Reading and rewriting the one dataflow block of a canonical Relax module.

A canonical module has one function, `main`, whose body is one dataflow block in A-normal form that returns a tuple
of tensors. Everything in tvmq that looks at a graph goes through this file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax

Array = npt.NDArray[Any]
Expr = Any  # tvm.relax.Expr: the binding is not typed
Visit = Callable[["Rewrite", str, Expr], "Expr | None"]


def main(module: tvm.IRModule) -> Any:
    """The function `main` of a module."""
    return module["main"]


def bindings(module: tvm.IRModule) -> Iterator[tuple[Any, Expr]]:
    """The (variable, value) pairs of `main`, in order, without the aliases that name outputs."""
    for block in main(module).body.blocks:
        for binding in block.bindings:
            yield binding.var, binding.value


def calls(module: tvm.IRModule) -> Iterator[tuple[Any, Any]]:
    """The (variable, call) pairs of `main` whose value is an operator call, in order."""
    return ((var, value) for var, value in bindings(module) if is_call(value))


def outputs(module: tvm.IRModule) -> list[Expr]:
    """The tensors that `main` returns, as expressions behind any aliases."""
    aliases = {var: value for var, value in bindings(module)}

    def resolve(expr: Expr) -> Expr:
        while expr in aliases and isinstance(aliases[expr], relax.Var | relax.Tuple):
            expr = aliases[expr]
        return expr

    result = resolve(main(module).body.body)
    fields = list(result.fields) if isinstance(result, relax.Tuple) else [result]
    return [resolve(field) for field in fields]


def is_call(expr: Expr, *names: str) -> bool:
    """Whether `expr` calls an operator, and one of `names` where they are given ("nn.conv2d", "tvmq.map")."""
    if not (isinstance(expr, relax.Call) and isinstance(expr.op, tvm.ir.Op)):
        return False
    return not names or op_name(expr) in names


def op_name(call: Any) -> str:
    """The operator's name without the dialect prefix `relax.`."""
    return str(call.op.name).removeprefix("relax.")


def is_constant(expr: Expr) -> bool:
    """Whether `expr` is a tensor constant."""
    return isinstance(expr, tvm.ir.GenericConst)


def to_numpy(constant: Any) -> Array:
    """The value of a tensor constant (bfloat16 through ml_dtypes)."""
    value = constant.value
    return np.asarray(value.numpy() if hasattr(value, "numpy") else np.array(value, dtype_of(constant)))


def constant(value: Array) -> Any:
    """A tensor constant of the dtype of `value`; unasked, TVM turns int64 into int32 and float64 into float32."""
    return relax.const(np.ascontiguousarray(value) if value.ndim else value, str(value.dtype))


def shape_of(expr: Expr) -> tuple[int, ...]:
    """The static shape of a tensor expression."""
    return tuple(int(extent) for extent in expr.ty.shape.values)


def is_static(expr: Expr) -> bool:
    """Whether `expr` is a tensor whose every extent is a number."""
    ty = expr.ty
    if not isinstance(ty, relax.TensorType) or ty.shape is None or not hasattr(ty.shape, "values"):
        return False
    return all(isinstance(extent, int | tvm.tirx.IntImm) for extent in ty.shape.values)


def clip_limits(call: Any) -> tuple[float, float]:
    """The lower and the upper limit of a `clip`; infinities where a side is open."""
    low, high = (float(getattr(limit, "value", limit)) for limit in call.args[1:])
    return low, high


def dtype_of(expr: Expr) -> str:
    """The element type of a tensor expression."""
    return str(expr.ty.dtype)


def operands(value: Expr) -> Iterator[Any]:
    """The variables that a bound value reads, with repeats."""
    if isinstance(value, relax.Var):
        yield value
    elif isinstance(value, relax.Call):
        for arg in value.args:
            yield from operands(arg)
    elif isinstance(value, relax.Tuple):
        for field in value.fields:
            yield from operands(field)
    elif isinstance(value, relax.TupleGetItem):
        yield from operands(value.tuple_value)


def users(module: tvm.IRModule) -> dict[Any, list[Any]]:
    """Each variable's readers, in order: binding variables; None stands for the function's result."""
    readers: dict[Any, list[Any]] = {}
    for var, value in bindings(module):
        for operand in operands(value):
            readers.setdefault(operand, []).append(var)
    for operand in operands(main(module).body.body):
        readers.setdefault(operand, []).append(None)
    return readers


def only_reader(readers: Mapping[Any, list[Any]], var: Any) -> Any:
    """The one reader of `var`, or None."""
    found = readers.get(var, [])
    return found[0] if len(found) == 1 else None


def substitute(value: Expr, env: Mapping[Any, Expr]) -> Expr:
    """`value` with every variable replaced through `env`; the same object where nothing changes."""
    if isinstance(value, relax.Var):
        return env.get(value, value)
    if isinstance(value, relax.Tuple):
        return relax.Tuple([substitute(field, env) for field in value.fields])
    if isinstance(value, relax.TupleGetItem):
        inner = substitute(value.tuple_value, env)
        return inner.fields[value.index] if isinstance(inner, relax.Tuple) else relax.TupleGetItem(inner, value.index)
    if isinstance(value, relax.Call):
        return relax.Call(value.op, [substitute(arg, env) for arg in value.args], value.attrs, value.ty_args)
    return value


@dataclass
class Rewrite:
    """What a visitor sees while `main` is re-emitted."""

    builder: Any
    old_of: dict[Any, Any]  # new variable -> the old one it stands for
    new_of: dict[Any, Any]  # old variable -> new expression
    values: dict[Any, Expr]  # new variable -> its value, in order
    names: dict[Any, str]  # new variable -> the name it should have
    current: Any = None  # the old variable whose binding is being visited
    added: list[Any] = field(default_factory=list)  # new parameters of `main`, after the old ones

    def parameter(self, name: str, like: Array) -> Any:
        """A new parameter of `main`, with the shape and dtype of `like`."""
        self.added.append(relax.Var(name, relax.TensorType(list(like.shape), str(like.dtype))))
        return self.added[-1]

    def emit(self, value: Expr, name: str) -> Any:
        """Bind `value` now under `name` (made unique at the end), and return its variable; nested calls come first."""
        if isinstance(value, relax.Call):
            value = self.builder.normalize(self._flat(value, name))
        var = relax.DataflowVar(name, value.ty if value.ty is not None else self.builder.normalize(value).ty)
        self.values[var] = value
        self.names[var] = name
        return var

    def value(self, expr: Expr) -> Expr:
        """The call behind a new variable, or the expression itself."""
        return self.values.get(expr, expr) if isinstance(expr, relax.Var) else expr

    def _flat(self, call: Any, name: str) -> Any:
        def flat(arg: Expr) -> Expr:
            if is_call(arg):
                return self.emit(arg, f"{name}_{op_name(arg).split('.')[-1]}")
            if isinstance(arg, relax.Tuple) and not isinstance(arg, relax.ShapeExpr):
                return relax.Tuple([flat(field) for field in arg.fields])
            return arg

        return relax.Call(call.op, [flat(arg) for arg in call.args], call.attrs, call.ty_args)


def rewrite(module: tvm.IRModule, visit: Visit) -> tvm.IRModule:
    """Re-emit `main`, asking `visit(rewrite, name, value)` for each binding; None keeps the value as it is.

    `value` has its variables replaced already. What nobody reads afterwards is dropped; names stay unless two clash.
    """
    function = main(module)
    state = Rewrite(relax.BlockBuilder(), {}, {param: param for param in function.params}, {}, {})
    for var, old_value in bindings(module):
        value = substitute(old_value, state.new_of)
        if not _is_leaf(value):
            value = state.builder.normalize(value)
            state.current = var
            new = visit(state, str(var.name), value)
            value = value if new is None else new
        if not _is_leaf(value):
            value = state.emit(value, str(var.name))
        if isinstance(value, relax.Var):
            state.old_of.setdefault(value, var)
        state.new_of[var] = value
    result = substitute(function.body.body, state.new_of)
    result = result if isinstance(result, relax.Tuple) else relax.Tuple([result])
    return _module([*function.params, *state.added], state, result, _attrs(function))


def _is_leaf(value: Expr) -> bool:
    return isinstance(value, relax.Var | relax.Tuple) or is_constant(value)


def _module(params: list[Any], state: Rewrite, result: Any, attrs: dict[str, Any]) -> tvm.IRModule:
    """A module of the live bindings, under unique names."""
    live = set(operands(result))
    kept: list[Any] = []
    for var, value in reversed(state.values.items()):
        if var in live:
            kept.append(var)
            live.update(operands(value))
    renamed: dict[Any, Any] = {}
    taken = {str(param.name) for param in params}
    block = []
    for var in reversed(kept):
        renamed[var] = relax.DataflowVar(unique(state.names[var], taken), var.ty)
        block.append(relax.VarBinding(renamed[var], _typed(substitute(state.values[var], renamed), state.values[var])))
    output = relax.Var("outputs", relax.TupleType([field.ty for field in result.fields]))
    block.append(relax.VarBinding(output, _typed(substitute(result, renamed), output)))
    body = _typed(relax.SeqExpr([relax.DataflowBlock(block)], output), output)
    dictionary = tvm.ir.make_node("ir.DictAttrs", **attrs) if attrs else None
    function = relax.Function(params, body, output.ty, True, dictionary)
    return tvm.IRModule({"main": function.with_attr("global_symbol", "main")})


def _typed(value: Expr, like: Expr) -> Expr:
    """`value` with the type that was inferred for `like`, from which it differs by variables only."""
    if value.ty is None or tvm.ir.Type.is_missing(value.ty):
        relax.expr._update_type(value, like.ty)
    return value


def unique(name: str, taken: set[str]) -> str:
    """`name`, or the first of `name_2`, `name_3`, ... that is not in `taken`, which it joins."""
    candidate, count = name, 1
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    taken.add(candidate)
    return candidate


def _attrs(function: Any) -> dict[str, Any]:
    keep = {} if function.attrs is None else {str(k): v for k, v in function.attrs.items()}
    keep.pop("global_symbol", None)
    return keep
