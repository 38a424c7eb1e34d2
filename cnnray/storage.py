"""The one door to local disk and object storage: list, read, conditional create, digest.

A ``Store`` is a folder or an S3 prefix; keys are paths below it, opaque and byte-exact. Stores are
small, picklable and open their client on first use, so they travel to workers. Credentials, region
and endpoint come from the standard AWS environment and profile on each machine, never from a
settings file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import threading
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from cnnray.errors import AlreadyExistsError, MissingObjectError, StorageError

OBJECT_DEADLINE_SECONDS = 120.0
"""Longest time one object may take, retries included: no client has such a limit of its own."""

TEMPORARY_PREFIX, TEMPORARY_SUFFIX = ".cnnray-", ".tmp"
"""Of a local file that is being written: it does not exist yet, so it is never listed."""

LIST_PAGE_SIZE = 1000
READ_CONCURRENCY = 16


@dataclass(frozen=True, slots=True)
class StoredObject:
    """One listed object: its key below the store, its size in bytes, its etag."""

    key: str
    size: int
    etag: str


class Store(Protocol):
    """A folder or an object prefix. Keys use ``/``; every method may raise ``StorageError``."""

    @property
    def uri(self) -> str:
        """Where this store is, as the user would write it."""

    def read(self, key: str, *, offset: int = 0, length: int | None = None) -> bytes:
        """The bytes of an object, or of a range of it. Raises ``MissingObjectError``."""

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        """Every object below ``prefix``, in the order of its key's UTF-8 bytes within a folder."""

    def list_folders(self) -> Sequence[str]:
        """The names of the immediate sub-folders, sorted."""

    def head(self, key: str) -> StoredObject | None:
        """The object's size and etag, or None when it does not exist."""

    def create(self, key: str, data: bytes) -> None:
        """Write an object that must not exist.

        Succeeds, too, when it exists with the same content: that is what a retry after a lost
        reply sees. Raises ``AlreadyExistsError`` when it holds anything else.
        """

    def write(self, key: str, data: bytes) -> None:
        """Write or replace an object; a reader sees the old bytes or the new ones."""

    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is no error."""

    def open(self, key: str) -> BinaryIO:
        """A seekable reader, for formats that read ranges."""


def open_store(uri: str) -> Store:
    """The store at a local path or ``s3://bucket/prefix``; ``StorageError`` for other schemes."""
    if uri.startswith("s3://"):
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        if not bucket:
            raise StorageError(f"no bucket in {uri!r}", hint="write s3://bucket/prefix")
        if "@" in bucket:
            raise StorageError(
                "credentials in a URI are refused", hint="use the AWS environment or a profile"
            )
        return S3Store(bucket=bucket, prefix=prefix)
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


def split_uri(uri: str) -> tuple[Store, str]:
    """The store that holds the object at ``uri``, and its key there."""
    if uri.startswith("s3://"):
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        return open_store(f"s3://{bucket}"), key
    path = Path(os.path.abspath(os.path.expanduser(uri.removeprefix("file://"))))
    return LocalStore(root=str(path.parent)), path.name


def child(store: Store, name: str) -> Store:
    """The store one folder below."""
    return open_store(f"{store.uri.rstrip('/')}/{name}")


def sha256(data: bytes) -> str:
    """The hex digest that manifests and bundles record."""
    return hashlib.sha256(data).hexdigest()


