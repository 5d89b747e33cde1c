"""Fused experts as linear layers of their own.

transformers keeps the experts of a block in 3-D parameters W (experts, d_out, d_in), or (experts, d_in, d_out) in a
module that `is_transposed`. In its eager form such a module computes one expert after the other, by `F.linear` or a
matmul on W[e]: a TorchFunctionMode sends each of these products through the `ExpertLinear` of W[e], whose hooks then
see the tokens routed to expert e. Under grouped or batched products there is nothing to see. Offloaded experts are in
memory only while their module computes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...errors import PrepError
from ...linear import PLAIN, parameter, reader, scales

_PRODUCTS = (F.linear, Tensor.matmul, Tensor.__matmul__, torch.matmul, torch.mm, Tensor.mm)
_MARKS = ("is_transposed", "has_gate")  # what transformers sets on every module of fused experts


class ExpertLinear(nn.Linear):
    """One projection of one expert: `y = x @ W.T`, W = W[e] of the fused parameter.

    It is not part of the model and holds no weight. owner: the module of the fused experts; key: their parameter in it,
    fused: its full name; expert: e. rows: which rows of the owner's input the last x was made of, and of how many; None
    where that was not seen.
    """

    owner: nn.Module
    rows: tuple[Tensor, int] | None

    def __init__(self, owner: nn.Module, key: str, fused: str, expert: int, shape: tuple[int, int]):
        nn.Module.__init__(self)
        self.out_features, self.in_features = shape
        self.register_parameter("bias", None)
        self.key, self.fused, self.expert, self.rows = key, fused, expert, None
        vars(self)["owner"] = owner  # not a child

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """W (d_out, d_in), a view of the owner's parameter or of what is kept of it elsewhere."""
        return _matrices(self.owner, parameter(self.owner, self.key, self.expert))

    def forward(self, x: Tensor, W: Tensor) -> Tensor:  # type: ignore[override]
        """x (n, d_in) -> (n, d_out) by the W that the owner computes with."""
        return F.linear(x, W)


def expert_layers(model: nn.Module) -> dict[str, ExpertLinear]:
    """The fused experts of a model, `<module>.<expert>.<parameter>` -> layer, such as `...mlp.experts.3.gate_up_proj`.

    Parameters that are packed or scaled, or whose values are nowhere, are left out.
    """
    experts: dict[str, ExpertLinear] = {}
    for name, module in model.named_modules():
        if not is_fused(module) or scales(module):
            continue
        for key, W in module.named_parameters(recurse=False):
            if W.ndim == 3 and W.dtype in PLAIN and not (W.is_meta and reader(module) is None):
                count, d_out, d_in = _matrices(module, W).shape
                for e in range(count):
                    experts[f"{name}.{e}.{key}"] = ExpertLinear(module, key, f"{name}.{key}", e, (d_out, d_in))
    return experts


def is_fused(module: nn.Module) -> bool:
    """True for a module that holds the weights of several experts in one parameter, in transformers' way."""
    return all(hasattr(module, mark) for mark in _MARKS)


def _matrices(owner: nn.Module, W: Tensor) -> Tensor:
    """A fused parameter as (experts, d_out, d_in), or one expert's part of it as (d_out, d_in)."""
    return W.mT if owner.is_transposed else W


def home(layer: nn.Module) -> nn.Module:
    """The module of the model that computes a layer: itself, or the fused experts it is one of."""
    return layer.owner if isinstance(layer, ExpertLinear) else layer


def watched(forward: Callable[[Any], object], layers: Mapping[str, nn.Module]) -> Callable[[Any], object]:
    """`forward` with the products of the experts among `layers` computed by these, so that their hooks are called."""
    experts = [layer for layer in layers.values() if isinstance(layer, ExpertLinear)]
    if not experts:
        return forward
    mode = _Products(experts)

    def run(batch: Any) -> object:
        owners = {expert.owner: None for expert in experts}
        handles = [owner.register_forward_pre_hook(mode.enter, with_kwargs=True) for owner in owners]
        try:
            with eager(experts), mode:
                return forward(batch)
        finally:
            for handle in handles:
                handle.remove()

    return run


