"""The options of `covariance` and `decompose`: names, types and defaults in one place, for Python and the command.

Nothing heavy is imported, so that the command line starts at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import PrepError
from ..units import blocks_as_text, parse_blocks, parse_mixture, parse_seconds, parse_share, parse_size
from .numerics.methods import MOMENT_KINDS, PUBLISHED, one_of

if TYPE_CHECKING:
    from torch import nn

    from .corpus.source import Mask

MOMENTS = (*MOMENT_KINDS, "auto")
MOMENT_DTYPES = ("float64", "float32")
MODEL_DTYPES = ("auto", "float32", "float64", "bfloat16", "float16")
BASIS_DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes of a number
PRODUCTS = ("auto", "exact")
UNTIL_RANK = 64
COMPATIBLE = ("peft-corda",)


@dataclass(frozen=True)
class CovarianceOptions:
    """What `covariance` was asked for, checked as far as options alone can be. The fields are the verb's arguments."""

    model: str | nn.Module
    data: str | Sequence[str] | Mapping[str, float] | None = None
    batches: Iterable[Any] | None = None
    mask: Mask | None = None
    store: str | Path = "prep.zarr"
    revision: str | None = None
    subset: str | None = None
    split: str = "train"
    text_column: str | None = None
    template: str | None = None
    chat_column: str | None = None
    label_mask: bool = False
    answer_from: str | None = None
    num_sequences: int = 256
    until: float | str | None = None
    rank: int | None = None
    seq_len: int = 512
    batch_size: int = 8
    pack: bool = True
    seed: int = 0
    targets: Sequence[str] = ()
    exclude: Sequence[str] = ()
    layers: str | None = None  # numbers, too, which become text
    moment: str = "full"
    moment_dtype: str = "float64"
    dtype: str = "auto"  # a torch.dtype, too, which becomes its name
    device: str | None = None
    device_map: str | Mapping[str, int | str] | None = None
    max_memory: str | Mapping[int | str, int | str] | None = None
    halves: bool = True
    keep_tokens: int = 0
    compat: str | None = None
    block_by_block: bool | None = None
    memory_budget: int | str = "8GB"
    device_memory: int | str | None = None
    products: str = "auto"
    checkpoint_every: float | str = "60s"
    overwrite: bool = False
    break_lock: bool = False
    trust_remote_code: bool = False
    quiet: bool = False
    dry_run: bool = False
    distributed: bool = False
    budget: int = field(init=False)  # memory_budget in bytes
    room: int | None = field(init=False)  # device_memory in bytes
    every: float = field(init=False)  # checkpoint_every in seconds
    share: float = field(init=False)  # until; 0 where there is none
    at_rank: int = field(init=False)  # rank, or its default
    sources: tuple[tuple[str, int], ...] = field(init=False)  # of `data`, with their weights

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", _as_given(self.model))
        object.__setattr__(self, "data", _as_given(self.data))
        object.__setattr__(self, "budget", parse_size(self.memory_budget))
        asked = self.device_memory
        given = asked if asked is None or str(asked).strip() == "0" else parse_size(asked)
        object.__setattr__(self, "room", None if given is None else int(given))
        object.__setattr__(self, "every", parse_seconds(self.checkpoint_every))
        object.__setattr__(self, "share", 0.0 if self.until is None else parse_share(self.until))
        object.__setattr__(self, "at_rank", UNTIL_RANK if self.rank is None else self.rank)
        object.__setattr__(self, "sources", () if self.data is None else parse_mixture(self.data))
        for name in ("targets", "exclude"):
            value = getattr(self, name)
            patterns = {value} if isinstance(value, str) else set(value)  # their order makes no difference
            object.__setattr__(self, name, tuple(sorted(patterns)))
        if tuple(self.targets) == ("all-linear",):  # what is done by default
            object.__setattr__(self, "targets", ())
        if self.layers is not None:
            object.__setattr__(self, "layers", blocks_as_text(parse_blocks(self.layers)))
        object.__setattr__(self, "dtype", _dtype_name(self.dtype))
        one_of("--moment", self.moment, MOMENTS)
        one_of("--moment-dtype", self.moment_dtype, MOMENT_DTYPES)
        one_of("--dtype", self.dtype, MODEL_DTYPES)
        one_of("--products", self.products, PRODUCTS)
        if self.compat is not None:
            one_of("--compat", self.compat, COMPATIBLE)
            if self.moment != "full" or not self.named:
                raise PrepError("--compat peft-corda needs --moment full and a model by path or hub id")
            if self.keep_tokens:
                raise PrepError(
                    "--keep-tokens keeps inputs as they are, --compat peft-corda scales them: leave out one"
                )
        if self.keep_tokens < 0:
            raise PrepError(f"--keep-tokens {self.keep_tokens} is not a number of tokens: give 0 for none, or more")
        self._check_inputs()
        self._check_labels()
        self._check_until()

    @property
    def named(self) -> bool:
        """Whether the model is a path or hub id, not a module."""
        return isinstance(self.model, str)

    def _check_labels(self) -> None:
        """Refuse a mask of labels by which no answer can be told."""
        if self.answer_from is not None and not (self.label_mask and self.template is not None):
            raise PrepError("--answer-from says where a --template's answer begins, for --label-mask: give both, too")
        if not self.label_mask:
            return
        if self.batches is not None:
            raise PrepError("label_mask= is for data=: of batches= the mask= says which tokens count")
        if self.compat is not None:
            raise PrepError(f"--compat {self.compat} counts every token: leave it out, or --label-mask")
        if self.template is not None and self.answer_from is None:
            raise PrepError(
                "--label-mask needs to know where the --template's answer begins: add --answer-from, such as '{answer}'"
            )
        if self.template is None and self.chat_column is None:
            raise PrepError("--label-mask needs --chat-column, or --template with --answer-from, to tell answers by")

    def _check_until(self) -> None:
        """Refuse what --until cannot be judged by."""
        if self.until is None and self.rank is not None:
            raise PrepError("--rank belongs to --until: give a share such as --until 2%")
        if self.until is None:
            return
        if self.at_rank < 1:
            raise PrepError(f"--rank {self.rank} is too small: ask for at least 1")
        if self.batches is not None or self.dry_run:
            raise PrepError("--until reads more text as it goes: it needs --data, and no --dry-run")
        if self.moment == "diagonal" or not self.halves:
            raise PrepError(
                "--until needs both halves of the moments, full or output: leave out --no-halves and --moment diagonal"
            )

    def _check_inputs(self) -> None:
        """Refuse combinations of model, data and batches that make no sense."""
        if (self.data is None) == (self.batches is None):
            raise PrepError("give either data=, or batches= for a model of your own")
        if self.batches is None and self.mask is not None:
            raise PrepError("mask= belongs to batches=: text is masked by its tokenizer")
        if self.named:
            return
        if self.data is not None:
            raise PrepError("data= needs the tokenizer of a path or hub id: name the model so, or give batches=")
        loading = ("revision", "trust_remote_code", "device", "device_map", "max_memory", "block_by_block")
        given = [name for name in loading if getattr(self, name)] + ["dtype"] * (self.dtype != "auto")
        if given:
            raise PrepError(f"{given[0]}= is for loading a path or hub id: prepare the module itself")