def encode_json(value: Any) -> bytes:
    """The one JSON form of documents that cnnray writes: readable, key order kept, no NaN."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def read_json(store: Store, key: str) -> Any:
    """A JSON document. Raises ``MissingObjectError``, or ``StorageError`` when it is not JSON."""
    try:
        return json.loads(store.read(key))
    except ValueError as error:
        raise StorageError(f"{store.uri}/{key} is not JSON: {error}") from error


def read_many(store: Store, keys: Iterable[str]) -> Iterator[bytes | StorageError]:
    """The bytes of each object in the order asked, or the error that each one met."""

    def read_one(key: str) -> bytes | StorageError:
        try:
            return store.read(key)
        except StorageError as error:
            return error

    with ThreadPoolExecutor(READ_CONCURRENCY) as pool:
        yield from pool.map(read_one, keys)


@dataclass(frozen=True)
class LocalStore:
    """A folder on a local or mounted disk."""

    root: str

    @property
    def uri(self) -> str:
        return self.root

    def _path(self, key: str) -> str:
        return os.path.join(self.root, key)

    def read(self, key: str, *, offset: int = 0, length: int | None = None) -> bytes:
        with self.open(key) as file:
            try:
                file.seek(offset)
                return file.read(-1 if length is None else length)
            except OSError as error:
                raise StorageError(f"cannot read {self._path(key)}: {error.strerror}") from error

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        top = self._path(prefix)
        if not os.path.isdir(top):
            raise MissingObjectError(f"no such folder: {top}")
        yield from self._walk(top, seen=set())

    def _walk(self, folder: str, *, seen: set[tuple[int, int]]) -> Iterator[StoredObject]:
        try:
            status = os.stat(folder)
            with os.scandir(folder) as entries:
                ordered = sorted(entries, key=lambda entry: os.fsencode(entry.name))
        except OSError as error:
            raise StorageError(f"cannot list {folder}: {error.strerror}") from error
        if (status.st_dev, status.st_ino) in seen:  # a symbolic link to a folder above
            return
        seen = seen | {(status.st_dev, status.st_ino)}
        for entry in ordered:
            if os.path.isdir(entry.path):  # unlike entry.is_dir(), bears a link to itself
                yield from self._walk(entry.path, seen=seen)
            elif os.path.isfile(entry.path) and not _is_temporary(entry.name):
                file_status = entry.stat()
                key = _printable(os.path.relpath(entry.path, self.root))
                yield StoredObject(key=key, size=file_status.st_size, etag=_etag(file_status))

    def list_folders(self) -> Sequence[str]:
        if not os.path.isdir(self.root):
            raise MissingObjectError(f"no such folder: {self.root}")
        with os.scandir(self.root) as entries:
            return sorted(_printable(entry.name) for entry in entries if os.path.isdir(entry.path))

    def head(self, key: str) -> StoredObject | None:
        try:
            status = os.stat(self._path(key))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            raise StorageError(f"cannot read {self._path(key)!r}: {error}") from error
        if stat.S_ISDIR(status.st_mode):
            return None
        return StoredObject(key=key, size=status.st_size, etag=_etag(status))

    def create(self, key: str, data: bytes) -> None:
        path = self._path(key)
        with _temporary_file(path, data) as temporary:
            try:
                os.link(temporary, path)  # atomic, and fails when the name is taken
            except FileExistsError:
                if self.read(key) != data:
                    raise AlreadyExistsError(f"{path} exists already") from None

    def write(self, key: str, data: bytes) -> None:
        path = self._path(key)
        with _temporary_file(path, data) as temporary:
            os.replace(temporary, path)

    def delete(self, key: str) -> None:
        path = self._path(key)
        try:
            os.unlink(path)
        except (FileNotFoundError, NotADirectoryError):
            pass
        except (OSError, ValueError) as error:
            raise StorageError(f"cannot delete {path!r}: {error}") from error
        with contextlib.suppress(OSError):  # as in an object store, no folder is left empty
            while (path := os.path.dirname(path)) != self.root:
                os.rmdir(path)

    def open(self, key: str) -> BinaryIO:
        path = self._path(key)
        try:
            return open(path, "rb")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise MissingObjectError(f"no such file: {path}") from error
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            raise StorageError(f"cannot read {path!r}: {error}") from error


@contextlib.contextmanager
def _temporary_file(path: str, data: bytes) -> Iterator[str]:
    """A file of ``data`` beside ``path``, to be put there; whatever happens, it is gone after."""
    name = f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}{TEMPORARY_SUFFIX}"
    temporary = os.path.join(os.path.dirname(path), name)
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise StorageError(f"cannot write {path!r}: {reason}") from error
    finally:
        with contextlib.suppress(OSError, ValueError):
            os.unlink(temporary)


def _is_temporary(name: str) -> bool:
    return name.startswith(TEMPORARY_PREFIX) and name.endswith(TEMPORARY_SUFFIX)


def _etag(status: os.stat_result) -> str:
    return f"{status.st_mtime_ns:x}-{status.st_size:x}"


def _printable(name: str) -> str:
    """A file name as text; bytes that are not UTF-8 are shown escaped, and then not readable."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


