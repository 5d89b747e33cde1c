"""The moments of a store as the files that quantisers collect for themselves.

    imatrix   a GGUF file of llama.cpp: `<tensor>.in_sum2` (experts or 1, d_in) = n E[x_i^2], `<tensor>.counts` = n
    hessian   a directory of QuIP# and VPTQ: `<block>_<key>.pt` with flatH, mu, n, ct

Layouts: llama.cpp tools/imatrix/imatrix.cpp; quip-sharp quantize_llama/hessian_offline_llama.py, whose readers add
`mu mu^T` to H again. These read with `torch.load` alone: the files are `torch.save` dictionaries of tensors and
numbers, which load with `weights_only=True`.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import PrepError
from ..files import written
from ..store import Store
from ..store.factors import kind_of
from ..store.format.schema import disk_guard
from ..store.info import sources

_CHUNK = 512  # tokens of a chunk, which llama.cpp counts, where a corpus has no length of sequences
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)")
_FUSED = {"gate_up_proj": ("gate_proj", "up_proj")}  # projections that llama.cpp keeps apart
# architectures of transformers that gguf knows by another name
_ARCHITECTURES = {"mistral": "llama", "mixtral": "llama", "phi": "phi2", "gptbigcode": "starcoder"}
_ARCHITECTURES |= {"cohere": "commandr", "deepseekv2": "deepseek2", "deepseekv3": "deepseek2"}
_KEYS = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "o_proj": "o"}  # of QuIP#, by the end of a layer's name
_KEYS |= {"gate_proj": "up", "up_proj": "up", "down_proj": "down"}

Sums = dict[str, tuple[np.ndarray, np.ndarray]]  # tensor -> in_sum2 (m, d_in), counts (m, 1); float32


def put(target: Path, size: int, write: Callable[[Path], object]) -> Path:
    """Write beside the target and rename, so that a file is whole or not there. size: its bytes, about."""
    with disk_guard(target.parent, size):
        target.parent.mkdir(parents=True, exist_ok=True)
        with written(target) as path:
            write(path)
    return target


def imatrix(store: Store, target: Path) -> Path:
    """Write llama.cpp's importance matrix, a GGUF file. PrepError for a model or layer that it has no name for."""
    Writer = type("Writer", (_gguf().GGUFWriter,), {"add_architecture": lambda _: None})  # a matrix has none
    sums, corpus = sums_by_tensor(store), store.corpus or {}

    def write(path: Path) -> None:
        writer, length = Writer(path, ""), corpus.get("seq_len") or _CHUNK
        writer.add_string("general.type", "imatrix")
        writer.add_array("imatrix.datasets", list(sources(corpus)) or ["unknown"])
        chunks = corpus.get("num_sequences") or -(-corpus.get("tokens", 0) // length)
        writer.add_uint32("imatrix.chunk_count", chunks)
        writer.add_uint32("imatrix.chunk_size", length)
        for name in sorted(sums):
            for part, values in zip(("in_sum2", "counts"), sums[name], strict=True):
                writer.add_tensor(f"{name}.{part}", values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    return put(target, sum(sum2.nbytes for sum2, _ in sums.values()), write)


def sums_by_tensor(store: Store) -> Sums:
    """llama.cpp's name of every calibrated weight -> sums of squares and numbers of tokens, of each expert."""
    moments, names = store.moments, _names(store)
    rows: dict[str, dict[int, tuple[Tensor, int]]] = {}
    for members in moments.sites.values():
        moment = moments[members[0]]
        told = moment.diagonal.double() * moment.count, moment.count
        for layer in members:
            whole, expert = _of_expert(layer)
            for part in _FUSED.get(whole.rpartition(".")[2], (whole.rpartition(".")[2],)):
                name = names(layer, f"{whole.rpartition('.')[0]}.{part}")
                rows.setdefault(name, {})[expert] = told
    # experts that no token was routed to are listed as skipped
    count = 1 + max((_of_expert(layer)[1] for layer in [*moments, *moments.skipped]), default=0)
    return {name: _stacked(of, count if name.endswith("_exps.weight") else 1) for name, of in rows.items()}


def _stacked(of: dict[int, tuple[Tensor, int]], count: int) -> tuple[np.ndarray, np.ndarray]:
    sums = np.zeros((count, len(next(iter(of.values()))[0])), np.float32)
    counts = np.zeros((count, 1), np.float32)
    for i, (values, n) in of.items():
        sums[i], counts[i] = values.numpy(), n
    return sums, counts


def _of_expert(layer: str) -> tuple[str, int]:
    """A layer's name without the number of its expert, and that number; 0 for other layers."""
    found = _EXPERT.fullmatch(layer)
    return (f"{found[1]}.{found[3]}", int(found[2])) if found else (layer, 0)


def _names(store: Store) -> Callable[[str, str], str]:
    """(layer, its name without an expert's number) -> the name that llama.cpp has for its weight."""
    gguf, kind = _gguf(), str(store.model.get("class"))
    known = {re.sub(r"[-_]", "", name): arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    prefix = re.sub(r"(For[A-Z]|LMHead|Model$).*", "", kind).lower()
    arch = known.get(_ARCHITECTURES.get(prefix, prefix))
    if arch is None:
        raise PrepError(f"llama.cpp's names for the tensors of {kind} are not known to the gguf package: update it")
    blocks = 1 + max((int(part) for layer in store.moments for part in layer.split(".") if part.isdigit()), default=0)
    table = gguf.get_tensor_name_map(arch, blocks)

    def name(layer: str, whole: str) -> str:
        found = table.get_name(whole)
        if found is None:
            raise PrepError(f"llama.cpp has no name for {layer} in the architecture {gguf.MODEL_ARCH_NAMES[arch]}")
        return f"{found}.weight"

    return name


def _gguf() -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise PrepError('--to imatrix needs the package gguf: pip install "prep-bases[gguf]"') from error


def hessians(store: Store, target: Path) -> Path:
    """Write a file for every site: `C - mu mu^T` as its lower triangle, mu = E[x], the width n, the count of tokens ct.

    StoreError where a layer has no full second moment, before anything is written.
    """
    moments = store.moments
    files: dict[str, str] = {}  # name -> layer; of equal sites, as those of q_proj and k_proj seen apart, the first
    for members in moments.sites.values():
        files.setdefault(_file(members[0]), members[0])
    needed = [layer for layer in files.values() if moments[layer].kind != "full"]
    if needed:
        moments[needed[0]].second_moment  # noqa: B018  # says what is missing
    size = sum(2 * moments[layer].shape[1] ** 2 for layer in files.values())
    with disk_guard(target, size):
        for name, layer in files.items():
            moment = moments[layer]
            mu = moment.mean.double()
            H = moment.second_moment.double() - torch.outer(mu, mu)
            n = len(mu)
            flat = H[torch.tril_indices(n, n).unbind()].float()
            data = {"flatH": flat, "mu": mu.float(), "n": n, "ct": moment.count}
            put(target / name, flat.nbytes, partial(torch.save, data))
    return target


def _file(layer: str) -> str:
    """`3_qkv.pt` of the attention's inputs in block 3, then `3_o`, `3_up`, `3_down`; of other layers their own name."""
    block = next((part for part in layer.split(".") if part.isdigit()), "0")
    whole, _ = _of_expert(layer)
    own = layer.split(f".{block}.", 1)[-1] if whole != layer else kind_of(layer)
    return f"{block}_{_KEYS.get(own.rpartition('.')[2], own) if whole == layer else own}.pt"
