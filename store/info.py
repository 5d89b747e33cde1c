"""What a store holds, for `prep info`: plain values ready for JSON, and the tables made of them."""

from __future__ import annotations

import contextlib
import os
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import zarr

from ..commands import OF_INPUTS, decompose_command, store_option
from ..copies import named
from ..errors import StoreError
from .artifact import Store, open_store
from .bases import Bases
from .basis import BasisSet
from .condition import check_moments, fault
from .excess import advice, excess_of, percent
from .factors import SIZE_RANK, Size, size_rows, sizes_of


def info(store: str | Path | Store = "prep.zarr") -> dict[str, Any]:
    """What a store, or the one at a path or URL, holds: the dictionary that `prep info --json` prints.

    Model, corpus, moments and bases with counts, sizes in bytes and captured energy by kind of layer. `layers` groups
    layer names that differ in their block number only; `energy` is the median over a group. What is damaged has a
    `problem` instead of what it would say of itself.

    Raises StoreError where there is no store.
    """
    store = open_store(store.location if isinstance(store, Store) else store)  # as it is by now
    groups: dict[str, dict[str, Any]] = {}
    sizes = _stored_bytes(store.root)
    summary = _moments(store, groups) if store.corpus is not None and store.status == "complete" else None
    bases: dict[str, dict[str, Any]] = {}
    stored_bases = Bases(store.root)  # also of a store that is not complete
    for name in stored_bases:
        problem = fault(stored_bases, name)
        if problem is not None:
            bases[name] = {"status": problem.split(",")[0], "problem": problem}
            continue
        basis = stored_bases.open(name)
        for layer, record in basis.layers.items():
            _group(groups, layer, record.shape)["energy"].setdefault(name, []).append(record.energy)
        bases[name] = {**_basis(basis), "bytes": sizes and sizes[f"bases/{name}"]}
    if summary is not None:
        summary["bytes"] = sizes and sizes["moments"]
    for group in groups.values():
        group["energy"] = {name: statistics.median(values) for name, values in group["energy"].items()}
    removed = store.attrs.get("removed") or {}
    tokens = (store.corpus or removed.get("corpus") or {}).get("tokens", 0)
    return {
        "store": store.location,
        "status": store.status,
        "id": store.id,
        "prep_version": store.attrs.get("prep_version"),
        "bytes": sizes and sizes[""],
        "model": store.model,
        "corpus": store.corpus,
        "removed": removed or None,
        "moments": summary,
        "bases": bases,
        "advice": advice(tokens, [basis.get("excess") for basis in bases.values()]),
        "layers": groups,
        "run": store.attrs.get("run"),
    }


