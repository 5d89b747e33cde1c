"""What `prep decompose` stores of every direction: kept and unseen, against the tokens and the two halves."""

import json
import shutil

import numpy as np
import pytest
import tiny
import torch

import prep
from prep import PrepError, StoreError
from prep.preprocess.decomposition.crossing import parts_of, statistics_of
from prep.preprocess.numerics.evaluation import kept_output
from prep.preprocess.numerics.methods import Method
from prep.preprocess.numerics.whitening import whitened_svd
from prep.preprocess.verify import verify
from prep.store import BasisWriter, open_store
from prep.store.format.schema import sealed

RUN = {"seq_len": 16, "batch_size": 4, "num_sequences": 24, "dtype": "float64", "quiet": True}
BASES = {
    "full": {},
    "full-centered": {"center": True},
    "full-p1": {"power": 1.0},
    "full-p1-bottom": {"power": 1.0, "select": "bottom"},
    "diagonal": {"metric": "diagonal"},
    "identity": {"metric": "identity"},
    "identity-activation": {"metric": "identity", "select": "activation"},
    "eva": {"for_": "eva"},
}
RANK = 12
LAYER = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, its calibrations and their bases; one layer of each kind is cross-fitted."""
    path = tmp_path_factory.mktemp("shares")
    tiny.write_data(path / "a.jsonl", tiny.texts(120))
    tiny.save(tiny.llama(80), path / "model")
    for kind in ("full", "output", "diagonal"):
        prep.covariance(str(path / "model"), str(path / "a.jsonl"), store=path / kind, moment=kind, **RUN)
    for name, options in BASES.items():
        prep.decompose(path / "full", rank=RANK, sample=1, quiet=True, **options)
        assert name in open_store(path / "full").bases
    for name in ("full", "identity", "identity-activation"):
        prep.decompose(path / "output", rank=RANK, sample=1, quiet=True, **BASES[name])
    return path


@pytest.mark.parametrize("kind", ["full", "output"])
def test_kept_is_what_evaluate_says_of_every_rank(place, kind):
    rows = prep.evaluate(place / kind, ranks=[1, 5, RANK])
    bases = open_store(place / kind).bases
    assert len(rows) == len(bases) * 14 * 3
    for row in rows:
        kept = bases[row.basis].kept(row.layer)
        assert kept.dtype == torch.float64 and kept.shape == (RANK,) and (kept >= 0).all()
        assert 1 - float(kept[: row.rank].sum()) == pytest.approx(row.lost, abs=1e-6)
        assert bases[row.basis].unseen(row.layer) is None
    assert verify(place / kind, model=str(place / "model")).findings == []


def test_unseen_is_what_bases_of_either_half_keep_of_the_other_one(place, tmp_path):
    path = shutil.copytree(place / "full", tmp_path / "s")
    for name in ("full", "full-p1", "eva"):
        prep.decompose(path, rank=RANK, sample=0, overwrite=True, quiet=True, **BASES[name])
    store = open_store(path)
    rows = prep.evaluate(path, ranks=[8, RANK], bases=["full", "full-p1"])
    for row in rows:  # the halves are equal, but not their energies
        assert 1 - float(store.bases[row.basis].unseen(row.layer)[: row.rank].sum()) == pytest.approx(
            row.unseen, abs=0.01
        )
    moment = store.moments[LAYER]
    parts = parts_of(moment, statistics_of(moment))
    W = weights(place)[LAYER]
    shares = []
    for own, other in ((parts.a, parts.b), (parts.b, parts.a)):
        basis = whitened_svd(W, own, Method(rank=RANK))
        total = np.trace(W @ other.second_moment @ W.T)
        shares.append(kept_output(basis.U, basis.S, basis.P, other) / total)
    np.testing.assert_allclose(store.bases["full"].unseen(LAYER), np.mean(shares, axis=0), rtol=1e-6, atol=1e-12)
    assert float(store.bases["eva"].unseen(LAYER).sum()) < float(store.bases["eva"].kept(LAYER).sum())
    assert verify(path, model=str(place / "model")).findings == []


def weights(place):
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float64)
    return {name: tiny.weight(module) for name, module in net.named_modules() if tiny.is_linear(module)}


def test_a_plain_svd_has_seen_no_tokens(place, tmp_path):
    """Nothing is cross-fitted, whatever the sample, and its excess is not noted."""
    path = shutil.copytree(place / "full", tmp_path / "s")
    basis = prep.decompose(path, rank=RANK, sample=0, overwrite=True, quiet=True, **BASES["identity"])
    assert basis.kept(LAYER) is not None and basis.unseen(LAYER) is None
    assert all(record.crossed is None for record in basis.layers.values())


def test_moments_that_do_not_tell_the_output(place, tmp_path):
    """Nothing is stored, nothing is read, and what is asked for says so."""
    basis = prep.decompose(place / "diagonal", metric="diagonal", rank=4, quiet=True)
    assert basis.kept(LAYER) is None and basis.unseen(LAYER) is None and basis.shares("kept") == {}
    alone = prep.decompose(tmp_path / "s", model=str(place / "model"), metric="identity", rank=4, quiet=True)
    assert alone.kept(LAYER) is None
    with pytest.raises(StoreError, match="does not hold the layer lm_head"):
        alone.kept("lm_head")


def test_a_basis_is_the_same_whatever_is_known_of_it(place, tmp_path):
    """Its hash, by which adapters know it, and its records' do not depend on --sample."""
    path = shutil.copytree(place / "full", tmp_path / "s")
    before = open_store(path).bases["full"]
    after = prep.decompose(path, rank=RANK, sample=0, overwrite=True, quiet=True)
    assert after.hash == before.hash == prep.decompose(path, rank=RANK, sample=1, quiet=True).hash
    assert after.unseen(LAYER) is not None
    for layer in after:
        assert torch.equal(after.kept(layer), before.kept(layer))


