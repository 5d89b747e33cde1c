"""Jobs of several processes that talk over gloo on this machine, forked like those of kills.py."""

import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

from kills import CONTEXT


def _rank(name: str, options: dict[str, Any], environment: dict[str, str], said: str, die_after: int | None) -> None:
    """Call `prep.<name>`, killed by SIGKILL after so many batches or layers; what it says goes into a file."""
    import contextlib

    import torch

    import prep
    from prep.preprocess.calibration.job import Calibration
    from prep.store import BasisWriter

    os.environ.update(environment)
    torch.set_num_threads(1)
    if "ON_DEVICES" in environment:  # the CPU counts as a device that keeps the sums of its layers
        from prep.preprocess.calibration import devices

        devices.ACCELERATORS.append("cpu")
    if "BEGUN_AS" in environment:
        _begin(environment)
    left = [die_after]
    for kind, method in ((Calibration, "_added"), (BasisWriter, "put")):
        whole = getattr(kind, method)

        def counted(self, *arguments, whole=whole, **named):
            result = whole(self, *arguments, **named)
            if left[0] is not None:
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(kind, method, counted)
    with open(said, "a", buffering=1) as out, contextlib.redirect_stderr(out):
        try:
            getattr(prep, name)(**options, distributed=True)
        except prep.PrepError as error:
            if not error.silent:
                out.write(f"Error: {error}\n")
            raise SystemExit(2) from None


def _begin(environment: dict[str, str]) -> None:
    """What a script may have done before: a default group of a backend that does nothing for tensors on the CPU."""
    import torch.distributed as dist
    import torch.testing._internal.distributed.fake_pg  # noqa: F401  (registers the backend)

    rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    store = dist.TCPStore(environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), size, rank == 0)
    dist.init_process_group(environment["BEGUN_AS"], store=store, rank=rank, world_size=size)


def run(
    name: str,
    options: dict[str, Any],
    folder: Path,
    size: int,
    per_node: int | None = None,
    die: tuple[int, int] | None = None,
    begun_as: str | None = None,
    on_devices: bool = False,
) -> tuple[list[int], list[str], float]:
    """Run `prep.<name>` with `size` ranks, `per_node` of them on every node (all by default).

    die: a rank and the number of batches or layers after which it is killed. begun_as: the backend of a default group
    that each rank has begun before. on_devices: sums are kept where the activations are, as on a GPU. Returns the exit
    codes, what each rank said, and the seconds from the first exit to the last.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    per_node = per_node or size
    processes, texts = [], []
    for rank in range(size):
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(size)}
        environment |= {"LOCAL_RANK": str(rank % per_node), "LOCAL_WORLD_SIZE": str(per_node)}
        environment |= {} if begun_as is None else {"BEGUN_AS": begun_as}
        environment |= {"ON_DEVICES": "1"} if on_devices else {}
        texts.append(folder / f"rank{rank}.{time.monotonic_ns()}")
        limit = die[1] if die is not None and die[0] == rank else None
        processes.append(CONTEXT.Process(target=_rank, args=(name, options, environment, str(texts[-1]), limit)))
        processes[-1].start()
    ended: dict[int, float] = {}
    while len(ended) < size:
        for rank, process in enumerate(processes):
            if rank not in ended and not process.is_alive():
                ended[rank] = time.monotonic()
        time.sleep(0.02)
    said = [text.read_text() if text.exists() else "" for text in texts]
    return [process.exitcode for process in processes], said, max(ended.values()) - min(ended.values())
