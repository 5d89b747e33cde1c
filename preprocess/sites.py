"""Which linear layers are calibrated, grouped by the input they share.

Layers that read the same activation (q_proj, k_proj, v_proj; gate_proj, up_proj) form one site and cost one second
moment. Sharing is observed, not guessed from names: two layers share if one forward hands both the same tensor at the
same version.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..store.errors import PrepError
from ..store.weights import is_linear, layer_shape


@dataclass(frozen=True)
class Site:
    """One input activation and the linear layers that read it.

    name: the first member in call order; members: layer names in call order; shapes: (d_out, d_in) of each.
    """

    name: str
    members: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]

    @property
    def d_in(self) -> int:
        """Width of the shared input."""
        return self.shapes[0][1]


def block_index(name: str) -> int | None:
    """The number of the block a module lies in: the first numeric part of its path, None outside the blocks."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def target_layers(
    model: nn.Module,
    targets: Sequence[str] = (),
    exclude: Sequence[str] = (),
    layers: str | None = None,
) -> dict[str, nn.Module]:
    """Linear layers by full module name, in module order.

    Without `targets`: every linear layer of the blocks, so not the head. targets, exclude: regular expressions searched
    in the names; layers: block numbers such as "0-3,8". PrepError if a target matches no layer, or nothing linear.
    """
    modules = dict(model.named_modules())
    linear = {name: module for name, module in modules.items() if is_linear(module)}
    chosen = {name for name in linear if block_index(name) is not None}
    if targets:
        chosen = set()
        for pattern in targets:
            found = {name for name in modules if name and _search(pattern, name, "--targets")}
            if not found:
                raise PrepError(
                    f"no layer matches --targets {pattern!r}: {type(model).__name__} has {_examples(list(linear))}"
                )
            if not found & linear.keys():
                name = min(found, key=len)
                kind = type(modules[name]).__name__
                raise PrepError(
                    f"--targets {pattern!r} matches {name}, a {kind}, which is not a linear layer: "
                    f"{type(model).__name__} has {_examples(list(linear))}"
                )
            chosen |= found & linear.keys()
    for pattern in exclude:
        chosen = {name for name in chosen if not _search(pattern, name, "--exclude")}
    if layers is not None:
        numbers = parse_layers(layers)
        chosen = {name for name in chosen if block_index(name) in numbers}
    if not chosen:
        where = "--targets, --exclude and --layers" if targets or exclude or layers else "the blocks of this model"
        raise PrepError(f"no linear layer is left by {where}: {type(model).__name__} has {_examples(list(linear))}")
    return {name: module for name, module in linear.items() if name in chosen}


def parse_layers(text: str) -> set[int]:
    """Block numbers from "0-3,8". PrepError for anything else."""
    numbers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        if not match:
            raise PrepError(f"--layers {text!r} is not a list of block numbers: write it like 0-3,8")
        first, last = int(match[1]), int(match[2] or match[1])
        numbers.update(range(first, last + 1))
    return numbers


def find_sites(targets: dict[str, nn.Module], forward: Callable[[], object]) -> tuple[list[Site], dict[str, str]]:
    """Sites in call order, observed in one call of `forward`, and the layers it did not reach with the reason.

    The inputs are kept alive until the forward ends, so `forward` should run a short sequence.
    """
    calls: dict[str, list[tuple[Tensor, int]]] = {}
    handles = []
    for name, module in targets.items():

        def note(_module: nn.Module, args: tuple, kwargs: dict, name: str = name) -> None:
            x = layer_input(args, kwargs)
            calls.setdefault(name, []).append((x, x._version))

        handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()

    groups: dict[tuple, list[str]] = {}
    for name, inputs in calls.items():
        key = (id(inputs[0][0]), inputs[0][1]) if len(inputs) == 1 else (name,)  # called twice: a site of its own
        groups.setdefault(key, []).append(name)
    sites = [
        Site(members[0], tuple(members), tuple(layer_shape(targets[member]) for member in members))
        for members in groups.values()
    ]
    skipped = {name: "the forward pass does not call it" for name in targets if name not in calls}
    return sites, skipped


def layer_input(args: tuple, kwargs: dict) -> Tensor:
    """The activation a linear layer was called with."""
    return args[0] if args else next(iter(kwargs.values()))


def _search(pattern: str, name: str, option: str) -> bool:
    try:
        return re.search(pattern, name) is not None
    except re.error as error:
        raise PrepError(f"{option} {pattern!r} is not a regular expression: {error}") from error


def _examples(names: list[str]) -> str:
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"the linear layers {shown}" if names else "no linear layers"
