"""The sums of one site on the device of its activations, in float64: no copy to the host, no wait for the device.

A batch adds X^T X by groups of at least GROUP rows, which fill a GPU: products of at most TOKENS tokens, added in
float32 within the batch and in float64 between batches. Half-precision activations are multiplied as they are, with
float32 results. Tensor cores cut off digits as they add, which costs 2.7e-6 at 2,048 tokens (Frobenius, emulated).
Whether a value was NaN or infinite is noted on the device, for one look per batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ...store.format.schema import panels
from ...store.moments import SiteData
from .accumulators import state_of
from .products import chunks
from .sample import Sample

GROUP = 2048  # rows of a product

Product = Callable[[Tensor, Tensor], Tensor]  # x (n, a), y (n, b) -> x^T y (a, b), float32 or float64
HALF = (torch.bfloat16, torch.float16)


def full_product(x: Tensor, y: Tensor) -> Tensor:
    """x^T y (a, b) of x (n, a) and y (n, b), in float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.to(wide).T @ y.to(wide)


def half_product(x: Tensor, y: Tensor) -> Tensor:
    """x^T y (a, b) in float32: of half-precision x (n, a) and y (n, b) on tensor cores, of others as `full_product`."""
    if x.dtype not in HALF or x.dtype != y.dtype:
        return full_product(x, y)
    return torch.mm(x.T, y, out_dtype=torch.float32)


def product_on(device: torch.device, exact: bool) -> Product:
    """The product that sums on a device are made of; exact: of float32 whatever the activations are."""
    mixed = device.type == "cuda" and "dtype" in torch.ops.aten.mm.overloads()  # from torch 2.8 on
    return half_product if mixed and not exact else full_product


class DeviceGram:
    """Sum of X^T X over batches, in float64 panels on a device: panel i is rows a:b, columns :b of the (d, d) sum."""

    def __init__(self, d: int, device: torch.device):
        self.ranges = panels(d)
        self.panels = [torch.zeros(b - a, b, dtype=torch.float64, device=device) for a, b in self.ranges]

    def add(self, X: Tensor, squared: Tensor, product: Product) -> None:
        """Add `squared` (0-d, float64) times X^T X, X (n, d) of any floating-point dtype."""
        for i, block in row_blocks(X, self.ranges, product):
            self.panels[i].add_(block.double().mul_(squared))


def row_blocks(X: Tensor, ranges: list[tuple[int, int]], product: Product) -> Iterator[tuple[int, Tensor]]:
    """(i, `X[:, a:b]^T X[:, :b]`) of every row range (a, b), numbered i; several ranges are one product."""
    pieces = chunks(X)
    for first, last in _groups(ranges):
        begin, end = ranges[first][0], ranges[last][1]
        total = product(pieces[0][:, begin:end], pieces[0][:, :end])
        for x in pieces[1:]:
            total += product(x[:, begin:end], x[:, :end])
        for i in range(first, last + 1):
            a, b = ranges[i]
            yield i, total[a - begin : b - begin, :b]


