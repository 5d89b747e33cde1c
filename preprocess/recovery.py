"""The store side of a calibration: it begins the store, keeps the state of an unfinished run, and takes it up again.

The store is touched when there is something to keep: at the first checkpoint or when a pass is done.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import zarr
from torch import nn

from ..store import Store, begin_moments, create_store, open_store, write_site
from ..store.checkpoint import finish, read_checkpoint, write_checkpoint
from ..store.errors import PrepError
from ..store.moments import skip_sites
from ..store.schema import put_attributes
from .calibration import site_members
from .moments import SiteMoments
from .progress import say
from .sites import Site

CHECKPOINT_SHARE = 0.1  # of the time may go into writing checkpoints: large states are written less often than asked


class Interrupted(PrepError):
    """A signal ended the run after its state was stored; `exit_code` is the shell's for that signal."""

    exit_code = 130


class Recovery:
    """Where a run is: `part` (pass number) and `batches` (done in that pass), and how to get there again."""

    def __init__(
        self,
        location: str | Path,
        existing: Store | None,
        attrs: dict[str, Any],
        passes: Sequence[Sequence[Site]],
        skipped: Mapping[str, str],
        every: float,
        quiet: bool,
    ):
        self._location, self._existing, self._attrs, self._every = location, existing, attrs, every
        self._index = {site.name: list(site.members) for part in passes for site in part}
        self._skipped = skipped
        self._root: zarr.Group | None = None
        self._signal: int | None = None
        self._due = time.monotonic() + every
        self.part = self.batches = 0
        self._sums: dict = {}
        if existing is not None and existing.status != "complete":
            self._resume(quiet)

    def _resume(self, quiet: bool) -> None:
        root = open_store(self._location, "r+").root
        found = read_checkpoint(root)
        if found is None:
            say(f"{self._location} is incomplete and holds no checkpoint: begun anew", quiet)
            return
        where, self._sums = found
        self.part, self.batches, self._root = int(where["part"]), int(where["batches"]), root
        say(f"{self._location} is incomplete: resumed in pass {self.part + 1} after {self.batches} batches", quiet)

    def restore(self, totals: Mapping[str, SiteMoments]) -> None:
        """Put the stored sums of the pass under way into its accumulators."""
        for site, sums in self._sums.items():
            totals[site].restore(sums)
        self._sums = {}

    def batch_done(self, batches: int, totals: Mapping[str, SiteMoments]) -> None:
        """Note progress; store the state if it is due, or before raising Interrupted if a signal came."""
        self.batches = batches
        if self._signal is None and time.monotonic() < self._due:
            return
        begun = time.monotonic()
        where = {"part": self.part, "batches": batches}
        write_checkpoint(self._begin(), {site: total.sums() for site, total in totals.items()}, where)
        cost = time.monotonic() - begun
        self._due = time.monotonic() + max(self._every, cost / CHECKPOINT_SHARE)
        if self._signal is not None:
            stopped = Interrupted(f"stopped after {batches} batches, which are stored: the same command resumes")
            stopped.exit_code = 128 + self._signal
            raise stopped

    def part_done(
        self, sites: Sequence[Site], totals: dict[str, SiteMoments], layers: Mapping[str, nn.Module], dtype: str
    ) -> None:
        """Write the moments of a finished pass, giving up its accumulators one by one.

        Experts that no token was routed to are listed as skipped.
        """
        idle = [site.name for site in sites if site.routed and not totals[site.name].count]
        for site in sites:
            if site.name not in idle:
                totals[site.name].need_tokens()
        root = self._begin()
        group: Any = root["moments"]
        skip_sites(root, dict.fromkeys(idle, "no token of the data was routed to it"))
        for site in sites:
            if site.name in idle:
                continue
            write_site(group, site.name, totals.pop(site.name).finish(site_members(site, layers)), dtype)
        self.part, self.batches = self.part + 1, 0
        write_checkpoint(root, {}, {"part": self.part, "batches": 0})

    def finish(self, attrs: dict[str, Any]) -> None:
        """Mark the store complete, with attributes known only now."""
        finish(self._begin(), {"status": "complete", **attrs})

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Inside, SIGINT and SIGTERM let the batch end and store the state; a second one ends the process as ever."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, _frame: FrameType | None) -> None:
            self._signal = number
            signal.signal(number, before[number])

        before: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in before:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _begin(self) -> zarr.Group:
        """The store's root for writing: made now if it was not there."""
        if self._root is None:
            if self._existing is None:
                self._root = create_store(self._location, self._attrs).root
            else:  # incomplete without a checkpoint, or with bases only, which are kept
                self._root = open_store(self._location, "r+").root
                put_attributes(self._root, {**self._root.attrs, **self._attrs})
            begin_moments(self._root, self._index, self._skipped)
        return self._root
