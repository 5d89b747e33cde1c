"""X^T X by blocks: every route and thread number against float64, and which blocks there are."""

import numpy as np
import pytest
import torch

from prep.preprocess.numerics.products import gram_blocks
from prep.store.format.schema import panels


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def lower(X, ranges):
    """The blocks put together, NaN where there is none; and how many there were."""
    C, count = torch.full((X.shape[1], X.shape[1]), torch.nan, dtype=X.dtype), 0
    for i, columns, product in gram_blocks(X, ranges):
        assert product.dtype == X.dtype
        a, b = ranges[i]
        C[a:b, columns] = product
        count += 1
    return C, count


@pytest.mark.parametrize("d", [7, 192, 600, 1031])
@pytest.mark.parametrize("number", [1, 2, 3, 16])
def test_blocks_are_the_lower_triangle(threads, d, number):
    threads(number)
    X = torch.randn(301, d, generator=torch.Generator().manual_seed(d))
    ranges = panels(d)
    C, count = lower(X, ranges)
    wanted = X.double().T @ X.double()
    for a, b in ranges:
        assert float((C[a:b, :b] - wanted[a:b, :b]).norm() / wanted[a:b, :b].norm()) < 1e-6
        assert torch.isnan(C[a:b, b:]).all()
    blocks = len(ranges) * (len(ranges) + 1) // 2
    assert count == (blocks if number == 1 or blocks >= 1.5 * number else len(ranges))


def test_the_number_of_threads_changes_nothing(threads):
    X = torch.randn(100, 1024, generator=torch.Generator().manual_seed(0))
    sums = []
    for number in (1, 2, 5):
        threads(number)
        sums.append(lower(X, panels(1024))[0].nan_to_num(0))
    assert torch.equal(sums[0], sums[1]) and torch.equal(sums[0], sums[2])


def test_views_doubles_and_no_tokens():
    wide = torch.randn(50, 600, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    X = wide[::2, 1::2]  # of two strides
    C, _ = lower(X, panels(300))
    np.testing.assert_allclose(np.tril(C.nan_to_num(0)), np.tril(X.T @ X), rtol=1e-12, atol=1e-12)
    C, _ = lower(X[:0], panels(300))
    assert not np.tril(C.nan_to_num(1)).any()


def _constant(draw):
    x = draw.standard_normal((8192, 640))
    x[:, 7] = 3777.123
    return x


def _drifting(draw):
    return 0.1 * draw.standard_normal((8192, 640)) + 5 * draw.standard_normal(640)


def _heavy(draw):
    return draw.standard_normal((8192, 640)) * np.exp(2 * draw.standard_normal(640))


@pytest.mark.parametrize(("make", "bound"), [(_constant, 2 * 2048**0.5 * 2**-24), (_drifting, 3e-7), (_heavy, 3e-7)])
@pytest.mark.parametrize("rows", [8192, 2048, 700])
@pytest.mark.parametrize("threads", [1, 4])
def test_the_error_keeps_its_bound_whatever_the_batch(make, bound, rows, threads, monkeypatch):
    """threads 4 is more than this matrix has blocks for: torch forms whole panels then."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    x = make(np.random.default_rng(0)).astype(np.float32)
    ranges = panels(640)
    wanted, got = np.zeros((640, 640)), np.zeros((640, 640))
    for a in range(0, 8192, rows):
        part = x[a : a + rows]
        wanted += part.T.astype(np.float64) @ part.astype(np.float64)
        for i, columns, product in gram_blocks(torch.from_numpy(part), ranges):
            got[slice(*ranges[i]), columns] += product.numpy()
    lower = np.tril(wanted)
    assert np.linalg.norm(np.tril(got) - lower) < bound * np.linalg.norm(lower)
