"""One calibration from its first byte on disk to its last: lock, room, signals, progress, checkpoints, moments.

The store is touched when there is something to keep: at the first checkpoint or when a pass is done. What is done, what
is under way and what is left follows from the store alone, so a run may go on under another memory budget.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ...errors import Interrupted, PrepError, StoreError
from ...precision import exact
from ...store import MomentWriter, SiteData, Store, begin_moments, create_store, open_store
from ...store.checkpoint import begin_half, begin_slot, finish, read_sums, use_slot, write_half, write_sums
from ...store.format.schema import DTYPES, FORMAT_VERSION, disk_guard, put_attributes
from ...store.lock import writer_lock
from ...store.moment_writer import SiteDone, skip_sites
from ...store.moments import IDLE
from ...store.staging import put_in_place, resolved
from ..corpus.source import Source
from ..distributed import World
from ..model.forward import evaluating
from ..model.network import Network
from ..model.sites import Site
from ..numerics.accumulators import moments_of
from ..options import CovarianceOptions
from ..progress import Progress, say
from .devices import place_sums
from .part import Batch, Part
from .plan import Plan, make_plan, tokens_kept, too_few_tokens
from .run import Run
from .scratch import folder_of, remove
from .signals import Signals
from .state import State, check_done, look, undo
from .sums import stored_sums, whole_sums, with_half
from .writers import Writers

CHECKPOINT_SHARE = 0.1  # of the time may go into writing checkpoints: large states are written less often than asked


class Calibration:
    """The run of `options` on a network: `with` it, `parts` are to be filled with `batches` and written.

    Each of several processes is given its own batches and keeps the sums of some sites. Entering takes the lock
    and begins or resumes. PrepError where the store is being written, holds another run, or the disk has
    no room; Interrupted after a signal, when the state is stored.
    """

    def __init__(self, options: CovarianceOptions, run: Run, network: Network, source: Source, world: World):
        self._options, self._network, self._source, self._world = options, network, source, world
        self._run = run.loaded(network)
        self._quiet = options.quiet or world.rank > 0
        self._signals, self._seen = Signals(), dict[str, int]()  # tokens by site
        self._root: Any = None
        self._created = False  # by this process

    def __enter__(self) -> Calibration:
        with contextlib.ExitStack() as stack:
            stack.enter_context(disk_guard(self._options.store))
            state = self._world.on_rank_zero(self._open, stack)
            self._path, self._begun, self._complete = Path(state.path), state.begun, state.complete
            self._slot, self._stored = state.slot, set(state.sites)
            self._done, self._batches = set(state.done), state.batches
            self._first, self._base = state.first, state.base(self._options)
            self._grown = None if self._base is None else self._base.moments
            self._source = self._source.after(state.first)
            sources = (self._network, self._source, self._options, self._world)
            self._devices, self._limit = ({}, 0) if self._complete else place_sums(*sources)
            plan = self._world.on_all(self._plan)
            self._passes = plan.passes
            stack.enter_context(disk_guard(self._path, plan.disk if self._world.writes else 0))
            stack.enter_context(evaluating(self._network.module))
            stack.enter_context(exact())
            if self._source.resumable:
                stack.enter_context(self._signals.noted())
            if self._passes:
                self._progress = stack.enter_context(self._bar())
            self._started = time.monotonic()
            self._due = self._started + self._every
            self._held = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        try:
            if error is not None and self._created:
                with contextlib.suppress(StoreError, OSError):  # the first error is the one to tell
                    undo(str(self._path), self._existing)
        finally:
            suppressed = self._held.__exit__(kind, error, trace)
        return suppressed

    def parts(self) -> Iterator[Part]:
        """The passes that are left, the first one with the sums that an interrupted run has stored."""
        for sites in self._passes:
            yield self._part(sites, whole=len(sites) == len(self._network.sites))

    def _part(self, sites: Sequence[Site], whole: bool) -> Part:
        part = Part(
            self._network,
            sites,
            whole=whole,
            compat=self._options.compat,
            world=self._world,
            devices=self._devices,
            exact=self._options.products == "exact",
            sampled=self._options.keep_tokens,
        )
        self._restore(part)
        return part

    def batches(self, part: Part) -> Iterator[Batch]:
        """The batches of this process that `part` has not seen; when the next one is asked for, one has been added."""
        numbers = itertools.count(self._batches + self._world.rank, self._world.size)
        own = self._world.share(self._source.read(self._batches))
        for number, inputs in zip(numbers, own, strict=False):
            if inputs is None:  # the last round has none for this process
                yield Batch(number, self._source.example(), None)
            else:
                source = self._source
                yield Batch(number, inputs, source.masks(inputs), source.keys(number), source.labels(inputs))
            self._added(number, part)

    def write(self, part: Part) -> None:
        """Write the moments of a finished pass, giving up its sums one by one.

        Experts that no token was routed to are listed as skipped. PrepError where another site had no token.
        """
        counts = self._counts(part)
        idle = {site.name for site in part.sites if not counts[site.name]}
        lost = [site.name for site in part.sites if site.name in idle and not site.routed]
        if lost:
            raise PrepError(f"no token reached {lost[0]}: use more data or leave it out with --exclude")
        root = self._begin()
        self._world.on_rank_zero(skip_sites, root, dict.fromkeys(sorted(idle), IDLE))
        writer = MomentWriter(root, self._options.moment_dtype) if root is not None else None
        done: list[SiteDone] = []
        with Writers() as writers:
            for site in part.sites:
                sums = part.sums.pop(site.name)
                if site.name in idle:
                    continue
                if (data := whole_sums(part, site.name, sums, counts, self._world)) is not None:
                    writers.submit(self._write_site, root, writer, site, data, done)
        noted = list(self._world.gather_iter(done))
        if writer is not None and self._world.rank == 0:
            for one in noted:
                writer.note(one)
            writer.flush()
        self._world.barrier()
        self._done |= {site.name for site in part.sites}
        self._batches, self._seen = 0, self._seen | counts
        if self._world.rank == 0:
            self._use(begin_slot(root), ())

    def _write_site(self, root: Any, writer: MomentWriter, site: Site, sums: SiteData, done: list[SiteDone]) -> None:
        members = {name: self._network.weights[name] for name in site.members}
        moments = moments_of(site.name, sums, members, DTYPES[self._options.moment_dtype])
        moments = with_half(root, site.name, moments, self._grown) if self._options.halves else moments
        done.append(writer.put(site.name, moments))

    def store(self) -> Store | None:
        """The finished store, in the place that was asked for, on the process that wrote it; None on the others."""
        self._world.on_rank_zero(self._finish)
        warning = too_few_tokens(self._network, self._seen)
        if warning:
            say(warning, self._quiet)
        return open_store(self._options.store) if self._world.rank == 0 else None

    # What is there

    def _open(self, stack: contextlib.ExitStack) -> State:
        """Take the lock and look."""
        stack.enter_context(writer_lock(self._options.store, self._options.break_lock))
        state, self._existing = look(self._options, self._run, len(self._network.sites), self._quiet)
        check_done(state, self._options, self._network.weights)
        return state

    def _plan(self) -> Plan:
        """The passes that are left."""
        left = [] if self._complete else [site for site in self._network.sites if site.name not in self._done]
        options = self._options
        budget = self._limit if self._devices else options.budget
        plan = make_plan(
            left,
            self._network.kinds,
            budget,
            options.moment_dtype,
            self._stored,
            self._devices,
            halves=options.halves and (self._source.half > 0 or self._first > 0),
            sampled=tokens_kept(options, self._source),
            samples=1 if self._devices else self._world.local_size,
            blocks=self._network.blocks,
        )
        if len(plan.passes) > 1 and self._source.once:
            raise PrepError(
                f"{len(plan.passes)} passes are needed and an iterator gives its batches once: "
                "give batches= as a list or a DataLoader, or raise memory_budget"
            )
        if not any(site.name in self._stored for site in (plan.passes or ((),))[0]):
            self._batches = 0
        return plan

    def _bar(self) -> Progress:
        source = self._source
        total, ready = source.total * len(self._passes), source.size(0, self._batches)
        return Progress("covariance", total, source.unit, self._quiet, ready)

    def _restore(self, part: Part) -> None:
        """Put the stored sums into those of their owners; they are of the first part only.

        Other parts begin with the moments of the store that grows.
        """
        stored = self._stored & part.sums.keys()
        if self._world.writes:
            for name in part.sums:
                if part.owners[name] == self._world.rank and (sums := self._begun_sums(name, stored)) is not None:
                    part.sums[name].restore(sums)
        self._stored = set()
        if self._first and not stored and self._options.halves and not self._source.half:
            self._keep_half(part)

    def _begun_sums(self, site: str, stored: set[str]) -> SiteData | None:
        if site in stored:
            return read_sums(self._begin(), self._slot, site)
        return stored_sums(self._grown, site) if self._grown is not None and not stored else None

    # What is kept

    @property
    def _every(self) -> float:
        """Seconds between checkpoints; infinite for the caller's own batches, which cannot be resumed."""
        return self._options.every if self._source.resumable else float("inf")

    def _added(self, number: int, part: Part) -> None:
        """Note progress; store the state if it is due, or before raising Interrupted if a signal came."""
        begin = number - self._world.rank
        self._batches = self._source.end(begin + self._world.size)
        self._progress.advance(self._source.size(begin, self._batches))
        if self._options.halves and begin < self._source.half <= self._batches < self._source.count:
            self._keep_half(part)
        due = self._world.rank == 0 and time.monotonic() >= self._due
        signal, store = self._world.max(self._signals.number, due)
        if not signal and not store:
            return
        begun = time.monotonic()
        self._checkpoint(part)
        cost = time.monotonic() - begun
        self._due = time.monotonic() + max(self._every, cost / CHECKPOINT_SHARE)
        if signal:
            done = f"stopped after {self._batches} batches, which are stored: the same command resumes"
            raise Interrupted(done, signal, silent=self._world.rank > 0)

    def _checkpoint(self, part: Part) -> None:
        """Store the sums under way, each by the process that keeps it."""
        root, counts = self._begin(), self._counts(part)
        slot = self._world.on_rank_zero(begin_slot, root)
        with Writers() as writers:
            for name, sums in part.sums.items():
                if (data := whole_sums(part, name, sums, counts, self._world)) is not None:
                    writers.submit(write_sums, root, slot, name, data)
        self._world.barrier()
        if self._world.rank == 0:
            self._use(slot, part.sums)

    def _keep_half(self, part: Part) -> None:
        """Store the moments of the tokens so far. A run that resumes from before this point comes here again."""
        root, counts = self._begin(), self._counts(part)
        self._world.on_rank_zero(begin_half, root)
        with Writers() as writers:
            for name, sums in part.sums.items():
                if not counts[name]:
                    continue
                if (data := whole_sums(part, name, sums, counts, self._world, sampled=False)) is not None:
                    writers.submit(write_half, root, name, data)
        self._world.barrier()

    def _use(self, slot: int, sites: Any) -> None:
        order = [site.name for site in self._network.sites if site.name in self._done]
        use_slot(self._root, slot, sites, {"done": order, "batches": self._batches, "first": self._first})

    def _counts(self, part: Part) -> dict[str, int]:
        """Tokens of every site, of all processes."""
        return self._world.sum({name: sums.count for name, sums in part.sums.items() if sums.kept})

    def _begin(self) -> Any:
        """The store's root for writing, made now if it was not there; None on a node that does not write."""
        if not self._begun:
            self._world.on_rank_zero(self._create)
            self._begun = True
        if self._root is None and self._world.writes:
            self._root = open_store(self._path, "r+").root
        return self._root

    def _create(self) -> None:
        self._created = True
        attrs = self._run.attributes()
        if self._existing is None:
            root = create_store(self._path, attrs).root
        else:  # incomplete without a checkpoint, or with bases only, which are kept
            root = open_store(self._path, "r+").root
            put_attributes(root, {**root.attrs, **attrs, "format_version": FORMAT_VERSION})
        sites = {site.name: dict(zip(site.members, site.shapes, strict=True)) for site in self._network.sites}
        begin_moments(root, sites, self._network.kinds, self._network.skipped)

    def _finish(self) -> None:
        """Mark the store complete, with attributes known only now, and put it where it was asked for."""
        if not self._complete:
            missing = [site.name for site in self._network.sites if site.name not in self._done]
            if missing:
                raise PrepError(f"{missing[0]} has no moments yet: every part that `parts` gives must be written")
            with contextlib.suppress(OSError, PrepError):  # of this run, or left by a killed one block by block
                remove(folder_of(self._options.store))
            corpus = {"tokens": max(self._seen.values(), default=0), **self._source.about}
            run = {**self._run.attributes()["run"], "seconds": round(time.monotonic() - self._started, 3)}
            found = {"model": self._run.model, "corpus": corpus, "id": self._run.id(corpus), "run": run}
            finish(self._begin(), {"status": "complete", **found})
        if self._path != Path(resolved(self._options.store)):
            bases = ", ".join(self._base.bases) if self._base is not None else ""
            put_in_place(self._path, self._options.store)
            if bases:
                say(f"bases {bases} of {self._first} sequences are gone: run `prep decompose` again", self._quiet)
