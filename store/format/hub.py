"""Stores in repositories of the hub, `hf://[datasets/]owner/name[@revision][/folder]`: read as from a web server.

A reader finds out once which commit the revision is, and asks for the files of that commit by name: a store that is
replaced meanwhile is not mixed with its successor, and nothing is listed or downloaded that is not needed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote, unquote

from zarr.abc.store import Store as ZarrStore

from ...errors import StoreError
from .files import unreadable
from .remote import get, url_store
from .untrusted import loads
from .zarr_core import sync

_URL = re.compile(
    r"hf://(?:(?P<kind>model|dataset)s/)?(?!(?:models|datasets|spaces|kernels|buckets)/)(?P<id>[\w.-]+/[\w.-]+)"
    r"(?:@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+))?(?:/(?P<folder>.+))?"
)
_ANSWER = 2**20  # bytes of what the hub says of a revision
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Repository:
    """A folder of a repository, the root by default. kind: model or dataset; revision: branch, tag, commit or None."""

    url: str
    kind: str
    id: str
    revision: str | None = None
    folder: str = ""

    def path(self, name: str) -> str:
        """Where the file of that name in the folder is in the repository."""
        return f"{self.folder}/{name}" if self.folder else name

    def at(self, commit: str) -> Repository:
        """The same folder as it is at a commit."""
        return replace(self, revision=commit)

    @property
    def pinned(self) -> bool:
        """Whether the revision is a commit, which stays as it is."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None


def repository(location: object) -> Repository | None:
    """The repository that a location names; None where it is none of a model or data set on the hub."""
    found = _URL.fullmatch(str(location).rstrip("/"))
    if found is None:
        return None
    kind, name, revision, folder = found.group("kind", "id", "revision", "folder")
    return Repository(str(location).rstrip("/"), kind or "model", name, revision and unquote(revision), folder or "")


def hub_store(at: Repository, read_only: bool = True) -> ZarrStore:
    """The files of a repository's folder, for reading. StoreError where there is no such repository, or to write."""
    if not read_only:
        raise StoreError(f"{at.url} cannot be written to file by file: work on a copy, `prep pull`, and push that")
    commit = commit_of(at)
    if commit is None:
        raise StoreError(f"no repository or revision at {at.url}: check its name, or log in with `hf auth login`")
    prefix = "datasets/" if at.kind == "dataset" else ""
    return _files(at, f"{prefix}{at.id}/resolve/{commit}/{at.folder}")


def commit_of(at: Repository) -> str | None:
    """The commit that a repository's revision is now; None where the hub shows none."""
    if at.pinned:
        return at.revision
    answers, key = _files(at, f"api/{at.kind}s/{at.id}/revision"), quote(at.revision or "main", safe="")
    try:
        raw = sync(get(answers, f"{key}?expand=sha", 0, _ANSWER))
        commit = None if raw is None else loads(raw)["sha"]
        if commit is not None and not _COMMIT.fullmatch(commit):
            raise ValueError("the answer is none of the hub")
        return commit
    except Exception as error:  # each file system has its own kinds
        if getattr(error, "status", None) in (401, 403):
            return None
        if isinstance(error, (KeyError, TypeError, ValueError)):
            error = ValueError("the answer is none of the hub; HF_ENDPOINT names it")
        raise unreadable(answers, "", error) from error


def _files(at: Repository, path: str) -> Any:
    """What is below a path of the hub's server, under the name of the repository in messages."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers

    if constants.HF_HUB_OFFLINE:
        raise StoreError(f"{at.url} is on the hub, and HF_HUB_OFFLINE keeps prep from it: unset that, or name a copy")
    headers = build_hf_headers(library_name="prep")
    store: Any = url_store(f"{constants.ENDPOINT}/{path}", storage_options={"headers": headers})
    store.address = at.url
    return store
