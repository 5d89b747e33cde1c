"""Whitened SVD of a linear layer: `W M = U diag(S) V^T`, `P = V^T M^-1 = S^-1 U^T W`, without a root or an inverse.

U and S are the eigenvectors and root eigenvalues of the Gram matrix `G = W M^2 W^T (d_out, d_out)`; for a tall layer
`W = Q R`, those of `R M^2 R^T (d_in, d_in)`, with `U = Q Z`. Hence the second moment C is never factorised and may be
singular. With `C_d = C + damping mean(diag C) I`:

    metric full        M = C_d^a          at a = 1/2, G = W C_d W^T: least E||(W - U S P) x||^2 (Eckart-Young)
    metric diagonal    M = diag(C_d)^a    ASVD, arXiv 2312.05821
    metric identity    M = I              plain SVD
    metric components  P = eigenvectors of the centred C (EVA, arXiv 2410.07170): no factor of W, see `_components`

For the first three `U^T W = diag(S) P` holds for every stored direction. Numerics only: pure functions in float64.
"""

from dataclasses import dataclass, replace

import numpy as np

from ..store.errors import PrepError
from . import solvers
from .methods import MOMENT_KINDS, Method, check, one_of

GRAM_FLOOR = 1e-6  # a selected S_i below this share of S_max is not taken from G, whose condition number is squared
_EPS = float(np.finfo(np.float64).eps)
_MOMENT_NOISE = 2.0**-24  # moments are sums of float32 products


@dataclass(frozen=True)
class Moment:
    """Statistics of one layer's input x, float64: what the calibration pass stored.

    kind `full`: second_moment (d_in, d_in) = E[x x^T], from which `diagonal` is taken; `diagonal`: diagonal (d_in,) =
    E[x_i^2]; `output`: diagonal, and output (d_out, d_out) = E[y y^T] of the bias-free y = W x. mean (d_in,) = E[x].
    """

    kind: str
    second_moment: np.ndarray | None = None
    diagonal: np.ndarray | None = None
    output: np.ndarray | None = None
    mean: np.ndarray | None = None

    def __post_init__(self) -> None:
        one_of("moment kind", self.kind, MOMENT_KINDS)
        if self.kind == "full" and self.second_moment is not None:
            object.__setattr__(self, "diagonal", np.diagonal(self.second_moment))
        needed = {"full": ["second_moment"], "diagonal": ["diagonal"], "output": ["output", "diagonal"]}[self.kind]
        missing = [name for name in needed if getattr(self, name) is None]
        if missing:
            raise PrepError(f"a moment of kind {self.kind} lacks {' and '.join(missing)}")


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


def whitened_svd(W: np.ndarray, moment: Moment | None, method: Method) -> WhitenedSVD:
    """Decompose a weight W (d_out, d_in) in the metric of `method`; the rank is clipped at min(d_out, d_in).

    A stored S_i that is zero up to rounding is raised to `eps max(d) S_max`, and to 1 in a layer without any energy,
    so that `U^T W = diag(S) P` holds there too; the spectrum is left as it is. The sign of a direction makes the
    largest entry of its column of U positive. Raises PrepError where `check` has a reason, shapes disagree, or a
    value is NaN or Inf.
    """
    reason = check(moment.kind if moment else None, method)
    if reason:
        raise PrepError(reason)
    W = np.asarray(W, dtype=np.float64)
    _validate(W, moment, method)
    rank = min(method.rank, *W.shape)
    if method.metric == "components":
        assert moment is not None
        return _components(W, moment, rank)

    Q, A = None, W
    if W.shape[0] > W.shape[1]:
        Q, A = np.linalg.qr(W)
        if moment is not None and moment.output is not None:
            moment = replace(moment, output=Q.T @ moment.output @ Q)
    spectrum, Z, order, total, route = _solve(A, moment, method, rank)

    S, Z = spectrum[order], Z[:, order]
    U = Z if Q is None else Q @ Z
    sign = _signs(U)
    kept = float(np.sum(S**2))
    floored = np.maximum(S, _EPS * max(W.shape) * spectrum[0] or 1.0)
    return WhitenedSVD(
        U=U * sign,
        S=floored,
        P=((Z * sign).T @ A) / floored[:, None],
        spectrum=spectrum,
        energy=kept / total if total > 0 else 1.0,
        tail=float(np.sqrt(max(total - kept, 0.0))) if route == "randomized" else _root_of_rest(spectrum, order),
        numerical_rank=int(np.sum(spectrum > _resolution(W.shape, method, route) * spectrum[0])),
        solver=route,
        bound=solvers.BOUND if route == "randomized" else 1.0,
    )


def spectrum_size(shape: tuple[int, int], method: Method) -> int:
    """How many singular values of a layer (d_out, d_in) every route gives: all k, or r where only those are sought."""
    if method.metric == "components":
        return shape[1]
    side, rank = min(shape), min(method.rank, *shape)
    return rank if _tries_randomized(side, rank, method) else side


def _tries_randomized(side: int, rank: int, method: Method) -> bool:
    small = side >= solvers.AUTO_SIDE and rank * solvers.AUTO_RATIO <= side
    return method.solver == "randomized" or (method.solver == "auto" and method.select == "top" and small)


