"""Copies that fail or are killed: the source and what was there before are whole, and no half of a copy opens."""

import asyncio
import contextlib
import random
import shutil
import time
from pathlib import Path

import fsspec
import pytest
import steps
import tiny
from click.testing import CliRunner
from fsspec.implementations.memory import MemoryFileSystem
from stores import files, flip
from torch import nn

from prep import StoreError
from prep.cli import main
from prep.preprocess.verify import verify
from prep.store import open_store
from prep.store import transfer as transfer_module
from prep.store.format.files import at_once
from prep.store.lock import writer_lock
from prep.store.staging import beside
from prep.store.transfer import pull, push


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two stores of one layer, `old` and `new`, with bases of different names."""
    path = tmp_path_factory.mktemp("made")
    tiny.store(path / "old", nn.Sequential(nn.Linear(4, 3)), ("full", "eva"), rank=2)
    tiny.store(path / "new", nn.Sequential(nn.Linear(4, 3)), ("full", "identity"), rank=2)
    return path


def which(location):
    """The name of the store that is there, whole."""
    assert verify(location).findings == []
    return open_store(location).id.split("-")[0]


def damaged(store, path):
    source = Path(shutil.copytree(store, path))
    chunk = next(file for file in files(source) if "/UP/c/" in file.as_posix())
    chunk.write_bytes(flip(chunk.read_bytes(), 3, 1))
    return source


def test_large_files_are_copied_in_pieces(made, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer_module, "PIECE", 500)
    push(made / "old", "memory://pieces/prep.zarr")
    assert tiny.contents(pull("memory://pieces/prep.zarr", tmp_path / "a").location) == tiny.contents(made / "old")
    source = Path(shutil.copytree(made / "old", tmp_path / "longer"))
    large = max(files(source), key=lambda file: file.stat().st_size * ("/c/" in file.as_posix()))
    large.write_bytes(large.read_bytes() + bytes(10**5))
    with pytest.raises(StoreError, match=r"the copy is damaged: .* does not hold"):
        pull(source, tmp_path / "b")
    assert not (tmp_path / "b").exists()


# A store onto itself


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_store_is_not_copied_onto_itself(made, tmp_path, overwrite):
    store = Path(shutil.copytree(made / "old", tmp_path / "b.zarr"))
    (tmp_path / "link").symlink_to("b.zarr")
    before, said = tiny.contents(store), "are one place"
    with contextlib.chdir(tmp_path):
        spellings = ["b.zarr", "./b.zarr/", "link", f"{tmp_path}/link", store.as_uri(), (tmp_path / "link").as_uri()]
        for source in spellings:
            for target in [*spellings, "b.zarr/inner", "."]:
                with pytest.raises(StoreError, match=said):
                    pull(source, target, overwrite=overwrite)
            for target in (store.as_uri(), (tmp_path / "link").as_uri(), (store / "inner").as_uri(), tmp_path.as_uri()):
                with pytest.raises(StoreError, match=said):
                    push(source, target, overwrite=overwrite)
    assert tiny.contents(store) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.zarr", "link"]


def test_two_spellings_of_one_url_are_one_place(made):
    """What no comparison of names shows: a file written to the target is seen in the source."""
    push(made / "old", "memory://shelf/one.zarr")
    for other in ("memory://shelf/one.zarr", "memory://shelf/one.zarr/"):
        with pytest.raises(StoreError, match="are one place"):
            push("memory://shelf/one.zarr", other, overwrite=True)
    with pytest.raises(StoreError, match="is to be copied"):
        push("memory://shelf/one.zarr", "memory:///shelf/one.zarr", overwrite=True)
    assert which("memory://shelf/one.zarr") == "old"
    assert not [path for path in MemoryFileSystem().find("/shelf/one.zarr") if path.endswith(".partial")]


# Paths


def test_push_to_a_file_url_makes_its_directories(made, tmp_path):
    target = tmp_path / "a b" / "deep" / "c.zarr"
    push(made / "old", target.as_uri())
    assert tiny.contents(target) == tiny.contents(made / "old")
    with pytest.raises(StoreError, match="exists already"):
        push(made / "new", target.as_uri())
    push(made / "new", target.as_uri(), overwrite=True)
    assert tiny.contents(target) == tiny.contents(made / "new")
    assert [path.name for path in target.parent.iterdir()] == ["c.zarr"]


def test_places_that_cannot_be_written_to_are_one_line(made, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("nowhere")
    for target in ("file", "file/c.zarr", "link", "link/c.zarr", "x" * 300):
        for copy in (push, pull):
            location = f"file://{tmp_path}/{target}"
            with pytest.raises(StoreError) as caught:
                copy(made / "old", location)
            assert len(str(caught.value).splitlines()) == 1
    for target in ("http://127.0.0.1:9/c.zarr", "file://elsewhere/c.zarr"):
        with pytest.raises(StoreError) as caught:
            push(made / "old", target)
        assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(StoreError, match="is a URL"):
        pull(made / "old", "memory://c.zarr")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_what_another_process_made_meanwhile_is_kept(made, tmp_path, monkeypatch):
    real, target = transfer_module.writer_lock, tmp_path / "c"

    def late(location, break_lock):
        shutil.copytree(made / "old", location)
        return real(location, break_lock)

    monkeypatch.setattr(transfer_module, "writer_lock", late)
    with pytest.raises(StoreError, match="exists already"):
        pull(made / "new", target)
    assert which(target) == "old"


def test_a_locked_store_is_not_replaced_but_for_its_option(made, tmp_path):
    target = shutil.copytree(made / "old", tmp_path / "c")
    for command in (["pull", str(made / "new"), "--store", str(target)], ["push", target.as_uri()]):
        environment = {"PREP_STORE": str(made / "new")}
        with writer_lock(target):
            result = CliRunner().invoke(main, [*command, "--overwrite"], env=environment)
            assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
            assert "is being written by process" in result.stderr and "or --break-lock" in result.stderr
            assert which(target) == "old"
            assert CliRunner().invoke(main, [*command, "--overwrite", "--break-lock"], env=environment).exit_code == 0
        assert which(target) == "new"
        shutil.rmtree(target)
        shutil.copytree(made / "old", target)


def replaced(source, target):
    pull(source, target, overwrite=True)


def killed_pulls(made, path, numbers):
    """A pull over another store, killed before the steps of those numbers: one of the two is there, whole."""
    target, ended = path / "w" / "c", []
    for step in numbers:
        shutil.rmtree(path / "w", ignore_errors=True)
        shutil.copytree(made / "old", target)
        steps.killed_at(step, replaced, made / "new", target)
        with writer_lock(target):
            pass
        ended.append(which(target))
        assert {path.name for path in target.parent.iterdir()} <= {"c", beside(target).name}
        replaced(made / "new", target)
        assert tiny.contents(target) == tiny.contents(made / "new")
        assert [path.name for path in target.parent.iterdir()] == ["c"]
    return ended


def test_a_pull_killed_at_some_steps(made, tmp_path):
    draw = random.Random(0)
    assert set(killed_pulls(made, tmp_path, [draw.randint(1, 60) for _ in range(5)] + [1000])) == {"old", "new"}


@pytest.mark.stress
def test_a_pull_killed_at_every_step(made, tmp_path):
    ended = killed_pulls(made, tmp_path, range(1, 200, 2))
    assert (ended[0], ended[-1], set(ended)) == ("old", "new", {"old", "new"})


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_damaged_source_arrives_nowhere_and_harms_nothing(made, tmp_path, overwrite):
    bad, place = damaged(made / "new", tmp_path / "bad.zarr"), tmp_path / "place"
    for location in ("memory://harm/c.zarr", (place / "c.zarr").as_uri()):
        if overwrite:
            push(made / "old", location)
        with pytest.raises(StoreError, match=r"damaged: bases/full.*/UP"):
            push(bad, location, overwrite=overwrite)
        if overwrite:
            assert which(location) == "old"
            continue
        with pytest.raises(StoreError, match="no store at"):
            open_store(location)
    if overwrite:
        assert [path.name for path in place.iterdir()] == ["c.zarr"]
    if overwrite:
        MemoryFileSystem().rm("/harm", recursive=True)


# URLs


class Brittle(MemoryFileSystem):
    """Files in memory that may be read for ever, and written or removed `left` times more."""

    protocol = "brittle"
    store: dict = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    left = 10**9

    def _use(self):
        type(self).left -= 1
        if self.left < 0:
            raise PermissionError(13, "the quota is used up")

    def pipe_file(self, path, value, mode="overwrite", **options):
        self._use()
        return super().pipe_file(path, value, mode=mode, **options)

    def _rm(self, path):
        self._use()
        super()._rm(path)

    def rm_file(self, path):
        self._use()
        super().rm_file(path)

    def rm(self, path, recursive=False, maxdepth=None):
        for file in self.find(path, withdirs=False) if self.isdir(path) else [path]:
            self.rm_file(self._strip_protocol(file))


@pytest.fixture(autouse=True)
def empty_brittle():
    Brittle.store.clear()
    Brittle.left = 10**9


fsspec.register_implementation("brittle", Brittle, clobber=True)


@steps.SOME
def test_a_push_that_breaks_off_anywhere_never_opens_as_complete(made, by):
    """Every removal and every write fails in turn, and all after it: the old copy is whole, or nothing opens."""
    url, states, left = "brittle://shelf/c.zarr", [], 0
    while "new" not in states:
        Brittle.store.clear()
        Brittle.left = 10**9
        push(made / "old", url)
        Brittle.left = left
        said = None
        try:
            push(made / "new", url, overwrite=True)
        except StoreError as error:
            said = str(error)
        if said is not None:
            assert said.startswith(f"cannot write to {url} (") and len(said.splitlines()) == 1
        opens = True
        try:
            open_store(url)
        except StoreError:
            opens = False
        states.append(which(url) if opens else None)
        Brittle.left = 10**9
        push(made / "new", url, overwrite=True)
        assert which(url) == "new"
        left += 1 if left < 8 else by
    whole = states.count("old")
    assert 0 < whole < 8 and states == ["old"] * whole + [None] * (len(states) - whole - 1) + ["new"]
    assert left > len(files(made / "new")) + len(files(made / "old"))


def test_a_push_whose_copy_is_found_damaged_leaves_no_store(made, monkeypatch):
    real = Brittle.pipe_file

    def rots(self, path, value, mode="overwrite", **options):
        value = flip(value, 3, 1) if path.endswith("/S/c/0/0") else value
        real(self, path, value, mode=mode, **options)

    monkeypatch.setattr(Brittle, "pipe_file", rots)
    with pytest.raises(StoreError, match=r"the copy is damaged: bases/full"):
        push(made / "old", "brittle://shelf/c.zarr")
    with pytest.raises(StoreError, match="no store at"):
        open_store("brittle://shelf/c.zarr")


def test_what_has_begun_is_finished_when_one_file_fails():
    """No thread writes into a folder that was removed after the failure; what had not begun never begins."""
    begun, ended = [], []

    def write(item):
        if item == 3:
            raise StoreError("the disk is full")
        time.sleep(0.05)
        ended.append(item)

    async def work(item):
        begun.append(item)
        await asyncio.to_thread(write, item)

    with pytest.raises(StoreError, match="the disk is full"):
        at_once(work, range(1000))
    assert sorted(begun) == sorted([*ended, 3]) and len(begun) < 1000
