"""`prep covariance`: stream text, or batches, through a model and store the second moment of every layer's input.

C = E[x x^T] over the real tokens, uncentred, with the mean beside it, per site (see sites.py).
"""

from __future__ import annotations

import contextlib
import json
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from .. import __version__
from ..errors import PrepError
from ..store import Store, open_store
from ..store.format.schema import content_hash, disk_guard, is_url
from ..store.lock import writer_lock
from .calibration.checks import check_fits, check_inputs, check_ranks, existing_run
from .calibration.estimate import Estimate, estimate
from .calibration.hooks import accumulators, evaluating, run_pass
from .calibration.plan import make_plan
from .calibration.recovery import Recovery
from .corpus.source import Batches, Mask, Text
from .corpus.text import CorpusOptions, load_corpus
from .distributed import joined
from .model import loading as models
from .model.placement import placement
from .model.sites import encoder_of, find_sites, other_weights, target_layers
from .numerics.accumulators import SiteMoments, moment_kind
from .numerics.methods import MOMENT_KINDS, one_of
from .progress import Progress


def covariance(
    model: str | nn.Module,
    data: str | None = None,
    *,
    batches: Iterable[Any] | None = None,
    mask: Mask | None = None,
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
    device_map: str | Mapping[str, int | str] | None = None,
    max_memory: str | Mapping[int | str, int | str] | None = None,
    compat: str | None = None,
    memory_budget: int = 8_000_000_000,
    checkpoint_every: float = 60.0,
    overwrite: bool = False,
    break_lock: bool = False,
    trust_remote_code: bool = False,
    quiet: bool = False,
    dry_run: bool = False,
    distributed: bool = False,
) -> Store | Estimate | None:
    """Calibrate `model` on `data` (file, glob or hub id) into `store`; the options are the command's.

    model: a path or hub id, or a module, which is calibrated on `batches`: an iterable of dictionaries, tuples or
    tensors that it is called with. mask: batch -> (B, T), True on real tokens, or None; by default a dictionary's
    `attention_mask`. The options from `subset` to `seed` are of `data`, those of loading of a path or hub id.
    device_map, max_memory: parts of the model on several devices or on disk (see placement.py).

    A complete store of the same run is returned as it is, an incomplete one is resumed, one of another run, or of
    batches, is refused unless `overwrite`. Accumulators beyond `memory_budget` bytes are made in several passes; the
    state is stored every `checkpoint_every` seconds and on SIGINT and SIGTERM, and nothing before; not with `batches`.

    compat="peft-corda" sums as PEFT's `preprocess_corda` does: each sequence divided by its maximum, padding counted,
    the mean over sequences. dry_run returns an Estimate of memory, disk and time and stores nothing.

    distributed: every process of a torchrun job, or of an initialised torch.distributed, calls it alike and takes its
    share of the batches; rank 0 returns the store, the others None (see ranks.py).

    Raises PrepError for bad input and StoreError where the store holds something else.
    """
    if is_url(store):
        raise PrepError(f"--store {store} is a URL: calibrate into a local path and copy it with `prep push`")
    one_of("--moment", moment, (*MOMENT_KINDS, "auto"))
    one_of("--moment-dtype", moment_dtype, ("float64", "float32"))
    one_of("--dtype", dtype, ("auto", *models.DTYPES))
    if compat is not None:
        one_of("--compat", compat, ("peft-corda",))
        if moment != "full" or not isinstance(model, str):
            raise PrepError("--compat peft-corda needs --moment full and a model by path or hub id")
    placed = {"device": device, "device_map": device_map, "max_memory": max_memory}
    loading = {"revision": revision, "trust_remote_code": trust_remote_code, "dtype": dtype != "auto", **placed}
    check_inputs(model, data, batches, mask, loading)
    placement(device, device_map, max_memory)
    options: dict[str, Any] = {
        "targets": list(targets),
        "exclude": list(exclude),
        "layers": layers,
        "moment": moment,
        "moment_dtype": moment_dtype,
        "dtype": dtype,
        "compat": compat,
    }
    corpus_options = CorpusOptions(
        models.absolute_if_local(str(data)),
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
    with joined(distributed) as ranks:
        quiet = quiet or ranks.rank > 0
        existing, done = None, False
        with ranks.together():
            check_ranks(ranks, batches is not None or dry_run, device, device_map)
            stream: Text | Batches
            if isinstance(model, str):
                model_id: str | None = models.absolute_if_local(model)
                architecture = models.config_hash(models.load_config(str(model_id), revision, trust_remote_code))
            else:
                model_id, architecture = None, models.model_hash(model)
            if batches is not None:
                stream = Batches(batches, mask)
            else:
                tokenizer = models.load_tokenizer(str(model_id), revision, trust_remote_code)
                stream = Text(load_corpus(corpus_options, tokenizer), batch_size)
                options["batch_size"] = batch_size
            wanted: dict[str, Any] = {
                "model": {"id": model_id, "revision": revision, "config_hash": architecture},
                "corpus": stream.about,
                "options": options,
            }
            if ranks.rank == 0 and not dry_run:
                existing, done = existing_run(store, wanted, overwrite, quiet)
        if ranks.first(lambda: done):
            return existing

        with ranks.together():
            if isinstance(model, str):
                net: nn.Module = models.load_model(
                    str(model_id),
                    revision=revision,
                    dtype=dtype,
                    device=None if device_map is not None else device or ranks.device,
                    device_map=device_map,
                    max_memory=max_memory,
                    trust_remote_code=trust_remote_code,
                )
            else:
                net = model
            if isinstance(stream, Text):
                check_fits(net, stream.corpus)
            layers_by_name = target_layers(net, targets, exclude, layers)
            forward = stream.forward(net, layers_by_name)
            with evaluating(net):
                sites, skipped = find_sites(layers_by_name, lambda: forward(stream.example()), encoder_of(net))
            if not sites:
                raise PrepError("no layer is reached by the forward pass: choose others with --targets")
            if not targets:
                skipped |= other_weights(net, exclude, layers)
            kinds = {site.name: moment_kind(moment, site.shapes) for site in sites}
            plan = make_plan(sites, kinds, memory_budget, moment_dtype)
            if len(plan.passes) > 1 and stream.once:
                raise PrepError(
                    f"{len(plan.passes)} passes are needed and an iterator gives its batches once: "
                    "give batches= as a list or a DataLoader, or raise memory_budget"
                )
        if dry_run:
            if not isinstance(stream, Text):
                raise PrepError("dry_run= needs data=, whose size is known")
            return estimate(layers_by_name, kinds, plan, forward, stream, moment_dtype)

        attrs = {
            **wanted,
            "model": models.describe(net, model_id, revision),
            "prep_version": __version__,
            "id": _id(wanted),
            "status": "incomplete",
            "run": {"host": platform.node(), "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())},
        }
        every = checkpoint_every if isinstance(stream, Text) else float("inf")  # one's own batches are not resumed
        tokens, whole, example = 0, len(plan.passes) == 1, stream.example()
        with contextlib.ExitStack() as held, disk_guard(store, plan.disk if ranks.writes else 0), evaluating(net):
            ranks.first(lambda: held.enter_context(writer_lock(store, break_lock)))
            recovery = Recovery(store, existing, attrs, plan.passes, skipped, every, quiet, ranks)
            ready = recovery.part * stream.total + stream.size(0, recovery.batches)
            begun = time.monotonic()
            with (
                recovery.signals() if isinstance(stream, Text) else contextlib.nullcontext(),
                Progress("covariance", stream.total * len(plan.passes), stream.unit, quiet, ready) as bar,
            ):
                for part in plan.passes[recovery.part :]:
                    totals = accumulators(part, kinds, ranks)
                    recovery.restore(totals)
                    first = recovery.batches

                    def after(number: int, totals: dict[str, SiteMoments] = totals) -> None:
                        begin = number - ranks.rank
                        end = stream.end(begin + ranks.size)
                        bar.advance(stream.size(begin, end))
                        recovery.batch_done(end, totals)

                    own = ranks.share(stream.read(first))
                    masks = stream.masks
                    run_pass(
                        layers_by_name, part, totals, forward, own, after, first, whole, masks, compat, ranks, example
                    )
                    tokens = max(tokens, recovery.part_done(part, totals, layers_by_name, moment_dtype))
            corpus = {"tokens": tokens, **stream.about}
            run = {**attrs["run"], "seconds": round(time.monotonic() - begun, 3)}
            recovery.finish({"corpus": corpus, "id": _id({**wanted, "corpus": corpus}), "run": run})
        return open_store(store) if ranks.rank == 0 else None


def _id(wanted: dict[str, Any]) -> str:
    return content_hash([json.dumps(wanted, sort_keys=True)])
