"""Several bases in one decomposition: those of separate runs, with one load of the model and one reading of moments."""

import shutil
from collections import Counter
from types import SimpleNamespace

import pytest
import tiny
from click.testing import CliRunner

import prep
from prep import PrepError, StoreError
from prep.cli import main
from prep.preprocess.decomposition import request, workers
from prep.preprocess.verify import verify
from prep.store import BasisWriter, open_store
from prep.store.info import info, table

METHODS = ["pissa", "milora", "corda_ipm", "corda_kpm", "whitened", "asvd", "eva", "antipasto"]
BASES = ["identity", "identity-bottom", "full-p1", "full-p1-bottom", "full", "diagonal", "eva", "identity-activation"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("made")
    model = tiny.save(tiny.llama(), path / "model")
    data = tiny.write_data(path / "text.jsonl", tiny.texts(60))
    for moment in ("full", "output"):
        prep.covariance(model, data, store=path / moment, moment=moment, **tiny.RUN)
    shutil.copytree(path / "full", path / "one by one")
    for method in METHODS:
        prep.decompose(path / "one by one", for_=method, rank=4, quiet=True)
    return SimpleNamespace(path=path, model=model, data=data)


@pytest.fixture
def store(made, tmp_path):
    shutil.copytree(made.path / "full", tmp_path / "s")
    return tmp_path / "s"


@pytest.fixture
def counted(monkeypatch):
    """How often each moment was read, and the model opened."""
    counts, read, load = Counter(), workers.statistics_of, request.open_model

    def reads(stored, sampled=False):
        counts[stored.site] += 1
        return read(stored)

    def loads(*arguments, **options):
        counts["model"] += 1
        return load(*arguments, **options)

    monkeypatch.setattr(workers, "statistics_of", reads)
    monkeypatch.setattr(request, "open_model", loads)
    return counts


def test_eight_bases_at_once_are_those_of_separate_runs(made, store, counted):
    bases = prep.decompose(store, for_=METHODS, rank=4, quiet=True)
    assert [basis.name for basis in bases] == BASES
    assert counted == dict.fromkeys(["model", *open_store(store).moments.sites], 1)
    assert tiny.contents(store) == tiny.contents(made.path / "one by one")


def test_methods_of_one_basis_share_it_and_what_is_there_is_not_made_again(store, counted, capsys):
    first = prep.decompose(store, for_="whitened", rank=4, quiet=True)
    counted.clear()
    bases = prep.decompose(store, for_="pissa, lora_xs,whitened", rank=4)
    assert [basis.name for basis in bases] == ["identity", "identity", "full"]
    assert bases[2].hash == first.hash
    # plain SVDs need no moment, but what they keep of the outputs does
    assert counted == dict.fromkeys(["model", *open_store(store).moments.sites], 1)
    said = capsys.readouterr().err
    assert "basis 'full' is complete and was made with the same options: nothing to do" in said
    assert "decompose identity: 14 of 14 layers" in said
    counted.clear()
    prep.decompose(store, for_=["pissa", "whitened"], rank=4, quiet=True)
    assert counted == {}


class Stop(BaseException):
    """As Ctrl-C is: no Exception."""


def test_an_interruption_loses_no_layer_of_any_basis(made, store, monkeypatch, capsys):
    note, noted = BasisWriter.note, []

    def stop(self, done):
        if len(noted) == 40:
            raise Stop
        noted.append(done)
        note(self, done)

    with monkeypatch.context() as patch:
        patch.setattr(BasisWriter, "note", stop)
        with pytest.raises(Stop):
            prep.decompose(store, for_=METHODS, rank=4, quiet=True)
    prep.decompose(store, for_=METHODS, rank=4)
    assert f"decompose {', '.join(BASES)}: {8 * 14 - 40} of {8 * 14 - 40} layers" in capsys.readouterr().err
    assert tiny.contents(store) == tiny.contents(made.path / "one by one")


def test_the_command_takes_commas_and_repetition(store):
    arguments = ["decompose", "--store", str(store), "--rank", "4", "--for", "pissa,asvd", "--for", "eva"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [line.split(", ")[0] for line in lines[:3]] == [
        f"{store}: basis {n}" for n in ("identity", "diagonal", "eva")
    ]
    assert lines[3:] == [f"next: prep info --store {store}"]
    assert verify(store).findings == []


def test_what_one_method_cannot_have_is_refused_for_all(made, store, tmp_path):
    before = tiny.contents(store)
    with pytest.raises(PrepError, match="--name mine cannot name the bases of 2 methods: leave it out"):
        prep.decompose(store, for_=["pissa", "eva"], name="mine")
    with pytest.raises(PrepError, match=r"--for 'eav' does not exist: take one of pissa, "):
        prep.decompose(store, for_="pissa,eav")
    with pytest.raises(PrepError, match="pissa has the metric identity, not full"):
        prep.decompose(store, for_="whitened,pissa", metric="full")
    assert tiny.contents(store) == before
    shutil.copytree(made.path / "output", tmp_path / "output")
    before = tiny.contents(tmp_path / "output")
    with pytest.raises(StoreError, match="metric components needs the full second moment, not output"):
        prep.decompose(tmp_path / "output", for_=["pissa", "eva"], quiet=True)
    assert tiny.contents(tmp_path / "output") == before
    with pytest.raises(StoreError, match=r"no store at .*: run `prep covariance --model X --data Y` first$"):
        prep.decompose(tmp_path / "none", for_=["pissa", "whitened"], model=made.model, quiet=True)
    assert not (tmp_path / "none").exists()


def test_an_output_moment_is_read_for_its_own_layer(made, tmp_path, counted):
    """It belongs to a layer, not to the site."""
    for place, methods in (("both", [["whitened", "asvd"]]), ("each", ["whitened", "asvd"])):
        shutil.copytree(made.path / "output", tmp_path / place)
        for method in methods:
            prep.decompose(tmp_path / place, for_=method, rank=4, quiet=True)
    assert counted["model.layers.0.self_attn.q_proj"] == 3 * 3  # of q, k and v, for both and for each
    assert tiny.contents(tmp_path / "both") == tiny.contents(tmp_path / "each")


def test_plain_bases_need_no_store(made, tmp_path):
    bases = prep.decompose(tmp_path / "s", for_=["pissa", "milora"], model=made.model, rank=4, quiet=True)
    assert [basis.name for basis in bases] == ["identity", "identity-bottom"]
    kept = open_store(made.path / "one by one").bases
    assert [basis.hash for basis in bases] == [kept[basis.name].hash for basis in bases]


def test_a_rank_above_all_is_told_as_what_was_kept(made, tmp_path, capsys):
    """Every layer here has 16 or 32 directions: all ranks from 32 on are one basis."""
    store = tmp_path / "s"
    shutil.copytree(made.path / "full", store)
    first = prep.decompose(store, rank=99_999, quiet=True)
    facts = info(open_store(store))["bases"]["full"]
    assert (facts["rank"], first.rank, max(one.rank for one in first.layers.values())) == (32, 32, 32)
    [row] = [line.split() for line in table(info(open_store(store))) if line.startswith("full ")]
    assert row[4] == "32"
    for rank, said in (
        (99_999, "basis 'full' is complete and was made with the same options: nothing to do"),
        (256, "basis 'full' is there already with every direction of its layers, up to 32"),
        (32, "basis 'full' is there already with every direction of its layers, up to 32"),
        (31, "basis 'full' is there already at rank 32: any rank up to 32 is a slice of it"),
    ):
        before = tiny.contents(store)
        assert prep.decompose(store, rank=rank).hash == first.hash
        assert capsys.readouterr().err.splitlines() == [said]
        assert tiny.contents(store) == before
    small = prep.decompose(store, for_="asvd", rank=8, quiet=True)
    with pytest.raises(StoreError, match="rank: 8 there, 99999 asked for"):
        prep.decompose(store, for_="asvd", rank=99_999, quiet=True)
    assert open_store(store).bases["diagonal"].hash == small.hash


def test_patterns_in_another_order_choose_the_same_layers(made, tmp_path):
    patterns = {"targets": ["q_proj", "up_proj"], "exclude": ["0.mlp", "1.self"]}
    turned = {name: [*reversed(given), given[0]] for name, given in patterns.items()}
    prep.covariance(made.model, made.data, store=tmp_path / "s", **patterns, **tiny.RUN)
    before = tiny.contents(tmp_path / "s")
    prep.covariance(made.model, made.data, store=tmp_path / "s", **turned, **tiny.RUN)
    assert tiny.contents(tmp_path / "s") == before
