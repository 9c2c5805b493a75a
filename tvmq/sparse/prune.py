"""One-shot pruning of a model without training: which weights go, and how those that stay make up for them.

    model -> masks of its layers -> model with zeros

The result is a model like any other: it is compiled, quantized and measured as its source was.
"""

from __future__ import annotations

import dataclasses
import enum
import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import tvm

from tvmq import ir
from tvmq.errors import CalibrationError, InputError, nearest
from tvmq.graph.layout import to_nhwc
from tvmq.graph.transposes import drop_transposes
from tvmq.importer.canonical import fold_constants
from tvmq.model import Model
from tvmq.oracle import interpret
from tvmq.quantize.data import inferences
from tvmq.quantize.input_products import input_rows
from tvmq.sparse import channels, masks, obs
from tvmq.sparse.layers import Layer, layers, with_matrices
from tvmq.sparse.masks import SINGLE, Block, Mask

Array = npt.NDArray[Any]


class Method(str, enum.Enum):
    """How weights are chosen."""

    LAYER = "layer"
    """The largest blocks of each layer: every layer gets the same density."""
    GLOBAL = "global"
    """The largest blocks of all layers together."""
    THRESHOLD = "threshold"
    """Weights of at least `alpha` times the largest one of their layer."""
    N_OF_M = "n:m"
    """The N largest of every M inputs of an output channel."""
    CHANNELS = "channels"
    """The strongest output channels: the others are removed for real (see `channels`)."""


@dataclass(frozen=True)
class Pruning:
    """What to prune. Raises InputError.

    density: the kept fraction; N:M has its own. block: what is kept or dropped together. alpha: of the threshold; None
    means the one that keeps `density` of all layers together. n, m: of N:M. skip: globs of the paths or names of layers
    that stay as they are. update: with calibration data, weights are chosen by what they do to a layer's results, and
    the others are corrected (see `obs`).
    """

    method: Method = Method.LAYER
    density: float = 0.2
    block: Block = SINGLE
    alpha: float | None = None
    n: int = 2
    m: int = 4
    skip: tuple[str, ...] = ()
    update: bool = False

    def __post_init__(self) -> None:
        words = [method.value for method in Method]
        if self.method not in words:
            hint = nearest(str(self.method), words)
            raise InputError("pruning method", expected=f"one of {', '.join(words)}", seen=repr(self.method), hint=hint)
        object.__setattr__(self, "method", Method(self.method))
        masks.check_density(self.density)
        if self.method in (Method.THRESHOLD, Method.N_OF_M, Method.CHANNELS) and self.block != SINGLE:
            raise InputError("block", expected=f"1x1 with {self.method.value}", seen=self.block)
        if self.method is Method.CHANNELS and self.update:
            raise InputError("update", expected="a method that masks weights", seen=self.method.value)

    def takes(self, layer: Layer) -> bool:
        """Whether `layer` is pruned."""
        return not any(fnmatch.fnmatchcase(name, glob) for glob in self.skip for name in (layer.path, layer.name))


@dataclass(frozen=True)
class Pruned:
    """The model; the density that each pruned layer has now, by path; the kept fraction of their weights together."""

    model: Model
    densities: Mapping[str, float]
    density: float


@dataclass(frozen=True)
class Inputs:
    """What calibration tells of the inputs of each layer, by its variable: the inverse of X^T X (see `obs`)."""

    inverses: Mapping[str, Array]


def observe(model: Model, calibration: Iterable[Any] | None, skip: tuple[str, ...] = ()) -> Inputs:
    """The inputs of the layers of `model` over all batches, for several prunings of it. Raises CalibrationError."""
    if calibration is None:
        raise CalibrationError("calibration data", expected="some, to correct the weights that stay", seen="none")
    module = to_nhwc(model.module)
    chosen = _chosen(module, model, Pruning(skip=skip))
    sums = zip(chosen, _grams(module, model, chosen, calibration), strict=True)
    return Inputs({layer.name: obs.inverse(h) for layer, h in sums})


