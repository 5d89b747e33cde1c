"""Functions in processes that are killed right before their n-th step in the file system."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

from kills import CONTEXT

STEPS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate"}


def _run(step: int, work: Callable[..., Any], arguments: tuple) -> None:
    left = step

    def hook(event: str, given: tuple) -> None:
        nonlocal left
        writes = event == "open" and isinstance(given[2], int) and given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if event in STEPS or writes:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    import torch

    torch.set_num_threads(1)
    sys.addaudithook(hook)
    work(*arguments)


def killed_at(step: int, work: Callable[..., Any], *arguments: Any) -> bool:
    """Run `work` in a process of its own, killed before its step of that number; whether it was."""
    process = CONTEXT.Process(target=_run, args=(step, work, arguments))
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
    return process.exitcode != 0


def every_step(work: Callable[..., Any], prepare: Callable[[], tuple], first: int = 1, by: int = 1) -> Iterator[int]:
    """Kill `work(*prepare())` before each of its steps in turn; their numbers, each after the kill."""
    step = first
    while killed_at(step, work, *prepare()):
        yield step
        step += by
