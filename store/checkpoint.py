"""The state of an unfinished calibration: two slots under /checkpoint, of which the root attribute names the good one.

A slot is written in full before the root's metadata file, replaced in one step, points to it: whenever the process is
killed, one slot is whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import zarr
from zarr.core.sync import sync

from . import schema
from .moments import SiteData, read_site, write_site


def write_checkpoint(root: zarr.Group, sums: Mapping[str, SiteData], where: dict[str, Any]) -> None:
    """Store the sums of the sites under way and `where` the run is (its keys are the caller's)."""
    before: Any = root.attrs.get("checkpoint") or {}
    slot = 1 - int(before.get("slot", 1))
    group = root.create_group(f"checkpoint/{slot}", overwrite=True)
    for site, data in sums.items():
        write_site(group, site, data, "float64")
    state = {"slot": slot, "sites": list(sums), **where}
    schema.put_attributes(root, {**root.attrs, "checkpoint": state})


def read_checkpoint(root: zarr.Group) -> tuple[dict[str, Any], dict[str, SiteData]] | None:
    """Where the run is and its sums; None where nothing was stored. StoreError if the slot is damaged."""
    found: Any = root.attrs.get("checkpoint")
    if not found:
        return None
    if not found["sites"]:
        return found, {}
    group = schema.child(root, f"checkpoint/{found['slot']}")
    return found, {site: read_site(group, site) for site in found["sites"]}


def finish(root: zarr.Group, attrs: Mapping[str, Any]) -> None:
    """Remove the slots, then set root attributes and forget the checkpoint in one step.

    By then the checkpoint names no sites, so that a run killed between the two does not miss the slots.
    """
    sync(root.store.delete_dir("checkpoint"))
    schema.remove_partial(root)
    kept = {name: value for name, value in root.attrs.items() if name != "checkpoint"}
    schema.put_attributes(root, {**kept, **attrs})
