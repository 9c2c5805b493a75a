"""Objects are linked for this machine and for others, whole or not at all."""

from __future__ import annotations

import importlib.util
import platform
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm import te

from tvmq.deploy import crosslink
from tvmq.deploy.crosslink import link_shared, linker, llvm_triple, zig_cache
from tvmq.errors import OutputError

HOST = f"{platform.machine()}-linux-gnu.2.28"
# Of the ELF header: class at byte 4 (1: 32 bits, 2: 64 bits), machine at byte 18.
ELF = {
    "x86_64-linux-gnu.2.28": (2, 62),
    "aarch64-linux-gnu.2.28": (2, 183),
    "arm-linux-gnueabihf.2.28": (1, 40),
    "riscv64-linux-gnu.2.31": (2, 243),
}
LLVM_TARGETS = {
    "x86_64-linux-gnu.2.28": {"kind": "llvm", "mtriple": "x86_64-linux-gnu"},
    "aarch64-linux-gnu.2.28": {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a72"},
    "arm-linux-gnueabihf.2.28": {
        "kind": "llvm",
        "mtriple": "armv7l-linux-gnueabihf",
        "mattr": ["+neon"],
        "mfloat-abi": "hard",
    },
    "riscv64-linux-gnu.2.31": {"kind": "llvm", "mtriple": "riscv64-linux-gnu", "mcpu": "sifive-u74"},
}


def exp_module(target: dict[str, object]) -> tvm.runtime.Executable:
    x = te.placeholder((7,), "float32", name="x")
    y = te.compute((7,), lambda i: te.exp(x[i]), name="y")
    function = te.create_prim_func([x, y]).with_attr("global_symbol", "exp")
    return tvm.compile(tvm.IRModule({"exp": function}), target=tvm.target.Target(target))


def elf_header(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:20]
    assert head[:4] == b"\x7fELF"
    return head[4], struct.unpack_from("<H", head, 18)[0]


def test_the_host_runs_what_was_linked(tmp_path: Path) -> None:
    library = tmp_path / "exp.so"
    exp_module({"kind": "llvm"}).export_library(str(library), fcompile=linker(HOST))
    x = np.linspace(-2, 2, 7, dtype="float32")
    y = tvm.runtime.empty((7,), "float32")
    tvm.runtime.load_module(str(library))["exp"](tvm.runtime.tensor(x), y)
    np.testing.assert_allclose(y.numpy(), np.exp(x), rtol=1e-6)


@pytest.mark.parametrize("triple", list(ELF))
def test_the_header_names_the_machine_of_the_triple(triple: str, tmp_path: Path) -> None:
    library = tmp_path / "exp.so"
    exp_module(LLVM_TARGETS[triple]).export_library(str(library), fcompile=linker(triple))
    assert elf_header(library) == ELF[triple]
    assert library.stat().st_size < 20_000, "debug sections or unused runtime were kept"
    assert b".debug" not in library.read_bytes()


def test_equal_objects_give_an_equal_library(tmp_path: Path) -> None:
    # TVM names its objects in a fresh temporary folder each time: neither that name nor the output's may be inside.
    for name in ("a.so", "b.so"):
        exp_module(LLVM_TARGETS["aarch64-linux-gnu.2.28"]).export_library(
            str(tmp_path / name), fcompile=linker("aarch64-linux-gnu.2.28")
        )
    assert (tmp_path / "a.so").read_bytes() == (tmp_path / "b.so").read_bytes()


def test_a_failed_link_is_one_line_and_leaves_the_old_output(tmp_path: Path) -> None:
    (tmp_path / "broken.o").write_bytes(b"no object")
    library = tmp_path / "m.so"
    library.write_bytes(b"old")
    with pytest.raises(OutputError, match=r"cannot link .*m\.so for aarch64-linux-gnu.2.28: saw .*error") as caught:
        link_shared([tmp_path / "broken.o"], library, "aarch64-linux-gnu.2.28")
    assert "\n" not in str(caught.value)
    assert library.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken.o", "m.so"]


def test_an_unknown_triple_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"unknown .*'abacus"):
        link_shared([], tmp_path / "m.so", "abacus-linux-gnu")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no folder"):
        link_shared([], tmp_path / "nowhere" / "m.so", "aarch64-linux-gnu.2.28")


def test_without_ziglang_the_error_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OutputError, match="no module ziglang; install it: pip install ziglang"):
        link_shared([], tmp_path / "m.so", "aarch64-linux-gnu.2.28")


def test_a_hanging_zig_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(command: list[str], **options: object) -> None:
        raise subprocess.TimeoutExpired(command, 1)

    monkeypatch.setattr(crosslink.subprocess, "run", hang)
    with pytest.raises(OutputError, match="no answer of zig"):
        link_shared([], tmp_path / "m.so", "aarch64-linux-gnu.2.28")
    assert list(tmp_path.iterdir()) == []


def test_the_cache_is_the_users_where_it_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ZIG_GLOBAL_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert zig_cache() == tmp_path / ".cache" / "zig"


def test_the_cache_is_temporary_where_home_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A file as home: no folder can be made below it, not by root either.
    (tmp_path / "home").write_text("")
    monkeypatch.delenv("ZIG_GLOBAL_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(crosslink.tempfile, "gettempdir", lambda: str(tmp_path))
    assert zig_cache().parent == tmp_path
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(crosslink.tempfile, "gettempdir", lambda: str(tmp_path / "file"))
    with pytest.raises(OutputError, match="expected a writable cache folder"):
        zig_cache()


def test_the_fcompile_has_what_tvm_reads() -> None:
    fcompile = linker("aarch64-linux-gnu.2.28")
    assert fcompile.output_format == "so"  # type: ignore[attr-defined]
    assert fcompile.get_target_triple() == "aarch64-linux-gnu"  # type: ignore[attr-defined]
    assert llvm_triple("x86_64-linux-musl") == "x86_64-linux-musl"


def test_objects_are_kept_where_they_are_wanted(tmp_path: Path) -> None:
    """What they are linked into by somebody else runs as what was linked here."""
    folder, again = tmp_path / "new" / "objects", tmp_path / "again.so"
    exp_module({"kind": "llvm"}).export_library(str(tmp_path / "exp.so"), fcompile=linker(HOST, folder))
    link_shared(sorted(folder.glob("*.o")), again, HOST)
    y = tvm.runtime.empty((7,), "float32")
    tvm.runtime.load_module(str(again))["exp"](tvm.runtime.tensor(np.zeros(7, "float32")), y)
    assert y.numpy().tolist() == [1.0] * 7


def test_objects_that_cannot_be_kept_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write .*/file/objects"):
        exp_module({"kind": "llvm"}).export_library(
            str(tmp_path / "exp.so"), fcompile=linker(HOST, tmp_path / "file" / "objects")
        )
