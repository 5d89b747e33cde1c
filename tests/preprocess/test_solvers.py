"""The eigenvectors of few directions, and the LAPACK routines below them, against NumPy and SciPy."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import scipy.linalg

from prep.preprocess.numerics import lapack, solvers

pytestmark = pytest.mark.usefixtures("one_blas_thread")

N, RANK = 160, 24
RNG = np.random.default_rng(0)
TURN = np.linalg.qr(RNG.standard_normal((N, N)))[0]
NUMBERS = np.arange(1, N + 1.0)


@pytest.fixture(autouse=True, params=["SciPy's routines", "NumPy, where those have other integers"])
def routes(request, monkeypatch):
    lapack._reachable.cache_clear()
    if request.param.startswith("NumPy"):

        def unreachable(name):
            raise ImportError(f"SciPy's {name} takes (char *, int64_t *)")

        monkeypatch.setattr(lapack, "_routine", unreachable)
    yield
    lapack._reachable.cache_clear()


def symmetric(spectrum: np.ndarray) -> np.ndarray:
    G = (TURN * spectrum) @ TURN.T
    return (G + G.T) / 2


def nan_above(A: np.ndarray) -> np.ndarray:
    """What a routine must not read."""
    return np.where(np.tri(len(A), dtype=bool), A, np.nan)


SPECTRA = {
    "power law": NUMBERS**-1.5,
    "clustered": np.repeat(NUMBERS[::-8], 8) * (1 + 1e-14 * NUMBERS),
    "pairs": np.repeat(NUMBERS[::-2], 2),
    "step": np.r_[np.ones(40), np.full(N - 40, 0.99)],
    "low rank": np.r_[NUMBERS[4::-1], np.zeros(N - 5)],
    "outlier": np.r_[1e8, NUMBERS[1:] ** -1],
    "ten decades": np.logspace(0, -10, N),
    "constant": np.ones(N),
    "zero": np.zeros(N),
    "tiny": 1e-30 * NUMBERS**-1.5,
}


@pytest.mark.parametrize("end", ["top", "bottom"])
@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
def test_few_directions_are_eigenvectors_and_orthonormal(spectrum, end):
    G, size = symmetric(spectrum), spectrum.max()
    order = np.arange(N)[:: 1 if end == "top" else -1][:RANK]
    S, Z = solvers.gram(G, order)
    assert (S.shape, Z.shape) == ((N,), (N, RANK))
    eigenvalues = np.sort(spectrum)[::-1]
    np.testing.assert_allclose(S**2, eigenvalues, rtol=0, atol=1e-13 * size)
    np.testing.assert_allclose(Z.T @ Z, np.eye(RANK), rtol=0, atol=1e-12)
    np.testing.assert_allclose(G @ Z, Z * eigenvalues[order], rtol=0, atol=1e-13 * size)


@pytest.mark.parametrize("first", [0, 50, N - RANK])
def test_eigenpairs_are_those_of_all_at_once(first):
    G = symmetric(NUMBERS**-1.5)
    values, Z = lapack.eigenpairs(nan_above(G), first, first + RANK)
    wanted, V = scipy.linalg.eigh(G)
    np.testing.assert_allclose(values, wanted, rtol=0, atol=1e-14)
    np.testing.assert_allclose(np.abs(np.sum(V[:, first : first + RANK] * Z, axis=0)), 1, atol=1e-9)


def test_inverse_iteration_on_what_is_no_number_is_refused():
    with pytest.raises(np.linalg.LinAlgError):
        lapack.eigenpairs(np.full((N, N), np.nan), 0, RANK)


def test_triangles():
    A, W, B = RNG.standard_normal((30, N)), RNG.standard_normal((N + 40, N)), RNG.standard_normal((N, 7))
    C = symmetric(NUMBERS)
    np.testing.assert_allclose(lapack.times_lower(A, nan_above(C)), A @ np.tril(C), rtol=0, atol=1e-11)
    np.testing.assert_allclose(lapack.times_lower(W[:N].T, C), W[:N].T @ np.tril(C), rtol=0, atol=1e-11)
    L = lapack.cholesky(W)
    np.testing.assert_array_equal(L, np.tril(L))
    np.testing.assert_allclose(L, np.linalg.cholesky(W.T @ W), rtol=0, atol=1e-12)
    np.testing.assert_allclose(lapack.cholesky(np.asfortranarray(W)), L, rtol=0, atol=1e-12)
    np.testing.assert_allclose(lapack.solve_lower_t(nan_above(L), B), np.linalg.solve(L.T, B), rtol=0, atol=1e-12)
    G = lapack.congruence(nan_above(L), nan_above(C))
    np.testing.assert_allclose(np.tril(G), np.tril(L.T @ C @ L), rtol=0, atol=1e-9)


def test_triangles_that_do_not_exist():
    with pytest.raises(np.linalg.LinAlgError):
        lapack.cholesky(np.ones((9, 3)))
    with pytest.raises(np.linalg.LinAlgError):
        lapack.solve_lower_t(np.diag([1.0, 0.0]), np.ones((2, 1)))


def test_arguments_are_left_alone_and_threads_agree():
    G, C, W = symmetric(NUMBERS**-1.5), symmetric(NUMBERS), RNG.standard_normal((N + 40, N))
    before = [x.copy() for x in (G, C, W)]

    def run(_=None):
        L = lapack.cholesky(W)
        pairs = lapack.eigenpairs(G, N - RANK, N)
        return [*pairs, L, np.tril(lapack.congruence(L, C)), lapack.times_lower(W, C), lapack.solve_lower_t(L, C)]

    first = run()
    with ThreadPoolExecutor(2) as pool:
        for again in pool.map(run, range(8)):
            for a, b in zip(first, again, strict=True):
                np.testing.assert_array_equal(a, b)
    for x, y in zip((G, C, W), before, strict=True):
        np.testing.assert_array_equal(x, y)


def test_limits_on_threads_reach_the_library_that_is_called():
    """In a process of its own: a library that is loaded inside of the limit would not obey it."""
    code = """
import prep.preprocess.decomposition.workers
from threadpoolctl import threadpool_info, threadpool_limits
with threadpool_limits(1):
    from prep.preprocess.numerics import lapack
    import numpy as np
    lapack.times_lower(np.ones((3, 4)), np.ones((4, 4)))
    print(*{pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"})
"""
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["1"], done.stderr
