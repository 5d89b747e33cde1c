"""The page: what it says where a store has nothing to show, names of strangers in it, and the file that it is."""

import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from click.testing import CliRunner
from pages import Page

import prep
from prep.cli import main
from prep.reporting.layers import places_of
from prep.store import open_store
from prep.store.format.schema import put_attributes

RUN = {**tiny.RUN, "layers": "1"}
TAG = "<script>alert(1)</script>"
NAME = "<script>alert(1)<b>"  # a store keeps no name with a slash


@pytest.fixture(scope="module")
def lacking(tmp_path_factory):
    """Stores that lack something, and what their sections say."""
    path = tmp_path_factory.mktemp("lacking")
    given = tiny.sources(path)
    kinds = {"moments": {}, "diagonal": {"moment": "diagonal"}, "whole": {"halves": False}, "svd": {}, "eva": {}}
    for name, options in kinds.items():
        prep.covariance(given.model, given.data, store=path / name, **RUN, **options)
    for name, method in (("diagonal", "asvd"), ("whole", "whitened"), ("svd", "pissa"), ("eva", "eva")):
        prep.decompose(path / name, for_=method, rank=4, quiet=True)
    prep.decompose(path / "bases", for_="pissa", model=given.model, rank=4, quiet=True)
    root = open_store(shutil.copytree(path / "moments", path / "incomplete"), "r+").root
    put_attributes(root, {**root.attrs, "status": "incomplete"})
    prep.remove(shutil.copytree(path / "whole", path / "nothing"), ["full"], moments=True)
    return given


DECOMPOSE = ("There is no complete basis.", "prep decompose")
COVARIANCE = "prep covariance --model X --data Y"
LACKS = {
    "nothing": dict.fromkeys(
        ("kept", "spectra", "data", "bases", "standing"),
        ("There are neither moments nor bases to look at.", COVARIANCE),
    ),
    "moments": {"kept": DECOMPOSE, "spectra": DECOMPOSE, "data": DECOMPOSE, "bases": DECOMPOSE},
    "bases": {
        "kept": ("What a basis keeps of the output is told by moments, and the store has none to read.", COVARIANCE),
        "data": (
            "The store has no moments to read, by which bases of more and of fewer tokens are compared.",
            COVARIANCE,
        ),
    },
    "diagonal": {
        "kept": (
            "Diagonal moments do not tell what a basis keeps of the output: full ones do, or those of outputs.",
            f"{COVARIANCE} --moment full --overwrite",
        )
    },
    "whole": {
        "data": (
            "The calibration kept no halves of its tokens, which tell how far a basis is from the best one.",
            f"{COVARIANCE} --overwrite",
        )
    },
    "svd": {
        "data": (
            "More tokens would gain nothing: the bases do not depend on them, or lose nothing that they need not.",
            "prep decompose",
        )
    },
    "eva": {"budget": ("No basis says what it keeps of the output of all its layers.", "prep decompose")},
    "incomplete": {
        "kept": ("The store is not complete: run the same command again.", COVARIANCE),
        "standing": ("The store is not complete: run the same command again.", COVARIANCE),
    },
}


@pytest.mark.parametrize("name", LACKS)
def test_a_section_without_data_says_why_and_what_would_fill_it(lacking, tmp_path, monkeypatch, name):
    monkeypatch.chdir(lacking.path)
    page = Page(prep.report(name, tmp_path / "r.html"))
    for section, (why, command) in LACKS[name].items():
        assert page.sections[section].endswith(f"{why} {command} --store {name}"), page.sections[section]
        assert f'"figure-{section}"' not in page.text
        words = command.replace(" X ", f" {lacking.model} ").replace(" Y", f" {lacking.data}")
        assert run(words, name, tmp_path / section).exit_code == 0


def run(command, name, folder):
    """What an advised command does to a copy of the store."""
    shutil.copytree(name, folder)
    short = ["--num-sequences", "8", "--seq-len", "16", "--batch-size", "4", "--layers", "1"]
    words = shlex.split(command)[1:]
    words += [*short] if words[0] == "covariance" else []
    return CliRunner().invoke(main, [*words, "--store", str(folder), "--quiet"])


class Strange(torch.nn.Module):
    """Two layers whose names are HTML."""

    def __init__(self):
        super().__init__()
        for i in range(2):
            self.add_module(f"{i}{NAME}", torch.nn.Linear(8, 8))

    def forward(self, x):
        for layer in self.children():
            x = layer(x)
        return x


