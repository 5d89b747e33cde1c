"""Adapters on disk: safetensors with `<layer>.core.<parameter>` and, unless left out, `<layer>.U`, `.S` and `.P`.

The metadata entry `prep` is JSON: format_version, core {name, builtin, options}, basis {store, name, hash, metric},
layers {name: {shape, rank, weight_hash, weight_dtype}} and a checksum of all this and of the tensors. Version 2, of
adapters that repair a quantised base, has `repaired` in every layer: what is known of its quantised weight (copies.py).
"""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..commands import METRICS
from ..copies import is_sound
from ..errors import PrepError
from ..files import written
from ..store import Store, open_store
from ..store.format.schema import DTYPES, content_hash
from ..store.format.untrusted import REPAIRED, Word, loads, mismatch
from .adapter import Adapter, Origin, find_adapter
from .attach import find_layers, install, refuse_adapted
from .cores import CORES, Core

FORMAT_VERSION = 2
BIG = 10_000_000  # bytes of a stored basis from which on it is said that it can be left out
_log = logging.getLogger(__name__)
_HEADER = {
    "format_version": int,
    "core": {"name": Word, "builtin": bool, "options": dict},
    "basis": {"store": str, "name": Word, "hash": str, "metric": METRICS},
    "embedded": bool,
    "layers": {
        str: {"shape": [int], "rank": int, "weight_hash": Word, "weight_dtype": Word, "repaired?": REPAIRED},
    },
    "checksum": str,
}


def save(model: nn.Module, path: str | Path, embed_basis: bool = True) -> None:
    """Write the model's adapter: self-contained, or without the basis and with a reference to it.

    model: one that `attach` or `load` has adapted. path: of the file, replaced when the new one is whole. embed_basis:
    U, S and P are most of a file, often over 99 %; with False it holds the trained core alone, and `load` is given the
    store. A sharded model is gathered: call it on every rank, rank 0 writes. PrepError if the model has no adapter.
    """
    _, adapter = find_adapter(model)
    tensors: dict[str, Tensor] = {}
    for name, layer in adapter.layers.items():
        tensors |= {f"{name}.core.{key}": value for key, value in layer.core.state().items()}
        if embed_basis:
            tensors |= {f"{name}.U": layer.U, f"{name}.S": layer.core.S, f"{name}.P": layer.projector}
    sharded = any(hasattr(value, "full_tensor") for value in tensors.values())
    whole = {key: _whole(value) for key, value in tensors.items()}
    if sharded and torch.distributed.get_rank() != 0:
        return
    header = _header(adapter, embed_basis)
    header["checksum"] = _checksum(header, whole)
    try:
        with written(Path(path)) as partial:
            save_file(whole, partial, metadata={"format": "pt", "prep": json.dumps(header)})
    except (OSError, SafetensorError) as error:
        raise PrepError(f"cannot write {path}: {error}") from error
    sizes = [sum(value.nbytes for key, value in whole.items() if (".core." in key) == core) for core in (True, False)]
    if sizes[1] > max(BIG, 10 * sizes[0]):
        _log.warning(
            "%s: %.1f MB, of which %.2f MB were trained; prep.save(..., embed_basis=False) writes these alone, and "
            "prep.load then needs the store",
            *(path, sum(sizes) / 1e6, sizes[0] / 1e6),
        )


def load(
    model: nn.Module,
    path: str | Path,
    *,
    core: type[Core] | None = None,
    store: str | Path | Store | None = None,
    verify: bool | str = True,
) -> Adapter:
    """Adapt the model as `save` wrote it to `path`. Strict: every layer, shape, parameter and base weight must agree.

    core: the class of a user's own core; nothing is imported by a name that the file gives. store: where the basis is,
    if the file holds only a reference to it. verify: check the base weights, as in `attach`.

    PrepError names what differs and leaves the model as it was.
    """
    refuse_adapted(model)
    header, tensors = _read(path)
    prototype = _core(path, header["core"], core)
    shapes = {name: tuple(layer["shape"]) for name, layer in header["layers"].items()}
    modules = find_layers(model, shapes)
    basis = header["basis"]
    origin = Origin(
        store=basis["store"],
        basis=basis["name"],
        hash=basis["hash"],
        metric=basis["metric"],
        weights={name: (layer["weight_hash"], layer["weight_dtype"]) for name, layer in header["layers"].items()},
        repaired={name: layer["repaired"] for name, layer in header["layers"].items() if "repaired" in layer},
    )
    ranks = {name: layer["rank"] for name, layer in header["layers"].items()}
    parts = _embedded(tensors, list(ranks)) if header["embedded"] else _referred(path, origin, ranks, store)
    states = {name: _take(tensors, f"{name}.core.") for name in ranks}
    return install(model, modules, parts, prototype, origin, verify, states)


def _header(adapter: Adapter, embedded: bool) -> dict[str, Any]:
    core, origin = adapter.core, adapter.origin
    builtin = type(core) in CORES.values()
    name = next((name for name, cls in CORES.items() if cls is type(core)), type(core).__name__)
    layers = {}
    for layer, module in adapter.layers.items():
        weight_hash, weight_dtype = origin.weights[layer]
        layers[layer] = {
            "shape": [module.out_features, module.in_features],
            "rank": len(module.P),
            "weight_hash": weight_hash,
            "weight_dtype": weight_dtype,
            **({"repaired": origin.repaired[layer]} if layer in origin.repaired else {}),
        }
    return {
        "format_version": FORMAT_VERSION if origin.repaired else 1,
        "core": {"name": name, "builtin": builtin, "options": core.options},
        "basis": {"store": origin.store, "name": origin.basis, "hash": origin.hash, "metric": origin.metric},
        "embedded": embedded,
        "layers": layers,
    }


