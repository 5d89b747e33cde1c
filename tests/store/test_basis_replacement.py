"""Replacing a basis: the old one is read until the new one is complete, wherever the process dies."""

import os
import shutil

import numpy as np
import pytest
import steps
import tiny
import torch

from prep import StoreError
from prep.preprocess.verify import verify
from prep.store import Bases, BasisWriter, LayerRecord, create_store, open_store
from prep.store.format import schema
from prep.store.transfer import push

LAYERS = {"a": (3, 4), "b": (3, 4)}
GROUPS = {(3, 4): {"layers": ["a", "b"], "rank": 2, "spectrum": 3}}
MODEL = {"id": "m", "revision": None, "class": "M", "config_hash": "0", "dtype": "float32"}


def parts(seed, layer):
    """U, S, P, spectrum of a weight that the seed gives."""
    W = np.random.default_rng([seed, *layer.encode()]).standard_normal(LAYERS[layer])
    U, S, Vt = np.linalg.svd(W, full_matrices=False)
    return [torch.from_numpy(np.ascontiguousarray(x)) for x in (U[:, :2], S[:2], Vt[:2], S)]


def begin(root, seed, name="full"):
    method = {"metric": "identity", "rank": 2, "seed": seed}
    return BasisWriter.create(root, name, method=method, dtype="float32", model=MODEL, groups=GROUPS)


def write(writer, seed, layers=tuple(LAYERS)):
    for layer in layers:
        shape = LAYERS[layer]
        record = LayerRecord(shape, GROUPS[shape]["layers"].index(layer), 2, 1.0, 0.0, 2, "exact", 1.0, "", "float32")
        writer.note(writer.put(layer, *parts(seed, layer), record))
    writer.flush()


def make(path, seed, name="full"):
    writer = begin(open_store(path, "r+").root, seed, name)
    write(writer, seed)
    writer.finish()


@pytest.fixture
def store(tmp_path):
    """A store with the basis `full` of seed 1."""
    attrs = {"id": "0", "model": MODEL, "corpus": None, "options": None, "status": "complete", "run": {}}
    create_store(tmp_path / "s", attrs)
    make(tmp_path / "s", 1)
    return tmp_path / "s"


def seed_of(path, name="full"):
    """Which basis readers find, checked against what went into it."""
    basis = open_store(path).bases[name]
    seed = basis.method["seed"]
    for layer, one in basis.read().items():
        for got, wanted in zip((one.U, one.S, one.P, one.spectrum), parts(seed, layer), strict=True):
            np.testing.assert_allclose(got.double(), wanted, rtol=1e-6, atol=1e-6)
    return seed


def strays(path):
    """The folder of every finding of `verify`, which must be a stray file."""
    findings = verify(path).findings
    assert all("does not belong to the store" in finding.problem for finding in findings), findings
    return {finding.where.split("/")[1] for finding in findings}


def names(path):
    return sorted(file.name for file in (path / "bases").iterdir())


def test_the_old_basis_is_read_until_the_new_one_is_complete(store):
    root = open_store(store, "r+").root
    writer = begin(root, 2)
    assert seed_of(store) == 1
    write(writer, 2)
    assert (seed_of(store), strays(store)) == (1, {".full.new"})
    assert open_store(store).bases.names == ["full"]
    writer.finish()
    assert (seed_of(store), names(store), strays(store)) == (2, ["full", "zarr.json"], set())


def test_a_replacement_is_resumed(store):
    bases = open_store(store).bases
    assert bases.pending("full") is None
    write(begin(open_store(store, "r+").root, 2), 2, ["a"])
    pending = open_store(store).bases.pending("full")
    assert (pending.name, pending.status, list(pending.layers), pending.method["seed"]) == (
        "full",
        "incomplete",
        ["a"],
        2,
    )
    writer = BasisWriter.resume(open_store(store, "r+").root, "full")
    write(writer, 2, ["b"])
    writer.finish()
    assert (seed_of(store), names(store)) == (2, ["full", "zarr.json"])
    assert open_store(store).bases.pending("full") is None


def test_another_replacement_begins_anew(store):
    write(begin(open_store(store, "r+").root, 2), 2, ["a"])
    write(begin(open_store(store, "r+").root, 3), 3, ["b"])
    pending = open_store(store).bases.pending("full")
    assert (pending.method["seed"], list(pending.layers)) == (3, ["b"])
    assert seed_of(store) == 1
    make(store, 4)
    assert (seed_of(store), names(store)) == (4, ["full", "zarr.json"])


def test_an_incomplete_basis_is_replaced_at_once(store):
    root = open_store(store, "r+").root
    write(begin(root, 5, "other"), 5, ["a"])
    writer = begin(root, 6, "other")
    assert open_store(store).bases.open("other").method["seed"] == 6
    assert names(store) == ["full", "other", "zarr.json"]
    write(writer, 6)
    writer.finish()
    assert (seed_of(store, "other"), seed_of(store), strays(store)) == (6, 1, set())


def test_a_damaged_basis_is_replaced_at_once(store):
    (store / "bases" / "full" / "zarr.json").write_text("{")
    make(store, 2)
    assert (seed_of(store), names(store), strays(store)) == (2, ["full", "zarr.json"], set())


def replace(path):
    make(path, 2)


