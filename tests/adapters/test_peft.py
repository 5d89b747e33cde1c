"""PEFT initialisations and exports from a store, against PEFT's own ways and float64 NumPy."""

import json
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
import tiny
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_eva_state_dict, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.utils.incremental_pca import IncrementalPCA
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import prep
from prep.adapters.peft.inits import INITS, KEPT
from prep.errors import PrepError
from prep.preprocess.numerics.methods import PUBLISHED
from prep.store import SiteData, open_store
from prep.store.format.schema import panels

RANK = 8
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OF_WEIGHTS = [init for init in INITS if init != "repair"]  # which is of quantised bases: test_repair.py
RESIDUAL = [init for init in INITS if init not in KEPT]
FORMS = {
    "plain": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True, "rank_pattern": {"q_proj": 4, "down_proj": 7}, "alpha_pattern": {"up_proj": 3}},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A tiny Llama in `model/`, its calibration in `prep.zarr`, with the basis of every init to rank 16."""
    given = tiny.sources(tmp_path_factory.mktemp("peft"), sentences=200)
    home, run = given.path, {"num_sequences": 60, "seq_len": 16, "batch_size": 60, "quiet": True}
    prep.covariance(given.model, given.data, store=home / "prep.zarr", **run)
    for init in OF_WEIGHTS:
        if init != "lora":
            prep.decompose(home / "prep.zarr", for_=init, rank=RANK if init == "lora_null" else 16, quiet=True)
    return home


@pytest.fixture(scope="module")
def store(home):
    return home / "prep.zarr"


def load(home, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(home / "model", dtype=dtype).eval()


def tokens(rows=3, seed=1):
    return torch.randint(3, 60, (rows, 10), generator=torch.Generator().manual_seed(seed))


def logits(model):
    with torch.no_grad():
        return model.eval()(tokens()).logits.float()


def apart(one, other):
    return ((one - other).norm() / other.norm()).item()


def adapted(model, adapter="default"):
    """layer -> (B A scaling, base weight) in float64."""
    layers = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            A, B = module.lora_A[adapter].weight.double(), module.lora_B[adapter].weight.double()
            W = torch.from_numpy(tiny.weight(module.get_base_layer()))
            layers[name.removeprefix("base_model.model.")] = (B @ A * module.scaling[adapter]).detach(), W
    return layers


def batches(home):
    """The tokens that the store was calibrated on, as they come from its corpus: 60 sequences of 16."""
    from prep.preprocess.corpus.text import CorpusOptions, load_corpus

    fields = {
        key: value for key, value in open_store(home / "prep.zarr").corpus.items() if key not in ("tokens", "hash")
    }
    corpus = load_corpus(CorpusOptions(**fields), tiny.tokenizer())
    return list(corpus.batches(60))


def train(model, steps=3, rate=1e-2):
    """Losses of a few steps of SGD."""
    x, losses = tokens(4, seed=3), []
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(steps):
        loss = model(input_ids=x, labels=x).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# The start


def test_the_default_bases_are_those_of_the_published_methods():
    from prep.preprocess.numerics.methods import basis_name

    for init in OF_WEIGHTS:
        assert init == "lora" or basis_name(PUBLISHED[init]) == INITS[init]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("init", OF_WEIGHTS)
def test_the_start_is_the_base_model(home, store, init, form):
    if (init, form) in {("lora_null", "rslora"), ("mica", "dora")}:
        pytest.skip("refused: ranks of its own, and PEFT's DoRA beside a frozen B")
    model = load(home)
    base = logits(model)
    model = prep.peft.get_model(model, store, init, r=RANK, lora_alpha=5, **FORMS[form])
    assert apart(logits(model), base) < 1e-5
    trained = train(model.train(), 2, rate=0.1)
    assert trained[1] < trained[0]


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("init", RESIDUAL)
def test_in_bfloat16_the_residual_is_rounded_once(home, store, init, autocast):
    model = load(home, torch.bfloat16)
    before = {name: tiny.weight(module) for name, module in model.named_modules() if tiny.is_linear(module)}
    model = prep.peft.get_model(model, store, init, r=RANK, verify=False, autocast_adapter_dtype=autocast)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32 if autocast else torch.bfloat16}
    for layer, (change, residual) in adapted(model).items():
        exact = torch.from_numpy(before[layer]) - change
        allowed = 2.0**-8 * exact.abs() + 1e-6 * exact.abs().max()
        assert ((residual - exact).abs() <= allowed).all(), layer


def test_in_bfloat16_dora_starts_with_the_norms_of_the_base(home, store):
    """As its forward computes them in float32; norms rounded to bfloat16 are 2e-3 off."""
    model = prep.peft.get_model(load(home, torch.bfloat16), store, "whitened", r=RANK, verify=False, use_dora=True)
    for layer, (change, residual) in adapted(model).items():
        magnitude = model.get_submodule(f"base_model.model.{layer}").lora_magnitude_vector["default"].weight
        assert tiny.relative(magnitude.detach(), (residual + change).norm(dim=1).numpy()) < 1e-6


def test_pissa_equals_pefts(home, store):
    ours = prep.peft.get_model(load(home), store, "pissa", r=RANK, lora_alpha=3)
    config = LoraConfig(r=RANK, lora_alpha=3, init_lora_weights="pissa", target_modules="all-linear")
    theirs = adapted(get_peft_model(load(home), config))
    assert theirs.keys() == adapted(ours).keys()
    for layer, (change, residual) in adapted(ours).items():
        assert apart(change, theirs[layer][0]) < 1e-5
        assert apart(residual, theirs[layer][1]) < 1e-5


def test_every_residual_init_is_the_svd_of_its_metric(home, store):
    """B A = U_r U_r^T W, U from NumPy's SVD of W M."""
    seen = tiny.Activations(load(home), batches(home))
    weights = {name: tiny.weight(module) for name, module in load(home).named_modules() if tiny.is_linear(module)}
    for init in RESIDUAL:
        method = PUBLISHED[init]
        if method.metric == "null":  # see test_inits.py
            continue
        changes = adapted(prep.peft.get_model(load(home), store, init, r=RANK, lora_alpha=RANK))
        for layer, (change, _) in changes.items():
            W, C = weights[layer], seen[layer].T @ seen[layer] / len(seen[layer])
            C = C + method.damping * np.diag(C).mean() * np.eye(len(C))
            M = {"identity": np.eye(len(C)), "diagonal": np.diag(np.diag(C) ** method.power)}.get(method.metric)
            if M is None:
                values, vectors = np.linalg.eigh(C)
                M = (vectors * values**method.power) @ vectors.T
            U = np.linalg.svd(W @ M, full_matrices=False)[0]
            U = U[:, :RANK] if method.select == "top" else U[:, -RANK:]
            assert tiny.relative(change, U @ U.T @ W) < 1e-4, (init, layer)


