"""The sample of tokens is that of the smallest priorities, whoever saw them in which order; mean_abs on it is exact."""

import itertools
import json
import shutil

import families
import jobs
import numpy as np
import pytest
import tiny
import torch
import xxhash
from click.testing import CliRunner
from scipy import stats
from torch import nn

import prep
from prep import Interrupted, PrepError
from prep.cli import main
from prep.preprocess.calibration import job
from prep.preprocess.calibration.job import Calibration
from prep.preprocess.corpus.source import open_source
from prep.preprocess.numerics.sample import Sample, priorities
from prep.preprocess.options import CovarianceOptions
from prep.preprocess.verify import verify
from prep.store import open_store
from prep.store.format.schema import put_attributes
from prep.store.pool import pool
from prep.store.sample import TokenSample, joined, weighted

KEPT = 24
RUN = {"num_sequences": 16, "seq_len": 16, "batch_size": 4, "keep_tokens": KEPT, "quiet": True}
DOWN, UP = "model.layers.1.mlp.down_proj", "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, text, and the packed store of a run of one process and one pass."""
    made = tiny.sources(tmp_path_factory.mktemp("sample"), sentences=200)
    made.options = {"model": made.model, "data": made.data, **RUN}
    made.whole = prep.covariance(store=made.path / "whole", **made.options).location
    return made


# The oracle


