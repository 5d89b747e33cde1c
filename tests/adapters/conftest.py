"""Fixtures of several files on adapters."""

import pytest
import tiny


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store of the tiny Llama with a basis of every method, to rank 24."""
    return tiny.store(tmp_path_factory.mktemp("adapters") / "prep.zarr", tiny.llama(), tuple(tiny.METHODS), rank=24)
