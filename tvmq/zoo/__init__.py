"""Well-known architectures with random weights, for benchmarks: shapes and costs are real, accuracy is not."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from tvmq.errors import InputError, nearest
from tvmq.zoo import encoders, vision

# A module in inference mode, and example inputs.
Builder = Callable[[], tuple[torch.nn.Module, tuple[torch.Tensor, ...]]]

MODELS: Mapping[str, Builder] = {
    "resnet18": vision.resnet18,
    "resnet50": vision.resnet50,
    "resnet152": vision.resnet152,
    "mobilenetv2": vision.mobilenetv2,
    "minilm": encoders.minilm,
    "bert_base": encoders.bert_base,
}


def builder(name: str) -> Builder:
    """What makes the model `name`. Raises InputError for a name that is not in `MODELS`."""
    if name not in MODELS:
        raise InputError(f"model {name!r}", expected=f"one of {', '.join(MODELS)}", hint=nearest(name, MODELS))
    return MODELS[name]
