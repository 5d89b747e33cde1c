"""The coefficient s of an adapter: y = base(x) + core_s(p) @ U.T, and s = 0 is the base model.

The backward of a forward must see the s of that forward. Gradient checkpointing breaks this: it runs the forward
again during the backward, when a `with adapter.coeff(...)` block has long ended. Autograd numbers its nodes in the
order in which they are recorded, so a log of (number, s) at each change tells which s was in effect when the node
under differentiation was recorded. The numbers are a thread's own, so set s in the thread that runs the forward; a
reentrant checkpoint within another is not covered.
"""

import itertools
import weakref
from collections import deque

import torch
from torch import Tensor
from torch.autograd import _get_sequence_nr


class Coefficient:
    """One value s for all layers of an adapter, and the log of its changes."""

    def __init__(self, value: float = 1.0):
        self.log: deque[tuple[int, float]] = deque([(0, value)], maxlen=1 << 16)
        self.key = next(_keys)
        _live[self.key] = self

    def __reduce__(self) -> tuple[type["Coefficient"], tuple[float]]:
        return Coefficient, (self.value,)  # a copy of the model gets a key and a log of its own

    @property
    def value(self) -> float:
        """s now."""
        return self.log[-1][1]

    def set(self, value: float) -> None:
        """Use `value` in every forward from here on; the backward of earlier forwards keeps theirs."""
        number = _get_sequence_nr()
        if self.log[-1][0] == number:
            self.log.pop()
        self.log.append((number, value))

    def read(self, current: Tensor) -> Tensor:
        """The s (0-d) of the forward that is running: `current`, or for a recomputed one what it was at first.

        Raises RuntimeError if that forward is older than the 65,536 latest changes.
        """
        if torch.compiler.is_compiling():
            return _read_at_run_time(current, self.key)
        return self._read(current)

    def _read(self, current: Tensor) -> Tensor:
        if torch._C._current_graph_task_id() == -1:
            return current
        recorded = torch._C._current_autograd_node()._sequence_nr()  # type: ignore[attr-defined]
        for number, value in reversed(self.log):
            if number <= recorded:
                return torch.full_like(current, value)
        raise RuntimeError("the backward of a forward that is 65,536 changes of the coefficient old")


_keys = itertools.count()
_live: weakref.WeakValueDictionary[int, Coefficient] = weakref.WeakValueDictionary()


# a CUDA graph would replay the value that it was recorded with
_TAGS: dict = {"tags": [torch.Tag.cudagraph_unsafe]} if hasattr(torch.Tag, "cudagraph_unsafe") else {}  # torch 2.9


@torch.library.custom_op("prep::coefficient", mutates_args=(), **_TAGS)
def _read_at_run_time(current: Tensor, key: int) -> Tensor:
    """An opaque operator: compiled code looks the value up when it runs, not when it is traced."""
    return _live[key]._read(current).clone()


@_read_at_run_time.register_fake
def _(current: Tensor, key: int) -> Tensor:
    return torch.empty_like(current)
