"""Targets: what a device is, read from `targets/*.toml`, checked, and handed to TVM, to zig and to the schedules.

A target says what the machine is, never what to do with it. Everything that follows from its instructions is
`Target.isa`. To add a device, write a TOML file: no name of a board or processor appears in code.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from tvmq import llvm
from tvmq.errors import TargetError, nearest
from tvmq.files import data_folder
from tvmq.isa import Isa, derive_isa
from tvmq.triple import Family, Triple, parse_triple

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HOST = "host"
"""The name of the machine that runs tvmq; it is detected, not read."""


@dataclass(frozen=True)
class Target:
    """One device. Raises TargetError for impossible values; hashable, picklable.

    `triple`, `cpu`: LLVM's names. `features`: LLVM features besides what `cpu` implies, without "+"; "-name" takes
    away one that LLVM's model of the processor has and this chip has not (or a tuning flag).
    `cores`: physical cores that work is spread over. `l1d_kib`, `l2_kib`: KiB that one core can count on, so a shared
    L2 is divided by `l2_shared_by`, the number of cores that share it; 0 where there is none. `l3_kib`: the whole
    last-level cache that one core reaches, 0 where there is none. `clock_mhz`: highest clock, None where a host does
    not say. `memory_mib`: None where it varies.
    `glibc`: the oldest C library ("2.28") that a bundle must load on, None for the linker's default or for musl.
    `libc`: "gnu" or "musl", as the triple says. `notes`: (field, where its value is from).
    """

    name: str
    description: str
    triple: str
    cpu: str
    cores: int
    l1d_kib: int
    l2_kib: int
    l3_kib: int = 0
    l2_shared_by: int = 1
    clock_mhz: int | None = None
    memory_mib: int | None = None
    features: tuple[str, ...] = ()
    glibc: str | None = None
    libc: str | None = None
    notes: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        parts = _check(self)
        object.__setattr__(self, "libc", parts.libc)

    @property
    def family(self) -> Family:
        """The instruction set family."""
        return parse_triple(self.triple).family

    @property
    def isa(self) -> Isa:
        """What its instructions can do; cached."""
        return derive_isa(self.triple, self.cpu, self.features)

    @property
    def zig_triple(self) -> str:
        """The `-target` for `zig cc`, e.g. "arm-linux-gnueabihf.2.28"."""
        return parse_triple(self.triple).zig(self.glibc)

    def tvm_options(self) -> dict[str, Any]:
        """The dict form of the TVM target."""
        options: dict[str, Any] = {"kind": "llvm", "mtriple": self.triple, "mcpu": self.cpu, "num-cores": self.cores}
        if self.features:
            options["mattr"] = llvm.mattr(self.features)
        if self.family is Family.ARM:
            # The triple alone is not enough: without this TVM 0.27 passes floats in core registers, and every call
            # into libm (expf, erff) of a hard-float system computes nonsense.
            options["mfloat-abi"] = "hard"
        return options

    def tvm_target(self) -> Any:
        """The `tvm.target.Target` to compile for."""
        import tvm

        return tvm.target.Target(self.tvm_options())

    def missing_features(self, host_features: Iterable[str]) -> tuple[str, ...]:
        """What a machine with `host_features` lacks to run code for this target, sorted; empty: it may run it."""
        return tuple(sorted(set(self.isa.required_features) - set(host_features)))

    def to_toml(self) -> str:
        """The file that reads back as this target."""
        values = _file_values(self)
        notes = values.pop("notes", {})
        lines = [f"{key} = {_toml_value(value)}" for key, value in values.items()]
        if notes:
            lines += ["", "[notes]", *(f"{key} = {_toml_value(value)}" for key, value in notes.items())]
        return "\n".join(lines) + "\n"


def load_target(name_or_path: str | Path | Target) -> Target:
    """The target of a shipped name, of a `.toml` file, or "host" for this machine. Raises TargetError."""
    if isinstance(name_or_path, Target):
        return name_or_path
    if isinstance(name_or_path, Path) or name_or_path.endswith(".toml"):
        return _read_target(Path(name_or_path))
    if name_or_path == HOST:
        from tvmq.detect import detect_host

        return detect_host()
    names = target_names()
    if name_or_path not in names:
        hint = nearest(name_or_path, [*names, HOST]) or f"known: {HOST}, {', '.join(names)}"
        raise TargetError(f"unknown target {name_or_path!r}", expected="a shipped name or a .toml file", hint=hint)
    return _read_target(data_folder("targets") / f"{name_or_path}.toml")


def target_names() -> list[str]:
    """The names of the shipped targets, sorted. "host" is not among them: it is this machine, not a file."""
    return sorted(path.stem for path in data_folder("targets").glob("*.toml"))


def target_summaries() -> list[dict[str, Any]]:
    """Name, triple, cpu, cores and description of each shipped target, as its file says: LLVM is not asked."""
    keys = ("name", "triple", "cpu", "cores", "description")
    files = [data_folder("targets") / f"{name}.toml" for name in target_names()]
    tables = (tomllib.loads(path.read_text(encoding="utf-8")) for path in files)
    return [{key: table[key] for key in keys} for table in tables]


def describe(target: Target) -> dict[str, Any]:
    """JSON-able: everything in the file, and under "derived" what follows from it."""
    derived = {
        "zig_triple": target.zig_triple,
        "tvm_target": target.tvm_options(),
        "isa": target.isa.to_dict(),
    }
    return {**_file_values(target), "derived": derived}


def _read_target(path: Path) -> Target:
    try:
        text = path.read_text(encoding="utf-8")
        raw = tomllib.loads(text)
    except OSError as error:
        raise TargetError(f"cannot read target {path}", seen=error.strerror or str(error)) from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise TargetError(f"{path} is not a TOML file", seen=str(error)) from error
    try:
        return _target_of_table(raw)
    except TargetError as error:
        raise TargetError(f"{path}: {error.what}", expected=error.expected, seen=error.seen, hint=error.hint) from error


_FIELDS = {field.name: field for field in fields(Target)}


def _target_of_table(raw: dict[str, Any]) -> Target:
    for key in raw:
        if key not in _FIELDS:
            hint = nearest(key, _FIELDS) or f"known: {', '.join(_FIELDS)}"
            raise TargetError(f"unknown key {key!r}", hint=hint)
    missing = [name for name, field in _FIELDS.items() if field.default is MISSING and name not in raw]
    if missing:
        raise TargetError(f"missing {', '.join(missing)}")
    values = dict(raw)
    if isinstance(values.get("features"), list):
        values["features"] = tuple(values["features"])
    if "notes" in values:
        if not isinstance(values["notes"], dict):
            raise _wrong("notes", "a table of field = sentence", values["notes"])
        values["notes"] = tuple(values["notes"].items())
    return Target(**values)


def _file_values(target: Target) -> dict[str, Any]:
    """The fields as a TOML file holds them, in the file's order; what is None or empty is left out."""
    values: dict[str, Any] = {name: getattr(target, name) for name in _FIELDS}
    values["features"] = list(target.features)
    values["notes"] = dict(target.notes)
    return {name: value for name, value in values.items() if value is not None and value not in ([], {})}


