from tvmq import llvm
from tvmq.cpuinfo import detectable
from tvmq.triple import Family, triple_of


def test_cpu_names_are_those_of_the_architecture():
    assert {"x86-64-v3", "x86-64-v4", "gracemont"} <= llvm.cpu_names("x86_64-linux-gnu")
    assert {"cortex-a7", "cortex-a8"} <= llvm.cpu_names("armv7l-linux-gnueabihf")
    assert "cortex-a72" not in llvm.cpu_names("x86_64-linux-gnu")


def test_features_imply_others_and_can_be_taken_away():
    assert {"amx-int8", "amx-tile"} <= llvm.cpu_features("x86_64-linux-gnu", "x86-64-v4", ("amx-int8",))
    assert "aes" in llvm.cpu_features("aarch64-linux-gnu", "cortex-a72")
    assert "aes" not in llvm.cpu_features("aarch64-linux-gnu", "cortex-a72", ("-aes",))


def test_every_detectable_feature_is_a_name_llvm_knows():
    # A misspelt name in the tables would silently never be required.
    for family in Family:
        assert detectable(family) <= llvm.known_features(triple_of(family, "gnu")), family


def test_mattr_spelling():
    assert llvm.mattr(("dotprod", "-aes")) == ["+dotprod", "-aes"]
