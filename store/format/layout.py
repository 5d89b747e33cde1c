"""How an array is cut into chunks, and these into files.

A chunk is a file of its own, or, where an array is `sharded`, one of those of a row: the file of a row of the first
axis holds the index of its chunks, that of zarr's codec `sharding_indexed`, and then all chunks without gaps. Chunks
have one size, so that every offset is known before anything is read.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import google_crc32c
import numpy as np

BF16_NAN = 0x7FC0
_ABSENT = 2**64 - 1  # offset and size of a chunk that a file does not hold
_ENTRY = 16  # bytes of a chunk's offset and size in an index


class Chunk(NamedTuple):
    """file: its key below the array; number: its place among the chunks of that file."""

    file: str
    number: int = 0


class Run(NamedTuple):
    """Bytes start to end of a file, which are those of consecutive chunks, in the first run behind the index if any."""

    numbers: list[int]
    start: int
    end: int


@dataclass(frozen=True)
class Layout:
    """What an array must look like: shape, chunk shape, the dtypes it may have; lower: no chunk above the diagonal of
    the last two axes; sharded: one file for each row of the first axis; rows: those that are there, all by default.
    """

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtypes: tuple[str, ...]
    lower: bool = False
    sharded: bool = False
    rows: tuple[int, ...] | None = None

    def file_keys(self) -> Iterator[str]:
        """The keys below the array of all files that must exist."""
        if self.sharded:
            rows = range(self.shape[0]) if self.rows is None else self.rows
            yield from (self.file(row) for row in rows)
            return
        held = None if self.rows is None else {row // self.chunks[0] for row in self.rows}
        for index in itertools.product(*map(range, self._counts)):
            if self._is_kept(index) and (held is None or index[0] in held):
                yield _key(index)

    def file(self, row: int) -> str:
        """The key below a sharded array of the file of a row."""
        return _key((row, *[0] * (len(self.shape) - 1)))

    def bounds(self, region: Sequence[slice]) -> list[tuple[int, int]]:
        """Begin and end of a region on every axis; axes that it does not name are whole."""
        whole = [slice(None)] * (len(self.shape) - len(region))
        return [part.indices(size)[:2] for part, size in zip([*region, *whole], self.shape, strict=True)]

    def cover(self, bounds: Sequence[tuple[int, int]]) -> Iterator[tuple[Chunk, tuple[slice, ...], tuple[slice, ...]]]:
        """The chunks that a region needs in the order of a file: which, where in the region, where in the chunk."""
        axes = [_pieces(a, b, edge) for (a, b), edge in zip(bounds, self.chunks, strict=True)]
        for pieces in itertools.product(*axes):
            index, outside, inside = zip(*pieces, strict=True)
            if self.sharded:
                chunk = Chunk(self.file(index[0]), self._numbers[index[1:]])
            else:
                chunk = Chunk(_key(index))
            yield chunk, outside, inside

    def chunk_bytes(self, dtype: str) -> int:
        """Size of a chunk in its file: the values and the checksum."""
        return math.prod(self.chunks) * storage_dtype(dtype).itemsize + 4

    def file_bytes(self, dtype: str) -> int:
        """Size of a file: one chunk, or an index and the chunks of a row."""
        return self.chunk_bytes(dtype) if not self.sharded else self._start(len(self._numbers), dtype)

    @property
    def shard(self) -> tuple[int, ...]:
        """Shape of what a file holds, whole chunks, where the array is sharded."""
        return (1, *(count * edge for count, edge in zip(self._counts[1:], self.chunks[1:], strict=True)))

    @property
    def index_bytes(self) -> int:
        """Size of the index at the start of a file, 0 where there is none."""
        return _ENTRY * math.prod(self._counts[1:]) + 4 if self.sharded else 0

    def index(self, dtype: str) -> bytes:
        """The index that every file of a sharded array begins with."""
        entries = np.full((math.prod(self._counts[1:]), 2), _ABSENT, "<u8")
        size = self.chunk_bytes(dtype)
        for place in self._numbers:
            entries[np.ravel_multi_index(place, self._counts[1:])] = self._start(self._numbers[place], dtype), size
        raw = entries.tobytes()
        return raw + google_crc32c.value(raw).to_bytes(4, "little")

    def runs(self, numbers: Iterable[int], dtype: str) -> list[Run]:
        """What is to be read of a file for some of its chunks: the index first, chunks that touch each other at once.

        A byte more than there should be is asked for at the end of a file, so that a longer one is noticed.
        """
        runs = [Run([], 0, self.index_bytes)]
        for number in sorted(numbers):
            begin, end = self._start(number, dtype), self._start(number + 1, dtype)
            if begin == runs[-1].end:
                runs[-1] = Run([*runs[-1].numbers, number], runs[-1].start, end)
            else:
                runs.append(Run([number], begin, end))
        last = runs[-1]
        runs[-1] = last._replace(end=last.end + (last.end == self.file_bytes(dtype)))
        return runs

    def _start(self, number: int, dtype: str) -> int:
        return self.index_bytes + number * self.chunk_bytes(dtype)

    @cached_property
    def _counts(self) -> tuple[int, ...]:
        """Chunks on every axis."""
        return tuple(-(-size // edge) for size, edge in zip(self.shape, self.chunks, strict=True))

    @cached_property
    def _numbers(self) -> dict[tuple[int, ...], int]:
        """The place of each chunk in its file by its index on the axes after the first."""
        kept = filter(self._is_kept, itertools.product(*map(range, self._counts[1:])))
        return {index: number for number, index in enumerate(kept)}

    def _is_kept(self, index: Sequence[int]) -> bool:
        return not self.lower or index[-1] <= index[-2]


def storage_dtype(dtype: str) -> np.dtype:
    """NumPy's dtype of the bytes in the store; zarr has no bfloat16."""
    return np.dtype("uint16" if dtype == "bfloat16" else dtype).newbyteorder("<")


def _key(index: Iterable[int]) -> str:
    return "/".join(("c", *map(str, index)))


def _pieces(a: int, b: int, edge: int) -> list[tuple[int, slice, slice]]:
    """The chunks of one axis that a range needs: index, where in the range, where in the chunk."""
    return [
        (
            i,
            slice(max(a, i * edge) - a, min(b, (i + 1) * edge) - a),
            slice(max(a - i * edge, 0), min(b - i * edge, edge)),
        )
        for i in range(a // edge, -(-b // edge))
    ]
