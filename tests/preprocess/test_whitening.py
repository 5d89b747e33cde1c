"""Whitened SVD against float64 oracles: SciPy's matrix functions and SVDs of `W M`, or of `W` times the activations."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
from layers import SHAPES, activations, diagonal, full, output, weight

from prep import PrepError
from prep.preprocess.numerics import randomized, whitening
from prep.preprocess.numerics.methods import PUBLISHED, Method, basis_name, check
from prep.preprocess.numerics.whitening import InputStatistics, WhitenedSVD, whitened_svd

pytestmark = pytest.mark.usefixtures("one_blas_thread")


def norm(A: np.ndarray) -> float:
    return float(np.linalg.norm(A))


def damped(X: np.ndarray, damping: float = 1e-3, center: bool = False) -> np.ndarray:
    C = np.cov(X.T, bias=True) if center else X.T @ X / len(X)
    return C + damping * np.trace(C) / len(C) * np.eye(len(C))


def metric_matrix(X: np.ndarray, method: Method) -> np.ndarray:
    C = damped(X, method.damping, method.center)
    if method.metric == "identity":
        return np.eye(len(C))
    if method.metric == "diagonal":
        return np.diag(np.diagonal(C) ** method.power)
    return C if method.power == 1 else scipy.linalg.fractional_matrix_power(C, method.power).real


def assert_is_basis(got: WhitenedSVD, W: np.ndarray, WM: np.ndarray, method: Method) -> None:
    """got against the singular values of `W M`; WM may be multiplied from the right by any orthogonal matrix."""
    oracle = scipy.linalg.svdvals(WM)[: min(W.shape)]
    oracle = np.pad(oracle, (0, min(W.shape) - len(oracle)))
    rank = min(method.rank, len(oracle))
    wanted = oracle[:rank] if method.select == "top" else oracle[::-1][:rank]
    np.testing.assert_allclose(got.S, wanted, rtol=0, atol=1e-7 * oracle[0])
    np.testing.assert_allclose(got.spectrum, oracle, rtol=0, atol=1e-7 * oracle[0])
    np.testing.assert_allclose(got.U.T @ got.U, np.eye(rank), atol=1e-10)
    np.testing.assert_allclose(got.S[:, None] * got.P, got.U.T @ W, rtol=0, atol=1e-12 * norm(W))
    size = norm(WM)
    assert norm(WM - got.U @ (got.U.T @ WM)) == pytest.approx(got.tail, abs=1e-6 * size)
    assert got.energy == pytest.approx(np.sum(wanted**2) / size**2, abs=1e-6)
    assert got.bound == 1.0


@pytest.mark.parametrize("solver", ["exact", "svd"])
@pytest.mark.parametrize("select", ["top", "bottom"])
@pytest.mark.parametrize(
    ("metric", "power"),
    [("identity", 0.5), ("diagonal", 0.5), ("diagonal", 1), ("full", 0.25), ("full", 0.5), ("full", 1)],
)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_against_the_svd_of_w_m(shape, metric, power, select, solver):
    X, W = activations(shape[1]), weight(*shape)
    method = Method(metric, power, select, rank=12, solver=solver)
    got = whitened_svd(W, full(X), method)
    M = metric_matrix(X, method)
    assert_is_basis(got, W, W @ M, method)
    error = norm((W - got.U @ (got.S[:, None] * got.P)) @ M)
    assert error == pytest.approx(got.tail, abs=1e-6 * norm(W @ M))


@pytest.mark.parametrize("select", ["top", "bottom"])
@pytest.mark.parametrize("power", [0.5, 1])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_singular_second_moment_without_damping(shape, power, select):
    X, W = activations(shape[1], tokens=20), weight(*shape)
    method = Method("full", power, select, rank=30, damping=0)
    got = whitened_svd(W, full(X), method)
    factor = X.T / np.sqrt(len(X))  # C^(1/2) times an isometry
    assert_is_basis(got, W, W @ factor if power == 0.5 else W @ factor @ factor.T, method)
    assert np.isfinite(got.P).all()
    assert got.numerical_rank <= 20


@pytest.mark.parametrize("metric", ["full", "diagonal"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_centred(shape, metric):
    X, W = activations(shape[1]), weight(*shape)
    method = Method(metric, rank=12, center=True)
    assert_is_basis(whitened_svd(W, full(X), method), W, W @ metric_matrix(X, method), method)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_cholesky_factor_and_symmetric_root_give_the_same_basis(shape):
    X, W = activations(shape[1]), weight(*shape)
    got = whitened_svd(W, full(X), Method(rank=8))
    C = damped(X)
    for M in (np.linalg.cholesky(C), scipy.linalg.sqrtm(C).real):
        U, S, Vt = scipy.linalg.svd(W @ M, full_matrices=False)
        P = np.linalg.solve(M.T, Vt[:8].T).T
        sign = np.sign(np.sum(U[:, :8] * got.U, axis=0))
        np.testing.assert_allclose(got.U, U[:, :8] * sign, atol=1e-7)
        np.testing.assert_allclose(got.S, S[:8], rtol=1e-9)
        np.testing.assert_allclose(got.P, P * sign[:, None], atol=1e-7 * np.abs(P).max())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_half_power_of_the_full_moment_has_the_least_output_error(shape):
    X, W = activations(shape[1]), weight(*shape)
    M = scipy.linalg.sqrtm(damped(X)).real

    def error(rank: int, *metric) -> float:
        got = whitened_svd(W, full(X), Method(*metric, rank=rank))
        return norm((W - got.U @ (got.S[:, None] * got.P)) @ M)

    for rank in (1, 4, 16):
        best = error(rank, "full", 0.5)
        others = [
            error(rank, *m) for m in [("full", 1), ("full", 0.25), ("diagonal", 0.5), ("diagonal", 1), ("identity",)]
        ]
        assert best <= min(others) * (1 + 1e-12)
        assert best < 0.9 * others[-1]


@pytest.mark.parametrize("rank", [3, 9, 30])
@pytest.mark.parametrize("shape", [*SHAPES.values(), (150, 130), (130, 150)])
def test_the_output_error_is_the_least_possible_one(shape, rank):
    X, W = activations(shape[1]), weight(*shape)
    M = scipy.linalg.sqrtm(damped(X)).real
    least = norm(scipy.linalg.svdvals(W @ M)[rank:])
    got = whitened_svd(W, full(X), Method(rank=rank))
    assert got.solver == "gram"
    for error in (got.tail, norm((W - got.U @ (got.S[:, None] * got.P)) @ M)):
        assert least * (1 - 1e-9) <= error <= least * (1 + 1e-6)


TALL = [
    Method(rank=9),
    Method(rank=9, center=True),
    Method("full", 1, rank=9),
    Method("full", 0.25, rank=9),
    Method("diagonal", rank=9),
    Method("identity", rank=9),
    Method("identity", select="activation", rank=9),
]


@pytest.mark.parametrize("method", TALL, ids=basis_name)
def test_tall_layers_by_cholesky_and_by_qr_agree(method):
    X, W = activations(70), weight(120, 70)
    by_cholesky = whitening._by_cholesky(W, full(X), method, 9)
    Q, R = np.linalg.qr(W)
    by_qr = whitening._of_rows(R, full(X), method, 9)
    assert by_cholesky.route == by_qr.route == "gram"
    np.testing.assert_array_equal(by_cholesky.order, by_qr.order)
    np.testing.assert_allclose(by_cholesky.spectrum, by_qr.spectrum, rtol=0, atol=1e-8 * by_qr.spectrum[0])
    np.testing.assert_allclose(by_cholesky.Z.T @ by_cholesky.Z, np.eye(9), rtol=0, atol=1e-14)
    np.testing.assert_allclose(np.abs(np.sum(by_cholesky.Z * (Q @ by_qr.Z), axis=0)), 1, rtol=0, atol=1e-10)
    np.testing.assert_array_equal(whitened_svd(W, full(X), method).spectrum, by_cholesky.spectrum)


@pytest.mark.parametrize("weakest", [1e-3, 1e-5, 1e-7, 1e-9, 0])
def test_tall_layers_of_any_condition(weakest):
    """The activations lift the weak directions of W, so that they are selected."""
    rng = np.random.default_rng(7)
    left, right = (np.linalg.qr(rng.standard_normal((n, 40)))[0] for n in (90, 40))
    sizes = np.r_[np.ones(20), np.full(20, weakest)]
    W = (left * sizes) @ right.T
    C = (right * np.linspace(2, 1, 40) / np.maximum(sizes, 1e-9) ** 2) @ right.T
    moment, method = InputStatistics("full", second_moment=(C + C.T) / 2), Method(damping=0, rank=30)
    fast = whitening._by_cholesky(W, moment, method, 30)
    assert (fast is not None) == (weakest == 1e-3)
    got = whitened_svd(W, moment, method)
    np.testing.assert_allclose(got.U.T @ got.U, np.eye(30), rtol=0, atol=1e-12)
    np.testing.assert_allclose(got.S[:, None] * got.P, got.U.T @ W, rtol=0, atol=1e-12 * norm(W))
    if weakest >= 1e-5:
        np.testing.assert_allclose(got.S, np.sqrt(np.linspace(2, 1, 40)[:30]), rtol=1e-4)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_output_moment_gives_the_basis_of_the_full_one(shape, center):
    X, W = activations(shape[1]), weight(*shape)
    method = Method(rank=12, center=center)
    a, b = whitened_svd(W, full(X), method), whitened_svd(W, output(X, W), method)
    np.testing.assert_allclose(b.S, a.S, rtol=0, atol=1e-6 * a.S[0])
    assert np.max(scipy.linalg.subspace_angles(a.U, b.U)) < 1e-6
    assert np.max(scipy.linalg.subspace_angles(a.P.T, b.P.T)) < 1e-6
    assert b.tail == pytest.approx(a.tail, rel=1e-6)
    assert b.solver == "gram"


def test_damping_is_relative_and_epsilon_absolute():
    X, W = activations(96), weight(40, 96)
    a = whitened_svd(W, full(X), Method(rank=8, damping=0.1))
    b = whitened_svd(W, full(3 * X), Method(rank=8, damping=0.1))
    np.testing.assert_allclose(b.S, 3 * a.S, rtol=1e-10)
    np.testing.assert_allclose(3 * b.P, a.P, rtol=1e-6, atol=1e-9)
    c = whitened_svd(W, full(X), Method(rank=8, damping=9, epsilon=0.1 * (X**2).mean()))
    np.testing.assert_allclose(c.S, a.S, rtol=1e-10)


def test_activation_order_is_the_rms_of_the_outputs_along_u():
    X, W = activations(96), weight(40, 96)
    U, S, Vt = scipy.linalg.svd(W, full_matrices=False)
    score = S * np.sqrt(np.mean((X @ Vt.T) ** 2, axis=0))
    wanted = np.argsort(-score)[:10]
    for moment in (full(X), output(X, W)):
        got = whitened_svd(W, moment, Method("identity", select="activation", rank=10))
        np.testing.assert_allclose(got.S, S[wanted], rtol=1e-7)
        np.testing.assert_allclose(np.abs(np.sum(got.U * U[:, wanted], axis=0)), 1, atol=1e-9)
        assert got.tail == pytest.approx(np.linalg.norm(np.delete(S, wanted)), rel=1e-9)
    top = whitened_svd(W, None, Method("identity", rank=10))
    assert not np.allclose(top.S, got.S)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_activation_is_top_for_the_undamped_half_power(shape):
    X, W = activations(shape[1]), weight(*shape)
    for moment in (full(X), output(X, W)):
        top = whitened_svd(W, moment, Method(damping=0, rank=16))
        got = whitened_svd(W, moment, Method(damping=0, rank=16, select="activation"))
        np.testing.assert_array_equal(got.S, top.S)
        np.testing.assert_array_equal(got.U, top.U)


def test_bottom_keeps_singular_values_that_the_gram_matrix_has_lost():
    X, W = activations(64), weight(64, 64) @ np.diag(np.logspace(0, -6, 64))
    method = Method("full", 1, "bottom", rank=6)
    got = whitened_svd(W, full(X), method)
    F = W @ damped(X)
    oracle = scipy.linalg.svdvals(F)[::-1][:6]
    assert oracle[0] < 1e-9 * got.spectrum[0]
    np.testing.assert_allclose(got.S, oracle, rtol=1e-3)
    assert got.solver == "svd"
    squared = np.sqrt(np.abs(np.linalg.eigvalsh(F @ F.T)))[:6]
    assert not np.allclose(squared, oracle, rtol=0.1)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_components_are_the_principal_components_of_the_activations(shape):
    X, W = activations(shape[1]), weight(*shape)
    got = whitened_svd(W, full(X), Method("components", rank=10))
    _, s, Vt = scipy.linalg.svd((X - X.mean(0)) / np.sqrt(len(X)), full_matrices=False)
    np.testing.assert_allclose(got.S, s[:10], rtol=1e-6)
    np.testing.assert_allclose(got.spectrum, s, rtol=0, atol=1e-7 * s[0])
    np.testing.assert_allclose(np.abs(np.sum(got.P * Vt[:10], axis=1)), 1, atol=1e-9)
    assert got.energy == pytest.approx(np.sum(s[:10] ** 2) / np.sum(s**2), rel=1e-9)
    assert got.tail == pytest.approx(np.linalg.norm(s[10:]), rel=1e-6)
    np.testing.assert_allclose(got.U.T @ got.U, np.eye(10), atol=1e-12)
    assert np.max(scipy.linalg.subspace_angles(got.U, W @ Vt[:10].T)) < 1e-6


SPECTRA = {  # of G, and whether the randomized route must reach its bound there
    "power law": (np.arange(1, 301.0) ** -1.5, True),
    "slow": (np.arange(1, 301.0) ** -0.5, True),
    "exponential": (np.exp(-np.arange(300) / 10) + 1e-5, True),
    "outliers": (np.r_[1e4, 3e3, 1e3, np.arange(4, 301.0) ** -1.2], True),
    "constant": (np.ones(300), True),
    "step": (np.r_[np.ones(40), np.full(260, 0.99)], None),
    "noise": (np.linspace(1.2, 0.8, 300), None),
    "low rank": (np.r_[np.ones(5), np.zeros(295)], False),
    "zero": (np.zeros(300), False),
}


@pytest.mark.parametrize("rank", [1, 12, 20])
@pytest.mark.parametrize(("spectrum", "reached"), SPECTRA.values(), ids=SPECTRA)
def test_randomized_meets_the_bound_or_says_that_it_does_not(spectrum, reached, rank):
    V = np.linalg.qr(np.random.default_rng(3).standard_normal((300, 300)))[0]
    G = (V * spectrum) @ V.T
    pairs = randomized.top_pairs((G + G.T) / 2, rank)
    if reached is not None and not (rank == 1 and not reached):
        assert (pairs is not None) == reached
    if pairs is not None:
        S, Z = pairs
        np.testing.assert_allclose(Z.T @ Z, np.eye(rank), atol=1e-10)
        left = np.trace(G) - np.trace(Z.T @ G @ Z)
        least = np.sum(np.sort(spectrum)[:-rank])
        assert left <= randomized.BOUND * least * (1 + 1e-9)
        assert np.trace(G) - np.sum(S**2) == pytest.approx(left, rel=1e-9)


@pytest.mark.parametrize("name", ["power law", "slow", "exponential", "outliers", "noise"])
def test_certificate_never_passes_directions_that_miss_the_bound(name):
    spectrum = np.sort(SPECTRA[name][0])[::-1]
    V = np.linalg.qr(np.random.default_rng(3).standard_normal((300, 300)))[0]
    G = (V * spectrum) @ V.T
    rng, rank, refused = np.random.default_rng(4), 12, 0
    for size in np.logspace(-9, 1, 40):
        Z = np.linalg.qr(V[:, :rank] + size * rng.standard_normal((300, rank)) / 17)[0]
        top, Y = np.linalg.eigh(Z.T @ G @ Z)
        top, Z = top[::-1], Z @ Y[:, ::-1]
        left = np.trace(G) - top.sum()
        residual = np.linalg.norm(G @ Z - Z * top, axis=0)
        passes = randomized._dominates(*randomized._dual(top, residual, (1 - 1 / randomized.BOUND) * left), Z, G)
        if left > randomized.BOUND * spectrum[rank:].sum():
            assert not passes
            refused += 1
        elif size < 1e-8:
            assert passes
    assert refused >= 3


def test_randomized_route_end_to_end():
    X, W = activations(320, tokens=500), weight(260, 320)
    exact = whitened_svd(W, full(X), Method(rank=10, solver="exact"))
    got = whitened_svd(W, full(X), Method(rank=10, solver="randomized"))
    assert (got.solver, exact.solver) == ("randomized", "gram")
    assert exact.tail**2 <= got.tail**2 * (1 + 1e-9)
    assert got.tail**2 <= got.bound * exact.tail**2
    assert 1 < got.bound <= 1.001
    M = scipy.linalg.sqrtm(damped(X)).real
    error = norm((W - got.U @ (got.S[:, None] * got.P)) @ M)
    assert error == pytest.approx(got.tail, rel=1e-6)
    assert got.energy == pytest.approx(exact.energy, rel=1e-3)
    assert got.spectrum.shape == (10,)
    np.testing.assert_allclose(got.S[:, None] * got.P, got.U.T @ W, atol=1e-12 * norm(W))


def test_randomized_without_a_proof_takes_the_exact_route():
    W = weight(320, 7) @ weight(7, 320)
    assert randomized.top_pairs(W @ W.T, 10) is None
    method = Method("identity", rank=10, solver="randomized")
    got = whitened_svd(W, None, method)
    assert (got.solver, got.bound, len(got.S)) == ("svd", 1.0, 10)
    np.testing.assert_allclose(got.S[:7], scipy.linalg.svdvals(W)[:7], rtol=1e-10)
    assert got.spectrum.shape == (320,)
    assert whitening.spectrum_size(W.shape, method) == 10


def test_randomized_is_not_tried_for_so_many_directions_that_the_exact_route_costs_less():
    W = np.linalg.qr(np.random.default_rng(5).standard_normal((96, 96)))[0] * np.linspace(1.1, 0.9, 96)
    got = whitened_svd(W, None, Method("identity", rank=40, solver="randomized"))
    assert (got.solver, got.bound) == ("gram", 1.0)
    np.testing.assert_allclose(got.S, np.linspace(1.1, 0.9, 96)[:40], rtol=1e-10)


def test_auto_is_exact_for_small_layers_and_randomized_where_few_directions_of_a_large_one_are_asked():
    rng = np.random.default_rng(6)
    W = rng.standard_normal((randomized.AUTO_SIDE, 64)) @ rng.standard_normal((64, randomized.AUTO_SIDE))
    W += rng.standard_normal(W.shape)
    few = whitened_svd(W, None, Method("identity", rank=16))
    S = scipy.linalg.svdvals(W)
    assert few.solver == "randomized"
    assert few.tail**2 <= few.bound * np.sum(S[16:] ** 2)
    assert whitened_svd(W, None, Method("identity", rank=16, select="bottom")).solver == "gram"
    assert whitened_svd(W[:128, :128], None, Method("identity", rank=4)).solver == "gram"


def test_numerical_rank():
    X = activations(96, tokens=20)
    W = weight(40, 96)
    assert whitened_svd(W, full(X), Method(damping=0)).numerical_rank <= 20
    assert whitened_svd(W, full(X), Method(damping=1e-3)).numerical_rank == 40
    low = weight(40, 7) @ weight(7, 96)
    for solver in ("exact", "svd"):
        assert whitened_svd(low, None, Method("identity", solver=solver)).numerical_rank == 7


@pytest.mark.parametrize("dead", ["weight", "moment"])
@pytest.mark.parametrize("kind", ["full", "output"])
def test_layer_without_energy(dead, kind):
    X, W = activations(96), weight(40, 96)
    X, W = (X, 0 * W) if dead == "weight" else (0 * X, W)
    got = whitened_svd(W, full(X) if kind == "full" else output(X, W), Method(rank=5))
    np.testing.assert_allclose(got.S[:, None] * got.P, got.U.T @ W, atol=1e-12)
    np.testing.assert_allclose(got.U.T @ got.U, np.eye(5), atol=1e-12)
    assert (got.tail, got.energy, got.numerical_rank) == (0.0, 1.0, 0)
    assert not got.spectrum.any()


def test_rank_is_clipped_and_a_full_basis_restores_the_weight():
    for shape in SHAPES.values():
        X, W = activations(shape[1]), weight(*shape)
        got = whitened_svd(W.astype(np.float32), full(X), Method())
        assert got.P.shape == (min(shape), shape[1])
        np.testing.assert_allclose(got.U @ (got.S[:, None] * got.P), W, atol=1e-5)
        assert (got.tail, got.energy) == (0.0, pytest.approx(1.0))


@pytest.mark.parametrize(
    "method",
    [
        Method(rank=9),
        Method(rank=9, solver="randomized"),
        Method(rank=4, solver="randomized"),
        Method("full", 0.25, rank=9),
        Method("components", rank=9),
    ],
)
def test_equal_input_gives_bitwise_equal_results_also_on_threads(method):
    X, W = activations(96), weight(80, 96)
    W_before, moment = W.copy(), full(X)
    before = moment.second_moment.copy()
    first = whitened_svd(W, moment, method)
    with ThreadPoolExecutor(2) as pool:
        for again in pool.map(lambda _: whitened_svd(W, moment, method), range(4)):
            for name in ("U", "S", "P", "spectrum"):
                np.testing.assert_array_equal(getattr(again, name), getattr(first, name))
    np.testing.assert_array_equal(W, W_before)
    np.testing.assert_array_equal(moment.second_moment, before)


@pytest.mark.parametrize(
    "method", [Method("components", rank=9), Method("full", 0.25), Method("full", 0.75, center=True)]
)
def test_the_layers_of_a_site_share_what_is_made_of_its_moment(method):
    X, first, second = activations(96), weight(80, 96), weight(120, 96, seed=2)
    shared = full(X)
    whitened_svd(first, shared, method)
    for W in (first, second):
        got, alone = whitened_svd(W, shared, method), whitened_svd(W, full(X), method)
        for name in ("U", "S", "P", "spectrum"):
            np.testing.assert_array_equal(getattr(got, name), getattr(alone, name))
    uncentred = whitened_svd(first, shared, replace(method, metric="full", center=False))
    np.testing.assert_array_equal(
        uncentred.S, whitened_svd(first, full(X), replace(method, metric="full", center=False)).S
    )


def test_every_published_method_runs_on_a_full_moment():
    X, W = activations(48), weight(32, 48)
    for method in PUBLISHED.values():
        assert whitened_svd(W, full(X), replace(method, rank=4)).U.shape == (32, 4)
    by_row = {name: basis_name(method) for name, method in PUBLISHED.items()}
    assert by_row["corda_kpm"] == "full-p1-bottom"
    assert by_row["milora"] == "identity-bottom"
    assert by_row["antipasto_rot"] == "identity-activation"
    assert by_row["eva"] == "eva"
    assert by_row["asvd"] == "diagonal"
    assert by_row["whitened"] == "full"
    assert basis_name(Method(center=True)) == "full-centered"
    assert basis_name(Method(power=0)) == "identity"


@pytest.mark.parametrize(
    ("method", "kinds"),
    [
        (Method("identity"), {None, "full", "diagonal", "output"}),
        (Method("full", 0), {None, "full", "diagonal", "output"}),
        (Method("identity", select="activation"), {"full", "output"}),
        (Method("diagonal", 1, select="bottom"), {"full", "diagonal", "output"}),
        (Method("diagonal", select="activation"), {"full", "output"}),
        (Method("full", select="activation"), {"full", "output"}),
        (Method("full", center=True), {"full", "output"}),
        (Method("full", 1), {"full"}),
        (Method("full", solver="svd"), {"full"}),
        (Method("components"), {"full"}),
    ],
)
def test_which_moments_serve_which_method(method, kinds):
    X, W = activations(48), weight(32, 48)
    moments = {None: None, "full": full(X), "diagonal": diagonal(X), "output": output(X, W)}
    oracle = whitened_svd(W, moments["full"], method)
    for kind, moment in moments.items():
        reason = check(kind, method)
        if kind in kinds:
            assert reason is None
            np.testing.assert_allclose(whitened_svd(W, moment, method).S, oracle.S, rtol=1e-4)
        else:
            assert "`prep covariance" in reason
            assert "\n" not in reason
            with pytest.raises(PrepError, match=r"prep covariance"):
                whitened_svd(W, moment, method)


@pytest.mark.parametrize(
    "options",
    [
        {"metric": "cov"},
        {"select": "middle"},
        {"solver": "fast"},
        {"rank": 0},
        {"power": -0.5},
        {"power": float("nan")},
        {"damping": -1e-3},
        {"epsilon": float("inf")},
        {"solver": "randomized", "select": "bottom"},
        {"metric": "identity", "center": True},
        {"metric": "components", "select": "bottom"},
        {"metric": "components", "solver": "svd"},
    ],
)
def test_methods_that_make_no_sense_are_refused(options):
    with pytest.raises(PrepError):
        Method(**options)


def test_bad_arrays_are_refused():
    X, W = activations(48), weight(32, 48)
    broken = W.copy()
    broken[3, 4] = np.nan
    with pytest.raises(PrepError, match="weight holds NaN or Inf"):
        whitened_svd(broken, full(X), Method())
    C = X.T @ X
    C[0, 0] = np.inf
    with pytest.raises(PrepError, match="second_moment"):
        whitened_svd(W, InputStatistics("full", second_moment=C), Method())
    with pytest.raises(PrepError, match="another model"):
        whitened_svd(weight(32, 40), full(X), Method())
    with pytest.raises(PrepError, match="another model"):
        whitened_svd(weight(30, 48), output(X, W), Method())
    with pytest.raises(PrepError, match="mean"):
        whitened_svd(W, InputStatistics("full", second_moment=X.T @ X), Method(center=True))
    with pytest.raises(PrepError, match="lacks output"):
        InputStatistics("output", diagonal=np.ones(3))
