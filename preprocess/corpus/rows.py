"""Files, directories and hub ids -> a stream of rows, and one line for each thing that can be wrong with them.

Everything is read by `datasets` in streaming mode: no copy of the data is written, no more is read than is asked for.
"""

import glob
import importlib.util
import logging
import os
import re
import textwrap
import traceback
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

from ...errors import PrepError
from ...store.format.untrusted import check_nesting
from ..hub import is_id, nearest_path, unreachable

READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}  # after one of the above but .parquet; names as fsspec has them
SHUFFLE_BUFFER = 10_000  # rows
CHECKED = 1 << 30  # bytes of JSON looked through before a reader sees them
SHUFFLE_FILES = 10  # open at a time

TEXT, CHAT, OTHER = "text", "chat", "other"  # what a column holds; a chat is a list of messages
MESSAGE = {"role", "content"}  # what a message has at least

Row = dict[str, Any]


def read_rows(source: str, subset: str | None, split: str, seed: int) -> tuple[dict[str, str], Generator[Row]]:
    """The columns (name -> TEXT, CHAT or OTHER) and the shuffled rows; both are empty if the data is.

    The order depends on the seed and the data only: files are sorted by name, then shuffled, and their rows pass
    through a buffer of 10,000. Raises PrepError, here or while rows are read, for what cannot be found or read.
    """
    with _explained(source, subset, split):
        dataset = _open(source, subset, split)
        columns = {} if dataset is None else _columns(dataset)

    def rows() -> Generator[Row]:
        if dataset is None:
            return
        with _explained(source, subset, split):
            # Several files feed the buffer in turn, so that the first one does not fill it alone.
            files = min(SHUFFLE_FILES, dataset.num_shards)
            yield from dataset.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER, max_buffer_input_shards=files)

    return columns, rows()


def _open(source: str, subset: str | None, split: str) -> Any:
    """A streaming `datasets.IterableDataset`; None if every file is empty."""
    import datasets

    files = _files(source)
    if not files:
        path = os.path.expanduser(source)
        path = os.path.abspath(path) if os.path.isdir(path) else path
        return datasets.load_dataset(path, name=subset, split=split, streaming=True)
    if subset is not None:
        raise PrepError(f"--subset {subset} selects a part of a hub data set, but {source} names files: leave it out")
    # The JSON and CSV readers fail on a file of no bytes; names are taken for patterns unless escaped.
    names = [glob.escape(os.path.abspath(file)) for file in files if _holds_bytes(file)]
    reader = READERS[_extension(files[0])]
    if reader == "json":
        _check_nesting(files)
    # By default the Parquet reader takes a whole row group at once, and fails on an empty one.
    settings = {"batch_size": 1000} if reader == "parquet" else {}
    return datasets.load_dataset(reader, data_files=names, split=split, streaming=True, **settings) if names else None


def _check_nesting(files: list[str]) -> None:
    """PrepError for JSON nested so deep that its readers, which recurse, would end the process; in the first GB."""
    left = CHECKED
    for file in files:
        with _opened(file) as opened:
            # a .json file is one value, a .jsonl file one a line
            for number, part in enumerate([opened.read(left)] if _extension(file) == ".json" else opened, 1):
                try:
                    check_nesting(part)
                except ValueError as error:
                    raise PrepError(f"{file} (value {number}) cannot be read: {error}; give other --data") from None
                left -= len(part)
                if left <= 0:
                    return


def _opened(file: str) -> Any:
    """A file open for reading its bytes, decompressed. PrepError where nothing here decompresses it."""
    import fsspec

    compression = COMPRESSED.get(os.path.splitext(file)[1].lower())
    if compression and set("[]") & set(os.path.abspath(file)):  # `datasets` makes a URL of it
        raise PrepError(f"{file} is compressed and has a bracket in its path: rename it")
    if compression == "zstd" and compression not in fsspec.available_compressions():
        raise PrepError(f"reading {file} needs a package: pip install zstandard")
    return fsspec.open(file, "rb", compression=compression) if compression else open(file, "rb")


def _holds_bytes(file: str) -> bool:
    with _opened(file) as opened:
        return bool(opened.read(1))