def uniform(seed, number, count):
    """The first numbers of NumPy's generator on Philox with the key (seed, number)."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, number], np.uint64))).random(count)


def first_bits(digest):
    return int(digest.hexdigest()[:16], 16)


def seed_of(corpus):
    """Of a text: from the length and the tokens of its first sequence."""
    first = corpus.sequences[0]
    return first_bits(xxhash.xxh3_128(np.array([len(first)], "<i8").tobytes() + first.astype("<i4").tobytes()))


def drawn(corpus):
    """The priorities of all real tokens, sequence by sequence."""
    return np.concatenate([uniform(seed_of(corpus), i, len(row)) for i, row in enumerate(corpus.sequences)])


def corpus_of(options):
    known = {name: value for name, value in options.items() if name not in ("store", "keep_tokens")}
    return open_source(CovarianceOptions(**known)).corpus


def smallest(X, of, count=KEPT):
    """The rows of X (n, d) with the smallest numbers, rising."""
    return X[np.argsort(of, kind="stable")[:count]]


def loaded(made):
    return prep.preprocess.model.loading.load_model(made.model, dtype="float32")


def stored_priorities(store, layer):
    moments = open_store(store).moments
    array = open_store(store).root[f"moments/samples/{moments[layer].site}/priorities"]
    return np.asarray(array[:])


def assert_equal(got, wanted):
    """Two stores with the same samples, bit for bit."""
    a, b = open_store(got).moments, open_store(wanted).moments
    assert list(a) == list(b)
    for layer in b:
        assert a[layer].count == b[layer].count
        assert torch.equal(a[layer].tokens, b[layer].tokens), layer
        assert np.array_equal(stored_priorities(got, layer), stored_priorities(wanted, layer)), layer


# Which tokens


def test_a_sample_is_made_of_the_smallest_priorities(made):
    corpus = corpus_of(made.options)
    activations = tiny.Activations(loaded(made), list(corpus.batches(4)))
    moments, of = open_store(made.whole).moments, drawn(corpus)
    for layer in moments:
        assert moments[layer].sampled == KEPT and moments[layer].tokens.dtype == torch.float32
        assert np.array_equal(moments[layer].tokens.double().numpy(), smallest(activations[layer], of)), layer
        assert np.array_equal(stored_priorities(made.whole, layer), np.sort(of)[:KEPT])
        assert moments[layer].half.tokens is None
    assert verify(made.whole).findings == []


def test_priorities_are_uniform_and_independent():
    """Within a sequence and over sequences, calls and corpora that follow each other."""
    table = np.stack([priorities([(7, i)], [64]) for i in range(512)])
    assert stats.kstest(table.ravel(), "uniform").pvalue > 0.01
    others = [
        priorities([(8, i) for i in range(512)], [64] * 512),
        priorities([(7, i) for i in range(512)], [64] * 512, 1),
    ]
    pairs = [(table[:, 1:], table[:, :-1]), (table[1:], table[:-1])]
    pairs += [(table, other.reshape(table.shape)) for other in others]
    for a, b in pairs:
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / table.size**0.5
    assert len(np.unique(table)) == table.size
    places = np.argsort(table.ravel())[:8192] % 64
    assert stats.chisquare(np.bincount(places, minlength=64)).pvalue > 0.01


def test_any_order_of_batches_gives_one_sample():
    rng = np.random.default_rng(0)
    X, of = torch.from_numpy(rng.standard_normal((500, 3))), rng.random(500)
    for size, cut in itertools.product((1, 7, 100, 499, 500, 900), (1, 13, 500)):
        sample, order = Sample(size, 3), rng.permutation(500)
        assert sample.data() is None
        for a in range(0, 500, cut):
            part = order[a : a + cut]
            sample.add(X[part], of[part])
            if a == 2 * cut:
                stored = sample.data()
                sample = Sample(size, 3)
                sample.restore(stored)
        assert np.array_equal(sample.data().tokens.numpy(), smallest(X.float().numpy(), of, size))
        assert np.array_equal(sample.data().priorities.numpy(), np.sort(of)[:size])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_never_counts(tmp_path, side):
    """Whatever is in a batch beside a sequence; float64, in which padding does not change the rounding by much."""
    made = tiny.sources(tmp_path, padding_side=side)
    options = {"model": made.model, "data": made.data, **RUN, "pack": False, "dtype": "float64"}
    corpus = corpus_of(options)
    net = prep.preprocess.model.loading.load_model(made.model, dtype="float64")
    activations, of = tiny.Activations(net, list(corpus.batches(1))), drawn(corpus)
    assert len(set(map(len, corpus.sequences))) > 3 and len(of) == corpus.tokens
    for size in (3, 8):
        store = prep.covariance(store=tmp_path / f"{size}", **{**options, "batch_size": size})
        for layer in (UP, DOWN):
            wanted = smallest(activations[layer], of)
            assert tiny.relative(store.moments[layer].tokens, wanted) < 1e-6, (size, layer)


def test_fewer_tokens_than_asked_for_are_all_kept(made, tmp_path):
    store = prep.covariance(store=tmp_path / "s", **{**made.options, "keep_tokens": 10**6})
    moment = store.moments[DOWN]
    assert moment.sampled == moment.count == 256
    X = moment.tokens.double().numpy()
    assert tiny.relative(moment.second_moment, X.T @ X / 256) < 1e-6
    assert verify(store.location).findings == []


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3-MoE", "GPT-OSS"])
def test_experts_keep_tokens_that_they_saw_by_their_place_in_the_text(tmp_path, name):
    """Both projections of an expert keep the same tokens; both batch sizes, too."""
    made = tiny.sources(tmp_path, tiny.model(name))
    options = {"model": made.model, "data": made.data, **RUN, "seq_len": 12, "pack": False, "dtype": "float64"}
    corpus, seen = corpus_of(options), {}
    net = prep.preprocess.model.loading.load_model(made.model, dtype="float64")
    net.set_experts_implementation("eager")

    def note(module_name, module, args):
        for e in args[1].unique().tolist():
            seen.setdefault(f"{module_name}.{e}", []).append((args[1] == e).any(1).numpy())

    for module_name, module in net.named_modules():
        if module_name.endswith("mlp.experts"):
            module.register_forward_pre_hook(lambda m, args, n=module_name: note(n, m, args))
    rows, of = {}, drawn(corpus)
    sequences = list(corpus.batches(1))
    routed = families.Routed(net, sequences)
    ends = np.cumsum([0, *map(len, corpus.sequences)])
    for number, inputs in enumerate(sequences):
        seen.clear()
        with torch.no_grad():
            net(**inputs)
        for expert, masks in seen.items():
            rows.setdefault(expert, []).append(of[ends[number] : ends[number + 1]][masks[0]])
    for size in (1, 4):
        store = prep.covariance(store=tmp_path / f"{size}", **{**options, "batch_size": size})
        for layer in (layer for layer in store.moments if ".experts." in layer):
            known = np.concatenate(rows[layer.rpartition(".")[0]])
            assert np.array_equal(stored_priorities(store.location, layer), np.sort(known)[:KEPT]), layer
            assert tiny.relative(store.moments[layer].tokens, smallest(routed[layer], known)) < 1e-6, layer
        assert verify(store.location).findings == []


# However the run goes


def test_a_run_that_is_resumed_at_every_batch_keeps_the_same(made, tmp_path, monkeypatch):
    added = Calibration._added
    for stop in range(4):

        def stopping(self, number, part, stop=stop):
            self._signals.number = 2 if number == stop else 0
            added(self, number, part)

        with monkeypatch.context() as patch:
            patch.setattr(Calibration, "_added", stopping)
            with pytest.raises(Interrupted):
                prep.covariance(store=tmp_path / f"{stop}", **made.options)
        prep.covariance(store=tmp_path / f"{stop}", **made.options)
        got, wanted = tiny.contents(tmp_path / f"{stop}"), tiny.contents(made.whole)
        assert got.keys() == wanted.keys()
        assert {name for name in wanted if got[name] != wanted[name]} <= {"zarr.json"}


@pytest.mark.parametrize("moment", ["full", "output"])
def test_several_passes_keep_the_same(made, tmp_path, monkeypatch, moment):
    one = prep.covariance(store=tmp_path / "one", moment=moment, **made.options)
    monkeypatch.setattr(job, "CHECKPOINT_SHARE", float("inf"))
    options = {**made.options, "memory_budget": 60_000, "checkpoint_every": 0.0}
    several = prep.covariance(store=tmp_path / "several", moment=moment, **options)
    assert_equal(several.location, one.location)


@pytest.mark.parametrize("options", [{}, {"pack": False}], ids=str)
def test_a_store_that_grew_has_the_sample_of_a_direct_run(made, tmp_path, options):
    options = {**made.options, **options}
    for count in (4, 8, 16):
        grown = prep.covariance(store=tmp_path / "s", **{**options, "num_sequences": count})
    whole = prep.covariance(store=tmp_path / "whole", **options)
    assert_equal(grown.location, whole.location)
    assert grown.id == whole.id and verify(grown.location).findings == []


@pytest.mark.parametrize("on_devices", [False, True])
def test_two_ranks_keep_what_one_does(made, tmp_path, monkeypatch, on_devices):
    options = {**made.options, "num_sequences": 14, "memory_budget": 120_000}
    if on_devices:
        monkeypatch.setenv("ON_DEVICES", "1")
    one = prep.covariance(store=tmp_path / "one", **options)
    given = {**options, "store": tmp_path / "two", "checkpoint_every": 1e-3}
    codes, said, _ = jobs.run("covariance", given, tmp_path, 2)
    assert codes == [0, 0], said
    assert_equal(tmp_path / "two", one.location)


def test_another_number_of_tokens_is_another_run(made, tmp_path):
    shutil.copytree(made.whole, tmp_path / "s")
    for count, there in ((0, "None asked for"), (10, "10 asked for")):
        with pytest.raises(PrepError, match=f"options keep_tokens: 24 there, {there}"):
            prep.covariance(store=tmp_path / "s", **{**made.options, "keep_tokens": count})


# Batches of one's own


class Twice(nn.Module):
    """A layer that is called twice, and one that sees one row per sequence."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.again, self.pooled = nn.Embedding(20, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, ids):
        x = self.embed(ids)
        self.pooled(x[:, 0])
        return self.again(self.again(x))


