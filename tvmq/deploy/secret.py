"""The secret that a board and its clients share: one line in a file that nobody else may read.

A client finds it in the file that the address names (`?secret=FILE`), else in $TVMQ_SECRET_FILE, else in
~/.config/tvmq/secret; `?secret=none` uses none.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from tvmq.errors import DeviceError

VARIABLE = "TVMQ_SECRET_FILE"
NONE = "none"
# Whoever listens to a handshake may try secrets at leisure: 128 random bits in hexadecimal are out of reach.
SHORTEST = 32
_HOW = "(umask 077; head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \\n' >FILE) makes one"


def read_secret(path: Path) -> bytes:
    """The secret in the file at `path`, without the space around it.

    Raises DeviceError where it cannot be read, others could read it too, or it is shorter than SHORTEST bytes.
    """
    what = f"secret {path}"
    try:
        with path.open("rb") as file:
            status, text = os.fstat(file.fileno()), file.read(4096)
    except OSError as error:
        raise DeviceError(what, seen=error.strerror or str(error), hint=_HOW) from error
    if status.st_uid not in (os.geteuid(), 0):
        raise DeviceError(what, expected="a file of this user", seen=f"one of user {status.st_uid}")
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o077:
        raise DeviceError(what, expected="mode 0600", seen=f"{mode:04o}", hint=f"chmod 600 {path}")
    secret = text.strip()
    if len(secret) < SHORTEST or len(secret.split()) != 1:
        seen = f"{len(secret)} bytes in {len(secret.split())} words"
        raise DeviceError(what, expected=f"one word of {SHORTEST} bytes or more", seen=seen, hint=_HOW)
    return secret


def find_secret(named: str | None = None) -> bytes | None:
    """A client's secret: of the file `named` (NONE: no secret), else of the usual places; None where there is none.

    Raises DeviceError for a file that cannot be used; the last place may be empty.
    """
    if named == NONE:
        return None
    if path := named or os.environ.get(VARIABLE):
        return read_secret(Path(path).expanduser())
    usual = _usual()
    return read_secret(usual) if usual is not None and usual.exists() else None


def _usual() -> Path | None:
    if base := os.environ.get("XDG_CONFIG_HOME"):
        return Path(base) / "tvmq" / "secret"
    try:
        return Path.home() / ".config" / "tvmq" / "secret"
    except RuntimeError:  # a user without a home, as in containers
        return None
