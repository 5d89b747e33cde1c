"""Where a calibration stands by what is in its place: nothing, a state to go on from, or all that was asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ...errors import PrepError
from ...store import Store, open_store
from ...store.checkpoint import abandon, read_checkpoint
from ...store.format.schema import attributes, child, local_path
from ...store.format.untrusted import MOMENTS, SITE
from ...store.staging import remove
from ...store.version1 import is_unfinished
from ..options import CovarianceOptions
from ..progress import say
from .run import Run, begun_from, find, is_done, other_weights


@dataclass(frozen=True)
class State:
    """path: where the run is kept; begun: it is there; complete: nothing is left to do.

    slot: of the checkpoint, with the sums of `sites`; done: sites whose moments are written; batches: how many of them
    are in the sums; first: how many sequences of a smaller store they go on from.
    """

    path: str
    begun: bool = False
    complete: bool = False
    slot: int = 0
    sites: tuple[str, ...] = ()
    done: tuple[str, ...] = ()
    batches: int = 0
    first: int = 0

    def base(self, options: CovarianceOptions) -> Store | None:
        """The smaller store, which stays in place until the run is complete; None where the run begins with nothing."""
        return open_store(options.store) if self.first else None


def look(options: CovarianceOptions, run: Run, sites: int, quiet: bool) -> tuple[State, Store | None]:
    """The state, and the store that is there, said in a line where the run is not new. sites: how many it has.

    For the holder of the lock. PrepError where another run is in the way.
    """
    path, existing = find(options, run)
    base, first = begun_from(options, run)
    new = State(str(path), first=first)
    if base is not None:
        lost = f"; its bases ({', '.join(base.bases)}), made of these, go then" if base.bases else ""
        more = f"and serves them until {run.corpus['num_sequences']} are in"
        say(f"{options.store} goes on after its {first} sequences, {more}{lost}", quiet)
    if existing is None:
        return new, None
    if is_done(existing):
        say(f"{options.store} is complete and was made with the same options: nothing to do", quiet)
        return replace(new, begun=True, complete=True), existing
    if existing.status == "complete":  # bases only, which are kept
        return new, existing
    known = read_checkpoint(existing.root)
    if known is None or known.get("first", 0) != first:
        say(f"{options.store} is incomplete and holds no checkpoint: begun anew", quiet)
        return new, existing
    if is_unfinished(existing.root):
        raise PrepError(
            f"{options.store} is an unfinished calibration of format version 1: finish it with the prep that began it, "
            "or begin anew with --overwrite"
        )
    done = f"{len(known['done'])} of {sites} sites are done"
    say(f"{options.store} is incomplete: resumed after {known['batches']} batches, {done}", quiet)
    return replace(new, begun=True, **_fields(known)), existing


def check_done(state: State, options: CovarianceOptions, weights: Mapping[str, Mapping[str, Any]]) -> None:
    """PrepError where moments of an unfinished store are of other weights than those that are known: layer -> record.

    A store that was begun block by block knows the weights of the blocks that are done, and not yet of all.
    """
    if state.done and not state.complete:
        for layer, record in stored_weights(open_store(state.path), state.done).items():
            if layer in weights and weights[layer]["weight_hash"] != record["weight_hash"]:
                raise PrepError(other_weights(options))


def stored_weights(store: Store, done: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What a store, which may be unfinished, says of the weights of the sites that are done: layer -> record."""
    attrs = attributes(child(store.root, "moments"), {**MOMENTS, "records": {str: SITE}})
    # not among the sites are experts that no token reached
    members = [attrs["records"][site]["members"] for site in done if site in attrs["sites"]]
    return {layer: record for one in members for layer, record in one.items()}


def _fields(known: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of the state."""
    return {
        "slot": known["slot"],
        "sites": tuple(known["sites"]),
        "done": tuple(known["done"]),
        "batches": known["batches"],
    }


def undo(path: str, existing: Store | None) -> None:
    """After an error, put back what was there before the run, unless a state was stored from which it can go on.

    existing: the store that was there. For the holder of the lock, in the process that began the store.
    """
    root = open_store(path, "r+").root
    if read_checkpoint(root) is not None:
        return
    if existing is None:
        remove(local_path(path))
    elif existing.corpus is None:
        abandon(root, existing.attrs)
