"""Several processes on one calibration: the moments of one process, whoever had which batch."""

import families
import jobs
import pytest
import tiny
import torch

import prep
from prep.preprocess.calibration import accumulators
from prep.preprocess.ranks import Ranks
from prep.preprocess.sites import Site
from prep.store import open_store


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, text and options of a run of 7 batches; two passes."""
    path = tmp_path_factory.mktemp("made")
    options = {
        "model": tiny.save(tiny.llama(intermediate=96), path / "model"),
        "data": tiny.write_data(path / "text.jsonl", tiny.texts(200)),
        "num_sequences": 13,
        "seq_len": 16,
        "batch_size": 2,
        "pack": False,
        "memory_budget": 200_000,
        "quiet": True,
    }
    return path, options


def same(a, b):
    """Two stores with equal moments to 1e-12, exact counts, and equal sites."""
    a, b = open_store(a), open_store(b)
    assert a.attrs["id"] == b.attrs["id"] and a.corpus == b.corpus
    assert a.moments.sites == b.moments.sites and a.moments.skipped == b.moments.skipped
    for layer in b.moments:
        ours, theirs = a.moments[layer], b.moments[layer]
        assert (ours.kind, ours.count, ours.members) == (theirs.kind, theirs.count, theirs.members)
        names = {"full": ["second_moment"], "diagonal": ["diagonal"], "output": ["output", "diagonal"]}[theirs.kind]
        for name in ["mean", *names]:
            assert tiny.relative(getattr(ours, name), getattr(theirs, name).numpy()) < 1e-12, (layer, name)


@pytest.mark.parametrize(
    ("size", "per_node", "moment"), [(1, 1, "full"), (2, 2, "full"), (3, 3, "auto"), (2, 1, "auto"), (4, 2, "full")]
)
def test_several_ranks_give_the_moments_of_one(made, tmp_path, size, per_node, moment):
    _, options = made
    prep.covariance(store=tmp_path / "one", moment=moment, **options)
    given = {**options, "store": tmp_path / "many", "moment": moment, "checkpoint_every": 1e-3}
    codes, said, _ = jobs.run("covariance", given, tmp_path, size, per_node)
    assert codes == [0] * size, said
    same(tmp_path / "many", tmp_path / "one")
    assert prep.open_store(tmp_path / "many").moments.sites and not (tmp_path / "many" / "checkpoint").exists()


def test_experts_that_some_ranks_do_not_reach(made, tmp_path):
    path, options = made
    options = {
        **options,
        "model": tiny.save(families.build(families.FAMILIES["Mixtral"]), path / "mixtral"),
        "moment": "full",
        "num_sequences": 3,
        "batch_size": 1,
    }
    options |= {"memory_budget": 10**9, "seq_len": 3}
    prep.covariance(store=tmp_path / "one", **options)
    codes, said, _ = jobs.run("covariance", {**options, "store": tmp_path / "many"}, tmp_path, 2)
    assert codes == [0, 0], said
    same(tmp_path / "many", tmp_path / "one")


def test_peft_sums_are_those_of_one_process(made, tmp_path):
    _, options = made
    options = {**options, "compat": "peft-corda"}
    prep.covariance(store=tmp_path / "one", **options)
    codes, said, _ = jobs.run("covariance", {**options, "store": tmp_path / "many"}, tmp_path, 3)
    assert codes == [0] * 3, said
    same(tmp_path / "many", tmp_path / "one")


@pytest.mark.parametrize(("victim", "size", "then"), [(1, 2, 3), (0, 3, 1)])
def test_a_killed_rank_ends_the_job_and_another_number_resumes(made, tmp_path, victim, size, then):
    _, options = made
    prep.covariance(store=tmp_path / "one", **options)
    options = {**options, "store": tmp_path / "many", "checkpoint_every": 1e-3, "quiet": False}
    codes, said, seconds = jobs.run("covariance", options, tmp_path, size, die=(victim, 2))
    assert codes[victim] == -9 and all(code == 2 for rank, code in enumerate(codes) if rank != victim), (codes, said)
    assert seconds < 60
    survivor = said[1 if victim == 0 else 0]
    assert "lost contact with another rank" in survivor and "run the same command again" in survivor
    codes, said, _ = jobs.run("covariance", options, tmp_path, then)
    assert codes == [0] * then, said
    assert "resumed in pass 1 after" in said[0] and not any(said[1:])
    same(tmp_path / "many", tmp_path / "one")


def test_one_rank_tells_what_is_wrong(made, tmp_path):
    _, options = made
    codes, said, _ = jobs.run("covariance", {**options, "store": tmp_path / "s", "data": "nothing.jsonl"}, tmp_path, 3)
    assert codes == [2, 2, 2]
    assert said[0].count("Error:") == 1 and "nothing.jsonl" in said[0] and not any(said[1:])
    codes, said, _ = jobs.run("covariance", {**options, "store": tmp_path / "s", "device_map": "cpu"}, tmp_path, 2)
    assert codes == [2, 2] and "CUDA_VISIBLE_DEVICES" in said[0] and not said[1]
    assert list(tmp_path.glob("s*")) == []


def test_a_locked_store_is_told_once(made, tmp_path):
    from prep.store.lock import writer_lock

    _, options = made
    with writer_lock(tmp_path / "s"):
        codes, said, _ = jobs.run("covariance", {**options, "store": tmp_path / "s"}, tmp_path, 2)
    assert codes == [2, 2] and "is being written by" in said[0] and not said[1]


def test_a_node_keeps_every_accumulator_once():
    sites = [Site(f"l{i}", (f"l{i}",), ((64, d),)) for i, d in enumerate((64, 512, 300, 64, 512, 200))]
    kinds = {site.name: "full" for site in sites}

    def size(totals):
        return sum(panel.numel() for total in totals.values() for panel in total.second.panels)

    alone = accumulators(sites, kinds)
    shares = [accumulators(sites, kinds, Ranks(rank, 3, rank, 3)) for rank in range(3)]
    assert sum(map(size, shares)) == size(alone)
    assert max(map(size, shares)) < 0.5 * size(alone)
    for site in sites:
        assert sum(share[site.name].kept for share in shares) == 1


def test_batches_are_dealt_in_turn():
    dealt = [list(Ranks(rank, 3).share(range(7))) for rank in range(3)]
    assert dealt == [[0, 3, 6], [1, 4, None], [2, 5, None]]
    assert list(Ranks().share(range(3))) == [0, 1, 2]
    assert [list(Ranks(rank, 2).share([])) for rank in range(2)] == [[], []]
    assert torch.tensor(Ranks().most(3, True)).tolist() == [3, 1]
