"""The package from Python: what it takes, what it documents, what it shows."""

import inspect
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import tiny
import torch
from torch import nn

import prep
from prep.preprocess import progress
from prep.preprocess.options import CovarianceOptions, DecomposeOptions
from prep.store import create_store, open_store
from prep.store.format.schema import put_attributes

LAYER = "model.layers.0.mlp.down_proj"
RUN = {"num_sequences": 8, "seq_len": 16, "quiet": True}
FUNCTIONS = {
    name: value
    for name, value in [*((name, getattr(prep, name)) for name in prep.__all__), *vars(prep.peft).items()]
    if inspect.isfunction(value)
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, text, and a store with the basis `full`, all named by `Path`s."""
    path = tmp_path_factory.mktemp("python")
    model, data = Path(tiny.save(tiny.llama(), path / "model")), Path(tiny.write_data(path / "t.jsonl", tiny.texts(60)))
    store = prep.covariance(model, data, store=path / "prep.zarr", memory_budget="1GiB", layers=[0, 1], **RUN)
    prep.decompose(store, rank=4, dtype=torch.float32, quiet=True)
    return SimpleNamespace(path=path, model=model, data=data, store=path / "prep.zarr")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_is_documented(name):
    said = inspect.getdoc(FUNCTIONS[name]) or ""
    for argument in inspect.signature(FUNCTIONS[name]).parameters:
        assert re.search(rf"\b{argument}\b", said), argument


def test_paths_and_opened_stores_are_taken(made):
    assert prep.open_store(made.store).model["id"] == str(made.model)
    opened = prep.open_store(made.store)
    assert prep.decompose(opened, rank=4, quiet=True).hash == opened.bases["full"].hash
    assert prep.decompose(opened, for_="pissa", model=made.model, rank=4, quiet=True).name == "identity"
    assert prep.verify(opened, model=made.model).findings == []
    assert list(prep.info(opened)["bases"]) == ["full", "identity"]
    assert prep.info(opened) == prep.info(made.store) == prep.info(str(made.store))


def test_own_types_become_those_of_the_command():
    options = CovarianceOptions(Path("m"), Path("d"), layers=range(3), dtype=torch.bfloat16, memory_budget="8GiB")
    assert (options.model, options.data, options.layers, options.dtype) == ("m", "d", "0-2", "bfloat16")
    assert options.budget == 2**33 and DecomposeOptions(dtype=torch.float16).dtype == "float16"
    assert CovarianceOptions("m", [Path("a"), "b"]).data == ["a", "b"]
    assert CovarianceOptions("m", {Path("a"): 2, "b": 1}).data == {"a": 2, "b": 1}
    module = nn.Linear(2, 2)
    module.location = "not a store"
    assert DecomposeOptions(model=module).model is module


def test_only_what_is_offered_is_listed():
    listed = [name for name in dir(prep) if not name.startswith("__")]
    assert listed == sorted(set(prep.__all__) - {"__version__"})
    for name in ("benchmarks", "tests", "docs", "examples"):
        assert name not in dir(prep) and not hasattr(prep, name)


def test_what_things_show_of_themselves(made):
    store = prep.open_store(made.store)
    shown = repr(store)
    assert shown.startswith("Store(") and "complete" in shown and "128 tokens" in shown and "'full'" in shown
    assert repr(store.moments) == "Moments(14 layers, 8 sites)"
    assert repr(store.moments[LAYER]) == f"LayerMoment({LAYER!r}, kind='full', d_in=48, count=128)"
    assert repr(store.bases).startswith("Bases(full")
    basis = store.bases["full"]
    assert repr(basis).startswith(
        "BasisSet('full', complete, 14 layers, metric='full', power=0.5, select='top', rank=4"
    )
    assert repr(basis[LAYER]) == f"Basis(32 x 48, rank 4, energy {basis[LAYER].energy:.3f} at rank 4)"
    for value in (store, store.moments, store.moments[LAYER], store.bases, basis):
        page = value._repr_html_()
        assert page.count("<table>") == page.count("</table>") == 1
        assert page.count("<tr>") == page.count("</tr>") > 1
    assert "<td>full</td><td>complete</td><td>full</td><td>0.5</td><td>top</td><td>4</td>" in store._repr_html_()
    assert "<td>q_proj, k_proj, v_proj</td>" in store.moments._repr_html_()
    first = next(iter(basis))
    shape = "{} x {}".format(*basis.layers[first].shape)
    assert f"<td>{first}</td><td>{shape}</td><td>4</td>" in basis._repr_html_()
    assert "and 2 more" in basis._repr_html_()  # of 14 layers


def test_what_a_notebook_shows_of_a_stranger_s_store_is_no_script(tmp_path):
    attrs = {"id": "0", "model": {"id": "<script>"}, "corpus": None, "options": None, "status": "complete"}
    store = create_store(tmp_path / "s", attrs)
    put_attributes(store.root, {**store.root.attrs, "bases": ["gone"]})
    page = open_store(tmp_path / "s")._repr_html_()
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert "missing or damaged" in page  # and the others would still be shown


def test_a_notebook_sees_a_bar(monkeypatch, capsys):
    """IPython's kernel, of which only what tells it from a shell is needed."""
    assert not progress.in_notebook()
    for config, wanted in (({"IPKernelApp": {}}, True), ({"TerminalIPythonApp": {}}, False)):
        shell = ModuleType("IPython")
        shell.get_ipython = lambda config=config: SimpleNamespace(config=config)
        monkeypatch.setitem(sys.modules, "IPython", shell)
        assert progress.in_notebook() == wanted
        with progress.Progress("covariance", 100, "tokens") as shown:
            shown.advance(40)
        assert ("covariance:  40%" in capsys.readouterr().err) == wanted
