"""Sums on the device of the activations: the same moments as on the host. Here the CPU counts as such a device."""

import jobs
import numpy as np
import pytest
import tiny
import torch

import prep
from prep import PrepError
from prep.preprocess.calibration import devices, estimate, job
from prep.preprocess.calibration.job import Calibration
from prep.preprocess.calibration.plan import make_plan
from prep.preprocess.model.sites import Site
from prep.preprocess.numerics import device_sums
from prep.preprocess.numerics.accumulators import SiteSums
from prep.preprocess.numerics.device_sums import DeviceSums, full_product, in_range, row_blocks
from prep.store import open_store
from prep.store.format.schema import panels

CPU = torch.device("cpu")
LARGE, SMALL = 10**9, 80_000  # bytes: one pass, several passes
OPTIONS = {"num_sequences": 10, "seq_len": 16, "batch_size": 2, "quiet": True, "checkpoint_every": 0.0}


@pytest.fixture
def on_devices(monkeypatch):
    monkeypatch.setattr(devices, "ACCELERATORS", ["cuda", "cpu"])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model and text, and a function that calibrates it."""
    path = tmp_path_factory.mktemp("made")
    model = tiny.save(tiny.llama(intermediate=96), path / "model")
    data = tiny.write_data(path / "text.jsonl", tiny.texts(80))
    return lambda store, **changed: prep.covariance(model, data, store=store, **{**OPTIONS, **changed})


def arrays(store):
    """Every array of the moments, by layer and name."""
    moments = open_store(store).moments
    names = {"full": ["second_moment"], "diagonal": ["diagonal"], "output": ["output", "diagonal"]}
    return {
        (layer, name): getattr(moments[layer], name)
        for layer in moments
        for name in ["mean", *names[moments[layer].kind]]
    }


def same(a, b, most=0.0):
    """Two stores whose moments differ by at most `most`, relative, and whose counts agree."""
    a_arrays, b_arrays = arrays(a), arrays(b)
    assert a_arrays.keys() == b_arrays.keys()
    for key, value in b_arrays.items():
        assert tiny.relative(a_arrays[key], value.numpy()) <= most, key
    a, b = open_store(a).moments, open_store(b).moments
    assert [a[layer].count for layer in a] == [b[layer].count for layer in b]


@pytest.fixture
def used(monkeypatch):
    """The sites whose sums a device kept."""
    sites, begin = [], DeviceSums.__init__

    def noted(self, name, *arguments):
        sites.append(name)
        begin(self, name, *arguments)

    monkeypatch.setattr(DeviceSums, "__init__", noted)
    return sites


# Against the host


@pytest.mark.parametrize("moment", ["full", "auto", "diagonal"])
@pytest.mark.parametrize("pack", [True, False])
def test_the_moments_are_those_of_the_host(made, tmp_path, on_devices, used, moment, pack):
    asked = {"dtype": "float64", "moment": moment, "pack": pack}
    made(tmp_path / "host", **asked, device_memory=0)
    assert not used
    made(tmp_path / "device", **asked, device_memory="1GB")
    assert used
    same(tmp_path / "device", tmp_path / "host", 1e-12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_moments_of_other_dtypes_differ_by_the_rounding_of_float32(made, tmp_path, on_devices, dtype):
    asked = {"dtype": dtype, "moment": "auto", "pack": False}
    made(tmp_path / "host", **asked, device_memory=0)
    made(tmp_path / "device", **asked, device_memory="1GB", products="exact")
    same(tmp_path / "device", tmp_path / "host", 1e-6)


def test_half_precision_goes_into_the_product_as_it_is(monkeypatch, made, tmp_path, on_devices):
    """The product of a GPU takes half precision and gives float32; here it is told what it is given."""
    given = set()

    def product(x, y):
        given.add((x.dtype, y.dtype))
        return full_product(x, y)

    monkeypatch.setattr(device_sums, "product_on", lambda device, exact: product)
    made(tmp_path / "device", dtype="bfloat16", moment="auto", device_memory="1GB")
    # the gram of an output, itself a product with float32 results, is one of float32
    assert given == {(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)}
    made(tmp_path / "host", dtype="bfloat16", moment="auto", device_memory=0)
    same(tmp_path / "device", tmp_path / "host", 1e-6)


def test_peft_corda_sums_are_those_of_the_host(made, tmp_path, on_devices, used):
    asked = {"compat": "peft-corda", "pack": False, "dtype": "float64"}
    made(tmp_path / "host", **asked, device_memory=0)
    made(tmp_path / "device", **asked, device_memory="1GB")
    assert used
    same(tmp_path / "device", tmp_path / "host", 1e-6)  # scaled in float32


def test_autocast_around_the_call_changes_nothing(made, tmp_path, on_devices):
    made(tmp_path / "alone", moment="auto", device_memory="1GB")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made(tmp_path / "inside", moment="auto", device_memory="1GB")
    same(tmp_path / "inside", tmp_path / "alone")


def test_experts_count_their_own_tokens(tmp_path, on_devices, used):
    import families

    model = tiny.model("Qwen3-MoE").double()
    asked = {"batches": families.inputs("Qwen3-MoE", 4), "quiet": True}
    prep.covariance(model, store=tmp_path / "host", **asked, device_memory=0)
    prep.covariance(model, store=tmp_path / "device", **asked, device_memory="1GB")
    moments = open_store(tmp_path / "device").moments
    assert used and len({moments[layer].count for layer in moments}) > 3
    same(tmp_path / "device", tmp_path / "host", 1e-12)


# Passes, kills and budgets


def test_passes_change_nothing(made, tmp_path, on_devices, used):
    made(tmp_path / "one", device_memory=LARGE)
    assert len(used) == 8
    made(tmp_path / "several", device_memory=SMALL)
    assert len(used) == 16
    same(tmp_path / "several", tmp_path / "one")


def test_a_site_larger_than_the_device_goes_to_the_host(made, tmp_path, on_devices, used):
    made(tmp_path / "s", device_memory=20_000)
    assert not used


def test_by_default_three_gigabytes_are_left(made, tmp_path, on_devices, used, monkeypatch):
    monkeypatch.setattr(devices, "_free", lambda device: devices.RESERVE + SMALL)
    made(tmp_path / "s")
    assert used
    used.clear()
    monkeypatch.setattr(devices, "_free", lambda device: devices.RESERVE - 1)
    made(tmp_path / "host")
    assert not used


class Killed(BaseException):
    """Ends a command where a kill would have."""


def test_a_dry_run_plans_for_the_device(made, tmp_path, on_devices, used, monkeypatch):
    assert made(tmp_path / "s", dry_run=True, device_memory=SMALL).passes > made(tmp_path / "s", dry_run=True).passes
    assert used and made(tmp_path / "s", dry_run=True, device_memory=0).device_memory == 0
    monkeypatch.setattr(estimate, "peak_device_memory", lambda device: 3 * 10**9)
    needed = made(tmp_path / "s", dry_run=True, device_memory="1GB")
    assert needed.device_memory == 3 * 10**9
    assert [line for line in estimate.lines(needed) if line.startswith("gpu      3.00 GB, of which 0.00 GB are acc")]


def interrupted(monkeypatch, run, batches):
    """Run a calibration that dies after so many batches, each of which was stored."""
    added, left = Calibration._added, [batches]

    def dies(self, *arguments):
        added(self, *arguments)
        left[0] -= 1
        if not left[0]:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(job, "CHECKPOINT_SHARE", float("inf"))
        patch.setattr(Calibration, "_added", dies)
        with pytest.raises(Killed):
            run()


@pytest.mark.parametrize("batches", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(("before", "after"), [(LARGE, LARGE), (SMALL, LARGE), (LARGE, SMALL), (SMALL, SMALL)])
def test_resumed_after_every_batch_and_under_another_budget(
    made, tmp_path, on_devices, monkeypatch, batches, before, after
):
    if before == LARGE and batches > 5:
        pytest.skip("a single pass has no more batches")
    made(tmp_path / "whole", device_memory=LARGE)
    interrupted(monkeypatch, lambda: made(tmp_path / "s", device_memory=before), batches)
    made(tmp_path / "s", device_memory=after)
    same(tmp_path / "s", tmp_path / "whole")


@pytest.mark.parametrize(("before", "after"), [("0", "1GB"), ("1GB", "0")])
def test_resumed_on_the_other_side(made, tmp_path, on_devices, monkeypatch, before, after):
    made(tmp_path / "whole", dtype="float64", device_memory=0)
    interrupted(monkeypatch, lambda: made(tmp_path / "s", dtype="float64", device_memory=before), 2)
    made(tmp_path / "s", dtype="float64", device_memory=after)
    same(tmp_path / "s", tmp_path / "whole", 1e-12)


@pytest.mark.parametrize(("size", "per_node"), [(2, 2), (3, 3), (2, 1)])
def test_ranks_keep_their_own_sums(tmp_path, size, per_node):
    options = {
        "model": tiny.save(tiny.llama(intermediate=96), tmp_path / "model"),
        "data": tiny.write_data(tmp_path / "text.jsonl", tiny.texts(80)),
        **{**OPTIONS, "num_sequences": 13, "pack": False, "moment": "auto"},
    }
    prep.covariance(**options, store=tmp_path / "alone")
    asked = {**options, "store": tmp_path / "s", "device_memory": SMALL}
    codes, said, _ = jobs.run("covariance", asked, tmp_path, size, per_node, on_devices=True)
    assert codes == [0] * size, said
    same(tmp_path / "s", tmp_path / "alone", 1e-6)
    assert open_store(tmp_path / "s").corpus == open_store(tmp_path / "alone").corpus


def test_ranks_resume(tmp_path):
    options = {
        "model": tiny.save(tiny.llama(), tmp_path / "model"),
        "data": tiny.write_data(tmp_path / "text.jsonl", tiny.texts(80)),
        **{**OPTIONS, "num_sequences": 12, "device_memory": "1GB"},
    }
    codes, said, _ = jobs.run("covariance", {**options, "store": tmp_path / "whole"}, tmp_path, 2, on_devices=True)
    assert codes == [0, 0], said
    options["store"] = tmp_path / "s"
    codes, _, _ = jobs.run("covariance", options, tmp_path, 2, die=(0, 2), on_devices=True)
    assert codes[0] == -9
    codes, said, _ = jobs.run("covariance", options, tmp_path, 2, on_devices=True)
    assert codes == [0, 0] and "resumed" not in said[1], said
    same(tmp_path / "s", tmp_path / "whole", 1e-12)


# What is wrong


def test_a_value_that_is_not_finite_is_named_by_site_and_batch(made, tmp_path, on_devices, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaMLP

    forward, calls = LlamaMLP.forward, [0]

    def broken(self, x):
        calls[0] += 1
        return forward(self, x * float("nan") if calls[0] == 7 else x)  # of two blocks; the first call is a probe

    monkeypatch.setattr(LlamaMLP, "forward", broken)
    with pytest.raises(PrepError, match=r"input of model\.layers\.0\.mlp\.gate_proj is NaN or infinite in batch 2"):
        made(tmp_path / "s", device_memory="1GB")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("device_memory", "8", "'8' is not a size"),
        ("device_memory", "-1GB", "is not a size"),
        ("products", "fast", "--products 'fast' does not exist: take one of auto, exact"),
    ],
)
def test_options_that_make_no_sense(made, tmp_path, option, value, message):
    with pytest.raises(PrepError, match=message):
        made(tmp_path / "s", **{option: value})
    assert not (tmp_path / "s").exists()


def test_exact_products_are_another_run(made, tmp_path):
    made(tmp_path / "auto")
    with pytest.raises(PrepError, match="options products: None there, 'exact' asked for"):
        made(tmp_path / "auto", products="exact")
    made(tmp_path / "exact", products="exact")
    with pytest.raises(PrepError, match="options products: 'exact' there, None asked for"):
        made(tmp_path / "exact")


# Numerics


@pytest.mark.parametrize("d", [7, 300, 2048, 4500])
def test_groups_of_rows_make_the_lower_triangle(d):
    X = np.random.default_rng(0).standard_normal((9, d))
    wanted, ranges, given = X.T @ X, panels(d), []

    def product(x, y):
        given.append(x.shape[1])
        return full_product(x, y)

    rows = dict(row_blocks(torch.from_numpy(X), ranges, product))
    assert list(rows) == list(range(len(ranges)))
    for (a, b), block in zip(ranges, rows.values(), strict=True):
        assert tiny.relative(block, wanted[a:b, :b]) < 1e-14
    assert all(width >= device_sums.GROUP for width in given[:-1]) and sum(given) == d


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e25, 1e-25, 3e35, 1e-37, 0.0])
def test_very_large_and_small_activations(dtype, scale):
    """Powers of two come off exactly, and the sums are those of the host."""
    X = (torch.randn(40, 24, generator=torch.Generator().manual_seed(0)) * scale).to(dtype)
    scaled, squared = in_range(X)
    assert torch.equal(scaled.double() * squared.sqrt(), X.double())
    host, device = SiteSums("a", "full", 24, {}), DeviceSums("a", "full", 24, {}, CPU)
    for sums in (host, device):
        sums.add_input(X, 0)
    assert host.count == device.count == 40
    ours, theirs = device.data().second_moment[0], host.data().second_moment[0]
    assert torch.isfinite(ours).all()
    if scale:
        assert tiny.relative(ours, theirs.numpy()) < 1e-6


def test_each_device_has_the_budget():
    sites = [Site(f"l{i}", (f"l{i}",), ((8, 64),)) for i in range(6)]
    kinds, size = {site.name: "full" for site in sites}, 8 * (64 * 64 + 64)
    places = {site.name: torch.device("cuda", i // 3) for i, site in enumerate(sites)}
    assert len(make_plan(sites, kinds, 3 * size, "float64", (), places).passes) == 1
    assert [len(part) for part in make_plan(sites, kinds, 2 * size, "float64", (), places).passes] == [2, 3, 1]
    assert len(make_plan(sites, kinds, 3 * size, "float64").passes) == 2
