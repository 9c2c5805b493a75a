"""Instructions of an inference by ONNX Runtime's library for 64-bit ARM, counted under qemu-user on one thread.

    board's root -> a copy of it with the library of the published wheel, a program that counts, and a processor's files

No Python runs there: the program calls ONNX Runtime's C interface.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tvmq.deploy.board_root import (
    HEADERS,
    ZIG_TRIPLE,
    default_cache,
    download_wheel,
    locked,
    prepare,
    require_pip,
    run_tool,
    scratch_in,
    unpack_libraries,
)
from tvmq.deploy.counting import plugin
from tvmq.deploy.crosslink import zig_cc
from tvmq.deploy.emulate import board_environment, find_qemu
from tvmq.errors import DeviceError
from tvmq.files import scratch_folder

Array = npt.NDArray[Any]
CPU = "cortex-a76"
PACKAGE = "onnxruntime"
SOURCE = Path(__file__).with_name("onnx_count.c")
# In the root.
FOLDER, PROGRAM, LIBRARY = "opt/onnxruntime", "onnx-count", "libonnxruntime.so.1"
# What Linux tells of a Cortex-A76: ONNX Runtime chooses kernels by it. Where the root has such a file, qemu shows that.
PROCESSOR = {
    "proc/cpuinfo": """\
processor	: 0
BogoMIPS	: 108.00
Features	: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer	: 0x41
CPU architecture: 8
CPU variant	: 0x4
CPU part	: 0xd0b
CPU revision	: 1
""",
    "sys/devices/system/cpu/possible": "0\n",
    "sys/devices/system/cpu/present": "0\n",
}
# ResNet-18 takes seconds; this is for a machine that is swamped.
TIMEOUT_S = 600.0


def count(model: Path, inputs: Sequence[Array], cache: Path | None = None) -> int:
    """Instructions of an inference of the ONNX file `model` on a Cortex-A76. cache: see `prepare_library`.

    Raises DeviceError, OutputError.
    """
    root, qemu = prepare_library(cache), find_qemu()
    folder = root / FOLDER
    emulator = [qemu, "-cpu", CPU, "-L", str(root), "-plugin", str(plugin(qemu, cache))]
    return run_counter([*emulator, str(folder / PROGRAM)], folder / LIBRARY, model, inputs)


def run_counter(program: Sequence[str], library: Path, model: Path, inputs: Sequence[Array]) -> int:
    """The least of two counts of an inference. program: in a qemu with the plugin. Raises DeviceError."""
    with scratch_folder() as folder:
        files = [folder / f"input{index}" for index in range(len(inputs))]
        for path, value in zip(files, inputs, strict=True):
            path.write_bytes(np.ascontiguousarray(value).tobytes())
        command = [*program, *map(str, (library, model, *files))]
        what = f"ONNX Runtime cannot run {model.name}"
        said = run_tool(command, what, board_environment(), timeout_s=TIMEOUT_S)
    return min(map(int, said.split()))


def prepare_library(cache: Path | None = None) -> Path:
    """A root for qemu with ONNX Runtime, of the version that is installed here, in `cache` (None: default_cache()).

    Downloads 22 MB the first time, besides what `prepare` does. Raises DeviceError where a tool is missing or a
    download fails, OutputError where `cache` cannot be written.
    """
    if importlib.util.find_spec(PACKAGE) is None:
        hint = "pip install 'tvmq[peers]'"
        raise DeviceError("cannot count ONNX Runtime's instructions", seen=f"no package {PACKAGE}", hint=hint)
    cache = default_cache() if cache is None else cache
    board, version = prepare(cache), importlib.metadata.version(PACKAGE)
    parts = [board.name, *PROCESSOR.values(), SOURCE.read_text(encoding="utf-8")]
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]
    root = cache / f"{PACKAGE}-{version}-{digest}"
    if root.is_dir():
        return root
    require_pip()
    with locked(cache), scratch_in(cache) as scratch:
        if not root.is_dir():  # another process may have built it while this one waited for the lock
            building = scratch / "root"
            shutil.copytree(board, building, symlinks=True)
            _install_library(building / FOLDER, version, scratch / "wheel")
            build_counter(building / FOLDER / PROGRAM, ZIG_TRIPLE)
            for name, text in PROCESSOR.items():
                (building / name).parent.mkdir(parents=True, exist_ok=True)
                (building / name).write_text(text, encoding="utf-8")
            building.rename(root)
    return root


def _install_library(folder: Path, version: str, scratch: Path) -> None:
    name = f"libonnxruntime.so.{version}"
    folder.mkdir()
    unpack_libraries(download_wheel(PACKAGE, version, scratch), [f"{PACKAGE}/capi/{name}"], folder)
    (folder / name).rename(folder / LIBRARY)


def build_counter(path: Path, zig_triple: str) -> None:
    """Compile the program that counts. Raises OutputError."""
    zig_cc(zig_triple, ["-O2", f"-I{HEADERS[0].parent}", str(SOURCE), "-ldl"], path)
    path.chmod(0o755)
