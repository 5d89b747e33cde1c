"""`prep remove`, and stores of which a basis was removed or damaged by hand."""

import contextlib
import json
import shutil
from types import SimpleNamespace

import pytest
import steps
import tiny
import torch
from click.testing import CliRunner
from stores import everything, files

import prep
from prep import PrepError, StoreError
from prep.cli import main
from prep.preprocess.verify import verify
from prep.store import open_store
from prep.store.format.schema import sealed
from prep.store.info import info, table
from prep.store.lock import writer_lock


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, two texts, and a store with three bases of which `identity` alone needs no moments."""
    path = tmp_path_factory.mktemp("made")
    model = tiny.save(tiny.llama(), path / "model")
    data = tiny.write_data(path / "text.jsonl", tiny.texts(60))
    other = tiny.write_data(path / "other.jsonl", tiny.texts(60, seed=1))
    prep.covariance(model, data, store=path / "s", **tiny.RUN)
    for method in ("whitened", "pissa", "asvd"):
        prep.decompose(path / "s", for_=method, rank=4, quiet=True)
    return SimpleNamespace(path=path, store=path / "s", model=model, data=data, other=other)


@pytest.fixture
def store(made, tmp_path):
    shutil.copytree(made.store, tmp_path / "s")
    return tmp_path / "s"


def bases_of(path):
    """All that readers get out of every basis."""
    found = open_store(path)
    values = {
        f"{name} {layer}": [getattr(one, part).double().tolist() for part in ("U", "S", "P", "spectrum")]
        for name, basis in found.bases.items()
        for layer, one in basis.read().items()
    }
    return {**values, **{name: [basis.hash, basis.method] for name, basis in found.bases.items()}}


def without(values, *names):
    return {key: value for key, value in values.items() if key.split()[0] not in names}


def invoke(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_bases_go_and_the_rest_stays(store):
    before, moments = bases_of(store), tiny.contents(store / "moments")
    left = prep.remove(store, ["full", "identity"])
    assert left.bases.names == ["diagonal"]
    assert bases_of(store) == without(before, "full", "identity")
    assert tiny.contents(store / "moments") == moments
    assert verify(store).findings == []
    assert sorted(file.name for file in (store / "bases").iterdir()) == ["diagonal", "zarr.json"]
    prep.decompose(store, for_="whitened", rank=4, quiet=True)
    assert bases_of(store) == without(before, "identity")


def test_the_command_says_what_went_and_what_is_left(store):
    result = invoke("remove", "identity", "--store", store)
    assert result.stdout.splitlines() == [f"{store}: identity removed", "left: full, diagonal, and the moments"]
    result = invoke("remove", "full", "diagonal", "--moments", "--store", store)
    assert result.stdout.splitlines() == [f"{store}: full, diagonal, the moments removed", "left: no basis"]
    assert verify(store).findings == []
    assert {file.name for file in files(store)} == {"zarr.json"}
    assert "removed" not in open_store(store).attrs  # nothing of those moments is left


def test_what_is_not_there_is_refused_before_anything_goes(store):
    before = tiny.contents(store)
    with pytest.raises(StoreError, match=r"has no basis 'nope' \(it has: full, identity, diagonal\)"):
        prep.remove(store, ["full", "nope"], moments=True)
    with pytest.raises(PrepError, match=r"name bases \(full, identity, diagonal\) or give --moments"):
        prep.remove(store)
    with pytest.raises(PrepError, match="is a URL"):
        prep.remove("memory://s", "full")
    for name in ("../moments", ".full.new", "zarr.json", "a/b", ""):
        with pytest.raises(StoreError, match=f"has no basis {name!r}"):
            prep.remove(store, [name])
    with writer_lock(store), pytest.raises(StoreError, match="is being written by"):
        prep.remove(store, "full")
    assert tiny.contents(store) == before


def test_bases_outlive_their_moments_and_only_those_moments_come_back(made, store):
    before, bases, known = everything(store), bases_of(store), open_store(store)
    left = prep.remove(store, moments=True)
    assert (left.corpus, left.status, (store / "moments").exists()) == (None, "complete", False)
    assert bases_of(store) == bases
    assert verify(store).findings == []
    assert "moments  removed: only those of the same corpus can come back" in table(info(open_store(store)))
    with pytest.raises(StoreError, match="holds no moments"):
        prep.remove(store, moments=True)
    with pytest.raises(StoreError, match=r"holds no moments: .*run `prep covariance` first"):
        prep.decompose(store, for_="corda_ipm", quiet=True)
    with pytest.raises(PrepError, match=r"holds a run with other options .*corpus source"):
        prep.covariance(made.model, made.other, store=store, **tiny.RUN)
    batches = [torch.randint(3, 60, (2, 8))]
    with pytest.raises(PrepError, match=r"other options|bases of removed moments"):
        prep.covariance(tiny.llama(), batches=batches, store=store, quiet=True)
    again = prep.covariance(made.model, made.data, store=store, **tiny.RUN)
    assert again.id == known.id
    assert everything(store) == before


def test_own_batches_are_not_put_beside_bases_of_others(tmp_path):
    net, store = tiny.llama(), tmp_path / "s"
    prep.covariance(net, batches=[torch.randint(3, 60, (2, 8))], store=store, quiet=True)
    prep.decompose(store, model=net, rank=4, quiet=True)
    prep.remove(store, moments=True)
    before = tiny.contents(store)
    with pytest.raises(PrepError, match="holds bases of removed moments, and batches cannot be compared"):
        prep.covariance(net, batches=[torch.randint(3, 60, (2, 8))], store=store, quiet=True)
    assert tiny.contents(store) == before


def test_moments_of_no_basis_make_room_for_any_other(made, store):
    """Plain SVDs are of no moments."""
    prep.remove(store, ["full", "diagonal"], moments=True)
    assert "removed" not in open_store(store).attrs
    assert prep.covariance(made.model, made.other, store=store, **tiny.RUN).bases.names == ["identity"]
    assert verify(store).findings == []


def test_an_unfinished_basis_is_removed(store):
    document = store / "bases" / "full" / "zarr.json"
    head = json.loads(document.read_text())
    attrs = {**head["attributes"], "status": "incomplete", "layers": {}}
    document.write_text(json.dumps({**head, "attributes": sealed(attrs)}))
    assert prep.remove(store, "full").bases.names == ["identity", "diagonal"]
    assert verify(store).findings == []


def removal(path):
    prep.remove(path, "full", moments=True)


def finish(path):
    """The same command again, as far as it has something left to do."""
    for options in ({"names": "full"}, {"moments": True}):
        with contextlib.suppress(StoreError):
            prep.remove(path, **options)


@steps.SOME
def test_killed_at_every_step(made, tmp_path, by):
    """Bases and moments are there whole or not at all, and the same command again ends without them."""
    kept, work, seen = tmp_path / "kept", tmp_path / "s", []
    prep.covariance(made.model, made.data, store=kept, targets="down_proj", layers="0", **tiny.RUN)
    for method in ("whitened", "asvd"):
        prep.decompose(kept, for_=method, rank=4, quiet=True)
    bases, moments = bases_of(kept), tiny.contents(kept / "moments")

    def again():
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(kept, work)
        return (work,)

    for step in steps.every_step(removal, again, max(by, 2)):
        found = open_store(work)
        seen.append(("full" in found.bases, found.corpus is not None))
        assert bases_of(work) == (bases if seen[-1][0] else without(bases, "full")), step
        assert not seen[-1][1] or tiny.contents(work / "moments") == moments, step
        finish(work)
        assert verify(work).findings == [], step
        assert (bases_of(work), open_store(work).corpus) == (without(bases, "full"), None), step
    assert seen == sorted(seen, reverse=True) and set(seen) == {(True, True), (False, True), (False, False)}


# By hand


def cut(file):
    file.write_bytes(file.read_bytes()[:-9])


DAMAGES = {
    "the folder is gone": (lambda at: shutil.rmtree(at), "missing, its folder is gone"),
    "no metadata": (lambda at: (at / "zarr.json").unlink(), "damaged, its zarr.json cannot be read"),
    "broken metadata": (lambda at: (at / "zarr.json").write_text("{"), "damaged, its zarr.json cannot be read"),
    "a chunk is gone": (
        lambda at: (at / "48x32" / "UP" / "c" / "1" / "0" / "0").unlink(),
        "damaged, 1 of its files are missing or of another size",
    ),
    "a chunk is short": (
        lambda at: cut(at / "48x32" / "S" / "c" / "0" / "0"),
        "damaged, 1 of its files are missing or of another size",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_basis_damaged_by_hand_is_marked_and_made_anew(store, damage):
    bases, (do, problem) = bases_of(store), DAMAGES[damage]
    do(store / "bases" / "full")
    facts = json.loads(invoke("info", "--json", "--store", store).stdout)
    assert facts["bases"]["full"] == {"status": problem.split(",")[0], "problem": problem}
    assert facts["bases"]["identity"]["status"] == "complete"
    lines = invoke("info", "--store", store).stdout.splitlines()
    advice = f"make it anew with `prep decompose --store {store}`, or `prep remove full --store {store}`"
    assert f"damaged  basis full: it is {problem}; {advice}" in lines
    assert lines[-1].endswith('basis="identity")')
    rest = open_store(store).bases
    assert {name: rest[name].hash for name in ("identity", "diagonal")} == {
        name: bases[name][0] for name in ("identity", "diagonal")
    }
    said = invoke("decompose", "--rank", 4, "--store", store)
    assert f"basis 'full' is {problem}: made anew" in said.stderr, said.stderr
    assert bases_of(store) == bases
    assert verify(store).findings == []


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_basis_damaged_by_hand_is_removed(store, damage):
    bases = bases_of(store)
    DAMAGES[damage][0](store / "bases" / "full")
    prep.remove(store, "full")
    assert bases_of(store) == without(bases, "full")
    assert verify(store).findings == []


def test_a_damaged_basis_with_other_options_is_not_replaced_unasked(store):
    (store / "bases" / "full" / "48x32" / "UP" / "c" / "1" / "0" / "0").unlink()
    before = tiny.contents(store)
    with pytest.raises(StoreError, match=r"with other options \(.*damping"):
        prep.decompose(store, damping=0.1, quiet=True)
    assert tiny.contents(store) == before


def test_moments_damaged_by_hand_are_marked(store):
    shutil.rmtree(store / "moments" / "full-48")
    lines = invoke("info", "--store", store).stdout.splitlines()
    [line] = [line for line in lines if line.startswith("damaged")]
    assert line.startswith("damaged  the moments, 0 MB: 11 of their files are missing or of another size: restore")
    assert line.endswith(f"or `prep remove --moments --store {store}`")
    prep.remove(store, moments=True)
    assert open_store(store).bases.names == ["full", "identity", "diagonal"]
    assert verify(store).findings == []


def test_sizes_are_those_of_the_files(store):
    facts = info(open_store(store))
    assert facts["moments"]["bytes"] == sum(map(len, tiny.contents(store / "moments").values()))
    for name in ("full", "identity", "diagonal"):
        assert facts["bases"][name]["bytes"] == sum(map(len, tiny.contents(store / "bases" / name).values()))
    parts = [facts["moments"]["bytes"], *(basis["bytes"] for basis in facts["bases"].values())]
    assert 0 < facts["bytes"] - sum(parts) < 10_000  # the root's metadata and that of `bases`
