"""Validation of untrusted JSON: how deeply it may be nested, and which types its values must have.

A pattern is a type (`float` takes whole numbers too), a value, None, a tuple of patterns of which one must fit,
`[pattern]` for a list, `{str: pattern}` for a dictionary of any names, or `{name: pattern}` for one that must have the
names, may lack each `name?`, and may have others.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from ...commands import METRICS

MAX_DEPTH = 100
NUMBER = 2**63  # whole numbers are below it
_STRINGS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")
_OTHERS = bytes(byte for byte in range(256) if byte not in b"[{]}")


class Word(str):
    """In a pattern: printable text, which messages can quote."""


NULL = None
_MODEL = {name: (str, NULL) for name in ("id?", "revision?", "class?", "config_hash?", "dtype?")}
_CORPUS: dict[str, Any] = dict.fromkeys(("num_sequences?", "seq_len?", "tokens?", "tokens_read?", "batches?"), int)
_CORPUS |= {
    "source?": str,
    "split?": (str, NULL),
    "pack?": bool,
    "label_mask?": bool,
    "parts?": [{"weight": float, "corpus": _CORPUS}],
}
_CORPUS["mixture?"] = [{"source": str, "weight": int, "sequences": int, "tokens": int}]

ROOT = {
    "format": str,
    "format_version": int,
    "id": Word,
    "model": {**_MODEL, "id": (str, NULL)},
    "status": ("complete", "incomplete"),
    "bases": list,
    "corpus?": (NULL, _CORPUS),
    "options?": (NULL, {"keep_tokens?": int}),
    "moments?": str,
    "removed?": {"corpus": _CORPUS, "options": (NULL, dict), "id": Word},
    "checkpoint?": (NULL, dict),
    "run?": (NULL, {"started?": str, "seconds?": float}),
}
SITE = {
    "kind": ("full", "diagonal", "output"),
    "members": {str: {"shape": [int], "weight_hash": Word, "weight_dtype?": Word}},
    "count": int,
    "arrays": {str: str},
    "hash": str,
    "half?": {"count": int, "share": float},
    "sample?": int,
}
MOMENTS = {
    "layout?": (1, 2),
    "sites": {str: list},
    "skipped?": {str: str},
    "hashes?": {str: str},
    "groups?": {str: [str]},
    "records?": {str: SITE},
}
REPAIRED = {"hash": Word, "dtype": Word, "probes": [float], "error": float}
_COPY = {"source": ("recipe", "checkpoint", "module"), "name": Word, "id?": Word, "revision?": (Word, NULL)}
_COPY |= {"files?": (str, NULL), "config?": (NULL, dict)}
BASIS = {
    "status": ("complete", "incomplete"),
    "layout?": (1, 2),
    "method": {
        "metric": METRICS,
        "rank": int,
        "power?": float,
        "select?": ("top", "bottom", "activation"),
        "pooling?": ("rms", "mean_abs"),
        "damping?": (float, NULL),
        "epsilon?": (float, NULL),
        "center?": bool,
        "solver?": str,
    },
    "dtype": ("float64", "float32", "float16", "bfloat16"),
    "model": _MODEL,
    "repair?": _COPY,
    "groups": {str: {"layers": list, "rank": int, "spectrum": int, "shares?": [("kept", "unseen")]}},
    "layers": {
        str: {
            "shape": [int],
            "index": int,
            "rank": int,
            "energy": float,
            "tail": float,
            "numerical_rank": int,
            "solver": str,
            "bound": float,
            "weight_hash": Word,
            "weight_dtype": Word,
            "hash?": str,
            "checksums?": str,
            "shares?": str,
            "crossed?": (NULL, {"ranks": [int], "unseen": [float], "excess": [float], "least": [float]}),
            "repaired?": (NULL, REPAIRED),
        }
    },
    "hash?": str,
    "files?": str,
}


def loads(raw: bytes) -> Any:
    """Parse JSON text. ValueError if it is not JSON, or is nested more than `MAX_DEPTH` deep."""
    check_nesting(raw)
    return json.loads(raw)


def check_nesting(raw: bytes) -> None:
    """ValueError where a JSON text is nested more than `MAX_DEPTH` deep: parsers that recurse would end the process."""
    if raw.count(b"[") + raw.count(b"{") <= MAX_DEPTH:
        return
    steps = _STRINGS.sub(b"", raw).translate(_STEPS, _OTHERS)
    if np.frombuffer(steps, np.int8).cumsum(dtype=np.int64).max(initial=0) > MAX_DEPTH:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep")


def mismatch(value: Any, pattern: Any) -> str | None:
    """The path at which a value does not match the pattern: "" for the value itself, ".sites.x"; None if it matches."""
    if isinstance(pattern, tuple):
        return None if any(mismatch(value, one) is None for one in pattern) else ""
    if isinstance(pattern, (dict, list)):
        if not isinstance(value, type(pattern)):
            return ""
        for at, item, one in _parts(value, pattern):
            if (inner := mismatch(item, one)) is not None:
                return f"{at}{inner}"
        return None
    if isinstance(pattern, type):
        return None if _is(value, pattern) else ""
    return None if type(value) is type(pattern) and value == pattern else ""


def _parts(value: Any, pattern: Any) -> Iterator[tuple[str, Any, Any]]:
    """The parts of a list or dictionary: where, what is there (`_ABSENT` if nothing), and its pattern."""
    if isinstance(pattern, list):
        yield from ((f"[{i}]", item, pattern[0]) for i, item in enumerate(value))
    elif str in pattern:
        yield from ((f".{name}", item, pattern[str]) for name, item in value.items())
    else:
        for name, one in pattern.items():
            plain = name.removesuffix("?")
            if plain in value or plain == name:
                yield f".{plain}", value.get(plain, _ABSENT), one


_ABSENT = object()  # of no type that a pattern names


def _is(value: Any, kind: type) -> bool:
    if kind is Word:
        return type(value) is str and value.isprintable()
    if kind is int or (kind is float and type(value) is int):
        return type(value) is int and abs(value) < NUMBER
    return isinstance(value, kind)
