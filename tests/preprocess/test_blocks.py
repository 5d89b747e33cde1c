"""`--block-by-block`: the store is that of the ordinary pass bit for bit, weights are read once, a killed run goes on.

The oracle is the ordinary calibration of the same checkpoint; what is read and held is counted where it is read.
"""

import json
import os
import random
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import kills
import pytest
import tiny
import torch
from families import FAMILIES, SENTENCES, inputs, without

import prep
from prep import PrepError
from prep.errors import Interrupted
from prep.preprocess.calibration import blocks, choice
from prep.preprocess.calibration.blocks import BlockByBlock
from prep.preprocess.calibration.scratch import folder_of
from prep.preprocess.model.checkpoint import checkpoint_of
from prep.preprocess.model.stack import Stack, checked
from prep.store import open_store
from prep.store.checkpoint import read_checkpoint

RUN = {"num_sequences": 24, "seq_len": 16, "batch_size": 4, "pack": False, "quiet": True}
SMALL = 30_000  # bytes: several passes over every block, hidden states on disk
DEEP = replace(FAMILIES["Mixtral"], config=FAMILIES["Mixtral"].config | {"num_hidden_layers": 3})
SHARED = tiny.Family(  # the last two blocks read keys and values of the ones before
    "gemma3n_text",
    "AutoModelForCausalLM",
    {
        **tiny.DENSE,
        **tiny.HEADS,
        "num_hidden_layers": 4,
        "intermediate_size": [48] * 4,
        "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
        "num_kv_shared_layers": 2,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.0] * 4,
    },
)
ALBERT = tiny.Family("albert", "AutoModelForMaskedLM", {**tiny.DENSE, "embedding_size": 16})


def calibrate(made, store, **changed):
    return prep.covariance(made.model, made.data, store=store, **{**RUN, "block_by_block": True, **changed})


def assert_same(a, b):
    """Two stores have the same files and attributes, but for when and where they were made."""
    (one, at_one), (other, at_other) = ((tiny.contents(path), open_store(path).attrs) for path in (a, b))
    assert {**at_one, "run": None} == {**at_other, "run": None}
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name] and name != "zarr.json"] == []


