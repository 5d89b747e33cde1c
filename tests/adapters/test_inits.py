"""LoRA-Null, MiCA and Astra against their formulas and PEFT's own code; how S is shared between A and B."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import prep
from prep.errors import PrepError
from prep.store import open_store
from prep.store.info import table

RANK = 8
INITS = ("lora_null", "mica", "astra")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A tiny Llama, its calibration, and the bases of the three inits."""
    given = tiny.sources(tmp_path_factory.mktemp("inits"), sentences=200)
    store = given.path / "prep.zarr"
    prep.covariance(given.model, given.data, store=store, num_sequences=60, seq_len=16, batch_size=60, quiet=True)
    prep.decompose(store, for_=list(INITS), rank=RANK, quiet=True)
    moments = {layer: open_store(store).moments[layer].second_moment.numpy() for layer in open_store(store).moments}
    return SimpleNamespace(path=given.path, model=given.model, store=store, moments=moments)


def load(home):
    return AutoModelForCausalLM.from_pretrained(home.model, dtype=torch.float32).eval()


def tokens():
    return torch.randint(3, 60, (3, 10), generator=torch.Generator().manual_seed(1))


def logits(model):
    with torch.no_grad():
        return model.eval()(tokens()).logits


def train(model, steps=5):
    x, losses = tokens(), []
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        loss = model.train()(input_ids=x, labels=x).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def pairs(model):
    """layer -> A (r, d_in), B (d_out, r), scaling, base weight; float64."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            A, B = (factor["default"].weight.detach().double().numpy() for factor in (module.lora_A, module.lora_B))
            W = tiny.weight(module.get_base_layer())
            found[name.removeprefix("base_model.model.")] = A, B, module.scaling["default"], W
    return found


def started(home, init, **options):
    return prep.peft.get_model(load(home), home.store, init, r=RANK, lora_alpha=options.pop("alpha", RANK), **options)


def weights(home):
    return {name: tiny.weight(module) for name, module in tiny.layers(load(home)).items()}


def test_the_store_is_whole(home):
    assert not prep.verify(home.store, model=home.model).findings


def test_astra_projects_on_the_largest_eigenvectors_of_the_outputs(home):
    """B = Q[:, -r:] of eigh(E[y y^T]), A = B^T W, base W - B A, as LyoAI/Astra has it (arXiv 2602.19111)."""
    for layer, (A, B, _, rest) in pairs(started(home, "astra")).items():
        W = weights(home)[layer]
        Q = np.linalg.eigh(W @ home.moments[layer] @ W.T)[1][:, -RANK:]
        assert tiny.relative(B @ B.T, Q @ Q.T) < 1e-5
        assert tiny.relative(np.abs(np.sum(Q[:, ::-1] * B, axis=0)), np.ones(RANK)) < 1e-5  # direction by direction
        assert tiny.relative(A, B.T @ W) < 1e-5
        assert tiny.relative(rest, W - Q @ Q.T @ W) < 1e-5


def test_lora_null_is_the_svd_of_w_in_the_null_space(home):
    """N = bottom r eigenvectors of C, W N N^T = U S V^T, B = U S^(1/2), A = S^(1/2) V^T (arXiv 2503.02659)."""
    for layer, (A, B, _, rest) in pairs(started(home, "lora_null")).items():
        W = weights(home)[layer]
        N = np.linalg.eigh(home.moments[layer])[1][:, :RANK]
        U, S, Vt = np.linalg.svd(W @ N @ N.T)
        U, S, Vt = U[:, :RANK], S[:RANK], Vt[:RANK]
        assert tiny.relative(B @ A, W @ N @ N.T) < 1e-5
        assert tiny.relative(np.abs(B), np.abs(U * np.sqrt(S))) < 1e-5
        assert tiny.relative(np.abs(A), np.abs(np.sqrt(S)[:, None] * Vt)) < 1e-5
        assert tiny.relative(rest, W - W @ N @ N.T) < 1e-5


def test_mica_is_pefts(home, tmp_path):
    """The same space of B and the same training; B is frozen, also where plain PEFT has loaded the adapter."""
    mica = pytest.importorskip("peft.tuners.lora.variants")
    if not hasattr(mica, "MiCALinearVariant"):
        pytest.skip("this PEFT has no MiCA")
    ours = started(home, "mica", alpha=16, task_type="CAUSAL_LM")
    config = LoraConfig(r=RANK, lora_alpha=16, init_lora_weights="mica", target_modules="all-linear")
    theirs = get_peft_model(load(home), config)
    for layer, (A, B, scaling, W) in pairs(ours).items():
        other = pairs(theirs)[layer]
        assert not A.any() and scaling == other[2]
        assert tiny.relative(B @ B.T, other[1] @ other[1].T) < 1e-5
        assert np.array_equal(W, other[3])
    np.testing.assert_allclose(train(ours), train(theirs), rtol=1e-5)
    prep.peft.save(ours, tmp_path / "mica")
    loaded = PeftModel.from_pretrained(load(home), tmp_path / "mica", is_trainable=True)
    assert torch.equal(logits(loaded), logits(ours))
    for model in (ours, theirs, loaded):
        assert {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad} == {"lora_A"}


def test_mica_starts_on_a_quantised_base(home):
    model = tiny.with_int8_up_projections(load(home))
    base = logits(model)
    assert torch.equal(logits(prep.peft.get_model(model, home.store, "mica", r=RANK)), base)


@pytest.mark.parametrize("split", ["even", "A", "B"])
def test_a_split_shares_s_between_a_and_b(home, tmp_path, split):
    """Whatever the scaling, `s B A` is `U S P`, and one of the factors has none of S; so has an exported adapter."""
    basis = open_store(home.store).bases["full-undamped"]
    model = started(home, "astra", split=split, alpha=20)
    assert tiny.relative(logits(model), logits(load(home)).numpy()) < 1e-5
    prep.export(home.store, "peft-lora", tmp_path / "lora", basis=basis.name, rank=RANK, lora_alpha=20, split=split)
    written = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for layer, (A, B, scaling, _) in pairs(model).items():
        U, S, P = (part.double().numpy() for part in (basis[layer].U, basis[layer].S, basis[layer].P))
        assert tiny.relative(scaling * B @ A, U * S @ P) < 1e-6
        norms = np.linalg.norm(B, axis=0)
        wanted = {"even": np.sqrt(S / scaling), "A": np.ones(RANK), "B": S / scaling}[split]
        assert tiny.relative(norms, wanted) < 1e-6
        key = f"base_model.model.{layer}.lora_%s.weight"
        assert tiny.relative(written[key % "A"][:RANK], A) < 1e-6
        assert tiny.relative(written[key % "B"][:, :RANK], B) < 1e-6


def test_an_export_splits_as_the_method_does(home, tmp_path):
    prep.export(home.store, "peft-lora", tmp_path / "astra", basis="full-undamped", rank=RANK)
    prep.export(home.store, "peft-lora", tmp_path / "null", basis="null", rank=RANK)
    B = load_file(tmp_path / "astra" / "adapter_model.safetensors")
    assert all(
        torch.allclose(value[:, :RANK].norm(dim=0), torch.ones(RANK)) for key, value in B.items() if "lora_B" in key
    )
    config = json.loads((tmp_path / "null" / "adapter_config.json").read_text())
    assert config["r"] == 2 * RANK


def test_the_table_of_a_start_is_what_its_weights_say(home, capsys):
    """Root mean squares by kind of layer; the update against signs in place of Adam's steps."""
    model = started(home, "astra", alpha=20)
    _, _, printed = capsys.readouterr().err.partition("rms of A / B / update per rate")
    title, *lines = printed.splitlines()
    assert title.strip() == "astra"
    rows = {line.split()[0]: [float(number) for number in line.split("  ")[-1].split("/")] for line in lines}
    found = {}
    draw = np.random.default_rng(0)
    for layer, (A, B, scaling, _) in pairs(model).items():
        steps = draw.choice([-1.0, 1.0], (40, *A.shape)), draw.choice([-1.0, 1.0], (40, *B.shape))
        change = scaling * np.mean([np.mean((B @ dA + dB @ A) ** 2) for dA, dB in zip(*steps, strict=True)]) ** 0.5
        sizes = np.sqrt(np.mean(A**2)), np.sqrt(np.mean(B**2)), change
        found.setdefault(layer.split(".", 3)[3], []).append(sizes)
    assert rows.keys() == found.keys()
    for kind, sizes in found.items():
        np.testing.assert_allclose(rows[kind], np.median(sizes, axis=0), rtol=0.06)
    started(home, "astra", quiet=True)
    assert "rms" not in capsys.readouterr().err


