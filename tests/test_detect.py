"""Machines as /proc and /sys show them, written by hand in that form and shortened to what is read."""

import dataclasses

import pytest

from tvmq import detect as detect_module
from tvmq.cpuinfo import host_features
from tvmq.detect import detect, detect_host
from tvmq.errors import TargetError
from tvmq.isa import Bf16, Int8Dot
from tvmq.target import load_target

AVX2 = """fpu tsc msr cx8 cmov mmx fxsr sse sse2 ht syscall nx lm constant_tsc nopl pni pclmulqdq ssse3 fma cx16 sse4_1
sse4_2 movbe popcnt aes xsave avx f16c rdrand lahf_lm abm 3dnowprefetch fsgsbase bmi1 avx2 bmi2 erms""".replace(
    "\n", " "
)
AVX512 = f"{AVX2} avx512f avx512dq rdseed adx avx512ifma clflushopt clwb avx512cd sha_ni avx512bw avx512vl avx512vbmi"
SERVER = f"{AVX512} avx512_bf16 umip avx512_vbmi2 gfni vaes vpclmulqdq avx512_vnni avx512_bitalg avx512_vpopcntdq"
SPR = f"{SERVER} avx_vnni avx512_fp16 amx_tile amx_int8 amx_bf16 serialize"
ZEN4 = f"{SERVER} sse4a misalignsse topoext clzero xsaveerptr"
PI4 = "fp asimd evtstrm crc32 cpuid"
RK3588 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"


class Machine:
    """A /proc and a /sys to be filled."""

    def __init__(self, root):
        self.proc, self.sys = root / "proc", root / "sys"
        self.file("proc/meminfo", "MemTotal:       16384000 kB\nMemFree: 1 kB\n")

    def file(self, path, text):
        full = self.proc.parent / path
        full.parent.mkdir(parents=True, exist_ok=True)
        full.write_text(text + "\n")

    def cpuinfo(self, *lines, count=1):
        self.file("proc/cpuinfo", "\n".join("\n".join((f"processor\t: {n}", *lines, "")) for n in range(count)))

    def cpu(self, number, siblings, caches, capacity=None, max_khz=None, siblings_file="core_cpus_list"):
        folder = f"sys/devices/system/cpu/cpu{number}"
        self.file(f"{folder}/topology/{siblings_file}", siblings)
        for index, (level, kind, size, shared) in enumerate(caches):
            for key, value in (("level", level), ("type", kind), ("size", size), ("shared_cpu_list", shared)):
                self.file(f"{folder}/cache/index{index}/{key}", str(value))
        if capacity:
            self.file(f"{folder}/cpu_capacity", str(capacity))
        if max_khz:
            self.file(f"{folder}/cpufreq/cpuinfo_max_freq", str(max_khz))

    def detect(self, triple, cpu, allowed, glibc="2.36"):
        return detect(self.proc, self.sys, triple=triple, cpu=cpu, allowed=allowed, glibc=glibc)


def spr(root, count=8):
    """Sapphire Rapids: hyper-threads n and n + count/2."""
    machine = Machine(root)
    flags = f"flags\t\t: {SPR}"
    machine.cpuinfo("model name\t: Intel(R) Xeon(R) Platinum 8488C", "cpu MHz\t\t: 2400.000", flags, count=count)
    half = count // 2
    for number in range(count):
        pair = f"{number % half},{number % half + half}"
        caches = [(1, "Data", "48K", pair), (1, "Instruction", "32K", pair), (2, "Unified", "2048K", pair)]
        machine.cpu(number, pair, [*caches, (3, "Unified", "107520K", f"0-{count - 1}")])
    return machine


def zen4(root, flags=ZEN4):
    machine = Machine(root)
    machine.cpuinfo("model name\t: AMD EPYC", "cpu MHz\t\t: 2596.130", f"flags\t\t: {flags}", count=2)
    for number in range(2):
        own = str(number)
        machine.cpu(
            number, own, [(1, "Data", "32K", own), (2, "Unified", "1M", own), (3, "Unified", "32M", "0-1")], 1024
        )
    return machine


