"""`prep verify`: the store against itself (store/verify.py) and, if asked, against the weights it was made from."""

from __future__ import annotations

from pathlib import Path

from ..errors import PrepError
from ..linear import weight_matrix
from ..store import Store, open_store
from ..store.integrity import Report, verify_store
from .model import loading as models
from .model.sites import target_layers


def verify(
    store: str | Path | Store = "prep.zarr",
    *,
    model: str | Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Report:
    """Check every chunk, hash, shape and identity of a store; with `model` (path or hub id) its weights too.

    store: its path, URL, or the opened store. revision: of the model on the hub. trust_remote_code: run code from the
    model's repository.

    The report's `findings` are empty for a whole store. Raises StoreError where there is no store to look at.
    """
    opened = open_store(store.location if isinstance(store, Store) else store)  # as it is by now
    if model is None:
        return verify_store(opened)
    dtype = opened.model.get("dtype")
    if dtype not in models.DTYPES:
        raise PrepError(f"{store} says its model had the dtype {dtype!r}: it is damaged")
    net = models.load_model(
        str(model), revision=revision, dtype=dtype, device="cpu", trust_remote_code=trust_remote_code
    )
    layers = target_layers(net, targets=[".*"])  # a store may have been made of layers outside the blocks
    return verify_store(opened, {layer: weight_matrix(module) for layer, module in layers.items()})
