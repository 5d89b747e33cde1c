"""check_core: does a user's own core keep the contract of cores.py?"""

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..linear import weight_hash, weight_matrix
from .adapter import Adapter, Origin
from .attach import install, merge, unmerge
from .cores import Core
from .saved import load, save


def check_core(core: type[Core] | Core, *, starts_at_base: bool = True) -> None:
    """Check a core, a class or an instance with its options, on a small model of two linear layers.

    Start (the base model, unless `starts_at_base` is False), shape and dtype, linearity in p row by row, coefficient,
    gradients against finite differences, autocast and low precision, merge, save and load. Raises AssertionError with
    the name of the first check that fails and what it found.
    """
    core = core() if isinstance(core, type) else core
    name = type(core).__name__
    generator_state = torch.random.get_rng_state()
    try:
        torch.manual_seed(0)
        again = type(core)(**core.options)
        _expect(_plain(again) == _plain(core), name, "options", "an attribute of __init__ is not a declared option")
        base = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 7))
        model = copy.deepcopy(base)
        adapter = _adapt(model, core)
        x = torch.randn(3, 5, 12)
        _check_start(name, model, adapter, base, x, starts_at_base)
        for parameter in adapter.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
        for layer in adapter.layers.values():
            _check_map(name, layer.core)
            _check_precision(name, layer.core, layer.change)
        _check_coefficient(name, model, adapter, base, x)
        for layer in adapter.layers.values():
            _check_gradients(name, copy.deepcopy(layer.core).double())
        _check_merge(name, model, x)
        _check_save(name, model, base, type(core), x)
    finally:
        torch.random.set_rng_state(generator_state)


def _adapt(model: nn.Module, core: Core) -> Adapter:
    modules = {key: module for key, module in model.named_children() if hasattr(module, "weight")}
    parts, weights = {}, {}
    for (key, module), r in zip(modules.items(), (8, 7), strict=True):
        W = weight_matrix(module)
        U, S, Vt = torch.linalg.svd(W, full_matrices=False)
        parts[key], weights[key] = (U[:, :r], S[:r], Vt[:r]), (weight_hash(W), "float32")
    return install(model, modules, parts, core, Origin("check", "check", "", "identity", weights))


def _check_start(
    name: str, model: nn.Module, adapter: Adapter, base: nn.Module, x: Tensor, starts_at_base: bool
) -> None:
    _expect(adapter.trainable > 0, name, "start", "it has no trainable parameter")
    for layer in adapter.layers.values():
        p = torch.randn(3, 4, len(layer.P))
        change = layer.core(p)
        _expect(change.shape == p.shape, name, "shape", f"p {tuple(p.shape)} gives {tuple(change.shape)}")
        _expect(change.dtype == p.dtype, name, "dtype", f"p in {p.dtype} gives {change.dtype}")
    if starts_at_base:
        _expect(torch.equal(model(x), base(x)), name, "start", "an untrained core changes the model")


def _plain(core: Core) -> dict[str, str]:
    known = {"training", "coefficient", *core.defaults()}
    attributes = {key: repr(value) for key, value in vars(core).items() if key[0] != "_" and key not in known}
    return {**attributes, "options": repr(core.options)}


def _check_map(name: str, core: Core) -> None:
    p, q = torch.randn(2, 3, 4, len(core.S)).unbind(0)
    change = core(p)
    _expect(torch.equal(core(p), change), name, "linearity", "the same p gives another result the second time")
    _expect(bool(change.any()), name, "linearity", "the result is zero for random parameters")
    _close(
        core(2 * p - 3 * q), 2 * change - 3 * core(q), name, "linearity", "core(2 p - 3 q) is not 2 core(p) - 3 core(q)"
    )
    _close(core(p[1:2, 2:3]), change[1:2, 2:3], name, "linearity", "a row depends on the other rows")


def _check_precision(name: str, core: Core, change: Callable[[Tensor], Tensor]) -> None:
    p = torch.randn(4, len(core.S))
    exact = core(p)
    with torch.autocast("cpu", torch.bfloat16):
        _expect(torch.equal(change(p), exact), name, "autocast", "the result differs under bfloat16 autocast")
    wide = copy.deepcopy(core).double()(p.double())
    _expect(wide.dtype == torch.float64, name, "dtype", f"float64 parameters and p give {wide.dtype}")
    _close(exact.double(), wide, name, "dtype", "the result is less exact than float32")


def _check_coefficient(name: str, model: nn.Module, adapter: Adapter, base: nn.Module, x: Tensor) -> None:
    full = model(x)
    with adapter.coeff(0.0):
        _expect(torch.equal(model(x), base(x)), name, "coefficient", "0 is not the base model")
    with adapter.coeff(0.5):
        _expect(
            not torch.equal(model(x), full), name, "coefficient", "0.5 gives the same as 1: the formula lacks self.s"
        )


def _check_gradients(name: str, core: Core) -> None:
    trainable = {key: p.detach().clone().requires_grad_() for key, p in core.named_parameters() if p.requires_grad}
    p = torch.randn(3, len(core.S), dtype=torch.float64, requires_grad=True)

    def forward(p: Tensor, *values: Tensor) -> Tensor:
        return functional_call(core, dict(zip(trainable, values, strict=True)), (p,))

    grads = torch.autograd.grad(forward(p, *trainable.values()).sin().sum(), [*trainable.values()], allow_unused=True)
    for key, grad in zip(trainable, grads, strict=True):
        reached = grad is not None and bool(torch.isfinite(grad).all()) and (grad.numel() == 0 or bool(grad.any()))
        _expect(reached, name, "gradients", f"{key} has no gradient")
    try:
        torch.autograd.gradcheck(forward, (p, *trainable.values()))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise AssertionError(f"{name}: gradients: they disagree with finite differences ({reason})") from error


def _check_merge(name: str, model: nn.Module, x: Tensor) -> None:
    expected = model(x)
    merge(model)
    _close(model(x), expected, name, "merge", "the merged model differs")
    unmerge(model)


def _check_save(name: str, model: nn.Module, base: nn.Module, cls: type[Core], x: Tensor) -> None:
    fresh = copy.deepcopy(base)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "core.safetensors"
        save(model, path)
        load(fresh, path, core=cls)
    _expect(torch.equal(fresh(x), model(x)), name, "save and load", "the loaded model differs: is all its state saved?")


def _expect(condition: bool, name: str, check: str, detail: str) -> None:
    if not condition:
        raise AssertionError(f"{name}: {check}: {detail}")


def _close(a: Tensor, b: Tensor, name: str, check: str, detail: str) -> None:
    _expect(bool((a - b).norm() <= 1e-5 * b.norm() + 1e-30), name, check, detail)