def prune(model: Model, pruning: Pruning, calibration: Iterable[Any] | Inputs | None = None) -> Pruned:
    """`model` with weights pruned. calibration: batches, or what `observe` made of them, for `update`.

    Raises InputError, CalibrationError.
    """
    if pruning.method is Method.CHANNELS:
        return _without_channels(model, pruning)
    # Channels last, so that a convolution's inputs are read as its matrix is.
    module = to_nhwc(model.module)
    chosen = _chosen(module, model, pruning)
    matrices = [masks.check_finite(layer.matrix, layer.path) for layer in chosen]
    if not pruning.update:
        kept = _masks(matrices, pruning)
        new = [matrix * mask for matrix, mask in zip(matrices, kept, strict=True)]
    else:
        inputs = calibration if isinstance(calibration, Inputs) else observe(model, calibration, pruning.skip)
        inverses = [inputs.inverses[layer.name] for layer in chosen]
        scores = [obs.saliency(*pair) for pair in zip(matrices, inverses, strict=True)]
        kept = _masks(scores, pruning)
        new = [obs.update(*three) for three in zip(matrices, kept, inverses, strict=True)]
    named = {layer.name: matrix for layer, matrix in zip(chosen, new, strict=True)}
    densities = {layer.path: float(mask.mean()) for layer, mask in zip(chosen, kept, strict=True)}
    share = sum(int(mask.sum()) for mask in kept) / max(sum(mask.size for mask in kept), 1)
    return Pruned(dataclasses.replace(model, module=with_matrices(module, named)), densities, share)


def _chosen(module: tvm.IRModule, model: Model, pruning: Pruning) -> list[Layer]:
    return [layer for layer in layers(module, model.paths) if pruning.takes(layer)]


def _without_channels(model: Model, pruning: Pruning) -> Pruned:
    module = fold_constants(drop_transposes(to_nhwc(model.module)))
    found = {layer.name: layer for layer in layers(module, model.paths)}
    for layer in found.values():
        masks.check_finite(layer.matrix, layer.path)
    smaller, densities = channels.remove(
        module, pruning.density, lambda name: name not in found or pruning.takes(found[name])
    )
    left = sum(layer.matrix.size for layer in layers(smaller, model.paths))
    share = left / max(sum(layer.matrix.size for layer in found.values()), 1)
    by_path = {model.paths.get(name, name): density for name, density in densities.items()}
    return Pruned(dataclasses.replace(model, module=smaller), by_path, share)


def _masks(scores: Sequence[Array], pruning: Pruning) -> list[Mask]:
    """The masks of matrices whose magnitudes say what a weight is worth."""
    match pruning.method:
        case Method.GLOBAL:
            return masks.by_block_globally(scores, pruning.density, pruning.block)
        case Method.THRESHOLD:
            alpha = masks.alpha_of(scores, pruning.density) if pruning.alpha is None else pruning.alpha
            return [masks.by_threshold(score, alpha) for score in scores]
        case Method.N_OF_M:
            return [masks.n_of_m(score, pruning.n, pruning.m) for score in scores]
        case _:
            return [masks.by_block(score, pruning.density, pruning.block) for score in scores]


def _grams(module: tvm.IRModule, model: Model, chosen: Sequence[Layer], calibration: Iterable[Any]) -> list[Array]:
    """X^T X of the inputs of each layer, over all batches. Raises CalibrationError."""
    names = {layer.name for layer in chosen}
    calls = {str(var.name): call for var, call in ir.calls(module) if str(var.name) in names}
    program = interpret.Program(module, frozenset(str(call.args[0].name) for call in calls.values()))
    sums: dict[str, Array] = {}
    for inputs in inferences(calibration, model.signature):
        tensors = {spec.name: array for spec, array in zip(model.signature.inputs, inputs, strict=True)}
        program.run(inputs, tensors.__setitem__)
        for name, call in calls.items():
            sums[name] = sums.get(name, 0.0) + obs.gram(input_rows(call, tensors[str(call.args[0].name)]))
    if chosen and not sums:
        raise CalibrationError("calibration data", expected="at least one batch", seen="none")
    return [sums[layer.name] for layer in chosen]
