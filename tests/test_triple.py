import pytest

from tvmq.errors import TargetError
from tvmq.triple import Family, parse_triple, triple_of


@pytest.mark.parametrize(
    ("text", "family", "libc", "zig"),
    [
        ("x86_64-linux-gnu", Family.X86, "gnu", "x86_64-linux-gnu.2.28"),
        ("aarch64-linux-gnu", Family.AARCH64, "gnu", "aarch64-linux-gnu.2.28"),
        ("aarch64-unknown-linux-gnu", Family.AARCH64, "gnu", "aarch64-linux-gnu.2.28"),
        ("aarch64-linux-musl", Family.AARCH64, "musl", "aarch64-linux-musl"),
        ("armv7l-linux-gnueabihf", Family.ARM, "gnu", "arm-linux-gnueabihf.2.28"),
        ("armv7-linux-musleabihf", Family.ARM, "musl", "arm-linux-musleabihf"),
        ("riscv64-linux-gnu", Family.RISCV64, "gnu", "riscv64-linux-gnu.2.28"),
    ],
)
def test_triples_and_their_zig_spelling(text, family, libc, zig):
    parts = parse_triple(text)
    assert (parts.family, parts.libc, parts.zig("2.28")) == (family, libc, zig)


def test_without_glibc_zig_takes_its_default():
    assert parse_triple("riscv64-linux-gnu").zig(None) == "riscv64-linux-gnu"


def test_unknown_architecture_names_the_nearest():
    with pytest.raises(TargetError, match=r"unknown architecture.*did you mean 'aarch64'\?"):
        parse_triple("arch64-linux-gnu")


@pytest.mark.parametrize(
    "text",
    ["x86_64", "x86_64-windows-gnu", "aarch64-apple-darwin", "armv7l-linux-gnueabi", "aarch64-linux-gnueabihf", "arm-"],
)
def test_triples_that_cannot_be_linked_for(text):
    with pytest.raises(TargetError, match="not one that tvmq links for"):
        parse_triple(text)


@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize("libc", ["gnu", "musl"])
def test_triple_of_reads_back(family, libc):
    parts = parse_triple(triple_of(family, libc))
    assert (parts.family, parts.libc) == (family, libc)
