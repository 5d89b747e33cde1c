"""Functions for spawned processes, and the small models and stores that they and the adapter tests share."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import prep
from prep.adapters.adapter import Adapter
from prep.linear import is_linear, layer_shape, weight_hash, weight_matrix
from prep.store import BasisWriter, LayerRecord, create_store

METHODS = {
    "full": {"metric": "full", "power": 0.5, "select": "top"},
    "diagonal": {"metric": "diagonal", "power": 0.5, "select": "top"},
    "identity": {"metric": "identity", "power": 0.5, "select": "top"},
    "identity-activation": {"metric": "identity", "power": 0.5, "select": "activation"},
    "eva": {"metric": "components", "power": 0.5, "select": "top"},
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny matrices gain nothing from a second thread and wait for it on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_llama(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A Llama of 2 layers in evaluation mode: hidden 32, intermediate 48, 4 heads (2 of keys), 64 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).to(dtype).eval()  # type: ignore[arg-type]


def tokens(rows: int = 4, length: int = 12, seed: int = 0) -> Tensor:
    """Random tokens (rows, length) of the tiny vocabulary."""
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer but the head."""
    return {name: module for name, module in model.named_modules() if is_linear(module) and name != "lm_head"}


def write_store(path: Path, model: nn.Module, names: tuple[str, ...] = ("full",), rank: int = 16) -> Path:
    """A store with the named bases of the model's layers, for random second moments; computed in float64."""
    model_attrs = {"id": "tiny", "revision": None, "class": "Tiny", "config_hash": "0", "dtype": "float32"}
    layers = linear_layers(model)
    first = weight_hash(weight_matrix(next(iter(layers.values()))))
    store = create_store(
        path,
        {
            "id": f"{path.name}-{first}",
            "model": model_attrs,
            "corpus": None,
            "options": None,
            "status": "complete",
            "prep_version": "0",
            "run": {},
        },
    )
    for name in names:
        write_basis(store.root, name, layers, rank, model_attrs)
    return path


def write_basis(root, name: str, layers: dict[str, nn.Module], rank: int, model_attrs: dict) -> None:
    rng = np.random.default_rng(0)
    groups: dict = {}
    for layer, module in layers.items():
        shape = layer_shape(module)
        group = groups.setdefault(shape, {"layers": [], "rank": min(rank, *shape), "spectrum": min(shape)})
        group["layers"].append(layer)
    method = {**METHODS.get(name, METHODS["full"]), "rank": rank}
    writer = BasisWriter.create(root, name, method=method, dtype="float32", model=model_attrs, groups=groups)
    for layer, module in layers.items():
        W = weight_matrix(module).double().numpy()
        U, S, P, spectrum = svd_basis(W, method, rank, rng)
        shape = layer_shape(module)
        record = LayerRecord(
            shape=shape,
            index=groups[shape]["layers"].index(layer),
            rank=len(S),
            energy=float((S**2).sum() / (spectrum**2).sum()),
            tail=0.0,
            numerical_rank=len(S),
            solver="exact",
            bound=1.0,
            weight_hash=weight_hash(weight_matrix(module)),
            weight_dtype=str(weight_matrix(module).dtype).removeprefix("torch."),
        )
        arrays = (torch.from_numpy(np.ascontiguousarray(part)) for part in (U, S, P, spectrum))
        writer.note(writer.put(layer, *arrays, record))
    writer.finish()


def svd_basis(W: np.ndarray, method: dict, rank: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """U (d_out, r), S (r,), P (r, d_in), spectrum (k,) of W M for a random M of the metric."""
    d_in = W.shape[1]
    root: np.ndarray = np.eye(d_in)
    if method["metric"] == "full":
        X = rng.standard_normal((4 * d_in, d_in)) * rng.uniform(0.3, 3, d_in)
        root = np.linalg.cholesky(X.T @ X / len(X))
    elif method["metric"] == "diagonal":
        root = np.diag(rng.uniform(0.3, 3, d_in))
    U, S, Vt = np.linalg.svd(W @ root, full_matrices=False)
    P = Vt @ np.linalg.inv(root)
    if method["metric"] == "components":
        P = np.linalg.qr(rng.standard_normal((d_in, len(S))))[0].T
    chosen = np.arange(len(S))[:rank]
    if method["select"] == "activation":
        chosen = np.argsort(-S * rng.uniform(0.5, 2, len(S)))[:rank]
    return U[:, chosen], S[chosen], P[chosen], S


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
    model = tiny_llama()
    adapter = prep.attach(model, store, core="dplr", rank=8, k=2)
    torch.manual_seed(0)
    for parameter in adapter.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model, adapter


def distributed_setups(rank: int, world: int, store: str, folder: str) -> None:
    """DDP, FSDP2 and FSDP2 in bfloat16 over gloo; rank 0 writes `<setup>.safetensors` with the trained adapter."""
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
        for setup in ("ddp", "fsdp", "fsdp-bf16"):
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
