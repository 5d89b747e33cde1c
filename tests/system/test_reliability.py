"""Interruptions: processes killed at any instant, two writers at once, full disks. Nothing is lost or wrong."""

import os
import random
import re
import shutil
import time
from types import SimpleNamespace

import kills
import pytest
import tiny
import torch

import prep
from prep import StoreError
from prep.preprocess.verify import verify
from prep.store import open_store
from prep.store.checkpoint import begin_slot, read_checkpoint, read_sums, use_slot, write_sums
from prep.store.lock import writer_lock

BATCHES = 10
PAUSE = 0.05  # seconds after every batch and layer, so that there is time to be killed in


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, text, and the stores of runs that nothing interrupted; how long the commands take with their pauses."""
    given = tiny.sources(tmp_path_factory.mktemp("made"), sentences=200)
    path = given.path
    options = {"model": given.model, "data": given.data, "num_sequences": 2 * BATCHES, "seq_len": 16, "batch_size": 2}
    # two passes, and a checkpoint after every few batches
    options |= {"checkpoint_every": 0.02, "memory_budget": 60_000, "quiet": False}
    seconds = {}
    for name, extra in (("covariance", options), ("decompose", {"rank": 4})):
        if name == "decompose":
            shutil.copytree(path / "covariance", path / name)
        begun, said = time.monotonic(), path / f"said {name}"
        code, work = kills.run(getattr(kills, name), {**extra, "store": path / name}, PAUSE, said, once_at_work=True)
        assert code == 0, said.read_text()
        seconds[name] = time.monotonic() - begun, work
    return SimpleNamespace(path=path, options=options, seconds=seconds)


def without_run(path):
    """Every file, the root's metadata as its attributes without `run`."""
    files = tiny.contents(path)
    files.pop("zarr.json")
    attrs = {name: value for name, value in open_store(path).attrs.items() if name != "run"}
    return files, attrs


def state(path):
    """(sites done, batches) of the checkpoint, which must be readable; (0, 0) before the first, (99, 0) at the end."""
    if not (path / "zarr.json").exists():
        return 0, 0
    stored = open_store(path)
    if stored.status == "complete":
        return 99, 0
    checkpoint = read_checkpoint(stored.root)
    return (len(checkpoint["done"]), checkpoint["batches"]) if checkpoint else (0, 0)


def killed(made, folder, name, count):
    """Kill a command `count` times at random instants and start it again until it is done; anew when it was done.

    The first time is no accident: it leaves something to resume from. The other instants are drawn from its whole life
    and from its working hours in turn. Every store that is done is compared with that of an uninterrupted run. Returns
    for every start what was on disk and what the command said.
    """
    draw, run, store = random.Random(1), getattr(kills, name), folder / "s"
    extra = made.options if name == "covariance" else {"rank": 4}
    starts, kills_left = [], count
    while kills_left or starts[-1][2] != 0:
        if not store.exists() and name == "decompose":
            shutil.copytree(made.path / "covariance", store)
        said, before = folder / f"said{len(starts)}", state(store)
        working, dies = len(starts) % 2 == 0, not starts
        after = draw.uniform(0, made.seconds[name][working]) if kills_left and not dies else None
        code, _ = kills.run(run, {**extra, "store": store}, PAUSE, said, after, working and not dies, dies)
        starts.append((before, said.read_text() if said.exists() else "", code))
        assert code in (0, -9), starts[-1]
        assert state(store) >= before
        kills_left -= code == -9
        if code == 0:
            assert without_run(store) == without_run(made.path / name)
            assert verify(store).findings == []
            shutil.rmtree(store)
    return starts


def covariance_survives(made, tmp_path, count):
    resumed = 0
    for before, said, _ in killed(made, tmp_path, "covariance", count):
        line = re.search(r"resumed after (\d+) batches, (\d+) of 8 sites", said)
        if line:  # it begins exactly at the state that was on disk: nothing of it is computed again
            assert (int(line[2]), int(line[1])) == before
            resumed += 1
    assert resumed


def decompose_survives(made, tmp_path, count):
    resumed, least = 0, 0
    for _, said, code in killed(made, tmp_path, "decompose", count):
        line = re.search(r"resumed after (\d+) of 14 layers", said)
        if line:
            assert int(line[1]) >= least
            least, resumed = int(line[1]), resumed + 1
        least = 0 if code == 0 else least
    assert resumed


def test_covariance_killed_once(made, tmp_path):
    covariance_survives(made, tmp_path, 1)


def test_decompose_killed_once(made, tmp_path):
    decompose_survives(made, tmp_path, 1)


