"""`prep covariance --block-by-block`: each block is loaded once, run over all batches, and freed.

A pass is of one block. What the block gives is kept (scratch.py) and handed to the next one by stubs (model/stack.py);
sums, checkpoints and moments are those of any calibration, so a store may be begun in one way and finished in another.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import torch

from ...errors import Interrupted, PrepError
from ...store import Store, open_store
from ...store.staging import beside, occupied
from ..corpus.source import Source, Text
from ..distributed import ALONE
from ..model.network import Network, weight_record
from ..model.stack import Stack, mapped
from ..options import CovarianceOptions
from ..progress import say
from .job import Calibration
from .part import Batch, Part
from .plan import Plan
from .run import Run
from .scratch import Scratch, folder_of, remove
from .state import stored_weights


class BlockByBlock(Calibration):
    """The run of `options` on a network with a stack: every part has the weights of its block."""

    def __init__(self, options: CovarianceOptions, run: Run, network: Network, source: Source):
        if _made_from_other_files(options, run):  # whether of other weights, too, must be known before
            network.weights.update({name: weight_record(name, layer) for name, layer in network.layers.items()})
        super().__init__(options, run, network, source, ALONE)
        assert network.stack is not None
        self._stack: Stack = network.stack
        self._folder: Path | None = None
        self._keeps = False  # what the block under way gives
        self._count = 0  # of batches, 0 where it is not known yet

    def __enter__(self) -> BlockByBlock:
        super().__enter__()
        self._count = self._source.count
        with contextlib.ExitStack() as stack:
            stack.push(self._held)
            if self._passes:
                of = {"run": self._run.id(self._run.corpus), "files": self._run.files, "first": self._first}
                self._scratch = Scratch(self._folder, of)
                stack.enter_context(self._stack.resident())
            self._held = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        if error is not None and not isinstance(error, Interrupted):
            with contextlib.suppress(OSError, PrepError):  # the first error is the one to tell
                remove(folder_of(self._options.store))
        return super().__exit__(kind, error, trace)

    def parts(self) -> Iterator[Part]:
        """The passes that are left, each with its block in memory, where it stays for all of its own."""
        left = list(self._passes)
        for block, group in itertools.groupby(left, lambda sites: self._network.blocks[sites[0].name]):
            passes = list(group)
            self._prepare(block - 1)
            self._scratch.drop_before(block - 1)
            with self._loaded(block):
                for number, sites in enumerate(passes, 1):
                    self._keeps = number == len(passes) and sites is not left[-1]
                    name = f"block {block + 1} of {len(self._stack.names)}"
                    name += f", pass {number} of {len(passes)}" if len(passes) > 1 else ""
                    self._progress.step(name, self._source.total, self._source.size(0, self._batches))
                    self._complete_outputs(block)
                    yield self._part(sites, whole=self._keeps)

    def batches(self, part: Part) -> Iterator[Batch]:
        """The batches that `part` has not seen, the stack ready for each; what its block gives is kept."""
        block = self._stack.at
        for batch in super().batches(part):
            self._hand(block, batch.number)
            yield batch
            if self._keeps:
                self._scratch.put(block, batch.number, self._stack.made)
        self._count = self._count or self._batches

    def _plan(self) -> Plan:
        plan = super()._plan()
        on_disk = 0 if self._complete else scratch_bytes(plan, self._network, self._source, self._options)
        if on_disk:
            self._folder = folder_of(self._options.store)
            say(f"hidden states, {on_disk / 1e9:.2f} GB, are kept in {self._folder}", self._quiet)
        return replace(plan, disk=plan.disk + on_disk)

    @contextlib.contextmanager
    def _loaded(self, block: int) -> Iterator[None]:
        with self._stack.loaded(block):
            self._network.weigh(self._stack.names[block])
            yield

    def _hand(self, block: int, batch: int) -> None:
        """Give the stack what the block before made of a batch."""
        self._stack.made = None
        if block > 0:
            device = self._stack.device
            self._stack.given = mapped(self._scratch.get(block - 1, batch), lambda x: x.to(device))

    def _prepare(self, block: int) -> None:
        """Make what all blocks up to this one give where it is not there: after a resume, or of those without sites."""
        there = block
        while there >= 0 and not self._has_all(there):
            there -= 1
        for number in range(there + 1, block + 1):
            with self._stack.loaded(number):
                self._fill(number)
            self._scratch.drop_before(number)

    def _complete_outputs(self, block: int) -> None:
        """Make what the block gives for the batches that the part has seen before it was interrupted."""
        if self._keeps and self._batches:
            self._fill(block, self._batches)

    def _fill(self, block: int, count: int | None = None) -> None:
        """Run the block under way over the batches (the first `count`) whose output is not there, without hooks."""
        number = -1
        for number, inputs in enumerate(self._source.read()):
            if number == count:
                return
            if self._signals.number:
                raise Interrupted("stopped: the same command resumes", self._signals.number)
            if not self._scratch.has(block, number):
                self._hand(block, number)
                with torch.no_grad():
                    self._network.forward(inputs)
                self._scratch.put(block, number, self._stack.made)
        self._count = self._count or number + 1

    def _has_all(self, block: int) -> bool:
        return self._count > 0 and all(self._scratch.has(block, number) for number in range(self._count))

    def store(self) -> Store | None:
        """The finished store; the hash of all weights is known now."""
        if not self._complete:
            known = self._network.weights
            for name, record in stored_weights(open_store(self._path), self._done).items():
                known.setdefault(name, record)
            for name in (name for site in self._network.sites for name in site.members):
                if name not in known:  # an expert that no token reached, of a block that was done before a resume
                    known[name] = weight_record(name, self._network.layers[name])
            self._run = self._run.loaded(self._network)
        return super().store()


def hidden_bytes(network: Network, source: Source) -> int:
    """What a block gives for all batches, about; 0 where their number is not known."""
    assert network.stack is not None
    example = network.stack.hidden
    if not isinstance(source, Text):
        return example * source.count
    left = source.corpus.sequences[source.first :]
    tokens = next(iter(source.example().values())).shape[-1]
    return example * len(left) * max(map(len, left), default=0) // tokens


def scratch_bytes(plan: Plan, network: Network, source: Source, options: CovarianceOptions) -> int:
    """What the outputs of two blocks take on disk; 0 where they fit the memory budget beside the sums."""
    kept = hidden_bytes(network, source)
    return 2 * kept if plan.memory + kept > options.budget else 0


def _made_from_other_files(options: CovarianceOptions, run: Run) -> bool:
    """Whether a store is in the place of this run that was not made from the checkpoint's files as they are."""
    stores = [path for path in (options.store, beside(options.store)) if occupied(path)]
    known = [(open_store(path).attrs.get("run") or {}).get("files") for path in stores]
    return any(files is None or files != run.files for files in known)
