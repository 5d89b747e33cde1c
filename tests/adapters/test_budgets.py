"""Adapters whose layers have different ranks, chosen under a budget or given: attach, save, merge, and PEFT."""

import json
import shutil

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from workers import logits, randomize

import prep
from prep.adapters.cores import CORES
from prep.store import open_store

BUDGET = "4k"


def parameters(ranks, bases):
    return sum(rank * sum(bases.layers[layer].shape) for layer, rank in ranks.items())


@pytest.mark.parametrize("embed", [True, False])
@pytest.mark.parametrize("core", CORES)
def test_a_budget_chooses_ranks_that_survive_saving_and_merging(store, tmp_path, core, embed):
    ranks, bases = prep.ranks(store, BUDGET), open_store(store).bases["full"]
    assert len(set(ranks.values())) > 2 and parameters(ranks, bases) <= 4000
    model, base = tiny.llama(), logits(tiny.llama())
    adapter = prep.attach(model, store, core=core, rank=BUDGET)
    assert {name: len(layer.P) for name, layer in adapter.layers.items()} == ranks
    assert core == "ablation" or torch.equal(logits(model), base)
    randomize(adapter)
    prep.save(model, tmp_path / "a.safetensors", embed_basis=embed)
    fresh = tiny.llama()
    loaded = prep.load(fresh, tmp_path / "a.safetensors", store=None if embed else store)
    assert {name: len(layer.P) for name, layer in loaded.layers.items()} == ranks
    assert torch.equal(logits(fresh), logits(model))
    prep.merge(model)
    torch.testing.assert_close(logits(model), logits(fresh), rtol=1e-3, atol=1e-3)
    prep.detach(model)
    assert torch.equal(logits(model), base)


def test_ranks_by_layer_are_those_of_the_layers_named(store):
    ranks = {"model.layers.1.mlp.up_proj": 3, "model.layers.0.mlp.up_proj": 7, "model.layers.0.self_attn.q_proj": 2}
    adapter = prep.attach(tiny.llama(), store, rank=ranks)
    assert {name: len(layer.P) for name, layer in adapter.layers.items()} == ranks
    adapter = prep.attach(tiny.llama(), store, rank=ranks, layers="mlp")
    assert {name: len(layer.P) for name, layer in adapter.layers.items()} == {
        name: rank for name, rank in ranks.items() if "mlp" in name
    }
    equal = prep.attach(tiny.llama(), store, rank=3).layers["model.layers.1.mlp.up_proj"]
    own = adapter.layers["model.layers.1.mlp.up_proj"]
    assert torch.equal(own.P, equal.P) and torch.equal(own.U, equal.U) and torch.equal(own.core.S, equal.core.S)


def test_a_budget_is_spent_on_the_layers_that_are_adapted(store):
    adapter = prep.attach(tiny.llama(), store, rank="2k", layers="self_attn")
    assert {name: len(layer.P) for name, layer in adapter.layers.items()} == prep.ranks(store, "2k", layers="self_attn")


def test_without_a_budget_what_directions_keep_is_not_read(store, tmp_path):
    path = shutil.copytree(store, tmp_path / "s")
    for array in path.glob("bases/full/*/kept"):
        shutil.rmtree(array)
    assert prep.attach(tiny.llama(), path, rank=8).trainable
    with pytest.raises(prep.StoreError, match="kept is missing"):
        prep.attach(tiny.llama(), path, rank=BUDGET)


# PEFT


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A store whose ranks are those of a tiny Llama, with the bases of two inits to rank 16."""
    given = tiny.sources(tmp_path_factory.mktemp("budgets"), sentences=200)
    prep.covariance(given.model, given.data, store=given.path / "s", **tiny.RUN)
    prep.decompose(given.path / "s", for_="whitened,corda_kpm", rank=16, quiet=True)
    return given


def adapted(model):
    """layer -> rank of A."""
    named = [(name.removeprefix("base_model.model."), module) for name, module in model.named_modules()]
    return {name: len(module.lora_A["default"].weight) for name, module in named if hasattr(module, "lora_A")}


def trained(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return logits(model.eval())


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize("init", ["whitened", "corda_kpm"])
def test_a_peft_model_under_a_budget(home, tmp_path, init, options):
    """Starts as the base although each layer has its own scaling; saved, it loads with PEFT alone in both forms."""
    basis = {"whitened": "full", "corda_kpm": "full-p1-bottom"}[init]
    ranks = prep.ranks(home.path / "s", "5k", basis=basis)
    model = prep.peft.get_model(load(home), home.path / "s", init, r="5k", lora_alpha=4, **options)
    assert adapted(model) == ranks and len(set(ranks.values())) > 2
    torch.testing.assert_close(logits(model.eval()), logits(load(home)), rtol=1e-3, atol=1e-3)
    wanted = trained(model)
    for as_ in ("lora", "residual"):
        prep.peft.save(model, tmp_path / as_, as_=as_)
    for as_, base in (("lora", load(home)), ("residual", load(home, tmp_path / "residual" / "base"))):
        one = PeftModel.from_pretrained(base, tmp_path / as_)
        torch.testing.assert_close(logits(one.eval()), wanted, rtol=1e-3, atol=1e-3)


def load(home, path=None):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path or home.model, dtype=torch.float32).eval()


def test_the_written_ranks_are_a_pattern_of_plain_peft(home, tmp_path):
    from click.testing import CliRunner

    from prep.cli import main

    asked = ["ranks", "--store", str(home.path / "s"), "--budget", "90%", "-o", str(tmp_path / "ranks.json")]
    done = CliRunner().invoke(main, asked)
    assert done.exit_code == 0, done.output
    ranks = json.loads((tmp_path / "ranks.json").read_text())
    assert ranks == prep.ranks(home.path / "s", "90%")
    model = get_peft_model(load(home), LoraConfig(rank_pattern=ranks, target_modules=list(ranks)))
    assert adapted(model) == ranks
    some = {"target_modules": ["q_proj", "up_proj"]}
    budgeted = prep.peft.get_model(load(home), home.path / "s", "whitened", r="90%", **some)
    assert adapted(budgeted) == prep.ranks(home.path / "s", "90%", layers="q_proj|up_proj")


def test_a_layer_whose_name_ends_another_one_has_its_own_rank(tmp_path):
    """PEFT takes the first key of a pattern that fits the end of a name."""
    net = torch.nn.ModuleDict({"fc": torch.nn.Linear(8, 8), "deep": torch.nn.ModuleDict({"fc": torch.nn.Linear(8, 8)})})
    with torch.no_grad():
        net["deep"]["fc"].weight.copy_(torch.diag(torch.tensor([9.0] + 7 * [0.01])))
    path = tiny.store(tmp_path / "s", net, rank=8)
    ranks = prep.ranks(path, 5 * 16)
    assert list(ranks) == ["deep.fc", "fc"] and ranks["deep.fc"] < ranks["fc"]
    assert adapted(get_peft_model(net, LoraConfig(rank_pattern=ranks, target_modules=["fc"]))) == ranks
