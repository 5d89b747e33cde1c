"""Bases of the error of a quantised copy: recipes, checkpoints and modules, against NumPy, SciPy and bitsandbytes."""

import shutil

import numpy as np
import pytest
import scipy.linalg
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import prep
from prep.copies import distance, label_of, probed, record_of
from prep.errors import PrepError, StoreError
from prep.linear import weight_hash, weight_matrix
from prep.preprocess.model.quantised import quantised, round_to_nearest
from prep.preprocess.numerics.methods import Method
from prep.preprocess.numerics.metric import InputStatistics
from prep.preprocess.numerics.whitening import whitened_svd

bnb = pytest.importorskip("bitsandbytes")

RANK = 6
DOWN, UP = "model.layers.1.mlp.down_proj", "model.layers.0.mlp.up_proj"
METRICS = ("full", "diagonal", "identity")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A wide Llama, its full moments in `full.zarr` with the nf4 bases of every metric, and in `auto.zarr` others."""
    given = tiny.sources(tmp_path_factory.mktemp("repair"), tiny.wide(), sentences=200)
    run = {"num_sequences": 60, "seq_len": 16, "quiet": True}
    prep.covariance(given.model, given.data, store=given.path / "full.zarr", **run)
    prep.covariance(given.model, given.data, store=given.path / "auto.zarr", moment="auto", **run)
    for metric in METRICS:
        prep.decompose(given.path / "full.zarr", repair="nf4", metric=metric, rank=RANK, quiet=True)
    given.W = {name: module.weight.detach() for name, module in tiny.layers(tiny.wide()).items()}
    return given


@pytest.fixture
def store(home, tmp_path):
    """A copy of the store to write to."""
    return shutil.copytree(home.path / "full.zarr", tmp_path / "s.zarr")


def nf4(W):
    layer = bnb.nn.Params4bit(W.clone(), requires_grad=False, quant_type="nf4", compress_statistics=False).to("cpu")
    return bnb.functional.dequantize_4bit(layer.data, layer.quant_state)


def damped(moment):
    C = moment.second_moment.numpy()
    return C + 1e-3 * np.trace(C) / len(C) * np.eye(len(C))


def root_of(moment, metric):
    """M of a metric, with SciPy's root of C."""
    C = damped(moment)
    return {"full": scipy.linalg.sqrtm(C).real, "diagonal": np.diag(np.diag(C) ** 0.5), "identity": np.eye(len(C))}[
        metric
    ]


# Recipes


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_a_recipe_is_what_the_layers_of_bitsandbytes_hold(home, kind):
    net = tiny.packed(home.model, kind)
    assert label_of(net) == kind
    for layer in (DOWN, UP):
        assert torch.equal(quantised(home.W[layer], kind), weight_matrix(net.get_submodule(layer)))


def test_recipes_keep_the_dtype_of_the_weight():
    W = torch.randn(5, 70)
    for recipe in ("nf4", "int3-g32"):
        assert quantised(W.bfloat16(), recipe).dtype == torch.bfloat16
        assert torch.equal(quantised(W.double(), recipe), quantised(W, recipe))
    assert torch.equal(quantised(W, "int4"), quantised(W, "int4-g64"))


@pytest.mark.parametrize(("bits", "group"), [(4, 16), (3, 64), (2, 100)])
def test_round_to_nearest_takes_the_nearest_of_its_levels(bits, group):
    W = torch.randn(6, 70, generator=torch.Generator().manual_seed(0))
    W[0] += 5  # all above zero, which stays a level
    W[1, :16] = 0
    Q = round_to_nearest(W, bits, group).numpy()
    for row, out in zip(W.numpy(), Q, strict=True):
        for a in range(0, 70, group):
            x, q = row[a : a + group], out[a : a + group]
            low, high = min(x.min(), 0), max(x.max(), 0)
            if low == high:
                assert (q == 0).all()
                continue
            step = (high - low) / (2**bits - 1)
            zero = np.round(-low / step)
            levels = (np.arange(2**bits) - zero) * step
            nearest = levels[np.abs(x[:, None] - levels).argmin(1)]
            np.testing.assert_allclose(np.abs(q - x), np.abs(nearest - x), atol=1e-5)
            assert np.abs(q[:, None] - levels).min(1).max() < 1e-5


