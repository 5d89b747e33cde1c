"""A uniform random sample of a site's tokens: those of smallest priority among all that were seen.

Every token has a random priority of its own, so the sample of several sets of tokens is made of their samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenSample:
    """tokens (n, d_in), float32: the inputs; priorities (n,), float64, from 0 to 1: rising."""

    tokens: Tensor
    priorities: Tensor


def joined(parts: Sequence[TokenSample], size: int) -> TokenSample:
    """The sample of the tokens of all parts: the `size` smallest priorities, of equal ones those of earlier parts."""
    priorities = torch.cat([part.priorities for part in parts])
    order = priorities.argsort(stable=True)[:size]
    return TokenSample(torch.cat([part.tokens for part in parts])[order], priorities[order])


def weighted(sample: TokenSample, weight: float) -> TokenSample:
    """The sample with priorities `1 - (1 - u)^(1 / weight)`, such as the smallest of `weight` random numbers has.

    Each token is then as likely to be among the smallest as if it were there `weight` times.
    """
    if weight == 1:
        return sample
    return TokenSample(sample.tokens, -torch.expm1(torch.log1p(-sample.priorities) / weight))
