"""Stores that go to a repository of the hub in a few commits, and come from there as a snapshot.

Contents go up before the commit that names them, and what is there already is not sent again: a push or pull that broke
off goes on where it was. A store of up to `OPERATIONS` files is one commit, which replaces another store at once; of a
larger one the last commit brings the root's zarr.json, and the first one takes the old root away.
"""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..errors import StoreError, first_line
from .format import schema
from .format.documents import MAX_DOCUMENT
from .format.hub import Repository, commit_of, hub_store
from .format.remote import timeout
from .manifest import CARD

OPERATIONS = 1000  # of one commit: huggingface_hub takes as many where the hub is quick
PATIENCE = 10  # times the limit of a read for what the hub has to work at
_ROOT = "zarr.json"


@dataclass(frozen=True)
class Target:
    """Where a store is to go: the commit that is there now, the names below the folder, the card if there is one."""

    at: Repository
    commit: str
    names: frozenset[str]
    card: str | None

    @property
    def occupied(self) -> bool:
        """Whether a store, or what is called like one, is there."""
        return _ROOT in self.names


def target(at: Repository) -> Target:
    """What is where a store is to go; a repository that does not exist is made, a private one.

    Raises StoreError where the revision is no branch of it, and whatever huggingface_hub raises.
    """
    if at.pinned:
        raise StoreError(f"{at.url} names a commit, which stays as it is: name a branch, or none")
    with _session() as api:
        commit = commit_of(at)
        if commit is None:
            api.create_repo(at.id, repo_type=at.kind, private=True, exist_ok=True)
            commit = commit_of(at)
        if commit is None:
            raise StoreError(f"{at.url} names a branch that is not there: make it on the hub, or leave it out")
        names = frozenset(_sizes(api, at, commit))
    card = None
    if CARD in names:
        raw = schema.fetch(hub_store(at.at(commit)), CARD, MAX_DOCUMENT)
        card = (raw or b"").decode(errors="replace")
    return Target(at, commit, names, card)


def upload(to: Target, contents: Mapping[str, Path], last: Mapping[str, bytes], gone: frozenset[str]) -> None:
    """Commit files by name; `last` with the last commit, which takes the names `gone` away."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    at, commit = to.at, to.commit
    operations: list[Any] = [CommitOperationAdd(at.path(name), content) for name, content in contents.items()]
    operations += [CommitOperationDelete(at.path(name), is_folder=False) for name in sorted(gone)]
    final = [CommitOperationAdd(at.path(name), content) for name, content in last.items()]
    if to.occupied and len(operations) + len(final) > OPERATIONS:
        operations.insert(0, CommitOperationDelete(at.path(_ROOT), is_folder=False))
    size = OPERATIONS - len(final)
    parts = [operations[i : i + size] for i in range(0, len(operations), size)] or [[]]
    with _session() as api:
        for number, part in enumerate(parts, 1):
            whole = number == len(parts)
            done = api.create_commit(
                at.id,
                part + final if whole else part,
                commit_message="Store of prep" if len(parts) == 1 else f"Store of prep ({number} of {len(parts)})",
                repo_type=at.kind,
                revision=at.revision,
                parent_commit=commit,
            )
            commit = done.oid


def withdraw(at: Repository) -> None:
    """Take the root's metadata away, without which what is there is no store."""
    from huggingface_hub import CommitOperationDelete

    with _session() as api:
        api.create_commit(
            at.id,
            [CommitOperationDelete(at.path(_ROOT), is_folder=False)],
            commit_message="No store: it was not found whole",
            repo_type=at.kind,
            revision=at.revision,
        )


class Snapshot:
    """A repository's folder at one commit, files of which are downloaded to the hub's cache and stay there."""

    def __init__(self, at: Repository):
        commit = commit_of(at)
        if commit is None:
            hub_store(at)  # says so
        assert commit is not None
        self.at = at.at(commit)
        with self._reading(), _session() as api:
            self.sizes = _sizes(api, self.at, commit)

    def download(self, limits: Mapping[str, int], pattern: str = "*") -> Path:
        """Where the files of those names are, each of at most so many bytes; what is there is not asked for again.

        pattern: one that they all match, and few others.

        StoreError where one is missing or larger, the disk is full, or the hub gives no answer.
        """
        from huggingface_hub import constants, snapshot_download

        for name, limit in limits.items():
            if name not in self.sizes:
                raise StoreError(f"{self.at.url}/{name} is missing: restore the store from a copy")
            if self.sizes[name] > limit:
                raise StoreError(f"{self.at.url}/{name} is larger than {limit:,} bytes: restore the store from a copy")
        unwanted = (name for name in self.sizes.keys() - limits.keys() if fnmatchcase(name, pattern))
        with schema.disk_guard(constants.HF_HUB_CACHE), self._reading(), _session():
            root = snapshot_download(
                self.at.id,
                repo_type=self.at.kind,
                revision=self.at.revision,
                allow_patterns=f"{glob.escape(self.at.path(''))}{pattern}",
                ignore_patterns=[glob.escape(self.at.path(name)) for name in unwanted],
                endpoint=constants.ENDPOINT,
                library_name="prep",
            )
        return Path(root, self.at.folder)

    def mended(self) -> bool:
        """Download again what the cache holds otherwise than the repository; whether there was any such file."""
        from huggingface_hub import constants

        where = {"repo_type": self.at.kind, "revision": self.at.revision, "cache_dir": constants.HF_HUB_CACHE}
        with schema.disk_guard(constants.HF_HUB_CACHE), self._reading(), _session() as api:
            damaged = api.verify_repo_checksums(self.at.id, **where).mismatches
            for file in damaged:
                api.hf_hub_download(self.at.id, file["path"], **where, force_download=True)
        return bool(damaged)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except StoreError:
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in schema.DISK_FULL:
                raise
            cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
            raise StoreError(
                f"{self.at.url} cannot be read ({first_line(cause)}): the same command goes on from there"
            ) from error


def _sizes(api: Any, at: Repository, commit: str) -> dict[str, int]:
    """Size of every file by its name below the folder."""
    from huggingface_hub.errors import EntryNotFoundError

    prefix = at.path("")
    try:
        entries = list(api.list_repo_tree(at.id, at.folder or None, recursive=True, revision=commit, repo_type=at.kind))
    except EntryNotFoundError:
        return {}
    sizes = {entry.path: entry.size for entry in entries if hasattr(entry, "size")}
    return {path.removeprefix(prefix): size for path, size in sizes.items() if path.startswith(prefix)}


@contextlib.contextmanager
def _session() -> Iterator[Any]:
    """The hub's interface, where requests that would wait for ever have limits; it shows no bars and no warnings."""
    from huggingface_hub import HfApi, get_session
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    seconds, silent, session = timeout(), are_progress_bars_disabled(), get_session()
    level = logging.get_verbosity()

    def limited(request: Any) -> None:
        limits = request.extensions.get("timeout") or {}
        most = seconds if request.method in ("GET", "HEAD") else PATIENCE * seconds
        names = ("connect", "read", "write", "pool")
        given = {name: most if limits.get(name) is None else limits[name] for name in names}
        request.extensions = {**request.extensions, "timeout": given}

    hooks = session.event_hooks
    session.event_hooks = {**hooks, "request": [*hooks["request"], limited]}
    disable_progress_bars()
    logging.set_verbosity_error()
    try:
        yield HfApi(library_name="prep")
    finally:
        session.event_hooks = hooks
        logging.set_verbosity(level)
        if not silent:
            enable_progress_bars()
