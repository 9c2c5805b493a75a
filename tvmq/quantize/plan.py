"""Decides which operators become integer and which tensors are quantized, with a reason for each that stays float.

Convolutions and matmuls with constant weights pull their inputs into int8. Everything else (adds, pools, activations,
concat) is integer where all that it reads is produced by integer operators already: it never adds a conversion.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax

from tvmq import ir
from tvmq.graph.fusion import Chain, find_chains
from tvmq.quantize.numerics import QParams
from tvmq.quantize.table import CalibrationTable
from tvmq.recipe import Precision, Recipe

PASS_THROUGH = ("reshape", "permute_dims", "squeeze", "expand_dims", "flatten", "strided_slice", "nn.pad", "nn.max_pool2d")


@dataclass(frozen=True)
class Decision:
    """What was decided for one operator: the variable of its result, its kind, its precision, and why."""

    name: str
    kind: str
    precision: Precision
    reason: str


@dataclass(frozen=True)
class Plan:
    """`qparams`: the variables to quantize. `integer`: chain ends and other variables computed in integers.

    `produced`: the quantized variables whose producer is integer, so that float readers see them dequantized.
    """

    chains: tuple[Chain, ...]
    qparams: Mapping[Any, QParams]
    integer: frozenset[Any]
    produced: frozenset[Any]
    decisions: tuple[Decision, ...]


def make_plan(module: tvm.IRModule, table: CalibrationTable, recipe: Recipe, paths: Mapping[str, str]) -> Plan:
    """The plan for a float module, from the calibration table and the recipe."""
    return _Planner(module, table, recipe, paths).plan()


class _Planner:
    def __init__(self, module: tvm.IRModule, table: CalibrationTable, recipe: Recipe, paths: Mapping[str, str]) -> None:
        self.module, self.table, self.recipe, self.paths = module, table, recipe, paths
        self.chains = find_chains(module)
        self.chain_of_end = {chain.end: chain for chain in self.chains}
        self.inside = {member for chain in self.chains for member in chain.members[:-1]}
        self.integer: set[Any] = set()
        self.wanted: set[Any] = set()
        self.decisions: list[Decision] = []
        self.residuals: dict[Any, list[Any]] = {}  # chain end -> the added tensors that it reads as integers

    def plan(self) -> Plan:
        for var, call in ir.calls(self.module):
            if var not in self.inside:
                self._decide(var, call)
        source = self._propagate()
        qparams = {var: self.table.tensors[str(source[var].name)].qparams for var in self.wanted}
        produced = frozenset(var for var in self.wanted if var in self.integer)
        return Plan(tuple(self.chains), qparams, frozenset(self.integer), produced, tuple(self.decisions))

    def _decide(self, var: Any, call: Any) -> None:
        chain = self.chain_of_end.get(var)
        kind = chain.kind if chain else ir.op_name(call)
        if chain is None and not ir.is_call(call, "concat", *PASS_THROUGH):
            self._note(var, kind, Precision.FP32, "no integer kernel for this operator")
            return
        reason = self._chain_reason(chain) if chain else self._follower_reason(var, call)
        if reason is None:
            self.integer.add(var)
            self._note(var, kind, Precision.INT8, "")
        else:
            self._note(var, kind, Precision.FP32, reason)

    def _chain_reason(self, chain: Chain) -> str | None:
        """Why a chain stays float; None where it becomes integer (and then its inputs are wanted)."""
        names = {str(member.name) for member in chain.members}
        precision, why = self.recipe.precision_of(chain.kind, *names, *(self.paths.get(name, name) for name in names))
        if precision is Precision.FP32:
            return why
        if chain.kind in ("conv2d", "matmul") and not ir.is_constant(chain.call.args[1]):
            return "both operands are activations"
        # A convolution reads its input as integers whoever made it; other kinds only what is integer already.
        anchored = chain.kind in ("conv2d", "matmul")
        if not anchored and chain.x not in self.integer:
            return f"its input {_name(chain.x)} is float"
        if missing := self._missing(chain.x):
            return missing
        added = chain.activations[1:]
        if not anchored and not all(operand in self.integer for operand in added):
            return "one of its inputs is float"
        integers = [operand for operand in added if operand in self.integer and not self._missing(operand)]
        if chain.kind == "add" and len(integers) != len(added):
            return self._missing(added[0])
        self.wanted.update([chain.x, *integers])
        return None

    def _follower_reason(self, var: Any, call: Any) -> str | None:
        """Why a concat or a pass-through operator stays float."""
        sources = list(ir.operands(call))
        if not sources or any(source not in self.integer for source in sources):
            return "its input is float"
        if ir.is_call(call, "nn.pad") and not _pads_zero(call):
            return "pads with another value than zero"
        if ir.is_call(call, "nn.max_pool2d") and (str(call.attrs.layout) != "NHWC" or bool(call.attrs.ceil_mode)):
            return "max pooling in this layout or with ceil_mode has no integer kernel"
        kind = "concat" if ir.is_call(call, "concat") else "max_pool2d" if ir.is_call(call, "nn.max_pool2d") else None
        if kind is not None:
            name = str(var.name)
            precision, why = self.recipe.precision_of(kind, name, self.paths.get(name, name))
            if precision is Precision.FP32:
                return why
        for source in [*sources, var]:
            if missing := self._missing(source):
                return missing
        return None

    def _missing(self, var: Any) -> str | None:
        entry = self.table.tensors.get(str(var.name))
        if entry is None:
            return f"{_name(var)} is not in the calibration table"
        return f"the calibration table keeps {_name(var)} float" if entry.keep_float else None

    def _propagate(self) -> dict[Any, Any]:
        """Quantize what wanted pass-through results and concats read; each result names the tensor whose range it shares."""
        values = dict(ir.bindings(self.module))
        for var, _ in reversed(list(ir.calls(self.module))):
            if var in self.wanted and var in self.integer and var not in self.chain_of_end:
                self.wanted.update(ir.operands(values[var]))
        # A pass-through operator whose result nobody wants as integers is better done in float, next to its reader.
        for var, call in ir.calls(self.module):
            if var in self.integer and var not in self.chain_of_end and var not in self.wanted:
                self.integer.discard(var)
                self._renote(var, call)
        source: dict[Any, Any] = {var: var for var in self.wanted}
        for var, call in ir.calls(self.module):
            if var in self.wanted and var in self.integer and ir.is_call(call, *PASS_THROUGH):
                source[var] = source[next(ir.operands(call))]
        return source

    def _note(self, var: Any, kind: str, precision: Precision, reason: str) -> None:
        self.decisions.append(Decision(str(var.name), kind, precision, reason))

    def _renote(self, var: Any, call: Any) -> None:
        reason = "nobody reads its result as integers"
        name = str(var.name)
        self.decisions = [
            Decision(name, d.kind, Precision.FP32, reason) if d.name == name else d for d in self.decisions
        ]


def _pads_zero(call: Any) -> bool:
    return str(call.attrs.pad_mode) == "constant" and float(call.attrs.pad_value) == 0.0


def _name(var: Any) -> str:
    return repr(str(var.name)) if isinstance(var, relax.Var) else "a constant"
