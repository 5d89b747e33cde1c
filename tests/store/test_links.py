"""Links in a store: readers may follow them, writers do not leave the store by one."""

import shutil

import pytest
import tiny

import prep
from prep import StoreError
from prep.store import open_store
from prep.store.transfer import pull


def link_out(store, name, victim):
    """Move a file or directory of the store to `victim` and put a link in its place."""
    shutil.move(store / name, victim)
    (store / name).symlink_to(victim)


def test_decompose_does_not_follow_a_link_out_of_the_store(store, tmp_path):
    """A stranger's store whose bases are somebody else's directory."""
    shutil.rmtree(store / "bases")
    victim = tmp_path / "victim"
    (victim / "full").mkdir(parents=True)
    (victim / "full" / "precious").write_text("x")
    (store / "bases").symlink_to("../victim")
    for options in ({}, {"overwrite": True}, {"name": "other"}):
        with pytest.raises(StoreError, match=r"bases is a link out of the store|missing or damaged") as caught:
            prep.decompose(store, rank=4, quiet=True, **options)
        assert len(str(caught.value).splitlines()) == 1
    assert tiny.contents(victim) == {"full/precious": b"x"}


@pytest.mark.parametrize("name", ["zarr.json", "moments", "moments/full-48/mean/c/0/0", "bases/full/32x32", "stray"])
def test_no_link_out_of_the_store_is_written_through(store, tmp_path, name):
    (store / "stray").write_text("x")
    link_out(store, name, tmp_path / "victim")
    before, victim = tiny.contents(tmp_path), tmp_path / "victim"
    with pytest.raises(StoreError, match=rf"{name} is a link out of the store, to {victim}"):
        open_store(store, "r+")
    with pytest.raises(StoreError, match="is a link out of the store"):
        prep.decompose(store, for_="pissa", rank=4, quiet=True)
    assert tiny.contents(tmp_path) == before
    assert list(open_store(store).bases["full"])  # reading goes on


def test_a_link_that_leads_nowhere_is_no_way_out_either(store, tmp_path):
    (store / "bases" / "zarr.json.partial").symlink_to(tmp_path / "made-by-the-writer")
    with pytest.raises(StoreError, match="is a link out of the store"):
        prep.decompose(store, for_="pissa", rank=4, quiet=True)
    assert not (tmp_path / "made-by-the-writer").exists()


def test_links_within_the_store_are_no_matter(store):
    (store / "bases" / "also").symlink_to("full")
    (store / "moments" / "up").symlink_to("../moments/full-48")
    assert prep.decompose(store, for_="pissa", rank=4, quiet=True).status == "complete"


def test_a_store_that_is_removed_takes_nothing_with_it(store, one_block, tmp_path):
    link_out(store, "bases", tmp_path / "victim")
    before = tiny.contents(tmp_path / "victim")
    pull(one_block, store, overwrite=True)
    assert tiny.contents(tmp_path / "victim") == before
    assert not (store / "bases").is_symlink()
