"""Build, once, the root folder of an emulated aarch64 board: a C library, TVM's runtime, and our runner.

    check tools -> Debian packages -> TVM's runtime libraries -> runner -> rename into the cache

`opt/tvmq` in it is all that a real board needs besides its own C and C++ libraries. The folder's name carries what it
was built from, so a new TVM or a changed runner is built anew and never mixed with an old root.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tvmq.deploy.crosslink import user_cache, zig_cc
from tvmq.errors import DeviceError, OutputError

# What libtvm_runtime.so names as NEEDED, as Debian packages.
DEBIAN_ARCHITECTURE = "arm64"
DEBIAN_PACKAGES = ("libc6", "libstdc++6", "libgcc-s1")
# Manuals, and converters between character sets: two thirds of libc6, which no inference asks for.
UNUSED_FOLDERS = ("usr/share", "usr/lib/aarch64-linux-gnu/gconv")

# The oldest C library that TVM's aarch64 wheels run on (manylinux_2_28), in the words of pip and of zig.
WHEEL_PLATFORM = "manylinux_2_28_aarch64"
ZIG_TRIPLE = "aarch64-linux-gnu.2.28"
# No wheel's Python part is used; a version for which both wheels exist.
WHEEL_PYTHON = "3.11"
WHEEL_LIBRARIES = {
    "apache-tvm": ("tvm/lib/libtvm_runtime.so", "tvm/lib/libtvm_runtime_extra.so"),
    "apache-tvm-ffi": ("tvm_ffi/lib/libtvm_ffi.so",),
}

TVMQ_FOLDER = "opt/tvmq"
RUNNER = "tvmq-runner"
# The C program of boards without Python, and the headers that it includes.
SOURCE = Path(__file__).with_name("board_runner.c")
HEADERS = tuple(sorted(SOURCE.parent.glob("board_*.h")))

# Command: the Debian package that has it.
PREPARE_TOOLS = {"apt-get": "apt", "apt-config": "apt", "dpkg-deb": "dpkg"}
# The wheel of TVM is 95 MB: 15 minutes is a line of 1 Mbit/s.
DOWNLOAD_TIMEOUT_S = 900.0


def default_cache(machine: str = "aarch64") -> Path:
    """`~/.cache/tvmq/MACHINE`, or below XDG_CACHE_HOME where that is set. Raises OutputError where there is no home."""
    base = user_cache()
    if base is None:
        raise OutputError(
            "there is no folder to keep a board's files in", seen="a user without a home", hint="set HOME"
        )
    return base / "tvmq" / machine


def prepare(cache: Path | None = None) -> Path:
    """The root of an emulated aarch64 board in `cache` (None: default_cache()), built where it is not there yet.

    Downloads 110 MB and keeps 12 MB. Interrupted, it leaves nothing that a later call would use. Raises DeviceError
    where a tool is missing or a download fails, OutputError where `cache` cannot be written.
    """
    cache = default_cache() if cache is None else cache
    root = cache / root_name()
    if root.is_dir():
        return root
    require_tools(PREPARE_TOOLS)
    require_pip()
    with locked(cache), scratch_in(cache) as scratch:
        if not root.is_dir():  # another process may have built it while this one waited for the lock
            building = scratch / "root"
            install_debian_packages(building, scratch / "apt")
            install_tvm_runtime(building, _libraries(cache, scratch / "wheels"))
            build_runner(building / TVMQ_FOLDER)
            building.rename(root)
    return root


def root_name() -> str:
    """A folder name that differs where anything differs that a root is built from."""
    versions = [f"{package}=={importlib.metadata.version(package)}" for package in WHEEL_LIBRARIES]
    parts = [*versions, *DEBIAN_PACKAGES, *UNUSED_FOLDERS, ZIG_TRIPLE]
    return f"root-{importlib.metadata.version('apache-tvm')}-{digest_of_runner(parts)}"


def digest_of_runner(parts: Sequence[str]) -> str:
    """Twelve characters that differ where `parts` or the runner's source do."""
    texts = [*parts, *(path.read_text(encoding="utf-8") for path in (SOURCE, *HEADERS))]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]


