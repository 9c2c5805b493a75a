"""The arguments of an operator's node, whole."""

from __future__ import annotations

from typing import Any

from torch import fx


def arguments(node: fx.Node) -> dict[str, Any]:
    """The operator's arguments by name (as in its schema), with PyTorch's defaults; tensors are fx nodes."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = dict(zip((argument.name for argument in schema), node.args, strict=False))
    defaults = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    return defaults | given | dict(node.kwargs)
