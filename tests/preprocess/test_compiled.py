"""Compiled models are calibrated and decomposed as the plain ones that they are made from."""

import pytest
import tiny
import torch

import prep
from prep.store import open_store

BATCHES = [
    {"input_ids": torch.randint(3, tiny.SIZE, (2, 12), generator=torch.Generator().manual_seed(i))} for i in (0, 1)
]


def wrapped(model):
    return torch.compile(model, backend="aot_eager")


def in_place(model):
    model.compile(backend="aot_eager")
    return model


def blocks_in_place(model):
    for block in model.model.layers:
        block.compile(backend="aot_eager")
    return model


@pytest.mark.parametrize("compiled_by", [wrapped, in_place, blocks_in_place])
def test_a_compiled_model_gives_the_moments_and_bases_of_the_plain_one(compiled_by, tmp_path):
    plain = prep.covariance(tiny.llama(), batches=BATCHES, store=tmp_path / "plain", quiet=True)
    wanted = prep.decompose(plain.location, model=tiny.llama(), rank=4, quiet=True).read()
    torch.compiler.reset()
    model = compiled_by(tiny.llama())
    with torch.no_grad():
        before = model(**BATCHES[0]).logits  # compiled now, and without hooks
    store = prep.covariance(model, batches=BATCHES, store=tmp_path / "compiled", quiet=True)
    assert store.moments.sites == plain.moments.sites
    for layer in plain.moments:
        assert torch.equal(store.moments[layer].second_moment, plain.moments[layer].second_moment), layer
    prep.decompose(store.location, model=model, rank=4, quiet=True)
    bases = open_store(tmp_path / "compiled").bases["full"].read()
    assert all(torch.equal(bases[layer].P, wanted[layer].P) for layer in wanted)
    with torch.no_grad():
        assert torch.equal(model(**BATCHES[0]).logits, before)
