"""Weights that are packed or scaled: dequantised by the quantiser's own library wherever they are read, or refused."""

import copy

import numpy as np
import pytest
import tiny
import torch
from torch import nn

import prep
from prep import PrepError
from prep.linear import is_plain, weight_matrix
from prep.preprocess.model.experts import expert_layers

bnb = pytest.importorskip("bitsandbytes")


class Net(nn.Module):
    """Two layers, the first of them to be packed; both sizes are whole blocks of every quantiser."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 64, bias=False), nn.Linear(64, 32)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def net():
    torch.manual_seed(0)
    return Net().eval()


def nf4(model):
    weight = model.first.weight.data
    model.first = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    model.first.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    model.first.to("cpu")
    return bnb.functional.dequantize_4bit(model.first.weight.data, model.first.weight.quant_state).reshape(64, 64)


def int8(model):
    weight = model.first.weight.data
    model.first = bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
    model.first.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    model.first.to("cpu")
    dequantised = model.first.weight.data.float() * model.first.weight.SCB[:, None] / 127
    assert (dequantised - weight).norm() < 1e-2 * weight.norm()
    return dequantised


def fp8(model):
    """transformers' FP8Linear: blocks of (32, 32) with a scale each."""
    from transformers.integrations.finegrained_fp8 import FP8Linear

    weight, layer = model.first.weight.data, FP8Linear(64, 64, block_size=(32, 32))
    blocks = weight.unflatten(0, (2, 32)).unflatten(2, (2, 32))
    scales = blocks.abs().amax((1, 3)) / 448
    layer.weight = nn.Parameter(
        (blocks / scales[:, None, :, None]).flatten(2).flatten(0, 1).to(torch.float8_e4m3fn), False
    )
    layer.weight_scale_inv = nn.Parameter(scales, requires_grad=False)
    layer.forward = lambda x: x @ weight.T  # its kernels are for GPUs
    model.first = layer
    return layer.weight.float() * scales.repeat_interleave(32, 0).repeat_interleave(32, 1)


PACKED = {"nf4": nf4, "int8": int8, "fp8": fp8}


@pytest.mark.parametrize("kind", PACKED)
def test_a_weight_is_what_its_library_dequantises(kind):
    model = net()
    wanted = PACKED[kind](model)
    assert torch.equal(model.second.weight, weight_matrix(model.second))
    assert tiny.relative(weight_matrix(model.first), wanted.double().numpy()) < 1e-6
    if kind == "nf4":  # a forward repacks it, and rounds its scales
        model(torch.randn(3, 64))
        assert tiny.relative(weight_matrix(model.first), wanted.double().numpy()) < 4e-3


@pytest.mark.parametrize("kind", PACKED)
def test_bases_are_those_of_the_dequantised_weight(kind, tmp_path):
    model, draw = net(), torch.Generator().manual_seed(1)
    W = PACKED[kind](model).double().numpy()
    batches = [torch.randn(50, 64, generator=draw) for _ in range(3)]
    twin = copy.deepcopy(model)  # what a decomposition loads anew
    prep.covariance(model, batches=batches, store=tmp_path / "s", quiet=True)
    basis = prep.decompose(tmp_path / "s", model=twin, rank=8, quiet=True)["first"]
    X = torch.cat(batches).double().numpy()
    C = X.T @ X / len(X)
    factor = np.linalg.cholesky(C + 1e-3 * np.trace(C) / 64 * np.eye(64))
    wanted = np.linalg.svd(W @ factor, compute_uv=False)
    assert np.allclose(basis.spectrum, wanted, rtol=1e-5)


class Odd(nn.Linear):
    """A layer whose integers mean something that only its author knows."""

    def __init__(self):
        super().__init__(64, 64, bias=False)
        self.weight = nn.Parameter(torch.ones(64, 64, dtype=torch.int8), requires_grad=False)

    def forward(self, x):
        return x


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (Odd(), r"first: the weight of a Odd is packed or scaled \(Parameter, torch.int8\) and cannot be read"),
        (nn.Linear(64, 64, bias=False), r"first: the weight of a Linear is sparse and cannot be read"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(layer, said, tmp_path):
    model = net()
    if isinstance(layer, Odd):
        model.first = layer
    else:
        layer.weight = nn.Parameter(layer.weight.detach().to_sparse(), requires_grad=False)
        model.first = layer
    with pytest.raises(PrepError, match=said):
        prep.covariance(model, batches=[torch.randn(5, 64)], store=tmp_path / "s", quiet=True)
    assert not (tmp_path / "s").exists()
    store = prep.covariance(model, batches=[torch.randn(5, 64)], exclude=["first"], store=tmp_path / "s", quiet=True)
    assert list(store.moments) == ["second"]


@pytest.mark.parametrize("nested", [False, True])
def test_several_scales_a_row_keep_their_places(nested):
    """What some CPUs repack in the first forward is read as what the layer then computes with."""
    torch.manual_seed(0)
    plain = nn.Linear(128, 96, bias=False)
    layer = bnb.nn.Linear4bit(
        128, 96, bias=False, quant_type="nf4", compress_statistics=nested, compute_dtype=torch.float32
    )
    layer.load_state_dict(plain.state_dict())
    assert torch.equal(weight_matrix(layer), plain.weight)  # not quantised yet
    layer = layer.to("cpu").eval()
    before = weight_matrix(layer)
    with torch.no_grad():
        computed = layer(torch.eye(128)).T.double().numpy()
    assert tiny.relative(weight_matrix(layer), computed) < 4e-3
    assert tiny.relative(before, computed) < 4e-3


def test_int8_before_it_is_quantised():
    layer = bnb.nn.Linear8bitLt(64, 64, bias=False)
    assert torch.equal(weight_matrix(layer), layer.weight)


def scaled():
    layer = nn.Linear(64, 64, bias=False).bfloat16()
    layer.register_buffer("weight_scale", torch.full((64, 1), 2.0))
    return layer


def codes_in_floats():
    layer = nn.Linear(64, 64, bias=False)
    layer.weight = nn.Parameter(torch.zeros(64 * 64 // 8, 1), requires_grad=False)
    return layer


@pytest.mark.parametrize("made", [scaled, codes_in_floats])
def test_ordinary_numbers_that_are_not_the_weight_are_refused(made):
    with pytest.raises(PrepError, match=r"the weight of a Linear is packed or scaled .*--exclude"):
        weight_matrix(made())


def test_fp8_that_was_dequantised_on_loading_is_plain():
    model = net()
    fp8(model)
    model.first.weight = nn.Parameter(torch.randn(64, 64).bfloat16())
    assert is_plain(model.first) and torch.equal(weight_matrix(model.first), model.first.weight)


class Experts(nn.Module):
    """Fused experts with a scale of each beside them."""

    is_transposed, has_gate = False, True

    def __init__(self, dtype, scale):
        super().__init__()
        self.up_proj = nn.Parameter(torch.zeros(2, 6, 4).to(dtype), requires_grad=False)
        if scale:
            self.up_proj_scale_inv = nn.Parameter(torch.ones(2, 1, 1))


def test_packed_and_scaled_experts_are_left_out():
    assert len(expert_layers(Experts(torch.float32, False))) == 2
    for dtype, scale in ((torch.float8_e4m3fn, True), (torch.float8_e4m3fn, False), (torch.bfloat16, True)):
        assert expert_layers(Experts(dtype, scale)) == {}
