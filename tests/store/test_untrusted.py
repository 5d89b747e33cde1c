"""Stores of strangers: whatever the metadata says, reading ends in a StoreError, soon and in little memory."""

import contextlib
import copy
import json
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import tiny
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stores import GIGABYTE, bounded, everything

import prep
from prep import PrepError, StoreError
from prep.preprocess.verify import verify
from prep.store import open_store
from prep.store.format.documents import array_document
from prep.store.format.layout import Layout
from prep.store.format.schema import panel_edge, sealed
from prep.store.info import info, table
from prep.store.pool import pool
from prep.store.transfer import pull

SITE = "model.layers.1.mlp.down_proj"
GROUP = "moments/full-48"  # which holds it alone


def documents(path):
    return {file: json.loads(file.read_text()) for file in sorted(Path(path).rglob("zarr.json"))}


def write(file, document):
    """Write a document whose attributes, if it is a group's, are sealed: a stranger can do that too."""
    if isinstance(document, dict) and document.get("node_type") == "group":
        with contextlib.suppress(TypeError, AttributeError):
            document = {**document, "attributes": sealed(document.get("attributes", {}))}
    file.write_text(json.dumps(document))


def edit(path, name, change):
    file = Path(path, name, "zarr.json")
    document = json.loads(file.read_text())
    change(document)
    write(file, document)


def look(path):
    """Read, describe and verify all of a store."""
    whole = open_store(path)
    table(info(whole))
    everything(path)
    return verify(path)


def uses(path):
    """All that one can do with a store of somebody else, each as a function of no arguments."""
    model, place = tiny.llama(), Path(path).parent

    def attach():
        adapter = prep.attach(model, path, verify=False)
        prep.detach(model)
        return adapter

    def export(form):
        prep.export(path, form, place / form, overwrite=True, rank=2, basis="full" if form == "peft-lora" else None)

    return {
        "open": lambda: repr(open_store(path)),
        "info": lambda: table(info(open_store(path))),
        "read": lambda: everything(path),
        "verify": lambda: verify(path),
        "attach": attach,
        "ranks": lambda: prep.ranks(path, "90%"),
        "bases": lambda: [prep.export(path, "safetensors", place / "bases", overwrite=True), export("peft-lora")],
        "covariances": lambda: export("peft-corda-covariance"),
        "pool": lambda: pool([path, path], store=place / "pool", overwrite=True),
        "pull": lambda: pull(path, place / "pulled", overwrite=True),
        "decompose": lambda: prep.decompose(path, metric="diagonal", model=model, rank=2, quiet=True, overwrite=True),
    }


def works_or_refuses(name, action):
    """Whether it ends with a result; if not, then in one line of the package's own error."""
    try:
        with bounded():
            action()
        return True
    except PrepError as error:
        said = str(error)
        assert len(said.splitlines()) == 1, (name, said)
        assert "memory" not in said and "allocate" not in said, (name, said)
        return False


def refused(path, match):
    with bounded(), pytest.raises(StoreError, match=match) as caught:
        everything(path)
    said = str(caught.value)
    assert len(said.splitlines()) == 1
    assert "memory" not in said and "allocate" not in said


def test_what_is_read_is_whole(store):
    assert look(store).findings == []


# Sizes


def claim(path, d):
    """The store says that its sites are d wide, everywhere and with a seal."""

    def members(document):
        for member in document["attributes"]["records"][SITE]["members"].values():
            member["shape"][1] = d
        document["attributes"]["groups"][f"full-{d}"] = document["attributes"]["groups"].pop("full-48")

    edit(path, "moments", members)
    (path / GROUP).rename(path / "moments" / f"full-{d}")
    edge = panel_edge(d)
    for name, layout in {
        "second_moment": Layout((1, d, d), (1, edge, edge), ("float64",), lower=True, sharded=True),
        "mean": Layout((1, d), (1, d), ("float64",)),
    }.items():
        edit(path, f"moments/full-{d}/{name}", lambda doc, one=layout: doc.update(array_document(one, "float64")))


