"""attach, detach, merge, unmerge, the coefficient, and the contract of a core of one's own."""

import copy

import numpy as np
import pytest
import tiny
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from workers import assert_same, logits, randomize, snapshot, tokens

import prep
from prep.adapters.cores import CORES
from prep.adapters.layer import AdaptedLinear
from prep.store import open_store


@pytest.mark.parametrize("mode", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("variant", list(prep.VARIANTS))
def test_an_attached_model_is_bitwise_the_base_model(store, variant, mode):
    model = tiny.llama(dtype=torch.bfloat16 if mode == "bfloat16" else torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        base = logits(model)
        adapter = prep.attach(model, store, **{**prep.VARIANTS[variant], "rank": 12})
        start = logits(model)
        assert torch.equal(start, base) == (variant != "antipasto_ablate")
        randomize(adapter)
        assert not torch.equal(logits(model), start)
        adapter.set_coeff(0.0)
        assert torch.equal(logits(model), base)


def test_ablation_starts_at_exactly_its_formula(store):
    model = tiny.llama()
    adapter = prep.attach(model, store, core="ablation", basis="full", layers=r"layers\.1\.mlp\.down_proj$", alpha=0.3)
    (layer,) = adapter.layers.values()
    x = torch.randn(5, 48, dtype=torch.float64)
    W, U, P = (t.detach().double() for t in (layer.weight, layer.U, layer.P))
    S, c = layer.core.S.double(), nn.functional.normalize(layer.core.c.detach().double(), dim=0)
    expected = x @ W.T - 0.3 * ((((x @ P.T) * S) @ c) @ c.T) @ U.T
    torch.testing.assert_close(layer(x.float()).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("merged", [False, True])
def test_detach_leaves_the_model_exactly_as_before(store, merged):
    model = tiny.llama()
    model.model.embed_tokens.weight.requires_grad_(False)
    model.custom = ["kept"]
    before = snapshot(model)
    adapter = prep.attach(model, store, core="dplr")
    randomize(adapter)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {n for n, _ in adapter.named_parameters()}
    if merged:
        prep.merge(model)
    prep.detach(model)
    assert_same(before, snapshot(model))
    with pytest.raises(prep.PrepError, match="no adapter"):
        prep.detach(model)


@pytest.mark.parametrize("name", list(CORES))
def test_frozen_means_frozen(store, name):
    """20 AdamW steps: only core parameters changed, no base weight has a gradient, coefficient 0 is still the base."""
    model = tiny.llama()
    base = logits(model)
    adapter = prep.attach(model, store, core=name, rank=12)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    x = tokens(rows=2, length=8)
    losses = []
    for _ in range(20):
        loss = model(x, labels=x).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    trained = {key for key, _ in adapter.named_parameters()}
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == trained
    assert {key for key, p in model.named_parameters() if p.grad is not None} == trained
    with adapter.coeff(0):
        assert torch.equal(logits(model), base)


def test_coefficient_blocks_nest_and_restore(store):
    model = tiny.llama()
    adapter = prep.attach(model, store, core="dense")
    randomize(adapter)
    full = logits(model)
    adapter.set_coeff(0.5)
    half = logits(model)
    with adapter.coeff(1.0):
        assert torch.equal(logits(model), full)
        with pytest.raises(KeyError), adapter.coeff(0.0):
            raise KeyError
        assert torch.equal(logits(model), full)
    assert torch.equal(logits(model), half)
    with pytest.raises(prep.PrepError, match="finite"):
        adapter.set_coeff(float("nan"))
    assert torch.equal(logits(model), half)


def contrastive_gradients(model, adapter, forward):
    """Gradients of a loss over three coefficients, the backward outside their blocks."""
    outputs = []
    for s in (0.5, -1.5, 0.0):
        with adapter.coeff(s):
            outputs.append(forward(tokens(seed=1)))
    weights = torch.linspace(-1, 1, outputs[0].numel()).view_as(outputs[0])
    loss = sum((k + 1) * (weights * output.sin()).sum() for k, output in enumerate(outputs))
    for parameter in adapter.parameters():
        parameter.grad = None
    loss.backward()
    return [parameter.grad.clone() for parameter in adapter.parameters()]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", list(CORES))
def test_gradient_checkpointing_uses_the_coefficient_of_the_forward(store, name, reentrant):
    model = tiny.llama()
    adapter = prep.attach(model, store, core=name, rank=8)
    randomize(adapter)
    model.train()
    model.enable_input_require_grads()
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    expected = contrastive_gradients(model, adapter, lambda x: model(x).logits)
    enable({"use_reentrant": reentrant})
    gradients = contrastive_gradients(model, adapter, lambda x: model(x).logits)
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * expected[0].abs().max().item())
    wrong = contrastive_gradients(model, adapter, lambda x: model(x).logits * 1.01)
    assert not all(torch.allclose(one, other, rtol=1e-3) for one, other in zip(wrong, expected, strict=True))


def test_backward_order_does_not_matter_under_checkpointing(store):
    """Each of two graphs has its own coefficient, whichever backward comes first and whatever is set in between."""
    model = tiny.llama()
    adapter = prep.attach(model, store, rank=8)
    randomize(adapter)
    block = model.model.layers[0].mlp
    x = torch.randn(3, 32, requires_grad=True)

    def gradient(s, between):
        with adapter.coeff(s):
            y = checkpoint(block, x, use_reentrant=False)
        with adapter.coeff(7.0):
            between(block(x).sum())
        (grad,) = torch.autograd.grad(y.square().sum(), block.up_proj.core.g)
        return grad

    with adapter.coeff(0.25):
        (expected,) = torch.autograd.grad(block(x).square().sum(), block.up_proj.core.g)
    torch.testing.assert_close(gradient(0.25, lambda loss: None), expected)
    torch.testing.assert_close(gradient(0.25, lambda loss: loss.backward()), expected)


@pytest.mark.parametrize("name", list(CORES))
def test_merging_keeps_the_logits(store, name):
    model = tiny.llama()
    adapter = prep.attach(model, store, core=name)
    randomize(adapter)
    with adapter.coeff(0.7):
        adapted = logits(model)
        prep.merge(model)
        with pytest.raises(prep.PrepError, match="merged"):
            adapter.set_coeff(1.0)
    assert (logits(model) - adapted).norm() <= 1e-5 * adapted.norm()
    prep.unmerge(model)
    adapter.set_coeff(0.7)
    assert torch.equal(logits(model), adapted)


def test_a_merged_model_is_a_plain_model(store, tmp_path):
    from transformers import LlamaForCausalLM

    model = tiny.llama()
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    adapter = prep.attach(model, store, core="dplr")
    randomize(adapter)
    adapter.set_coeff(0.7)
    adapted = logits(model)
    prep.merge(model)
    merged = logits(model)
    assert (merged - adapted).norm() <= 1e-5 * adapted.norm()
    assert model.state_dict().keys() == weights.keys()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path)), merged)
    with pytest.raises(prep.PrepError, match="merged already"):
        prep.merge(model)
    prep.unmerge(model)
    assert torch.equal(logits(model), adapted)
    assert all(
        torch.equal(model.state_dict()[key.replace("_proj.", "_proj.base_layer.")], weights[key]) for key in weights
    )
    with pytest.raises(prep.PrepError, match="not merged"):
        prep.unmerge(model)