def _toml_value(value: object) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_toml_value, value))}]"
    # JSON's strings and whole numbers are TOML's, but for DEL, which TOML wants escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


# Smallest and largest believable value: figures in bytes, kHz or Hz fall outside.
_RANGES = {
    "cores": (1, 1024),
    "l1d_kib": (1, 1024),
    "l2_kib": (0, 1 << 17),
    "l2_shared_by": (1, 1024),
    "l3_kib": (0, 1 << 21),
    "clock_mhz": (10, 10_000),
    "memory_mib": (1, 1 << 26),
}
_STRINGS = ("name", "description", "triple", "cpu", "glibc", "libc")
# Names become names of folders (tuning logs).
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_GLIBC = re.compile(r"2\.\d{1,2}")


def _check(target: Target) -> Triple:
    """Every value, the cheap ones first: LLVM is only asked about a triple that is known to be good."""
    _check_strings(target)
    for name, (low, high) in _RANGES.items():
        value = getattr(target, name)
        optional = value is None and _FIELDS[name].default is None
        if not optional and (type(value) is not int or not low <= value <= high):
            raise _wrong(name, f"a whole number from {low} to {high}", value)
    _check_notes(target)
    parts = parse_triple(target.triple)
    _check_libc(target, parts)
    _check_cpu(target)
    return parts


def _check_strings(target: Target) -> None:
    for name in _STRINGS:
        value = getattr(target, name)
        optional = value is None and _FIELDS[name].default is None
        if not optional and (not isinstance(value, str) or not value):
            raise _wrong(name, "a string", value)
    if not _NAME.fullmatch(target.name):
        raise _wrong("name", "lower-case letters, digits, dots, dashes", target.name)
    if not isinstance(target.features, tuple) or not all(isinstance(name, str) for name in target.features):
        raise _wrong("features", "a list of strings", target.features)


def _check_notes(target: Target) -> None:
    for key, sentence in target.notes:
        if key not in _FIELDS:
            raise TargetError(f"note on unknown key {key!r}", hint=nearest(key, _FIELDS))
        if not isinstance(sentence, str):
            raise _wrong(f"notes.{key}", "a sentence", sentence)


def _check_libc(target: Target, parts: Triple) -> None:
    if target.libc is not None and target.libc != parts.libc:
        raise _wrong("libc", f"{parts.libc!r}, as in {target.triple!r}", target.libc)
    if target.glibc is not None and parts.libc == "musl":
        raise _wrong("glibc", "none, as the C library is musl", target.glibc)
    if target.glibc is not None and not _GLIBC.fullmatch(target.glibc):
        raise _wrong("glibc", 'a version such as "2.28"', target.glibc)


def _check_cpu(target: Target) -> None:
    cpus = llvm.cpu_names(target.triple)
    if target.cpu not in cpus:
        hint = nearest(target.cpu, sorted(cpus))
        raise TargetError(f"LLVM knows no cpu {target.cpu!r} for {target.triple}", hint=hint)
    known = llvm.known_features(target.triple)
    for feature in target.features:
        name = feature.removeprefix("-")
        if name not in known:
            hint = 'write it without "+"' if name.startswith("+") else nearest(name, sorted(known))
            raise TargetError(f"LLVM knows no feature {name!r} for {target.triple}", hint=hint)


def _wrong(name: str, expected: str, seen: object) -> TargetError:
    return TargetError(name, expected=expected, seen=repr(seen))
