"""Commands in processes that may be killed at any instant, forked from a server that has imported everything once."""

import multiprocessing
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["prep.preprocess.covariance", "prep.preprocess.decompose", "transformers.models.llama.modeling_llama"]
)


def covariance(options: Mapping[str, Any], pause: float, said: str) -> None:
    """`prep covariance` with checkpoints as often as asked, a pause after every batch, and what it says in a file."""
    from prep.preprocess.calibration import job

    job.CHECKPOINT_SHARE = 1.0
    done = job.Calibration._added

    def slow(self, *arguments):
        time.sleep(pause)
        done(self, *arguments)
        at_work(said)

    job.Calibration._added = slow  # type: ignore[method-assign]
    _run("covariance", options, said)


def decompose(options: Mapping[str, Any], pause: float, said: str) -> None:
    """`prep decompose` whose layers count as done at once, with a pause after each."""
    from prep.store.bases import BasisWriter

    note = BasisWriter.note

    def slow(self, done):
        note(self, done)
        self.flush()
        at_work(said)
        time.sleep(pause)

    BasisWriter.note = slow  # type: ignore[method-assign]
    _run("decompose", options, said)


def cut_short(options: Mapping[str, Any], threads: int, batches: int | None, said: str) -> None:
    """`prep covariance` that SIGKILL ends after so many batches, on so many threads; what it says in a file."""
    import os
    import signal

    from prep.preprocess.calibration import job

    job.CHECKPOINT_SHARE = 1.0
    left, added = [batches], job.Calibration._added

    def counted(self, *arguments):
        added(self, *arguments)
        if left[0] is not None:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    job.Calibration._added = counted  # type: ignore[method-assign]
    _run("covariance", options, said, threads)


def _run(name: str, options: Mapping[str, Any], said: str, threads: int = 1) -> None:
    import contextlib

    import torch

    import prep

    torch.set_num_threads(threads)
    with open(said, "a", buffering=1) as out, contextlib.redirect_stderr(out):
        try:
            getattr(prep, name)(**options)
        except prep.PrepError as error:
            out.write(f"Error: {error}\n")
            raise SystemExit(2) from None


def start(command: Callable[..., None], options: Mapping[str, Any], pause: float, said: Path) -> Any:
    """The process of a command."""
    process = CONTEXT.Process(target=command, args=(dict(options), pause, str(said)))
    process.start()
    return process


def at_work(said: str | Path) -> None:
    """Leave a sign that the first batch or layer is done."""
    Path(f"{said}.work").touch()


def run(
    command: Callable[..., None],
    options: Mapping[str, Any],
    pause: float,
    said: Path,
    kill_after: float | None = None,
    once_at_work: bool = False,
) -> tuple[int, float]:
    """Exit code of a command, killed after so many seconds (counted from its first batch or layer on) if it still runs.

    Also how long it worked, from that sign on.
    """
    process = start(command, options, pause, said)
    sign = Path(f"{said}.work")
    while once_at_work and process.is_alive() and not sign.exists():
        time.sleep(0.005)
    begun = time.monotonic()
    process.join(kill_after)
    if process.is_alive():
        process.kill()
    process.join()
    return process.exitcode, time.monotonic() - begun
