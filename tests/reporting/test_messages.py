"""What a report says of what it refuses, and of what a store does not have: whole sentences."""

import json
import re
import shlex
import shutil
import sys

import messages
import pytest
import tiny
from click.testing import CliRunner
from pages import Page
from stores import flip

import prep
from prep.cli import main
from prep.store import open_store
from prep.store.format.schema import put_attributes

RUN = {**tiny.RUN, "layers": "1"}
SPECTRUM = "bases/full/32x48/spectrum/c/0/0"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Stores that lack something, and files that are no reports."""
    path = tmp_path_factory.mktemp("messages")
    given = tiny.sources(path)
    for name, options in (
        ("moments", {}),
        ("diagonal", {"moment": "diagonal"}),
        ("whole", {"halves": False}),
        ("pissa", {}),
    ):
        prep.covariance(given.model, given.data, store=path / name, **RUN, **options)
    prep.decompose(path / "diagonal", for_="asvd", rank=4, quiet=True)
    prep.decompose(path / "whole", rank=4, quiet=True)
    prep.decompose(path / "pissa", for_="pissa", rank=4, quiet=True)
    tiny.store(path / "bases", tiny.llama(), rank=4)
    shutil.copytree(path / "whole", path / "damaged")
    chunk = path / "damaged" / SPECTRUM
    chunk.write_bytes(flip(chunk.read_bytes(), 5, 1))
    root = open_store(shutil.copytree(path / "moments", path / "incomplete"), "r+").root
    put_attributes(root, {**root.attrs, "status": "incomplete"})
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
        f"file://.../{SPECTRUM.partition('/c/')[0]} (chunk c/0/0) does not match its checksum: "
        "restore the store from a copy",
    ),
    "a directory": (
        lambda: prep.report("moments", "folder"),
        "folder is a directory: name a file, such as --output folder/report.html",
    ),
    "no directory": (
        lambda: prep.report("moments", "none/report.html"),
        "none is no directory: make it, or name another --output",
    ),
    "another file": (
        lambda: prep.report("moments", "notes.html"),
        "notes.html is there already and no report: name another --output, or replace it with --overwrite",
    ),
    "a file of a store": (
        lambda: prep.report("moments", "moments/zarr.json", overwrite=True),
        "moments/zarr.json lies in a store: name another --output",
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
    messages.check(lambda: prep.report("moments"), f'a report needs {package}: pip install "prep-bases[report]"')
