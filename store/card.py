"""The model card of a store on the hub: what it holds, of what it was made, how it is used. Its README.md there."""

from __future__ import annotations

import os
import re
import statistics
from typing import Any

from .artifact import Store
from .basis import BasisSet
from .info import basis_rows, corpus_lines, info, sources

LIBRARY = "prep"
TAGS = ("prep", "lora", "svd", "activation-statistics")
_OWN = ("library_name", "base_model", "datasets")  # metadata that prep writes; other fields are the user's


def card(store: Store, url: str, before: str | None = None) -> str:
    """The card of a store that goes to `url`. before: the card that is there, whose other metadata, such as the
    licence, is kept."""
    from huggingface_hub import ModelCardData

    facts = info(store)
    theirs = {name: value for name, value in (_metadata(before) or {}).items() if name not in _OWN}
    tags = list(dict.fromkeys([*TAGS, *(theirs.pop("tags", None) or ())]))
    base, read = facts["model"].get("id"), list(dict.fromkeys(filter(_is_id, sources(facts["corpus"] or {}))))
    data = ModelCardData(
        **theirs, library_name=LIBRARY, base_model=base if _is_id(base) else None, datasets=read or None, tags=tags
    )
    licence = "" if data.license else "# license: for you to choose; a later push keeps it\n"
    return f"---\n{data.to_yaml()}\n{licence}---\n\n" + "\n".join(_body(store, facts, url))


def is_ours(content: str | None) -> bool:
    """Whether a card is one that prep may write anew: its own, one without text, or none."""
    if content is None:
        return True
    metadata = _metadata(content)
    text = content.split("---", 2)[-1] if content.lstrip().startswith("---") else content
    return metadata is not None and (metadata.get("library_name") == LIBRARY or not text.strip())


def _metadata(content: str | None) -> dict[str, Any] | None:
    """The metadata of a card; None where it cannot be read."""
    from huggingface_hub import ModelCard

    if content is None or not content.lstrip().startswith("---"):
        return {}
    try:
        return ModelCard(content).data.to_dict()
    except Exception:  # of the parser, or of any of the fields
        return None


def _body(store: Store, facts: dict[str, Any], url: str) -> list[str]:
    model, corpus = facts["model"], facts["corpus"] or (facts["removed"] or {}).get("corpus")
    base = f"`{_short(model.get('id') or 'a module')}`" + (
        f" at `{model['revision']}`" if model.get("revision") else ""
    )
    lines = [
        f"# {url.removeprefix('hf://')}",
        "",
        f"Activation statistics and whitened SVD bases of {_cell(base)}, a store of `prep`: starting points for",
        "LoRA and other adapters, to be read layer by layer.",
        "",
        "```python",
        "import prep",
        _use(facts, url),
        "```",
        "",
        "| | |",
        "|---|---|",
        f"| model | {_cell(base)}, {model.get('class', '?')}, {model.get('dtype', '?')} |",
    ]
    if corpus:
        lines += [
            f"| {'text' if not i else ''} | {_cell(_short(line))} |" for i, line in enumerate(corpus_lines(corpus))
        ]
        lines.append(f"| tokens | {corpus.get('tokens', 0):,} |")
    lines += [f"| store | `{store.id}` |", f"| configuration | `{model.get('config_hash', '?')}` |"]
    if facts["moments"]:
        kinds = ", ".join(f"{count} {kind}" for kind, count in facts["moments"]["kinds"].items())
        lines.append(f"| moments | {facts['moments']['layers']} layers, {facts['moments']['sites']} inputs ({kinds}) |")
    if facts["bases"]:
        lines += ["", *_bases(store, facts["bases"])]
    return [*lines, ""]


def _bases(store: Store, bases: dict[str, Any]) -> list[str]:
    """The table of bases: what `prep info` says of them, with the share of the output that they keep, and hashes."""
    head, *rows = basis_rows(bases)
    lines = [[*head[:-1], "kept output", "hash"]]
    for row, name in zip(rows, bases, strict=True):
        kept = _kept(store.bases[name])
        lines.append([*row[:-1], "" if kept is None else f"{kept:.4f}", f"`{bases[name]['hash']}`"])
    table = [f"| {' | '.join(map(_cell, line))} |" for line in lines]
    return [
        "## Bases",
        "",
        table[0],
        "|---" * len(lines[0]) + "|",
        *table[1:],
        "",
        "Kept output: the share of `E||W x||^2` that a layer's stored directions keep on the calibration text, the "
        "median over layers; of bases by `components`, of the input's variance.",
    ]


def _kept(basis: BasisSet) -> float | None:
    shares = [min(1.0, float(values.sum())) for values in basis.shares("kept").values()]
    return statistics.median(shares) if shares else None


def _use(facts: dict[str, Any], url: str) -> str:
    name = next((name for name, one in facts["bases"].items() if one.get("status") == "complete"), None)
    if name is None:
        return f"prep.pull({url!r}, 'prep.zarr')  # then: prep decompose"
    return f'prep.attach(model, "{url}", core="gain", basis="{name}")'


def _is_id(name: object) -> bool:
    """Whether a model or a corpus has the name of a repository of the hub, and not of a file or of nothing."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if not isinstance(name, str) or name == "batches" or os.path.isabs(name) or os.path.exists(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _short(line: str) -> str:
    """A line on a corpus in which the paths of this machine are names of files."""
    return re.sub(r"(?<![^\s])/\S*/", "", line)


def _cell(text: str) -> str:
    """Text that ends no cell of a table."""
    return text.replace("|", "\\|").replace("\n", " ")
