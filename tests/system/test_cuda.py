"""The pipeline on a GPU against the CPU: `pytest -m cuda`; skipped where there is none."""

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

import prep
from prep.preprocess.numerics.device_sums import DeviceSums
from prep.preprocess.numerics.sample import Sample
from prep.store import open_store

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]

SMOLLM2 = Path(__file__).parents[2] / ".cache" / "smollm2"
OPTIONS = {"num_sequences": 16, "seq_len": 16, "batch_size": 4, "quiet": True}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("made")
    model = tiny.save(tiny.llama(96), path / "model")
    data = tiny.write_data(path / "text.jsonl", tiny.texts(120))
    return lambda store, **changed: prep.covariance(model, data, store=store, **{**OPTIONS, **changed})


def worst(a, b):
    """The largest relative difference of two stores' matrices."""
    a, b = open_store(a).moments, open_store(b).moments
    assert list(a) == list(b) and [a[layer].count for layer in a] == [b[layer].count for layer in b]
    names = {"full": "second_moment", "output": "output"}
    return max(
        tiny.relative(getattr(a[layer], names[a[layer].kind]), getattr(b[layer], names[b[layer].kind]).numpy())
        for layer in b
    )


@pytest.mark.parametrize("moment", ["full", "auto"])
@pytest.mark.parametrize(("dtype", "most"), [("float64", 1e-11), ("float32", 1e-5)])
def test_a_gpu_gives_the_moments_of_the_cpu(made, tmp_path, moment, dtype, most):
    made(tmp_path / "cpu", device="cpu", moment=moment, dtype=dtype)
    made(tmp_path / "gpu", device="cuda", moment=moment, dtype=dtype)
    made(tmp_path / "host", device="cuda", moment=moment, dtype=dtype, device_memory=0)
    assert worst(tmp_path / "gpu", tmp_path / "cpu") < most
    assert worst(tmp_path / "host", tmp_path / "gpu") < 1e-6


@pytest.mark.parametrize("tf32", [False, True])
def test_float32_activations_are_multiplied_in_float32(tf32):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        X = torch.randn(2048, 512, device="cuda")
        sums = DeviceSums("a", "full", 512, {}, X.device)
        from prep.precision import exact

        with exact():
            sums.add_input(X, 0)
    finally:
        torch.set_float32_matmul_precision(before)
    C = X.double().T @ X.double()
    got = torch.cat([panel for panel in sums.data().second_moment if panel.shape[1] == 512])
    assert tiny.relative(got.cpu(), C[-len(got) :].cpu().numpy()) < 1e-6


@pytest.mark.parametrize(("exact", "most"), [(False, 5e-6), (True, 2e-7)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_products(exact, most, dtype):
    """Error of every entry, over the root of its diagonal entries."""
    X = torch.randn(8192, 2560, device="cuda").to(dtype)
    sums = DeviceSums("a", "full", 2560, {}, X.device, exact)
    sums.add_input(X, 0)
    wanted, panels = X.double().T @ X.double(), sums.data().second_moment
    deviation, begin = X.double().square().sum(0).sqrt(), 0
    for panel in panels:
        rows = slice(begin, begin + len(panel))
        off = (panel - wanted[rows, : panel.shape[1]]).abs()
        assert (off / deviation[rows, None] / deviation[: panel.shape[1]]).max() < most
        begin = rows.stop


def test_equal_runs_are_bitwise_equal_and_no_site_waits(made, tmp_path):
    for name in "ab":
        made(tmp_path / name, device="cuda", dtype="bfloat16")
    assert worst(tmp_path / "a", tmp_path / "b") == 0
    X = torch.randn(64, 32, device="cuda")
    sums = DeviceSums("a", "full", 32, {}, X.device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sums.add_input(X, 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["Llama", "Qwen3-MoE"])
def test_a_gpu_keeps_the_tokens_of_the_cpu(tmp_path, name):
    given = tiny.sources(tmp_path, tiny.model(name), sentences=120)
    options = {**OPTIONS, "dtype": "float64", "keep_tokens": 20, "pack": False}
    for place, changed in (("cpu", {"device": "cpu"}), ("gpu", {}), ("host", {"device_memory": 0})):
        prep.covariance(given.model, given.data, store=tmp_path / place, **{"device": "cuda", **options, **changed})
    cpu = open_store(tmp_path / "cpu").moments
    for place in ("gpu", "host"):
        found = open_store(tmp_path / place).moments
        for layer in cpu:
            assert tiny.relative(found[layer].tokens, cpu[layer].tokens.numpy()) < 1e-5, (place, layer)


def test_no_sample_waits_for_the_gpu():
    rng, parts = np.random.default_rng(0), []
    sample = Sample(64, 32, "cuda")
    for _ in range(20):
        X, of = torch.randn(50, 32, device="cuda"), rng.random(50)
        parts.append((X, of))
        torch.cuda.set_sync_debug_mode("error")
        try:
            sample.add(X, of)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    X, of = torch.cat([X for X, _ in parts]).cpu(), np.concatenate([of for _, of in parts])
    assert torch.equal(sample.data().tokens, X[np.argsort(of)[:64]])


def test_bases_from_a_gpu_attach_and_train_there(made, tmp_path):
    made(tmp_path / "s", device="cuda")
    prep.decompose(tmp_path / "s", rank=8, quiet=True)
    model = tiny.llama(96).cuda()
    ids = torch.arange(3, 19, device="cuda")[None]
    base = model(ids).logits
    adapter = prep.attach(model, tmp_path / "s", core="gain")
    assert torch.equal(model(ids).logits, base)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    losses = []
    for _ in range(10):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    prep.detach(model)
    model.get_submodule(next(iter(open_store(tmp_path / "s").bases["full"].layers))).weight.data += 0.01
    with pytest.raises(prep.PrepError, match="other weights"):
        prep.attach(model, tmp_path / "s", core="gain")


def test_cuda_graphs_use_the_coefficient_of_each_call(made, tmp_path):
    made(tmp_path / "s", device="cuda")
    prep.decompose(tmp_path / "s", rank=8, quiet=True)
    model = tiny.llama(96).cuda()
    adapter = prep.attach(model, tmp_path / "s", core="dense")
    for parameter in adapter.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    block, x = model.model.layers[0].mlp, torch.randn(3, 32, device="cuda")
    compiled = torch.compile(block, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for s in (1.0, 1.0, 1.0, 0.5, -2.0, 0.0):
            with adapter.coeff(s):
                torch.testing.assert_close(compiled(x).clone(), block(x), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="make demo puts the model there")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_smollm2(tmp_path, dtype):
    data = tiny.write_data(tmp_path / "text.jsonl", [f"The answer to question {i} is {i * i}." for i in range(2000)])
    options = {"num_sequences": 8, "seq_len": 256, "quiet": True, "dtype": dtype}
    prep.covariance(str(SMOLLM2), data, store=tmp_path / "gpu", device="cuda", **options)
    prep.covariance(str(SMOLLM2), data, store=tmp_path / "cpu", device="cpu", **options)
    assert worst(tmp_path / "gpu", tmp_path / "cpu") < (1e-4 if dtype == "float32" else 0.1)
    bases = prep.decompose(tmp_path / "gpu", rank=16, quiet=True)
    assert np.median([record.energy for record in bases.layers.values()]) > 0.5
