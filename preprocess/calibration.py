"""The calibration pass: run batches through the model and add what the hooks see to the accumulators of each site.

One hook per site takes the shared input; the other members must be handed the very same tensor. The head is left out
where the targets allow it, and a pass over part of the sites ends at the deepest of them.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..store import SiteData
from ..store.errors import PrepError
from ..store.weights import weight_hash, weight_matrix
from .moments import SiteMoments
from .sites import Site, layer_input

Batch = dict[str, Tensor]
Forward = Callable[[Batch], object]


class _DeepestSite(Exception):
    """Ends a forward after the last site of a pass."""


def accumulators(sites: Sequence[Site], kinds: Mapping[str, str]) -> dict[str, SiteMoments]:
    """Empty accumulators by site name; kinds: site name -> moment kind."""
    return {
        site.name: SiteMoments(
            site.name,
            kinds[site.name],
            site.d_in,
            {member: shape[0] for member, shape in zip(site.members, site.shapes, strict=True)},
        )
        for site in sites
    }


def run_pass(
    layers: Mapping[str, nn.Module],
    sites: Sequence[Site],
    totals: Mapping[str, SiteMoments],
    forward: Forward,
    batches: Iterable[Batch],
    after: Callable[[int, int], None] = lambda number, tokens: None,
    first: int = 0,
    whole: bool = True,
) -> None:
    """Run `forward` over `batches` and add every site's moments to `totals`.

    batches: dictionaries of tensors, numbered from `first`, with an `attention_mask` (B, T) where padding is to be left
    out. after(number, tokens) is called when a batch is done. whole: False ends each forward at the last of `sites`,
    which are in call order. PrepError for NaN or infinite activations; the hooks are removed in any case.
    """
    state = _Batch()
    handles = [handle for site in sites for handle in _hook(site, layers, totals[site.name], state)]
    if not whole:
        last = layers[sites[-1].members[-1]]
        handles.append(last.register_forward_hook(_stop))
    try:
        with torch.no_grad():
            for number, batch in enumerate(batches, first):
                state.begin(number, batch)
                with contextlib.suppress(_DeepestSite):
                    forward(batch)
                after(number, state.tokens)
    finally:
        for handle in handles:
            handle.remove()


def calibrate(
    layers: Mapping[str, nn.Module],
    sites: Sequence[Site],
    kinds: Mapping[str, str],
    forward: Forward,
    batches: Iterable[Batch],
) -> dict[str, SiteData]:
    """The moments of every site over `batches`, in one pass and in memory."""
    totals = accumulators(sites, kinds)
    run_pass(layers, sites, totals, forward, batches)
    return {site.name: totals[site.name].finish(site_members(site, layers)) for site in sites}


def site_members(site: Site, layers: Mapping[str, nn.Module]) -> dict[str, dict[str, Any]]:
    """What a store says of a site's layers: shape, and hash and dtype of the weight."""
    members = {}
    for member, shape in zip(site.members, site.shapes, strict=True):
        W = weight_matrix(layers[member])
        dtype = str(W.dtype).removeprefix("torch.")
        members[member] = {"shape": list(shape), "weight_hash": weight_hash(W), "weight_dtype": dtype}
    return members


def forward_of(model: nn.Module, layers: Mapping[str, nn.Module]) -> Forward:
    """A function that runs a batch through the part of the model that holds `layers`, without the head if it can."""
    body = getattr(model, "base_model", model)
    inside = {id(module) for module in body.modules()}
    if not all(id(layer) in inside for layer in layers.values()):
        body = model
    accepted = inspect.signature(body.forward).parameters
    # models that count positions from the padding token themselves (RoBERTa) start at another number than 0
    own_positions = any(hasattr(module, "create_position_ids_from_input_ids") for module in body.modules())
    device = next(body.parameters()).device

    def forward(batch: Batch) -> object:
        inputs: dict[str, Any] = {name: value.to(device) for name, value in batch.items()}
        if own_positions or "position_ids" not in accepted:
            inputs.pop("position_ids", None)
        if "use_cache" in accepted:
            inputs["use_cache"] = False
        if "decoder_input_ids" in accepted:  # an encoder-decoder reads the text on both sides
            inputs.setdefault("decoder_input_ids", inputs["input_ids"])
            if "attention_mask" in inputs:
                inputs.setdefault("decoder_attention_mask", inputs["attention_mask"])
        return body(**inputs)

    return forward


class _Batch:
    """What the hooks need to know of the batch under way: its number, its tokens and which rows are real ones."""

    def begin(self, number: int, batch: Batch) -> None:
        mask = batch.get("attention_mask")
        self.number = number
        self.size = mask.numel() if mask is not None else None
        self.rows = mask.reshape(-1).nonzero().squeeze(1) if mask is not None and not mask.all() else None
        self.tokens = int(mask.sum()) if mask is not None else next(iter(batch.values())).numel()

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
                f"{member} no longer shares its input with {leader} in batch {state.number}: "
                f"calibrate it in a store of its own with --targets {member}"
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


def _stop(*_: object) -> None:
    raise _DeepestSite
