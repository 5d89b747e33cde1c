"""The metric M of a whitened SVD: `A M` and its Gram matrix `G = A M^2 A^T`, from the moments of a layer's input.

    full        M = C_d^a          C_d = C + damping mean(diag C) I, which is never factorised and may be singular
    diagonal    M = diag(C_d)^a
    identity    M = I

At full, a = 1/2, half of the products make G: with `C = T + T^T`, T its lower triangle and half of its diagonal,
`A C A^T = X + X^T` for `X = (A T) A^T`. Numerics only, in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...errors import PrepError
from . import lapack
from .methods import MOMENT_KINDS, Method, one_of


@dataclass(frozen=True)
class InputStatistics:
    """Statistics of one layer's input x, float64: what the calibration pass stored. Matrices are symmetric.

    kind `full`: second_moment (d_in, d_in) = E[x x^T], from which `diagonal` is taken; `diagonal`: diagonal (d_in,) =
    E[x_i^2]; `output`: diagonal, and output (d_out, d_out) = E[y y^T] of the bias-free y = W x. mean (d_in,) = E[x].
    tokens (n, d_in), float32: a sample of x, for pooling mean_abs.
    Raises PrepError for what is missing, NaN or Inf.
    """

    kind: str
    second_moment: np.ndarray | None = None
    diagonal: np.ndarray | None = None
    output: np.ndarray | None = None
    mean: np.ndarray | None = None
    tokens: np.ndarray | None = None
    _made: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        one_of("moment kind", self.kind, MOMENT_KINDS)
        needed = {"full": ["second_moment"], "diagonal": ["diagonal"], "output": ["output", "diagonal"]}[self.kind]
        missing = [name for name in needed if getattr(self, name) is None]
        if missing:
            raise PrepError(f"a moment of kind {self.kind} lacks {' and '.join(missing)}")
        for name in ("second_moment", "diagonal", "output", "mean", "tokens"):
            array = getattr(self, name)
            if array is not None and not np.isfinite(array).all():
                raise PrepError(f"the moment ({name}) holds NaN or Inf: run `prep covariance` again")
        if self.second_moment is not None:
            object.__setattr__(self, "diagonal", np.diagonal(self.second_moment))

    def once(self, what: Any, make: Callable[[], Any]) -> Any:
        """make(), kept under the name `what` for the other layers that share this moment."""
        if what not in self._made:
            self._made[what] = make()
        return self._made[what]


def gram(A: np.ndarray, moment: InputStatistics | None, method: Method, lower: np.ndarray | None = None) -> np.ndarray:
    """`G = A M^2 A^T` (n, n): its lower triangle, the other one is undefined. lower: A^T, where A is a triangle.

    From `E[y y^T] = A C A^T` where that is what is stored.
    """
    if method.metric != "full" or method.power != 0.5:
        F = factor(A, moment, method)
        return F @ F.T
    assert moment is not None
    C, damping = moment.second_moment, added_diagonal(moment, method)
    if C is not None and lower is not None:
        G = lapack.congruence(lower, C + damping * np.eye(len(C)))
    elif C is not None:
        B = lapack.times_lower(A, C)
        B += A * ((damping - np.diagonal(C)) / 2)
        X = B @ A.T
        G = X + X.T
    else:
        assert moment.output is not None
        G = moment.output + damping * (A @ A.T)
    if method.center:
        y = A @ _mean(moment)
        G -= np.outer(y, y)
    return G


def factor(A: np.ndarray, moment: InputStatistics | None, method: Method) -> np.ndarray:
    """`A M` (n, d_in), up to a rotation from the right, which changes neither U nor S."""
    if method.metric == "identity":
        return A
    assert moment is not None
    if method.metric == "diagonal":
        return A * (_variance(moment, method) + added_diagonal(moment, method)) ** method.power
    C, damping = moment.second_moment, added_diagonal(moment, method)
    assert C is not None
    if method.power == 1:
        B = A @ C + damping * A
        return B - np.outer(A @ _mean(moment), _mean(moment)) if method.center else B
    eigenvalues, V = moment.once(
        ("eigh", method.center), lambda: np.linalg.eigh(centred(moment) if method.center else C)
    )
    return (A @ V) * np.maximum(eigenvalues + damping, 0) ** method.power


def centred(moment: InputStatistics) -> np.ndarray:
    """`C - E[x] E[x]^T` (d_in, d_in)."""
    assert moment.second_moment is not None
    return moment.second_moment - np.outer(_mean(moment), _mean(moment))


def added_diagonal(moment: InputStatistics, method: Method) -> float:
    """What is added to the diagonal of C, in the units of C."""
    return method.damping * float(_variance(moment, method).mean()) if method.epsilon is None else method.epsilon


def _variance(moment: InputStatistics, method: Method) -> np.ndarray:
    """The undamped diagonal (d_in,): E[x_i^2], less the squared mean when centred."""
    assert moment.diagonal is not None
    return np.maximum(moment.diagonal - _mean(moment) ** 2, 0) if method.center else moment.diagonal


def _mean(moment: InputStatistics) -> np.ndarray:
    assert moment.mean is not None
    return moment.mean
