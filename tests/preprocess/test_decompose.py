"""The decomposition of a store: every published method against NumPy and SciPy on the stored moments, and resuming."""

import json
import shutil
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import tiny
import torch
from transformers import AutoModelForCausalLM

import prep
from prep import PrepError, StoreError
from prep.preprocess.decomposition import workers as stage
from prep.preprocess.numerics.methods import PUBLISHED
from prep.store import BasisWriter
from prep.store.format import schema

RUN = {"num_sequences": 40, "seq_len": 16, "quiet": True}
RANK = 12


def calibrate(make, data, path, **options):
    """A model directory, its weights as float64 (d_out, d_in), and the store of a calibration."""
    model = make()
    directory = tiny.save(model, path / "model")
    store = path / "s.zarr"
    prep.covariance(directory, data, store=store, **RUN, **options)
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    W = {name: tiny.weight(module) for name, module in loaded.named_modules() if tiny.is_linear(module)}
    return SimpleNamespace(model=directory, W=W, path=store)


@pytest.fixture(scope="module")
def llama(data, tmp_path_factory):
    return calibrate(lambda: tiny.llama(80), data, tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def gpt2(data, tmp_path_factory):
    return calibrate(lambda: tiny.model("GPT-2"), data, tmp_path_factory.mktemp("gpt2"))


def decomposed(calibrated, **options):
    return prep.decompose(calibrated.path, quiet=True, **options)


def damped(C, damping=1e-3):
    return C + damping * np.trace(C) / len(C) * np.eye(len(C))


def metric_matrix(moment, method, center=False):
    """M (d_in, d_in) from the stored moments."""
    C = moment.second_moment.double().numpy()
    if center:
        C = C - np.outer(moment.mean, moment.mean)
    C = damped(C, method["damping"])
    if method["metric"] == "identity":
        return np.eye(len(C))
    if method["metric"] == "diagonal":
        return np.diag(np.diagonal(C) ** method["power"])
    values, V = np.linalg.eigh(C)
    return (V * values ** method["power"]) @ V.T


def float64(basis):
    return [getattr(basis, name).double().numpy() for name in ("U", "S", "P")]


def check_layer(basis, W, M, C, select):
    """One layer's basis against an SVD of `W M`, whatever route the product took."""
    U, S, P = float64(basis)
    record = basis.record
    left, spectrum, _ = np.linalg.svd(W @ M)
    rank = min(RANK, *W.shape)
    assert (U.shape, S.shape, P.shape) == ((len(W), rank), (rank,), (rank, W.shape[1]))
    assert (record.rank, record.shape) == (rank, W.shape)
    order = np.arange(len(spectrum))
    if select == "bottom":
        order = order[::-1]
    if select == "activation":
        order = np.argsort(-np.linalg.norm(left[:, : len(spectrum)].T @ W @ scipy.linalg.sqrtm(C).real, axis=1))
    kept = spectrum[order[:rank]]
    np.testing.assert_allclose(S, kept, rtol=0, atol=1e-7 * spectrum[0])
    np.testing.assert_allclose(basis.spectrum.numpy(), spectrum, rtol=0, atol=1e-7 * spectrum[0])
    np.testing.assert_allclose(U.T @ U, np.eye(rank), atol=1e-6)
    np.testing.assert_allclose(U.T @ W, S[:, None] * P, atol=1e-6 * float(np.linalg.norm(W)))
    error = np.linalg.norm((W - U * S @ P) @ M)
    assert abs(error - record.tail) < 1e-6 * np.linalg.norm(W @ M)
    assert record.energy == basis.energy == pytest.approx(np.sum(kept**2) / np.sum(spectrum**2), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name not in ("eva", "lora_null")])
def test_every_published_method(llama, name):
    basis = decomposed(llama, for_=name, name=name, rank=RANK)
    assert basis.dtype == "float32"
    moments = prep.open_store(llama.path).moments
    assert set(basis) == set(moments)
    for layer in basis:
        C = moments[layer].second_moment.double().numpy()
        check_layer(
            basis[layer], llama.W[layer], metric_matrix(moments[layer], basis.method), C, basis.method["select"]
        )


