"""Models and tokenizers by path or hub id, with one-line errors."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import os
import tempfile
import textwrap
import weakref
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import PrepError
from ...linear import dtype_name
from ...store.format.schema import content_hash
from ..hub import check_model
from .placement import computes_on_cpu, partition, placement
from .sites import block_index

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
_DEQUANTISE = ("compressed-tensors", "fp8", "mxfp4")  # methods of which transformers takes `dequantize`


def load_config(model: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The model's configuration. PrepError if there is no such model or it needs code of its own."""
    check_model(model, revision)
    from transformers import AutoConfig

    with _one_line(model):
        return AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)


def load_tokenizer(model: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The model's tokenizer. PrepError if it has none."""
    from transformers import AutoTokenizer

    with _one_line(model, "tokenizer"):
        return AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)


def load_model(
    model: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    device_map: str | Mapping[str, int | str] | None = None,
    max_memory: str | Mapping[int | str, int | str] | None = None,
    trust_remote_code: bool = False,
    dequantised: bool = False,
) -> nn.Module:
    """The model in evaluation mode, as the class its configuration names, from safetensors only.

    dtype "auto": the checkpoint's on an accelerator, float32 on a CPU, where half precision is slow and less exact.
    device_map, max_memory: see placement.py. Weights that go to disk stay in the checkpoint; those that it holds in
    another form are written to a folder in TMPDIR, which goes with the model or the process. dequantised: weights that
    transformers can dequantise while it loads them are.
    PrepError if it cannot be loaded, or the checkpoint lacks weights of the blocks, which would be random.
    """
    devices, memory = placement(device, device_map, max_memory)
    config = load_config(model, revision, trust_remote_code)
    packed = getattr(config, "quantization_config", None)
    if dequantised and isinstance(packed, dict) and packed.get("quant_method") in _DEQUANTISE:
        packed["dequantize"] = True
    torch_dtype = DTYPES.get(dtype, torch.float32 if _on_cpu(device or "cpu", devices, memory) else "auto")
    auto = model_class(config)
    if isinstance(devices, dict):
        with _one_line(model):
            empty = without_weights(auto, config, trust_remote_code)
        devices = partition(empty, devices)
    with _one_line(model), quiet(), contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="prep-offload-")) if devices else None
        loaded: Any
        loaded, report = auto.from_pretrained(  # type: ignore[misc]
            model,
            config=config,
            revision=revision,
            dtype=torch_dtype,
            device_map=devices,
            max_memory=memory,
            offload_folder=folder,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=True,  # reported, and refused below
            output_loading_info=True,
        )
        weakref.finalize(loaded, stack.pop_all().close)
    check_complete(model, {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    if device is not None:
        try:
            loaded = loaded.to(device)
        except (RuntimeError, AssertionError) as error:
            raise PrepError(f"--device {device} cannot be used: {_first_line(error)}") from error
    return loaded.eval()


def resolved_dtype(
    dtype: str,
    config: Any,
    device: str | None = None,
    device_map: str | Mapping[str, int | str] | None = None,
    max_memory: str | Mapping[int | str, int | str] | None = None,
) -> str:
    """The dtype that `load_model` gives a model, by name; "auto" where only the checkpoint's tensors tell."""
    if dtype != "auto":
        return dtype
    if _on_cpu(device or default_device(), *placement(device, device_map, max_memory)):
        return "float32"
    known = getattr(config, "dtype", None)
    return dtype_name(known) if isinstance(known, torch.dtype) else str(known or "auto")


def default_device() -> str:
    """Where a model goes that no option places."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _on_cpu(device: str, devices: Any, memory: Any) -> bool:
    """Whether a model computes on the CPU, on `device` or as a device map says."""
    try:
        return torch.device(device).type == "cpu" if devices is None else computes_on_cpu(devices, memory)
    except RuntimeError as error:
        raise PrepError(f"--device {device!r} does not exist: write it like cpu, cuda or cuda:1") from error


def checkpoint_stamp(model: str, config: Any) -> str | None:
    """What identifies a checkpoint without reading it: a hub commit, or the names, sizes and times of its files.

    None where neither is known.
    """
    if os.path.isdir(model):
        files = [*Path(model).glob("*.safetensors"), *Path(model).glob("*.safetensors.index.json")]
        stats = [(file.name, file.stat()) for file in sorted(files)]
        return content_hash(f"{name} {stat.st_size} {stat.st_mtime_ns}\n" for name, stat in stats)
    return getattr(config, "_commit_hash", None)


def model_class(config: Any) -> Any:
    """The class that a configuration names, or one of transformers' auto classes."""
    import transformers

    names = getattr(config, "architectures", None) or []
    return transformers.AutoModelForCausalLM if not names else getattr(transformers, names[0], transformers.AutoModel)


def without_weights(
    auto: Any, config: Any, trust_remote_code: bool = False, dtype: torch.dtype | None = None
) -> nn.Module:
    """The modules of the model that `auto` would load, in `dtype` (the configuration's), on the meta device."""
    from transformers.initialization import meta_device_safe_creation_ops

    config = copy.deepcopy(config)
    settings: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    with torch.device("meta"), meta_device_safe_creation_ops():
        if hasattr(auto, "from_config"):
            return auto.from_config(config, trust_remote_code=trust_remote_code, **settings)
        return auto._from_config(config, **settings)


def check_complete(model: str, random: Collection[str]) -> None:
    """PrepError if weights of the blocks are among those that a checkpoint lacks or has in another shape."""
    in_blocks = sorted(name for name in random if block_index(name) is not None)
    if in_blocks:
        raise PrepError(
            f"the checkpoint {model} has no {in_blocks[0]} of the shape that its config.json says"
            f" ({len(in_blocks)} such weights): complete it, or name another --model"
        )


def config_hash(config: Any) -> str:
    """Hash of the architecture as the configuration describes it, without names and library versions."""
    fields = json.loads(config.to_json_string(use_diff=False))
    for name in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
        fields.pop(name, None)
    return content_hash([json.dumps(fields, sort_keys=True)])


def model_hash(model: nn.Module) -> str:
    """Hash of the architecture: of its configuration, or of names and shapes where a module has none."""
    config = getattr(model, "config", None)
    if hasattr(config, "to_json_string"):
        return config_hash(config)
    return content_hash(f"{name} {tuple(parameter.shape)}\n" for name, parameter in model.named_parameters())


def describe(model: nn.Module, model_id: str | None, revision: str | None) -> dict[str, Any]:
    """The store's `model` attribute; the id is None for a module that was passed as such."""
    first = next((x.dtype for x in model.parameters() if x.is_floating_point()), torch.float32)
    commit = getattr(getattr(model, "config", None), "_commit_hash", None) if model_id else None
    return {
        "id": model_id,
        "revision": revision or commit,
        "class": type(model).__name__,
        "config_hash": model_hash(model),
        "dtype": dtype_name(getattr(model, "dtype", first)),
    }


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextlib.contextmanager
def _one_line(model: str, what: str = "model") -> Iterator[None]:
    """Turn the loaders' exceptions into one line."""
    try:
        yield
    except Exception as error:  # loaders and hub client raise their own kinds
        if "trust_remote_code" in str(error):
            raise PrepError(
                f"{model} needs code from its own repository: pass --trust-remote-code if you trust it"
            ) from error
        said = textwrap.shorten(str(error), 300, placeholder=" ...") or type(error).__name__
        full = "No space left" in str(error)
        advice = "set TMPDIR, where offloaded experts go, or HF_HOME to a larger disk" if full else "check --model"
        raise PrepError(f"cannot load the {what} {model} ({said}): {advice}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No bars, no report on the weights, which is read instead, and no warning of what a device map asks for."""
    import transformers

    log, accelerate = transformers.utils.logging, logging.getLogger("accelerate")
    shown, verbosity, level = log.is_progress_bar_enabled(), log.get_verbosity(), accelerate.level
    log.disable_progress_bar()
    log.set_verbosity_error()
    accelerate.setLevel(logging.ERROR)
    try:
        yield
    finally:
        accelerate.setLevel(level)
        log.set_verbosity(verbosity)
        if shown:
            log.enable_progress_bar()