@dataclass(frozen=True)
class S3Store:
    """A prefix of an S3 bucket, through s3fs's client and the AWS environment."""

    bucket: str
    prefix: str

    @property
    def uri(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def _key(self, key: str) -> str:
        folder = self.prefix.rstrip("/")
        return f"{folder}/{key}" if folder and key else folder or key

    def _call(self, method: str, **arguments: Any) -> Any:
        from fsspec.asyn import sync

        filesystem = _s3_filesystem()
        try:
            return sync(
                filesystem.loop,
                filesystem._call_s3,
                method,
                Bucket=self.bucket,
                timeout=OBJECT_DEADLINE_SECONDS,
                **arguments,
            )
        except Exception as error:
            raise _storage_error(error, self, arguments.get("Key")) from error

    def read(self, key: str, *, offset: int = 0, length: int | None = None) -> bytes:
        if length == 0:
            return b""
        end = "" if length is None else str(offset + length - 1)
        ranged = {"Range": f"bytes={offset}-{end}"} if offset or length is not None else {}
        from fsspec.asyn import sync

        filesystem = _s3_filesystem()

        async def get() -> bytes:
            reply = await filesystem._call_s3(
                "get_object", Bucket=self.bucket, Key=self._key(key), **ranged
            )
            async with reply["Body"] as body:
                return cast(bytes, await body.read())

        for last_attempt in (False, False, True):  # the SDK does not retry a body that breaks off
            try:
                return cast(bytes, sync(filesystem.loop, get, timeout=OBJECT_DEADLINE_SECONDS))
            except Exception as error:
                if _http_status(error) == 416:  # the range begins beyond the end
                    return b""
                named = _storage_error(error, self, self._key(key))
                if last_attempt or not _is_broken_body(error):
                    raise named from error
        raise AssertionError("unreachable")

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        base = self.prefix.rstrip("/") + "/" if self.prefix.rstrip("/") else ""
        for page in self._pages(base + prefix):
            for item in page.get("Contents", ()):
                key = item["Key"].removeprefix(base)
                if key and not key.endswith("/"):  # a "folder" object that consoles create
                    yield StoredObject(key=key, size=item["Size"], etag=item["ETag"].strip('"'))

    def list_folders(self) -> Sequence[str]:
        base = self.prefix.rstrip("/") + "/" if self.prefix.rstrip("/") else ""
        pages = self._pages(base, Delimiter="/")
        return sorted(
            item["Prefix"].removeprefix(base).rstrip("/")
            for page in pages
            for item in page.get("CommonPrefixes", ())
        )

    def _pages(self, prefix: str, **arguments: Any) -> Iterator[dict[str, Any]]:
        arguments |= {"Prefix": prefix, "MaxKeys": LIST_PAGE_SIZE}
        while True:
            page = self._call("list_objects_v2", **arguments)
            yield page
            if not page.get("IsTruncated"):
                return
            arguments["ContinuationToken"] = page["NextContinuationToken"]

    def head(self, key: str) -> StoredObject | None:
        reply = self._head(key)
        if reply is None:
            return None
        return StoredObject(key=key, size=reply["ContentLength"], etag=reply["ETag"].strip('"'))

    def _head(self, key: str) -> dict[str, Any] | None:
        try:
            return cast(dict[str, Any], self._call("head_object", Key=self._key(key)))
        except MissingObjectError:
            return None

    def create(self, key: str, data: bytes) -> None:
        digest = sha256(data)
        try:
            self._put(key, data, digest, IfNoneMatch="*")
        except StorageError as error:
            if _http_status(error.__cause__) not in (409, 412):
                raise
            # A refusal may be the echo of our own write whose reply was lost: look who won.
            reply = self._head(key)
            if reply is None or reply.get("Metadata", {}).get("cnnray-sha256") != digest:
                raise AlreadyExistsError(f"{self.uri}/{key} exists already") from error

    def write(self, key: str, data: bytes) -> None:
        self._put(key, data, sha256(data))

    def _put(self, key: str, data: bytes, digest: str, **condition: str) -> None:
        self._call(
            "put_object",
            Key=self._key(key),
            Body=data,
            Metadata={"cnnray-sha256": digest},
            **condition,
        )

    def delete(self, key: str) -> None:
        self._call("delete_object", Key=self._key(key))

    def open(self, key: str) -> BinaryIO:
        filesystem = _s3_filesystem()
        try:
            file = filesystem.open(f"{self.bucket}/{self._key(key)}", "rb", cache_type="none")
        except Exception as error:
            raise _storage_error(error, self, self._key(key)) from error
        return cast(BinaryIO, file)


_clients = threading.local()


def _s3_filesystem() -> Any:
    """This thread's s3fs, with the timeouts and retries of the retry policy."""
    if not hasattr(_clients, "filesystem"):
        import s3fs

        _clients.filesystem = s3fs.S3FileSystem(
            config_kwargs={
                "connect_timeout": 5,
                "read_timeout": 20,
                "retries": {"mode": "standard", "max_attempts": 5},
                "max_pool_connections": 64,
            },
            use_listings_cache=False,
        )
    return _clients.filesystem


def _http_status(error: BaseException | None) -> int | None:
    """The HTTP status behind an s3fs error: its Python types differ between servers."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return cast("int | None", response.get("ResponseMetadata", {}).get("HTTPStatusCode"))
        error = error.__cause__ or error.__context__
    return None


def _error_code(error: BaseException | None) -> str:
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
        error = error.__cause__ or error.__context__
    return ""


def _is_broken_body(error: BaseException) -> bool:
    return type(error).__name__ in (
        "ResponseStreamingError",
        "IncompleteReadError",
        "ClientPayloadError",
        "IncompleteRead",
    )


def _storage_error(error: BaseException, store: S3Store, key: str | None) -> StorageError:
    """What went wrong, in one line with the remedy."""
    where = f"s3://{store.bucket}/{key}" if key else f"s3://{store.bucket}"
    status, code, kind = _http_status(error), _error_code(error), type(error).__name__
    if code == "NoSuchBucket" or (isinstance(error, FileNotFoundError) and key is None):
        return StorageError(
            f"no such bucket: {store.bucket}", hint="create it, or check AWS_ENDPOINT_URL"
        )
    if status == 404 or isinstance(error, FileNotFoundError):
        return MissingObjectError(f"no such object: {where}")
    if kind == "NoCredentialsError":
        return StorageError(
            f"no credentials for {where}", hint="set AWS_ACCESS_KEY_ID or AWS_PROFILE"
        )
    if status in (401, 403) or isinstance(error, PermissionError):
        return StorageError(f"access denied: {where}", hint="check the key's permissions")
    if kind in ("EndpointConnectionError", "ConnectTimeoutError"):
        return StorageError(f"cannot reach the object store for {where}", hint=str(error))
    if kind == "FSTimeoutError":
        return StorageError(f"{where} took longer than {OBJECT_DEADLINE_SECONDS:.0f} s")
    return StorageError(f"{where}: {error}")