def _solve(
    A: np.ndarray, moment: Moment | None, method: Method, rank: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float, str]:
    """Spectrum, left directions Z of `A M`, the selected ones in order, sum of all S^2, and the route that ran."""
    has_factor = not (method.metric == "full" and moment is not None and moment.second_moment is None)
    if method.solver != "svd":
        G = _gram(A, moment, method)
        if _tries_randomized(len(A), rank, method):
            found = solvers.randomized(G, rank)
            if found is not None and found[0][-1] >= GRAM_FLOOR * found[0][0]:
                return *found, np.arange(rank), float(np.trace(G)), "randomized"
        S, Z = solvers.gram(G)
        order = _select(S, Z, A, moment, method.select)[:rank]
        if S[order].min() >= GRAM_FLOOR * S[0] or not has_factor:
            return S, Z, order, float(np.sum(S**2)), "gram"
    S, Z = solvers.svd(_factor(A, moment, method))
    return S, Z, _select(S, Z, A, moment, method.select)[:rank], float(np.sum(S**2)), "svd"


def _gram(A: np.ndarray, moment: Moment | None, method: Method) -> np.ndarray:
    """`G = A M^2 A^T` (n, n), from `E[y y^T] = A C A^T` where that is what is stored."""
    if method.metric != "full" or method.power != 0.5:
        F = _factor(A, moment, method)
        return F @ F.T
    assert moment is not None
    if moment.second_moment is not None:
        G = _times_second_moment(A, moment, method) @ A.T
    else:
        assert moment.output is not None
        G = moment.output + _damping(moment, method) * (A @ A.T)
        if method.center:
            mean = A @ _mean(moment)
            G -= np.outer(mean, mean)
    return (G + G.T) / 2


def _factor(A: np.ndarray, moment: Moment | None, method: Method) -> np.ndarray:
    """`A M` (n, d_in), up to a rotation from the right, which changes neither U nor S."""
    if method.metric == "identity":
        return A
    assert moment is not None
    if method.metric == "diagonal":
        return A * (_variance(moment, method) + _damping(moment, method)) ** method.power
    if method.power == 1:
        return _times_second_moment(A, moment, method)
    eigenvalues, V = np.linalg.eigh(_times_second_moment(np.eye(A.shape[1]), moment, method))
    return (A @ V) * np.maximum(eigenvalues, 0) ** method.power


def _times_second_moment(A: np.ndarray, moment: Moment, method: Method) -> np.ndarray:
    """`A C_d` (n, d_in): damped and centred without a second d_in^2 array."""
    assert moment.second_moment is not None
    B = A @ moment.second_moment
    B += _damping(moment, method) * A
    if method.center:
        mean = _mean(moment)
        B -= np.outer(A @ mean, mean)
    return B


def _damping(moment: Moment, method: Method) -> float:
    """What is added to the diagonal of C, in the units of C."""
    return method.damping * float(_variance(moment, method).mean()) if method.epsilon is None else method.epsilon


def _variance(moment: Moment, method: Method) -> np.ndarray:
    """The undamped diagonal (d_in,): E[x_i^2], less the squared mean when centred."""
    assert moment.diagonal is not None
    return np.maximum(moment.diagonal - _mean(moment) ** 2, 0) if method.center else moment.diagonal


def _mean(moment: Moment) -> np.ndarray:
    assert moment.mean is not None
    return moment.mean


def _select(S: np.ndarray, Z: np.ndarray, A: np.ndarray, moment: Moment | None, select: str) -> np.ndarray:
    """Direction numbers (k,), the first ones to be kept: S descending or ascending, or the activation score.

    The score `S_i rms(P_i x)` is `rms(u_i^T W x)`, from `U^T (W C W^T) U`: P is not needed, and E[y y^T] serves.
    """
    if select == "top":
        return np.arange(len(S))
    if select == "bottom":
        return np.arange(len(S))[::-1]
    assert moment is not None
    if moment.second_moment is not None:
        X = Z.T @ A
        score = np.einsum("ij,ij->i", X @ moment.second_moment, X)
    else:
        assert moment.output is not None
        score = np.einsum("ij,ij->j", moment.output @ Z, Z)
    return np.argsort(-score, kind="stable")


def _components(W: np.ndarray, moment: Moment, rank: int) -> WhitenedSVD:
    """EVA: P (r, d_in) the top eigenvectors of the centred C, S their standard deviations, energy the variance share.

    U (d_out, r) spans `W P^T` with orthonormal columns; P has orthonormal rows, and `U^T W = diag(S) P` does not hold.
    The tail is that of the input, `||x - P^T P x||`. There is no damping, which would not change eigenvectors.
    """
    assert moment.second_moment is not None
    C = moment.second_moment - np.outer(_mean(moment), _mean(moment))
    spectrum, V = solvers.gram((C + C.T) / 2)
    P = (V[:, :rank] * _signs(V[:, :rank])).T
    U, R = np.linalg.qr(W @ P.T)
    total, order = float(np.sum(spectrum**2)), np.arange(rank)
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


def _validate(W: np.ndarray, moment: Moment | None, method: Method) -> None:
    if W.ndim != 2 or 0 in W.shape:
        raise PrepError(f"the weight has shape {W.shape}: a linear layer has (d_out, d_in)")
    if not np.isfinite(W).all():
        raise PrepError("the weight holds NaN or Inf: check the checkpoint")
    if moment is None:
        return
    if method.center and moment.mean is None:
        raise PrepError("the centred second moment needs the mean, which is not stored: run `prep covariance` again")
    d_out, d_in = W.shape
    shapes = {"second_moment": (d_in, d_in), "diagonal": (d_in,), "output": (d_out, d_out), "mean": (d_in,)}
    for name, shape in shapes.items():
        array = getattr(moment, name)
        if array is None:
            continue
        if array.shape != shape:
            raise PrepError(f"the moment ({name} {array.shape}) belongs to another model: the weight is {W.shape}")
        if not np.isfinite(array).all():
            raise PrepError(f"the moment ({name}) holds NaN or Inf: run `prep covariance` again")
