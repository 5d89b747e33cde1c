"""The products X^T X of a batch X (n, d), block by block of the lower triangle.

On a CPU each block is one call of NumPy's BLAS on one thread, and as many threads as torch has take blocks in turn:
threads of the library's own would fight with torch's. A block on the diagonal is A^T A of one A, which NumPy forms by
syrk, at half the work. Elsewhere, and where blocks are too few for the threads, torch forms whole panels of rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

BLOCKS_PER_THREAD = 1.5  # fewer leave threads without work


def gram_blocks(X: Tensor, ranges: list[tuple[int, int]]) -> Iterator[tuple[int, slice, Tensor]]:
    """(i, columns, `X[:, a:b]^T X[:, columns]`) of every row range (a, b), numbered i, with columns up to b, in order.

    X (n, d): float32 or float64, which is also the dtype of the products; they are on X's device.
    """
    threads, blocks = torch.get_num_threads(), len(ranges) * (len(ranges) + 1) // 2
    if X.device.type != "cpu" or (threads > 1 and blocks < BLOCKS_PER_THREAD * threads):
        for i, (a, b) in enumerate(ranges):
            yield i, slice(b), X[:, a:b].T @ X[:, :b]
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
        return x[:, rows].T @ x[:, columns]


def _result(i: int, columns: slice, product: Future) -> tuple[int, slice, Tensor]:
    return i, columns, torch.from_numpy(product.result())


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "products")


@cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()
