"""What the user asks for: precision, calibration, and exceptions by layer; read from TOML or keywords."""

from __future__ import annotations

import dataclasses
import enum
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tvmq import recipe_checks as checks
from tvmq.errors import RecipeError, nearest
from tvmq.recipe_rules import Rule, as_rule
from tvmq.recipe_values import (
    CALIBRATED,
    DEFAULT_KINDS,
    FLOAT_ENDS,
    GROUP_SIZES,
    KINDS,
    PRODUCTS,
    WEIGHT_ONLY,
    Aggregate,
    Algorithm,
    Observer,
    PowerOfTwo,
    Precision,
    Sparse,
    WeightLevels,
)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# What the weights of a precision may be: floats are rounded to anything, 4 bits are numbers or places in a table.
_LEVELS = {
    Precision.FP32: tuple(WeightLevels),
    Precision.INT8_WEIGHT: (
        WeightLevels.NONE,
        WeightLevels.UNIFORM,
        WeightLevels.ASYMMETRIC,
        WeightLevels.STOCHASTIC,
    ),
    Precision.INT4_WEIGHT: tuple(WeightLevels),
}
# Precisions whose weights have a number of bits that may be chosen, and those whose weights may have groups.
_WITH_BITS = (*CALIBRATED, Precision.INT8_DYNAMIC, Precision.AUTO)
_WITH_GROUPS = WEIGHT_ONLY
# What may have the precisions of layers that read and make floats.
_KINDS_WITH_FLOAT_ENDS = {
    Precision.INT8_DYNAMIC: ("matmul", "embedding", *PRODUCTS),
    Precision.INT8_WEIGHT: ("conv2d", "matmul", "embedding"),
    Precision.INT4_WEIGHT: ("conv2d", "matmul"),
}


