"""Stores of format version 1, as prep wrote them before version 2, and the models that they are of.

In tests/version1.tar.gz `whole` holds moments with halves and kept tokens (full, and output of a wide layer), the basis
`full`, made of them, and `plain` in bfloat16; `bases` holds a basis of one layer in more than one slab, and no moments.
They were made by

covariance(Net(), batches=batches(), store="whole", moment="auto", moment_dtype="float32", keep_tokens=6)
decompose("whole", model=Net(), rank=8, sample=0)
decompose("whole", model=Net(), metric="identity", name="plain", rank=8, dtype="bfloat16")
decompose("bases", model=Tall(), metric="identity", rank=66, dtype="bfloat16")
"""

from __future__ import annotations

import tarfile
from pathlib import Path

import torch
from torch import Tensor, nn

ARCHIVE = Path(__file__).with_name("version1.tar.gz")


class Net(nn.Module):
    """Weights and inputs are whole numbers over 64, so that they are the same everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(12, 8, bias=False), nn.Linear(12, 8, bias=False)
        self.out, self.down = nn.Linear(8, 12), nn.Linear(24, 4)
        _fill(self)

    def forward(self, x: Tensor) -> Tensor:
        h = self.out(self.q(x) - self.k(x))
        return self.down(torch.cat([h, h * x], -1))


class Tall(nn.Module):
    """One layer of rank 66."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(66, 67, bias=False)
        _fill(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x)


def _fill(module: nn.Module) -> None:
    for number, parameter in enumerate(module.parameters()):
        parameter.requires_grad_(False).copy_(numbers(number, tuple(parameter.shape)))


def numbers(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Values between -1 and 1 that look random."""
    count = torch.arange(torch.Size(shape).numel(), dtype=torch.int64) + 1000 * (seed + 1)
    return ((count * count * 7919 + count * 104729) % 127 - 63).reshape(shape).float() / 64


def batches() -> list[Tensor]:
    """Four of ten sequences, each of three tokens."""
    return [numbers(100 + i, (10, 3, 12)) for i in range(4)]


def unpacked(folder: Path) -> Path:
    """The stores, in a new folder."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder
