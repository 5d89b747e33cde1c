"""Long work shows itself: a bar with rate and time left on a terminal or in a notebook, else plain log lines."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm.auto import tqdm

_LINE_EVERY = 10.0  # seconds between log lines


class Progress:
    """Counts `unit`s from `done` up to `total` (0: not known) on stderr; silent when `quiet`.

    Where the work goes over the same units again and again, `step` says what is told instead of the count of all.
    """

    def __init__(self, label: str, total: int, unit: str, quiet: bool = False, done: int = 0):
        self.label, self.total, self.unit, self.quiet = label, total, unit, quiet
        self.done = self._before = done
        self._begun = self._printed = time.monotonic()
        self._step: tuple[str, int, int] | None = None  # its name, its units, and what was done before it
        self._bar = (
            tqdm(desc=label, total=total or None, initial=done, unit=f" {unit}", unit_scale=total >= 10_000)
            if (sys.stderr.isatty() or in_notebook()) and not quiet
            else None
        )

    def __enter__(self) -> Progress:
        return self

    def step(self, name: str, total: int, done: int = 0) -> None:
        """Tell from here on the step under way and its units: `total` of them, 0 where not known, of which `done`."""
        self._step = name, total, self.done - done
        if self._bar is not None:
            self._bar.bar_format = "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]"
            self._bar.set_description_str(self._said())

    def advance(self, amount: int) -> None:
        """Count `amount` more."""
        self.done += amount
        if self._bar is not None:
            if self._step is not None:
                self._bar.set_description_str(self._said(), refresh=False)
            self._bar.update(amount)
        elif not self.quiet and self.done < self.total and time.monotonic() - self._printed >= _LINE_EVERY:
            self._print()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif not self.quiet and error is None:
            self._print()

    def _print(self) -> None:
        self._printed = time.monotonic()
        seconds = self._printed - self._begun
        rate = (self.done - self._before) / seconds if seconds else 0.0
        left = f", {(self.total - self.done) / rate:,.0f} s left" if rate and self.done < self.total else ""
        pace = f", {rate:,.0f} {self.unit}/s" if self._step is None else ""
        say(f"{self._said()} in {seconds:.1f} s{pace}{left}", self.quiet)

    def _said(self) -> str:
        """What is done of what."""
        name, total, before = self._step or ("", self.total, 0)
        of = f" of {total:,}" if total else ""
        return f"{self.label}: {name}{', ' if name else ''}{self.done - before:,}{of} {self.unit}"


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return "IPKernelApp" in getattr(shell, "config", {})


def say(message: str, quiet: bool = False) -> None:
    """A line on stderr, so that stdout carries results only."""
    if not quiet:
        print(message, file=sys.stderr, flush=True)