@dataclass(frozen=True)
class Recipe:
    """How a model becomes a bundle.

    precision: of every operator that no rule names. observer and aggregate: how ranges are estimated; `percentile` (of
    a tensor's elements that its range holds), `momentum` (the weight of a new inference) and `fixed_range` belong to
    one of them each. symmetric: zero points of activations are 0. symmetric_loss: so are those of tensors whose noise
    of rounding that raises by so many decibels at most (up to 10; None: of none). narrow_range: activations leave the
    least integer out, as weights do. activation_bits, weight_bits: 2 to 8, stored as 8;
    fewer leave integers unused (7: half of the range). power_of_two: scales that are rounded up to one. per_channel: a
    weight scale an output channel, else one a tensor. group_size: 32, 64 or 128 inputs of a layer with weight-only
    precision share a scale; None means 32 for 4 bits, and one scale an output channel for 8. kinds:
    operator kinds that may become integer; products of two activations (`attention`, `batch_matmul`), `layer_norm`,
    `group_norm`, `softmax` and `embedding` have to be named here or by a rule. algorithms: what is done for accuracy;
    nothing where empty. smoothing: the alpha of `smooth`, the share that goes by activations. weight_levels: of fp32
    layers a simulation, whose weights are rounded to few values, see `quantize.levels`; of weight-only ones what bits
    mean, see `quantize.tables`. integer_io: the bundle takes and returns int8, and the conversions are apart
    (`Executor.quantize`, `Executor.dequantize`). simulate: round to integers and back, and compute in float. winograd:
    float 3x3 convolutions may use it where it is faster; its sums are rounded more. sparse: whether products leave out
    weights that are zero. rules: exceptions.
    """

    precision: Precision = Precision.FP32
    observer: Observer = Observer.MIN_MAX
    percentile: float = 99.99
    momentum: float = 0.1
    aggregate: Aggregate = Aggregate.POOLED
    fixed_range: float = 8.0
    symmetric: bool = False
    symmetric_loss: float | None = None
    narrow_range: bool = False
    activation_bits: int = 8
    weight_bits: int = 8
    power_of_two: PowerOfTwo = PowerOfTwo.NONE
    per_channel: bool = True
    group_size: int | None = None
    kinds: tuple[str, ...] = DEFAULT_KINDS
    algorithms: tuple[Algorithm, ...] = (Algorithm.AUTO,)
    smoothing: float = 0.5
    weight_levels: WeightLevels = WeightLevels.NONE
    integer_io: bool = False
    simulate: bool = False
    winograd: bool = True
    sparse: Sparse = Sparse.AUTO
    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        for name, kind in _ENUMS.items():
            object.__setattr__(self, name, checks.enum(kind, name, getattr(self, name)))
        self._spell_out_moving_average()
        chosen = (checks.enum(Algorithm, "algorithms", item) for item in checks.items("algorithms", self.algorithms))
        object.__setattr__(self, "algorithms", tuple(chosen))
        object.__setattr__(self, "kinds", tuple(_known_kind(kind) for kind in checks.items("kinds", self.kinds)))
        object.__setattr__(self, "rules", tuple(as_rule(rule) for rule in checks.items("rules", self.rules)))
        for name in ("symmetric", "narrow_range", "per_channel", "integer_io", "simulate", "winograd"):
            if not isinstance(getattr(self, name), bool):
                raise RecipeError(f"recipe: {name}", expected="true or false", seen=repr(getattr(self, name)))
        if self.group_size is not None:
            checks.one_of("group_size", self.group_size, GROUP_SIZES)
        if self.symmetric_loss is not None:
            checks.between("symmetric_loss", self.symmetric_loss, 0.0, 10.0)
        checks.between("percentile", self.percentile, 50.0, 100.0)
        checks.between("momentum", self.momentum, 0.0, 1.0)
        checks.between("smoothing", self.smoothing, 0.0, 1.0)
        checks.between("fixed_range", self.fixed_range, 0.0, 1e37)
        checks.bits("activation_bits", self.activation_bits)
        checks.bits("weight_bits", self.weight_bits)
        self._check_levels()
        for rule in self.rules:
            self._check_rule(rule)

    def _check_levels(self) -> None:
        if self.weight_levels is WeightLevels.NONE or self.weight_levels in _LEVELS.get(self.precision, ()):
            return
        able = [precision.value for precision, known in _LEVELS.items() if self.weight_levels in known]
        raise RecipeError(
            "recipe: weight_levels",
            expected=f"precision {' or '.join(able)} with {self.weight_levels.value}",
            seen=self.precision.value,
            hint="a rule may give layers both",
        )

    def _check_rule(self, rule: Rule) -> None:
        """Raises RecipeError where what `rule` gives has no meaning for its layers."""
        layer, given = self._ruled(rule), rule.changes()
        if layer.precision is Precision.FP32 and layer.weight_levels is not WeightLevels.NONE:
            return
        for name, known in (("weight_bits", _WITH_BITS), ("group_size", _WITH_GROUPS)):
            if name in given and layer.precision not in known:
                able = ", ".join(precision.value for precision in known)
                expected = f"precision {able}, or fp32 with weight_levels"
                where = f"recipe: rule {rule.match!r}: {name}"
                raise RecipeError(where, expected=expected, seen=layer.precision.value)

    def _spell_out_moving_average(self) -> None:
        """`observer = "moving_average"` means the extremes of samples, averaged."""
        if self.observer is not Observer.MOVING_AVERAGE:
            return
        if self.aggregate not in (Aggregate.POOLED, Aggregate.MOVING_AVERAGE):
            expected = "no other aggregate than moving_average with the observer of that name"
            raise RecipeError("recipe: aggregate", expected=expected, seen=repr(self.aggregate.value))
        object.__setattr__(self, "observer", Observer.MIN_MAX)
        object.__setattr__(self, "aggregate", Aggregate.MOVING_AVERAGE)

    @classmethod
    def from_toml(cls, path: str | Path) -> Recipe:
        """Read a recipe file. Raises RecipeError naming the key that is wrong."""
        try:
            data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise RecipeError(f"recipe {path}", seen=error.strerror) from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise RecipeError(f"recipe {path}", expected="a TOML file", seen=str(error)) from error
        return cls.from_dict(data)

    @classmethod
    def from_qconfig(cls, **fields: Any) -> Recipe:
        """The recipe that means what `relay.quantize.qconfig(**fields)` meant; see `qconfig.meanings`.

        Raises RecipeError for an unknown field, and for a value that has no meaning here.
        """
        from tvmq import qconfig

        return cls(**qconfig.recipe_fields(fields))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """A recipe from plain data, as `to_dict` gives it. Raises RecipeError."""
        known = [field.name for field in dataclasses.fields(cls)]
        for key in data:
            if key not in known:
                expected = f"one of {', '.join(known)}"
                raise RecipeError(f"recipe: unknown key {key!r}", expected=expected, hint=nearest(str(key), known))
        return cls(**data)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON and TOML."""
        data = dataclasses.asdict(self)
        for name in _ENUMS:
            data[name] = getattr(self, name).value
        data["kinds"] = list(self.kinds)
        data["algorithms"] = [algorithm.value for algorithm in self.algorithms]
        data["rules"] = [rule.to_dict() for rule in self.rules]
        return data

    def asks(self, algorithm: Algorithm) -> bool:
        """Whether `algorithm` is for a layer of this recipe, by name or as part of `auto`."""
        if algorithm is Algorithm.BIAS_CORRECTION_ANALYTIC and Algorithm.AUTO in self.algorithms:
            return Algorithm.BIAS_CORRECTION not in self.algorithms
        return algorithm in self.algorithms

    @property
    def all_algorithms(self) -> tuple[Algorithm, ...]:
        """Those for all layers, then those that only rules name."""
        ruled = (algorithm for rule in self.rules for algorithm in rule.algorithms or ())
        return tuple(dict.fromkeys((*self.algorithms, *ruled)))

    def rule_of(self, kind: str, *names: str) -> Rule | None:
        """The first rule that names an operator of `kind` known by `names`."""
        return next((rule for rule in self.rules if rule.matches(kind, *names)), None)

    def precision_of(self, kind: str, *names: str) -> tuple[Precision, str]:
        """The precision asked for an operator of `kind` known by `names`, and why."""
        rule = self.rule_of(kind, *names)
        ruled = rule.precision if rule is not None else None
        precision, why = self.precision, "the recipe's precision"
        if rule is not None and ruled is not None:
            precision, why = ruled, f"rule {rule.match!r}"
        if precision is Precision.INT16 and kind not in ("conv2d", "matmul"):
            return Precision.FP32, "int16 is for convolutions and linear layers"
        if precision in FLOAT_ENDS and kind not in _KINDS_WITH_FLOAT_ENDS[precision]:
            layers = "convolutions and linear layers" if precision in WEIGHT_ONLY else "linear layers"
            return Precision.FP32, f"{precision.value} is for {layers}"
        integer = precision in (*CALIBRATED, *FLOAT_ENDS) or (precision is Precision.AUTO and kind in DEFAULT_KINDS)
        if ruled is None and integer and kind in KINDS and kind not in self.kinds:
            return Precision.FP32, f"the recipe's kinds leave out {kind}"
        return precision, why

    def of_layer(self, kind: str, *names: str) -> Recipe:
        """The recipe for the weights of a layer: with what the first rule says that names it."""
        rule = self.rule_of(kind, *names)
        return self if rule is None else self._ruled(rule)

    def _ruled(self, rule: Rule) -> Recipe:
        changes = rule.changes()
        if rule.precision is not None and self.weight_levels not in _LEVELS.get(rule.precision, ()):
            changes.setdefault("weight_levels", WeightLevels.NONE)  # the recipe's are of its own precision
        try:
            return dataclasses.replace(self, rules=(), **changes)
        except RecipeError as error:
            where = error.what.replace("recipe:", f"recipe: rule {rule.match!r}:", 1)
            raise RecipeError(where, expected=error.expected, seen=error.seen, hint=error.hint) from None

    def weight_group(self, precision: Precision) -> int | None:
        """How many inputs of a layer share a weight scale; None means all of them."""
        return 32 if self.group_size is None and precision is Precision.INT4_WEIGHT else self.group_size


_ENUMS: dict[str, type[enum.Enum]] = {
    "precision": Precision,
    "observer": Observer,
    "sparse": Sparse,
    "aggregate": Aggregate,
    "power_of_two": PowerOfTwo,
    "weight_levels": WeightLevels,
}


def _known_kind(kind: str) -> str:
    if kind not in KINDS:
        expected = f"some of {', '.join(KINDS)}"
        raise RecipeError("recipe: kinds", expected=expected, seen=repr(kind), hint=nearest(str(kind), KINDS))
    return kind


def wants_integers(recipe: Recipe) -> bool:
    """Whether `recipe` asks for fixed scales of activations, so for calibration data; `auto` takes what there is."""
    return bool(wanted_precisions(recipe).intersection(CALIBRATED))


def wanted_precisions(recipe: Recipe) -> set[Precision]:
    """Every precision that `recipe` asks for somewhere."""
    return {recipe.precision, *(rule.precision for rule in recipe.rules if rule.precision is not None)}
