"""SIGINT and SIGTERM noted instead of obeyed at once, so that a run ends where its state can be stored."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any


class Signals:
    """number: of the signal that came, 0 before one has. A second one acts as usual."""

    number = 0

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Inside, signals are noted; only the main thread can do that."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in self._before:
            signal.signal(number, self._note)
        try:
            yield
        finally:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.number = number
        signal.signal(number, self._before[number])
