"""tvmq operators -> calls of TensorIR kernels for one target, weights packed.

    y = tvmq.conv2d(x, w, b, m)  ->  p = call_tir(pad, x);  y = call_tir(gemm, p, packed w, b', m)

Equal kernels are built once. Each call's kernel, in the words of the kernel table, goes into the report.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm
from tvm import relax

from tvmq import ir, ops
from tvmq.kernels import lower_attention, lower_grouped, lower_images, lower_matrix, lower_rest, lower_wide, tiles
from tvmq.kernels.decision import Decisions, Records
from tvmq.kernels.lowering import Lowered, Lowering
from tvmq.quantize import wide
from tvmq.recipe_values import Sparse
from tvmq.target import Target


def lower(
    module: tvm.IRModule,
    target: Target,
    *,
    winograd: bool = True,
    sparse: Sparse = Sparse.AUTO,
    records: Records | None = None,
) -> Lowered:
    """Lower every tvmq operator of `module`; other operators stay for TVM's own lowering.

    winograd: whether float convolutions may be computed by it. sparse: which products leave out weights that are zero.
    records: what was measured to be the fastest kernels of other products.
    Raises ModelError for weights that are not finite where their zeros are looked for.
    """
    variables = [*ir.main(module).params, *(var for var, _ in ir.bindings(module))]
    taken = frozenset(str(var.name) for var in variables)
    lowering = Lowering(target, winograd, sparse, Decisions(records), taken)
    main = ir.rewrite(module, lambda *step: visit(lowering, *step))
    functions = {"main": ir.main(main)}
    if lowering.tiles is not None:
        functions[tiles.PERMISSION] = tiles.permission()
    lowered = tvm.IRModule({**functions, **{var: f for var, f in lowering.functions.values()}})
    choices = lowering.decisions.made
    return Lowered(
        lowered,
        lowering.names,
        lowering.parameters,
        lowering.packed,
        lowering.notes,
        choices,
        lowering.prepared,
    )


def visit(lowering: Lowering, state: ir.Rewrite, name: str, value: Any) -> Any:
    """What becomes of one binding of main: see `ir.rewrite`."""
    if not ir.is_call(value):
        return None
    if ir.is_call(value, *ops.DEQUANTIZERS):
        return None  # a convolution's weight, which its kernel says how to make: see lower_decoded.py
    if not ir.op_name(value).startswith(ops.PREFIX):
        return relax.Call(value.op, lowering.lift(state, name, value.args), value.attrs, value.ty_args)
    rules = INT16_RULES if ir.dtype_of(value.args[0]) == wide.DTYPE else RULES
    rule = rules[ir.op_name(value).removeprefix(ops.PREFIX)]
    return rule(lowering, state, name, value)


RULES: dict[str, Callable[[Lowering, ir.Rewrite, str, Any], Any]] = {
    "conv2d": lower_matrix.conv2d,
    "matmul": lower_matrix.matmul,
    "grouped_matmul": lower_grouped.matmul,
    "asymmetric_matmul": lower_grouped.asymmetric,
    "lookup_matmul": lower_grouped.lookup,
    "avg_pool2d": lower_rest.pool,
    "max_pool2d": lower_rest.pool,
    "adaptive_avg_pool2d": lower_images.adaptive_pool,
    "resize2d": lower_images.resize,
    "cubic2d": lower_images.cubic,
    "map": lower_rest.elementwise,
    "concat": lower_rest.concat,
    "embedding": lower_rest.embedding,
    "layer_norm": lower_rest.rowwise,
    "group_norm": lower_images.group_norm,
    "softmax": lower_rest.rowwise,
    "attention": lower_attention.attention,
    "batch_matmul": lower_rest.batch_matmul,
}
# Of what reads int16.
INT16_RULES = {**RULES, "conv2d": lower_wide.conv2d, "matmul": lower_wide.matmul}