def pi4(root, sizes=True):
    machine = Machine(root)
    machine.cpuinfo("BogoMIPS\t: 108.00", f"Features\t: {PI4}", "CPU implementer\t: 0x41", "CPU part\t: 0xd08", count=4)
    machine.file("sys/firmware/devicetree/base/model", "Raspberry Pi 4 Model B Rev 1.4\0")
    for number in range(4):
        caches = [(1, "Data", "32K", number), (1, "Instruction", "48K", number), (2, "Unified", "1024K", "0-3")]
        machine.cpu(number, str(number), caches if sizes else [], max_khz=1800000)
    return machine


def rk3588(root):
    """Little cores 0-3, big ones 4-5 and 6-7 in two clusters."""
    machine = Machine(root)
    machine.cpuinfo(f"Features\t: {RK3588}", count=8)
    for number in range(8):
        big = number >= 4
        l1, l2, own = ("64K", "512K", str(number)) if big else ("32K", "128K", str(number))
        caches = [(1, "Data", l1, own), (2, "Unified", l2, own), (3, "Unified", "3072K", "0-7")]
        machine.cpu(number, own, caches, 1024 if number >= 6 else 1000 if big else 530, 2256000 if big else 1800000)
    return machine


def test_sapphire_rapids(tmp_path):
    target = spr(tmp_path).detect("x86_64-linux-gnu", "sapphirerapids", range(8))
    assert (target.cores, target.l1d_kib, target.l2_kib, target.l2_shared_by) == (4, 48, 2048, 1)
    assert (target.l3_kib, target.clock_mhz, target.memory_mib) == (107520, 2400, 16000)
    assert target.description == "Intel(R) Xeon(R) Platinum 8488C"
    assert (target.isa.int8_dot, target.isa.bf16, target.isa.fp16) == (Int8Dot.AMX, Bf16.AMX, True)
    assert target.features == ("-prefer-256-bit",)
    assert not load_target("x86-64-amx").missing_features(target.isa.required_features)


def test_a_hypervisor_that_masks_amx(tmp_path):
    machine = spr(tmp_path)
    flags = SPR.replace("amx_tile amx_int8 amx_bf16 ", "")
    machine.cpuinfo("model name\t: Intel Xeon", f"flags\t\t: {flags}", count=8)
    target = machine.detect("x86_64-linux-gnu", "sapphirerapids", range(8))
    assert {"-amx-tile", "-amx-int8", "-amx-bf16"} <= set(target.features)
    assert (target.isa.int8_dot, target.isa.bf16) == (Int8Dot.AVX512_VNNI, Bf16.AVX512)


def test_zen4(tmp_path):
    machine = zen4(tmp_path)
    target = machine.detect("x86_64-linux-gnu", "znver4", range(2))
    assert (target.cores, target.l1d_kib, target.l2_kib, target.l3_kib) == (2, 32, 1024, 32768)
    assert (target.isa.int8_dot, target.isa.bf16) == (Int8Dot.AVX512_VNNI, Bf16.AVX512)
    assert target.features == ()
    assert target.missing_features(host_features(machine.proc, target.family)) == ()
    assert load_target("x86-64-amx").missing_features(host_features(machine.proc, target.family)) == (
        "amx-bf16",
        "amx-int8",
        "amx-tile",
        "avx512fp16",
    )


def test_a_cpu_that_llvm_does_not_know_is_described_by_its_features(tmp_path):
    target = zen4(tmp_path).detect("x86_64-linux-gnu", "znver99", range(2))
    assert target.cpu == "generic"
    assert {"avx2", "avx512vnni", "avx512bf16"} <= set(target.features)
    assert target.isa.int8_dot is Int8Dot.AVX512_VNNI


def test_pi4(tmp_path):
    target = pi4(tmp_path).detect("aarch64-linux-gnu", "cortex-a72", range(4), glibc="2.31")
    assert target.description == "Raspberry Pi 4 Model B Rev 1.4"
    assert (target.cores, target.l1d_kib, target.l2_kib, target.l2_shared_by, target.l3_kib) == (4, 32, 256, 4, 0)
    assert (target.clock_mhz, target.zig_triple) == (1800, "aarch64-linux-gnu.2.31")
    assert target.isa == load_target("raspberry-pi-4b").isa


