"""What follows from parameters alone is computed once, when a bundle is loaded, by a function of its own.

main(x, packed, scales, bias):  w = call_tir(decode, packed, scales);  y = call_tir(gemm, x, w, bias)
  ->  prepare(packed, scales): (w,)
      main(x, bias, w):  y = call_tir(gemm, x, w, bias)
"""

from __future__ import annotations

import dataclasses
from typing import Any

import tvm
from tvm import relax

from tvmq import ir
from tvmq.kernels.lowering import Lowered

PREPARE = "prepare"


def split(lowered: Lowered) -> Lowered:
    """The module with `main` and `prepare`; `parameters` in the order in which main takes them, then prepare."""
    if not lowered.prepared:
        return lowered
    main = ir.main(lowered.module)
    made = {var: value for var, value in ir.bindings(lowered.module) if str(var.name) in lowered.prepared}
    reads = list(dict.fromkeys(operand for value in made.values() for operand in ir.operands(value)))
    weights = {var: relax.Var(str(var.name), var.ty) for var in made}
    rest = ir.rewrite(tvm.IRModule({"main": main}), lambda state, _name, _value: weights.get(state.current))
    params = [param for param in main.params if param not in reads]
    body = ir.main(rest)
    function = relax.Function([*params, *weights.values()], body.body, body.ret_ty, True, body.attrs)
    others = {var: f for var, f in lowered.module.functions.items() if str(var.name_hint) != "main"}
    module = tvm.IRModule({"main": function, PREPARE: _prepare(reads, made), **others})
    names = [str(var.name) for var in reads]
    kept = {name: array for name, array in lowered.parameters.items() if name not in names}
    return dataclasses.replace(
        lowered, module=module, parameters={**kept, **{name: lowered.parameters[name] for name in names}}
    )


def _prepare(reads: list[Any], made: dict[Any, Any]) -> Any:
    """A function of the parameters `reads` that gives what `made` holds, in its order."""
    params = {var: relax.Var(str(var.name), var.ty) for var in reads}
    builder = relax.BlockBuilder()
    with builder.function(PREPARE, list(params.values())):
        with builder.dataflow():
            results = [builder.emit(ir.substitute(value, params), str(var.name)) for var, value in made.items()]
            output = builder.emit_output(relax.Tuple(results))
        builder.emit_func_output(output)
    return builder.get()[PREPARE]
