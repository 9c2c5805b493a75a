"""Instruction counts on an emulated board: they repeat but for a little beside the kernels, and add up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tvmq.cli import main
from tvmq.deploy.counting import plugin
from tvmq.deploy.emulate import EmulatedBoard, find_qemu
from tvmq.deploy.executor import load
from tvmq.deploy.session import RemoteSession
from tvmq.errors import DeviceError
from tvmq.measure.counts import count

CPU = "cortex-a76"


@pytest.mark.emulated
def test_counts_repeat_and_add_up(board_root: Path, bundle_of: Callable[..., Path]) -> None:
    path = bundle_of("flatten_linear", target="raspberry-pi-5")
    first, second = (count(path, CPU) for _ in range(2))
    # A call varied by 1100 instructions from board to board.
    assert [op.name for op in first.ops] == [op.name for op in second.ops]
    for once, again in zip(first.ops, second.ops, strict=True):
        assert abs(once.instructions - again.instructions) < 5000
    parts = sum(op.instructions for op in first.ops)
    # The virtual machine's own work is a few thousand instructions a call.
    assert parts < first.instructions < parts + 20_000 * len(first.ops)
    assert any(op.kernel.endswith("sdot") for op in first.ops)
    assert min(op.instructions for op in first.ops) > 100


@pytest.mark.emulated
def test_a_board_without_the_plugin_says_so(board: EmulatedBoard, bundle_of: Callable[..., Path]) -> None:
    executor = load(bundle_of("flatten_linear", target="raspberry-pi-3b"), board.url)
    executor.runner()
    assert isinstance(executor.session, RemoteSession)
    with pytest.raises(DeviceError, match="this board does not count instructions"):
        executor.session.instructions(executor.machine.module, "invoke_stateful", "main")


@pytest.mark.emulated
def test_a_function_that_does_not_exist(board: EmulatedBoard, bundle_of: Callable[..., Path]) -> None:
    executor = load(bundle_of("flatten_linear", target="raspberry-pi-3b"), board.url)
    assert isinstance(executor.session, RemoteSession)
    with pytest.raises(DeviceError, match="no such function"):
        executor.session.instructions(executor.library, "nothing")
    # The session lives on.
    np.testing.assert_array_equal(executor.session.fetch(executor.session.tensor(np.arange(3))), np.arange(3))


def test_a_static_qemu_takes_no_plugins(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="expected qemu-aarch64 with plugins.*apt-get install qemu-user$"):
        plugin("/usr/bin/qemu-aarch64-static", tmp_path)


def test_a_qemu_without_a_version(tmp_path: Path) -> None:
    command = tmp_path / "qemu-aarch64"
    command.write_text("#!/bin/sh\necho abacus\n")
    command.chmod(0o755)
    with pytest.raises(DeviceError, match="expected a version of qemu, saw abacus"):
        plugin(str(command), tmp_path)


@pytest.mark.emulated
def test_the_plugin_is_built_once(board_root: Path, tmp_path: Path) -> None:
    path = plugin(find_qemu(), tmp_path)
    changed = path.stat().st_mtime_ns
    assert plugin(find_qemu(), tmp_path) == path
    assert path.stat().st_mtime_ns == changed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["board", "emulat"], "did you mean 'emulate'"),
        (["board", "emulate", "--port", "65536"], "expected a port from 0 to 65535"),
        (["board", "emulate", "--port", "9090", "--count", "x.tvmq"], "only without --count"),
    ],
)
def test_mistakes_on_the_command_line(words: list[str], said: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert said in capfd.readouterr().err


@pytest.mark.emulated
def test_the_command_counts(
    board_root: Path, bundle_of: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    path = bundle_of("flatten_linear", target="raspberry-pi-5")
    assert main(["board", "emulate", "--cpu", CPU, "--count", str(path)]) == 0
    assert f"instructions an inference on one {CPU}" in capfd.readouterr().out