def test_batches_of_ones_own(tmp_path):
    net, batches = Twice(), [torch.randint(1, 20, (3, 5), generator=torch.Generator().manual_seed(i)) for i in range(4)]
    batches[1][0, 3:] = 0
    options = {"batches": batches, "mask": lambda ids: ids != 0, "quiet": True, "keep_tokens": 9}
    store = prep.covariance(net, store=tmp_path / "s", **options)
    digest = xxhash.xxh3_128(f"{batches[0].dtype}{tuple(batches[0].shape)}".encode() + batches[0].numpy().tobytes())
    seed, rows, of = first_bits(digest), {"again": [], "pooled": []}, {"again": [], "pooled": []}
    with torch.no_grad():
        for i, ids in enumerate(batches):
            x, real = net.embed(ids), ids != 0
            for call, given in enumerate((x, net.again(x))):
                rows["again"].append(given[real])
                of["again"].append(uniform(seed + call, i, int(real.sum())))
            rows["pooled"].append(x[:, 0])
            of["pooled"].append(uniform(seed, i, 3))
    for layer in rows:
        wanted = smallest(torch.cat(rows[layer]).numpy(), np.concatenate(of[layer]), 9)
        assert tiny.relative(store.moments[layer].tokens, wanted) < 1e-6
    again = prep.covariance(net, store=tmp_path / "passes", memory_budget=1200, **options)
    assert_equal(again.location, store.location)


