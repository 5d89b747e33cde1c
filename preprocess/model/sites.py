"""Which linear layers are calibrated, grouped by the input they share.

Layers that read the same activation (q_proj, k_proj, v_proj; gate_proj, up_proj) form one site and cost one second
moment. Sharing is observed, not guessed from names: two layers share if one forward hands both the same tensor at the
same version. The experts of a block share nothing: each of their projections is a site (see experts.py).
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import PrepError, did_you_mean
from ...linear import is_linear, layer_shape
from ...units import parse_blocks
from .experts import ExpertLinear, expert_layers, home, is_fused

ALL_LINEAR = "all-linear"  # PEFT's word for every linear layer but the head
MASK, DECODER_MASK = "attention_mask", "decoder_attention_mask"
LABELS = "label_mask"  # of a batch: 1 on the tokens that count; no input of the model
NOT_CALLED = "the forward pass does not call it"
_NO_PRODUCTS = (nn.Embedding, nn.modules.conv._ConvNd)


@dataclass(frozen=True)
class Site:
    """One input activation and the linear layers that read it.

    name: the first member in call order; members: layer names in call order; shapes: (d_out, d_in) of each.
    mask: which of a batch's masks tells its real tokens; routed: it is an expert, which is given real tokens only;
    once: a forward calls it once, as far as was seen.
    """

    name: str
    members: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    mask: str = MASK
    routed: bool = False
    once: bool = True

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
    """Linear layers by full module name in module order, then fused experts.

    Without `targets`, or for "all-linear": every linear layer of the blocks, so not the head; in a model without
    blocks, every linear layer. targets, exclude: regular expressions searched in the names, or patterns of whole names
    that begin with *; layers: block numbers such as "0-3,8". PrepError if a target matches no layer, or nothing linear.
    """
    modules: dict[str, nn.Module] = {**dict(model.named_modules()), **expert_layers(model)}
    linear = {name: module for name, module in modules.items() if is_linear(module)}
    usual = {name for name in linear if block_index(name) is not None} or set(linear)
    chosen = set() if targets else usual
    if targets:
        for pattern in targets:
            if pattern == ALL_LINEAR:
                chosen |= usual
                continue
            matched = {name for name in modules if name and _search(pattern, name, "--targets")}
            if not matched:
                meant = did_you_mean(pattern, dict.fromkeys(name.rpartition(".")[2] for name in linear))
                raise PrepError(
                    f"no layer matches --targets {pattern!r}{meant}: "
                    f"{type(model).__name__} has {_examples(list(linear))}"
                )
            if not matched & linear.keys():
                name = min(matched, key=len)
                kind = type(modules[name]).__name__
                raise PrepError(
                    f"--targets {pattern!r} matches {name}, a {kind}, which is not a linear layer: "
                    f"{type(model).__name__} has {_examples(list(linear))}"
                )
            chosen |= matched & linear.keys()
    if layers is not None:
        _check_blocks(layers, linear)
    chosen = _narrowed(chosen, exclude, layers)
    if not chosen:
        where = "--targets, --exclude and --layers" if targets or exclude or layers else "the blocks of this model"
        raise PrepError(f"no linear layer is left by {where}: {type(model).__name__} has {_examples(list(linear))}")
    return {name: module for name, module in linear.items() if name in chosen}


def _check_blocks(layers: str, linear: Iterable[str]) -> None:
    """PrepError for the number of a block that the model does not have."""
    there = {number for name in linear if (number := block_index(name)) is not None}
    missing = [number for number in parse_blocks(layers) if number not in there]
    if missing and there:
        of = f"the model has {len(there)} blocks, {min(there)} to {max(there)}"
        raise PrepError(f"--layers {layers} names block {missing[0]}: {of}")


def other_weights(model: nn.Module, exclude: Sequence[str] = (), layers: str | None = None) -> dict[str, str]:
    """The matrices of the blocks that belong to no linear layer, embedding or convolution: name -> why not calibrated.

    Routers, experts in a layout of their own, packed attention weights. exclude, layers: as in `target_layers`.
    """
    reached = {expert.fused for expert in expert_layers(model).values()}
    unusable = {}
    for owner, module in model.named_modules():
        if is_linear(module) or isinstance(module, _NO_PRODUCTS):
            continue
        for key, parameter in module.named_parameters(owner, recurse=False):
            matrix = parameter.numel() > max(parameter.shape, default=1) and "bias" not in key.rpartition(".")[2]
            if matrix and key not in reached:
                what = "packed or not in memory" if is_fused(module) else "no linear layer"
                unusable[key] = f"a weight of {type(module).__name__}, which is {what}"
    linear = [name for name, module in model.named_modules() if is_linear(module)]
    if any(block_index(name) is not None for name in linear):
        unusable = {name: reason for name, reason in unusable.items() if block_index(name) is not None}
    kept = _narrowed(set(unusable), exclude, layers)
    return {name: reason for name, reason in unusable.items() if name in kept}


def encoder_of(model: nn.Module) -> nn.Module | None:
    """The encoder of a transformers encoder-decoder, which `model` is or holds; None where there is none."""
    for module in model.modules():
        if getattr(getattr(module, "config", None), "is_encoder_decoder", False) and hasattr(module, "get_encoder"):
            return module.get_encoder()  # type: ignore[operator]
    return None


class _Observed:
    """What one forward shows: the inputs of every target, in call order, and the encoder's outputs."""

    def __init__(self, targets: dict[str, nn.Module], encoder: nn.Module | None):
        self.calls: dict[str, list[tuple[Tensor, int]]] = {}
        self.skipped: dict[str, str] = {}
        self.encoded: list[Tensor] = []
        self._handles: list[Any] = []
        if encoder is not None:
            self._handles.append(encoder.register_forward_hook(self._keep))
        for name, module in targets.items():
            self._handles.append(module.register_forward_pre_hook(partial(self._note, name), with_kwargs=True))  # type: ignore[arg-type]
            self._handles.append(module.register_forward_hook(partial(self._look, name)))

    def release(self) -> None:
        """Remove the hooks, and take modules that are not target layers out of the calls."""
        for handle in self._handles:
            handle.remove()
        self.calls = {name: inputs for name, inputs in self.calls.items() if name not in self.skipped}

    def _keep(self, _encoder: nn.Module, _args: tuple, y: Any) -> None:
        self.encoded.append(y if isinstance(y, Tensor) else y[0])

    def _note(self, name: str, _module: nn.Module, args: tuple, kwargs: dict) -> None:
        x = layer_input(args, kwargs)
        self.calls.setdefault(name, []).append((x, x._version))

    def _look(self, name: str, module: nn.Module, _args: tuple, y: object) -> None:
        if not isinstance(y, Tensor):  # a router of Llama 4
            self.skipped[name] = f"{type(module).__name__} gives a {type(y).__name__}, a linear layer a tensor"


