"""What a store was made of, in words."""

from __future__ import annotations

from typing import Any

from ..store.info import corpus_lines, skipped_lines
from .gather import Facts


def origin(facts: Facts) -> list[list[str]]:
    """Names and values: model, corpus, moments, time, store."""
    info, model, run = facts.info, facts.info["model"], facts.info["run"] or {}
    corpus = info["corpus"] or (info["removed"] or {}).get("corpus") or {}
    revision = f" at {model['revision']}" if model.get("revision") else ""
    rows = [["model", f"{model['id'] or 'a module'}{revision}, {model.get('class', '?')} in {model.get('dtype', '?')}"]]
    rows += [["weights", model["weights"]]] if model.get("weights") else []
    rows += [["" if i else "corpus", line] for i, line in enumerate(corpus_lines(corpus) if corpus else ())]
    rows += [["template", corpus["template"]]] if corpus.get("template") else []
    rows += [["corpus hash", corpus["hash"]]] if corpus.get("hash") else []
    rows += [["" if i else "moments", line] for i, line in enumerate(_moments(info))]
    if "started" in run:
        seconds = f"{run.get('seconds', 0):,.0f} s"
        rows.append(["calibrated", f"{run['started']}, in {seconds}, by prep {info['prep_version']}"])
    size = "" if info["bytes"] is None else f", {info['bytes'] / 1e6:,.0f} MB"
    return [*rows, ["store", f"{info['store']} ({info['status']}{size}), id {info['id']}"]]


def _moments(info: dict[str, Any]) -> list[str]:
    """How many there are of which kind, and the layers that have none."""
    moments = info["moments"]
    if moments is None:
        return ["removed, bases made of them are left"] if info["removed"] else []
    if "problem" in moments:
        return [moments["problem"]]
    kinds = ", ".join(f"{count} {kind}" for kind, count in moments["kinds"].items())
    kept = f", {moments['tokens_kept']:,} tokens of each kept" if moments["tokens_kept"] else ""
    skipped = [f"skipped {line}" for line in skipped_lines(moments["skipped"])]
    return [f"{moments['layers']} layers, {moments['sites']} inputs ({kinds}){kept}", *skipped]
