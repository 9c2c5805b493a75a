"""The plugin with which qemu-user counts instructions, built once for the qemu that is here."""

from __future__ import annotations

import hashlib
import re
import subprocess
from pathlib import Path

from tvmq.deploy.board_root import default_cache
from tvmq.deploy.crosslink import zig_cc
from tvmq.errors import DeviceError

SOURCE = Path(__file__).with_name("count_plugin.c")
# qemu 9 takes plugins from version 2 of its interface on, earlier ones know version 1 only; what is used is in both.
_VERSIONS = {False: 1, True: 2}
_NEW = 9


def plugin(qemu: str, cache: Path | None = None) -> Path:
    """The plugin for the command `qemu`, in `cache` (None: default_cache()). Raises DeviceError, OutputError."""
    version = _interface(qemu)
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]
    path = (default_cache() if cache is None else cache) / f"count-{version}-{digest}.so"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        # What qemu itself has stays undefined. Native: it is a part of qemu, not of the board.
        options = ["-shared", "-fPIC", "-O2", f"-DPLUGIN_VERSION={version}", "-Wl,--allow-shlib-undefined"]
        zig_cc("native", [*options, str(SOURCE)], path)
    return path


def _interface(qemu: str) -> int:
    """The version of the plugin interface that `qemu` takes."""
    if qemu.endswith("-static"):
        hint = "on Debian: apt-get install qemu-user"
        raise DeviceError("cannot count instructions", expected="qemu-aarch64 with plugins", seen=qemu, hint=hint)
    said = subprocess.run([qemu, "--version"], capture_output=True, text=True, check=False).stdout
    major = re.search(r"version (\d+)", said)
    if major is None:
        raise DeviceError("cannot count instructions", expected="a version of qemu", seen=said[:80] or "nothing")
    return _VERSIONS[int(major[1]) >= _NEW]
