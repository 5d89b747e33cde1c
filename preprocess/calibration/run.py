"""Which calibration a store holds: what determines its result, and whether a store that is there is of it."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ... import __version__
from ...errors import PrepError
from ...store import Store, open_store
from ...store.checkpoint import read_checkpoint
from ...store.format.schema import content_hash
from ...store.staging import beside, resolved
from ...store.version1 import is_unfinished
from ..corpus.source import Source, Text
from ..hub import absolute_if_local
from ..model import loading
from ..model.network import Network
from ..options import CovarianceOptions

_ARCHITECTURE = ("id", "revision", "config_hash")
_AMOUNT = ("num_sequences", "tokens", "tokens_read", "hash", "mixture")  # of a corpus: how much of the data was taken
_FOLLOWS = ("corpus tokens:", "corpus tokens_read:", "corpus hash:")  # from other options
_WEIGHTS = "weights"  # entry of the model's description: a hash over those of all calibrated layers


@dataclass(frozen=True)
class Run:
    """What determines a calibration: model, corpus and options, as the root attributes of its store keep them.

    begins: the hash of the first so many sequences of the corpus, None for batches.
    files: names, sizes and times of the checkpoint's files, by which a later run recognises them without reading them.
    The model is described in full when it is loaded, see `loaded`.
    """

    model: dict[str, Any]
    corpus: dict[str, Any]
    options: dict[str, Any]
    files: str | None
    revision: str | None = None  # of the model, if one was asked for
    begins: Callable[[int], str] | None = None
    started: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))

    @classmethod
    def of(cls, options: CovarianceOptions, source: Source) -> Run:
        """The run that the options ask for, with what is known before the model is loaded."""
        chosen = {name: getattr(options, name) for name in ("layers", "moment", "moment_dtype", "compat")}
        chosen |= {"targets": list(options.targets), "exclude": list(options.exclude)}
        chosen |= {"products": options.products} if options.products != "auto" else {}
        chosen |= {"keep_tokens": options.keep_tokens} if options.keep_tokens else {}
        files = None
        if isinstance(options.model, str):
            name = absolute_if_local(options.model)
            config = loading.load_config(name, options.revision, options.trust_remote_code)
            known = {"id": name, "revision": options.revision, "config_hash": loading.config_hash(config)}
            chosen["dtype"] = loading.resolved_dtype(
                options.dtype, config, options.device, options.device_map, options.max_memory
            )
            files = loading.checkpoint_stamp(name, config)
        else:
            known = {"id": None, "revision": None, "config_hash": loading.model_hash(options.model)}
            chosen["dtype"] = options.dtype
        begins = source.corpus.hash_of if isinstance(source, Text) else None
        return cls(known, source.about, chosen | source.options, files, options.revision, begins)

    def loaded(self, network: Network) -> Run:
        """The run with the loaded model's class, dtype, revision and a hash of its weights, if all are known."""
        described = loading.describe(network.module, self.model["id"], self.model["revision"])
        layers = sorted(layer for site in network.sites for layer in site.members)
        known = network.weights
        hashes = [f"{layer} {known[layer]['weight_hash']}\n" for layer in layers if layer in known]
        weights = content_hash(hashes) if len(hashes) == len(layers) else None
        return replace(self, model={**described, _WEIGHTS: weights})

    def attributes(self) -> dict[str, Any]:
        """The root attributes of a store that this run begins."""
        return {
            "model": self.model,
            "corpus": self.corpus,
            "options": self.options,
            "prep_version": __version__,
            "id": self.id(self.corpus),
            "status": "incomplete",
            "run": {"host": platform.node(), "started": self.started, "files": self.files},
        }

    def id(self, corpus: dict[str, Any]) -> str:
        """Hash of what determines the moments; corpus: as it is known at the end."""
        model = {**{name: self.model[name] for name in _ARCHITECTURE}, "revision": self.revision}
        return content_hash([json.dumps({"model": model, "corpus": corpus, "options": self.options}, sort_keys=True)])

    def differences(self, store: Store) -> list[str]:
        """How the run that a store describes differs from this one; for a store of bases only, how its model does.

        A complete store of fewer sequences differs where the corpus does not begin with them.
        """
        model, options = (
            {**self.model, "revision": self.revision},
            {"products": None, "keep_tokens": None, **self.options},
        )
        corpus = {"label_mask": None, "answer_from": None, **self.corpus}
        wanted = {"model": model, "corpus": corpus, "options": options}
        there = {**store.attrs, **_removed(store)}
        if there["corpus"] is None:
            wanted = {"model": {name: wanted["model"][name] for name in _ARCHITECTURE}}
        different = []
        if fewer := self._fewer(store):
            wanted["corpus"] = {name: value for name, value in corpus.items() if name not in _AMOUNT}
            if not self.growth(store):
                different.append(f"corpus: the data does not begin with the {fewer} sequences calibrated on")
        for section, values in wanted.items():
            for key, value in values.items():
                known = there[section].get(key)
                unknown = (key in ("revision", _WEIGHTS) and value is None) or (key == _WEIGHTS and known is None)
                if known != value and not unknown:
                    different.append(f"{section} {key}: {known!r} there, {value!r} asked for")
        return different

    def growth(self, store: Store) -> int:
        """The number of sequences of a complete store with which the corpus begins and goes on; 0 for any other."""
        fewer = self._fewer(store)
        same = fewer and self.begins is not None and self.begins(fewer) == store.attrs["corpus"].get("hash")
        return fewer if same else 0

    def _fewer(self, store: Store) -> int:
        """The number of sequences of a complete store if more are asked for, otherwise 0."""
        known = (store.corpus or {}).get("num_sequences") if store.status == "complete" else None
        return known if self.begins is not None and known and known < self.corpus["num_sequences"] else 0


