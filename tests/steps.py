"""Functions in processes that are killed right before their n-th step in the file system."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from kills import CONTEXT

SOME = pytest.mark.parametrize("by", [8, pytest.param(1, marks=pytest.mark.stress)])  # steps from one kill to the next
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


def every_step(work: Callable[..., Any], prepare: Callable[[], tuple], by: int = 1, dense: int = 1) -> Iterator[int]:
    """Kill `work(*prepare())` before each of its steps in turn; their numbers, each after the kill.

    Before each of the first `dense` steps, then before every `by`-th.
    """
    step = 1
    while killed_at(step, work, *prepare()):
        yield step
        step += 1 if step < dense else by
