"""Models that torchao's quantizers quantized beside the same models quantized by tvmq: kernels, and latency in turns.

    python tests/importer/pt2e_latency.py [--rounds 15] [--kernels] [model ...]

Static quantization by torchao's X86 and XNNPACK quantizers beside tvmq's `int8`, dynamic beside `int8-dynamic` (of
transformers: it is for linear layers). The least latency of either, measured in turns; `--kernels`: which kernels one calls
more often than the other, which no noise disturbs, and no times.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86
from torchao.testing.pt2e import _xnnpack_quantizer as xnnpack

import tvmq
from tvmq import pipeline
from tvmq.kernels.lower import lower
from tvmq.measure.benchmark import rounds, timer
from tvmq.model import Model
from tvmq.zoo import encoders, vision

SAMPLES = 4
# PT2E may take this much longer than tvmq's own.
GOAL = 1.05
Example = tuple[torch.Tensor, ...]


class Squeezed(nn.Module):
    """Expand, depthwise, squeeze-and-excite, project, with hardswish: a block of MobileNetV3."""

    def __init__(self, cin: int, mid: int, cout: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.expand = nn.Sequential(*vision._conv(cin, mid, 1), nn.Hardswish())
        self.depthwise = nn.Sequential(*vision._conv(mid, mid, kernel, stride, mid), nn.Hardswish())
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(mid, mid // 4, 1),
            nn.ReLU(),
            nn.Conv2d(mid // 4, mid, 1),
            nn.Hardsigmoid(),
        )
        self.project = nn.Sequential(*vision._conv(mid, cout, 1))
        self.residual = stride == 1 and cin == cout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.depthwise(self.expand(x))
        y = self.project(y * self.squeeze(y))
        return x + y if self.residual else y


class MobileNetV3(nn.Module):
    """Shaped like MobileNetV3-Small."""

    BLOCKS = ((16, 3, 2, 16), (72, 3, 2, 24), (88, 3, 1, 24), (96, 5, 2, 40), (240, 5, 1, 40), (240, 5, 1, 40))
    LAST = ((120, 5, 1, 48), (144, 5, 1, 48), (288, 5, 2, 96), (576, 5, 1, 96), (576, 5, 1, 96))

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [*vision._conv(3, 16, 3, 2), nn.Hardswish()]
        cin = 16
        for mid, kernel, stride, cout in (*self.BLOCKS, *self.LAST):
            layers.append(Squeezed(cin, mid, cout, kernel, stride))
            cin = cout
        self.features = nn.Sequential(*layers, *vision._conv(cin, 576, 1), nn.Hardswish())
        self.head = nn.Sequential(nn.Linear(576, 1024), nn.Hardswish(), nn.Linear(1024, 1000))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x).mean((2, 3)))


class ViT(nn.Module):
    """Shaped like ViT-Tiny: 16x16 patches of an image, and `layers` layers."""

    def __init__(self, layers: int = 12, width: int = 192, heads: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.positions = nn.Parameter(torch.zeros(1, 196, width))
        self.layers = nn.Sequential(*(encoders.Layer(width, heads, 4 * width) for _ in range(layers)))
        self.head = nn.Linear(width, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.layers(x).mean(1))


def _vit() -> tuple[nn.Module, Example]:
    torch.manual_seed(0)
    return ViT().eval(), (torch.randn(vision.IMAGE),)


MODELS: dict[str, Callable[[], tuple[nn.Module, Example]]] = {
    "resnet18": vision.resnet18,
    "mobilenetv2": vision.mobilenetv2,
    "mobilenetv3": lambda: vision._ready(MobileNetV3()),
    "bert-like": encoders.minilm,
    "vit-like": _vit,
}
TRANSFORMERS = ("bert-like", "vit-like")


def _x86(dynamic: bool) -> object:
    config = x86.get_default_x86_inductor_quantization_config(is_dynamic=dynamic)
    return x86.X86InductorQuantizer().set_global(config)


def _xnnpack(dynamic: bool) -> object:
    config = xnnpack.get_symmetric_quantization_config(is_per_channel=True, is_dynamic=dynamic)
    return xnnpack.XNNPACKQuantizer().set_global(config)


QUANTIZERS: dict[str, Callable[[bool], object]] = {"X86": _x86, "XNNPACK": _xnnpack}


def quantized(module: nn.Module, samples: Sequence[Example], quantizer: object) -> ExportedProgram:
    """What torchao makes of a module, calibrated on samples."""
    prepared = prepare_pt2e(torch.export.export(module, samples[0]).module(), quantizer)
    for sample in samples:
        prepared(*sample)
    return torch.export.export(convert_pt2e(prepared), samples[0])


def samples_of(example: Example) -> list[Example]:
    """The example, and others like it."""
    draw = torch.Generator().manual_seed(1)

    def like(x: torch.Tensor) -> torch.Tensor:
        return torch.randn(x.shape, generator=draw) if x.is_floating_point() else x[:, torch.randperm(x.shape[1])]

    return [example, *(tuple(map(like, example)) for _ in range(SAMPLES - 1))]


@dataclass(frozen=True)
class Subject:
    """A model, and how it is compiled."""

    model: Model
    recipe: tvmq.Recipe
    calibration: Any = None

    def kernels(self) -> Counter[str]:
        """How often an inference calls each of tvmq's kernels; nothing is built for that."""
        target = tvmq.load_target("host")
        realized = pipeline.realized_module(self.model, target, self.recipe, self.calibration).module
        lowered = lower(realized, target, winograd=self.recipe.winograd, sparse=self.recipe.sparse)
        return Counter(lowered.kernels.values())

    def load(self, path: Path) -> tvmq.Executor:
        """Its bundle, made at `path` where there is none."""
        if not path.exists():
            tvmq.compile(self.model, "host", self.recipe, self.calibration, path)
        return tvmq.load(path)


