"""Damage: whatever happens to one file of a store, nothing else is read from it in silence; `verify` names it."""

import json
import random
import shutil
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import zarr
from safetensors.torch import load_file, save_file
from stores import everything, files, flip, place

import prep
from prep import StoreError
from prep.adapters.peft.eva import components
from prep.preprocess.verify import verify
from prep.store import BasisWriter, LayerRecord, create_store, open_store
from prep.store.format import schema
from prep.store.format.schema import content_hash, put_attributes, sealed
from prep.store.moment_writer import seal_sites

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model and two stores of it: full moments with two bases, and output moments."""
    made = tiny.sources(tmp_path_factory.mktemp("made"))
    prep.covariance(made.model, made.data, store=made.path / "full", keep_tokens=12, **tiny.RUN)
    prep.decompose(made.path / "full", rank=4, quiet=True)
    prep.decompose(made.path / "full", for_="antipasto", rank=4, dtype="bfloat16", quiet=True)
    options = {"moment": "output", "moment_dtype": "float32", **tiny.RUN}
    prep.covariance(made.model, made.data, store=made.path / "output", **options)
    return made


@pytest.fixture
def store(made, tmp_path):
    return shutil.copytree(made.path / "full", tmp_path / "s.zarr")


def owner(path, file):
    """The array or group that a file belongs to, by name."""
    return file.relative_to(path).as_posix().split("/c/")[0].removesuffix("zarr.json").rstrip("/")


def meaning(raw):
    """A zarr.json as a reader takes it, or None; `run` tells of the machine and is not sealed."""
    try:
        document = json.loads(raw)
        document["attributes"].pop("run", None)
        return document
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


DAMAGE = {
    "flipped": lambda raw, draw: flip(raw, draw.randrange(len(raw)), 1 << draw.randrange(8)),
    "deleted": lambda raw, draw: None,
    "truncated": lambda raw, draw: raw[: draw.randrange(len(raw))],
}


def injure(path, whole, kind, seed):
    """Damage one file of `path`, look at the store by reading and by verifying, and restore the file."""
    draw = random.Random(seed)
    file = draw.choice(files(path))
    raw = file.read_bytes()
    bad = DAMAGE[kind](raw, draw)
    file.unlink() if bad is None else file.write_bytes(bad)
    harmless = bad is not None and file.name == "zarr.json" and meaning(bad) == meaning(raw) is not None
    what = f"{kind}, seed {seed}: {file.relative_to(path)}"
    try:
        assert everything(path) == whole, what
        said = None
    except StoreError as error:
        said = str(error)
    assert said is None or len(said.splitlines()) == 1, what
    try:
        findings = [f"{finding.where} {finding.problem}" for finding in verify(path).findings]
    except StoreError as error:  # the root itself
        findings = [str(error)]
        assert not owner(path, file), what
    assert harmless or any(name_of(owner(path, file)) in finding for finding in findings), f"{what}: {findings}"
    assert not harmless or (said is None and not findings), f"{what}: {findings}"
    if file.name != "zarr.json":
        assert said is not None, what
    file.write_bytes(raw)


def name_of(path):
    """How messages name a group or array."""
    head = path.split("/")
    if len(head) == 2:  # a site or a basis
        return head[1]
    return path if path in ("", "moments", "bases") or head[0] == "moments" else "/".join(head[2:])


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_never_silent(store, kind):
    whole = everything(store)
    for seed in range(12):
        injure(store, whole, kind, seed)


@pytest.mark.stress
@pytest.mark.parametrize("source", ["full", "output"])
@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_at_500_places_is_never_silent(made, tmp_path, kind, source):
    path = shutil.copytree(made.path / source, tmp_path / "s")
    whole = everything(path)
    for seed in range(500):
        injure(path, whole, kind, seed)


def test_a_whole_store_verifies(made):
    for name, bases in (("full", 2), ("output", 0)):
        report = verify(made.path / name, model=made.model)
        assert report.findings == []
        assert (report.sites, report.bases) == (8, bases)
        assert report.weights == 14 * (1 + bases)
        summary = report.to_dict()
        assert summary["whole"] is True
        assert json.loads(json.dumps(summary)) == summary
    held = sum(file.stat().st_size for file in files(made.path / "output") if "/c/" in file.as_posix())
    chunks = [file for file in files(made.path / "output") if "/c/" in file.as_posix()]
    matrices = [file for file in chunks if file.parent.parent.parent.name == "c"]  # one chunk behind an index
    assert len(matrices) == 2 * 14
    assert report.bytes == held - 4 * len(chunks) - (16 + 4) * len(matrices)


def test_verify_goes_on_after_a_finding(store):
    for array in (place(store, UP, "mean")[0], "bases/full/32x48/S"):
        chunk = next(file for file in files(store / array) if file.name != "zarr.json")
        chunk.write_bytes(flip(chunk.read_bytes(), 5, 1))
    where = [finding.where for finding in verify(store).findings]
    # the sites of one width have their means in one chunk, and the layers of one shape their S
    moments = open_store(store).moments
    sites = [f"moments/{site}/mean" for site, layers in moments.sites.items() if moments[layers[0]].shape[1] == 32]
    layers = [f"bases/full: model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    assert where == [*sites, *layers]


def _site(store, layer):
    return open_store(store).moments[layer].site


def test_what_does_not_belong_is_found(store):
    zarr.open_group(str(store), mode="r+", zarr_format=3).create_array("moments/extra", shape=(3,), dtype="float32")
    (store / "bases" / "full" / "notes.txt").write_text("x")
    places = {finding.where for finding in verify(store).findings}
    assert places == {"moments/extra/zarr.json", "bases/full/notes.txt"}


def test_other_weights_are_found(made, store, tmp_path):
    other = shutil.copytree(made.model, tmp_path / "model")
    weights = load_file(other / "model.safetensors")
    weights[f"{DOWN}.weight"][0, 0] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    findings = verify(store, model=str(other)).findings
    assert {finding.where for finding in findings} == {DOWN}
    assert all("not the one that the store was made from" in finding.problem for finding in findings)


# A writer that was wrong: checksums and hashes fit, mathematics does not


def rewritten(store, layer, name, change):
    """Replace an array's values and make all hashes fit again."""
    root = open_store(store, "r+").root
    (path, row), site = place(store, layer, name), _site(store, layer)
    where = ... if row is None else row
    values = change(np.asarray(root[path][where]))
    root[path][where] = values
    attrs = dict(root["moments"].attrs)
    record = attrs["records"][site]
    record["arrays"] |= {name: content_hash([values])}
    record["hash"] = content_hash(f"{key} {record['arrays'][key]}" for key in sorted(record["arrays"]))
    put_attributes(root["moments"], attrs)
    put_attributes(root, {**root.attrs, "moments": seal_sites(root)})


