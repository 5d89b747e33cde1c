"""Pooling: the moments of two halves are those of the whole; weights make the mixture that they name."""

import contextlib
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import steps
import tiny
import torch
from stores import place

import prep
from prep import PrepError, StoreError
from prep.preprocess.verify import verify
from prep.store import open_store
from prep.store import pool as pool_module
from prep.store.info import info, table
from prep.store.lock import writer_lock
from prep.store.pool import pool

RUN = {"num_sequences": 8, "batch_size": 4, "quiet": True}
DOWN = "model.layers.1.mlp.down_proj"
KINDS = ("full", "diagonal", "output")


def calibrate(model, path, sentences, **options):
    path.mkdir(parents=True)
    data = tiny.write_data(path / "text.jsonl", sentences)
    return str(prep.covariance(model, data, store=path / "s", **{**RUN, **options}).location)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two texts of different lengths, each padded on its own and both together, for every moment kind."""
    path = tmp_path_factory.mktemp("made")
    model = tiny.save(tiny.llama(80), path / "model")
    short, long = tiny.texts(4, 3, 5, seed=1), tiny.texts(4, 9, 14, seed=2)
    stores = {}
    for kind in KINDS:
        # in float64, as padding changes the rounding of a float32 forward
        options = {"moment": kind, "pack": False, "seq_len": 16, "dtype": "float64"}
        stores[kind] = SimpleNamespace(
            a=calibrate(model, path / kind / "a", short, **options, num_sequences=4),
            b=calibrate(model, path / kind / "b", long, **options, num_sequences=4),
            whole=calibrate(model, path / kind / "whole", [*short, *long], **options),
        )
    return SimpleNamespace(path=path, model=model, **stores)


def arrays(store, layer):
    """What is stored of a layer's input or output, as float64."""
    moment = open_store(store).moments[layer]
    values = {"mean": moment.mean, "diagonal": moment.diagonal}
    if moment.kind != "diagonal":
        values["matrix"] = moment.second_moment if moment.kind == "full" else moment.output
    return {name: value.double().numpy() for name, value in values.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_two_halves_are_the_whole(made, tmp_path, kind):
    one = getattr(made, kind)
    pooled = pool([one.a, one.b], store=tmp_path / "c")
    whole = open_store(one.whole)
    assert dict(pooled.moments.sites) == dict(whole.moments.sites)
    for layer in whole.moments:
        assert pooled.moments[layer].count == whole.moments[layer].count
        assert pooled.moments[layer].members == whole.moments[layer].members
        got, wanted = arrays(tmp_path / "c", layer), arrays(one.whole, layer)
        for name in wanted:
            assert tiny.relative(got[name], wanted[name]) < 1e-9, (layer, name)
    assert verify(tmp_path / "c").findings == []


@pytest.mark.parametrize("weights", [None, (1, 2), (0.3, 0.7)])
def test_the_formula(made, tmp_path, weights):
    one = made.full
    pool([one.a, one.b], store=tmp_path / "c", weights=weights)
    w = weights or (1, 1)
    counts = [open_store(part).moments[DOWN].count for part in (one.a, one.b)]
    assert counts[0] != counts[1]
    parts = [arrays(part, DOWN) for part in (one.a, one.b)]
    for name, got in arrays(tmp_path / "c", DOWN).items():
        total = w[0] * counts[0] + w[1] * counts[1]
        wanted = (w[0] * counts[0] * parts[0][name] + w[1] * counts[1] * parts[1][name]) / total
        np.testing.assert_allclose(got, wanted, rtol=1e-13, atol=1e-15)


def test_pooling_is_associative_and_its_bases_agree(made, tmp_path):
    """(a + b) + a is 2 a + b; a pool decomposes like any store."""
    one = made.full
    pool([one.a, one.b], store=tmp_path / "ab")
    pool([tmp_path / "ab", one.a], store=tmp_path / "aba")
    pool([one.a, one.b], store=tmp_path / "2ab", weights=[2, 1])
    for name, got in arrays(tmp_path / "aba", DOWN).items():
        np.testing.assert_allclose(got, arrays(tmp_path / "2ab", DOWN)[name], rtol=1e-12, atol=1e-14)
    first, second = (prep.decompose(tmp_path / name, rank=4, quiet=True) for name in ("aba", "2ab"))
    torch.testing.assert_close(first[DOWN].S, second[DOWN].S, rtol=1e-9, atol=0)


def test_provenance_is_kept(made, tmp_path):
    one = made.full
    pooled = pool([one.a, one.b], store=tmp_path / "c", weights=[1, 2])
    parts = pooled.corpus["parts"]
    assert [part["weight"] for part in parts] == [1.0, 2.0]
    assert [part["id"] for part in parts] == [open_store(path).id for path in (one.a, one.b)]
    assert parts[0]["corpus"] == open_store(one.a).corpus
    assert pooled.corpus["tokens"] == sum(open_store(path).corpus["tokens"] for path in (one.a, one.b))
    assert pooled.model == open_store(one.a).model
    assert pooled.status == "complete"
    lines = table(info(pooled))
    assert any(line.startswith("corpus   pool of 2 stores") for line in lines)
    pool([tmp_path / "c", one.a], store=tmp_path / "nested")
    assert any("1 x a pool" in line for line in table(info(open_store(tmp_path / "nested"))))


def test_the_same_pool_is_not_made_twice(made, tmp_path):
    one = made.full
    pool([one.a, one.b], store=tmp_path / "c")
    before = tiny.contents(tmp_path / "c")
    pool([one.a, one.b], store=tmp_path / "c")
    assert tiny.contents(tmp_path / "c") == before
    with pytest.raises(StoreError, match="holds something else"):
        pool([one.a, one.b], store=tmp_path / "c", weights=[1, 3])
    assert tiny.contents(tmp_path / "c") == before
    pool([one.a, one.b], store=tmp_path / "c", weights=[1, 3], overwrite=True)
    assert [part["weight"] for part in open_store(tmp_path / "c").corpus["parts"]] == [1.0, 3.0]


def test_what_is_no_store_is_not_replaced(made, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "precious").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(StoreError, match="is not a prep store"):
            pool([made.full.a, made.full.b], store=tmp_path / "folder", overwrite=overwrite)
    assert (tmp_path / "folder" / "precious").read_text() == "x"


def test_differences_are_named(made, tmp_path):
    path, sentences, options = made.path / "others", tiny.texts(8), {"seq_len": 8, "dtype": "float64"}
    other = tiny.llama(80)
    with torch.no_grad():
        other.get_submodule(DOWN).weight[0, 0] += 1
    weights = tiny.save(other, path / "weights")
    wide = tiny.save(tiny.llama(64), path / "wide")
    cases = {
        "the weight_hash of model.layers.1.mlp.down_proj": calibrate(weights, path / "w", sentences, **options),
        "the model's config_hash": calibrate(wide, path / "c", sentences, **options),
        "the model's dtype": calibrate(made.model, path / "d", sentences, seq_len=8),
        "their layers: only one has model.layers.0": calibrate(
            made.model, path / "l", sentences, **options, layers="1"
        ),
        "the moment kind of": made.diagonal.b,
    }
    for difference, part in cases.items():
        with pytest.raises(StoreError, match=f"differ in {difference}"):
            pool([made.full.a, part], store=tmp_path / "c")
        assert not (tmp_path / "c").exists()


def test_bad_input(made, tmp_path):
    one, target = made.full, tmp_path / "c"
    copy = shutil.copytree(one.a, tmp_path / "a")
    for arguments, message in [
        (([one.a],), "name two or more"),
        (([one.a, one.b], [1.0]), "--weights 1:"),
        (([one.a, one.b], [1.0, -1.0]), "--weights 1,-1"),
        (([one.a, one.b], [1.0, float("inf")]), "positive numbers"),
        (([one.a, tmp_path / "absent"],), "no store at"),
    ]:
        with pytest.raises(PrepError, match=message):
            pool(arguments[0], store=target, weights=arguments[1] if len(arguments) > 1 else None)
    with pytest.raises(PrepError, match="is one of the parts"):
        pool([copy, one.b], store=copy, overwrite=True)
    assert not target.exists()
    assert tiny.contents(copy) == tiny.contents(one.a)


def spelled(path):
    """Other ways to name a store in the working directory."""
    Path("link").symlink_to(path)
    return [f"./{path}", f"{path}/", f"../{Path.cwd().name}/{path}", "link", Path(path).absolute().as_uri()]


def test_a_part_is_not_emptied_however_it_is_spelled(made, tmp_path):
    copy = Path(shutil.copytree(made.full.a, tmp_path / "a.zarr"))
    before = tiny.contents(copy)
    with contextlib.chdir(tmp_path):
        for store in [*spelled("a.zarr"), "a.zarr/moments", "."]:
            for parts in (["a.zarr", made.full.b], [made.full.b, copy]):
                with pytest.raises(PrepError, match="is one of the parts"):
                    pool(parts, store=store, overwrite=True)
        with pytest.raises(PrepError, match="pool into a path"):
            pool(["a.zarr", made.full.b], store="memory://pooled")
    assert tiny.contents(copy) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zarr", "link"]


def test_what_another_process_completed_meanwhile_is_kept(made, tmp_path, monkeypatch):
    """Between the first look at the store and the lock, another process makes one."""
    one, store = made.full, tmp_path / "c"
    same = pool([one.a, one.b], store=tmp_path / "same")
    real = pool_module.writer_lock

    def late(source):
        def lock(location, break_lock):
            shutil.copytree(source, location)
            return real(location, break_lock)

        return lock

    monkeypatch.setattr(pool_module, "writer_lock", late(one.whole))
    with pytest.raises(StoreError, match="holds something else"):
        pool([one.a, one.b], store=store)
    assert tiny.contents(store) == tiny.contents(one.whole)
    shutil.rmtree(store)
    monkeypatch.setattr(pool_module, "writer_lock", late(tmp_path / "same"))
    assert pool([one.a, one.b], store=store).attrs == same.attrs
    assert tiny.contents(store) == tiny.contents(tmp_path / "same")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "same"]


