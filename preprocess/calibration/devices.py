"""Where the sums of a calibration are kept: on the devices of their layers, or on the host."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..corpus.source import Source, Text
from ..distributed import World
from ..memory import free_memory
from ..model.experts import home
from ..model.forward import evaluating
from ..model.network import Network
from ..model.placement import input_device
from ..options import CovarianceOptions
from .plan import site_bytes, tokens_kept

ACCELERATORS = ["cuda"]  # kinds of device that can add in float64
RESERVE = 3 * 10**9  # bytes of a device that are left for the products of a batch

Placed = dict[str, torch.device]  # site name -> the device of its layers


def place_sums(network: Network, source: Source, options: CovarianceOptions, world: World) -> tuple[Placed, int]:
    """The device of every site's sums, and the bytes that the sums of one pass may take on each; no device: the host.

    `room` of the options: bytes of each device, 0 for the host; by default what one batch leaves free, less RESERVE.
    The host is taken as well where a device is none of ACCELERATORS, or a site alone is larger than the limit.
    """
    limit = options.room
    devices = {site.name: input_device(home(network.layers[site.name])) for site in network.sites}
    possible = limit != 0 and all(device.type in ACCELERATORS for device in devices.values())
    if not all(world.all_gather(possible)):
        return {}, 0
    if limit is None:
        limit = _room(network, source, set(devices.values()))
    limit = min(world.all_gather(limit))
    sampled = tokens_kept(options, source)
    largest = max(site_bytes(site, network.kinds[site.name], sampled) for site in network.sites)
    return (devices, limit) if largest <= limit else ({}, 0)


def _room(network: Network, source: Source, devices: Iterable[torch.device]) -> int:
    """Bytes that are free on every device beside the model and what a batch takes."""
    inputs = next(source.read()) if isinstance(source, Text) else source.example()
    with evaluating(network.module), torch.no_grad():
        network.forward(inputs)
    return max(0, min(map(_free, devices)) - RESERVE)


def _free(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
