"""Which tokens of a document are an answer, so that only they are counted: `--label-mask`.

    --template     tokens with a character of the template from its part --answer-from on
    --chat-column  what the chat template writes between {% generation %} and {% endgeneration %}

The model reads whole documents. Special tokens that a tokenizer puts behind a text belong to what they end.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ...errors import PrepError
from .render import chunks, fill, messages_of, split_template, written
from .rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .text import CorpusOptions

Document = tuple[np.ndarray, np.ndarray | None]  # tokens (n,) int32, and which of them are an answer (n,) bool

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def check_labels(options: CorpusOptions, tokenizer: PreTrainedTokenizerBase) -> None:
    """PrepError where answers cannot be told from the rest."""
    if not tokenizer.is_fast:
        raise PrepError("--label-mask needs a fast tokenizer, which says where its tokens are in the text: save one")
    if options.template is not None:
        split_template(options.template, str(options.answer_from))
    elif not _GENERATION.search(str(tokenizer.get_chat_template())):
        raise PrepError(
            "the tokenizer's chat template marks no answers by {% generation %}, which --label-mask needs: add it to "
            "the template, or write the text with --template and --answer-from"
        )


def marked(options: CorpusOptions, rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase) -> Iterator[Document]:
    """The documents of the rows with their answers; blank ones and those with a missing value are left out."""
    of_rows = _conversations if options.template is None else _filled
    limit = None if options.pack else options.seq_len
    kept = slice(-limit, None) if limit and tokenizer.truncation_side == "left" else slice(limit)
    for ids, answer in of_rows(options, rows, tokenizer):
        if len(ids):
            yield np.array(ids[kept], np.int32), np.array(answer[kept], bool)


def _conversations(
    options: CorpusOptions, rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[list[int], list[int]]]:
    column = str(options.chat_column)
    for row in rows:
        messages = messages_of(column, row)
        if messages is not None:
            apply = partial(tokenizer.apply_chat_template, messages, tokenize=True, return_dict=True)
            encoded = written(column, partial(apply, return_assistant_tokens_mask=True))
            yield encoded["input_ids"], encoded["assistant_masks"]


def _filled(
    options: CorpusOptions, rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[list[int], np.ndarray]]:
    prompt, answer = split_template(str(options.template), str(options.answer_from))

    def texts() -> Iterator[tuple[str, int]]:
        for row in rows:
            before, after = fill(prompt, row), fill(answer, row)
            if before is not None and after is not None and (before + after).strip():
                yield before + after, len(before)

    for chunk in chunks(texts(), lambda item: len(item[0])):
        encoded = tokenizer(
            [text for text, _ in chunk], return_offsets_mapping=True, return_attention_mask=False, verbose=False
        )
        for ids, offsets, (_, start) in zip(encoded["input_ids"], encoded["offset_mapping"], chunk, strict=True):
            yield ids, answers(np.array(offsets).reshape(-1, 2), start)


def answers(offsets: np.ndarray, start: int) -> np.ndarray:
    """Which tokens (n,) with the character spans `offsets` (n, 2) reach beyond the character `start`."""
    spans = offsets[:, 1] > offsets[:, 0]
    answer = spans & (offsets[:, 1] > start)
    if spans.any():
        last = int(np.flatnonzero(spans)[-1])
        answer[last + 1 :] = answer[last]
    return answer
