"""Files and hub ids -> token batches with masks.

    rows -> documents (a column, a template or the chat template) -> tokens -> sequences -> batches

packed:    doc_1 + [end] + doc_2 + [end] + ... cut every seq_len tokens, the tail dropped: no padding anywhere
unpacked:  one document per sequence, truncated to seq_len; batches are padded and `position_ids = cumsum(mask) - 1`
"""

import re
import string
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from ...errors import PrepError
from .rows import CHAT, MESSAGE, TEXT, Row, read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK_CHARACTERS = 1 << 18  # text tokenised in one call, about 64k tokens
ESCAPES = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}

Template = list[tuple[str, str | None]]  # literal text and the column that follows it


@dataclass(frozen=True)
class CorpusOptions:
    r"""What to read and how to cut it; equal options on equal data give equal sequences.

    `source`: hub id, directory, file (.jsonl .json .parquet .csv .txt) or glob. At most one of `text_column`,
    `template` and `chat_column` is set. A template is like "{question}\n{answer}": columns in braces, `{{` for a brace,
    and \n, \t, \\ as the two characters that a shell passes on. `num_sequences` of `seq_len` tokens are read.
    """

    source: str
    subset: str | None = None
    split: str = "train"
    text_column: str | None = None
    template: str | None = None
    chat_column: str | None = None
    num_sequences: int = 256
    seq_len: int = 512
    pack: bool = True
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Corpus:
    """Token sequences, each an int32 array: (seq_len,) if packed, else (1..seq_len,)."""

    options: CorpusOptions
    sequences: tuple[np.ndarray, ...]
    pad_id: int
    padding_side: str
    mixture: tuple[dict[str, Any], ...] = ()  # source, weight, sequences and tokens of every part, see mixture.py

    @property
    def tokens(self) -> int:
        """Number of tokens, padding not counted."""
        return sum(map(len, self.sequences))

    @property
    def hash(self) -> str:
        """xxh3-128 of the lengths (int64) followed by all tokens (int32), little-endian. 32 hex digits."""
        return self.hash_of(len(self.sequences))

    def hash_of(self, count: int) -> str:
        """The hash of a corpus that ends after `count` sequences."""
        first = self.sequences[:count]
        digest = xxhash.xxh3_128(np.array([len(sequence) for sequence in first], "<i8").tobytes())
        for sequence in first:
            digest.update(sequence.astype("<i4").tobytes())
        return digest.hexdigest()

    def batches(self, batch_size: int, start: int = 0) -> Iterator[dict[str, Tensor]]:
        """Batches in order, from sequence number `start` on; the last one may be smaller.

        Each has int64 `input_ids` (B, T); unpacked also `attention_mask` (B, T), 1 on real tokens, and `position_ids`
        (B, T), which count real tokens only, so that padding on the left moves no position. T is the longest sequence
        of the batch. Raises PrepError if `batch_size` < 1.
        """
        if batch_size < 1:
            raise PrepError(f"--batch-size is {batch_size}: give 1 or more")
        for first in range(start, len(self.sequences), batch_size):
            rows = self.sequences[first : first + batch_size]
            if self.options.pack:
                yield {"input_ids": torch.from_numpy(np.stack(rows)).long()}
                continue
            longest = max(map(len, rows))
            ids = torch.full((len(rows), longest), self.pad_id)
            mask = torch.zeros_like(ids)
            for i, row in enumerate(rows):
                real = slice(longest - len(row), None) if self.padding_side == "left" else slice(len(row))
                ids[i, real] = torch.from_numpy(row).long()
                mask[i, real] = 1
            yield {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def load_corpus(options: CorpusOptions, tokenizer: "PreTrainedTokenizerBase", share: Fraction = Fraction(1)) -> Corpus:
    """The first `num_sequences` sequences of the shuffled data, which are this share of all that were asked for.

    Documents get the tokenizer's special tokens, except those of a chat template, which writes its own. Blank documents
    and rows with a missing value are skipped. Raises PrepError for whatever is wrong with the options or the data.
    """
    check_options(options, tokenizer)
    columns, rows = read_rows(options.source, options.subset, options.split, options.seed)
    documents: list[np.ndarray] = []
    with closing(rows):
        if columns:
            render = _renderer(options, columns, tokenizer)
            texts = (text for text in map(render, rows) if text and not text.isspace())
            documents = _take(_tokenize(texts, options, tokenizer), options, tokenizer)
    if not documents:
        raise PrepError(f"{options.source} holds no text: every document is missing or blank; give other --data")
    tokens = sum(map(len, documents))
    available = tokens // options.seq_len if options.pack else len(documents)
    if available < options.num_sequences:
        raise PrepError(_too_little(options, available, len(documents), tokens, share))
    if options.pack:
        used = options.num_sequences * options.seq_len
        documents = list(np.concatenate(documents)[:used].reshape(-1, options.seq_len))
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return Corpus(options, tuple(documents), 0 if pad is None else pad, tokenizer.padding_side)


def check_options(options: CorpusOptions, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse what can be refused before any data is read."""
    for flag, value in (("--num-sequences", options.num_sequences), ("--seq-len", options.seq_len)):
        if value < 1:
            raise PrepError(f"{flag} is {value}: give 1 or more")
    columns = (
        ("--text-column", options.text_column),
        ("--template", options.template),
        ("--chat-column", options.chat_column),
    )
    given = [flag for flag, value in columns if value is not None]
    if len(given) > 1:
        raise PrepError(f"{' and '.join(given)} exclude each other: give one of them")
    if options.template is not None:
        _parse_template(options.template)
    if options.chat_column is not None and not tokenizer.chat_template:
        raise PrepError(
            f"the tokenizer has no chat template, which --chat-column {options.chat_column} needs: give a --model that "
            "has one, or data with the text in a column"
        )


def _renderer(
    options: CorpusOptions, columns: dict[str, str], tokenizer: "PreTrainedTokenizerBase"
) -> Callable[[Row], str | None]:
    """The function row -> text (None where a value is missing) that the options ask for."""
    if options.template is not None:
        template = _parse_template(options.template)
        for _, name in template:
            _require(name, "--template", columns, options)
        return partial(_fill, template)
    if options.chat_column is not None:
        _require(options.chat_column, "--chat-column", columns, options)
        return partial(_chat, options.chat_column, tokenizer)
    if options.text_column is not None:
        _require(options.text_column, "--text-column", columns, options)
        return partial(_text, options.text_column)
    texts = [name for name, holds in columns.items() if holds == TEXT]
    chats = [name for name, holds in columns.items() if holds == CHAT]
    if "text" in columns:
        texts = ["text"]
    elif chats:
        raise PrepError(_conversations(options, chats[0], texts, bool(tokenizer.chat_template)))
    if len(texts) != 1:
        raise PrepError(
            f"{options.source} has the columns {', '.join(columns)}: choose with --text-column NAME, or join several "
            "with --template '{NAME}\\n{NAME}'"
        )
    return partial(_text, texts[0])


def _conversations(options: CorpusOptions, chat: str, texts: list[str], has_template: bool) -> str:
    """What to do about data whose text is in a column of messages."""
    other = f", or take a text with --text-column, one of {', '.join(texts)}" if texts else ""
    if has_template:
        return f"{options.source} holds conversations in the column {chat}: read them with --chat-column {chat}{other}"
    return (
        f"{options.source} holds conversations in the column {chat}, and the tokenizer has no chat template: give a "
        f"--model that has one{other or ', or data with the text in a column'}"
    )


def _is_chat(value: object) -> bool:
    return isinstance(value, list) and value != [] and all(isinstance(m, dict) and m.keys() >= MESSAGE for m in value)


def _require(name: str | None, flag: str, columns: dict[str, str], options: CorpusOptions) -> None:
    if name is not None and name not in columns:
        raise PrepError(f"{flag} names {name!r}, but {options.source} has the columns {', '.join(columns)}")


def _text(column: str, row: Row) -> str | None:
    value = row.get(column)
    if value is not None and not isinstance(value, str):
        also = f", or write it out with --template '{{{column}}}'" if isinstance(value, int | float) else ""
        raise PrepError(f"column {column!r} holds {_kind(value)}: {_other(column, value, '--text-column')}{also}")
    return value


def _fill(template: Template, row: Row) -> str | None:
    """The template with this row's values; numbers are written as Python writes them."""
    parts = []
    for literal, column in template:
        value = "" if column is None else row.get(column)
        if value is None:
            return None
        if not isinstance(value, str | int | float):
            raise PrepError(f"column {column!r} holds {_kind(value)}: {_other(str(column), value, '--template')}")
        parts.append(f"{literal}{value}")
    return "".join(parts)


def _chat(column: str, tokenizer: "PreTrainedTokenizerBase", row: Row) -> str | None:
    """The conversation as the tokenizer's chat template writes it; messages are {"role": ..., "content": ...}."""
    messages = row.get(column)
    if messages is None or messages == []:
        return None
    if not _is_chat(messages):
        first = messages[0] if isinstance(messages, list) and messages else None
        has = f" (they have {', '.join(map(str, first))})" if isinstance(first, dict) else ""
        raise PrepError(
            f"column {column!r} is no list of messages with a role and a content{has}: rename their keys, or choose "
            "another --chat-column"
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # templates raise what they like
        said = textwrap.shorten(str(error), 300, placeholder=" ...") or type(error).__name__
        raise PrepError(f"the chat template refuses a row of column {column!r} ({said}): use --template") from error


def _kind(value: object) -> str:
    return "conversations, not text" if _is_chat(value) else f"{type(value).__name__}, not text"


def _other(column: str, value: object, flag: str) -> str:
    """What to do about a column that an option names and that holds no text."""
    if _is_chat(value):
        return f"use --chat-column {column}"
    return f"choose another with {flag}" if flag == "--text-column" else f"leave it out of {flag}"


def _parse_template(template: str) -> Template:
    r"""Literal text and column names; the escapes \n, \t and \\ are read first."""
    text = re.sub(r"\\[nt\\]", lambda match: ESCAPES[match[0]], template)
    try:
        parsed = list(string.Formatter().parse(text))
    except ValueError as error:
        raise PrepError(
            f"--template {template!r} is malformed ({error}): write columns as {{NAME}}, a brace as {{{{"
        ) from error
    for _, name, spec, conversion in parsed:
        if name is not None and (spec or conversion or not name or name.isdigit() or set(name) & set(".[]")):
            raise PrepError(f"--template {template!r}: only column names can stand in braces, as in {{question}}")
    if all(name is None for _, name, _, _ in parsed):
        raise PrepError(f"--template {template!r} names no column: write one in braces, as in {{question}}")
    return [(literal, name) for literal, name, _, _ in parsed]


def _tokenize(
    texts: Iterable[str], options: CorpusOptions, tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[np.ndarray]:
    """One int32 array of at least one token per document; texts are read a chunk ahead."""
    limit = None if options.pack else options.seq_len
    for chunk in _chunks(texts):
        encoded = tokenizer(
            chunk,
            add_special_tokens=options.chat_column is None,
            truncation=limit is not None,
            max_length=limit,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # a packed document may be longer than the model's context: it is cut later
        )
        for ids in encoded["input_ids"]:
            if ids:
                # A tokenizer does not truncate below its special tokens.
                yield np.array(ids[:limit], np.int32)


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    size = 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if size >= CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _take(
    documents: Iterable[np.ndarray], options: CorpusOptions, tokenizer: "PreTrainedTokenizerBase"
) -> list[np.ndarray]:
    """As many documents as the sequences need; packed ones end with the end token."""
    end = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    wanted = options.num_sequences * (options.seq_len if options.pack else 1)
    taken: list[np.ndarray] = []
    have = 0
    for ids in documents:
        if options.pack and end is not None and ids[-1] != end:
            ids = np.append(ids, np.int32(end))
        taken.append(ids)
        have += len(ids) if options.pack else 1
        if have >= wanted:
            break
    return taken


def _too_little(options: CorpusOptions, available: int, documents: int, tokens: int, share: Fraction) -> str:
    fixes = [f"--num-sequences {available // share}"] if available else []
    if options.pack:
        if tokens >= options.num_sequences:
            fixes.append(f"--seq-len {tokens // options.num_sequences}")
        if documents > available:
            fixes.append(f"--no-pack ({documents} documents)")
    has = f"{available} sequences of {options.seq_len} tokens" if options.pack else f"{available} documents"
    return (
        f"{options.source} gives {has}, {options.num_sequences} were asked for: use {', '.join([*fixes, 'more data'])}"
    )
