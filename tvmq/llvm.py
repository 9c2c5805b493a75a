"""What LLVM knows about processors, asked through TVM: names, and the features that a name implies.

Only triples that `tvmq.triple.parse_triple` accepts may be passed in. TVM is imported when first asked, so that a board
that only runs bundles can use the modules above this one.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from tvmq.triple import Family, parse_triple

# Tuning flags that LLVM 22 gives to none of its processors (AArch64Features.td).
_FLAGS = {Family.AARCH64: frozenset({"slow-paired-128"})}


@functools.cache
def cpu_names(triple: str) -> frozenset[str]:
    """The `-mcpu` names that LLVM accepts for `triple`."""
    from tvm.target import codegen

    return frozenset(str(name) for name in codegen.llvm_get_cpu_archlist(_target(triple)))


@functools.cache
def known_features(triple: str) -> frozenset[str]:
    """Every feature that some processor of the triple's architecture has, tuning flags included.

    LLVM does not list its features by themselves, and prints on stderr when it is given an unknown one: so the union
    over its processors is what counts as known (measured: 20 ms for x86-64), and flags that no processor has by itself.
    """
    family = parse_triple(triple).family
    return _FLAGS.get(family, frozenset()).union(*(cpu_features(triple, cpu) for cpu in cpu_names(triple)))


@functools.cache
def cpu_features(triple: str, cpu: str, features: tuple[str, ...] = ()) -> frozenset[str]:
    """The effective features of `cpu` with `features` ("name" or "-name") applied: LLVM resolves what implies what."""
    from tvm.target import codegen

    return frozenset(str(name) for name in codegen.llvm_get_cpu_features(_target(triple, cpu, features)))


def mattr(features: Iterable[str]) -> list[str]:
    """LLVM's spelling of a feature list: "dotprod" -> "+dotprod"; "-aes" stays."""
    return [name if name.startswith("-") else f"+{name}" for name in features]


def host_cpu() -> str:
    """LLVM's name for this machine's processor, "generic" where it does not know it."""
    from tvm.target import codegen

    return str(codegen.llvm_get_system_cpu())


def _target(triple: str, cpu: str | None = None, features: tuple[str, ...] = ()) -> Any:
    import tvm

    spec: dict[str, Any] = {"kind": "llvm", "mtriple": triple}
    if cpu is not None:
        spec["mcpu"] = cpu
    if features:
        spec["mattr"] = mattr(features)
    return tvm.target.Target(spec)
