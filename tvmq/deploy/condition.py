"""In what condition a machine is measured: clocks, temperature, throttling, load, processors. Read from /proc and /sys.

Imports no TVM, and needs no rights: what a machine does not tell is None or empty.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

EMULATED = "emulated: these times mean nothing; for instructions: tvmq board emulate --count"
# Bits of the firmware's word on a Raspberry Pi (documentation of `vcgencmd get_throttled`); 16 bits higher: since boot.
_PI_FLAGS = ("under-voltage", "frequency capped", "throttled", "soft temperature limit")
_PI_WORD = "sys/devices/platform/soc/soc:firmware/get_throttled"
_CPUS = "sys/devices/system/cpu"
# As a share of the processors: more of them busy with something else shows in a measurement.
_BUSY = 0.25


@dataclass(frozen=True, kw_only=True)
class Condition:
    """A machine before or after a measurement. known: False where the board does not tell; the rest is void then.

    governors: of processors, each once. mhz, max_mhz: now, of each processor. temperature_c: of the hottest zone.
    throttled: what limits the clock now. throttled_since_boot: what has done so. throttle_events: counted by the
    processor. load: processes that run or wait, over the last minute. allowed: the processors of this process.
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

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        if self.emulated:
            return EMULATED
        if not self.known:
            return "condition of the board: unknown (only tvmq board serve tells)"
        pinned = f", held to {','.join(map(str, self.allowed))}" if len(self.allowed) != self.processors else ""
        heat = "unknown" if self.temperature_c is None else f"{self.temperature_c:.0f} degrees"
        clock = f"{min(self.mhz)} of {max(self.max_mhz or self.mhz)} MHz" if self.mhz else "unknown"
        parts = {
            "governor": ", ".join(self.governors) or "unknown",
            "slowest clock": clock,
            "temperature": heat,
            "throttled": ", ".join(self.throttled) or "no" if self._tells_throttling else "unknown",
            "load": "unknown" if self.load is None else f"{self.load:.2f}",
            "processors": f"{self.processors or 'unknown'}{pinned}",
        }
        return "; ".join(f"{name} {value}" for name, value in parts.items())

    @property
    def _tells_throttling(self) -> bool:
        return bool(self.throttled) or self.throttle_events is not None


def read(root: Path = Path("/")) -> Condition:
    """This machine's condition; `root`: where its /proc and /sys are."""
    cpus = sorted((root / _CPUS).glob("cpu[0-9]*"), key=lambda path: int(path.name[3:]))
    word = _word(root / _PI_WORD, 16)
    events = [_word(path) for cpu in cpus for path in cpu.glob("thermal_throttle/core_throttle_count")]
    clock = [_word(cpu / "cpufreq/scaling_cur_freq") for cpu in cpus]
    most = [_word(cpu / "cpufreq/cpuinfo_max_freq") for cpu in cpus]
    zones = [_word(path) for path in (root / "sys/class/thermal").glob("thermal_zone*/temp")]
    load = _text(root / "proc/loadavg").split()
    # A firmware that answers counts as one that tells, also where it says that there is nothing.
    counted = [event for event in events if event is not None] or ([0] if word is not None else [])
    return Condition(
        governors=tuple(sorted({text for cpu in cpus if (text := _text(cpu / "cpufreq/scaling_governor"))})),
        mhz=tuple(khz // 1000 for khz in clock if khz is not None),
        max_mhz=tuple(khz // 1000 for khz in most if khz is not None),
        temperature_c=max((zone / 1000 for zone in zones if zone is not None), default=None),
        throttled=(*_flags(word or 0), *_cooling(root)),
        throttled_since_boot=_flags((word or 0) >> 16),
        throttle_events=sum(counted) if counted else None,
        load=float(load[0]) if load else None,
        processors=len(cpus) or None,
        allowed=tuple(sorted(os.sched_getaffinity(0))),
    )


def from_json(text: str) -> Condition:
    """What `Condition.to_dict` gave, as a board sends it."""
    values: dict[str, Any] = json.loads(text)
    known: dict[str, Any] = {name: tuple(item) if isinstance(item, list) else item for name, item in values.items()}
    return Condition(**known)


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


def _cooling(root: Path) -> tuple[str, ...]:
    """Cooling of processors that is at work: Linux lowers their clock."""
    devices = sorted((root / "sys/class/thermal").glob("cooling_device*"))
    kinds = {_text(path / "type") for path in devices if _word(path / "cur_state")}
    return tuple(
        f"cooling by {kind}" for kind in sorted(kinds) if kind.lower().startswith(("processor", "cpufreq", "cpu"))
    )


def _text(path: Path) -> str:
    # Files of /sys may be there and not be readable, or their device be gone.
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace").strip()
    return ""


def _word(path: Path, base: int = 10) -> int | None:
    with contextlib.suppress(ValueError):
        return int(_text(path), base)
    return None
