"""The state of an unfinished calibration: two slots under /checkpoint, of which the root attribute names the good one.

A slot is written in full before the root's metadata file, replaced in one step, points to it: whenever the process is
killed, one slot is whole. /checkpoint/half holds the moments of the first half of every site's tokens, written when
these are in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
import zarr
from torch import Tensor

from .format import schema
from .format.zarr_core import sync
from .moment_writer import seal_sites
from .site import HALF, HALF_DTYPE, SiteData
from .site_group import read_site, write_site

_SMALL = torch.finfo(torch.float32).smallest_normal / torch.finfo(torch.float32).eps


def begin_slot(root: zarr.Group) -> int:
    """Empty the slot that is not in use, and give its number."""
    before: Any = root.attrs.get("checkpoint") or {}
    slot = 1 - int(before.get("slot", 1))
    schema.create_group(root, f"checkpoint/{slot}")
    return slot


def write_sums(root: zarr.Group, slot: int, site: str, sums: SiteData) -> None:
    """Store the sums of one site in a slot; several processes may, each its own sites."""
    write_site(root, f"checkpoint/{slot}/{site}", sums, "float64")


def use_slot(root: zarr.Group, slot: int, sites: Iterable[str], where: dict[str, Any]) -> None:
    """Make a slot the checkpoint: it holds `sites`; `where` the run is (its keys are the caller's)."""
    schema.put_attributes(root, {**root.attrs, "checkpoint": {"slot": slot, "sites": list(sites), **where}})


def read_checkpoint(root: zarr.Group) -> dict[str, Any] | None:
    """Where the run is, with the `slot` and its `sites`; None where nothing was stored."""
    state: Any = root.attrs.get("checkpoint")
    return state or None


def read_sums(root: zarr.Group, slot: int, site: str) -> SiteData:
    """The sums of one site in a slot. StoreError if they are damaged."""
    return read_site(root, f"checkpoint/{slot}/{site}")


def begin_half(root: zarr.Group) -> None:
    """Begin the halves of a pass; those of the passes before are in the moments."""
    schema.create_group(root, f"checkpoint/{HALF}")


def write_half(root: zarr.Group, site: str, sums: SiteData) -> None:
    """Store the moments of one site as they stand, from its sums so far; several processes may, each its own sites.

    Nothing is stored of a site whose moments leave float32's range.
    """

    def mean(values: Tensor) -> Tensor:
        return (values / sums.count).float()

    def means(panels: list[Tensor]) -> list[Tensor]:
        return [mean(panel) for panel in panels]

    moments = replace(
        sums,
        mean=mean(sums.mean),
        second_moment=means(sums.second_moment) if sums.second_moment else None,
        diagonal=mean(sums.diagonal) if sums.diagonal is not None else None,
        outputs={layer: means(panels) for layer, panels in sums.outputs.items()} if sums.outputs else None,
        sample=None,
    )
    if all(_in_range(values) for name, values in moments.arrays().items() if name != "mean"):
        write_site(root, f"checkpoint/{HALF}/{site}", moments, HALF_DTYPE)


def _in_range(values: Tensor | list[Tensor]) -> bool:
    """Whether float32 holds an array: finite, and its largest magnitude far from the smallest numbers."""
    parts = [values] if isinstance(values, Tensor) else values
    largest = torch.stack([part.abs().max() for part in parts]).max()
    return bool(torch.isfinite(largest)) and not 0 < largest < _SMALL


def read_half(root: zarr.Group, site: str) -> SiteData | None:
    """What `write_half` stored of a site, None where it did not."""
    try:
        schema.child(root, f"checkpoint/{HALF}/{site}")
    except KeyError:
        return None
    return read_site(root, f"checkpoint/{HALF}/{site}")


def finish(root: zarr.Group, attrs: Mapping[str, Any]) -> None:
    """Remove the slots, then set root attributes, with a hash of all sites, and forget the checkpoint in one step.

    By then the checkpoint names no sites, so a run that is killed between the two steps does not look for the slots.
    """
    seal = seal_sites(root)
    sync(root.store.delete_dir("checkpoint"))
    schema.remove_partial(root)
    kept = {name: value for name, value in root.attrs.items() if name not in ("checkpoint", "removed")}
    schema.put_attributes(root, {**kept, **attrs, "moments": seal})


def abandon(root: zarr.Group, before: Mapping[str, Any]) -> None:
    """Take a calibration out of a store that held bases only: root attributes as they were `before`, no moments."""
    schema.put_attributes(root, dict(before))
    for name in ("moments", "checkpoint"):
        sync(root.store.delete_dir(name))
    schema.remove_partial(root)