def test_an_indefinite_moment_is_found(store):
    site = _site(store, DOWN)
    rewritten(store, DOWN, "second_moment", lambda C: C - 2 * np.linalg.eigvalsh(C)[-1] * np.eye(len(C)))
    [finding] = verify(store).findings
    assert finding.where == f"moments/{site}/second_moment"
    assert "not positive semi-definite" in finding.problem


@pytest.mark.parametrize(("factor", "name"), [(-1, "half/second_moment"), (5, "half/second_moment")])
def test_a_half_that_is_no_part_of_the_tokens_is_found(store, factor, name):
    """Indefinite itself, or such that nothing positive is left for the other tokens."""
    site = _site(store, DOWN)
    assert open_store(store).moments[DOWN].half is not None
    rewritten(store, DOWN, name, lambda C: factor * C)
    [finding] = verify(store).findings
    assert finding.where == f"moments/{site}/{name}" and "not positive semi-definite" in finding.problem


@pytest.mark.parametrize(
    "change", [lambda u: u[::-1].copy(), lambda u: u + 1, lambda u: u - 1], ids=["fall", "+1", "-1"]
)
def test_priorities_that_are_not_those_of_a_sample_are_found(store, change):
    site = _site(store, DOWN)
    rewritten(store, DOWN, "priorities", change)
    [finding] = verify(store).findings
    assert finding.where == f"moments/{site}/priorities" and "they do not rise from 0 to 1" in finding.problem


def test_a_mean_of_another_sample_is_found(store):
    rewritten(store, DOWN, "mean", lambda mean: 100 * mean + 1)
    [finding] = verify(store).findings
    assert "C - E[x] E[x]^T is not positive semi-definite" in finding.problem