def on_real_rows(owners: Iterable[nn.Module], rows: Callable[[nn.Module], tuple[Tensor | None, int]]) -> list[Any]:
    """Hooks that give fused experts the real tokens only: padding is not routed, and its output is zero.

    rows: owner -> (indices of the real rows, number of all rows), indices None where all are real.
    """

    def before(owner: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        real, size = rows(owner)
        if real is None:
            return None
        rows_given = len(_first_tensor(args, kwargs))
        if rows_given != size:
            raise PrepError(f"{type(owner).__name__} takes {rows_given} rows, not {size}: calibrate without padding")

        own = tuple(_real_part(value, real, size) for value in args)
        return own, {name: _real_part(value, real, size) for name, value in kwargs.items()}

    def after(owner: nn.Module, _args: tuple, y: Tensor) -> Tensor:
        real, size = rows(owner)
        return y if real is None else y.new_zeros(size, *y.shape[1:]).index_copy_(0, real.to(y.device), y)

    handles: list[Any] = []
    for owner in owners:
        handles.append(owner.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(owner.register_forward_hook(after))
    return handles


def _first_tensor(args: tuple, kwargs: dict) -> Tensor:
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def _real_part(value: Any, real: Tensor, size: int) -> Any:
    """The rows `real` of a tensor that has one row per token, `size` in all; anything else as it is."""
    per_token = isinstance(value, Tensor) and value.ndim > 0 and len(value) == size
    return value.index_select(0, real.to(value.device)) if per_token else value


class _Products(TorchFunctionMode):
    """Computes each product with an expert's weight by the expert's layer.

    The weight is known as a view of a parameter of `owner`, the module of fused experts that was called last; which
    rows of its input an expert is given, from the indexing that takes them.
    """

    def __init__(self, experts: Iterable[ExpertLinear]):
        super().__init__()
        self.owner: nn.Module | None = None
        self._input: Tensor | None = None  # of the owner
        self._rows: tuple[Tensor, int] | None = None  # of the input, those that were taken last
        self._experts = {(expert.owner, expert.key, expert.expert): expert for expert in experts}

    def enter(self, owner: nn.Module, args: tuple, kwargs: dict) -> None:
        """A hook for the call of a module of fused experts."""
        self.owner, self._input, self._rows = owner, _first_tensor(args, kwargs), None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.__getitem__ and self._takes_rows(*args):
            self._rows = args[1], len(args[0])
        if func in _PRODUCTS and len(args) > 1 and args[1].ndim == 2 and self.owner is not None:
            W = args[1] if func is F.linear else args[1].mT
            expert = self._expert(self.owner, W)
            if expert is not None:
                bias = args[2] if len(args) > 2 else kwargs.get("bias")
                known = self._rows is not None and len(self._rows[0]) == len(args[0])
                expert.rows = self._rows if known else None
                y = expert(args[0], W)
                return y if bias is None else y + bias
        return func(*args, **kwargs)

    def _takes_rows(self, x: Tensor, rows: Any) -> bool:
        """Whether `x[rows]` are rows of the owner's input."""
        given = self._input
        if given is None or not isinstance(rows, Tensor) or rows.dtype != torch.long or rows.ndim != 1:
            return False
        return x.data_ptr() == given.data_ptr() and x.ndim == 2 and x.numel() == given.numel()

    def _expert(self, owner: nn.Module, W: Tensor) -> ExpertLinear | None:
        """The expert whose weight W (d_out, d_in) is, by its address."""
        for key, fused in owner.named_parameters(recurse=False):
            if fused.ndim == 3:
                Ws = _matrices(owner, fused.detach())
                e, rest = divmod(W.data_ptr() - Ws.data_ptr(), Ws.stride(0) * Ws.element_size())
                if rest == 0 and (W.shape, W.stride()) == (Ws.shape[1:], Ws.stride()[1:]):
                    return self._experts.get((owner, key, e))
        return None


@contextlib.contextmanager
def eager(experts: Iterable[ExpertLinear]) -> Iterator[None]:
    """The experts' modules computing one expert after the other; what they did before is restored."""
    configs: dict[int, Any] = {id(config): config for config in (home(expert).config for expert in experts)}
    before = [(config, config._experts_implementation) for config in configs.values()]
    try:
        for config, _ in before:
            config._experts_implementation = "eager"
        yield
    finally:
        for config, implementation in before:
            config._experts_implementation = implementation
