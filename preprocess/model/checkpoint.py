"""A model without its weights, which are read from its checkpoint one by one when they are asked for.

Names, casts and fused experts are transformers' own: its renamings say which parameter a tensor of the checkpoint
belongs to, its converters make one parameter of several tensors or several of one. All of them are tried on tensors
without values first, so that what cannot be read this way is known before anything is.
"""

from __future__ import annotations

import copy
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import PrepError
from ...linear import READER, parameter
from . import loading
from .experts import ExpertLinear
from .tensors import Tensors

_KEPT = 2  # results that serve several parameters or experts: as many are under way side by side


class Unserved(Exception):
    """Why a model cannot be read weight by weight, in words that follow "is loaded whole:"."""


@dataclass
class _Recipe:
    """How parameters are made of tensors. name: the first of them; converter: transformers' own, None where the tensor
    is the parameter; sources: (pattern of the converter, tensor, dtype to cast it to).

    made: all parameters that come of it; divisible: experts come one by one, each of its own tensors or part of one.
    """

    name: str
    converter: Any
    sources: list[tuple[str, str, torch.dtype]] = field(default_factory=list)
    made: dict[str, tuple[int, ...]] = field(default_factory=dict)
    divisible: bool = False

    def convert(self, model: Any, get: Callable[[str], Tensor], of: Iterable[tuple] | None = None) -> dict[str, Tensor]:
        """The parameters made of the tensors that `get` gives. of: some of the sources in place of all."""
        if self.converter is None:
            _, tensor, dtype = self.sources[0]
            return {self.name: get(tensor).to(dtype)}
        converter = copy.deepcopy(self.converter)
        for pattern, tensor, dtype in self.sources if of is None else of:
            converter.add_tensor(self.name, tensor, pattern, get(tensor).to(dtype))
        made = converter.convert(self.name, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def expert(self, number: int) -> list[tuple[str, str, torch.dtype]]:
        """The sources of one expert: that number of every pattern."""
        patterns = dict.fromkeys(pattern for pattern, *_ in self.sources)
        return [[source for source in self.sources if source[0] == pattern][number] for pattern in patterns]


class Checkpoint:
    """The parameters of `model`, which has none of its weights, in the tensors of its checkpoint.

    random: parameters that the checkpoint lacks or has in another shape, which a loaded model would draw at random.
    """

    def __init__(self, model: Any, tensors: Tensors, dtype: torch.dtype):
        self._model, self._tensors = model, tensors
        self._recipes: dict[str, tuple[_Recipe, str]] = {}  # by parameter, with its name among the recipe's own
        self.random: set[str] = set()
        there = model.state_dict()
        for recipe in _recipes(model, tensors, dtype):
            for name, shape in _tried(recipe, model, tensors).items():
                if name in there and shape != tuple(there[name].shape):
                    self.random.add(name)
                elif name in there:
                    self._recipes.setdefault(name, (recipe, name))
            recipe.divisible = _divisible(recipe, model, tensors)
        self._tie()
        ignored = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
        missing = there.keys() - self._recipes.keys()
        self.random |= {name for name in missing if not any(re.search(pattern, name) for pattern in ignored)}
        self._kept: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
        self._keeping = threading.Lock()

    @property
    def bytes_read(self) -> int:
        """Of tensors in the checkpoint's own dtypes, so far."""
        return self._tensors.bytes_read

    def read(self, name: str, part: int | None = None) -> Tensor:
        """The values of a parameter, or of `part` of its first dimension, as a loaded model has them, bit for bit."""
        if name not in self._recipes:
            raise PrepError(f"the checkpoint has no {name} of the shape that its config.json says: complete it")
        recipe, made = self._recipes[name]
        if part is not None and recipe.divisible:
            if recipe.converter is None:
                _, tensor, dtype = recipe.sources[0]
                return self._tensors.read(tensor, part).to(dtype)
            return recipe.convert(self._model, self._tensors.read, recipe.expert(part))[made][0]
        if part is None and len(recipe.made) == 1:
            return recipe.convert(self._model, self._tensors.read)[made]
        with self._keeping:
            if recipe.name not in self._kept:
                while len(self._kept) >= _KEPT:
                    self._kept.popitem(last=False)
                self._kept[recipe.name] = recipe.convert(self._model, self._tensors.read)
            whole = self._kept[recipe.name][made]
        return whole if part is None else whole[part]

    def bytes_of(self, layers: Mapping[str, nn.Module]) -> int:
        """Bytes to be read for the weights of layers of the model."""
        total, whole = 0, {}
        for layer, module in layers.items():
            expert = isinstance(module, ExpertLinear)
            recipe, _ = self._recipes[module.fused if isinstance(module, ExpertLinear) else f"{layer}.weight"]
            size = sum(self._tensors[tensor].bytes for _, tensor, _ in recipe.sources)
            if expert and recipe.divisible:
                total += size // recipe.made[recipe.name][0]
            else:
                whole[recipe.name] = size
        return total + sum(whole.values())

    def _tie(self) -> None:
        """What is tied to a parameter that is there is made like it, whichever of the two the checkpoint holds."""
        tied: dict[str, str] = getattr(self._model, "all_tied_weights_keys", None) or {}
        for pairs in (tied.items(), [(source, target) for target, source in tied.items()], tied.items()):
            for target, source in pairs:
                if target not in self._recipes and source in self._recipes:
                    self._recipes[target] = self._recipes[source]
        self.random -= self._recipes.keys()


def open_model(model: str, revision: str | None, dtype: torch.dtype, trust_remote_code: bool) -> nn.Module:
    """The model of a path or hub id in evaluation mode, on the meta device but for its buffers; `parameter` reads.

    Nothing but the configuration and safetensors is downloaded. Unserved where the model must be loaded as a whole,
    PrepError for a model that cannot be loaded at all, or a checkpoint that lacks weights of the blocks.
    """
    config = loading.load_config(model, revision, trust_remote_code)
    try:
        net, checkpoint = _opened(model, config, revision, dtype)
    except Unserved:
        raise
    except Exception as error:  # transformers' own classes may have changed, or a file is damaged: loading says so
        raise Unserved(f"{type(error).__name__}: {error}".splitlines()[0]) from error
    loading.check_complete(model, checkpoint.random)
    for name, module in net.named_modules():
        prefix = f"{name}." if name else ""
        vars(module)[READER] = partial(_read, checkpoint, prefix)
    return net


def checkpoint_of(net: nn.Module) -> Checkpoint | None:
    """What a model of `open_model` reads its weights from; None for any other."""
    reader = vars(net).get(READER)
    return None if reader is None else reader.args[0]


def _read(checkpoint: Checkpoint, prefix: str, key: str, part: int | None) -> Tensor:
    return checkpoint.read(prefix + key, part)


def materialise(modules: Iterable[nn.Module], device: torch.device) -> None:
    """Read the parameters and buffers that these modules of a model of `open_model` hold themselves."""
    for module in modules:
        for key in [key for key, _ in module.named_parameters(recurse=False)]:
            module._parameters[key] = nn.Parameter(parameter(module, key).to(device), requires_grad=False)
        for key in [key for key, _ in module.named_buffers(recurse=False)]:
            module._buffers[key] = parameter(module, key).to(device)


def pretend(net: nn.Module, device: torch.device) -> None:
    """Give a model of `open_model` parameters and buffers of one number per row, which take no memory."""
    draw = torch.Generator().manual_seed(0)
    for module in net.modules():
        for key, weight in list(module.named_parameters(recurse=False)):
            module._parameters[key] = nn.Parameter(_rows(weight, draw, device), requires_grad=False)
        for key, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[key] = _rows(buffer, draw, device) if buffer.is_meta else buffer.to(device)


def _rows(like: Tensor, draw: torch.Generator, device: torch.device) -> Tensor:
    if not like.is_floating_point() or not like.ndim:
        return torch.zeros(like.shape, dtype=like.dtype, device=device)
    rows = torch.randn(like.shape[0], generator=draw).mul_(0.1).to(device, like.dtype)
    return rows.as_strided(like.shape, (1, *[0] * (like.ndim - 1)))


def free(modules: Iterable[nn.Module]) -> None:
    """The opposite of `materialise` and `pretend`: what the checkpoint holds takes no memory."""
    for module in modules:
        for key, weight in list(module.named_parameters(recurse=False)):
            empty = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
            module._parameters[key] = nn.Parameter(empty, requires_grad=False)
        for key, buffer in list(module.named_buffers(recurse=False)):
            if key not in module._non_persistent_buffers_set:
                module._buffers[key] = torch.empty(buffer.shape, dtype=buffer.dtype, device="meta")


def _opened(model: str, config: Any, revision: str | None, dtype: torch.dtype) -> tuple[nn.Module, Checkpoint]:
    cls = loading.model_class(config)
    of_transformers = all(kind.__module__.startswith("transformers.") for kind in (cls, type(config)))
    if not of_transformers or not hasattr(cls, "_from_config"):
        raise Unserved("its class is not one of transformers")
    parts = (config, config.get_text_config())
    if any(getattr(part, "quantization_config", None) for part in parts):
        raise Unserved("it is quantised")
    files = _files(model, config, revision)
    with loading.quiet():
        net = loading.without_weights(cls, config, dtype=dtype)
        checkpoint = Checkpoint(net, Tensors(files), dtype)
        _fill_buffers(net)
    return net.eval(), checkpoint


def _files(model: str, config: Any, revision: str | None) -> list[str]:
    """The safetensors files that transformers would load, downloaded if they are on the hub."""
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, find_adapter_config_file
    from transformers.utils.hub import get_checkpoint_shard_files

    if any(getattr(config, name, None) for name in ("transformers_weights", "extra_files", "fusion_config")):
        raise Unserved("its configuration names files of its own")
    revision = getattr(config, "_commit_hash", None) or revision
    if find_adapter_config_file(model, revision=revision) is not None:
        raise Unserved("an adapter lies beside it")
    found = partial(cached_file, model, revision=revision, _raise_exceptions_for_missing_entries=False)
    whole = found(SAFE_WEIGHTS_NAME)
    if whole is not None:
        return [whole]
    index = found(SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        raise Unserved("it has no safetensors")
    return get_checkpoint_shard_files(model, index, revision=revision)[0]


def _fill_buffers(net: Any) -> None:
    """Compute the buffers that no checkpoint holds, such as rotary frequencies."""
    for value in (*net.parameters(), *net.buffers()):
        value._is_hf_initialized = True
    for name, value in list(net.named_non_persistent_buffers()):
        owner, _, key = name.rpartition(".")
        net.get_submodule(owner)._buffers[key] = torch.empty_like(value, device="cpu")
    net.initialize_weights()


def _recipes(model: Any, tensors: Tensors, dtype: torch.dtype) -> Iterable[_Recipe]:
    """The recipes of a checkpoint's tensors, as transformers' `convert_and_load_state_dict_in_model` finds them."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        build_glob_alternation,
        dot_natural_key,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(model)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    there, prefix = model.state_dict(), model.base_model_prefix
    kept_wide = model._get_dtype_plan(dtype)  # patterns of names -> dtypes
    wide, pattern_of, _ = build_glob_alternation(list(kept_wide)) if kept_wide else (re.compile("(?!)"), {}, {})
    recipes: dict[str, _Recipe] = {}
    for tensor in sorted(tensors, key=dot_natural_key):
        name, pattern = rename_source_key(tensor, renamings, converters, prefix, there)
        if name not in there and tensor in there:
            name, pattern = rename_source_key(tensor, [], [], prefix, there)
        if name in there:
            match = wide.search(name)
            cast = there[name].dtype if match is None else kept_wide[pattern_of[str(match.lastgroup)]]
            recipe = recipes.setdefault(name, _Recipe(name, by_pattern.get(pattern or "")))
            recipe.sources.append((pattern or tensor, tensor, cast))
    return recipes.values()


def _tried(recipe: _Recipe, model: Any, tensors: Tensors) -> dict[str, tuple[int, ...]]:
    """The shapes of what a recipe makes, from tensors without values."""
    recipe.made = {name: tuple(value.shape) for name, value in recipe.convert(model, partial(_empty, tensors)).items()}
    return recipe.made


def _divisible(recipe: _Recipe, model: Any, tensors: Tensors) -> bool:
    """Whether expert e of a parameter (experts, ...) comes of part e of its tensor, or of the e-th of each pattern."""
    shapes = list(recipe.made.values())
    if len(shapes) != 1 or len(shapes[0]) != 3:
        return False
    if recipe.converter is None:
        return True
    first, *others = recipe.converter.operations
    stacks = type(first).__name__ == "MergeModulelist" and first.dim == 0
    if not stacks or not all(type(one).__name__ == "Concatenate" and one.dim > 0 for one in others):
        return False
    counts = {sum(pattern == other for other, *_ in recipe.sources) for pattern, *_ in recipe.sources}
    return counts == {shapes[0][0]}


def _empty(tensors: Tensors, name: str) -> Tensor:
    return torch.empty(tensors[name].shape, dtype=tensors[name].dtype, device="meta")