def finished(options: CovarianceOptions, run: Run) -> Store | None:
    """The existing store, if it is complete, of this run and of the same model files; no lock is taken.

    PrepError where it is of another run, unless it is to be overwritten.
    """
    path, store = find(options, run)
    if store is None or path != Path(resolved(options.store)) or options.overwrite or not is_done(store):
        return None
    same_files = run.files is not None and (store.attrs.get("run") or {}).get("files") == run.files
    return store if same_files else None


def find(options: CovarianceOptions, run: Run) -> tuple[Path, Store | None]:
    """Where this run is kept, and the store that is there: of this run, or of bases that it adds moments to.

    What is to be overwritten, or to grow, stays until the new store is complete, which is built beside it; an
    unfinished store of this run is not overwritten but resumed. PrepError where another run is in the way.
    """
    place = Path(resolved(options.store))
    existing = _store_at(place)
    if existing is None:
        return place, None
    differences = run.differences(existing)
    held = ""
    if existing.corpus is not None:
        held = "moments" if _holds_moments(existing) else ""
    elif _removed(existing):
        held = "bases of removed moments"
    own_batches = held if run.corpus["source"] == "batches" else ""
    if not options.overwrite:
        if differences or own_batches:
            raise PrepError(_refusal(options, differences, own_batches))
        if not run.growth(existing):
            return place, existing
    elif _is_resumable(existing, run):
        return place, existing
    place = beside(place)
    existing = _store_at(place)
    mine = existing is not None and (
        _is_resumable(existing, run)
        or (is_done(existing) and not run.differences(existing) and not run.growth(existing))
    )
    return place, existing if mine else None


def begun_from(options: CovarianceOptions, run: Run) -> tuple[Store | None, int]:
    """The complete store of fewer sequences that this run goes on from, and their number; None and 0 otherwise."""
    store = None if options.overwrite else _store_at(Path(resolved(options.store)))
    first = run.growth(store) if store is not None else 0
    return (store, first) if first else (None, 0)


def growth(options: CovarianceOptions, run: Run) -> int:
    """The number of sequences of the complete store that this run would go on from; 0 where it would not."""
    store, first = begun_from(options, run)
    return first if store is not None and not run.differences(store) else 0


def _is_resumable(store: Store, run: Run) -> bool:
    """Whether a store is an unfinished one of this run."""
    text = run.corpus["source"] != "batches" and not is_unfinished(store.root)
    return text and store.status != "complete" and store.corpus is not None and not run.differences(store)


def _removed(store: Store) -> dict[str, Any]:
    """Corpus, options and id of moments that `prep remove` took out of a store."""
    return store.attrs.get("removed") or {}


def _holds_moments(store: Store) -> bool:
    """Whether anything would be lost if a calibration were begun anew."""
    return store.status == "complete" or read_checkpoint(store.root) is not None


def is_done(store: Store) -> bool:
    """Whether a store of this run needs nothing more."""
    return store.status == "complete" and store.corpus is not None


def _store_at(path: Path) -> Store | None:
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return None
    return open_store(path)


def _refusal(options: CovarianceOptions, differences: list[str], own_batches: str) -> str:
    """own_batches: what the store holds that batches cannot be compared with."""
    if own_batches:
        return (
            f"{options.store} holds {own_batches}, and batches cannot be compared with theirs: "
            "name another store, or replace it with overwrite=True"
        )
    if all(one.startswith(f"model {_WEIGHTS}") for one in differences):
        return other_weights(options)
    shown = [one for one in differences if not one.startswith(_FOLLOWS)] or differences
    other_text = all(one.startswith("corpus ") for one in differences)
    joined = " (`prep pool` joins the two; more sequences of the same text extend it)" if other_text else ""
    return (
        f"{options.store} holds a run with other options ({'; '.join(shown)}): "
        f"name another --store{joined}, or replace it with --overwrite"
    )


def other_weights(options: CovarianceOptions) -> str:
    """The line for a store of another checkpoint."""
    return (
        f"{options.store} was made from other weights than {options.model} has now: "
        "name another --store, or replace it with --overwrite"
    )