@pytest.mark.parametrize("wrong", ["U", "P"])
def test_a_basis_that_is_none_is_found(made, store, wrong):
    layer = "model.layers.0.mlp.down_proj"
    basis = open_store(store).bases["full"]
    one = basis[layer]
    root = open_store(store, "r+").root
    writer = BasisWriter.resume(root, "full")
    U = one.U * 1.01 if wrong == "U" else one.U
    P = one.P * 1.01 if wrong == "P" else one.P
    shares = {role: basis.shares(role)[layer] for role in writer.shares}
    writer.note(writer.put(layer, U, one.S, P, one.spectrum, LayerRecord(**{**asdict(one.record), "hash": ""}), shares))
    writer.finish()
    [finding] = verify(store, model=made.model).findings[:1]
    assert finding.where == f"bases/full: {layer}"
    assert ("U is not orthonormal" if wrong == "U" else "U^T W = diag(S) P does not hold") in finding.problem


# A writer that was interrupted: a layer counts as done when all that its record speaks of is there


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """A writer of five layers of one shape in chunks of two, their bases, and how to write one of them."""
    monkeypatch.setattr(schema, "ROWS", 2)
    monkeypatch.setattr(schema, "SLAB", 2)
    attrs = {"id": "0" * 32, "model": {"id": "m"}, "corpus": None, "options": None, "status": "complete"}
    path, draw = tmp_path / "begun.zarr", np.random.default_rng(0)
    layers = [f"layer{i}" for i in range(5)]
    parts = {layer: np.linalg.svd(draw.standard_normal((7, 6)), full_matrices=False) for layer in layers}

    def write(writer, layer):
        U, S, Vt = (torch.from_numpy(part) for part in parts[layer])
        record = LayerRecord((7, 6), layers.index(layer), 5, 1.0, 0.0, 6, "svd", 1.0, "", "float64")
        writer.note(writer.put(layer, U[:, :5], S[:5], Vt[:5], S, record))

    writer = BasisWriter.create(
        create_store(path, attrs).root,
        "b",
        method={"metric": "identity", "rank": 5},
        dtype="float64",
        model={},
        groups={(7, 6): {"layers": layers, "rank": 5, "spectrum": 6}},
    )
    return SimpleNamespace(path=path, layers=layers, parts=parts, write=write, writer=writer)


def assert_holds(begun, layers):
    """Exactly `layers` count as done, and can be read although others of their chunks are missing."""
    basis = open_store(begun.path).bases.open("b")
    assert sorted(basis.layers) == sorted(layers)
    for layer, one in basis.read().items():
        U, S, Vt = begun.parts[layer]
        for got, wanted in ((one.U, U[:, :5]), (one.S, S[:5]), (one.P, Vt[:5]), (one.spectrum, S)):
            np.testing.assert_array_equal(got, wanted)


def resumed(begun):
    return BasisWriter.resume(open_store(begun.path, "r+").root, "b")


def test_what_was_flushed_is_kept_and_the_rest_forgotten(begun):
    begun.write(begun.writer, "layer3")
    begun.write(begun.writer, "layer0")
    begun.writer.flush()
    begun.write(begun.writer, "layer1")  # shares a chunk of S with layer0, and is lost with the process
    assert_holds(begun, ["layer0", "layer3"])
    again = resumed(begun)
    begun.write(again, "layer2")  # shares one with layer3
    again.flush()
    assert_holds(begun, ["layer0", "layer2", "layer3"])
    again = resumed(begun)
    for layer in ("layer4", "layer1"):
        begun.write(again, layer)
    again.finish()
    assert_holds(begun, begun.layers)
    assert verify(begun.path).findings == []


@pytest.mark.parametrize("step", range(1, 6))
def test_a_flush_that_fails_leaves_what_counted_before(begun, monkeypatch, step):
    begun.write(begun.writer, "layer0")
    begun.writer.flush()
    for layer in ("layer1", "layer4"):
        begun.write(begun.writer, layer)
    calls = []
    for name in ("write", "put_attributes"):
        real = getattr(schema, name)

        def breaks(*arguments, real=real):
            calls.append(1)
            if len(calls) == step:
                raise OSError("gone")
            return real(*arguments)

        monkeypatch.setattr(schema, name, breaks)
    with pytest.raises(OSError, match="gone"):  # two chunks of S, two of the spectrum, and the attributes
        begun.writer.flush()
    monkeypatch.undo()
    monkeypatch.setattr(schema, "ROWS", 2)
    monkeypatch.setattr(schema, "SLAB", 2)
    assert_holds(begun, ["layer0"])
    begun.writer.flush()
    assert_holds(begun, ["layer0", "layer1", "layer4"])


