"""Files that outlive the process: written whole or not at all, and found beside or inside the package."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tvmq.errors import OutputError


def require_folder(path: str | Path) -> Path:
    """`path`, to be written to later. Raises OutputError where its folder is missing: before the work, not after it."""
    final = Path(path)
    if not final.parent.is_dir():
        raise OutputError(f"cannot write {final}", expected="an existing folder", seen=f"no folder {final.parent}")
    return final


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for files that nobody keeps. Raises OutputError where the disk is full or not writable."""
    try:
        with tempfile.TemporaryDirectory(prefix="tvmq-") as folder:
            yield Path(folder)
    except OSError as error:
        hint = "set TMPDIR to a folder with space"
        raise OutputError("cannot write temporary files", seen=error.strerror or str(error), hint=hint) from error


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it is renamed to `path` when the block ends, and removed when it fails.

    Raises OutputError where the folder is missing, or the disk is full or not writable.
    """
    final = require_folder(path)
    temporary: Path | None = None
    try:
        handle, name = tempfile.mkstemp(prefix=f".{final.name}.", suffix=".part", dir=final.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        # mkstemp makes private files; a result is as readable as any file the user makes.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(final)
        temporary = None
    except OSError as error:
        raise OutputError(f"cannot write {final}", seen=error.strerror or str(error)) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all. Raises OutputError."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def data_folder(name: str) -> Path:
    """The folder of shipped data `name` ("targets", "tuning_logs"): inside an installed package, else beside it."""
    here = Path(__file__).resolve().parent
    inside = here / "_data" / name
    return inside if inside.is_dir() else here.parent / name