def find_sites(
    targets: dict[str, nn.Module], forward: Callable[[], object], encoder: nn.Module | None = None
) -> tuple[list[Site], dict[str, str]]:
    """Sites in call order, observed in one call of `forward`, and the layers it did not reach with the reason.

    encoder: of an encoder-decoder; what lies outside of it has the decoder's mask unless it reads the encoder's output.
    The inputs are kept alive until the forward ends, so `forward` should run a short sequence.
    """
    seen = _Observed(targets, encoder)
    try:
        with torch.no_grad():
            forward()
    except (NotImplementedError, RuntimeError) as error:  # such as `x.to(self.embed_tokens.weight.device)`
        if not re.search(r"\bmeta\b", str(error)):
            raise
        raise PrepError(
            "the model looks at a weight that is on disk from outside of its module: keep the embedding off it, "
            """such as --device-map '{"": "disk", "model.embed_tokens": "cpu"}'"""
        ) from error
    finally:
        seen.release()
    groups: dict[tuple, list[str]] = {}
    for name, inputs in _with_all_experts(seen.calls, targets):
        key = (id(inputs[0][0]), inputs[0][1]) if len(inputs) == 1 else (name,)  # called twice: a site of its own
        groups.setdefault(key, []).append(name)
    inside = {id(module) for module in encoder.modules()} if encoder is not None else None
    sites = []
    for members in groups.values():
        shapes = tuple(layer_shape(targets[member]) for member in members)
        mask, routed = _mask_of(members[0], targets, seen, inside), isinstance(targets[members[0]], ExpertLinear)
        once = all(len(seen.calls.get(member, ())) <= 1 for member in members)
        sites.append(Site(members[0], tuple(members), shapes, mask, routed, once))
    return sites, seen.skipped | _not_reached(sites, targets, seen.skipped)


