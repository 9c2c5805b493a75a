"""Arguments that are no tensors (a flag, a number, None) are part of the model: they are bound before it is traced.

forward(x, flag, y) with (x, True, y)  ->  forward(x, *, flag=True, y) with x, y=y
"""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any

import torch
from torch.utils import _pytree as pytree

from tvmq.errors import ModelError

CONSTANT = (bool, int, float, str, type(None))


def bound(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], title: str
) -> tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]]:
    """`module` with the constants among its arguments bound, and the tensors as they are passed then.

    Itself, with the same arguments, where there are none; else a copy that shares its layers. Raises ModelError for
    arguments that `forward` does not take, or without a tensor, and for constants beside `*args`.
    """
    leaves = pytree.tree_leaves((args, kwargs))
    constants = [leaf for leaf in leaves if isinstance(leaf, CONSTANT)]
    if not constants:
        return module, args, kwargs
    where = f"example inputs of {title}"
    if len(constants) == len(leaves):
        raise ModelError(where, expected="a tensor or an array", seen=type(constants[0]).__name__)
    given = _by_name(module, args, kwargs, where)
    fixed = {name: value for name, value in given.items() if isinstance(value, CONSTANT)}
    tensors = {name: value for name, value in given.items() if name not in fixed}
    made = copy.copy(module)
    made.forward = functools.partial(module.forward, **fixed)
    return made, (), tensors


def _by_name(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], where: str) -> dict[str, Any]:
    """The arguments by the names that `forward` has for them. Raises ModelError."""
    signature = inspect.signature(module.forward)
    try:
        found = dict(signature.bind(*args, **kwargs).arguments)
    except TypeError as error:
        raise ModelError(where, expected="what forward() takes", seen=str(error)) from error
    for name, parameter in signature.parameters.items():
        if name in found and parameter.kind in (parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY):
            hint = "bind the constants in a wrapper module"
            raise ModelError(where, expected="arguments with names beside constants", seen=str(parameter), hint=hint)
        if name in found and parameter.kind is parameter.VAR_KEYWORD:
            found |= found.pop(name)
    return found
