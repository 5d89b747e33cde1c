"""Files of two versions of a store, as an interrupted copy leaves them: each is whole, together they are nothing."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from stores import everything
from stores import place as where

import prep
from prep import StoreError
from prep.preprocess.verify import verify
from prep.store import open_store
from prep.store.checkpoint import read_sums, write_sums
from prep.store.format.schema import sealed
from prep.store.pool import pool

Q, OUT, DOWN = (f"model.layers.1.{name}" for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"))
SLAB = 2


@pytest.fixture(scope="module")
def made(small_slabs, tmp_path_factory):
    """Stores of one model and two corpora, alike in all but their numbers."""
    path = tmp_path_factory.mktemp("made")
    model = tiny.save(tiny.llama(), path / "model")
    for seed, name in enumerate(("one", "two")):
        data = tiny.write_data(path / f"{name}.jsonl", tiny.texts(60, seed=seed))
        prep.covariance(model, data, store=path / name, layers="1", **tiny.RUN)
        prep.decompose(path / name, rank=8, quiet=True)
    return SimpleNamespace(path=path, model=model, one=path / "one", two=path / "two")


@pytest.fixture
def store(made, tmp_path):
    return shutil.copytree(made.one, tmp_path / "s.zarr")


def exchange(store, one, other):
    """Exchange two chunks of a store."""
    assert (store / one).read_bytes() != (store / other).read_bytes()
    (store / one).rename(store / "kept")
    (store / other).rename(store / one)
    (store / "kept").rename(store / other)


def exchange_chunks(file, one, other, of):
    """Exchange two of the chunks of a file, which all have one size and follow an index."""
    raw = file.read_bytes()
    index = 16 * of + 4
    size = (len(raw) - index) // of
    chunks = [raw[index + i * size :][:size] for i in range(of)]
    assert chunks[one] != chunks[other]
    chunks[one], chunks[other] = chunks[other], chunks[one]
    file.write_bytes(raw[:index] + b"".join(chunks))


def copied(made, store, name):
    """Copy a file or directory of the other store over that of this one."""
    assert everything(made.two) != everything(store)
    source = made.two / name
    if source.is_dir():
        shutil.copytree(source, store / name, dirs_exist_ok=True)
    else:
        shutil.copy(source, store / name)


def refused(match, action, *arguments, **options):
    with pytest.raises(StoreError, match=match) as caught:
        action(*arguments, **options)
    assert len(str(caught.value).splitlines()) == 1


def place(store, layer):
    """The group of a layer's shape, and its row."""
    record = open_store(store).bases["full"].layers[layer]
    return "bases/full/{}x{}".format(*record.shape), record.index


# Bases


def test_files_of_two_layers_exchanged(made, store, tmp_path):
    (group, q), (same, o) = place(store, Q), place(store, OUT)
    assert group == same
    exchange(store, f"{group}/UP/c/{q}/0/0", f"{group}/UP/c/{o}/0/0")
    wrong = rf"{group}/UP \(chunk 0 of c/./0/0\) is not the one that the metadata speak of, but of another version"
    model = tiny.llama()
    refused(wrong, prep.attach, model, store, rank=1, verify=False)
    prep.attach(model, store, rank=1, layers="mlp")  # of other files
    refused(wrong, prep.export, store, "safetensors", tmp_path / "s.safetensors")
    assert not (tmp_path / "s.safetensors").exists()
    assert {finding.where for finding in verify(store).findings} == {f"bases/full: {layer}" for layer in (Q, OUT)}


def test_only_the_directions_that_are_read_are_compared(made, store):
    group, q = place(store, Q)
    whole = open_store(made.one).bases["full"].read([Q], rank=SLAB)[Q]
    exchange_chunks(store / f"{group}/UP/c/{q}/0/0", 1, 3, of=4)
    basis = open_store(store).bases["full"]
    part = basis.read([Q], rank=SLAB)[Q]
    np.testing.assert_array_equal(part.P, whole.P)
    np.testing.assert_array_equal(part.S, whole.S)
    refused(rf"UP \(chunk 1 of c/{q}/0/0\) is not the one", basis.read, [Q], rank=SLAB + 1)


