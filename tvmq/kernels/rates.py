"""How fast a target's instructions multiply, by the kernels' own cost model: what `auto` precision is decided with."""

from __future__ import annotations

from tvmq.isa import Bf16
from tvmq.kernels import gemm_blocking, interleave, micro_floats, micro_integers, tile_blocking, tiles
from tvmq.kernels.builder import BF16
from tvmq.kernels.geometry import conv_geometry
from tvmq.kernels.micro import Micro
from tvmq.quantize.auto import Rates
from tvmq.recipe_values import Precision
from tvmq.target import Target

# A product that fills tiles and caches, as large layers do: 512 x 512 x 512.
_EXTENT = 512
# Slots that a vector of depthwise products takes: widened one by one, and by products of rows, where MobileNetV2's
# layers were measured on Zen 4 beside float32 ones.
_ONE_BY_ONE = 1.5
_BY_ROWS = {Precision.BF16: 0.95, Precision.INT8: 0.75}


def rates_of(target: Target) -> Rates:
    """Products a slot in each precision for which the target has instructions; every target multiplies int8 somehow."""
    isa = target.isa
    wide = micro_floats.float_micro(isa)
    matrix = {Precision.FP32: _rate(target, wide), Precision.INT8: _rate(target, micro_integers.int8_micro(isa))}
    narrow = micro_floats.bf16_micro(isa)
    # The pairs that any vector unit widens are float32 products: no gain but memory, and never planned.
    if isa.bf16 is Bf16.AMX or narrow.product.kr > 1:
        matrix[Precision.BF16] = _rate(target, narrow)
    depthwise = {Precision.FP32: float(wide.lanes)}
    for precision, dtype in ((Precision.BF16, BF16), (Precision.INT8, isa.activation_dtype)):
        slots = _ONE_BY_ONE if interleave.row_dot(isa, dtype) is None else _BY_ROWS[precision]
        depthwise[precision] = wide.lanes / slots
    return Rates(matrix, depthwise)


def _rate(target: Target, m: Micro) -> float:
    """Products a slot: of the vector template, or of tiles where they are faster."""
    shape = (1, 1, _EXTENT, _EXTENT)
    geometry = conv_geometry(shape, (_EXTENT, 1, 1, _EXTENT), shape, (1, 1), (1, 1), 1)
    blocking = gemm_blocking.choose(geometry, m, target.cores, target.l2_kib * 1024)
    slots = gemm_blocking.cost(geometry, m, blocking.tile)
    unit = tiles.unit_of(target.isa)
    for dot in unit.dots if unit is not None else ():
        if (dot.a_dtype, dot.w_dtype) == (m.a_dtype, m.w_dtype):
            l1, l2 = target.l1d_kib * 1024, target.l2_kib * 1024
            _, cycles = tile_blocking.choose(geometry, dot, target.cores, l1, l2)
            slots = min(slots, cycles * tile_blocking.SLOTS)
    return float(_EXTENT**3 / slots)
