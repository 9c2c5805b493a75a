"""What the user asks for: precision, calibration, and exceptions by layer; read from TOML or keywords."""

from __future__ import annotations

import dataclasses
import enum
import fnmatch
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tvmq.errors import RecipeError, nearest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class Precision(str, enum.Enum):
    """The arithmetic of an operator, or of a model's operators by default."""

    FP32 = "fp32"
    BF16 = "bf16"
    INT8 = "int8"
    INT8_DYNAMIC = "int8-dynamic"
    """Linear layers: int8 weights, and int8 activations with a scale a row that is found while running."""
    INT8_WEIGHT = "int8-weight"
    """Linear layers: int8 weights, multiplied as float32."""
    INT4_WEIGHT = "int4-weight"
    """Linear layers: 4-bit weights with a scale a group, multiplied as float32."""
    AUTO = "auto"
    """The fastest of fp32, bf16 and int8 by estimate; int8 only where there is calibration data."""


# Of linear layers (products with a constant matrix) only; none needs calibration.
LINEAR = (Precision.INT8_DYNAMIC, Precision.INT8_WEIGHT, Precision.INT4_WEIGHT)


class Sparse(str, enum.Enum):
    """Whether weights with zeros are multiplied without them."""

    AUTO = "auto"
    """Where it is estimated to be faster on the target."""
    FORCE = "force"
    """Wherever there is a kernel for it."""
    OFF = "off"


class Observer(str, enum.Enum):
    """The statistic of samples that a tensor's range is."""

    MIN_MAX = "min_max"
    MOVING_AVERAGE = "moving_average"
    """Short for min_max with the aggregate of that name."""
    PERCENTILE = "percentile"
    ENTROPY = "entropy"
    """Least Kullback-Leibler divergence between the distributions before and after."""
    MSE = "mse"
    """Least mean squared error, by search."""
    OCTAV = "octav"
    """Least mean squared error, by Newton's method."""
    ACIQ = "aciq"
    """Least mean squared error for a Laplace distribution."""
    FIXED = "fixed"
    """[-fixed_range, fixed_range] for every tensor, without data."""


class Aggregate(str, enum.Enum):
    """How the statistics of samples become one: of their elements together, or of each sample's range."""

    POOLED = "pooled"
    WIDEST = "widest"
    MEAN = "mean"
    MOVING_AVERAGE = "moving_average"


class Algorithm(str, enum.Enum):
    """What may be done so that quantization costs less accuracy."""

    EQUALIZE = "equalize"
    """Cross-layer equalization: like ranges for the channels of a tensor. No data."""
    SMOOTH = "smooth"
    """SmoothQuant: outlying channels of activations are moved into weights."""
    CLIP_WEIGHTS = "clip_weights"
    """Weight scales of least squared error."""
    SQUANT = "squant"
    """Rounding errors of a kernel and of a channel cancel. No data."""
    GPTQ = "gptq"
    """Rounding errors are made up for by the inputs that follow."""
    BIAS_CORRECTION = "bias_correction"
    """The mean error of each channel, measured, is taken off its bias."""
    BIAS_CORRECTION_ANALYTIC = "bias_correction_analytic"
    """The same, computed from the means of inputs."""


# Those that look at calibration data before ranges are taken, or again afterwards.
WITH_DATA = (Algorithm.SMOOTH, Algorithm.GPTQ, Algorithm.BIAS_CORRECTION, Algorithm.BIAS_CORRECTION_ANALYTIC)


class PowerOfTwo(str, enum.Enum):
    """Which scales are rounded up to powers of two."""

    NONE = "none"
    WEIGHTS = "weights"
    ACTIVATIONS = "activations"
    ALL = "all"


class WeightLevels(str, enum.Enum):
    """Values that weights of float layers are rounded to, 2**weight_bits a group; stored and multiplied as floats."""

    NONE = "none"
    UNIFORM = "uniform"
    ASYMMETRIC = "asymmetric"
    LOG2 = "log2"
    NORMAL_FLOAT = "normal_float"
    CODEBOOK = "codebook"
    STOCHASTIC = "stochastic"


