"""`prep covariance`: stream text through a model and store the second moment of every linear layer's input.

C = E[x x^T] over the real tokens of the corpus, uncentred, with the mean beside it, per site (see sites.py).
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import __version__
from ..store import Store, open_store
from ..store.errors import PrepError
from ..store.lock import writer_lock
from ..store.schema import content_hash, disk_guard
from . import models
from .calibration import accumulators, forward_of, run_pass
from .corpus import Corpus, CorpusOptions, load_corpus
from .methods import MOMENT_KINDS, one_of
from .moments import SiteMoments, moment_kind
from .plan import make_plan
from .progress import Progress, say
from .recovery import Recovery
from .sites import find_sites, target_layers

PROBE_TOKENS = 32  # length of the sequence on which shared inputs are found


def covariance(
    model: str,
    data: str,
    *,
    store: str | Path = "prep.zarr",
    revision: str | None = None,
    subset: str | None = None,
    split: str = "train",
    text_column: str | None = None,
    template: str | None = None,
    chat_column: str | None = None,
    num_sequences: int = 256,
    seq_len: int = 512,
    batch_size: int = 8,
    pack: bool = True,
    seed: int = 0,
    targets: Sequence[str] = (),
    exclude: Sequence[str] = (),
    layers: str | None = None,
    moment: str = "full",
    moment_dtype: str = "float64",
    dtype: str = "auto",
    device: str | None = None,
    device_map: str | None = None,
    memory_budget: int = 8_000_000_000,
    checkpoint_every: float = 60.0,
    overwrite: bool = False,
    break_lock: bool = False,
    trust_remote_code: bool = False,
    quiet: bool = False,
) -> Store:
    """Calibrate `model` (path or hub id) on `data` (file, glob or hub id) into `store`; the options are the command's.

    A complete store of the same run is returned as it is, an incomplete one is resumed, one of another run is refused
    unless `overwrite`. Accumulators beyond `memory_budget` bytes are made in several passes; the state is stored every
    `checkpoint_every` seconds and on SIGINT and SIGTERM, and nothing before.

    Raises PrepError for bad input and StoreError where the store holds something else.
    """
    one_of("--moment", moment, (*MOMENT_KINDS, "auto"))
    one_of("--moment-dtype", moment_dtype, ("float64", "float32"))
    one_of("--dtype", dtype, ("auto", *models.DTYPES))
    corpus_options = CorpusOptions(
        models.absolute_if_local(data),
        subset,
        split,
        text_column,
        template,
        chat_column,
        num_sequences,
        seq_len,
        pack,
        seed,
    )
    model_id = models.absolute_if_local(model)
    config = models.load_config(model_id, revision, trust_remote_code)
    corpus = load_corpus(corpus_options, models.load_tokenizer(model_id, revision, trust_remote_code))
    options = {
        "targets": list(targets),
        "exclude": list(exclude),
        "layers": layers,
        "moment": moment,
        "moment_dtype": moment_dtype,
        "dtype": dtype,
        "batch_size": batch_size,
    }
    wanted: dict[str, Any] = {
        "model": {"id": model_id, "revision": revision, "config_hash": models.config_hash(config)},
        "corpus": {**asdict(corpus_options), "tokens": corpus.tokens, "hash": corpus.hash},
        "options": options,
    }
    existing = _existing(store, wanted, overwrite, quiet)
    if existing is not None and existing.status == "complete" and existing.corpus is not None:
        return existing

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    net = models.load_model(
        model_id,
        revision=revision,
        dtype=dtype,
        device=device,
        device_map=device_map,
        trust_remote_code=trust_remote_code,
    )
    _check_fits(net, corpus)
    layers_by_name = target_layers(net, targets, exclude, layers)
    forward = forward_of(net, layers_by_name)
    example = next(iter(corpus.batches(1)))
    sites, skipped = find_sites(layers_by_name, lambda: forward({k: v[:, :PROBE_TOKENS] for k, v in example.items()}))
    if not sites:
        raise PrepError("no layer is reached by the forward pass: choose others with --targets")
    kinds = {site.name: moment_kind(moment, site.shapes) for site in sites}
    plan = make_plan(sites, kinds, memory_budget, moment_dtype)

    attrs = {
        **wanted,
        "model": models.describe(net, model_id, revision),
        "prep_version": __version__,
        "id": content_hash([json.dumps(wanted, sort_keys=True)]),
        "status": "incomplete",
        "run": {"host": platform.node(), "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())},
    }
    with disk_guard(store, plan.disk), writer_lock(store, break_lock):
        recovery = Recovery(store, existing, attrs, plan.passes, skipped, checkpoint_every, quiet)
        done = (recovery.part * len(corpus.sequences) + recovery.batches * batch_size) / len(corpus.sequences)
        begun = time.monotonic()
        with (
            recovery.signals(),
            Progress("covariance", corpus.tokens * len(plan.passes), "tokens", quiet, int(done * corpus.tokens)) as bar,
        ):
            for part in plan.passes[recovery.part :]:
                totals = accumulators(part, kinds)
                recovery.restore(totals)
                first = recovery.batches

                def after(number: int, tokens: int, totals: dict[str, SiteMoments] = totals) -> None:
                    bar.advance(tokens)
                    recovery.batch_done(number + 1, totals)

                batches = corpus.batches(batch_size, first * batch_size)
                run_pass(layers_by_name, part, totals, forward, batches, after, first, whole=len(plan.passes) == 1)
                recovery.part_done(part, totals, layers_by_name, moment_dtype)
        recovery.finish({**attrs["run"], "seconds": round(time.monotonic() - begun, 3)})
    return open_store(store)


def _check_fits(model: nn.Module, corpus: Corpus) -> None:
    """Refuse sequences the model has no positions for, and tokens it has no embedding for."""
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    longest, limit = max(map(len, corpus.sequences)), getattr(config, "max_position_embeddings", None)
    if limit and longest > limit:
        raise PrepError(f"sequences of {longest} tokens, the model takes {limit}: use --seq-len {limit} or less")
    top, size = max(int(ids.max()) for ids in corpus.sequences), model.get_input_embeddings().weight.shape[0]  # type: ignore[operator, union-attr]
    if top >= size:
        raise PrepError(f"the tokenizer gives token {top}, the model embeds {size} tokens: they do not belong together")


def _existing(location: str | Path, wanted: dict[str, Any], overwrite: bool, quiet: bool) -> Store | None:
    """The store that is there, if its run is the wanted one (complete or not) or it holds bases only; else an error."""
    path = Path(location)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return None
    found = open_store(location)
    if overwrite:
        return None
    sections = ["model"] if found.corpus is None else ["model", "corpus", "options"]
    differences = []
    for section in sections:
        have = found.attrs[section]
        for key, value in wanted[section].items():
            if key == "revision" and value is None:
                continue
            if have.get(key) != value:
                differences.append(f"{section} {key}: {have.get(key)!r} there, {value!r} asked for")
    if differences:
        raise PrepError(
            f"{location} holds a run with other options ({'; '.join(differences)}): "
            "name another --store, or replace it with --overwrite"
        )
    if found.status == "complete" and found.corpus is not None:
        say(f"{location} is complete and was made with the same options: nothing to do", quiet)
    return found
