"""Sparse weights as kernels read them: one stream of 32-bit words with the places of what is not zero, and its values.

A word is what one product takes of a weight: a float32, a pair of bfloat16 or int16, four int8. A run of a
convolution's taps or of a matrix is a row of such words. Panels of `rows` output channels share places: a word that is
not zero in one of them is stored for all.

    first panel of each part [parts + 1]     parts of about as many entries each, for the cores
    first entry of each panel [panels + 1]
    places [entries]                         of input words, as the kernel counts them
    values [entries, rows]                   from a multiple of 16 words on

Space for entries is rounded up a little, so that layers that are much the same share a kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tvmq.kernels.builder import BF16
from tvmq.kernels.micro import Micro

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]
# Words in the widest vector.
_ALIGNMENT = 16


@dataclass(frozen=True)
class Layout:
    """Where the parts of a stream are. `entries`: the space for them."""

    parts: int
    panels: int
    rows: int
    entries: int

    @property
    def starts(self) -> int:
        """The index of the first panel's first entry."""
        return self.parts + 1

    @property
    def places(self) -> int:
        """The index of the first place."""
        return self.starts + self.panels + 1

    @property
    def values(self) -> int:
        """The index of the first value."""
        return -(-(self.places + self.entries) // _ALIGNMENT) * _ALIGNMENT

    @property
    def words(self) -> int:
        """The length of the stream."""
        return self.values + self.entries * self.rows


def layout_of(pattern: Mask, rows: int, parts: int) -> Layout:
    """The layout of a pattern, bool [panels, words]."""
    count = max(1, int(pattern.sum()))
    granule = 1 << max(0, count.bit_length() - 7)
    return Layout(parts, pattern.shape[0], rows, -(-count // granule) * granule)


@dataclass(frozen=True)
class SparsePacking:
    """How a weight [O, kh, kw, I] of `dtype` was packed into a stream.

    word: the dtype of a word's elements, `kr` of them. offsets: the place of each run's first word; the words of a run
    have places `pitch` apart.
    """

    kind: str
    shape: tuple[int, ...]
    dtype: str
    word: str
    kr: int
    offsets: tuple[int, ...]
    pitch: int
    layout: tuple[int, int, int, int]

    def places(self) -> Array:
        """The place of every word, int32 [words of an output channel]."""
        length = math.prod(self.shape[1:]) // len(self.offsets)
        run = np.arange(-(-length // self.kr), dtype=np.int32) * self.pitch
        return (np.array(self.offsets, np.int32)[:, None] + run).ravel()

    def pack(self, weight: Array) -> Array:
        """The weight as its kernel reads it: int32."""
        layout = Layout(*self.layout)
        words = to_words(weight, len(self.offsets), self.kr, self.word)
        pattern = union(words != 0, layout.rows)
        stream = np.zeros(layout.words, np.int32)
        counts = pattern.sum(axis=1)
        ends = np.concatenate([[0], np.cumsum(counts)])
        stream[: layout.starts] = split(counts, layout.parts)
        stream[layout.starts : layout.places] = ends
        panel, word = np.nonzero(pattern)
        stream[layout.places : layout.places + len(word)] = self.places()[word]
        full = np.zeros((layout.panels * layout.rows, words.shape[1]), np.int32)
        full[: len(words)] = words
        values = full.reshape(layout.panels, layout.rows, -1)[panel, :, word]
        stream[layout.values : layout.values + values.size] = values.ravel()
        return stream

    def unpack(self, packed: Array) -> Array:
        """The weight as it was; bfloat16 as its bits."""
        layout = Layout(*self.layout)
        ends = packed[layout.starts : layout.places]
        panel = np.repeat(np.arange(layout.panels), np.diff(ends))
        places = self.places()
        order = np.argsort(places)
        word = order[np.searchsorted(places, packed[layout.places : layout.places + len(panel)], sorter=order)]
        values = packed[layout.values : layout.values + len(panel) * layout.rows].reshape(-1, layout.rows)
        full = np.zeros((layout.panels, layout.rows, len(places)), np.int32)
        full[panel, :, word] = values
        elements = full.reshape(-1, len(places)).view(self.word)[: self.shape[0]]
        length = math.prod(self.shape[1:]) // len(self.offsets)
        runs = elements.reshape(self.shape[0], len(self.offsets), -1)[:, :, :length]
        return _restored(np.ascontiguousarray(runs).reshape(self.shape), self.dtype)


def word_dtype(m: Micro) -> str:
    """The dtype of the elements of a word: what the product takes, bfloat16 as bits."""
    if m.w_dtype == BF16:
        return "uint16" if m.product.kr == 2 else "float32"
    return m.product.dtype.split("x", maxsplit=1)[0]


def to_words(weight: Array, runs: int, kr: int, word: str) -> Array:
    """A weight [O, ...] as int32 [O, runs * words of a run], each run padded with zeros."""
    channels = weight.shape[0]
    rows = weight.reshape(channels, runs, -1)
    # A negative zero is a zero.
    rows = np.where(rows == 0, np.zeros((), rows.dtype), rows)
    if word == "uint16":
        rows = rows.view(np.uint16)
    length = rows.shape[2]
    full = np.zeros((channels, runs, -(-length // kr) * kr), word)
    full[:, :, :length] = rows
    return full.reshape(channels, -1).view(np.int32)


def union(mask: Mask, rows: int) -> Mask:
    """bool [O, words] -> [panels of `rows` output channels, words]: whether any of them has the word."""
    panels = -(-mask.shape[0] // rows)
    full = np.zeros((panels * rows, mask.shape[1]), bool)
    full[: mask.shape[0]] = mask
    return np.asarray(full.reshape(panels, rows, -1).any(axis=1))


def split(counts: Array, parts: int) -> Array:
    """The first panel of each of `parts` parts with about as many entries each, and the end: int [parts + 1]."""
    # A panel costs something even where it is empty.
    ends = np.cumsum(counts + 1)
    wanted = ends[-1] * np.arange(1, parts) / parts
    inner = np.searchsorted(ends, wanted, side="left")
    # The panel that a boundary falls into goes to the side where more of it lies.
    before = np.where(inner > 0, ends[inner - 1], 0)
    inner = inner + (wanted - before > ends[inner] - wanted)
    return np.concatenate([[0], inner, [len(counts)]])


def _restored(weight: Array, dtype: str) -> Array:
    """Elements of words as a weight of `dtype`: widened ones become what they were."""
    if dtype == BF16:
        return weight if weight.dtype == np.uint16 else (weight.view(np.uint32) >> 16).astype(np.uint16)
    return weight.astype(dtype)
