"""The adapted layer: y = base(x) + core(p) @ U.T with p = x @ P.T; the base weight is never written.

On a basis of the error of a quantised base, its repair is added: y = base(x) + (core(p) + p * S) @ U.T.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..linear import layer_shape
from ..precision import exact
from .cores import Core


class AdaptedLinear(nn.Module):
    """A linear layer, whatever its kind or quantisation, with a core on a frozen basis.

    Ut (r, d_out), the transpose of U as a store holds it, and P (r, d_in) are frozen parameters, kept in `dtype` and
    cast to that of x in the forward. Rows of P that `dtype` has no room for are divided by 2^exponent, and their
    coordinates multiplied by it. The core computes in float32 (float64 if it is in float64), with autocast off.
    repairs: the basis is one of the error of the base layer's quantised weight.
    """

    exponent: Tensor | None

    def __init__(
        self,
        base_layer: nn.Module,
        U: Tensor,
        P: Tensor,
        core: Core,
        dtype: torch.dtype | None = None,
        repairs: bool = False,
    ):
        super().__init__()
        dtype = dtype or P.dtype
        exponent = row_exponents(P, dtype)
        P = P if exponent is None else torch.ldexp(P.float(), -exponent[:, None])
        self.base_layer = base_layer
        self.Ut = nn.Parameter(U.T.to(dtype).contiguous(), requires_grad=False)
        self.P = nn.Parameter(P.to(dtype).contiguous(), requires_grad=False)
        self.register_buffer("exponent", exponent, persistent=False)
        self.core, self.repairs = core, repairs
        self.out_features, self.in_features = layer_shape(base_layer)

    @property
    def U(self) -> Tensor:
        """The basis of the output, (d_out, r)."""
        return self.Ut.T

    @property
    def projector(self) -> Tensor:
        """P (r, d_in) as the basis has it: float32 where its rows were divided."""
        return self.P if self.exponent is None else torch.ldexp(self.P.float(), self.exponent[:, None])

    @property
    def weight(self) -> Tensor:
        """The base layer's own parameter: model code looks at its dtype and device."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return getattr(self.base_layer, "bias", None)

    def change(self, p: Tensor) -> Tensor:
        """core(p), and p * S where the basis repairs, in at least float32: p (..., r) -> (..., r)."""
        core = self.core
        dtype = torch.promote_types(core.S.dtype, torch.float32)
        with torch.autocast(p.device.type, enabled=False):
            p = p.to(dtype)
            q = self._core(p, dtype)
            return q + p * core.S.to(dtype) if self.repairs else q

    def _core(self, p: Tensor, dtype: torch.dtype) -> Tensor:
        core = self.core
        if core.S.dtype == dtype:
            return core(p)
        # parameters that mixed precision has cast down would meet p in another dtype
        state = {**dict(core.named_parameters()), **dict(core.named_buffers())}
        state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}
        return functional_call(core, state, (p,))

    def project(self, x: Tensor) -> Tensor:
        """x @ P.T: x (..., d_in) -> (..., r). A P that is wider than float16 is not cast to it."""
        device, P = x.device.type, self.P
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        if dtype == torch.float16 != P.dtype:
            with torch.autocast(device, enabled=False):
                p = F.linear(x.to(P.dtype), P)
        else:
            p = F.linear(x, P.to(x.dtype))
        return p if self.exponent is None else torch.ldexp(p.float(), self.exponent)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = self.base_layer(x, *args, **kwargs)
        q = self.change(self.project(x)).to(x.dtype)
        return y + (q @ self.Ut.to(x.dtype)).to(y.dtype)

    def matrix(self) -> Tensor:
        """What the adapter adds to the weight: U @ K.T @ P (d_out, d_in) with K = change(I), in at least float32."""
        with torch.no_grad(), exact():
            K = self.change(torch.eye(len(self.P), device=self.P.device))
            return self.U.to(K.dtype) @ K.T @ self.projector.to(K.dtype)

    def _apply(self, fn: Callable, recurse: bool = True) -> "AdaptedLinear":
        """Moves and casts, as of `half()`: P, or the core for its S, is only moved where float16 has no room for it."""
        core = self.core
        basis = {id(tensor): core.S[:, None] for tensor in (*core.parameters(), *core.buffers())} | {id(self.P): self.P}

        def moved(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            if id(tensor) not in basis or new.dtype != torch.float16 or tensor.dtype == torch.float16:
                return new
            return new if row_exponents(basis[id(tensor)], torch.float16) is None else tensor.to(new.device)

        return super()._apply(moved, recurse)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, rank {len(self.P)}"


def row_exponents(P: Tensor, dtype: torch.dtype) -> Tensor | None:
    """(r,) int32: rows of P (r, d_in) over 2^exponent fit float16, with room below for their smaller entries.

    None where all rows fit as they are, and for dtypes of float32's range.
    """
    if dtype != torch.float16:
        return None
    largest = P.detach().abs().amax(1).float()
    fits = (largest >= 2**-8) & (largest <= 2**12) | (largest == 0)
    if fits.all():
        return None
    return torch.frexp(largest).exponent.masked_fill(fits, 0).to(torch.int32)