def test_a_kernel_that_does_not_give_cache_sizes(tmp_path):
    target = pi4(tmp_path, sizes=False).detect("aarch64-linux-gnu", "cortex-a72", range(4))
    assert (target.l1d_kib, target.l2_kib) == (32, 128)
    assert "assumed" in dict(target.notes)["l1d_kib"]


def test_of_two_clusters_the_big_one(tmp_path):
    target = rk3588(tmp_path).detect("aarch64-linux-gnu", "cortex-a76", range(8))
    assert (target.cores, target.l1d_kib, target.l2_kib, target.clock_mhz) == (4, 64, 512, 2256)
    assert target.isa.int8_dot is Int8Dot.SDOT


def test_bound_to_the_little_cluster(tmp_path):
    target = rk3588(tmp_path).detect("aarch64-linux-gnu", "cortex-a76", range(4))
    assert (target.cores, target.l1d_kib, target.l2_kib, target.clock_mhz) == (4, 32, 128, 1800)


def test_affinity_and_hyper_threads(tmp_path):
    machine = spr(tmp_path)
    assert machine.detect("x86_64-linux-gnu", "sapphirerapids", {0, 4}).cores == 1
    assert machine.detect("x86_64-linux-gnu", "sapphirerapids", {0, 1, 2}).cores == 3


def test_the_topology_file_of_older_kernels(tmp_path):
    machine = spr(tmp_path)
    for number in range(8):
        folder = machine.sys / f"devices/system/cpu/cpu{number}/topology"
        (folder / "core_cpus_list").rename(folder / "thread_siblings_list")
    assert machine.detect("x86_64-linux-gnu", "sapphirerapids", range(8)).cores == 4


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/cpu.max": "max 100000"}, 4),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/cpu.max": "250000 100000"}, 2),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/cpu.max": "50000 100000"}, 1),  # a parent's limit holds
        ({"proc/self/cgroup": "0::/not/seen", "sys/fs/cgroup/cpu.max": "300000 100000"}, 3),  # inside a container
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "6400000 100000"}, 4),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/x\n0::/",
                "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_quota_us": "200000",
                "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_period_us": "100000",
            },
            2,
        ),
        (
            {
                "proc/self/cgroup": "1:cpu:/",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            4,
        ),
    ],
)
def test_cgroup_quota(files, cores, tmp_path):
    machine = spr(tmp_path)
    for path, text in files.items():
        machine.file(path, text)
    target = machine.detect("x86_64-linux-gnu", "sapphirerapids", range(8))
    assert target.cores == cores
    assert ("quota" in dict(target.notes)["cores"]) == (cores < 4)


def test_a_bare_machine_still_has_a_target(tmp_path):
    machine = Machine(tmp_path)
    machine.cpuinfo(f"Features\t: {PI4}")
    (machine.proc / "meminfo").unlink()
    target = machine.detect("aarch64-linux-musl", "cortex-a53", [0], glibc=None)
    assert (target.cores, target.clock_mhz, target.memory_mib, target.libc) == (1, None, None, "musl")
    assert target.description == "this machine (aarch64)"
    assert "assumed" in dict(target.notes)["l2_kib"]


def test_not_linux(monkeypatch):
    monkeypatch.setattr(detect_module.sys, "platform", "darwin")
    with pytest.raises(TargetError, match="cannot detect this machine: expected Linux, saw darwin; name a target"):
        detect_host()


@pytest.mark.parametrize(("confstr", "expected"), [("glibc 2.36", "2.36"), ("glibc 2.31.9", "2.31"), (None, None)])
def test_c_library(confstr, expected, monkeypatch):
    monkeypatch.setattr("os.confstr", lambda name: confstr)
    assert detect_module._glibc() == expected


def test_a_c_library_that_does_not_say(monkeypatch):
    def unknown(name):
        raise ValueError(name)

    monkeypatch.setattr("os.confstr", unknown)
    assert detect_module._glibc() is None


def test_this_machine_can_run_what_is_compiled_for_it():
    target = load_target("host")
    assert target.missing_features(host_features()) == ()
    assert target == dataclasses.replace(detect_host(), clock_mhz=target.clock_mhz)
    target.tvm_target()
