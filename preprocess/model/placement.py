"""Models larger than one device: which device keeps each part, as accelerate's device maps say it.

A map names modules and the device of each, or "disk", from where weights are read for every forward pass. What is on
disk, or on the CPU beside accelerators, is computed with on the first accelerator. `auto`, `balanced` and `sequential`
are maps that accelerate makes from the memory there is.
"""

from __future__ import annotations

import importlib.util
import json
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import PrepError
from ...linear import offload_hook
from ...units import parse_size

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")

Devices = dict[str, int | str]  # by module
Memory = dict[int | str, int]  # bytes by device


def placement(
    device: str | None,
    device_map: str | Mapping[str, int | str] | None,
    max_memory: str | Mapping[int | str, int | str] | None,
) -> tuple[str | Devices | None, Memory | None]:
    """The device map as one of STRATEGIES or {module: device}, and the memory as {device: bytes}, both checked.

    device_map: also a device, or JSON or a .json file of {module: device}. max_memory: also like "0=20GB,cpu=60GB";
    devices that it does not name are not used. PrepError for options that exclude each other, devices that are not
    there, and without accelerate.
    """
    if device_map is None:
        if max_memory is not None:
            raise PrepError("--max-memory limits what --device-map auto takes: give that, too")
        return None, None
    if device is not None:
        raise PrepError("--device and --device-map both say where the model goes: give one of them")
    if importlib.util.find_spec("accelerate") is None:
        raise PrepError("--device-map needs the package accelerate: pip install accelerate")
    if device_map in STRATEGIES:
        return str(device_map), None if max_memory is None else _memory(max_memory)
    if max_memory is not None:
        raise PrepError(f"--max-memory limits --device-map {', '.join(STRATEGIES)}: leave it out with other ones")
    return _devices(device_map), None


def computes_on_cpu(device_map: str | Devices, max_memory: Memory | None) -> bool:
    """True where a placement has no accelerator."""
    if isinstance(device_map, str):
        devices: Iterable[int | str] = max_memory or range(int(torch.accelerator.is_available()))
    else:
        devices = device_map.values()
    return all(device == "disk" or torch.device(device).type == "cpu" for device in devices)


def partition(model: nn.Module, device_map: Devices) -> Devices:
    """`device_map` with every entry that contains another one taken apart into its children.

    Otherwise a loader takes the name "layers.1" for the beginning of "layers.10", and a part of a module cannot be on
    disk. model: only its names are used. PrepError for a name that it lacks, for parameters without a device, and for
    tied ones with two.
    """
    modules = dict(model.named_modules())
    for name in device_map:
        if name not in modules:
            known = ", ".join([name for name in modules if name.count(".") == 1][:4])
            raise PrepError(f"--device-map names {name!r}, no module of {type(model).__name__}: it has {known}, ...")

    def parts(name: str, device: int | str | None) -> Iterator[tuple[str, int | str]]:
        device, prefix = device_map.get(name, device), f"{name}." if name else ""
        inner = any(other != name and other.startswith(prefix) for other in device_map)
        if device is not None and not inner:
            yield name, device
            return
        for key, _ in _tensors(modules[name], recurse=False):
            if device is None:
                raise PrepError(f"--device-map has no device for {prefix}{key}: name its module, or '' for all others")
            if device == "disk":
                raise PrepError(f"--device-map divides {name}, whose {key} is on disk: it can be there as a whole only")
            yield prefix + key, device
        for key, child in modules[name].named_children():
            if any(True for _ in _tensors(child)):
                yield from parts(prefix + key, device)

    devices = dict(parts("", None))
    for one, other in getattr(model, "all_tied_weights_keys", {}).items():
        first, second = (
            next((devices[name] for name in _around(key) if name in devices), None) for key in (one, other)
        )
        if first != second:
            raise PrepError(
                f"--device-map has {one} on {first}, {other} on {second}: they are one weight, give one device"
            )
    return devices


def input_device(model: nn.Module) -> torch.device:
    """Where a model takes its inputs: where its first parameter is, or is computed with if it is offloaded."""
    for module in model.modules():
        for _, value in _tensors(module, recurse=False):
            hook = offload_hook(module) if value.is_meta else None
            return value.device if hook is None else torch.device(hook.execution_device)
    return torch.device("cpu")


def _around(name: str) -> Iterator[str]:
    """A name, and the modules it lies in from the inside out."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""


def _tensors(module: nn.Module, recurse: bool = True) -> Iterator[tuple[str, Tensor]]:
    return chain(module.named_parameters(recurse=recurse), module.named_buffers(recurse=recurse))


def _devices(given: str | Mapping[str, int | str]) -> Devices:
    """{module: device} from one device for all, from JSON, or from a file of it."""
    devices: Any = given
    if isinstance(given, str):
        literal = given.lstrip().startswith("{")
        try:
            if literal or given.endswith(".json"):
                devices = json.loads(given if literal else Path(given).read_text())
            else:
                devices = {"": given}
        except (OSError, ValueError) as error:
            raise PrepError(f"--device-map {given} cannot be read ({error}): give {{module: device}}") from error
    if not isinstance(devices, Mapping) or not devices:
        raise PrepError(f'--device-map {given} maps no modules: write it like {{"": "disk", "model.layers.0": "cpu"}}')
    for device in devices.values():
        if device != "disk":
            _check_device(device, f"--device-map names {device!r}", "auto, disk or a device, like cpu or cuda:1")
    return dict(devices)


def _memory(given: str | Mapping[int | str, int | str]) -> Memory:
    """{device: bytes} from "0=20GB,cpu=60GB" or a mapping."""
    if isinstance(given, str):
        given = {device.strip(): size for device, _, size in (part.partition("=") for part in given.split(","))}
    limits: Memory = {}
    for device, size in given.items():
        known = int(device) if str(device).isdigit() else device
        if not isinstance(known, int) and known not in ("cpu", "mps"):
            raise PrepError(f"--max-memory names {device!r}: number the accelerators, like 0=20GB,cpu=60GB")
        _check_device(known, f"--max-memory names {device!r}", "0=20GB,cpu=60GB")
        limits[known] = parse_size(str(size))
    return limits


def _check_device(device: Any, what: str, instead: str) -> None:
    """PrepError unless tensors can be made on the device."""
    try:
        if isinstance(device, bool | None) or torch.empty(0, device=device).is_meta:
            raise RuntimeError("nothing is computed there")
    except (RuntimeError, AssertionError, TypeError) as error:
        raise PrepError(
            f"{what}, which cannot be used ({textwrap.shorten(str(error), 80)}): write {instead}"
        ) from error
