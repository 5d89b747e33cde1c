"""Repairs of a quantised base: PEFT's start, an exported adapter, beside a core; against dense weights and LoftQ."""

import json

import pytest
import tiny
import torch
from peft import PeftModel
from peft.utils import loftq_utils
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

import prep
from prep.adapters.cores import CORES
from prep.adapters.drift import check_copy
from prep.errors import PrepError
from prep.linear import kept_packed, weight_matrix

bnb = pytest.importorskip("bitsandbytes")

RANK = 8
DOWN = "model.layers.1.mlp.down_proj"
FORMS = {
    "plain": {},
    "rslora": {"use_rslora": True, "rank_pattern": {"q_proj": 4, "down_proj": 7}, "alpha_pattern": {"up_proj": 3}},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A wide Llama in `model/` and its store, with repairs of nf4, int8 and of nf4 in the metric identity."""
    given = tiny.sources(tmp_path_factory.mktemp("repair"), tiny.wide(), sentences=200)
    given.store = given.path / "s.zarr"
    prep.covariance(given.model, given.data, store=given.store, num_sequences=60, seq_len=16, quiet=True)
    for recipe, metric in (("nf4", "full"), ("nf4", "identity"), ("int8", "full")):
        prep.decompose(given.store, repair=recipe, metric=metric, rank=RANK, quiet=True)
    prep.decompose(given.store, rank=RANK, quiet=True)
    return given


def dense(home, name="repair-nf4", ranks=None, repaired=True):
    """The saved model with the quantised weights, and their repair by the first directions, written out."""
    basis = prep.open_store(home.store).bases[name]
    net = AutoModelForCausalLM.from_pretrained(home.model).eval()
    packed = tiny.packed(home.model, basis.repair["name"])
    with torch.no_grad():
        for layer, one in basis.read().items():
            r = RANK if ranks is None else ranks(layer)
            Q = weight_matrix(packed.get_submodule(layer)).float()
            change = (one.U[:, :r].double() * one.S[:r]) @ one.P[:r].double()
            net.get_submodule(layer).weight.copy_(Q + change.float() if repaired else Q)
    return net


def logits(model):
    x = torch.randint(3, 60, (3, 10), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.eval()(x).logits.float()


def apart(one, other):
    return ((one - other).norm() / other.norm()).item()


def codes(net):
    return {name: p.detach().clone() for name, p in net.named_parameters() if type(p).__name__ == "Params4bit"}


def train(model, steps=4):
    """Losses of a few steps with Adam; in training mode bitsandbytes does not repack."""
    x, losses = torch.randint(3, 60, (4, 10), generator=torch.Generator().manual_seed(3)), []
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    model.train()
    for _ in range(steps):
        loss = model(input_ids=x, labels=x).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# PEFT


@pytest.mark.parametrize("form", FORMS)
def test_the_start_is_the_repaired_model_and_trains(home, form):
    """bitsandbytes' forward on some CPUs rounds scales to bfloat16: 0.3 % of the weights."""
    net = tiny.packed(home.model)
    before = codes(net)
    model = prep.peft.get_model(net, home.store, "repair", r=RANK, lora_alpha=5, **FORMS[form])
    pattern = FORMS[form].get("rank_pattern", {})
    wanted = dense(home, ranks=lambda layer: pattern.get(layer.rpartition(".")[2], RANK))
    model.train()
    with torch.no_grad():
        x = torch.randint(3, 60, (3, 10), generator=torch.Generator().manual_seed(1))
        start = model(x).logits
    assert apart(start, logits(wanted)) < 1e-4
    losses = train(model)
    assert losses[-1] < losses[0]
    assert all(torch.equal(value, before[name]) for name, value in codes(net).items() if name in before)
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())


def test_it_repairs(home):
    """Nearer to the unquantised model than the base, with nf4 and int8, in training and in evaluation."""
    right = logits(AutoModelForCausalLM.from_pretrained(home.model))
    for kind in ("nf4", "int8"):
        base = apart(logits(tiny.packed(home.model, kind)), right)
        model = prep.peft.get_model(tiny.packed(home.model, kind), home.store, "repair", r=RANK)
        assert apart(logits(model), right) < 0.95 * base, kind


def test_a_base_that_has_run_is_the_same_base(home):
    """A forward in evaluation repacks it and rounds its scales; neither that nor nested scales make it another one."""
    net = tiny.packed(home.model)
    logits(net)
    model = prep.peft.get_model(net, home.store, "repair", r=RANK)
    assert apart(logits(model), logits(dense(home))) < 2e-2
    prep.peft.get_model(tiny.packed(home.model, bnb_4bit_use_double_quant=True), home.store, "repair", r=RANK)


