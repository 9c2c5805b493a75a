"""What lowering rules share: the target's micro-kernels, kernels built once, packed weights, and what is reported."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax

from tvmq import ir, ops
from tvmq.kernels import (
    coded_panels,
    depthwise,
    depthwise_rows,
    gemm,
    inline_llvm,
    micro_floats,
    micro_integers,
    tile_gemm,
    tiles,
    winograd,
)
from tvmq.kernels.builder import BF16, FLOAT, FP16, stored_dtype
from tvmq.kernels.decision import Choice, Decisions
from tvmq.kernels.elementwise import Map
from tvmq.kernels.entry import MOST_CHANNELS, Entry
from tvmq.kernels.micro import Micro
from tvmq.kernels.pad import Pad
from tvmq.kernels.sparse_stream import SparsePacking
from tvmq.kernels.tiles import Dot
from tvmq.recipe_values import Sparse
from tvmq.target import Target

Array = npt.NDArray[Any]
SHORT = {
    "float32": "f32",
    "bfloat16": "bf16",
    "float16": "f16",
    "int8": "s8",
    "uint8": "u8",
    "int16": "s16",
    "int32": "s32",
}

# Pixels that an image is quantized by where NEON narrows them: whole registers of 8 bits.
_NARROWED = 16


@dataclass(frozen=True)
class Packing:
    """How a weight of `shape` was packed: see `pack` in gemm, tile_gemm, depthwise (nr: its lanes), depthwise_rows
    (nr, taps: its most and least lanes; kr: its rows) and winograd (taps: m), and `pack_words` in coded_panels; "plain"
    ones are as they were.
    """

    kind: str
    shape: tuple[int, ...]
    taps: int
    groups: int
    nr: int
    kr: int

    def pack(self, weight: Array) -> Array:
        """The weight as its kernel reads it."""
        if self.kind == "plain":
            return weight
        if self.kind == "depthwise":
            return depthwise.pack(weight, self.nr)
        if self.kind == "rows":
            return depthwise_rows.pack(weight, self.kr, self.nr, self.taps)
        if self.kind == "winograd":
            return winograd.pack(weight, self.taps, self.nr)
        pack = {"tiles": tile_gemm.pack, "words": coded_panels.pack_words}.get(self.kind, gemm.pack)
        return pack(weight, self.taps, self.groups, self.nr, self.kr)

    def unpack(self, packed: Array) -> Array:
        """The weight as it was."""
        if self.kind == "plain":
            return packed.reshape(self.shape)
        if self.kind == "depthwise":
            return depthwise.unpack(packed, self.shape, self.nr)
        if self.kind == "rows":
            return depthwise_rows.unpack(packed, self.shape, self.kr, self.nr, self.taps)
        if self.kind == "winograd":
            return winograd.unpack(packed, self.shape, self.taps, self.nr)
        unpack = {"tiles": tile_gemm.unpack, "words": coded_panels.unpack_words}.get(self.kind, gemm.unpack)
        return unpack(packed, self.shape, self.taps, self.groups, self.nr, self.kr)


def packing_of(entry: Mapping[str, Any]) -> Packing | SparsePacking:
    """How a weight was packed, from its entry in a bundle's manifest."""
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items() if k != "parameter"}
    return SparsePacking(**fields) if fields["kind"] == "sparse" else Packing(**fields)


