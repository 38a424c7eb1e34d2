"""From what a user writes to the store that is meant."""

from __future__ import annotations

import os
from pathlib import Path

from cnnray.errors import StorageError
from cnnray.storage.base import Store
from cnnray.storage.local import LocalStore
from cnnray.storage.s3 import S3Store


def open_store(uri: str, *, single_writer: bool = False) -> Store:
    """The store at a local path or ``s3://bucket/prefix``; ``StorageError`` for other schemes.

    ``single_writer`` is the user's word that nobody else writes there: ``create`` on S3 then looks
    before it writes, for stores that know no conditional writes.
    """
    if uri.startswith("s3://"):
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        if not bucket:
            raise StorageError(f"no bucket in {uri!r}", hint="write s3://bucket/prefix")
        if "@" in bucket:
            raise StorageError(
                "credentials in a URI are refused", hint="use the AWS environment or a profile"
            )
        return S3Store(bucket=bucket, prefix=prefix, conditional_writes=not single_writer)
    scheme, separator, _ = uri.partition("://")
    if separator and scheme != "file":
        raise StorageError(
            f"cannot open {scheme}:// addresses: only local paths and s3:// are supported",
            hint="copy the data to S3 or to a local folder",
        )
    path = uri.removeprefix("file://")
    if not path:
        raise StorageError("an empty path", hint="name a folder or s3://bucket/prefix")
    return LocalStore(root=os.path.abspath(os.path.expanduser(path)))


def split_uri(uri: str, *, single_writer: bool = False) -> tuple[Store, str]:
    """The store that holds the object at ``uri``, and its key there."""
    if uri.startswith("s3://"):
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        return open_store(f"s3://{bucket}", single_writer=single_writer), key
    path = Path(os.path.abspath(os.path.expanduser(uri.removeprefix("file://"))))
    return LocalStore(root=str(path.parent)), path.name


def child(store: Store, name: str) -> Store:
    """The store one folder below; who may write is as in ``store``."""
    single_writer = isinstance(store, S3Store) and not store.conditional_writes
    return open_store(f"{store.uri.rstrip('/')}/{name}", single_writer=single_writer)