def test_info_says_how_bases_start(home):
    """At rank 16, or that of the basis, with a scaling of 1: of two layers of a kind, which are all that there are."""
    facts = prep.info(home.store)
    model = started(home, "lora_null", quiet=True)
    for kind, said in facts["bases"]["null"]["start"].items():
        found = [
            (np.sqrt(np.mean(A**2)), np.sqrt(np.mean(B**2)))
            for layer, (A, B, _, _) in pairs(model).items()
            if layer.endswith(kind)
        ]
        np.testing.assert_allclose([said["A"], said["B"]], np.median(found, axis=0), rtol=1e-5)
        assert said["update"] == pytest.approx((RANK * (said["A"] ** 2 + said["B"] ** 2)) ** 0.5, rel=0.1)
    assert any("rms of A / B / update" in line for line in table(facts))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"init": "mica", "split": "A"}, "init 'mica' has no S to share between A and B: leave out split"),
        ({"init": "astra", "split": "both"}, "no split 'both': choose from even, A, B"),
        (
            {"init": "lora_null", "r": 4},
            "made of 8 eigenvectors of .*: `prep decompose --for lora_null --rank 4 --over",
        ),
        ({"init": "lora_null", "r": "95%"}, "init 'lora_null' has a basis of one rank"),
        ({"init": "mica", "r": "2K"}, "init 'mica' starts from none of the output"),
        ({"init": "mica", "use_dora": True}, "use_dora cannot be combined with init 'mica'"),
        ({"init": "whitened", "basis": "null"}, "basis 'null' does not serve init 'whitened'"),
        ({"init": "lora_null", "basis": "full-undamped"}, "does not serve init 'lora_null'"),
    ],
    ids=str,
)
def test_refusals(home, options, match):
    model = load(home)
    with pytest.raises(PrepError, match=match):
        prep.peft.get_model(model, home.store, **{"r": RANK, **options})
    assert not hasattr(model, "peft_config")
