"""Decides which operators become integer and which tensors are quantized, with a reason for each that stays float.

Convolutions and matmuls with constant weights pull their inputs into int8. Everything else (adds, pools, activations,
concat) is integer where all that it reads is produced by integer operators already: it never adds a conversion (but see
carried.py).
Layers with int16 activations pull their inputs into int16, whatever else reads these, and give what their readers want.
Layers with dynamic or weight-only precision read and give floats, and leave their neighbours alone. Products of
two activations pull both into int8 where a recipe asks for it.
What is to be floats of 16 bits is decided in narrow.py, and what `auto` asks for in auto.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import tvm

from tvmq import ir
from tvmq.errors import RecipeError
from tvmq.graph.fusion import Chain, find_chains
from tvmq.graph.products import has_embedding_kernel, product_kind
from tvmq.quantize import auto, numerics, products, wide
from tvmq.quantize.auto import Rates
from tvmq.quantize.carried import carried
from tvmq.quantize.decisions import Decision, coding_of, kind_of, not_coded, with_levels
from tvmq.quantize.kept import factor, has_own_scale, keeps_integers, qparams_behind
from tvmq.quantize.narrow import MOVES, narrow, no_stored_form, tensors_of
from tvmq.quantize.numerics import QParams
from tvmq.quantize.table import CalibrationTable
from tvmq.recipe import Recipe
from tvmq.recipe_rules import Rule
from tvmq.recipe_values import DEFAULT_KINDS, FLOAT_ENDS, HALVES, KINDS, PowerOfTwo, Precision


@dataclass(frozen=True)
class Plan:
    """`qparams`: the variables to quantize. `integer`: chain ends and other variables computed in integers.

    `produced`: the quantized variables whose producer is integer, so that float readers see them dequantized.
    `narrow`: variables computed in floats of 16 bits, which are `half`; `stored`: those to be stored so. `float_ends`:
    anchors of layers with dynamic or weight-only precision. `wide`: what layers with int16 activations (anchors:
    `wide_layers`) read -> its scale; `made_wide`: those of them whose kernel makes int16. `products`: products of two
    activations, and attentions, with int8 or int8-dynamic. `embeddings`: lookups in tables of int8. `unused`: the
    patterns of rules that no operator comes to. `recipes`: anchors with weights that a rule gives another recipe than
    the model's -> that recipe.
    """

    chains: tuple[Chain, ...]
    qparams: Mapping[Any, QParams]
    integer: frozenset[Any]
    produced: frozenset[Any]
    narrow: frozenset[Any]
    stored: frozenset[Any]
    float_ends: Mapping[Any, Precision]
    wide: Mapping[Any, float]
    wide_layers: frozenset[Any]
    made_wide: frozenset[Any]
    products: Mapping[Any, Precision]
    embeddings: frozenset[Any]
    decisions: tuple[Decision, ...]
    unused: tuple[str, ...] = ()
    recipes: Mapping[Any, Recipe] = field(default_factory=dict)
    half: str = HALVES[Precision.BF16]


def make_plan(
    module: tvm.IRModule,
    table: CalibrationTable | None,
    recipe: Recipe,
    paths: Mapping[str, str],
    rates: Rates | None = None,
) -> Plan:
    """The plan for a float module, from the recipe and, where that asks for integers, the calibration table.

    rates: what the target's instructions do, for recipes that ask for `auto`. Raises RecipeError without them.
    """
    return _Planner(module, table, recipe, paths, rates).plan()


class _Planner:
    def __init__(
        self,
        module: tvm.IRModule,
        table: CalibrationTable | None,
        recipe: Recipe,
        paths: Mapping[str, str],
        rates: Rates | None,
    ) -> None:
        self.module, self.recipe, self.paths, self.rates = module, recipe, paths, rates
        self.allowed = {Precision.FP32, Precision.BF16, *({Precision.INT8} if table is not None else ())}
        self.entries = table.tensors if table is not None else {}
        self.values = dict(ir.bindings(module))
        self.chains = find_chains(module)
        self.chain_of_end = {chain.end: chain for chain in self.chains}
        self.inside = {member for chain in self.chains for member in chain.members[:-1]}
        self.carried = carried(module, self.chains)
        self.integer: set[Any] = set()
        self.wanted: set[Any] = set()
        self.asked: set[Any] = set()  # for floats of 16 bits
        self.half = Precision.BF16  # which they are
        self.float_ends: dict[Any, Precision] = {}
        self.wide: dict[Any, float] = {}
        self.wide_layers: set[Any] = set()
        self.products: dict[Any, Precision] = {}
        self.embeddings: set[Any] = set()
        self.decisions: dict[Any, Decision] = {}
        self.counts: dict[str, int] = {}  # operators of each kind so far
        self.used: set[Rule] = set()
        self.recipes: dict[Any, Recipe] = {}

    def plan(self) -> Plan:
        for var, call in ir.calls(self.module):
            if var not in self.inside:
                self._decide(var, call)
        qparams = self._propagate()
        narrowed = narrow(self.module, self.chains, self.asked)
        for var in narrowed.computed - self.asked:
            self._renote(var, self.half, "")
        for var, reason in narrowed.reasons.items():
            self._renote(var, Precision.FP32, reason)
        variables = (*ir.main(self.module).params, *(var for var, _ in ir.bindings(self.module)))
        qparams = {var: qparams[var] for var in variables if var in self.wanted}
        made_wide = frozenset(var for var in self.wide if var in self.integer and var in self.chain_of_end)
        produced = frozenset(var for var in self.wanted if var in self.integer) - made_wide
        return Plan(
            chains=tuple(self.chains),
            qparams=qparams,
            integer=frozenset(self.integer),
            produced=produced,
            narrow=narrowed.computed,
            stored=narrowed.stored,
            float_ends=self.float_ends,
            wide=self.wide,
            wide_layers=frozenset(self.wide_layers),
            made_wide=made_wide,
            products=self.products,
            embeddings=frozenset(self.embeddings),
            decisions=tuple(self.decisions.values()),
            unused=tuple(rule.match for rule in self.recipe.rules if rule not in self.used),
            recipes=self.recipes,
            half=HALVES[self.half],
        )

    def _decide(self, var: Any, call: Any) -> None:
        chain = self.chain_of_end.get(var)
        kind = chain.kind if chain else kind_of(call)
        precision, why = self._asked(chain, var, call)
        if precision in HALVES:
            self._ask(var, precision)
            self._note(var, kind, precision, why)
            return
        if chain is not None and precision in FLOAT_ENDS:
            self._decide_float_ends(chain, precision)
            return
        if chain is not None and precision is Precision.INT16:
            self._decide_wide(chain)
            return
        if chain is None and product_kind(call) and precision in (Precision.INT8, Precision.INT8_DYNAMIC):
            self._decide_product(var, kind, call, precision)
            return
        if kind == "embedding" and precision in (Precision.INT8, Precision.INT8_DYNAMIC, Precision.INT8_WEIGHT):
            # Its results are floats, as those of other weight-only operators.
            self.embeddings.add(var)
            self._note(var, kind, Precision.INT8_WEIGHT, "")
            return
        if chain is None and not has_own_scale(call) and not keeps_integers(call):
            two = ir.is_call(call, "matmul", "nn.conv2d") and not ir.is_constant(call.args[1])
            missing = "both operands are activations" if two else "no integer or 16-bit kernel for this operator"
            self._note(var, kind, Precision.FP32, why or missing)
            return
        declined = with_levels(why, chain, self.recipe, self.recipes) if precision is Precision.FP32 else None
        if declined is None:
            declined = self._chain_reason(chain) if chain else self._follower_reason(var, call)
        if declined is None:
            self.integer.add(var)
            self._note(var, kind, Precision.INT8, why)
        else:
            self._note(var, kind, Precision.FP32, declined)

    def _ask(self, var: Any, precision: Precision) -> None:
        """`var` is to be floats of 16 bits. Raises RecipeError for two kinds of them."""
        if self.asked and precision is not self.half:
            both = " and ".join(half.value for half in HALVES)
            raise RecipeError("recipe: precision", expected="floats of 16 bits of one kind", seen=both)
        self.asked.add(var)
        self.half = precision

    def _asked(self, chain: Chain | None, var: Any, call: Any) -> tuple[Precision | None, str]:
        """The precision that is asked for, and why it is float32 or chosen; None for operators that only move."""
        precision, why = self._recipe_precision(chain, var, call)
        if precision is Precision.AUTO:
            if self.rates is None:
                raise RecipeError("recipe: precision auto", expected="a target to estimate times for", seen="none")
            activations = chain.activations if chain is not None else tensors_of(call)
            # What becomes integer only where a recipe names it has no estimates.
            kind = chain.kind if chain is not None else product_kind(call)
            allowed = self.allowed - {Precision.INT8} if kind in KINDS[len(DEFAULT_KINDS) :] else self.allowed
            return auto.choose(chain, [self._made(x) for x in activations], self.rates, allowed)
        return precision, why if precision is Precision.FP32 else ""

    def _made(self, x: Any) -> Precision:
        """What makes the elements of an activation, as far as is decided; moves keep what they read."""
        while ir.is_call(self.values.get(x), *MOVES):
            x = self.values[x].args[0]
        made = self.decisions[x].precision if x in self.decisions else Precision.FP32
        # int16 layers make what their readers want.
        return {Precision.INT16: Precision.INT8, **dict.fromkeys(FLOAT_ENDS, Precision.FP32)}.get(made, made)

    def _recipe_precision(self, chain: Chain | None, var: Any, call: Any) -> tuple[Precision | None, str]:
        if chain is not None:
            weighted = chain.kind in ("conv2d", "matmul")
            shape = ir.shape_of(chain.call.args[1] if weighted else chain.call)
            names = self._names(chain.kind, shape, [str(member.name) for member in chain.members])
            if weighted and self.recipe.rule_of(chain.kind, *names) is not None:
                self.recipes[chain.anchor] = self.recipe.of_layer(chain.kind, *names)
            return self.recipe.precision_of(chain.kind, *names)
        kind = {"concat": "concat", "nn.max_pool2d": "max_pool2d"}.get(ir.op_name(call)) or product_kind(call)
        kind = "embedding" if has_embedding_kernel(call) else kind
        if kind is None:
            return None, ""
        shape = ir.shape_of(call) if ir.is_static(call) else ()
        precision, why = self.recipe.precision_of(kind, *self._names(kind, shape, [str(var.name)]))
        # There is no 16-bit kernel for these.
        wide = kind in ("batch_matmul", "embedding") and precision in (*HALVES, Precision.AUTO)
        return (None, "") if wide else (precision, why)

    def _names(self, kind: str, shape: tuple[int, ...], variables: list[str]) -> list[str]:
        """What rules may call the next operator of `kind`, besides that."""
        index = self.counts.get(kind, 0)
        self.counts[kind] = index + 1
        paths = [self.paths.get(name, name) for name in variables]
        names = [*variables, *paths, f"{kind}#{index}", f"{kind}:{'x'.join(map(str, shape))}"]
        if (rule := self.recipe.rule_of(kind, *names)) is not None:
            self.used.add(rule)
        return names

    def _decide_float_ends(self, chain: Chain, precision: Precision) -> None:
        """A layer with dynamic or weight-only precision."""
        recipe = self.recipes.get(chain.anchor, self.recipe)
        if declined := not_coded(chain, precision, recipe):
            self._note(chain.end, chain.kind, Precision.FP32, declined)
            return
        self.float_ends[chain.anchor] = precision
        self._note(chain.end, chain.kind, precision, coding_of(chain, precision, recipe))

    def _decide_wide(self, chain: Chain) -> None:
        """A layer with int16 activations: it makes floats, int16, or int8, as its readers want."""
        if missing := self._missing(chain.x):
            self._note(chain.end, chain.kind, Precision.FP32, missing)
            return
        power_of_two = self.recipe.power_of_two in (PowerOfTwo.ACTIVATIONS, PowerOfTwo.ALL)
        self.wide[chain.x] = wide.scale_of(self.entries[str(chain.x.name)].qparams, power_of_two=power_of_two)
        self.wide_layers.add(chain.anchor)
        self.integer.add(chain.end)
        self._note(chain.end, chain.kind, Precision.INT16, "")

    def _decide_product(self, var: Any, kind: str, call: Any, precision: Precision) -> None:
        """A product of activations: a static one reads integers whoever made them, but of softmax rows with scales."""
        chains = [self.chain_of_end.get(operand) for operand in call.args]
        needed = [x for x, chain in zip(call.args, chains, strict=True) if chain is None or chain.kind != "softmax"]
        static = precision is Precision.INT8
        declined = next((missing for x in needed if static and (missing := self._missing(x))), None)
        if products.depth_of(call) > numerics.MOST_DEPTH:
            declined = f"sums of {products.depth_of(call)} products may not fit 32 bits"
        if declined is not None:
            self._note(var, kind, Precision.FP32, declined)
            return
        self.products[var] = precision
        if static:
            self.wanted.update(needed)
            self.integer.add(var)
        self._note(var, kind, precision, "")

    def _chain_reason(self, chain: Chain) -> str | None:
        """Why a chain stays float; None where it becomes integer (and then its inputs are wanted)."""
        # A convolution reads its input as integers whoever made it; other kinds only what is integer already.
        anchored = chain.kind in ("conv2d", "matmul")
        needed = [chain.x] if anchored else chain.activations
        for operand in needed:
            if not anchored and operand not in self.integer:
                return f"its input {_name(operand)} is float"
            if missing := self._missing(operand):
                return missing
        self.wanted.update(needed)
        self.wanted.update(x for x in chain.activations[1:] if x in self.integer and not self._missing(x))
        return None

    def _follower_reason(self, var: Any, call: Any) -> str | None:
        """Why a concat, or an operator that keeps integers, stays float."""
        sources = tensors_of(call)
        for source in sources:
            if ir.is_constant(source):
                return "one of its inputs is a constant"
            if source not in self.integer and var not in self.carried:
                return f"its input {_name(source)} is float"
        if declined := no_stored_form(call, integer=True):
            return declined
        if factor(call) != 1.0 and sources[0] in self.products:
            return "it is part of the kernel of a product, which makes floats"
        if ir.is_call(call, "nn.pad") and not self._holds(sources[0], float(call.attrs.pad_value)):
            return f"pads with {float(call.attrs.pad_value):g}, outside of its input's range"
        return next((missing for tensor in [*sources, var] if (missing := self._missing(tensor))), None)

    def _holds(self, var: Any, value: float) -> bool:
        """Whether `value` is in the range that the integers of `var` stand for, where that is known."""
        while self._keeps(var):
            value /= factor(self.values[var])
            var = self.values[var].args[0]
        entry = self.entries.get(str(var.name))
        if entry is None:
            return True
        params = entry.qparams
        low, high = ((q - params.zero_point) * params.scale for q in (params.qmin, params.qmax))
        return low <= value <= high

    def _missing(self, var: Any) -> str | None:
        entry = self.entries.get(str(var.name))
        if entry is None:
            return f"{_name(var)} is not in the calibration table"
        return f"the calibration table keeps {_name(var)} float" if entry.keep_float else None

    def _propagate(self) -> dict[Any, QParams]:
        """Quantize what wanted concats and operators that keep integers read.

        Returns the parameters of each wanted variable: by its range, or by what it keeps.
        """
        values, computing = self.values, {*self.chain_of_end, *self.products}
        for var, _ in reversed(list(ir.calls(self.module))):
            if var in self.wanted and var in self.integer and var not in computing:
                self.wanted.update(ir.operands(values[var]))
        # What keeps integers is better done in float, next to its reader, where nobody wants integers.
        for var, _ in ir.calls(self.module):
            if var in self.integer and var not in computing and var not in self.wanted:
                self.integer.discard(var)
                self._renote(var, Precision.FP32, "nobody reads its result as integers")
        found = {var: self.entries[str(var.name)].qparams for var in self.wanted}
        for var, call in ir.calls(self.module):
            if var not in self.wanted or var not in self.integer:
                continue
            if self._keeps(var):
                found[var] = qparams_behind(found[next(ir.operands(call))], call)
            elif ir.is_call(call, "concat") and len({found[part] for part in tensors_of(call)}) == 1:
                found[var] = found[tensors_of(call)[0]]
        return found

    def _keeps(self, var: Any) -> bool:
        """Whether the integers of `var` are those of what its operator reads."""
        return var in self.integer and var not in self.chain_of_end and keeps_integers(self.values.get(var))

    def _note(self, var: Any, kind: str, precision: Precision, reason: str) -> None:
        self.decisions[var] = Decision(str(var.name), kind, precision, reason)

    def _renote(self, var: Any, precision: Precision, reason: str) -> None:
        self._note(var, self.decisions[var].kind, precision, reason)


def _name(var: Any) -> str:
    return repr(str(var.name))