def _mask_of(name: str, targets: dict[str, nn.Module], seen: _Observed, inside: set[int] | None) -> str:
    """Which mask tells the real tokens of a layer's input. inside: ids of the encoder's modules, if there is one."""
    x = seen.calls[name][0][0] if name in seen.calls else None
    if inside is None or id(home(targets[name])) in inside:
        return MASK
    return MASK if x is not None and any(_same(x, encoded) for encoded in seen.encoded) else DECODER_MASK


def _not_reached(sites: list[Site], targets: dict[str, nn.Module], skipped: dict[str, str]) -> dict[str, str]:
    """The layers that are in no site, with the reason; fused experts by the name of their parameter."""
    reached = {member for site in sites for member in site.members}
    reasons = {}
    for name, layer in targets.items():
        if name not in reached and isinstance(layer, ExpertLinear):
            reasons[layer.fused] = f"{type(layer.owner).__name__} does not compute one expert after the other"
        elif name not in reached and name not in skipped:
            reasons[name] = NOT_CALLED
    return reasons


def layer_input(args: tuple, kwargs: dict) -> Tensor:
    """The activation a linear layer was called with."""
    return args[0] if args else next(iter(kwargs.values()))


def _with_all_experts(
    calls: dict[str, list[tuple[Tensor, int]]], targets: dict[str, nn.Module]
) -> list[tuple[str, list[tuple[Tensor, int]]]]:
    """The calls, with every expert of a parameter where one of them was called: a short sequence is not routed to all.

    Experts have no input to share: they are listed without one.
    """
    fused: dict[str, list[str]] = {}
    for name, layer in targets.items():
        if isinstance(layer, ExpertLinear):
            fused.setdefault(layer.fused, []).append(name)
    ordered: list[tuple[str, list[tuple[Tensor, int]]]] = []
    for name, inputs in calls.items():
        layer = targets[name]
        if isinstance(layer, ExpertLinear):
            ordered += [(expert, []) for expert in fused.pop(layer.fused, [])]
        else:
            ordered.append((name, inputs))
    return ordered


def _same(x: Tensor, y: Tensor) -> bool:
    """True for one tensor, also after it was moved to another device, or there and back."""
    return x is y or (x.shape == y.shape and torch.equal(x, y.to(x.device)))


def _narrowed(names: set[str], exclude: Sequence[str], layers: str | None) -> set[str]:
    """The names that no pattern of `exclude` is found in, of the blocks `layers`."""
    for pattern in exclude:
        names = {name for name in names if not _search(pattern, name, "--exclude")}
    if layers is not None:
        numbers = parse_blocks(layers)
        names = {name for name in names if block_index(name) in numbers}
    return names


def _search(pattern: str, name: str, option: str) -> bool:
    """Whether a regular expression is found in a name, or a pattern such as `*.q_proj`, which is none, is all of it."""
    if pattern.startswith("*"):
        return fnmatch.fnmatchcase(name, pattern)
    try:
        return re.search(pattern, name) is not None
    except re.error as error:
        raise PrepError(
            f"{option} {pattern!r} is not a regular expression: {error}; "
            "write one, such as q_proj$, or a pattern of whole names that begins with *, such as *.q_proj"
        ) from error


def _examples(names: list[str]) -> str:
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"the linear layers {shown}" if names else "no linear layers"
