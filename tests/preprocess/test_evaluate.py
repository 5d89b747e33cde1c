"""`prep evaluate` against both weights run on the very tokens, and the halves that a calibration keeps."""

import json
import shutil
import statistics

import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner

import prep
from prep import Interrupted, PrepError, StoreError
from prep.cli import main
from prep.linear import weight_matrix
from prep.preprocess.calibration.job import Calibration
from prep.preprocess.decomposition.crossing import sampled
from prep.preprocess.model.experts import expert_layers
from prep.preprocess.numerics import evaluation
from prep.preprocess.verify import verify
from prep.store import open_store
from prep.store.excess import EXPONENT, advice, percent
from prep.store.info import info as describe
from prep.store.info import table

RUN = {"seq_len": 16, "batch_size": 4, "num_sequences": 24, "dtype": "float64", "quiet": True}
BASES = {
    "full": {},
    "full-p1": {"power": 1.0},
    "diagonal": {"metric": "diagonal"},
    "identity-activation": {"metric": "identity", "select": "activation"},
    "full-bottom": {"select": "bottom"},
    "eva": {"for_": "eva"},
}
OUTPUT_BASES = ("full", "identity-activation")
RANK = 12


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    path = tmp_path_factory.mktemp("evaluate")
    tiny.write_data(path / "a.jsonl", tiny.texts(120))
    tiny.write_data(path / "b.jsonl", tiny.texts(120, seed=7))
    tiny.save(tiny.llama(80), path / "model")
    return path


@pytest.fixture(scope="module")
def stores(place):
    """Full and output moments of one text with their bases, and the full moments of another text."""
    for kind in ("full", "output"):
        prep.covariance(str(place / "model"), str(place / "a.jsonl"), store=place / kind, moment=kind, **RUN)
        for name in BASES if kind == "full" else OUTPUT_BASES:
            prep.decompose(place / kind, rank=RANK, quiet=True, **BASES[name])
    prep.covariance(str(place / "model"), str(place / "b.jsonl"), store=place / "other", **RUN)
    return place


def inputs(place, data):
    """The model in float64 and its layers' inputs on the very tokens of a calibration."""
    from prep.preprocess.corpus.source import open_source
    from prep.preprocess.model.loading import load_model
    from prep.preprocess.options import CovarianceOptions

    options = CovarianceOptions(str(place / "model"), str(place / data), **RUN)
    net = load_model(str(place / "model"), dtype="float64", device="cpu")
    return net, tiny.Activations(net, list(open_source(options).read()))


def lost(X, W, basis, rank):
    """The share of E||W x||^2 that a basis loses, by running both weights."""
    U, S, P = (getattr(basis, name).double().numpy() for name in "USP")
    Y = X @ W.T - (X @ P[:rank].T * S[:rank]) @ U[:, :rank].T
    return np.sum(Y**2) / np.sum((X @ W.T) ** 2)


def variance_lost(X, basis, rank):
    """The share of the input variance that P misses."""
    P, X = basis.P.double().numpy()[:rank], X - X.mean(0)
    return 1 - np.sum((X @ P.T) ** 2) / np.sum(X**2)


@pytest.mark.parametrize(("kind", "on"), [("full", None), ("full", "other"), ("output", None), ("output", "other")])
def test_every_row_against_the_tokens(stores, kind, on):
    rows = prep.evaluate(stores / kind, on=None if on is None else stores / on, ranks=[1, 5, RANK])
    net, X = inputs(stores, "a.jsonl" if on is None else "b.jsonl")
    modules, bases = dict(net.named_modules()), open_store(stores / kind).bases
    names = BASES if kind == "full" else OUTPUT_BASES
    assert len(rows) == len(names) * 14 * 3
    for row in rows:
        basis = bases[row.basis][row.layer]
        if row.basis == "eva":
            wanted = variance_lost(X[row.layer], basis, row.rank)
        else:
            wanted = lost(X[row.layer], tiny.weight(modules[row.layer]), basis, row.rank)
        assert row.lost == pytest.approx(wanted, rel=1e-6, abs=1e-6)
        assert (row.excess is None) == (on is not None)