def resume(path):
    """What a command does that is run again."""
    root = open_store(path, "r+").root
    pending = Bases(root).pending("full")
    if pending is None:
        make(path, 2)
        return
    writer = BasisWriter.resume(root, "full")
    write(writer, 2, [layer for layer in LAYERS if layer not in pending.layers])
    writer.finish()


@steps.SOME
def test_killed_at_every_step(store, tmp_path, by):
    """Readers find the old basis or the new one, whole; the same again ends with the new one."""
    kept, work, seen = store.rename(tmp_path / "kept"), tmp_path / "s", []

    def again():
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(kept, work)
        return (work,)

    for step in steps.every_step(replace, again, max(by, 4)):
        seen.append(seed_of(work))
        resume(work)
        assert (seed_of(work), names(work), strays(work)) == (2, ["full", "zarr.json"], set()), step
    assert seen == sorted(seen) and len(seen) > 5
    assert seed_of(work) == 2


def swapped(path):
    writer = BasisWriter.resume(open_store(path, "r+").root, "full")
    writer.finish()


@steps.SOME
def test_killed_at_every_step_of_the_exchange(store, tmp_path, by):
    writer = begin(open_store(store, "r+").root, 2)
    write(writer, 2)
    kept, work, seen, states = store.rename(tmp_path / "kept"), tmp_path / "s", [], set()

    def again():
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(kept, work)
        return (work,)

    for _ in steps.every_step(swapped, again, by, dense=12):
        states.add(tuple(names(work)))
        seen.append(seed_of(work))
        resume(work)
        assert (seed_of(work), names(work), strays(work)) == (2, ["full", "zarr.json"], set())
    assert seen == sorted(seen) and set(seen) == {1, 2}
    for between in ((".full.new", "full"), (".full.new", ".full.old"), (".full.old", "full")):
        assert (*between, "zarr.json") in states


def test_a_reader_does_not_tidy_up(store):
    os.rename(store / "bases" / "full", store / "bases" / ".full.old")
    before = tiny.contents(store)
    assert seed_of(store) == 1
    assert open_store(store).bases.pending("full") is None
    assert tiny.contents(store) == before
    assert Bases(open_store(store, "r+").root).pending("full") is None
    assert names(store) == ["full", "zarr.json"]


def test_at_a_url_a_basis_is_replaced_at_once(store):
    url = "memory://replaced/s"
    push(store, url)
    writer = begin(open_store(url, "r+").root, 2)
    with pytest.raises(StoreError, match="is not complete"):
        seed_of(url)
    write(writer, 2)
    writer.finish()
    assert seed_of(url) == 2
    assert verify(url).findings == []


def test_attributes_that_another_writer_changed_are_not_written_over(store):
    """A root that was opened before another process added a basis and changed an attribute."""
    root = open_store(store, "r+").root
    make(store, 5, "other")
    other = open_store(store, "r+").root
    schema.put_attributes(other, {**other.attrs, "run": {"host": "elsewhere"}})
    writer = begin(root, 3, "third")
    write(writer, 3)
    writer.finish()
    reopened = open_store(store)
    assert reopened.bases.names == ["full", "other", "third"]
    assert reopened.attrs["run"] == {"host": "elsewhere"}
    assert verify(store).findings == []


# Names

BAD = [
    "a.partial",
    ".hidden",
    "x" * 201,
    "é" * 101,
    "a/b",
    "a\\b",
    "a\nb",
    "zarr.json",
    ".",
    "..",
    "",
    "a\x00b",
    "\ud800",
]


@pytest.mark.parametrize("name", BAD, ids=lambda name: repr(name)[:12])
def test_names_that_a_store_cannot_keep(store, name):
    before = tiny.contents(store)
    for what, advice in (("basis", "give another --name"), ("layer", "--exclude"), ("site", "--exclude")):
        with pytest.raises(StoreError, match=rf"cannot name a {what} in a store, .*{advice}") as caught:
            schema.check_writable_name(name, what)
        assert len(str(caught.value).splitlines()) == 1
        str(caught.value).encode()
    with pytest.raises(StoreError, match="cannot name a basis"):
        begin(open_store(store, "r+").root, 2, name)
    assert tiny.contents(store) == before


@pytest.mark.parametrize("name", ["full", "model.layers.0.mlp", "x" * 200, "é" * 100, "partial", "a.partial.b", "a b"])
def test_names_that_a_store_keeps(store, name):
    assert schema.check_writable_name(name, "layer") == name
    for seed in (1, 2):
        make(store, seed, name)
    assert seed_of(store, name) == 2


def test_only_files_of_writers_are_tidied_up(store):
    """Not those of others, and no directory, whatever it is called."""
    ours = ["zarr.json.partial", f"zarr.{'0' * 32}.partial", "0.partial", f"12.{'a' * 32}.partial"]
    theirs = ["notes.partial", "x.partial", "zarr.partial"]
    for name in [*ours, *theirs]:
        (store / "bases" / name).write_text("x")
    (store / "bases" / "a.partial" / "1.partial").mkdir(parents=True)
    schema.remove_partial(open_store(store, "r+").root)
    assert names(store) == sorted([*theirs, "a.partial", "full", "zarr.json"])
    assert (store / "bases" / "a.partial" / "1.partial").is_dir()
    make(store, 2, "next")
    assert seed_of(store, "next") == 2
