import struct

import pytest

from tvmq import cpuinfo
from tvmq.errors import TargetError
from tvmq.triple import Family

ZEN4 = """\
processor\t: 0
flags\t\t: fpu sse sse2 ht pni ssse3 fma sse4_1 sse4_2 aes avx f16c abm bmi1 avx2 avx512f avx512_vnni sha_ni rdpid

processor\t: 1
flags\t\t: fpu sse sse2 ht pni ssse3 fma sse4_1 sse4_2 aes avx f16c abm bmi1 avx2 avx512f avx512_vnni sha_ni
"""


def proc(tmp_path, text, auxv=b""):
    (tmp_path / "self").mkdir()
    (tmp_path / "cpuinfo").write_text(text)
    (tmp_path / "self" / "auxv").write_bytes(auxv)
    return tmp_path


def test_x86_flags_become_llvm_names(tmp_path):
    features = cpuinfo.host_features(proc(tmp_path, ZEN4), Family.X86)
    assert {"sse3", "sse4.2", "lzcnt", "bmi", "avx512vnni", "avx512f", "fma"} <= features
    assert not {"aes", "sha", "rdpid", "pni", "ht"} & features


def test_what_one_core_lacks_the_machine_lacks(tmp_path):
    text = "Features\t: fp asimd asimddp i8mm\n\nFeatures\t: fp asimd asimddp\n"
    assert cpuinfo.host_features(proc(tmp_path, text), Family.AARCH64) == {"fp-armv8", "neon", "dotprod"}


def test_32_bit_arm(tmp_path):
    text = "Features\t: half thumb fastmult vfp edsp neon vfpv3 tls vfpv4 idiva idivt vfpd32 lpae evtstrm\n"
    expected = {"vfp2", "vfp3", "vfp4", "fp16", "d32", "neon", "hwdiv", "hwdiv-arm"}
    assert cpuinfo.host_features(proc(tmp_path, text), Family.ARM) == expected


@pytest.mark.parametrize(
    ("isa", "expected"),
    [("rv64imafdcv_zicsr_zba", {"m", "a", "f", "d", "c", "v", "zba"}), ("rv64gc", {"m", "a", "f", "d", "c"})],
)
def test_riscv(tmp_path, isa, expected):
    assert cpuinfo.host_features(proc(tmp_path, f"isa\t\t: {isa}\n"), Family.RISCV64) == expected


def test_an_emulated_arm_reads_its_auxiliary_vector(tmp_path):
    # qemu-user shows the x86 host's cpuinfo: bits 0, 1, 20 of AT_HWCAP (16) and 13 of AT_HWCAP2 (26).
    auxv = struct.pack("<8Q", 16, 1 << 0 | 1 << 1 | 1 << 20, 26, 1 << 13, 6, 4096, 0, 0)
    features = cpuinfo.host_features(proc(tmp_path, ZEN4, auxv), Family.AARCH64)
    assert features == {"fp-armv8", "neon", "dotprod", "i8mm"}


def test_an_emulated_32_bit_arm(tmp_path):
    auxv = struct.pack("<4I", 16, 1 << 6 | 1 << 12 | 1 << 16, 0, 0)
    features = cpuinfo.host_features(proc(tmp_path, ZEN4, auxv), Family.ARM)
    assert features == {"vfp2", "neon", "vfp4", "fp16"}


@pytest.mark.parametrize("family", Family)
def test_a_machine_that_does_not_say(tmp_path, family):
    with pytest.raises(TargetError, match="cannot tell this machine's instructions"):
        cpuinfo.host_features(tmp_path, family)


def test_unknown_machine(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "vax")
    with pytest.raises(TargetError, match="saw vax"):
        cpuinfo.machine_family()


def test_a_32_bit_process_on_a_64_bit_kernel_is_arm(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    monkeypatch.setattr("struct.calcsize", lambda code: 4)
    assert cpuinfo.machine_family() is Family.ARM


def test_this_machine_has_no_tuning_flags():
    features = cpuinfo.host_features()
    assert features <= cpuinfo.detectable(cpuinfo.machine_family())
    assert not [name for name in features if name.startswith(("fast-", "slow-", "prefer-", "tune"))]