def _files(source: str) -> list[str]:
    """The files a source names, sorted; none for a directory or what must be a hub id."""
    path = os.path.expanduser(source)
    files = [path] if os.path.isfile(path) else sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
    extensions = sorted({_extension(file) for file in files})
    if len(extensions) > 1:
        raise PrepError(f"{source} matches files of several kinds ({', '.join(extensions)}): narrow --data to one")
    if files and extensions[0] not in READERS:
        raise PrepError(f"cannot read {source}: convert it to one of {' '.join(READERS)}, also with .gz or .zst")
    if files or os.path.isdir(path):
        return files
    if glob.has_magic(path):
        raise PrepError(f"no file matches {source}: check --data")
    # `datasets` would take the name of one of its readers, "text" say, for all files of the working directory.
    if not path or (path.isidentifier() and importlib.util.find_spec(f"datasets.packaged_modules.{path}")):
        raise PrepError(f"{source!r} is no file, directory or hub id: check --data")
    if not is_id(path):
        raise PrepError(f"no such file: {source}{nearest_path(path)}; check --data")
    if unreachable(path, "dataset"):
        raise PrepError(
            f"{source} is no file or directory here{nearest_path(path)}, and the hub was not reached: check --data, "
            "or connect"
        )
    return []


def _extension(path: str) -> str:
    """Of what is in the file: `.jsonl` of both x.jsonl and x.jsonl.gz."""
    stem, last = os.path.splitext(path.lower())
    inner = os.path.splitext(stem)[1]
    return inner if last in COMPRESSED and READERS.get(inner, "parquet") != "parquet" else last


def _columns(dataset: Any) -> dict[str, str]:
    import datasets

    features = dataset.features
    if features is None:  # known only from the first rows
        tables = dataset.with_format("arrow").iter(batch_size=1)
        features = next((datasets.Features.from_arrow_schema(table.schema) for table in tables), {})
    return {name: _holds(kind) for name, kind in features.items()}


def _holds(kind: Any) -> str:
    """TEXT, CHAT or OTHER for a feature of `datasets`."""
    if getattr(kind, "dtype", None) in ("string", "large_string"):
        return TEXT
    inner = kind[0] if isinstance(kind, list) and kind else getattr(kind, "feature", None)
    return CHAT if isinstance(inner, dict) and inner.keys() >= MESSAGE else OTHER


@contextmanager
def _explained(source: str, subset: str | None, split: str) -> Iterator[None]:
    """Whatever `datasets` raises becomes a PrepError; its bars, its readers' reports and its calls home are off."""
    import datasets

    reports = logging.getLogger("datasets.packaged_modules")
    level, bars = reports.level, not datasets.are_progress_bars_disabled()
    counts = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    reports.setLevel(logging.CRITICAL)
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # reports even local files, and waits for seconds when offline
    if bars:
        datasets.disable_progress_bars()
    try:
        yield
    except PrepError:
        raise
    except Exception as error:  # every reader and the hub client raise their own kinds
        raise PrepError(_explain(error, source, subset, split)) from error
    finally:
        reports.setLevel(level)
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counts
        if bars:
            datasets.enable_progress_bars()


def _explain(error: Exception, source: str, subset: str | None, split: str) -> str:
    import datasets

    said = textwrap.shorten(str(error), 400, placeholder=" ...") or type(error).__name__
    listed = re.findall(r"\[[^]]*\]", str(error))
    choices = textwrap.shorten(f", one of {listed[-1]}", 400, placeholder=" ...") if listed else ""
    if "Config name is missing" in said:
        return f"{source} has several subsets: choose with --subset{choices}"
    if "BuilderConfig" in said and "not found" in said:
        return f"{source} has no subset {subset!r}: choose with --subset{choices}"
    if "Bad split" in said:
        return f"{source} has no split {split!r}: choose with --split{choices}"
    if isinstance(error, datasets.exceptions.DatasetNotFoundError):
        return f"{source} is no file or directory here, and on the hub: {said} Check --data"
    if isinstance(error, ConnectionError):
        return f"{source} is no file or directory here, and the hub was not reached ({said}): check --data, or connect"
    if isinstance(error, FileNotFoundError):
        return f"{source} holds no data files ({said}): check --data"
    return f"cannot read {_open_file(error) or source} ({said}): repair it, or give other --data"


def _open_file(error: Exception) -> str | None:
    """The file that a reader of `datasets` was in when it failed: its errors do not name it."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        file = frame.f_locals.get("file")
        if "packaged_modules" in frame.f_code.co_filename and isinstance(file, str):
            return file
    return None
