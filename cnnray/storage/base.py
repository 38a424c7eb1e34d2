"""What every store is and does, and the digests and documents kept in it."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from cnnray.errors import StorageError

READ_CONCURRENCY = 16
"""Most requests that one process keeps in flight."""


@dataclass(frozen=True, slots=True)
class StoredObject:
    """One listed object: its key below the store, its size in bytes, its etag."""

    key: str
    size: int
    etag: str


class Store(Protocol):
    """A folder or an object prefix.

    Keys use ``/``. Every method may raise ``StorageError``, and ``UnavailableError`` when the store
    gave no usable answer in time, however often it was asked.
    """

    @property
    def uri(self) -> str:
        """Where this store is, as the user would write it."""

    def read(
        self, key: str, *, offset: int = 0, length: int | None = None, if_match: str | None = None
    ) -> bytes:
        """The bytes of an object, or of a range of it, as far as it has them.

        Raises ``MissingObjectError``, and ``ChangedObjectError`` when the object's etag is not
        ``if_match`` (None and "" ask for no etag).
        """

    def list(self, prefix: str = "", *, recursive: bool = True) -> Iterator[StoredObject]:
        """Every object below ``prefix``, in the order of its key's UTF-8 bytes within a folder.

        ``prefix`` is "" or ends in "/". Without ``recursive``, the objects of that folder alone.
        """

    def list_folders(self) -> Sequence[str]:
        """The names of the immediate sub-folders, sorted."""

    def head(self, key: str) -> StoredObject | None:
        """The object's size and etag, or None when it does not exist."""

    def create(self, key: str, data: bytes) -> None:
        """Write an object that must not exist.

        Succeeds, too, when it exists with the same content: that is what a retry after a lost
        reply sees. Raises ``AlreadyExistsError`` when it holds anything else.
        """

    def refuses_overwrite(self, key: str) -> bool:
        """Whether ``create`` is safe here against other writers; may leave an object at ``key``."""

    def write(self, key: str, data: bytes) -> None:
        """Write or replace an object; a reader sees the old bytes or the new ones."""

    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is no error."""

    def open(self, key: str) -> BinaryIO:
        """A seekable reader, for formats that read ranges."""


def sha256(data: bytes) -> str:
    """The hex digest that manifests and bundles record."""
    return hashlib.sha256(data).hexdigest()


def encode_json(value: Any) -> bytes:
    """The one JSON form of documents that cnnray writes: readable, key order kept, no NaN."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def decode_json(data: bytes) -> Any:
    """The value of a JSON document. Raises ``ValueError`` for whatever else the bytes are."""
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def encode_parquet(table: pa.Table, *, compression: str = "snappy") -> bytes:
    """A table as the bytes of a Parquet file: the same table gives the same bytes."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression=compression)
    return buffer.getvalue()


def read_json(store: Store, key: str) -> Any:
    """A JSON document. Raises ``MissingObjectError``, or ``StorageError`` when it is not JSON."""
    try:
        return decode_json(store.read(key))
    except ValueError as error:
        raise StorageError(f"{store.uri}/{shown(key)} is not JSON: {error}") from error


def shown(name: str) -> str:
    """A key or path as a message may hold it: control characters are escaped."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in name)