def second_moment(path):
    with bounded():
        return open_store(path).moments[SITE].second_moment


ABSENT = r"\(file c/0/0/0\) does not hold"


@pytest.mark.parametrize(("d", "message"), [(1_200_000, "claims 11,520 GB"), (100_000, ABSENT), (20_000, ABSENT)])
def test_an_array_that_is_not_there_is_refused_before_memory_is_set_aside(store, d, message):
    claim(store, d)
    with pytest.raises(StoreError, match=message):
        second_moment(store)


def test_a_chunk_file_larger_than_a_chunk_is_not_read(store):
    with (store / GROUP / "mean" / "c" / "0" / "0").open("r+b") as file:
        file.truncate(50 * GIGABYTE)  # sparse
    with bounded(), pytest.raises(StoreError, match=r"mean \(chunk c/0/0\) does not hold 388 bytes"):
        _ = open_store(store).moments[SITE].mean


@pytest.mark.parametrize("array", [f"{GROUP}/second_moment", "bases/full/32x48/UP"])
@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda raw, n: indexed(raw, n, lambda index: index[::-1]), "index"),
        (lambda raw, n: indexed(raw, n, lambda index: index + 2**40), "index"),
        (lambda raw, n: bytes([raw[0] ^ 1]) + raw[1:], "index"),
        (lambda raw, n: raw + b"x", "file"),
        (lambda raw, n: raw[: 16 * n], "file"),
        (lambda raw, n: b"", "file"),
    ],
)
def test_an_index_is_compared_and_never_followed(store, array, harm, said):
    file = store / array / "c" / "0" / "0" / "0"
    n = 1 if array.startswith("moments") else 2
    file.write_bytes(harm(file.read_bytes(), n))
    refused(store, rf"{array} \({said} (of )?c/0/0/0\) (is not that of its chunks|does not hold)")
    assert verify(store).findings


def indexed(raw, n, change):
    """A file with another index, which has the right checksum."""
    index = change(np.frombuffer(raw[: 16 * n], "<u8")).tobytes()
    return index + google_crc32c.value(index).to_bytes(4, "little") + raw[16 * n + 4 :]


def test_a_document_of_a_gigabyte_is_not_read(store):
    for name in ("", "moments", f"{GROUP}/mean"):
        file = store / name / "zarr.json"
        kept = file.read_bytes()
        with file.open("r+b") as opened:
            opened.truncate(4 * GIGABYTE)
        with bounded(), pytest.raises(StoreError):
            everything(store)
        file.write_bytes(kept)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "1" * 10_000, "NaN", "null", "[]", '"x"', ""])
def test_documents_that_are_no_metadata(store, text):
    for name in ("", "moments", f"{GROUP}/mean", f"{GROUP}/second_moment", "bases/full", "bases/full/32x48/UP"):
        file = store / name / "zarr.json"
        kept = file.read_bytes()
        file.write_text(text)
        refused(store, "damaged|cannot be opened")
        file.write_bytes(kept)


@pytest.mark.parametrize(
    "half", [{"count": 0, "share": 0.5}, {"count": 10**6, "share": 0.5}, {"count": 4, "share": 1.0}, {"count": 4}]
)
def test_halves_that_cannot_be(store, half):
    edit(store, "moments", lambda document: document["attributes"]["records"][SITE].update(half=half))
    refused(store, "damaged")


@pytest.mark.parametrize("sample", [0, -1, 11, 13, 10**6, 2**60, 1.5, None, [12], True])
def test_samples_that_cannot_be(store, sample):
    assert open_store(store).moments[SITE].sampled == 12
    edit(store, "moments", lambda document: document["attributes"]["records"][SITE].update(sample=sample))
    refused(store, "damaged")


