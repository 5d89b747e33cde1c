"""Files that are written for others: their permissions, and what is said of big ones."""

import logging
import os

import pytest
import tiny
from torch import nn

import prep
from prep.adapters import saved


@pytest.fixture(params=[0o022, 0o077], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "prep.zarr"
    return tiny.store(path, tiny.llama(), ("full", "identity", "eva"), rank=8)


def test_files_have_the_permissions_of_the_umask(store, tmp_path, umask):
    """As a file that Python opens; safetensors alone gives 0600."""
    model = tiny.llama()
    prep.attach(model, store, rank=4)
    prep.save(model, tmp_path / "core.safetensors")
    for form in ("safetensors", "peft-lora"):
        prep.export(store, form, tmp_path / form, basis="full", rank=4)
    for init in ("whitened", "lora"):
        adapted = prep.peft.get_model(tiny.llama(), store, init, r=4)
        prep.peft.save(adapted, tmp_path / init)
        if init == "whitened":
            prep.peft.save(adapted, tmp_path / "residual", as_="residual")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert len(weights) == 6  # of `residual` two
    for path in files:
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask, path
    assert not list(tmp_path.rglob(".*"))


def test_stores_have_the_permissions_of_the_umask(tmp_path, umask):
    path = tiny.store(tmp_path / "prep.zarr", tiny.llama(), ("full",), rank=4)
    for file in path.rglob("*"):
        assert file.stat().st_mode & 0o777 == (0o777 if file.is_dir() else 0o666) & ~umask, file


def test_what_was_there_stays_when_a_file_cannot_be_written(store, tmp_path, monkeypatch):
    model = tiny.llama()
    prep.attach(model, store, rank=4)
    (tmp_path / "a").write_text("mine")

    def full(*_args, **_kwargs):
        raise OSError("no space")

    monkeypatch.setattr(saved, "save_file", full)
    with pytest.raises(prep.PrepError, match=r"cannot write .*no space"):
        prep.save(model, tmp_path / "a")
    assert [file.name for file in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "mine"


def test_a_big_file_names_the_option_that_leaves_the_basis_out(tmp_path, caplog):
    wide = nn.Sequential(nn.Linear(1300, 1300, bias=False))
    store = tiny.store(tmp_path / "prep.zarr", wide, rank=1100)
    prep.attach(wide, store)
    with caplog.at_level(logging.WARNING):
        prep.save(wide, tmp_path / "big.safetensors")
        [said] = caplog.messages
        prep.save(wide, tmp_path / "small.safetensors", embed_basis=False)
    assert caplog.messages == [said] and "embed_basis=False" in said
    assert said.startswith(f"{tmp_path / 'big.safetensors'}: 11.4 MB, of which 0.00 MB were trained")
    assert (tmp_path / "big.safetensors").stat().st_size > 1000 * (tmp_path / "small.safetensors").stat().st_size
