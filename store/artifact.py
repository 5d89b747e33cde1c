"""A store: one model's moments and bases with their provenance, in one zarr v3 group.

Root attributes: format, format_version, prep_version, id, model {id, revision, class, config_hash, dtype},
corpus {...} or null, options {...} of the calibration, status, bases [names], run {host, times}. Two equal runs
differ in `run` alone.
"""

from __future__ import annotations

import html
import os
from pathlib import Path
from typing import Any

import zarr
from zarr.errors import BaseZarrError

from ..errors import StoreError
from .bases import Bases
from .format import schema
from .format.untrusted import ROOT
from .moments import Moments
from .staging import check_replaceable, interrupted, place, remove


class Store:
    """A store opened for reading: `.moments[layer]`, `.bases[name][layer]`, `.model`, `.corpus`, `.options`, `.id`."""

    def __init__(self, location: str, root: zarr.Group):
        attrs = dict(root.attrs)
        if attrs.get("format") != schema.FORMAT:
            raise StoreError(f"{location} is a zarr group but not a prep store: name another --store")
        if not isinstance(attrs.get("format_version"), int) or attrs["format_version"] > schema.FORMAT_VERSION:  # type: ignore[operator]
            raise StoreError(
                f"{location} has the format version {attrs.get('format_version')!r:.40}, this prep-bases reads up to "
                f"{schema.FORMAT_VERSION}: upgrade prep-bases"
            )
        self.attrs: dict[str, Any] = schema.attributes(root, ROOT)
        self.location, self.root = location, root

    def __repr__(self) -> str:
        tokens = (self.corpus or {}).get("tokens")
        calibrated = "not calibrated" if tokens is None else f"{tokens:,} tokens"
        return (
            f"Store({self.location!r}, {self.status}, model={self.model['id']!r}, {calibrated}, "
            f"bases={list(Bases(self.root))})"
        )

    def _repr_html_(self) -> str:
        """For notebooks: what it was made of, and its bases."""
        return f"<p><code>{html.escape(repr(self))}</code></p>{Bases(self.root)._repr_html_()}"

    @property
    def id(self) -> str:
        """Hash of what determines the moments: model, corpus and options."""
        return str(self.attrs["id"])

    @property
    def status(self) -> str:
        """`complete`, or `incomplete` while a calibration is under way or was interrupted."""
        return str(self.attrs["status"])

    @property
    def model(self) -> dict[str, Any]:
        """The model's id, revision, class, config_hash and dtype."""
        return self.attrs["model"]

    @property
    def corpus(self) -> dict[str, Any] | None:
        """Source, options, token count and hash of the calibration text; None where nothing was calibrated."""
        return self.attrs.get("corpus")

    @property
    def options(self) -> dict[str, Any] | None:
        """Targets, moment kind, dtypes and batch size of the calibration; None where nothing was calibrated."""
        return self.attrs.get("options")

    @property
    def moments(self) -> Moments:
        """The moments by layer name. StoreError where the store was not calibrated or is not complete."""
        if self.corpus is None:
            raise StoreError(f"{self.location} holds no moments: run `prep covariance --model X --data Y` first")
        if self.status != "complete":
            raise StoreError(f"{self.location} is not complete: run the same `prep covariance` command again")
        try:
            return Moments(schema.child(self.root, "moments"), self.attrs.get("moments"))
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{self.location}/moments is missing or damaged: restore the store from a copy") from error

    @property
    def bases(self) -> Bases:
        """The bases by name, each with a status of its own: they can be read while moments are added to the store.

        StoreError where there is none because the store is not complete.
        """
        bases = Bases(self.root)
        if self.status != "complete" and not bases:
            raise StoreError(f"{self.location} is not complete: run the same `prep covariance` command again")
        return bases


def open_store(location: str | Path, mode: str = "r") -> Store:
    """Open the store at `location`, a path or URL (mode "r", or "r+" to add to it). Reads one metadata file.

    Raises StoreError where there is none, where it is not a prep store, where its format is newer and, with "r+", where
    a link in it leads out of it.
    """
    name, local = str(location), not schema.is_url(location)
    where = place(location) if local and mode != "r" else location
    try:
        root = schema.open_group(where, mode)
    except FileNotFoundError as error:
        if local and os.path.lexists(schema.local_path(location)) and place(location).exists():
            raise StoreError(f"{name} is not a prep store: name another --store") from error
        raise _absent(location) from error
    except (ValueError, KeyError, TypeError, OSError, BaseZarrError) as error:
        raise StoreError(f"{name} cannot be opened as a store ({error}): name another --store") from error
    if local and mode != "r":
        _check_links(place(location))
    return Store(name, root)


def _absent(location: str | Path) -> StoreError:
    left = interrupted(location)
    if left is not None:
        return StoreError(
            f"{location} was being replaced when the process died, and is at {left}: run that command again"
        )
    hint = "run `prep covariance --model X --data Y` first, or name one with --store"
    return StoreError(f"no store at {location}: {hint}")


def _check_links(store: Path) -> None:
    """StoreError that names a link leading out of the store: a writer would follow it."""
    folders = [str(store)]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(folder) as entries:
                inside = list(entries)
        except FileNotFoundError:  # another rank of the job has just removed it
            continue
        except OSError as error:
            raise StoreError(f"{folder} cannot be read ({error.strerror}): check its permissions") from error
        folders += [entry.path for entry in inside if entry.is_dir(follow_symlinks=False)]
        for link in (entry.path for entry in inside if entry.is_symlink()):
            target = os.path.realpath(link)
            if not target.startswith(f"{store}{os.sep}"):
                raise StoreError(f"{link} is a link out of the store, to {target}: put a copy of that in its place")


def create_store(location: str | Path, attrs: dict[str, Any]) -> Store:
    """Begin a store with the given root attributes, removing a store (never anything else) that is there.

    At a URL nothing is ever removed: StoreError where something is.
    """
    where = location
    if not schema.is_url(location):
        check_replaceable(location)
        where = place(location)
        remove(where)
    elif schema.fetch(schema.zarr_store(location, False), "zarr.json", 1) is not None:
        raise StoreError(f"{location} holds something already: name another --store, or make it on a disk and push it")
    own = {"format": schema.FORMAT, "format_version": schema.FORMAT_VERSION, "bases": []}
    return Store(str(location), schema.open_group(where, "w-", own | attrs))