@pytest.mark.parametrize(
    "change",
    [{"ranks": [4, 4]}, {"ranks": []}, {"excess": []}, {"unseen": [-1.0]}, {"least": [float("inf")]}, {"least": ["x"]}],
)
def test_notes_on_excess_that_cannot_be(store, change):
    record = {"ranks": [4], "unseen": [0.5], "excess": [0.1], "least": [0.4]}

    def noted(document):
        assert document["attributes"]["layers"][SITE]["crossed"].keys() == record.keys()
        document["attributes"]["layers"][SITE]["crossed"] = record | change

    edit(store, "bases/full", noted)
    refused(store, "damaged")


# Codecs, grids, dtypes: nothing of a foreign document reaches the decoder

GZIP = {"name": "gzip", "configuration": {"level": 1}}
BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
SHARDING = {
    "name": "sharding_indexed",
    "configuration": {"chunk_shape": [48], "codecs": [BYTES], "index_codecs": [BYTES], "index_location": "end"},
}
FOREIGN = {
    "gzip": {"codecs": [BYTES, GZIP]},
    "zstd": {"codecs": [BYTES, {"name": "zstd", "configuration": {"level": 0, "checksum": False}}, {"name": "crc32c"}]},
    "numcodecs": {"codecs": [BYTES, {"name": "numcodecs.lzma", "configuration": {}}]},
    "pickle": {"codecs": [{"name": "numcodecs.pickle", "configuration": {}}]},
    "sharding": {"codecs": [SHARDING]},
    "no checksum": {"codecs": [BYTES]},
    "big endian": {"codecs": [{"name": "bytes", "configuration": {"endian": "big"}}, {"name": "crc32c"}]},
    "object dtype": {"data_type": "object"},
    "string dtype": {"data_type": "string"},
    "other dtype": {"data_type": "int64"},
    "zero fill": {"fill_value": 0.0},
    "no fill": {"fill_value": None},
    "small chunks": {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1]}}},
    "zero chunks": {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [0]}}},
    "rectilinear": {"chunk_grid": {"name": "rectilinear", "configuration": {"chunk_shapes": [[48]]}}},
    "key encoding": {"chunk_key_encoding": {"name": "v2", "configuration": {"separator": "/"}}},
    "upward key": {"chunk_key_encoding": {"name": "default", "configuration": {"separator": "/../"}}},
    "transformer": {"storage_transformers": [{"name": "x", "configuration": {}}]},
    "extra field": {"x": {"must_understand": True}},
    "attributes": {"attributes": {"dtype": "float64", "x": 1}},
    "dtype attribute": {"attributes": {"dtype": ["float64"]}},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_encodings_are_refused(store, name):
    edit(store, f"{GROUP}/mean", lambda document: document.update(copy.deepcopy(FOREIGN[name])))
    refused(store, f"{GROUP}/mean has (an unexpected|the dtype)")
    assert f"moments/{SITE}/mean" in {finding.where for finding in verify(store).findings}


def test_equal_spellings_are_accepted(store):
    crc = {"name": "crc32c", "configuration": {}}
    edit(store, f"{GROUP}/mean", lambda doc: doc.update(codecs=[BYTES, crc], dimension_names=None))
    assert look(store).findings == []


# Types

