"""Stores on the hub, against a stand-in of its interface (tests/hub.py)."""

import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import hub as standin
import pytest
import tiny
from huggingface_hub import ModelCard, constants
from stores import files, flip
from torch import nn

import prep
from prep import StoreError
from prep.preprocess.verify import verify
from prep.store import create_store, open_store
from prep.store import hub as hub_module
from prep.store.card import card
from prep.store.format.schema import put_attributes
from prep.store.transfer import pull, push

URL, REPO = "hf://me/store", "models/me/store"


def net():
    return nn.Sequential(nn.Linear(4, 3))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two stores of one layer, `old` and `new`, with bases of different names, and a calibrated one, `whole`."""
    path = tmp_path_factory.mktemp("made")
    tiny.store(path / "old", net(), ("full", "eva"), rank=2)
    tiny.store(path / "new", net(), ("full", "identity"), rank=2)
    given = tiny.sources(path)
    prep.covariance(given.model, given.data, store=path / "whole", layers="1", **tiny.RUN)
    prep.decompose(path / "whole", rank=4, quiet=True)
    return path


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with standin.standing(monkeypatch, tmp_path / "cache") as hub:
        yield hub


def which(location):
    assert verify(location).findings == []
    return open_store(location).id.split("-")[0]


def keys(store):
    return {file.relative_to(store).as_posix() for file in files(store)}


def one_line(error):
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


# Push


def test_push_is_one_commit_and_pull_brings_every_byte(made, hub, tmp_path):
    pushed = push(made / "whole", URL)
    repo = hub.repos[REPO]
    assert (repo.private, len(repo.order), pushed.location) == (True, 2, URL)  # the first commit is the hub's
    assert hub.names(REPO) == keys(made / "whole") | {"README.md", ".gitattributes"}
    for name in keys(made / "whole"):
        assert hub.content(REPO, name) == (made / "whole" / name).read_bytes()
    assert verify(URL).findings == []
    pull(URL, tmp_path / "back")
    assert tiny.contents(tmp_path / "back") == tiny.contents(made / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "cache"]


def test_the_card_says_what_the_store_holds(made, hub):
    push(made / "whole", URL)
    text = hub.content(REPO, "README.md").decode()
    card, facts = ModelCard(text), prep.info(made / "whole")
    assert (card.data.library_name, card.data.license, card.data.datasets) == ("prep", None, None)
    assert card.data.base_model is None  # the model is a directory
    assert {"prep", "lora", "svd"} <= set(card.data.tags)
    assert f"| tokens | {facts['corpus']['tokens']:,} |" in text and facts["id"] in text
    [row] = [line for line in text.splitlines() if line.startswith("| full |")]
    basis = open_store(made / "whole").bases["full"]
    kept = sorted(float(values.sum()) for values in basis.shares("kept").values())
    assert f"{kept[len(kept) // 2]:.4f}" in row and basis.hash in row
    assert 'prep.attach(model, "hf://me/store", core="gain", basis="full")' in text


def test_the_card_names_what_is_on_the_hub(made, tmp_path):
    attrs = dict(open_store(made / "whole").attrs)
    attrs["model"] = {**attrs["model"], "id": "HuggingFaceTB/SmolLM2-135M"}
    parts = [
        {"source": one, "weight": 1, "sequences": 1, "tokens": 1} for one in ("openai/gsm8k", "/home/me/own.jsonl")
    ]
    attrs["corpus"] = {**attrs["corpus"], "mixture": parts}
    named = shutil.copytree(made / "whole", tmp_path / "named")
    put_attributes(open_store(named, "r+").root, attrs)
    text = card(open_store(named), URL)
    data = ModelCard(text).data
    assert (data.base_model, data.datasets) == ("HuggingFaceTB/SmolLM2-135M", ["openai/gsm8k"])
    assert "/home/me" not in text and "own.jsonl" in text


def test_what_is_there_is_kept_unless_asked(made, hub, tmp_path):
    push(made / "old", URL)
    repo = hub.repos[REPO]
    first = repo.order[-1]
    text = hub.content(REPO, "README.md").decode().replace("---\n", "---\nlicense: mit\n", 1)
    repo.add({**repo.commits[first], "README.md": ("text", text.encode()), "model.safetensors": ("text", b"x")})
    with pytest.raises(StoreError, match=f"{URL} holds something already"):
        push(made / "new", URL)
    push(made / "new", URL, overwrite=True)
    assert len(repo.order) == 4 and which(URL) == "new"
    assert hub.names(REPO) == keys(made / "new") | {"README.md", ".gitattributes", "model.safetensors"}
    assert ModelCard(hub.content(REPO, "README.md").decode()).data.license == "mit"
    pull(f"{URL}@{first}", tmp_path / "first")
    pull(URL, tmp_path / "last")
    assert (which(tmp_path / "first"), which(tmp_path / "last")) == ("old", "new")
    assert which(f"{URL}@{first}") == "old"
    with pytest.raises(StoreError, match="exists already"):
        pull(URL, tmp_path / "first")
    assert which(pull(URL, tmp_path / "first", overwrite=True).location) == "new"


def test_a_card_that_is_not_preps_is_kept_unless_asked(made, hub):
    repo = hub.repos[REPO] = standin.Repo(False)
    repo.add({"README.md": ("text", b"---\nlibrary_name: peft\n---\nMy model"), "config.json": ("text", b"{}")})
    with pytest.raises(StoreError, match=f"{URL} has a README.md of its own"):
        push(made / "old", URL)
    assert len(repo.order) == 1
    push(made / "old", URL, overwrite=True)
    assert which(URL) == "old" and "config.json" in hub.names(REPO)
    hub.repos["models/me/bare"] = bare = standin.Repo(False)
    bare.add({"README.md": ("text", b"---\nlicense: mit\n---\n")})  # as the hub's page makes it
    push(made / "old", "hf://me/bare")
    assert ModelCard(hub.content("models/me/bare", "README.md").decode()).data.license == "mit"
    repo.add({"zarr.json": ("text", b"{}")})
    with pytest.raises(StoreError, match="cannot be opened as a store"):
        push(made / "old", URL, overwrite=True)


def test_folders_data_sets_and_branches(made, hub, tmp_path):
    url = "hf://datasets/me/many/stores/a.zarr"
    push(made / "old", url)
    assert {name for name in hub.names("datasets/me/many") if name != ".gitattributes"} == {
        f"stores/a.zarr/{name}" for name in keys(made / "old") | {"README.md"}
    }
    assert which(url) == "old" and which(pull(url, tmp_path / "back").location) == "old"
    hub.repos["datasets/me/many"].branches["next"] = hub.repos["datasets/me/many"].order[0]
    push(made / "new", "hf://datasets/me/many@next/stores/a.zarr")
    assert (which(url), which("hf://datasets/me/many@next/stores/a.zarr")) == ("old", "new")


# What breaks off


class Failing:
    """Refuses every request of a method whose path holds a part, after the first ones."""

    def __init__(self, method, part, after):
        self.method, self.part, self.left = method, part, after

    def __call__(self, method, path):
        if method == self.method and self.part in path:
            self.left -= 1
            return 403 if self.left < 0 else None
        return None


def test_an_interrupted_push_sends_the_rest(made, hub):
    hub.refuse = Failing("PUT", "/lfs/", 5)
    with pytest.raises(StoreError, match=f"cannot write to {URL}") as caught:
        push(made / "whole", URL)
    one_line(caught)
    hub.refuse = lambda *_: None
    sent = len(hub.objects)
    assert sent == 5 and hub.names(REPO) == {".gitattributes"}
    hub.log.clear()
    push(made / "whole", URL)
    assert verify(URL).findings == []
    contents = {file.read_bytes() for file in files(made / "whole") if "/c/" in file.as_posix()}
    assert len(hub.asked("PUT", "/lfs/")) == len(contents) - sent


def test_a_large_store_is_a_few_commits_and_none_before_the_last(made, hub, monkeypatch):
    monkeypatch.setattr(hub_module, "OPERATIONS", 10)
    push(made / "old", URL)
    repo = hub.repos[REPO]
    count = -(-(len(keys(made / "old")) - 1) // 8)  # the last one has the card and the root as well
    assert 2 < count == len(repo.order) - 1
    for commit in repo.order[:-1]:
        with pytest.raises(StoreError, match="no store at"):
            open_store(f"{URL}@{commit}")
    hub.refuse = Failing("POST", "/commit/", 1)
    with pytest.raises(StoreError, match="cannot write to"):
        push(made / "new", URL, overwrite=True)
    with pytest.raises(StoreError, match="no store at"):
        open_store(URL)
    hub.refuse = lambda *_: None
    sent = {f"/lfs/{name}" for name in hub.objects}
    hub.log.clear()
    push(made / "new", URL, overwrite=True)
    assert which(URL) == "new" and not sent & set(hub.asked("PUT", "/lfs/"))
    assert hub.names(REPO) == keys(made / "new") | {"README.md", ".gitattributes"}


def test_a_push_beside_another_one_is_refused_and_repeats(made, hub):
    push(made / "old", URL)

    def meanwhile(method, path):
        if "/commit/" in path:
            hub.refuse = lambda *_: None
            repo = hub.repos[REPO]
            repo.add({**repo.commits[repo.branches["main"]], "note": ("text", b"x")})

    hub.refuse = meanwhile
    with pytest.raises(StoreError, match="cannot write to"):
        push(made / "new", URL, overwrite=True)
    assert which(URL) == "old"
    push(made / "new", URL, overwrite=True)
    assert which(URL) == "new" and "note" in hub.names(REPO)


def test_a_copy_that_is_found_damaged_is_no_store(made, hub):
    hub.rot = lambda content: flip(content, 3, 1) if len(content) == 20 else content
    with pytest.raises(StoreError, match="the copy is damaged: bases/"):
        push(made / "old", URL)
    with pytest.raises(StoreError, match="no store at"):
        open_store(URL)


def test_an_interrupted_pull_fetches_the_rest(made, hub, tmp_path):
    push(made / "whole", URL)
    total = len(
        {content for kind, content in hub.repos[REPO].commits[hub.repos[REPO].order[-1]].values() if kind == "lfs"}
    )
    hub.log.clear()
    documents = sum(name.endswith("zarr.json") for name in tiny.contents(made / "whole"))
    hub.refuse = Failing("GET", "/", documents + total // 2)
    with pytest.raises(StoreError, match=f"{URL} cannot be read") as caught:
        pull(URL, tmp_path / "back")
    one_line(caught)
    assert not (tmp_path / "back").exists()
    hub.refuse = lambda *_: None
    blobs = {path.name for path in (tmp_path / "cache").glob("*/blobs/*")} & hub.objects.keys()
    assert 0 < len(blobs) < total  # the server gave no more, however many were asked for
    hub.log.clear()
    pull(URL, tmp_path / "back")
    again = {path[1:] for method, path, _ in hub.log if method == "GET" and path[1:] in hub.objects}
    assert again == {name for name in hub.objects} - blobs
    assert tiny.contents(tmp_path / "back") == tiny.contents(made / "whole")


def test_what_was_damaged_in_the_cache_is_fetched_again(made, hub, tmp_path):
    push(made / "whole", URL)
    pull(URL, tmp_path / "first")
    [shot] = (tmp_path / "cache").glob("models--*/snapshots/*")
    chunk = "moments/full-48/second_moment/c/0/0/0"
    (shot / chunk).write_bytes(flip((shot / chunk).read_bytes(), 100, 1))
    pull(URL, tmp_path / "second")
    (shot / "bases/full/zarr.json").write_text("{")
    hub.log.clear()
    pull(URL, tmp_path / "third")
    assert tiny.contents(tmp_path / "second") == tiny.contents(tmp_path / "third") == tiny.contents(made / "whole")
    fetched = [path for method, path, _ in hub.log if method == "GET" and not path.startswith("/api/")]
    assert len(fetched) == 1 and fetched[0].endswith("/bases/full/zarr.json")
    repo = hub.repos[REPO]
    bad = ("text", flip(hub.content(REPO, chunk), 100, 1))
    repo.add({**repo.commits[repo.order[-1]], chunk: bad})  # now the repository is what is damaged
    with pytest.raises(StoreError, match=r"the copy is damaged: moments/.* does not match its checksum") as caught:
        pull(URL, tmp_path / "fourth")
    one_line(caught)
    assert not (tmp_path / "fourth").exists()


# Reading


def test_attach_asks_for_what_it_needs(made, hub):
    push(made / "whole", URL)
    hub.log.clear()
    prep.attach(tiny.llama(), URL, core="gain", basis="full", rank=2)
    basis = open_store(made / "whole").bases["full"]
    needed = {"zarr.json", "bases/full/zarr.json"}
    for shape in basis.shapes:
        top = f"bases/full/{shape[0]}x{shape[1]}"
        for role, layout in basis.arrays(shape).items():
            if role in ("UP", "S"):
                needed |= {f"{top}/{role}/zarr.json", *(f"{top}/{role}/{key}" for key in layout.file_keys())}
    marked = f"/me/store/resolve/{hub.repos[REPO].order[-1]}/"
    asked = [path for _, path, _ in hub.log if path.startswith("/me/")]
    assert all(path.startswith(marked) for path in asked)
    assert sorted(path.removeprefix(marked) for path in asked) == sorted(needed)
    assert len(hub.asked("GET", "/api/")) == 1 and {method for method, _, _ in hub.log} == {"GET"}


def test_places_on_the_hub_that_are_refused(made, hub, tmp_path, monkeypatch):
    push(made / "old", URL)
    hub.repos[REPO].private = False
    for call, said in [
        (lambda: open_store("hf://me/none"), "no repository or revision at hf://me/none: "),
        (lambda: open_store(f"{URL}@none"), f"no repository or revision at {URL}@none: "),
        (lambda: open_store(f"{URL}/none"), f"no store at {URL}/none: "),
        (lambda: pull("hf://me/none", tmp_path / "x"), "no repository or revision at hf://me/none: "),
        (lambda: pull(f"{URL}/none", tmp_path / "x"), f"no store at {URL}/none: "),
        (lambda: push(made / "old", f"{URL}@none"), f"{URL}@none names a branch that is not there: "),
        (lambda: push(made / "old", f"{URL}@{'0' * 40}"), "names a commit, which stays as it is: "),
        (lambda: prep.decompose(URL, rank=2, metric="identity"), f"{URL} cannot be written to file by file: "),
        (lambda: create_store(URL, {}), f"{URL} cannot be written to file by file: "),
    ]:
        with pytest.raises(StoreError, match=re.escape(said)) as caught:
            call()
        one_line(caught)
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with pytest.raises(StoreError, match=f"cannot write to {URL}"):
        push(made / "new", URL, overwrite=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(StoreError, match="HF_HUB_OFFLINE keeps prep from it"):
        open_store(URL)
    assert not (tmp_path / "x").exists()


def test_no_more_is_fetched_than_a_store_can_hold(made, hub, tmp_path):
    push(made / "old", URL)
    repo = hub.repos[REPO]
    tree = dict(repo.commits[repo.order[-1]])
    chunk = next(name for name in tree if "/UP/c/" in name)
    repo.add({**tree, chunk: ("text", bytes(10**6)), "bases/more/c/0": ("text", bytes(10**6))})
    with pytest.raises(StoreError, match=f"{URL}/{chunk} is larger than"):
        pull(URL, tmp_path / "back")
    repo.add({name: file for name, file in tree.items() if name != chunk})
    with pytest.raises(StoreError, match=f"{URL}/{chunk} is missing"):
        pull(URL, tmp_path / "back")
    repo.add({**tree, "bases/more/c/0": ("text", bytes(10**6)), "video.mp4": ("text", b"x")})
    pull(URL, tmp_path / "back")
    assert tiny.contents(tmp_path / "back") == tiny.contents(made / "old")
    assert not hub.asked("GET", "more") and not hub.asked("GET", "video")


def test_a_hub_that_gives_no_answer_ends_in_one_line(made, hub, tmp_path, monkeypatch):
    push(made / "old", URL)
    monkeypatch.setenv("PREP_TIMEOUT", "0.2")
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda seconds: None))

    def silent(part):
        def wait(method, path):
            if part in path:
                over.wait(5)

        return wait

    over = threading.Event()
    try:
        for part, said in [("/revision/", "cannot be read (no answer in time"), ("/tree/", "cannot be read (")]:
            hub.lock, hub.refuse = NoLock(), silent(part)
            with pytest.raises(StoreError, match=re.escape(f"{URL} {said}")) as caught:
                pull(URL, tmp_path / "back")
            one_line(caught)
    finally:
        over.set()


class NoLock:
    def __enter__(self):
        pass

    def __exit__(self, *_):
        pass


# Copies of repositories


def test_what_a_repository_keeps_beside_a_store_disturbs_nothing(made, tmp_path):
    store = Path(shutil.copytree(made / "old", tmp_path / "clone"))
    for name in ("README.md", ".gitattributes", ".git/HEAD", ".cache/huggingface/download/zarr.json.metadata"):
        (store / name).parent.mkdir(parents=True, exist_ok=True)
        (store / name).write_text("x")
    assert verify(store).findings == []
    pull(store, tmp_path / "copy")
    assert tiny.contents(tmp_path / "copy") == tiny.contents(made / "old")
    prep.attach(net(), store, core="gain", basis="full", rank=2, verify=False)
    prep.remove(store, ["eva"])
    assert list(open_store(store).bases) == ["full"]
    (store / "notes.md").write_text("x")
    assert [finding.where for finding in verify(store).findings] == ["notes.md"]
    pull(made / "new", store, overwrite=True)
    assert tiny.contents(store) == tiny.contents(made / "new")


def test_the_commands_in_processes_of_their_own(made, hub, tmp_path):
    environment = {**os.environ, **vars(hub.env), "HF_HUB_OFFLINE": "0"}
    run = "from prep.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", run, "push", URL, "--store", str(made / "old")],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{URL}: whole\n", "")
    assert which(URL) == "old"