# The basis


@pytest.mark.parametrize("metric", METRICS)
def test_a_repair_is_the_svd_of_the_error(home, metric):
    """S and the tail against a float64 SVD of E M, the product against its truncation."""
    found = prep.open_store(home.path / "full.zarr")
    name = "repair-nf4" if metric == "full" else f"repair-nf4-{metric}"
    basis = found.bases[name]
    assert basis.repair == {"source": "recipe", "name": "nf4"} and set(basis) == set(home.W)
    for layer, W in home.W.items():
        Q, M = nf4(W), root_of(found.moments[layer], metric)
        E = W.double().numpy() - Q.double().numpy()
        left, S, right = np.linalg.svd(E @ M, full_matrices=False)
        one, record = basis[layer], basis.layers[layer]
        np.testing.assert_allclose(one.S, S[:RANK], rtol=0, atol=1e-7 * S[0])
        assert record.tail == pytest.approx(np.linalg.norm(S[RANK:]), rel=1e-7)
        product = (one.U.double() * one.S) @ one.P.double()
        wanted = (left[:, :RANK] * S[:RANK]) @ right[:RANK] @ np.linalg.inv(M)
        assert tiny.relative(product, wanted) < 1e-5
        assert (record.weight_hash, record.repaired["hash"]) == (weight_hash(W), weight_hash(Q))
        assert record.repaired["error"] == pytest.approx(np.linalg.norm(E), rel=1e-9)


@pytest.mark.parametrize("layer", [DOWN, UP])
def test_it_is_the_product_of_qera(home, layer):
    """arXiv 2410.06040, theorem 1: B A = U_r S_r V_r^T C^(-1/2), of the SVD of E C^(1/2), in float64."""
    moment, W = prep.open_store(home.path / "full.zarr").moments[layer], home.W[layer].double().numpy()
    E = W - nf4(home.W[layer]).double().numpy()
    root = scipy.linalg.sqrtm(damped(moment)).real
    U, S, V = scipy.linalg.svd(E @ root, full_matrices=False)
    wanted = (U[:, :RANK] * S[:RANK]) @ V[:RANK] @ np.linalg.inv(root)
    statistics = InputStatistics("full", second_moment=moment.second_moment.numpy(), mean=moment.mean.numpy())
    found = whitened_svd(E, statistics, Method(rank=RANK))
    assert tiny.relative((found.U * found.S) @ found.P, wanted) < 1e-7


def test_whitened_leaves_least_of_the_output_of_every_layer(home):
    rows = prep.evaluate(home.path / "full.zarr", ranks=RANK)
    lost = {(row.basis, row.layer): row.lost for row in rows}
    moments = prep.open_store(home.path / "full.zarr").moments
    for layer, W in home.W.items():
        assert lost["repair-nf4", layer] <= lost["repair-nf4-diagonal", layer]
        assert lost["repair-nf4", layer] <= lost["repair-nf4-identity", layer]
        E, C = (W - nf4(W)).double().numpy(), moments[layer].second_moment.numpy()
        one = prep.open_store(home.path / "full.zarr").bases["repair-nf4-diagonal"][layer]
        left = E - ((one.U.double() * one.S) @ one.P.double()).numpy()
        share = np.trace(left @ C @ left.T) / np.trace(E @ C @ E.T)
        assert lost["repair-nf4-diagonal", layer] == pytest.approx(share, rel=1e-5)


def test_the_excess_is_that_of_the_error(home):
    """What a decomposition notes is what an evaluation finds anew, and is not that of W."""
    noted = prep.evaluate(home.path / "full.zarr", bases="repair-nf4", ranks=RANK)
    anew = prep.evaluate(home.path / "full.zarr", bases="repair-nf4", ranks=RANK, sample=2)
    assert [row.unseen for row in noted if row.unseen is not None]
    for one, other in zip(noted, anew, strict=True):
        assert one.lost == pytest.approx(other.lost) and (one.unseen is None) == (other.unseen is None)
        if one.unseen is not None:
            assert one.lost < one.unseen < 1 and one.unseen == pytest.approx(other.unseen)
            assert one.excess == pytest.approx(other.excess)


