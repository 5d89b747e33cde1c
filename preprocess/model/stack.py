"""A model without its weights, run one block at a time: every forward is the model's own, with stubs for other blocks.

To run block k, blocks before it are replaced by stubs: the last of them gives back what it once computed, the others
give NaN. So masks, positions and whatever else a family hands to each block come from its own code. That nothing but
the output of the block before reaches a block is not assumed: `checked` compares what every block is given, and what it
makes of it, with an ordinary forward of the same modules.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import PrepError
from .checkpoint import free, materialise
from .forward import Forward, Inputs
from .sites import Site, block_index, encoder_of

Output = Any  # of a block: a tensor, or a tuple of tensors and None


class _Done(Exception):
    """Ends a forward after the block under way."""


@dataclass
class Stack:
    """The blocks of a model in call order. outside: the modules beside them that a forward needs; device: of both.

    hidden: bytes that a block gives for the example, at most. at: the number of the block under way, -1 for all.
    given: what the block before the one under way gave; made: what that one gave, None before it has.
    """

    net: nn.Module
    names: tuple[str, ...]
    device: torch.device
    outside: tuple[str, ...] = ()
    hidden: int = 0
    at: int = -1
    given: Output = None
    made: Output = None
    _calls: list[tuple[int, Any, Output]] | None = field(default=None, repr=False)

    @contextlib.contextmanager
    def resident(self) -> Iterator[None]:
        """Inside, what lies outside the blocks has its weights, and a forward ends after block `at`."""
        modules = [self.net.get_submodule(name) for name in self.outside]
        try:
            materialise(modules, self.device)
            with self._stubs():
                yield
        finally:
            free(modules)

    @contextlib.contextmanager
    def loaded(self, number: int) -> Iterator[nn.Module]:
        """Inside, a block has its weights and is the one under way."""
        block = self.net.get_submodule(self.names[number])
        modules = list(block.modules())
        try:
            materialise(modules, self.device)
            self.at = number
            yield block
        finally:
            free(modules)
            self.at, self.given, self.made = -1, None, None

    def bytes(self, number: int | None) -> int:
        """Of the weights of a block, or of what lies outside of the blocks."""
        if number is None:
            modules = [self.net.get_submodule(name) for name in self.outside]
            return sum(weight.nbytes for module in modules for weight in module.parameters(recurse=False))
        return sum(weight.nbytes for weight in self.net.get_submodule(self.names[number]).parameters())

    def forward(self, whole: Forward) -> Forward:
        """A batch through the block under way alone; whole: through all of the model."""

        def run(inputs: Inputs) -> None:
            self.made = None
            with contextlib.suppress(_Done):
                whole(inputs)

        return run

    @contextlib.contextmanager
    def _stubs(self) -> Iterator[None]:
        blocks = [self.net.get_submodule(name) for name in self.names]
        try:
            for number, block in enumerate(blocks):
                vars(block)["forward"] = _Stub(self, number, block.forward)
            yield
        finally:
            for block in blocks:
                vars(block).pop("forward", None)

    def called(self, number: int, forward: Callable[..., Output], args: tuple, kwargs: dict) -> Output:
        """What a block gives in place of its own forward."""
        if number < self.at:
            return mapped(self.given, Tensor.clone if number == self.at - 1 else _nan)
        given = _tensors((args, kwargs)) if self._calls is not None else None
        made = forward(*args, **kwargs)
        if self._calls is not None:
            self._calls.append((number, given, made))
        if self.at < 0:  # all of the model
            return made
        self.made = mapped(made, Tensor.detach)
        raise _Done

    @contextlib.contextmanager
    def recorded(self) -> Iterator[list[tuple[int, Any, Output]]]:
        """Inside, calls of blocks are noted: number, tensors that it was given, output."""
        self._calls = []
        try:
            yield self._calls
        finally:
            self._calls = None


class _Stub:
    def __init__(self, stack: Stack, number: int, forward: Callable[..., Output]):
        self._stack, self._number, self._forward = stack, number, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Output:
        return self._stack.called(self._number, self._forward, args, kwargs)


def stack_of(net: nn.Module, sites: Sequence[Site], device: torch.device) -> tuple[Stack, dict[str, int]]:
    """The blocks that hold the sites, up to the last of these, and the number of each site's block.

    PrepError, which names the reason, for a model that has no one stack of blocks, each of which is called once.
    """
    if encoder_of(net) is not None:
        raise refused(net, "is an encoder-decoder, whose blocks all read the encoder's output")
    named: dict[str, str] = {}
    for site in sites:
        for member in site.members:
            named[site.name] = block = _block(member)
            if not block:
                raise refused(net, f"has {member} outside of its blocks", "--exclude that layer, or ")
            if block != _block(site.name):
                raise refused(net, f"shares the input of {site.name} among blocks")
    parents = sorted({name.rpartition(".")[0] for name in named.values()})
    if len(parents) > 1:
        raise refused(net, f"has the stacks {' and '.join(parents)}", "take one of them with --targets, or ")
    last = max(int(name.rpartition(".")[2]) for name in named.values())
    children = [name for name, _ in net.get_submodule(parents[0]).named_children()]
    if children[: last + 1] != [str(number) for number in range(last + 1)]:
        raise refused(net, f"has other modules among the blocks of {parents[0]}")
    names = tuple(f"{parents[0]}.{number}" for number in range(last + 1))
    return Stack(net, names, device), {site: int(name.rpartition(".")[2]) for site, name in named.items()}


def checked(stack: Stack, forward: Forward, example: Inputs) -> None:
    """Find what is `outside`, and see that blocks run one by one as they do together, with the weights there are.

    What an earlier forward has left anywhere is that of another example. PrepError for a family where it is not so.
    """
    net, other, used = stack.net, _turned(example), dict[str, None]()
    run = stack.forward(forward)
    with stack._stubs(), torch.no_grad():
        with stack.recorded() as calls, _noted(stack, used):
            forward(other)
        if [number for number, *_ in calls][: len(stack.names)] != list(range(len(stack.names))):
            raise refused(net, "does not call its blocks once each, in their order")
        if len(calls) > len(stack.names):
            raise refused(net, "calls a block more than once")
        for number, _, made in calls:
            if not _is_output(made):
                raise refused(net, f"has a block, {stack.names[number]}, that gives a {type(made).__name__}")
        stack.outside = tuple(used)
        stack.hidden = max(sum(x.nbytes for x in _tensors(made)) for *_, made in calls)
        forward(example)
        try:
            for number, given, made in reversed(calls):  # so that no block has seen it since, as in a calibration
                stack.at, stack.given = number, calls[number - 1][2] if number else None
                try:
                    with stack.recorded() as again:
                        run(other)
                    [(_, given_again, made_again)] = again
                    same = _equal(given, given_again) and _equal(_tensors(made), _tensors(made_again))
                except Exception:  # whatever a model does without what an earlier block has left
                    same = False
                if not same:
                    raise refused(net, f"hands more to {stack.names[number]} than the block before gives")
        finally:
            stack.at, stack.given, stack.made = -1, None, None


def refused(net: nn.Module, why: str, instead: str = "") -> PrepError:
    """The error for a model that cannot be calibrated block by block."""
    return PrepError(f"{type(net).__name__} {why}: {instead}leave out --block-by-block")


def mapped(output: Output, change: Callable[[Tensor], Tensor]) -> Output:
    """The output of a block with every tensor changed."""
    if isinstance(output, Tensor):
        return change(output)
    return tuple(None if one is None else change(one) for one in output)


def _nan(x: Tensor) -> Tensor:
    return torch.full_like(x, torch.nan) if x.is_floating_point() else torch.zeros_like(x)


def _is_output(made: Output) -> bool:
    parts = made if type(made) is tuple else (made,)
    return all(one is None or (isinstance(one, Tensor) and one.is_contiguous()) for one in parts) and any(
        one is not None for one in parts
    )


@contextlib.contextmanager
def _noted(stack: Stack, used: dict[str, None]) -> Iterator[None]:
    """Note the modules outside the blocks that are called before the last block."""
    parent = stack.names[0].rpartition(".")[0]
    blocks = tuple(f"{parent}.{number}." for number in range(len(stack.net.get_submodule(parent))))  # type: ignore[arg-type]
    last = stack.net.get_submodule(stack.names[-1])
    ended: list[bool] = []

    def note(name: str) -> Callable[..., None]:
        return lambda *_: None if ended else used.setdefault(name)

    handles: list[Any] = [last.register_forward_hook(lambda *_: ended.append(True))]
    for name, module in stack.net.named_modules():
        if not f"{name}.".startswith(blocks):
            handles.append(module.register_forward_pre_hook(note(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _block(layer: str) -> str:
    """The name of the block a layer lies in, "" outside of the blocks."""
    number = block_index(layer)
    parts = layer.split(".")
    return "" if number is None else ".".join(parts[: parts.index(str(number)) + 1])


def _turned(example: Inputs) -> Inputs:
    """An example with its tokens or numbers in the other order."""
    if isinstance(example, Mapping):
        return {name: _turned(x) if name == "input_ids" or _is_real(x) else x for name, x in example.items()}
    return example.flip(-1) if isinstance(example, Tensor) else example


def _is_real(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _tensors(value: Any) -> list[Tensor]:
    """Copies of the tensors in nested arguments, in order."""
    if isinstance(value, Tensor):
        return [value.detach().clone()]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [one for part in value for one in _tensors(part)] if isinstance(value, (list, tuple)) else []


def _equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(a, b, strict=True))