def saved(path: Path, family, data: str) -> SimpleNamespace:
    return SimpleNamespace(path=path, data=data, model=tiny.save(tiny.model(family), path / "model", family.side))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A mixture of experts of three blocks, text, and the store of an ordinary run."""
    path = tmp_path_factory.mktemp("blocks")
    one = saved(path, DEEP, tiny.write_data(path / "text.jsonl", SENTENCES))
    one.whole = path / "whole"
    calibrate(one, one.whole, block_by_block=False)
    return one


# The same store


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "T5"])
def test_every_family_is_refused_or_bitwise_the_same(tmp_path, name):
    family = FAMILIES[name]
    one = saved(tmp_path, family, tiny.write_data(tmp_path / "text.jsonl", SENTENCES))
    options = {"keep_tokens": 10}
    if name == "ViT":
        one.data, options = None, {"batches": [without(batch, "labels") for batch in inputs(name, 4)]}
    calibrate(one, tmp_path / "a", block_by_block=False, **options)
    calibrate(one, tmp_path / "b", **options)
    assert_same(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(
    "options",
    [
        {"memory_budget": SMALL},
        {"moment": "output", "dtype": "bfloat16", "moment_dtype": "float32"},
        {"layers": "2", "exclude": ["experts"]},
        {"pack": True, "num_sequences": 6, "compat": "peft-corda"},
    ],
    ids=["disk and passes", "outputs", "a deep block", "compat"],
)
def test_with_other_options(made, tmp_path, options):
    calibrate(made, tmp_path / "a", **{"block_by_block": False, **options})
    calibrate(made, tmp_path / "b", **options)
    assert_same(tmp_path / "a", tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_store_grows_block_by_block(made, tmp_path):
    one = saved(tmp_path, FAMILIES["Llama"], made.data)
    for store, ways in (("a", (False, False)), ("b", (False, True)), ("c", (True, False))):
        for way, sequences in zip(ways, (8, 24), strict=True):
            calibrate(one, tmp_path / store, num_sequences=sequences, block_by_block=way)
    assert_same(tmp_path / "a", tmp_path / "b")
    assert_same(tmp_path / "a", tmp_path / "c")


# What is read and held


@pytest.mark.parametrize("budget", [SMALL, 10**9], ids=["several passes", "one pass"])
def test_weights_are_read_once_and_one_block_is_held(made, tmp_path, monkeypatch, budget):
    read, held = [], []

    class Counted(BlockByBlock):
        def batches(self, part):
            for batch in super().batches(part):
                yield batch
                blocks_held = {
                    number
                    for number, name in enumerate(self._stack.names)
                    if not all(weight.is_meta for weight in self._stack.net.get_submodule(name).parameters())
                }
                held.append((blocks_held, {self._network.blocks[name] for name in part.sums}))

        def store(self):
            read.append(checkpoint_of(self._network.module).bytes_read)
            return super().store()

    monkeypatch.setattr("prep.preprocess.covariance.BlockByBlock", Counted)
    calibrate(made, tmp_path / "s", memory_budget=budget)
    assert 0 < read[0] <= 1.1 * sum(file.stat().st_size for file in Path(made.model).glob("*.safetensors"))
    passes = len(held) // 18
    assert len(held) == 18 * passes and (passes > 1) == (budget == SMALL)
    assert [(list(a), list(b)) for a, b in held] == [([n], [n]) for n in range(3) for _ in range(6 * passes)]


def test_a_model_that_does_not_fit_is_taken_block_by_block(made, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(choice, "free_memory", lambda: 1000)
    calibrate(made, tmp_path / "a", block_by_block=None, quiet=False)
    assert "0.0 GB are free: block by block (--no-block-by-block loads it whole)" in capfd.readouterr().err
    calibrate(made, tmp_path / "b", block_by_block=False, quiet=False)
    assert "block by block" not in capfd.readouterr().err
    assert_same(tmp_path / "a", tmp_path / "b")


def test_a_dry_run_tells_blocks_and_scratch(made, tmp_path, capfd):
    plain = calibrate(made, tmp_path / "s", dry_run=True, block_by_block=False)
    told = calibrate(made, tmp_path / "s", dry_run=True, quiet=False)
    line = "dry run: loads the largest block and runs one batch through it; nothing is stored\n"
    assert capfd.readouterr().err == line
    assert (told.blocks, told.passes, told.scratch, plain.blocks) == (3, 3, 0, 0)
    assert told.accumulators < plain.accumulators and told.disk == plain.disk
    assert told.hidden == 24 * max(len(text.split()) for text in SENTENCES) * 32 * 4
    assert calibrate(made, tmp_path / "s", dry_run=True, memory_budget=SMALL).scratch == 2 * told.hidden
    assert not (tmp_path / "s").exists()


def test_what_is_told_is_of_the_block_under_way(made, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("prep.preprocess.progress._LINE_EVERY", 0.0)
    packed = {"pack": True, "num_sequences": 4, "batch_size": 2, "quiet": False}
    calibrate(made, tmp_path / "s", **packed, layers="1-2", exclude=["experts"], memory_budget=10_000)
    told = [line.split(" in ")[0] for line in capfd.readouterr().err.splitlines() if line.startswith("covariance")]
    passes = [f"block {block} of 3, pass {number} of 2" for block in (2, 3) for number in (1, 2)]
    assert told == [f"covariance: {one}, {tokens} of 64 tokens" for one in passes for tokens in (32, 64)]


# Killed and resumed


def killed(made, store, batches, **options):
    """A run in a process of its own that dies by SIGKILL after so many batches; whether it was killed."""
    said = store.parent / "said"
    given = {"model": made.model, "data": made.data, "store": str(store), **RUN, "checkpoint_every": 0.0}
    process = kills.CONTEXT.Process(
        target=kills.cut_short, args=({**given, "block_by_block": True, **options}, 1, batches, str(said))
    )
    process.start()
    process.join()
    return process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("budget", "batches"), [(SMALL, 8), (10**9, 12)], ids=["in a block, on disk", "after a block, in memory"]
)
def test_killed_and_resumed(made, tmp_path, budget, batches):
    store = tmp_path / "s"
    assert killed(made, store, batches, memory_budget=budget)
    assert read_checkpoint(open_store(store).root)["batches"] > 0
    assert folder_of(store).exists() == (budget == SMALL)
    calibrate(made, store, memory_budget=budget)
    assert not folder_of(store).exists()
    assert_same(store, made.whole)


@pytest.mark.parametrize("first", [True, False], ids=["begun by blocks", "ended by blocks"])
def test_resumed_in_the_other_way(made, tmp_path, first):
    """The one that completes the store takes away what the other has left beside it."""
    store = tmp_path / "s"
    budget = SMALL if first else 10**9
    assert killed(made, store, 9 if first else 4, block_by_block=first, memory_budget=budget)
    assert folder_of(store).exists() == first
    calibrate(made, store, block_by_block=not first)
    assert_same(store, made.whole)
    assert not folder_of(store).exists()


def test_a_signal_stores_the_state(made, tmp_path, monkeypatch):
    put, left = blocks.Scratch.put, [9]

    def signalled(self, *arguments):
        put(self, *arguments)
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(blocks.Scratch, "put", signalled)
    with pytest.raises(Interrupted, match="which are stored"):
        calibrate(made, tmp_path / "s")
    calibrate(made, tmp_path / "s")
    assert_same(tmp_path / "s", made.whole)


def test_other_weights_are_refused_on_resume(made, tmp_path):
    other = SimpleNamespace(**{**vars(made), "model": str(tmp_path / "model")})
    tiny.save(tiny.model(DEEP), tmp_path / "model", DEEP.side)
    assert killed(other, tmp_path / "s", 9)
    tiny.save(tiny.model(DEEP, seed=1), tmp_path / "model", DEEP.side)
    before = tiny.contents(tmp_path / "s")
    for way in (True, False):
        with pytest.raises(PrepError, match=r"was made from other weights than .* has now"):
            calibrate(other, tmp_path / "s", block_by_block=way)
    assert tiny.contents(tmp_path / "s") == before


@pytest.mark.stress
def test_killed_at_random(made, tmp_path):
    draw = random.Random(0)
    for number in range(20):
        store, budget = tmp_path / str(number), draw.choice([SMALL, 10**9])
        options = {"model": made.model, "data": made.data, "store": str(store), **RUN, "checkpoint_every": 0.0}
        options |= {"block_by_block": True, "memory_budget": budget}
        kills.run(kills.covariance, options, 0.01, tmp_path / "said", draw.uniform(0, 0.5), once_at_work=True)
        calibrate(made, store, memory_budget=budget)
        assert_same(store, made.whole)
        assert not folder_of(store).exists()


# Refusals


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        (FAMILIES["T5"], {}, "T5ForConditionalGeneration is an encoder-decoder"),
        (SHARED, {"targets": r"^model\.layers"}, r"hands more to model\.layers\.3 than the block before gives"),
        (SHARED, {}, r"has the stacks model.altup_projections and .* take one of them with --targets"),
        (ALBERT, {}, "AlbertForMaskedLM calls a block more than once"),
        (FAMILIES["Llama"], {"targets": ["q_proj", "lm_head"]}, "has lm_head outside of its blocks: --exclude"),
    ],
    ids=["encoder-decoder", "shared keys", "two stacks", "one block for all", "head"],
)
def test_families_that_cannot_be_run_so(made, tmp_path, family, options, message):
    one = saved(tmp_path, family, made.data)
    with pytest.raises(PrepError, match=message) as caught:
        calibrate(one, tmp_path / "s", **options)
    assert "\n" not in str(caught.value) and "leave out --block-by-block" in str(caught.value)
    assert not (tmp_path / "s").exists()


def test_what_has_no_safetensors_is_refused(made, tmp_path):
    one = saved(tmp_path, FAMILIES["Llama"], made.data)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "transformers_weights": "x.safetensors"}))
    with pytest.raises(PrepError, match=r"cannot be read block by block \(its configuration names files of its own\)"):
        calibrate(one, tmp_path / "s")


def test_a_block_that_reads_what_an_earlier_forward_left(monkeypatch):
    """State that a module keeps between forwards does not pass for what the block is given."""
    net, kept = tiny.llama(), {}
    first = net.model.layers[0]
    forward = type(first).forward

    def writes(self, hidden, **kwargs):
        kept["hidden"] = hidden if self is first else kept["hidden"]
        return forward(self, hidden + kept["hidden"], **kwargs)

    monkeypatch.setattr(type(first), "forward", writes)
    stack = Stack(net, ("model.layers.0", "model.layers.1"), torch.device("cpu"))
    with pytest.raises(PrepError, match=r"hands more to model\.layers\.1"):
        checked(stack, lambda batch: net(**batch), {"input_ids": torch.arange(3, 12)[None]})


def test_something_else_in_the_folder_s_place(made, tmp_path):
    folder = folder_of(tmp_path / "s")
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(PrepError, match="is in the way of the hidden states"):
        calibrate(made, tmp_path / "s", memory_budget=SMALL)
    assert (folder / "notes.txt").read_text() == "mine" and not (tmp_path / "s").exists()
