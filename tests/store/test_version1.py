"""Stores of format version 1: what reads, reads them, and what is written into one, or made of one, is of version 2."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import version1
from stores import everything, files, flip

import prep
from prep import PrepError, StoreError
from prep.preprocess.verify import verify
from prep.store import Bases, open_store
from prep.store.format.schema import sealed
from prep.store.info import info, table
from prep.store.integrity import verify_store
from prep.store.pool import pool
from prep.store.transfer import pull, push

RUN = {"moment": "auto", "moment_dtype": "float32", "keep_tokens": 6, "quiet": True}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The stores of version 1, and the first of them made anew."""
    old = version1.unpacked(tmp_path_factory.mktemp("version1"))
    new = tmp_path_factory.mktemp("made") / "new"
    prep.covariance(version1.Net(), batches=version1.batches(), store=new, **RUN)
    prep.decompose(new, model=version1.Net(), rank=8, sample=0, quiet=True)
    return SimpleNamespace(old=old / "whole", bases=old / "bases", new=new)


@pytest.fixture
def old(made, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(made.old, tmp_path / "old")


def changed(store, name, change):
    """Change the attributes of a group, with a seal that fits."""
    file = store / name / "zarr.json"
    document = json.loads(file.read_text())
    change(document["attributes"])
    document["attributes"] = sealed(document["attributes"])
    file.write_text(json.dumps(document))


def test_it_is_read_and_verified(made):
    for store in (made.old, made.bases):
        assert open_store(store).attrs["format_version"] == 1
        assert verify(store).findings == []
        assert table(info(store))
    weights = {name: layer.weight for name, layer in version1.Net().named_children()}
    report = verify_store(open_store(made.old), weights)
    assert report.findings == [] and report.weights == 3 * 4  # of the moments and of two bases
    layer = open_store(made.bases).bases["identity"]["up"]  # of 66 directions, in two slabs
    W = version1.Tall().up.weight
    assert tiny.relative(((layer.U.double() * layer.S) @ layer.P.double()).numpy(), W.numpy()) < 2**-7
    part = open_store(made.bases).bases["identity"].read(["up"], rank=65)["up"]
    assert torch.equal(part.U, layer.U[:, :65]) and torch.equal(part.P, layer.P[:65])


def test_it_holds_what_a_store_of_now_holds(made):
    old, new = everything(made.old), everything(made.new)
    for name in ("sites", "skipped"):
        assert old[name] == new[name]
    for layer in open_store(made.new).moments:
        for one in (layer, f"half of {layer}"):
            assert np.all([np.array_equal(np.array(a), np.array(b)) for a, b in zip(old[one], new[one], strict=True)])
    assert open_store(made.old).attrs["moments"] == open_store(made.new).attrs["moments"]
    assert open_store(made.old).bases["full"].hash == open_store(made.new).bases["full"].hash
    assert open_store(made.new).attrs["format_version"] == 2 and verify(made.new).findings == []
    assert len(files(made.new / "bases" / "full")) < len(files(made.old / "bases" / "full"))


def test_moments_are_those_of_the_inputs(made):
    X = tiny.Activations(version1.Net(), [{"x": x} for x in version1.batches()])
    for store in (made.old, made.new):
        moments, W = open_store(store).moments, version1.Net().down.weight.double().numpy()
        for layer in ("q", "out"):
            C = X[layer].T @ X[layer] / len(X[layer])
            assert tiny.relative(moments[layer].second_moment.double().numpy(), C) < 1e-6
        Y = X["down"] @ W.T
        assert tiny.relative(moments["down"].output.double().numpy(), Y.T @ Y / len(Y)) < 1e-6


def test_it_attaches(made):
    net, x = version1.Net(), version1.batches()[0]
    before = net(x)
    for store, model in ((made.old, net), (made.bases, version1.Tall())):
        for basis in open_store(store).bases:
            prep.attach(model, store, core="gain", basis=basis, rank=4)
            assert model is not net or torch.equal(model(x), before)
            prep.detach(model)


def test_what_is_written_into_it_is_of_version_2(old):
    rows = prep.evaluate(old, model=version1.Net())
    before = {name: raw for name, raw in tiny.contents(old).items() if name.startswith(("moments/", "bases/full/"))}
    prep.decompose(old, model=version1.Net(), rank=8, sample=0, name="again", quiet=True)
    store = open_store(old)
    assert store.attrs["format_version"] == 2
    assert [store.bases[name].layout for name in store.bases] == [1, 1, 2]
    assert store.bases["again"].hash == store.bases["full"].hash
    assert verify(old).findings == []
    assert before.items() <= tiny.contents(old).items()
    assert prep.evaluate(old, bases="full", model=version1.Net()) == [row for row in rows if row.basis == "full"]


def test_a_basis_that_was_not_complete_is_begun_anew(old, capsys):
    known = open_store(old).bases["full"].hash

    def unfinished(attrs):
        attrs.update(status="incomplete")
        attrs["layers"].pop("down")

    changed(old, "bases/full", unfinished)
    with pytest.raises(StoreError, match="basis 'full' is not complete"):
        _ = open_store(old).bases["full"]
    basis = prep.decompose(old, model=version1.Net(), rank=8, sample=0)
    assert "basis 'full' is not complete, and of an earlier format: made anew" in capsys.readouterr().err
    assert basis.layout == 2 and basis.hash == known
    assert Bases(open_store(old).root).names == ["plain", "full"] and verify(old).findings == []


def test_it_is_replaced_when_its_successor_is_whole(old):
    known = open_store(old).bases["full"].hash
    basis = prep.decompose(old, model=version1.Net(), rank=8, sample=0, overwrite=True, quiet=True)
    assert basis.layout == 2 and basis.hash == known
    assert verify(old).findings == []


def test_moments_come_to_a_store_of_bases(made, tmp_path):
    store = shutil.copytree(made.bases, tmp_path / "bases")
    x = version1.numbers(7, (4, 3, 66))
    prep.covariance(version1.Tall(), batches=[x], store=store, quiet=True)
    assert open_store(store).attrs["format_version"] == 2 and open_store(store).bases["identity"].layout == 1
    assert verify(store).findings == []


def test_it_is_pooled_and_copied(made, tmp_path):
    both = pool([made.old, made.new], store=tmp_path / "pool")
    assert both.attrs["format_version"] == 2 and verify(both.location).findings == []
    for layer in both.moments:
        torch.testing.assert_close(both.moments[layer].diagonal, open_store(made.new).moments[layer].diagonal)
    assert tiny.contents(pull(made.old, tmp_path / "copy").location) == tiny.contents(made.old)
    push(made.old, "memory://version1/prep.zarr")
    assert everything("memory://version1/prep.zarr") == everything(made.old)


@pytest.mark.parametrize("name", ["zarr.json", "mean/c/0", "half/second_moment/c/0/0", "second_moment/zarr.json"])
def test_damage_is_found(old, name):
    file = old / "moments" / "q" / name
    raw = file.read_bytes()
    file.write_bytes(flip(raw, len(raw) // 2, 1))
    with pytest.raises(StoreError, match="moments"):
        everything(old)
    assert [finding.where.startswith("moments/q") for finding in verify(old).findings] == [True]


def test_an_unfinished_calibration_is_refused(tmp_path):
    model, data = tiny.save(tiny.llama(), tmp_path / "model"), tiny.write_data(tmp_path / "d.jsonl", tiny.texts(60))
    store = tmp_path / "store"
    prep.covariance(model, data, store=store, **tiny.RUN)
    state = {"slot": 0, "sites": [], "done": [], "batches": 0}
    changed(store, "", lambda attrs: attrs.update(status="incomplete", format_version=1, checkpoint=state))
    changed(store, "moments", lambda attrs: [attrs.pop(name) for name in ("layout", "groups", "records")])
    before = tiny.contents(store)
    with pytest.raises(PrepError, match="is an unfinished calibration of format version 1: finish it with") as refused:
        prep.covariance(model, data, store=store, **tiny.RUN)
    assert len(str(refused.value).splitlines()) == 1 and tiny.contents(store) == before
    prep.covariance(model, data, store=store, overwrite=True, **tiny.RUN)
    assert open_store(store).attrs["format_version"] == 2 and verify(store).findings == []
