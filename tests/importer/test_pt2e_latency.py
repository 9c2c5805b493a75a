"""Models that torchao quantized call no more kernels than those that tvmq quantized (`pt2e_latency.py` measures them)."""

import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("torchao")

import pt2e_latency


class Small(nn.Module):
    """A residual block, one with a shortcut, a pool, and a linear layer whose result is the model's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.outer, self.shortcut = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.inner(x) + x)
        x = torch.relu(self.outer(x) + self.shortcut(x))
        return self.head(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


def _small() -> tuple[nn.Module, pt2e_latency.Example]:
    torch.manual_seed(0)
    return Small().eval(), (torch.randn(1, 3, 8, 8),)


def _extra(name: str, made: tuple[nn.Module, pt2e_latency.Example] | None = None) -> dict[str, int]:
    """How many kernels more each quantization calls than tvmq's own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pairs = pt2e_latency.pairs_of(name, made is not None, made)
        return {pair.quantizer: pair.theirs.kernels.total() - pair.ours.kernels.total() for pair in pairs}


def test_a_small_network_has_the_same_kernels() -> None:
    """X86's quantizer leaves the average float: what the linear layer reads is converted by a kernel of its own."""
    assert _extra("small", _small()) == {"X86": 1, "XNNPACK": 0}


@pytest.mark.slow
@pytest.mark.parametrize("name", pt2e_latency.MODELS)
def test_kernels(name: str) -> None:
    assert max(_extra(name).values()) <= 0


def test_the_table() -> None:
    rows = [
        pt2e_latency.Row("resnet18", "X86", (20, 21), (4.0, 4.1)),
        pt2e_latency.Row("resnet18", "XNNPACK", (20, 30), (4.0, 5.0)),
    ]
    table = pt2e_latency.markdown(rows, "a command")
    assert "1 of 2 take at most 1.05 times" in table and "    a command\n" in table
    assert "| resnet18 | XNNPACK | 20 | 30 | 4.000 | 5.000 | 1.250 |" in table
