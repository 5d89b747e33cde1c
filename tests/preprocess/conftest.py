"""Fixtures of several files on calibration and decomposition."""

import pytest
import tiny
from threadpoolctl import threadpool_limits


@pytest.fixture
def one_blas_thread():
    """As the worker threads run it; small matrices on several threads only fight."""
    with threadpool_limits(1):
        yield


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A text of 300 sentences."""
    return tiny.write_data(tmp_path_factory.mktemp("data") / "text.jsonl", tiny.texts(300))