@pytest.mark.parametrize("part", ["zarr.json", "32x48/UP", "32x48/S"])
def test_a_basis_half_copied_over_another(made, store, part):
    copied(made, store, f"bases/full/{part}")
    refused("32x48/U?[PS] .*is not the one that", prep.attach, tiny.llama(), store, layers="down_proj", verify=False)
    assert verify(store).findings


def test_a_spectrum_of_another_basis(made, store):
    copied(made, store, "bases/full/32x48/spectrum")
    basis = open_store(store).bases["full"][DOWN]
    refused(rf"32x48/spectrum \(row 0, {DOWN}\) is not the one", lambda: basis.spectrum)


def test_records_of_two_runs_are_no_basis(made, store):
    file = store / "bases" / "full" / "zarr.json"
    document, other = (json.loads((path / "bases" / "full" / "zarr.json").read_text()) for path in (store, made.two))
    document["attributes"]["layers"][Q] = other["attributes"]["layers"][Q]
    document["attributes"] = sealed(document["attributes"])
    file.write_text(json.dumps(document))
    refused("the hash of basis 'full' is not that of its records", prep.attach, tiny.llama(), store, verify=False)


# Moments


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("moments/full-48/second_moment", "full-48/second_moment is not the one that"),
        ("moments/full-48/mean", "full-48/mean is not the one that"),
        ("moments/full-48", "full-48/.* is not the one that"),
        ("moments", "/moments is not the one that"),
        ("moments/zarr.json", "/moments is not the one that"),
        ("zarr.json", "/moments is not the one that"),
    ],
)
def test_moments_of_another_corpus(made, store, tmp_path, part, message):
    copied(made, store, part)
    wanted = {"metric": "diagonal"} if not part.endswith("mean") else {"for_": "eva"}
    refused(message, prep.decompose, store, **wanted, rank=4, quiet=True)
    refused(message, pool, [store, made.two], store=tmp_path / "pool")
    refused(message, everything, store)
    assert verify(store).findings


def test_chunks_of_two_sites_exchanged(store):
    """The inputs of attention and of its output projection are equally wide."""
    (array, q), (same, out) = (where(store, layer, "second_moment") for layer in (Q, OUT))
    assert array == same
    exchange(store, f"{array}/c/{q}/0/0", f"{array}/c/{out}/0/0")
    refused("second_moment is not the one that", prep.decompose, store, metric="diagonal", rank=4, quiet=True)
    refused("second_moment is not the one that", lambda: open_store(store).moments[OUT].diagonal)


def test_sums_of_another_checkpoint(made, store):
    root = open_store(store, "r+").root
    for slot, source in enumerate((store, made.two)):
        write_sums(root, slot, DOWN, replace(open_store(source).moments[DOWN].data(), members={}))
    np.testing.assert_array_equal(read_sums(root, 0, DOWN).mean, open_store(store).moments[DOWN].mean)
    shutil.copytree(*(store / "checkpoint" / slot / DOWN / "second_moment" for slot in "10"), dirs_exist_ok=True)
    refused("second_moment is not the one that", read_sums, root, 0, DOWN)


# Earlier stores


def test_stores_without_these_hashes_are_read(store):
    """They are as those of the first writers, and what is read is what was."""
    before = everything(store)
    for name, change in {
        "": lambda attrs: attrs.pop("moments"),
        "bases/full": lambda attrs: [record.pop("checksums") for record in attrs["layers"].values()],
    }.items():
        file = Path(store, name, "zarr.json")
        document = json.loads(file.read_text())
        change(document["attributes"])
        document["attributes"] = sealed(document["attributes"])
        file.write_text(json.dumps(document))
    after = everything(store)
    assert before["root"].pop("moments")
    for values in [value for key, value in [*before.items(), *after.items()] if key.startswith("full ")]:
        values[0].pop("checksums")
    assert after == before
    assert verify(store).findings == []
    prep.attach(tiny.llama(), store)
