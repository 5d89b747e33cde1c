"""`prep decompose`: the whitened SVD of every layer of a store, in one metric or several.

Moments are read once per site, the numerics are those of numerics/whitening.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from ..errors import PrepError
from ..store import BasisSet, Store, open_store
from ..store.format.schema import zarr_store
from .decomposition.estimate import Estimate, estimate
from .decomposition.existing import not_made
from .decomposition.job import Decomposition
from .decomposition.request import basis_names, load_layers, open_requests
from .distributed import World, joined
from .options import DecomposeOptions
from .progress import say


def decompose(
    store: str | Path | Store = "prep.zarr",
    *,
    repair: str | nn.Module | None = None,
    for_: str | Sequence[str] | None = None,
    name: str | None = None,
    metric: str | None = None,
    power: float | None = None,
    damping: float | None = None,
    epsilon: float | None = None,
    center: bool | None = None,
    rank: int = 256,
    select: str | None = None,
    pooling: str | None = None,
    solver: str = "auto",
    dtype: str | torch.dtype = "float32",
    sample: int | None = None,
    model: str | Path | nn.Module | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    break_lock: bool = False,
    trust_remote_code: bool = False,
    quiet: bool = False,
    dry_run: bool = False,
    distributed: bool = False,
) -> BasisSet | list[BasisSet] | Estimate | None:
    """Decompose every layer of the store into the basis `name` and return it; the options are the command's.

    The weights of a path or hub id are read layer by layer from its safetensors, each once; a model that cannot be read
    so (quantised, with code of its own, without safetensors) is loaded whole, which a line says.

    store: its path, URL, or the opened store.
    repair: a quantised copy Q of the model, whose error W - Q is decomposed in place of W: a recipe (nf4, fp4, int8, or
    int4, int3, int2 with groups such as int4-g128), a path or hub id, or a module. U, S and P are then the best repair
    of the copy: least E||(W - Q - U S P) x||^2 in metric full, which needs full second moments.
    for_: a published method, such as "corda_ipm" (a row of PUBLISHED), whose metric, power, select and center are
    fixed. Of several, in a list or joined by commas, the bases are made with one load of the model and one reading of
    each moment, and returned as a list in their order; methods that share a basis return it alike.
    name: of the basis, by default made of metric, power and select.
    metric: full, diagonal or identity: the SVD of W M with M = C^a, diag(C)^a or I. power: the a, by default 0.5.
    damping: C + damping mean(diag C) I, by default 0.001. epsilon: C + epsilon I instead. center: C without the mean.
    rank: directions to keep, clipped per layer. select: the top, the bottom, or those of the largest activation.
    pooling: of activations: rms, S_i sqrt(E[(P_i x)^2]), or mean_abs, S_i E|P_i x| over the tokens that were kept.
    solver: exact, the float64 Gram route; svd, a float64 SVD of W M; randomized, within 1e-3 of the optimum; or auto.
    dtype: of stored U and P, by name or as a torch.dtype.
    sample: layers of each kind to cross-fit between the halves of the tokens, by default 2, 0 for all: what a basis
    loses of unseen tokens and what more data would gain is then noted of them (`evaluate`, `info`), and of all layers
    what each direction keeps there (`ranks`).
    model: a path, hub id or module; by default the store's, which it has if it was calibrated by path or hub id. With
    metric identity and `model`, no store need exist. revision: of `model` on the hub. trust_remote_code: run code from
    its repository.
    quiet: print errors only. break_lock: take a writer's lock that another machine has left behind. dry_run: return an
    Estimate of what is read, of memory and disk, and store nothing.

    A basis that is there with the same options is returned, an incomplete one resumed; another one is refused, or with
    `overwrite` replaced when the new one is complete.

    distributed: every process of a torchrun job, or of an initialised torch.distributed, calls it alike, sees the store
    and takes some of the layers; rank 0 returns the basis, the others None.

    Raises PrepError for bad input and StoreError where the store cannot serve it.
    """
    options = DecomposeOptions(**locals())
    with joined(distributed) as world:
        return _decompose(options, world)


def _decompose(options: DecomposeOptions, world: World) -> BasisSet | list[BasisSet] | Estimate | None:
    if world.size > 1 and options.dry_run:
        raise PrepError(f"--dry-run is for one process, these are {world.size}: start it without torchrun")
    requests = world.on_all(open_requests, options)
    missing = world.on_rank_zero(not_made, requests)
    todo = [request for request in requests if request.name in missing]
    if options.dry_run:
        return estimate(todo, options.quiet)
    if todo:
        world.on_all(zarr_store, options.store, False)  # refuses a place that cannot be written to
        net, modules = world.on_all(load_layers, todo, options.quiet or world.rank > 0)
        with Decomposition(todo, net, modules, world) as job:
            for name, done in job.layers():
                job.note(name, done)
            job.finish()
    if world.rank > 0:
        return None
    bases = open_store(options.store).bases
    for basis in (bases[request.name] for request in todo if request.method.metric == "components"):
        say(_reach(basis), options.quiet)
    made = [bases[name] for name in basis_names(options, requests[0].repair)]
    return made if options.several else made[0]


def _reach(basis: BasisSet) -> str:
    """How far an EVA basis reaches, whose ranks are redistributed when an adapter starts from it."""
    held = basis.method["rank"]
    if all(record.rank == min(record.shape) for record in basis.layers.values()):
        return f"basis {basis.name} holds every component: an EVA start takes any r"
    return (
        f"basis {basis.name} holds {held} components: an EVA start redistributes ranks, for which r may be up to "
        f"{held // 2} (rho 2), or {held} with rho 1"
    )
