import dataclasses
import json
import pickle
import re

import pytest
import tvm
from tvm.script import ir as I
from tvm.script import tirx as T

from tvmq.errors import TargetError
from tvmq.isa import Bf16, Int8Dot
from tvmq.target import Target, describe, load_target, target_names, tomllib
from tvmq.triple import Family

GOOD = """\
name = "board"
description = "A board"
triple = "aarch64-linux-gnu"
cpu = "cortex-a72"
cores = 4
l1d_kib = 32
l2_kib = 256
"""

# name: int8 dot, bf16, vector bits, registers, fma, fp16, zig triple, cores
SHIPPED = {
    "beaglebone": (Int8Dot.NEON, Bf16.NONE, 128, 16, False, False, "arm-linux-gnueabihf.2.28", 1),
    "graviton2": (Int8Dot.SDOT, Bf16.NONE, 128, 32, True, True, "aarch64-linux-gnu.2.28", 64),
    "graviton3": (Int8Dot.I8MM, Bf16.NEON, 128, 32, True, True, "aarch64-linux-gnu.2.28", 64),
    "imx8mp": (Int8Dot.NEON, Bf16.NONE, 128, 32, True, False, "aarch64-linux-gnu.2.28", 4),
    "intel-n100": (Int8Dot.AVX_VNNI, Bf16.NONE, 256, 16, True, False, "x86_64-linux-gnu.2.28", 4),
    "jetson-orin-nano": (Int8Dot.SDOT, Bf16.NONE, 128, 32, True, True, "aarch64-linux-gnu.2.28", 6),
    "raspberry-pi-2": (Int8Dot.NEON, Bf16.NONE, 128, 16, True, False, "arm-linux-gnueabihf.2.28", 4),
    "raspberry-pi-3b": (Int8Dot.NEON, Bf16.NONE, 128, 32, True, False, "aarch64-linux-gnu.2.28", 4),
    "raspberry-pi-4b": (Int8Dot.NEON, Bf16.NONE, 128, 32, True, False, "aarch64-linux-gnu.2.28", 4),
    "raspberry-pi-5": (Int8Dot.SDOT, Bf16.NONE, 128, 32, True, True, "aarch64-linux-gnu.2.28", 4),
    "raspberry-pi-zero-2w": (Int8Dot.NEON, Bf16.NONE, 128, 32, True, False, "aarch64-linux-gnu.2.28", 4),
    "rk3399": (Int8Dot.NEON, Bf16.NONE, 128, 32, True, False, "aarch64-linux-gnu.2.28", 2),
    "rk3588": (Int8Dot.SDOT, Bf16.NONE, 128, 32, True, True, "aarch64-linux-gnu.2.28", 4),
    "visionfive-2": (Int8Dot.NONE, Bf16.NONE, 32, 16, True, False, "riscv64-linux-gnu.2.31", 4),
    "x86-64-amx": (Int8Dot.AMX, Bf16.AMX, 512, 32, True, True, "x86_64-linux-gnu.2.28", 4),
    "x86-64-avx2": (Int8Dot.AVX2_PAIRS, Bf16.NONE, 256, 16, True, False, "x86_64-linux-gnu.2.28", 4),
    "x86-64-avx512-vnni": (Int8Dot.AVX512_VNNI, Bf16.NONE, 512, 32, True, False, "x86_64-linux-gnu.2.28", 4),
}


def module(lanes):
    count = 1024 // lanes

    @I.ir_module
    class Module:
        @T.prim_func(s_tir=True)
        def main(A: T.Buffer((1024,), "float32"), B: T.Buffer((1024,), "float32"), C: T.Buffer((1024,), "float32")):
            T.func_attr({"global_symbol": "main", "tirx.noalias": True})
            for i in T.serial(count):
                C[T.ramp(i * lanes, 1, lanes)] = (
                    A[T.ramp(i * lanes, 1, lanes)] * B[T.ramp(i * lanes, 1, lanes)] + C[T.ramp(i * lanes, 1, lanes)]
                )

    return Module


@I.ir_module
class Scalar:
    @T.prim_func(s_tir=True)
    def main(A: T.Buffer((1024,), "float32"), C: T.Buffer((1024,), "float32")):
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        for i in T.serial(1024):
            C[i] = A[i] * A[i] + C[i]


@I.ir_module
class CallsLibm:
    @T.prim_func(s_tir=True)
    def main(A: T.Buffer((1024,), "float32"), C: T.Buffer((1024,), "float32")):
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        for i in T.serial(1024):
            C[i] = T.erf(A[i])


def assembly(mod, target):
    return tvm.compile(mod, target=target.tvm_target()).mod.inspect_source("asm")


def write(tmp_path, text):
    path = tmp_path / "board.toml"
    path.write_text(text)
    return path