def test_lora_null(llama):
    """U S P = W N N^T of the bottom eigenvectors N of C; P lies in their span."""
    basis = decomposed(llama, for_="lora_null", rank=RANK)
    assert basis.name == "null"
    moments = prep.open_store(llama.path).moments
    for layer in basis:
        U, S, P = float64(basis[layer])
        N = scipy.linalg.eigh(moments[layer].second_moment.double().numpy())[1][:, :RANK]
        W = llama.W[layer]
        np.testing.assert_allclose(U * S @ P, W @ N @ N.T, atol=1e-6 * np.linalg.norm(W))
        np.testing.assert_allclose(U.T @ U, np.eye(RANK), atol=1e-6)
        np.testing.assert_allclose(P @ P.T, np.eye(RANK), atol=1e-6)
        assert basis[layer].energy == pytest.approx(np.sum(S**2) / np.sum(W**2))
        assert basis.layers[layer].tail == pytest.approx(np.linalg.norm(W - W @ N @ N.T), rel=1e-6)


def test_another_rank_of_lora_null_is_another_basis(llama):
    decomposed(llama, for_="lora_null", name="of-eight", rank=8)
    with pytest.raises(prep.StoreError, match="rank: 8 there, 4 asked for"):
        prep.decompose(llama.path, for_="lora_null", name="of-eight", rank=4, quiet=True)


def test_eva(llama):
    basis = decomposed(llama, for_="eva", rank=RANK)
    assert basis.name == "eva"
    moments = prep.open_store(llama.path).moments
    for layer in basis:
        U, S, P = float64(basis[layer])
        moment = moments[layer]
        values, V = scipy.linalg.eigh(moment.second_moment.numpy() - np.outer(moment.mean, moment.mean))
        values, V = values[::-1], V[:, ::-1]
        np.testing.assert_allclose(S, np.sqrt(values[:RANK]), rtol=0, atol=1e-7 * np.sqrt(values[0]))
        np.testing.assert_allclose(np.abs(np.sum(P.T * V[:, :RANK], axis=0)), 1, atol=1e-5)
        np.testing.assert_allclose(U.T @ U, np.eye(RANK), atol=1e-6)
        assert basis[layer].energy == pytest.approx(values[:RANK].sum() / values.sum())


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "full"),
        ({"metric": "full", "power": 1}, "full-p1"),
        ({"metric": "diagonal", "power": 0.25, "select": "bottom"}, "diagonal-p0.25-bottom"),
        ({"center": True, "damping": 1e-2}, "full-centered"),
    ],
)
def test_options_and_default_names(gpt2, options, name):
    """Conv1D layers too: the stored basis is of the (d_out, d_in) matrix, whatever the module keeps."""
    basis = decomposed(gpt2, rank=RANK, **options)
    assert (basis.name, list(prep.open_store(gpt2.path).bases)[-1]) == (name, name)
    moments = prep.open_store(gpt2.path).moments
    assert basis["transformer.h.0.attn.c_attn"].record.shape == (96, 32)
    for layer in basis:
        M = metric_matrix(moments[layer], basis.method, options.get("center", False))
        C = moments[layer].second_moment.numpy()
        check_layer(basis[layer], gpt2.W[layer], M, C, basis.method["select"])


def test_absolute_damping(llama):
    basis = decomposed(llama, epsilon=0.5, rank=RANK, name="absolute")
    moments = prep.open_store(llama.path).moments
    for layer in basis:
        C = moments[layer].second_moment.numpy() + 0.5 * np.eye(moments[layer].shape[1])
        spectrum = scipy.linalg.svdvals(llama.W[layer] @ scipy.linalg.sqrtm(C).real)
        np.testing.assert_allclose(basis[layer].S, spectrum[:RANK], rtol=0, atol=1e-7 * spectrum[0])


@pytest.mark.parametrize("solver", ["exact", "svd", "randomized"])
def test_solvers(llama, solver):
    """Every route states its error, and a bound on how far that is from the least possible one."""
    basis = decomposed(llama, solver=solver, rank=4, name=solver)
    moments = prep.open_store(llama.path).moments
    for layer in basis:
        (U, S, P), record = float64(basis[layer]), basis[layer].record
        M, W = metric_matrix(moments[layer], basis.method), llama.W[layer]
        least = np.linalg.norm(scipy.linalg.svdvals(W @ M)[4:])
        error = np.linalg.norm((W - U * S @ P) @ M)
        assert abs(error - record.tail) < 1e-6 * np.linalg.norm(W @ M)
        assert error**2 <= record.bound * least**2 * (1 + 1e-6)
        assert record.bound == 1 or solver == "randomized"