def require_tools(tools: Mapping[str, str]) -> None:
    """Raise DeviceError where one of `tools` (command: Debian package) is not on the PATH."""
    missing = {command: package for command, package in tools.items() if shutil.which(command) is None}
    if missing:
        hint = f"on Debian: apt-get install {' '.join(dict.fromkeys(missing.values()))}"
        raise DeviceError("cannot emulate a board", seen=f"no {' and no '.join(missing)} on the PATH", hint=hint)


def require_pip() -> None:
    """Raise DeviceError where this Python has no pip."""
    if importlib.util.find_spec("pip") is None:
        hint = f"get it: {sys.executable} -m ensurepip"
        raise DeviceError("cannot emulate a board", seen=f"no pip in {sys.executable}", hint=hint)


# ---- Debian packages ----


def install_debian_packages(root: Path, scratch: Path) -> None:
    """Unpack the board's C and C++ libraries into `root`, from the package index that this machine uses."""
    configuration = apt_configuration(scratch)
    packages = scratch / "packages"
    packages.mkdir()
    environment = os.environ | {"APT_CONFIG": str(configuration)}
    run_tool(["apt-get", "-qq", "update"], f"cannot read the {DEBIAN_ARCHITECTURE} package index", environment)
    run_tool(["apt-get", "-qq", "download", *DEBIAN_PACKAGES], "cannot download Debian packages", environment, packages)
    for package in sorted(packages.glob("*.deb")):
        run_tool(["dpkg-deb", "-x", str(package), str(root)], f"cannot unpack {package.name}")
    # Newer Debian packages have their files below usr/ and leave this link to the installer.
    if not (root / "lib").exists():
        (root / "lib").symlink_to("usr/lib")
    for unused in UNUSED_FOLDERS:
        shutil.rmtree(root / unused, ignore_errors=True)


def apt_configuration(folder: Path) -> Path:
    """Write into `folder` an apt configuration for the board's architecture that keeps its state there.

    Sources, keys, proxies and certificates are this machine's.
    """
    dump = run_tool(["apt-config", "dump"], "cannot read apt's configuration")
    # Hooks are commands for this machine: the one in Docker's images empties the system's cache.
    kept = [line for line in dump.splitlines() if "-Invoke" not in line and not line.startswith("APT::Architecture")]
    ours = [
        f'APT::Architecture "{DEBIAN_ARCHITECTURE}";',
        f'APT::Architectures {{ "{DEBIAN_ARCHITECTURE}"; }};',
        # apt as root downloads as the user _apt, who cannot write a private folder.
        'APT::Sandbox::User "root";',
        f'Dir::State "{folder / "state"}";',
        f'Dir::State::status "{folder / "status"}";',
        f'Dir::Cache "{folder / "cache"}";',
        # Already in the dump; read again they would bring the hooks back.
        'Dir::Etc::main "/dev/null";',
        'Dir::Etc::parts "/dev/null";',
    ]
    (folder / "state/lists/partial").mkdir(parents=True)
    (folder / "cache/archives/partial").mkdir(parents=True)
    (folder / "status").touch()
    path = folder / "apt.conf"
    path.write_text("\n".join([*kept, *ours, ""]), encoding="utf-8")
    return path


# ---- TVM ----


def install_tvm_runtime(root: Path, libraries: Path) -> None:
    """Put TVM's aarch64 runtime libraries, which are in the folder `libraries`, into `root`."""
    shutil.copytree(libraries, root / TVMQ_FOLDER)


def runtime_libraries(cache: Path | None = None) -> Path:
    """A folder in `cache` (None: default_cache()) with TVM's aarch64 runtime libraries, of the versions installed here.

    Downloads 97 MB where they are not there yet. Raises DeviceError where pip is missing or a download fails,
    OutputError where `cache` cannot be written.
    """
    cache = default_cache() if cache is None else cache
    require_pip()
    with locked(cache), scratch_in(cache) as scratch:
        return _libraries(cache, scratch / "wheels")


