"""QDQ -> integer operators: each fusion chain becomes one tvmq operator with an epilogue.

    quantize(relu(add(conv2d(dequantize(x), dequantize(w)), b)), s, z)
      ->  tvmq.conv2d(x, w, b_int32, m; epilogue = bias, scale, quantize(z, max(qmin, z), qmax))

Rows that are quantized for dynamic linear layers are results of the kernel that makes them, where that sees whole rows,
else of a map; the epilogue of such a layer multiplies by the scale of its row. Chains without QDQ become float tvmq
operators in the same way, so that one pass does all fusion; conversions to 16 bits and back say what float operators
read and make. Weights in groups are operands of linear layers as they are; convolutions read what these are dequantized
to. 8-bit activations are stored as `storage` asks ("int8", or "uint8" = the same number plus 128): the values that they
stand for are the same; int16 ones are as they are.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax

from tvmq import ir, op_calls, ops
from tvmq.graph import fusion
from tvmq.graph.fusion import Chain, find_chains
from tvmq.graph.pairs import CHANNEL_AXIS, is_symmetric
from tvmq.graph.reductions import is_for_integers
from tvmq.oracle import interpret
from tvmq.quantize import averages, moves, numerics, wide
from tvmq.quantize.annotate import reads_int16
from tvmq.quantize.epilogues import ChainEpilogue, Stored
from tvmq.quantize.kept import is_cubic, keeps_integers
from tvmq.quantize.narrow import no_stored_form
from tvmq.quantize.realize_products import Products

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class _Weight:
    """A weight's constant, and its float32 [channels] scales; None for weights that are multiplied as floats.

    groups: the constant scales of groups of its rows, and its bits; None where it has no groups. zero_points: the
    constant of groups' zero points, None where there are none. table: the constant that its integers are places in;
    None where they are numbers.
    """

    value: Any
    scales: Array | None
    groups: tuple[Any, int] | None = None
    zero_points: Any = None
    table: Any = None


# Operators whose constant operands are weights.
_MULTIPLIED = ("nn.conv2d", "matmul", "take")
# Anchors of kernels that see whole rows.
_ROWWISE = ("layer_norm", "softmax", "add", "subtract", "unary")


def realize(module: tvm.IRModule, storage: str = "int8") -> tvm.IRModule:
    """The module in tvmq operators. `storage`: the dtype of 8-bit activations, "int8" or "uint8"."""
    return _Realizer(module, storage).run()


class _Realizer:
    def __init__(self, module: tvm.IRModule, storage: str) -> None:
        self.module, self.storage = module, storage
        self.offset = 128 if storage == "uint8" else 0
        self.values = dict(ir.bindings(module))
        self.readers = ir.users(module)
        self.chain_of_end = {chain.end: chain for chain in find_chains(module)}
        self.chain_of_anchor = {chain.anchor: chain for chain in self.chain_of_end.values()}
        self.inside = {m for chain in self.chain_of_end.values() for m in chain.members[:-1]}
        chained = {*self.chain_of_end, *self.inside}
        self.products = Products(self.values, self.readers, chained, self._source, self._source_rows)
        self.stored: dict[Any, Stored] = {}  # old variable of a quantize or a rounding -> what stands for it
        self.rows: dict[Any, Any] = {}  # old variable of quantized rows -> (q, scales) of the kernel that makes them

    def run(self) -> tvm.IRModule:
        return ir.rewrite(self.module, self._visit)

    def _visit(self, state: ir.Rewrite, name: str, value: Any) -> Any:
        old = state.current
        if old in self.inside or not ir.is_call(value):
            return None
        if _stores(value):
            return self._store(state, name, value)
        if ir.is_call(value, "dequantize", "astype") and old not in self.chain_of_end:
            return self._load(old, value)
        if ir.is_call(value, "tvmq.map"):
            return self._quantize_rows(old, value)
        if ir.is_call(value, "take"):
            return self._embedding(state, self.values[old])
        if self.products.is_scaled(old):
            return None
        if (product := self.products.of(state, old, None)) is not None:
            return product
        if (
            ir.is_call(value, "nn.max_pool2d")
            and ir.dtype_of(value) == "float32"
            and not no_stored_form(value, integer=True)
        ):
            return moves.max_pool(value, value.args[0], "float32")
        if old in self.chain_of_end and not self._only_stored(old):
            return self._float_chain(state, name, self.chain_of_end[old])
        return None

    def _load(self, old: Any, value: Any) -> Any:
        """The float32 values of a stored tensor, for those that want them; None for a weight."""
        if _is_constant_tensor(self.values[old]):
            return self._constant(old, value)
        stored = self._source(old)
        if stored is None or stored.read:
            return None
        return op_calls.elementwise(stored.var, (), stored.to_float, out_shape=ir.shape_of(value), out_dtype="float32")

    def _constant(self, old: Any, value: Any) -> Any:
        """The float32 values of a constant that its source quantized; None where it is a weight."""
        weights = all(ir.is_call(self.values.get(reader), *_MULTIPLIED) for reader in self.readers[old])
        return None if weights else ir.constant(interpret.evaluate(value, {}))

    def _only_stored(self, var: Any) -> bool:
        """Whether the one reader of `var` is a quantize or a rounding, which then realizes the chain."""
        readers = self.readers.get(var, [])
        return len(readers) == 1 and readers[0] is not None and _stores(self.values[readers[0]])

    def _store(self, state: ir.Rewrite, name: str, value: Any) -> Any:
        """What stands for a quantize or a rounding: the operator before it, or a map of its own."""
        call = self.values[state.current]
        out = self._stored_as(call)
        producer = call.args[0]
        if out.is_integer and self._is_only_averaged(state.current):
            self.stored[state.current] = averages.rounded_when_read(state.new_of.get(producer, producer), out)
            return None
        new = self._producer(state, producer, out) if self._only_stored(producer) else None
        if new is None:
            source = self._source(producer)
            x, steps = (value.args[0], ()) if source is None else (source.var, source.to_float)
            if out.is_integer:
                steps = (*steps, ops.Multiply(float(numerics.reciprocal(out.scale))), out.to_integer())
            new = op_calls.elementwise(x, (), steps, out_shape=ir.shape_of(value), out_dtype=out.dtype)
        else:
            name = str(producer.name)
        var = new if isinstance(new, relax.Var) else state.emit(new, name)
        self.stored[state.current] = dataclasses.replace(out, var=var)
        return var

    def _is_only_averaged(self, quantized: Any) -> bool:
        """Whether averages alone read the integers of a tensor that is needed as floats too."""
        producer = self.values[quantized].args[0]
        if self._only_stored(producer) or self._source(producer) is not None:
            return False
        return averages.only_averaged(quantized, self.values, self.readers, self.chain_of_anchor)

    def _stored_as(self, call: Any) -> Stored:
        """What a quantize, a dequantize or a rounding says of its stored tensor."""
        if ir.is_call(call, "astype"):
            return Stored(None, ir.dtype_of(call))
        scale, zero_point = float(ir.to_numpy(call.args[1])), int(ir.to_numpy(call.args[2]))
        if ir.dtype_of(call.args[0] if ir.is_call(call, "dequantize") else call) == wide.DTYPE:
            return Stored(None, wide.DTYPE, scale, zero_point)
        return Stored(None, self.storage, scale, zero_point + self.offset)

    def _producer(self, state: ir.Rewrite, var: Any, out: Stored) -> Any:
        """The operator of an old variable, making it as `out`; None where it makes floats."""
        call: Any = self.values.get(var)
        if var in self.chain_of_end:
            return self._chain(state, self.chain_of_end[var], out)
        if keeps_integers(call):
            return moves.kept(call, self._source(call.args[0]), out)
        if ir.is_call(call, "concat"):
            return moves.concat(call, [self._source(field) for field in call.args[0].fields], out)
        if is_cubic(call):
            return moves.cubic(call, self._source(call.args[0]), out)
        return self.products.of(state, var, out)

    def _source(self, var: Any) -> Stored | None:
        """The stored tensor whose float32 values an old variable holds; None where it was float32 all along."""
        call: Any = self.values.get(var)
        if _is_constant_tensor(call):
            out = self._stored_as(call)
            elements = ir.to_numpy(call.args[0]).astype(np.int32) + self.offset
            return dataclasses.replace(out, var=ir.constant(elements.astype(self.storage)))
        stored = self.stored.get(call.args[0]) if ir.is_call(call, "dequantize", "astype") else None
        if stored is None or not stored.is_integer or stored.read:
            return stored
        # A source may dequantize with another scale than it quantized with.
        return dataclasses.replace(self._stored_as(call), var=stored.var)

    # --- rows with a scale each ---

    def _quantize_rows(self, old: Any, call: Any) -> Any:
        """What stands for a map that quantizes rows; None for other maps."""
        if ops.row_quantizer(call) is None:
            return None
        if old in self.rows:
            return self.rows[old]
        return op_calls.quantize_rows(call.args[0], zero_point=self.offset, dtype=self.storage)

    def _float_chain(self, state: ir.Rewrite, name: str, chain: Chain) -> Any:
        """The float operator for `chain`, which quantizes its rows on the way where a reader asks for them."""
        readers = self.readers.get(chain.end, [])
        wanted = [reader for reader in readers if reader is not None and ops.is_row_quantizer(self.values[reader])]
        if not wanted or chain.kind not in _ROWWISE:
            return self._chain(state, chain, None)
        keep = len(readers) > len(wanted)
        tail = ops.QuantizeRows(keep, self.offset, self.storage)
        results = state.emit(self._chain(state, chain, None, tail), f"{name}_rows")
        names = [name, f"{name}_q", f"{name}_scale"] if keep else [name, f"{name}_scale"]
        parts = [state.emit(relax.TupleGetItem(results, i), part) for i, part in enumerate(names)]
        self.rows.update({reader: relax.Tuple(parts[-2:]) for reader in wanted})
        return parts[0]

    def _source_rows(self, state: ir.Rewrite, var: Any) -> Stored | None:
        """The stored tensor whose rows an old float variable dequantizes."""
        call: Any = self.values.get(var)
        if call is None or not ops.is_row_dequantizer(call):
            return None
        q, scales = (state.new_of[arg] for arg in call.args)
        return Stored(q, self.storage, zero_point=self.offset, rows=scales)

    # --- chains ---

    def _chain(self, state: ir.Rewrite, chain: Chain, out: Stored | None, tail: ops.QuantizeRows | None = None) -> Any:
        """One tvmq operator for `chain`, stored as `out` or `tail` asks, or float32 where both are None."""
        x = self._source(chain.x)
        if x is not None and x.is_wide and not reads_int16(chain, chain.x):
            x = None
        if x is None and (is_for_integers(chain.call) or (chain.is_affine and out is None and tail is None)):
            return None  # TVM computes it in the loops of what makes it, or reads it
        weight = None
        if chain.kind in CHANNEL_AXIS:
            weight = self._weight(state, chain)
            if weight is None:
                return None
            x = x or self._source_rows(state, chain.x)
            if ir.dtype_of(weight.value) == "float32" or weight.groups is not None:
                x = None  # x is read as float32, whatever it was made from
            elif x is None or x.is_integer != (weight.scales is not None):
                return None
        sums = ChainEpilogue(state, chain, x, out, self._source)
        if weight is not None and weight.scales is not None:
            sums.integer_products(weight.scales)
        sums.follow()
        if tail is not None:
            sums.steps.append(tail)
        return self._anchor(chain, weight, sums)

    def _weight(self, state: ir.Rewrite, chain: Chain) -> _Weight | None:
        """The weight of a chain; None where it is no constant, or quantized in another way than `annotate` does."""
        expr = chain.call.args[1]
        if ir.is_constant(expr):
            return _Weight(expr, None)
        call: Any = self.values.get(expr)
        if ir.is_call(call, "astype") and ir.is_constant(call.args[0]) and ir.dtype_of(call.args[0]) in numerics.HALVES:
            return _Weight(call.args[0], None)
        if chain.kind == "conv2d" and ir.is_call(call, *ops.DEQUANTIZERS):
            return _Weight(state.new_of[expr], None)
        if ir.is_call(call, "tvmq.dequantize_groups"):
            return _Weight(call.args[0], None, (call.args[1], ops.attributes(call)["bits"]))
        if ir.is_call(call, "tvmq.dequantize_places"):
            return _Weight(call.args[0], None, (call.args[1], 4), table=call.args[2])
        if ir.is_call(call, "tvmq.dequantize_asymmetric"):
            return _Weight(call.args[0], None, (call.args[1], ops.attributes(call)["bits"]), call.args[2])
        axis = CHANNEL_AXIS[chain.kind]
        if not ir.is_call(call, "dequantize") or not is_symmetric(call, axis):
            return None
        scales = ir.to_numpy(call.args[1]).reshape(-1)
        return _Weight(call.args[0], np.broadcast_to(scales, (ir.shape_of(expr)[axis],)))

    def _anchor(self, chain: Chain, weight: _Weight | None, sums: ChainEpilogue) -> Any:
        x, steps, operands, a = sums.x, tuple(sums.steps), sums.operands, chain.call.attrs
        operand = x.var if x is not None else sums.state.new_of.get(chain.x, chain.x)
        common: dict[str, Any] = {
            "out_shape": ir.shape_of(chain.call),
            "out_dtype": sums.out_dtype,
        }
        zero = x.zero_point if x is not None else 0
        if weight is not None and chain.kind == "conv2d":
            common |= {name: [int(v) for v in getattr(a, name)] for name in ("strides", "padding", "dilation")}
            groups = int(a.groups)
            return op_calls.conv2d(operand, weight.value, operands, steps, groups=groups, x_zero_point=zero, **common)
        if weight is not None and weight.groups is not None:
            scales, bits = weight.groups
            if weight.table is not None:
                return op_calls.lookup_matmul(operand, weight.value, scales, weight.table, operands, steps, **common)
            if weight.zero_points is not None:
                known = weight.value, scales, weight.zero_points
                return op_calls.asymmetric_matmul(operand, *known, operands, steps, bits=bits, **common)
            return op_calls.grouped_matmul(operand, weight.value, scales, operands, steps, bits=bits, **common)
        if weight is not None:
            return op_calls.matmul(operand, weight.value, operands, steps, x_zero_point=zero, **common)
        if chain.kind in fusion.FLOAT_ANCHORS:
            if x is not None and x.is_integer:
                common |= {"x_scale": x.scale, "x_zero_point": zero}
            if chain.kind == "softmax":
                return op_calls.softmax(operand, operands, steps, **common)
            gamma, beta = chain.call.args[1:]
            if chain.kind == "group_norm":
                common |= {"groups": int(a.num_groups)}
                return op_calls.group_norm(operand, gamma, beta, operands, steps, epsilon=float(a.epsilon), **common)
            return op_calls.layer_norm(operand, gamma, beta, operands, steps, epsilon=float(a.epsilon), **common)
        if chain.kind == "avg_pool2d" and averages.is_uneven(chain.call):
            return op_calls.adaptive_avg_pool2d(operand, operands, steps, x_zero_point=zero, **common)
        if chain.kind == "avg_pool2d":
            common |= {"read": x.read if x is not None else (), **averages.window(chain.call)}
            if (image := averages.image_of(chain.call)) != ir.shape_of(chain.x):
                operand = sums.state.emit(relax.op.reshape(operand, image), f"{chain.anchor.name}_image")
            return op_calls.avg_pool2d(operand, operands, steps, x_zero_point=zero, **common)
        return op_calls.elementwise(operand, operands, steps, **common)

    # --- operators without a chain ---

    def _embedding(self, state: ir.Rewrite, call: Any) -> Any:
        """`tvmq.embedding` for a lookup in a table of int8 with a scale a row, or one; None for other lookups."""
        table: Any = self.values.get(call.args[0])
        if not ir.is_call(table, "dequantize") or not all(ir.is_constant(arg) for arg in table.args):
            return None
        (weight, scales, zeros), indices = table.args, call.args[1]
        by_row = ir.to_numpy(scales).size == 1 or int(table.attrs.axis) % len(ir.shape_of(weight)) == 0
        plain = ir.dtype_of(weight) == "int8" and len(ir.shape_of(weight)) == 2 and int(call.attrs.axis or 0) == 0
        if not (by_row and plain) or ir.to_numpy(zeros).any() or call.attrs.axis is None:
            return None
        every = np.broadcast_to(ir.to_numpy(scales).reshape(-1), (ir.shape_of(weight)[0],))
        return op_calls.embedding(state.new_of.get(indices, indices), weight, ir.constant(every))


def _is_constant_tensor(call: Any) -> bool:
    """Whether a value dequantizes an int8 constant with one scale."""
    constant = ir.is_call(call, "dequantize") and all(ir.is_constant(arg) for arg in call.args)
    return constant and ir.dtype_of(call.args[0]) == "int8" and ir.to_numpy(call.args[1]).size == 1


def _stores(call: Any) -> bool:
    """Whether a call is a quantize, or the rounding of float32 to 16 bits."""
    if ir.is_call(call, "astype"):
        return ir.dtype_of(call) in numerics.HALVES and ir.dtype_of(call.args[0]) == "float32"
    return ir.is_call(call, "quantize")
