"""A folder for boards without Python: a native program that runs, measures and serves, and TVM's runtime beside it.

TVM's libraries -> program, cross-linked with ziglang -> one .tar.gz, equal for equal versions, made once
"""

from __future__ import annotations

import gzip
import importlib.metadata
import platform
import shutil
import sys
import tarfile
from pathlib import Path

from tvmq.deploy.board_root import (
    WHEEL_LIBRARIES,
    ZIG_TRIPLE,
    build_runner,
    default_cache,
    digest_of_runner,
    runtime_libraries,
)
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
    archive = board_archive("aarch64", f"cannot pack for {target.name}", cache)
    with atomic_path(path) as temporary:
        shutil.copyfile(archive, temporary)
    return path.stat().st_size


def board_archive(machine: str, what: str, cache: Path | None = None) -> Path:
    """The .tar.gz for boards of type `machine`, as `uname -m` has it, made in `cache` where it is not there yet.

    Raises DeviceError, which begins with `what`, where there is no runtime of TVM for them or it cannot be had,
    OutputError where `cache` cannot be written.
    """
    ours = platform.machine() if sys.platform == "linux" else ""
    machines = sorted({"aarch64", *({"x86_64"} & {ours})})
    if machine not in machines:
        hint = "TVM publishes its runtime for no other; where there is Python: tvmq board serve"
        raise DeviceError(what, expected=f"a board of type {' or '.join(machines)}", seen=machine, hint=hint)
    # With the glibc that the libraries were made for.
    triple = f"{machine}-linux-gnu.{ZIG_TRIPLE.partition('.')[2]}"
    folder = default_cache(machine) if cache is None else cache
    parts = [triple, *map(importlib.metadata.version, WHEEL_LIBRARIES)]
    path = folder / f"pack-{machine}-{digest_of_runner(parts)}.tar.gz"
    if not path.exists():
        with scratch_folder() as scratch:
            made = scratch / FOLDER
            _copy_libraries(machine, made, folder)
            build_runner(made, triple)
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary:
                _archive(made, temporary)
    return path


def _copy_libraries(machine: str, folder: Path, cache: Path) -> None:
    """TVM's runtime libraries: for 64-bit ARM those of the published wheels, for x86 those installed here."""
    if machine == "aarch64":
        shutil.copytree(runtime_libraries(cache), folder)
        return
    folder.mkdir()
    for package, names in WHEEL_LIBRARIES.items():
        for name in names:
            source = Path(str(importlib.metadata.distribution(package).locate_file(name)))
            shutil.copyfile(source, folder / source.name)


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
