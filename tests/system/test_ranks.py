"""Several processes on one calibration: the moments of one process, whoever had which batch."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import jobs
import pytest
import tiny
import torch

import prep
from prep import PrepError
from prep.preprocess.calibration.part import host_sums, owners
from prep.preprocess.distributed import World, check_devices
from prep.preprocess.model.sites import Site
from prep.preprocess.verify import verify
from prep.store import open_store


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, text and options of a run of 7 batches; two passes."""
    given = tiny.sources(tmp_path_factory.mktemp("made"), tiny.llama(96), sentences=200)
    options = {
        "model": given.model,
        "data": given.data,
        "num_sequences": 13,
        "seq_len": 16,
        "batch_size": 2,
        "pack": False,
        "memory_budget": 200_000,
        "quiet": True,
    }
    return given.path, options


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


LABELS = {"template": "{number} {text}", "label_mask": True, "answer_from": "{text}"}


@pytest.mark.parametrize(
    ("size", "per_node", "changed"),
    [(1, 1, {}), (2, 2, {}), (2, 2, LABELS), (3, 3, {"moment": "auto"}), (2, 1, {"moment": "auto"}), (4, 2, {})],
    ids=["1", "2", "2 on answers", "3", "2 nodes of 1", "2 nodes of 2"],
)
def test_several_ranks_give_the_moments_of_one(made, tmp_path, size, per_node, changed):
    options = {**made[1], **changed}
    prep.covariance(store=tmp_path / "one", **options)
    given = {**options, "store": tmp_path / "many", "checkpoint_every": 1e-3}
    codes, said, _ = jobs.run("covariance", given, tmp_path, size, per_node)
    assert codes == [0] * size, said
    same(tmp_path / "many", tmp_path / "one")
    assert prep.open_store(tmp_path / "many").moments.sites and not (tmp_path / "many" / "checkpoint").exists()


def test_ranks_keep_the_first_half_and_grow(made, tmp_path):
    """Two ranks read two batches a round: the half is in after 4 of 7. What three ranks add is what one would."""
    _, options = made
    half = prep.covariance(store=tmp_path / "half", halves=False, **{**options, "num_sequences": 8})
    given = {**options, "store": tmp_path / "many"}
    codes, said, _ = jobs.run("covariance", given, tmp_path, 2)
    assert codes == [0, 0], said
    found = open_store(tmp_path / "many")
    for layer in found.moments:
        got, wanted = found.moments[layer].half, half.moments[layer]
        assert got.count == wanted.count
        assert tiny.relative(got.second_moment, wanted.second_moment.numpy()) < 1e-6
    prep.covariance(store=tmp_path / "few", **{**options, "num_sequences": 6})
    shutil.copytree(tmp_path / "few", tmp_path / "grown")
    prep.covariance(store=tmp_path / "few", **options)
    codes, said, _ = jobs.run("covariance", {**options, "store": tmp_path / "grown"}, tmp_path, 3)
    assert codes == [0] * 3, said
    same(tmp_path / "grown", tmp_path / "few")
    assert verify(tmp_path / "grown").findings == [] == verify(tmp_path / "many").findings