def test_conv1d_layers_and_biases(tmp_path):
    model = tiny.model("GPT-2")
    path = tiny.save(model, tmp_path / "gpt2")
    prep.decompose(tmp_path / "s.zarr", for_="pissa", rank=RANK, model=path, quiet=True)
    base = logits(model)
    peft = prep.peft.get_model(model, tmp_path / "s.zarr", "pissa", r=RANK, use_dora=True, fan_in_fan_out=True)
    assert apart(logits(peft), base) < 1e-5
    assert set(adapted(peft)) == set(open_store(tmp_path / "s.zarr").bases["identity"])


# CorDA


def corda_config(model, **files):
    """PEFT's configuration; its CorDA does not resolve `all-linear`."""
    names = [name for name, module in model.named_modules() if tiny.is_linear(module) and name != "lm_head"]
    corda = CordaConfig(**{key: str(value) for key, value in files.items()})
    return LoraConfig(r=RANK, lora_alpha=3, init_lora_weights="corda", target_modules=names, corda_config=corda)


@pytest.fixture(scope="module")
def corda(home):
    """A directory with PEFT's covariance file, its SVD cache, and `peft.zarr`, a store that holds that covariance."""
    place = home / "corda"
    model, (batch,) = load(home), batches(home)
    config = corda_config(model, covariance_file=place / "covariance.pt", cache_file=place / "cache.pt")
    preprocess_corda(model, config, run_model=lambda: [model(ids[None]) for ids in batch["input_ids"]])
    shutil.copytree(home / "prep.zarr", place / "peft.zarr")
    store = open_store(place / "peft.zarr", "r+")
    bases, sites = store.bases["full"].layers, {}
    for layer, C in torch.load(place / "covariance.pt").items():
        record = bases[layer]
        member = {"shape": list(record.shape), "weight_hash": record.weight_hash, "weight_dtype": record.weight_dtype}
        blocks = [C[a:b, :b] for a, b in panels(len(C))]
        sites[layer] = SiteData("full", {layer: member}, batch["input_ids"].numel(), torch.zeros(len(C)), blocks)
    tiny.write_moments(store.root, sites)
    for init in ("corda_ipm", "corda_kpm"):
        prep.decompose(place / "peft.zarr", for_=init, damping=0.01, rank=16, overwrite=True, quiet=True)
    return place


