"""Shorter formats that the user has allowed reach nothing that must be exact: C, the weight check, PEFT's residual."""

import contextlib

import pytest
import tiny
import torch

import prep
from prep.precision import exact


@contextlib.contextmanager
def autocast():
    with torch.autocast("cpu", torch.bfloat16):
        yield


@contextlib.contextmanager
def legacy():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def backend():
    place = torch.backends.mkldnn.matmul
    before = place.fp32_precision
    place.fp32_precision = "bf16"
    yield
    place.fp32_precision = before


SETTINGS = {"autocast": autocast, "legacy": legacy, "backend": backend}


def product() -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(256, 256, generator=draw)
    return a @ a


@pytest.mark.parametrize("setting", SETTINGS)
def test_products_are_exact_and_settings_come_back(setting):
    wanted = product()
    with SETTINGS[setting]():
        loose = product()
        with exact():
            assert torch.equal(product(), wanted)
        with contextlib.suppress(ValueError), exact():
            raise ValueError
        assert torch.equal(product(), loose)
    assert torch.equal(product(), wanted)
    assert setting != "autocast" or loose.dtype == torch.bfloat16


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    made = tiny.sources(tmp_path_factory.mktemp("made"))
    options = {"data": made.data, "moment": "auto", **tiny.RUN}
    prep.covariance(made.model, store=made.path / "s", **options)
    prep.decompose(made.path / "s", for_="pissa", rank=4, quiet=True)
    return made.path, made.model, options


@pytest.mark.parametrize("setting", SETTINGS)
def test_moments_do_not_depend_on_settings(made, tmp_path, setting):
    path, model, options = made
    with SETTINGS[setting]():
        prep.covariance(model, store=tmp_path / "s", **options)
    wanted, files = tiny.contents(path / "s"), tiny.contents(tmp_path / "s")
    assert all(wanted[name] == files[name] for name in wanted if name.startswith("moments"))


@pytest.mark.parametrize("setting", SETTINGS)
def test_starts_do_not_depend_on_settings(made, setting):
    """The weights are probed, as they are in another dtype than those of the basis, and the residual formed, alike."""
    path, directory, _ = made

    def residual():
        model = prep.preprocess.model.loading.load_model(directory, dtype="float64").to(torch.float32)
        for parameter in model.parameters():
            parameter.data = parameter.data.double()
        adapted = prep.peft.get_model(model.float(), path / "s", init="pissa", r=4)
        return {name: value for name, value in adapted.state_dict().items() if "base_layer.weight" in name}

    wanted = residual()
    with SETTINGS[setting]():
        loose = residual()
    assert all(torch.equal(loose[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("setting", SETTINGS)
def test_merging_does_not_depend_on_settings(made, setting):
    path, directory, _ = made

    def merged():
        model = prep.preprocess.model.loading.load_model(directory, dtype="float32")
        adapter = prep.attach(model, path / "s", basis="identity")
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.fill_(0.3)
        prep.merge(model)
        return model.state_dict()

    wanted = merged()
    with SETTINGS[setting]():
        loose = merged()
    assert all(torch.equal(loose[name], wanted[name]) for name in wanted)


def test_a_setting_that_follows_another_still_does():
    above, place = torch.backends, torch.backends.mkldnn.matmul
    before = above.fp32_precision, place.fp32_precision
    try:
        place.fp32_precision, above.fp32_precision = "none", "bf16"
        with exact():
            assert place.fp32_precision == "ieee"
        above.fp32_precision = "none"
        assert place.fp32_precision == "none"
    finally:
        above.fp32_precision, place.fp32_precision = before