@pytest.mark.stress
def test_covariance_killed_30_times(made, tmp_path):
    covariance_survives(made, tmp_path, 30)


@pytest.mark.stress
def test_decompose_killed_30_times(made, tmp_path):
    decompose_survives(made, tmp_path, 30)


# Two writers


def test_two_writers_at_once(made, tmp_path):
    """One wins; the other gets the line that names the owner; the store is that of one run."""
    store = tmp_path / "s"
    options = {**made.options, "store": store}
    processes = [kills.start(kills.covariance, options, 0.05, tmp_path / f"said{i}") for i in range(2)]
    for process in processes:
        process.join()
    assert sorted(process.exitcode for process in processes) == [0, 2]
    said = "".join((tmp_path / f"said{i}").read_text() for i in range(2))
    assert re.search(
        rf"Error: {store} is being written by process \d+ on \S+ for \d+ s: wait for it, or --break-lock", said
    )
    assert without_run(store) == without_run(made.path / "covariance")
    assert not (tmp_path / "s.lock").exists()


def test_the_lock_of_a_dead_process_is_free(tmp_path):
    store = tmp_path / "s"
    with writer_lock(store):
        with pytest.raises(StoreError, match=rf"is being written by process {os.getpid()} on"), writer_lock(store):
            pass
        with writer_lock(store, break_lock=True):
            pass
    (tmp_path / "s.lock").write_text('{"host": "elsewhere", "pid": 1, "since": 0}')
    with writer_lock(store):
        assert (tmp_path / "s.lock").exists()
    assert not (tmp_path / "s.lock").exists()


# Checkpoints


def test_a_checkpoint_is_replaced_in_one_step(made, tmp_path, monkeypatch):
    """Whatever fails while the second state is written, the first one is there."""
    from prep.preprocess.calibration.part import host_sums
    from prep.preprocess.model.sites import Site
    from prep.store.format import schema

    site = Site("a", ("a",), ((8, 16),))
    totals = {"a": host_sums(site, "full")}
    root = prep.store.create_store(tmp_path / "s", {"id": "", "model": {"id": "m"}, "status": "incomplete"}).root
    draw = torch.Generator().manual_seed(0)
    totals["a"].add_input(torch.randn(5, 16, generator=draw), 0)

    def write(batches):
        slot = begin_slot(root)
        write_sums(root, slot, "a", totals["a"].data())
        use_slot(root, slot, ["a"], {"done": [], "batches": batches})

    def read():
        root = open_store(tmp_path / "s").root
        where = read_checkpoint(root)
        return where, read_sums(root, where["slot"], "a")

    write(1)
    before = [panel.clone() for panel in totals["a"].data().second_moment]
    totals["a"].add_input(torch.randn(5, 16, generator=draw), 1)
    for step in range(1, 6):
        calls = []
        for name in ("write", "create_array", "put_attributes"):
            real = getattr(schema, name)

            def breaks(*arguments, real=real, calls=calls, step=step):
                calls.append(1)
                if len(calls) == step:
                    raise OSError("gone")
                return real(*arguments)

            monkeypatch.setattr(schema, name, breaks)
        with pytest.raises(OSError, match="gone"):
            write(2)
        monkeypatch.undo()
        where, sums = read()
        assert where["batches"] == 1
        assert all(torch.equal(a, b) for a, b in zip(sums.second_moment, before, strict=True))
    write(2)
    where, sums = read()
    assert where["batches"] == 2 and sums.count == 10


# Full disks


@pytest.mark.stress
@pytest.mark.parametrize("free", [0, 12, 24, 48, 72, 96, 128, 160, 192, 224])
def test_a_disk_that_is_full(made, disk, monkeypatch, free):
    """With `free` kB left a command ends in one line; with room it ends as if nothing had been."""
    usage, store = shutil.disk_usage(disk), disk / "s"
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)  # the check beforehand would see it

    def ends(command, **options):
        (disk / "filler").write_bytes(bytes(4096 * max(0, os.statvfs(disk).f_bavail - free // 4)))
        line = ""
        try:
            command(store=store, **options)
        except StoreError as error:
            line = str(error)
        assert line == f"the disk of {store} is full: make room and run the same command again"
        (disk / "filler").unlink()
        command(store=store, **options)

    ends(prep.covariance, **{**made.options, "checkpoint_every": 0.0, "quiet": True})
    assert without_run(store) == without_run(made.path / "covariance")
    ends(prep.decompose, rank=4, quiet=True)
    assert without_run(store) == without_run(made.path / "decompose")
    assert verify(store).findings == []
