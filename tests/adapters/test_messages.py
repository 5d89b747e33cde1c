"""What attach, load and save, and the PEFT starts and exports say when they refuse: one table of sentences per verb."""

import json
import sys
from pathlib import Path

import messages
import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import prep
from prep.adapters.cores import CORES, Core


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """`prep.zarr` with a basis of every method to rank 24, `start.zarr` for PEFT, adapters saved in several ways."""
    path = tmp_path_factory.mktemp("messages")
    net = tiny.llama()
    tiny.store(path / "prep.zarr", net, tuple(tiny.METHODS), rank=24)
    tiny.store(path / "other.zarr", net, shares=False)
    tiny.store(path / "bare" / "prep.zarr", net, ("identity",))
    tiny.store(path / "low" / "prep.zarr", net, rank=12)
    for name, core, embed in (
        ("gain", "gain", True),
        ("dplr", "dplr", True),
        ("own", Own, True),
        ("refers", "gain", 0),
    ):
        model = tiny.llama()
        prep.attach(model, path / "prep.zarr", core=core, rank=8)
        prep.save(model, path / f"{name}.safetensors", embed_basis=bool(embed))
    rewritten(path, "newer", lambda header, tensors: header.update(format_version=3))
    rewritten(path, "headless", lambda header, tensors: header.pop("format_version"))
    rewritten(path, "altered", lambda header, tensors: tensors.update(extra=torch.ones(1)))
    whole = (path / "gain.safetensors").read_bytes()
    (path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    save_file({"a": torch.ones(2)}, path / "stranger.safetensors")
    given = tiny.sources(path)
    prep.covariance(given.model, given.data, store=path / "start.zarr", **tiny.RUN)
    for init in ("pissa", "whitened", "corda_ipm", "eva"):
        prep.decompose(path / "start.zarr", for_=init, rank=16, quiet=True)
    prep.decompose(
        path / "copies.zarr", repair="int4", metric="identity", name="repair-int4", rank=4, model=given.model
    )
    (path / "there.safetensors").write_text("mine")
    return path


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


class Own(Core):
    """core(p) = s (p * S) * tanh(w)."""

    strength: float = 1.0

    def build(self, r):
        self.w = nn.Parameter(torch.zeros(r))

    def forward(self, p):
        return self.s * p * self.S * torch.tanh(self.strength * self.w)


class Other(Own):
    pass


def _rebuilt(self, r):
    self.v = nn.Parameter(torch.zeros(r, 2))


CHANGED = type("Own", (Core,), {"build": _rebuilt, "__annotations__": {"strength": float}, "strength": 1.0})
NARROW = type("Own", (Core,), {"build": _rebuilt})


def rewritten(path, name, change):
    """A copy of the saved gain with its header and tensors changed, the checksum left as it was."""
    with safe_open(path / "gain.safetensors", framework="pt") as file:
        header = json.loads(file.metadata()["prep"])
    tensors = load_file(path / "gain.safetensors")
    change(header, tensors)
    save_file(tensors, path / f"{name}.safetensors", metadata={"prep": json.dumps(header)})


def changed(change, net=None):
    """A tiny Llama after a change of its modules."""
    net = tiny.llama() if net is None else net
    change(net.model.layers[1].mlp)
    return net


def with_up(module):
    return changed(lambda mlp: setattr(mlp, "up_proj", module))


def shifted():
    return changed(lambda mlp: mlp.up_proj.weight.data.add_(1e-3))


def attach(net=None, store="prep.zarr", **options):
    return lambda: prep.attach(net() if net else tiny.llama(), store, **options)


def attached():
    net = tiny.llama()
    prep.attach(net, "prep.zarr", rank=8)
    return net


def merged():
    net = attached()
    prep.merge(net)
    return net


def scaled_while_merged():
    net = tiny.llama()
    adapter = prep.attach(net, "prep.zarr", rank=8)
    prep.merge(net)
    adapter.set_coeff(0.5)


def meta():
    with torch.device("meta"):
        return with_up(nn.Linear(32, 48, bias=False))


ATTACH = {
    "no such basis": (
        attach(basis="diagonal-bottom"),
        "the store has no basis 'diagonal-bottom' (it has: full, diagonal, identity, identity-activation, eva): "
        "make it with `prep decompose --metric diagonal --select bottom`",
    ),
    "a rank above the stored one": (
        attach(rank=25),
        "rank 25 asked for, basis 'full' holds 1 to 24: make it with `prep decompose --rank 25 --overwrite`",
    ),
    "rank 0": (
        attach(rank=0),
        "rank 0 asked for, basis 'full' holds 1 to 24: take one of these",
    ),
    "a negative rank": (
        attach(rank=-3),
        "rank -3 asked for, basis 'full' holds 1 to 24: take one of these",
    ),
    "a budget that is none": (
        attach(rank="lots"),
        "'lots' is not a budget: write parameters like 2M, or the share to keep like 95%",
    ),
    "a rank as text": (
        attach(rank="8"),
        "'8' is not a budget: write parameters like 2M, or the share to keep like 95%",
    ),
    "a budget below rank 1": (
        attach(rank="0.9k"),
        "a budget of 900 parameters is below rank 1 of the 14 layers, 928: ask for more",
    ),
    "a budget of a basis that does not say": (
        attach(store="other.zarr", rank="4k"),
        "basis 'full' does not say what its directions keep of the outputs: run `prep covariance --model X --data Y "
        "--store other.zarr`, then `prep decompose --rank 16 --overwrite --store other.zarr`",
    ),
    "a rank by layer above the stored one": (
        attach(rank={"model.layers.0.mlp.up_proj": 25}),
        "rank 25 of model.layers.0.mlp.up_proj asked for, basis 'full' holds 1 to 24: take one of these",
    ),
    "ranks of a layer that the basis lacks": (
        attach(rank={"lm_head": 4}),
        "basis 'full' does not hold the layer lm_head; `prep info` lists its layers",
    ),
    "ranks of other layers": (
        attach(rank={"model.layers.0.mlp.up_proj": 4}, layers="self_attn"),
        "rank= names no layer to adapt: give ranks by layer, as `prep ranks` writes them",
    ),
    "layers that match nothing": (
        attach(layers="lm_head"),
        "layers='lm_head' matches none of the basis, such as model.layers.0.self_attn.q_proj",
    ),
    "layers that are no expression": (attach(layers="("), "layers='(' is not a regular expression: ..."),
    "a misspelled core": (
        attach(core="gian"),
        "no core 'gian': choose from gain, rotation, ablation, dplr, arrow, dense, or give a Core of your own "
        "(did you mean 'gain'?)",
    ),
    "an option of another core": (
        attach(core="gain", block=4),
        "the core Gain has no option 'block' (it has: suppress_only=False)",
    ),
    "options beside an instance": (
        attach(core=CORES["dplr"](), k=4),
        "options belong to the instance: core=DPLR(k=...)",
    ),
    "a choice that a core does not have": (
        attach(core="rotation", rotate="W"),
        "Rotation(rotate='W'): choose V, U, both or none",
    ),
    "no store": (
        attach(store="none.zarr"),
        "no store at none.zarr: run `prep covariance --model X --data Y` first, or name one with --store",
    ),
    "other weights": (
        attach(shifted),
        "model.layers.1.mlp.up_proj has other weights than its basis was made from (drift ...%): give the model "
        "that was decomposed, or pass verify=False",
    ),
    "another model": (
        attach(lambda: nn.Sequential(nn.Linear(32, 32))),
        "the model has no layer model.layers.0.self_attn.q_proj, which the basis holds: give the model it was "
        "made from",
    ),
    "another shape": (
        attach(lambda: with_up(nn.Linear(32, 40))),
        "model.layers.1.mlp.up_proj is 40 x 32 in the model and 48 x 32 in the basis: give the model it was made from",
    ),
    "no linear layer": (
        attach(lambda: with_up(nn.Embedding(48, 32))),
        "model.layers.1.mlp.up_proj is a Embedding, not a linear layer: leave it out with layers=",
    ),
    "weights on the meta device": (
        attach(meta),
        "the weight of model.layers.0.self_attn.q_proj is not in memory (meta device): load or offload the model "
        "otherwise",
    ),
    "an adapted model": (attach(attached), "the model has an adapter already: call prep.detach(model) first"),
    "a module around an adapted model": (
        attach(lambda: nn.ModuleDict({"inner": attached()})),
        "the model has an adapter already: call prep.detach(model) first",
    ),
    "components and another dtype": (
        attach(lambda: tiny.llama(dtype=torch.bfloat16), basis="eva"),
        "model.layers.0.self_attn.q_proj has other weights than its basis was made from, or the same in another "
        "dtype than float32: give the model that was decomposed, or pass verify=False",
    ),
    "detach without an adapter": (
        lambda: prep.detach(tiny.llama()),
        "the model has no adapter: call prep.attach or prep.load first",
    ),
    "a coefficient that is not finite": (
        lambda: prep.attach(tiny.llama(), "prep.zarr").set_coeff(float("nan")),
        "the coefficient must be finite, not nan",
    ),
    "merge twice": (lambda: prep.merge(merged()), "the adapter is merged already"),
    "unmerge before merge": (lambda: prep.unmerge(attached()), "the adapter is not merged"),
    "another coefficient while merged": (
        scaled_while_merged,
        "the adapter is merged at its coefficient: call prep.unmerge(model) first",
    ),
}


@pytest.mark.parametrize("asked", ATTACH)
def test_attach(here, asked):
    messages.check(*ATTACH[asked])


def load(name, net=None, **options):
    return lambda: prep.load(net() if net else tiny.llama(), f"{name}.safetensors", **options)


SAVED = {
    "no file": (load("none"), "no adapter at none.safetensors: give the file that prep.save wrote"),
    "a file of somebody else": (
        load("stranger"),
        "stranger.safetensors was not written by prep.save: a Trainer's checkpoint is resumed by the Trainer",
    ),
    "a file cut short": (
        load("cut"),
        "cut.safetensors is truncated or not a safetensors file (...): restore it from a copy",
    ),
    "a file that was altered": (
        load("altered"),
        "altered.safetensors was altered or is damaged (its checksum does not match): restore it from a copy",
    ),
    "a file of a newer version": (
        load("newer"),
        "newer.safetensors has the format version 3, this prep-bases reads up to 2: upgrade prep-bases",
    ),
    "a file without its version": (
        load("headless"),
        "the metadata of headless.safetensors are not those of an adapter at format_version: restore it from a copy",
    ),
    "a core of one's own without its class": (
        load("own"),
        "own.safetensors holds the core Own, which is not a built-in one: pass its class, core=Own",
    ),
    "a core of one's own and another class": (load("own", core=Other), "own.safetensors holds the core Own, not Other"),
    "a core of one's own and a built-in class": (
        load("own", core=CORES["gain"]),
        "own.safetensors holds the core Own, not Gain",
    ),
    "a built-in core and another class": (
        load("dplr", core=CORES["gain"]),
        "dplr.safetensors holds the core dplr, not Gain",
    ),
    "a class with other parameters": (
        load("own", core=CHANGED),
        "model.layers.0.self_attn.q_proj: the core Own takes {'v': (8, 2)}, not {'w': (8,)}",
    ),
    "a class with fewer options": (load("own", core=NARROW), "the core Own has no option 'strength' (it has: none)"),
    "other weights": (
        load("gain", lambda: tiny.llama(seed=1)),
        "model.layers.0.self_attn.q_proj has other weights than its basis was made from (drift ...%): give the "
        "model that was decomposed, or pass verify=False",
    ),
    "another shape": (
        load("gain", lambda: with_up(nn.Linear(32, 40))),
        "model.layers.1.mlp.up_proj is 40 x 32 in the model and 48 x 32 in the basis: give the model it was made from",
    ),
    "an adapted model": (load("gain", attached), "the model has an adapter already: call prep.detach(model) first"),
    "a reference without its store": (
        load("refers"),
        "refers.safetensors refers to the basis 'full' of a store: pass it, store=PATH",
    ),
    "a reference and another store": (
        load("refers", store="other.zarr"),
        "refers.safetensors refers to another basis 'full' than the one in other.zarr, which has the id "
        "other.zarr-... and not prep.zarr-...",
    ),
    "a reference and another basis": (
        load("refers", store="low/prep.zarr"),
        "refers.safetensors refers to another basis 'full' than the one in low/prep.zarr",
    ),
    "a reference and no basis": (
        load("refers", store="bare/prep.zarr"),
        "the store has no basis 'full' (it has: identity): make it with `prep decompose --store bare/prep.zarr`",
    ),
    "save without an adapter": (
        lambda: prep.save(tiny.llama(), "a.safetensors"),
        "the model has no adapter: call prep.attach or prep.load first",
    ),
    "save into no directory": (
        lambda: prep.save(attached(), "missing/a.safetensors"),
        "cannot write missing/a.safetensors: ...",
    ),
}


@pytest.mark.parametrize("asked", SAVED)
def test_load_and_save(here, asked):
    messages.check(*SAVED[asked])


def start(init="whitened", net=None, store="start.zarr", **options):
    return lambda: prep.peft.get_model(net() if net else tiny.llama(), store, init, **{"r": 8, **options})


def one_weight_twice():
    def share(mlp):
        mlp.up_proj.weight = mlp.gate_proj.weight

    return changed(share)


def packed():
    return with_up(tiny.int8(tiny.llama().model.layers[1].mlp.up_proj))


def started(init="whitened"):
    return prep.peft.get_model(tiny.llama(), "start.zarr", init, r=8)


def started_and_merged():
    net = started()
    net.merge_adapter()
    return net


def without_peft():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "peft", None)
        start("pissa")()


