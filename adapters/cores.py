"""The trainable cores: small maps on the coordinates p = x @ P.T of a frozen basis (U, S, P).

An adapted layer computes y = base(x) + core(p) @ U.T, so a core returns the *change* of the coordinates: linear in p,
exactly zero for the coefficient s = 0 and, ablation apart, at the start. p (..., r) and S (r,) are float32 whatever the
model's dtype. Row convention: p @ A.T.
"""

import inspect
import json
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import PrepError, did_you_mean
from .coefficient import Coefficient


class Core(nn.Module):
    """A core: subclass it, declare its options, make its parameters in `build`, write its formula in `forward`.

    Options are the annotated class attributes with a default; their values must be JSON. `self.S` (r,) holds the
    layer's singular values (frozen), `self.s` (0-d) the coefficient of the running forward.
    """

    S: nn.Parameter
    coeff: Tensor

    def __init__(self, **options: Any):
        """PrepError for an option that is not declared or has another type than its default."""
        super().__init__()
        defaults = self.defaults()
        for name, value in options.items():
            if name not in defaults:
                known = ", ".join(f"{key}={default!r}" for key, default in defaults.items()) or "none"
                meant = did_you_mean(name, defaults)
                raise PrepError(f"the core {type(self).__name__} has no option {name!r} (it has: {known}){meant}")
            kind = type(defaults[name])
            value = float(value) if kind is float and type(value) is int else value
            if defaults[name] is not None and type(value) is not kind:
                raise PrepError(f"{type(self).__name__}({name}=...) takes {kind.__name__}, not {value!r}")
            setattr(self, name, value)
        self.coefficient = Coefficient()

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The declared options and their defaults."""
        classes = [c for c in reversed(cls.__mro__) if issubclass(c, Core)]
        return {name: vars(c)[name] for c in classes for name in inspect.get_annotations(c) if name in vars(c)}

    @property
    def options(self) -> dict[str, Any]:
        """The declared options and their values. PrepError where one is not JSON."""
        options = {name: getattr(self, name) for name in self.defaults()}
        try:
            return json.loads(json.dumps(options))
        except TypeError as error:
            raise PrepError(f"the options of {type(self).__name__} cannot be written as JSON: {error}") from error

    def on(self, S: Tensor, coefficient: Coefficient | None = None) -> "Core":
        """A new core of this class and these options for a layer with the singular values S (r,)."""
        core = type(self)(**self.options)
        core.S = nn.Parameter(S.detach().float(), requires_grad=False)
        core.build(len(S))
        core.to(S.device, torch.float32)
        core.coefficient = coefficient or core.coefficient
        core.register_buffer("coeff", core.S.new_tensor(core.coefficient.value), persistent=False)
        return core

    @property
    def s(self) -> Tensor:
        """The coefficient (0-d)."""
        return self.coefficient.read(self.coeff)

    def state(self) -> dict[str, Tensor]:
        """What training changes: parameters and persistent buffers without S, which belongs to the basis."""
        return {name: value for name, value in self.state_dict().items() if name != "S"}

    def build(self, r: int) -> None:
        """Make the trainable parameters for r coordinates; PrepError where an option makes no sense."""
        raise NotImplementedError(f"{type(self).__name__} needs a build(r)")

    def forward(self, p: Tensor) -> Tensor:
        """The change of the coordinates: p (..., r) -> (..., r)."""
        raise NotImplementedError(f"{type(self).__name__} needs a forward(p)")


def gain(g: Tensor, s: Tensor, suppress_only: bool = False) -> Tensor:
    """elu(s g), the relative change of each singular value: above -1, linear where it amplifies, 0 at g = 0.

    suppress_only: g above 0 counts as 0, so that s >= 0 only attenuates.
    """
    return F.elu(s * (g.clamp(max=0) if suppress_only else g))


class Gain(Core):
    """core(p) = p * S * elu(s g);  g (r,) starts at 0.  Source: arXiv 2601.07473."""

    suppress_only: bool = False

    def build(self, r: int) -> None:
        self.g = nn.Parameter(torch.zeros(r))

    def forward(self, p: Tensor) -> Tensor:
        return p * (self.S * gain(self.g, self.s, self.suppress_only))


class Rotation(Core):
    """core(p) = rot_U(rot_V(p) * (S + s d)) - p * S;  rot(p) = p @ R.T on blocks of `block` coordinates.

    R = (I - A/2)^-1 (I + A/2),  A = s L tanh(theta / L) skew-symmetric,  L = 2 tan(angle / 2): a Cayley rotation by
    about s theta, by at most `angle` in each plane for |s| <= 1, and R(-s) = R(s)^-1. theta_V, theta_U
    (r // block, block (block - 1) / 2) start at 0, as `rotate` (V, U, both, none) has them; d (r,) starts at
    bias + N(0, bias): 0, or 4e-4 as published. r mod block coordinates at the end stay as they are.
    Source: arXiv 2601.07473.
    """

    rotate: str = "V"
    block: int = 4
    angle: float = 0.5
    bias: float = 0.0

    theta_V: nn.Parameter | None
    theta_U: nn.Parameter | None
    skew: Tensor

    def build(self, r: int) -> None:
        if self.rotate not in ("V", "U", "both", "none"):
            raise PrepError(f"Rotation(rotate={self.rotate!r}): choose V, U, both or none")
        if self.block < 2 or not 0 < self.angle < math.pi:
            raise PrepError(f"Rotation(block={self.block}, angle={self.angle}): block >= 2 and 0 < angle < pi")
        b = min(self.block, r)
        rows, columns = torch.triu_indices(b, b, 1)
        skew = torch.zeros(len(rows), b, b)
        pair = torch.arange(len(rows))
        skew[pair, rows, columns], skew[pair, columns, rows] = 1.0, -1.0
        self.register_buffer("skew", skew, persistent=False)
        for side in "VU":
            turns = self.rotate in (side, "both")
            theta = nn.Parameter(torch.zeros(r // b, len(rows))) if turns else None
            self.register_parameter(f"theta_{side}", theta)
        self.d = nn.Parameter(self.bias + self.bias * torch.randn(r))

    def turn(self, p: Tensor, theta: Tensor | None, s: Tensor) -> Tensor:
        """p @ (R - I).T, exactly zero for theta = 0;  R - I = (I - A/2)^-1 A."""
        if theta is None:
            return torch.zeros_like(p)
        n, b = len(theta), self.skew.shape[-1]
        limit = 2 * math.tan(self.angle / 2)
        A = (s * limit * torch.tanh(theta / limit) @ self.skew.flatten(1)).view(n, b, b)
        eye = torch.eye(b, dtype=A.dtype, device=A.device)
        change = torch.linalg.solve_ex(eye - A / 2, A).result  # never singular: A is skew
        turned = torch.einsum("...ni,nji->...nj", p[..., : n * b].unflatten(-1, (n, b)), change).flatten(-2)
        return F.pad(turned, (0, p.shape[-1] - n * b)) if n * b < p.shape[-1] else turned

    def forward(self, p: Tensor) -> Tensor:
        s = self.s
        v = self.turn(p, self.theta_V, s)
        d = (p + v) * (s * self.d)
        h = (p + v) * self.S + d
        return v * self.S + d + self.turn(h, self.theta_U, s)


class Ablation(Core):
    """core(p) = -s ((h @ c) * clamp(a, 0, 1)) @ c.T,  h = p * S,  c made orthonormal.

    c (r, k) starts at N(0, 1/r), a (k,) at alpha > 0, without which c gets no gradient: the one core whose start is
    not the base model. It only contracts. Source: arXiv 2601.07473, after Arditi et al. 2024, arXiv 2406.11717.
    """

    k: int = 1
    alpha: float = 0.05

    def build(self, r: int) -> None:
        if not (self.k >= 1 and 0 <= self.alpha <= 1):
            raise PrepError(f"Ablation(k={self.k}, alpha={self.alpha}): k >= 1 and 0 <= alpha <= 1")
        k = min(self.k, r)
        self.c = nn.Parameter(torch.randn(r, k) / math.sqrt(r))
        self.a = nn.Parameter(torch.full((k,), self.alpha))

    def forward(self, p: Tensor) -> Tensor:
        c = F.normalize(self.c, dim=0) if self.c.shape[1] == 1 else torch.linalg.qr(self.c).Q
        h = p * self.S
        return ((h @ c) * (-self.s * self.a.clamp(0, 1))) @ c.T


class DPLR(Core):
    """core(p) = p * S * elu(s g) + s (p @ A.T) @ B.T: diagonal plus low rank.

    g (r,) and B (r, k) start at 0, A (k, r) as in LoRA (uniform within 1 / sqrt(r)). Source: arXiv 2601.07473;
    Hu et al. 2021, arXiv 2106.09685.
    """

    k: int = 8
    suppress_only: bool = False

    def build(self, r: int) -> None:
        if self.k < 1:
            raise PrepError(f"DPLR(k={self.k}): k >= 1")
        k = min(self.k, r)
        self.g = nn.Parameter(torch.zeros(r))
        self.A = nn.Parameter(torch.empty(k, r).uniform_(-1, 1) / math.sqrt(r))
        self.B = nn.Parameter(torch.zeros(r, k))

    def forward(self, p: Tensor) -> Tensor:
        s = self.s
        return p * (self.S * gain(self.g, s, self.suppress_only)) + (s * (p @ self.A.T)) @ self.B.T


class Arrow(Core):
    """core(p) = [h_top @ (s M).T, h_tail * elu(s g)],  h = p * S,  top the first `block` coordinates.

    M (block, block) and g (r - block,) start at 0. Source: arXiv 2601.07473.
    """

    block: int = 8
    suppress_only: bool = False

    def build(self, r: int) -> None:
        if self.block < 1:
            raise PrepError(f"Arrow(block={self.block}): block >= 1")
        b = min(self.block, r)
        self.M = nn.Parameter(torch.zeros(b, b))
        self.g = nn.Parameter(torch.zeros(r - b))

    def forward(self, p: Tensor) -> Tensor:
        s, b = self.s, len(self.M)
        h = p * self.S
        return torch.cat([h[..., :b] @ (s * self.M).T, h[..., b:] * gain(self.g, s, self.suppress_only)], -1)


class Dense(Core):
    """core(p) = s h @ R.T,  h = p * S;  R (r, r) starts at 0.  Source: LoRA-XS, arXiv 2405.17604."""

    def build(self, r: int) -> None:
        self.R = nn.Parameter(torch.zeros(r, r))

    def forward(self, p: Tensor) -> Tensor:
        return (p * self.S) @ (self.s * self.R).T


CORES: dict[str, type[Core]] = {
    "gain": Gain,
    "rotation": Rotation,
    "ablation": Ablation,
    "dplr": DPLR,
    "arrow": Arrow,
    "dense": Dense,
}
