"""Files and hub ids -> token batches with masks.

    rows -> documents (a column, a template or the chat template) -> tokens -> sequences -> batches

packed:    doc_1 + [end] + doc_2 + [end] + ... cut every seq_len tokens, the tail dropped: no padding anywhere
unpacked:  one document per sequence, truncated to seq_len; batches are padded and `position_ids = cumsum(mask) - 1`
"""

from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from ...errors import PrepError
from ..model.sites import LABELS
from .labels import Document, check_labels, marked
from .render import chunks, parse_template, renderer
from .rows import read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_NO_ANSWER = "check --answer-from and the chat template, or raise --seq-len"


@dataclass(frozen=True)
class CorpusOptions:
    r"""What to read and how to cut it; equal options on equal data give equal sequences.

    `source`: hub id, directory, file (.jsonl .json .parquet .csv .txt) or glob. At most one of `text_column`,
    `template` and `chat_column` is set. A template is like "{question}\n{answer}": columns in braces, `{{` for a brace,
    and \n, \t, \\ as the two characters that a shell passes on. `num_sequences` of `seq_len` tokens are read.
    label_mask: only the tokens of answers count, those of a template from its part `answer_from` on (see labels.py).
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
    label_mask: bool = False
    answer_from: str | None = None


@dataclass(frozen=True, eq=False)
class Corpus:
    """Token sequences, each an int32 array: (seq_len,) if packed, else (1..seq_len,).

    labels: of each sequence a bool array, True on the tokens that count; empty where all do.
    """

    options: CorpusOptions
    sequences: tuple[np.ndarray, ...]
    pad_id: int
    padding_side: str
    labels: tuple[np.ndarray, ...] = ()
    mixture: tuple[dict[str, Any], ...] = ()  # source, weight, sequences and tokens of every part, see mixture.py

    @property
    def tokens(self) -> int:
        """Number of tokens that count: without padding and, under --label-mask, of answers only."""
        return sum(int(answer.sum()) for answer in self.labels) if self.labels else self.read

    @property
    def read(self) -> int:
        """Number of tokens that the model reads, padding not counted."""
        return sum(map(len, self.sequences))

    @property
    def hash(self) -> str:
        """xxh3-128 of the lengths (int64), all tokens (int32) and labels (uint8), little-endian. 32 hex digits."""
        return self.hash_of(len(self.sequences))

    def hash_of(self, count: int) -> str:
        """The hash of a corpus that ends after `count` sequences."""
        first = self.sequences[:count]
        digest = xxhash.xxh3_128(np.array([len(sequence) for sequence in first], "<i8").tobytes())
        for sequence in first:
            digest.update(sequence.astype("<i4").tobytes())
        for answer in self.labels[:count]:
            digest.update(answer.astype(np.uint8).tobytes())
        return digest.hexdigest()

    def batches(self, batch_size: int, start: int = 0) -> Iterator[dict[str, Tensor]]:
        """Batches in order, from sequence number `start` on; the last one may be smaller.

        Each has int64 `input_ids` (B, T); unpacked also `attention_mask` (B, T), 1 on real tokens, and `position_ids`
        (B, T), which count real tokens only, so that padding on the left moves no position. T is the longest sequence
        of the batch. With labels also `label_mask` (B, T), 1 on the tokens that count. PrepError if `batch_size` < 1.
        """
        if batch_size < 1:
            raise PrepError(f"--batch-size is {batch_size}: give 1 or more")
        for first in range(start, len(self.sequences), batch_size):
            rows, answers = (all_of[first : first + batch_size] for all_of in (self.sequences, self.labels))
            if self.options.pack:
                batch = {"input_ids": torch.from_numpy(np.stack(rows)).long()}
                yield batch | ({LABELS: torch.from_numpy(np.stack(answers)).long()} if answers else {})
                continue
            longest = max(map(len, rows))
            ids = torch.full((len(rows), longest), self.pad_id)
            mask, label = torch.zeros_like(ids), torch.zeros_like(ids)
            for i, row in enumerate(rows):
                real = slice(longest - len(row), None) if self.padding_side == "left" else slice(len(row))
                ids[i, real] = torch.from_numpy(row).long()
                mask[i, real] = 1
                if answers:
                    label[i, real] = torch.from_numpy(answers[i]).long()
            batch = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
            yield batch | ({LABELS: label} if answers else {})


def load_corpus(options: CorpusOptions, tokenizer: "PreTrainedTokenizerBase", share: Fraction = Fraction(1)) -> Corpus:
    """The first `num_sequences` sequences of the shuffled data, which are this share of all that were asked for.

    Documents get the tokenizer's special tokens, except those of a chat template, which writes its own. Blank documents
    and rows with a missing value are skipped. Raises PrepError for whatever is wrong with the options or the data.
    """
    check_options(options, tokenizer)
    columns, rows = read_rows(options.source, options.subset, options.split, options.seed)
    documents, labels = list[np.ndarray](), list[np.ndarray]()
    with closing(rows):
        if columns:
            render = renderer(options, columns, tokenizer)
            if options.label_mask:
                found = marked(options, rows, tokenizer)
            else:
                texts = (text for text in map(render, rows) if text and not text.isspace())
                found = ((ids, None) for ids in _tokenize(texts, options, tokenizer))
            documents, labels = _take(found, options, tokenizer)
    if not documents:
        raise PrepError(f"{options.source} holds no text: every document is missing or blank; give other --data")
    tokens = sum(map(len, documents))
    available = tokens // options.seq_len if options.pack else len(documents)
    if available < options.num_sequences:
        raise PrepError(_too_little(options, available, len(documents), tokens, share))
    if options.pack:
        used = options.num_sequences * options.seq_len
        documents = list(np.concatenate(documents)[:used].reshape(-1, options.seq_len))
        labels = list(np.concatenate(labels)[:used].reshape(-1, options.seq_len)) if labels else []
    if labels and not any(answer.any() for answer in labels):
        raise PrepError(f"{options.source} holds no token of an answer in {len(documents)} sequences: {_NO_ANSWER}")
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    pad = 0 if pad is None else pad
    return Corpus(options, tuple(documents), pad, tokenizer.padding_side, tuple(labels))


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
        parse_template(options.template)
    if options.chat_column is not None and not tokenizer.chat_template:
        raise PrepError(
            f"the tokenizer has no chat template, which --chat-column {options.chat_column} needs: give a --model that "
            "has one, or data with the text in a column"
        )
    if options.label_mask:
        check_labels(options, tokenizer)


def _tokenize(
    texts: Iterable[str], options: CorpusOptions, tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[np.ndarray]:
    """One int32 array of at least one token per document; texts are read a chunk ahead."""
    limit = None if options.pack else options.seq_len
    for chunk in chunks(texts, len):
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


def _take(
    documents: Iterable[Document], options: CorpusOptions, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Tokens and answers of as many documents as the sequences need; packed ones end with the end token.

    The end token is an answer where the token before it is. Without --label-mask there are no answers.
    """
    end = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    wanted = options.num_sequences * (options.seq_len if options.pack else 1)
    taken, labels = list[np.ndarray](), list[np.ndarray]()
    have = 0
    for ids, answer in documents:
        if options.pack and end is not None and ids[-1] != end:
            ids = np.append(ids, np.int32(end))
            answer = None if answer is None else np.append(answer, answer[-1])
        taken.append(ids)
        labels += [] if answer is None else [answer]
        have += len(ids) if options.pack else 1
        if have >= wanted:
            break
    return taken, labels


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