def pefts_corda(home, **files):
    """PEFT's model from a file of its own or of ours."""
    model = load(home)
    config = corda_config(model, **files)
    preprocess_corda(model, config)
    return get_peft_model(model, config)


def largest_angle(one, other, layer):
    """Sine of the largest principal angle between the spaces of two B."""
    layer = f"base_model.model.{layer}"
    Q, R = (np.linalg.qr(m.get_submodule(layer).lora_B["default"].weight.detach().double())[0] for m in (one, other))
    return np.linalg.norm(Q - R @ (R.T @ Q), 2)


def test_corda_on_pefts_covariance_is_pefts_corda(home, corda):
    """The same spaces, the same training, from get_model and from the exported cache."""
    theirs = pefts_corda(home, cache_file=corda / "cache.pt")
    ours = prep.peft.get_model(load(home), corda / "peft.zarr", "corda_ipm", r=RANK, lora_alpha=3)
    prep.export(corda / "peft.zarr", "peft-corda", corda / "ours.pt", rank=RANK)
    exported = pefts_corda(home, cache_file=corda / "ours.pt")
    for layer in adapted(theirs):
        assert largest_angle(ours, theirs, layer) < 1e-3
        assert largest_angle(exported, theirs, layer) < 1e-3
    losses = train(theirs, 20)
    assert losses[-1] < losses[0] - 0.1
    np.testing.assert_allclose(train(ours, 20), losses, rtol=1e-4)
    np.testing.assert_allclose(train(exported, 20), losses, rtol=1e-4)


def test_compat_calibrates_as_peft_does(home, corda, tmp_path):
    """`--compat peft-corda`: PEFT's covariance, its spaces and its training, from our own pass in batches of 8."""
    data = str(home / "text.jsonl")
    options = {"num_sequences": 60, "seq_len": 16, "batch_size": 8, "compat": "peft-corda", "quiet": True}
    store = prep.covariance(str(home / "model"), data, store=tmp_path / "c.zarr", **options)
    for layer, C in torch.load(corda / "covariance.pt").items():
        assert apart(store.moments[layer].second_moment, C.double()) < 1e-5
        assert store.moments[layer].count == 60
    prep.decompose(tmp_path / "c.zarr", for_="corda_ipm", damping=0.01, rank=16, quiet=True)
    theirs = pefts_corda(home, cache_file=corda / "cache.pt")
    ours = prep.peft.get_model(load(home), tmp_path / "c.zarr", "corda_ipm", r=RANK, lora_alpha=3)
    for layer in adapted(theirs):
        assert largest_angle(ours, theirs, layer) < 1e-3
    np.testing.assert_allclose(train(ours, 20), train(theirs, 20), rtol=1e-4)


@pytest.mark.parametrize("init", ["corda_ipm", "corda_kpm"])
def test_an_exported_cache_is_what_get_model_starts_from(home, store, tmp_path, init):
    prep.export(store, "peft-corda", tmp_path / "cache.pt", basis=INITS[init], rank=RANK)
    theirs = pefts_corda(home, cache_file=tmp_path / "cache.pt")
    ours = prep.peft.get_model(load(home), store, init, r=RANK, lora_alpha=3)
    one, other = ours.state_dict(), theirs.state_dict()
    assert one.keys() == other.keys()
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], rtol=1e-4, atol=1e-6 * value.abs().max().item())


