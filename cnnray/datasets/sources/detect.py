"""Open a user's images: tell a folder of them from tables, tars and IDX files."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from cnnray.datasets.manifest import MANIFEST
from cnnray.datasets.sources.base import Source, is_hidden
from cnnray.datasets.sources.dataset import DatasetSource
from cnnray.datasets.sources.folder import FolderSource
from cnnray.datasets.sources.idx import IdxSource, is_idx_name
from cnnray.datasets.sources.inventory import InventorySource, find_inventory
from cnnray.datasets.sources.table import TableSource
from cnnray.datasets.sources.webdataset import (
    COMPRESSED_SUFFIXES,
    WebDatasetSource,
    compressed_tar,
)
from cnnray.errors import DataError, MissingObjectError, SettingsError
from cnnray.storage import Store, open_store, split_uri

FORMATS = ("auto", "folder", "table", "webdataset", "idx", "dataset", "inventory")

PEEK_FILES = 1000
"""Files of a folder that are looked at to tell what it is."""

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
OTHER_SUFFIX = re.compile(
    r"\.(csv|tsv|parquet|json|jsonl|txt|md|xml|ya?ml|zip|7z|rar|gz|tgz|bz2|tbz2|xz|txz|zst"
    r"|npy|npz|h5|mat|pkl|pt|tfrecord|db|py|pdf)"
)
"""A folder that holds nothing else holds no images."""


def open_source(
    uri: str, *, format: str = "auto", labelled: bool = True, **options: str | None
) -> Source:
    """Open the images at ``uri``, telling their format by what lies there.

    A .csv or .parquet file, or a folder of nothing but .parquet, is a table; a .tar, or a folder of
    tars without images beside them, is a webdataset; ``*-ubyte[.gz]`` are idx; a packed dataset is
    known by its manifest; the manifest.json of an S3 Inventory is an inventory; all else is a
    folder of images. Options (``path_column``, ``label_column``, ``split_column``, ``key_column``,
    ``etag_column``) belong to tables; None is the same as leaving one out.

    Raises ``DataError`` when there are no images at all, ``SettingsError`` for a wrong option.
    """
    columns = {name: value for name, value in options.items() if value is not None}
    place = _look(uri, labelled=labelled)
    chosen = _detect(place) if format == "auto" else format
    if columns and chosen != "table":
        raise SettingsError(f"{', '.join(columns)}: only a table has columns, {uri} is a {chosen}")
    if chosen == "folder":
        if not place.names:
            raise _no_images(place)
        return FolderSource(store=place.store, labelled=labelled)
    if chosen == "table":
        return TableSource(store=place.store, file=place.file, labelled=labelled, **columns)
    if chosen == "webdataset":
        return WebDatasetSource(store=place.store, file=place.file, labelled=labelled)
    if chosen == "idx":
        return IdxSource(store=place.store, file=place.file, labelled=labelled)
    if chosen == "dataset":
        return DatasetSource(store=place.store)
    if chosen == "inventory":
        return InventorySource(store=place.store, file=place.file or MANIFEST)
    raise SettingsError(f"no format {format!r}", hint=f"use one of {', '.join(FORMATS)}")


@dataclass(frozen=True)
class _Place:
    """What lies at a URI: one file in its folder's store, or the first files of a folder."""

    uri: str
    store: Store
    file: str | None
    names: list[str]


def _look(uri: str, *, labelled: bool) -> _Place:
    store = open_store(uri)
    may_be_file = uri.startswith("s3://")
    names = []
    try:
        names = _first_names(store, hidden=False)
        if not (names or labelled) and may_be_file:  # a bucket has no hidden images
            names = _first_names(store, hidden=True)
    except MissingObjectError:  # a local path that is no folder
        may_be_file = True
    if names:
        return _Place(uri, store, None, names)
    folder, name = _split_file(uri)
    if may_be_file and name and folder.head(name) is not None:
        return _Place(uri, folder, name, [])
    raise DataError(f"no images at all in {uri}: there are no files", hint="check the path")


def _first_names(store: Store, *, hidden: bool) -> list[str]:
    found = (item.key for item in store.list() if is_hidden(item.key) == hidden)
    return list(itertools.islice(found, PEEK_FILES))


def _split_file(uri: str) -> tuple[Store, str]:
    """The folder of a file, as a store, and the file's name."""
    if not uri.startswith("s3://"):
        return split_uri(uri)
    folder, _, name = uri.rpartition("/")
    return (open_store(folder), name) if folder != "s3:/" else (open_store(uri), "")


def _detect(place: _Place) -> str:
    if place.file is not None:
        return _detect_file(place)
    suffixes = {PurePosixPath(name).suffix.lower() for name in place.names}
    if MANIFEST in place.names and suffixes == {".json", ".parquet"}:
        return "dataset"
    if suffixes == {".parquet"}:
        return "table"
    if suffixes.intersection(IMAGE_SUFFIXES):
        return "folder"
    if ".tar" in suffixes:
        return "webdataset"
    if any(is_idx_name(PurePosixPath(name).name) for name in place.names):
        return "idx"
    if all(OTHER_SUFFIX.fullmatch(suffix) for suffix in suffixes):
        raise _no_images(place)
    return "folder"


def _detect_file(place: _Place) -> str:
    name = (place.file or "").lower()
    if name.endswith((".csv", ".parquet")):
        return "table"
    if name.endswith(".tar"):
        return "webdataset"
    if name.endswith(("-ubyte", "-ubyte.gz")):
        return "idx"
    if place.file == MANIFEST and find_inventory(place.store, MANIFEST) is not None:
        return "inventory"
    raise _no_images(place)


def _no_images(place: _Place) -> DataError:
    """What was found instead of images."""
    names = place.names or [place.file or ""]
    for name in names:
        if name.lower().endswith(COMPRESSED_SUFFIXES):
            return compressed_tar(f"{place.store.uri}/{name}")
    found = f"found {', '.join(repr(name) for name in names[:3])}" + (", ..." if names[3:] else "")
    return DataError(
        f"no images at all in {place.uri}: {found}",
        hint="name a folder of images, a .csv or .parquet table, a .tar, or a folder of IDX files",
    )
