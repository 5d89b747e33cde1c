"""Does a basis belong to this weight? U^T W = diag(S) P holds for every basis that was made from W.

A basis of the error W - Q of a quantised copy belongs to Q, which is known by its hash or by probes (copies.py).

Weights of the dtype the basis was made from are compared by hash. Others, quantised ones included, are probed: for
random x, `(W x)^T U` against `(P x)^T diag(S)`; the relative difference is the drift of the weights. Weights on a GPU
are probed as well, unless a hash is asked for, which copies them to the host.
"""

import copy
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..copies import FAR, distance, probed, signs
from ..errors import PrepError
from ..linear import dtype_name, is_plain, layer_shape, weight_hash, weight_matrix
from ..precision import exact
from ..store.format.schema import DTYPES

TOLERANCE = {"float64": 1e-5, "float32": 1e-5, "float16": 5e-3, "bfloat16": 5e-3, "int8": 5e-2}
PACKED_TOLERANCE = 0.25  # four bits show 0.07 to 0.1, other weights more than 1
PROBES = 8


def tensors_of(module: nn.Module) -> list[Tensor]:
    """The layer's tensors, the weight first where there is one: they tell its device and dtypes."""
    weight = getattr(module, "weight", None)
    others = chain(module.parameters(), module.buffers())
    return [*([weight] if isinstance(weight, Tensor) else []), *others]


def check_weight(
    name: str,
    module: nn.Module,
    U: Tensor,
    S: Tensor,
    P: Tensor,
    made_from: tuple[str, str],
    identity: bool = True,
    hashed: bool = True,
) -> None:
    """PrepError with the drift in percent if the basis U (d_out, r), S (r,), P (r, d_in) belongs to other weights.

    made_from: hash and dtype of the weight that was decomposed. identity: False for a basis of components, for which
    U^T W = diag(S) P does not hold and only the hash can tell. hashed: False probes weights of the same dtype, too.
    """
    expected, dtype = made_from
    where = f"{name} has other weights than its basis was made from"
    advice = "give the model that was decomposed, or pass verify=False"
    same_dtype = False
    if is_plain(module) and dtype in DTYPES:
        W = weight_matrix(module)
        same_dtype = W.dtype == DTYPES[dtype]
        if (hashed or not identity) and weight_hash(W.to(DTYPES[dtype])) == expected:
            return
    if not identity:
        raise PrepError(f"{where}, or the same in another dtype than {dtype}: {advice}")
    measured = drift(module, U, S, P)
    limit = TOLERANCE[dtype_name(U.dtype)] if same_dtype else tolerance(module, dtype, U.dtype)
    if (same_dtype and hashed) or not measured <= limit:
        raise PrepError(f"{where} (drift {measured:.2%}): {advice}")


def check_copy(name: str, module: nn.Module, known: Mapping[str, Any], verify: bool | str) -> None:
    """PrepError if a base layer does not compute with the quantised weight Q whose error was decomposed.

    known: what the basis records of Q. Where hashes differ, or are not asked for, probes tell; with verify "hash" only
    an equal hash will do.
    """
    count = len(known["probes"])
    try:
        Q = weight_matrix(module)
    except PrepError as error:  # its own forward may still tell
        probes = _probed_by_forward(name, module, count, error)
    else:
        if by_hash(module, verify) and weight_hash(Q) == known["hash"]:
            return
        probes = probed(Q, count)
    measured = distance(probes, known)
    if verify == "hash" or not measured <= FAR:
        raise PrepError(
            f"{name} has another quantised weight than its basis repairs (they differ by {measured:.0%} of that "
            "weight's error): give the base that was decomposed with --repair, decompose this one, or pass verify=False"
        )


def _probed_by_forward(name: str, module: nn.Module, count: int, error: PrepError) -> Tensor:
    """`probed` of a weight that only the layer itself can read."""
    s, t = signs(layer_shape(module), count)
    try:
        return (product(module, t.float()).cpu().double() * s).sum(1)
    except Exception:  # whatever a quantiser's layer raises where it is called alone
        raise PrepError(
            f"{name}, a {type(module).__name__}, has a quantised weight that cannot be compared with the one its basis "
            "repairs: run the model once, which unpacks some, or pass verify=False"
        ) from error


def by_hash(module: nn.Module, verify: bool | str) -> bool:
    """Whether a weight is compared by hash: on the CPU, and elsewhere where verify is "hash"."""
    return verify == "hash" or tensors_of(module)[0].device.type == "cpu"


def check_verify(verify: bool | str) -> None:
    """PrepError unless verify is True, False or "hash"."""
    if verify not in (True, False, "hash"):
        raise PrepError(f'verify={verify!r}: give True, False or "hash"')


def drift(module: nn.Module, U: Tensor, S: Tensor, P: Tensor) -> float:
    """Relative difference of x W^T U and x P^T diag(S) for random x: 0 up to rounding for the right weights.

    Relative to what r directions of x W^T hold on average, where these hold less: rounding hits all directions alike.
    """
    x = torch.randn(PROBES, layer_shape(module)[1], generator=torch.Generator().manual_seed(0))
    with exact():
        h = (x @ P.cpu().float().T) * S.cpu().float()
        y = product(module, x).cpu().float()
        scale = max(h.norm(), y.norm() * (U.shape[1] / U.shape[0]) ** 0.5)
        return ((y @ U.cpu().float() - h).norm() / scale).item()


def product(module: nn.Module, x: Tensor) -> Tensor:
    """x @ W.T for x (n, d_in) in float32, through the forward where the weight is packed."""
    tensors = tensors_of(module)
    x = x.to(tensors[0].device)
    with torch.no_grad(), exact():
        if is_plain(module):
            return x @ weight_matrix(module).float().T
        x = x.to(next((t.dtype for t in tensors if t.dtype in DTYPES.values()), torch.float32))
        probe = copy.copy(module)  # a forward may settle dtypes on the module and, in evaluation, repack its weight
        probe.training = True
        y, bias = probe(x), getattr(module, "bias", None)
        return y if bias is None else y - bias


def tolerance(module: nn.Module, made_from: str, stored: torch.dtype) -> float:
    """The drift that the coarsest of the dtypes involved explains."""
    dtype = tensors_of(module)[0].dtype
    here = dtype_name(dtype) if is_plain(module) or dtype == torch.int8 else "packed"
    return max(TOLERANCE.get(name, PACKED_TOLERANCE) for name in (here, made_from, dtype_name(stored)))
