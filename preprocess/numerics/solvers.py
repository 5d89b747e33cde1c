"""Left singular directions of `A M`, from its Gram matrix `G = A M^2 A^T` (n, n) or from `A M` itself.

    gram        G = Z diag(S^2) Z^T                exact, but the condition number is squared
    svd         A M = Z diag(S) V^T                exact, keeps the small S_i
    randomized  block Krylov with Rayleigh-Ritz    the top r only, with a certificate

The certificate is the dual of Ky Fan's maximum principle: for every level s and every positive semidefinite X,

    s I + X - G > 0   implies   sum of the r largest eigenvalues of G <= r s + tr X

so one Cholesky factorisation, at a fraction of the cost of an eigendecomposition, proves how little better any other r
directions could be. Block Krylov: Musco and Musco 2015, arXiv 1504.05477.
All functions are pure, and their LAPACK calls let go of the GIL.
"""

import numpy as np

from . import lapack

BOUND = 1.001  # certified: squared error of the randomized route / squared error of the best rank r
RATIO = 16  # more than side / 16 directions cost less by `gram`
AUTO_SIDE = 1024  # `auto` prefers the randomized route from this side of G on ...
AUTO_RATIO = 32  # ... when at most side / 32 directions are asked: twice as fast as `gram`, or more

_EPS = float(np.finfo(np.float64).eps)
_SEED = 0
_GROWTH = 1.2  # of the Krylov space from one Rayleigh-Ritz step to the next
_FEW = 4  # of n directions at most n / 4 are found one by one, otherwise all at once


def gram(G: np.ndarray, order: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """S (n,) descending and Z of a symmetric G (n, n); eigenvalues that rounding made negative count as zero.

    Z (n, n), or only the columns of `order` (r,): consecutive direction numbers, rising or falling.
    """
    n = len(G)
    if order is not None and _FEW * len(order) < n:
        first = n - 1 - int(order.max())
        try:
            eigenvalues, Z = lapack.eigenpairs(G, first, first + len(order))
            return _roots(eigenvalues), Z[:, n - 1 - order - first]
        except np.linalg.LinAlgError:
            pass
    eigenvalues, Z = np.linalg.eigh(G)
    Z = Z[:, ::-1]
    return _roots(eigenvalues), Z if order is None else Z[:, order]


def _roots(eigenvalues: np.ndarray) -> np.ndarray:
    return np.sqrt(np.maximum(eigenvalues[::-1], 0))


def svd(F: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """S (n,) descending and Z (n, n) of F (n, d), n <= d. Only a triangle of F is decomposed: V is not needed."""
    triangle = np.asarray(np.linalg.qr(F.T, mode="r"))
    Z, S, _ = np.linalg.svd(triangle.T)
    return S, Z


def randomized(G: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray] | None:
    """S (rank,) and Z (n, rank) with `tr(G) - sum S^2 <= BOUND * (tr(G) - sum of the rank largest eigenvalues)`.

    The start block is seeded: equal input gives equal output. None where the bound is not proven before the
    Krylov space is so large that `gram` is cheaper.
    """
    n, trace = len(G), float(np.trace(G))
    block = max(8, rank // 4)
    largest = min(n // 2, 6 * (rank + block))
    Q, GQ, T = np.empty((n, largest), order="F"), np.empty((n, largest), order="F"), np.empty((largest, largest))
    new = np.random.default_rng(_SEED).standard_normal((n, block))
    size, enough = 0, 1.5 * rank
    while size + block <= largest:
        for _ in range(2):  # once leaves a part of Q where the new block is small
            new = np.linalg.qr(new - Q[:, :size] @ (Q[:, :size].T @ new))[0]
        last, size = slice(size, size + block), size + block
        Q[:, last] = new
        GQ[:, last] = new = G @ new
        T[:size, last] = Q[:, :size].T @ new
        if size < enough:
            continue
        enough = _GROWTH * size
        ritz, Y = np.linalg.eigh(T[:size, :size], UPLO="U")
        ritz, Y = ritz[::-1], Y[:, ::-1]
        top, Z = ritz[:rank], Q[:, :size] @ Y[:, :rank]
        residual = np.linalg.norm(GQ[:, :size] @ Y[:, :rank] - Z * top, axis=0)
        slack = float((1 - 1 / BOUND) * (trace - top.sum()))
        if slack <= n * _EPS * trace:  # what is left is rounding
            return None
        level, x = _dual(top, residual, slack)
        hopeful = ritz[rank] + np.sum(residual**2 / x) < level  # roughly what the factorisation decides
        if hopeful and _dominates(level, x, Z, G):
            return np.sqrt(np.maximum(top, 0)), Z
    return None


def _dual(top: np.ndarray, residual: np.ndarray, slack: float) -> tuple[float, np.ndarray]:
    """Level s and x (r,), X = Z diag(x) Z^T, with `r s + sum x = sum top + slack`; top (r,) is descending.

    Half of the slack lifts s above the smallest Ritz values, which closes the gap of a flat spectrum; the other half
    pays for the residuals.
    """
    half = slack / 2
    ascending = np.cumsum(top[::-1])
    level = float(((half + ascending) / np.arange(1, len(top) + 1)).min())
    share = residual + residual.mean() + _EPS * top[0]
    return level, np.maximum(top - level, 0) + half * share / share.sum()


def _dominates(level: float, x: np.ndarray, Z: np.ndarray, G: np.ndarray) -> bool:
    """Whether `level I + Z diag(x) Z^T - G` is positive definite, also after the rounding of the factorisation."""
    n = len(G)
    D = (Z * x) @ Z.T - G
    D.flat[:: n + 1] += level
    D.flat[:: n + 1] -= n * _EPS * np.trace(D)
    try:
        np.linalg.cholesky(D)
    except np.linalg.LinAlgError:
        return False
    return True
