"""--label-mask: moments of the tokens of answers only, while the model reads whole sequences."""

import json
import signal
from pathlib import Path

import kills
import numpy as np
import pytest
import tiny
import torch
from peft import EvaConfig, LoraConfig, get_eva_state_dict, get_peft_model
from transformers import AutoModelForCausalLM

import prep
from prep.preprocess.corpus.labels import answers
from prep.preprocess.corpus.mixture import load_mixture
from prep.preprocess.corpus.text import CorpusOptions, load_corpus
from prep.store import open_store
from prep.store.checkpoint import read_checkpoint

TEMPLATE = {"template": "{question} w0 {answer}", "label_mask": True, "answer_from": "{answer}"}
RUN = {**tiny.RUN, "num_sequences": 16, "seq_len": 12}
CHAT = (
    "{% for m in messages %}{% if m.role == 'assistant' %}w1 {% generation %}{{ m.content }} {% endgeneration %}"
    "{% else %}{{ m.content }} {% endif %}{% endfor %}"
)
END = tiny.VOCABULARY["<end>"]


def write(path, count=60):
    """Questions of 2 to 5 words with answers of 1 to 6, as columns and as messages."""
    pairs = list(zip(tiny.texts(count, 2, 5), tiny.texts(count, 1, 6, seed=1), strict=True))
    rows = []
    for question, answer in pairs:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append({"question": question, "answer": answer, "messages": turns})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Two saved models with different padding sides, and data with answers."""
    home = tmp_path_factory.mktemp("labels")
    made = tiny.sources(home, padding_side="left")
    made.data = write(home / "pairs.jsonl")
    made.moe = tiny.save(tiny.model("Qwen3-MoE"), home / "moe")
    return made


def corpus(data, tokenizer=None, **options):
    return load_corpus(
        CorpusOptions(data, **{"num_sequences": 16, "seq_len": 12, **options}), tokenizer or tiny.tokenizer()
    )


def seen(model, corpus, layer):
    """The inputs of a layer at the tokens of answers, from one sequence at a time without padding; float64."""
    rows = []
    for ids, answer in zip(corpus.sequences, corpus.labels, strict=True):
        inputs = torch.from_numpy(ids).long()[None]
        rows.append(tiny.Activations(model, [{"input_ids": inputs}])[layer][answer])
    return np.concatenate(rows)


def test_a_token_with_a_character_of_the_answer_is_of_it():
    """Special tokens before the text are not, those behind it are what the text ends with."""
    spans = np.array([(0, 0), (0, 3), (3, 6), (6, 9), (0, 0)])
    assert answers(spans, 3).tolist() == [False, False, True, True, True]
    assert answers(spans, 5).tolist() == [False, False, True, True, True]  # the token reaches over the border
    assert answers(spans, 9).tolist() == [False] * 5
    assert answers(spans, 0).tolist() == [False, True, True, True, True]


@pytest.mark.parametrize("pack", [False, True])
def test_labels_of_a_template(given, pack):
    """Each document is its question, w0 and its answer; packed, the end token is of the answer and all is cut alike."""
    rows = [json.loads(line) for line in Path(given.data).read_text().splitlines()]
    lengths = {f"{row['question']} w0 {row['answer']}": len(row["answer"].split()) for row in rows}
    made = corpus(given.data, pack=pack, **TEMPLATE)
    assert [len(answer) for answer in made.labels] == [len(ids) for ids in made.sequences]
    joined, labels = np.concatenate(made.sequences), np.concatenate(made.labels)
    assert made.tokens == labels.sum() < made.read == len(joined)
    words = np.array(list(tiny.VOCABULARY))[joined]
    documents = np.split(np.arange(len(joined)), np.flatnonzero(joined == END) + 1)[:-1] if pack else None
    documents = documents or np.split(np.arange(len(joined)), np.cumsum([len(ids) for ids in made.sequences]))[:-1]
    for places in documents:
        text = places[words[places] != "<end>"]
        answer = lengths[" ".join(words[text])]
        wanted = [False] * (len(text) - answer) + [True] * (answer + len(places) - len(text))
        assert labels[places].tolist() == wanted
    plain = corpus(given.data, pack=pack, template=TEMPLATE["template"])
    assert all(map(np.array_equal, plain.sequences, made.sequences))
    assert plain.hash != made.hash


@pytest.mark.parametrize("pack", [False, True])
def test_labels_of_a_chat_are_what_its_template_generates(given, pack):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = CHAT
    made = corpus(given.data, tokenizer, pack=pack, chat_column="messages", label_mask=True)
    asked = corpus(given.data, pack=pack, template="{question} w1 {answer}", label_mask=True, answer_from="{answer}")
    assert all(map(np.array_equal, made.sequences, asked.sequences))
    assert all(map(np.array_equal, made.labels, asked.labels))
    tokenizer.chat_template = CHAT.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    with pytest.raises(prep.PrepError, match=r"marks no answers by \{% generation %\}"):
        corpus(given.data, tokenizer, chat_column="messages", label_mask=True)


def test_a_mixture_keeps_the_labels_of_its_sequences(given, tmp_path):
    other = write(tmp_path / "more.jsonl", 40)
    options = CorpusOptions("", num_sequences=9, seq_len=12, **TEMPLATE)
    mixed = load_mixture(options, [(given.data, 2), (other, 1)], tiny.tokenizer())
    parts = [corpus(given.data, num_sequences=6, **TEMPLATE), corpus(other, num_sequences=3, **TEMPLATE)]
    known = {
        ids.tobytes(): answer.tolist()
        for part in parts
        for ids, answer in zip(part.sequences, part.labels, strict=True)
    }
    assert [known[ids.tobytes()] for ids in mixed.sequences] == [answer.tolist() for answer in mixed.labels]
    assert mixed.tokens == sum(part.tokens for part in parts)


@pytest.mark.parametrize("pack", [False, True])
def test_moments_are_those_of_the_answers(given, tmp_path, pack):
    """Against the rows of a plain forward; an output moment, the halves, the sample and the counts are of them, too."""
    model, made = tiny.llama(), corpus(given.data, tiny.tokenizer("left"), pack=pack, **TEMPLATE)
    options = {**RUN, **TEMPLATE, "pack": pack, "keep_tokens": 1000}
    store = prep.covariance(given.model, given.data, store=tmp_path / "s.zarr", **options)
    outputs = prep.covariance(given.model, given.data, store=tmp_path / "o.zarr", moment="output", **options)
    assert store.corpus["tokens"] == made.tokens
    assert store.corpus["tokens_read"] == made.read
    for layer in store.moments:
        X, moment = seen(model, made, layer), store.moments[layer]
        assert moment.count == len(X) == moment.sampled == made.tokens
        assert tiny.relative(moment.second_moment, X.T @ X / len(X)) < 1e-5
        assert tiny.relative(moment.mean, X.mean(0)) < 1e-5
        assert 0 < moment.half.count < moment.count
        Y = X @ tiny.weight(model.get_submodule(layer)).T
        assert tiny.relative(outputs.moments[layer].output, Y.T @ Y / len(Y)) < 1e-5
    [line] = [line for line in prep.info(store)["corpus"].items() if line[0] == "label_mask"]
    assert line == ("label_mask", True)


def test_experts_compute_with_all_tokens_and_count_the_answers(given, tmp_path):
    """What reads the experts' output sees the model as it is; an expert counts the answers routed to it."""
    store = prep.covariance(given.moe, given.data, store=tmp_path / "s.zarr", pack=False, **RUN, **TEMPLATE)
    model = AutoModelForCausalLM.from_pretrained(given.moe).eval()
    made = corpus(given.data, pack=False, **TEMPLATE)
    for layer in tiny.layers(model):
        X = seen(model, made, layer)
        assert tiny.relative(store.moments[layer].second_moment, X.T @ X / len(X)) < 1e-5
    for block in "01":
        names = [x for x in store.moments if f"layers.{block}." in x and x.endswith("gate_up_proj")]
        assert sum(store.moments[name].count for name in names) == 2 * made.tokens  # each goes to two experts