def _groups(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """First and last number of the ranges of each product: as few as make GROUP rows, the rest in the last group."""
    groups, first = [], 0
    for i, (_, end) in enumerate(ranges):
        if end - ranges[first][0] >= GROUP:
            groups.append((first, i))
            first = i + 1
    if first < len(ranges):
        groups.append((first, len(ranges) - 1))
    return groups


class DeviceSums:
    """Accumulates the sums of one site on a device, see `SiteSums`. Every process that shares a pass keeps its own.

    exact: half-precision activations are multiplied in float32. sampled: so many tokens are kept. finite: by
    `input of <site>` and `output of <layer>`, a flag (0-d) that is False once a value was NaN or infinite.
    """

    kept = True

    def __init__(
        self,
        name: str,
        kind: str,
        d_in: int,
        outputs: dict[str, int],
        device: torch.device,
        exact: bool = False,
        sampled: int = 0,
    ):
        self.name, self.kind, self.device, self.product = name, kind, device, product_on(device, exact)
        self.count = 0
        self.sum_x = torch.zeros(d_in, dtype=torch.float64, device=device)
        self.sum_x2 = torch.zeros_like(self.sum_x) if kind != "full" else None
        self.second = DeviceGram(d_in, device) if kind == "full" else None
        wanted = outputs if kind == "output" else {}
        self.outputs = {layer: DeviceGram(d_out, device) for layer, d_out in wanted.items()}
        self.sample = Sample(sampled, d_in, device) if sampled else None
        noted = [f"input of {name}", *(f"output of {layer}" for layer in wanted)]
        self.finite = {what: torch.ones((), dtype=torch.bool, device=device) for what in noted}

    def add_input(self, X: Tensor, _batch: int, count: int | None = None) -> None:
        """Add the real tokens X (n, d_in) of one batch, counted as n or `count`."""
        self.count += len(X) if count is None else count
        if not len(X):
            return
        X, total = self._seen(X, f"input of {self.name}")
        self.sum_x += total
        X, squared = in_range(X)
        if self.second is not None:
            self.second.add(X, squared, self.product)
        if self.sum_x2 is not None:
            for x in chunks(X):
                self.sum_x2 += x.to(torch.promote_types(x.dtype, torch.float32)).square().sum(0).double() * squared

    def add_output(self, layer: str, Y: Tensor) -> None:
        """Add the bias-free outputs Y (n, d_out) of one member for the same tokens."""
        if len(Y):
            self.outputs[layer].add(*in_range(self._seen(Y, f"output of {layer}")[0]), self.product)

    def output(self, x: Tensor, W: Tensor) -> Tensor:
        """y = x @ W.T (n, d_out) in float32, of half-precision x (n, d_in) and W (d_out, d_in)."""
        return self.product(x.T, W.to(x.device, x.dtype).T)

    def data(self) -> SiteData:
        """The state of the sums, which `restore` takes back; it shares their memory, on their device."""
        return state_of(self)

    def restore(self, sums: SiteData) -> None:
        """Go on from the sums of an earlier run, which may be on another device."""
        self.count = sums.count
        self.sum_x.copy_(sums.mean)
        if self.sum_x2 is not None and sums.diagonal is not None:
            self.sum_x2.copy_(sums.diagonal)
        pairs = [(self.second, sums.second_moment)] if self.second else []
        pairs += [(total, (sums.outputs or {})[layer]) for layer, total in self.outputs.items()]
        for total, stored in pairs:
            for panel, values in zip(total.panels, stored or (), strict=True):
                panel.copy_(values)
        if self.sample is not None and sums.sample is not None:
            self.sample.restore(sums.sample)

    def _seen(self, X: Tensor, what: str) -> tuple[Tensor, Tensor]:
        """X on the device of the sums, and its sum over tokens (d,), which is noted to be finite or not."""
        X = X.to(self.device)
        total = X.sum(0, dtype=torch.promote_types(X.dtype, torch.float32))
        self.finite[what] &= torch.isfinite(total).all()
        return X, total


def in_range(X: Tensor) -> tuple[Tensor, Tensor]:
    """X / 2^e, and 4^e (0-d, float64): e is 0 unless squares of X would leave the range of float32. No wait.

    Powers of two by their bits, which is exact.
    """
    one = torch.ones((), dtype=torch.float64, device=X.device)
    if X.dtype in (torch.float64, torch.float16):  # whose squares float64 and float32 hold
        return X, one
    least, most = torch.aminmax(X)
    largest = torch.maximum(-least, most).float()
    usual = (largest == 0) | ((largest >= 2.0**-30) & (largest <= 2.0**40))
    e = torch.where(usual, 0, torch.frexp(largest).exponent.clamp(-120, 126))
    return X * ((127 - e) << 23).int().view(torch.float32), ((1023 + 2 * e.long()) << 52).view(torch.float64)
