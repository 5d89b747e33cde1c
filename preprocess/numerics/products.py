"""The products X^T X of a batch X (n, d), block by block of the lower triangle.

float32 products are of at most TOKENS tokens; those of longer batches are added in float64. Whatever the batch, the
relative error stays below 2 sqrt(TOKENS) 2^-24 = 5.4e-6 (Frobenius), which a channel that is constant comes near to;
elsewhere it is 1e-9 to 7e-7 (measured on SmolLM2: median 6e-8).

On a CPU each block is one call of NumPy's BLAS on one thread, and as many threads as torch has take blocks in turn:
threads of the library's own would fight with torch's. A block on the diagonal is A^T A of one A, which NumPy forms by
syrk, at half the work. Elsewhere, and where blocks are too few for the threads, torch forms whole panels of rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

TOKENS = 2048  # of a float32 product
BLOCKS_PER_THREAD = 1.5  # fewer leave threads without work


def gram_blocks(X: Tensor, ranges: list[tuple[int, int]]) -> Iterator[tuple[int, slice, Tensor]]:
    """(i, columns, `X[:, a:b]^T X[:, columns]`) of every row range (a, b), numbered i, with columns up to b, in order.

    X (n, d): float32 or float64. The products are on X's device, float32 only where X is and has few tokens.
    """
    threads, blocks = torch.get_num_threads(), len(ranges) * (len(ranges) + 1) // 2
    if X.device.type != "cpu" or (threads > 1 and blocks < BLOCKS_PER_THREAD * threads):
        for i, (a, b) in enumerate(ranges):
            yield i, slice(b), _added(slice(a, b), slice(b), chunks(X))
        return
    x = X.contiguous().numpy()
    todo = ((i, a, b, s, t) for i, (a, b) in enumerate(ranges) for s, t in ranges[: i + 1])
    waiting: deque[tuple[int, slice, Future]] = deque()
    with _blas().limit(limits=1, user_api="blas"):
        for i, a, b, s, t in todo:
            waiting.append((i, slice(s, t), _pool(threads).submit(_product, x, slice(a, b), slice(s, t))))
            if len(waiting) > 2 * threads:
                yield _result(*waiting.popleft())
        while waiting:
            yield _result(*waiting.popleft())


def _product(x: np.ndarray, rows: slice, columns: slice) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):  # told where the sums are finished
        return _added(rows, columns, chunks(x))


def chunks(x: Any) -> list[Any]:
    """x (n, d) in pieces of at most TOKENS rows, an array or tensor; float64 stays whole."""
    if len(x) <= TOKENS or x.dtype in (np.float64, torch.float64):
        return [x]
    return [x[a : a + TOKENS] for a in range(0, len(x), TOKENS)]


def _added(rows: slice, columns: slice, chunks: list[Any]) -> Any:
    """The products `x[:, rows]^T x[:, columns]` of all chunks added in float64; of a single one as it is."""
    total: Any = None
    for x in chunks:
        product = x[:, rows].T @ x[:, columns]
        if total is not None:
            total += product
        elif len(chunks) == 1:
            return product
        else:
            total = product.astype(np.float64) if isinstance(product, np.ndarray) else product.double()
    return total


def _result(i: int, columns: slice, product: Future) -> tuple[int, slice, Tensor]:
    return i, columns, torch.from_numpy(product.result())


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "products")


@cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()
