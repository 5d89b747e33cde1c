"""Mixtures of data: sequences in proportion to weights, by seed alone, known to everything that asks what was read."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from click.testing import CliRunner

import prep
from prep import PrepError
from prep.cli import main
from prep.preprocess.calibration.job import Calibration
from prep.preprocess.corpus.mixture import allotted, load_mixture
from prep.preprocess.corpus.text import CorpusOptions, load_corpus
from prep.preprocess.verify import verify
from prep.store import open_store
from prep.store.info import info, table
from prep.units import parse_mixture

RUN = {"num_sequences": 12, "seq_len": 16, "batch_size": 4, "quiet": True}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("made")
    names = {name: tiny.write_data(path / f"{name}.jsonl", tiny.texts(60, seed=i)) for i, name in enumerate("abc")}
    return SimpleNamespace(path=path, model=tiny.save(tiny.llama(), path / "model"), **names)


def lists(corpus):
    return [sequence.tolist() for sequence in corpus.sequences]


@pytest.mark.parametrize("pack", [True, False])
def test_sequences_are_those_of_each_source_in_proportion_at_any_length(made, pack):
    weights, counts = {made.a: 5, made.b: 2, made.c: 1}, {made.a: 13, made.b: 5, made.c: 2}  # of 12.5, 5 and 2.5
    options, words = CorpusOptions("", num_sequences=20, seq_len=8, pack=pack, seed=3), tiny.tokenizer()
    mixed = load_mixture(options, list(weights.items()), words)
    alone = {
        name: lists(load_corpus(CorpusOptions(name, num_sequences=n, seq_len=8, pack=pack, seed=3), words))
        for name, n in counts.items()
    }
    left = {name: list(sequences) for name, sequences in alone.items()}
    for position, sequence in enumerate(lists(mixed), 1):
        [name] = [name for name, sequences in left.items() if sequences and sequences[0] == sequence]
        left[name].pop(0)
        for other, sequences in alone.items():
            assert abs(len(sequences) - len(left[other]) - position * len(sequences) / 20) < 1
    assert not any(left.values())


def test_counts_are_largest_remainders():
    rng = np.random.default_rng(0)
    for _ in range(200):
        weights = [int(weight) for weight in rng.integers(1, 50, rng.integers(1, 6))]
        total = int(rng.integers(1, 300))
        counts, exact = allotted(total, weights), total * np.array(weights) / sum(weights)
        assert sum(counts) == total and np.abs(counts - exact).max() < 1
        up = [i for i, count in enumerate(counts) if count > exact[i]]
        down = [i for i, count in enumerate(counts) if count < exact[i]]
        assert all(exact[i] % 1 >= exact[j] % 1 - 1e-9 for i in up for j in down)


def test_the_moments_are_those_of_the_parts_together(made, tmp_path):
    """C of the mixture is the mean over the tokens of both, which `pool` takes of two stores."""
    prep.covariance(made.model, {made.a: 2, made.b: 1}, store=tmp_path / "mixed", **RUN)
    for name, count in (("a", 8), ("b", 4)):
        options = {**RUN, "num_sequences": count}
        prep.covariance(made.model, getattr(made, name), store=tmp_path / name, **options)
    wanted = prep.pool([tmp_path / "a", tmp_path / "b"], store=tmp_path / "pool").moments
    found = open_store(tmp_path / "mixed").moments
    for layer in wanted:
        assert found[layer].count == wanted[layer].count == 12 * 16
        assert tiny.relative(found[layer].second_moment, wanted[layer].second_moment.numpy()) < 1e-6


def test_one_source_is_no_mixture(made, tmp_path):
    stores = []
    for i, data in enumerate([made.a, [made.a], (f"{made.a}=2",), {made.a: 0.5}]):
        stores.append(prep.covariance(made.model, data, store=tmp_path / f"{i}", **RUN))
    fields = {"source", "subset", "split", "text_column", "template", "chat_column", "num_sequences", "seq_len"}
    fields |= {"pack", "seed", "tokens", "hash"}
    assert set(stores[0].corpus) == fields and stores[0].corpus["source"] == made.a
    for store in stores[1:]:
        assert {**store.attrs, "run": None} == {**stores[0].attrs, "run": None}
        assert tiny.contents(f"{store.location}/moments") == tiny.contents(f"{stores[0].location}/moments")


def covariance(made, *options):
    run = ["--num-sequences", "12", "--seq-len", "16", "--batch-size", "4"]
    return CliRunner().invoke(main, ["covariance", "--model", made.model, *map(str, options), *run])


def test_the_store_knows_its_mixture_however_it_is_spelled(made, tmp_path):
    store = tmp_path / "s"
    result = covariance(made, "--data", f"{made.a}=2", "--data", made.b, "--store", store)
    assert result.exit_code == 0, result.output
    corpus = open_store(store).corpus
    assert corpus["source"] == f"2 x {made.a} + 1 x {made.b}"
    assert corpus["mixture"] == [
        {"source": made.a, "weight": 2, "sequences": 8, "tokens": 128},
        {"source": made.b, "weight": 1, "sequences": 4, "tokens": 64},
    ]
    lines = table(info(open_store(store)))
    assert "corpus   mixture of 2, train: 12 x 16, packed, 192 tokens" in lines
    assert f"         2 x {made.a}, 8 sequences, 128 tokens" in lines
    before = tiny.contents(store)
    for data in ({made.b: 1, made.a: 2}, {made.a: 4, made.b: 2}, [made.b, f"{made.a}=2"], {made.a: 1, made.b: 0.5}):
        prep.covariance(made.model, data, store=store, **RUN)
        assert tiny.contents(store) == before
    for data in ({made.a: 1, made.b: 1}, {made.a: 2, made.c: 1}, made.a):
        with pytest.raises(PrepError, match=r"holds a run with other options .*corpus source"):
            prep.covariance(made.model, data, store=store, **RUN)
    assert verify(store).findings == []
    other = prep.covariance(made.model, made.c, store=tmp_path / "other", **RUN)
    pooled = prep.pool([store, other.location], store=tmp_path / "pool")
    assert pooled.corpus["parts"][0]["corpus"] == corpus
    assert verify(tmp_path / "pool").findings == []


def test_an_interrupted_mixture_goes_on(made, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    data, options = {made.a: 2, made.b: 1}, {**RUN, "checkpoint_every": 0.0}
    prep.covariance(made.model, data, store=whole, **options)
    added, count = Calibration._added, []

    def stop(self, *arguments):
        added(self, *arguments)
        count.append(arguments)
        if len(count) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Calibration, "_added", stop)
        patch.setattr("prep.preprocess.calibration.job.CHECKPOINT_SHARE", 1.0)
        with pytest.raises(KeyboardInterrupt):
            prep.covariance(made.model, data, store=cut, **options)
    with pytest.raises(PrepError, match=r"holds a run with other options .*corpus mixture"):
        prep.covariance(made.model, {made.a: 1, made.b: 1}, store=cut, **options)
    monkeypatch.setattr(Calibration, "_added", lambda self, *arguments: (count.append(1), added(self, *arguments))[1])
    prep.covariance(made.model, data, store=cut, **options)
    assert len(count) < 2 + 3  # of three batches what the last checkpoint does not hold
    assert open_store(cut).id == open_store(whole).id
    assert tiny.contents(cut / "moments") == tiny.contents(whole / "moments")


def test_a_dry_run_counts_the_whole_mixture(made, tmp_path):
    needed = prep.covariance(made.model, [made.a, made.b], store=tmp_path / "s", dry_run=True, **RUN)
    assert needed.tokens == 12 * 16
    assert not (tmp_path / "s").exists()


def test_what_is_wrong_with_a_mixture_is_one_line(made, tmp_path):
    def message(data, **options):
        with pytest.raises(PrepError) as caught:
            prep.covariance(made.model, data, store=tmp_path / "s", **{**RUN, **options})
        assert "\n" not in str(caught.value)
        return str(caught.value)

    for weight in ("0", "-1", "nan", "inf", "1e-9"):
        assert message([f"{made.a}={weight}", made.b]).startswith(f"--data {made.a} has the weight {weight}: give a")
    assert message([]) == "--data names nothing to read: give a file, a glob or a hub id"
    assert message([made.a, f"{made.a}=3"]) == (
        f"{made.a} is named twice in --data: give it one weight, as in {made.a}=2"
    )
    few = message({made.a: 99, made.b: 1})
    assert few.startswith(f"12 sequences leave none for {made.b} with 1 of 100 parts: ask for --num-sequences 100")
    assert message([made.a, str(made.path / "none.jsonl")]).startswith("no such file")
    short = tiny.write_data(tmp_path / "short.jsonl", tiny.texts(5))
    little = message({made.a: 2, short: 1}, num_sequences=12)
    asked = int(re.search(r"use --num-sequences (\d+), ", little)[1])
    assert little.startswith(f"{short} gives ") and 0 < asked < 12
    prep.covariance(made.model, {made.a: 2, short: 1}, store=tmp_path / "s", **{**RUN, "num_sequences": asked})
    assert not any(tmp_path.glob("s.*"))


def test_a_weight_is_read_only_where_it_is_none_of_the_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "year=2020").mkdir()
    assert parse_mixture(["year=2020", "other=2020", "b.jsonl=0.5", "c=d.jsonl"]) == (
        ("year=2020", 2),
        ("other", 4040),
        ("b.jsonl", 1),
        ("c=d.jsonl", 2),
    )
    assert parse_mixture({"x": 1 / 3, "y": 1}) == (("x", 333333), ("y", 1000000))