def _moments(store: Store, groups: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Counts of the moments, which go into `groups` by layer; only a `problem` where they are damaged."""
    kinds = Counter[str]()
    try:
        moments = store.moments
        entries = {layer: moments[layer] for layer in moments}
        check_moments(moments, store.root)
    except StoreError as error:
        return {"problem": str(error)}
    for layer, entry in entries.items():
        group = _group(groups, layer, entry.shape)
        group["moment"], group["tokens"] = entry.kind, entry.count
        kinds[entry.kind] += layer == moments.sites[entry.site][0]
    kept = max((entry.sampled for entry in entries.values()), default=0)
    counts = {"sites": len(moments.sites), "layers": len(moments), "kinds": dict(kinds), "tokens_kept": kept}
    return {**counts, "skipped": moments.skipped}


def _basis(basis: BasisSet) -> dict[str, Any]:
    records = list(basis.layers.values())
    return {
        "status": basis.status,
        "layers": len(records),
        "of": len(basis.expected),
        "method": basis.method,
        "repairs": named(basis.repair),
        "rank": basis.rank,
        "dtype": basis.dtype,
        "hash": basis.hash,
        "energy": statistics.median(r.energy for r in records) if records else None,
        "excess": excess_of(basis),
        "unresolved": sum(r.rank > r.numerical_rank for r in records),
        "start": _start(basis),
    }


def _start(basis: BasisSet) -> dict[str, dict[str, float]] | None:
    """Sizes of LoRA's A and B at the start and of their update, by kind of layer; None where that is not known."""
    try:
        return {kind: vars(one) for kind, one in sizes_of(basis).items()} if basis.status == "complete" else None
    except StoreError:  # damage, which `prep verify` names
        return None


def _group(groups: dict[str, dict[str, Any]], layer: str, shape: tuple[int, int]) -> dict[str, Any]:
    key = pattern(layer)
    key = key if groups.get(key, {"shape": shape})["shape"] == shape else layer
    group = groups.setdefault(key, {"layers": [], "shape": shape, "moment": None, "tokens": None, "energy": {}})
    if layer not in group["layers"]:
        group["layers"].append(layer)
    return group


def _stored_bytes(root: zarr.Group) -> Counter[str] | None:
    """Bytes on a local disk of the store, as "", and below `moments`, `bases/full` and the like; None elsewhere."""
    path = getattr(root.store, "root", None)
    if path is None:
        return None
    sizes = Counter[str]()
    for folder, _, names in os.walk(path):
        size = 0
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # another process is writing
                size += os.stat(f"{folder}{os.sep}{name}").st_size
        parts = folder[len(str(path)) :].split(os.sep)[1:3]
        sizes.update({"/".join(parts[:depth]): size for depth in range(len(parts) + 1)})
    return sizes


def table(facts: dict[str, Any]) -> list[str]:
    """The lines that `prep info` prints of an `info`."""
    model, corpus, moments = facts["model"], facts["corpus"], facts["moments"]
    size = f", {facts['bytes'] / 1e6:,.0f} MB" if facts["bytes"] is not None else ""
    lines = [f"store    {facts['store']} ({facts['status']}{size})"]
    if facts["status"] != "complete":
        lines[0] += ": run the same `prep covariance` command again"
    revision = f" at {model['revision']}" if model.get("revision") else ""
    lines.append(
        f"model    {model['id'] or 'a module'}{revision} ({model.get('class', '?')}, {model.get('dtype', '?')})"
    )
    lines += _corpus(corpus) if corpus else []
    option = store_option(facts["store"])
    if facts["removed"]:
        lines += [*_corpus(facts["removed"]["corpus"]), "moments  removed: only those of the same corpus can come back"]
    if moments:
        size = "" if moments["bytes"] is None else f", {moments['bytes'] / 1e6:,.0f} MB"
        if "problem" in moments:
            lines.append(f"damaged  the moments{size}: {moments['problem']}, or `prep remove --moments{option}`")
        else:
            kinds = ", ".join(f"{count} {kind}" for kind, count in moments["kinds"].items())
            kept = f", {moments['tokens_kept']:,} tokens kept" if moments["tokens_kept"] else ""
            lines.append(f"moments  {moments['layers']} layers, {moments['sites']} sites ({kinds}){kept}{size}")
            lines += [f"skipped  {line}" for line in skipped_lines(moments["skipped"])]
    for name, basis in facts["bases"].items():
        if "problem" in basis:
            again = (
                f"make it anew with {decompose_command(name, store=facts['store'])}, or `prep remove {name}{option}`"
            )
            lines.append(f"damaged  basis {name}: it is {basis['problem']}; {again}")
    bases = {name: basis for name, basis in facts["bases"].items() if "problem" not in basis}
    if bases:
        lines += ["", *aligned(basis_rows(bases))]
        lines += [
            f"{name} repairs {one['repairs']}"
            for name, one in bases.items()
            if one["repairs"] is not None and not name.startswith(f"repair-{one['repairs']}")
        ]
        lines += [facts["advice"]] if facts["advice"] else []
    layers = [["layers", "count", "d_out", "d_in", "moment", "tokens"]]
    energies = [["captured energy", *bases]]
    for name, group in facts["layers"].items():
        tokens = "" if group["tokens"] is None else f"{group['tokens']:,}"
        layers.append([name, str(len(group["layers"])), *map(str, group["shape"]), group["moment"] or "", tokens])
        energy = group["energy"]
        energies.append([name, *(f"{energy[basis]:.3f}" if basis in energy else "" for basis in bases)])
    if len(layers) > 1:
        lines += ["", *aligned(layers)]
    lines += ["", *aligned(energies)] if bases else []
    starts = {name: one["start"] for name, one in bases.items() if one["start"]}
    if starts:
        sizes = {name: {kind: Size(**said) for kind, said in one.items()} for name, one in starts.items()}
        lines += ["", *aligned(size_rows(f"LoRA at r {SIZE_RANK}: rms of A / B / update", sizes))]
    return ["".join(c if c.isprintable() else "?" for c in line) for line in lines]  # a store may hold escape codes


_COLUMNS = ["basis", "metric", "power", "select", "rank", "damping", "layers", "energy", "excess", "dtype", "MB"]


def basis_rows(bases: Mapping[str, dict[str, Any]]) -> list[list[str]]:
    """What is said of bases, as `info` has them, below the names of the columns."""
    return [_COLUMNS, *(_row(name, basis) for name, basis in bases.items())]


def _row(name: str, basis: dict[str, Any]) -> list[str]:
    method = basis["method"]
    damping = _short(method.get("damping")) if method.get("epsilon") is None else f"{method['epsilon']:g} abs"
    count = f"{basis['layers']}" if basis["status"] == "complete" else f"{basis['layers']} of {basis['of']}"
    plain = method["metric"] == "identity" or method["metric"] in OF_INPUTS
    return [
        name,
        method["metric"],
        "" if plain else _short(method.get("power")),
        method.get("select", "") + ("" if method.get("pooling", "rms") == "rms" else f" {method['pooling']}"),
        str(basis["rank"]),
        "" if plain else damping,
        count,
        "" if basis["energy"] is None else f"{basis['energy']:.3f}",
        "" if basis["excess"] is None else percent(basis["excess"]["relative"]),
        basis["dtype"],
        "" if basis["bytes"] is None else f"{basis['bytes'] / 1e6:,.0f}",
    ]


def _corpus(corpus: dict[str, Any]) -> list[str]:
    return [f"{'' if i else 'corpus':<9}{line}" for i, line in enumerate(corpus_lines(corpus))]


def sources(corpus: dict[str, Any]) -> Iterator[str]:
    """The sources of a corpus, of its mixture, or of the stores that it was pooled of."""
    for part in corpus.get("parts") or ():
        yield from sources(part["corpus"])
    if mixture := corpus.get("mixture"):
        yield from (part["source"] for part in mixture)
    elif corpus.get("source"):
        yield corpus["source"]


def corpus_lines(corpus: dict[str, Any]) -> list[str]:
    """What was read in one line, and in one more for each part of a pool or mixture."""
    tokens = f"{corpus.get('tokens', 0):,} tokens"
    if corpus.get("label_mask"):
        tokens += f" of answers out of {corpus.get('tokens_read', 0):,}"
    if "parts" in corpus:
        parts = [(part["weight"], part["corpus"]) for part in corpus["parts"]]
        return [f"pool of {len(parts)} stores, {tokens}"] + [
            f"{weight:g} x {part.get('source', 'a pool')}, {part.get('tokens', 0):,} tokens" for weight, part in parts
        ]
    if corpus.get("source") == "batches":
        return [f"{corpus.get('batches', '?')} batches, {tokens}"]
    source, split, count, length = (corpus.get(name, "?") for name in ("source", "split", "num_sequences", "seq_len"))
    mixture = corpus.get("mixture") or []
    source = f"mixture of {len(mixture)}" if mixture else source
    kind = "packed" if corpus.get("pack") else "padded"
    return [f"{source}, {split}: {count} x {length}, {kind}, {tokens}"] + [
        f"{part['weight']} x {part['source']}, {part['sequences']:,} sequences, {part['tokens']:,} tokens"
        for part in mixture
    ]


def _short(number: float | None) -> str:
    return "" if number is None else f"{number:g}"


def skipped_lines(skipped: Mapping[str, str]) -> list[str]:
    """Layers with the reason, one line for those that differ in their numbers only."""
    groups: dict[tuple[str, str], list[str]] = {}
    for layer, reason in skipped.items():
        groups.setdefault((pattern(layer), reason), []).append(layer)
    return [
        f"{layers[0]}: {reason}" if len(layers) == 1 else f"{pattern} ({len(layers)}): {reason}"
        for (pattern, reason), layers in groups.items()
    ]


def pattern(layer: str) -> str:
    """The kind of a layer: its name with a star for every number."""
    return ".".join("*" if part.isdigit() else part for part in layer.split("."))


def aligned(rows: list[list[str]]) -> list[str]:
    """Columns aligned: the first to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    numeric = [all(row[i][:1].isdigit() or not row[i] for row in rows[1:]) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in rows
    ]
