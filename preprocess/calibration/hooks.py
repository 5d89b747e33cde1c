"""The hooks of a pass: what one batch shows of a site's input goes to the site's sums.

One hook per site takes the shared input; the other members must be handed the very same tensor. Every class has the
same life cycle: `attach`, then calls by the model, then `release`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import PrepError
from ...linear import parameter, weight_matrix
from ..model.experts import ExpertLinear, home
from ..model.sites import DECODER_MASK, MASK, Site, layer_input
from ..numerics.accumulators import SiteSums
from ..numerics.device_sums import DeviceSums
from ..numerics.sample import Key, priorities


class RealRows:
    """Which rows of the batch under way count: the real tokens and, under --label-mask, of these the answers.

    masks: name -> (indices of the real rows or None where all are real, number of all rows), which experts compute
    with. empty: no row counts. Rows have priorities (see numerics/sample.py), which `of` does not need.
    """

    number = 0
    empty = False

    def __init__(self) -> None:
        self.masks: dict[str, tuple[Tensor | None, int]] = {}
        self._moved: dict[tuple[str, torch.device], Tensor] = {}
        self._sequences = 0
        self._keys: Sequence[Key] = ()
        self._counted: dict[str, tuple[Tensor | None, int]] = {}  # like `masks`, of the rows that count
        self._real: Mapping[str, Tensor] = {}  # masks of the real rows
        self._given: Mapping[str, Tensor] = {}  # and of those that count
        self._answers: dict[str, Tensor] = {}  # of the real rows, which ones are of answers
        self._calls: Counter[str] = Counter()
        self._drawn: dict[Any, np.ndarray] = {}
        self._routed: tuple[Tensor, np.ndarray] | None = None

    def begin(
        self,
        number: int,
        masks: Mapping[str, Tensor] | None,
        keys: Sequence[Key] = (),
        labels: Tensor | None = None,
    ) -> None:
        """The batch `number` with its masks (B, T), zero on padding; None for a batch that does not count.

        keys: of its sequences, or of all its rows. labels: (B, T), zero on tokens that are of no answer.
        """
        self.number, self.empty, self._keys, self._given = number, masks is None, keys, masks or {}
        self._moved, self._calls, self._drawn, self._routed = {}, Counter(), {}, None
        self.masks, self._real = {name: _rows_of(mask) for name, mask in self._given.items()}, self._given
        self._counted, self._answers = self.masks, {}
        if labels is not None and masks is not None:
            given = dict.fromkeys((MASK, DECODER_MASK), torch.ones_like(labels)) | dict(masks)
            self._answers = {name: labels[mask.bool()].bool() for name, mask in given.items()}
            self._given = {name: labels * mask for name, mask in given.items()}
            self._counted = {name: _rows_of(mask) for name, mask in self._given.items()}
        self._sequences = max(map(len, self._given.values()), default=0)

    def of(self, x: Tensor, site: Site, layer: nn.Module) -> Tensor:
        """The rows that count of an activation (..., d) of a site's layer as (n, d)."""
        flat = x.detach().reshape(-1, x.shape[-1])
        if self.empty:
            return flat[:0]
        if site.routed:
            chosen = self._routed_answers(site, layer)
            return flat if chosen is None else flat.index_select(0, chosen.to(flat.device))
        rows, size = self._counted.get(site.mask, (None, 0))
        if rows is None:
            return flat
        if len(flat) == size:
            place = site.mask, flat.device
            if place not in self._moved:
                self._moved[place] = rows.to(flat.device)
            return flat.index_select(0, self._moved[place])
        # one row per sequence, another stream such as image patches, or a model that removes padding itself
        if len(x) == self._sequences or len(flat) == len(rows):
            return flat
        raise PrepError(
            f"the input of {site.name} has {len(flat)} rows in batch {self.number} of {size} tokens, so its padding "
            "cannot be told: use batches without padding or leave it out with --exclude"
        )

    def _routed_answers(self, site: Site, layer: nn.Module) -> Tensor | None:
        """Which of the rows that an expert is given under this call are of answers; None where all count."""
        if not self._answers:
            return None
        if not isinstance(layer, ExpertLinear) or layer.rows is None:
            raise PrepError(
                f"the tokens that {site.name} is given cannot be told, so neither its answers: leave out --label-mask, "
                "or this layer with --exclude"
            )
        rows, _ = layer.rows
        return self._answers[site.mask][rows.cpu()].nonzero().squeeze(1)

    def priorities(self, n: int, site: Site, layer: nn.Module) -> np.ndarray:
        """Priorities (n,) of the rows that `of` gave for the call of a site's layer under way."""
        if not n:
            return np.zeros(0)
        call = self._calls[site.name]
        self._calls[site.name] += 1
        if not isinstance(layer, ExpertLinear):
            return self._draw(n, site.mask, call)
        if layer.rows is None:
            return priorities(self._keys[:1], [n], call)
        rows, of = layer.rows
        if self._routed is None or self._routed[0] is not rows:  # both projections of an expert have the same
            self._routed = rows, rows.cpu().numpy()
        drawn = self._draw(of, site.mask, call)[self._routed[1]]
        chosen = self._routed_answers(site, layer)
        return drawn if chosen is None else drawn[chosen.numpy()]

    def _draw(self, n: int, mask: str, call: int) -> np.ndarray:
        """Priorities (n,) of the rows of a stream of tokens: the same for all sites that read it."""
        place = n, mask, call
        if place not in self._drawn:
            self._drawn[place] = priorities(*self._split(n, mask), call)
        return self._drawn[place]

    def _split(self, n: int, mask: str) -> tuple[Sequence[Key], list[int]]:
        """Keys and numbers of rows of the sequences that n rows are of; one key for all where that is not known."""
        keys = self._keys
        for given in (self._given.get(mask), self._real.get(mask)):  # experts are given all real rows
            if given is not None and given.numel() % len(keys) == 0:
                counts = given.reshape(len(keys), -1).count_nonzero(1).tolist()
                if sum(counts) == n:
                    return keys, counts
        return (keys, [n // len(keys)] * len(keys)) if n % len(keys) == 0 else (keys[:1], [n])


def _rows_of(mask: Tensor) -> tuple[Tensor | None, int]:
    """Indices of the rows where a mask is not zero, None where that is everywhere; the number of all rows."""
    return None if mask.all() else mask.reshape(-1).nonzero().squeeze(1), mask.numel()


class SiteHooks:
    """The hooks of one site: the first member's input is added, the others must be handed the same tensor."""

    def __init__(
        self,
        site: Site,
        layers: Mapping[str, nn.Module],
        sums: SiteSums | DeviceSums,
        rows: RealRows,
        compat: str | None = None,
    ):
        self._site, self._layers, self._sums, self._rows, self._compat = site, layers, sums, rows, compat
        self._shared: tuple[Tensor, int] | None = None
        self._handles: list[Any] = []

    def attach(self) -> None:
        """Begin to see the calls of the site's layers."""
        for member in self._site.members:
            layer = self._layers[member]
            self._handles.append(
                layer.register_forward_pre_hook(partial(self._take_input, member), with_kwargs=True)  # type: ignore[arg-type]
            )
            if self._sums.kind == "output":
                self._handles.append(
                    layer.register_forward_hook(partial(self._take_output, member), with_kwargs=True)  # type: ignore[arg-type]
                )

    def release(self) -> None:
        """Remove the hooks and what they hold."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._shared = [], None

    def _take_input(self, member: str, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        x, members = layer_input(args, kwargs), self._site.members
        if member == members[0]:
            self._add(x, layer)
            self._shared = x, x._version
        elif self._shared is None or x is not self._shared[0] or x._version != self._shared[1]:
            raise PrepError(
                f"{member} no longer shares its input with {members[0]} in batch {self._rows.number}: "
                f"calibrate it in a store of its own with --targets {member}"
            )
        if member == members[-1]:
            self._shared = None

    def _add(self, x: Tensor, layer: nn.Module) -> None:
        if self._compat == "peft-corda":
            own = x[:0] if self._rows.empty else x
            self._sums.add_input(scaled_by_sequence(own), self._rows.number, count=len(own))
        else:
            X, sample = self._rows.of(x, self._site, layer), self._sums.sample
            self._sums.add_input(X, self._rows.number)
            if sample is not None:
                sample.add(X, self._rows.priorities(len(X), self._site, layer))

    def _take_output(self, member: str, layer: nn.Module, args: tuple, kwargs: dict, y: Tensor) -> None:
        if y.dtype in (torch.float32, torch.float64):
            y = self._rows.of(y, self._site, layer)
            if getattr(layer, "bias", None) is not None:
                y = y - parameter(layer, "bias").to(y.device)
        else:  # a half-precision y has lost what the moment is to keep
            y = self._sums.output(self._rows.of(layer_input(args, kwargs), self._site, layer), weight_matrix(layer))
        self._sums.add_output(member, y)


class ExpertTurns:
    """Hooks of one module of fused experts that make an expert without tokens add an empty batch.

    Processes that share a pass then add to the sums of all experts in the same order.
    """

    def __init__(self, owner: nn.Module, names: Sequence[str], layers: Mapping[str, nn.Module], sums: Mapping):
        # the projections of one expert follow another
        self._order = sorted(names, key=lambda name: int(name.split(".")[-2]))
        self._owner, self._layers, self._sums = owner, layers, sums
        self._waiting: list[str] = []
        self._handles: list[Any] = []

    def attach(self) -> None:
        """Begin to see the calls of the module and its experts."""
        self._handles = [self._owner.register_forward_pre_hook(self._begin)]
        for name in self._order:
            self._handles.append(self._layers[name].register_forward_pre_hook(partial(self._reach, name)))
        self._handles.append(self._owner.register_forward_hook(self._end))

    def release(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _begin(self, *_: object) -> None:
        self._waiting = list(self._order)

    def _reach(self, name: str, *_: object) -> None:
        self._pass_over(name)
        if not self._waiting:
            raise PrepError(f"{name} is computed out of its experts' order: calibrate with one process")
        self._waiting.pop(0)

    def _end(self, *_: object) -> None:
        self._pass_over(None)

    def _pass_over(self, name: str | None) -> None:
        while self._waiting and self._waiting[0] != name:
            self._sums[self._waiting.pop(0)].add_nothing(next(self._owner.parameters()).dtype)


def expert_turns(sites: Sequence[Site], layers: Mapping[str, nn.Module], sums: Mapping[str, Any]) -> list[ExpertTurns]:
    """The turns of every module of fused experts among the sites."""
    homes: dict[nn.Module, list[str]] = {}
    for site in sites:
        if site.routed:
            homes.setdefault(home(layers[site.name]), []).append(site.name)
    return [ExpertTurns(owner, names, layers, sums) for owner, names in homes.items()]


def scaled_by_sequence(x: Tensor) -> Tensor:
    """PEFT's `preprocess_corda`: x (B, T, d) -> (B T, d), each sequence divided by |max x|, padding included.

    It counts sequences, not tokens: its C is the sum of X^T X over sequences, divided by their number.
    """
    x = x.detach().float()
    return (x / x.flatten(1).amax(1).abs()[:, None, None]).flatten(0, 1)