# shipped files


def test_the_shipped_targets_are_these():
    assert target_names() == sorted(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_derives(name):
    target = load_target(name)
    isa = target.isa
    derived = (isa.int8_dot, isa.bf16, isa.vector_bits, isa.vector_registers, isa.fma, isa.fp16)
    assert (*derived, target.zig_triple, target.cores) == SHIPPED[name]
    assert target.name == name
    assert isa.activation_dtype == ("uint8" if target.family is Family.X86 else "int8")
    assert target.missing_features(isa.required_features) == ()


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_states_the_source_of_each_figure(name):
    target = load_target(name)
    figures = {"cpu", "cores", "l1d_kib", "l2_kib", "l3_kib", "clock_mhz", "memory_mib", "glibc", "features"}
    stated = {key for key in figures if getattr(target, key)}
    assert stated <= set(dict(target.notes))
    if target.l2_shared_by > 1:
        assert "shared" in dict(target.notes)["l2_kib"]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_compiles_to_an_object(name, tmp_path):
    target = load_target(name)
    lib = tvm.compile(module(max(target.isa.fp32_lanes, 4)), target=target.tvm_target())
    lib.mod.write_to_file(str(tmp_path / "code.o"), "o")
    elf_machine = {Family.X86: 62, Family.AARCH64: 183, Family.ARM: 40, Family.RISCV64: 243}[target.family]
    assert int.from_bytes((tmp_path / "code.o").read_bytes()[18:20], "little") == elf_machine


@pytest.mark.parametrize("name", ["x86-64-avx512-vnni", "x86-64-amx"])
@pytest.mark.parametrize("mod", [module(16), Scalar], ids=["explicit", "left to LLVM"])
def test_avx512_targets_use_512_bits(name, mod):
    assert re.search(r"ps\s.*zmm", assembly(mod, load_target(name)))


def test_llvm_alone_would_stay_on_256_bits():
    # Why the shipped files say -prefer-256-bit; explicit vectors do not need it.
    target = dataclasses.replace(load_target("x86-64-avx512-vnni"), features=("avx512vnni",))
    assert not re.search(r"ps\s.*zmm", assembly(Scalar, target))
    assert re.search(r"ps\s.*zmm", assembly(module(16), target))


def test_32_bit_arm_passes_floats_in_float_registers():
    loop = assembly(CallsLibm, load_target("raspberry-pi-2")).split("\terff")[0]
    assert re.search(r"vldr\s+s0", loop)


def test_a_machine_without_vnni_is_told_so():
    target = load_target("x86-64-avx512-vnni")
    host = load_target("x86-64-avx2").isa.required_features
    missing = target.missing_features(host)
    assert "avx512vnni" in missing
    assert "avx2" not in missing
    assert list(missing) == sorted(missing)


def test_tvm_target_options():
    assert load_target("x86-64-amx").tvm_options() == {
        "kind": "llvm",
        "mtriple": "x86_64-linux-gnu",
        "mcpu": "x86-64-v4",
        "mattr": [
            "+avx512vnni",
            "+avx512bf16",
            "+avx512fp16",
            "+amx-tile",
            "+amx-int8",
            "+amx-bf16",
            "-prefer-256-bit",
        ],
        "num-cores": 4,
    }
    assert load_target("raspberry-pi-2").tvm_options()["mfloat-abi"] == "hard"


# round trips


@pytest.mark.parametrize("name", [*SHIPPED, "host"])
def test_to_toml_reads_back(name, tmp_path):
    target = load_target(name)
    assert load_target(write(tmp_path, target.to_toml())) == target


def test_odd_strings_read_back(tmp_path):
    target = load_target(write(tmp_path, GOOD))
    odd = dataclasses.replace(target, description='5" \\ tab\t newline\n \x7f \x01 é 板', notes=(("cores", 'a "b"'),))
    assert load_target(write(tmp_path, odd.to_toml())) == odd


def test_a_target_is_a_value():
    target = load_target("rk3588")
    assert pickle.loads(pickle.dumps(target)) == target
    assert len({target, load_target("rk3588")}) == 1
    assert load_target(target) is target
    with pytest.raises(dataclasses.FrozenInstanceError):
        target.cores = 8


@pytest.mark.parametrize("name", [*SHIPPED, "host"])
def test_describe_is_json_with_all_of_the_file(name):
    target = load_target(name)
    plain = json.loads(json.dumps(describe(target)))
    derived = plain.pop("derived")
    assert plain == tomllib.loads(target.to_toml())
    assert derived["isa"]["int8_dot"] == target.isa.int8_dot.value
    assert derived["zig_triple"] == target.zig_triple


def test_path_as_string(tmp_path):
    target = load_target(str(write(tmp_path, GOOD)))
    assert (target.l3_kib, target.clock_mhz, target.features, target.libc) == (0, None, (), "gnu")


def test_musl(tmp_path):
    target = load_target(write(tmp_path, GOOD.replace("-gnu", "-musl") + 'libc = "musl"\n'))
    assert (target.zig_triple, target.libc) == ("aarch64-linux-musl", "musl")


# errors: one line each


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("cores = 4", "core = 4", r"unknown key 'core'; did you mean 'cores'\?"),
        ("cores = 4", "cores = 4\nqqqq = 1", r"unknown key 'qqqq'; known: name, description"),
        ("cores = 4", "", "missing cores"),
        ("cores = 4", "cores = 0", "cores: expected a whole number from 1 to 1024, saw 0"),
        ("cores = 4", 'cores = "4"', "cores: expected a whole number .* saw '4'"),
        ("cores = 4", "cores = true", "cores: expected a whole number .* saw True"),
        ("cores = 4", "cores = 4.0", "cores: expected a whole number .* saw 4.0"),
        ("l1d_kib = 32", "l1d_kib = 32768", "l1d_kib: expected a whole number from 1 to 1024"),
        ("cores = 4", "cores = 4\nclock_mhz = 1500000", "clock_mhz: expected a whole number from 10 to 10000"),
        ("cores = 4", "cores = 4\nmemory_mib = 0", "memory_mib: expected"),
        ('name = "board"', "name = 3", "name: expected a string, saw 3"),
        ('name = "board"', 'name = "../x"', "name: expected lower-case letters"),
        ('"A board"', '""', "description: expected a string"),
        ("aarch64-linux-gnu", "arch64-linux-gnu", r"unknown architecture.*did you mean 'aarch64'\?"),
        ("aarch64-linux-gnu", "aarch64-linux", "not one that tvmq links for"),
        (
            "cortex-a72",
            "cortexa72",
            r"LLVM knows no cpu 'cortexa72' for aarch64-linux-gnu; did you mean 'cortex-a72'\?",
        ),
        ("cores = 4", 'cores = 4\nfeatures = ["dotprdo"]', r"no feature 'dotprdo' .*; did you mean 'dotprod'\?"),
        ("cores = 4", 'cores = 4\nfeatures = ["-aess"]', r"no feature 'aess' .*; did you mean 'aes'\?"),
        ("cores = 4", 'cores = 4\nfeatures = ["+dotprod"]', r"write it without \"\+\""),
        ("cores = 4", "cores = 4\nfeatures = [1]", "features: expected a list of strings"),
        ("cores = 4", 'cores = 4\nfeatures = "dotprod"', "features: expected a list of strings"),
        ("cores = 4", "cores = 4\nglibc = 2.28", "glibc: expected a string, saw 2.28"),
        ("cores = 4", 'cores = 4\nglibc = "latest"', "glibc: expected a version such as"),
        ("cores = 4", 'cores = 4\nlibc = "musl"', "libc: expected 'gnu', as in 'aarch64-linux-gnu', saw 'musl'"),
        ("cores = 4", "cores = 4\nnotes = 1", "notes: expected a table"),
        ("l2_kib = 256", 'l2_kib = 256\n[notes]\ncpus = "x"', r"note on unknown key 'cpus'; did you mean 'cpu'\?"),
        ("l2_kib = 256", "l2_kib = 256\n[notes]\ncpu = 1", "notes.cpu: expected a sentence"),
        ("cores = 4", "cores = = 4", "is not a TOML file"),
    ],
)
def test_unsound_files(old, new, message, tmp_path):
    assert old in GOOD
    path = write(tmp_path, GOOD.replace(old, new))
    with pytest.raises(TargetError, match=message) as caught:
        load_target(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_glibc_of_a_musl_target(tmp_path):
    path = write(tmp_path, GOOD.replace("-gnu", "-musl") + 'glibc = "2.28"\n')
    with pytest.raises(TargetError, match="glibc: expected none, as the C library is musl"):
        load_target(path)


def test_values_are_checked_without_a_file_too():
    with pytest.raises(TargetError, match="cores: expected"):
        Target("x", "x", "aarch64-linux-gnu", "cortex-a72", cores=-1, l1d_kib=32, l2_kib=256)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raspberry-pi-4", r"unknown target 'raspberry-pi-4': .*did you mean 'raspberry-pi-4b'\?"),
        ("hots", r"did you mean 'host'\?"),
        ("zzzzzz", "known: host, beaglebone"),
        ("missing.toml", "cannot read target missing.toml: saw No such file"),
    ],
)
def test_unknown_targets(name, message):
    with pytest.raises(TargetError, match=message):
        load_target(name)


def test_a_file_that_is_no_text(tmp_path):
    path = tmp_path / "x.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TargetError, match="is not a TOML file"):
        load_target(path)
