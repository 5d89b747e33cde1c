"""Bases whose P leaves the range of float16: the weakest directions, whose S is small."""

import numpy as np
import pytest
import tiny
import torch

import prep
from prep import PrepError, StoreError
from prep.adapters.cores import CORES
from prep.adapters.layer import row_exponents


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model of small activations, and a basis of the directions that hold least of its output."""
    model = tiny.llama()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name:
                parameter.mul_(0.01)
    made = tiny.sources(tmp_path_factory.mktemp("made"), model)
    prep.covariance(made.model, made.data, store=made.path / "s", **tiny.RUN)
    prep.decompose(made.path / "s", for_="corda_kpm", rank=6, quiet=True)
    return made.path, made.model


def load(directory, dtype):
    return prep.preprocess.model.loading.load_model(directory, dtype=dtype)


def logits(model):
    return model(torch.arange(3, 15)[None]).logits.detach().double()


def test_the_case_is_one(made):
    P = prep.open_store(made[0] / "s").bases["full-p1-bottom"].read()
    assert any(not torch.isfinite(basis.P.half()).all() for basis in P.values())


@pytest.mark.parametrize("core", CORES)
def test_a_float16_model_follows_the_float32_one(made, core, tmp_path):
    """At the start, after training and after a save and load: never NaN, and as near as the base models are."""
    path, directory = made
    step = 1e-8 if core in ("rotation", "dplr") else 0.1  # in units of p, which is large, and not of p S
    torch.manual_seed(0)
    wide, half = load(directory, "float32"), load(directory, "float16")
    base = logits(wide)
    rounding = (logits(half) - base).norm()
    adapters = [prep.attach(model, path / "s", core=core, basis="full-p1-bottom") for model in (wide, half)]
    for one, other in zip(*(adapter.parameters() for adapter in adapters), strict=True):
        one.data += step * torch.randn_like(one)
        other.data.copy_(one.data)
    wanted, narrow = logits(wide), logits(half)
    assert torch.isfinite(narrow).all()
    assert (narrow - wanted).norm() < 5 * rounding + 0.05 * (wanted - base).norm()
    prep.save(half, tmp_path / "a.safetensors")
    again = load(directory, "float16")
    prep.load(again, tmp_path / "a.safetensors")
    assert torch.equal(logits(again), narrow)
    loss = half(torch.arange(3, 15)[None], labels=torch.arange(3, 15)[None]).loss
    loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in adapters[1].parameters())


def test_rows_are_divided_by_powers_of_two_only_where_they_must():
    P = torch.tensor([[1.0, -0.5], [3e6, 1.0], [1e-6, 2e-6], [0.0, 0.0]])
    exponents = row_exponents(P, torch.float16)
    assert exponents.tolist() == [0, 22, -18, 0]
    assert np.allclose(torch.ldexp(P, -exponents[:, None]).abs().amax(1), [1, 3e6 / 2**22, 2e-6 * 2**18, 0])
    assert row_exponents(P[:1], torch.float16) is None
    assert row_exponents(P, torch.bfloat16) is None and row_exponents(P, torch.float32) is None


def test_a_basis_that_does_not_fit_float16_is_not_stored_in_it(made, tmp_path):
    path, _ = made
    options = {"for_": "corda_kpm", "rank": 6, "name": "half", "quiet": True}
    said = r"P has entries up to \S+, float16 ends at 7e\+04: .*--dtype float32 or bfloat16"
    with pytest.raises(PrepError, match=said):
        prep.decompose(path / "s", dtype="float16", **options)
    with pytest.raises(StoreError, match="basis 'half' is not complete"):
        prep.open_store(path / "s").bases["half"]
    basis = prep.decompose(path / "s", dtype="bfloat16", overwrite=True, **options)
    assert all(torch.isfinite(one.P).all() for one in basis.read().values())


@pytest.mark.parametrize("how", ["autocast", "half() after attach"])
def test_a_float32_model_that_turns_to_float16_keeps_its_basis(made, how):
    path, directory = made
    torch.manual_seed(0)
    model = load(directory, "float32")
    base = logits(model)
    adapter = prep.attach(model, path / "s", core="dense", basis="full-p1-bottom")
    for parameter in adapter.parameters():
        parameter.data.normal_(std=10)
    wanted = logits(model)
    if how == "autocast":
        with torch.autocast("cpu", torch.float16):
            narrow = logits(model)
    else:
        narrow = logits(model.half())
        assert {layer.weight.dtype for layer in adapter.layers.values()} == {torch.float16}
    assert torch.isfinite(narrow).all()
    assert (narrow - wanted).norm() < 0.01 * (wanted - base).norm()


def test_a_cast_that_loses_nothing_is_a_cast(made):
    path, directory = made
    prep.decompose(path / "s", for_="pissa", rank=6, quiet=True)
    adapter = prep.attach(load(directory, "float32"), path / "s", basis="identity", layers="q_proj")
    for layer in adapter.layers.values():
        layer.half()
        assert {tensor.dtype for tensor in layer.parameters()} == {torch.float16}
