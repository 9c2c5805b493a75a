"""Models that torchao's quantizers quantized beside the same models quantized by tvmq: kernels, and latency in turns.

    python tests/importer/pt2e_latency.py [--out docs/quantized_models.md] [--rounds 15] [--bundles FOLDER] [model ...]
    python tests/importer/pt2e_latency.py --kernels [model ...]

Static quantization by torchao's X86 and XNNPACK quantizers beside tvmq's `int8`, dynamic beside `int8-dynamic` (of
transformers: it is for linear layers). The least latency of either, measured in turns; `--kernels`: which kernels one
calls more often than the other, which no noise disturbs, and no times. Bundles that are kept need not be made again.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
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
from tvmq.deploy.bundle import read
from tvmq.files import atomic_write_text
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
        if x.is_floating_point():
            return torch.randn(x.shape, generator=draw)
        return x[:, torch.randperm(x.shape[1], generator=draw)]

    return [example, *(tuple(map(like, example)) for _ in range(SAMPLES - 1))]


@dataclass(frozen=True)
class Subject:
    """A model, and how it is compiled."""

    model: Model
    recipe: tvmq.Recipe
    calibration: Any = None

    @functools.cached_property
    def kernels(self) -> Counter[str]:
        """How often an inference calls each of tvmq's kernels; nothing is built for that."""
        target = tvmq.load_target("host")
        realized = pipeline.realized_module(self.model, target, self.recipe, self.calibration).module
        lowered = lower(realized, target, winograd=self.recipe.winograd, sparse=self.recipe.sparse)
        return Counter(lowered.kernels.values())

    def write(self, path: Path) -> None:
        """Its bundle, where there is none."""
        if not path.exists():
            tvmq.compile(self.model, "host", self.recipe, self.calibration, path)


@dataclass(frozen=True)
class Pair:
    """tvmq's own quantization of a model, and that of one of torchao's quantizers."""

    name: str
    quantizer: str
    ours: Subject
    theirs: Subject


def quantizations(name: str) -> list[tuple[str, bool]]:
    """The quantizers that a model is given to, and whether dynamically."""
    kinds = (False, True) if name in TRANSFORMERS else (False,)
    return [(title, dynamic) for dynamic in kinds for title in QUANTIZERS]


def title_of(quantizer: str, dynamic: bool) -> str:
    """What the table calls a quantization."""
    return f"{quantizer} dynamic" if dynamic else quantizer


def pairs_of(name: str, check: bool, made: tuple[nn.Module, Example] | None = None) -> Iterator[Pair]:
    """Each quantizer's result of a model beside tvmq's; `check` the imports. made: a model that is not in `MODELS`."""
    module, example = made or MODELS[name]()
    samples = samples_of(example)
    source = tvmq.import_model(module, example, name=name, check=check)
    calibration = [tuple(x.numpy() for x in sample) for sample in samples]
    static = Subject(source, tvmq.Recipe(precision="int8"), calibration)
    dynamically = Subject(source, tvmq.Recipe(precision="int8-dynamic"))
    for title, dynamic in quantizations(name):
        model = tvmq.import_model(quantized(module, samples, QUANTIZERS[title](dynamic)), name=name, check=check)
        ours = dynamically if dynamic else static
        yield Pair(name, title_of(title, dynamic), ours, Subject(model, tvmq.Recipe()))


def differences(ours: Counter[str], theirs: Counter[str]) -> list[str]:
    """The kernels that one calls more often."""
    names = sorted(name for name in ours | theirs if ours[name] != theirs[name])
    return [f"{name}: {ours[name]} in ours, {theirs[name]} in theirs" for name in names]


@dataclass(frozen=True)
class Row:
    """A line of the table: kernel calls of an inference, and the least milliseconds of one, of either."""

    name: str
    quantizer: str
    calls: tuple[int, int]
    ms: tuple[float, float]

    @property
    def ratio(self) -> float:
        """How much longer theirs takes."""
        return self.ms[1] / self.ms[0]

    def __str__(self) -> str:
        calls, ms = (" | ".join(map(form, pair)) for form, pair in ((str, self.calls), ("{:.3f}".format, self.ms)))
        return f"| {self.name} | {self.quantizer} | {calls} | {ms} | {self.ratio:.3f} |"


