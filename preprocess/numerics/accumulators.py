"""Streaming moments: sums over tokens of x, x^2, x x^T and y y^T. Numerics only.

A batch X (n, d) adds X^T X. C is symmetric, so only the blocks on and below the diagonal of p row ranges are formed and
kept: (p + 1) / 2p of the memory. The product is float32, the running sum float64, so the error does not grow with the
number of batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import PrepError
from ...linear import dtype_name
from ...store.format.schema import panels
from ...store.moments import SiteData
from .products import gram_blocks
from .sample import Sample

Collect = Callable[[Tensor], Iterable[Tensor]]  # a tensor of this process -> those to add here, of all processes


_USUAL = (1e-6, 1e9)  # sums of tokens that are no reason to look whether squares leave float32's range


def alone(x: Tensor) -> Iterable[Tensor]:
    """The Collect of a single process."""
    return (x,)


class GramSum:
    """Sum of X^T X over batches, in float64 panels on CPU: panel i is rows a:b, columns :b of the (d, d) sum.

    collect: see Collect. kept: False where another process keeps the sum.
    """

    def __init__(self, d: int, collect: Collect = alone, kept: bool = True):
        self.ranges, self.collect = panels(d), collect
        self.panels = [torch.zeros(b - a, b, dtype=torch.float64) for a, b in self.ranges] if kept else []

    def add(self, X: Tensor, exponents: Sequence[int]) -> None:
        """Add X^T X 4^e of X (n, d), float32 or float64, on any device; exponents: e of every process."""
        for i, columns, product in gram_blocks(X, self.ranges):
            for part, e in zip(self.collect(product), exponents, strict=True):
                total, block = self.panels[i][:, columns].numpy(), part.cpu().numpy()
                if e:
                    block = np.ldexp(block.astype(np.float64), 2 * e)
                np.add(total, block, out=total)  # torch would wake its threads, which then wait busily


class SiteSums:
    """Accumulates the sums of one site.

    kind "full": C; "diagonal": E[x_i^2]; "output": E[y y^T] of each layer and E[x_i^2]. The mean always.
    collect, kept: as in GramSum, where several processes share a pass. sampled: so many tokens are kept, by each
    process of those that are its own.
    """

    def __init__(
        self,
        name: str,
        kind: str,
        d_in: int,
        outputs: dict[str, int],
        collect: Collect = alone,
        kept: bool = True,
        sampled: int = 0,
    ):
        self.name, self.kind, self.kept, self._collect = name, kind, kept, collect
        self.count = 0
        self.sum_x = torch.zeros(d_in, dtype=torch.float64)
        self.sum_x2 = torch.zeros(d_in, dtype=torch.float64) if kind != "full" else None
        self.second = GramSum(d_in, collect, kept) if kind == "full" else None
        wanted = outputs if kind == "output" else {}
        self.outputs = {layer: GramSum(d_out, collect, kept) for layer, d_out in wanted.items()}
        self.sample = Sample(sampled, d_in) if sampled else None

    def add_input(self, X: Tensor, batch: int, count: int | None = None) -> None:
        """Add the real tokens X (n, d_in) of one batch, counted as n or `count`. PrepError for NaN or infinite ones."""
        X = X if X.dtype == torch.float64 else X.float()
        total = X.sum(0).cpu()
        if not torch.isfinite(total).all():
            raise not_finite(f"input of {self.name}", batch)
        X, own = _in_range(X, total)
        said = self._collect(torch.tensor([X.shape[0] if count is None else count, own]))
        counts = [part.tolist() for part in said]
        self.count += sum(tokens for tokens, _ in counts)
        exponents = [exponent for _, exponent in counts]
        for part in self._collect(total):
            self.sum_x.add_(part)
        if self.second is not None:
            self.second.add(X, exponents)
        if self.sum_x2 is not None:
            parts = self._collect(X.square().sum(0).cpu())
            for part, e in zip(parts, exponents, strict=True):
                self.sum_x2.add_(part.double() * 4.0**e if e else part)

    def add_output(self, layer: str, Y: Tensor) -> None:
        """Add the bias-free outputs Y (n, d_out) of one member for the same tokens. PrepError for infinite ones."""
        Y = Y if Y.dtype == torch.float64 else Y.float()
        total = Y.sum(0).cpu()
        if not torch.isfinite(total).all():
            raise PrepError(f"the output of {layer} is NaN or infinite: try --dtype float64, or look at the data")
        Y, own = _in_range(Y, total)
        self.outputs[layer].add(Y, [int(e) for e in self._collect(torch.tensor(own))])

    def add_nothing(self, dtype: torch.dtype) -> None:
        """Take part in a batch that brought this process no tokens; dtype: of the activations elsewhere."""
        self.add_input(torch.zeros(0, len(self.sum_x), dtype=dtype), 0)
        for layer, total in self.outputs.items():
            self.add_output(layer, torch.zeros(0, total.ranges[-1][1], dtype=dtype))

    def data(self) -> SiteData:
        """The state of the sums, which `restore` takes back; it shares their memory."""
        return state_of(self)

    def restore(self, sums: SiteData) -> None:
        """Go on from the sums of an earlier run."""
        self.count, self.sum_x, self.sum_x2 = sums.count, sums.mean, sums.diagonal
        if self.second is not None and sums.second_moment is not None:
            self.second.panels = sums.second_moment
        for layer, panels_ in (sums.outputs or {}).items():
            self.outputs[layer].panels = panels_
        if self.sample is not None and sums.sample is not None:
            self.sample.restore(sums.sample)

    def output(self, x: Tensor, W: Tensor) -> Tensor:
        """y = x @ W.T (n, d_out) in float32, of half-precision x (n, d_in) and W (d_out, d_in)."""
        return x.float() @ W.to(x.device, torch.float32).T


def state_of(sums: Any) -> SiteData:
    """The state of a site's sums, on the host or on a device, whose memory it shares, and their sample, on the host."""
    return SiteData(
        kind=sums.kind,
        members={},
        count=sums.count,
        mean=sums.sum_x,
        second_moment=sums.second.panels if sums.second else None,
        diagonal=sums.sum_x2,
        outputs={layer: total.panels for layer, total in sums.outputs.items()} or None,
        sample=sums.sample.data() if sums.sample is not None else None,
    )