def test_conv1d_and_a_layer_that_several_parents_share(tmp_path):
    model = tiny.model("GPT-2", n_embd=16)
    model.transformer.h[1].mlp = model.transformer.h[0].mlp
    store = tiny.store(tmp_path / "prep.zarr", model, rank=12)
    base = logits(model)
    adapter = prep.attach(model, store, core="dense")
    assert len(adapter.layers) == 6
    assert model.transformer.h[1].mlp.c_fc is model.transformer.h[0].mlp.c_fc
    assert torch.equal(logits(model), base)
    randomize(adapter, 0.05)
    adapted = logits(model)
    assert not torch.equal(adapted, base)
    prep.merge(model)
    torch.testing.assert_close(logits(model), adapted, rtol=1e-5, atol=1e-5)
    prep.detach(model)
    assert torch.equal(logits(model), base)
    assert not any(isinstance(module, AdaptedLinear) for module in model.modules())


def test_a_rank_is_a_slice_and_clipped_per_layer(store):
    model = tiny.llama()
    adapter = prep.attach(model, store, basis="full", rank=20)
    bases = open_store(store).bases["full"]
    for name, layer in adapter.layers.items():
        r = min(20, *bases.layers[name].shape)
        assert torch.equal(layer.U, bases[name].U[:, :r])
        assert torch.equal(layer.P, bases[name].P[:r])
        assert layer.core.g.shape == (r,)
        assert layer.Ut.is_contiguous()
        assert all(t.untyped_storage().nbytes() == 4 * t.numel() for t in (layer.Ut, layer.P))
    assert {len(layer.P) for layer in adapter.layers.values()} == {16, 20}
    assert "rank 16 to 20, 14 layers" in repr(adapter)
    assert adapter.trainable == 14 * 20 - 4 * 4
    macs = sum(len(layer.P) * (layer.in_features + layer.out_features) for layer in adapter.layers.values())
    assert adapter.multiply_adds == macs + adapter.trainable
    assert f"{adapter.trainable} trainable" in repr(adapter)


