"""A folder for boards without Python: a native program that runs, measures and serves, and TVM's runtime beside it.

TVM's aarch64 libraries -> program, cross-linked with ziglang -> one .tar.gz, equal for equal versions
"""

from __future__ import annotations

import gzip
import shutil
import tarfile
from pathlib import Path

from tvmq.deploy.board_root import ZIG_TRIPLE, build_runner, runtime_libraries
from tvmq.errors import DeviceError
from tvmq.files import atomic_path, require_folder, scratch_folder
from tvmq.target import Target

FOLDER = "tvmq-board"
# The only 64-bit ARM runtime of TVM that is published is for this one.
_TRIPLE = "aarch64-linux-gnu"


def pack(target: Target, out: str | Path, cache: Path | None = None) -> int:
    """Write the pack for boards like `target` to the .tar.gz `out`, whole or not at all; returns its bytes.

    cache: where TVM's libraries are kept, None for the user's. Raises DeviceError where TVM has no runtime for the
    target or it cannot be had, OutputError where `out` cannot be written.
    """
    oldest = ZIG_TRIPLE.partition(".")[2]
    if target.triple != _TRIPLE or _version(target.glibc or oldest) < _version(oldest):
        raise DeviceError(
            f"cannot pack for {target.name}",
            expected=f"a target of type {_TRIPLE} with glibc {oldest} or newer",
            seen=f"{target.triple} with {target.libc} {target.glibc}",
            hint="TVM publishes its runtime for no other board; where there is Python: tvmq board serve",
        )
    path = require_folder(out)
    with scratch_folder() as scratch:
        folder = scratch / FOLDER
        shutil.copytree(runtime_libraries(cache), folder)
        build_runner(folder)
        with atomic_path(path) as temporary:
            _archive(folder, temporary)
    return path.stat().st_size


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def _archive(folder: Path, out: Path) -> None:
    """The files of `folder` in a .tar.gz that does not tell when and by whom it was made."""
    with (
        out.open("wb") as file,
        gzip.GzipFile(fileobj=file, mode="wb", filename="", mtime=0) as stream,
        tarfile.open(fileobj=stream, mode="w") as archive,
    ):
        for path in sorted(folder.iterdir()):
            entry = tarfile.TarInfo(f"{folder.name}/{path.name}")
            entry.size, entry.mode = path.stat().st_size, 0o755
            with path.open("rb") as content:
                archive.addfile(entry, content)
