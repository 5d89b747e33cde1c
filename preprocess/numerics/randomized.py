"""The top r eigenpairs of a Gram matrix G (n, n) by block Krylov and Rayleigh-Ritz, with a certificate.

The certificate is the dual of Ky Fan's maximum principle: for every level s and every positive semidefinite X,

    s I + X - G > 0   implies   sum of the r largest eigenvalues of G <= r s + tr X

so one Cholesky factorisation, at a fraction of the cost of an eigendecomposition, proves how little better any other r
directions could be. Block Krylov: Musco and Musco 2015, arXiv 1504.05477.
"""

import numpy as np

BOUND = 1.001  # certified: squared error of the randomized route / squared error of the best rank r
RATIO = 16  # more than side / 16 directions cost less by `solvers.gram`
AUTO_SIDE = 1024  # `auto` prefers this route from this side of G on ...
AUTO_RATIO = 32  # ... when at most side / 32 directions are asked: twice as fast as `solvers.gram`, or more

_EPS = float(np.finfo(np.float64).eps)
_SEED = 0
_GROWTH = 1.2  # of the Krylov space from one Rayleigh-Ritz step to the next


def top_pairs(G: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray] | None:
    """S (rank,) and Z (n, rank) with `tr(G) - sum S^2 <= BOUND * (tr(G) - sum of the rank largest eigenvalues)`.

    The start block is seeded: equal input gives equal output. None where the bound is not proven before the
    Krylov space is so large that `solvers.gram` is cheaper.
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