# Pools


@pytest.mark.parametrize("weights", [None, (1, 3)])
def test_a_pool_has_a_sample_of_the_tokens_of_all(made, tmp_path, weights):
    data = tiny.write_data(tmp_path / "b.jsonl", tiny.texts(200, seed=5))
    options = {**made.options, "keep_tokens": 30, "num_sequences": 8}
    parts = [made.whole, prep.covariance(store=tmp_path / "b", **{**options, "data": data}).location]
    pooled = pool(parts, store=tmp_path / "pool", weights=weights)
    assert pooled.options["keep_tokens"] == KEPT and verify(tmp_path / "pool").findings == []
    for layer in (UP, DOWN):
        of = [stored_priorities(part, layer) for part in parts]
        of = [1 - (1 - u) ** (1 / w) for u, w in zip(of, weights or (1, 1), strict=True)]
        X = np.concatenate([open_store(part).moments[layer].tokens.numpy() for part in parts])
        assert np.array_equal(pooled.moments[layer].tokens.numpy(), smallest(X, np.concatenate(of)))
    assert (
        prep.decompose(tmp_path / "pool", for_="antipasto", pooling="mean_abs", rank=4, quiet=True).status == "complete"
    )


def test_a_weighted_pool_draws_tokens_as_often_as_they_count():
    """12,000 of 40,000 tokens count three times: they are 36 of 64 parts, a little less where many are drawn."""
    rng = np.random.default_rng(0)
    parts = []
    for n, value, weight in ((28_000, 0.0, 1), (12_000, 1.0, 3)):
        u = torch.from_numpy(np.sort(rng.random(n))[:4000])
        parts.append(weighted(TokenSample(torch.full((4000, 1), value), u), weight))
    share = float(joined(parts, 4000).tokens.mean())
    assert abs(share - 36 / 64) < 0.03


def test_a_pool_with_a_part_without_a_sample_has_none(made, tmp_path):
    plain = prep.covariance(store=tmp_path / "b", **{**made.options, "keep_tokens": 0})
    pooled = pool([made.whole, plain.location], store=tmp_path / "pool")
    assert pooled.moments[DOWN].tokens is None and "keep_tokens" not in pooled.options
    assert verify(tmp_path / "pool").findings == []


# Directions by mean_abs


@pytest.mark.parametrize("metric", ["identity", "diagonal", "full"])
@pytest.mark.parametrize("moment", ["full", "output", "diagonal"])
def test_directions_are_ordered_by_the_mean_magnitude(made, tmp_path, metric, moment):
    """Against a float64 SVD of `W M` and `|W x|` along its directions; tall, square and wide layers."""
    if (moment, metric) == ("diagonal", "full"):
        pytest.skip("the metric needs more")
    store = prep.covariance(store=tmp_path / "s", moment=moment, **made.options)
    basis = prep.decompose(
        store.location, metric=metric, select="activation", pooling="mean_abs", rank=12, damping=1e-3, quiet=True
    )
    assert basis.name == f"{metric}-activation-mean_abs" and basis.method["pooling"] == "mean_abs"
    net, wanted_C = loaded(made), open_store(made.whole).moments
    for layer, found in basis.items():
        W, X = tiny.weight(net.get_submodule(layer)), store.moments[layer].tokens.double().numpy()
        C = wanted_C[layer].second_moment.double().numpy()
        C = C + 1e-3 * np.diag(C).mean() * np.eye(len(C))
        root = {"identity": np.eye(len(C)), "diagonal": np.diag(np.sqrt(np.diag(C)))}.get(metric)
        if root is None:
            values, vectors = np.linalg.eigh(C)
            root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
        U, S, _ = np.linalg.svd(W @ root, full_matrices=False)
        score = np.abs(X @ W.T @ U).mean(0)
        order = np.argsort(-score)[:12]
        assert np.all(-np.diff(np.sort(score)) < 0)
        assert np.allclose(found.S.numpy(), S[order], rtol=1e-4), layer
        overlap = np.abs(np.einsum("ij,ij->j", found.U.double().numpy(), U[:, order]))
        assert np.allclose(overlap, 1, atol=1e-3), layer
    assert verify(store.location).findings == []