def not_finite(what: str, batch: int) -> PrepError:
    """The error for `input of <site>` or `output of <layer>` that cannot be summed."""
    dtype = "float32" if what.startswith("input") else "float64"
    return PrepError(f"the {what} is NaN or infinite in batch {batch}: try --dtype {dtype}, or look at the data")


def moments_of(
    name: str, sums: SiteData, members: dict[str, dict[str, Any]], dtype: torch.dtype = torch.float64
) -> SiteData:
    """The sums of the site `name` divided by its token count, in place. dtype: in which the moments are stored.

    PrepError where no token came, a product overflowed, or `dtype` cannot hold the moments or float32 the sample.
    """
    if not sums.count:
        raise PrepError(f"no token reached {name}: use more data or leave it out with --exclude")
    moments = mapped(replace(sums, members=members), lambda total: total.div_(sums.count))
    limits = torch.finfo(dtype)
    diagonal = [moments.diagonal] if moments.diagonal is not None else []
    for blocks in (moments.second_moment or [], diagonal, *(moments.outputs or {}).values()):
        largest = max((_largest(block) for block in blocks), default=0.0)
        if not math.isfinite(largest):
            raise PrepError(f"the second moment of {name} overflows float32: run the model with --dtype float64")
        if largest > limits.max or 0 < largest < limits.smallest_normal / limits.eps:
            raise PrepError(
                f"the second moment of {name}, up to {largest:.0e}, is beyond {dtype_name(dtype)}: "
                "store it with --moment-dtype float64"
            )
    if moments.sample is not None and not torch.isfinite(moments.sample.tokens).all():
        raise PrepError(f"the input of {name} is beyond float32, in which tokens are kept: leave out --keep-tokens")
    return moments


def mapped(sums: SiteData, change: Callable[[Tensor], Tensor]) -> SiteData:
    """The sums or moments of a site with every tensor but those of the sample changed, in a fixed order."""
    outputs = sums.outputs
    return replace(
        sums,
        mean=change(sums.mean),
        second_moment=list(map(change, sums.second_moment)) if sums.second_moment else None,
        diagonal=change(sums.diagonal) if sums.diagonal is not None else None,
        outputs={layer: list(map(change, outputs[layer])) for layer in sorted(outputs)} if outputs else None,
    )


def _largest(X: Tensor) -> float:
    """The largest magnitude, NaN where there is one."""
    return float(torch.stack(torch.aminmax(X)).abs().max())


def _in_range(X: Tensor, total: Tensor) -> tuple[Tensor, int]:
    """X / 2^e and e, chosen so that no square leaves float32's range where X is very small or large; 0 as a rule.

    total (d,): the sum of X over tokens, by which the rule is known without another look at X.
    """
    sums = total.abs().max() if len(total) else torch.zeros(())
    if X.dtype == torch.float64 or not X.numel() or _USUAL[0] <= sums <= _USUAL[1]:
        return X, 0
    largest = _largest(X)
    if largest == 0 or 2.0**-30 <= largest <= 2.0**40:
        return X, 0
    e = max(math.frexp(largest)[1], -120)  # 2^120 is a float32
    return X * 2.0**-e, e


def moment_kind(asked: str, shapes: tuple[tuple[int, int], ...]) -> str:
    """The kind for a site of layers (d_out, d_in): auto is output where every layer has d_in > 2 d_out, else full."""
    if asked != "auto":
        return asked
    return "output" if all(d_in > 2 * d_out for d_out, d_in in shapes) else "full"


def site_elements(kind: str, shapes: tuple[tuple[int, int], ...]) -> int:
    """Numbers that a site's accumulator keeps."""
    d_in = shapes[0][1]
    triangles = [d_in] if kind == "full" else [d_out for d_out, _ in shapes] if kind == "output" else []
    return d_in + (d_in if kind != "full" else 0) + sum((b - a) * b for d in triangles for a, b in panels(d))
