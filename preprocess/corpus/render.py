"""Rows -> texts: a column, a template of several, or a conversation as the chat template writes it."""

from __future__ import annotations

import re
import string
import textwrap
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from ...errors import PrepError
from .rows import CHAT, MESSAGE, TEXT, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .text import CorpusOptions

CHUNK_CHARACTERS = 1 << 18  # text tokenised in one call, about 64k tokens
ESCAPES = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}

Item = TypeVar("Item")
Template = list[tuple[str, str | None]]  # literal text and the column that follows it


def renderer(
    options: CorpusOptions, columns: dict[str, str], tokenizer: PreTrainedTokenizerBase
) -> Callable[[Row], str | None]:
    """The function row -> text (None where a value is missing) that the options ask for."""
    if options.template is not None:
        template = parse_template(options.template)
        for _, name in template:
            require(name, "--template", columns, options)
        return partial(fill, template)
    if options.chat_column is not None:
        require(options.chat_column, "--chat-column", columns, options)
        return partial(_chat, options.chat_column, tokenizer)
    if options.text_column is not None:
        require(options.text_column, "--text-column", columns, options)
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


def require(name: str | None, flag: str, columns: dict[str, str], options: CorpusOptions) -> None:
    if name is not None and name not in columns:
        raise PrepError(f"{flag} names {name!r}, but {options.source} has the columns {', '.join(columns)}")


def _text(column: str, row: Row) -> str | None:
    value = row.get(column)
    if value is not None and not isinstance(value, str):
        also = f", or write it out with --template '{{{column}}}'" if isinstance(value, int | float) else ""
        raise PrepError(f"column {column!r} holds {_kind(value)}: {_other(column, value, '--text-column')}{also}")
    return value


def fill(template: Template, row: Row) -> str | None:
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


def _chat(column: str, tokenizer: PreTrainedTokenizerBase, row: Row) -> str | None:
    """The conversation as the tokenizer's chat template writes it; messages are {"role": ..., "content": ...}."""
    messages = messages_of(column, row)
    if messages is None:
        return None
    return str(written(column, partial(tokenizer.apply_chat_template, messages, tokenize=False)))


def messages_of(column: str, row: Row) -> list | None:
    """The messages of a row; None where there are none. PrepError for anything else."""
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
    return messages


def written(column: str, apply: Callable[[], Any]) -> Any:
    """What a chat template makes of a row. PrepError where it refuses it."""
    try:
        return apply()
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


def parse_template(template: str) -> Template:
    r"""Literal text and column names; the escapes \n, \t and \\ are read first."""
    parsed = _pieces(template, unescaped(template))
    if all(name is None for _, name in parsed):
        raise PrepError(f"--template {template!r} names no column: write one in braces, as in {{question}}")
    return parsed


def split_template(template: str, answer: str) -> tuple[Template, Template]:
    """The template up to the part `answer`, and from it on. PrepError where it is not there, or there twice."""
    text, part = unescaped(template), unescaped(answer)
    if not part or text.count(part) != 1:
        many = "more than once" if part and part in text else "not"
        raise PrepError(
            f"--answer-from {answer!r} is {many} in --template {template!r}: give the part of it that the answer "
            "begins with, such as {answer}"
        )
    parse_template(template)
    before, _, after = text.partition(part)
    return _pieces(template, before), _pieces(template, part + after)


def unescaped(template: str) -> str:
    r"""The text with \n, \t and \\ for the two characters that a shell passes on."""
    return re.sub(r"\\[nt\\]", lambda match: ESCAPES[match[0]], template)


def _pieces(template: str, text: str) -> Template:
    try:
        parsed = list(string.Formatter().parse(text))
    except ValueError as error:
        raise PrepError(
            f"--template {template!r} is malformed ({error}): write columns as {{NAME}}, a brace as {{{{"
        ) from error
    for _, name, spec, conversion in parsed:
        if name is not None and (spec or conversion or not name or name.isdigit() or set(name) & set(".[]")):
            raise PrepError(f"--template {template!r}: only column names can stand in braces, as in {{question}}")
    return [(literal, name) for literal, name, _, _ in parsed]


def chunks(items: Iterable[Item], length: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Lists of items of about `CHUNK_CHARACTERS` in all."""
    chunk: list[Item] = []
    size = 0
    for item in items:
        chunk.append(item)
        size += length(item)
        if size >= CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
