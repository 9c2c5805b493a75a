"""One operator at a time, legalized and compiled by TVM for this machine: whatever has no rule here."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax

Array = npt.NDArray[Any]
Value = Any  # an array, or a tuple of values


def compute(call: Any, args: list[Value]) -> Value:
    """Compute one call with TVM's own legalization, compiled for this machine."""
    arrays: list[Array] = []
    params: list[Any] = []

    def lift(expr: Any, value: Value) -> Any:
        if isinstance(value, np.ndarray):
            arrays.append(value)
            params.append(relax.Var(f"p{len(params)}", relax.TensorType(list(value.shape), str(value.dtype))))
            return params[-1]
        if isinstance(expr, relax.Tuple):
            return relax.Tuple([lift(f, v) for f, v in zip(expr.fields, value, strict=True)])
        return expr

    lifted = relax.Call(call.op, [lift(a, v) for a, v in zip(call.args, args, strict=True)], call.attrs, call.ty_args)
    builder = relax.BlockBuilder()
    with builder.function("main", params):
        builder.emit_func_output(builder.emit(lifted))
    module = builder.get()
    try:
        machine = _compiled(module.script(show_meta=True), _Carrier(module))
    # TVM's legalization and code generation raise Python's own kinds of error, and some of TVM's that derive from them.
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError) as error:
        text = str(error).strip().splitlines()
        raise CannotCompile(str(call.op.name), text[-1][:200] if text else type(error).__name__) from error
    result = machine["main"](*(tvm.runtime.tensor(np.asarray(a, order="C")) for a in arrays))
    return _to_numpy(result)


class CannotCompile(Exception):
    """TVM refused `operator`; `reason` is the last line of what it said."""

    def __init__(self, operator: str, reason: str) -> None:
        self.operator = operator
        self.reason = reason
        super().__init__(f"{operator}: {reason}")


class _Carrier:
    """Takes a module past a cache whose key is the module's text: all carriers compare equal."""

    def __init__(self, module: tvm.IRModule) -> None:
        self.module = module

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Carrier)

    def __hash__(self) -> int:
        return 0


@functools.lru_cache(maxsize=256)
def _compiled(_text: str, carrier: _Carrier) -> Any:
    # Each call runs once or twice: optimizing its code would take longer than it saves.
    executable = relax.build(carrier.module, target=tvm.target.Target({"kind": "llvm", "opt-level": 0}))
    return relax.VirtualMachine(executable, tvm.cpu())


def _to_numpy(value: Any) -> Value:
    return value.numpy() if hasattr(value, "numpy") else tuple(_to_numpy(item) for item in value)