def test_the_rank_is_clipped_at_each_layer(llama):
    basis = decomposed(llama, metric="identity", rank=24, name="clipped")
    for layer, W in llama.W.items():
        if layer == "lm_head":
            continue
        U, S, P = float64(basis[layer])
        rank = min(24, *W.shape)
        assert basis[layer].record.rank == len(S) == rank
        if rank == min(W.shape):
            assert tiny.relative(U * S @ P, W) < 1e-6
            assert basis[layer].record.tail < 1e-6 * np.linalg.norm(W)
    assert {basis[layer].record.rank for layer in basis} == {16, 24}


@pytest.mark.parametrize(("dtype", "unit"), [("bfloat16", 2.0**-8), ("float16", 2.0**-11)])
def test_half_precision_stores_read_back_what_they_rounded(llama, dtype, unit):
    exact = decomposed(llama, rank=RANK, name="float32")
    rounded = decomposed(llama, rank=RANK, name=dtype, dtype=dtype)
    for layer in exact:
        for name in ("U", "P"):
            wide, narrow = getattr(exact[layer], name), getattr(rounded[layer], name)
            assert str(narrow.dtype) == f"torch.{dtype}"
            off = (narrow.float() - wide).abs()
            assert bool((off <= unit * wide.abs() * 1.001 + 2.0**-24).all())
            assert float(off.max()) > 0
        assert torch.equal(rounded[layer].S, exact[layer].S)
        assert rounded[layer].S.dtype == torch.float64
    assert rounded.hash != exact.hash


def test_a_rank_slice_is_the_top_of_the_basis(llama):
    basis = decomposed(llama, rank=RANK, name="float32")
    sliced = basis.read(["model.layers.1.mlp.down_proj"], rank=5)["model.layers.1.mlp.down_proj"]
    whole = basis["model.layers.1.mlp.down_proj"]
    assert torch.equal(sliced.U, whole.U[:, :5])
    assert torch.equal(sliced.P, whole.P[:5])
    assert torch.equal(sliced.S, whole.S[:5])


# Moment kinds


