"""What `prep covariance` refuses before it begins: options and inputs that do not go together, stores of other runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from ...errors import PrepError
from ...store import Store, open_store
from ..corpus.source import Mask
from ..corpus.text import Corpus
from ..distributed import Ranks
from ..progress import say
from .hooks import counts_own_positions


def check_inputs(
    model: str | nn.Module, data: str | None, batches: Any, mask: Mask | None, loading: dict[str, Any]
) -> None:
    """Refuse combinations that make no sense; loading: options that only a path or hub id has, by name."""
    if (data is None) == (batches is None):
        raise PrepError("give either data=, or batches= for a model of your own")
    if batches is None and mask is not None:
        raise PrepError("mask= belongs to batches=: text is masked by its tokenizer")
    if not isinstance(model, str):
        if data is not None:
            raise PrepError("data= needs the tokenizer of a path or hub id: name the model so, or give batches=")
        given = [name for name, value in loading.items() if value]
        if given:
            raise PrepError(f"{given[0]}= is for loading a path or hub id: prepare the module itself")


def check_ranks(ranks: Ranks, alone: bool, device: str | None, device_map: Any) -> None:
    """Refuse what several processes cannot do. alone: a job for one process is asked for."""
    if ranks.size == 1:
        return
    if alone:
        raise PrepError(
            f"batches= and --dry-run are for one process, these are {ranks.size}: start it without torchrun"
        )
    if ranks.local_size == 1:
        return
    if device is not None and ":" in device:
        raise PrepError(f"--device {device} would hold {ranks.local_size} processes: leave it out, each takes its own")
    devices = [visible.split(",") for visible in ranks.gather(os.environ.get("CUDA_VISIBLE_DEVICES", "all"))]
    for i in range(0, ranks.size, ranks.local_size):
        own = [name for visible in devices[i : i + ranks.local_size] for name in visible]
        if device_map is not None and len(set(own)) < len(own):
            raise PrepError(
                "--device-map spreads the model over every device that a process sees, and the processes of a node see "
                "the same ones: start one per node, or give each its own CUDA_VISIBLE_DEVICES"
            )


def check_fits(model: nn.Module, corpus: Corpus) -> None:
    """Refuse sequences the model has no positions for, and tokens it has no embedding for."""
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    longest, limit = max(map(len, corpus.sequences)), getattr(config, "max_position_embeddings", None)
    if limit and counts_own_positions(model):  # from the number after the padding token's on
        limit -= config.pad_token_id + 1
    if limit and longest > limit:
        raise PrepError(f"sequences of {longest} tokens, the model takes {limit}: use --seq-len {limit} or less")
    top, size = max(int(ids.max()) for ids in corpus.sequences), model.get_input_embeddings().weight.shape[0]  # type: ignore[operator, union-attr]
    if top >= size:
        raise PrepError(f"the tokenizer gives token {top}, the model embeds {size} tokens: they do not belong together")


def existing_run(
    location: str | Path, wanted: dict[str, Any], overwrite: bool, quiet: bool
) -> tuple[Store | None, bool]:
    """The store that is there, if its run is the wanted one or it holds bases only, and whether the run is complete.

    PrepError where it holds another run.
    """
    path = Path(location)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return None, False
    found = open_store(location)
    if overwrite:
        return None, False
    sections = ["model"] if found.corpus is None else ["model", "corpus", "options"]
    differences = []
    for section in sections:
        have = found.attrs[section]
        for key, value in wanted[section].items():
            if key == "revision" and value is None:
                continue
            if have.get(key) != value:
                differences.append(f"{section} {key}: {have.get(key)!r} there, {value!r} asked for")
    if found.corpus is not None and wanted["corpus"]["source"] == "batches":
        raise PrepError(
            f"{location} holds moments, and batches cannot be compared with theirs: "
            "name another store, or replace it with overwrite=True"
        )
    if differences:
        raise PrepError(
            f"{location} holds a run with other options ({'; '.join(differences)}): "
            "name another --store, or replace it with --overwrite"
        )
    done = found.status == "complete" and found.corpus is not None
    if done:
        say(f"{location} is complete and was made with the same options: nothing to do", quiet)
    return found, done
