"""Names of models and data: a path here, or an id of the hub, which is asked once and not for half a minute."""

from __future__ import annotations

import glob
import os
import re

from ..errors import PrepError, did_you_mean

_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_OF_FILES = re.compile(r"\.(jsonl?|parquet|csv|txt|gz|zst|safetensors|gguf|bin|pth?)$", re.IGNORECASE)
_PATIENCE = 10  # seconds for the one question to the hub


def absolute_if_local(name: str) -> str:
    """A local path or glob made absolute, so that a store finds it from anywhere; a hub id as it is."""
    return os.path.abspath(name) if glob.glob(name, recursive=True) else name


def is_id(name: str) -> bool:
    """Whether a name can be a hub id, one word or two joined by a slash; those of files are paths."""
    return bool(_ID.fullmatch(name)) and not _OF_FILES.search(name)


def check_model(name: str, revision: str | None = None) -> None:
    """PrepError at once where a model is no directory here, and no id or of a hub that cannot be reached."""
    if os.path.exists(name):
        return
    if not is_id(name):
        raise PrepError(f"no model at {name}{nearest_path(name)}: give a directory with config.json or a hub id")
    from huggingface_hub import try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
        return
    if unreachable(name, "model"):
        raise PrepError(
            f"cannot load the model {name}: it is no directory here{nearest_path(name)}, and the hub was not reached; "
            "check --model, or connect"
        )


def unreachable(name: str, kind: str) -> bool:
    """Whether the hub gives no answer about a "model" or "dataset"; in offline mode it is not asked."""
    from huggingface_hub import HfApi

    ask = HfApi().model_info if kind == "model" else HfApi().dataset_info
    try:
        ask(name, timeout=_PATIENCE)
    except Exception as error:  # an answer, too, if it is not one of the connection
        return any(cls.__name__ == "TransportError" for cls in type(error).__mro__)
    return False


def nearest_path(name: str) -> str:
    """` (did you mean 'x'?)` with what is in the same folder under the nearest name; nothing where none is near."""
    folder, last = os.path.split(name.rstrip("/"))
    stem, _ = os.path.splitext(last)
    try:  # an ending in common makes no name near
        there = {os.path.splitext(other)[0]: other for other in sorted(os.listdir(folder or "."))}
    except OSError:
        return ""
    meant = did_you_mean(stem, there)
    found = next((other for other_stem, other in there.items() if f" {other_stem!r}?" in meant), "")
    return f" (did you mean {os.path.join(folder, found)!r}?)" if found else ""
