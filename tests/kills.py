"""Commands in processes that may be killed at any instant, forked from a server that has imported everything once."""

import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["prep.preprocess.covariance", "prep.preprocess.decompose", "transformers.models.llama.modeling_llama"]
)


def covariance(options: Mapping[str, Any], pause: float, said: str, dies: bool = False) -> None:
    """`prep covariance` with checkpoints as often as asked, a pause after every batch, and what it says in a file.

    dies: SIGKILL ends it as soon as there is a checkpoint to resume from.
    """
    from prep.preprocess.calibration import job

    job.CHECKPOINT_SHARE = 1.0
    done, checkpoint = job.Calibration._added, job.Calibration._checkpoint

    def slow(self, *arguments):
        time.sleep(pause)
        done(self, *arguments)
        at_work(said)

    def last(self, *arguments):
        checkpoint(self, *arguments)
        _die()

    job.Calibration._added = slow  # type: ignore[method-assign]
    if dies:
        job.Calibration._checkpoint = last  # type: ignore[method-assign]
    _run("covariance", options, said)


def decompose(options: Mapping[str, Any], pause: float, said: str, dies: bool = False) -> None:
    """`prep decompose` whose layers count as done at once, with a pause after each. dies: SIGKILL ends it at one."""
    from prep.store import BasisWriter

    note = BasisWriter.note

    def slow(self, done):
        note(self, done)
        self.flush()
        if dies:
            _die()
        at_work(said)
        time.sleep(pause)

    BasisWriter.note = slow  # type: ignore[method-assign]
    _run("decompose", options, said)


def cut_short(options: Mapping[str, Any], threads: int, batches: int | None, said: str) -> None:
    """`prep covariance` that SIGKILL ends after so many batches, on so many threads; what it says in a file."""
    from prep.preprocess.calibration import job

    job.CHECKPOINT_SHARE = 1.0
    left, added = [batches], job.Calibration._added

    def counted(self, *arguments):
        added(self, *arguments)
        if left[0] is not None:
            left[0] -= 1
            if left[0] == 0:
                _die()

    job.Calibration._added = counted  # type: ignore[method-assign]
    _run("covariance", options, said, threads)


class Command:
    """The command `prep` in a `process` of its own in `folder`, with nothing imported anew.

    environment: also of huggingface_hub, as it would have been read while that was imported.
    """

    def __init__(self, arguments: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None):
        self._said = tempfile.TemporaryDirectory()
        names = [f"{self._said.name}/out", f"{self._said.name}/err"]
        given = (list(arguments), str(folder), dict(environment or {}), names)
        self.process = CONTEXT.Process(target=_command, args=given)
        self.process.start()

    def ended(self) -> Any:
        """When it is: its `returncode`, and all of its `stdout` and `stderr`."""
        self.process.join()
        with self._said as said:
            out, err = (Path(said, name).read_text() for name in ("out", "err"))
        return SimpleNamespace(returncode=self.process.exitcode, stdout=out, stderr=err)


def command(arguments: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None) -> Any:
    """How a command ends, see `Command`."""
    return Command(arguments, folder, environment).ended()


def _command(arguments: list[str], folder: str, environment: dict[str, str], names: list[str]) -> None:
    from huggingface_hub import constants

    from prep.cli import main

    for number, name in enumerate(names, 1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(folder)
    os.environ.update(environment)
    if "HF_ENDPOINT" in environment:
        constants.ENDPOINT = environment["HF_ENDPOINT"]
    if "HF_HUB_OFFLINE" in environment:
        constants.HF_HUB_OFFLINE = environment["HF_HUB_OFFLINE"] == "1"
    main(arguments, prog_name="prep")


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


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


def start(
    command: Callable[..., None], options: Mapping[str, Any], pause: float, said: Path, dies: bool = False
) -> Any:
    """The process of a command."""
    process = CONTEXT.Process(target=command, args=(dict(options), pause, str(said), dies))
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
    dies: bool = False,
) -> tuple[int, float]:
    """Exit code of a command, killed after so many seconds (counted from its first batch or layer on) if it still runs.

    Also how long it worked, from that sign on. dies: it is killed when it has left something to resume from.
    """
    process = start(command, options, pause, said, dies)
    sign = Path(f"{said}.work")
    while once_at_work and process.is_alive() and not sign.exists():
        time.sleep(0.005)
    begun = time.monotonic()
    process.join(kill_after)
    if process.is_alive():
        process.kill()
    process.join()
    return process.exitcode, time.monotonic() - begun
