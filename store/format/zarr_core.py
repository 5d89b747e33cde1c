"""What is needed of zarr and is only in its private `zarr.core`: the reason for the bound on zarr's version."""

from __future__ import annotations

from typing import Any

import zarr
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.core.group import AsyncGroup
from zarr.core.sync import sync
from zarr.storage import StorePath

__all__ = ["group_of", "prototype", "sync", "to_buffer"]


def prototype() -> BufferPrototype:
    """The kind of buffer that a zarr store reads into."""
    return default_buffer_prototype()


def to_buffer(raw: bytes) -> Buffer:
    """Bytes as a zarr store writes them."""
    return default_buffer_prototype().buffer.from_bytes(raw)


def group_of(path: StorePath, attributes: dict[str, Any]) -> zarr.Group:
    """The group at `path` with attributes that were read already: nothing is read."""
    return zarr.Group(AsyncGroup.from_dict(path, {"zarr_format": 3, "node_type": "group", "attributes": attributes}))
