"""A small model as .pt2, its data, and its bundle, made once a session by the command line itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tvmq.cli import main


@dataclass(frozen=True)
class Files:
    folder: Path
    model: Path
    data: Path
    bundle: Path

    def batch(self) -> np.ndarray:
        with np.load(self.data) as archive:
            return archive["x"]


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        return json.loads(self.out)

    @property
    def line(self) -> str:
        """What stderr says, which is one line."""
        assert self.err.count("\n") == 1, self.err
        assert "Traceback" not in self.err
        return self.err.rstrip("\n")


def small_network(last: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), last).eval()


def export(module: nn.Module, path: Path) -> Path:
    torch.export.save(torch.export.export(module, (torch.zeros(1, 3, 8, 8),)), path)
    return path


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("cli")
    model = export(small_network(nn.ReLU()), folder / "small.pt2")
    data = folder / "data.npz"
    np.savez(data, x=np.random.default_rng(0).standard_normal((4, 3, 8, 8)).astype(np.float32))
    bundle = folder / "small.tvmq"
    words = ["compile", str(model), "--precision", "int8", "--calibrate", str(data), "-o", str(bundle)]
    assert main(words) == 0
    return Files(folder, model, data, bundle)


@pytest.fixture(scope="session")
def export_small() -> Callable[[nn.Module, Path], Path]:
    """Write the small network with another last layer as .pt2."""
    return lambda last, path: export(small_network(last), path)


@pytest.fixture
def tvmq(capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run a command line in this process."""

    def run(*words: object) -> Outcome:
        capfd.readouterr()
        code = main([str(word) for word in words])
        return Outcome(code, *capfd.readouterr())

    return run