GROUP_SIZES = (32, 64, 128)
# Products of two activations.
PRODUCTS = ("attention", "batch_matmul")
DEFAULT_KINDS = ("conv2d", "matmul", "add", "subtract", "multiply", "unary", "avg_pool2d", "max_pool2d", "concat")
KINDS = (*DEFAULT_KINDS, *PRODUCTS, "layer_norm", "softmax", "embedding")


@dataclass(frozen=True)
class Rule:
    """Layers that the glob `match` names get `precision`; the first match wins.

    A layer's names are its path and its variables' names, its kind (`conv2d`), its kind and number among those of its
    kind from 0 (`conv2d#3`), and its kind and the shape of its weight, or of its result (`conv2d:64x3x3x64`).
    """

    match: str
    precision: Precision

    def __post_init__(self) -> None:
        if not isinstance(self.match, str):
            raise RecipeError("recipe: rules.match", expected="a pattern of names", seen=repr(self.match))
        object.__setattr__(self, "precision", _enum(Precision, "rules.precision", self.precision))

    def matches(self, *names: str) -> bool:
        """Whether any of `names` fits the pattern."""
        return any(fnmatch.fnmatchcase(name, self.match) for name in names)


@dataclass(frozen=True)
class Recipe:
    """How a model becomes a bundle.

    precision: of every operator that no rule names. observer and aggregate: how ranges are estimated; `percentile` (of
    a tensor's elements that its range holds), `momentum` (the weight of a new inference) and `fixed_range` belong to
    one of them each. symmetric: zero points of activations are 0. activation_bits, weight_bits: 2 to 8, stored as 8;
    fewer leave integers unused (7: half of the range). power_of_two: scales that are rounded up to one. per_channel: a
    weight scale an output channel, else one a tensor. group_size: 32, 64 or 128 inputs of a linear layer with
    weight-only precision share a scale; None means 32 for 4 bits, and one scale an output channel for 8. kinds:
    operator kinds that may become integer; products of two activations (`attention`, `batch_matmul`), `layer_norm`,
    `softmax` and `embedding` have to be named here or by a rule. algorithms: what is done for accuracy; smoothing:
    SmoothQuant's alpha, the share that goes by activations. weight_levels: weights of an fp32 model rounded to few
    values, a simulation of kinds without kernels: see `quantize.levels`. integer_io: the bundle takes and returns
    int8, and the conversions are apart (`Executor.quantize`, `Executor.dequantize`). simulate: round to integers and
    back, and compute in float. winograd: float 3x3 convolutions may use it where it is faster; its sums are rounded
    more. sparse: whether products leave out weights that are zero. rules: exceptions.
    """

    precision: Precision = Precision.FP32
    observer: Observer = Observer.MIN_MAX
    percentile: float = 99.99
    momentum: float = 0.1
    aggregate: Aggregate = Aggregate.POOLED
    fixed_range: float = 8.0
    symmetric: bool = False
    activation_bits: int = 8
    weight_bits: int = 8
    power_of_two: PowerOfTwo = PowerOfTwo.NONE
    per_channel: bool = True
    group_size: int | None = None
    kinds: tuple[str, ...] = DEFAULT_KINDS
    algorithms: tuple[Algorithm, ...] = ()
    smoothing: float = 0.5
    weight_levels: WeightLevels = WeightLevels.NONE
    integer_io: bool = False
    simulate: bool = False
    winograd: bool = True
    sparse: Sparse = Sparse.AUTO
    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "precision", _enum(Precision, "precision", self.precision))
        object.__setattr__(self, "observer", _enum(Observer, "observer", self.observer))
        object.__setattr__(self, "sparse", _enum(Sparse, "sparse", self.sparse))
        object.__setattr__(self, "aggregate", _enum(Aggregate, "aggregate", self.aggregate))
        object.__setattr__(self, "power_of_two", _enum(PowerOfTwo, "power_of_two", self.power_of_two))
        object.__setattr__(self, "weight_levels", _enum(WeightLevels, "weight_levels", self.weight_levels))
        self._spell_out_moving_average()
        chosen = (_enum(Algorithm, "algorithms", item) for item in _items("algorithms", self.algorithms))
        object.__setattr__(self, "algorithms", tuple(chosen))
        object.__setattr__(self, "kinds", tuple(_known_kind(kind) for kind in _items("kinds", self.kinds)))
        object.__setattr__(self, "rules", tuple(_rule(rule) for rule in _items("rules", self.rules)))
        for name in ("symmetric", "per_channel", "integer_io", "simulate", "winograd"):
            if not isinstance(getattr(self, name), bool):
                raise RecipeError(f"recipe: {name}", expected="true or false", seen=repr(getattr(self, name)))
        if self.group_size not in (None, *GROUP_SIZES) or isinstance(self.group_size, float):
            expected = f"one of {', '.join(str(size) for size in GROUP_SIZES)}"
            raise RecipeError("recipe: group_size", expected=expected, seen=repr(self.group_size))
        _between("percentile", self.percentile, 50.0, 100.0)
        _between("momentum", self.momentum, 0.0, 1.0)
        _between("smoothing", self.smoothing, 0.0, 1.0)
        _between("fixed_range", self.fixed_range, 0.0, 1e37)
        for name in ("activation_bits", "weight_bits"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 2 <= value <= 8:
                raise RecipeError(f"recipe: {name}", expected="an integer from 2 to 8", seen=repr(value))

        if self.weight_levels is not WeightLevels.NONE:
            others = {self.precision, *(rule.precision for rule in self.rules)} - {Precision.FP32}
            if others:
                expected = "precision fp32 everywhere, since such weights are multiplied as floats"
                raise RecipeError("recipe: weight_levels", expected=expected, seen=min(other.value for other in others))

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
        for name in ("precision", "observer", "aggregate", "power_of_two", "weight_levels", "sparse"):
            data[name] = getattr(self, name).value
        data["kinds"] = list(self.kinds)
        data["algorithms"] = [algorithm.value for algorithm in self.algorithms]
        data["rules"] = [{"match": rule.match, "precision": rule.precision.value} for rule in self.rules]
        return data

    def precision_of(self, kind: str, *names: str) -> tuple[Precision, str]:
        """The precision asked for an operator of `kind` known by `names`, and why."""
        rule = next((rule for rule in self.rules if rule.matches(kind, *names)), None)
        precision, why = self.precision, "the recipe's precision"
        if rule is not None:
            precision, why = rule.precision, f"rule {rule.match!r}"
        others: tuple[str, ...] = ()
        if precision is not Precision.INT4_WEIGHT:
            others = ("embedding", *PRODUCTS) if precision is Precision.INT8_DYNAMIC else ("embedding",)
        if precision in LINEAR and kind not in ("matmul", *others):
            return Precision.FP32, f"{precision.value} is for linear layers"
        integer = precision in (Precision.INT8, *LINEAR) or (precision is Precision.AUTO and kind in DEFAULT_KINDS)
        if rule is None and integer and kind in KINDS and kind not in self.kinds:
            return Precision.FP32, f"the recipe's kinds leave out {kind}"
        return precision, why

    def weight_group(self, precision: Precision) -> int | None:
        """How many inputs of a linear layer share a weight scale; None means all of them."""
        return 32 if self.group_size is None and precision is Precision.INT4_WEIGHT else self.group_size


def _enum(kind: type[Any], name: str, value: object) -> Any:
    values = [member.value for member in kind]
    try:
        return kind(value)
    except ValueError:
        hint = nearest(str(value), values)
        expected = f"one of {', '.join(values)}"
        raise RecipeError(f"recipe: {name}", expected=expected, seen=repr(value), hint=hint) from None


def _known_kind(kind: str) -> str:
    if kind not in KINDS:
        expected = f"some of {', '.join(KINDS)}"
        raise RecipeError("recipe: kinds", expected=expected, seen=repr(kind), hint=nearest(str(kind), KINDS))
    return kind


def _items(name: str, value: object) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise RecipeError(f"recipe: {name}", expected="a list", seen=repr(value))
    return value


def _rule(rule: Rule | Mapping[str, Any]) -> Rule:
    if isinstance(rule, Rule):
        return rule
    if not isinstance(rule, Mapping) or set(rule) != {"match", "precision"}:
        raise RecipeError("recipe: rules", expected="tables with match and precision", seen=repr(rule))
    return Rule(rule["match"], rule["precision"])


def _between(name: str, value: object, low: float, high: float) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not low < value <= high:
        raise RecipeError(f"recipe: {name}", expected=f"a number above {low:g}, up to {high:g}", seen=repr(value))