def test_more_layers_to_cross_fit_are_another_basis(place, tmp_path):
    path = shutil.copytree(place / "full", tmp_path / "s")
    for sample in (None, 1):
        assert prep.decompose(path, rank=RANK, sample=sample, quiet=True).unseen(LAYER) is None
    with pytest.raises(StoreError, match=r"sample: 7 layers cross-fitted there, 14 asked for\): give .*--overwrite"):
        prep.decompose(path, rank=RANK, sample=0, quiet=True)
    with pytest.raises(PrepError, match="--sample -1 is not a number of layers: give 0 for all, or more"):
        prep.decompose(path, rank=RANK, sample=-1, quiet=True)


@pytest.mark.parametrize("again", [0, None])
def test_an_interrupted_basis_is_resumed_with_its_arrays(place, tmp_path, monkeypatch, again):
    """Also where the second command does not say what the first did."""
    whole = prep.decompose(shutil.copytree(place / "full", tmp_path / "w"), rank=RANK, name="x", sample=0, quiet=True)
    path, note, noted = shutil.copytree(place / "full", tmp_path / "s"), BasisWriter.note, []

    def stop(self, done):
        note(self, done)
        noted.append(done)
        if len(noted) == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(BasisWriter, "note", stop)
        with pytest.raises(KeyboardInterrupt):
            prep.decompose(path, rank=RANK, name="x", sample=0, quiet=True)
    got = prep.decompose(path, rank=RANK, name="x", sample=again, quiet=True)
    assert got.hash == whole.hash
    for layer in whole:
        assert torch.equal(got.unseen(layer), whole.unseen(layer)) and got.layers[layer] == whole.layers[layer]
    assert verify(path).findings == []


def test_stores_from_before_open_and_resume_as_they_were(place, tmp_path):
    path = without_shares(shutil.copytree(place / "full", tmp_path / "s"), "full")
    basis = open_store(path).bases["full"]
    assert basis.kept(LAYER) is None and basis[LAYER].S.shape == (RANK,)
    assert verify(path).findings == []
    file = path / "bases" / "full" / "zarr.json"
    document = json.loads(file.read_text())
    document["attributes"]["status"] = "incomplete"
    del document["attributes"]["layers"][LAYER]
    document["attributes"] = sealed(document["attributes"])
    file.write_text(json.dumps(document))
    resumed = prep.decompose(path, rank=RANK, sample=1, quiet=True)
    assert resumed.hash == basis.hash and resumed.kept(LAYER) is None
    assert prep.decompose(path, rank=RANK, overwrite=True, quiet=True).unseen(LAYER) is not None  # 2 of each kind


def without_shares(path, name):
    """The store as an earlier version wrote it."""
    file = path / "bases" / name / "zarr.json"
    document = json.loads(file.read_text())
    for key, group in document["attributes"]["groups"].items():
        for role in group.pop("shares"):
            shutil.rmtree(path / "bases" / name / key / role)
    for record in document["attributes"]["layers"].values():
        del record["shares"]
    document["attributes"] = sealed(document["attributes"])
    file.write_text(json.dumps(document))
    return path


@pytest.mark.parametrize("change", [lambda t: 2 * t, lambda t: t - 0.5])
def test_shares_that_are_none_are_found(place, tmp_path, change):
    """By a writer that was wrong; what a disk or a stranger does to them is refused on reading."""
    path = shutil.copytree(place / "full", tmp_path / "s")
    basis, writer = open_store(path).bases["full"], BasisWriter.resume(open_store(path, "r+").root, "full")
    one = basis[LAYER]
    writer.note(writer.put(LAYER, one.U, one.S, one.P, one.spectrum, one.record, {"kept": change(basis.kept(LAYER))}))
    writer.finish()
    [finding] = verify(path).findings
    assert finding.where == f"bases/full: {LAYER}" and "kept are no shares of one output" in finding.problem


def test_shares_of_another_version_are_refused(place, tmp_path):
    path = shutil.copytree(place / "full", tmp_path / "s")
    chunk = "32x80/kept/c/0/0"
    shutil.copy(path / "bases" / "full-p1" / chunk, path / "bases" / "full" / chunk)
    with pytest.raises(StoreError, match=r"kept \(row 1, .*\) is not the one that the metadata speak of"):
        open_store(path).bases["full"].kept(LAYER)
    assert f"bases/full: {LAYER}" in [finding.where for finding in verify(path).findings]