PEFT = {
    "a misspelled init": (
        start("pisa"),
        "no init 'pisa': choose from pissa, milora, corda_ipm, corda_kpm, whitened, asvd, astra, "
        "lora_null, eva, mica, repair, lora (did you mean 'pissa'?)",
    ),
    "a rank above the stored one": (
        start(r=17),
        "rank 17 asked for, basis 'full' holds 16 of model.layers.0.self_attn.q_proj: `prep decompose --rank 17 "
        "--overwrite --store start.zarr`",
    ),
    "a rank above the layer's": (
        start(r=64),
        "rank 64 does not fit model.layers.0.self_attn.q_proj, which has 1 to 32: lower it or set rank_pattern",
    ),
    "a pattern above the stored rank": (
        start(r=4, rank_pattern={"k_proj": 17}),
        "rank 17 does not fit model.layers.0.self_attn.k_proj, which has 1 to 16: lower it or set rank_pattern",
    ),
    "a budget of a share that is not reached": (
        start(r="99.99%"),
        "all of basis 'full' keeps ...%, not 99.99%: ask for less, or make it anew with `prep decompose --rank 32 "
        "--overwrite --store start.zarr`",
    ),
    "a budget for eva": (
        start("eva", r="4k"),
        "r='4k' is a budget, and init 'eva' redistributes its ranks itself: give r as a number, or ranks as "
        "rank_pattern",
    ),
    "a budget without a basis": (
        start("lora", r="4k"),
        "r='4k' is a budget, and init 'lora' has no basis to choose ranks by: give r as a number, or ranks as "
        "rank_pattern",
    ),
    "a budget and a pattern": (
        start(r="4k", rank_pattern={"q_proj": 4}),
        "r='4k' chooses the rank of every layer: leave out rank_pattern",
    ),
    "more components than are stored": (
        start("eva", r=12),
        "rank 12 with rho 2 takes 24 components, basis 'eva' holds 16 of model.layers.0.self_attn.q_proj: `prep "
        "decompose --for eva --rank 24 --overwrite --store start.zarr`, or a smaller rho",
    ),
    "a target without a basis": (
        start(target_modules=["q_proj", "lm_head"]),
        "basis 'full' lacks 1 of the 3 targeted layers, such as lm_head: narrow target_modules, or calibrate "
        "them too (`prep covariance --targets`)",
    ),
    "a target that matches nothing": (
        start(target_modules=["qq_proj"]),
        "target_modules={'qq_proj'} matches no layer of the model, such as model.layers.0.self_attn.q_proj "
        "(did you mean 'q_proj'?)",
    ),
    "components for a basis": (
        start(basis="eva"),
        "basis 'eva' does not serve init 'whitened': leave out basis= to take 'full'",
    ),
    "a basis for components": (
        start("eva", basis="full"),
        "basis 'full' does not serve init 'eva': leave out basis= to take 'eva'",
    ),
    "no such basis": (
        start(basis="full-p2"),
        "the store has no basis 'full-p2' (it has: identity, full, full-p1, eva): make it with `prep decompose "
        "--power 2 --store start.zarr`",
    ),
    "no basis of the init": (
        start("corda_kpm"),
        "the store has no basis 'full-p1-bottom' (it has: identity, full, full-p1, eva): make it with `prep "
        "decompose --for corda_kpm --store start.zarr`",
    ),
    "init_lora_weights beside init": (
        start(init_lora_weights="pissa"),
        "init_lora_weights is chosen by init='whitened': leave it out",
    ),
    "alpha 0": (start(lora_alpha=0), "lora_alpha and alpha_pattern must be above 0"),
    "an alpha below 0": (start(alpha_pattern={"q_proj": -1}), "lora_alpha and alpha_pattern must be above 0"),
    "layers that are replicated": (
        start(layer_replication=[[0, 2], [0, 2]]),
        "layer_replication cannot be combined with init 'whitened': leave it out, or take init 'lora'",
    ),
    "invocation tokens": (
        start(alora_invocation_tokens=[1]),
        "alora_invocation_tokens cannot be combined with init 'whitened': leave it out, or take init 'lora'",
    ),
    "other weights": (
        start(net=shifted),
        "model.layers.1.mlp.up_proj has other weights than its basis was made from (drift ...%): give the model "
        "that was decomposed, or pass verify=False",
    ),
    "other weights under eva": (
        start("eva", net=shifted),
        "model.layers.1.mlp.up_proj has other weights than its basis was made from, or the same in another dtype "
        "than float32: give the model that was decomposed, or pass verify=False",
    ),
    "another shape": (
        start(net=lambda: tiny.llama(40)),
        "model.layers.0.mlp.gate_proj is 40 x 32 in the model and 48 x 32 in the basis: give the model it was "
        "made from",
    ),
    "a weight with two uses": (
        start(net=one_weight_twice, verify=False),
        "model.layers.1.mlp.gate_proj shares its weight with model.layers.1.mlp.up_proj.weight: leave it out of "
        "target_modules",
    ),
    "a basis of the weights for a repair": (
        start("repair", basis="full"),
        "basis 'full' does not serve init 'repair': name one made with --repair",
    ),
    "a repair for the weights": (
        start("pissa", store="copies.zarr", basis="repair-int4"),
        "basis 'repair-int4' does not serve init 'pissa': leave out basis= to take 'identity'",
    ),
    "a repair of a base that is not quantised": (
        start("repair", store="copies.zarr"),
        "the model does not say how it is quantised: name the basis that repairs it, basis=",
    ),
    "a repair of another base": (
        start("repair", store="copies.zarr", basis="repair-int4", r=4),
        "model.layers.0.self_attn.q_proj has another quantised weight than its basis repairs (they differ by ...% of "
        "that weight's error): give the base that was decomposed with --repair, decompose this one, or pass "
        "verify=False",
    ),
    "a model with PEFT adapters": (
        start(net=lambda: started("lora")),
        "the model has PEFT adapters already: give the base model",
    ),
    "a model with an adapter of prep": (
        start(net=attached),
        "the model has an adapter already: call prep.detach(model) first",
    ),
    "a quantised base": (
        start("pissa", net=packed),
        "model.layers.1.mlp.up_proj is quantised (Int8Params) and cannot keep the residual of init 'pissa': "
        "quantise the base that prep.peft.save(..., as_='residual') writes, or take init 'repair' or "
        "'eva'",
    ),
    "no PEFT": (without_peft, 'PEFT is not installed: pip install "prep-bases[peft]"'),
    "save in no form that there is": (
        lambda: prep.peft.save(started(), "a", as_="full"),
        "no form as_='full': choose from lora, residual",
    ),
    "save what is no PEFT model": (
        lambda: prep.peft.save(tiny.llama(), "a"),
        "this is not a PEFT model: give the one that prep.peft.get_model returned",
    ),
    "save a merged model": (
        lambda: prep.peft.save(started_and_merged(), "a"),
        "the adapter is merged into the base: call model.unmerge_adapter() before saving",
    ),
    "a split of nothing": (
        start(init="mica", split="A"),
        "init 'mica' has no S to share between A and B: leave out split",
    ),
    "a split that there is not": (start(init="pissa", split="both"), "no split 'both': choose from even, A, B"),
    "save eva as a residual": (
        lambda: prep.peft.save(started("eva"), "a", as_="residual"),
        "the base has no residual under this init: save with as_='lora'",
    ),
}


