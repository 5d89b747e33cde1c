"""What a basis loses of a layer's output on any tokens, for every rank at once, and what more data would gain.

Where `U^T W = diag(S) P`, the first r directions lose, on tokens with the second moment C,

    e(r) = E||(W - U S P) x||^2 = tr(W C W^T) - sum_{i<=r} t_i,   t_i = u_i^T W C W^T u_i = S_i^2 P_i C P_i^T

for every metric and power; `E[y y^T]` serves in place of `W C W^T`. A basis of metric components (EVA) is no factor of
W: it is scored by the input variance that P holds, `t_i = P_i (C - E[x] E[x]^T) P_i^T` of `tr(C - E[x] E[x]^T)`. For
one of metric null U^T W is not diag(S) P, and `t_i = 2 S_i u_i^T W C P_i^T - S_i^2 P_i C P_i^T`, which may be negative.

Of two disjoint parts A and B of the tokens, `e_B(basis of A)` is an honest estimate, and `e_A(basis of A)` is too small
by about as much as the basis of A is worse than the best one. The excess of a basis falls as n^-0.8 (measured).
Numerics only: pure functions in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import PrepError
from . import lapack
from .methods import Method
from .metric import InputStatistics, added_diagonal
from .whitening import WhitenedSVD, whitened_svd

EXPONENT = 0.8  # the excess of a basis falls as tokens^-EXPONENT; store/excess.py knows it, too


@dataclass(frozen=True)
class Energy:
    """total: E||W x||^2, or the input variance for metric components; kept (r,): t_i of each direction, in order."""

    total: float
    kept: np.ndarray

    def lost(self, rank: int) -> float:
        """e(rank), with all directions where there are fewer; never below zero."""
        return max(self.total - float(self.kept[:rank].sum()), 0.0)

    @property
    def shares(self) -> np.ndarray:
        """`kept` in shares of the total; none is below zero, and all are zero in a layer without energy."""
        return np.maximum(self.kept, 0) / self.total if self.total > 0 else np.zeros_like(self.kept)


@dataclass(frozen=True)
class Crossed:
    """Two parts, share: of A in the tokens. Energies of the basis of A and of that of B, each on both parts."""

    share: float
    a_on_a: Energy
    a_on_b: Energy
    b_on_b: Energy
    b_on_a: Energy

    def lost(self, rank: int) -> float:
        """The mean error of a basis on the tokens that it has not seen."""
        return (self.a_on_b.lost(rank) + self.b_on_a.lost(rank)) / 2

    def excess(self, rank: int) -> float:
        """How far the basis of all tokens is from the best one: `gap / (p^-0.8 + q^-0.8)`, p and q the parts' shares.

        gap is the mean of what either basis loses more on the other part than on its own; of equal parts this is
        `gap / 2 * 2^-0.8`.
        """
        return self._gap(rank) / (self.share**-EXPONENT + (1 - self.share) ** -EXPONENT)

    def least(self, rank: int, lost: float) -> float:
        """The error of the best basis, from what that of all tokens loses on them: `lost + gap / 4` of equal parts."""
        return lost + self._gap(rank) / (1 / self.share + 1 / (1 - self.share))

    @property
    def kept(self) -> np.ndarray:
        """The share of the output that each direction (r,) keeps of tokens that its basis has not seen, the mean."""
        return (self.a_on_b.shares + self.b_on_a.shares) / 2

    def shares(self, ranks: Sequence[int], energy: Energy) -> dict[str, Any]:
        """Lists `unseen`, `excess` and `least` at `ranks`, in shares of the total.

        energy: of the basis of all tokens, on them.
        """
        unit = energy.total if energy.total > 0 else 1.0
        return {
            "ranks": list(ranks),
            "unseen": [self.lost(rank) / unit for rank in ranks],
            "excess": [self.excess(rank) / unit for rank in ranks],
            "least": [self.least(rank, energy.lost(rank)) / unit for rank in ranks],
        }

    def _gap(self, rank: int) -> float:
        a = self.a_on_b.lost(rank) - self.a_on_a.lost(rank)
        b = self.b_on_a.lost(rank) - self.b_on_b.lost(rank)
        return max((a + b) / 2, 0.0)


def own_energy(
    W: np.ndarray,
    basis: WhitenedSVD,
    moment: InputStatistics,
    method: Method,
    total: Callable[[], float] | None = None,
) -> Energy:
    """The energy of a basis on the tokens that it was made of. PrepError where their moment does not tell it.

    total: gives `output_energy` of W and moment, which the bases of a layer may share; most need none.
    """
    if method.metric == "components":
        return Energy(input_variance(moment), basis.S**2)
    known = _from_gram(W, basis, moment, method) if method.metric == "full" and method.power == 0.5 else None
    if known is not None:
        return known
    energy = output_energy(W, moment) if total is None else total()
    return Energy(energy, kept_by(method.metric, W, basis.U, basis.S, basis.P, moment))


def _from_gram(W: np.ndarray, basis: WhitenedSVD, moment: InputStatistics, method: Method) -> Energy | None:
    """`own_energy` of metric full at power 1/2 without a product with C, since there `S_i^2 = u_i^T W C_d W^T u_i`.

    With d what damping adds to the diagonal of C, `t_i = S_i^2 (1 - d |P_i|^2)`, and `S_i^2 (P_i E[x])^2` more where
    the mean was taken out. None where most energy is by damping, and a difference would be rounding, or where there is
    none: S is 1 then.
    """
    damped = float(np.sum(basis.S**2) + basis.tail**2)
    d = added_diagonal(moment, method)
    by_damping = d * float(np.sum(W**2))
    if by_damping > damped / 2 or not basis.spectrum[0] > 0:
        return None
    total, kept = damped - by_damping, basis.S**2 * (1 - d * np.sum(basis.P**2, axis=1))
    if method.center:
        assert moment.mean is not None
        total += float(np.sum((W @ moment.mean) ** 2))
        kept += (basis.S * (basis.P @ moment.mean)) ** 2
    return Energy(total, kept)


def output_energy(W: np.ndarray, moment: InputStatistics) -> float:
    """`E||W x||^2 = tr(W C W^T)`. PrepError where the moment is a diagonal, which does not give it."""
    if moment.output is not None:
        return float(np.trace(moment.output))
    _need_matrix(moment)
    return quadratic(np.asarray(W, dtype=np.float64), moment).sum()


def input_variance(moment: InputStatistics) -> float:
    """`tr(C - E[x] E[x]^T)`."""
    assert moment.diagonal is not None and moment.mean is not None
    return float(np.sum(moment.diagonal - moment.mean**2))


def kept_output(U: np.ndarray, S: np.ndarray, P: np.ndarray, moment: InputStatistics) -> np.ndarray:
    """t_i (r,) of U (d_out, r), S (r,), P (r, d_in). PrepError where the moment is a diagonal."""
    if moment.output is not None:
        U = np.asarray(U, dtype=np.float64)
        return np.einsum("ij,ij->j", moment.output @ U, U)
    _need_matrix(moment)
    return quadratic(np.asarray(P, dtype=np.float64) * np.asarray(S, dtype=np.float64)[:, None], moment)


def kept_by(
    metric: str, W: np.ndarray, U: np.ndarray, S: np.ndarray, P: np.ndarray, moment: InputStatistics
) -> np.ndarray:
    """t_i (r,) of a basis of any metric but components. PrepError where the moment does not tell it."""
    if metric != "null":
        return kept_output(U, S, P, moment)
    _need_matrix(moment)
    PC = P @ moment.second_moment
    return S * (2 * np.einsum("ij,ij->i", U.T @ W, PC) - S * np.einsum("ij,ij->i", P, PC))


def kept_variance(P: np.ndarray, moment: InputStatistics) -> np.ndarray:
    """The input variance (r,) along the orthonormal rows of P (r, d_in). PrepError where the moment is not full."""
    if moment.second_moment is None:
        raise PrepError(
            f"metric components is scored on the full second moment, not {moment.kind}: "
            "run `prep covariance --moment full`"
        )
    P = np.asarray(P, dtype=np.float64)
    assert moment.mean is not None
    return quadratic(P, moment) - (P @ moment.mean) ** 2


def quadratic(A: np.ndarray, moment: InputStatistics) -> np.ndarray:
    """`A_i C A_i^T` (n,) of the rows of A (n, d_in), from the lower triangle of C: half of the work."""
    C = moment.second_moment
    assert C is not None
    B = lapack.times_lower(A, C)
    return 2 * np.einsum("ij,ij->i", B, A) - (A**2) @ np.diagonal(C)


def rest(whole: InputStatistics, part: InputStatistics, share: float) -> InputStatistics:
    """The moment of the other tokens, `(C - share C_part) / (1 - share)`."""

    def other(name: str) -> np.ndarray | None:
        a, b = getattr(whole, name), getattr(part, name)
        return None if a is None or b is None else (a - share * b) / (1 - share)

    return InputStatistics(whole.kind, other("second_moment"), other("diagonal"), other("output"), other("mean"))


def crossed(W: np.ndarray, a: InputStatistics, b: InputStatistics, share: float, method: Method) -> Crossed:
    """The bases of two parts of the tokens, each scored on both."""
    of_a = whitened_svd(W, a, method)
    same = method.metric == "identity" and method.select != "activation"  # whatever the tokens
    of_b = of_a if same else whitened_svd(W, b, method)
    a_on_a, b_on_b = own_energy(W, of_a, a, method), own_energy(W, of_b, b, method)

    def on(basis: WhitenedSVD, moment: InputStatistics, total: float) -> Energy:
        if method.metric == "components":
            return Energy(total, kept_variance(basis.P, moment))
        return Energy(total, kept_by(method.metric, W, basis.U, basis.S, basis.P, moment))

    return Crossed(share, a_on_a, on(of_a, b, b_on_b.total), b_on_b, on(of_b, a, a_on_a.total))


def _need_matrix(moment: InputStatistics) -> None:
    if moment.second_moment is None:
        raise PrepError(
            "the output that a basis keeps does not follow from a diagonal moment: "
            "run `prep covariance --moment full` or `--moment output`"
        )