def test_a_killed_run_goes_on_to_the_same_store(given, tmp_path):
    """Killed after 5 batches of several passes; sums, halves and samples are those of a run that nothing ended."""
    options = {**RUN, **TEMPLATE, "batch_size": 2, "keep_tokens": 20, "memory_budget": 60_000}
    whole = prep.covariance(given.model, given.data, store=tmp_path / "whole", **options)
    killed = {
        **options,
        "model": given.model,
        "data": given.data,
        "store": str(tmp_path / "s"),
        "checkpoint_every": 0.0,
    }
    process = kills.CONTEXT.Process(target=kills.cut_short, args=(killed, 1, 5, str(tmp_path / "said")))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert read_checkpoint(open_store(tmp_path / "s").root)["batches"] > 0
    again = prep.covariance(given.model, given.data, store=tmp_path / "s", **options)
    (one, other), attrs = (tiny.contents(tmp_path / name) for name in ("whole", "s")), {"run": None}
    assert {**whole.attrs, **attrs} == {**again.attrs, **attrs}
    assert {**one, "zarr.json": b""} == {**other, "zarr.json": b""}


def test_growing_and_other_labels(given, tmp_path):
    """More sequences go on with the store of fewer; another mask is another run."""
    few = {**RUN, "num_sequences": 8}
    store = tmp_path / "s.zarr"
    prep.covariance(given.model, given.data, store=store, **few, **TEMPLATE)
    for change in ({"answer_from": "w0 {answer}"}, {"label_mask": False, "answer_from": None}):
        with pytest.raises(prep.PrepError, match=r"corpus (label_mask|answer_from)"):
            prep.covariance(given.model, given.data, store=store, **few, **{**TEMPLATE, **change})
    grown = prep.covariance(given.model, given.data, store=store, **RUN, **TEMPLATE)
    whole = prep.covariance(given.model, given.data, store=tmp_path / "w.zarr", **RUN, **TEMPLATE)
    for layer in whole.moments:
        assert grown.moments[layer].count == whole.moments[layer].count
        assert tiny.relative(grown.moments[layer].second_moment, whole.moments[layer].second_moment.numpy()) < 1e-12
    plain = tmp_path / "p.zarr"
    prep.covariance(given.model, given.data, store=plain, **few, template=TEMPLATE["template"])
    with pytest.raises(prep.PrepError, match="corpus label_mask: None there, True asked for"):
        prep.covariance(given.model, given.data, store=plain, **few, **TEMPLATE)


