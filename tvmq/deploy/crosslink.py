"""Link compiled objects into a shared library for any machine, with ziglang as the only toolchain.

    objects (.o) --zig cc -target TRIPLE -shared--> library (.so)

Triples are zig's, with the oldest glibc that the library must run on: "aarch64-linux-gnu.2.28",
"arm-linux-gnueabihf.2.28", "x86_64-linux-gnu.2.28". The first link for a triple builds zig's start files (7 s measured
on two cores), each later one takes 0.05 s. Equal objects give an equal library, byte for byte.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from tvmq.errors import OutputError
from tvmq.files import atomic_path

# Building the start files of a triple took 8 s on two cores; a slow single-core machine is given 40 times that.
LINK_TIMEOUT_S = 320.0

# -s drops symbol tables and debug sections. Without --gc-sections a 32-bit ARM library has 250 kB of unused runtime.
SHARED_FLAGS = ("-shared", "-s", "-Wl,--gc-sections")
# What is linked besides, by the first part of the triple.
HELPERS = {"arm": ("-O2", str(Path(__file__).with_name("arm_division.c")))}


def link_shared(objects: Sequence[str | Path], output: str | Path, zig_triple: str) -> None:
    """Link `objects` into the shared library `output`, written whole or not at all.

    TVM's runtime symbols stay undefined: the process that loads the library has them. Raises OutputError.
    """
    zig_cc(zig_triple, [*SHARED_FLAGS, *map(str, objects), "-lm"], output)


def linker(zig_triple: str, keep: Path | None = None) -> Callable[..., None]:
    """An `fcompile` for TVM: `module.export_library(path, fcompile=linker("aarch64-linux-gnu.2.28"))`.

    keep: a folder that receives the object files.
    """

    def fcompile(output: str, objects: Sequence[str], options: Sequence[str] = ()) -> None:
        # TVM passes include paths in `options` where a module has C source; zig compiles that too.
        link_shared([*options, *objects], output, zig_triple)
        if keep is not None:
            _keep([Path(path) for path in objects if path.endswith(".o")], keep)

    # TVM reads these: the library's file name ending, and the triple of packed constants where no module names one.
    fcompile.output_format = "so"  # type: ignore[attr-defined]
    fcompile.get_target_triple = lambda: llvm_triple(zig_triple)  # type: ignore[attr-defined]
    return fcompile


def _keep(objects: Sequence[Path], folder: Path) -> None:
    """Copy files into a folder, which is made where it is missing. Raises OutputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {folder}", seen=error.strerror or str(error)) from error
    for path in objects:
        with atomic_path(folder / path.name) as temporary:
            shutil.copyfile(path, temporary)


def llvm_triple(zig_triple: str) -> str:
    """The triple without zig's glibc version: "aarch64-linux-gnu.2.28" -> "aarch64-linux-gnu"."""
    return zig_triple.partition(".")[0]


def zig_cc(zig_triple: str, arguments: Sequence[str], output: str | Path) -> None:
    """Run zig's C compiler for `zig_triple`; `output` is written whole or not at all.

    Raises OutputError where ziglang is missing, fails, or takes longer than LINK_TIMEOUT_S.
    """
    final = Path(output)
    if importlib.util.find_spec("ziglang") is None:
        raise OutputError(f"cannot link {final}", seen="no module ziglang", hint="install it: pip install ziglang")
    with atomic_path(final) as temporary:
        helpers = HELPERS.get(zig_triple.partition("-")[0], ())
        command = [sys.executable, "-m", "ziglang", "cc", "-target", zig_triple, "-o", str(temporary)]
        command += [*arguments, *helpers]
        _run(command, final, zig_triple)


def _run(command: list[str], output: Path, zig_triple: str) -> None:
    # Given a cache folder that it cannot write, zig 0.17 spins for ever: name one that was tried.
    cache = zig_cache()
    environment = os.environ | {"ZIG_GLOBAL_CACHE_DIR": str(cache)}
    what = f"cannot link {output} for {zig_triple}"
    try:
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=LINK_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        hint = f"is the disk of {cache} full?"
        raise OutputError(what, seen=f"no answer of zig in {LINK_TIMEOUT_S:.0f} s", hint=hint) from error
    if done.returncode != 0:
        raise OutputError(
            what, seen=_first_error(done.stderr), hint="check that the objects were compiled for that triple"
        )


def _first_error(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[-1] if lines else "a failure without a message")


def zig_cache() -> Path:
    """The folder of zig's cache: its own default where that is writable, else a private one among the temporary files.

    Raises OutputError where neither can be written.
    """
    usual = _usual_zig_cache()
    if usual is not None and _is_writable(usual):
        return usual
    fallback = Path(tempfile.gettempdir()) / f"tvmq-zig-{os.getuid()}"
    # Everybody may make folders in /tmp: one of another user is not trusted with what goes into a library.
    if _is_writable(fallback) and fallback.stat().st_uid == os.getuid():
        return fallback
    raise OutputError(
        "cannot link",
        expected="a writable cache folder",
        seen=f"neither {usual} nor {fallback} is",
        hint="set HOME or TMPDIR",
    )


def _usual_zig_cache() -> Path | None:
    if named := os.environ.get("ZIG_GLOBAL_CACHE_DIR"):
        return Path(named)
    base = user_cache()
    return base / "zig" if base is not None else None


def user_cache() -> Path | None:
    """The folder of this user's caches, or None for a user without a home."""
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base)
    try:
        return Path.home() / ".cache"
    except RuntimeError:  # a user without a home, as in containers
        return None


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # A real file: os.access says yes to root on a read-only mount.
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
