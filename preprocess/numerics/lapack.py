"""Routines of BLAS and LAPACK that NumPy does not offer, in float64, taken from SciPy's Cython interface.

    times_lower    A tril(C)                       dtrmm
    cholesky       L L^T = W^T W                   dsyrk, dpotrf
    congruence     L^T C L                         dsygst
    solve_lower_t  L^-T B                          dtrtrs
    eigenpairs     all eigenvalues, some vectors   dsytrd, dsterf, dstein, dormtr

Called through ctypes, which releases the GIL (SciPy's own wrappers keep it): worker threads run side by side. Where
SciPy does not offer a routine in this form, NumPy does the work. The arrays are C-contiguous and LAPACK reads them by
columns: a lower triangle here is an upper one there.
"""

import ctypes
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

try:  # with this module, so that limits on BLAS threads reach SciPy's library, too
    from scipy.linalg import cython_blas, cython_lapack
except ImportError:
    cython_blas = cython_lapack = None

_SCALARS: dict[type, Callable[[Any], Any]] = {
    str: lambda letter: ctypes.c_char(letter.encode()),
    int: ctypes.c_int,
    float: ctypes.c_double,
}
_BLOCK = 64  # columns per block that the workspaces allow for
_RESIDUAL = 1e-10  # of ||G||; inverse iteration that ends above this has failed


def times_lower(A: np.ndarray, C: np.ndarray) -> np.ndarray:
    """`A tril(C)` (m, n) for A (m, n) and C (n, n), whose upper triangle is not read: half the work of `A C`."""
    m, n = A.shape
    assert C.shape == (n, n)
    if not _reachable("dtrmm"):
        return A @ np.tril(C)
    B = _copy(A)
    _call("dtrmm", "L", "U", "N", "N", n, m, 1.0, _rows(C), n, B, n)
    return B


def cholesky(W: np.ndarray) -> np.ndarray:
    """The triangle L (n, n) with `L L^T = W^T W`, for W (m, n). LinAlgError where that is not positive definite."""
    m, n = W.shape
    if not _reachable("dsyrk", "dpotrf"):
        return np.linalg.cholesky(W.T @ W)
    L = np.zeros((n, n))
    _call("dsyrk", "U", "N", n, m, 1.0, _rows(W), n, 0.0, L, n)
    if info := _lapack("dpotrf", "U", n, L, n):
        raise np.linalg.LinAlgError(f"dpotrf: {info}")
    return L


def congruence(L: np.ndarray, C: np.ndarray) -> np.ndarray:
    """`L^T C L` (n, n), its lower triangle, for a lower-triangular L and a symmetric C."""
    n = len(C)
    assert C.shape == L.shape == (n, n)
    if not _reachable("dsygst"):
        L, C = np.tril(L), np.tril(C) + np.tril(C, -1).T
        return L.T @ C @ L
    G = _copy(C)
    if info := _lapack("dsygst", 2, "U", n, G, n, _rows(L), n):
        raise np.linalg.LinAlgError(f"dsygst: {info}")
    return G


def solve_lower_t(L: np.ndarray, B: np.ndarray) -> np.ndarray:
    """`L^-T B` (n, r) for a lower-triangular L (n, n). LinAlgError if it is singular."""
    n, r = B.shape
    assert L.shape == (n, n)
    if not _reachable("dtrtrs"):
        return np.linalg.solve(np.tril(L).T, B)
    X = _copy(B.T)
    if info := _lapack("dtrtrs", "U", "N", "N", n, r, _rows(L), n, X, n):
        raise np.linalg.LinAlgError(f"dtrtrs: {info}")
    return X.T


def eigenpairs(G: np.ndarray, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues (n,) ascending, all, and the orthonormal eigenvectors (n, last - first) of numbers first to last - 1.

    The vectors come from inverse iteration, which costs n (last - first)^2 where eigenvalues lie close together.
    LinAlgError where it does not converge: take all vectors then.
    """
    n, r = len(G), last - first
    assert G.shape == (n, n) and 0 <= first < last <= n
    if not _reachable("dsytrd", "dsterf", "dstein", "dormtr"):
        values, Z = np.linalg.eigh(G)
        if not np.isfinite(values).all():
            raise np.linalg.LinAlgError("no eigenvalues")
        return values, Z[:, first:last]
    A, d, e, tau = _copy(G), np.empty(n), np.empty(n), np.empty(n)
    work = np.empty((n + r + _BLOCK) * _BLOCK)
    info = _lapack("dsytrd", "U", n, A, n, d, e, tau, work, n * _BLOCK)
    values, rest = d.copy(), e.copy()
    info = info or _lapack("dsterf", n, values, rest)
    if info:
        raise np.linalg.LinAlgError(f"no eigenvalues: {info}")
    wanted, one_block, ends = np.zeros(n), np.ones(n, np.int32), np.full(n, n, np.int32)
    wanted[:r] = values[first:last]
    Z, integers, failed = np.empty((r, n)), np.empty(n, np.int32), np.empty(r, np.int32)
    info = _lapack("dstein", n, d, e, r, wanted, one_block, ends, Z, n, np.empty(5 * n), integers, failed)
    off = Z * (d - wanted[:r, None])
    off[:, 1:] += Z[:, :-1] * e[: n - 1]
    off[:, :-1] += Z[:, 1:] * e[: n - 1]
    scale = max(abs(values[0]), abs(values[-1]))
    if info or not np.abs(off).max() <= _RESIDUAL * scale or not np.abs(Z @ Z.T - np.eye(r)).max() <= _RESIDUAL:
        raise np.linalg.LinAlgError(f"inverse iteration: {info}")
    _lapack("dormtr", "L", "U", "N", n, r, A, n, tau, Z, n, work, len(work))
    return values, Z.T


def _rows(A: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(A, dtype=np.float64)


def _copy(A: np.ndarray) -> np.ndarray:
    return np.array(A, dtype=np.float64, order="C")


def _lapack(name: str, *args: Any) -> int:
    """The routine's `info`, its last argument: 0 for success."""
    info = ctypes.c_int()
    _call(name, *args, info)
    return info.value


def _call(name: str, *args: Any) -> None:
    """Fortran takes every argument by its address; arrays must be C-contiguous."""
    values = [_SCALARS[type(x)](x) if type(x) in _SCALARS else x for x in args]
    _routine(name)(*(x.ctypes.data if isinstance(x, np.ndarray) else ctypes.addressof(x) for x in values))


@cache
def _reachable(*names: str) -> bool:
    """Whether SciPy offers all these routines, with the integers that are passed here."""
    try:
        return all(map(_routine, names))
    except (ImportError, AttributeError, KeyError, ValueError):
        return False


@cache
def _routine(name: str) -> Any:
    """The function in the capsule that SciPy publishes for C callers. ImportError if its integers are not C's int."""
    module = cython_lapack if name in cython_lapack.__pyx_capi__ else cython_blas
    capsule, api = module.__pyx_capi__[name], ctypes.pythonapi
    api.PyCapsule_GetName.argtypes, api.PyCapsule_GetName.restype = [ctypes.py_object], ctypes.c_char_p
    api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    signature = api.PyCapsule_GetName(capsule)
    if not re.search(rb"\bint \*", signature):
        raise ImportError(f"SciPy's {name} takes {signature.decode()}")
    pointers = [ctypes.c_void_p] * signature.count(b"*")
    return ctypes.CFUNCTYPE(None, *pointers)(api.PyCapsule_GetPointer(capsule, signature))
