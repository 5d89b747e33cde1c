"""A core of one's own, and the bugs that check_core must find in one."""

import pytest
import tiny
import torch
from torch import nn
from workers import logits, randomize

import prep
from prep.adapters.cores import CORES, Core


class Shift(Core):
    """core(p) = s (p * S) * tanh(w);  w (r,) starts at 0."""

    strength: float = 1.0

    def build(self, r):
        self.w = nn.Parameter(torch.zeros(r))

    def forward(self, p):
        return self.s * p * self.S * torch.tanh(self.strength * self.w)


def test_a_core_of_ones_own(store):
    prep.testing.check_core(Shift)
    prep.testing.check_core(Shift(strength=2))
    model = tiny.llama()
    base = logits(model)
    by_class = prep.attach(model, store, core=Shift, strength=2)
    assert by_class.core.options == {"strength": 2.0}
    prep.detach(model)
    adapter = prep.attach(model, store, core=Shift(strength=0.5))
    assert torch.equal(logits(model), base)
    assert adapter.layers["model.layers.0.mlp.up_proj"].core.strength == 0.5
    randomize(adapter)
    assert not torch.equal(logits(model), base)


@pytest.mark.parametrize("name", list(CORES))
def test_the_built_in_cores_keep_the_contract(name):
    prep.testing.check_core(CORES[name], starts_at_base=name != "ablation")


class NotZero(Shift):
    def build(self, r):
        self.w = nn.Parameter(torch.full((r,), 1e-3))


class NoCoefficient(Shift):
    def forward(self, p):
        return p * self.S * torch.tanh(self.w)


class Offset(Shift):
    def forward(self, p):
        return super().forward(p) + self.s * self.w


class Normalised(Shift):
    def forward(self, p):
        return super().forward(p - p.mean(0, keepdim=True))


class Detached(Shift):
    def forward(self, p):
        return self.s * p * self.S * (self.w + self.w.detach() ** 2)


class Unsaved(Shift):
    def build(self, r):
        super().build(r)
        self.mask = torch.rand(r)

    def forward(self, p):
        return super().forward(p) * self.mask.to(p.dtype)


class Half(Shift):
    def forward(self, p):
        return super().forward(p.bfloat16().to(p.dtype))


class Rounded(Shift):
    def forward(self, p):
        return super().forward(p).bfloat16()


class Undeclared(Shift):
    def __init__(self, sign=1.0, **options):
        super().__init__(**options)
        self.sign = sign

    def forward(self, p):
        return super().forward(p) * self.sign


class Reshaped(Shift):
    def forward(self, p):
        return super().forward(p).flatten(0, -2)


class Noisy(Shift):
    def forward(self, p):
        return super().forward(nn.functional.dropout(p, 0.5))


class Idle(Shift):
    def build(self, r):
        super().build(r)
        self.idle = nn.Parameter(torch.zeros(r))


@pytest.mark.parametrize(
    ("core", "message"),
    [
        (NotZero, "NotZero: start"),
        (NoCoefficient, "NoCoefficient: coefficient: 0 is not the base"),
        (Offset, "Offset: linearity"),
        (Normalised, "Normalised: linearity"),
        (Detached, "Detached: gradients: they disagree"),
        (Idle, "Idle: gradients: idle has no gradient"),
        (Unsaved, "Unsaved: save and load"),
        (Half, "Half: linearity"),
        (Rounded, "Rounded: dtype"),
        (Reshaped, "Reshaped: shape"),
        (Noisy, "Noisy: linearity"),
        (Undeclared(sign=-1.0), "Undeclared: options"),
    ],
    ids=lambda value: None if isinstance(value, str) else getattr(value, "__name__", "Undeclared"),
)
def test_check_core_finds_planted_bugs(core, message):
    with pytest.raises(AssertionError, match=message):
        prep.testing.check_core(core)