def bundles_of(name: str, folder: Path) -> list[tuple[str, Path, Path]]:
    """Each quantization of a model, tvmq's bundle and the quantizer's; those that `folder` lacks are made."""
    found = []
    for quantizer, dynamic in quantizations(name):
        title = title_of(quantizer, dynamic)
        files = (f"{name}-{'dynamic' if dynamic else 'static'}.tvmq", f"{name}-{title}.tvmq".replace(" ", "-"))
        found.append((title, folder / files[0], folder / files[1]))
    if not all(path.exists() for _, *paths in found for path in paths):
        paths = {title: rest for title, *rest in found}
        for pair in pairs_of(name, check=False):
            pair.ours.write(paths[pair.quantizer][0])
            pair.theirs.write(paths[pair.quantizer][1])
    return found


def measured(name: str, quantizer: str, ours: Path, theirs: Path, count: int) -> Row:
    """The least latency of either bundle, over rounds in turns."""
    calls = [sum(bool(step["symbol"]) for step in read(path).manifest["steps"]) for path in (ours, theirs)]
    with tvmq.load(ours) as mine, tvmq.load(theirs) as other:
        executors = [mine, other]
        for executor in executors:
            executor.benchmark(repeat=1, min_repeat_ms=20)
        found = rounds([timer(executor, 1, 10, warmup=1) for executor in executors], count)
    return Row(name, quantizer, (calls[0], calls[1]), (min(found[0]), min(found[1])))


HEAD = "| model | quantizer | kernels, tvmq's | kernels | ms, tvmq's | ms | ratio |\n|---|---|---|---|---|---|---|"


def markdown(rows: Sequence[Row], command: str) -> str:
    """The table of the documentation."""
    within = sum(row.ratio <= GOAL for row in rows)
    lines = [
        "# Models that their source quantized",
        "",
        "What torchao's X86 and XNNPACK quantizers (PT2E) make of models beside the same models quantized by tvmq: static",
        "by `int8`, dynamic by `int8-dynamic`, both from the same float model and the same samples. Kernel calls of an",
        f"inference, and its least milliseconds, in turns on {tvmq.load_target('host').description}.",
        f"{within} of {len(rows)} take at most {GOAL:g} times as long as tvmq's own. Written by",
        "",
        f"    {command}",
        "",
        HEAD,
        *map(str, rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Print the table. Exit code 1 where a pair misses the goal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help=f"of {', '.join(MODELS)}; default: all")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--kernels", action="store_true", help="which kernels differ, and no times")
    parser.add_argument("--bundles", metavar="FOLDER", help="where bundles are kept: what is there is not made again")
    parser.add_argument("--only-make", action="store_true", help="make the bundles, and no times")
    parser.add_argument("--out", metavar="FILE.md", help="write the table there")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    names = options.models or list(MODELS)
    if options.kernels:
        for pair in (pair for name in names for pair in pairs_of(name, check=False)):
            found = differences(pair.ours.kernels, pair.theirs.kernels)
            print("\n    ".join([f"{pair.name}, {pair.quantizer}:", *found]), flush=True)
        return 0
    with contextlib.ExitStack() as stack:
        folder = Path(options.bundles or stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        made = [(name, *bundles) for name in names for bundles in bundles_of(name, folder)]
        if options.only_make:
            return 0
        print(HEAD)
        rows = []
        for name, quantizer, ours, theirs in made:
            rows.append(measured(name, quantizer, ours, theirs, options.rounds))
            print(rows[-1], flush=True)
    if options.out:
        command = f"python tests/importer/pt2e_latency.py --out {options.out}"
        atomic_write_text(Path(options.out), markdown(rows, command))
    return int(any(row.ratio > GOAL for row in rows))


if __name__ == "__main__":
    sys.exit(main())
