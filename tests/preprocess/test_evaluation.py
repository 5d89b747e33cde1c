"""What a basis loses, against both weights run on tokens in float64; its excess, against two parts and the world."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from layers import SHAPES, activations, diagonal, full, output, weight

from prep import PrepError
from prep.preprocess.numerics.evaluation import (
    Crossed,
    Energy,
    crossed,
    input_variance,
    kept_by,
    kept_output,
    kept_variance,
    output_energy,
    own_energy,
    rest,
)
from prep.preprocess.numerics.methods import Method, check
from prep.preprocess.numerics.whitening import whitened_svd

RANKS = (1, 5, 12, 40)
METHODS = [
    Method("identity"),
    Method("identity", select="bottom"),
    Method("identity", select="activation"),
    Method("diagonal"),
    Method("diagonal", power=1),
    Method("full", power=0.25),
    Method("full"),
    Method("full", select="bottom"),
    Method("full", center=True),
    Method("full", power=1),
    Method("full", damping=0),
]
NULL = Method("null", rank=12)


def lost_on(X, W, basis, rank):
    """E||(W - U S P) x||^2 by running both weights on tokens."""
    approximate = basis.U[:, :rank] @ (basis.S[:rank, None] * basis.P[:rank])
    return float(np.mean(np.sum((X @ W.T - X @ approximate.T) ** 2, axis=1)))


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_error_is_that_of_running_both_weights(shape, method):
    """On its own tokens and on others, for full and output moments, at every rank from one product."""
    W, own = weight(*shape), activations(shape[1])
    basis = whitened_svd(W, full(own), method)
    for X in (own, activations(shape[1], tokens=300, seed=5)):
        total = float(np.mean(np.sum((X @ W.T) ** 2, axis=1)))
        for moment in (full(X), output(X, W)):
            energy = Energy(output_energy(W, moment), kept_output(basis.U, basis.S, basis.P, moment))
            assert energy.total == pytest.approx(total, rel=1e-10)
            for rank in RANKS:
                assert energy.lost(rank) == pytest.approx(lost_on(X, W, basis, rank), rel=1e-6, abs=1e-9 * total)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_error_of_a_basis_in_the_null_space(shape):
    """Where U^T W is not diag(S) P: on its own tokens and on others, at every rank."""
    W, own = weight(*shape), activations(shape[1])
    basis = whitened_svd(W, full(own), NULL)
    for X in (own, activations(shape[1], tokens=300, seed=5)):
        moment = full(X)
        energy = Energy(output_energy(W, moment), kept_by("null", W, basis.U, basis.S, basis.P, moment))
        for rank in (1, 5, 12):
            wanted = lost_on(X, W, basis, rank)
            assert energy.total - energy.kept[:rank].sum() == pytest.approx(wanted, rel=1e-6)
    np.testing.assert_allclose(
        own_energy(W, basis, full(own), NULL).kept, kept_by("null", W, basis.U, basis.S, basis.P, full(own))
    )
    found = crossed(W, full(own[:200]), full(own[200:]), 200 / len(own), NULL)
    assert found.a_on_b.total == pytest.approx(output_energy(W, full(own[200:])))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_basis_made_of_output_moments(shape):
    W, X, other = weight(*shape), activations(shape[1]), activations(shape[1], seed=5)
    basis = whitened_svd(W, output(X, W), Method(rank=12))
    for tokens in (X, other):
        kept = kept_output(basis.U, basis.S, basis.P, full(tokens))
        energy = Energy(output_energy(W, full(tokens)), kept)
        for rank in RANKS:
            assert energy.lost(rank) == pytest.approx(lost_on(tokens, W, basis, rank), rel=1e-6)


def test_eva_is_scored_by_the_input_variance_that_p_holds():
    W, X, other = weight(40, 96), activations(96), activations(96, seed=5)
    basis = whitened_svd(W, full(X), Method("components", rank=12))
    for tokens in (X, other):
        centred = tokens - tokens.mean(0)
        energy = Energy(input_variance(full(tokens)), kept_variance(basis.P, full(tokens)))
        for rank in RANKS:
            P = basis.P[:rank]
            wanted = np.mean(np.sum((centred - centred @ P.T @ P) ** 2, axis=1))
            assert energy.lost(rank) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("moment", ["full", "output"])
@pytest.mark.parametrize(
    "method", [*METHODS, Method("full", epsilon=3.0), Method("full", solver="randomized")], ids=str
)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_energy_on_own_tokens_needs_no_product_where_the_svd_tells_it(shape, method, moment):
    """Of every method what products with the moment give: with damping, also absolute or above C, and centred."""
    W, X = weight(*shape), activations(shape[1])
    made = full(X) if moment == "full" else output(X, W)
    if check(made.kind, method) is not None:
        pytest.skip("the moment does not serve the method")
    for damping in (method.damping, 50.0):
        method = replace(method, rank=2 if method.solver == "randomized" else 12, damping=damping)
        basis = whitened_svd(W, made, method)
        energy, total = own_energy(W, basis, made, method), output_energy(W, made)
        kept = kept_output(basis.U, basis.S, basis.P, made)
        assert energy.total == pytest.approx(total, rel=1e-9)
        np.testing.assert_allclose(energy.kept, kept, rtol=1e-6, atol=1e-12 * total)
        np.testing.assert_allclose(energy.shares, kept / total, rtol=1e-6, atol=1e-12)
        assert own_energy(W, basis, made, method, partial(float, total)).total == pytest.approx(total, rel=1e-9)


def test_the_energy_of_components_is_their_variance():
    W, X = weight(40, 96), activations(96)
    method = Method("components", rank=12)
    basis = whitened_svd(W, full(X), method)
    energy = own_energy(W, basis, full(X), method)
    assert energy.total == pytest.approx(np.var(X, axis=0).sum(), rel=1e-9)
    np.testing.assert_allclose(energy.kept, kept_variance(basis.P, full(X)), rtol=1e-6, atol=1e-12 * energy.total)


def test_a_layer_without_energy_keeps_nothing():
    W, X = np.zeros((40, 96)), activations(96)
    basis = whitened_svd(W, full(X), Method(rank=12))
    assert (own_energy(W, basis, full(X), Method(rank=12)).shares == np.zeros(12)).all()


def test_moments_that_cannot_serve():
    W, X = weight(40, 96), activations(96)
    basis = whitened_svd(W, full(X), Method(rank=12))
    with pytest.raises(PrepError, match="diagonal moment: run `prep covariance --moment full`"):
        output_energy(W, diagonal(X))
    with pytest.raises(PrepError, match="diagonal moment: run `prep covariance --moment full`"):
        kept_output(basis.U, basis.S, basis.P, diagonal(X))
    with pytest.raises(PrepError, match="not output: run `prep covariance --moment full`"):
        kept_variance(basis.P, output(X, W))


@pytest.mark.parametrize("make", [full, diagonal, lambda X: output(X, weight(40, 96))], ids=["full", "diag", "output"])
def test_the_rest_of_the_tokens_is_the_difference(make):
    X = activations(96)
    got, wanted = rest(make(X), make(X[:130]), 130 / len(X)), make(X[130:])
    for name in ("second_moment", "diagonal", "output", "mean"):
        if getattr(wanted, name) is not None:
            np.testing.assert_allclose(getattr(got, name), getattr(wanted, name), rtol=1e-9, atol=1e-12)


def parts(W, a, b, share, method):
    return crossed(W, a, b, share, method)


@pytest.mark.parametrize("share", [0.5, 0.3])
def test_crossed_errors_against_tokens(share):
    """The basis of either part on the tokens of the other one, and the formula of the excess written out."""
    W, X, method = weight(40, 96), activations(96), Method(rank=12)
    cut = int(share * len(X))
    A, B = X[:cut], X[cut:]
    got = parts(W, full(A), full(B), share, method)
    of_a, of_b = whitened_svd(W, full(A), method), whitened_svd(W, full(B), method)
    shares = [
        kept_output(basis.U, basis.S, basis.P, full(other)) / np.mean(np.sum((other @ W.T) ** 2, axis=1))
        for basis, other in ((of_a, B), (of_b, A))
    ]
    np.testing.assert_allclose(got.kept, np.mean(shares, axis=0), rtol=1e-6)
    for rank in (1, 5, 12):
        on_other = [lost_on(B, W, of_a, rank), lost_on(A, W, of_b, rank)]
        on_own = [lost_on(A, W, of_a, rank), lost_on(B, W, of_b, rank)]
        assert got.lost(rank) == pytest.approx(np.mean(on_other), rel=1e-6)
        gap = np.mean(on_other) - np.mean(on_own)
        assert got.excess(rank) == pytest.approx(gap / (share**-0.8 + (1 - share) ** -0.8), rel=1e-6)
        if share == 0.5:
            assert got.excess(rank) == pytest.approx(gap / 2 * 2**-0.8, rel=1e-6)
            assert got.least(rank, 7.0) == pytest.approx(7 + gap / 4, rel=1e-6)


@pytest.mark.parametrize("share", [0.5, 0.2])
def test_the_excess_is_that_of_the_basis_in_the_world(share):
    """Normal inputs of a known covariance: the truth is known exactly; the mean over samples, also of unequal parts."""
    d, n, rank = 24, 400, 6
    W = weight(20, d)
    rng = np.random.default_rng(0)
    root = np.linalg.qr(rng.standard_normal((d, d)))[0] * np.arange(1, d + 1) ** -0.5
    C = root @ root.T
    world = full(np.linalg.cholesky(C).T * np.sqrt(d))
    np.testing.assert_allclose(world.second_moment, C, atol=1e-12)
    method = Method(rank=rank, damping=0)
    best = whitened_svd(W, world, method)
    least = Energy(output_energy(W, world), kept_output(best.U, best.S, best.P, world)).lost(rank)
    predicted, true = [], []
    for _ in range(60):
        X = rng.standard_normal((n, d)) @ root.T
        basis = whitened_svd(W, full(X), method)
        cut = int(share * n)
        predicted.append(parts(W, full(X[:cut]), full(X[cut:]), share, method).excess(rank))
        kept = kept_output(basis.U, basis.S, basis.P, world)
        true.append(Energy(output_energy(W, world), kept).lost(rank) - least)
    # independent samples obey 1 / n and not n^-0.8: 2^0.2 = 1.15 is built into the prediction
    assert 0.9 < np.mean(predicted) / np.mean(true) < 1.5


def test_parts_that_agree_have_no_excess():
    W, X = weight(40, 96), activations(96)
    got = parts(W, full(X), full(X), 0.5, Method(rank=12))
    assert isinstance(got, Crossed)
    assert got.excess(12) == pytest.approx(0, abs=1e-9 * got.a_on_a.total)