BASIS, MOMENTS, RECORD, OF = "bases/full", "moments", f"layers/{SITE}", f"records/{SITE}"
WRONG = [
    *[("", key, value) for key in ("model", "corpus", "options", "bases", "run", "moments") for value in (7, "x", [7])],
    *[("", "corpus/tokens", value) for value in ("x", None, {}, 10**400)],
    *[("", f"model/{key}", {}) for key in ("id", "class", "dtype", "revision")],
    ("", "id", {}),
    ("", "status", "perhaps"),
    ("", "format_version", True),
    ("", "checkpoint", [1]),
    ("", "corpus", {"parts": 7}),
    ("", "corpus", {"parts": [{"weight": "x", "corpus": {}}], "tokens": 1}),
    ("", "corpus", {"parts": [{"weight": 1, "corpus": {"parts": [7]}}], "tokens": 1}),
    *[(MOMENTS, f"sites/{SITE}", value) for value in ({}, [], 7, "x", None, [SITE, "y"])],
    *[
        (MOMENTS, key, value)
        for key in ("sites", "skipped", "hashes", "groups", "records")
        for value in (7, [7], {"x": 7}, "x")
    ],
    (MOMENTS, "skipped", {"x": "two\nlines"}),
    *[(MOMENTS, "layout", value) for value in (1, 3, "2", None, True)],
    *[(MOMENTS, "groups/full-48", value) for value in (7, {}, [], [SITE, SITE], [7], ["x"], ["x", SITE])],
    *[(MOMENTS, f"{OF}/{key}", value) for key in ("kind", "members", "arrays", "hash") for value in (7, {}, [])],
    *[(MOMENTS, f"{OF}/count", value) for value in ("7", -1, 2.5, 10**30)],
    *[(MOMENTS, f"{OF}/members/{SITE}", value) for value in (7, {}, {"shape": 7}, {"shape": [32, 48]})],
    *[(MOMENTS, f"{OF}/members/{SITE}/{key}", 7) for key in ("shape", "weight_hash", "weight_dtype")],
    *[(BASIS, "layout", value) for value in (1, 3, "2", None, True)],
    *[(BASIS, f"method/{key}", value) for key in ("metric", "rank", "power", "select") for value in ("x", {}, None)],
    *[(BASIS, f"method/{key}", {}) for key in ("damping", "epsilon", "center", "solver")],
    (BASIS, "method/rank", 10**400),
    (BASIS, "method/metric", "full --for $(touch x)\n"),
    *[(BASIS, key, value) for key in ("method", "dtype", "groups", "layers", "hash") for value in (7, {}, [])],
    *[(BASIS, "model", value) for value in (7, [], {"id": {}})],
    *[(BASIS, "groups/32x48", value) for value in (7, {}, {"layers": 7, "rank": 4, "spectrum": 32})],
    *[(BASIS, "groups/32x48/shares", value) for value in (7, "kept", {}, ["unseen"], ["kept", "kept"], ["U"], [])],
    *[(BASIS, f"{RECORD}/shares", value) for value in (7, None, "", "0" * 8, "0" * 16, "g" * 16)],
    (BASIS, "groups", {f"{2**40}x{2**40}": {"layers": [SITE], "rank": 2**40, "spectrum": 2**40}}),
    *[(BASIS, RECORD, value) for value in (7, {}, [], None)],
    *[
        (BASIS, f"{RECORD}/{key}", value)
        for key in ("shape", "index", "rank", "energy", "tail", "numerical_rank", "bound")
        for value in ("0", {}, None, True)
    ],
    *[(BASIS, f"{RECORD}/{key}", value) for key in ("solver", "weight_hash", "weight_dtype") for value in (0, None)],
    *[(BASIS, f"{RECORD}/checksums", value) for value in (7, "x", "0" * 23, "g" * 24, "0" * 24)],
    *[(BASIS, f"{RECORD}/index", value) for value in (-1, 1, 10**30)],
]


@pytest.mark.parametrize("name", ["", MOMENTS, BASIS])
def test_attributes_of_other_types(store, name):
    file, actions = store / name / "zarr.json", uses(store)
    if name == BASIS:
        actions = {use: action for use, action in actions.items() if use not in ("covariances", "pool", "decompose")}
    kept = file.read_text()
    for key, value in [(key, value) for where, key, value in WRONG if where == name]:
        *path, last = key.split("/")
        document = json.loads(kept)
        node = document["attributes"]
        for step in path:
            node = node[step]
        node[last] = value
        write(file, document)
        results = {use: works_or_refuses(use, action) for use, action in actions.items()}
        harmless = key in ("run", "options", "model/revision", "skipped") and isinstance(value, (dict, str))
        assert harmless or not all(results.values()), (key, value)
        file.write_text(kept)
    if "decompose" in actions:
        actions["decompose"]()  # ends what was begun
    assert look(store).findings == []


# Names