def test_an_exported_covariance_gives_pefts_own_corda(home, store, tmp_path):
    prep.export(store, "peft-corda-covariance", tmp_path / "c.pt")
    written = torch.load(tmp_path / "c.pt")
    seen = tiny.Activations(load(home), batches(home))
    assert set(written) == set(open_store(store).moments)
    for layer, C in written.items():
        assert tiny.relative(C, seen[layer].T @ seen[layer] / len(seen[layer])) < 1e-6
    theirs = pefts_corda(home, covariance_file=tmp_path / "c.pt")
    prep.decompose(store, for_="corda_ipm", damping=0.01, rank=16, name="damped", quiet=True)
    ours = prep.peft.get_model(load(home), store, "corda_ipm", r=RANK, lora_alpha=3, basis="damped")
    for layer in adapted(theirs):
        assert largest_angle(ours, theirs, layer) < 1e-3


def test_whitened_has_at_most_the_output_error_of_pefts_corda(home, store, corda):
    """E||(W - W_r) x||^2 over the calibration tokens."""
    seen = tiny.Activations(load(home), batches(home))
    ours = adapted(prep.peft.get_model(load(home), store, "whitened", r=RANK))
    theirs = adapted(pefts_corda(home, cache_file=corda / "cache.pt"))
    for layer, (_, residual) in ours.items():
        error, other = (np.linalg.norm(seen[layer] @ W.numpy().T) for W in (residual, theirs[layer][1]))
        assert error <= other * (1 + 1e-5), layer


# EVA


def rows_of(model, layer):
    """A (rank, d_in) of a layer."""
    return model.get_submodule(f"base_model.model.{layer}").lora_A["default"].weight.detach()


def test_eva_components_are_those_of_incremental_pca(home, store):
    """Fed all tokens once with 2r components; the first r/2 agree."""
    seen = tiny.Activations(load(home), batches(home))
    model = prep.peft.get_model(load(home), store, "eva", r=RANK, eva_config=EvaConfig(rho=1.0))
    for layer in adapted(model):
        A = rows_of(model, layer)
        pca = IncrementalPCA(n_components=2 * RANK, copy=True, lowrank=True, lowrank_seed=42)
        pca.partial_fit(torch.from_numpy(seen[layer]).float())
        cosine = nn.functional.cosine_similarity(A, pca.components_[: len(A)])
        assert len(A) == RANK
        assert cosine[: RANK // 2].min() > 0.999, layer


@pytest.mark.parametrize("pattern", [{}, {"o_proj": 4, "gate_proj": 6, "v_proj": 2}, {"q_proj": 1, "k_proj": 1}])
def test_eva_redistributes_ranks_as_peft_does(home, store, pattern):
    (batch,) = batches(home)
    config = {"r": 4, "lora_alpha": 4, "rank_pattern": pattern, "target_modules": "all-linear"}
    theirs = get_peft_model(load(home), LoraConfig(**config, init_lora_weights="eva", eva_config=EvaConfig(tau=0.9)))
    components = get_eva_state_dict(theirs, [batch], show_progress_bar=False)
    wanted = {name.removeprefix("base_model.model."): len(rows) for name, rows in components.items()}
    ours = prep.peft.get_model(load(home), store, "eva", **config)
    ranks = {layer: len(rows_of(ours, layer)) for layer in adapted(ours)}
    assert len(set(ranks.values())) > 2
    for site in open_store(store).moments.sites.values():  # which of equal inputs gets one more is arbitrary
        assert sorted(ranks.get(x, 0) for x in site) == sorted(wanted[x] for x in site)


def test_in_bfloat16_eva_trains_in_float32_whatever_its_ranks(home, store):
    model = prep.peft.get_model(load(home, torch.bfloat16), store, "eva", r=RANK, verify=False)
    assert len({module.r["default"] for module in model.modules() if hasattr(module, "lora_A")}) > 1
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}


