"""A quantised copy of a model, layer by layer: W (d_out, d_in) -> Q, the weight that the copy computes with.

    nf4, fp4          bitsandbytes, a scale for each 64 weights, as its `Linear4bit` keeps them
    int8              bitsandbytes, a scale for each output, as its `Linear8bitLt` keeps them
    int4, int3, int2  round to nearest between the least and largest of each 64 inputs, or of N: `int4-gN`

A recipe of this list is applied to W. Any other copy is a checkpoint or a module, whose layers are dequantised one by
one by the library that packed them (`weight_matrix`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...commands import RECIPE
from ...copies import label, label_of, quantisation, record_of
from ...errors import PrepError, did_you_mean
from ...linear import layer_shape, weight_hash, weight_matrix
from ...store import LayerRecord
from ..hub import absolute_if_local
from . import loading
from .experts import expert_layers

RECIPES = ("nf4", "fp4", "int8", "int4", "int3", "int2")
GROUP = 64  # inputs that share a scale where a recipe does not say
_BLOCK = 64  # of bitsandbytes


class Copy:
    """A quantised copy, by the recipe, path, hub id or module that `given` is; a checkpoint is loaded when it is read.

    said: what a basis records of it: `source` (recipe, checkpoint or module), `name`, by which its bases are called,
    and of a checkpoint `id`, `revision`, `files` (as `checkpoint_stamp` sees them) and `config`, its quantisation.

    PrepError for a name that is neither a recipe nor a model, or a library that is not installed.
    """

    def __init__(self, given: str | nn.Module, trust_remote_code: bool = False):
        self._given, self._trust = given, trust_remote_code
        if isinstance(given, nn.Module):
            self.said: dict[str, Any] = {"source": "module", "name": label_of(given) or "module"}
        elif RECIPE.fullmatch(given):
            if not given.startswith(("int4", "int3", "int2")) and importlib.util.find_spec("bitsandbytes") is None:
                raise PrepError(f'the recipe {given} is bitsandbytes\': pip install "prep-bases[quant]"')
            self.said = {"source": "recipe", "name": given}
        else:
            self.said = _checkpoint(given, trust_remote_code)

    @property
    def by_recipe(self) -> bool:
        """Whether Q follows from W alone."""
        return self.said["source"] == "recipe"

    @cached_property
    def _layers(self) -> dict[str, nn.Module]:
        if isinstance(self._given, nn.Module):
            net = self._given
        else:
            with _of_option():
                net = loading.load_model(
                    self.said["id"],
                    revision=self.said["revision"],
                    device="cpu",
                    trust_remote_code=self._trust,
                    dequantised=True,
                )
        return {**dict(net.named_modules()), **expert_layers(net)}

    def check(self, modules: Mapping[str, nn.Module]) -> None:
        """PrepError unless the copy has all these layers, of the same shapes, with weights that can be read."""
        if self.by_recipe:
            return
        for layer, module in modules.items():
            there, shape = self._layers.get(layer), layer_shape(module)
            if there is None or not _is_layer(there) or layer_shape(there) != shape:
                raise PrepError(
                    f"the quantised copy has no linear layer {layer} of {shape[0]} x {shape[1]}: give --repair a copy "
                    "of the model that is decomposed"
                )
            if not torch.isfinite(self.weight(layer)).all():
                raise PrepError(f"{layer}: the quantised weight holds NaN or Inf: check the copy given to --repair")

    def weight(self, layer: str, W: Tensor | None = None) -> Tensor:
        """Q (d_out, d_in) of a layer. W: its weight, which a recipe is applied to."""
        if self.by_recipe:
            assert W is not None
            return quantised(W, self.said["name"])
        try:
            return weight_matrix(self._layers[layer])
        except PrepError as error:
            raise PrepError(
                f"{layer} of the quantised copy is a {type(self._layers[layer]).__name__}, which cannot be dequantised "
                "here: give --repair a copy that transformers dequantises on loading, or the module, from Python"
            ) from error

    def error(self, layer: str, W: Tensor) -> tuple[np.ndarray, dict[str, Any]]:
        """E = W - Q (d_out, d_in) in float64, and what a record says of Q."""
        Q = self.weight(layer, W).to("cpu")
        E = W.to("cpu", torch.float64) - Q
        return E.numpy(), record_of(E, Q)

    def is_unchanged(self, said: Mapping[str, Any], records: Mapping[str, LayerRecord]) -> bool:
        """Whether it is the copy of a basis as far as can be told without loading: `said` and `records` are its own."""
        if isinstance(self._given, nn.Module):
            return all(layer in self._layers and self.is_known(layer, one.repaired) for layer, one in records.items())
        return self.by_recipe or (self.said["files"] is not None and self.said["files"] == said.get("files"))

    def is_known(self, layer: str, record: Mapping[str, Any] | None) -> bool:
        """Whether the Q of a record is that of the layer; by a recipe it is where W is."""
        return record is not None and (self.by_recipe or weight_hash(self.weight(layer)) == record["hash"])


def quantised(W: Tensor, recipe: str) -> Tensor:
    """Q (d_out, d_in) of W by a recipe, in W's dtype (float32 for int8 and where W is float64)."""
    W = W.detach().to("cpu", torch.float32 if W.dtype == torch.float64 else W.dtype).contiguous()
    if recipe.startswith(("nf4", "fp4", "int8")):
        return _bitsandbytes(W, recipe)
    bits, _, group = recipe.removeprefix("int").partition("-g")
    return round_to_nearest(W.float(), int(bits), int(group or GROUP)).to(W.dtype)


