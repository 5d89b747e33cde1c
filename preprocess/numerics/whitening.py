"""Whitened SVD of a linear layer: `W M = U diag(S) V^T`, `P = V^T M^-1 = S^-1 U^T W`, without a root or an inverse.

U and S are the eigenvectors and root eigenvalues of the Gram matrix `G = W M^2 W^T (d_out, d_out)`; for a tall layer
`W = Q R`, those of `R M^2 R^T (d_in, d_in)`, with `U = Q Z`. Where W allows, `R = L^T` is Cholesky's factor of `W^T W`
and only the columns of `Q Z` that are kept are formed. The second moment C is never factorised and may be singular.
With `C_d = C + damping mean(diag C) I`:

    metric full        M = C_d^a          at a = 1/2, G = W C_d W^T: least E||(W - U S P) x||^2 (Eckart-Young)
    metric diagonal    M = diag(C_d)^a    ASVD, arXiv 2312.05821
    metric identity    M = I              plain SVD
    metric components  P = eigenvectors of the centred C (EVA, arXiv 2410.07170): no factor of W, see `_components`
    metric null        U S P = W N N^T, N = bottom eigenvectors of C (LoRA-Null, arXiv 2503.02659), see `_null`

For the first three `U^T W = diag(S) P` holds for every stored direction. Numerics only: pure functions in float64.
"""

from dataclasses import dataclass, replace

import numpy as np

from ...errors import PrepError
from . import lapack, randomized, solvers
from .methods import Method, check, check_tokens
from .metric import InputStatistics, centred, factor, gram

TOKENS = 512  # of a sample that are multiplied at a time
CHOLESKY_LOSS = 1e-8  # of orthogonality in U = W L^-T Z: about eps cond(W)^2; above this W is decomposed by QR
GRAM_FLOOR = 1e-6  # a selected S_i below this share of S_max is not taken from G, whose condition number is squared
_EPS = float(np.finfo(np.float64).eps)
_MOMENT_NOISE = 2.0**-24  # moments are sums of float32 products


@dataclass(frozen=True)
class WhitenedSVD:
    """The basis of one layer, float64: U (d_out, r), S (r,), P (r, d_in), in the order of the selection.

    spectrum: all singular values, descending; the r stored ones only for solver `randomized`. energy: share of
    sum S^2 that the stored directions hold. tail: root of the sum of S^2 over the others, `||(W - U S P) M||_F`.
    numerical_rank: how many values of the spectrum are above rounding. solver: the route that ran, `gram`, `svd`
    or `randomized`. bound: tail^2 is at most bound times the least possible one (1 for an exact route).
    """

    U: np.ndarray
    S: np.ndarray
    P: np.ndarray
    spectrum: np.ndarray
    energy: float
    tail: float
    numerical_rank: int
    solver: str
    bound: float


def whitened_svd(W: np.ndarray, moment: InputStatistics | None, method: Method) -> WhitenedSVD:
    """Decompose a weight W (d_out, d_in) in the metric of `method`; the rank is clipped at min(d_out, d_in).

    A stored S_i that is zero up to rounding is raised to `eps max(d) S_max`, and to 1 in a layer without any energy,
    so that `U^T W = diag(S) P` holds there too; the spectrum is left as it is. The sign of a direction makes the
    largest entry of its column of U positive. Raises PrepError where `check` has a reason, shapes disagree, or a
    value is NaN or Inf.
    """
    reason = check(moment.kind if moment else None, method)
    if reason is None and (lacking := check_tokens(moment is not None and moment.tokens is not None, method)):
        reason = f"{lacking}: calibrate with `prep covariance --keep-tokens 4096`"
    if reason:
        raise PrepError(reason)
    W = np.asarray(W, dtype=np.float64)
    _validate(W, moment, method)
    rank = min(method.rank, *W.shape)
    if method.metric == "components":
        assert moment is not None
        return _components(W, moment, rank)
    if method.metric == "null":
        assert moment is not None
        return _null(W, moment, rank)

    solution = _solve(W, moment, method, rank)
    U = solution.Z * _signs(solution.Z)
    spectrum, order, total, route = solution.spectrum, solution.order, solution.total, solution.route
    S = spectrum[order]
    kept = float(np.sum(S**2))
    floored = np.maximum(S, _EPS * max(W.shape) * spectrum[0] or 1.0)
    return WhitenedSVD(
        U=U,
        S=floored,
        P=(U.T @ W) / floored[:, None],
        spectrum=spectrum,
        energy=kept / total if total > 0 else 1.0,
        tail=float(np.sqrt(max(total - kept, 0.0))) if route == "randomized" else _root_of_rest(spectrum, order),
        numerical_rank=int(np.sum(spectrum > _resolution(W.shape, method, route) * spectrum[0])),
        solver=route,
        bound=randomized.BOUND if route == "randomized" else 1.0,
    )


def spectrum_size(shape: tuple[int, int], method: Method) -> int:
    """How many singular values of a layer (d_out, d_in) every route gives: all k, or r where only those are sought."""
    if method.metric == "components":
        return shape[1]
    if method.metric == "null":
        return min(method.rank, *shape)
    side, rank = min(shape), min(method.rank, *shape)
    return rank if _tries_randomized(side, rank, method) else side


