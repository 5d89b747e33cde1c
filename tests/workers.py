"""Functions for spawned processes, and what they and the adapter tests do with a tiny model."""

import os
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

import prep
from prep.adapters.adapter import Adapter


def tokens(rows: int = 4, length: int = 12, seed: int = 0) -> Tensor:
    """Random tokens (rows, length) of the tiny vocabulary."""
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


def randomize(adapter: Adapter, std: float = 0.2) -> None:
    """Core parameters as if trained."""
    for parameter in adapter.parameters():
        parameter.data += std * torch.randn_like(parameter)


def logits(model: nn.Module, x: Tensor | None = None) -> Tensor:
    """Of some tokens, without a graph."""
    with torch.no_grad():
        return model(tokens() if x is None else x).logits


def snapshot(model: nn.Module) -> tuple[dict, ...]:
    """Everything of a model that detach must bring back: modules by identity, parameters bitwise, flags, attributes."""
    return (
        {name: id(module) for name, module in model.named_modules()},
        {name: (id(p), p.requires_grad, p.dtype) for name, p in model.named_parameters()},
        {name: value.clone() for name, value in model.state_dict().items()},
        {key: value for key, value in vars(model).items() if not key.startswith(("_modules", "_parameters"))},
    )


def assert_same(before: tuple[dict, ...], after: tuple[dict, ...]) -> None:
    """Equal snapshots."""
    for one, other in zip(before, after, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            if isinstance(one[key], torch.Tensor):
                assert torch.equal(one[key], other[key]), key
            else:
                assert one[key] == other[key], key


def train(model: nn.Module, adapter: Adapter, rows: Tensor, steps: int = 3) -> None:
    """SGD on a loss over two coefficients, two forwards for each and one backward for all, outside the blocks."""
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.05)
    for _ in range(steps):
        losses = []
        for s in (1.0, -0.5):
            with adapter.coeff(s):
                losses.append(sum(model(part, labels=part).loss for part in rows.chunk(2)))
        optimizer.zero_grad()
        (losses[0] + 0.3 * losses[1]).backward()
        optimizer.step()


def adapted(store: str | Path) -> tuple[nn.Module, Adapter]:
    """A tiny model with a dplr core whose parameters have left their start."""
    model = tiny.llama()
    adapter = prep.attach(model, store, core="dplr", rank=8, k=2)
    torch.manual_seed(0)
    for parameter in adapter.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model, adapter


def distributed_setups(rank: int, world: int, store: str, folder: str) -> None:
    """DDP, FSDP2 and FSDP2 in bfloat16 over gloo; rank 0 writes `<setup>.safetensors` with the trained adapter.

    Alone, the last one only: what the others train without rounding, a plain loop does.
    """
    from datetime import timedelta

    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous{world}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    rows = tokens(rows=4).chunk(world)[rank]
    mesh = init_device_mesh("cpu", (world,))
    try:
        for setup in ("ddp", "fsdp", "fsdp-bf16") if world > 1 else ("fsdp-bf16",):
            model, adapter = adapted(store)
            wrapped: Any
            if setup == "ddp":
                wrapped = DistributedDataParallel(model)
            else:
                policy = MixedPrecisionPolicy()
                if setup == "fsdp-bf16":
                    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
                for block in model.get_submodule("model.layers").children():
                    fully_shard(block, mesh=mesh, mp_policy=policy)
                wrapped = fully_shard(model, mesh=mesh, mp_policy=policy)
            train(wrapped, adapter, rows)
            with adapter.coeff(1.0 + rank):
                wrapped(rows)
                assert {layer.core.coeff.item() for layer in adapter.layers.values()} == {1.0 + rank}
            if setup != "ddp" or rank == 0:
                prep.save(wrapped, f"{folder}/{setup}-{world}.safetensors")
            prep.detach(wrapped)
            with pytest.raises(prep.PrepError, match=r"already (wrapped|sharded)"):
                prep.attach(wrapped, store)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    os._exit(0)  # torch's threads sometimes abort a process whose interpreter ends before them
