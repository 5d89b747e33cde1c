"""`prep covariance`: stream text through a model and store the second moment of every linear layer's input.

C = E[x x^T] over the real tokens of the corpus, uncentred, with the mean beside it, per site (see sites.py).
"""

from __future__ import annotations

import inspect
import json
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__
from ..store import SiteData, Store, create_store, open_store, write_sites
from ..store.errors import PrepError
from ..store.schema import content_hash, disk_guard
from ..store.weights import weight_hash, weight_matrix
from . import models
from .corpus import Corpus, CorpusOptions, load_corpus
from .moments import SiteMoments, moment_kind, site_elements
from .progress import Progress, say
from .sites import Site, find_sites, layer_input, target_layers

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
    overwrite: bool = False,
    trust_remote_code: bool = False,
    quiet: bool = False,
) -> Store:
    """Calibrate `model` (path or hub id) on `data` (file, glob or hub id) into `store`; the options are the command's.

    A complete store of the same run is returned as it is, an incomplete one is begun anew, one of another run is
    refused unless `overwrite`. Nothing is written before model, data, sites and disk space are known to be good.

    Raises PrepError for bad input and StoreError where the store holds something else.
    """
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
    first = next(iter(corpus.batches(1)))
    sites, skipped = find_sites(layers_by_name, lambda: forward({k: v[:, :PROBE_TOKENS] for k, v in first.items()}))
    if not sites:
        raise PrepError("no layer is reached by the forward pass: choose others with --targets")
    kinds = {site.name: moment_kind(moment, site.shapes) for site in sites}
    elements = sum(site_elements(kinds[site.name], site.shapes) for site in sites)
    size = elements * (8 if moment_dtype == "float64" else 4)

    attrs = {
        **wanted,
        "model": models.describe(net, model_id, revision),
        "prep_version": __version__,
        "id": content_hash([json.dumps(wanted, sort_keys=True)]),
        "status": "incomplete",
        "run": {"host": platform.node(), "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())},
    }
    begun = time.monotonic()
    with disk_guard(store, size):
        if existing is not None and existing.corpus is None:
            target = open_store(store, "r+")
            target.root.attrs.update(attrs)
        else:
            target = create_store(store, attrs)
        with Progress("covariance", corpus.tokens, "tokens", quiet) as progress:
            data_by_site = calibrate(
                layers_by_name, sites, kinds, forward, corpus.batches(batch_size), advance=progress.advance
            )
        write_sites(target.root, data_by_site, moment_dtype, skipped)
        attrs["run"]["seconds"] = round(time.monotonic() - begun, 3)
        target.root.attrs.update({"status": "complete", "run": attrs["run"]})
    return open_store(store)


def calibrate(
    layers: Mapping[str, nn.Module],
    sites: Sequence[Site],
    kinds: Mapping[str, str],
    forward: Callable[[dict[str, Tensor]], object],
    batches: Iterable[dict[str, Tensor]],
    advance: Callable[[int], None] = lambda tokens: None,
) -> dict[str, SiteData]:
    """Run `forward` over `batches` and accumulate the moments of every site.

    layers: name -> linear module; kinds: site name -> moment kind; batches: dictionaries of tensors, with an
    `attention_mask` (B, T) where padding is to be left out. PrepError for NaN or infinite activations.
    """
    totals = {
        site.name: SiteMoments(
            site.name, kinds[site.name], site.d_in, {m: s[0] for m, s in zip(site.members, site.shapes, strict=True)}
        )
        for site in sites
    }
    state = _Batch()
    handles = [handle for site in sites for handle in _hook(site, layers, totals[site.name], state)]
    try:
        with torch.no_grad():
            for number, batch in enumerate(batches):
                state.begin(number, batch.get("attention_mask"))
                forward(batch)
                advance(state.tokens if state.tokens is not None else batch["input_ids"].numel())
    finally:
        for handle in handles:
            handle.remove()
    return {
        site.name: totals[site.name].finish(
            {
                member: {
                    "shape": list(shape),
                    "weight_hash": weight_hash(weight_matrix(layers[member])),
                    "weight_dtype": str(weight_matrix(layers[member]).dtype).removeprefix("torch."),
                }
                for member, shape in zip(site.members, site.shapes, strict=True)
            }
        )
        for site in sites
    }


class _Batch:
    """What the hooks need to know of the batch under way: its number and which rows are real tokens."""

    def begin(self, number: int, mask: Tensor | None) -> None:
        self.number = number
        self.size = mask.numel() if mask is not None else None
        self.rows = mask.reshape(-1).nonzero().squeeze(1) if mask is not None and not mask.all() else None
        self.tokens = int(mask.sum()) if mask is not None else None

    def real(self, x: Tensor) -> Tensor:
        """The real tokens of an activation (..., d) as (n, d)."""
        flat = x.detach().reshape(-1, x.shape[-1])
        if self.rows is None or flat.shape[0] != self.size:
            return flat
        return flat.index_select(0, self.rows.to(flat.device))


def _hook(site: Site, layers: Mapping[str, nn.Module], total: SiteMoments, state: _Batch) -> list[Any]:
    """Hooks of one site: the first member's input is accumulated, the others must be handed the same tensor."""
    shared: list[tuple[Tensor, int]] = []
    leader, last = site.members[0], site.members[-1]

    def take(member: str, args: tuple, kwargs: dict) -> None:
        x = layer_input(args, kwargs)
        if member == leader:
            total.add_input(state.real(x), state.number)
            shared[:] = [(x, x._version)]
        elif not shared or x is not shared[0][0] or x._version != shared[0][1]:
            raise PrepError(
                f"{member} no longer shares its input with {leader} in batch {state.number}: report this model"
            )
        if member == last:
            shared.clear()

    def take_output(member: str, module: nn.Module, args: tuple, kwargs: dict, y: Tensor) -> None:
        if y.dtype in (torch.float32, torch.float64):
            bias = getattr(module, "bias", None)
            y = state.real(y) if bias is None else state.real(y) - bias
        else:  # a half-precision y has lost what the moment is to keep
            y = state.real(layer_input(args, kwargs)).float() @ weight_matrix(module).float().T
        total.add_output(member, y)

    handles: list[Any] = []
    for member in site.members:
        pre = lambda _m, args, kwargs, member=member: take(member, args, kwargs)  # noqa: E731
        handles.append(layers[member].register_forward_pre_hook(pre, with_kwargs=True))
        if total.kind == "output":
            post = lambda m, args, kwargs, y, member=member: take_output(member, m, args, kwargs, y)  # noqa: E731
            handles.append(layers[member].register_forward_hook(post, with_kwargs=True))
    return handles


def forward_of(model: nn.Module, layers: Mapping[str, nn.Module]) -> Callable[[dict[str, Tensor]], object]:
    """A function that runs a batch through the part of the model that holds `layers`, without the head if it can."""
    body = getattr(model, "base_model", model)
    inside = {id(module) for module in body.modules()}
    if not all(id(layer) in inside for layer in layers.values()):
        body = model
    accepted = inspect.signature(body.forward).parameters
    # models that count positions from the padding token themselves (RoBERTa) start at another number than 0
    own_positions = any(hasattr(module, "create_position_ids_from_input_ids") for module in body.modules())
    device = next(body.parameters()).device

    def forward(batch: dict[str, Tensor]) -> object:
        inputs: dict[str, Any] = {name: value.to(device) for name, value in batch.items()}
        if own_positions or "position_ids" not in accepted:
            inputs.pop("position_ids", None)
        if "use_cache" in accepted:
            inputs["use_cache"] = False
        return body(**inputs)

    return forward


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
    elif found.status != "complete":
        say(f"{location} is incomplete: begun anew", quiet)
    return found
