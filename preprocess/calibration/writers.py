"""Sites are written by several threads: hashing and the disk take turns, and few sites are in memory at a time."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

THREADS = min(8, os.cpu_count() or 1)


class Writers:
    """`with Writers() as writers: writers.submit(write, ...)`; at the end, or after an error, all have ended."""

    def __enter__(self) -> Writers:
        self._pool = ThreadPoolExecutor(THREADS, "writers")
        self._waiting: deque[Future] = deque()
        return self

    def submit(self, write: Callable[..., object], *args: Any) -> None:
        """Call `write(*args)` on a thread; waits where one item for each thread is waiting. Raises what one raised."""
        self._waiting.append(self._pool.submit(write, *args))
        if len(self._waiting) > THREADS:
            self._waiting.popleft().result()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)
        while kind is None and self._waiting:
            self._waiting.popleft().result()
