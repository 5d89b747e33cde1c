"""The weight of a layer, read once: hashed, and checked against the one that the store was calibrated on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...errors import PrepError
from ...linear import weight_hash, weight_matrix
from .request import Request


class WrongWeight(PrepError):
    """The model has not the weights that it should have, or they are not finite: what was begun is taken back."""


@dataclass(frozen=True)
class Weight:
    """W (d_out, d_in) in its own dtype, with its hash."""

    W: Tensor
    hash: str


Weigh = Callable[[str, nn.Module], Weight]  # by the layer's name


def weighed(layer: str, module: nn.Module) -> Weight:
    """The weight of a layer. WrongWeight, which names it, where it cannot be read or holds NaN or Inf."""
    try:
        W = weight_matrix(module)
    except PrepError as error:
        raise WrongWeight(f"{layer}: {error}") from error
    if not torch.isfinite(W).all():
        raise WrongWeight(f"{layer}: the weight holds NaN or Inf: check the checkpoint")
    return Weight(W, weight_hash(W))


def weigher(request: Request) -> Weigh:
    """`weighed` for the layers of a request, for several threads.

    WrongWeight also where a layer was calibrated with another weight, if its moment is one of outputs or the model
    should be the calibrated one.
    """

    def weigh(layer: str, module: nn.Module) -> Weight:
        weight, moment = weighed(layer, module), (request.layers or {}).get(layer)
        if moment is not None and weight.hash != moment.weight_hash and moment.kind == "output":
            raise WrongWeight(
                f"{layer} has an output moment of other weights than this model's: give the --model that was calibrated"
            )
        if moment is not None and weight.hash != moment.weight_hash and request.calibrated_model:
            raise WrongWeight(
                f"{layer} has other weights than the store was calibrated on: run `prep covariance --overwrite` with "
                "its options, or give the --model that was calibrated"
            )
        return weight

    return weigh