def test_a_row_that_nobody_wrote_is_no_basis(begun):
    """A record that came before its S: the chunk is whole, and holds the fill value."""
    for layer in ("layer0", "layer1"):
        begun.write(begun.writer, layer)
    begun.writer.flush()
    S = zarr.open_array(str(begun.path / "bases" / "b" / "7x6" / "S"), mode="r+")
    S[1] = np.nan
    basis = open_store(begun.path).bases.open("b")
    np.testing.assert_array_equal(basis["layer0"].S, begun.parts["layer0"][1][:5])
    with pytest.raises(StoreError, match="7x6/S has a chunk that is missing or not finite"):
        _ = basis["layer1"]


def test_a_damaged_row_is_found_when_its_basis_is_resumed(begun):
    begun.write(begun.writer, "layer0")
    begun.writer.flush()
    chunk = begun.path / "bases" / "b" / "7x6" / "S" / "c" / "0" / "0"
    chunk.write_bytes(flip(chunk.read_bytes(), 3, 1))
    with pytest.raises(StoreError, match=r"7x6/S \(chunk c/0/0\) does not match its checksum"):
        resumed(begun)


def test_an_edited_attribute_is_refused_until_it_is_sealed(store):
    head = json.loads((store / "moments" / "zarr.json").read_text())
    head["attributes"]["records"][_site(store, DOWN)]["count"] += 1
    (store / "moments" / "zarr.json").write_text(json.dumps(head))
    with pytest.raises(StoreError, match="/moments has attributes that do not match their hash"):
        _ = open_store(store).moments[DOWN]
    head["attributes"] = sealed(head["attributes"])
    (store / "moments" / "zarr.json").write_text(json.dumps(head))
    assert open_store(store).moments[DOWN].count == 8 * 16 + 1


def test_the_seal_is_that_of_the_format_page(store):
    """In the words of docs/store-format.md, with nothing of the package."""
    import xxhash

    for group in (store, store / "moments", store / "bases" / "full"):
        attrs = json.loads((group / "zarr.json").read_text())["attributes"]
        seal = attrs.pop("attrs_hash")
        attrs.pop("run", None)
        text = json.dumps(attrs, sort_keys=True, separators=(",", ":"))
        assert seal == xxhash.xxh3_128_hexdigest(text.encode())


def test_infinite_values_are_refused(store):
    rewritten(store, DOWN, "mean", lambda mean: np.where(np.arange(len(mean)) == 1, np.inf, mean))
    with pytest.raises(StoreError, match="mean has a chunk that is missing or not finite"):
        _ = open_store(store).moments[DOWN].mean
    assert torch.isfinite(open_store(store).moments[DOWN].second_moment).all()


def test_a_basis_of_components_of_a_low_rank_input_is_whole(made, tmp_path):
    """EVA's S are standard deviations of the input: fewer tokens than channels end them in zeros, and that is right."""
    run = {**tiny.RUN, "num_sequences": 1, "seq_len": 6, "batch_size": 1}
    prep.covariance(made.model, made.data, store=tmp_path / "s", **run)
    basis = prep.decompose(tmp_path / "s", for_="eva", rank=24, quiet=True)
    assert min(float(one.S.min()) for one in basis.read().values()) == 0
    assert verify(tmp_path / "s", model=made.model).findings == []


def test_components_that_do_not_vary_are_not_whitened(tmp_path):
    """Inputs of three directions: whitening would divide by the deviation of the others, which is zero."""
    X = torch.zeros(20, 8)
    X[:, :3] = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    model = torch.nn.Sequential(torch.nn.Linear(8, 10))
    prep.covariance(model, batches=[X], store=tmp_path / "s", quiet=True)
    prep.decompose(tmp_path / "s", for_="eva", model=model, rank=8, quiet=True)
    store = open_store(tmp_path / "s")
    with pytest.raises(prep.PrepError, match="the input of 0 varies in fewer than 8 directions"):
        components(store, store.bases["eva"], {"0": 8}, 1.0, whiten=True)
    assert torch.isfinite(components(store, store.bases["eva"], {"0": 3}, 1.0, whiten=True)["0"]).all()


@pytest.mark.parametrize("seed", [4, 10, 11])
def test_a_channel_that_never_changes_is_whole(tmp_path, seed):
    """Its square is a float32 sum of equal terms, the worst case of rounding, and nearly all of the trace."""
    draw = np.random.default_rng(seed)
    X = torch.tensor(draw.standard_normal((2048, 64)) * 1e-3, dtype=torch.float32)
    X[:, 5] = float(draw.uniform(50, 100))
    model = torch.nn.Sequential(torch.nn.Linear(64, 4))
    prep.covariance(model, batches=[X], store=tmp_path / "s", quiet=True)
    assert verify(tmp_path / "s").findings == []
