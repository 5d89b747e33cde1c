"""The calibration pass: moments against float64 sums over activations that other hooks kept, sites, padding, errors."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

import prep
from prep import PrepError
from prep.preprocess.calibration.part import Batch, Part
from prep.preprocess.corpus.text import CorpusOptions, load_corpus
from prep.preprocess.model.network import Network
from prep.preprocess.model.sites import MASK, find_sites, target_layers
from prep.preprocess.numerics.accumulators import moments_of
from prep.preprocess.options import CovarianceOptions

BATCHES = 52
RUN = {"num_sequences": 2 * BATCHES, "seq_len": 16, "batch_size": 2, "quiet": True}
MODELS = {"llama": partial(tiny.llama, 770), "gpt2": partial(tiny.model, "GPT-2")}
MODELS |= {"phi": partial(tiny.model, "Phi"), "bert": partial(tiny.model, "BERT")}

ROBERTA = replace(tiny.FAMILIES["BERT"], kind="roberta")

# the members of every site of the first block, in call order
SITES = {
    "llama": [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ],
    "gpt2": [["attn.c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"]],
    "phi": [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"], ["self_attn.dense"], ["mlp.fc2"]],
    "bert": [
        ["attention.self.query", "attention.self.key", "attention.self.value"],
        ["attention.output.dense"],
        ["intermediate.dense"],
        ["output.dense"],
    ],
}
BLOCKS = {"llama": "model.layers", "gpt2": "transformer.h", "phi": "model.layers", "bert": "bert.encoder.layer"}


@pytest.fixture(scope="module", params=list(MODELS))
def calibrated(request, data, tmp_path_factory):
    """A model, its activations in `BATCHES` batches, and a function that gives the store of a moment kind."""
    path = tmp_path_factory.mktemp(request.param)
    directory = tiny.save(MODELS[request.param](), path / "model")
    corpus = load_corpus(CorpusOptions(data, num_sequences=2 * BATCHES, seq_len=16), tiny.tokenizer())
    model = load(directory)
    batches = list(corpus.batches(2))
    assert len(batches) == BATCHES
    stores = {}

    def store(moment):
        if moment not in stores:
            stores[moment] = prep.covariance(directory, data, store=path / moment, moment=moment, **RUN)
        return stores[moment]

    return SimpleNamespace(name=request.param, model=model, x=tiny.Activations(model, batches), store=store)


def load(directory, dtype=torch.float32):
    kinds = {"bert": AutoModelForMaskedLM, "roberta": AutoModelForMaskedLM, "t5": AutoModelForSeq2SeqLM}
    config = json.loads((Path(directory) / "config.json").read_text())
    return kinds.get(config["model_type"], AutoModelForCausalLM).from_pretrained(directory, dtype=dtype).eval()


def gram(X):
    return X.T @ X / len(X)


# Against a float64 oracle


def test_full_moments(calibrated):
    moments = calibrated.store("full").moments
    for layer in moments:
        X, moment = calibrated.x[layer], moments[layer]
        assert moment.count == len(X) == 32 * BATCHES
        assert moment.second_moment.dtype == torch.float64
        assert tiny.relative(moment.second_moment, gram(X)) < 1e-7, layer
        assert tiny.relative(moment.mean, X.mean(0)) < 1e-7, layer
        assert tiny.relative(moment.diagonal, (X**2).mean(0)) < 1e-7, layer
        assert torch.equal(moment.second_moment, moment.second_moment.T)


def test_output_moments_are_of_the_bias_free_output(calibrated):
    moments = calibrated.store("output").moments
    modules = dict(calibrated.model.named_modules())
    for layer in moments:
        X, moment = calibrated.x[layer], moments[layer]
        assert tiny.relative(moment.output, gram(X @ tiny.weight(modules[layer]).T)) < 1e-7, layer
        assert tiny.relative(moment.diagonal, (X**2).mean(0)) < 1e-7, layer
        assert tiny.relative(moment.mean, X.mean(0)) < 1e-7, layer
        with pytest.raises(PrepError, match=rf"{layer} .*prep covariance --moment full"):
            _ = moment.second_moment


def test_diagonal_moments(calibrated):
    moments = calibrated.store("diagonal").moments
    for layer in moments:
        X, moment = calibrated.x[layer], moments[layer]
        assert tiny.relative(moment.diagonal, (X**2).mean(0)) < 1e-7, layer
        assert tiny.relative(moment.mean, X.mean(0)) < 1e-7, layer
        assert moment.count == len(X)
        with pytest.raises(PrepError, match="prep covariance --moment output"):
            _ = moment.output


def test_auto_takes_the_output_moment_of_wide_sites_only(calibrated):
    moments = calibrated.store("auto").moments
    wide = {"llama": "mlp.down_proj", "gpt2": "mlp.c_proj"}.get(calibrated.name, "none")
    for layer in moments:
        kind = "output" if layer.endswith(wide) else "full"
        assert moments[layer].kind == kind, layer
        same = calibrated.store(kind).moments[layer]
        name = "output" if kind == "output" else "second_moment"
        assert torch.equal(getattr(moments[layer], name), getattr(same, name))


def test_sites(calibrated):
    sites = calibrated.store("full").moments.sites
    blocks = [f"{BLOCKS[calibrated.name]}.{i}" for i in range(2)]
    wanted = [[f"{block}.{layer}" for layer in members] for block in blocks for members in SITES[calibrated.name]]
    assert list(sites.values()) == wanted
    assert list(sites) == [members[0] for members in wanted]


def test_half_precision_models_keep_exact_output_moments(data, tmp_path):
    """In bfloat16 y itself has lost three digits; its moment is that of W x."""
    directory = tiny.save(tiny.model("GPT-2"), tmp_path / "model")
    store = prep.covariance(directory, data, store=tmp_path / "s", moment="output", dtype="bfloat16", **RUN)
    corpus = load_corpus(CorpusOptions(data, num_sequences=2 * BATCHES, seq_len=16), tiny.tokenizer())
    model = load(directory, torch.bfloat16)
    x, modules = tiny.Activations(model, list(corpus.batches(2))), dict(model.named_modules())
    assert store.model["dtype"] == "bfloat16"
    for layer in store.moments:
        Y = x[layer] @ tiny.weight(modules[layer]).T
        assert tiny.relative(store.moments[layer].output, gram(Y)) < 1e-6, layer


def test_double_precision_models_are_summed_in_double_precision(data, tmp_path):
    directory = tiny.save(tiny.llama(), tmp_path / "model")
    store = prep.covariance(directory, data, store=tmp_path / "s", dtype="float64", **{**RUN, "num_sequences": 8})
    corpus = load_corpus(CorpusOptions(data, num_sequences=8, seq_len=16), tiny.tokenizer())
    x = tiny.Activations(load(directory, torch.float64), list(corpus.batches(2)))
    for layer in store.moments:
        assert tiny.relative(store.moments[layer].second_moment, gram(x[layer])) < 1e-14, layer


def test_float32_stores_hold_the_rounded_moments(data, tmp_path):
    directory = tiny.save(tiny.llama(), tmp_path / "model")
    run = {**RUN, "num_sequences": 8, "moment": "auto"}
    wide = prep.covariance(directory, data, store=tmp_path / "f64", **run).moments
    narrow = prep.covariance(directory, data, store=tmp_path / "f32", moment_dtype="float32", **run).moments
    for layer in wide:
        for name in ("second_moment", "mean", "diagonal"):
            assert getattr(narrow[layer], name).dtype == torch.float32
            assert torch.equal(getattr(narrow[layer], name), getattr(wide[layer], name).float())


# Padding


@pytest.mark.parametrize(
    ("family", "side"),
    [
        ("Llama", "left"),
        ("Llama", "right"),
        ("GPT-2", "left"),
        ("BERT", "left"),
        ("BERT", "right"),
        ("OPT", "left"),
        (ROBERTA, "right"),
        ("T5", "right"),
        ("T5", "left"),
    ],
    ids=lambda value: getattr(value, "kind", value),
)
def test_padding_changes_nothing(family, side, tmp_path):
    """Batches of 1, 4 and 9 pad the same sentences to different lengths; the oracle pads none."""
    sentences = tiny.texts(24, shortest=2, longest=15)
    data = tiny.write_data(tmp_path / "text.jsonl", sentences)
    directory = tiny.save(tiny.model(family), tmp_path / "model", side)
    inputs = [torch.tensor([tiny.ids(text)]) for text in sentences]
    keys = ["input_ids", "decoder_input_ids"] if family == "T5" else ["input_ids"]
    x = tiny.Activations(load(directory), [dict.fromkeys(keys, ids) for ids in inputs])
    for size in (1, 4, 9):
        run = {"num_sequences": 24, "seq_len": 16, "batch_size": size, "pack": False, "quiet": True}
        moments = prep.covariance(directory, data, store=tmp_path / f"{size}.zarr", **run).moments
        for layer in moments:
            assert moments[layer].count == len(x[layer]) == sum(ids.numel() for ids in inputs)
            assert tiny.relative(moments[layer].second_moment, gram(x[layer])) < 1e-6, (size, layer)
            assert tiny.relative(moments[layer].mean, x[layer].mean(0)) < 1e-6, (size, layer)


def test_positions_that_begin_after_the_padding_token(data, tmp_path):
    """RoBERTa with 64 embedded positions takes 63 tokens when its padding token is 0."""
    directory = tiny.save(tiny.model(ROBERTA), tmp_path / "model")
    run = {"num_sequences": 2, "quiet": True}
    assert prep.covariance(directory, data, store=tmp_path / "63", seq_len=63, **run).corpus["tokens"] == 126
    with pytest.raises(PrepError, match="takes 63"):
        prep.covariance(directory, data, store=tmp_path / "64", seq_len=64, **run)


# Which layers


def chosen(directory, data, path, **options):
    run = {"num_sequences": 1, "seq_len": 8, "quiet": True}
    return prep.covariance(directory, data, store=path, **run, **options).moments


def test_targets_exclude_and_layers(data, tmp_path):
    directory = tiny.save(tiny.llama(), tmp_path / "model")
    every = [f"model.layers.{i}.{name}" for i in range(2) for group in SITES["llama"] for name in group]
    assert set(chosen(directory, data, tmp_path / "a")) == set(every)
    assert set(chosen(directory, data, tmp_path / "b", layers="1")) == {name for name in every if ".1." in name}
    assert set(chosen(directory, data, tmp_path / "c", layers="0-1")) == set(every)
    picked = chosen(directory, data, tmp_path / "d", targets=["q_proj$", "up_proj"], exclude=[r"\.0\.mlp"])
    assert set(picked) == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)} | {"model.layers.1.mlp.up_proj"}
    rest = chosen(directory, data, tmp_path / "e", exclude=["self_attn"], layers="0")
    assert set(rest) == {f"model.layers.0.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")}


def test_the_head_is_calibrated_when_it_is_asked_for(data, tmp_path):
    directory = tiny.save(tiny.llama(), tmp_path / "model")
    moments = chosen(directory, data, tmp_path / "s", targets=["lm_head", "layers.1.mlp.down_proj"])
    assert set(moments) == {"lm_head", "model.layers.1.mlp.down_proj"}
    corpus = load_corpus(CorpusOptions(data, num_sequences=1, seq_len=8), tiny.tokenizer())
    x = tiny.Activations(load(directory), list(corpus.batches(1)))
    assert tiny.relative(moments["lm_head"].second_moment, gram(x["lm_head"])) < 1e-7


class Strange(nn.Module):
    """What real networks do to inputs: `twice` runs twice, `late` reads x after an update in place, `idle` never."""

    def __init__(self):
        super().__init__()
        self.early, self.twin, self.twice, self.idle = (nn.Linear(6, 4, bias=False) for _ in range(4))
        self.late = nn.Linear(6, 4)
        self.copies = False

    def forward(self, x):
        h = x.clone()
        self.early(h)
        self.twin(h.clone() if self.copies else h)
        h += 1
        self.late(h)
        self.twice(h * 2)
        self.twice(h * 3)


@pytest.fixture
def strange():
    torch.manual_seed(0)
    model = Strange()
    layers = {name: module for name, module in model.named_modules() if name}
    x = torch.randn(4, 5, 6)
    sites, skipped = find_sites(layers, lambda: model(x))
    assert skipped == {"idle": "the forward pass does not call it"}
    return SimpleNamespace(model=model, layers=layers, x=x, sites=sites)


def run(strange, kind="full", batches=None):
    kinds = {site.name: kind for site in strange.sites}
    batches = [{"input_ids": strange.x}] if batches is None else batches
    network = Network(
        strange.model,
        strange.layers,
        tuple(strange.sites),
        kinds,
        {},
        lambda batch: strange.model(batch["input_ids"]),
        {},
    )
    part = Part(network, strange.sites)
    with part.hooked():
        for number, batch in enumerate(batches):
            masks = {MASK: batch[MASK]} if MASK in batch else {}
            part.add(Batch(number, batch, masks))
    return {site.name: moments_of(site.name, part.sums[site.name].data(), {}) for site in strange.sites}


def test_sites_are_told_apart_by_tensor_and_version(strange):
    assert [site.members for site in strange.sites] == [("early", "twin"), ("late",), ("twice",)]
    sums = run(strange)
    X = strange.x.reshape(-1, 6).double().numpy()
    both = np.concatenate([2 * (X + 1), 3 * (X + 1)])
    for site, wanted in (("early", X), ("late", X + 1), ("twice", both)):
        assert sums[site].count == len(wanted)
        assert tiny.relative(sums[site].second_moment[0], gram(wanted)) < 1e-6
    Y = (X + 1) @ tiny.weight(strange.model.late).T
    assert tiny.relative(run(strange, "output")["late"].outputs["late"][0], gram(Y)) < 1e-6


def test_sharing_that_ends_is_an_error(strange):
    strange.model.copies = True
    with pytest.raises(PrepError, match="twin no longer shares its input with early in batch 0"):
        run(strange)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_activations_that_are_not_finite_are_named_by_site_and_batch(strange, value):
    batches = [{"input_ids": strange.x.clone()} for _ in range(4)]
    batches[2]["input_ids"][1, 2, 3] = value
    with pytest.raises(PrepError, match=r"input of early is NaN or infinite in batch 2: "):
        run(strange, batches=batches)


@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_sums_that_overflow_are_right_or_an_error(strange, kind):
    x = strange.x * 1e25
    early = run(strange, kind, [{"input_ids": x}])["early"]
    wanted = gram(x.reshape(-1, 6).double().numpy())
    if kind == "full":
        assert tiny.relative(early.second_moment[0], wanted) < 1e-6
    else:
        assert tiny.relative(early.diagonal, np.diagonal(wanted)) < 1e-6
    x = strange.x.clone()
    x[::2, :, 0], x[1::2, :, 0] = 1e25, -1e25  # which their sum does not show
    with pytest.raises(PrepError, match=r"second moment of early overflows float32: .*--dtype float64"):
        run(strange, kind, [{"input_ids": x}])


def test_padding_may_hold_anything(strange):
    x, mask = strange.x.clone(), torch.ones(4, 5, dtype=torch.long)
    x[1, 3:], mask[1, 3:] = float("nan"), 0
    sums = run(strange, batches=[{"input_ids": x, "attention_mask": mask}])
    real = strange.x[mask.bool()].double().numpy()
    assert sums["early"].count == 18
    assert tiny.relative(sums["early"].second_moment[0], gram(real)) < 1e-6


def test_target_layers_names_what_is_wrong():
    model = tiny.llama()
    wrong: list[tuple[dict, str]] = [
        ({"targets": ["nope"]}, "no layer matches"),
        ({"targets": ["norm$"]}, "LlamaRMSNorm"),
        ({"targets": ["("]}, "regular expression"),
        ({"targets": ["q|**"]}, r"regular expression: .*; write one, such as .* \*\.q_proj"),
        ({"targets": ["*.nope"]}, "no layer matches"),
        ({"layers": "7"}, "block 7"),
        ({"layers": "1-"}, "list of block numbers"),
        ({"exclude": ["."]}, "no linear layer is left"),
    ]
    for options, message in wrong:
        with pytest.raises(PrepError, match=message):
            target_layers(model, **options)


@pytest.mark.parametrize(
    ("pattern", "same"),
    [
        ("*.q_proj", r"\.q_proj$"),
        ("*.1.mlp.*", r"\.1\.mlp\."),
        ("*_proj", "_proj$"),
        ("*lm_head", "^lm_head$"),
        ("all-linear", r"\.layers\..*_proj$"),
    ],
)
def test_patterns_of_whole_names(pattern, same):
    model = tiny.llama()
    assert list(target_layers(model, [pattern])) == list(target_layers(model, [same])) != []
    if pattern == "all-linear":
        assert list(target_layers(model, [pattern, "*head"])) == [*target_layers(model), "lm_head"]
    else:
        everything, left = target_layers(model, [".*"]), target_layers(model, [".*"], exclude=[pattern])
        assert everything.keys() - left.keys() == target_layers(model, [same]).keys()


def test_all_linear_is_the_default():
    """The store is the same: nothing is refused for having been asked for by name."""
    assert CovarianceOptions("m", "d", targets="all-linear") == CovarianceOptions("m", "d")


# Stores


def test_equal_runs_give_equal_stores_but_for_the_run(data, tmp_path):
    directory = tiny.save(tiny.llama(), tmp_path / "model")
    for name in "ab":
        options = {"store": tmp_path / name, "moment": "auto", **RUN, "num_sequences": 8}
        prep.covariance(directory, data, **options)
        for method in ("whitened", "antipasto"):
            prep.decompose(tmp_path / name, for_=method, rank=8, quiet=True)
    first, second = (tiny.contents(tmp_path / name) for name in "ab")
    heads = [json.loads(files.pop("zarr.json")) for files in (first, second)]
    assert first == second
    assert len(first) > 100
    for head in heads:
        assert set(head["attributes"].pop("run")) == {"host", "started", "seconds", "files"}
    assert heads[0] == heads[1]


def test_provenance(data, tmp_path):
    directory = tiny.save(tiny.llama(), tmp_path / "model")
    store = prep.covariance(directory, data, store=tmp_path / "s", **{**RUN, "num_sequences": 8, "seed": 3})
    assert (store.status, store.model["id"], store.model["class"]) == ("complete", directory, "LlamaForCausalLM")
    assert store.model["dtype"] == "float32"
    corpus = store.corpus
    assert (corpus["source"], corpus["tokens"], corpus["seed"], corpus["split"]) == (data, 8 * 16, 3, "train")
    options = {"targets": [], "moment": "full", "batch_size": 2, "moment_dtype": "float64"}
    assert options.items() <= store.options.items()
    assert len(store.id) == len(corpus["hash"]) == len(store.model["config_hash"]) == 32
    assert prep.open_store(tmp_path / "s").attrs == store.attrs


def test_a_failed_pass_leaves_what_was_there(data, tmp_path):
    good, bad = tiny.llama(), tiny.llama()
    with torch.no_grad():
        bad.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    good, bad = tiny.save(good, tmp_path / "good"), tiny.save(bad, tmp_path / "bad")
    run = {"store": tmp_path / "s", **RUN, "num_sequences": 8}
    with pytest.raises(PrepError, match="down_proj is NaN or infinite"):
        prep.covariance(bad, data, **run)
    assert not (tmp_path / "s").exists()
    prep.covariance(good, data, **run)
    before = tiny.contents(tmp_path / "s")
    with pytest.raises(PrepError, match="NaN"):
        prep.covariance(bad, data, overwrite=True, **run)
    assert tiny.contents(tmp_path / "s") == before


def test_a_store_of_bases_gains_moments_and_keeps_its_bases(data, tmp_path):
    directory = tiny.save(tiny.llama(), tmp_path / "model")
    prep.decompose(tmp_path / "s", model=directory, metric="identity", rank=4, quiet=True)
    before = tiny.contents(tmp_path / "s" / "bases")
    store = prep.covariance(directory, data, store=tmp_path / "s", **{**RUN, "num_sequences": 8})
    assert tiny.contents(tmp_path / "s" / "bases") == before
    assert list(store.bases) == ["identity"]
    assert len(store.moments) == len(store.bases["identity"]) == 14


def test_options_are_checked_before_anything_is_read(tmp_path):
    for options in ({"moment": "ful"}, {"moment_dtype": "float16"}, {"dtype": "int8"}):
        with pytest.raises(PrepError, match="does not exist"):
            prep.covariance("nowhere", "nothing", store=tmp_path / "s", **options)


@pytest.mark.parametrize("scale", [1e-24, 1e24])
def test_outputs_of_any_size_are_summed_right(strange, scale):
    """Inputs of ordinary size and a weight that is not."""
    strange.model.early.weight.data *= scale
    stored = run(strange, "output")["early"].outputs["early"][0]
    Y = strange.x.reshape(-1, 6).double().numpy() @ tiny.weight(strange.model.early).T
    assert tiny.relative(stored, gram(Y)) < 1e-6


def test_outputs_that_are_not_finite_are_named(strange):
    strange.model.early.weight.data *= 1e25
    with pytest.raises(PrepError, match=r"output of early is NaN or infinite: try --dtype float64"):
        run(strange, "output", [{"input_ids": strange.x * 1e20}])


@pytest.mark.parametrize("scale", [1e-25, 1e21])
def test_moments_that_float32_cannot_store_are_refused(scale, tmp_path):
    model = nn.Sequential(nn.Linear(6, 4))
    options = {"batches": [torch.randn(40, 6) * scale], "store": tmp_path / "s", "quiet": True}
    with pytest.raises(PrepError, match=r"second moment of 0, .* is beyond float32: .*--moment-dtype float64"):
        prep.covariance(model, moment_dtype="float32", **options)
    assert prep.covariance(model, **options, overwrite=True).status == "complete"


def warned(directory, data, path, capsys, **options):
    """The lines of a calibration on stderr that warn."""
    prep.covariance(directory, data, store=path, **{**RUN, "quiet": False, **options})
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]


def test_fewer_tokens_than_a_layer_is_wide_are_one_line(data, tmp_path, capsys):
    directory = tiny.save(tiny.llama(), tmp_path / "model")  # inputs of 32 and, of two sites, 48
    [line] = warned(directory, data, tmp_path / "a", capsys, num_sequences=2)
    assert "2 of 8 sites saw fewer tokens than they are wide" in line
    assert "model.layers.0.mlp.down_proj (32 for 48)" in line and "for 48 tokens or more" in line
    [line] = warned(directory, data, tmp_path / "b", capsys, num_sequences=1)
    assert "8 of 8 sites" in line and "(16 for 32)" in line
    [line] = warned(directory, data, tmp_path / "c", capsys, num_sequences=1, moment="output")
    assert "8 of 8 sites" in line and "down_proj (16 for 32)" in line and "for 48 tokens" in line
    assert not warned(directory, data, tmp_path / "d", capsys, num_sequences=3)
    assert not warned(directory, data, tmp_path / "e", capsys, num_sequences=1, moment="diagonal")
    assert not warned(directory, data, tmp_path / "f", capsys, num_sequences=1, quiet=True)


def test_a_run_on_other_data_names_pool(data, tmp_path):
    directory = tiny.save(tiny.llama(), tmp_path / "model")
    prep.covariance(directory, data, store=tmp_path / "s", **{**RUN, "num_sequences": 4})
    with pytest.raises(PrepError) as error:
        prep.covariance(directory, data, store=tmp_path / "s", **{**RUN, "num_sequences": 4, "seed": 1})
    assert str(error.value) == (
        f"{tmp_path / 's'} holds a run with other options (corpus seed: 0 there, 1 asked for): name another --store "
        "(`prep pool` joins the two; more sequences of the same text extend it), or replace it with --overwrite"
    )