@dataclass(frozen=True)
class Lowered:
    """`module`: main and its kernels. `kernels`: variable of main -> the name of the kernel that computes it.

    `parameters`: the arrays that main takes after its inputs, by name. `packed`: variable of a matrix or depthwise
    operator -> (name of the parameter, how to unpack it) of its weight, and of more constants after it that are packed.
    `notes`: variable -> what its user should know of the kernel. `choices`: variable -> what was free, and decided.
    `prepared`: variables of main that follow from parameters alone -> the names of these, see prepare.py.
    """

    module: tvm.IRModule
    kernels: dict[str, str]
    parameters: dict[str, Array]
    packed: dict[str, list[tuple[str, Packing | SparsePacking]]]
    notes: dict[str, str]
    choices: dict[str, Choice]
    prepared: dict[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass
class Lowering:
    """What has been lowered so far, and the helpers that rules call."""

    target: Target
    winograd: bool = True
    sparse: Sparse = Sparse.OFF
    decisions: Decisions = field(default_factory=Decisions)
    taken: frozenset[str] = frozenset()  # names of the module's variables
    functions: dict[Any, tuple[Any, Any]] = field(default_factory=dict)  # kernel -> (global variable, PrimFunc)
    kernels: dict[Any, Any] = field(default_factory=dict)  # global variable -> kernel
    names: dict[str, str] = field(default_factory=dict)
    parameters: dict[str, Array] = field(default_factory=dict)
    packed: dict[str, list[tuple[str, Packing | SparsePacking]]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    # Operators whose weight is stored in other bits than their kernel reads -> what makes it of these, packed as told.
    coded: dict[str, Callable[[Packing], Any]] = field(default_factory=dict)
    prepared: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.builder = relax.BlockBuilder()
        self.float = micro_floats.float_micro(self.target.isa)
        self.int8 = micro_integers.int8_micro(self.target.isa)
        self.int16 = micro_integers.int16_micro(self.target.isa)
        self.bf16 = micro_floats.bf16_micro(self.target.isa)
        self.fp16 = micro_floats.fp16_micro(self.target.isa)
        self.tiles = tiles.unit_of(self.target.isa)

    def note(self, name: str, text: str) -> None:
        """Tell the user `text` of operator `name`, after what was told before."""
        self.notes[name] = f"{self.notes[name]}; {text}" if name in self.notes else text

    def micro(self, weight_dtype: str) -> Micro:
        """The micro-kernel for weights of a dtype."""
        return {FLOAT: self.float, BF16: self.bf16, FP16: self.fp16}.get(weight_dtype, self.int8)

    def tile_dot(self, m: Micro) -> Dot | None:
        """The product of tiles that reads what `m` reads, None where the target has none."""
        dots = self.tiles.dots if self.tiles is not None else ()
        return next((dot for dot in dots if (dot.a_dtype, dot.w_dtype) == (m.a_dtype, m.w_dtype)), None)

    def call(self, kernel: Any, title: str, args: Sequence[Any], shape: Sequence[int], dtype: str) -> Any:
        """A call of `kernel` (built at its first use) that makes a tensor."""
        return self.call_for(kernel, title, args, [(shape, dtype)])

    def call_for(
        self, kernel: Any, title: str, args: Sequence[Any], results: Sequence[tuple[Sequence[int], str]]
    ) -> Any:
        """A call of `kernel` that makes a tensor, or several, of (shape, dtype) each."""
        if kernel not in self.functions:
            symbol = f"tvmq_{title.replace('-', '_')}_{len(self.functions)}"
            # The pattern "opaque" keeps TVM's operator fusion away.
            function = kernel.function().with_attrs({"global_symbol": symbol, "op_pattern": 8})
            self.functions[kernel] = (self.builder.add_func(function, symbol), function)
            self.kernels[self.functions[kernel][0]] = kernel
        made = [relax.TensorType(list(shape), stored_dtype(dtype)) for shape, dtype in results]
        return relax.call_tir(self.functions[kernel][0], relax.Tuple(list(args)), made if len(made) > 1 else made[0])

    def parameter(self, state: ir.Rewrite, name: str, value: Array) -> Any:
        """`value` as a parameter of main: weights live beside the code, not in it. Names in use are made distinct."""
        unique = name
        while unique in self.parameters or unique in self.taken:
            unique += "_"
        self.parameters[unique] = np.ascontiguousarray(value).view(stored_dtype(str(value.dtype)))
        return state.parameter(unique, self.parameters[unique])

    def pack(self, state: ir.Rewrite, name: str, weights: Sequence[tuple[Array, Packing | SparsePacking]]) -> list[Any]:
        """Parameters for the first constants of operator `name`: its weight, and what is packed with it."""
        if name in self.coded:
            ((_, packing),) = weights
            assert isinstance(packing, Packing)
            return [self.coded[name](packing)]
        suffixes = ("weight", "scales", "zero_points")
        made = [self.parameter(state, f"{name}_{s}", p.pack(w)) for s, (w, p) in zip(suffixes, weights, strict=False)]
        self.packed[name] = [(str(var.name), packing) for var, (_, packing) in zip(made, weights, strict=True)]
        return made

    def lift(self, state: ir.Rewrite, name: str, args: Sequence[Any]) -> list[Any]:
        """`args` with each constant tensor (not scalar) as a parameter."""

        def one(arg: Any, index: int) -> Any:
            if ir.is_constant(arg) and ir.shape_of(arg):
                return self.parameter(state, f"{name}_{index}", ir.to_numpy(arg))
            return relax.Tuple(self.lift(state, name, arg.fields)) if isinstance(arg, relax.Tuple) else arg

        return [one(arg, index) for index, arg in enumerate(args)]

    def pad(
        self, state: ir.Rewrite, name: str, x: Any, padding: Sequence[int], channels: int, value: float, dtype: str
    ) -> Any:
        """`x` (4-D) padded and converted; `x` itself where there is nothing to do.

        Where `x` is an image that came channels-first, one kernel transposes it too.
        """
        pad = Pad(ir.shape_of(x), dtype_of(x), tuple(padding), channels, value, dtype)  # type: ignore[arg-type]
        image, steps = self._channels_first(state, x)
        if image is not None and channels == ir.shape_of(x)[3]:
            rounding = inline_llvm.rounding_llvm(self.target.isa)
            narrow = (
                self.int8.narrow if steps and isinstance(steps[-1], ops.Quantize) and dtype == pad.x_dtype else None
            )
            lanes = self.float.lanes if narrow is None else _NARROWED
            kernel: Any = Entry(dtype_of(image), steps, pad, lanes, rounding, narrow)
            x, title = image, f"{SHORT[dtype]}-{SHORT[kernel.x_dtype]}-image"
        elif pad.copies:
            kernel, title = pad, f"{SHORT[pad.x_dtype]}-{SHORT[dtype]}-pad"
        else:
            return x
        var = state.emit(self.call(kernel, title, [x], pad.out_shape, dtype), f"{name}_padded")
        self.names[f"{name}_padded"] = title
        return var

    def _channels_first(self, state: ir.Rewrite, x: Any) -> tuple[Any, ops.Epilogue]:
        """The NCHW tensor that `x` is the transpose of, and the steps in between; None where it is not one."""
        steps: ops.Epilogue = ()
        value = state.value(x)
        if ir.is_call(value, "call_tir") and isinstance(map_of := self.kernels.get(value.args[0]), Map):
            if map_of.operands:
                return None, ()
            value, steps = state.value(value.args[1].fields[0]), map_of.epilogue
        if not ir.is_call(value, "permute_dims") or ir.shape_of(x)[3] > MOST_CHANNELS:
            return None, ()
        transposes = value.attrs.axes is not None and [int(axis) for axis in value.attrs.axes] == [0, 2, 3, 1]
        return (value.args[0], steps) if transposes else (None, ())


def dtype_of(expr: Any) -> str:
    """The element type of an operand: the uint16 that lowering makes are bfloat16."""
    dtype = ir.dtype_of(expr)
    return BF16 if dtype == stored_dtype(BF16) else dtype


def declared(operands: Sequence[Any]) -> tuple[tuple[tuple[int, ...], str], ...]:
    """(shape, dtype) of each operand."""
    return tuple((ir.shape_of(operand), dtype_of(operand)) for operand in operands)


def fold_zero_point(
    epilogue: ops.Epilogue, operands: list[Any], kernel: Array, zero_point: int
) -> tuple[ops.Epilogue, list[Any]]:
    """sum((x - z) * w) = sum(x * w) - z * sum(w): the correction goes into the bias, one number a channel."""
    if zero_point == 0:
        return epilogue, operands
    correction = (-zero_point * kernel.astype(np.int64).reshape(kernel.shape[0], -1).sum(axis=1)).astype(np.int32)
    if epilogue and isinstance(epilogue[0], ops.Bias):
        return epilogue, [ir.constant(ir.to_numpy(operands[0]) + correction), *operands[1:]]
    return (ops.Bias(), *epilogue), [ir.constant(correction), *operands]
