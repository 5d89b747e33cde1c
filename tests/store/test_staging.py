"""Replacing a store: the old one or the new one is there, whole, wherever the process dies; nothing else is touched."""

import contextlib
import os
import shutil
import subprocess

import pytest
import steps
import tiny
from torch import nn

from prep import StoreError
from prep.preprocess.verify import verify
from prep.store import create_store, open_store
from prep.store.format.schema import is_url, local_path
from prep.store.lock import writer_lock
from prep.store.staging import (
    beside,
    occupied,
    overlap,
    place,
    put_in_place,
    recover,
    remove,
    replacement,
    resolved,
    same_place,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two stores of one layer, `old` and `new`."""
    path = tmp_path_factory.mktemp("made")
    for name in ("old", "new"):
        tiny.store(path / name, nn.Sequential(nn.Linear(4, 3)), rank=2)
    return path


def which(path):
    """The name of the store that is there, whole; None where there is none."""
    if not path.exists():
        return None
    assert verify(path).findings == []
    return open_store(path).id.split("-")[0]


# Locations


def test_resolved_locations(tmp_path):
    (tmp_path / "a b").mkdir()
    (tmp_path / "link").symlink_to("a b")
    there = tmp_path.resolve() / "a b"
    with contextlib.chdir(tmp_path):
        for spelling in (
            "a b",
            "./a b/",
            "link",
            "link/../a b",
            (tmp_path / "a b").as_uri(),
            f"FILE://{tmp_path}/link",
        ):
            assert resolved(spelling) == there, spelling
            assert not is_url(spelling)
            assert same_place(spelling, there)
            assert place(spelling) == there
            assert beside(spelling).parent == there.parent
    assert resolved("s3://bucket/a.zarr//") == "s3://bucket/a.zarr"
    assert is_url("s3://bucket/a.zarr")
    assert local_path("file://localhost/a%20b") == local_path("local:///a b") == local_path("/a b")


def test_one_place_by_two_real_paths(tmp_path):
    """Where a file system is mounted twice, the paths differ and the directory does not."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert not same_place(tmp_path / "a", tmp_path / "b")
    if subprocess.run(["mount", "--bind", tmp_path / "a", tmp_path / "b"], capture_output=True).returncode:
        pytest.skip("mounting is not permitted")
    try:
        assert same_place(tmp_path / "a", tmp_path / "b")
        assert overlap(tmp_path / "a", tmp_path / "b" / "c")
    finally:
        subprocess.run(["umount", tmp_path / "b"], check=True)


@pytest.mark.parametrize(
    ("a", "b", "wanted"),
    [
        ("x", "x", True),
        ("x", "./y/../x", True),
        ("x", "x/y", True),
        ("x/y/z", "x", True),
        ("x", "xy", False),
        ("x/y", "x/z", False),
        ("s3://b/x", "s3://b/x/", True),
        ("s3://b/x", "s3://b/x/y", True),
        ("s3://b/x", "s3://b/xy", False),
        ("s3://b/x", "x", False),
    ],
)
def test_overlap(tmp_path, a, b, wanted):
    with contextlib.chdir(tmp_path):
        assert overlap(a, b) is overlap(b, a) is wanted


# Replacing


def put(path):
    put_in_place(beside(path), path)


def lay_out(made, path, *, there=True):
    """A folder of its own with the new store staged beside the old one; the store's path."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    if there:
        shutil.copytree(made / "old", path / "s")
    shutil.copytree(made / "new", beside(path / "s"))
    return path / "s"


def settled(store):
    """What the next writer finds: the store in place whole, and nothing that was moved away."""
    with writer_lock(store):
        pass
    names = {path.name for path in store.parent.iterdir()}
    assert names <= {"s", beside(store).name}, names
    return which(store), which(beside(store))


@steps.SOME
@pytest.mark.parametrize("there", [True, False])
def test_killed_at_every_step(made, tmp_path, there, by):
    """Old or new, both whole, at any instant and after the next writer's tidying; then the same again succeeds."""
    seen = set()
    store = tmp_path / "w" / "s"
    for step in steps.every_step(put, lambda: (lay_out(made, tmp_path / "w", there=there),), by, dense=6):
        if store.exists():
            at_once = which(store)
        else:
            with pytest.raises(
                StoreError, match=r"was being replaced .*run that command again" if there else "no store"
            ):
                open_store(store)
            at_once = None
        after, staged = settled(store)
        assert (after, staged) in [("old" if there else None, "new"), ("new", None)], step
        assert at_once in (after, None)
        seen.add((at_once, after))
        if staged:
            put(store)
        assert settled(store) == ("new", None)
    assert seen == ({("old", "old"), (None, "old"), ("new", "new")} if there else {(None, None)})
    assert settled(store) == ("new", None)


@steps.SOME
def test_killed_while_tidying_up(made, tmp_path, by):
    """The tidying itself may be killed wherever it stands, after a kill wherever that was."""
    store, step, worst = tmp_path / "w" / "s", 1, 0
    while steps.killed_at(step, put, lay_out(made, tmp_path / "w")):
        kept = tmp_path / "kept"
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(tmp_path / "w", kept)

        def again(kept=kept):
            shutil.rmtree(tmp_path / "w")
            shutil.copytree(kept, tmp_path / "w")
            return (store,)

        for other in steps.every_step(recover, again, max(by, 4)):
            assert settled(store) in [("old", "new"), ("new", None)]
            worst = max(worst, other)
        assert settled(store) in [("old", "new"), ("new", None)]
        step += max(by, 3)
    assert step > 5 and worst > 5


def test_an_interrupt_between_the_renames_is_undone(made, tmp_path, monkeypatch):
    for fails in (1, 2):
        store, calls, real = lay_out(made, tmp_path / "w"), [], os.rename

        def rename(a, b, calls=calls, fails=fails, real=real):
            calls.append(a)
            if len(calls) == fails:
                raise KeyboardInterrupt
            real(a, b)

        monkeypatch.setattr(os, "rename", rename)
        with pytest.raises(KeyboardInterrupt):
            put(store)
        monkeypatch.undo()
        assert (which(store), which(beside(store))) == ("old", "new")
        assert len(list(store.parent.iterdir())) == 2


def test_a_replacement_that_fails_leaves_nothing_beside(made, tmp_path):
    store = tmp_path / "s"
    shutil.copytree(made / "old", store)
    for error in (StoreError, KeyboardInterrupt):
        with pytest.raises(error), replacement(store) as built:  # noqa: PT012
            shutil.copytree(made / "new", built)
            raise error
        assert [path.name for path in tmp_path.iterdir()] == ["s"]
        assert which(store) == "old"
    with replacement(store) as built:
        shutil.copytree(made / "new", built)
    assert which(store) == "new"


def test_a_removal_that_was_killed_opens_no_more_and_is_finished(made, tmp_path):
    path = tmp_path / "w"

    def copy():
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(path)
        shutil.copytree(made / "old", path)
        return (path,)

    for step in steps.every_step(remove, copy):
        if step == 1:
            assert which(path) == "old"
        else:
            with pytest.raises(StoreError, match="is not a prep store"):
                open_store(path)
        create_store(path, {"id": "x", "model": {"id": "m"}, "status": "incomplete"})
        assert sorted(tiny.contents(path)) == ["zarr.json"]
    assert not path.exists()


def test_strangers_are_never_moved_or_removed(made, tmp_path):
    """Neither a directory that is in the way, nor a copy that a user keeps beside the store."""
    staged, replaced = (lay_out(made, tmp_path / "w").with_name(f"s.{name}") for name in ("staged", "replaced"))
    store = tmp_path / "w" / "s"
    for name in ("s.old", "s.new", "s.bak"):
        shutil.copytree(made / "old", store.with_name(name))
    replaced.mkdir()
    (replaced / "precious").write_text("x")
    with pytest.raises(StoreError, match=r"s.replaced is in the way and not a prep store: move it elsewhere"):
        put(store)
    with writer_lock(store):
        pass
    assert (which(store), which(staged)) == ("old", "new")
    shutil.move(replaced, tmp_path / "elsewhere")
    put(store)
    staged.mkdir()
    (staged / "precious").write_text("x")
    with pytest.raises(StoreError, match=r"s.staged is in the way"), replacement(store):
        raise AssertionError
    assert which(store) == "new"
    assert (staged / "precious").read_text() == "x"
    assert [which(store.with_name(name)) for name in ("s.old", "s.new", "s.bak")] == ["old"] * 3
    shutil.rmtree(staged)
    shutil.copytree(made / "old", tmp_path / "real")
    staged.symlink_to(tmp_path / "real")
    with pytest.raises(StoreError, match=r"s.staged is in the way"), replacement(store):
        raise AssertionError
    assert which(tmp_path / "real") == "old"


def test_a_store_that_was_moved_away_is_not_lost_to_a_strangers_directory(made, tmp_path):
    """Where something else has come in its place, the only copy stays; an empty directory is in nobody's way."""
    store = lay_out(made, tmp_path / "w")
    store.rename(store.with_name("s.replaced"))
    store.mkdir()
    (store / "precious").write_text("x")
    with writer_lock(store):
        pass
    assert which(store.with_name("s.replaced")) == "old"
    (store / "precious").unlink()
    assert settled(store) == ("old", "new")


def test_occupied(made, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / f"zarr.{'0' * 32}.partial").write_text("{")
    assert [occupied(tmp_path / name) for name in ("absent", "empty", "begun")] == [False] * 3
    assert occupied(made / "old")
    create_store(tmp_path / "begun", {"id": "x", "model": {"id": "m"}, "status": "incomplete"})
