"""Bundles for boards, made here without a toolchain, give on an emulated board the bits that they give here."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from samples import calibration_of

from tvmq import pipeline
from tvmq.deploy.bundle import read
from tvmq.deploy.emulate import EmulatedBoard
from tvmq.deploy.executor import load
from tvmq.measure.verify import verify
from tvmq.model import Model
from tvmq.recipe import Recipe

# target, qemu's processor, and a part of the names of its int8 kernels.
BOARDS = [
    ("raspberry-pi-4b", "cortex-a72", "-neon"),
    ("raspberry-pi-3b", "cortex-a53", "-neon"),
    ("raspberry-pi-5", "cortex-a76", "-sdot"),
]
NAMES = ("residual", "depthwise_separable", "concat", "pools", "activations", "dead_channels")


@pytest.mark.emulated
@pytest.mark.parametrize(("target", "cpu", "kernel"), BOARDS)
@pytest.mark.parametrize("name", NAMES)
def test_a_board_gives_the_bits_of_this_machine(
    board_root: Path, bundle_of: Callable[..., Path], name: str, target: str, cpu: str, kernel: str
) -> None:
    here = load(bundle_of(name))
    assert here.bundle.manifest["exact"]
    with EmulatedBoard(board_root).start(cpu=cpu) as board:
        there = load(bundle_of(name, target=target), board.url)
        rng = np.random.default_rng(7)
        for scale in (0.1, 1.0, 100.0):
            inputs = [(scale * rng.standard_normal(spec.shape)).astype(np.float32) for spec in here.signature.inputs]
            for want, got in zip(here(*inputs), there(*inputs), strict=True):
                np.testing.assert_array_equal(got, want)
        kernels = [step["kernel"] for step in there.bundle.manifest["steps"] if "-conv2d" in step["kernel"]]
        assert kernels
        assert all(title.endswith(kernel) for title in kernels)


@pytest.mark.emulated
@pytest.mark.parametrize(
    ("target", "cpu"),
    [
        pytest.param("raspberry-pi-3b", "cortex-a53", marks=pytest.mark.slow),
        pytest.param("raspberry-pi-5", "cortex-a76", marks=pytest.mark.slow),
        ("graviton3", "max"),
    ],
)
def test_a_cnn_and_a_transformer_on_each_level(
    board_root: Path, bundle_of: Callable[..., Path], target: str, cpu: str
) -> None:
    """No dot product, sdot, smmla: int8 is the oracle's bit for bit."""
    with EmulatedBoard(board_root).start(cpu=cpu) as board:
        for name in ("depthwise_separable", "transformer"):
            result = verify(bundle_of(name, target=target), board.url)
            assert result.ok, str(result)


@pytest.mark.emulated
@pytest.mark.parametrize("name", ["residual", "transformer", "split"])
def test_verification_over_rpc(board: EmulatedBoard, bundle_of: Callable[..., Path], name: str) -> None:
    result = verify(bundle_of(name, target="raspberry-pi-4b"), board.url)
    assert result.ok, str(result)
    assert result.device == board.url
    assert len(result.ops) >= 5


def test_the_golden_outputs_are_the_same_for_every_target(bundle_of: Callable[..., Path]) -> None:
    """The oracle does not know the target, but for how it stores activations."""
    wanted = [
        read(bundle_of("residual", target=target)).golden()[1][0]
        for target in ("raspberry-pi-4b", "beaglebone", "x86-64-avx2", "graviton3")
    ]
    for other in wanted[1:]:
        np.testing.assert_array_equal(other, wanted[0])


@pytest.mark.parametrize("target", ["beaglebone", "visionfive-2", "graviton3", "rk3588", "x86-64-amx", "intel-n100"])
def test_bundles_are_made_for_machines_that_are_not_here(bundle_of: Callable[..., Path], target: str) -> None:
    bundle = read(bundle_of("residual", target=target))
    machine = {"x86_64": 62, "aarch64": 183, "arm": 40, "riscv64": 243}  # ELF's e_machine
    arch = bundle.manifest["target"]["triple"].split("-")[0]
    assert (
        int.from_bytes(bundle.members["lib.so"][18:20], "little") == machine["arm" if arch.startswith("armv") else arch]
    )
    # The Cortex-A8 has no division: what is called instead comes with the library.
    assert b"__divsi3" not in bundle.members["lib.so"]


def test_no_compiler_is_needed(
    imported: Callable[[str], Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of the system's is on the PATH: ziglang links."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shutil.which("cc") is None
    model = imported("flatten_linear")
    compiled = pipeline.compile_model(
        model, "raspberry-pi-4b", Recipe(precision="int8"), calibration_of(model), tmp_path / "m.tvmq"
    )
    assert read(compiled.path).members["lib.so"][:4] == b"\x7fELF"
