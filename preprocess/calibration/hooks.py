"""The calibration pass: run batches through the model and add what the hooks see to the accumulators of each site.

One hook per site takes the shared input; the other members must be handed the very same tensor. The head is left out
where the targets allow it, and a pass over part of the sites ends at the deepest of them.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import PrepError
from ...linear import dtype_name, parameter, weight_hash, weight_matrix
from ...store import SiteData
from ..distributed import ALONE, Ranks, dealt
from ..model.experts import home, on_real_rows, watched
from ..model.placement import input_device
from ..model.sites import DECODER_MASK, MASK, Site, layer_input
from ..numerics.accumulators import SiteMoments, site_elements

Batch = Any  # a dictionary of tensors, unless `forward` takes something else
Forward = Callable[[Batch], object]
Masks = Callable[[Batch], Mapping[str, Tensor]]


class _DeepestSite(Exception):
    """Ends a forward after the last site of a pass."""


def accumulators(sites: Sequence[Site], kinds: Mapping[str, str], ranks: Ranks = ALONE) -> dict[str, SiteMoments]:
    """Empty accumulators by site name; kinds: site name -> moment kind. Of several ranks each keeps some of them."""
    owners = dealt({site.name: site_elements(kinds[site.name], site.shapes) for site in sites}, ranks.local_size)
    return {
        site.name: SiteMoments(
            site.name,
            kinds[site.name],
            site.d_in,
            {member: shape[0] for member, shape in zip(site.members, site.shapes, strict=True)},
            ranks.collector(owners[site.name]),
            owners[site.name] == ranks.local_rank,
        )
        for site in sites
    }


def text_masks(batch: Batch) -> dict[str, Tensor]:
    """The masks of a batch of text, which an encoder-decoder reads on both sides; none without padding."""
    return dict.fromkeys((MASK, DECODER_MASK), batch[MASK]) if MASK in batch else {}


def run_pass(
    layers: Mapping[str, nn.Module],
    sites: Sequence[Site],
    totals: Mapping[str, SiteMoments],
    forward: Forward,
    batches: Iterable[Batch],
    after: Callable[[int], None] = lambda number: None,
    first: int = 0,
    whole: bool = True,
    masks: Masks = text_masks,
    compat: str | None = None,
    ranks: Ranks = ALONE,
    example: Batch = None,
) -> None:
    """Run `forward` over `batches` and add every site's moments to `totals`.

    batches: numbered from `first`, of several ranks in turn; None, which a rank without a batch in the last round is
    given, runs `example` and adds nothing. masks(batch): masks (B, T), zero on padding, by the name a site has for its
    own; no mask, no padding. after(number) is called when a batch is done. whole: False ends each forward at the last
    of `sites`, which are in call order. compat: "peft-corda" for PEFT's sums (see `scaled_by_sequence`). PrepError for
    NaN or infinite activations, and where padding cannot be told from tokens; the hooks are removed in any case.
    """
    state = _Batch()
    handles = _turns(sites, layers, totals) if ranks.size > 1 else []
    handles += [handle for site in sites for handle in _hook(site, layers, totals[site.name], state, compat)]
    owners = {home(layers[site.name]): site.mask for site in sites if site.routed}
    handles += on_real_rows(owners, lambda owner: state.masks.get(owners[owner], (None, 0)))
    if not whole:
        last = home(layers[sites[-1].members[-1]])
        handles.append(last.register_forward_hook(_stop))
    try:
        with torch.no_grad():
            for number, batch in zip(itertools.count(first + ranks.rank, ranks.size), batches, strict=False):
                state.begin(number, masks(batch) if batch is not None else None)
                with contextlib.suppress(_DeepestSite):
                    forward(batch if batch is not None else example)
                after(number)
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
        members[member] = {
            "shape": list(shape),
            "weight_hash": weight_hash(W),
            "weight_dtype": dtype_name(W.dtype),
        }
    return members


def forward_of(model: nn.Module, layers: Mapping[str, nn.Module]) -> Forward:
    """A function that runs a batch through the part of the model that holds `layers`, without the head if it can."""
    body = getattr(model, "base_model", model)
    inside = {id(module) for module in body.modules()}
    if not all(id(home(layer)) in inside for layer in layers.values()):
        body = model
    accepted = inspect.signature(body.forward).parameters
    own_positions = counts_own_positions(body)
    device = input_device(body)

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

    return watched(forward, layers)


def counts_own_positions(model: nn.Module) -> bool:
    """Whether a model numbers its tokens itself, as RoBERTa does: from the padding token's number on, not from 0."""
    return any(hasattr(module, "create_position_ids_from_input_ids") for module in model.modules())


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; every module's own mode is restored."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _Batch:
    """What the hooks need to know of the batch under way: its number and which rows are real ones.

    masks: name -> (indices of the real rows or None where all are real, number of all rows). empty: no row counts.
    """

    def begin(self, number: int, masks: Mapping[str, Tensor] | None) -> None:
        self.number, self.empty = number, masks is None
        self.masks: dict[str, tuple[Tensor | None, int]] = {}
        self.rows_of_batch = 0
        for name, mask in (masks or {}).items():
            rows = None if mask.all() else mask.reshape(-1).nonzero().squeeze(1)
            self.masks[name] = rows, mask.numel()
            self.rows_of_batch = len(mask)

    def real(self, x: Tensor, site: Site) -> Tensor:
        """The real tokens of a site's activation (..., d) as (n, d)."""
        flat = x.detach().reshape(-1, x.shape[-1])
        if self.empty:
            return flat[:0]
        rows, size = self.masks.get(site.mask, (None, 0))
        if rows is None or site.routed:
            return flat
        if len(flat) == size:
            return flat.index_select(0, rows.to(flat.device))
        # one row per sequence, another stream such as image patches, or a model that removes padding itself
        if len(x) == self.rows_of_batch or len(flat) == len(rows):
            return flat
        raise PrepError(
            f"the input of {site.name} has {len(flat)} rows in batch {self.number} of {size} tokens, so its padding "
            "cannot be told: use batches without padding or leave it out with --exclude"
        )