@pytest.fixture(scope="module")
def strange(tmp_path_factory):
    """A report of a store in which every name is HTML, or a template of plotly's."""
    path, net = tmp_path_factory.mktemp("strange"), Strange()
    prep.covariance(net, batches=[torch.randn(20, 8) for _ in range(2)], store=path / "s", quiet=True)
    prep.decompose(path / "s", model=net, name="x", rank=4, quiet=True)
    (path / "s" / "bases" / "x").rename(path / "s" / "bases" / NAME)
    root = open_store(path / "s", "r+").root
    attrs = root.attrs.asdict() | {"bases": [NAME]}
    attrs |= {"id": TAG, "model": {**attrs["model"], "id": TAG, "class": "%{x}", "revision": TAG}}
    attrs["corpus"] = {**attrs["corpus"], "source": TAG, "template": "{{ title }} \ud800", "split": TAG}
    put_attributes(root, attrs)
    return prep.report(path / "s", path / "r.html")


def test_names_of_strangers_are_text(strange):
    """In tables and headings by jinja, in menus, axes and titles as plotly reads them."""
    page = Page(strange)
    figures = len(re.findall(r"Plotly\.newPlot\(\s*\"figure-", page.text))
    assert figures == 6 and page.tags["script"] == figures + 2  # and plotly's own, and the page's
    assert "b" not in page.tags and page.text.count("alert(1)") > 10
    said = dict(page.tables["made"][0])
    assert said["model"] == f"{TAG} at {TAG}, %{{x}} in float32" and said["template"] == "{{ title }} ?"
    escaped = NAME.replace("<", "&lt;").replace(">", "&gt;")
    assert page.figure("spectra").layout["annotations"][0]["text"] == f"0{escaped}"
    for section in ("kept", "spectra", "data"):
        [button] = page.figure(section).layout["updatemenus"][0]["buttons"]
        assert button["label"] == escaped


def test_the_page_loads_nothing(strange):
    page = Page(strange)
    [policy] = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page.text)
    assert policy.startswith("default-src 'none';") and "http" not in policy
    assert not set(page.tags) & {"link", "img", "iframe", "object", "embed", "base", "form"}
    assert os.path.getsize(strange) < 6_000_000


def test_a_store_at_a_url_is_reported_without_its_full_moments(lacking, tmp_path):
    url = "memory://report/a.zarr"
    prep.push(lacking.path / "whole", url, overwrite=True)
    near = Page(prep.report(lacking.path / "whole", tmp_path / "near.html"))
    far = Page(prep.report(url, tmp_path / "far.html"))
    assert "prep pull brings the store here" in far.sections["standing"]
    assert "prep pull" not in near.text
    for section in ("kept", "spectra", "bases", "budget"):
        assert far.figure(section).data == near.figure(section).data


def test_a_report_is_replaced_and_other_files_are_not(lacking, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = lacking.path / "whole"
    assert prep.report(store).name == "report.html" and Page("report.html").sections["made"]
    before = Path("report.html").read_text()
    assert prep.report(prep.open_store(store), "report.html").read_text() == before
    Path("mine.html").write_text("mine")
    os.symlink("mine.html", "link.html")
    for name in ("mine.html", "link.html"):
        with pytest.raises(prep.PrepError, match="is there already and no report"):
            prep.report(store, name)
    assert Path("mine.html").read_text() == "mine"
    prep.report(store, "mine.html", overwrite=True)
    assert Path("mine.html").read_text() == before
    assert sorted(os.listdir()) == ["link.html", "mine.html", "report.html"]


def test_the_command_says_where_the_report_is(lacking, tmp_path):
    done = CliRunner().invoke(main, ["report", "--store", str(lacking.path / "whole"), "-o", str(tmp_path / "r.html")])
    assert (done.exit_code, done.output) == (0, f"written to {tmp_path / 'r.html'}\n")


@pytest.mark.parametrize(
    ("names", "kinds"),
    [
        (["model.layers.0.self_attn.q_proj", "model.layers.11.mlp.up_proj"], ["self_attn.q_proj", "mlp.up_proj"]),
        (["encoder.block.0.layer.1.wi", "decoder.block.0.layer.2.wi"], ["encoder.wi", "decoder.wi"]),
        (["h.0.mlp.experts.3.up", "h.0.attn.q"], ["mlp.experts.up", "attn.q"]),
        (["head"], ["head"]),
        (["0", "2", "²"], ["*"]),
    ],
)
def test_kinds_are_named_by_what_tells_them_apart(names, kinds):
    places = places_of(names)
    assert places.kinds == kinds
    assert [places.of[name][1] for name in names[:1]] == [0]
