"""The lowering rule of attention, and what is free in its kernel: register tile, parts of a head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from tvmq import ir, ops
from tvmq.kernels import gemm_blocking, inline_llvm
from tvmq.kernels.attention import Attention
from tvmq.kernels.builder import BF16
from tvmq.kernels.decision import Point
from tvmq.kernels.integer_attention import IntegerAttention
from tvmq.kernels.lowering import SHORT, Lowering, dtype_of
from tvmq.kernels.micro import Micro
from tvmq.kernels.shuffles import pair_llvm
from tvmq.kernels.task import task_of
from tvmq.quantize import numerics

# Vectors of queries that share the loads of keys, by the rule and by any point.
_VECTORS, _MOST_VECTORS = 2, 4
# Slots of a vector of powers, and to pack one of queries or finish one of sums: transposed, divided, stored.
_POWER, _FINISH = 20, 6


def attention(lowering: Lowering, _state: ir.Rewrite, name: str, call: Any) -> Any:
    """`tvmq.attention`."""
    query, key, value = call.args
    target, dtype, out_dtype = lowering.target, dtype_of(query), ir.dtype_of(call)
    batch, queries, heads, depth = ir.shape_of(query)
    shape, words = (batch, queries, heads, depth), lowering.bf16.by_words()
    m = lowering.float
    if dtype in numerics.INT_RANGE:
        m = lowering.int8.by_words()
    elif dtype == BF16 and words.product.kr > 1 and depth % words.kr == 0:
        m = words
    keys, depth_out = ir.shape_of(key)[1], ir.shape_of(value)[3]
    space = AttentionSpace(shape, keys, depth_out, m, target.cores)
    rows, vectors, parts = lowering.decisions.choose(name, task_of(call), (space,)).point
    common = (
        shape,
        keys,
        depth_out,
        ops.attributes(call)["scale"],
        dtype,
        out_dtype,
        ops.epilogue_of(call),
        m,
        rows,
        vectors,
        parts,
        pair_llvm(target.isa) if m.w_dtype == BF16 and m.kr > 1 else "",
        inline_llvm.rounding_llvm(target.isa),
    )
    spec = Attention(*common)
    if dtype in numerics.INT_RANGE:
        query_zero, _, value_zero = ops.attributes(call)["zero_points"]
        spec = IntegerAttention(*common, (query_zero - (128 if dtype == "uint8" else 0), value_zero))
    multiplied = m.w_dtype if dtype in numerics.INT_RANGE else dtype
    title = f"{SHORT[out_dtype]}-{SHORT[multiplied]}-attention-{rows}x{vectors * m.lanes}-{m.name}"
    lowering.names[name] = title
    return lowering.call(spec, title, [query, key, value], ir.shape_of(call), out_dtype)


@dataclass(frozen=True)
class AttentionSpace:
    """shape: of the queries, [N, S, heads, depth]. keys: how many; depth_out: of values."""

    shape: tuple[int, int, int, int]
    keys: int
    depth_out: int
    micro: Micro
    cores: int
    template: ClassVar[str] = "attention"
    knobs: ClassVar[tuple[str, ...]] = ("rows", "vectors", "parts")

    def default(self) -> Point:
        """Vectors that leave most registers to keys, and to columns of values, which share their loads."""
        vectors = min(_VECTORS, self._groups)
        return self._most_rows(vectors), vectors, _parts(self._units, self._blocks(vectors), self.cores)

    def points(self) -> list[Point]:
        """Tiles that fill half of the registers or more; a head in one part, or in up to a few for each core."""
        found = {self.default()}
        for vectors in range(1, min(_MOST_VECTORS, self._groups) + 1):
            most, blocks = self._most_rows(vectors), self._blocks(vectors)
            shares = {-(-blocks // (part * 2**power)) for part in (1, 3) for power in range(4)}
            # Tiles are as equal as can be: of numbers of rows that make the same ones, the largest.
            tiles = {(_equal(self.keys, n), _equal(self.depth_out, n)): n for n in range(-(-most // 2), most + 1)}
            found |= {(rows, vectors, -(-blocks // share)) for rows in tiles.values() for share in shares}
        return sorted(found)

    def cost(self, point: Point) -> float:
        """Issue slots on all cores."""
        rows, vectors, parts = point
        m, depth = self.micro, self.shape[3]
        block = float(self.keys * vectors * _POWER + (depth + self.depth_out) * vectors * _FINISH)
        for extent, steps in ((self.keys, depth / m.kr), (self.depth_out, self.keys / m.kr)):
            for size, count in gemm_blocking.split(extent, _equal(extent, rows)):
                block += count * (steps * gemm_blocking.step_cost(m, size, vectors) + 2 * size * vectors)
        share = -(-self._blocks(vectors) // parts)
        return float(-(-self._units * parts // self.cores) * share * block)

    def near(self, point: Point) -> Point:
        """The tile; its parts by the rule."""
        rows, vectors, _ = point
        vectors = min(vectors, self._groups)
        return rows, vectors, _parts(self._units, self._blocks(vectors), self.cores)

    @property
    def _units(self) -> int:
        return self.shape[0] * self.shape[2]

    @property
    def _groups(self) -> int:
        """Vectors of queries that a head has."""
        return -(-self.shape[1] // self.micro.lanes)

    def _blocks(self, vectors: int) -> int:
        return -(-self.shape[1] // (vectors * self.micro.lanes))

    def _most_rows(self, vectors: int) -> int:
        return (self.micro.registers - vectors - 1 - self.micro.single.temporaries) // vectors


def _equal(extent: int, most: int) -> int:
    """The size of equal parts of at most `most`."""
    return -(-extent // -(-extent // most))


def _parts(units: int, blocks: int, cores: int) -> int:
    """Into how many parts to divide the `blocks` of each unit: the fewest that keep the cores nine tenths busy."""

    def busy(parts: int) -> float:
        share = -(-blocks // parts)
        return units * blocks / (-(-units * parts // cores) * cores * share)

    best = max(busy(parts) for parts in range(1, blocks + 1))
    return next(parts for parts in range(1, blocks + 1) if busy(parts) >= min(best, 0.9))