def test_experts(tmp_path):
    """Each projection of each expert on the tokens that were routed to it; a half without tokens has no excess."""
    model = tiny.model("Mixtral", dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(3, tiny.SIZE, (2, 12), generator=generator) for _ in range(6)]
    prep.covariance(model, batches=batches, store=tmp_path / "s", quiet=True)
    prep.decompose(tmp_path / "s", model=model, rank=6, quiet=True)
    rows = prep.evaluate(tmp_path / "s", model=model, ranks=[2, 6], sample=0)
    store, experts = open_store(tmp_path / "s"), expert_layers(model)
    assert any(row.layer in experts for row in rows)
    for row in rows:
        moment = store.moments[row.layer]
        assert (row.excess is not None) == (moment.half is not None)
        if row.layer in experts:
            W = weight_matrix(experts[row.layer]).double().numpy()
            basis = store.bases["full"][row.layer]
            U, S, P = (getattr(basis, name).double().numpy() for name in "USP")
            D = W - (U[:, : row.rank] * S[: row.rank]) @ P[: row.rank]
            C = moment.second_moment.numpy()
            assert row.lost == pytest.approx(np.trace(D @ C @ D.T) / np.trace(W @ C @ W.T), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("kind", ["full", "diagonal", "output"])
def test_the_half_is_a_calibration_of_half_of_the_sequences(place, tmp_path, kind):
    """float32; what is left is the other half; verify finds nothing."""
    options = {**RUN, "moment": kind, "pack": False}
    made = prep.covariance(str(place / "model"), str(place / "a.jsonl"), store=tmp_path / "s", **options)
    first = {**options, "num_sequences": 12, "halves": False}
    half = prep.covariance(str(place / "model"), str(place / "a.jsonl"), store=tmp_path / "half", **first)
    for layer in made.moments:
        got, wanted = made.moments[layer].half, half.moments[layer]
        assert wanted.half is None
        assert got.count == wanted.count and got.share == wanted.count / made.moments[layer].count
        for name in ("mean", "diagonal", {"full": "second_moment", "output": "output"}.get(kind, "mean")):
            assert getattr(got, name).dtype == torch.float32
            torch.testing.assert_close(getattr(got, name), getattr(wanted, name).float(), rtol=1e-6, atol=1e-6)
    assert verify(tmp_path / "s").findings == []


@pytest.mark.parametrize("kind", ["full", "output"])
def test_no_other_array_is_changed_by_the_half(place, tmp_path, kind):
    """The files of all other arrays are the same with and without it, byte by byte."""
    options = {**RUN, "moment": kind}
    for halves in (True, False):
        prep.covariance(
            str(place / "model"), str(place / "a.jsonl"), store=tmp_path / f"{halves}", halves=halves, **options
        )
    found = {one: tiny.contents(tmp_path / one / "moments") for one in ("True", "False")}
    arrays = {name: raw for name, raw in found["False"].items() if "/c/" in name}
    assert arrays and arrays == {n: raw for n, raw in found["True"].items() if "/c/" in n and "/half_" not in n}


def test_halves_of_several_passes_and_of_none(place, tmp_path):
    data, model = str(place / "a.jsonl"), str(place / "model")
    once = prep.covariance(model, data, store=tmp_path / "one", **RUN)
    prep.covariance(model, data, store=tmp_path / "many", memory_budget=60_000, **RUN)
    several = open_store(tmp_path / "many")
    for layer in once.moments:
        assert torch.equal(once.moments[layer].half.second_moment, several.moments[layer].half.second_moment)
    short = {**RUN, "num_sequences": 4}  # a single batch cannot be halved
    assert prep.covariance(model, data, store=tmp_path / "short", **short).moments[layer].half is None
    without = prep.covariance(model, data, store=tmp_path / "without", halves=False, **RUN)
    assert without.moments[layer].half is None and without.id == once.id
    assert not (tmp_path / "one" / "checkpoint").exists()


def failing(batches, count):
    """A list of batches that ends in an error after `count` of them."""

    class Failing(list):
        def __iter__(self):
            for number, batch in enumerate(list.__iter__(self)):
                if number == count:
                    raise RuntimeError("the data is gone")
                yield batch

    return Failing(batches)


def attributes(path):
    store = open_store(path)
    return store.attrs, {name: basis.hash for name, basis in store.bases.items()}


def test_an_error_after_the_half_leaves_what_was_there(tmp_path):
    """Of batches no state is stored: nothing is left, and bases that were there can be read."""
    net = tiny.llama(80)
    batches = [torch.randint(3, tiny.SIZE, (2, 12)) for _ in range(6)]
    with pytest.raises(RuntimeError, match="the data is gone"):
        prep.covariance(net, batches=failing(batches, 5), store=tmp_path / "s", quiet=True)
    assert not (tmp_path / "s").exists()
    prep.decompose(tmp_path / "b", model=net, metric="identity", rank=4, quiet=True)
    before = attributes(tmp_path / "b")
    with pytest.raises(RuntimeError, match="the data is gone"):
        prep.covariance(net, batches=failing(batches, 5), store=tmp_path / "b", quiet=True)
    assert attributes(tmp_path / "b") == before and verify(tmp_path / "b").findings == []
    assert prep.covariance(net, batches=batches, store=tmp_path / "b", quiet=True).moments


def test_a_resumed_run_has_the_same_half(place, tmp_path, monkeypatch):
    """Interrupted after any number of batches: before the half is in, when it is, and after."""
    data, model = str(place / "a.jsonl"), str(place / "model")
    whole = prep.covariance(model, data, store=tmp_path / "whole", **RUN)
    assert all(whole.moments[layer].half is not None for layer in whole.moments)
    added = Calibration._added
    for stop in range(5):

        def stopping(self, number, part, stop=stop):
            self._signals.number = 2 if number == stop else 0
            added(self, number, part)

        with monkeypatch.context() as patch:
            patch.setattr(Calibration, "_added", stopping)
            with pytest.raises(Interrupted):
                prep.covariance(model, data, store=tmp_path / f"{stop}", **RUN)
        found = prep.covariance(model, data, store=tmp_path / f"{stop}", **RUN)
        assert all(found.moments[layer].hash == whole.moments[layer].hash for layer in whole.moments)


@pytest.mark.parametrize("weights", [None, (1, 3)])
def test_a_pool_has_the_halves_of_its_parts(stores, tmp_path, weights):
    """C_half and the share such that the difference is the mixture of the other halves."""
    pooled = prep.pool([stores / "full", stores / "other"], store=tmp_path / "p", weights=weights)
    parts = [open_store(stores / name).moments for name in ("full", "other")]
    w = weights or (1, 1)
    for layer in list(pooled.moments)[::5]:
        got, C = pooled.moments[layer].half, pooled.moments[layer].second_moment
        ones = [part[layer] for part in parts]
        firsts = [one.half for one in ones]
        mass = [weight * one.count * first.share for weight, one, first in zip(w, ones, firsts, strict=True)]
        wanted = sum(m * first.second_moment.double() for m, first in zip(mass, firsts, strict=True)) / sum(mass)
        torch.testing.assert_close(got.second_moment.double(), wanted, rtol=1e-5, atol=1e-6)
        seconds = [
            (one.second_moment - f.share * f.second_moment.double()) for one, f in zip(ones, firsts, strict=True)
        ]
        left = [weight * one.count * second for weight, one, second in zip(w, ones, seconds, strict=True)]
        total = sum(weight * one.count for weight, one in zip(w, ones, strict=True))
        torch.testing.assert_close(C - got.share * got.second_moment.double(), sum(left) / total, rtol=1e-4, atol=1e-6)
    assert verify(tmp_path / "p").findings == []


def test_decompositions_note_what_evaluate_finds(stores):
    """At their own ranks the records are what cross-fitting anew gives, for the layers of a sample."""
    for kind in ("full", "output"):
        noted = prep.evaluate(stores / kind)
        anew = prep.evaluate(stores / kind, sample=2)
        assert len(noted) == len(anew) and any(row.excess for row in noted)
        for row, other in zip(noted, anew, strict=True):
            assert (row.layer, row.basis, row.rank) == (other.layer, other.basis, other.rank)
            for name in ("lost", "unseen", "excess", "least"):
                assert getattr(row, name) == pytest.approx(getattr(other, name), rel=1e-6, abs=1e-9)


def test_info_shows_the_excess_and_says_what_to_do(stores, place, tmp_path):
    """In one column and one line, by what the records say; without halves there is neither."""
    facts = describe(open_store(stores / "full"))
    rows = [row for row in prep.evaluate(stores / "full", bases="full", ranks=RANK) if row.excess is not None]
    wanted = statistics.median(row.relative for row in rows)
    assert facts["bases"]["full"]["excess"] == {"rank": RANK, "relative": pytest.approx(wanted), "layers": len(rows)}
    worst = max(basis["excess"]["relative"] for basis in facts["bases"].values())
    lines = table(facts)
    assert (
        f"384 tokens: rank-{RANK} bases lose {100 * worst:.0f} % more output than they need to; 4 times the tokens"
        in (facts["advice"])
    )
    assert (
        facts["advice"].endswith(f"would bring that to about {percent(worst * 4**-0.8)}") and facts["advice"] in lines
    )
    header = next(line for line in lines if line.startswith("basis"))
    assert header.split()[-3:] == ["excess", "dtype", "MB"]
    without = prep.covariance(str(place / "model"), str(place / "a.jsonl"), store=tmp_path / "s", halves=False, **RUN)
    prep.decompose(tmp_path / "s", rank=4, quiet=True)
    assert describe(open_store(prep.remove(shutil.copytree(stores / "full", tmp_path / "r"), moments=True).location))[
        "advice"
    ].startswith("384 tokens: ")
    facts = describe(open_store(without.location))
    assert facts["advice"] is None and facts["bases"]["full"]["excess"] is None


def test_the_line_of_advice():
    assert EXPONENT == evaluation.EXPONENT
    known = {"rank": 64, "relative": 0.06, "layers": 14}
    assert advice(16_384, [None, {**known, "relative": 0.01}, known]) == (
        "16,384 tokens: rank-64 bases lose 6.0 % more output than they need to; 4 times the tokens would bring that "
        "to about 2.0 %"
    )
    assert advice(131_072, [{**known, "relative": 0.004}]) == (
        "131,072 tokens: rank-64 bases lose 0.40 % more output than they need to: they are enough"
    )
    assert advice(5, [None]) is None


def test_a_sample_is_spread_over_the_blocks():
    layers = [f"model.layers.{i}.{name}" for i in range(10) for name in ("q", "k")]
    assert sampled(layers, 2) == ["model.layers.2.q", "model.layers.7.q", "model.layers.2.k", "model.layers.7.k"]
    assert sorted(sampled(layers, 0)) == sorted(sampled(layers, 99)) == sorted(layers)


def test_the_command_prints_a_table_and_the_rows(stores):
    shown = CliRunner().invoke(main, ["evaluate", "--store", str(stores / "full"), "--basis", "full"])
    assert shown.exit_code == 0, shown.output
    lines = shown.output.splitlines()
    assert lines[0].split() == ["basis", "layers", "count", "rank", "8", "rank", str(RANK)]
    assert lines[-1].split()[:3] == ["full", "all", "14"] and "+" in lines[-1]
    asked = ["evaluate", "--store", str(stores / "full"), "--rank", "5", "--json", "--on", str(stores / "other")]
    shown = CliRunner().invoke(main, asked)
    found = json.loads(shown.output)
    rows = prep.evaluate(stores / "full", on=stores / "other", ranks=5)
    assert found["rows"] == [vars(row) for row in rows]


def test_what_cannot_be_evaluated_says_so(stores, tmp_path):
    with pytest.raises(StoreError, match="has no basis 'none'"):
        prep.evaluate(stores / "full", bases="none")
    with pytest.raises(StoreError, match=r"holds rank 12, 40 was asked for: make it with `prep decompose .*--rank 40"):
        prep.evaluate(stores / "full", ranks=[4, 40])
    with pytest.raises(StoreError, match="holds no basis: run `prep decompose`"):
        prep.evaluate(stores / "other")
    with pytest.raises(StoreError, match=r"basis 'eva' is scored on the full second moment: .*--moment full`"):
        prep.evaluate(stores / "full", on=stores / "output", bases="eva")
    model = tiny.save(tiny.llama(48), tmp_path / "model")
    data = str(stores / "a.jsonl")
    prep.covariance(model, data, store=tmp_path / "s", **RUN)
    with pytest.raises(StoreError, match="are of different models"):
        prep.evaluate(stores / "full", on=tmp_path / "s")
    prep.covariance(str(stores / "model"), data, store=tmp_path / "d", moment="diagonal", **RUN)
    prep.decompose(tmp_path / "d", metric="diagonal", rank=4, quiet=True)
    with pytest.raises(StoreError, match=r"kind diagonal, which does not tell its output: .*--moment full"):
        prep.evaluate(tmp_path / "d")
    with pytest.raises(PrepError, match="made from other weights"):
        prep.evaluate(stores / "full", model=build_other(stores))


def build_other(stores):
    """The same architecture with other weights."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(stores / "model").double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model
