"""A folder per class, or any tree of images when no labels are wanted.

Every file is an input whatever its name, except those whose name, or that of a folder above them,
starts with a dot: they belong to tools. Without labels, a bucket has no such names: each of its
keys is an input.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa

from cnnray.datasets.sources.base import SPLIT_NAMES, Entry, entry_tables, is_hidden, read_each
from cnnray.errors import StorageError
from cnnray.storage import Store, StoredObject, child

MAX_FOLDERS = 1000
"""Of a tree without labels; one listing of everything takes fewer requests than more of them."""

EVERYTHING = "*"


@dataclass(frozen=True)
class FolderSource:
    """Images below ``store``, labelled by the folder they are in.

    The layout is ``class/**`` or, when every immediate folder is named as a split,
    ``split/class/**``. Files beside the class folders are listed without a label. Without
    ``labelled`` the layout is free, and there are neither labels nor splits.

    A partition that ends with ``/`` is everything below that folder, EVERYTHING is what it says;
    any other is the files directly in the folder of that name, the root being the empty name.
    """

    store: Store
    labelled: bool = True

    def partitions(self) -> list[str]:
        """The files beside the class folders, then each class folder."""
        folders = self._folders(self.store)
        if not self.labelled and len(folders) > MAX_FOLDERS:
            return [EVERYTHING]
        if not (self.labelled and folders and all(name.lower() in SPLIT_NAMES for name in folders)):
            return ["", *(f"{name}/" for name in folders)]
        partitions = [""]
        for split in folders:
            partitions.append(split)
            classes = self._folders(child(self.store, split))
            partitions += (f"{split}/{name}/" for name in classes)
        return partitions

    def list(self, partition: str) -> Iterator[pa.Table]:
        """The files of one folder, in the order of their names; keys are paths below the root."""
        label, split = self._label_and_split(partition)
        takes_all = self._takes_all
        yield from entry_tables(
            Entry(item.key, item.key, 0, item.size, item.etag, label, split)
            for item in self._objects(partition)
            if takes_all or not is_hidden(item.key)
        )

    def read(self, entries: pa.Table) -> Iterator[bytes | StorageError]:
        """The bytes of each file."""
        columns = (entries[name].to_pylist() for name in ("path", "etag"))
        return read_each(self._read, zip(*columns, strict=True))

    def _read(self, file: tuple[str, str]) -> bytes:
        path, etag = file
        return self.store.read(path, if_match=etag)

    def _label_and_split(self, partition: str) -> tuple[str | None, str | None]:
        if not self.labelled or not partition:
            return None, None
        folder, is_class, _ = partition.rpartition("/")
        if not is_class:
            return None, SPLIT_NAMES[partition.lower()]
        split, has_split, label = folder.rpartition("/")
        return label or None, SPLIT_NAMES[split.lower()] if has_split else None

    def _objects(self, partition: str) -> Iterator[StoredObject]:
        if partition == EVERYTHING:
            return self.store.list()
        if partition.endswith("/"):
            return self.store.list(partition)
        return self.store.list(f"{partition}/" if partition else "", recursive=False)

    def _folders(self, store: Store) -> Sequence[str]:
        names = store.list_folders()
        return names if self._takes_all else [name for name in names if not is_hidden(name)]

    @property
    def _takes_all(self) -> bool:
        return not self.labelled and self.store.uri.startswith("s3://")
