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

from ...errors import PrepError
from ...store import Store, begin_moments, create_store, open_store, write_site
from ...store.checkpoint import begin_slot, finish, read_checkpoint, read_sums, use_slot, write_sums
from ...store.format.schema import put_attributes
from ...store.moments import skip_sites
from ..distributed import ALONE, Ranks
from ..model.sites import Site
from ..numerics.accumulators import SiteMoments
from ..progress import say
from .hooks import site_members

CHECKPOINT_SHARE = 0.1  # of the time may go into writing checkpoints: large states are written less often than asked


class Interrupted(PrepError):
    """A signal ended the run after its state was stored; `exit_code` is the shell's for that signal."""


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
        ranks: Ranks = ALONE,
    ):
        self._location, self._existing, self._attrs, self._every = location, existing, attrs, every
        self._ranks = ranks
        self._index = {site.name: list(site.members) for part in passes for site in part}
        self._skipped = skipped
        self._root: zarr.Group | None = None
        self._signal: int | None = None
        self._due = time.monotonic() + every
        found = ranks.first(lambda: self._resume(quiet))
        self._begun = found is not None
        where = found or {"slot": 0, "sites": [], "part": 0, "batches": 0}
        self._slot, self._stored = int(where["slot"]), list(where["sites"])
        self.part, self.batches = int(where["part"]), int(where["batches"])

    def _resume(self, quiet: bool) -> dict[str, Any] | None:
        """What the store says of the state that it holds."""
        if self._existing is None or self._existing.status == "complete":
            return None
        where = read_checkpoint(self._existing.root)
        if where is None:
            say(f"{self._location} is incomplete and holds no checkpoint: begun anew", quiet)
            return None
        done = f"in pass {int(where['part']) + 1} after {int(where['batches'])} batches"
        say(f"{self._location} is incomplete: resumed {done}", quiet)
        return where

    def restore(self, totals: Mapping[str, SiteMoments]) -> None:
        """Put the stored sums of the pass under way into the accumulators that this rank keeps."""
        if self._ranks.writes:
            for site in self._stored:
                if totals[site].kept:
                    totals[site].restore(read_sums(self._begin(), self._slot, site))
        self._stored = []

    def batch_done(self, batches: int, totals: Mapping[str, SiteMoments]) -> None:
        """Note progress; store the state if it is due, or before raising Interrupted if a signal came."""
        self.batches = batches
        due = self._ranks.rank == 0 and time.monotonic() >= self._due
        stop, store = self._ranks.most(self._signal or 0, due)
        if not stop and not store:
            return
        begun = time.monotonic()
        self._checkpoint(totals)
        cost = time.monotonic() - begun
        self._due = time.monotonic() + max(self._every, cost / CHECKPOINT_SHARE)
        if stop:
            stopped = Interrupted(f"stopped after {batches} batches, which are stored: the same command resumes")
            stopped.exit_code = 128 + stop
            stopped.silent = self._ranks.rank > 0
            raise stopped

    def _checkpoint(self, totals: Mapping[str, SiteMoments]) -> None:
        """Store the sums of the sites under way, each by the rank that keeps it."""
        root, counts = self._begin(), self._counts(totals)
        slot = self._ranks.first(lambda: begin_slot(root))
        for site, total in totals.items():
            if total.kept:
                sums = self._ranks.over_nodes(total.sums(), counts[site])
                if self._ranks.writes:
                    write_sums(root, slot, site, sums)
        self._ranks.wait()
        if self._ranks.rank == 0:
            use_slot(root, slot, totals, {"part": self.part, "batches": self.batches})

    def part_done(
        self, sites: Sequence[Site], totals: dict[str, SiteMoments], layers: Mapping[str, nn.Module], dtype: str
    ) -> int:
        """Write the moments of a finished pass, giving up its accumulators one by one; the tokens of its fullest site.

        Experts that no token was routed to are listed as skipped.
        """
        counts = self._counts(totals)
        idle = [site.name for site in sites if not counts[site.name]]
        lost = [site.name for site in sites if site.name in idle and not site.routed]
        if lost:
            raise PrepError(f"no token reached {lost[0]}: use more data or leave it out with --exclude")
        root = self._begin()
        self._ranks.first(lambda: skip_sites(root, dict.fromkeys(idle, "no token of the data was routed to it")))
        for site in sites:
            total = totals.pop(site.name)
            if site.name not in idle and total.kept:
                total.restore(self._ranks.over_nodes(total.sums(), counts[site.name]))
                if self._ranks.writes:
                    write_site(root["moments"], site.name, total.finish(site_members(site, layers)), dtype)
        self._ranks.wait()
        self.part, self.batches = self.part + 1, 0
        if self._ranks.rank == 0:
            use_slot(root, begin_slot(root), (), {"part": self.part, "batches": 0})
        return max(counts.values())

    def _counts(self, totals: Mapping[str, SiteMoments]) -> dict[str, int]:
        """Tokens of every site, of all ranks."""
        return self._ranks.added({site: total.count for site, total in totals.items() if total.kept})

    def finish(self, attrs: dict[str, Any]) -> None:
        """Mark the store complete, with attributes known only now."""
        self._ranks.first(lambda: finish(self._begin(), {"status": "complete", **attrs}))

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

    def _begin(self) -> Any:
        """The store's root for writing, made now if it was not there; None on a node that does not write."""
        if not self._begun:
            self._ranks.first(self._create)
            self._begun = True
        if self._root is None and self._ranks.writes:
            self._root = open_store(self._location, "r+").root
        return self._root

    def _create(self) -> None:
        if self._existing is None:
            root = create_store(self._location, self._attrs).root
        else:  # incomplete without a checkpoint, or with bases only, which are kept
            root = open_store(self._location, "r+").root
            put_attributes(root, {**root.attrs, **self._attrs})
        begin_moments(root, self._index, self._skipped)
