"""One pass over the batches: the sums of its sites, and the forward whose hooks add to them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import ALONE, World, dealt
from ..model.experts import home, on_real_rows
from ..model.forward import Inputs
from ..model.network import Network
from ..model.sites import Site
from ..numerics.accumulators import SiteSums, site_elements
from .hooks import ExpertTurns, RealRows, SiteHooks, expert_turns


@dataclass(frozen=True)
class Batch:
    """inputs: what the model is called with. masks: (B, T) by name, zero on padding; None for a batch not counted."""

    number: int
    inputs: Inputs
    masks: Mapping[str, Tensor] | None


class _DeepestSite(Exception):
    """Ends a forward after the last site of a pass."""


class Part:
    """The sites of one pass and their sums. `with part.hooked(): part.add(batch)` adds what a batch shows of them.

    whole: False ends each forward at the last of `sites`, which are in call order. compat: "peft-corda" for PEFT's
    sums (see `scaled_by_sequence`).
    """

    def __init__(
        self,
        network: Network,
        sites: Sequence[Site],
        *,
        whole: bool = True,
        compat: str | None = None,
        world: World = ALONE,
    ):
        self.sites, self.sums = tuple(sites), site_sums(sites, network.kinds, world)
        self._network, self._whole = network, whole
        self._rows = RealRows()
        self._masks: dict[nn.Module, str] = {}  # of the modules of fused experts
        layers = network.layers
        self._hooks: list[SiteHooks | ExpertTurns] = [*expert_turns(sites, layers, self.sums)] if world.size > 1 else []
        self._hooks += [SiteHooks(site, layers, self.sums[site.name], self._rows, compat) for site in sites]

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """Inside, batches may be added; the hooks are removed at the end in any case."""
        layers = self._network.layers
        self._masks = {home(layers[site.name]): site.mask for site in self.sites if site.routed}
        handles: list[Any] = []
        try:
            for hooks in self._hooks:
                hooks.attach()
            handles += on_real_rows(self._masks, self._real_rows)
            if not self._whole:
                handles.append(home(layers[self.sites[-1].members[-1]]).register_forward_hook(_stop))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for hooks in self._hooks:
                hooks.release()

    def add(self, batch: Batch) -> None:
        """Run a batch through the model and add its moments.

        PrepError for NaN or infinite activations, and where padding cannot be told from tokens.
        """
        self._rows.begin(batch.number, batch.masks)
        with torch.no_grad(), contextlib.suppress(_DeepestSite):
            self._network.forward(batch.inputs)

    def _real_rows(self, owner: nn.Module) -> tuple[Tensor | None, int]:
        """Indices of the real rows and number of all rows, for a module of fused experts."""
        return self._rows.masks.get(self._masks[owner], (None, 0))


def site_sums(sites: Sequence[Site], kinds: Mapping[str, str], world: World = ALONE) -> dict[str, SiteSums]:
    """Empty sums by site name; kinds: site name -> moment kind. Of several processes each keeps those of some sites."""
    owners = dealt({site.name: site_elements(kinds[site.name], site.shapes) for site in sites}, world.local_size)
    return {
        site.name: SiteSums(
            site.name,
            kinds[site.name],
            site.d_in,
            {member: shape[0] for member, shape in zip(site.members, site.shapes, strict=True)},
            world.collector(owners[site.name]),
            owners[site.name] == world.local_rank,
        )
        for site in sites
    }


def _stop(*_: object) -> None:
    raise _DeepestSite
