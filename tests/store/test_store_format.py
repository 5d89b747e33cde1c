"""docs/store-format.md is complete: a process without prep reads a store by that page, with zarr and NumPy."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

import prep
from prep.store import SiteData, create_store
from prep.store.format import schema
from prep.store.format.arrays import write_row
from prep.store.format.schema import panels

PAGE = Path(__file__).parents[2] / "docs" / "store-format.md"
LAYER = "model.layers.0.mlp.down_proj"
BASIS = "bases/identity"
ATTRS = {"id": "0" * 32, "model": {"id": "m"}, "corpus": {}, "options": {}, "status": "complete", "prep_version": "0"}


@pytest.fixture
def store(tmp_path):
    """A store with one site of width 700 (two panels) and a bfloat16 basis of its only layer, and what went into it."""
    rng = np.random.default_rng(0)
    X, W = rng.standard_normal((900, 700)), rng.standard_normal((40, 700))
    C = X.T @ X / len(X)
    root = create_store(tmp_path / "s.zarr", ATTRS).root
    members = {LAYER: {"shape": [40, 700], "weight_hash": "", "weight_dtype": "float32"}}
    blocks = [torch.from_numpy(C[a:b, :b]) for a, b in panels(700)]
    data = SiteData("full", members, len(X), torch.from_numpy(X.mean(0)), second_moment=blocks)
    tiny.write_moments(root, {LAYER: data})
    U, S, Vt = np.linalg.svd(W, full_matrices=False)
    writer = prep.store.BasisWriter.create(
        root,
        "identity",
        method={"metric": "identity", "rank": 40},
        dtype="bfloat16",
        model={"id": "m"},
        groups={(40, 700): {"layers": [LAYER], "rank": 40, "spectrum": 40}},
    )
    record = prep.store.LayerRecord((40, 700), 0, 40, 1.0, 0.0, 40, "svd", 1.0, "", "float32")
    writer.note(writer.put(LAYER, *map(torch.from_numpy, (U, S, Vt, S)), record))
    writer.finish()
    return tmp_path / "s.zarr", C, W


def run_without_prep(code: str, cwd: Path) -> str:
    guard = "import sys; sys.modules['prep'] = None\n"
    done = subprocess.run([sys.executable, "-c", guard + code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_of_the_page_reads_a_store(store):
    path, C, W = store
    example = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    decode = "W_r = (U.T * S) @ P"
    assert decode in example
    widen = "U, P = ((a.astype('uint32') << 16).view('float32').astype('float64') for a in (U, P))\n" + decode
    code = f"LAYER = {LAYER!r}\n" + example.replace('"prep.zarr"', repr(str(path))).replace(
        '"bases/full"', '"bases/identity"'
    )
    code = code.replace(decode, widen) + "np.save('C.npy', C); np.save('W_r.npy', W_r)"
    run_without_prep(code, path.parent)
    np.testing.assert_array_equal(np.load(path.parent / "C.npy"), np.tril(C) + np.tril(C, -1).T)
    error = np.linalg.norm(np.load(path.parent / "W_r.npy") - W) / np.linalg.norm(W)
    assert error < 2**-8


MATRIX = "moments/full-700/second_moment"  # two panels of 350 rows


def test_the_page_states_codecs_fill_values_index_and_triangle(store):
    path, C, _ = store
    meta = json.loads((path / MATRIX / "zarr.json").read_text())
    [codec] = meta["codecs"]
    plain = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    assert codec["name"] == "sharding_indexed" and codec["configuration"].pop("chunk_shape") == [1, 350, 350]
    assert codec["configuration"] == {"codecs": plain, "index_codecs": plain, "index_location": "start"}
    assert meta["fill_value"] == "NaN"
    raw, N, size = (path / MATRIX / "c" / "0" / "0" / "0").read_bytes(), 4, 8 * 350 * 350 + 4
    absent, first = [2**64 - 1] * 2, 16 * N + 4
    index = np.frombuffer(raw[: 16 * N], "<u8").reshape(N, 2).tolist()
    assert index == [[first, size], absent, [first + size, size], [first + 2 * size, size]]
    assert len(raw) == first + 3 * size
    last = np.frombuffer(raw[first + 2 * size :][: size - 4], "<f8").reshape(350, 350)
    np.testing.assert_array_equal(last, C[350:, 350:])
    bf16 = json.loads((path / "bases" / "identity" / "40x700" / "UP" / "zarr.json").read_text())
    assert bf16["data_type"] == "uint16"
    assert bf16["fill_value"] == 0x7FC0
    assert bf16["attributes"]["dtype"] == "bfloat16"


def test_plain_zarr_reads_a_symmetric_matrix_and_would_write_the_same_file(store, tmp_path):
    """Of more than three panels zarr writes the chunks in Morton's order: prep, which knows where its own are, has
    each panel's behind each other.
    """
    import zarr

    path, C, _ = store
    lower = np.tril(C) + np.tril(C, -1).T
    lower[:350, 350:] = np.nan
    np.testing.assert_array_equal(zarr.open_array(str(path / MATRIX), mode="r")[0], lower)
    plain = zarr.create_array(
        str(tmp_path / "plain"),
        shape=(1, 700, 700),
        chunks=(1, 350, 350),
        shards={"shape": (1, 700, 700), "index_location": "start"},
        dtype="float64",
        fill_value=np.nan,
        serializer=zarr.codecs.BytesCodec(endian="little"),
        compressors=zarr.codecs.Crc32cCodec(),
    )
    plain[0] = lower
    assert tiny.contents(tmp_path / "plain" / "c") == tiny.contents(path / MATRIX / "c")


@pytest.fixture
def stacked(tmp_path, monkeypatch):
    """Bases of five layers of one shape in chunks of two layers and of three ranks, in every dtype; what they hold."""
    monkeypatch.setattr(schema, "ROWS", 2)
    monkeypatch.setattr(schema, "SLAB", 3)
    path, draw = tmp_path / "stacked.zarr", torch.Generator().manual_seed(0)
    root = create_store(path, ATTRS | {"corpus": None, "options": None}).root
    layers, given = [f"layer{i}" for i in range(5)], {}
    for dtype in schema.DTYPES:
        group = {"layers": layers, "rank": 7, "spectrum": 8}
        writer = prep.store.BasisWriter.create(
            root,
            dtype,
            method={"metric": "identity", "rank": 7},
            dtype=dtype,
            model={"id": "m"},
            groups={(9, 8): group},
        )
        for i, layer in enumerate(layers):
            parts = [torch.randn(size, generator=draw, dtype=torch.float64) for size in ((9, 7), (7,), (7, 8), (8,))]
            record = prep.store.LayerRecord((9, 8), i, 7, 1.0, 0.0, 8, "svd", 1.0, "", "float32")
            writer.note(writer.put(layer, *parts, record))
            given[dtype, layer] = parts
        writer.finish()
    return path, layers, given


def test_plain_zarr_reads_the_arrays_and_would_write_the_same_files(stacked, tmp_path):
    import zarr

    path, layers, given = stacked
    for dtype in schema.DTYPES:
        for role, edges in {"UP": (1, 3, 17), "S": (2, 7), "spectrum": (2, 8)}.items():
            parts = [
                {"UP": torch.cat([U.T, P], 1), "S": S, "spectrum": spectrum}
                for U, S, P, spectrum in (given[dtype, layer] for layer in layers)
            ]
            values = torch.stack([one[role] for one in parts])
            kept = values if role in ("S", "spectrum") else values.to(schema.DTYPES[dtype])
            bits = kept.view(torch.uint16).numpy() if kept.dtype == torch.bfloat16 else kept.numpy()
            stored = zarr.open_array(str(path / "bases" / dtype / "9x8" / role), mode="r")
            assert stored.chunks == edges
            np.testing.assert_array_equal(stored[...], bits)
            plain = zarr.create_array(
                str(tmp_path / "plain"),
                shape=bits.shape,
                chunks=edges,
                shards={"shape": (1, 9, 17), "index_location": "start"} if role == "UP" else None,
                dtype=bits.dtype,
                fill_value=stored.fill_value,
                serializer=zarr.codecs.BytesCodec(endian="little"),
                compressors=zarr.codecs.Crc32cCodec(),
                overwrite=True,
            )
            plain[...] = bits
            assert tiny.contents(tmp_path / "plain" / "c") == tiny.contents(path / "bases" / dtype / "9x8" / role / "c")


@pytest.mark.parametrize("rank", [1, 3, 4, 7, 100, None])
def test_any_rank_is_a_slice(stacked, rank):
    path, layers, given = stacked
    for dtype in schema.DTYPES:
        slices = prep.open_store(path).bases[dtype].read(layers[3:0:-2], rank)
        assert list(slices) == ["layer3", "layer1"]
        for layer, one in slices.items():
            U, S, P, spectrum = given[dtype, layer]
            assert torch.equal(one.U, U[:, :rank].to(schema.DTYPES[dtype]))
            assert torch.equal(one.P, P[:rank].to(schema.DTYPES[dtype]))
            assert torch.equal(one.S, S[:rank]) and torch.equal(one.spectrum, spectrum)


def test_all_spectra_are_read_at_once(stacked):
    path, layers, given = stacked
    found = dict(prep.open_store(path).bases["float32"].spectra())
    assert list(found) == layers
    assert all(torch.equal(found[layer], given["float32", layer][3]) for layer in layers)


def test_mean_squares_are_read_from_the_chunks_on_the_diagonal(store):
    path, C, _ = store
    file = path / MATRIX / "c" / "0" / "0" / "0"
    raw = file.read_bytes()
    middle = len(raw) // 2  # of chunk (1, 0)
    file.write_bytes(raw[:middle] + bytes(8) + raw[middle + 8 :])
    moment = prep.open_store(path).moments[LAYER]
    np.testing.assert_array_equal(moment.squares().numpy(), C.diagonal())
    with pytest.raises(prep.StoreError, match=r"second_moment \(chunk 1 of c/0/0/0\) does not match its checksum"):
        _ = moment.diagonal


def test_a_region_is_written_in_whole_files(stacked):
    root = prep.open_store(stacked[0], "r+").root
    layout = schema.Layout((5, 7), (2, 7), ("float64",))
    array = schema.open_array(root, "bases/float64/9x8/S", layout)
    before = schema.read(array)
    for region, values in [
        ((slice(1, 3),), torch.zeros(2, 7)),
        ((slice(0, 1),), torch.zeros(1, 7)),
        ((slice(0, 2),), torch.zeros(1, 7)),
        ((slice(0, 2), slice(0, 3)), torch.zeros(2, 3)),
    ]:
        with pytest.raises(ValueError, match="are not the whole files of"):
            schema.write(array, region, values)
    assert torch.equal(schema.read(array), before)
    schema.write(array, (slice(4, 5),), torch.ones(1, 7))
    assert torch.equal(schema.read(array, (slice(3, 5),)), torch.stack([before[3], torch.ones(7, dtype=torch.float64)]))


def test_a_matrix_is_written_panel_by_panel(tmp_path):
    """It is there when the last one is, and never in memory whole."""
    root = create_store(tmp_path / "s", ATTRS | {"corpus": None, "options": None}).root
    C = torch.randn(1100, 1100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    layout = schema.Layout((2, 1100, 1100), (1, 275, 275), ("float64",), lower=True, sharded=True)
    array = schema.create_array(root, "C", layout)
    panels_of, file = [(slice(a, b), slice(0, b)) for a, b in panels(1100)], tmp_path / "s/C/c/1/0/0"
    broken = write_row(array, 1, (C[region] for region in panels_of))
    next(broken)
    assert [path.name for path in file.parent.iterdir()] == ["0.partial"]
    broken.close()
    assert list(file.parent.iterdir()) == []
    assert len(list(write_row(array, 1, (C[region] for region in panels_of)))) == 4
    assert file.stat().st_size == layout.file_bytes("float64")
    for rows, columns in panels_of:
        assert torch.equal(schema.read(array, (slice(1, 2), rows, columns))[0], C[rows, columns])
    with pytest.raises(prep.StoreError, match=r"C \(file c/0/0/0\) is missing"):
        schema.read(array, (slice(0, 1), slice(0, 275), slice(0, 275)))


def test_every_attribute_that_is_written_is_described(store):
    path, _, _ = store
    page = PAGE.read_text()
    found = [json.loads((path / name / "zarr.json").read_text())["attributes"] for name in ("", "moments", BASIS)]
    records = found[1]["records"][LAYER], found[2]["layers"][LAYER]
    for name in {name for attrs in (*found, *records) for name in attrs}:
        assert f"`{name}`" in page, name


def test_consolidated_metadata_is_not_needed_and_does_no_harm(store):
    import zarr

    path, C, _ = store
    before = prep.open_store(path).moments[LAYER].second_moment
    zarr.consolidate_metadata(str(path), zarr_format=3)
    after = prep.open_store(path).moments[LAYER].second_moment
    assert torch.equal(before, after)
    assert torch.equal(after, torch.from_numpy(np.tril(C) + np.tril(C, -1).T))