@dataclass(frozen=True)
class Pair:
    """tvmq's own quantization of a model, and that of one of torchao's quantizers."""

    name: str
    quantizer: str
    ours: Subject
    theirs: Subject


def pairs_of(name: str, check: bool) -> Iterator[Pair]:
    """Each quantizer's result of a model beside tvmq's; `check` the imports."""
    module, example = MODELS[name]()
    samples = samples_of(example)
    source = tvmq.import_model(module, example, name=name, check=check)
    for dynamic in (False, True) if name in TRANSFORMERS else (False,):
        calibration = None if dynamic else [tuple(x.numpy() for x in sample) for sample in samples]
        ours = Subject(source, tvmq.Recipe(precision="int8-dynamic" if dynamic else "int8"), calibration)
        for title, quantizer in QUANTIZERS.items():
            model = tvmq.import_model(quantized(module, samples, quantizer(dynamic)), name=name, check=check)
            yield Pair(name, f"{title} dynamic" if dynamic else title, ours, Subject(model, tvmq.Recipe()))


def differences(ours: Counter[str], theirs: Counter[str]) -> list[str]:
    """The kernels that one calls more often."""
    names = sorted(name for name in ours | theirs if ours[name] != theirs[name])
    return [f"{name}: {ours[name]} in ours, {theirs[name]} in theirs" for name in names]


def least_ms(pair: Pair, count: int, folder: Path) -> tuple[float, float]:
    """The least latency of either, over rounds in turns."""
    mine = folder / f"{pair.name}-{pair.ours.recipe.precision.value}.tvmq"
    executors = [pair.ours.load(mine), pair.theirs.load(folder / f"{pair.name}-{pair.quantizer}.tvmq")]
    for executor in executors:
        executor.benchmark(repeat=1, min_repeat_ms=20)
    found = rounds([timer(executor, 1, 10, warmup=1) for executor in executors], count)
    return min(found[0]), min(found[1])


def main() -> int:
    """Print the table. Exit code 1 where a pair misses the goal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help=f"of {', '.join(MODELS)}; default: all")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--kernels", action="store_true", help="which kernels differ, and no times")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    missed = 0
    if not options.kernels:
        print("| model | quantizer | ms, ours | ms, theirs | ratio |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for pair in (pair for name in options.models or MODELS for pair in pairs_of(name, not options.kernels)):
            if options.kernels:
                print(f"{pair.name}, {pair.quantizer}:", flush=True)
                print(
                    "\n".join(f"    {line}" for line in differences(pair.ours.kernels(), pair.theirs.kernels())),
                    flush=True,
                )
            else:
                mine, other = least_ms(pair, options.rounds, Path(folder))
                missed += other > GOAL * mine
                print(f"| {pair.name} | {pair.quantizer} | {mine:.3f} | {other:.3f} | {other / mine:.3f} |", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