def test_an_exported_eva_dictionary_is_taken_without_a_warning(home, store, tmp_path):
    prep.export(store, "peft-eva", tmp_path / "eva.safetensors", rank=4)
    config = LoraConfig(r=4, lora_alpha=4, init_lora_weights="eva", eva_config=EvaConfig(), target_modules="all-linear")
    theirs = get_peft_model(load(home), config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        initialize_lora_eva_weights(theirs, eva_state_dict=load_file(tmp_path / "eva.safetensors"))
    ours = prep.peft.get_model(load(home), store, "eva", r=4, lora_alpha=4, target_modules="all-linear")
    one, other = ours.state_dict(), theirs.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_eva_whitening_divides_by_the_root_of_the_singular_values(home, store):
    seen = tiny.Activations(load(home), batches(home))
    model = prep.peft.get_model(load(home), store, "eva", r=4, eva_config=EvaConfig(rho=1.0, whiten=True))
    layer = "model.layers.1.mlp.down_proj"
    A = rows_of(model, layer)
    values = np.linalg.svd(seen[layer] - seen[layer].mean(0), compute_uv=False)
    np.testing.assert_allclose(A.norm(dim=1), values[:4] ** -0.5, rtol=1e-4)


# Layers, ranks and scalings


@pytest.mark.parametrize(
    "choice",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
        {"target_modules": r".*\.(k|up)_proj"},
        {"target_modules": "all-linear", "exclude_modules": ["o_proj"]},
        {"exclude_modules": r".*layers\.0.*"},
        {"layers_to_transform": 0},
        {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
def test_layers_are_chosen_as_by_peft(home, store, choice):
    ours = prep.peft.get_model(load(home), store, "whitened", r=RANK, **choice)
    theirs = get_peft_model(load(home), LoraConfig(**{"target_modules": LINEAR, **choice}))
    assert set(adapted(ours)) == set(adapted(theirs)) != set()


def test_ranks_and_scalings_are_pefts(home, store):
    form = FORMS["rslora"]
    ours = prep.peft.get_model(load(home), store, "whitened", r=RANK, lora_alpha=5, **form)
    theirs = get_peft_model(load(home), LoraConfig(r=RANK, lora_alpha=5, target_modules="all-linear", **form))
    for name, module in theirs.named_modules():
        if hasattr(module, "lora_A"):
            assert ours.get_submodule(name).r == module.r
            assert ours.get_submodule(name).scaling == module.scaling


# Saving


LOADER = """
import sys, json
sys.modules["prep"] = None
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
tokens = torch.load(sys.argv[1] + "/tokens.pt")
for base, path in json.loads(sys.argv[2]):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), path).eval()
    with torch.no_grad():
        torch.save(model(tokens).logits, path + "/logits.pt")
"""


def test_saved_adapters_load_with_plain_peft(home, store, tmp_path):
    wanted, jobs = {}, []
    for init in ("whitened", "pissa", "eva"):
        for form, options in FORMS.items():
            model = prep.peft.get_model(load(home), store, init, r=RANK, lora_alpha=5, task_type="CAUSAL_LM", **options)
            train(model)
            for as_ in ("lora",) if init == "eva" else ("lora", "residual"):
                path = tmp_path / f"{init}-{form}-{as_}"
                prep.peft.save(model, path, as_=as_)
                jobs.append((str(path / "base" if as_ == "residual" else home / "model"), str(path)))
                wanted[path] = logits(model)
            assert not torch.equal(logits(model), logits(load(home)))
    torch.save(tokens(), tmp_path / "tokens.pt")
    done = subprocess.run(
        [sys.executable, "-c", LOADER, str(tmp_path), json.dumps(jobs)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for path, expected in wanted.items():
        assert apart(torch.load(path / "logits.pt"), expected) < 1e-5, path.name


def test_what_save_writes(home, store, tmp_path):
    """Rank 2r with the scaling kept, and a model that can go on training as if nothing had been saved."""
    model = prep.peft.get_model(load(home), store, "whitened", r=RANK, lora_alpha=4)
    before = dict(vars(model.peft_config["default"]))
    prep.peft.save(model, tmp_path / "a")
    assert vars(model.peft_config["default"]) == before
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (2 * RANK, 8, True)
    assert isinstance(config["lora_alpha"], int)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    prep.export(store, "peft-lora", tmp_path / "b", rank=RANK, lora_alpha=4)
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_extra_trained_modules_and_biases_are_saved(home, store, tmp_path):
    model = prep.peft.get_model(load(home), store, "whitened", r=RANK, modules_to_save=["lm_head"], bias="all")
    train(model, rate=0.1)
    for as_, base in (("lora", home / "model"), ("residual", tmp_path / "residual" / "base")):
        prep.peft.save(model, tmp_path / as_, as_=as_)
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / as_)
        assert apart(logits(loaded), logits(model)) < 1e-5
    assert set(load_file(tmp_path / "residual" / "base" / "model.safetensors")) == set(
        load_file(home / "model" / "model.safetensors")
    )


def test_a_plain_save_is_refused_by_peft_and_can_be_rescued(home, store, tmp_path):
    """A Trainer's checkpoint is such a save: it resumes on the model of the same get_model, and only there."""
    options = {"init": "whitened", "r": RANK, "use_dora": True}
    model = prep.peft.get_model(load(home), store, **options)
    train(model)
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"not written by prep\.peft\.save"):
        PeftModel.from_pretrained(load(home), tmp_path / "plain")
    again = prep.peft.get_model(load(home), store, **options)
    again.load_adapter(tmp_path / "plain", "default")
    assert torch.equal(logits(again), logits(model))
    prep.peft.save(again, tmp_path / "saved")
    assert apart(logits(PeftModel.from_pretrained(load(home), tmp_path / "saved")), logits(model)) < 1e-5


# Other exports


@pytest.mark.parametrize(("basis", "width"), [("identity", 2 * RANK), ("full-p1-bottom", 2 * RANK), ("eva", None)])
def test_an_exported_adapter_starts_as_the_base_and_trains(home, store, tmp_path, basis, width):
    prep.export(store, "peft-lora", tmp_path / "lora", basis=basis, rank=RANK)
    model = PeftModel.from_pretrained(load(home), tmp_path / "lora", is_trainable=True)
    assert type(model).__name__ == "PeftModelForCausalLM"
    assert apart(logits(model), logits(load(home))) < 1e-5
    ranks = {len(module.lora_A["default"].weight) for module in model.modules() if hasattr(module, "lora_A")}
    assert ranks == {width} if width else len(ranks) > 1
    losses = train(model.train(), rate=0.1)
    assert losses[-1] < losses[0]


def test_exported_safetensors_hold_the_basis(store, tmp_path):
    assert (
        prep.export(store, "safetensors", tmp_path / "new" / "b.safetensors", basis="diagonal")
        == tmp_path / "new" / "b.safetensors"
    )
    prep.export(store, "safetensors", tmp_path / "cut.safetensors", basis="diagonal", rank=3)
    whole, cut = load_file(tmp_path / "new" / "b.safetensors"), load_file(tmp_path / "cut.safetensors")
    bases = open_store(store).bases["diagonal"]
    assert len(whole) == 3 * len(bases)
    for layer in bases:
        for part in "USP":
            assert torch.equal(whole[f"{layer}.{part}"], getattr(bases[layer], part))
        assert torch.equal(cut[f"{layer}.U"], bases[layer].U[:, :3])
        assert torch.equal(cut[f"{layer}.P"], bases[layer].P[:3])


# Errors


def refused(home, store, match, model=None, **options):
    model = load(home) if model is None else model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(PrepError, match=match) as error:
        prep.peft.get_model(model, store, **{"init": "whitened", "r": RANK, **options})
    assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.state_dict().keys() == before.keys()
    assert all(parameter.requires_grad for parameter in model.parameters() if parameter.is_floating_point())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"init": "pisa"}, "no init"),
        ({"r": 17}, "--rank 17"),
        ({"r": 64}, "rank 64"),
        ({"r": 4, "rank_pattern": {"k_proj": 17}}, "rank 17"),
        ({"r": 12, "init": "eva"}, "24 components"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
        ({"target_modules": ["qq_proj"]}, "matches no layer"),
        ({"basis": "eva"}, "does not serve"),
        ({"init": "eva", "basis": "full"}, "does not serve"),
        ({"basis": "full-p2"}, "no basis"),
        ({"init_lora_weights": "pissa"}, "leave it out"),
        ({"lora_alpha": 0}, "above 0"),
        ({"alpha_pattern": {"q_proj": -1}}, "above 0"),
        ({"layer_replication": [[0, 2], [0, 2]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    ],
    ids=str,
)
def test_refusals_leave_the_model_alone(home, store, options, match):
    refused(home, store, match, **options)


def test_a_missing_basis_names_the_command_that_makes_it(home, tmp_path):
    prep.decompose(tmp_path / "s.zarr", for_="pissa", rank=16, model=str(home / "model"), quiet=True)
    commands = {
        "whitened": "prep decompose",
        "corda_kpm": "prep decompose --for corda_kpm",
        "eva": "prep decompose --for eva",
    }
    for init, command in commands.items():
        refused(home, tmp_path / "s.zarr", f"`{command} --store {tmp_path / 's.zarr'}`", init=init)


def test_other_weights_and_shapes_are_refused(home, store):
    model = load(home)
    model.model.layers[1].mlp.up_proj.weight.data[3] += 1
    refused(home, store, "other weights", model=model)
    refused(home, store, "other weights", model=model, init="eva")
    refused(home, store, "40 x 32", model=tiny.llama(40))
    assert prep.peft.get_model(model, store, "whitened", r=RANK, verify=False)


def test_a_weight_with_two_uses_is_refused(home, store):
    model = load(home)
    model.model.layers[0].mlp.up_proj.weight = model.model.layers[0].mlp.gate_proj.weight
    refused(home, store, "shares its weight", model=model, verify=False)


def test_an_adapted_model_is_refused(home, store):
    with pytest.raises(PrepError, match="PEFT adapters"):
        prep.peft.get_model(prep.peft.get_model(load(home), store, "lora"), store, "whitened")
    model = load(home)
    prep.attach(model, store)
    with pytest.raises(PrepError, match="adapter already"):
        prep.peft.get_model(model, store, "whitened")


def test_a_quantised_base_takes_eva_but_no_residual(home, store):
    model = tiny.with_int8_up_projections(load(home))
    with pytest.raises(PrepError, match="quantised"):
        prep.peft.get_model(model, store, "pissa", r=RANK)
    base = logits(model)
    model = prep.peft.get_model(model, store, "eva", r=RANK)
    assert torch.equal(logits(model), base)


def test_without_peft_the_error_says_what_to_install(home, store, monkeypatch):
    model = load(home)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(PrepError, match=r'pip install "prep-bases\[peft\]"'):
        prep.peft.get_model(model, store, "pissa")


def test_save_refuses_what_it_cannot_write(home, store, tmp_path):
    model = prep.peft.get_model(load(home), store, "whitened", r=RANK)
    with pytest.raises(PrepError, match="no form"):
        prep.peft.save(model, tmp_path / "a", as_="full")
    with pytest.raises(PrepError, match="not a PEFT model"):
        prep.peft.save(load(home), tmp_path / "a")
    model.merge_adapter()
    with pytest.raises(PrepError, match="merged into the base"):
        prep.peft.save(model, tmp_path / "a")
    with pytest.raises(PrepError, match="no residual under this init"):
        prep.peft.save(prep.peft.get_model(load(home), store, "eva", r=RANK), tmp_path / "a", as_="residual")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("to", "options", "match"),
    [
        ("onnx", {}, "onnx"),
        ("peft-corda", {}, "needs a --rank"),
        ("peft-corda", {"rank": 17}, "--rank 17"),
        ("peft-corda", {"rank": 4, "basis": "eva"}, "full-p1"),
        ("peft-eva", {"rank": 4, "basis": "full"}, "take 'eva'"),
        ("peft-lora", {"rank": 4, "basis": "full-p3"}, "--power 3"),
    ],
)
def test_exports_that_cannot_be_made(store, tmp_path, to, options, match):
    with pytest.raises(PrepError, match=match):
        prep.export(store, to, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_an_export_replaces_only_when_told(store, tmp_path):
    path = tmp_path / "b.safetensors"
    path.write_text("mine")
    with pytest.raises(PrepError, match="is there already"):
        prep.export(store, "safetensors", path)
    assert path.read_text() == "mine"
    prep.export(store, "safetensors", path, overwrite=True)
    assert load_file(path)
    with pytest.raises(PrepError, match="is there already"):
        prep.export(store, "safetensors", tmp_path, overwrite=True)


def test_a_store_without_full_moments_has_no_covariance_to_export(home, tmp_path):
    prep.decompose(tmp_path / "s.zarr", for_="pissa", rank=4, model=str(home / "model"), quiet=True)
    with pytest.raises(PrepError, match="holds no moments"):
        prep.export(tmp_path / "s.zarr", "peft-corda-covariance", tmp_path / "c.pt")