def round_to_nearest(W: Tensor, bits: int, group: int) -> Tensor:
    """Each `group` inputs of a row of W (d_out, d_in) on 2^bits levels from its least to its largest, zero among them.

    `Q = step (clamp(round(W / step) + zero, 0, 2^bits - 1) - zero)`, as GPTQ and AWQ begin.
    """
    d_out, d_in = W.shape
    size = min(group, d_in)
    blocks = F.pad(W, (0, -d_in % size)).unflatten(1, (-1, size))
    low, high = blocks.amin(2, keepdim=True).clamp(max=0), blocks.amax(2, keepdim=True).clamp(min=0)
    step = ((high - low) / (2**bits - 1)).clamp(min=torch.finfo(W.dtype).tiny)
    zero = torch.round(-low / step)
    codes = torch.clamp(torch.round(blocks / step) + zero, 0, 2**bits - 1)
    return ((codes - zero) * step).flatten(1)[:, :d_in].reshape(d_out, d_in)


def _bitsandbytes(W: Tensor, recipe: str) -> Tensor:
    from bitsandbytes import functional

    with torch.no_grad():
        if recipe == "int8":
            codes, scale, _ = functional.int8_vectorwise_quant(W.half())  # it takes no other dtype
            return functional.int8_vectorwise_dequant(codes, scale)
        codes, state = functional.quantize_4bit(W, blocksize=_BLOCK, compress_statistics=False, quant_type=recipe)
        return functional.dequantize_4bit(codes, state).reshape(W.shape)


def _checkpoint(given: str, trust_remote_code: bool) -> dict[str, Any]:
    """What is recorded of a checkpoint, from its configuration."""
    if "/" not in given and not os.path.isdir(given):
        raise PrepError(
            f"--repair {given!r} is no recipe ({', '.join(RECIPES)}, int4-g128 ...) and no directory here"
            f"{did_you_mean(given, RECIPES)}: give one of them, or the path or hub id of a quantised model"
        )
    model = absolute_if_local(given)
    with _of_option():
        config = loading.load_config(model, trust_remote_code=trust_remote_code)
    settings = quantisation(config)
    return {
        "source": "checkpoint",
        "name": label(settings) or "copy",
        "id": model,
        "revision": getattr(config, "_commit_hash", None),
        "files": loading.checkpoint_stamp(model, config),
        "config": settings,
    }


@contextlib.contextmanager
def _of_option() -> Iterator[None]:
    """Errors inside are those of --repair."""
    try:
        yield
    except PrepError as error:
        raise PrepError(str(error).replace("--model", "--repair")) from error


def _is_layer(module: nn.Module) -> bool:
    return hasattr(module, "nf") or (hasattr(module, "in_features") and hasattr(module, "out_features"))