def _tries_randomized(side: int, rank: int, method: Method) -> bool:
    if method.solver == "randomized":
        return rank * randomized.RATIO <= side
    wanted = method.solver == "auto" and method.select == "top"
    return wanted and side >= randomized.AUTO_SIDE and rank * randomized.AUTO_RATIO <= side


@dataclass(frozen=True)
class _Directions:
    """Spectrum; the left directions Z (n, r) that are kept, and their numbers in it; sum of all S^2; the route."""

    spectrum: np.ndarray
    order: np.ndarray
    Z: np.ndarray
    total: float
    route: str


def _solve(W: np.ndarray, moment: InputStatistics | None, method: Method, rank: int) -> _Directions:
    """The selected left directions of `W M`; those of a tall W by way of a triangle A with `W = Q A`."""
    if W.shape[0] <= W.shape[1]:
        return _of_rows(W, moment, method, rank)
    solution = _by_cholesky(W, moment, method, rank)
    if solution is None:
        Q, A = np.linalg.qr(W)
        if moment is not None and moment.output is not None:
            output = Q.T @ moment.output @ Q
            moment = replace(moment, output=(output + output.T) / 2)
        solution = _of_rows(A, moment, method, rank)
        solution = replace(solution, Z=Q @ solution.Z)
    return solution


def _by_cholesky(W: np.ndarray, moment: InputStatistics | None, method: Method, rank: int) -> _Directions | None:
    """`W^T W = L L^T`, hence `Q = W L^-T`, of which only the selected directions `Q Z` are formed.

    None where W is too ill-conditioned for it, or G for what is selected; the smallest S_i need the digits of a QR.
    """
    if method.solver == "svd" or method.select == "bottom" or (moment is not None and moment.output is not None):
        return None
    try:
        L = lapack.cholesky(W)
        solution = _by_gram(L.T, moment, method, rank, L)
        U = W @ lapack.solve_lower_t(L, solution.Z) if solution is not None else None
    except np.linalg.LinAlgError:
        return None
    if solution is None or U is None:
        return None
    loss = U.T @ U - np.eye(len(solution.order))
    if not np.abs(loss).max() <= CHOLESKY_LOSS:
        return None
    return replace(solution, Z=U - U @ (loss / 2))  # a Newton-Schulz step, which squares the loss


def _of_rows(A: np.ndarray, moment: InputStatistics | None, method: Method, rank: int) -> _Directions:
    solution = _by_gram(A, moment, method, rank) if method.solver != "svd" else None
    if solution is not None:
        return solution
    S, Z = solvers.svd(factor(A, moment, method))
    order = _select(S, Z, A, moment, method)[:rank]
    return _Directions(S, order, Z[:, order], float(np.sum(S**2)), "svd")


def _by_gram(
    A: np.ndarray, moment: InputStatistics | None, method: Method, rank: int, lower: np.ndarray | None = None
) -> _Directions | None:
    """From `G = A M^2 A^T`; lower is A^T where A is a triangle. None where G has lost a selected S_i to rounding."""
    G = gram(A, moment, method, lower)
    if _tries_randomized(len(A), rank, method):
        G = np.tril(G) + np.tril(G, -1).T
        pairs = randomized.top_pairs(G, rank)
        if pairs is not None and pairs[0][-1] >= GRAM_FLOOR * pairs[0][0]:
            S, Z = pairs
            return _Directions(S, np.arange(rank), Z, float(np.trace(G)), "randomized")
    if method.select == "activation":
        S, Z = solvers.gram(G)
        order = _select(S, Z, A, moment, method)[:rank]
        Z = Z[:, order]
    else:
        order = np.arange(len(G))[:: 1 if method.select == "top" else -1][:rank]
        S, Z = solvers.gram(G, order)
    has_factor = not (method.metric == "full" and moment is not None and moment.second_moment is None)
    if has_factor and S[order].min() < GRAM_FLOOR * S[0]:
        return None
    return _Directions(S, order, Z, float(np.sum(S**2)), "gram")


def _select(S: np.ndarray, Z: np.ndarray, A: np.ndarray, moment: InputStatistics | None, method: Method) -> np.ndarray:
    """Direction numbers (k,), the first ones to be kept: S descending or ascending, or the activation score.

    The score `S_i rms(P_i x)` is `rms(u_i^T W x)`, from `U^T (W C W^T) U`: P is not needed, and E[y y^T] serves.
    Pooled as mean_abs it is `S_i E|P_i x| = E|u_i^T W x|` over the sample of tokens.
    """
    if method.select == "top":
        return np.arange(len(S))
    if method.select == "bottom":
        return np.arange(len(S))[::-1]
    assert moment is not None
    if method.pooling == "mean_abs":
        score = _mean_abs(Z.T @ A, moment)
    elif moment.second_moment is not None:
        X = Z.T @ A
        score = np.einsum("ij,ij->i", X @ moment.second_moment, X)
    else:
        assert moment.output is not None
        score = np.einsum("ij,ij->j", moment.output @ Z, Z)
    return np.argsort(-score, kind="stable")


