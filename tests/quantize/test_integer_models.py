"""Models whose operators between convolutions all become integer: compiled for this machine, equal to the oracle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from tvmq.deploy.executor import load
from tvmq.importer.load import import_model
from tvmq.pipeline import compile_model
from tvmq.recipe import Recipe
from tvmq.recipe_values import DEFAULT_KINDS


class Gates(nn.Module):
    """Squeeze-and-excite, products, differences, parts, and larger images, between convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, 8, H, W] -> [N, 8, 2 H, 2 W]."""
        x = self.a(x)
        x = x * torch.sigmoid(x.mean((2, 3), keepdim=True))
        x = x * torch.tanh(self.b(x)) - functional.max_pool2d(x, 3, 1, 1)
        first, second = self.c(x).chunk(2, 1)
        return self.d(functional.interpolate(torch.cat([second, first], 1), scale_factor=2))


def a_line() -> nn.Module:
    pools = nn.MaxPool1d(2, ceil_mode=True), nn.Conv1d(8, 8, 2), nn.AdaptiveAvgPool1d(4)
    larger = (
        nn.Upsample(scale_factor=2),
        nn.Upsample(11, mode="linear"),
        nn.Upsample(9, mode="linear", align_corners=True),
    )
    return nn.Sequential(nn.Conv1d(4, 8, 3), nn.ReLU(), *pools, *larger, nn.Conv1d(8, 3, 2))


class Volumes(nn.Module):
    """Convolutions of volumes, padded, strided, grouped and transposed, their pools and resizes, from the first on."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv3d(3, 8, 3, padding=1), nn.Conv3d(8, 8, 3, (2, 1, 1), 1, groups=2)
        self.c, self.d = nn.Conv3d(8, 8, (3, 1, 1), padding=(2, 0, 0), groups=8), nn.Conv3d(8, 8, 1)
        self.up = nn.ConvTranspose3d(8, 3, 2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, 3, D, H, W] -> [N, 3, D', H', W']."""
        x = functional.max_pool3d(torch.relu(self.a(x)), (1, 3, 2), (1, 2, 1), (0, 1, 1))
        x = functional.avg_pool3d(self.b(x), 2, 1, 1)
        x = functional.avg_pool3d(x, (2, 2, 3), (1, 1, 2), (0, 0, 1), ceil_mode=True)
        x = functional.interpolate(functional.interpolate(x, scale_factor=2), size=(3, 6, 5), mode="trilinear")
        x = self.c(x) * torch.sigmoid(self.d(functional.adaptive_avg_pool3d(x, 1)))
        return self.up(functional.adaptive_avg_pool3d(x, (3, 2, 2)))


class Means(nn.Module):
    """Means and sums along axes other than height and width, the last one too, between linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))
        self.d, self.e, self.f = nn.Linear(9, 8), nn.Linear(6, 8), nn.Linear(1, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, R, S, 8] -> [S + 3, 8]."""
        x = torch.relu(self.b(torch.relu(self.a(x)).mean(1)))
        y = torch.relu(self.c(torch.cat([x.mean(0), x.sum((0, 1), keepdim=True)[0]])))
        y = self.d(torch.cat([y, torch.relu(y.mean(-1, keepdim=True))], 1))
        return self.b(torch.cat([y, self.e(y.sum(-1)[None]), self.f(y.mean()[None, None])]))


def a_decoder() -> nn.Module:
    return nn.Sequential(nn.ConvTranspose2d(4, 6, 4, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 3))


class Frame(nn.Module):
    """Padding with a value between convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, 4, H, W] -> [N, 4, H + 1, W]."""
        return self.b(functional.pad(torch.relu(self.a(x)), (2, 2, 1, 4), value=0.3))


class Sizes(nn.Module):
    """Resizing, mirrored pixels, and pools whose windows differ, between convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, 4, H, W] -> [N, 4, 3, 4]."""
        x = functional.avg_pool2d(torch.relu(self.a(x)), (1, 3), (1, 2), (0, 1), ceil_mode=True)
        x = self.b(functional.interpolate(x, size=(10, 14), mode="bilinear"))
        x = functional.interpolate(functional.interpolate(x, size=(9, 12), mode="bicubic"), (1, 9), mode="bicubic")
        x = functional.pad(functional.interpolate(x, size=(7, 17)), (2, 1, 1, 0), mode="reflect").flip(3)
        return self.c(functional.adaptive_avg_pool2d(x, (3, 4)))


class Leaks(nn.Module):
    """Leaky rectifiers behind a convolution, behind a residual sum, and on their own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, 4, H, W] -> [N, 4, H, W]."""
        x = functional.leaky_relu(self.a(x), 0.1)
        y = functional.leaky_relu(self.b(x) + x, 0.2)
        return self.c(functional.leaky_relu(functional.max_pool2d(y, 3, 1, 1), -0.3))


class Curves(nn.Module):
    """ELU, SELU, CELU and PReLU behind convolutions, a residual sum, a pool, and on their own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.slopes, self.slope = nn.PReLU(4), nn.PReLU(init=-0.2)
        self.slopes.weight.data = torch.tensor([0.1, -0.5, 2.0, 0.0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, 4, H, W] -> [N, 4, H, W]."""
        x = functional.elu(self.a(x), 0.7)
        y = self.slopes(self.b(x) + x)
        y = functional.selu(functional.max_pool2d(y, 3, 1, 1)) + functional.celu(y, 0.6)
        y = self.slope(functional.max_pool2d(functional.celu(y), 3, 1, 1))
        return self.c(self.slopes(functional.max_pool2d(y, 3, 1, 1)))


class Norms(nn.Module):
    """Norms of groups and of single channels behind convolutions, one before a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 12, 3, 2, 1), nn.Conv2d(12, 12, 3, padding=1), nn.Conv2d(12, 4, 1)
        self.groups, self.channels = nn.GroupNorm(3, 12), nn.InstanceNorm2d(12, affine=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, 3, H, W] -> [N, 4, H / 2, W / 2]."""
        x = torch.relu(self.groups(self.a(x)))
        return self.c(torch.relu(self.channels(self.b(x)) + x))


class Dense(nn.Module):
    """Batch norms behind concats, a pool and a mean; constants of channels without a kernel before them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(4, 6, 3), nn.Conv2d(6, 3, 1), nn.Conv2d(9, 4, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for n in (6, 9, 4))
        for norm in self.norms:
            for tensor in (norm.weight.data, norm.running_mean, norm.bias.data, norm.running_var):
                nn.init.uniform_(tensor, 0.3, 1.5)
        self.d, self.slopes = nn.Linear(4, 3), nn.Parameter(torch.tensor([-1.0, 2.0, 0.1, 0.4]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, 4, H, W] -> [N, 3]."""
        first, second, third = self.norms
        x = functional.max_pool2d(self.a(x), 2)
        x = self.c(torch.relu(second(torch.cat([x, self.b(torch.relu(first(x)))], 1))))
        x = third(functional.max_pool2d(torch.relu(x), 2, 1)).mean((2, 3))
        return self.d(self.slopes * x.flip(0) + 0.3)


MODELS = {
    "norms": (Norms, (2, 3, 10, 9)),
    "dense": (Dense, (2, 4, 10, 9)),
    "curves": (Curves, (1, 4, 5, 7)),
    "leaks": (Leaks, (1, 4, 5, 7)),
    "sizes": (Sizes, (1, 4, 5, 8)),
    "frame": (Frame, (1, 4, 6, 5)),
    "gates": (Gates, (2, 8, 6, 5)),
    "line": (a_line, (2, 4, 14)),
    "volumes": (Volumes, (2, 3, 4, 6, 5)),
    "means": (Means, (3, 2, 5, 8)),
    "decoder": (a_decoder, (1, 4, 5, 4)),
}
# Norms are integer where a recipe names them.
RECIPE = Recipe(precision="int8", kinds=(*DEFAULT_KINDS, "group_norm"))
# What moves the model's own inputs and outputs between layouts.
EDGES = ("permute_dims", "reshape")


@pytest.mark.parametrize("name", MODELS)
def test_everything_between_convolutions_is_integer(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, shape = MODELS[name]
    network = make().eval()
    x = np.random.default_rng(0).standard_normal((4, *shape)).astype(np.float32)
    model = import_model(network, (torch.from_numpy(x[0]),))
    compiled = compile_model(model, "host", RECIPE, list(x), tmp_path / "m.tvmq")
    floats = [row for row in compiled.operators if row["precision"] != "int8" and row["kind"] not in EDGES]
    assert not floats
    executor = load(compiled.path)
    # Compiling compared it with the oracle, bit for bit.
    assert executor.bundle.manifest["exact"]
    with torch.no_grad():
        want = network(torch.from_numpy(x[1])).numpy()
    assert np.corrcoef(executor(x[1])[0].ravel(), want.ravel())[0, 1] > 0.99