def _checksum(header: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    content: list[Any] = [json.dumps({key: header[key] for key in header if key != "checksum"}, sort_keys=True)]
    for key in sorted(tensors):
        value = tensors[key]
        content += [f"{key} {value.dtype} {tuple(value.shape)}", value.reshape(-1).view(torch.uint8).numpy()]
    return content_hash(content)


def _whole(value: Tensor) -> Tensor:
    """The tensor in one piece on the CPU."""
    value = value.detach()
    if hasattr(value, "full_tensor"):
        value = value.full_tensor()
    return value.cpu().contiguous()


def _read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file that `save` wrote; PrepError for anything else, damage and newer formats."""
    if not Path(path).is_file():
        raise PrepError(f"no adapter at {path}: give the file that prep.save wrote")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise PrepError(f"{path} is truncated or not a safetensors file ({error}): restore it from a copy") from error
    if "prep" not in metadata:
        raise PrepError(f"{path} was not written by prep.save: a Trainer's checkpoint is resumed by the Trainer")
    try:
        header = loads(metadata["prep"].encode())
    except ValueError as error:
        raise PrepError(f"the metadata of {path} are damaged: restore it from a copy") from error
    version = header.get("format_version") if isinstance(header, dict) else None
    if type(version) is int and version > FORMAT_VERSION:
        raise PrepError(
            f"{path} has the format version {version}, this prep-bases reads up to {FORMAT_VERSION}: upgrade prep-bases"
        )
    wrong = mismatch(header, _HEADER)
    if wrong is not None:
        where = f" at {wrong[1:]:.80}" if wrong else ""
        raise PrepError(f"the metadata of {path} are not those of an adapter{where}: restore it from a copy")
    if header["checksum"] != _checksum(header, tensors):
        raise PrepError(f"{path} was altered or is damaged (its checksum does not match): restore it from a copy")
    _check_layers(path, header, tensors)
    return header, tensors


def _check_layers(path: str | Path, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """PrepError where shapes, ranks and the basis of a layer do not go together, or a number is NaN or infinite."""
    for name, layer in header["layers"].items():
        shape, rank = layer["shape"], layer["rank"]
        known = layer.get("repaired")
        if (known is not None) != (header["format_version"] > 1) or not (known is None or is_sound(known)):
            raise PrepError(f"{path} does not say what {name:.80} repairs: it was not written by prep.save")
        if len(shape) != 2 or min(shape) < 1 or not 1 <= rank <= min(shape):
            raise PrepError(
                f"{path} holds {name:.80} of the shape {shape} at rank {rank}: it was not written by prep.save"
            )
        if header["embedded"]:
            wanted = {"U": (shape[0], rank), "S": (rank,), "P": (rank, shape[1])}
            for role, size in wanted.items():
                value = tensors.get(f"{name}.{role}")
                if value is None or tuple(value.shape) != size or value.dtype not in DTYPES.values():
                    said = "nothing" if value is None else f"{value.dtype} {tuple(value.shape)}"
                    raise PrepError(f"{path} holds {said} as {role} of {name:.80}, not {size}: restore it from a copy")
    for key, value in tensors.items():
        if value.is_floating_point() and not torch.isfinite(value.float()).all():
            raise PrepError(f"{path} holds NaN or Inf in {key:.80}: restore it from a copy")


def _core(path: str | Path, saved: dict[str, Any], given: type[Core] | None) -> Core:
    """An instance of the saved core: a built-in one by name, another one only from the class given."""
    name = saved["name"]
    builtin = CORES.get(name) if saved["builtin"] else None
    if saved["builtin"] and builtin is None:
        raise PrepError(f"{path} holds the core {name!r}, which this prep-bases does not know: upgrade prep-bases")
    if builtin is None and given is None:
        raise PrepError(f"{path} holds the core {name}, which is not a built-in one: pass its class, core={name}")
    if given is not None and (given.__name__ != name if builtin is None else given is not builtin):
        raise PrepError(f"{path} holds the core {name}, not {given.__name__}")
    cls = builtin or given
    assert cls is not None
    return cls(**saved["options"])


def _embedded(tensors: dict[str, Tensor], layers: list[str]) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    return {name: (tensors.pop(f"{name}.U"), tensors.pop(f"{name}.S"), tensors.pop(f"{name}.P")) for name in layers}


def _referred(
    path: str | Path, origin: Origin, ranks: dict[str, int], store: str | Path | Store | None
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """The bases a file refers to, from their store."""
    if store is None:
        raise PrepError(f"{path} refers to the basis {origin.basis!r} of a store: pass it, store=PATH")
    opened = store if isinstance(store, Store) else open_store(store)
    bases = opened.bases[origin.basis]
    if bases.hash != origin.hash:  # which tells the basis; a store's id changes when moments are added to it
        other = "" if opened.id == origin.store else f", which has the id {opened.id} and not {origin.store}"
        raise PrepError(f"{path} refers to another basis {origin.basis!r} than the one in {opened.location}{other}")
    return {name: (part.U, part.S, part.P) for name, part in bases.read(ranks, ranks).items()}


def _take(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
