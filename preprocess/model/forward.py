"""How a batch runs through a model: without the head where the targets allow it, in evaluation mode."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .experts import home, watched
from .placement import input_device
from .sites import LABELS

Inputs = Any  # a dictionary of tensors, unless `forward` takes something else
Forward = Callable[[Inputs], object]


class TextForward:
    """Runs a batch of text through the part of a transformers model that holds `layers`, without the head if it can."""

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module]):
        body: Any = getattr(model, "base_model", model)
        inside = {id(module) for module in body.modules()}
        if not all(id(home(layer)) in inside for layer in layers.values()):
            body = model
        self._body, self._device = body, input_device(body)
        self._accepted = inspect.signature(body.forward).parameters
        self._own_positions = counts_own_positions(body)

    def __call__(self, batch: Inputs) -> object:
        inputs: dict[str, Any] = {name: value.to(self._device) for name, value in batch.items() if name != LABELS}
        if self._own_positions or "position_ids" not in self._accepted:
            inputs.pop("position_ids", None)
        if "use_cache" in self._accepted:
            inputs["use_cache"] = False
        if "decoder_input_ids" in self._accepted:  # an encoder-decoder reads the text on both sides
            inputs.setdefault("decoder_input_ids", inputs["input_ids"])
            if "attention_mask" in inputs:
                inputs.setdefault("decoder_attention_mask", inputs["attention_mask"])
        return self._body(**inputs)


def text_forward(model: nn.Module, layers: Mapping[str, nn.Module]) -> Forward:
    """`TextForward`, with the products of the experts among `layers` computed by these."""
    return watched(TextForward(model, layers), layers)


def counts_own_positions(model: nn.Module) -> bool:
    """Whether a model numbers its tokens itself, as RoBERTa does: from the padding token's number on, not from 0."""
    return any(hasattr(module, "create_position_ids_from_input_ids") for module in model.modules())


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and eager where it was compiled: compiled code knows no hooks of later on.

    Every module's own mode is restored.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module in training:
            module.training = True
