"""Weights and inputs of single layers, and their moments, for the tests of the numerics."""

import numpy as np

from prep.preprocess.numerics.metric import InputStatistics

SHAPES = {"wide": (40, 96), "square": (64, 64), "tall": (96, 40)}
TOKENS = 400


def activations(d_in: int, tokens: int = TOKENS, seed: int = 0) -> np.ndarray:
    """(tokens, d_in): a power-law spectrum in a random basis, a mean, and three huge outlier dimensions."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((d_in, d_in)))[0]
    X = rng.standard_normal((tokens, d_in)) * np.arange(1, d_in + 1) ** -0.8 @ basis + 0.1 * rng.standard_normal(d_in)
    X[:, rng.choice(d_in, 3, replace=False)] *= [40, 60, 100]
    return X


def weight(d_out: int, d_in: int, seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((d_out, d_in)) @ np.diag(np.linspace(1, 0.05, d_in))


def full(X: np.ndarray) -> InputStatistics:
    return InputStatistics("full", second_moment=X.T @ X / len(X), mean=X.mean(0))


def diagonal(X: np.ndarray) -> InputStatistics:
    return InputStatistics("diagonal", diagonal=(X**2).mean(0), mean=X.mean(0))


def output(X: np.ndarray, W: np.ndarray) -> InputStatistics:
    Y = X @ W.T
    return InputStatistics("output", diagonal=(X**2).mean(0), output=Y.T @ Y / len(X), mean=X.mean(0))