def _libraries(cache: Path, scratch: Path) -> Path:
    """As `runtime_libraries`, for who has the lock."""
    versions = {package: importlib.metadata.version(package) for package in WHEEL_LIBRARIES}
    folder = cache / "-".join(["libraries", *versions.values()])
    if not folder.is_dir():
        building = scratch / "libraries"
        building.mkdir(parents=True)
        for package, libraries in WHEEL_LIBRARIES.items():
            unpack_libraries(download_wheel(package, versions[package], scratch / package), libraries, building)
        building.rename(folder)
    return folder


def download_wheel(package: str, version: str, folder: Path) -> Path:
    """Download the aarch64 wheel of `package` into `folder`, from the index that pip uses here."""
    wanted = ["--platform", WHEEL_PLATFORM, "--python-version", WHEEL_PYTHON, "--only-binary=:all:", "--no-deps"]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--dest",
        str(folder),
        *wanted,
        f"{package}=={version}",
    ]
    run_tool(command, f"cannot download the {WHEEL_PLATFORM} wheel of {package} {version}")
    return next(folder.glob("*.whl"))


def unpack_libraries(wheel: Path, libraries: Sequence[str], folder: Path) -> None:
    """Write the files `libraries` of `wheel` into `folder`, without their folders."""
    with zipfile.ZipFile(wheel) as archive:
        missing = sorted(set(libraries) - set(archive.namelist()))
        if missing:
            raise DeviceError(f"cannot use {wheel.name}", expected=" and ".join(libraries), seen=f"no {missing[0]}")
        for library in libraries:
            (folder / Path(library).name).write_bytes(archive.read(library))


def build_runner(folder: Path, zig_triple: str = ZIG_TRIPLE) -> None:
    """Compile the native runner into `folder`, beside TVM's runtime libraries, which it loads. Raises OutputError."""
    import tvm_ffi.libinfo

    includes = {tvm_ffi.libinfo.find_include_path(), tvm_ffi.libinfo.find_dlpack_include_path()}
    # The runner calls libtvm_ffi only; the others are linked for the functions they register when they are loaded.
    libraries = ["-Wl,--no-as-needed", "-ltvm_ffi", "-ltvm_runtime", "-ltvm_runtime_extra", f"-L{folder}"]
    # libstdc++ is found on the board, not here; $ORIGIN: the libraries are where the program is.
    link = ["-Wl,--allow-shlib-undefined", "-Wl,-rpath,$ORIGIN", "-s"]
    headers = [f"-I{include}" for include in sorted(includes)]
    zig_cc(zig_triple, ["-O2", *headers, str(SOURCE), *libraries, *link], folder / RUNNER)
    (folder / RUNNER).chmod(0o755)


# ---- Shared steps ----


@contextlib.contextmanager
def locked(cache: Path) -> Iterator[None]:
    """Let one process at a time build in `cache`."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = (cache / ".lock").open("w")
    except OSError as error:
        raise OutputError(f"cannot write {cache}", seen=error.strerror or str(error)) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def scratch_in(cache: Path) -> Iterator[Path]:
    """A folder in `cache` that is gone afterwards.

    The caller has the lock: what a killed process left behind is ours to remove.
    """
    for stale in cache.glob(".part-*"):
        shutil.rmtree(stale, ignore_errors=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".part-", dir=cache) as folder:
            yield Path(folder)
    except OSError as error:
        raise OutputError(f"cannot write {cache}", seen=error.strerror or str(error)) from error


def run_tool(
    command: Sequence[str],
    what: str,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    timeout_s: float | None = None,
) -> str:
    """The stdout of `command`. timeout_s: None means DOWNLOAD_TIMEOUT_S.

    Raises DeviceError(what) with the last line it said where it fails.
    """
    limit_s = DOWNLOAD_TIMEOUT_S if timeout_s is None else timeout_s
    try:
        done = subprocess.run(
            command,
            env=environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise DeviceError(what, seen=f"no answer of {command[0]} in {limit_s:.0f} s") from error
    if done.returncode != 0:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise DeviceError(what, seen=said[-1] if said else f"exit code {done.returncode} of {command[0]}")
    return done.stdout
