"""In what condition a machine is measured: clocks, temperature, throttling, load, processors. Read from /proc and /sys.

Imports no TVM, and needs no rights: what a machine does not tell is None or empty. A board sends the files as they are
(`gather` and `pack`, or board_condition.h); what they say is read here (`parse`).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

EMULATED = "emulated: these times mean nothing; for instructions: tvmq board emulate --count"
# Bits of the firmware's word on a Raspberry Pi (documentation of `vcgencmd get_throttled`); 16 bits higher: since boot.
_PI_FLAGS = ("under-voltage", "frequency capped", "throttled", "soft temperature limit")
_CPUS = "sys/devices/system/cpu"
# What is read, as shell patterns below /.
_LOAD, _PRESENT = "proc/loadavg", f"{_CPUS}/present"
_PI_WORD = "sys/devices/platform/soc/soc:firmware/get_throttled"
_THREADS = "proc/self/task/*/status"
_GOVERNORS = f"{_CPUS}/cpu[0-9]*/cpufreq/scaling_governor"
_CLOCKS, _MOST = (f"{_CPUS}/cpu[0-9]*/cpufreq/{name}" for name in ("scaling_cur_freq", "cpuinfo_max_freq"))
_EVENTS = f"{_CPUS}/cpu[0-9]*/thermal_throttle/core_throttle_count"
_ZONES = "sys/class/thermal/thermal_zone*/temp"
_COOLERS, _COOLING = (f"sys/class/thermal/cooling_device*/{name}" for name in ("type", "cur_state"))
FILES = (_LOAD, _PRESENT, _PI_WORD, _THREADS, _GOVERNORS, _CLOCKS, _MOST, _EVENTS, _ZONES, _COOLERS, _COOLING)
# Where files are sent: between a file's name and its text, and after that. The same in board_condition.h.
_UNIT, _RECORD = "\x1f", "\x1e"
# As a share of the processors: more of them busy with something else shows in a measurement.
_BUSY = 0.25


@dataclass(frozen=True, kw_only=True)
class Condition:
    """A machine before or after a measurement. known: False where the board does not tell; the rest is void then.

    governors: of processors, each once. mhz, max_mhz: now, of each processor. temperature_c: of the hottest zone.
    throttled: what limits the clock now. throttled_since_boot: what has done so. throttle_events: counted by the
    processor. load: processes that run or wait, over the last minute. threads: the processors that each thread of this
    process may use, as Linux lists them ("0-3"), each list once; allowed: all of these, by number.
    """

    known: bool = True
    emulated: bool = False
    governors: tuple[str, ...] = ()
    mhz: tuple[int, ...] = ()
    max_mhz: tuple[int, ...] = ()
    temperature_c: float | None = None
    throttled: tuple[str, ...] = ()
    throttled_since_boot: tuple[str, ...] = ()
    throttle_events: int | None = None
    load: float | None = None
    processors: int | None = None
    allowed: tuple[int, ...] = ()
    threads: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        if self.emulated:
            return EMULATED
        if not self.known:
            return "condition of the board: unknown (TVM's own servers do not tell)"
        heat = "unknown" if self.temperature_c is None else f"{self.temperature_c:.0f} degrees"
        clock = f"{min(self.mhz)} of {max(self.max_mhz or self.mhz)} MHz" if self.mhz else "unknown"
        parts = {
            "governor": ", ".join(self.governors) or "unknown",
            "slowest clock": clock,
            "temperature": heat,
            "throttled": ", ".join(self.throttled) or "no" if self._tells_throttling else "unknown",
            "load": "unknown" if self.load is None else f"{self.load:.2f}",
            "processors": f"{self.processors or 'unknown'}{self._held}",
        }
        return "; ".join(f"{name} {value}" for name, value in parts.items())

    @property
    def _tells_throttling(self) -> bool:
        return bool(self.throttled) or self.throttle_events is not None

    @property
    def _held(self) -> str:
        """Which processors threads are held to, where that is not all of them."""
        free = len(self.threads) <= 1 and len(self.allowed) == self.processors
        return "" if free or not self.threads else f", threads held to {' and '.join(self.threads)}"


def read(root: Path = Path("/")) -> Condition:
    """This machine's condition; `root`: where its /proc and /sys are."""
    return parse(gather(FILES, root))


def gather(patterns: Iterable[str], root: Path = Path("/")) -> dict[str, str]:
    """The texts of the files below `root` that match, by name."""
    found = {}
    for path in (path for pattern in patterns for path in root.glob(pattern)):
        # Files of /sys may be there and not be readable, or their device be gone.
        with contextlib.suppress(OSError):
            found[path.relative_to(root).as_posix()] = path.read_text(encoding="utf-8", errors="replace").strip()
    return found


def pack(files: Mapping[str, str]) -> str:
    """Files as one text, as boards send them."""
    return "".join(f"{name}{_UNIT}{text}{_RECORD}" for name, text in files.items())


