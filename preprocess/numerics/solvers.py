"""Left singular directions of `A M`, from its Gram matrix `G = A M^2 A^T` (n, n) or from `A M` itself.

    gram    G = Z diag(S^2) Z^T     exact, but the condition number is squared
    svd     A M = Z diag(S) V^T     exact, keeps the small S_i

The top few of many are found faster by randomized.py. All functions are pure, and their LAPACK calls let go of the GIL.
"""

import numpy as np

from . import lapack

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
