"""Files for others to read: whole or not there, with the permissions of any other file.

safetensors makes its files readable by their owner alone, whatever the umask.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import PrepError


@contextlib.contextmanager
def written(path: Path) -> Iterator[Path]:
    """Where to write a file that is put in its place at the end, or removed after an error."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        mode = _new_file(partial)
        yield partial
        os.chmod(partial, mode)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def new_json(path: str | Path, value: Any, overwrite: bool) -> None:
    """Write a JSON file. PrepError where something is there and is not to be overwritten, or it cannot be written."""
    target = Path(path)
    if target.is_dir() or (target.exists() and not overwrite):
        raise PrepError(f"{target} is there already: name another path, or replace a file with --overwrite")
    try:
        with written(target) as partial:
            partial.write_text(json.dumps(value, indent=2) + "\n")
    except OSError as error:
        raise PrepError(f"cannot write {target}: {error.strerror}") from error


def readable(folder: Path, pattern: str) -> None:
    """Give the files in `folder` that match `pattern` the permissions of new files."""
    probe = folder / f".{os.getpid()}.partial"
    try:
        mode = _new_file(probe)
    finally:
        probe.unlink(missing_ok=True)
    for path in folder.glob(pattern):
        os.chmod(path, mode)


def _new_file(path: Path) -> int:
    """Make an empty file; the permissions that the umask gives it."""
    path.unlink(missing_ok=True)
    path.touch()
    return stat.S_IMODE(path.stat().st_mode)