def test_several_metrics_with_one_load(home, store):
    bases = prep.decompose(store, repair="int3", for_="whitened,asvd,pissa", rank=4, quiet=True)
    assert [basis.name for basis in bases] == ["repair-int3", "repair-int3-diagonal", "repair-int3-identity"]
    E = (home.W[UP] - quantised(home.W[UP], "int3")).double().numpy()
    assert np.allclose(bases[2][UP].S, np.linalg.svd(E, compute_uv=False)[:4])


def test_without_moments_the_plain_svd_of_the_error(home, tmp_path):
    basis = prep.decompose(tmp_path / "s", repair="nf4", metric="identity", model=home.model, rank=RANK, quiet=True)
    known = prep.open_store(home.path / "full.zarr").bases["repair-nf4-identity"]
    assert basis.name == known.name and torch.equal(basis[UP].S, known[UP].S)


def test_an_output_moment_does_not_tell_the_error(home):
    """W C W^T is not E C E^T: refused, or the diagonal beside it serves."""
    store = home.path / "auto.zarr"
    assert prep.open_store(store).moments[DOWN].kind == "output"
    with pytest.raises(StoreError, match=r"down_proj: .*--metric diagonal, or run `prep covariance --moment full`"):
        prep.decompose(store, repair="nf4", quiet=True)
    basis = prep.decompose(store, repair="nf4", metric="diagonal", rank=RANK, quiet=True)
    known = prep.open_store(home.path / "full.zarr").bases["repair-nf4-diagonal"]
    np.testing.assert_allclose(basis[DOWN].S, known[DOWN].S, rtol=1e-6)
    assert basis.layers[DOWN].crossed is None
    with pytest.raises(StoreError, match=r"scored on the full second moment: calibrate with"):
        prep.evaluate(store)


# Where the copy comes from


def test_a_checkpoint_and_a_module_are_the_recipe(home, store, tmp_path):
    net = tiny.packed(home.model)
    net.save_pretrained(tmp_path / "packed")
    known = prep.open_store(store).bases["repair-nf4"]
    of_file = prep.decompose(store, repair=tmp_path / "packed", name="file", rank=RANK, quiet=True)
    of_module = prep.decompose(store, repair=net, name="module", rank=RANK, quiet=True)
    assert of_file.repair["source"] == "checkpoint" and of_file.repair["id"] == str(tmp_path / "packed")
    assert of_file.repair["config"]["bnb_4bit_quant_type"] == "nf4"
    assert of_module.repair == {"source": "module", "name": "nf4"}
    for layer in known:
        assert known.layers[layer].hash == of_file.layers[layer].hash == of_module.layers[layer].hash
    rows = prep.evaluate(store, bases=["repair-nf4", "file"], ranks=RANK)
    assert [row.lost for row in rows if row.basis == "file"] == [row.lost for row in rows if row.basis != "file"]
    with pytest.raises(PrepError, match=r"'module' repairs a module, which is not in the store"):
        prep.evaluate(store, bases="module")


def test_what_is_there_is_not_made_again(home, store, tmp_path, capsys):
    given = {"recipe": "nf4", "module": tiny.packed(home.model), "checkpoint": tmp_path / "packed"}
    given["module"].save_pretrained(given["checkpoint"])
    for name, copy in given.items():
        prep.decompose(store, repair=copy, name=name, rank=RANK, quiet=True)
        before = tiny.contents(store)
        prep.decompose(store, repair=copy, name=name, rank=RANK)
        assert "is complete and was made with the same options: nothing to do" in capsys.readouterr().err
        assert tiny.contents(store) == before
    with pytest.raises(StoreError, match=r"other options \(repair: 'nf4' there, 'int4' asked for\)"):
        prep.decompose(store, repair="int4", name="recipe", rank=RANK, quiet=True)
    with pytest.raises(StoreError, match=r"other options \(repair: 'nf4' there, None asked for\)"):
        prep.decompose(store, name="recipe", rank=RANK, quiet=True)
    with pytest.raises(StoreError, match=r"'module' was made from other weights of .* than the model and its copy"):
        prep.decompose(store, repair=tiny.packed(tiny.save(tiny.wide(1), tmp_path / "o")), name="module", rank=RANK)
    file = given["checkpoint"] / "model.safetensors"
    weights = load_file(file)
    weights[f"{UP}.weight.absmax"][0] *= 2
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(StoreError, match=r"'checkpoint' was made from other weights of .*up_proj than the model and"):
        prep.decompose(store, repair=given["checkpoint"], name="checkpoint", rank=RANK, quiet=True)
    with pytest.raises(PrepError, match=r"up_proj: the copy that basis 'checkpoint' repairs has another weight by now"):
        prep.evaluate(store, bases="checkpoint")