def test_experts_that_some_ranks_do_not_reach(made, tmp_path):
    path, options = made
    options = {
        **options,
        "model": tiny.save(tiny.model("Mixtral"), path / "mixtral"),
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
    assert "resumed after" in said[0] and not any(said[1:])
    same(tmp_path / "many", tmp_path / "one")


def test_one_rank_tells_what_is_wrong(made, tmp_path):
    _, options = made
    codes, said, _ = jobs.run("covariance", {**options, "store": tmp_path / "s", "data": "nothing.jsonl"}, tmp_path, 3)
    assert codes == [2, 2, 2]
    assert said[0].count("Error:") == 1 and "nothing.jsonl" in said[0] and not any(said[1:])
    codes, said, _ = jobs.run("covariance", {**options, "store": tmp_path / "s", "device_map": "cpu"}, tmp_path, 2)
    assert codes == [2, 2] and "CUDA_VISIBLE_DEVICES" in said[0] and not said[1]
    assert list(tmp_path.glob("s*")) == []


def test_a_group_that_was_begun_elsewhere_is_left_alone(made, tmp_path):
    """Its backend need not know tensors on the CPU, as nccl does not: everything goes over groups of our own."""
    _, options = made
    prep.covariance(store=tmp_path / "one", **options)
    given = {**options, "store": tmp_path / "many", "checkpoint_every": 1e-3}
    codes, said, _ = jobs.run("covariance", given, tmp_path, 2, begun_as="fake")
    assert codes == [0, 0], said
    same(tmp_path / "many", tmp_path / "one")


def test_every_process_of_a_node_has_a_device_of_its_own():
    """What processes see is given here; where there is no GPU the names of devices are all that can be tested."""
    four = [World(rank, 4, rank, 4) for rank in range(4)]
    gpus = max(1, torch.cuda.device_count())
    assert [world.device("cuda") for world in four] == [f"cuda:{rank % gpus}" for rank in range(4)]
    assert [world.device("cpu") for world in four] == ["cpu"] * 4
    assert World().device("cuda") == "cuda"
    own, shared = [["0"], ["1"], ["2"], ["3"]], [["0", "1", "2", "3"]] * 4
    for seen in (own, shared):
        check_devices(four[0], "cuda", None, seen)
    check_devices(four[0], "cpu", None, [["0", "1"]] * 4)
    check_devices(four[0], None, "auto", own)
    with pytest.raises(PrepError, match=r"4 processes on a node with 2 GPUs: .*--nproc-per-node 2, .*--device cpu"):
        check_devices(four[0], "cuda", None, [["0", "1"]] * 4)
    with pytest.raises(PrepError, match="--device cuda:0 would hold 4 processes"):
        check_devices(four[0], "cuda:0", None, shared)
    with pytest.raises(PrepError, match="give each its own CUDA_VISIBLE_DEVICES"):
        check_devices(four[0], None, "auto", shared)


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

    def share_of(world):
        owner = owners(sites, kinds, world)
        return {site.name: host_sums(site, "full", world, owner[site.name]) for site in sites}

    alone = share_of(World())
    shares = [share_of(World(rank, 3, rank, 3)) for rank in range(3)]
    assert sum(map(size, shares)) == size(alone)
    assert max(map(size, shares)) < 0.5 * size(alone)
    for site in sites:
        assert sum(share[site.name].kept for share in shares) == 1


def test_batches_are_dealt_in_turn():
    dealt = [list(World(rank, 3).share(range(7))) for rank in range(3)]
    assert dealt == [[0, 3, 6], [1, 4, None], [2, 5, None]]
    assert list(World().share(range(3))) == [0, 1, 2]
    assert [list(World(rank, 2).share([])) for rank in range(2)] == [[], []]
    assert torch.tensor(World().max(3, True)).tolist() == [3, 1]


# decompose


def same_basis(a, b):
    """Two bases with equal records and directions; the layers are few enough that only rounding may differ."""
    a, b = open_store(a).bases["full"], open_store(b).bases["full"]
    assert list(a) == list(b) and a.method == b.method
    for layer, theirs in b.read().items():
        ours = a[layer]
        assert (ours.record.index, ours.record.weight_hash) == (theirs.record.index, theirs.record.weight_hash)
        for name in ("U", "S", "P", "spectrum"):
            assert tiny.relative(getattr(ours, name), getattr(theirs, name).numpy()) < 1e-6, (layer, name)


@pytest.fixture(scope="module")
def moments(made, tmp_path_factory):
    path = tmp_path_factory.mktemp("moments") / "s"
    prep.covariance(store=path, **made[1])
    return path


@pytest.mark.parametrize("size", [2, 3])
def test_several_ranks_decompose_as_one(moments, tmp_path, size):
    for name in ("one", "many"):
        shutil.copytree(moments, tmp_path / name)
    prep.decompose(tmp_path / "one", rank=8, quiet=True)
    codes, said, _ = jobs.run("decompose", {"store": tmp_path / "many", "rank": 8, "quiet": True}, tmp_path, size)
    assert codes == [0] * size, said
    same_basis(tmp_path / "many", tmp_path / "one")
    assert verify(tmp_path / "many").findings == []


def test_ranks_that_begin_a_store_of_bases(made, tmp_path):
    options = {"model": made[1]["model"], "metric": "identity", "rank": 8, "name": "full", "quiet": True}
    prep.decompose(tmp_path / "one", **options)
    codes, said, _ = jobs.run("decompose", {**options, "store": tmp_path / "many"}, tmp_path, 2)
    assert codes == [0, 0], said
    same_basis(tmp_path / "many", tmp_path / "one")


@pytest.mark.parametrize(("victim", "then"), [(1, 1), (0, 3)])
def test_a_killed_rank_loses_few_layers(moments, tmp_path, victim, then):
    for name in ("one", "many"):
        shutil.copytree(moments, tmp_path / name)
    prep.decompose(tmp_path / "one", rank=8, quiet=True)
    options = {"store": tmp_path / "many", "rank": 8}
    codes, said, seconds = jobs.run("decompose", options, tmp_path, 2, die=(victim, 3))
    assert codes[victim] == -9 and codes[1 - victim] == 2 and seconds < 60, (codes, said)
    assert "lost contact with another rank" in said[1 - victim]
    codes, said, _ = jobs.run("decompose", options, tmp_path, then)
    assert codes == [0] * then, said
    assert "basis 'full': resumed after" in said[0]
    same_basis(tmp_path / "many", tmp_path / "one")


# What takes long


@pytest.mark.stress
def test_killed_at_20_batches_and_resumed_by_another_number_each_time(made, tmp_path):
    _, options = made
    prep.covariance(store=tmp_path / "one", **options)
    draw, resumed = random.Random(0), 0
    given = {**options, "store": tmp_path / "many", "checkpoint_every": 1e-3, "quiet": False}
    for _ in range(20):
        size = draw.randint(2, 4)
        per_node = draw.choice([n for n in (1, 2, size) if size % n == 0])
        codes, said, seconds = jobs.run(
            "covariance", given, tmp_path, size, per_node, (draw.randrange(size), draw.randint(1, 3))
        )
        assert set(codes) <= {0, 2, -9} and seconds < 60, (codes, said)
        resumed += "resumed after" in said[0]
        if codes == [0] * size:
            same(tmp_path / "many", tmp_path / "one")
            shutil.rmtree(tmp_path / "many")
    assert resumed > 5
    codes, said, _ = jobs.run("covariance", given, tmp_path, 2)
    assert codes == [0, 0], said
    same(tmp_path / "many", tmp_path / "one")


@pytest.mark.stress
def test_the_commands_under_torchrun(made, tmp_path):
    """Both commands as a user types them; rank 0 alone prints, and torchrun names a rank that is killed."""
    _, options = made
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "prep.cli",
    ]
    store = ["--store", str(tmp_path / "many")]
    read = ["--model", options["model"], "--data", options["data"], "--num-sequences", "13", "--seq-len", "16"]
    read += ["--batch-size", "2", "--no-pack"]
    for command in (["covariance", *read], ["decompose", "--rank", "8"]):
        done = subprocess.run([*torchrun, *command, *store], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("next: prep") == 1
    prep.covariance(store=tmp_path / "one", **{**options, "memory_budget": 10**9})
    prep.decompose(tmp_path / "one", rank=8, quiet=True)
    same(tmp_path / "many", tmp_path / "one")
    same_basis(tmp_path / "many", tmp_path / "one")

    more = tiny.write_data(tmp_path / "more.jsonl", tiny.texts(6000))
    slow = ["--data", more, "--num-sequences", "5000", "--store", str(tmp_path / "killed"), "--checkpoint-every", "1s"]
    job = subprocess.Popen([*torchrun, "covariance", *read, *slow], stderr=subprocess.PIPE, text=True, env=environment)
    while not (tmp_path / "killed" / "zarr.json").exists():
        assert job.poll() is None
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[1]), signal.SIGKILL)
    begun = time.monotonic()
    _, said = job.communicate()
    assert job.returncode != 0 and time.monotonic() - begun < 60
    assert re.search(r"rank\s*: 1", said) and "-9" in said