class _OnCPU(TorchFunctionMode):
    """PEFT's LoftQ computes on "cuda" whatever there is."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def here(value):
            return "cpu" if isinstance(value, str) and value == "cuda" else value

        return func(*map(here, args), **{key: here(value) for key, value in (kwargs or {}).items()})


def test_metric_identity_is_pefts_loftq(home):
    """One step of loftq_init: the same dequantised weight, and B A, from the same quantiser."""
    net = tiny.packed(home.model)
    weights = AutoModelForCausalLM.from_pretrained(home.model)
    model = prep.peft.get_model(net, home.store, "repair", r=RANK, lora_alpha=RANK, basis="repair-nf4-identity")
    layers = {name: m for name, m in model.named_modules() if hasattr(m, "lora_A")}
    assert len(layers) == 14
    for name, module in layers.items():
        W = weights.get_submodule(name.removeprefix("base_model.model.")).weight.detach()
        with _OnCPU():
            Q, A, B = loftq_utils.loftq_init(W, 4, RANK, num_iter=1)
        assert torch.equal(weight_matrix(module.get_base_layer()), Q)
        ours = module.lora_B["default"].weight @ module.lora_A["default"].weight
        assert apart(ours.detach(), B @ A) < 1e-5
        scale = [module.lora_A["default"].weight.norm().item(), module.lora_B["default"].weight.norm().item()]
        assert scale == pytest.approx([A.norm().item(), B.norm().item()], rel=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_saved_and_exported_adapters_load_with_plain_peft(home, tmp_path, form):
    model = prep.peft.get_model(tiny.packed(home.model), home.store, "repair", r=RANK, lora_alpha=5, **FORMS[form])
    train(model, 2)
    trained = logits(model)
    prep.peft.save(model, tmp_path / "adapter")
    assert apart(logits(model), trained) == 0  # saving leaves the base as it was
    loaded = PeftModel.from_pretrained(tiny.packed(home.model), tmp_path / "adapter")
    assert apart(logits(loaded), trained) < 1e-5
    with pytest.raises(PrepError, match="the base has no residual under this init"):
        prep.peft.save(model, tmp_path / "other", as_="residual")


def test_an_exported_repair_is_a_plain_adapter(home, tmp_path):
    path = prep.export(home.store, "peft-lora", tmp_path / "adapter", basis="repair-nf4", rank=RANK)
    config = json.loads((path / "adapter_config.json").read_text())
    assert (config["r"], config["init_lora_weights"], config["base_model_name_or_path"]) == (RANK, True, home.model)
    assert {len(A) for key, A in load_file(path / "adapter_model.safetensors").items() if "lora_A" in key} == {RANK}
    with safe_open(path / "adapter_model.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["prep"])["repair"] == {"source": "recipe", "name": "nf4"}
    on_dense = PeftModel.from_pretrained(dense(home, repaired=False), path)
    assert apart(logits(on_dense), logits(dense(home))) < 1e-5
    assert apart(logits(PeftModel.from_pretrained(tiny.packed(home.model), path)), logits(dense(home))) < 2e-2
    with pytest.raises(PrepError, match="repairs a quantised model and does not serve --to peft-corda"):
        prep.export(home.store, "peft-corda", tmp_path / "corda.pt", basis="repair-nf4", rank=RANK)


def test_dora_starts_as_the_repaired_model_where_peft_can_read_the_base(home):
    model = prep.peft.get_model(
        dense(home, repaired=False), home.store, "repair", basis="repair-nf4", r=RANK, use_dora=True
    )
    assert apart(logits(model), logits(dense(home))) < 1e-5
    for kind in ("nf4", "int8"):
        with pytest.raises(PrepError, match=r"is on a CPU, where PEFT does not find the norms that use_dora needs"):
            prep.peft.get_model(tiny.packed(home.model, kind), home.store, "repair", r=RANK, use_dora=True)


# Which base


OTHER = "has another quantised weight than its basis repairs .*: give the base that was decomposed with --repair"


def requantised(home):
    net = AutoModelForCausalLM.from_pretrained(home.model).bfloat16()
    return tiny.packed(tiny.save(net, home.path / "rounded"))


BASES = {
    "another quantiser": lambda home: tiny.packed(home.model, "fp4"),
    "another model": lambda home: tiny.packed(tiny.save(tiny.wide(1), home.path / "other")),
    "another rounding of the weights": requantised,
    "the model itself": lambda home: AutoModelForCausalLM.from_pretrained(home.model),
}


@pytest.mark.parametrize("base", BASES)
def test_other_bases_are_refused_by_name(home, base):
    net = BASES[base](home)
    with pytest.raises(PrepError, match=r"model.layers.0.self_attn.q_proj " + OTHER):
        prep.peft.get_model(net, home.store, "repair", r=RANK, basis="repair-nf4")
    with pytest.raises(PrepError, match=r"model.layers.0.self_attn.q_proj " + OTHER):
        prep.attach(net, home.store, basis="repair-nf4")
    prep.attach(net, home.store, basis="repair-nf4", verify=False)


def test_by_hash_alone_a_repacked_base_is_another_one(home):
    prep.attach(tiny.packed(home.model), home.store, basis="repair-nf4", verify="hash")
    net = tiny.packed(home.model, bnb_4bit_use_double_quant=True)
    with pytest.raises(PrepError, match=OTHER):
        prep.attach(net, home.store, basis="repair-nf4", verify="hash")


@pytest.mark.parametrize(
    ("init", "options", "said"),
    [
        ("whitened", {"basis": "repair-nf4"}, "'repair-nf4' does not serve init 'whitened': leave out basis="),
        ("repair", {"basis": "full"}, "basis 'full' does not serve init 'repair': name one made with --repair"),
        ("repair", {"r": 9}, r"holds 8 of .*: `prep decompose --repair nf4 --rank 9 --overwrite"),
    ],
)
def test_bases_of_another_sort_are_refused(home, init, options, said):
    with pytest.raises(PrepError, match=said):
        prep.peft.get_model(tiny.packed(home.model), home.store, init, **{"r": RANK} | options)


def test_the_usual_basis_is_that_of_the_model_s_quantisation(home):
    with pytest.raises(PrepError, match=r"no basis 'repair-fp4' .*: make it with `prep decompose --repair fp4"):
        prep.peft.get_model(tiny.packed(home.model, "fp4"), home.store, "repair", r=RANK)
    with pytest.raises(PrepError, match="the model does not say how it is quantised: name the basis"):
        prep.peft.get_model(AutoModelForCausalLM.from_pretrained(home.model), home.store, "repair", r=RANK)


class Sealed(nn.Module):
    """A layer that only its own forward can read."""

    def __init__(self, W):
        super().__init__()
        self.out_features, self.in_features = W.shape
        self.register_buffer("codes", W)

    def forward(self, x):
        return x.to(self.codes.dtype) @ self.codes.T


def test_a_weight_that_cannot_be_read_is_probed_by_its_forward(home):
    known = prep.open_store(home.store).bases["repair-nf4"].layers[DOWN].repaired
    Q = weight_matrix(tiny.packed(home.model).get_submodule(DOWN))
    for dtype in (torch.float32, torch.bfloat16):
        check_copy(DOWN, Sealed(Q.to(dtype)), known, True)
    with pytest.raises(PrepError, match=OTHER):
        check_copy(DOWN, Sealed(Q.roll(1, 0)), known, True)
    layer = Sealed(Q)
    layer.codes = torch.ones(3)
    with pytest.raises(PrepError, match=r"a Sealed, has a quantised weight that cannot be compared with"):
        check_copy(DOWN, layer, known, True)


# Cores


@pytest.mark.parametrize("core", CORES)
def test_every_core_stands_beside_the_repair(home, core):
    net = dense(home, repaired=False)
    adapter = prep.attach(net, home.store, core=core, basis="repair-nf4")
    if core != "ablation":
        assert apart(logits(net), logits(dense(home))) < 1e-5
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    changed = logits(net)
    assert apart(changed, logits(dense(home))) > 1e-4
    with adapter.coeff(0.0):
        assert apart(logits(net), logits(dense(home))) < 1e-5
    prep.merge(net)
    assert apart(logits(net), changed) < 1e-4
    prep.detach(net)
    assert apart(logits(net), logits(dense(home, repaired=False))) == 0


@pytest.mark.parametrize("embed", [True, False])
def test_saved_cores_load_onto_the_packed_base_only(home, tmp_path, embed):
    net, other = tiny.packed(home.model), tiny.packed(home.model)
    base, before = logits(other), codes(other)  # as a forward leaves them
    prep.attach(net, home.store, core="dense", basis="repair-nf4", rank=6)
    losses = train(net)
    assert losses[-1] < losses[0]
    trained = logits(net)
    with pytest.raises(PrepError, match="a Linear4bit, is quantised, sharded or sparse"):
        prep.merge(net)
    prep.save(net, tmp_path / "a.safetensors", embed_basis=embed)
    prep.detach(net)
    assert torch.equal(logits(net), base)
    assert all(torch.equal(value, before[name]) for name, value in codes(net).items())
    given = {} if embed else {"store": home.store}
    prep.load(net, tmp_path / "a.safetensors", **given)
    assert torch.equal(logits(net), trained)
    with pytest.raises(PrepError, match=OTHER):
        prep.load(tiny.packed(home.model, "fp4"), tmp_path / "a.safetensors", **given)
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["prep"])["format_version"] == 2


def test_a_state_dict_leaves_a_repacked_base_as_it_was(home):
    net = tiny.packed(home.model)
    before = logits(net)
    with kept_packed(net):
        net.state_dict()
    assert torch.equal(logits(net), before)