NAMES = ["../escape", "..", ".", "", "/etc", "a/b", "a\\b", "\x1b[2J", "a\x00b", "x" * 600, "zarr.json", 7, None, ["a"]]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name)[:12])
def test_names_cannot_leave_the_store(store, name):
    (store.parent / "escape").mkdir()
    (store.parent / "escape" / "zarr.json").write_text("{}")
    with contextlib.suppress(TypeError):  # no key of JSON
        kept = (store / "moments" / "zarr.json").read_bytes()
        edit(store, "moments", lambda doc: doc["attributes"]["sites"].update({str(name): [SITE]}))
        if name != str(name):
            (store / "moments" / "zarr.json").write_bytes(kept)
        else:
            refused(store, "cannot name a site")
            (store / "moments" / "zarr.json").write_bytes(kept)
    kept = (store / "moments" / "zarr.json").read_bytes()
    edit(store, "moments", lambda doc: doc["attributes"]["sites"][SITE].append(name))
    refused(store, "cannot name a layer")
    (store / "moments" / "zarr.json").write_bytes(kept)
    edit(store, "bases/full", lambda doc: doc["attributes"]["groups"]["32x48"]["layers"].append(name))
    refused(store, "cannot name a layer")
    edit(store, "", lambda doc: doc["attributes"]["bases"].append(name))
    refused(store, "cannot name a basis")


# Anything


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from([-1, 0, 1, 2, 3, 48, 2**20, 2**31, 2**48, 2**63, 2**64, -(2**70), 10**30])
    | st.floats()
    | st.sampled_from(
        ["", "..", "../x", "a/b", "float64", "bfloat16", "full", "output", "complete", "1x1", "32x48", SITE]
    )
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def changed(draw, given_documents):
    """One to three documents with a value, key or item replaced, removed or added; or a number everywhere."""
    given_documents = copy.deepcopy(given_documents)
    if draw(st.integers(0, 3)) == 0:
        old = draw(st.sampled_from([4, 16, 32, 48, 128]))
        new = draw(st.sampled_from([0, -1, 1, 3, 31, 500, 10_000, 70_000, 10**6, 10**7, 2**40, 2**70, 4.5, "4", None]))
        return {file: replace(document, old, new) for file, document in given_documents.items()}
    for _ in range(draw(st.integers(1, 3))):
        node = given_documents[draw(st.sampled_from(sorted(given_documents)))]
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(node[key], dict | list) and node[key] and draw(st.integers(0, 4)):
                node = node[key]
                continue
            action = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
            if action == "replace":
                node[key] = draw(JSON)
            elif action == "remove":
                del node[key]
            elif isinstance(node, dict):
                node[draw(st.text(max_size=8))] = draw(JSON)
            else:
                node.append(draw(JSON))
            break
    return given_documents


def replace(value, old, new):
    if isinstance(value, dict):
        return {key: replace(item, old, new) for key, item in value.items()}
    if isinstance(value, list):
        return [replace(item, old, new) for item in value]
    return new if type(value) is int and value == old else value


def fuzz(store, cases, names):
    before, actions = documents(store), uses(store)

    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(changed(before))
    def run(other):
        for file, document in other.items():
            if document != before[file]:
                write(file, document)
        try:
            for name in names:
                works_or_refuses(name, actions[name])
        finally:
            for file, document in other.items():
                if document != before[file]:
                    file.write_text(json.dumps(before[file]))

    run()
    assert look(store).findings == []


def test_fuzzed_metadata(store):
    fuzz(store, 50, ("info", "read", "verify"))


@pytest.mark.stress
def test_fuzzed_metadata_2000_times(store):
    fuzz(store, 2000, ("info", "read", "verify", "attach", "bases", "covariances", "pool", "pull"))


def test_nothing_is_executed_or_unpickled():
    """The package's readers know neither pickle nor eval."""
    root = Path(prep.store.__file__).parent
    for file in root.rglob("*.py"):
        text = file.read_text()
        for word in ("pickle", "eval(", "exec(", "torch.load", "allow_pickle", "__import__"):
            assert word not in text, (file.name, word)
    assert zarr.config.get("array.order") == "C"
