"""Fixtures of several files on reports."""

from types import SimpleNamespace

import pytest
import tiny
from pages import Page

import prep


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model of two blocks, its store with four bases of rank 16, and the report of that."""
    path, net = tmp_path_factory.mktemp("report"), tiny.llama()
    given = tiny.sources(path, net)
    store = path / "prep.zarr"
    prep.covariance(given.model, given.data, store=store, **tiny.RUN)
    prep.decompose(store, for_="whitened,asvd,pissa,eva", rank=16, quiet=True)
    file = prep.report(store, path / "report.html")
    return SimpleNamespace(path=path, net=net, given=given, store=store, file=file, page=Page(file))
