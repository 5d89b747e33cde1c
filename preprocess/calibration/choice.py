"""Whether a model is calibrated block by block: as asked, or where it does not fit into memory."""

from __future__ import annotations

import torch
from torch import nn

from ...errors import PrepError
from ..distributed import World
from ..memory import free_memory
from ..model import loading
from ..model.checkpoint import Unserved, open_model
from ..options import CovarianceOptions
from ..progress import say
from .run import Run


def check_blocks(options: CovarianceOptions, world: World) -> None:
    """Refuse what cannot be done block by block together with it."""
    if not options.block_by_block:
        return
    if options.until is not None:
        raise PrepError("--until runs the model again and again, --block-by-block reads it once: leave out one of them")
    if options.device_map is not None:
        raise PrepError("--device-map and --block-by-block both say where the model goes: leave out one of them")
    if world.size > 1:
        raise PrepError(f"--block-by-block is for one process, these are {world.size}: start it without torchrun")


def without_blocks(options: CovarianceOptions, run: Run, world: World) -> nn.Module | None:
    """The model without its weights, which are to be read block by block; None where it is to be loaded whole.

    PrepError where that was asked for and the model cannot be read so.
    """
    asked = options.block_by_block
    possible = options.named and options.device_map is None and options.until is None and world.size == 1
    if asked is False or (asked is None and not possible):
        return None
    device = torch.device(world.device(options.device) or "cpu")
    model, dtype = str(options.model), loading.DTYPES.get(run.options["dtype"])
    if asked is None:
        needed = 0 if dtype is None else _weights(options, dtype)
        room = free_memory() if device.type != "cuda" else torch.cuda.mem_get_info(device)[0]
        if needed <= room:
            return None
        say(
            f"{model} takes {needed / 1e9:.1f} GB, {room / 1e9:.1f} GB are free: block by block "
            "(--no-block-by-block loads it whole)",
            options.quiet,
        )
    try:
        if dtype is None:
            raise Unserved("its configuration names no dtype: give --dtype")
        return open_model(model, options.revision, dtype, options.trust_remote_code)
    except Unserved as reason:
        if asked:
            raise PrepError(f"{model} cannot be read block by block ({reason}): leave out --block-by-block") from reason
        say(f"{model} is loaded whole: {reason}", options.quiet)
        return None


def _weights(options: CovarianceOptions, dtype: torch.dtype) -> int:
    """Bytes of a model in a dtype; 0 for one that is not transformers' own."""
    config = loading.load_config(str(options.model), options.revision, options.trust_remote_code)
    cls = loading.model_class(config)
    if not cls.__module__.startswith("transformers.") or getattr(config, "quantization_config", None):
        return 0
    try:
        net = loading.without_weights(cls, config, options.trust_remote_code, dtype)
    except Exception:  # what is wrong with it, loading says
        return 0
    return sum(weight.nbytes for weight in net.parameters())
