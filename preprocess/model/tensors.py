"""The tensors of safetensors files, read one by one into memory of their own.

A file begins with the length of its header (8 bytes, little-endian) and the header, which says where each tensor lies.
Nothing is mapped, so that pages of a large file never count as this process's memory, and a part of a tensor is read
without the rest.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import PrepError


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: `offset` bytes into `file`."""

    file: str
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Of all its values."""
        return math.prod(self.shape) * self.dtype.itemsize


class Tensors(Mapping[str, Stored]):
    """All tensors of some files by name. bytes_read: of tensors, so far. ValueError for a header that is damaged."""

    def __init__(self, files: Iterable[str]):
        self._stored = {name: stored for file in files for name, stored in _header(file)}
        self._lock = threading.Lock()
        self.bytes_read = 0

    def __getitem__(self, name: str) -> Stored:
        return self._stored[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def read(self, name: str, part: int | None = None) -> Tensor:
        """The values of a tensor, or of `part` of its first dimension. For several threads; PrepError if it fails."""
        stored = self._stored[name]
        shape, offset, size = stored.shape, stored.offset, stored.bytes
        if part is not None:
            size //= shape[0]
            shape, offset = shape[1:], offset + part * size
        values = torch.empty(shape, dtype=stored.dtype)
        try:
            with open(stored.file, "rb", buffering=0) as file:
                file.seek(offset)
                _fill(file, values.reshape(-1).view(torch.uint8).numpy().data)
        except OSError as error:
            raise PrepError(f"cannot read {name} of {stored.file} ({error}): check the checkpoint") from error
        with self._lock:
            self.bytes_read += size
        return values


def _header(file: str) -> Iterator[tuple[str, Stored]]:
    """(name, place) of every tensor of a file."""
    from transformers.modeling_utils import str_to_torch_dtype

    end = os.path.getsize(file)
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > end - 8:
            raise ValueError(f"{file} is shorter than its header")
        header: dict[str, Any] = json.loads(opened.read(length))
    for name, said in header.items():
        if name == "__metadata__":
            continue
        first, last = (8 + length + offset for offset in said["data_offsets"])
        stored = Stored(file, first, tuple(said["shape"]), str_to_torch_dtype[said["dtype"]])
        if not 8 + length <= first <= last <= end or last - first != stored.bytes:
            raise ValueError(f"{file} does not hold {name} as its header says")
        yield name, stored


def _fill(file: Any, room: memoryview) -> None:
    """Read until `room` is full; one call reads 2 GB at most."""
    while room:
        count = file.readinto(room)
        if not count:
            raise OSError("the file ends within it")
        room = room[count:]
