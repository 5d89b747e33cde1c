"""What `prep covariance` and `prep decompose` say when they refuse: one table of sentences per verb."""

import json
import shutil
from collections import OrderedDict
from dataclasses import replace

import messages
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import prep
from prep.preprocess.calibration.choice import check_blocks
from prep.preprocess.distributed import World
from prep.preprocess.options import CovarianceOptions

O_PROJ, DOWN = "model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """`model` and `text.jsonl`; `full`, `diagonal` and `output`, their stores; models and texts that will not do."""
    given = tiny.sources(tmp_path_factory.mktemp("messages"))
    path = given.path
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        for moment in ("full", "diagonal", "output"):
            prep.covariance("model", "text.jsonl", store=moment, moment=moment, **tiny.RUN)
        prep.decompose("full", rank=4, quiet=True)
        prep.pool(["full", "full"], store="pool")
        prep.covariance(Net(), batches=IDS, store="batches", quiet=True)
        prep.decompose("bases", model="model", metric="identity", rank=2, quiet=True)
    write_texts(path)
    write_models(path)
    return path


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


def write_texts(path):
    (path / "empty.jsonl").write_text("")
    (path / "blank.jsonl").write_text('{"text": " "}\n{"text": null}\n')
    row = {"question": "w1", "answer": "w2", "n": 1, "tags": ["x"], "from": [{"from": "human", "value": "w1"}]}
    (path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (path / "deep.jsonl").write_text('{"text": "a"}\n{"text": "b", "x": ' + "[" * 200 + "]" * 200 + "}\n")
    (path / "table.xlsx").touch()
    (path / "folder").mkdir()
    (path / "folder" / "precious").write_text("x")
    (path / "mixed.jsonl").write_text('{"text": "w1"}\n')
    (path / "mixed.txt").write_text("w1\n")


def write_models(path):
    for name, change in {
        "infinite": lambda weights: weights[f"{O_PROJ}.weight"][0, 0].fill_(float("inf")),
        "changed": lambda weights: weights["model.layers.0.mlp.up_proj.weight"][0, 0].add_(1),
        "incomplete": lambda weights: weights.pop(f"{DOWN}.weight"),
    }.items():
        shutil.copytree(path / "model", path / name)
        weights = load_file(path / "model" / "model.safetensors")
        change(weights)
        save_file(weights, path / name / "model.safetensors", metadata={"format": "pt"})
    remote = {"AutoConfig": "strange.Config", "AutoModelForCausalLM": "strange.Model"}
    for name, changes in {
        "wider": {"hidden_size": 64, "head_dim": 8},
        "unknown": {"model_type": "strange"},
        "remote": {"model_type": "strange", "auto_map": remote},
    }.items():
        shutil.copytree(path / "model", path / name)
        config = json.loads((path / name / "config.json").read_text())
        (path / name / "config.json").write_text(json.dumps(config | changes))
    shutil.copytree(path / "model", path / "without-tokenizer")
    for file in (path / "without-tokenizer").glob("tokenizer*"):
        file.unlink()
    (path / "nothing").mkdir()
    tiny.save(tiny.llama(64), path / "other-shapes")
    tiny.save(tiny.model("GPT-2"), path / "gpt2")
    tiny.save(tiny.model(replace(tiny.FAMILIES["BERT"], kind="roberta")), path / "roberta")


def covariance(model="model", data="text.jsonl", store="new", **options):
    return lambda: prep.covariance(model, data, store=store, **{**tiny.RUN, **options})


COVARIANCE = {
    # models
    "no absolute model": (
        covariance("/nowhere/model"),
        "no model at /nowhere/model: give a directory with config.json or a hub id",
    ),
    "no relative model": (
        covariance("./nowhere"),
        "no model at ./nowhere: give a directory with config.json or a hub id",
    ),
    "no deep model": (covariance("a/b/c"), "no model at a/b/c: give a directory with config.json or a hub id"),
    "a directory without a model": (covariance("nothing"), "cannot load the model .../nothing (...): check --model"),
    "a model without tokenizer": (
        covariance("without-tokenizer"),
        "cannot load the tokenizer .../without-tokenizer (...): check --model",
    ),
    "a checkpoint that lacks a weight": (
        covariance("incomplete"),
        "the checkpoint incomplete has no model.layers.1.mlp.down_proj.weight of the shape that its config.json "
        "says (1 such weights): complete it, or name another --model",
    ),
    "a checkpoint of other shapes": (
        covariance("wider"),
        "the checkpoint wider has no model.layers.0.input_layernorm.weight of the shape that its config.json "
        "says (18 such weights): complete it, or name another --model",
    ),
    "a model type that there is not": (covariance("unknown"), "cannot load the model .../unknown (...): check --model"),
    "code of its own": (
        covariance("remote"),
        ".../remote needs code from its own repository: pass --trust-remote-code if you trust it",
    ),
    # texts
    "no file": (covariance(data="none.jsonl"), "no such file: none.jsonl; check --data"),
    "no match": (covariance(data="*.parquet"), "no file matches *.parquet: check --data"),
    "a file of another kind": (
        covariance(data="table.xlsx"),
        "cannot read .../table.xlsx: convert it to one of .jsonl .json .parquet .csv .txt, also with .gz or .zst",
    ),
    "files of several kinds": (
        covariance(data="mixed.*"),
        ".../mixed.* matches files of several kinds (.jsonl, .txt): narrow --data to one",
    ),
    "a folder without data": (covariance(data="nothing"), ".../nothing holds no data files (...): check --data"),
    "a word": (covariance(data="text"), "'text' is no file, directory or hub id: check --data"),
    "an empty file": (
        covariance(data="empty.jsonl"),
        ".../empty.jsonl holds no text: every document is missing or blank; give other --data",
    ),
    "blank texts": (
        covariance(data="blank.jsonl"),
        ".../blank.jsonl holds no text: every document is missing or blank; give other --data",
    ),
    "JSON that is nested too deep": (
        covariance(data="deep.jsonl"),
        ".../deep.jsonl (value 2) cannot be read: it is nested more than 100 deep; give other --data",
    ),
    "too little text": (
        covariance(num_sequences=500),
        ".../text.jsonl gives 38 sequences of 16 tokens, 500 were asked for: use --num-sequences 38, --seq-len "
        "1, --no-pack (60 documents), more data",
    ),
    "several columns": (
        covariance(data="rows.jsonl"),
        ".../rows.jsonl has the columns question, answer, n, tags, from: choose with --text-column NAME, or join "
        "several with --template '{NAME}\\n{NAME}'",
    ),
    "a missing column": (
        covariance(text_column="nope"),
        "--text-column names 'nope', but .../text.jsonl has the columns text, number",
    ),
    "a missing column in a template": (
        covariance(template="{nope}"),
        "--template names 'nope', but .../text.jsonl has the columns text, number",
    ),
    "a column of numbers": (
        covariance(data="rows.jsonl", text_column="n"),
        "column 'n' holds int, not text: choose another with --text-column, or write it out with --template '{n}'",
    ),
    "lists in a template": (
        covariance(data="rows.jsonl", template="{tags}"),
        "column 'tags' holds list, not text: leave it out of --template",
    ),
    "a template with a path": (
        covariance(template="{a.b}"),
        "--template '{a.b}': only column names can stand in braces, as in {question}",
    ),
    "a malformed template": (
        covariance(template="{a"),
        "--template '{a' is malformed (...): write columns as {NAME}, a brace as {{",
    ),
    "a template without columns": (
        covariance(template="plain {{a}}"),
        "--template 'plain {{a}}' names no column: write one in braces, as in {question}",
    ),
    "a column and a template": (
        covariance(text_column="a", template="{b}"),
        "--text-column and --template exclude each other: give one of them",
    ),
    "answers that cannot be told": (
        covariance(label_mask=True),
        "--label-mask needs --chat-column, or --template with --answer-from, to tell answers by",
    ),
    "a template whose answer is not named": (
        covariance(label_mask=True, template="{text} {number}"),
        "--label-mask needs to know where the --template's answer begins: add --answer-from, such as '{answer}'",
    ),
    "an answer that is not masked": (
        covariance(template="{text}", answer_from="{text}"),
        "--answer-from says where a --template's answer begins, for --label-mask: give both, too",
    ),
    "an answer that is not in the template": (
        covariance(label_mask=True, template="{text} {number}", answer_from="{answer}"),
        "--answer-from '{answer}' is not in --template '{text} {number}': give the part of it that the answer begins "
        "with, such as {answer}",
    ),
    "an answer that is in the template twice": (
        covariance(label_mask=True, template="{text}{text}", answer_from="{text}"),
        "--answer-from '{text}' is more than once in --template '{text}{text}': give the part of it that the answer "
        "begins with, such as {answer}",
    ),
    "labels of PEFT's own sums": (
        covariance(label_mask=True, template="{text}", answer_from="{text}", compat="peft-corda"),
        "--compat peft-corda counts every token: leave it out, or --label-mask",
    ),
    "no chat template": (
        covariance(chat_column="text"),
        "the tokenizer has no chat template, which --chat-column text needs: give a --model that has one, or data with "
        "the text in a column",
    ),
    "a subset of a file": (
        covariance(subset="main"),
        "--subset main selects a part of a hub data set, but .../text.jsonl names files: leave it out",
    ),
    "no such split": (
        covariance(split="nope"),
        ".../text.jsonl has no split 'nope': choose with --split, one of ['train']",
    ),
    # sizes
    "no sequences": (covariance(num_sequences=0), "--num-sequences is 0: give 1 or more"),
    "a negative length": (covariance(seq_len=-1), "--seq-len is -1: give 1 or more"),
    "no batch": (covariance(batch_size=0), "--batch-size is 0: give 1 or more"),
    "sequences that are too long": (
        covariance(seq_len=65, num_sequences=2),
        "sequences of 65 tokens, the model takes 64: use --seq-len 64 or less",
    ),
    "positions after the padding": (
        covariance("roberta", seq_len=64, num_sequences=2),
        "sequences of 64 tokens, the model takes 63: use --seq-len 63 or less",
    ),
    "a budget that holds no site": (
        covariance(memory_budget=1000),
        "model.layers.0.self_attn.q_proj needs 8.45e-06 GB of accumulators, the --memory-budget is 1e-06 GB: "
        "raise it, or take --moment auto or diagonal",
    ),
    "a budget that holds no site with its tokens": (
        covariance(memory_budget=9000, keep_tokens=100),
        "model.layers.0.self_attn.q_proj needs 2.2e-05 GB of accumulators, the --memory-budget is 9e-06 GB: raise it, "
        "or take --moment auto or diagonal, or fewer --keep-tokens",
    ),
    # layers
    "targets that match nothing": (
        covariance(targets=["nope"]),
        "no layer matches --targets 'nope': LlamaForCausalLM has the linear layers "
        "model.layers.0.self_attn.q_proj, model.layers.0.self_attn.k_proj, model.layers.0.self_attn.v_proj, ...",
    ),
    "a target that is not linear": (
        covariance(targets=["norm$"]),
        "--targets 'norm$' matches model.norm, a LlamaRMSNorm, which is not a linear layer: LlamaForCausalLM has "
        "the linear layers model.layers.0.self_attn.q_proj, model.layers.0.self_attn.k_proj, "
        "model.layers.0.self_attn.v_proj, ...",
    ),
    "targets that are no expression": (covariance(targets=["("]), "--targets '(' is not a regular expression: ..."),
    "everything excluded": (
        covariance(exclude=["."]),
        "no linear layer is left by --targets, --exclude and --layers: LlamaForCausalLM has the linear layers "
        "model.layers.0.self_attn.q_proj, model.layers.0.self_attn.k_proj, model.layers.0.self_attn.v_proj, ...",
    ),
    "a block that there is not": (covariance(layers="9"), "--layers 9 names block 9: the model has 2 blocks, 0 to 1"),
    "blocks that are no numbers": (
        covariance(layers="one"),
        "--layers 'one' is not a list of block numbers: write it like 0-3,8",
    ),
    # options
    "no such moment": (
        covariance(moment="ful"),
        "--moment 'ful' does not exist: take one of full, diagonal, output, auto (did you mean 'full'?)",
    ),
    "no such dtype of moments": (
        covariance(moment_dtype="float16"),
        "--moment-dtype 'float16' does not exist: take one of float64, float32",
    ),
    "no such dtype": (
        covariance(dtype="int8"),
        "--dtype 'int8' does not exist: take one of auto, float32, float64, bfloat16, float16",
    ),
    "fewer tokens than none": (
        covariance(keep_tokens=-1),
        "--keep-tokens -1 is not a number of tokens: give 0 for none, or more",
    ),
    "tokens as PEFT scales them": (
        covariance(keep_tokens=8, compat="peft-corda"),
        "--keep-tokens keeps inputs as they are, --compat peft-corda scales them: leave out one",
    ),
    "no such device": (
        covariance(device="abacus"),
        "--device 'abacus' does not exist: write it like cpu, cuda or cuda:1",
    ),
    "two places": (
        covariance(device="cpu", device_map="auto"),
        "--device and --device-map both say where the model goes: give one of them",
    ),
    "a limit without a map": (
        covariance(max_memory="cpu=1GB"),
        "--max-memory limits what --device-map auto takes: give that, too",
    ),
    "a limit for a map that takes none": (
        covariance(device_map="disk", max_memory="cpu=1GB"),
        "--max-memory limits --device-map auto, balanced, balanced_low_0, sequential: leave it out with other ones",
    ),
    "no such map": (
        covariance(device_map="automatic"),
        "--device-map names 'automatic', which cannot be used (...): write auto, disk or a device, like cpu or cuda:1",
    ),
    "no such device in a map": (
        covariance(device_map={"": "meta"}),
        "--device-map names 'meta', which cannot be used (nothing is computed there): write auto, disk or a "
        "device, like cpu or cuda:1",
    ),
    "no such number in a map": (
        covariance(device_map={"": 99}),
        "--device-map names 99, which cannot be used (...): write auto, disk or a device, like cpu or cuda:1",
    ),
    "nothing in a map": (
        covariance(device_map={"": None}),
        "--device-map names None, which cannot be used (nothing is computed there): write auto, disk or a "
        "device, like cpu or cuda:1",
    ),
    "no such file of a map": (
        covariance(device_map="none.json"),
        "--device-map none.json cannot be read ([Errno 2] No such file or directory: 'none.json'): give {module: "
        "device}",
    ),
    "a map that is cut short": (
        covariance(device_map="{bad"),
        "--device-map {bad cannot be read (...): give {module: device}",
    ),
    "an empty map": (
        covariance(device_map="{}"),
        '--device-map {} maps no modules: write it like {"": "disk", "model.layers.0": "cpu"}',
    ),
    "no such module in a map": (
        covariance(device_map={"": "cpu", "layers.1": "disk"}),
        "--device-map names 'layers.1', no module of LlamaForCausalLM: it has model.embed_tokens, model.layers, "
        "model.norm, model.rotary_emb, ...",
    ),
    "a map that leaves modules out": (
        covariance(device_map={"model.layers": "cpu"}),
        "--device-map has no device for model.embed_tokens.weight: name its module, or '' for all others",
    ),
    "blocks read once, and again and again": (
        covariance(block_by_block=True, until="2%"),
        "--until runs the model again and again, --block-by-block reads it once: leave out one of them",
    ),
    "blocks in two places": (
        covariance(block_by_block=True, device_map="auto"),
        "--device-map and --block-by-block both say where the model goes: leave out one of them",
    ),
    "blocks of several processes": (
        lambda: check_blocks(CovarianceOptions("model", "text.jsonl", block_by_block=True), World(size=2)),
        "--block-by-block is for one process, these are 2: start it without torchrun",
    ),
    "a limit for no device": (
        covariance(device_map="auto", max_memory="cuda:0=1GB"),
        "--max-memory names 'cuda:0': number the accelerators, like 0=20GB,cpu=60GB",
    ),
    "a limit that is no size": (
        covariance(device_map="auto", max_memory="cpu"),
        "'' is not a size: write it like 8GB, 8GiB or 500MB",
    ),
    "a mask for text": (
        covariance(mask=lambda ids: ids != 0),
        "mask= belongs to batches=: text is masked by its tokenizer",
    ),
    # stores
    "tokens that a store did not keep": (
        covariance(store="full", keep_tokens=8),
        "full holds a run with other options (options keep_tokens: None there, 8 asked for): name another --store, or "
        "replace it with --overwrite",
    ),
    "a store of other options": (
        covariance(store="full", seed=1, moment="diagonal", targets=["mlp"]),
        "full holds a run with other options (corpus seed: 0 there, 1 "
        "asked for; options moment: 'full' there, 'diagonal' asked for; options targets: [] there, ['mlp'] asked "
        "for): name another --store, or replace it with --overwrite",
    ),
    "a store of another model": (
        covariance("gpt2", store="full"),
        "full holds a run with other options (model id: '.../model' there, '.../gpt2' asked for; model "
        "config_hash: '...' there, '...' asked for): name another --store, or replace it with --overwrite",
    ),
    "a folder that is no store": (
        covariance(store="folder", overwrite=True),
        ".../folder is not a prep store: name another --store",
    ),
    "a file that is no store": (
        covariance(store="text.jsonl", overwrite=True),
        ".../text.jsonl is a file and not a prep store: name another --store",
    ),
    # the pass
    "activations that are not finite": (
        covariance("infinite"),
        "the input of model.layers.1.mlp.gate_proj is NaN or infinite in batch 0: try --dtype float32, or look "
        "at the data",
    ),
}


@pytest.mark.parametrize("asked", COVARIANCE)
def test_covariance(here, asked):
    messages.check(*COVARIANCE[asked])


class Net(nn.Module):
    """An embedding and two layers."""

    def __init__(self):
        super().__init__()
        self.embed, self.first, self.second = nn.Embedding(20, 6), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, ids, **_):
        return self.second(self.first(self.embed(ids)))


IDS = [torch.arange(1, 16).reshape(3, 5)] * 2


def batches(given=IDS, store="new", **options):
    return lambda: prep.covariance(Net(), batches=given, store=store, quiet=True, **options)


def named(name):
    net = nn.Sequential(OrderedDict([(name, nn.Linear(4, 3))]))
    return lambda: prep.covariance(net, batches=[torch.ones(2, 4)], store="new", quiet=True)


BATCHES = {
    "a module and text": (
        lambda: prep.covariance(Net(), "x.jsonl", store="new"),
        "data= needs the tokenizer of a path or hub id: name the model so, or give batches=",
    ),
    "batches and text": (
        lambda: prep.covariance(Net(), "x.jsonl", batches=IDS, store="new"),
        "give either data=, or batches= for a model of your own",
    ),
    "neither": (lambda: prep.covariance(Net(), store="new"), "give either data=, or batches= for a model of your own"),
    "no batches": (batches([]), "batches= is empty: give at least one batch"),
    "a dtype for a module": (
        batches(dtype="bfloat16"),
        "dtype= is for loading a path or hub id: prepare the module itself",
    ),
    "blocks of a module": (
        batches(block_by_block=True),
        "block_by_block= is for loading a path or hub id: prepare the module itself",
    ),
    "a mask that is no tensor": (
        batches(mask=lambda batch: [1]),
        "the attention_mask is list: give mask=, a function from a batch to (B, T)",
    ),
    "a mask of another shape": (
        batches([{"ids": IDS[0], "attention_mask": torch.ones(3, 1, 5, 5)}]),
        "the attention_mask has the shape (3, 1, 5, 5): give mask=, a function from a batch to (B, T)",
    ),
    "a mask that leaves nothing": (
        batches(mask=torch.zeros_like),
        "no token reached first: use more data or leave it out with --exclude",
    ),
    "an embedding": (
        batches(targets=["embed"]),
        "--targets 'embed' matches embed, a Embedding, which is not a linear layer: Net has the linear layers "
        "first, second",
    ),
    "an iterator and several passes": (
        lambda: batches(iter(IDS), memory_budget="0.6kB")(),
        "2 passes are needed and an iterator gives its batches once: give batches= as a list or a DataLoader, or "
        "raise memory_budget",
    ),
    "moments that are there": (
        batches(store="full"),
        "full holds moments, and batches cannot be compared with theirs: name another store, or replace it with "
        "overwrite=True",
    ),
    "a name that a store cannot keep": (
        named("a/b"),
        "'a/b' cannot name a layer in a store, it is no single path component: leave it out with --exclude",
    ),
}


@pytest.mark.parametrize("asked", BATCHES)
def test_covariance_of_batches(here, asked):
    messages.check(*BATCHES[asked])


def decompose(store="full", **options):
    return lambda: prep.decompose(store, quiet=True, **options)


DECOMPOSE = {
    "no store": (decompose("none"), "no store at none: run `prep covariance --model X --data Y` first"),
    "no store for metric identity": (
        decompose("none", metric="identity"),
        "no store at none: run `prep covariance --model X --data Y` first, or name the --model (metric identity "
        "needs no covariance)",
    ),
    "a store without moments": (
        decompose("bases"),
        "bases holds no moments: metric full needs moments: run `prep covariance` first",
    ),
    "full from a diagonal": (
        decompose("diagonal"),
        "model.layers.0.self_attn.q_proj: metric full needs the full second moment, not diagonal: run `prep "
        "covariance --moment full` into another --store, or with --overwrite",
    ),
    "components from a diagonal": (
        decompose("diagonal", for_="eva"),
        "model.layers.0.self_attn.q_proj: metric components needs the full second moment, not diagonal: run "
        "`prep covariance --moment full` into another --store, or with --overwrite",
    ),
    "activation from a diagonal": (
        decompose("diagonal", for_="antipasto"),
        "model.layers.0.self_attn.q_proj: select activation needs the full second moment, not diagonal: run "
        "`prep covariance --moment full` into another --store, or with --overwrite",
    ),
    "magnitudes without tokens": (
        decompose("full", for_="antipasto", pooling="mean_abs"),
        "model.layers.0.self_attn.q_proj: pooling mean_abs needs a sample of the tokens, and none was kept: run its "
        "`prep covariance` command again with `--overwrite --keep-tokens 4096`",
    ),
    "magnitudes without tokens of a diagonal": (
        decompose("diagonal", for_="antipasto", pooling="mean_abs"),
        "model.layers.0.self_attn.q_proj: pooling mean_abs needs a sample of the tokens, and none was kept: run its "
        "`prep covariance` command again with `--overwrite --keep-tokens 4096`",
    ),
    "magnitudes without tokens of a pool": (
        decompose("pool", for_="antipasto", pooling="mean_abs"),
        "model.layers.0.self_attn.q_proj: pooling mean_abs needs a sample of the tokens, and none was kept: calibrate "
        "the parts of this pool with `--keep-tokens 4096` and pool them again",
    ),
    "magnitudes without tokens of batches": (
        lambda: prep.decompose("batches", metric="identity", select="activation", pooling="mean_abs", model=Net()),
        "first: pooling mean_abs needs a sample of the tokens, and none was kept: calibrate again with "
        "overwrite=True, keep_tokens=4096",
    ),
    "magnitudes of the top": (
        decompose(pooling="mean_abs"),
        "pooling mean_abs is for select activation, not top: take that, or rms",
    ),
    "no such pooling": (
        decompose(for_="antipasto", pooling="max"),
        "pooling 'max' does not exist: take one of rms, mean_abs",
    ),
    "power 1 from an output": (
        decompose("output", for_="corda_ipm"),
        "model.layers.0.self_attn.q_proj: metric full at power 1 needs the full second moment, not output: run "
        "`prep covariance --moment full` into another --store, or with --overwrite",
    ),
    "components from an output": (
        decompose("output", for_="eva"),
        "model.layers.0.self_attn.q_proj: metric components needs the full second moment, not output: run `prep "
        "covariance --moment full` into another --store, or with --overwrite",
    ),
    "a plain SVD of an output": (
        decompose("output", solver="svd"),
        "model.layers.0.self_attn.q_proj: solver svd in metric full needs the full second moment, not output: "
        "run `prep covariance --moment full` into another --store, or with --overwrite",
    ),
    "another model of a store of bases": (
        decompose("bases", model="gpt2", metric="identity", rank=2, name="other"),
        "bases is of another model (.../model): name another --store",
    ),
    "other shapes": (
        decompose(name="other", model="other-shapes"),
        "model.layers.0.mlp.gate_proj is 64 x 32 in the model and 48 x 32 in the store: give the --model that "
        "was calibrated",
    ),
    "other layers": (
        decompose(name="other", model="gpt2"),
        "the model has no layer model.layers.0.self_attn.q_proj, which the store was calibrated on: give its --model",
    ),
    "an output of other weights": (
        decompose("output", model="changed"),
        "model.layers.0.mlp.up_proj has an output moment of other weights than this model's: give the --model "
        "that was calibrated",
    ),
    "weights that are not finite": (
        decompose(name="other", model="infinite"),
        "model.layers.1.self_attn.o_proj: the weight holds NaN or Inf: check the checkpoint",
    ),
    "a basis of other options": (
        decompose(rank=6, power=1, name="full"),
        "full holds a basis 'full' with other options (power: 0.5 there, 1 asked for; rank: 4 there, 6 asked "
        "for): give this one another --name, or replace it with --overwrite",
    ),
    "a basis of another dtype": (
        decompose(rank=4, dtype="bfloat16"),
        "full holds a basis 'full' with other options (dtype: 'float32' there, 'bfloat16' asked for): give this "
        "one another --name, or replace it with --overwrite",
    ),
    "no such dtype": (
        decompose(dtype="float64"),
        "--dtype 'float64' does not exist: take one of float32, bfloat16, float16",
    ),
    "a name that leads out": (
        decompose(name="../up"),
        "--name '../up' cannot name a basis: use letters, digits, dots and dashes",
    ),
    "rank 0": (decompose(rank=0), "rank 0 is too small: ask for at least 1"),
    "a negative power": (decompose(power=-1), "power -1 is not allowed: give a finite number >= 0"),
    "no such method": (
        decompose(for_="nope"),
        "--for 'nope' does not exist: take one of pissa, milora, mica, corda_ipm, corda_kpm, whitened, "
        "antipasto_corda, asvd, antipasto_asvd, astra, eva, lora_null, antipasto, antipasto_rot, antipasto_ablate, "
        "antipasto_dplr, antipasto_arrow, lora_xs",
    ),
    "a mean that metric identity does not take": (
        decompose(metric="identity", center=True),
        "center has no effect in metric identity: leave it out, or take metric full or diagonal",
    ),
    "pissa in another metric": (
        decompose(for_="pissa", metric="full"),
        "pissa has the metric identity, not full: leave out --metric, or leave out --for and give --metric, "
        "--power and --select",
    ),
    "milora from the top": (
        decompose(for_="milora", select="top"),
        "milora has the select bottom, not top: leave out --select, or leave out --for and give --metric, "
        "--power and --select",
    ),
    "corda_ipm at another power": (
        decompose(for_="corda_ipm", power=0.5),
        "corda_ipm has the power 1, not 0.5: leave out --power, or leave out --for and give --metric, --power "
        "and --select",
    ),
    "whitened about the mean": (
        decompose(for_="whitened", center=True),
        "whitened has the center False, not True: leave out --center, or leave out --for and give --metric, "
        "--power and --select",
    ),
    "a repair of an output": (
        decompose("output", repair="int4"),
        "model.layers.0.self_attn.q_proj: the moment of its output tells W C W^T, not E C E^T: take --metric diagonal, "
        "or run `prep covariance --moment full` into another --store, or with --overwrite",
    ),
    "a repair by components": (
        decompose(repair="int4", for_="eva"),
        "--repair takes the top of the error, not metric components: leave out --for and --select",
    ),
    "a repair from the bottom": (
        decompose(repair="int4", select="bottom"),
        "--repair takes the top of the error, not select bottom: leave out --for and --select",
    ),
    "no such recipe": (
        decompose(repair="itn4"),
        "--repair 'itn4' is no recipe (nf4, fp4, int8, int4, int3, int2, int4-g128 ...) and no directory here (did you "
        "mean 'int4'?): give one of them, or the path or hub id of a quantised model",
    ),
    "no such copy": (
        decompose(repair="./nowhere"),
        "no model at ./nowhere: give a directory with config.json or a hub id",
    ),
    "a copy of another model": (
        decompose(repair="gpt2"),
        "the quantised copy has no linear layer model.layers.0.self_attn.q_proj of 32 x 32: give --repair a copy of "
        "the model that is decomposed",
    ),
    "a copy that is not finite": (
        decompose(repair="infinite"),
        "model.layers.1.self_attn.o_proj: the quantised weight holds NaN or Inf: check the copy given to --repair",
    ),
    "a basis of the weights by the name of a repair": (
        decompose(repair="int4", name="full", rank=4),
        "full holds a basis 'full' with other options (repair: None there, 'int4' asked for): give this one another "
        "--name, or replace it with --overwrite",
    ),
    "a folder that is no store": (
        decompose("folder", metric="identity", model="model"),
        "folder is not a prep store: name another --store",
    ),
}


@pytest.mark.parametrize("asked", DECOMPOSE)
def test_decompose(here, asked):
    messages.check(*DECOMPOSE[asked])
