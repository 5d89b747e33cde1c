"""`prep covariance`: stream text, or batches, through a model and store the second moment of every layer's input.

C = E[x x^T] over the real tokens, uncentred, with the mean beside it, per site (see model/sites.py).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import PrepError
from ..store import Store, open_store
from ..store.format.schema import is_url
from .calibration.blocks import BlockByBlock
from .calibration.choice import check_blocks, without_blocks
from .calibration.estimate import Estimate, announce, estimate
from .calibration.job import Calibration
from .calibration.run import Run, finished, growth
from .calibration.until import grown
from .corpus.source import Mask, Source, Text, open_source
from .distributed import World, check_devices, joined, visible_devices
from .model.loading import load_model
from .model.network import Network, observe, observe_blocks
from .model.placement import placement
from .options import CovarianceOptions
from .progress import say


def covariance(
    model: str | Path | nn.Module,
    data: str | Path | Sequence[str] | Mapping[str, float] | None = None,
    *,
    batches: Iterable[Any] | None = None,
    mask: Mask | None = None,
    store: str | Path = "prep.zarr",
    revision: str | None = None,
    subset: str | None = None,
    split: str = "train",
    text_column: str | None = None,
    template: str | None = None,
    chat_column: str | None = None,
    label_mask: bool = False,
    answer_from: str | None = None,
    num_sequences: int = 256,
    until: float | str | None = None,
    rank: int | None = None,
    seq_len: int = 512,
    batch_size: int = 8,
    pack: bool = True,
    seed: int = 0,
    targets: Sequence[str] = (),
    exclude: Sequence[str] = (),
    layers: str | Sequence[int] | None = None,
    moment: str = "full",
    moment_dtype: str = "float64",
    dtype: str | torch.dtype = "auto",
    device: str | None = None,
    device_map: str | Mapping[str, int | str] | None = None,
    max_memory: str | Mapping[int | str, int | str] | None = None,
    halves: bool = True,
    keep_tokens: int = 0,
    compat: str | None = None,
    block_by_block: bool | None = None,
    memory_budget: int | str = "8GB",
    device_memory: int | str | None = None,
    products: str = "auto",
    checkpoint_every: float | str = "60s",
    overwrite: bool = False,
    break_lock: bool = False,
    trust_remote_code: bool = False,
    quiet: bool = False,
    dry_run: bool = False,
    distributed: bool = False,
) -> Store | Estimate | None:
    """Calibrate `model` on `data` (file, glob or hub id) into `store`; the options are the command's.

    model: a path or hub id, or a module, which is calibrated on `batches`.
    data: a hub id, a .jsonl .json .parquet .csv .txt file (.gz, .zst too), or a glob of files. Of several, in a list or
    a dictionary with weights, {"a.jsonl": 2, "b.jsonl": 1}, sequences are taken in proportion (see corpus/mixture.py).
    batches: instead of `data`, an iterable of dictionaries, tuples or tensors that the model is called with.
    mask: batch -> (B, T), True on real tokens, or None; by default a dictionary's `attention_mask`.
    store: the path to write to.
    revision: of the model on the hub. trust_remote_code: run code from the model's repository.
    subset, split: configuration and split of a hub data set.
    text_column: the column of text, by default `text` or the only one. template: text of several columns, such as
    "{question}\\n{answer}". chat_column: a column of messages, written by the tokenizer's chat template.
    label_mask: count the tokens of answers only; the model reads all. answer_from: the part of `template` that an
    answer begins with, such as "{answer}"; of a chat column answers are what the chat template marks as generation.
    num_sequences, seq_len, batch_size: how many sequences are read, of how many tokens, and how many at a time.
    pack: join documents by the end token and cut them; False pads one document a sequence. seed: of their order.
    targets, exclude: regular expressions of layer names, or lists of them. layers: block numbers, "0-3,8" or [0, 1].
    moment: full E[x x^T], diagonal E[x_i^2], output E[y y^T] of y = W x, or auto: output where d_in > 2 d_out.
    moment_dtype: of the stored moments. dtype: of the model, by name or as a torch.dtype.
    device: of the model. device_map, max_memory: parts of it on several devices or on disk (see model/placement.py).
    quiet: print errors only. break_lock: take a writer's lock that another machine has left behind.

    A complete store of the same run is returned as it is, an incomplete one is resumed. A complete one of fewer
    sequences goes on with the next ones and serves the old moments until it is done; bases made of these go then. One
    of another run, or of batches, is refused, or with `overwrite` replaced when the new one is complete. The state is
    stored every `checkpoint_every` and on SIGINT (then KeyboardInterrupt is raised) and SIGTERM; not with `batches`.

    block_by_block: one block of the model at a time is loaded, run over all batches and freed; the moments are bitwise
    the same. By default, where the model does not fit into memory. Hidden states that do not fit into `memory_budget`
    beside the accumulators are kept in a folder beside the store.

    Accumulators beyond `memory_budget` are made in several passes. Those of layers on a GPU are kept there, as far as
    `device_memory` (by default what a batch leaves free) allows; products="exact" multiplies half-precision
    activations in float32 there.

    halves: the moments of the first half of the tokens are kept beside those of all (float32), which `evaluate` needs
    to say what more data would gain; batches whose number is not known have none.

    keep_tokens: the inputs of so many tokens of every site are kept too (float32), drawn uniformly from all: what
    `decompose` needs for pooling="mean_abs".

    until: twice as many sequences are read again and again, until the median excess of whitened bases at `rank` (64) is
    below this share, "2%" or 0.02, or `num_sequences` are in. It begins with what is there, or with two batches.

    compat="peft-corda" sums as PEFT's `preprocess_corda` does: each sequence divided by its maximum, padding counted,
    the mean over sequences. dry_run returns an Estimate of memory, disk and time and stores nothing; where a complete
    store of fewer sequences is there, of the others.

    distributed: every process of a torchrun job, or of an initialised torch.distributed, calls it alike and takes its
    share of the batches; rank 0 returns the store, the others None (see distributed.py).

    Raises PrepError for bad input and StoreError where the store holds something else.
    """
    options = CovarianceOptions(**locals())
    with joined(distributed) as world:
        world.on_all(_check, options, world, world.all_gather(visible_devices()))
        if options.until is None:
            return _calibrate(world, options)
        return grown(options, world, partial(world.on_all, _load, options, world), partial(_calibrate, world))


def _calibrate(world: World, options: CovarianceOptions, module: nn.Module | None = None) -> Any:
    """module: the model, if it has been loaded."""
    begun = time.monotonic()
    source = world.on_all(open_source, options)
    run = world.on_all(Run.of, options, source)
    if isinstance(source, Text) and options.dry_run:
        source = source.after(growth(options, run))
    else:
        done = world.on_rank_zero(_is_finished, options, run)
        if done:
            return open_store(options.store) if world.rank == 0 else None
    network = world.on_all(_network, options, run, source, world, module)
    if isinstance(source, Text) and options.dry_run:
        return estimate(options, network, source, time.monotonic() - begun)
    with _job(options, run, network, source, world) as job:
        for part in job.parts():
            with part.hooked():
                for batch in job.batches(part):
                    part.add(batch)
            job.write(part)
        return job.store()


def _check(options: CovarianceOptions, world: World, devices: Sequence[Sequence[str]]) -> None:
    """Refuse what options and processes together cannot do; devices: what every process sees."""
    if is_url(options.store):
        raise PrepError(f"--store {options.store} is a URL: calibrate into a local path and copy it with `prep push`")
    placement(options.device, options.device_map, options.max_memory)
    if world.size > 1 and (options.batches is not None or options.dry_run):
        raise PrepError(
            f"batches= and --dry-run are for one process, these are {world.size}: start it without torchrun"
        )
    if options.dry_run and options.data is None:
        raise PrepError("dry_run= needs data=, whose size is known")
    check_blocks(options, world)
    check_devices(world, options.device, options.device_map, devices)


def _is_finished(options: CovarianceOptions, run: Run) -> bool:
    """Whether the store asked for is there already, of this very run."""
    done = finished(options, run) is not None
    if done:
        say(f"{options.store} is complete and was made with the same options: nothing to do", options.quiet)
    return done


def _network(options: CovarianceOptions, run: Run, source: Source, world: World, module: nn.Module | None) -> Network:
    """The layers and sites of the model, which is loaded unless it is to be block by block."""
    empty = without_blocks(options, run, world) if module is None else None
    if isinstance(source, Text) and options.dry_run:
        announce(options, source, by_block=empty is not None)
    if empty is not None:
        return observe_blocks(empty, source, options, torch.device(world.device(options.device)))
    return observe(_load(options, world) if module is None else module, source, options)


def _job(options: CovarianceOptions, run: Run, network: Network, source: Source, world: World) -> Calibration:
    if network.stack is not None:
        return BlockByBlock(options, run, network, source)
    return Calibration(options, run, network, source, world)


def _load(options: CovarianceOptions, world: World) -> nn.Module:
    """The model in memory, on this process's device."""
    if not isinstance(options.model, str):
        return options.model
    return load_model(
        options.model,
        revision=options.revision,
        dtype=options.dtype,
        device=None if options.device_map is not None else world.device(options.device),
        device_map=options.device_map,
        max_memory=options.max_memory,
        trust_remote_code=options.trust_remote_code,
    )
