"""The errors a user can act on: one line that says what is wrong, where, and what to do."""

import re
from collections.abc import Iterable
from difflib import get_close_matches


class PrepError(Exception):
    """Bad input or a failed check; the message is one line. silent: another process of the job prints it."""

    exit_code = 2  # of the command line
    silent = False


class StoreError(PrepError):
    """A store is missing, incomplete, damaged or holds something else than was asked of it."""


class Interrupted(KeyboardInterrupt):
    """A signal ended a run after its state was stored. Like Ctrl-C, `except Exception` lets it pass.

    exit_code: the shell's for that signal; silent: another process of the job prints the message.
    """

    def __init__(self, message: str, signal: int, silent: bool = False):
        super().__init__(message)
        self.exit_code, self.silent = 128 + signal, silent


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` with the nearest known word, or one that ends with this one; nothing where none is near.

    Digits are meant as they are: neither another number nor another size is a slip of the pen.
    """
    words, digits = list(known), re.sub(r"\D", "", word)
    alike = [other for other in words if re.sub(r"\D", "", other) == digits]
    meant = get_close_matches(word, alike, 1, 0.7) or [other for other in words if word and other.endswith(f".{word}")]
    return f" (did you mean {meant[0]!r}?)" if meant else ""
