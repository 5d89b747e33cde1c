"""A model ready to be calibrated: its target layers, the sites that they form, and how a batch runs through it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ...errors import PrepError
from ...linear import dtype_name, layer_shape, weight_hash, weight_matrix
from ...store.format.schema import check_writable_name
from ..corpus.source import Source, Text
from ..corpus.text import Corpus
from ..numerics.accumulators import moment_kind
from ..options import CovarianceOptions
from .checkpoint import free, pretend
from .experts import eager, expert_layers
from .forward import Forward, counts_own_positions, evaluating
from .sites import NOT_CALLED, Site, encoder_of, find_sites, other_weights, target_layers
from .stack import Stack, checked, refused, stack_of

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Network:
    """layers: name -> module of every target; sites in call order; kinds: site name -> moment kind.

    weights: layer -> what a store says of it: shape, hash and dtype of its weight. forward runs a batch; skipped:
    layer -> why it has no moments. stack: of a model that is run block by block, whose weights are known when their
    block has been loaded; blocks: site name -> number of its block there.
    """

    module: nn.Module
    layers: dict[str, nn.Module]
    sites: tuple[Site, ...]
    kinds: dict[str, str]
    weights: dict[str, dict[str, Any]]
    forward: Forward
    skipped: dict[str, str]
    stack: Stack | None = None
    blocks: Mapping[str, int] = field(default_factory=dict)

    def weigh(self, inside: str) -> None:
        """Note the weights of the layers below a module, which are in memory, as far as they are not known."""
        for name, layer in self.layers.items():
            if name.startswith(f"{inside}.") and name not in self.weights:
                self.weights[name] = weight_record(name, layer)


def observe(module: nn.Module, source: Source, options: CovarianceOptions, weighed: bool = True) -> Network:
    """The layers that the options choose, and their sites as one short forward pass shows them.

    weighed: False leaves the weights unread. PrepError where nothing is left to calibrate, or the text does not fit the
    model.
    """
    if isinstance(source, Text):
        check_fits(module, source.corpus)
    layers = target_layers(module, options.targets, options.exclude, options.layers)
    for name in layers:
        check_writable_name(name, "layer")
    chosen = layers if weighed else {}
    weights = {name: weight_record(name, layer) for name, layer in chosen.items()}  # a forward may repack them
    forward = source.forward(module, layers)
    with evaluating(module):
        sites, skipped = find_sites(layers, lambda: forward(source.example()), encoder_of(module))
    if not sites:
        raise PrepError("no layer is reached by the forward pass: choose others with --targets")
    if not options.targets:
        skipped |= other_weights(module, options.exclude, options.layers)
    kinds = {site.name: moment_kind(options.moment, site.shapes) for site in sites}
    return Network(module, layers, tuple(sites), kinds, weights, forward, skipped)


def observe_blocks(net: nn.Module, source: Source, options: CovarianceOptions, device: torch.device = CPU) -> Network:
    """The network of a model of `open_model`, to be run block by block on `device`; nothing of its weights is read.

    PrepError for a family that cannot be run so.
    """
    pretend(net, device)
    try:
        with eager(expert_layers(net).values()):  # other products refuse such weights
            return _observed_blocks(net, source, options, device)
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        what = f"does not run with stand-ins for its weights ({' '.join(str(error).split())[:80]})"
        raise refused(net, what) from error
    finally:
        free(net.modules())


def _observed_blocks(net: nn.Module, source: Source, options: CovarianceOptions, device: torch.device) -> Network:
    network = observe(net, source, options, weighed=False)
    stack, blocks = stack_of(net, network.sites, device)
    inside = tuple(f"{name}." for name in stack.names)
    idle = [layer for layer, reason in network.skipped.items() if reason == NOT_CALLED]
    missed = next((layer for layer in idle if layer.startswith(inside)), None)
    if missed is not None:  # other weights might call it
        raise refused(net, f"does not always call {missed}", "--exclude that layer, or ")
    with evaluating(net):
        checked(stack, network.forward, source.example())
    return replace(network, forward=stack.forward(network.forward), stack=stack, blocks=blocks)


def weight_record(name: str, layer: nn.Module) -> dict[str, Any]:
    """What a store says of a layer: shape, and hash and dtype of the weight. PrepError where that cannot be read."""
    try:
        W = weight_matrix(layer)
    except PrepError as error:
        raise PrepError(f"{name}: {error}") from error
    return {"shape": list(layer_shape(layer)), "weight_hash": weight_hash(W), "weight_dtype": dtype_name(W.dtype)}


def check_fits(model: nn.Module, corpus: Corpus) -> None:
    """Refuse sequences the model has no positions for, and tokens it has no embedding for."""
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    longest, limit = max(map(len, corpus.sequences)), getattr(config, "max_position_embeddings", None)
    if limit and counts_own_positions(model):  # from the number after the padding token's on
        limit -= config.pad_token_id + 1
    if limit and longest > limit:
        raise PrepError(f"sequences of {longest} tokens, the model takes {limit}: use --seq-len {limit} or less")
    table = getattr(model.get_input_embeddings(), "weight", None)  # type: ignore[operator]
    if table is None:
        raise PrepError(f"{type(model).__name__} reads no tokens: give it batches=, from Python")
    top = max(int(ids.max()) for ids in corpus.sequences)
    if top >= len(table):
        raise PrepError(
            f"the tokenizer gives token {top}, the model embeds {len(table)} tokens: they do not belong together"
        )