def test_layers_are_chosen_by_a_regular_expression(store):
    model = tiny.llama()
    adapter = prep.attach(model, store, layers=r"layers\.1\..*(q|v)_proj$")
    assert list(adapter.layers) == ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]
    assert sum(isinstance(module, AdaptedLinear) for module in model.modules()) == 2


def test_the_adapted_layer_shows_what_model_code_looks_at(store):
    model = tiny.llama()
    base = model.model.layers[0].mlp.up_proj
    prep.attach(model, store)
    layer = model.model.layers[0].mlp.up_proj
    assert layer.base_layer is base
    assert layer.weight is base.weight
    assert layer.bias is None
    assert (layer.in_features, layer.out_features) == (32, 48)


def test_attaching_decomposes_nothing(store, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("a decomposition at attach")

    for module in (torch.linalg, np.linalg):
        for name in vars(module):
            if callable(getattr(module, name)) and not name.startswith("_") and "Error" not in name:
                monkeypatch.setattr(module, name, forbidden)
    for name in ("svd", "qr", "geqrf", "pca_lowrank", "svd_lowrank"):
        monkeypatch.setattr(torch, name, forbidden)
    with pytest.raises(AssertionError, match="decomposition"):
        torch.linalg.qr(torch.eye(2))
    for name in CORES:
        prep.attach(tiny.llama(), store, core=name)


def test_save_pretrained_of_an_adapted_model_warns(store, tmp_path):
    model = tiny.llama()
    prep.attach(model, store)
    with pytest.warns(UserWarning, match=r"use prep\.save, or prep\.merge"):
        model.save_pretrained(tmp_path)


def test_a_copied_model_has_a_coefficient_of_its_own(store):
    model = tiny.llama()
    randomize(prep.attach(model, store))
    full = logits(model)
    other = copy.deepcopy(model)
    vars(other)["_prep_adapter"].set_coeff(0.0)
    assert torch.equal(logits(model), full)
    prep.detach(other)
    assert torch.equal(logits(model), full)
    assert torch.equal(logits(other), logits(tiny.llama()))


@pytest.mark.parametrize("how", ["weight_norm", "spectral_norm", "old weight_norm", "sparse"])
def test_merging_is_all_or_nothing(store, how):
    """A later layer that cannot be merged leaves every layer as it was."""
    from torch.nn.utils import parametrizations

    model = tiny.llama()
    prep.attach(model, store, core="gain", verify=False)
    last = model.model.layers[-1].mlp.down_proj
    base = last.base_layer
    if how == "weight_norm":
        parametrizations.weight_norm(base)
    elif how == "spectral_norm":
        parametrizations.spectral_norm(base)
    elif how == "sparse":
        base.weight = nn.Parameter(base.weight.detach().to_sparse(), requires_grad=False)
    else:
        with pytest.warns(FutureWarning):
            nn.utils.weight_norm(base)
    before = {name: (id(module), id(getattr(module, "weight", None))) for name, module in model.named_modules()}
    if how in ("weight_norm", "spectral_norm"):  # their weight is made anew at every look
        before = {name: ids for name, ids in before.items() if "down_proj" not in name}
    with pytest.raises(prep.PrepError, match=r"down_proj.*, a .*Linear, "):
        prep.merge(model)
    after = {name: (id(module), id(getattr(module, "weight", None))) for name, module in model.named_modules()}
    assert {name: after[name] for name in before} == before
