"""Device maps: parts of a model on disk change no moment, no site and no hash, and stay on disk; refusals by name.

Weights on disk are real ones: transformers and accelerate load the models. A second device stands in where tensors
must be moved: `cpu:1`, which torch copies to and from as it does between accelerators.
"""

import gc
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from click.testing import CliRunner
from families import FAMILIES, Routed, inputs, without

import prep
from prep import PrepError
from prep.cli import main
from prep.linear import parameter, weight_hash, weight_matrix
from prep.preprocess.model.experts import expert_layers
from prep.preprocess.model.loading import load_model
from prep.preprocess.model.placement import partition, placement
from prep.preprocess.model.sites import other_weights, target_layers

RUN = {"num_sequences": 24, "seq_len": 16, "batch_size": 8, "pack": False, "quiet": True}
TEXTS = tiny.texts(24, shortest=2, longest=15)
BLOCKS = 11  # so that the name of block 1 begins the name of block 10
DEEP = replace(FAMILIES["Llama"], config=FAMILIES["Llama"].config | {"num_hidden_layers": BLOCKS})
TIED = replace(FAMILIES["Llama"], config=FAMILIES["Llama"].config | {"tie_word_embeddings": True})
MODELS = {name: FAMILIES[name] for name in ("OPT", "GPT-2", "Mixtral", "GPT-OSS", "Llama 4", "Phi", "T5")}
MODELS |= {"deep": DEEP, "tied": TIED}
EMBEDDING_KEPT = {"": "disk", "model.embed_tokens": "cpu"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`data`; `model(name)`, the directory of a saved model; `store(name, ...)`, its store without a device map."""
    path = tmp_path_factory.mktemp("made")
    data = tiny.write_data(path / "text.jsonl", TEXTS)
    stores = {}

    def model(name):
        if not (path / name).exists():
            tiny.save(tiny.model(MODELS[name]), path / name, MODELS[name].side)
        return str(path / name)

    def store(name, **options):
        key = json.dumps([name, options])
        if key not in stores:
            stores[key] = prep.covariance(model(name), data, store=path / str(len(stores)), **RUN, **options)
        return stores[key]

    return SimpleNamespace(data=data, model=model, store=store)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Where temporary folders are made: empty when all that was made there is gone."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def assert_equal(got, wanted):
    """Two stores hold the same moments bit for bit, of the same sites and weights."""
    a, b = got.moments, wanted.moments
    assert (a.sites, a.skipped) == (b.sites, b.skipped)
    assert_equal_layers(a, b)


def assert_equal_layers(a, b):
    assert set(a) == set(b)
    for layer in a:
        x, y = a[layer], b[layer]
        assert (x.kind, x.count, x.weight_hash) == (y.kind, y.count, y.weight_hash), layer
        kept = {"full": ("second_moment", "mean"), "output": ("output", "diagonal", "mean")}[x.kind]
        for role in kept:
            assert torch.equal(getattr(x, role), getattr(y, role)), (layer, role)


@pytest.mark.parametrize(
    ("moment", "dtype"),
    [
        ("full", "float32"),
        ("output", "bfloat16"),
        pytest.param("full", "bfloat16", marks=pytest.mark.stress),
        pytest.param("output", "float32", marks=pytest.mark.stress),
    ],
)
@pytest.mark.parametrize(
    ("name", "device_map"),
    [
        ("deep", {"": "cpu", "model.layers.1": "disk"}),
        ("deep", {"": "disk", "model.layers.3.mlp": "cpu", "model.layers.10.self_attn.q_proj": "cpu"}),
        ("tied", "disk"),
        ("OPT", "disk"),  # linear layers with biases
        ("GPT-2", "disk"),  # transposed weights
        ("Mixtral", {"": "cpu", "model.layers.1": "disk"}),  # experts that the loader fuses
        ("GPT-OSS", "disk"),  # transposed experts with biases, fused in the checkpoint
        ("Llama 4", EMBEDDING_KEPT),  # experts in one product
    ],
    ids=["block", "mixed", "tied", "biases", "transposed", "experts", "transposed experts", "batched experts"],
)
def test_weights_on_disk_change_nothing(made, tmp_path, name, device_map, moment, dtype):
    options = {"moment": moment, "dtype": dtype}
    store = prep.covariance(made.model(name), made.data, store=tmp_path / "s", device_map=device_map, **RUN, **options)
    assert_equal(store, made.store(name, **options))


@pytest.mark.parametrize("name", ["deep", "Mixtral"])
def test_moments_are_those_of_the_activations(made, tmp_path, name):
    options = {"dtype": "float64", "device_map": "disk"}
    full = prep.covariance(made.model(name), made.data, store=tmp_path / "full", **RUN, **options)
    output = prep.covariance(made.model(name), made.data, store=tmp_path / "output", moment="output", **RUN, **options)
    model = load_model(made.model(name), dtype="float64")
    model.set_experts_implementation("eager")
    sentences = [{"input_ids": torch.tensor([tiny.ids(text)])} for text in TEXTS]
    plain, routed = tiny.Activations(model, sentences), Routed(model, sentences)
    layers = {**dict(model.named_modules()), **expert_layers(model)}
    assert any(".experts." in layer for layer in full.moments) == (name == "Mixtral")
    for layer in full.moments:
        X = (routed if ".experts." in layer else plain)[layer]
        W = weight_matrix(layers[layer])
        Y = X @ W.numpy().T
        assert full.moments[layer].count == len(X)
        assert full.moments[layer].weight_hash == weight_hash(W)
        assert tiny.relative(full.moments[layer].second_moment, X.T @ X / len(X)) < 1e-9, layer
        assert tiny.relative(output.moments[layer].output, Y.T @ Y / len(X)) < 1e-9, layer


def test_memory_limits_decide_what_goes_to_disk(made, tmp_path):
    options = {"device_map": "auto", "max_memory": "cpu=200kB"}
    meta = [parameter.is_meta for parameter in load_model(made.model("deep"), **options).parameters()]
    assert not meta[0] and meta[-1]
    store = prep.covariance(made.model("deep"), made.data, store=tmp_path / "s", **options, **RUN)
    assert_equal(store, made.store("deep"))


def test_several_passes_each_end_at_their_deepest_site(made, tmp_path):
    budget = {"memory_budget": 60_000}
    store = prep.covariance(made.model("Mixtral"), made.data, store=tmp_path / "s", device_map="disk", **budget, **RUN)
    assert_equal(store, made.store("Mixtral", **budget))


def test_weights_are_read_and_not_kept(made):
    for name in ("GPT-2", "OPT", "Mixtral", "GPT-OSS"):
        plain, spread = load_model(made.model(name)), load_model(made.model(name), device_map="disk")
        layers = {**target_layers(spread), **expert_layers(spread)}
        for layer, module in {**target_layers(plain), **expert_layers(plain)}.items():
            assert torch.equal(weight_matrix(layers[layer]), weight_matrix(module))
            assert weight_hash(weight_matrix(layers[layer])) == weight_hash(weight_matrix(module))
            if getattr(module, "bias", None) is not None:
                assert torch.equal(parameter(layers[layer], "bias"), module.bias)
        assert all(value.is_meta for value in spread.parameters())


def test_bases_are_made_from_weights_on_disk(made, tmp_path):
    store = prep.covariance(made.model("Mixtral"), made.data, store=tmp_path / "a", **RUN)
    spread = load_model(made.model("Mixtral"), device_map="disk")
    prep.decompose(store.location, rank=4, name="plain", quiet=True)
    prep.decompose(store.location, rank=4, name="spread", model=spread, quiet=True)
    bases = prep.open_store(store.location).bases
    for layer in bases["plain"]:
        a, b = bases["plain"][layer], bases["spread"][layer]
        assert torch.equal(a.U, b.U) and torch.equal(a.S, b.S) and torch.equal(a.P, b.P)
        assert bases["plain"].layers[layer].weight_hash == bases["spread"].layers[layer].weight_hash


def moved(module):
    """The inputs of a module are copied to another device, as between accelerators."""
    add_hook_to_module(module, AlignDevicesHook("cpu:1", io_same_device=True))


def test_an_input_that_is_moved_makes_a_site_of_its_own(made, tmp_path):
    batches = [without(batch, "labels") for batch in inputs("Phi", 8)]
    spread = load_model(made.model("Phi"), device_map={"": "cpu", "model.layers.0": "disk"})
    moved(spread.model.layers[1].mlp)
    for moment in ("full", "output"):
        options = {"batches": batches, "moment": moment, "quiet": True}
        plain = prep.covariance(load_model(made.model("Phi")), store=tmp_path / f"a {moment}", **options)
        other = prep.covariance(spread, store=tmp_path / f"b {moment}", **options)
        assert len(other.moments.sites) == len(plain.moments.sites) + 1
        fc1 = "model.layers.%s.mlp.fc1"
        assert fc1 % 0 in other.moments.sites["model.layers.0.self_attn.q_proj"]
        assert other.moments.sites[fc1 % 1] == [fc1 % 1]
        assert_equal_layers(other.moments, plain.moments)


def test_the_encoders_output_keeps_its_mask_when_it_is_moved(made, tmp_path):
    batches = [without(batch, "labels") for batch in inputs("T5", 8)]
    spread = load_model(made.model("T5"), device_map={"": "cpu", "encoder.block.0": "disk"})
    moved(spread.decoder.block[1])
    plain = prep.covariance(load_model(made.model("T5")), batches=batches, store=tmp_path / "a", quiet=True)
    other = prep.covariance(spread, batches=batches, store=tmp_path / "b", quiet=True)
    assert len(other.moments.sites) == len(plain.moments.sites) + 1
    assert_equal_layers(other.moments, plain.moments)


def test_what_the_loader_rewrites_goes_with_the_model(made, folders):
    model = load_model(made.model("Mixtral"), device_map={"": "cpu", "model.layers.1": "disk"})
    files = sorted(path.name for path in folders.rglob("*.safetensors"))
    assert files == [f"model.layers.1.mlp.experts.{key}.safetensors" for key in ("down_proj", "gate_up_proj")]
    del model
    gc.collect()
    assert not list(folders.iterdir())


def test_dense_models_are_read_where_they_are(made, folders):
    model = load_model(made.model("deep"), device_map="disk")
    assert not list(folders.rglob("*.*"))
    with torch.no_grad():
        assert torch.equal(
            model(torch.arange(20)[None]).logits, load_model(made.model("deep"))(torch.arange(20)[None]).logits
        )


def test_a_run_leaves_no_folder_behind(made, folders):
    """Neither one that is finished, nor one that ends with an error, nor a process that ends with a model in it."""
    options = {"store": folders / "s", "device_map": "disk", **RUN}
    prep.covariance(made.model("Mixtral"), made.data, **options)
    with pytest.raises(PrepError, match=r"needs .* of accumulators"):
        prep.covariance(made.model("Mixtral"), made.data, overwrite=True, memory_budget="1kB", **options)
    gc.collect()
    assert [path.name for path in folders.iterdir()] == ["s"]
    code = (
        "import sys, tempfile; from pathlib import Path; from prep.preprocess.model.loading import load_model\n"
        "tempfile.tempdir = sys.argv[2]; model = load_model(sys.argv[1], device_map='disk')\n"
        "print(*(path.name for path in Path(sys.argv[2]).iterdir())); raise SystemExit(2)"
    )
    command = [sys.executable, "-c", code, made.model("Mixtral"), str(folders)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2 and len(ended.stdout.split()) == 2, ended.stderr
    assert [path.name for path in folders.iterdir()] == ["s"]


def test_values_that_are_nowhere():
    linear = torch.nn.Linear(3, 2, device="meta")
    with pytest.raises(PrepError, match=r"the weight \(2, 3\) of a Linear is on the meta device, without values"):
        weight_matrix(linear)
    with torch.device("meta"):
        model = tiny.model("Mixtral")
    assert not expert_layers(model)
    experts = {name: reason for name, reason in other_weights(model).items() if ".experts." in name}
    assert set(experts.values()) == {"a weight of MixtralExperts, which is packed or not in memory"}
    assert len(experts) == 4


# Options


@pytest.fixture(scope="module")
def deep():
    with torch.device("meta"):
        return tiny.model(DEEP)


def test_entries_that_contain_others_are_taken_apart(deep):
    parts = partition(deep, {"": "cpu", "model.layers.1": "disk"})
    blocks = {f"model.layers.{i}": "disk" if i == 1 else "cpu" for i in range(BLOCKS)}
    assert parts == blocks | dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    assert partition(deep, {"": "disk"}) == {"": "disk"}
    assert partition(deep, {"model": "cpu", "lm_head": "disk"}) == {"model": "cpu", "lm_head": "disk"}


def test_forms_of_a_device_map(tmp_path):
    wanted = {"": "cpu", "model.layers.1": "disk"}
    (tmp_path / "map.json").write_text(json.dumps(wanted))
    for given in (wanted, json.dumps(wanted), str(tmp_path / "map.json")):
        assert placement(None, given, None) == (wanted, None)
    assert placement(None, "cpu", None) == ({"": "cpu"}, None)
    assert placement(None, "sequential", "cpu=1.5GB") == ("sequential", {"cpu": 1_500_000_000})
    assert placement(None, "auto", {"cpu": 1000}) == ("auto", {"cpu": 1000})
    assert placement("cpu", None, None) == (None, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cpu", "device_map": "auto"}, "both say where"),
        ({"max_memory": "cpu=1GB"}, "give that, too"),
        ({"device_map": "disk", "max_memory": "cpu=1GB"}, "leave it out"),
        ({"device_map": "automatic"}, "'automatic', which cannot be used"),
        ({"device_map": {"": 99}}, "99, which cannot be used"),
        ({"device_map": {"": "meta"}}, "'meta', which cannot be used"),
        ({"device_map": {"": None}}, "None, which cannot be used"),
        ({"device_map": "{bad"}, "bad cannot be read"),
        ({"device_map": "none.json"}, "none.json cannot be read"),
        ({"device_map": "{}"}, "maps no modules"),
        ({"device_map": "auto", "max_memory": "cuda:0=1GB"}, "number the accelerators"),
        ({"device_map": "auto", "max_memory": "99=1GB"}, "--max-memory names '99', which cannot be used"),
        ({"device_map": "auto", "max_memory": "cpu"}, "'' is not a size"),
        (
            {"device_map": {"": "cpu", "layers.1": "disk"}},
            "no module of LlamaForCausalLM",
        ),
        ({"device_map": {"model.layers": "cpu"}}, "no device for model.embed_tokens.weight"),
    ],
)
def test_refusals_are_one_line_before_anything_is_loaded(made, tmp_path, options, message):
    with pytest.raises(PrepError, match=message) as caught:
        prep.covariance(made.model("deep"), made.data, store=tmp_path / "s", **options, **RUN)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "s").exists()


def test_refusals_that_depend_on_the_model(made, tmp_path):
    head = {"": "cpu", "model.embed_tokens": "disk"}
    with pytest.raises(PrepError, match=r"has lm_head.weight on cpu, model.embed_tokens.weight on disk: .* one weight"):
        load_model(made.model("tied"), device_map=head)
    experts = "model.layers.0.mlp.experts"
    inside = {"": "disk", "model.layers.0.self_attn.q_proj": "cpu"}
    with pytest.raises(PrepError, match=r"divides model.layers.0.self_attn, whose sinks is on disk"):
        load_model(made.model("GPT-OSS"), device_map=inside)
    with pytest.raises(PrepError, match=f"names '{experts}.gate_up_proj', no module of MixtralForCausalLM"):
        load_model(made.model("Mixtral"), device_map={"": "cpu", f"{experts}.gate_up_proj": "disk"})
    with pytest.raises(PrepError, match="a weight that is on disk from outside of its module: keep the embedding off"):
        prep.covariance(made.model("Llama 4"), made.data, store=tmp_path / "s", device_map="disk", **RUN)


def test_an_incomplete_checkpoint_is_refused_with_a_device_map_too(tmp_path):
    model = tiny.model("Llama")
    del model.model.layers[1].mlp.up_proj.weight
    path = tiny.save(model, tmp_path / "model")
    with pytest.raises(PrepError, match=r"has no model.layers.1.mlp.up_proj.weight of the shape"):
        load_model(path, device_map={"": "cpu", "model.layers.0": "disk"})


def test_the_command(made, tmp_path):
    command = ["covariance", "--model", made.model("deep"), "--data", made.data, "--no-pack", "--num-sequences", "24"]
    command += ["--seq-len", "16", "--batch-size", "8", "--store", str(tmp_path / "s")]
    result = CliRunner().invoke(main, [*command, "--quiet", "--device-map", "auto", "--max-memory", "cpu=200kB"])
    assert (result.exit_code, result.output) == (0, "")
    assert_equal(prep.open_store(tmp_path / "s"), made.store("deep"))
    result = CliRunner().invoke(main, [*command, "--device", "cpu", "--device-map", '{"": "disk"}'])
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
    assert "--device and --device-map" in result.stderr


def test_accelerate_is_needed_by_device_maps_only(made, tmp_path):
    code = (
        "import sys; sys.modules['accelerate'] = None; import prep\n"
        "model, data, store = sys.argv[1:]\n"
        "run = dict(store=store, num_sequences=8, seq_len=16, quiet=True)\n"
        "print(len(prep.covariance(model, data, moment='output', **run).moments))\n"
        "try: prep.covariance(model, data, device_map='auto', overwrite=True, **run)\n"
        "except prep.PrepError as error: print(error)\n"
    )
    command = [sys.executable, "-c", code, made.model("GPT-2"), made.data, str(tmp_path / "s")]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines == ["8", "--device-map needs the package accelerate: pip install accelerate"]
