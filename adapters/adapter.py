"""The adapter of a model: its layers, its trainable parameters, its coefficient, and where its bases come from."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..commands import OF_INPUTS
from ..errors import PrepError
from .coefficient import Coefficient
from .cores import Core
from .layer import AdaptedLinear


@dataclass(frozen=True)
class Origin:
    """What an adapter's bases are: a named basis of a store, and per layer the hash and dtype of its weight.

    repaired: per layer what is known of the quantised weight whose error was decomposed; empty for bases of weights.
    """

    store: str
    basis: str
    hash: str
    metric: str
    weights: dict[str, tuple[str, str]]
    repaired: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def identity(self) -> bool:
        """Whether U^T W = diag(S) P holds."""
        return self.metric not in OF_INPUTS


class Adapter:
    """The trainable part of an adapted model: `parameters()` for the optimizer, `coeff(s)` to scale it."""

    def __init__(self, layers: dict[str, AdaptedLinear], core: Core, origin: Origin, coefficient: Coefficient):
        self.layers, self.core, self.origin, self.coefficient = layers, core, origin, coefficient
        self.originals: dict[str, Tensor] = {}  # the weights from before a merge
        self.requires_grad: dict[str, bool] = {}  # of the model's parameters before attach
        self.attributes: dict[str, Any] = {}  # of the model, replaced while the layers are in it

    def __repr__(self) -> str:
        ranks = sorted({len(layer.P) for layer in self.layers.values()})
        rank = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        name = type(self.core).__name__
        return (
            f"Adapter({name} on {self.origin.basis!r}, rank {rank}, {len(self.layers)} layers, "
            f"{self.trainable:,} trainable parameters, {self.multiply_adds:,} multiply-adds per token)"
        )

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trainable parameters with their names in the model."""
        for name, layer in self.layers.items():
            for key, parameter in layer.core.named_parameters():
                if parameter.requires_grad:
                    yield f"{name}.core.{key}", parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trainable parameters."""
        return (parameter for _, parameter in self.named_parameters())

    @property
    def trainable(self) -> int:
        """The number of trainable parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds per token that the adapter adds: r (d_in + d_out) per layer, and one per core parameter."""
        return sum(layer.P.numel() + layer.Ut.numel() for layer in self.layers.values()) + self.trainable

    def set_coeff(self, s: float) -> None:
        """Scale the adapter by s in every forward from here on: 1 as trained, 0 the base model, or the repaired one.

        PrepError where s is not finite or the adapter is merged.
        """
        if not math.isfinite(s):
            raise PrepError(f"the coefficient must be finite, not {s}")
        if self.originals:
            raise PrepError("the adapter is merged at its coefficient: call prep.unmerge(model) first")
        self._set(float(s))

    def _set(self, s: float) -> None:
        self.coefficient.set(s)
        shared: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        for layer in self.layers.values():
            old = layer.core.coeff
            key = (old.device, old.dtype)
            if key not in shared:
                shared[key] = torch.full_like(old, s)
            layer.core.coeff = shared[key]  # replaced, not written: graphs that hold the old one keep its value

    @contextlib.contextmanager
    def coeff(self, s: float) -> Iterator[None]:
        """`with adapter.coeff(0.5): ...` scales the adapter by s for the forwards inside, and for their backward."""
        before = self.coefficient.value
        self.set_coeff(s)
        try:
            yield
        finally:
            self._set(before)


def find_adapter(model: nn.Module) -> tuple[nn.Module, Adapter]:
    """The adapted module, `model` itself or what it wraps, and its adapter. PrepError if there is none."""
    for module in model.modules():
        if "_prep_adapter" in vars(module):
            return module, vars(module)["_prep_adapter"]
    raise PrepError("the model has no adapter: call prep.attach or prep.load first")
