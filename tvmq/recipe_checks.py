"""Checks of a recipe's values: each raises RecipeError, which names the key, what was expected, and what was seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvmq.errors import RecipeError, nearest


def enum(kind: type[Any], name: str, value: object) -> Any:
    """The member of an enum of strings."""
    values = [member.value for member in kind]
    try:
        return kind(value)
    except ValueError:
        hint = nearest(str(value), values)
        expected = f"one of {', '.join(values)}"
        raise RecipeError(f"recipe: {name}", expected=expected, seen=repr(value), hint=hint) from None


def items(name: str, value: object) -> Sequence[Any]:
    """A list."""
    if not isinstance(value, list | tuple):
        raise RecipeError(f"recipe: {name}", expected="a list", seen=repr(value))
    return value


def between(name: str, value: object, low: float, high: float) -> None:
    """A number above `low`, and not above `high`."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not low < value <= high:
        raise RecipeError(f"recipe: {name}", expected=f"a number above {low:g}, up to {high:g}", seen=repr(value))


def bits(name: str, value: object) -> None:
    """A number of bits."""
    if isinstance(value, bool) or not isinstance(value, int) or not 2 <= value <= 8:
        raise RecipeError(f"recipe: {name}", expected="an integer from 2 to 8", seen=repr(value))


def one_of(name: str, value: object, known: Sequence[int]) -> None:
    """One of some integers."""
    if value not in known or not isinstance(value, int) or isinstance(value, bool):
        expected = f"one of {', '.join(str(item) for item in known)}"
        raise RecipeError(f"recipe: {name}", expected=expected, seen=repr(value))
