"""What reading, pool, push, pull, info and verify say of stores that they refuse: one table of sentences per verb."""

import json
import shutil
from pathlib import Path

import hub as standin
import messages
import pytest
import tiny
import torch
from stores import flip

import prep
from prep.preprocess.verify import verify
from prep.store import open_store
from prep.store.format.schema import put_attributes, sealed
from prep.store.info import info, table
from prep.store.lock import writer_lock
from prep.store.pool import pool
from prep.store.transfer import pull, push

DOWN = "model.layers.1.mlp.down_proj"
MEAN = "moments/full-48/mean"
OF_DOWN = f"moments/{DOWN}/mean"  # as `verify` calls it


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Stores of one model and two texts, `a` and `b`, stores that differ from them, and damaged copies of `a`."""
    path = tmp_path_factory.mktemp("messages")
    model = tiny.save(tiny.llama(), path / "model")
    for seed, name in enumerate("ab"):
        tiny.write_data(path / f"{name}.jsonl", tiny.texts(60, seed=seed))
    other = tiny.llama()
    with torch.no_grad():
        other.get_submodule(DOWN).weight[0, 0] += 1
    other, wide = tiny.save(other, path / "other"), tiny.save(tiny.llama(64), path / "wide")
    run = {**tiny.RUN, "layers": "1"}
    for name, net, data, options in (
        ("a", model, "a", {}),
        ("b", model, "b", {}),
        ("weights", other, "b", {}),
        ("shapes", wide, "b", {}),
        ("halves", model, "b", {"dtype": "bfloat16"}),
        ("layers", model, "b", {"layers": "0-1"}),
        ("kinds", model, "b", {"moment": "diagonal"}),
    ):
        prep.covariance(net, str(path / f"{data}.jsonl"), store=path / name, **{**run, **options})
    prep.decompose(path / "a", rank=4, quiet=True)
    shutil.copytree(path / "a", path / "whole")
    prep.decompose(path / "whole", rank=64, overwrite=True, quiet=True)
    prep.decompose(path / "kinds", metric="diagonal", rank=4, quiet=True)
    prep.decompose(path / "alone", model=model, metric="identity", rank=4, quiet=True)
    for name, change in DAMAGED.items():
        change(shutil.copytree(path / "a", path / name))
    (path / "folder").mkdir()
    (path / "folder" / "precious").write_text("x")
    (path / "file").write_text("x")
    (path / "beside.lock").write_text("[metadata]\n")
    push(path / "a", "memory://messages/a.zarr", overwrite=True)
    return path


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


def edited(name, change, seal=True):
    """Change the attributes of a group, with or without a seal that fits."""

    def edit(store):
        file = store / name / "zarr.json"
        document = json.loads(file.read_text())
        change(document["attributes"])
        if seal:
            document["attributes"] = sealed(document["attributes"])
        file.write_text(json.dumps(document))

    return edit


def incomplete(store):
    root = open_store(store, "r+").root
    put_attributes(root, {**root.attrs, "status": "incomplete"})


def flipped(name):
    def change(store):
        (store / name).write_bytes(flip((store / name).read_bytes(), 5, 1))

    return change


def gone(name):
    return lambda store: (store / name).unlink()


def cut(name):
    return lambda store: (store / name).write_text("{")


def linked_out(store):
    shutil.move(store / MEAN, store.parent / "victim")
    (store / MEAN).symlink_to(store.parent / "victim")


def without_shares(store):
    """The basis as versions wrote it that did not know what its directions keep."""

    def forget(attrs):
        for group in attrs["groups"].values():
            del group["shares"]
        for record in attrs["layers"].values():
            del record["shares"]

    edited("bases/full", forget)(store)
    for path in [*store.glob("bases/full/*/kept"), *store.glob("bases/full/*/unseen")]:
        shutil.rmtree(path)


DAMAGED = {
    "incomplete": incomplete,
    "newer": edited("", lambda attrs: attrs.update(format_version=99)),
    "edited": edited("moments", lambda attrs: attrs["records"][DOWN].update(count=7), seal=False),
    "no-chunk": gone(f"{MEAN}/c/0/0"),
    "bad-chunk": flipped(f"{MEAN}/c/0/0"),
    "bad-basis": flipped("bases/full/32x48/S/c/0/0"),
    "no-array": cut(f"{MEAN}/zarr.json"),
    "no-moments": cut("moments/zarr.json"),
    "no-basis": cut("bases/full/zarr.json"),
    "no-root": cut("zarr.json"),
    "linked": linked_out,
    "earlier": without_shares,
    "stray": lambda store: (store / "bases" / "full" / "notes.txt").write_text("x"),
    "two-damages": lambda store: [flipped(f"{MEAN}/c/0/0")(store), flipped("bases/full/32x48/S/c/0/0")(store)],
}


def mean(name):
    return lambda: open_store(name).moments[DOWN].mean


def locked():
    with writer_lock("a"), writer_lock("a"):
        pass


def beside_a_strangers_lock():
    with writer_lock("beside"):
        pass


READ = {
    "no store": (
        lambda: open_store("none"),
        "no store at none: run `prep covariance --model X --data Y` first, or name one with --store",
    ),
    "a file": (lambda: open_store("file"), "file is a file and not a prep store: name another --store"),
    "a folder": (lambda: open_store("folder"), "folder is not a prep store: name another --store"),
    "no scheme that there is": (
        lambda: open_store("gopher://x/prep.zarr"),
        "gopher://x/prep.zarr cannot be opened (Protocol not known: gopher): write it like s3://bucket/prep.zarr",
    ),
    "a newer format": (
        lambda: open_store("newer"),
        "newer has the format version 99, this prep-bases reads up to 2: upgrade prep-bases",
    ),
    "a damaged root": (
        lambda: open_store("no-root"),
        "no-root cannot be opened as a store (...): name another --store",
    ),
    "moments of an incomplete store": (
        lambda: open_store("incomplete").moments,
        "incomplete is not complete: run the same `prep covariance` command again",
    ),
    "a layer without moments": (
        lambda: open_store("a").moments["lm_head"],
        "the store has no moments of lm_head; `prep info` lists its layers",
    ),
    "a basis that is not there": (
        lambda: open_store("a").bases["full-p1-bottom"],
        "the store has no basis 'full-p1-bottom' (it has: full): make it with `prep decompose --for corda_kpm "
        "--store a`",
    ),
    "a layer that the basis lacks": (
        lambda: open_store("a").bases["full"]["lm_head"],
        "basis 'full' does not hold the layer lm_head; `prep info` lists its layers",
    ),
    "a missing chunk": (
        mean("no-chunk"),
        "no-chunk/moments/full-48/mean (chunk c/0/0) is missing: restore the store from a copy",
    ),
    "a flipped bit": (
        mean("bad-chunk"),
        "bad-chunk/moments/full-48/mean (chunk c/0/0) does not match its checksum: restore the store from a copy",
    ),
    "an array without metadata": (
        mean("no-array"),
        "no-array/moments/full-48/mean is missing or its metadata is damaged: restore the store from a copy",
    ),
    "an edited attribute": (
        mean("edited"),
        "edited/moments has attributes that do not match their hash: restore it from a copy",
    ),
    "moments without metadata": (
        mean("no-moments"),
        "no-moments/moments is missing or damaged: restore the store from a copy",
    ),
    "a basis without metadata": (
        lambda: open_store("no-basis").bases["full"],
        "basis 'full' is missing or damaged: make it anew with `prep decompose --overwrite --store no-basis`",
    ),
    "a flipped bit of a basis": (
        lambda: open_store("bad-basis").bases["full"].read(),
        "bad-basis/bases/full/32x48/S (chunk c/0/0) does not match its checksum: restore the store from a copy",
    ),
    "writing through a link": (
        lambda: open_store("linked", "r+"),
        ".../linked/moments/full-48/mean is a link out of the store, to .../victim: put a copy of that in its place",
    ),
    "two writers": (locked, "a is being written by process ... on ... for ... s: wait for it, or --break-lock"),
    "somebody else's lock": (
        beside_a_strangers_lock,
        ".../beside.lock is not a lock of prep: move it elsewhere, or name another --store",
    ),
}


@pytest.mark.parametrize("asked", READ)
def test_read(here, asked):
    messages.check(*READ[asked])


def pooled(*parts, store="c", **options):
    return lambda: pool(parts, store=store, **options)


POOL = {
    "one part": (pooled("a"), "1 store to pool: name two or more"),
    "too few weights": (pooled("a", "b", weights=[1.0]), "--weights 1: give 2 positive numbers"),
    "a negative weight": (pooled("a", "b", weights=[1.0, -1.0]), "--weights 1,-1: give 2 positive numbers"),
    "an infinite weight": (pooled("a", "b", weights=[1.0, float("inf")]), "--weights 1,inf: give 2 positive numbers"),
    "no such part": (
        pooled("a", "none"),
        "no store at none: run `prep covariance --model X --data Y` first, or name one with --store",
    ),
    "into a part": (
        pooled("a", "b", store="./a", overwrite=True),
        "--store ./a is one of the parts, or lies in a, or holds it: name a new one",
    ),
    "into a URL": (
        pooled("a", "b", store="memory://pooled"),
        "--store memory://pooled is a URL: pool into a path and copy it with `prep push`",
    ),
    "over another store": (
        pooled("a", "b", store="kinds"),
        "kinds holds something else: name another --store, or replace it with --overwrite",
    ),
    "over a folder": (
        pooled("a", "b", store="folder", overwrite=True),
        "folder is not a prep store: name another --store",
    ),
    "other weights": (
        pooled("a", "weights"),
        "a and weights differ in the weight_hash of model.layers.1.mlp.down_proj (... and ...): they cannot be pooled",
    ),
    "other shapes": (
        pooled("a", "shapes"),
        "a and shapes differ in the model's config_hash (... and ...): they cannot be pooled",
    ),
    "another dtype": (
        pooled("a", "halves"),
        "a and halves differ in the model's dtype (float32 and bfloat16): they cannot be pooled",
    ),
    "other layers": (
        pooled("a", "layers"),
        "a and layers differ in their layers: only one has model.layers.0.self_attn.q_proj (7 layers and 14): "
        "they cannot be pooled",
    ),
    "another kind": (
        pooled("a", "kinds"),
        "a and kinds differ in the moment kind of model.layers.1.self_attn.q_proj (full and diagonal): they "
        "cannot be pooled",
    ),
    "a damaged part": (
        pooled("b", "no-chunk"),
        "no-chunk/moments/full-48/mean (chunk c/0/0) is missing: restore the store from a copy",
    ),
    "an incomplete part": (
        pooled("b", "incomplete"),
        "incomplete is not complete: run the same `prep covariance` command again",
    ),
}


@pytest.mark.parametrize("asked", POOL)
def test_pool(here, asked):
    messages.check(*POOL[asked])


COPY = {
    "push to no URL": (lambda: push("a", "elsewhere"), "elsewhere is no URL: write it like s3://bucket/prep.zarr"),
    "push over a store at a URL": (
        lambda: push("b", "memory://messages/a.zarr"),
        "memory://messages/a.zarr holds something already: name another URL, or replace it with --overwrite",
    ),
    "push over a store at a file URL": (
        lambda: push("b", Path("a").absolute().as_uri()),
        "file://.../a exists already: name another URL, or replace it with --overwrite",
    ),
    "push onto itself": (
        lambda: push("a", Path("a").absolute().as_uri(), overwrite=True),
        "file://.../a and a are one place, or one lies in the other: name another target",
    ),
    "push a URL onto itself": (
        lambda: push("memory://messages/a.zarr", "memory:///messages/a.zarr", overwrite=True),
        "memory:///messages/a.zarr is the store that is to be copied: name another URL",
    ),
    "push an incomplete store": (
        lambda: push("incomplete", "memory://messages/b.zarr"),
        "incomplete is not complete: run the same `prep covariance` command again",
    ),
    "push a damaged store": (
        lambda: push("bad-chunk", "memory://messages/b.zarr"),
        "bad-chunk is damaged: moments/model.layers.1.mlp.down_proj/mean: "
        "bad-chunk/moments/full-48/mean (chunk c/0/0) does not match its checksum: "
        "restore the store from a copy",
    ),
    "push a store of two damages": (
        lambda: push("two-damages", "memory://messages/b.zarr"),
        "two-damages is damaged: moments/model.layers.1.mlp.down_proj/mean: "
        "two-damages/moments/full-48/mean (chunk c/0/0) does not match its checksum: "
        "restore the store from a copy (2 such findings)",
    ),
    "push to the web": (
        lambda: push("a", "http://127.0.0.1:9/c.zarr"),
        "http://127.0.0.1:9/c.zarr/zarr.json cannot be read (...): check path, permission and connection",
    ),
    "push to another host": (
        lambda: push("a", "file://elsewhere/c.zarr"),
        "file://elsewhere/c.zarr names the host 'elsewhere': write it like file:///path/prep.zarr",
    ),
    "pull into a URL": (
        lambda: pull("a", "memory://c.zarr"),
        "--store memory://c.zarr is a URL: pull into a path, and copy that with `prep push`",
    ),
    "pull over a store": (
        lambda: pull("memory://messages/a.zarr", "b"),
        "b exists already: name another --store, or replace it with --overwrite",
    ),
    "pull over a folder": (
        lambda: pull("memory://messages/a.zarr", "folder", overwrite=True),
        "folder is not a prep store: name another --store",
    ),
    "pull into itself": (
        lambda: pull("a", "a/inner"),
        "a/inner and a are one place, or one lies in the other: name another target",
    ),
    "pull a damaged store": (
        lambda: pull("no-chunk", "c"),
        "no-chunk/moments/full-48/mean/c/0/0 is missing: restore the store from a copy",
    ),
    "pull from nowhere": (
        lambda: pull("memory://messages/none", "c"),
        "no store at memory://messages/none: run `prep covariance --model X --data Y` first, or name one with --store",
    ),
}


@pytest.mark.parametrize("asked", COPY)
def test_push_and_pull(here, asked):
    messages.check(*COPY[asked])


@pytest.fixture(scope="module")
def hub(place, tmp_path_factory):
    """A stand-in of the hub with `store`, a copy of `a`, and `model`, which has a card of its own."""
    with (
        pytest.MonkeyPatch.context() as patch,
        standin.standing(patch, tmp_path_factory.mktemp("cache")) as hub,
    ):
        push(place / "a", "hf://me/store")
        repo = hub.repos["models/me/store"]
        whole = dict(repo.commits[repo.order[-1]])
        mean = f"{MEAN}/c/0/0"
        for branch, tree in {
            "large": {**whole, mean: ("text", bytes(10**4))},
            "short": {name: file for name, file in whole.items() if name != mean},
            "damaged": {**whole, mean: ("text", flip(hub.content("models/me/store", mean), 5, 1))},
        }.items():
            repo.add(tree, branch)
        hub.repos["models/me/model"] = standin.Repo(False)
        hub.repos["models/me/model"].add({"README.md": ("text", b"---\nlibrary_name: peft\n---\nMy model")})
        yield hub


def where(name, value, call):
    """The call where a variable of a module has another value."""

    def run():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(name, value)
            call()

    return run


def as_another(call):
    def run():
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HF_TOKEN", "hf_another")
            call()

    return run


COMMIT = "0" * 40
HUB = {
    "no repository": (
        lambda: open_store("hf://me/none"),
        "no repository or revision at hf://me/none: check its name, or log in with `hf auth login`",
    ),
    "no branch": (
        lambda: pull("hf://me/store@none", "c"),
        "no repository or revision at hf://me/store@none: check its name, or log in with `hf auth login`",
    ),
    "no store in a repository": (
        lambda: pull("hf://me/model", "c"),
        "no store at hf://me/model: run `prep covariance --model X --data Y` first, or name one with --store",
    ),
    "writing file by file": (
        lambda: open_store("hf://me/store", "r+"),
        "hf://me/store cannot be written to file by file: work on a copy, `prep pull`, and push that",
    ),
    "offline": (
        where("huggingface_hub.constants.HF_HUB_OFFLINE", True, lambda: open_store("hf://me/store")),
        "hf://me/store is on the hub, and HF_HUB_OFFLINE keeps prep from it: unset that, or name a copy",
    ),
    "another server": (
        where("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9", lambda: open_store("hf://me/store")),
        "hf://me/store cannot be read (...): check path, permission and connection",
    ),
    "push over a store": (
        lambda: push("b", "hf://me/store"),
        "hf://me/store holds something already: name another URL, or replace it with --overwrite",
    ),
    "push over a card": (
        lambda: push("b", "hf://me/model"),
        "hf://me/model has a README.md of its own: name another URL, or replace it with --overwrite",
    ),
    "push to a commit": (
        lambda: push("b", f"hf://me/store@{COMMIT}"),
        f"hf://me/store@{COMMIT} names a commit, which stays as it is: name a branch, or none",
    ),
    "push to no branch": (
        lambda: push("b", "hf://me/store@next"),
        "hf://me/store@next names a branch that is not there: make it on the hub, or leave it out",
    ),
    "push without permission": (
        as_another(lambda: push("b", "hf://me/new")),
        "cannot write to hf://me/new (...): check the address and your permissions",
    ),
    "pull too much metadata": (
        where("prep.store.transfer.MAX_DOCUMENTS", 1000, lambda: pull("hf://me/store", "c")),
        "hf://me/store has more than 0 MB of metadata: the store is damaged",
    ),
    "pull a file that is too large": (
        lambda: pull("hf://me/store@large", "c"),
        f"hf://me/store@large/{MEAN}/c/0/0 is larger than 388 bytes: restore the store from a copy",
    ),
    "pull without a file": (
        lambda: pull("hf://me/store@short", "c"),
        f"hf://me/store@short/{MEAN}/c/0/0 is missing: restore the store from a copy",
    ),
    "pull a damaged file": (
        lambda: pull("hf://me/store@damaged", "c"),
        f"the copy is damaged: {OF_DOWN}: .../{MEAN} (chunk c/0/0) does not match its checksum: restore the store "
        "from a copy",
    ),
}


@pytest.mark.parametrize("asked", HUB)
def test_the_hub(here, hub, asked):
    messages.check(*HUB[asked])


BROKEN = {
    "files are refused": (
        ("/resolve/", 403),
        "hf://me/store cannot be read (...): the same command goes on from there",
    ),
    "it is another server": (
        ("/revision/", 200),
        "hf://me/store cannot be read (the answer is none of the hub; HF_ENDPOINT names it): check path, permission "
        "and connection",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_hub_that_answers_otherwise(here, hub, monkeypatch, how):
    (part, status), sentence = BROKEN[how]
    monkeypatch.setattr(hub, "refuse", lambda method, path: status if part in path else None)
    messages.check(lambda: pull("hf://me/store", "c"), sentence)


INFO = {
    "no store": (
        lambda: info(open_store("none")),
        "no store at none: run `prep covariance --model X --data Y` first, or name one with --store",
    ),
}

MARKED = {
    "no-moments": ("moments", "no-moments/moments is missing or damaged: restore the store from a copy"),
    "no-basis": ("full", "damaged, its zarr.json cannot be read"),
}


@pytest.mark.parametrize("asked", INFO)
def test_info(here, asked):
    messages.check(*INFO[asked])


@pytest.mark.parametrize("store", MARKED)
def test_info_marks_what_is_damaged(here, store):
    """One part of a store does not keep the others from being told of."""
    part, problem = MARKED[store]
    facts = info(open_store(store))
    assert {"moments": facts["moments"], **facts["bases"]}[part]["problem"] == problem
    assert "problem" not in (facts["bases"]["full"] if part == "moments" else facts["moments"])


@pytest.mark.parametrize(
    ("store", "advice"),
    [
        ("no-moments", "`prep remove --moments --store no-moments`"),
        ("no-basis", "`prep decompose --store no-basis`, or `prep remove full --store no-basis`"),
    ],
)
def test_info_advises_how_to_mend_what_is_damaged(here, store, advice):
    [line] = [line for line in table(info(store)) if line.startswith("damaged ")]
    assert line.endswith(advice)


# what `prep verify` finds in them: where, and the sentence
COPY_IT = "restore the store from a copy"
VERIFY = {
    "a": [],
    "incomplete": [("moments", "incomplete is not complete: run the same `prep covariance` command again")],
    "edited": [
        (
            "moments",
            "edited/moments has attributes that do not match their hash: restore it from a copy",
        )
    ],
    "no-chunk": [(OF_DOWN, f"no-chunk/{MEAN} (chunk c/0/0) is missing: {COPY_IT}")],
    "bad-chunk": [(OF_DOWN, f"bad-chunk/{MEAN} (chunk c/0/0) does not match its checksum: {COPY_IT}")],
    "no-array": [(OF_DOWN, f"no-array/{MEAN} is missing or its metadata is damaged: {COPY_IT}")],
    "no-moments": [("moments", f"no-moments/moments is missing or damaged: {COPY_IT}")],
    "no-basis": [
        (
            "bases/full",
            "basis 'full' is missing or damaged: make it anew with `prep decompose --overwrite --store no-basis`",
        )
    ],
    "two-damages": [
        (OF_DOWN, f"two-damages/{MEAN} (chunk c/0/0) does not match its checksum: {COPY_IT}"),
        (
            f"bases/full: {DOWN}",
            f"two-damages/bases/full/32x48/S (chunk c/0/0) does not match its checksum: {COPY_IT}",
        ),
    ],
    "stray": [
        (
            "bases/full/notes.txt",
            "does not belong to the store: an interrupted or foreign writer left it; remove it",
        )
    ],
}


@pytest.mark.parametrize("name", VERIFY)
def test_verify(here, name):
    assert [(finding.where, finding.problem) for finding in verify(name).findings] == VERIFY[name]


RANKS = {
    "no such basis": (
        lambda: prep.ranks("a", "2k", basis="ful"),
        "the store has no basis 'ful' (it has: full) (did you mean 'full'?)",
    ),
    "no budget": (
        lambda: prep.ranks("a", "many"),
        "'many' is not a budget: write parameters like 2M, or the share to keep like 95%",
    ),
    "a bare number as text": (
        lambda: prep.ranks("a", "64"),
        "'64' is not a budget: write parameters like 2M, or the share to keep like 95%",
    ),
    "a share without its sign": (
        lambda: prep.ranks("a", "0.95"),
        "'0.95' is not a budget: write parameters like 2M, or the share to keep like 95%",
    ),
    "more than everything": (
        lambda: prep.ranks("a", "120%"),
        "'120%' is not a budget: write parameters like 2M, or the share to keep like 95%",
    ),
    "below rank 1": (
        lambda: prep.ranks("a", 400),
        "a budget of 400 parameters is below rank 1 of the 7 layers, 464: ask for more",
    ),
    "above all that is there": (
        lambda: prep.ranks("a", "2M"),
        "a budget of 2,000,000 parameters is above all of basis 'full', 1,856: ask for less, or make it anew with "
        "`prep decompose --rank 8 --overwrite --store a`",
    ),
    "above all that there can be": (
        lambda: prep.ranks("whole", "2M"),
        "a budget of 2,000,000 parameters is above all of basis 'full', ...: ask for less",
    ),
    "a share that is not reached": (
        lambda: prep.ranks("a", "99.9%"),
        "all of basis 'full' keeps ...%, not 99.9%: ask for less, or make it anew with `prep decompose --rank 8 "
        "--overwrite --store a`",
    ),
    "a basis without moments": (
        lambda: prep.ranks("alone", "2k", basis="identity"),
        "basis 'identity' does not say what its directions keep of the outputs: run `prep covariance --model X "
        "--data Y --store alone`, then `prep decompose --for pissa --rank 4 --overwrite --store alone`",
    ),
    "diagonal moments": (
        lambda: prep.ranks("kinds", "2k", basis="diagonal"),
        "basis 'diagonal' does not say what its directions keep of the outputs: diagonal moments do not tell; "
        "calibrate with `prep covariance --moment full` into another --store",
    ),
    "a basis of an earlier version": (
        lambda: prep.ranks("earlier", "2k"),
        "basis 'full' does not say what its directions keep of the outputs: make it anew with `prep decompose "
        "--rank 4 --overwrite --store earlier`",
    ),
    "layers that match nothing": (
        lambda: prep.ranks("a", "2k", layers="lm_head"),
        "layers='lm_head' matches none of the basis, such as model.layers.1.self_attn.q_proj",
    ),
}


@pytest.mark.parametrize("asked", RANKS)
def test_ranks(here, asked):
    messages.check(*RANKS[asked])


WHOLE = {
    "no store": (
        lambda: verify("none"),
        "no store at none: run `prep covariance --model X --data Y` first, or name one with --store",
    ),
    "a newer format": (
        lambda: verify("newer"),
        "newer has the format version 99, this prep-bases reads up to 2: upgrade prep-bases",
    ),
    "a damaged root": (lambda: verify("no-root"), "no-root cannot be opened as a store (...): name another --store"),
    "no such model": (
        lambda: verify("a", model="./none"),
        "no model at ./none: give a directory with config.json or a hub id",
    ),
}


@pytest.mark.parametrize("asked", WHOLE)
def test_verify_refuses(here, asked):
    messages.check(*WHOLE[asked])
