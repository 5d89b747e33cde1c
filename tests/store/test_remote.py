"""Stores at URLs: the same numbers as from disk, single files asked for by name, and only those that a rank needs."""

import contextlib
import http.server
import os
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import workers
from stores import bounded, everything, files, flip

import prep
from prep import StoreError
from prep.preprocess.verify import verify
from prep.store import open_store
from prep.store.format import remote, schema
from prep.store.pool import pool
from prep.store.transfer import pull, push

BUCKET, RANK, SLAB = "shelf", 4, 2


@pytest.fixture(scope="module")
def made(small_slabs, tmp_path_factory):
    """A store with moments and two bases, one for metric identity."""
    made = tiny.sources(tmp_path_factory.mktemp("made"))
    made.store = made.path / "prep.zarr"
    prep.covariance(made.model, made.data, store=made.store, layers="1", **tiny.RUN)
    prep.decompose(made.store, rank=8, quiet=True)
    prep.decompose(made.store, for_="pissa", rank=8, quiet=True)
    return made


# Servers


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 64  # with the five by default, readers of many files wait to be let in

    def handle_error(self, *_):
        """A reader that has seen enough goes."""


@pytest.fixture(scope="module")
def web(made):
    """A web server over the store's directory that notes its requests."""
    log: list[tuple[str, str]] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(made.path))

        def log_request(self, *_):
            log.append((self.command, self.path))

        def log_error(self, *_):
            pass

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield SimpleNamespace(url=f"http://127.0.0.1:{server.server_port}/prep.zarr", log=log, prefix="/prep.zarr/")
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def s3():
    """An S3 server with an empty bucket that notes its requests."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    log: list[tuple[str, str]] = []
    backend = DomainDispatcherApplication(create_backend_app)

    def app(environ, start_response):
        query = f"?{environ['QUERY_STRING']}" if environ["QUERY_STRING"] else ""
        log.append((environ["REQUEST_METHOD"], environ["PATH_INFO"] + query))
        return backend(environ, start_response)

    server = make_server("127.0.0.1", 0, app, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            patch.setenv(name, value)
        import boto3

        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield SimpleNamespace(url=f"s3://{BUCKET}/prep.zarr", log=log, prefix=f"/{BUCKET}/prep.zarr/")
    server.shutdown()


@pytest.fixture(scope="module")
def shelf(s3, made):
    """The store pushed to S3."""
    push(made.store, s3.url)
    return s3


@pytest.fixture(params=["web", "shelf"])
def server(request):
    return request.getfixturevalue(request.param)


def asked(server):
    """The files that were asked for since the log was cleared, after checking how."""
    names = []
    for method, path in server.log:
        assert method == "GET", (method, path)
        assert "?" not in path and not path.endswith("/"), f"a listing: {path}"
        assert path.startswith(server.prefix)
        names.append(path.removeprefix(server.prefix))
    for name in names:
        assert name.split("/")[-1] not in (".zarray", ".zgroup", ".zattrs", ".zmetadata"), f"a v2 probe: {name}"
        assert not name.endswith(".json") or name.endswith("zarr.json")
    return names


# Reading


def test_everything_reads_the_same(made, server):
    assert everything(server.url) == everything(made.store)


def test_attaching_gives_the_same_logits_and_fetches_only_what_the_rank_needs(made, server):
    model = tiny.llama()
    x = workers.tokens()
    prep.attach(model, made.store, core="gain", basis="full", rank=RANK)
    for core in model.modules():
        if hasattr(core, "g"):
            core.g.data.fill_(0.3)
    wanted = workers.logits(model, x)
    prep.detach(model)

    server.log.clear()
    prep.attach(model, server.url, core="gain", basis="full", rank=RANK)
    names = asked(server)
    for core in model.modules():
        if hasattr(core, "g"):
            core.g.data.fill_(0.3)
    assert torch.equal(workers.logits(model, x), wanted)
    prep.detach(model)

    basis = open_store(made.store).bases["full"]
    needed = {"zarr.json", "bases/full/zarr.json"}
    for shape in basis.shapes:
        for role, layout in basis.arrays(shape).items():
            top = f"bases/full/{shape[0]}x{shape[1]}/{role}"
            if role in ("UP", "S"):
                needed |= {f"{top}/zarr.json", *(f"{top}/{key}" for key in layout.file_keys())}
    assert set(names) == needed
    assert len(names) == len(needed)


def test_one_layer_fetches_its_own_chunks(made, server):
    layer = "model.layers.1.self_attn.o_proj"
    basis = open_store(server.url).bases["identity"]
    server.log.clear()
    one = basis.read([layer], rank=1)[layer]
    index = one.record.index
    chunks = {name for name in asked(server) if "/c/" in name}
    top = "bases/identity/32x32"
    assert chunks == {f"{top}/UP/c/{index}/0/0", f"{top}/S/c/{index // SLAB}/0"}
    assert torch.equal(one.U, open_store(made.store).bases["identity"][layer].U[:, :1])


def test_memory_urls(made):
    push(made.store, "memory://shelf/prep.zarr")
    assert everything("memory://shelf/prep.zarr") == everything(made.store)


def test_verify_and_pool_read_from_urls(made, server, tmp_path):
    report = verify(server.url, model=made.model)
    assert (report.findings, report.bases, report.weights) == ([], 2, 7 * 3)
    pooled = pool([server.url, made.store], store=tmp_path / "c")
    layer = next(iter(pooled.moments))
    torch.testing.assert_close(pooled.moments[layer].mean, open_store(made.store).moments[layer].mean)


def test_decompose_writes_to_a_url(made, s3, tmp_path):
    local = tmp_path / "grown.zarr"
    prep.covariance(made.model, made.data, store=local, layers="1", targets="self_attn", **tiny.RUN)
    push(local, f"s3://{BUCKET}/grown.zarr")
    basis = prep.decompose(f"s3://{BUCKET}/grown.zarr", metric="diagonal", rank=4, quiet=True)
    wanted = prep.decompose(local, metric="diagonal", rank=4, quiet=True)
    assert basis.hash == wanted.hash
    assert verify(f"s3://{BUCKET}/grown.zarr").findings == []


# Copies


def test_push_and_pull_keep_every_byte(made, shelf, tmp_path):
    pull(shelf.url, tmp_path / "back.zarr")
    kept = {file.relative_to(made.store): file.read_bytes() for file in files(made.store)}
    assert {
        file.relative_to(tmp_path / "back.zarr"): file.read_bytes() for file in files(tmp_path / "back.zarr")
    } == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back.zarr"]


def test_pull_from_the_web_needs_no_listing(made, web, tmp_path):
    web.log.clear()
    pull(web.url, tmp_path / "back.zarr")
    assert set(asked(web)) == {file.relative_to(made.store).as_posix() for file in files(made.store)}
    assert everything(tmp_path / "back.zarr") == everything(made.store)


@pytest.mark.parametrize("where", ["memory", pytest.param("shelf", marks=pytest.mark.stress)])
def test_what_is_there_is_kept_unless_asked(made, tmp_path, request, where):
    url = "memory://kept/prep.zarr" if where == "memory" else request.getfixturevalue("shelf").url
    if where == "memory":
        push(made.store, url)
    with pytest.raises(StoreError, match="holds something already"):
        push(made.store, url)
    push(made.store, url, overwrite=True)
    assert verify(url).findings == []
    target = shutil.copytree(made.store, tmp_path / "s")
    before = everything(target)
    with pytest.raises(StoreError, match="exists already"):
        pull(url, target)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "precious").write_text("x")
    with pytest.raises(StoreError, match="is not a prep store"):
        pull(url, tmp_path / "folder", overwrite=True)
    assert (tmp_path / "folder" / "precious").exists()
    assert everything(pull(url, target, overwrite=True).location) == before


@pytest.mark.parametrize("damage", ["flipped", "deleted"])
def test_a_damaged_source_arrives_nowhere(made, tmp_path, damage):
    source = shutil.copytree(made.store, tmp_path / "bad.zarr")
    chunk = next(file for file in files(source / "bases" / "full") if "/UP/c/" in str(file))
    if damage == "flipped":
        chunk.write_bytes(flip(chunk.read_bytes(), 3, 1))
    else:
        chunk.unlink()
    with contextlib.chdir(tmp_path), pytest.raises(StoreError, match=r"bases/full.*/UP"):
        pull("bad.zarr", "good.zarr")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.zarr"]
    with pytest.raises(StoreError, match=r"bases/full.*/UP"):
        push(source, f"memory://{damage}/prep.zarr")


def test_a_store_that_is_not_complete_is_not_copied(made, tmp_path):
    source = shutil.copytree(made.store, tmp_path / "s")
    root = open_store(source, "r+").root
    schema.put_attributes(root, {**root.attrs, "status": "incomplete"})
    with pytest.raises(StoreError, match="is not complete"):
        push(source, "memory://incomplete/prep.zarr")


# Errors


def test_urls_that_lead_nowhere(made, web, s3):
    for url, message in [
        (web.url + "x", "no store at"),
        (f"s3://{BUCKET}/absent", "no store at"),
        ("s3://no-such-bucket/prep.zarr", "no store at|cannot be read"),
        ("http://127.0.0.1:9/prep.zarr", "cannot be read"),
        ("gopher://x/prep.zarr", "cannot be opened"),
    ]:
        with pytest.raises(StoreError, match=message) as caught:
            open_store(url)
        assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(StoreError, match="is no URL"):
        push(made.store, str(Path("elsewhere")))


def test_a_connection_that_breaks_is_no_damage(made, tmp_path):
    class Gone(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            if "/c/" in self.path:
                self.send_error(503)
            else:
                super().do_GET()

        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(made.path))

        def log_message(self, *_):
            pass

    server = Server(("127.0.0.1", 0), Gone)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/prep.zarr"
    with pytest.raises(StoreError, match=r"mean/c/0/0 cannot be read \(503.*check path, permission and connection"):
        _ = open_store(url).moments["model.layers.1.mlp.down_proj"].mean
    server.shutdown()
    server.server_close()


# Servers that do harm


class Harm(http.server.BaseHTTPRequestHandler):
    """Serves the store's directory, and does to the files whose path holds `at` what `how` says."""

    root: Path
    at = how = ""
    sent = 0  # bytes of the endless files

    def do_GET(self):
        file = Path(f"{self.root}{self.path}")
        content = file.read_bytes() if file.exists() else b""
        if self.at not in self.path:
            return self.answer(content, len(content))
        with contextlib.suppress(ConnectionError, TimeoutError):
            getattr(self, self.how)(content)
        return None

    def answer(self, content, length):
        self.send_response(200)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(content)

    def silent(self, _):
        self.server.over.wait()

    def stalls(self, content):
        self.answer(content[: len(content) // 2], len(content))
        self.server.over.wait()

    def trickles(self, content):
        self.answer(b"", len(content))
        for byte in content:
            self.wfile.write(bytes([byte]))
            if self.server.over.wait(0.2):
                break

    def endless(self, content, length=None):
        self.answer(content, length)
        while not self.server.over.is_set():
            type(self).sent += self.wfile.write(bytes(2**16))

    def longer(self, content):
        self.endless(content, 2**40)

    def shorter(self, content):
        self.answer(content[: len(content) // 2], len(content))
        self.close_connection = True

    def truncated(self, content):
        self.answer(content[: len(content) // 2], len(content) // 2)

    def elsewhere(self, content):
        self.send_response(206)
        self.send_header("Content-Range", f"bytes 7-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - 7))
        self.end_headers()
        self.wfile.write(content[7:])

    def noise(self, content):
        self.wfile.write(content)

    def gone(self, _):
        self.connection.close()

    def busy(self, _):
        self.send_response(503)
        self.send_header("Retry-After", "0.01")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def busy_twice(self, content):
        with self.server.lock:
            self.server.asked[self.path] = asked = self.server.asked.get(self.path, 0) + 1
        self.busy(content) if asked < 3 else self.answer(content, len(content))

    def log_message(self, *_):
        pass


@pytest.fixture
def harmful(made, monkeypatch):
    """A function that starts a harmful server and gives its URL; readers wait a while for an answer, twice."""
    monkeypatch.setenv("PREP_TIMEOUT", "0.5")
    monkeypatch.setenv("PREP_RETRIES", "1")
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    servers = []

    def start(how, at):
        handler = type("Handler", (Harm,), {"root": made.path, "how": how, "at": at})
        server = Server(("127.0.0.1", 0), handler)
        server.daemon_threads, server.over = True, threading.Event()
        server.lock, server.asked = threading.Lock(), {}
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/prep.zarr", handler

    yield start
    for server in servers:
        server.over.set()
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("how", "at"),
    [
        ("silent", "prep.zarr/zarr.json"),
        ("silent", "UP/zarr.json"),
        ("stalls", "full/zarr.json"),
        ("stalls", "UP/c/0/0/0"),
        ("trickles", "prep.zarr/zarr.json"),
        ("trickles", "UP/c/0/0/0"),
    ],
)
def test_a_server_that_stalls_ends_an_attach(made, harmful, how, at):
    url, _ = harmful(how, at)
    model = tiny.llama()
    with (
        bounded(30),
        pytest.raises(StoreError, match=r"cannot be read \(no answer in time, tried 2 times; PREP_T") as caught,
    ):
        prep.attach(model, url, rank=RANK)
    assert len(str(caught.value).splitlines()) == 1
    assert not any("core" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("shorter", r"cannot be read \(the answer broke off before its end, tried 2 times\)"),
        ("truncated", r"does not hold .* bytes: restore the store from a copy"),
        ("elsewhere", r"cannot be read \(the server sent another part than was asked for\)"),
        ("noise", r"cannot be read \("),
        ("gone", r"cannot be read \(.*, tried 2 times\)"),
        ("busy", r"cannot be read \(503.*, tried 2 times\)"),
    ],
)
def test_a_server_that_lies_or_fails_ends_in_one_line(made, harmful, how, said):
    url, _ = harmful(how, "UP/c/0/0/0")
    with bounded(30), pytest.raises(StoreError, match=f"P.*{said}") as caught:
        prep.attach(tiny.llama(), url, rank=RANK)
    assert len(str(caught.value).splitlines()) == 1


def test_what_passes_is_tried_again(made, harmful, monkeypatch):
    monkeypatch.setenv("PREP_RETRIES", "2")
    url, _ = harmful("busy_twice", "full/")
    assert open_store(url).bases["full"].hash == open_store(made.store).bases["full"].hash
    monkeypatch.setenv("PREP_RETRIES", "1")
    url, _ = harmful("busy_twice", "full/")
    with pytest.raises(StoreError, match=r"503.*, tried 2 times"):
        _ = open_store(url).bases["full"]


def test_an_s3_server_that_stalls_ends_an_attach(made, harmful, s3, monkeypatch):
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", harmful("silent", "")[0].removesuffix("/prep.zarr"))
    s3fs.S3FileSystem.clear_instance_cache()  # one that has met the other server would go there
    try:
        with bounded(30), pytest.raises(StoreError, match=r"cannot be read \(no answer in time, tried 2 times; PREP_T"):
            prep.attach(tiny.llama(), s3.url, rank=RANK)
    finally:
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize(("at", "limit"), [("prep.zarr/zarr.json", 40_000_001), ("UP/c/0/0/0", 2 * RANK * 80 * 4)])
@pytest.mark.parametrize("how", ["endless", "longer"])
def test_no_more_is_read_than_was_asked_for(made, harmful, how, at, limit):
    url, server = harmful(how, at)
    with bounded(30), pytest.raises(StoreError, match=r"larger than 40 MB|does not hold .* bytes"):
        open_store(url).bases[
            "full"
        ].read()  # of whole files: what is behind the part that a rank needs is not asked for
    assert server.sent < limit + 2**25  # what the buffers of two sockets hold


def test_parts_of_files_with_and_without_ranges(made, web, shelf):
    """The web server of Python ignores ranges, S3 does not."""
    key = "moments/full-48/mean/c/0/0"
    whole = (made.store / key).read_bytes()
    for url in (str(made.store), web.url, shelf.url, "memory://parts/prep.zarr"):
        if url.startswith("memory"):
            push(made.store, url)
        files = schema.zarr_store(url, read_only=True)
        for start, limit in [(0, 10), (7, 10), (len(whole) - 1, 2), (0, len(whole)), (0, len(whole) + 1)]:
            assert schema.fetch(files, key, limit, start) == whole[start : start + limit], (url, start, limit)
        assert schema.fetch(files, key, 5, len(whole) + 10) == b"", url
        assert schema.fetch(files, f"{key}x", 5) is None, url


def test_a_limit_that_is_none(made, web, monkeypatch):
    for value in ("soon", "0", "-1", "nan", "inf"):
        monkeypatch.setenv("PREP_TIMEOUT", value)
        with pytest.raises(StoreError, match=f"PREP_TIMEOUT={value} is no number of seconds"):
            open_store(web.url)
    monkeypatch.delenv("PREP_TIMEOUT")
    for value in ("some", "-1", "1.5", "101", "nan"):
        monkeypatch.setenv("PREP_RETRIES", value)
        with pytest.raises(StoreError, match=f"PREP_RETRIES={value} is no number of retries up to 100"):
            open_store(web.url)


# Local files that are none


@pytest.mark.parametrize("name", ["zarr.json", "bases/full/zarr.json", "bases/full/32x48/UP/c/0/0/0"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_only_regular_files_are_read(made, tmp_path, name, kind):
    store = shutil.copytree(made.store, tmp_path / "s.zarr")
    (store / name).unlink()
    os.mkfifo(store / name) if kind == "pipe" else (store / name).symlink_to("/dev/zero")
    for action in (
        lambda: prep.attach(tiny.llama(), store, rank=RANK),
        lambda: push(store, f"memory://{kind}{len(name)}/prep.zarr"),
        lambda: pull(store, tmp_path / "copy.zarr"),
    ):
        with bounded(30), pytest.raises(StoreError, match=r"cannot be read \(no regular file\)") as caught:
            action()
        assert len(str(caught.value).splitlines()) == 1
    linked = tmp_path / "linked"
    (store / name).unlink()
    (store / name).rename(linked) if (store / name).exists() else shutil.copy(made.store / name, linked)
    (store / name).symlink_to(linked)
    prep.attach(tiny.llama(), store, rank=RANK)  # a link to a regular file is one
