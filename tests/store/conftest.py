"""Fixtures of several files on stores."""

import shutil

import pytest
import tiny

import prep
from prep.store.format import schema


@pytest.fixture(scope="module")
def small_slabs():
    """Chunks of two ranks, and of two layers, so that a tiny basis has several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schema, "SLAB", 2)
        patch.setattr(schema, "ROWS", 2)
        yield


@pytest.fixture(scope="module")
def one_block(tmp_path_factory):
    """A store of the moments of block 1, with a basis of rank 4."""
    given = tiny.sources(tmp_path_factory.mktemp("made"))
    prep.covariance(given.model, given.data, store=given.path / "s", layers="1", keep_tokens=12, **tiny.RUN)
    prep.decompose(given.path / "s", rank=4, quiet=True)
    return given.path / "s"


@pytest.fixture
def store(one_block, tmp_path):
    """A copy of it that a test may change."""
    return shutil.copytree(one_block, tmp_path / "s.zarr")