def test_output_moments_give_the_basis_of_full_moments(data, tmp_path):
    """Wide layers, relative damping: S to 1e-6 of S_max, the same directions, the same energy."""
    both = {}
    for moment in ("full", "auto"):
        (tmp_path / moment).mkdir()
        both[moment] = calibrate(lambda: tiny.llama(200), data, tmp_path / moment, moment=moment)
    wide = [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    kinds = prep.open_store(both["auto"].path).moments
    assert {kinds[layer].kind for layer in wide} == {"output"}
    assert {kinds[layer].kind for layer in kinds if layer not in wide} == {"full"}
    full, output = (decomposed(one, rank=RANK, damping=1e-2) for one in both.values())
    for layer in wide:
        (U, S, P), (V, T, Q) = float64(full[layer]), float64(output[layer])
        np.testing.assert_allclose(T, S, rtol=0, atol=1e-6 * S[0])
        np.testing.assert_allclose(np.linalg.svd(U.T @ V)[1], 1, atol=1e-6)
        np.testing.assert_allclose(np.abs(np.sum(U * V, axis=0)), 1, atol=1e-4)
        assert tiny.relative(V * T @ Q, U * S @ P) < 1e-5
        np.testing.assert_allclose(output[layer].spectrum, full[layer].spectrum, rtol=0, atol=1e-6 * S[0])
        assert output[layer].energy == pytest.approx(full[layer].energy, rel=1e-6)


def test_a_moment_that_cannot_serve_is_refused_by_layer_and_command(data, tmp_path):
    kinds = {}
    for moment in ("diagonal", "output"):
        (tmp_path / moment).mkdir()
        kinds[moment] = calibrate(tiny.llama, data, tmp_path / moment, moment=moment)
    for moment, options in [
        ("diagonal", {}),
        ("diagonal", {"for_": "eva"}),
        ("diagonal", {"for_": "antipasto"}),
        ("output", {"for_": "corda_ipm"}),
        ("output", {"for_": "eva"}),
        ("output", {"solver": "svd"}),
    ]:
        before = tiny.contents(kinds[moment].path)
        with pytest.raises(StoreError, match="--moment full"):
            decomposed(kinds[moment], **options)
        assert tiny.contents(kinds[moment].path) == before
    for moment, method in [
        ("diagonal", "asvd"),
        ("diagonal", "pissa"),
        ("output", "whitened"),
        ("output", "antipasto"),
    ]:
        assert len(decomposed(kinds[moment], for_=method, rank=4)) == 14


# Without moments


def test_identity_needs_no_covariance(llama, tmp_path):
    basis = prep.decompose(tmp_path / "new.zarr", model=llama.model, metric="identity", rank=RANK, quiet=True)
    store = prep.open_store(tmp_path / "new.zarr")
    assert (store.status, store.corpus, store.model["id"]) == ("complete", None, llama.model)
    calibrated = decomposed(llama, for_="pissa", name="pissa", rank=RANK)
    assert set(basis) == set(calibrated) == set(store.bases["identity"])
    for layer in basis:
        check_layer(basis[layer], llama.W[layer], np.eye(llama.W[layer].shape[1]), None, "top")
        assert torch.equal(basis[layer].P, calibrated[layer].P)
    with pytest.raises(StoreError, match="holds no moments"):
        prep.decompose(tmp_path / "new.zarr", quiet=True)
    with pytest.raises(StoreError, match=r"holds no moments"):
        _ = store.moments


def test_a_store_of_bases_is_of_one_model(llama, gpt2, tmp_path):
    prep.decompose(tmp_path / "s", model=llama.model, metric="identity", rank=2, quiet=True)
    before = tiny.contents(tmp_path / "s")
    with pytest.raises(PrepError, match="another model"):
        prep.decompose(tmp_path / "s", model=gpt2.model, metric="identity", rank=2, name="other", quiet=True)
    assert tiny.contents(tmp_path / "s") == before


def test_what_needs_a_store_says_so(llama, tmp_path):
    with pytest.raises(StoreError, match="no store at"):
        prep.decompose(tmp_path / "none", quiet=True)
    with pytest.raises(StoreError, match="or name the --model"):
        prep.decompose(tmp_path / "none", metric="identity", quiet=True)
    with pytest.raises(StoreError, match="no store at"):
        prep.decompose(tmp_path / "none", model=llama.model, for_="antipasto", quiet=True)
    assert not (tmp_path / "none").exists()


# Other models, other options


def test_another_model_is_refused(llama, gpt2, tmp_path):
    before = tiny.contents(llama.path)
    other = tiny.save(tiny.llama(96), tmp_path / "wider")
    with pytest.raises(PrepError, match="96 x 32"):
        decomposed(llama, name="other", model=other)
    with pytest.raises(PrepError, match="has no layer"):
        decomposed(llama, name="other", model=gpt2.model)
    assert tiny.contents(llama.path) == before


def test_output_moments_belong_to_their_weights(data, tmp_path):
    calibrated = calibrate(tiny.llama, data, tmp_path, moment="output")
    changed = tiny.llama()
    with torch.no_grad():
        changed.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    changed = tiny.save(changed, tmp_path / "changed")
    with pytest.raises(PrepError, match="output moment of other weights"):
        decomposed(calibrated, model=changed)


def test_weights_that_are_not_finite_begin_no_basis(llama, tmp_path):
    model = tiny.llama(80)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[3, 3] = float("inf")
    bad = tiny.save(model, tmp_path / "bad")
    before = tiny.contents(llama.path)
    with pytest.raises(PrepError, match=r"o_proj: the weight holds NaN"):
        decomposed(llama, model=bad, name="bad")
    assert tiny.contents(llama.path) == before
    with pytest.raises(PrepError, match="NaN"):
        prep.decompose(tmp_path / "none", model=bad, metric="identity", quiet=True)
    assert not (tmp_path / "none").exists()


def test_a_basis_is_made_once_and_replaced_only_when_asked(llama, capsys):
    decomposed(llama, name="once", rank=4)
    before = tiny.contents(llama.path)
    same = prep.decompose(llama.path, name="once", rank=4)
    assert "basis 'once' is complete and was made with the same options: nothing to do" in capsys.readouterr().err
    assert same.status == "complete"
    with pytest.raises(StoreError, match=r"power: .* there, .*rank: 4 there"):
        decomposed(llama, name="once", rank=6, power=1)
    with pytest.raises(StoreError, match="dtype: 'float32' there"):
        decomposed(llama, name="once", rank=4, dtype="bfloat16")
    assert tiny.contents(llama.path) == before
    names = list(prep.open_store(llama.path).bases)
    replaced = decomposed(llama, name="once", rank=6, power=1, overwrite=True)
    assert (replaced.method["rank"], replaced.method["power"]) == (6, 1)
    assert sorted(prep.open_store(llama.path).bases) == sorted(names)
    after = tiny.contents(llama.path)
    kept = [name for name in before if not name.startswith("bases/once/") and name != "zarr.json"]
    assert all(after[name] == before[name] for name in kept)


def test_options_are_checked_first(llama):
    wrong: list[tuple[dict, str]] = [
        ({"dtype": "float64"}, "--dtype 'float64'"),
        ({"name": "../up"}, "cannot name a basis"),
        ({"rank": 0}, "rank 0"),
        ({"power": -1}, "power -1"),
        ({"for_": "nope"}, "--for 'nope'"),
        ({"metric": "identity", "center": True}, "center"),
    ]
    for options, message in wrong:
        with pytest.raises(PrepError, match=message):
            decomposed(llama, **options)


# Interruptions


def moments_only(source, target):
    """A copy of a store without its bases."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("bases"))
    head = json.loads((target / "zarr.json").read_text())
    head["attributes"] = schema.sealed(head["attributes"] | {"bases": []})
    (target / "zarr.json").write_text(json.dumps(head, indent=2))
    return target


class Stop(BaseException):
    """As Ctrl-C is: no Exception."""


def test_an_interrupted_decomposition_goes_on(llama, tmp_path, monkeypatch, capsys):
    """After 5 of 14 layers: those are not computed again, and the end is bitwise that of an uninterrupted run."""
    calls, lock = [], threading.Lock()
    compute, note = stage.whitened_svd, BasisWriter.note

    def counted(W, *rest):
        with lock:
            calls.append(W.shape)
        return compute(W, *rest)

    written: list[str] = []

    def stop_after_five(self, done):
        if len(written) == 5:
            raise Stop
        written.append(done.layer)
        note(self, done)

    monkeypatch.setattr(stage, "whitened_svd", counted)
    whole, stopped = (moments_only(llama.path, tmp_path / name) for name in ("whole", "stopped"))
    prep.decompose(whole, for_="corda_kpm", rank=RANK, quiet=True)
    assert len(calls) == 14

    with monkeypatch.context() as patch:
        patch.setattr(BasisWriter, "note", stop_after_five)
        with pytest.raises(Stop):
            prep.decompose(stopped, for_="corda_kpm", rank=RANK, quiet=True)
    name = "full-p1-bottom"
    with pytest.raises(StoreError, match=r"is not complete \(5 of 14 layers\): run the same `prep decompose` again"):
        _ = prep.open_store(stopped).bases[name]
    partial = prep.open_store(stopped).bases.open(name)
    assert set(partial.layers) == set(written)
    before = {layer: partial.layers[layer] for layer in written}

    calls.clear()
    prep.decompose(stopped, for_="corda_kpm", rank=RANK)
    assert len(calls) == 14 - 5
    shown = capsys.readouterr().err
    assert f"basis '{name}': resumed after 5 of 14 layers" in shown
    assert f"decompose {name}: 9 of 9 layers" in shown
    resumed = prep.open_store(stopped).bases[name]
    assert {layer: resumed.layers[layer] for layer in written} == before
    assert tiny.contents(stopped) == tiny.contents(whole)


def test_an_error_in_one_layer_names_it_and_keeps_the_others(llama, tmp_path, monkeypatch):
    store = moments_only(llama.path, tmp_path / "s")
    compute = stage.whitened_svd

    def fails(W, *rest):
        if W.shape == (80, 32):
            raise PrepError("no convergence")
        return compute(W, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(stage, "whitened_svd", fails)
        with pytest.raises(PrepError, match=r"^model\.layers\.\d\.mlp\.(gate|up)_proj: no convergence"):
            prep.decompose(store, rank=4, quiet=True)
    assert len(prep.decompose(store, rank=4, quiet=True)) == 14


def test_a_basis_whose_beginning_failed_can_be_begun_again(llama, tmp_path, monkeypatch):
    """The disk may be full while the empty arrays are made: such a basis is not listed."""
    store = moments_only(llama.path, tmp_path / "s")
    make, made = schema.create_array, []

    def full(*arguments):
        made.append(arguments)
        if len(made) == 3:
            raise OSError(28, "No space left on device")
        return make(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(schema, "create_array", full)
        with pytest.raises(StoreError, match=r"the disk of .* is full: make room and run the same command again"):
            prep.decompose(store, rank=4, quiet=True)
    assert list(prep.open_store(store).bases) == []
    assert len(prep.decompose(store, rank=4, quiet=True)) == 14


def test_workers_are_as_many_as_the_memory_has_room_for(llama, tmp_path, monkeypatch):
    """With room for one site at a time there is one worker, and the basis is the same."""
    from prep.preprocess.decomposition import workers

    pools, make = [], workers.ThreadPoolExecutor
    monkeypatch.setattr(workers, "ThreadPoolExecutor", lambda count: pools.append(count) or make(count))
    monkeypatch.setattr(workers.os, "sched_getaffinity", lambda _pid: range(4), raising=False)
    stores = [moments_only(llama.path, tmp_path / name) for name in ("ample", "scarce")]
    prep.decompose(stores[0], rank=RANK, quiet=True)
    monkeypatch.setattr(workers, "free_memory", lambda: 300_000)
    prep.decompose(stores[1], rank=RANK, quiet=True)
    assert pools[0] == 4 and 1 <= pools[1] < 4
    ample, scarce = (prep.open_store(store).bases["full"] for store in stores)
    for layer in ample:  # more threads in each product: other roundings
        assert tiny.relative(scarce[layer].S, ample[layer].S.numpy()) < 1e-12


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pissa", {"metric": "full"}, "--metric"),
        ("milora", {"select": "top"}, "--select"),
        ("corda_ipm", {"power": 0.5}, "--power"),
        ("whitened", {"center": True}, "--center"),
    ],
)
def test_an_option_that_makes_a_published_method_another_one(llama, tmp_path, name, options, message):
    with pytest.raises(PrepError, match=message):
        decomposed(llama, for_=name, **options)
    assert decomposed(llama, for_="pissa", metric="identity", rank=2, name="same").method["metric"] == "identity"


def test_a_smaller_rank_is_a_slice_of_what_is_there(llama, tmp_path, capsys):
    shutil.copytree(llama.path, tmp_path / "s")
    first = prep.decompose(tmp_path / "s", rank=8, quiet=True)
    capsys.readouterr()
    again = prep.decompose(tmp_path / "s", rank=3)
    assert again.hash == first.hash
    assert capsys.readouterr().err == "basis 'full' is there already at rank 8: any rank up to 8 is a slice of it\n"
    smaller = prep.decompose(tmp_path / "s", rank=3, name="full", overwrite=True, quiet=True)
    assert smaller.method["rank"] == 3


@pytest.mark.parametrize("damage", ["folder gone", "metadata gone", "chunk gone"])
def test_the_command_that_a_damaged_basis_advises_works(llama, tmp_path, damage):
    store = shutil.copytree(llama.path, tmp_path / "s")
    prep.decompose(store, rank=4, quiet=True)
    whole = prep.decompose(store, for_="milora", rank=4, quiet=True)
    folder = store / "bases" / "identity-bottom"
    if damage == "folder gone":
        shutil.rmtree(folder)
    elif damage == "metadata gone":
        (folder / "zarr.json").unlink()
    else:
        next(folder.glob("*/UP/c/0/0/0")).unlink()
    if damage != "chunk gone":
        with pytest.raises(StoreError) as refused:
            _ = prep.open_store(store).bases["identity-bottom"]
        advised = f"`prep decompose --for milora --overwrite --store {store}`"
        assert str(refused.value).endswith(f"make it anew with {advised}")
    again = prep.decompose(store, for_="milora", rank=4, overwrite=True, quiet=True)
    assert again.hash == whole.hash and len(again.read()) == len(whole)
    assert prep.verify(store).findings == []


def test_an_eva_basis_says_up_to_which_rank_it_serves(llama, tmp_path, capsys):
    store = shutil.copytree(llama.path, tmp_path / "s")
    capsys.readouterr()
    prep.decompose(store, for_="eva", rank=6, overwrite=True)
    said = "basis eva holds 6 components: an EVA start redistributes ranks, for which r may be up to 3 (rho 2), or 6"
    assert said in capsys.readouterr().err
    model = AutoModelForCausalLM.from_pretrained(llama.model)
    with pytest.raises(PrepError, match="rank 4 with rho 2 takes 8 components"):
        prep.peft.get_model(model, store, "eva", r=4)
    assert prep.peft.get_model(model, store, "eva", r=3)
    prep.decompose(store, for_="eva", rank=256, overwrite=True)
    assert "holds every component" in capsys.readouterr().err
