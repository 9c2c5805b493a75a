"""Parameters in one block of bytes: how many each takes, and several programs' blocks as one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# A cache line, and what any vector load needs.
ALIGNMENT = 64
Index = list[dict[str, Any]]


def stored_size(entry: Mapping[str, Any]) -> int:
    """The bytes that a parameter takes; one stored without its zeros has a bit an element besides."""
    itemsize, count = np.dtype(entry["dtype"]).itemsize, int(np.prod(entry["shape"], dtype=np.int64))
    kept = entry.get("nonzero")
    return int(count * itemsize if kept is None else -(-count // 8) + int(kept) * itemsize)


def shared(packed: Sequence[tuple[bytes, Index]]) -> tuple[bytes, list[Index]]:
    """One block for the parameters of several programs, as of `bundle.pack_parameters`; equal ones once."""
    block = bytearray()
    known: dict[tuple[Any, ...], int] = {}
    indices = []
    for data, index in packed:
        moved = []
        for entry in index:
            stored = data[entry["offset"] : entry["offset"] + stored_size(entry)]
            key = (hashlib.sha256(stored).digest(), entry["dtype"], tuple(entry["shape"]), entry.get("nonzero"))
            if key not in known:
                block.extend(b"\0" * (-len(block) % ALIGNMENT))
                known[key] = len(block)
                block.extend(stored)
            moved.append({**entry, "offset": known[key]})
        indices.append(moved)
    return bytes(block), indices
