"""Products of float32 that are float32, whatever the process around has set.

NVIDIA_TF32_OVERRIDE=1 acts inside of cuBLAS and cannot be undone from here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

_DEVICES = ("cpu", "cuda", "mps", "xpu")


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """Inside, autocast is off and float32 matrix products use no shorter format (TF32, bfloat16); then as before."""
    with contextlib.ExitStack() as stack:
        for device in _DEVICES:
            if _autocast(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(_ieee())
        yield


def _autocast(device: str) -> bool:
    try:
        return torch.is_autocast_enabled(device)
    except RuntimeError:  # a device that this build does not know
        return False


@contextlib.contextmanager
def _ieee() -> Iterator[None]:
    places: list[Any] = [torch.backends.cuda.matmul, torch.backends.mkldnn]
    places = [getattr(place, "matmul", place) for place in places]
    if not all(hasattr(place, "fp32_precision") for place in places):  # before torch 2.9
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    known = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "ieee"
        yield
    finally:
        for place, value in zip(places, known, strict=True):
            place.fp32_precision = "none"  # it then reads as the setting above it, which it goes on following
            if place.fp32_precision != value:
                place.fp32_precision = value
