"""A stand-in of the hub: the part of its HTTP interface that huggingface_hub calls for repositories, in memory.

It is no hub. It answers as huggingface_hub 2.4 expects it of one: a commit must have the parent that it names, contents
that are text come in the commit itself and all others by git-lfs, downloads are redirected to a second server, which
stands for the delivery network and must see no token. Xet, which huggingface_hub prefers for
transfers, is not there: with `HF_HUB_DISABLE_XET` it takes git-lfs.
"""

import base64
import contextlib
import hashlib
import http.server
import json
import threading
from dataclasses import dataclass, field
from types import SimpleNamespace
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_standin"
PAGE = 20  # entries of a listing, 1000 at the hub


@dataclass
class Repo:
    """commits: oid -> path -> ("text", content) or ("lfs", sha256); order: of the commits of main."""

    private: bool
    commits: dict[str, dict[str, tuple[str, object]]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    summaries: list[str] = field(default_factory=list)

    def add(self, tree, branch="main", summary=""):
        oid = hashlib.sha1(f"{len(self.commits)} {branch} {sorted(tree)}".encode()).hexdigest()
        self.commits[oid], self.branches[branch] = tree, oid
        self.order.append(oid)
        self.summaries.append(summary)
        return oid


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub:
    """repos by `models/owner/name`; objects: of git-lfs; log: method, path and range of each request.

    refuse: gives the status of a request that is to fail; rot: may change what is stored.
    """

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.log: list[tuple[str, str, str | None]] = []
        self.refuse = lambda method, path: None
        self.rot = lambda content: content
        self.lock = threading.Lock()
        self.main, self.delivery = (self._start(kind) for kind in (Interface, Delivery))
        self.url, self.delivery_url = (f"http://127.0.0.1:{one.server_port}" for one in (self.main, self.delivery))

    def _start(self, kind):
        server = Server(("127.0.0.1", 0), type(kind.__name__, (kind,), {"hub": self}))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server

    def stop(self):
        for server in (self.main, self.delivery):
            server.shutdown()
            server.server_close()

    def names(self, repo, revision="main"):
        one = self.repos[repo]
        return set(one.commits[one.branches.get(revision, revision)])

    def content(self, repo, path, revision="main"):
        one = self.repos[repo]
        kind, content = one.commits[one.branches.get(revision, revision)][path]
        return content if kind == "text" else self.objects[content]

    def asked(self, method, part):
        return [path for how, path, _ in self.log if how == method and part in path]


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 64
    daemon_threads = True

    def handle_error(self, *_):
        """A client that has seen enough goes."""


class Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def parse_request(self):
        if not super().parse_request():
            return False
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = urlsplit(self.path)
        self.where, self.query = unquote(parts.path).strip("/"), parse_qs(parts.query)
        self.raw = parts.path.strip("/")
        with self.hub.lock:
            self.hub.log.append((self.command, self.path, self.headers.get("Range")))
            status = self.hub.refuse(self.command, self.path)
        if status is not None:
            self.answer(status, b"refused")
            return False
        return True

    def answer(self, status, content=b"", **headers):
        if not isinstance(content, bytes):
            content, headers = json.dumps(content).encode(), {"Content-Type": "application/json", **headers}
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def part(self, content, **headers):
        """Content as the request's range asks for it."""
        asked = self.headers.get("Range")
        if asked is None:
            return self.answer(200, content, **headers)
        first, _, last = asked.removeprefix("bytes=").partition("-")
        first, last = int(first), min(int(last or len(content)), len(content) - 1)
        if first >= len(content):
            return self.answer(416)
        about = f"bytes {first}-{last}/{len(content)}"
        return self.answer(206, content[first : last + 1], Content_Range=about, **headers)

    def log_message(self, *_):
        pass


class Delivery(Handler):
    def do_GET(self):
        if "Authorization" in self.headers:
            return self.answer(400, b"a token was shown to a stranger")
        return self.part(self.hub.objects[self.where])


class Interface(Handler):
    def do_GET(self):
        words = self.raw.split("/")
        if words[0] != "api":
            return self.resolve()
        repo = self.repo("/".join(words[1:4]))
        if repo is None:
            return self.answer(401, {"error": "Invalid username or password."}, X_Error_Code="RepoNotFound")
        revision = unquote(words[5])
        commit = repo.branches.get(revision, revision)
        if commit not in repo.commits:
            return self.answer(404, {"error": f"Invalid rev id: {revision}"}, X_Error_Code="RevisionNotFound")
        if words[4] == "revision":
            return self.answer(200, {"id": "/".join(words[2:4]), "sha": commit})
        return self.tree(repo.commits[commit], unquote("/".join(words[6:])))

    do_HEAD = do_GET

    def repo(self, name):
        one = self.hub.repos.get(name)
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        return one if one is not None and (known or not one.private) else None

    def tree(self, tree, folder):
        paths = sorted(path for path in tree if not folder or path.startswith(f"{folder}/"))
        if folder and not paths:
            return self.answer(404, {"error": f"{folder} does not exist"}, X_Error_Code="EntryNotFound")
        first = int(self.query.get("cursor", ["0"])[0])
        headers = {}
        if first + PAGE < len(paths):
            headers["Link"] = f'<{self.hub.url}/{self.raw}?recursive=true&cursor={first + PAGE}>; rel="next"'
        return self.answer(200, [self.entry(path, tree[path]) for path in paths[first : first + PAGE]], **headers)

    def entry(self, path, file):
        kind, content = file
        raw = content if kind == "text" else self.hub.objects[content]
        about = {"type": "file", "path": path, "size": len(raw), "oid": blob_id(raw)}
        return about if kind == "text" else {**about, "lfs": {"oid": content, "size": len(raw), "pointerSize": 130}}

    def resolve(self):
        where = self.where if self.where.startswith("datasets/") else f"models/{self.where}"
        kind, owner, name, _, revision, *path = where.split("/")
        repo = self.repo(f"{kind}/{owner}/{name}")
        if repo is None:
            return self.answer(401, X_Error_Code="RepoNotFound")
        commit = repo.branches.get(revision, revision)
        file = repo.commits.get(commit, {}).get("/".join(path))
        if file is None:
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        kind, content = file
        if kind == "text":
            return self.part(content, ETag=f'"{blob_id(content)}"', X_Repo_Commit=commit)
        linked = {"X-Linked-Etag": f'"{content}"', "X-Linked-Size": str(len(self.hub.objects[content]))}
        return self.answer(302, Location=f"{self.hub.delivery_url}/{content}", X_Repo_Commit=commit, **linked)

    def do_PUT(self):
        sha = hashlib.sha256(self.body).hexdigest()
        if self.where != f"lfs/{sha}":
            return self.answer(400, b"other contents")
        self.hub.objects[sha] = self.hub.rot(self.body)
        return self.answer(200)

    def do_POST(self):
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid username or password."})
        words = self.raw.split("/")
        if self.where == "api/validate-yaml":
            return self.answer(200, {"warnings": [], "errors": []})
        if self.where == "api/repos/create":
            return self.create(json.loads(self.body))
        if self.where.endswith(".git/info/lfs/objects/batch"):
            return self.answer(
                200, {"transfer": "basic", "objects": list(map(self.batch, json.loads(self.body)["objects"]))}
            )
        repo = self.repo("/".join(words[1:4]))
        if words[4] == "preupload":
            tree = repo.commits[repo.branches[unquote(words[5])]]
            return self.answer(200, {"files": [self.mode(tree, file) for file in json.loads(self.body)["files"]]})
        return self.commit(repo, unquote(words[5]), [json.loads(line) for line in self.body.splitlines()])

    def create(self, asked):
        name = f"{asked.get('type') or 'model'}s/{asked['organization']}/{asked['name']}"
        if name in self.hub.repos:
            return self.answer(409, {"url": f"{self.hub.url}/{name}", "error": "You already created this repo"})
        self.hub.repos[name] = Repo(asked.get("visibility") == "private" or bool(asked.get("private")))
        self.hub.repos[name].add({".gitattributes": ("text", b"*.bin filter=lfs")}, summary="initial commit")
        return self.answer(200, {"url": f"{self.hub.url}/{asked['organization']}/{asked['name']}"})

    def batch(self, file):
        if file["oid"] in self.hub.objects:
            return file
        return {**file, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{file['oid']}"}}}

    def mode(self, tree, file):
        kind, content = tree.get(file["path"], (None, None))
        text = True
        try:
            text = b"\0" not in base64.b64decode(file["sample"]).decode().encode()
        except UnicodeDecodeError:
            text = False
        oid = blob_id(content) if kind == "text" else content
        return {"path": file["path"], "uploadMode": "regular" if text else "lfs", "shouldIgnore": False, "oid": oid}

    def commit(self, repo, branch, lines):
        head, tree = lines[0]["value"], dict(repo.commits[repo.branches[branch]])
        if head.get("parentCommit", repo.branches[branch]) != repo.branches[branch]:
            return self.answer(412, {"error": "A commit has happened since. Please refresh and try again."})
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "deletedFile":
                tree.pop(value["path"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    return self.answer(400, {"error": f"{value['path']} was not uploaded"})
                tree[value["path"]] = ("lfs", value["oid"])
            else:
                tree[value["path"]] = ("text", base64.b64decode(value["content"]))
        oid = repo.add(tree, branch, head["summary"])
        name = self.raw.split("/")[2:4]
        return self.answer(200, {"commitUrl": f"{self.hub.url}/{'/'.join(name)}/commit/{oid}", "commitOid": oid})


@contextlib.contextmanager
def standing(patch, cache):
    """A stand-in that huggingface_hub in this process talks to, with a cache of its own; its `env` is for others."""
    from huggingface_hub import close_session, constants

    hub = Hub()
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
    settings = {"ENDPOINT": hub.url, "HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_XET": True, "HF_HUB_OFFLINE": False}
    for name, value in {**settings, "HUGGINGFACE_CO_URL_TEMPLATE": template}.items():
        patch.setattr(constants, name, value)
    patch.setenv("HF_TOKEN", TOKEN)
    env = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    hub.env = SimpleNamespace(**env)
    close_session()
    try:
        yield hub
    finally:
        close_session()
        hub.stop()