@dataclass(frozen=True)
class DecomposeOptions:
    """What `decompose` was asked for. The fields are the verb's arguments."""

    store: str | Path = "prep.zarr"
    repair: str | nn.Module | None = None
    for_: str | Sequence[str] | None = None
    name: str | None = None
    metric: str | None = None
    power: float | None = None
    damping: float | None = None
    epsilon: float | None = None
    center: bool | None = None
    rank: int = 256
    select: str | None = None
    pooling: str | None = None
    solver: str = "auto"
    dtype: str = "float32"  # likewise
    sample: int | None = None
    model: str | nn.Module | None = None
    revision: str | None = None
    overwrite: bool = False
    break_lock: bool = False
    trust_remote_code: bool = False
    quiet: bool = False
    dry_run: bool = False
    distributed: bool = False
    methods: tuple[str | None, ...] = field(init=False)  # of `for_`; None for that of the other options

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", _as_given(self.model))
        object.__setattr__(self, "repair", _as_given(self.repair))
        object.__setattr__(self, "store", getattr(self.store, "location", self.store))  # of an opened one
        object.__setattr__(self, "dtype", _dtype_name(self.dtype))
        one_of("--dtype", self.dtype, tuple(BASIS_DTYPES))
        given = [self.for_] if isinstance(self.for_, str) else self.for_ or ()
        names = [name.strip() for one in given for name in one.split(",")]
        for name in names:
            one_of("--for", name, tuple(PUBLISHED))
        object.__setattr__(self, "methods", tuple(dict.fromkeys(names)) or (None,))
        if self.name is not None and len(self.methods) > 1:
            raise PrepError(f"--name {self.name} cannot name the bases of {len(self.methods)} methods: leave it out")
        if self.sample is not None:
            check_sample(self.sample)

    @property
    def several(self) -> bool:
        """Whether bases were asked for as a list, or joined by commas."""
        return self.for_ is not None and (not isinstance(self.for_, str) or "," in self.for_)


def check_sample(count: int) -> None:
    """PrepError for a negative number of layers of each kind."""
    if count < 0:
        raise PrepError(f"--sample {count} is not a number of layers: give 0 for all, or more")


def _as_given(value: Any) -> Any:
    """Paths as text, also in a list or as keys, and the module that `torch.compile` wrapped; else the value."""
    if isinstance(value, (list, tuple)):
        return [_as_given(one) for one in value]
    if isinstance(value, Mapping):
        return {_as_given(name): weight for name, weight in value.items()}
    return os.fspath(value) if isinstance(value, os.PathLike) else getattr(value, "_orig_mod", value)


def _dtype_name(dtype: Any) -> str:
    """`float32` for itself and for torch.float32."""
    return str(dtype).removeprefix("torch.")
