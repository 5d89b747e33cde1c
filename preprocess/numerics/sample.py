"""The running sample of a site's tokens, see store/sample.py: which tokens are in it follows from their places alone.

The tokens of a sequence have the numbers of a counter-based generator keyed with the sequence's number as priorities.
However the tokens come, in batches, processes, passes or runs, the same ones are kept. Numerics only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...store.sample import TokenSample

Key = tuple[int, int]  # of a corpus, and of a sequence in it; both below 2^64


def priorities(keys: Sequence[Key], lengths: Sequence[int], call: int = 0) -> np.ndarray:
    """Priorities (n,) from 0 to 1 of the tokens of sequences, `lengths[i]` of that with `keys[i]`, in order.

    call: of a layer that is called several times in a forward, whose inputs are tokens of their own each time.
    """
    draws = [
        np.random.Generator(np.random.Philox(key=np.array([(seed + call) % 2**64, number], np.uint64))).random(length)
        for (seed, number), length in zip(keys, lengths, strict=True)
    ]
    return np.concatenate(draws) if draws else np.zeros(0)


class Sample:
    """The `size` tokens of smallest priority among those added, in float32 on a device; priorities are on the host."""

    def __init__(self, size: int, d_in: int, device: torch.device | str = "cpu"):
        self.size = size
        self._priorities = np.zeros(0)
        self._rows = torch.empty(0, d_in, device=device)  # as many as there were at most, or room for more

    def add(self, X: Tensor, priorities: np.ndarray) -> None:
        """Add tokens X (n, d_in), of which those that enter are gathered, with their priorities (n,).

        Nothing waits for the device where X is on that of the sample.
        """
        have = len(self._priorities)
        limit = self._priorities.max() if have == self.size else np.inf
        entering = np.flatnonzero(priorities < limit)
        if not len(entering):
            return
        order = np.argsort(np.concatenate([self._priorities, priorities[entering]]), kind="stable")[: self.size]
        new = entering[np.sort(order[order >= have]) - have]
        free = np.setdiff1d(np.arange(len(order)), order[order < have])
        self._reserve(len(order))
        self._priorities = np.concatenate([self._priorities, np.zeros(len(order) - have)])
        self._priorities[free] = priorities[new]
        chosen = X.index_select(0, _moved(new, X.device)).to(self._rows.device, torch.float32)
        self._rows.index_copy_(0, _moved(free, self._rows.device), chosen)

    def data(self) -> TokenSample | None:
        """The sample so far, on the host; None where no token came. `restore` takes it back."""
        if not len(self._priorities):
            return None
        order = np.argsort(self._priorities, kind="stable")
        tokens = self._rows.index_select(0, _moved(order, self._rows.device))
        return TokenSample(tokens.cpu(), torch.from_numpy(self._priorities[order]))

    def restore(self, sample: TokenSample) -> None:
        """Go on from the sample of an earlier run."""
        self._priorities = sample.priorities.numpy().copy()
        self._rows = sample.tokens.to(self._rows.device, copy=True)

    def _reserve(self, rows: int) -> None:
        """Room for so many rows: twice as many as before, so that a site takes little more than it saw."""
        have = len(self._rows)
        if rows > have:
            larger = self._rows.new_empty(min(max(rows, 2 * have), self.size), self._rows.shape[1])
            larger[:have] = self._rows
            self._rows = larger


def _moved(numbers: np.ndarray, device: torch.device) -> Tensor:
    """Row numbers on a device, which does not wait for them."""
    return torch.from_numpy(numbers).to(device, non_blocking=True)