def test_layers_that_are_not_quantised_have_nothing_to_repair(home, store):
    """A copy that leaves layers in full: E = 0 there, and so is U S P."""
    net = tiny.packed(home.model, llm_int8_skip_modules=["up_proj", "lm_head"])
    basis = prep.decompose(store, repair=net, name="some", rank=RANK, quiet=True)
    one = basis[UP]
    assert basis.layers[UP].repaired["error"] == 0 and float(one.P.abs().max()) == 0
    assert float(basis[DOWN].P.abs().max()) > 0
    assert not prep.verify(store).findings


def test_a_layer_that_nobody_can_dequantise_is_named(home, store):
    class OddLinear(torch.nn.Module):
        in_features, out_features, qweight = 64, 192, torch.zeros(3)

    net = AutoModelForCausalLM.from_pretrained(home.model)
    net.set_submodule(UP, OddLinear())
    with pytest.raises(PrepError, match=r"up_proj of the quantised copy is a OddLinear, which cannot be dequantised"):
        prep.decompose(store, repair=net, quiet=True)


def test_without_bitsandbytes_the_error_says_what_to_install(store, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PrepError, match=r"pip install \"prep-bases\[quant\]\""):
        prep.decompose(store, repair="fp4", quiet=True)


# What a store says


def test_info_says_what_is_repaired(store):
    from prep.store.info import table

    prep.decompose(store, repair="fp4", name="mine", rank=2, quiet=True)
    facts = prep.info(store)
    assert facts["bases"]["repair-nf4"]["repairs"] == "nf4" and facts["bases"]["mine"]["repairs"] == "fp4"
    assert [line for line in table(facts) if " repairs " in line] == ["mine repairs fp4"]


def test_commands_make_the_basis_again(home, store, tmp_path):
    bases = prep.open_store(store).bases
    where = f"--overwrite --store {store}`"
    assert bases["repair-nf4"].command(9) == f"`prep decompose --repair nf4 --rank 9 {where}"
    assert bases["repair-nf4-diagonal"].command(9) == f"`prep decompose --repair nf4 --metric diagonal --rank 9 {where}"
    for name, wanted in {
        "repair-int3-g32-identity": "--repair int3-g32 --metric identity",
        "repair-gptq": "--repair COPY --name repair-gptq",
    }.items():
        with pytest.raises(StoreError, match=rf"make it with `prep decompose {wanted} --store"):
            bases[name]
    net = tiny.packed(home.model)
    made = prep.decompose(store, repair=net, metric="diagonal", name="mine", rank=2, quiet=True)
    assert made.command(9) == (
        f"`prep.decompose({str(store)!r}, repair=module, metric='diagonal', name='mine', rank=9, overwrite=True)`"
    )


def test_a_basis_whose_records_lack_the_copy_is_damaged(store):
    from prep.store.format import schema

    group = schema.child(prep.open_store(store, "r+").root, "bases/repair-nf4")
    attrs = dict(group.attrs)
    attrs["layers"][UP].pop("repaired")
    schema.put_attributes(group, attrs)
    with pytest.raises(StoreError, match="'repair-nf4' are damaged"):
        _ = prep.open_store(store).bases["repair-nf4"]


def test_probes_tell_how_far_another_copy_is():
    draw = torch.Generator().manual_seed(0)
    W = torch.randn(96, 64, generator=draw)
    Q = nf4(W)
    record = record_of((W - Q).double(), Q)
    assert distance(probed(Q, 16), record) == 0
    for far in (0.01, 0.5, 3.0):
        other = Q + far * (W - Q).norm() * torch.nn.functional.normalize(
            torch.randn(96, 64, generator=draw).flatten(), dim=0
        ).reshape(96, 64)
        assert 0.5 * far < distance(probed(other, 16), record) < 1.6 * far
