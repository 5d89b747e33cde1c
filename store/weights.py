"""Linear layers as matrices: one orientation, one hash.

Every formula of the project uses `W (d_out, d_in)` with `y = x @ W.T`, whatever a module calls its parameter.
"""

import torch
import xxhash
from torch import Tensor, nn


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's `Conv1D`: a linear layer that keeps its weight as (d_in, d_out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and getattr(module, "weight", None) is not None


def is_linear(module: nn.Module) -> bool:
    """True for `nn.Linear` (and its quantised subclasses) and `Conv1D`."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def layer_shape(module: nn.Module) -> tuple[int, int]:
    """(d_out, d_in) of a linear layer, from its features and not from a possibly packed weight."""
    if is_conv1d(module):
        d_in, d_out = weight_matrix(module).T.shape
        return int(d_out), int(d_in)
    return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]


def weight_matrix(module: nn.Module) -> Tensor:
    """The layer's weight as W (d_out, d_in), a view that shares the parameter's memory."""
    weight: Tensor = module.weight.detach()  # type: ignore[operator, union-attr, assignment]
    return weight.T if is_conv1d(module) else weight


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def weight_hash(W: Tensor) -> str:
    """xxh3-128 of W (d_out, d_in) in its own dtype: shape and dtype are part of the hash. 32 hex digits."""
    digest = xxhash.xxh3_128(f"{dtype_name(W.dtype)}{tuple(W.shape)}".encode())
    digest.update(W.contiguous().cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()
