"""Fixtures of several files on whole commands."""

import subprocess

import pytest


@pytest.fixture
def disk(tmp_path):
    """A disk of 4 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", path], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    yield path
    subprocess.run(["umount", path], check=True)