def unpack(text: str) -> dict[str, str]:
    """The files of a packed text."""
    pairs = (record.partition(_UNIT) for record in text.split(_RECORD) if record)
    return {name: content.strip() for name, _, content in pairs}


def parse(files: Mapping[str, str]) -> Condition:
    """What the files of a machine say."""
    word = _word(files.get(_PI_WORD, ""), 16)
    events = _words(_matching(files, _EVENTS))
    load = files.get(_LOAD, "").split()
    threads = tuple(dict.fromkeys(filter(None, map(_allowed, _matching(files, _THREADS).values()))))
    # A firmware that answers counts as one that tells, also where it says that there is nothing.
    counted = events or ([0] if word is not None else [])
    return Condition(
        governors=tuple(sorted(set(filter(None, _matching(files, _GOVERNORS).values())))),
        mhz=tuple(khz // 1000 for khz in _words(_matching(files, _CLOCKS))),
        max_mhz=tuple(khz // 1000 for khz in _words(_matching(files, _MOST))),
        temperature_c=max((zone / 1000 for zone in _words(_matching(files, _ZONES))), default=None),
        throttled=(*_flags(word or 0), *_cooling(files)),
        throttled_since_boot=_flags((word or 0) >> 16),
        throttle_events=sum(counted) if counted else None,
        load=float(load[0]) if load else None,
        processors=len(_numbers(files.get(_PRESENT, ""))) or None,
        allowed=tuple(sorted({number for text in threads for number in _numbers(text)})),
        threads=threads,
    )


def fastest(files: Mapping[str, str]) -> list[int]:
    """The processors that the process may use, those of the highest clock first; empty where the machine tells none.

    Of equal ones the last: interrupts come to the first.
    """
    clocks = {int(re.findall(r"\d+", name)[0]): _word(text) or 0 for name, text in _matching(files, _MOST).items()}
    return sorted(parse(files).allowed, key=lambda number: (-clocks.get(number, 0), -number))


def warnings(before: Condition, after: Condition) -> list[str]:
    """What makes a measurement between the two doubtful, a sentence each."""
    if after.emulated:
        return [EMULATED]
    found = []
    why = sorted({*before.throttled, *after.throttled, *_new(before.throttled_since_boot, after.throttled_since_boot)})
    events = (after.throttle_events or 0) - (before.throttle_events or 0)
    if why or events > 0:
        found.append(f"warning: the board throttled meanwhile ({', '.join(why) or f'{events} times'}); cool it")
    moving = [name for name in before.governors if name != "performance"]
    if moving:
        found.append(f"warning: governor {', '.join(moving)}: clocks move with the load; performance keeps them")
    if before.load is not None and before.processors and before.load > _BUSY * before.processors:
        found.append(f"warning: a load of {before.load:.2f} before the measurement: others compute on the machine")
    return found


def _new(before: Sequence[str], after: Sequence[str]) -> list[str]:
    return [name for name in after if name not in before]


def _flags(word: int) -> tuple[str, ...]:
    return tuple(name for bit, name in enumerate(_PI_FLAGS) if word >> bit & 1)


def _cooling(files: Mapping[str, str]) -> tuple[str, ...]:
    """Cooling of processors that is at work: Linux lowers their clock."""
    kinds = {
        kind
        for path, kind in _matching(files, _COOLERS).items()
        if _word(files.get(f"{path.removesuffix('type')}cur_state", ""))
    }
    return tuple(
        f"cooling by {kind}" for kind in sorted(kinds) if kind.lower().startswith(("processor", "cpufreq", "cpu"))
    )


def _matching(files: Mapping[str, str], pattern: str) -> dict[str, str]:
    """The files of a pattern, in the order of the numbers in their names."""
    name = re.compile(re.escape(pattern).replace(r"\[0\-9\]\*", r"\d+").replace(r"\*", r"[^/]*"))
    found = [path for path in files if name.fullmatch(path)]
    return {path: files[path] for path in sorted(found, key=lambda path: [int(n) for n in re.findall(r"\d+", path)])}


def _allowed(status: str) -> str:
    """The list of processors in a thread's status."""
    found = re.search(r"^Cpus_allowed_list:\s*(\S+)", status, re.MULTILINE)
    return found[1] if found else ""


def _numbers(text: str) -> list[int]:
    """The numbers of a list of processors as Linux writes it: "0-3,6"."""
    spans = (part.partition("-") for part in text.split(",") if part)
    return [number for first, _, last in spans for number in range(int(first), int(last or first) + 1)]


def _words(files: Mapping[str, str]) -> list[int]:
    """The numbers that files hold; others tell nothing."""
    return [word for word in map(_word, files.values()) if word is not None]


def _word(text: str, base: int = 10) -> int | None:
    with contextlib.suppress(ValueError):
        return int(text, base)
    return None
