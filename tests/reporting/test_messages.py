"""What a report says of what it refuses: one table of sentences."""

import shutil
import sys

import messages
import pytest
import tiny
from stores import flip

import prep

SPECTRUM = "bases/full/32x48/spectrum/c/0/0"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A store, a damaged one, a directory and a file that is no report."""
    path = tmp_path_factory.mktemp("messages")
    given = tiny.sources(path)
    prep.covariance(given.model, given.data, store=path / "store", layers="1", **tiny.RUN)
    prep.decompose(path / "store", rank=4, quiet=True)
    chunk = shutil.copytree(path / "store", path / "damaged") / SPECTRUM
    chunk.write_bytes(flip(chunk.read_bytes(), 5, 1))
    (path / "folder").mkdir()
    (path / "notes.html").write_text("<html>")
    return path


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.delenv("PREP_STORE", raising=False)
    return place


REFUSED = {
    "no store": (
        lambda: prep.report("none"),
        "no store at none: run `prep covariance --model X --data Y` first, or name one with --store",
    ),
    "a damaged one": (
        lambda: prep.report("damaged"),
        f"damaged/{SPECTRUM.partition('/c/')[0]} (chunk c/0/0) does not match its checksum: "
        "restore the store from a copy",
    ),
    "a directory": (
        lambda: prep.report("store", "folder"),
        "folder is a directory: name a file, such as --output folder/report.html",
    ),
    "no directory": (
        lambda: prep.report("store", "none/report.html"),
        "none is no directory: make it, or name another --output",
    ),
    "another file": (
        lambda: prep.report("store", "notes.html"),
        "notes.html is there already and no report: name another --output, or replace it with --overwrite",
    ),
    "a file of a store": (
        lambda: prep.report("store", "store/zarr.json", overwrite=True),
        "store/zarr.json lies in a store: name another --output",
    ),
}


@pytest.mark.parametrize("asked", REFUSED)
def test_what_is_refused(here, asked):
    messages.check(*REFUSED[asked])


@pytest.mark.parametrize("package", ["plotly", "jinja2"])
def test_a_missing_package_is_named(here, monkeypatch, package):
    for name in [name for name in sys.modules if name.startswith(("prep.reporting.", f"{package}."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    messages.check(lambda: prep.report("store"), f'a report needs {package}: pip install "prep-bases[report]"')
