"""What attach refuses, by name and without touching the model: wrong arguments, other models, other weights."""

import pytest
import tiny
import torch
from torch import Tensor, nn
from workers import assert_same, logits, randomize, snapshot

import prep
from prep.adapters.cores import CORES


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"basis": "diagonal-bottom"}, "no basis"),
        ({"rank": 25}, "rank 25"),
        ({"rank": 0}, "rank 0"),
        ({"layers": "lm_head"}, "matches none"),
        ({"layers": "("}, "regular expression"),
        ({"core": "gian"}, "no core"),
        ({"core": "gain", "block": 4}, "no option"),
        ({"core": CORES["dplr"](), "k": 4}, "instance"),
        ({"core": "rotation", "rotate": "W"}, "both or none"),
    ],
)
def test_wrong_arguments_are_refused_and_leave_the_model_alone(store, arguments, message):
    model = tiny.llama()
    before = snapshot(model)
    with pytest.raises(prep.PrepError, match=message):
        prep.attach(model, store, **arguments)
    assert_same(before, snapshot(model))


def test_attach_is_all_or_nothing(store):
    model = tiny.llama()
    last = list(tiny.layers(model).values())[-1]
    last.weight.data += 1e-3
    before = snapshot(model)
    with pytest.raises(prep.PrepError, match=r"layers\.1\.mlp\.down_proj .*drift 0\."):
        prep.attach(model, store)
    assert_same(before, snapshot(model))
    prep.attach(model, store, verify=False)


def test_a_model_that_lacks_the_layers_is_refused(store):
    with pytest.raises(prep.PrepError, match="no layer"):
        prep.attach(nn.Sequential(nn.Linear(32, 32)), store)
    model = tiny.llama()
    model.model.layers[1].mlp.up_proj = nn.Linear(32, 40)
    with pytest.raises(prep.PrepError, match="40 x 32"):
        prep.attach(model, store)
    model.model.layers[1].mlp.up_proj = nn.Embedding(48, 32)
    with pytest.raises(prep.PrepError, match="Embedding"):
        prep.attach(model, store)
    with torch.device("meta"):
        model.model.layers[1].mlp.up_proj = nn.Linear(32, 48, bias=False)
    with pytest.raises(prep.PrepError, match="meta"):
        prep.attach(model, store)


def test_attaching_twice_is_refused(store):
    model = tiny.llama()
    prep.attach(model, store)
    with pytest.raises(prep.PrepError, match="already"):
        prep.attach(model, store)
    with pytest.raises(prep.PrepError, match="already"):
        prep.attach(nn.ModuleDict({"inner": model}), store)


def test_verification_across_dtypes(store, tmp_path):
    """Casts of the right weights pass by hash or probe, other weights of any dtype do not."""
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        prep.attach(tiny.llama(dtype=dtype), store)
        with pytest.raises(prep.PrepError, match=r"drift 1\d\d\.\d\d%"):
            prep.attach(tiny.llama(seed=1, dtype=dtype), store)
    with pytest.raises(prep.PrepError, match="drift 1"):
        prep.attach(tiny.llama(seed=1), store)
    low = tiny.store(tmp_path / "low.zarr", tiny.llama(dtype=torch.bfloat16), ("full", "eva"))
    nearly = tiny.llama(dtype=torch.bfloat16)
    weight = nearly.model.layers[1].self_attn.v_proj.weight.data
    weight[0, 0] += 0.01 * weight[0, 0]
    with pytest.raises(prep.PrepError, match=r"layers\.1\.self_attn\.v_proj .*drift 0\."):
        prep.attach(nearly, low)
    upcast = tiny.llama(dtype=torch.bfloat16).float()
    prep.attach(upcast, low)
    drifted = tiny.llama(dtype=torch.bfloat16).float()
    drifted.model.layers[0].mlp.up_proj.weight.data *= 1.1
    with pytest.raises(prep.PrepError, match=r"layers\.0\.mlp\.up_proj .*drift 1?\d\."):
        prep.attach(drifted, low)


def test_a_basis_of_components_is_verified_by_hash_only(store):
    prep.attach(tiny.llama(), store, basis="eva")
    with pytest.raises(prep.PrepError, match="another dtype"):
        prep.attach(tiny.llama(dtype=torch.bfloat16), store, basis="eva")


class Packed(nn.Module):
    """A linear layer that keeps int8 codes and no `weight`."""

    codes: Tensor
    scale: Tensor

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = None

    def forward(self, x):
        return x @ (self.codes * self.scale).T


def test_a_linear_like_layer_is_adapted_and_verified_through_its_forward(store):
    model, name = tiny.llama(), "model.layers.1.mlp.up_proj"
    model.model.layers[1].mlp.up_proj = Packed(model.get_submodule(name))
    base = logits(model)
    adapter = prep.attach(model, store, core="dplr")
    assert torch.equal(logits(model), base)
    randomize(adapter)
    assert not torch.equal(logits(model), base)
    with pytest.raises(prep.PrepError, match=f"{name}, a Packed, is quantised"):
        prep.merge(model)
    prep.detach(model)
    model.get_submodule(name).codes = model.get_submodule(name).codes.roll(1, 0)
    with pytest.raises(prep.PrepError, match=f"{name} has other weights"):
        prep.attach(model, store)


def test_the_weakest_directions_are_probed_in_half_precision():
    """The bottom of a float32 weight belongs to its bfloat16 copy, and to no other weight."""
    from prep.adapters.drift import check_weight

    torch.manual_seed(0)
    weak = torch.logspace(0, -4, 24)
    layer, other = torch.nn.Linear(40, 24, bias=False), torch.nn.Linear(40, 24, bias=False)
    for module in (layer, other):
        U, _, Vt = torch.linalg.svd(module.weight.detach(), full_matrices=False)
        module.weight.data = (U * weak) @ Vt
    U, S, Vt = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    bottom = U[:, -6:], S[-6:], Vt[-6:]
    check_weight("l", layer.bfloat16(), *bottom, ("", "float32"))
    with pytest.raises(prep.PrepError, match="other weights"):
        check_weight("l", other.bfloat16(), *bottom, ("", "float32"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_of_the_same_dtype_are_probed_where_they_are_not_hashed(dtype):
    """As on a GPU: the right weights pass without their hash, changed and other ones do not."""
    from prep.adapters.drift import check_weight

    torch.manual_seed(0)
    layer = torch.nn.Linear(40, 24, bias=False).to(getattr(torch, dtype))
    U, S, Vt = torch.linalg.svd(layer.weight.detach().float(), full_matrices=False)
    basis = U[:, :8], S[:8], Vt[:8]
    check_weight("l", layer, *basis, ("", dtype), hashed=False)
    with pytest.raises(prep.PrepError, match="other weights"):
        check_weight("l", layer, *basis, ("", dtype), hashed=True)
    layer.weight.data[3] *= 1.01
    with pytest.raises(prep.PrepError, match=r"other weights .*drift 0\.\d+%"):
        check_weight("l", layer, *basis, ("", dtype), hashed=False)


def test_verify_takes_true_false_and_hash(store):
    model = tiny.llama()
    with pytest.raises(prep.PrepError, match="verify='probe'"):
        prep.attach(model, store, verify="probe")
    prep.attach(model, store, verify="hash")