def _hook(
    site: Site, layers: Mapping[str, nn.Module], total: SiteMoments, state: _Batch, compat: str | None = None
) -> list[Any]:
    """Hooks of one site: the first member's input is accumulated, the others must be handed the same tensor."""
    shared: list[tuple[Tensor, int]] = []
    leader, last = site.members[0], site.members[-1]

    def take(member: str, args: tuple, kwargs: dict) -> None:
        x = layer_input(args, kwargs)
        if member == leader:
            if compat == "peft-corda":
                own = x[:0] if state.empty else x
                total.add_input(scaled_by_sequence(own), state.number, count=len(own))
            else:
                total.add_input(state.real(x, site), state.number)
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
            y = state.real(y, site)
            if getattr(module, "bias", None) is not None:
                y = y - parameter(module, "bias").to(y.device)
        else:  # a half-precision y has lost what the moment is to keep
            x = state.real(layer_input(args, kwargs), site).float()
            y = x @ weight_matrix(module).to(x.device, x.dtype).T
        total.add_output(member, y)

    handles: list[Any] = []
    for member in site.members:
        pre = lambda _m, args, kwargs, member=member: take(member, args, kwargs)  # noqa: E731
        handles.append(layers[member].register_forward_pre_hook(pre, with_kwargs=True))
        if total.kind == "output":
            post = lambda m, args, kwargs, y, member=member: take_output(member, m, args, kwargs, y)  # noqa: E731
            handles.append(layers[member].register_forward_hook(post, with_kwargs=True))
    return handles


def _turns(sites: Sequence[Site], layers: Mapping[str, nn.Module], totals: Mapping[str, SiteMoments]) -> list[Any]:
    """Hooks by which an expert that is given no token here adds nothing, so that all ranks add in the same order."""
    homes: dict[nn.Module, list[str]] = {}
    for site in sites:
        if site.routed:
            homes.setdefault(home(layers[site.name]), []).append(site.name)
    handles = []
    for owner, names in homes.items():
        order = sorted(names, key=lambda name: int(name.split(".")[-2]))  # the projections of one expert follow another
        waiting: list[str] = []

        def begin(*_: object, waiting: list[str] = waiting, order: list[str] = order) -> None:
            waiting[:] = order

        def pass_over(name: str | None, waiting: list[str] = waiting, owner: nn.Module = owner) -> None:
            while waiting and waiting[0] != name:
                totals[waiting.pop(0)].add_nothing(next(owner.parameters()).dtype)
            if name is not None and not waiting:
                raise PrepError(f"{name} is computed out of its experts' order: calibrate with one process")
            waiting[:1] = []

        handles.append(owner.register_forward_pre_hook(begin))
        for name in names:
            skip = lambda *_, name=name, pass_over=pass_over: pass_over(name)  # noqa: E731
            handles.append(layers[name].register_forward_pre_hook(skip))
        handles.append(owner.register_forward_hook(lambda *_, pass_over=pass_over: pass_over(None)))
    return handles


def scaled_by_sequence(x: Tensor) -> Tensor:
    """PEFT's `preprocess_corda`: x (B, T, d) -> (B T, d), each sequence divided by |max x|, padding included.

    It counts sequences, not tokens: its C is the sum of X^T X over sequences, divided by their number.
    """
    x = x.detach().float()
    return (x / x.flatten(1).amax(1).abs()[:, None, None]).flatten(0, 1)


def _stop(*_: object) -> None:
    raise _DeepestSite
