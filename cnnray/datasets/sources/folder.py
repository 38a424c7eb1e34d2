"""A folder per class, or any tree of images when no labels are wanted.

Every file is an input whatever its name, except those whose name, or that of a folder above them,
starts with a dot.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from cnnray.datasets.sources.base import SPLIT_NAMES, Entry, entry_tables, is_hidden, read_each
from cnnray.errors import StorageError
from cnnray.storage import Store, StoredObject, child


@dataclass(frozen=True)
class FolderSource:
    """Images below ``store``, labelled by the folder they are in.

    The layout is ``class/**`` or, when every immediate folder is named as a split,
    ``split/class/**``. Files beside the class folders are listed without a label. Without
    ``labelled`` the layout is free, and there are neither labels nor splits.

    A partition that ends with ``/`` is everything below that folder; any other is the files
    directly in the folder of that name, the root being the empty name.
    """

    store: Store
    labelled: bool = True

    def partitions(self) -> list[str]:
        """The files beside the class folders, then each class folder."""
        folders = _visible_folders(self.store)
        if not (self.labelled and folders and all(name.lower() in SPLIT_NAMES for name in folders)):
            return ["", *(f"{name}/" for name in folders)]
        partitions = [""]
        for split in folders:
            partitions.append(split)
            classes = _visible_folders(child(self.store, split))
            partitions += (f"{split}/{name}/" for name in classes)
        return partitions

    def list(self, partition: str) -> Iterator[pa.Table]:
        """The files of one folder, in the order of their names; keys are paths below the root."""
        label, split = self._label_and_split(partition)
        yield from entry_tables(
            Entry(item.key, item.key, 0, item.size, item.etag, label, split)
            for item in self._objects(partition)
            if not is_hidden(item.key)
        )

    def read(self, entries: pa.Table) -> Iterator[bytes | StorageError]:
        """The bytes of each file."""
        return read_each(self.store.read, entries["path"].to_pylist())

    def _label_and_split(self, partition: str) -> tuple[str | None, str | None]:
        if not self.labelled or not partition:
            return None, None
        folder, is_class, _ = partition.rpartition("/")
        if not is_class:
            return None, SPLIT_NAMES[partition.lower()]
        split, has_split, label = folder.rpartition("/")
        return label or None, SPLIT_NAMES[split.lower()] if has_split else None

    def _objects(self, partition: str) -> Iterator[StoredObject]:
        if partition.endswith("/"):
            yield from self.store.list(partition)
        else:
            yield from _files_directly_in(self.store, partition)


def _visible_folders(store: Store) -> list[str]:
    return [name for name in store.list_folders() if not is_hidden(name)]


def _files_directly_in(store: Store, folder: str) -> Iterator[StoredObject]:
    prefix = f"{folder}/" if folder else ""
    for item in store.list(prefix):
        if "/" not in item.key.removeprefix(prefix):
            yield item
