"""Rules of recipes: which layers, by names and globs, get another precision, other weights or other algorithms."""

from __future__ import annotations

import dataclasses
import enum
import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tvmq import recipe_checks as checks
from tvmq.errors import RecipeError, nearest
from tvmq.recipe_values import GROUP_SIZES, OF_LAYERS, Algorithm, Precision, WeightLevels


@dataclass(frozen=True)
class Rule:
    """Layers that the glob `match` names get what else is given; the first match wins, None leaves the recipe's.

    A layer's names are its path and its variables' names, its kind (`conv2d`), its kind and number among those of its
    kind from 0 (`conv2d#3`), and its kind and the shape of its weight, or of its result (`conv2d:64x3x3x64`). The
    fields after precision are of the weights of convolutions and linear layers, and mean what they mean in `Recipe`;
    algorithms: some of OF_LAYERS, instead of the recipe's.
    """

    match: str
    precision: Precision | None = None
    weight_levels: WeightLevels | None = None
    weight_bits: int | None = None
    group_size: int | None = None
    algorithms: tuple[Algorithm, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.match, str):
            raise RecipeError("recipe: rules.match", expected="a pattern of names", seen=repr(self.match))
        for name, kind in (("precision", Precision), ("weight_levels", WeightLevels)):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, checks.enum(kind, f"rules.{name}", getattr(self, name)))
        if self.weight_bits is not None:
            checks.bits("rules.weight_bits", self.weight_bits)
        if self.group_size is not None:
            checks.one_of("rules.group_size", self.group_size, GROUP_SIZES)
        if self.algorithms is not None:
            given = checks.items("rules.algorithms", self.algorithms)
            object.__setattr__(self, "algorithms", tuple(_of_layers(algorithm) for algorithm in given))
        if not self.changes():
            raise RecipeError("recipe: rules", expected=_RULE, seen=repr({"match": self.match}))

    def matches(self, *names: str) -> bool:
        """Whether any of `names` fits the pattern."""
        return any(fnmatch.fnmatchcase(name, self.match) for name in names)

    def changes(self) -> dict[str, Any]:
        """The fields of a recipe that are given, by name."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "match"}
        return {name: value for name, value in fields.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON and TOML."""
        return {"match": self.match, **{name: _plain(value) for name, value in self.changes().items()}}


_RULE_KEYS = tuple(field.name for field in dataclasses.fields(Rule))
_RULE = f"tables with match and {', '.join(_RULE_KEYS[1:-1])} or {_RULE_KEYS[-1]}"


def as_rule(rule: Rule | Mapping[str, Any]) -> Rule:
    """A rule, or one from plain data. Raises RecipeError."""
    if isinstance(rule, Rule):
        return rule
    if not isinstance(rule, Mapping) or "match" not in rule:
        raise RecipeError("recipe: rules", expected=_RULE, seen=repr(rule))
    for key in rule:
        if key not in _RULE_KEYS:
            hint = nearest(str(key), _RULE_KEYS)
            raise RecipeError("recipe: rules", expected=_RULE, seen=repr(dict(rule)), hint=hint)
    return Rule(**rule)


def _plain(value: Any) -> Any:
    """A value of a rule as JSON and TOML know it."""
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value.value if isinstance(value, enum.Enum) else value


def _of_layers(value: object) -> Algorithm:
    algorithm: Algorithm = checks.enum(Algorithm, "rules.algorithms", value)
    if algorithm not in OF_LAYERS:
        expected = f"some of {', '.join(known.value for known in OF_LAYERS)}, since others are of several layers"
        raise RecipeError("recipe: rules.algorithms", expected=expected, seen=repr(algorithm.value))
    return algorithm
