"""What the blocks of a model have given, batch by batch, for the blocks after them: in memory, or in files.

The files lie in `<store>.hidden` beside the store, safetensors with one output of one batch each. A run that was killed
finds those of its last blocks there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ...errors import PrepError
from ...files import written
from ...store.staging import place
from ..model.stack import Output, mapped
from ..model.tensors import Tensors

_RUN = "run.json"
_NAME = re.compile(r"(\d+-\d+\.safetensors|run\.json)(\.\d+\.partial)?")


def folder_of(store: str | Path) -> Path:
    """Where the files of a store's calibration lie."""
    path = place(store)
    return path.with_name(path.name + ".hidden")


class Scratch:
    """Outputs by block and batch, on the host. folder: None keeps them in memory, those of one block.

    of: whose they are; files of anything else are removed. PrepError where something else is in the folder's place.
    """

    def __init__(self, folder: Path | None, of: dict[str, Any]):
        self._folder, self._kept = folder, dict[tuple[int, int], Output]()
        if folder is None:
            return
        said = json.dumps(of, sort_keys=True)
        if _read(folder / _RUN) != said:
            remove(folder)
            folder.mkdir()
            with written(folder / _RUN) as file:
                file.write_text(said)

    def has(self, block: int, batch: int) -> bool:
        """Whether the output of a block for a batch is there."""
        return (block, batch) in self._kept if self._folder is None else self._file(block, batch).exists()

    def get(self, block: int, batch: int) -> Output:
        """An output, which is the caller's own copy where it was read from a file."""
        if self._folder is None:
            return self._kept[block, batch]
        file = self._file(block, batch)
        try:
            stored = Tensors([str(file)])
            parts = {name: stored.read(name) for name in stored}
        except (OSError, ValueError) as error:
            raise PrepError(f"{file} is damaged: remove {file.parent} and run the same command again") from error
        if "output" in parts:
            return parts["output"]
        places = {int(name): value for name, value in parts.items()}
        return tuple(places.get(i) for i in range(max(places) + 1))

    def put(self, block: int, batch: int, output: Output) -> None:
        """Keep an output; in memory, that of the block before goes."""
        held = mapped(output, Tensor.cpu)
        if self._folder is None:
            self._kept.pop((block - 1, batch), None)
            self._kept[block, batch] = held
            return
        parts = {"output": held} if isinstance(held, Tensor) else dict(enumerate(held))
        named = {str(name): value.contiguous() for name, value in parts.items() if value is not None}
        with written(self._file(block, batch)) as file:
            save_file(named, file)

    def drop_before(self, block: int) -> None:
        """Forget what the blocks before this one gave."""
        self._kept = {place: output for place, output in self._kept.items() if place[0] >= block}
        for file in self._folder.glob("*-*.safetensors*") if self._folder is not None else ():
            if int(file.name.partition("-")[0]) < block:
                file.unlink()

    def _file(self, block: int, batch: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{block}-{batch}.safetensors"


def remove(folder: Path) -> None:
    """Remove the files of a calibration. PrepError where something else is there."""
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir() or not all(_NAME.fullmatch(name) for name in os.listdir(folder)):
        raise PrepError(f"{folder} is in the way of the hidden states: move it elsewhere")
    shutil.rmtree(folder)


def _read(file: Path) -> str | None:
    return file.read_text() if file.is_file() else None
