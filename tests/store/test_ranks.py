"""`prep ranks` on calibrated stores: against what `prep evaluate` says of equal ranks, and as the command prints it."""

import json

import pytest
import tiny
from click.testing import CliRunner

import prep
from prep.cli import main
from prep.store import open_store

RUN = {"seq_len": 16, "batch_size": 4, "num_sequences": 24, "quiet": True}
BASES = {"full": {}, "full-p1-bottom": {"power": 1.0, "select": "bottom"}, "eva": {"for_": "eva"}}
RANK = 16


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`seen` has bases of which some layers were cross-fitted, `unseen` those of which all were."""
    given = tiny.sources(tmp_path_factory.mktemp("ranks"), tiny.llama(80), sentences=120)
    for name, sample in (("seen", 1), ("unseen", 0)):
        prep.covariance(given.model, given.data, store=given.path / name, **RUN)
        for options in BASES.values() if name == "seen" else [{}]:
            prep.decompose(given.path / name, rank=RANK, sample=sample, quiet=True, **options)
    return given.path


def shapes(basis):
    return {layer: record.shape for layer, record in basis.layers.items()}


def parameters(ranks, basis):
    return sum(rank * sum(basis.layers[layer].shape) for layer, rank in ranks.items())


def lost(rows, ranks, what="lost"):
    """The mean loss of the layers at their ranks, as `prep evaluate` says."""
    found = {(row.layer, row.rank): getattr(row, what) for row in rows}
    return sum(found[layer, rank] for layer, rank in ranks.items()) / len(ranks)


@pytest.mark.parametrize("name", BASES)
def test_no_more_is_lost_than_at_equal_ranks_of_as_many_parameters(made, name):
    basis = open_store(made / "seen").bases[name]
    rows = prep.evaluate(made / "seen", bases=name, ranks=range(1, RANK + 1))
    better = 0
    for rank in range(1, RANK + 1):
        equal = {layer: min(rank, *shape) for layer, shape in shapes(basis).items()}
        chosen = prep.ranks(made / "seen", parameters(equal, basis), basis=name)
        assert chosen.keys() == equal.keys() and parameters(chosen, basis) <= parameters(equal, basis)
        assert lost(rows, chosen) <= lost(rows, equal) + 1e-6
        better += lost(rows, chosen) < lost(rows, equal) - 1e-4
    assert better > 8


@pytest.mark.parametrize("share", ["50%", "80 %", "94.5%"])
def test_a_share_is_kept_with_fewer_parameters_than_equal_ranks_need(made, share):
    basis = open_store(made / "seen").bases["full"]
    rows = prep.evaluate(made / "seen", bases="full", ranks=range(1, RANK + 1))
    chosen = prep.ranks(made / "seen", share)
    kept = float(share.rstrip("% ")) / 100
    assert 1 - lost(rows, chosen) >= kept - 1e-6
    equal = [{layer: min(rank, *shape) for layer, shape in shapes(basis).items()} for rank in range(1, RANK + 1)]
    enough = next(ranks for ranks in equal if 1 - lost(rows, ranks) >= kept)
    assert parameters(chosen, basis) < parameters(enough, basis)


def test_unseen_tokens_decide_where_all_layers_were_cross_fitted(made):
    rows = prep.evaluate(made / "unseen", ranks=range(1, RANK + 1), sample=0)
    basis = open_store(made / "unseen").bases["full"]
    budget = parameters(dict.fromkeys(basis, 6), basis)
    by_unseen, by_kept = prep.ranks(made / "unseen", budget), prep.ranks(made / "seen", budget)
    assert by_unseen != by_kept
    assert lost(rows, by_unseen, "unseen") <= lost(rows, by_kept, "unseen") + 1e-3
    assert lost(rows, by_kept) <= lost(rows, by_unseen) + 1e-6


def run(*arguments):
    done = CliRunner().invoke(main, ["ranks", *map(str, arguments)])
    return done.exit_code, done.output


def test_what_the_command_prints(made, tmp_path):
    store, file = made / "seen", tmp_path / "r.json"
    code, printed = run("--store", store, "--budget", "4k", "--json", "-o", file)
    said = json.loads(printed)
    assert code == 0 and said["ranks"] == prep.ranks(store, "4k") == json.loads(file.read_text())
    assert (said["basis"], said["by"]) == ("full", "kept")
    basis = open_store(store).bases["full"]
    total = said["summary"][-1]
    assert total["layers"] == "all" and total["count"] == 14 and len(said["summary"]) == 8
    assert total["parameters"] == parameters(said["ranks"], basis) <= 4000
    assert total["equal_parameters"] == parameters(dict.fromkeys(basis, said["equal_rank"]), basis) <= 4000
    assert total["parameters"] == sum(one["parameters"] for one in said["summary"][:-1])
    rows = prep.evaluate(store, bases="full", ranks=range(1, RANK + 1))
    assert total["lost"] == pytest.approx(lost(rows, said["ranks"]), abs=1e-6)
    assert total["equal_lost"] == pytest.approx(lost(rows, dict.fromkeys(basis, said["equal_rank"])), abs=1e-6)
    code, printed = run("--store", store, "--budget", "4k")
    lines = printed.splitlines()
    assert code == 0 and lines[0].split()[:6] == ["layers", "count", "rank", "mean", "parameters", "lost"]
    assert lines[-2].split()[:2] == ["all", "14"] and f"{total['parameters']:,}" in lines[-2]
    assert lines[-1].startswith("lost: ") and "tokens that it was made of" in lines[-1]
    assert "has not seen" in run("--store", made / "unseen", "--budget", "4k")[1]


def test_a_file_is_replaced_only_when_told(made, tmp_path):
    file, asked = tmp_path / "r.json", ("--store", made / "seen", "--budget", "4k")
    file.write_text("mine")
    code, printed = run(*asked, "-o", file)
    assert code == 2 and file.read_text() == "mine"
    assert "r.json is there already: name another path, or replace a file with --overwrite" in printed
    assert run(*asked, "-o", tmp_path, "--overwrite")[0] == 2
    assert "cannot write" in run(*asked, "-o", tmp_path / "none" / "r.json")[1]
    assert run(*asked, "-o", file, "--overwrite")[0] == 0
    assert json.loads(file.read_text()) == prep.ranks(made / "seen", "4k")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.json"]