@pytest.mark.parametrize("asked", PEFT)
def test_peft_start(here, asked):
    messages.check(*PEFT[asked])


def export(to, target="out", store="start.zarr", **options):
    return lambda: prep.export(store, to, Path(target), **options)


EXPORT = {
    "a form that there is not": (
        export("onnx"),
        "nothing is called --to 'onnx': choose from peft-corda, peft-corda-covariance, peft-eva, peft-lora, "
        "safetensors, imatrix, hessian",
    ),
    "no rank": (export("peft-corda"), "--to peft-corda needs a --rank: the r of the LoraConfig that will read it"),
    "a rank above the stored one": (
        export("peft-corda", rank=17),
        "rank 17 asked for, basis 'full-p1' holds 16 of model.layers.0.self_attn.q_proj: `prep decompose --for "
        "corda_ipm --rank 17 --overwrite --store start.zarr`",
    ),
    "components for CorDA": (
        export("peft-corda", rank=4, basis="eva"),
        "basis 'eva' does not serve --to peft-corda: take 'full-p1'",
    ),
    "a basis for EVA": (
        export("peft-eva", rank=4, basis="full"),
        "basis 'full' does not serve --to peft-eva: take 'eva'",
    ),
    "no such basis": (
        export("peft-lora", rank=4, basis="full-p3"),
        "the store has no basis 'full-p3' (it has: identity, full, full-p1, eva): make it with `prep decompose "
        "--power 3 --store start.zarr`",
    ),
    "a file that is there": (
        export("safetensors", "there.safetensors", basis="full"),
        "there.safetensors is there already: name another path, or replace a safetensors with --overwrite",
    ),
    "a directory that is there": (
        export("safetensors", "bare", basis="full", overwrite=True),
        "bare is there already: name another path, or replace a safetensors with --overwrite",
    ),
    "a repair for CorDA": (
        export("peft-corda", store="copies.zarr", rank=4, basis="repair-int4"),
        "basis 'repair-int4' repairs a quantised model and does not serve --to peft-corda: take peft-lora",
    ),
    "no moments": (
        export("peft-corda-covariance", store="prep.zarr"),
        "prep.zarr holds no moments: run `prep covariance --model X --data Y` first",
    ),
}


@pytest.mark.parametrize("asked", EXPORT)
def test_export(here, asked):
    messages.check(*EXPORT[asked])
