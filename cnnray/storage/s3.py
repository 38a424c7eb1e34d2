"""A prefix of an S3 bucket as a store."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from cnnray.errors import (
    AlreadyExistsError,
    ChangedObjectError,
    MissingObjectError,
    StorageError,
    UnavailableError,
)
from cnnray.storage.base import StoredObject, sha256
from cnnray.storage.connection import connect
from cnnray.storage.reader import ObjectReader
from cnnray.storage.replies import etag_of, http_status, object_name
from cnnray.storage.retry import Deadline

LIST_PAGE_SIZE = 1000

CREATE_ROUNDS = 3
"""How often a name that is refused as taken, and then is not there, is tried."""

DIGEST_KEY = "cnnray-sha256"
"""Metadata by which a writer knows its own object again."""


@dataclass(frozen=True)
class S3Store:
    """A prefix of an S3 bucket, through the AWS environment: s3fs's client and one to read fast."""

    bucket: str
    prefix: str
    conditional_writes: bool = True

    @property
    def uri(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    @property
    def _base(self) -> str:
        """What the keys of all objects of this store begin with."""
        folder = self.prefix.rstrip("/")
        return f"{folder}/" if folder else ""

    def _key(self, key: str) -> str:
        return self._base + key if key else self.prefix.rstrip("/")

    def _name(self, key: str) -> str:
        return object_name(self.bucket, self._key(key))

    def _call(self, method: str, *, size: int = 0, **arguments: Any) -> dict[str, Any]:
        """The reply of an operation on the bucket or, by ``Key``, on an object of ``size``."""
        key = arguments.pop("Key", None)
        reply, _ = connect().request(
            method, bucket=self.bucket, key=key, deadline=Deadline(size), **arguments
        )
        return reply

    def read(
        self, key: str, *, offset: int = 0, length: int | None = None, if_match: str | None = None
    ) -> bytes:
        if length == 0:
            return b""
        connection, deadline, full_key = connect(), Deadline(), self._key(key)
        found = connection.read_fast(
            bucket=self.bucket,
            key=full_key,
            deadline=deadline,
            offset=offset,
            length=length,
            if_match=if_match,
        )
        if isinstance(found, bytes):
            return found
        arguments = {"IfMatch": f'"{if_match}"'} if if_match else {}
        if offset or length is not None:
            arguments["Range"] = f"bytes={offset}-{'' if length is None else offset + length - 1}"
        try:
            reply, data = connection.request(
                "get_object",
                bucket=self.bucket,
                key=full_key,
                deadline=deadline,
                earlier=found,
                **arguments,
            )
        except StorageError as error:
            if http_status(error.__cause__) == 416:  # the range begins beyond the end
                return b""
            raise
        if if_match and etag_of(reply) != if_match:  # by a store that knows no If-Match
            raise ChangedObjectError(f"{self._name(key)} is no longer the object that was listed")
        if "Range" in arguments and "ContentRange" not in reply:  # by one that knows no ranges
            return data[offset:][:length]
        return data

    def list(self, prefix: str = "", *, recursive: bool = True) -> Iterator[StoredObject]:
        for page in self._pages(self._base + prefix, **({} if recursive else {"Delimiter": "/"})):
            for item in page.get("Contents", ()):
                key, size = item["Key"].removeprefix(self._base), item["Size"]
                if key and (size or not key.endswith("/")):  # empty "folders" are of consoles
                    yield StoredObject(key=key, size=size, etag=etag_of(item))

    def list_folders(self) -> Sequence[str]:
        return sorted(
            item["Prefix"].removeprefix(self._base).removesuffix("/")
            for page in self._pages(self._base, Delimiter="/")
            for item in page.get("CommonPrefixes", ())
        )

    def _pages(self, prefix: str, **arguments: Any) -> Iterator[dict[str, Any]]:
        arguments |= {"Prefix": prefix, "MaxKeys": LIST_PAGE_SIZE}
        while True:
            page = self._call("list_objects_v2", **arguments)
            yield page
            if not page.get("IsTruncated"):
                return
            token = page.get("NextContinuationToken")
            if not token or token == arguments.get("ContinuationToken"):
                raise StorageError(f"the listing of {self.uri} does not go on")
            arguments["ContinuationToken"] = token

    def head(self, key: str) -> StoredObject | None:
        reply = self._head(key)
        if reply is None:
            return None
        return StoredObject(key=key, size=reply["ContentLength"], etag=etag_of(reply))

    def _head(self, key: str) -> dict[str, Any] | None:
        try:
            return self._call("head_object", Key=self._key(key))
        except MissingObjectError:
            return None

    def create(self, key: str, data: bytes) -> None:
        for _ in range(CREATE_ROUNDS):
            if self._put_new(key, data):
                return
            # A refusal may be the echo of our own write whose reply was lost: look who won.
            reply = self._head(key)
            if reply is not None:
                if reply.get("Metadata", {}).get(DIGEST_KEY) == sha256(data):
                    return
                raise AlreadyExistsError(f"{self._name(key)} exists already")
        raise UnavailableError(f"{self._name(key)} is refused as existing, yet is not there")

    def _put_new(self, key: str, data: bytes) -> bool:
        """Write the object unless there is one; False when there seems to be."""
        if not self.conditional_writes:
            if self._head(key) is not None:
                return False
            self.write(key, data)
            return True
        try:
            self._put(key, data, IfNoneMatch="*")
        except StorageError as error:
            if http_status(error.__cause__) in (409, 412):
                return False
            raise
        return True

    def refuses_overwrite(self, key: str) -> bool:
        for _ in range(2):
            try:
                self._put(key, b"probe", IfNoneMatch="*")
            except StorageError as error:
                status = http_status(error.__cause__)
                if status == 501:  # the store knows that it cannot
                    return False
                if status == 412:
                    return True
                raise
        return False

    def write(self, key: str, data: bytes) -> None:
        self._put(key, data)

    def _put(self, key: str, data: bytes, **condition: str) -> None:
        self._call(
            "put_object",
            size=len(data),
            Key=self._key(key),
            Body=data,
            Metadata={DIGEST_KEY: sha256(data)},
            **condition,
        )

    def delete(self, key: str) -> None:
        with contextlib.suppress(MissingObjectError):
            self._call("delete_object", Key=self._key(key))

    def open(self, key: str) -> BinaryIO:
        found = self.head(key)
        if found is None:
            self.read(key, length=1)  # tells, as a reply to HEAD cannot, a bucket that is missing
            raise MissingObjectError(f"no such object: {self._name(key)}")
        return cast(BinaryIO, ObjectReader(self, found))