def test_mean_abs_is_another_basis_than_rms(made, tmp_path):
    store = shutil.copytree(made.whole, tmp_path / "s")
    rms = prep.decompose(store, for_="antipasto", rank=32, quiet=True)
    pooled = prep.decompose(store, for_="antipasto", pooling="mean_abs", rank=32, quiet=True)
    assert (rms.name, pooled.name) == ("identity-activation", "identity-activation-mean_abs")
    assert any(not torch.equal(rms[layer].S, pooled[layer].S) for layer in rms)
    assert all(record.crossed is None for record in pooled.layers.values())  # a sample has no halves
    rows = prep.evaluate(store, bases=[rms.name, pooled.name], ranks=8, sample=2)
    assert {row.basis for row in rows if row.excess is not None} == {rms.name}
    lost = {row.basis: row.lost for row in rows if row.layer == DOWN}
    assert lost[pooled.name] == pytest.approx(lost[rms.name], rel=0.2)


def test_a_basis_from_before_pooling_is_one_by_rms(made, tmp_path, capsys):
    store = shutil.copytree(made.whole, tmp_path / "s")
    prep.decompose(store, for_="antipasto", rank=4, quiet=True)
    group = open_store(store, "r+").root["bases/identity-activation"]
    method = {name: value for name, value in group.attrs["method"].items() if name != "pooling"}
    put_attributes(group, {**group.attrs, "method": method})
    before = tiny.contents(store)
    prep.decompose(store, for_="antipasto", rank=4)
    assert "complete and was made with the same options: nothing to do" in capsys.readouterr().err
    assert tiny.contents(store) == before


def test_the_advised_command_works(made, tmp_path):
    """A store without a sample refuses mean_abs; the calibration's own command with what is advised helps."""
    runner, store = CliRunner(), str(tmp_path / "s")
    calibrate = ["covariance", "--model", made.model, "--data", made.data, "--store", store, "--seq-len", "16"]
    calibrate += ["--num-sequences", "8", "-q"]
    decompose = ["decompose", "--for", "antipasto", "--pooling", "mean_abs", "--rank", "4", "--store", store]
    assert runner.invoke(main, calibrate).exit_code == 0
    refused = runner.invoke(main, decompose)
    assert refused.exit_code == 2 and refused.stderr.count("\n") == 1
    assert "run its `prep covariance` command again with `--overwrite --keep-tokens 4096`" in refused.stderr
    assert runner.invoke(main, [*calibrate, "--overwrite", "--keep-tokens", "4096"]).exit_code == 0
    done = runner.invoke(main, decompose)
    assert done.exit_code == 0 and "basis identity-activation-mean_abs, 14 layers" in done.stdout
    said = runner.invoke(main, ["info", "--store", store]).stdout
    assert "activation mean_abs" in said and "128 tokens kept" in said
    facts = json.loads(runner.invoke(main, ["info", "--store", store, "--json"]).stdout)
    assert facts["moments"]["tokens_kept"] == 128


# What it takes


def test_a_dry_run_counts_the_sample(made, tmp_path):
    options = {**made.options, "batch_size": 8}
    plain = prep.covariance(store=tmp_path / "s", dry_run=True, **{**options, "keep_tokens": 0})
    for kept, held in ((100, 100), (10**6, 256)):
        needed = prep.covariance(store=tmp_path / "s", dry_run=True, **{**options, "keep_tokens": kept})
        sample = sum(held * (4 * d + 8) for d in (32, 32, 32, 48) * 2)
        assert needed.disk - plain.disk == needed.accumulators - plain.accumulators == sample
        assert needed.checkpoint - plain.checkpoint == 2 * sample


def test_a_store_without_a_sample_says_so(made, tmp_path):
    store = prep.covariance(store=tmp_path / "s", **{**made.options, "keep_tokens": 0})
    assert store.moments[DOWN].tokens is None and store.moments[DOWN].sampled == 0
    assert "keep_tokens" not in store.options
    assert store.id != open_store(made.whole).id


def test_inputs_beyond_float32_are_refused(tmp_path):
    net = nn.Sequential(nn.Linear(4, 3)).double()
    options = {"batches": [torch.full((2, 4), 1e50, dtype=torch.float64)], "quiet": True}
    prep.covariance(net, store=tmp_path / "a", **options)
    with pytest.raises(PrepError, match="is beyond float32, in which tokens are kept: leave out --keep-tokens"):
        prep.covariance(net, store=tmp_path / "b", keep_tokens=4, **options)