def pooled_over(parts, store, weights):
    pool(parts, store=store, weights=weights, overwrite=True)


def arrays_and_groups(path):
    """Every file but the root's metadata, which holds times."""
    return {name: raw for name, raw in tiny.contents(path).items() if name != "zarr.json"}


def killed_pools(made, path, seeds):
    """A pool over another store, killed at a random step: one of the two is there, whole; again, and it succeeds."""
    one, store = made.full, path / "w" / "c"
    pool([one.a, one.b], store=path / "old")
    pool([one.a, one.b], store=path / "new", weights=[1, 2])
    old, new = (arrays_and_groups(path / name) for name in ("old", "new"))
    ended = []
    for seed in seeds:
        shutil.rmtree(path / "w", ignore_errors=True)
        shutil.copytree(path / "old", store)
        # nine in ten steps are those of building; the others are looked at one by one in test_staging.py
        step = random.Random(seed).randint(1, 420)
        steps.killed_at(step, pooled_over, [one.a, one.b], store, [1, 2])
        with writer_lock(store):
            pass
        contents = arrays_and_groups(store)
        assert contents in (old, new)
        assert verify(store).findings == []
        ended.append(contents == new)
        pool([one.a, one.b], store=store, weights=[1, 2], overwrite=True)
        assert arrays_and_groups(store) == new
        assert [p.name for p in store.parent.iterdir()] == ["c"]
    return ended


def test_a_pool_killed_at_any_step(made, tmp_path):
    assert not all(killed_pools(made, tmp_path, range(5)))


@pytest.mark.stress
def test_a_pool_killed_at_many_steps(made, tmp_path):
    assert set(killed_pools(made, tmp_path, range(100))) == {False, True}


def test_a_damaged_part_makes_no_pool(made, tmp_path):
    copy = shutil.copytree(made.full.a, tmp_path / "a")
    array, row = place(copy, DOWN, "second_moment")
    (copy / array / "c" / f"{row}" / "0" / "0").unlink()
    with pytest.raises(StoreError, match=rf"{array} \(file c/{row}/0/0\) is missing"):
        pool([copy, made.full.b], store=tmp_path / "c")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    shutil.rmtree(copy)
    shutil.copytree(made.full.a, copy)
    assert len(pool([copy, made.full.b], store=tmp_path / "c").moments) == 14