def _mean_abs(X: np.ndarray, moment: InputStatistics) -> np.ndarray:
    """`E|X_i x|` (n,) of the rows of X (n, d_in) over the sample of tokens."""
    tokens = moment.tokens
    assert tokens is not None
    score = np.zeros(len(X))
    for a in range(0, len(tokens), TOKENS):
        score += np.abs(X @ tokens[a : a + TOKENS].T.astype(np.float64)).sum(1)
    return score / len(tokens)


def _components(W: np.ndarray, moment: InputStatistics, rank: int) -> WhitenedSVD:
    """EVA: P (r, d_in) the top eigenvectors of the centred C, S their standard deviations, energy the variance share.

    U (d_out, r) spans `W P^T` with orthonormal columns; P has orthonormal rows, and `U^T W = diag(S) P` does not hold.
    The tail is that of the input, `||x - P^T P x||`. There is no damping, which would not change eigenvectors.
    """
    order = np.arange(rank)
    spectrum, V = moment.once(("components", rank), lambda: solvers.gram(centred(moment), order))
    P = (V * _signs(V)).T
    U, R = np.linalg.qr(W @ P.T)
    total = float(np.sum(spectrum**2))
    return WhitenedSVD(
        U=U * np.where(np.diagonal(R) < 0, -1.0, 1.0),
        S=spectrum[:rank],
        P=P,
        spectrum=spectrum,
        energy=float(np.sum(spectrum[:rank] ** 2)) / total if total > 0 else 1.0,
        tail=_root_of_rest(spectrum, order),
        numerical_rank=int(np.sum(spectrum > _MOMENT_NOISE**0.5 * spectrum[0])),
        solver="gram",
        bound=1.0,
    )


def _null(W: np.ndarray, moment: InputStatistics, rank: int) -> WhitenedSVD:
    """LoRA-Null: of N (d_in, r), the bottom eigenvectors of C, `W N = U diag(S) V^T` and `P = V^T N^T`.

    `U diag(S) P = W N N^T` has every row in the span of N, so a slice of it is not that of fewer eigenvectors. P has
    orthonormal rows, `U^T W = diag(S) P` does not hold. energy and tail are in terms of W: `|W N|^2 / |W|^2` and
    `|W - W N N^T|`. There is no damping, which would not change eigenvectors.
    """
    C = moment.second_moment
    assert C is not None
    order = np.arange(len(C))[::-1][:rank]
    N = moment.once(("null", rank), lambda: solvers.gram(C, order)[1])
    U, S, Vt = np.linalg.svd(W @ N, full_matrices=False)
    signs = _signs(U)
    total, kept = float(np.sum(W**2)), float(np.sum(S**2))
    return WhitenedSVD(
        U=U * signs,
        S=S,
        P=(Vt * signs[:, None]) @ N.T,
        spectrum=S,
        energy=kept / total if total > 0 else 1.0,
        tail=float(np.sqrt(max(total - kept, 0.0))),
        numerical_rank=int(np.sum(_EPS * max(W.shape) * S[0] < S)),
        solver="gram",
        bound=1.0,
    )


def _resolution(shape: tuple[int, ...], method: Method, route: str) -> float:
    """S_i / S_max below which rounding decides: of the stored moment (damping lifts S above it), or of the route."""
    own = _EPS * max(shape) if route == "svd" else _EPS**0.5
    return max(own, _MOMENT_NOISE ** min(method.power, 1)) if method.metric == "full" else own


def _root_of_rest(spectrum: np.ndarray, order: np.ndarray) -> float:
    return float(np.linalg.norm(np.delete(spectrum, order)))


def _signs(U: np.ndarray) -> np.ndarray:
    """(r,) of +-1: the largest entry of each column of U becomes positive."""
    largest = U[np.argmax(np.abs(U), axis=0), np.arange(U.shape[1])]
    return np.where(largest < 0, -1.0, 1.0)


def _validate(W: np.ndarray, moment: InputStatistics | None, method: Method) -> None:
    if W.ndim != 2 or 0 in W.shape:
        raise PrepError(f"the weight has shape {W.shape}: a linear layer has (d_out, d_in)")
    if not np.isfinite(W).all():
        raise PrepError("the weight holds NaN or Inf: check the checkpoint")
    if moment is None:
        return
    if method.center and moment.mean is None:
        raise PrepError("the centred second moment needs the mean, which is not stored: run `prep covariance` again")
    d_out, d_in = W.shape
    if moment.tokens is not None and moment.tokens.shape[1:] != (d_in,):
        raise PrepError(f"the tokens {moment.tokens.shape} belong to another model: the weight is {W.shape}")
    shapes = {"second_moment": (d_in, d_in), "diagonal": (d_in,), "output": (d_out, d_out), "mean": (d_in,)}
    for name, shape in shapes.items():
        array = getattr(moment, name)
        if array is not None and array.shape != shape:
            raise PrepError(f"the moment ({name} {array.shape}) belongs to another model: the weight is {W.shape}")
