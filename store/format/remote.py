"""Stores at URLs: any fsspec file system. Reading asks for single files by name; nothing is listed."""

from __future__ import annotations

from zarr.abc.store import Store as ZarrStore

from ...errors import StoreError


def url_store(url: str, read_only: bool = True) -> ZarrStore:
    """The files below `url`. StoreError where fsspec or the file system's own package is missing, or it is unknown."""
    from zarr.storage import FsspecStore

    try:
        return FsspecStore.from_url(url.rstrip("/"), read_only=read_only)
    except ImportError as error:
        raise StoreError(f'{url} needs another package ({error}): pip install "prep-bases[remote]"') from error
    except (ValueError, OSError) as error:
        raise StoreError(f"{url} cannot be opened ({error}): write it like s3://bucket/prep.zarr") from error
