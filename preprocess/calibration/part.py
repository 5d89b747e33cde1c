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
from ..numerics.accumulators import SiteSums, not_finite, site_elements
from ..numerics.device_sums import DeviceSums
from ..numerics.sample import Key
from .hooks import ExpertTurns, RealRows, SiteHooks, expert_turns


@dataclass(frozen=True)
class Batch:
    """inputs: what the model is called with. masks: (B, T) by name, zero on padding; None for a batch not counted.

    keys: what the tokens of each of its sequences, or of all, are drawn by (see numerics/sample.py). labels: (B, T),
    zero on tokens that do not count though they are real; None where all real ones do.
    """

    number: int
    inputs: Inputs
    masks: Mapping[str, Tensor] | None
    keys: Sequence[Key] = ()
    labels: Tensor | None = None


class _DeepestSite(Exception):
    """Ends a forward after the last site of a pass."""


class Part:
    """The sites of one pass and their sums. `with part.hooked(): part.add(batch)` adds what a batch shows of them.

    whole: False ends each forward at the last of `sites`, which are in call order, unless one is called again. compat:
    "peft-corda" for PEFT's sums (see `scaled_by_sequence`). devices: site name -> where its sums are kept, then by each
    process its own; on the host by default. exact: products of float32 on a device, too. sampled: so many tokens of
    every site are kept. owners: which local rank writes a site.
    """

    def __init__(
        self,
        network: Network,
        sites: Sequence[Site],
        *,
        whole: bool = True,
        compat: str | None = None,
        world: World = ALONE,
        devices: Mapping[str, torch.device] | None = None,
        exact: bool = False,
        sampled: int = 0,
    ):
        self.sites, self.owners = tuple(sites), owners(sites, network.kinds, world)
        self.sums: dict[str, SiteSums | DeviceSums] = {}
        for site in sites:
            kind = network.kinds[site.name]
            if devices:
                self.sums[site.name] = device_sums(site, kind, devices[site.name], exact, sampled)
            else:
                self.sums[site.name] = host_sums(site, kind, world, self.owners[site.name], sampled)
        self.on_devices = bool(devices)
        self._network, self._whole = network, whole or not all(site.once for site in sites)
        self._rows = RealRows()
        self._masks: dict[nn.Module, str] = {}  # of the modules of fused experts
        layers = network.layers
        self._hooks: list[SiteHooks | ExpertTurns] = []
        if world.size > 1 and not devices:  # every product is handed to the owner of the sums
            self._hooks += expert_turns(sites, layers, self.sums)
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
        self._rows.begin(batch.number, batch.masks, batch.keys, batch.labels)
        with torch.no_grad(), contextlib.suppress(_DeepestSite):
            self._network.forward(batch.inputs)
        if self.on_devices:
            self._check_finite(batch.number)

    def _check_finite(self, number: int) -> None:
        """One look at what each device has noted. PrepError names site or layer, and the batch."""
        noted: dict[torch.device, dict[str, Tensor]] = {}
        for sums in self.sums.values():
            if isinstance(sums, DeviceSums):
                noted.setdefault(sums.device, {}).update(sums.finite)
        for flags in noted.values():
            for what, finite in zip(flags, torch.stack([*flags.values()]).tolist(), strict=True):
                if not finite:
                    raise not_finite(what, number)

    def _real_rows(self, owner: nn.Module) -> tuple[Tensor | None, int]:
        """Indices of the real rows and number of all rows, for a module of fused experts."""
        return self._rows.masks.get(self._masks[owner], (None, 0))


def owners(sites: Sequence[Site], kinds: Mapping[str, str], world: World) -> dict[str, int]:
    """Site name -> local rank of the process that keeps or collects its sums; kinds: site name -> moment kind."""
    return dealt({site.name: site_elements(kinds[site.name], site.shapes) for site in sites}, world.local_size)


def host_sums(site: Site, kind: str, world: World = ALONE, owner: int = 0, sampled: int = 0) -> SiteSums:
    """Empty sums on the host, kept by one of the processes."""
    collect, kept = world.collector(owner), owner == world.local_rank
    return SiteSums(site.name, kind, site.d_in, _widths(site), collect, kept, sampled)


def device_sums(site: Site, kind: str, device: torch.device, exact: bool = False, sampled: int = 0) -> DeviceSums:
    """Empty sums on a device, of this process alone."""
    return DeviceSums(site.name, kind, site.d_in, _widths(site), device, exact, sampled)


def _widths(site: Site) -> dict[str, int]:
    return {member: d_out for member, (d_out, _) in zip(site.members, site.shapes, strict=True)}


def _stop(*_: object) -> None:
    raise _DeepestSite
