"""Linear layers as matrices: one orientation, one hash, wherever the weight is.

Every formula of the project uses `W (d_out, d_in)` with `y = x @ W.T`, whatever a module calls its parameter. The
weights of a model may be kept elsewhere, all of them in a checkpoint, or some where accelerate put them.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from .errors import PrepError

READER = "_prep_reader"  # the attribute of a module whose parameters are read by it, as `reader` says
PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's `Conv1D`: a linear layer that keeps its weight as (d_in, d_out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and getattr(module, "weight", None) is not None


def is_linear(module: nn.Module) -> bool:
    """True for `nn.Linear` (and its quantised subclasses) and `Conv1D`."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def layer_shape(module: nn.Module) -> tuple[int, int]:
    """(d_out, d_in) of a linear layer, from its features and not from a possibly packed weight."""
    if is_conv1d(module):
        d_in, d_out = module.weight.shape  # type: ignore[union-attr, misc]
        return int(d_out), int(d_in)
    return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]


def weight_matrix(module: nn.Module) -> Tensor:
    """The layer's weight as W (d_out, d_in): a view that shares the parameter's memory, or what `parameter` reads.

    Packed and scaled weights are dequantised by their own library. PrepError where none is known for them.
    """
    weight = getattr(module, "weight", None)  # once: that of an expert is read here
    W = _values(module, "weight", weight) if _is_plain(module, weight) else _dequantised(module, weight)
    return W.T if is_conv1d(module) else W


def is_plain(module: nn.Module) -> bool:
    """Whether the weight is an ordinary tensor of floating-point numbers: not packed, scaled, sparse or a subclass."""
    return _is_plain(module, getattr(module, "weight", None))


def _is_plain(module: nn.Module, weight: Any) -> bool:
    if type(weight) not in (nn.Parameter, Tensor) or weight.layout != torch.strided or weight.dtype not in PLAIN:
        return False
    d_out, d_in = layer_shape(module)  # codes may be kept in a floating-point dtype
    scaled = scales(module) and type(module).__name__ != "FP8Linear"  # which does not scale what it has dequantised
    return weight.numel() == d_out * d_in and not scaled


def scales(module: nn.Module) -> list[str]:
    """The names of a module's own tensors that scale another one."""
    return [name for name in (*module._parameters, *module._buffers) if "scale" in name]


def _dequantised(module: Any, weight: Any) -> Tensor:
    """W of a packed or scaled weight, in the shape of `weight`."""
    kind = type(weight).__name__
    with torch.no_grad():
        if kind == "Params4bit":
            from bitsandbytes import functional

            data, state = weight.data, copy.copy(weight.quant_state)
            if state is None:  # it has not been quantised yet
                return data
            if getattr(state, "packing_format_for_cpu", False):  # as the first forward on a CPU leaves it
                scale = state.absmax.T.reshape(-1).float()
                data, state = functional._convert_weight_packed_for_cpu_inverse(data, state)
                state.absmax, state.nested = scale, False  # it rounds nested ones again and leaves others transposed
            return functional.dequantize_4bit(data, state).reshape(layer_shape(module))
        if kind == "Int8Params":
            from bitsandbytes import functional

            if weight.dtype != torch.int8:  # it has not been quantised yet
                return weight.data
            scale = weight.SCB if weight.SCB is not None else module.state.SCB
            return functional.int8_vectorwise_dequant(weight.data, scale)
        if type(module).__name__ == "FP8Linear":
            from transformers.integrations import finegrained_fp8

            scale = module.weight_scale_inv.detach()
            return finegrained_fp8._dequantize_fp8_weight(weight, scale, module.block_size, torch.float32)
        if kind not in ("Parameter", "Tensor") and hasattr(weight, "dequantize"):  # torchao
            return weight.dequantize()
    sparse = isinstance(weight, Tensor) and weight.layout != torch.strided
    packed = "sparse" if sparse else f"packed or scaled ({kind}, {getattr(weight, 'dtype', 'no tensor')})"
    raise PrepError(
        f"the weight of a {type(module).__name__} is {packed} and cannot be read: leave the layer out with --exclude, "
        "or give the model with plain weights"
    )


@contextlib.contextmanager
def kept_packed(model: nn.Module) -> Iterator[None]:
    """Inside, `state_dict` may be called on a model whose 4-bit weights a forward on a CPU has repacked.

    bitsandbytes unpacks them for it and leaves their scales transposed; they are put back as they were.
    """
    packed: list[tuple[Any, Tensor, Any, dict[str, Any]]] = []
    for weight in model.parameters():
        state = getattr(weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            packed.append((weight, weight.data, state, dict(vars(state))))
    try:
        yield
    finally:
        for weight, data, state, fields in packed:
            weight.data, weight.quant_state = data, state
            vars(state).clear()
            vars(state).update(fields)


def parameter(module: nn.Module, key: str, part: int | None = None) -> Tensor:
    """The parameter `key` of a module with its values, or `part` of its first dimension, read from where they are kept.

    The module stays as it is and nothing is kept. PrepError if the values are nowhere.
    """
    return _values(module, key, getattr(module, key), part)


def _values(module: nn.Module, key: str, value: Any, part: int | None = None) -> Tensor:
    held: Tensor = value.detach()
    if not held.is_meta:
        return held if part is None else held[part]
    read = reader(module)
    if read is None:
        what = f"the {key} {tuple(held.shape)} of a {type(module).__name__}"
        raise PrepError(f"{what} is on the meta device, without values: load the model with its weights")
    return read(key, part).detach()


def reader(module: nn.Module) -> Callable[[str, int | None], Tensor] | None:
    """What reads a module's parameters that are not in memory, by key and part: from a checkpoint, or from where
    accelerate keeps them. None where neither does.
    """
    hook = offload_hook(module)
    return partial(_offloaded, hook.weights_map) if hook is not None else vars(module).get(READER)


def _offloaded(kept: Any, key: str, part: int | None) -> Tensor:
    """What accelerate keeps, on the CPU: from a file of the same dtype it is a mapped view."""
    source: Any = getattr(kept, "dataset", None)
    if hasattr(source, "device"):  # it reads files onto the device that computes: whole, even where a part is wanted
        source = copy.copy(source)
        source.device = "cpu"
        kept, key = source, kept.prefix + key
    return kept[key] if part is None else kept[key][part]


def offload_hook(module: nn.Module) -> Any:
    """accelerate's hook that brings a module's parameters into memory for each call, None where they stay there."""
    hook = getattr(module, "_hf_hook", None)
    return next((one for one in getattr(hook, "hooks", (hook,)) if getattr(one, "offload", False)), None)


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def weight_hash(W: Tensor) -> str:
    """xxh3-128 of W (d_out, d_in) in its own dtype: shape and dtype are part of the hash. 32 hex digits."""
    digest = xxhash.xxh3_128(f"{dtype_name(W.dtype)}{tuple(W.shape)}".encode())
    digest.update(W.contiguous().cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()