def test_eva_of_answers_is_pefts(given, tmp_path):
    """PEFT's EvaConfig(use_label_mask=True), fed the same sequences with -100 on all but answers."""
    made = corpus(given.data, **TEMPLATE)
    labels = np.where(np.stack(made.labels), np.stack(made.sequences), -100)
    batch = {"input_ids": torch.from_numpy(np.stack(made.sequences)).long(), "labels": torch.from_numpy(labels).long()}
    config = LoraConfig(
        r=4, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0), target_modules=["q_proj", "up_proj"]
    )
    theirs = get_eva_state_dict(get_peft_model(tiny.llama(), config), [batch], show_progress_bar=False)
    prep.covariance(given.model, given.data, store=tmp_path / "s.zarr", **RUN, **TEMPLATE)
    basis = prep.decompose(tmp_path / "s.zarr", for_="eva", rank=4, quiet=True)
    for name, rows in theirs.items():
        P = basis[name.removeprefix("base_model.model.")].P
        assert torch.nn.functional.cosine_similarity(P[:2], rows[:2].float()).abs().min() > 0.999


def test_sequences_without_an_answer_count_for_nothing(given, tmp_path):
    """Batches with none are read, and a corpus of such sequences is refused."""
    path = tmp_path / "d.jsonl"
    path.write_text(
        "".join(json.dumps({"question": " ".join(tiny.WORDS[:20]), "answer": "w9"}) + "\n" for _ in range(9))
    )
    with pytest.raises(prep.PrepError, match="holds no token of an answer in 8 sequences: check --answer-from"):
        prep.covariance(
            given.model, str(path), store=tmp_path / "s.zarr", pack=False, **{**RUN, "num_sequences": 8}, **TEMPLATE
        )
    assert not (tmp_path / "s.zarr").exists()
    long = {**RUN, "num_sequences": 8, "batch_size": 1}
    store = prep.covariance(given.model, str(path), store=tmp_path / "s.zarr", **long, **TEMPLATE)
    assert store.corpus["tokens"] < open_store(store.location).corpus["tokens_read"] == 96
