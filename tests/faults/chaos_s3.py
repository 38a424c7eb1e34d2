"""An S3 server that fails on request: one folder, one process, nothing but the standard library.

``python chaos_s3.py --folder D`` serves it until SIGTERM; ``ChaosServer`` does so in this process;
``ChaosProcess`` starts the first from a test and steers it. Objects outlive the server: each is one
file that was renamed into place, so a server that was killed comes back with whole objects only.

Rules (``Rule``) say which requests fail and how. They are set in process or over HTTP, at a path
that no bucket can have: GET and POST ``/-/rules``, GET ``/-/operations?since=N``, POST
``/-/settings`` and ``/-/buckets``. Every operation is logged before its reply is sent; one that was
under way when the server was killed is not.

Any credentials are accepted. Not there: versions, ACLs, signatures, ListObjects v1, UploadPartCopy.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import bisect
import contextlib
import hashlib
import http.client
import io
import json
import os
import random
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import uuid
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from email.utils import formatdate
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import parse_qsl, quote, unquote_to_bytes
from xml.etree import ElementTree

HOST = "127.0.0.1"
PAGE_SIZE = 1000
MAX_KEY_BYTES = 1024
MAX_LINE_BYTES = 1 << 16
MAX_HEADERS = 200
HISTORY_CHANGES = 100_000
START_SECONDS = 30.0
STOP_SECONDS = 10.0
LIFETIME_SECONDS = 900

REFUSALS = {
    "503": (503, "SlowDown"),
    "500": (500, "InternalError"),
    "429": (429, "TooManyRequests"),
    "412": (412, "PreconditionFailed"),
    "409": (409, "ConditionalRequestConflict"),
    "access_denied": (403, "AccessDenied"),
}
"""Actions that refuse the operation: it is not done."""

ACTIONS = {
    **{name: f"reply with {code}, not done" for name, (_, code) in REFUSALS.items()},
    "reset": "RST instead of a reply, not done",
    "no_headers": "no reply at all until the client goes, not done",
    "delay": "wait `seconds`, then do it",
    "ignore_condition": "do it as if If-None-Match were not there",
    "stale_list": "list what was there `seconds` ago",
    "lost_reply": "do it, then close without a reply",
    "stall": "do it, send the reply's head and half of its body, then nothing",
    "truncate": "do it, send the reply's head and half of its body, then close",
    "drip": "do it, send the reply's body at `bytes_per_second`",
    "flip": "do it, send the reply with one bit of its body flipped",
}
"""A reply without a body is stalled, truncated and dripped within its first line."""


class S3Error(Exception):
    """A refusal, as S3 words it."""

    def __init__(self, status: int, code: str, message: str = "") -> None:
        super().__init__(code)
        self.status = status
        self.code = code
        self.message = message or code


# Objects on disk and their index


class Record(NamedTuple):
    """What is known of an object; the first line of its file."""

    key: str
    size: int
    etag: str
    modified: float
    headers: dict[str, str]  # of the reply to GET: content type, user metadata


class Index:
    """The records of one bucket in the order of their keys' UTF-8 bytes, and their last changes."""

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self.records = {record.key: record for record in records}
        self.keys = sorted(self.records)  # code points sort as their UTF-8 bytes do
        self._history: deque[tuple[float, str, Record | None]] = deque(maxlen=HISTORY_CHANGES)

    def change(self, key: str, record: Record | None) -> None:
        """Put a record in, or take one out."""
        before = self.records.get(key)
        self._history.append((time.time(), key, before))
        if record is not None:
            self.records[key] = record
            if before is None:
                bisect.insort(self.keys, key)
        elif before is not None:
            del self.records[key]
            del self.keys[bisect.bisect_left(self.keys, key)]

    def before(self, moment: float) -> Index:
        """The index as it was then."""
        records: dict[str, Record | None] = dict(self.records)
        for changed, key, record in reversed(self._history):
            if changed <= moment:
                break
            records[key] = record
        return Index(record for record in records.values() if record is not None)


class Buckets:
    """Buckets in a folder. Every change is one rename or unlink under one lock."""

    def __init__(self, folder: Path) -> None:
        self._objects, self._uploads = folder / "objects", folder / "uploads"
        self._temporary = folder / "temporary"
        shutil.rmtree(self._temporary, ignore_errors=True)  # writes that a kill cut off
        for path in (self._objects, self._uploads, self._temporary):
            path.mkdir(parents=True, exist_ok=True)
        self.lock = threading.RLock()
        self._indexes = {
            bucket.name: Index(_read_record(path) for path in bucket.iterdir())
            for bucket in self._objects.iterdir()
        }

    def create(self, bucket: str) -> None:
        """Add a bucket."""
        if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", bucket):
            raise S3Error(400, "InvalidBucketName")
        with self.lock:
            if bucket in self._indexes:
                raise S3Error(409, "BucketAlreadyOwnedByYou")
            (self._objects / bucket).mkdir()
            self._indexes[bucket] = Index()

    def index(self, bucket: str) -> Index:
        """The objects of a bucket."""
        try:
            return self._indexes[bucket]
        except KeyError:
            raise S3Error(404, "NoSuchBucket") from None

    def head(self, bucket: str, key: str) -> Record:
        """The record of an object."""
        try:
            return self.index(bucket).records[key]
        except KeyError:
            raise S3Error(404, "NoSuchKey", "The specified key does not exist.") from None

    def open(self, bucket: str, key: str) -> tuple[Record, BinaryIO]:
        """An object's record and its file, at the start of the body. Both are of one version."""
        self.head(bucket, key)
        try:
            file = self._path(bucket, key).open("rb")
        except FileNotFoundError:  # deleted in this moment
            raise S3Error(404, "NoSuchKey") from None
        return Record(*json.loads(file.readline())), file

    def put(
        self, bucket: str, key: str, body: bytes, *, request: Mapping[str, str], etag: str = ""
    ) -> Record:
        """Write an object if the request's conditions hold, at one moment."""
        index = self.index(bucket)
        etag = etag or hashlib.md5(body, usedforsecurity=False).hexdigest()
        record = Record(key, len(body), etag, time.time(), _stored_headers(request))
        temporary = self._temporary / uuid.uuid4().hex
        _write_record(temporary, record, body)
        with self.lock:
            try:
                _check_write(request, index.records.get(key))
            except S3Error:
                temporary.unlink()
                raise
            temporary.rename(self._path(bucket, key))
            index.change(key, record)
        return record

    def delete(self, bucket: str, key: str) -> None:
        """Remove an object, if it is there."""
        with self.lock:
            if key in self.index(bucket).records:
                self._path(bucket, key).unlink()
                self.index(bucket).change(key, None)

    def begin_upload(self, bucket: str, key: str, *, request: Mapping[str, str]) -> str:
        """The id of a new multipart upload."""
        self.index(bucket)
        upload = uuid.uuid4().hex
        building = self._temporary / upload
        building.mkdir()
        record = Record(key, 0, "", time.time(), _stored_headers(request))
        _write_record(building / "upload", record, b"")
        (self._uploads / bucket).mkdir(exist_ok=True)
        building.rename(self._uploads / bucket / upload)
        return upload

    def put_part(self, bucket: str, key: str, upload: str, number: int, body: bytes) -> str:
        """Write one part of an upload; its ETag."""
        folder, _ = self._upload(bucket, key, upload)
        etag = hashlib.md5(body, usedforsecurity=False).hexdigest()
        temporary = self._temporary / uuid.uuid4().hex
        _write_record(temporary, Record(key, len(body), etag, time.time(), {}), body)
        try:
            temporary.rename(folder / f"{number:05}")
        except FileNotFoundError:  # aborted in this moment
            raise S3Error(404, "NoSuchUpload") from None
        return etag

    def finish_upload(
        self,
        bucket: str,
        key: str,
        upload: str,
        *,
        parts: Sequence[tuple[int, str]],
        request: Mapping[str, str],
    ) -> Record:
        """Make the object of the parts that the client names."""
        folder, begun = self._upload(bucket, key, upload)
        if not parts or [number for number, _ in parts] != sorted({n for n, _ in parts}):
            raise S3Error(400, "InvalidPartOrder")
        bodies, digests = [], hashlib.md5(usedforsecurity=False)
        for number, etag in parts:
            path = folder / f"{number:05}"
            if not path.exists() or _read_record(path).etag != etag:
                raise S3Error(400, "InvalidPart")
            bodies.append(path.read_bytes().partition(b"\n")[2])
            digests.update(bytes.fromhex(etag))
        headers = {**request, **begun.headers}
        whole = f"{digests.hexdigest()}-{len(parts)}"
        record = self.put(bucket, key, b"".join(bodies), request=headers, etag=whole)
        shutil.rmtree(folder, ignore_errors=True)
        return record

    def abort_upload(self, bucket: str, key: str, upload: str) -> None:
        """Forget an upload and its parts."""
        folder, _ = self._upload(bucket, key, upload)
        shutil.rmtree(folder, ignore_errors=True)

    def uploads(self, bucket: str) -> list[tuple[str, str]]:
        """The (key, id) of each upload that is neither finished nor aborted."""
        self.index(bucket)
        begun = (self._uploads / bucket).glob("*/upload")
        return sorted((_read_record(path).key, path.parent.name) for path in begun)

    def _path(self, bucket: str, key: str) -> Path:
        return self._objects / bucket / hashlib.sha256(key.encode()).hexdigest()

    def _upload(self, bucket: str, key: str, upload: str) -> tuple[Path, Record]:
        self.index(bucket)
        folder = self._uploads / bucket / upload
        if re.fullmatch("[0-9a-f]{32}", upload) and (folder / "upload").exists():
            record = _read_record(folder / "upload")
            if record.key == key:
                return folder, record
        raise S3Error(404, "NoSuchUpload")


def _write_record(path: Path, record: Record, body: bytes) -> None:
    with path.open("xb") as file:
        file.write(json.dumps(record).encode() + b"\n" + body)


def _read_record(path: Path) -> Record:
    with path.open("rb") as file:
        return Record(*json.loads(file.readline()))


def _stored_headers(request: Mapping[str, str]) -> dict[str, str]:
    stored = {"content-type": request.get("content-type", "binary/octet-stream")}
    codings = [name.strip() for name in request.get("content-encoding", "").split(",")]
    coding = ",".join(name for name in codings if name not in ("", "aws-chunked"))
    if coding:
        stored["content-encoding"] = coding
    return stored | {name: v for name, v in request.items() if name.startswith("x-amz-meta-")}


def _check_write(request: Mapping[str, str], current: Record | None) -> None:
    if request.get("if-none-match") == "*" and current is not None:
        raise S3Error(412, "PreconditionFailed", "At least one of the pre-conditions did not hold")
    wanted = request.get("if-match")
    if wanted is not None and current is None:
        raise S3Error(404, "NoSuchKey")
    if wanted is not None and current is not None and wanted.strip('"') != current.etag:
        raise S3Error(412, "PreconditionFailed", "At least one of the pre-conditions did not hold")


# Requests and replies


@dataclass(frozen=True)
class Request:
    """One request, its body read and decoded."""

    method: str
    bucket: str
    key: str
    query: dict[str, str]
    headers: dict[str, str]  # names in lower case
    body: bytes

    @cached_property
    def operation(self) -> str:
        """The name that S3 has for this."""
        for method, level, mark, name in _OPERATIONS:
            if (method, level) == (self.method, "key" if self.key else "bucket") and (
                not mark or mark in self.query or mark in self.headers
            ):
                return name
        return "Unknown"

    @property
    def subject(self) -> str:
        """The key; the prefix of a listing."""
        return self.key or self.query.get("prefix", "")

    @cached_property
    def client(self) -> str:
        """The access key id that it is signed with."""
        signed = self.headers.get("authorization") or self.query.get("X-Amz-Credential", "")
        return signed.partition("Credential=")[2].partition("/")[0] or signed.partition("/")[0]

    @property
    def condition(self) -> str:
        """Its If-Match or If-None-Match, as one line."""
        given = ((name, self.headers.get(name)) for name in ("if-match", "if-none-match"))
        return ", ".join(f"{name}: {value}" for name, value in given if value is not None)


_OPERATIONS = (
    # method, level, query parameter or header, name; the first that fits
    ("GET", "bucket", "uploads", "ListMultipartUploads"),
    ("GET", "bucket", "location", "GetBucketLocation"),
    ("GET", "bucket", "list-type", "ListObjectsV2"),
    ("HEAD", "bucket", "", "HeadBucket"),
    ("PUT", "bucket", "", "CreateBucket"),
    ("POST", "bucket", "delete", "DeleteObjects"),
    ("GET", "key", "uploadId", "ListParts"),
    ("GET", "key", "", "GetObject"),
    ("HEAD", "key", "", "HeadObject"),
    ("PUT", "key", "uploadId", "UploadPart"),
    ("PUT", "key", "x-amz-copy-source", "CopyObject"),
    ("PUT", "key", "", "PutObject"),
    ("POST", "key", "uploads", "CreateMultipartUpload"),
    ("POST", "key", "uploadId", "CompleteMultipartUpload"),
    ("DELETE", "key", "uploadId", "AbortMultipartUpload"),
    ("DELETE", "key", "", "DeleteObject"),
)


@dataclass(frozen=True)
class Reply:
    """One reply."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    length: int | None = None  # of the body that HEAD does not send

    def head(self) -> bytes:
        """The status line and the headers."""
        lines = [f"HTTP/1.1 {self.status} {http.client.responses.get(self.status, 'Unknown')}"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        if self.status not in (204, 304):
            lines.append(
                f"content-length: {len(self.body) if self.length is None else self.length}"
            )
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace")


def read_request(stream: BinaryIO, connection: socket.socket) -> Request | None:
    """The next request of a connection, or None at its end. ``OSError`` when it breaks off."""
    line = stream.readline(MAX_LINE_BYTES)
    if not line:
        return None
    try:
        method, target, _ = line.decode("latin-1").split(" ")
        headers = _read_headers(stream)
        if headers.get("expect", "").lower() == "100-continue":
            connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = _read_body(stream, headers)
    except ValueError as error:
        raise ConnectionError("malformed request") from error
    path, _, query = target.partition("?")
    bucket, _, key = path.removeprefix("/").partition("/")
    return Request(
        method=method,
        bucket=bucket,
        key=_decode_once(key),
        query=dict(parse_qsl(query, keep_blank_values=True)),
        headers=headers,
        body=body,
    )


def _decode_once(path: str) -> str:
    """The text that a percent-encoded one stands for, whatever it looks like."""
    return unquote_to_bytes(path.encode("latin-1")).decode("utf-8", "surrogateescape")


def _read_headers(stream: BinaryIO) -> dict[str, str]:
    headers: dict[str, str] = {}
    for _ in range(MAX_HEADERS):
        line = stream.readline(MAX_LINE_BYTES).decode("latin-1")
        if line in ("\r\n", "\n"):
            return headers
        name, colon, value = line.partition(":")
        if not colon:
            break
        headers[name.lower()] = value.strip()
    raise ConnectionError("headers broke off")


def _read_body(stream: BinaryIO, headers: dict[str, str]) -> bytes:
    """The bytes that the client means; the trailers of aws-chunked are added to the headers."""
    if headers.get("transfer-encoding", "").lower() == "chunked":
        body = _read_chunks(stream)[0]
    else:
        length = int(headers.get("content-length", 0))
        body = stream.read(length)
        if len(body) < length:
            raise ConnectionError("body broke off")
    if headers.get("x-amz-content-sha256", "").startswith("STREAMING-"):
        body, trailers = _read_chunks(io.BytesIO(body))
        headers.update(trailers)
    return body


def _read_chunks(stream: BinaryIO) -> tuple[bytes, dict[str, str]]:
    """The body and the trailers of a chunked stream; HTTP's and AWS's are alike."""
    chunks = []
    while size := int(stream.readline(MAX_LINE_BYTES).partition(b";")[0], 16):
        chunk = stream.read(size)
        if len(chunk) < size or stream.readline(MAX_LINE_BYTES) != b"\r\n":
            raise ConnectionError("chunk broke off")
        chunks.append(chunk)
    return b"".join(chunks), _read_headers(stream)


def _check_request(request: Request) -> None:
    """Refuse bad keys, and bodies that are not what the client sent."""
    try:
        if len(request.key.encode()) > MAX_KEY_BYTES:
            raise S3Error(400, "KeyTooLongError", "Your key is too long")
    except UnicodeEncodeError:
        raise S3Error(400, "InvalidURI", "the key is not UTF-8") from None
    headers, body = request.headers, request.body
    if int(headers.get("x-amz-decoded-content-length", len(body))) != len(body):
        raise S3Error(400, "IncompleteBody")
    digest = headers.get("content-md5")
    if digest and _base64(hashlib.md5(body, usedforsecurity=False).digest()) != digest:
        raise S3Error(400, "BadDigest")
    checksum = headers.get("x-amz-checksum-crc32")
    whole = request.operation in ("PutObject", "UploadPart")  # elsewhere it is of another body
    if checksum and whole and _base64(zlib.crc32(body).to_bytes(4, "big")) != checksum:
        raise S3Error(400, "BadDigest")


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


_SPECIAL = re.compile("[&<>\"'\\x00-\\x1f\\x7f]")


def escape(text: str) -> str:
    """Text within XML; control characters as S3 writes them, which no XML parser accepts."""
    return _SPECIAL.sub(lambda match: f"&#{ord(match.group())};", text)


def _xml(root: str, content: str, *, status: int = 200) -> Reply:
    namespace = ' xmlns="http://s3.amazonaws.com/doc/2006-03-01/"' if root != "Error" else ""
    body = f'<?xml version="1.0" encoding="UTF-8"?>\n<{root}{namespace}>{content}</{root}>'
    return Reply(status, {"content-type": "application/xml"}, body.encode("utf-8", "replace"))


def _error(request: Request, error: S3Error) -> Reply:
    if request.method == "HEAD" or error.status == 304:
        return Reply(error.status)
    content = f"<Code>{error.code}</Code><Message>{escape(error.message)}</Message>"
    content += f"<Key>{escape(request.key)}</Key><BucketName>{escape(request.bucket)}</BucketName>"
    return _xml("Error", content, status=error.status)


# Operations: each takes the buckets and a request, and gives the reply


def _object_headers(record: Record) -> dict[str, str]:
    return {
        **record.headers,
        "etag": f'"{record.etag}"',
        "last-modified": formatdate(record.modified, usegmt=True),
        "accept-ranges": "bytes",
    }


def _check_read(headers: Mapping[str, str], record: Record) -> None:
    wanted, unwanted = headers.get("if-match"), headers.get("if-none-match")
    if wanted is not None and wanted.strip('"') not in ("*", record.etag):
        raise S3Error(412, "PreconditionFailed")
    if unwanted is not None and unwanted.strip('"') in ("*", record.etag):
        raise S3Error(304, "NotModified")


def _head_object(buckets: Buckets, request: Request) -> Reply:
    record = buckets.head(request.bucket, request.key)
    _check_read(request.headers, record)
    return Reply(200, _object_headers(record), length=record.size)


def _get_object(buckets: Buckets, request: Request) -> Reply:
    record, file = buckets.open(request.bucket, request.key)
    with file:
        _check_read(request.headers, record)
        headers = _object_headers(record)
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", ""))
        if not wanted or wanted.groups() == ("", ""):
            return Reply(200, headers, file.read())
        first, last = _range(*wanted.groups(), size=record.size)
        file.seek(first, os.SEEK_CUR)
        headers["content-range"] = f"bytes {first}-{last}/{record.size}"
        return Reply(206, headers, file.read(last - first + 1))


def _range(first: str, last: str, *, size: int) -> tuple[int, int]:
    if first:
        begin, end = int(first), min(int(last or size), size - 1)
    else:  # the last so many bytes
        begin, end = max(0, size - int(last)), size - 1
    if begin >= size:
        raise S3Error(416, "InvalidRange", "The requested range is not satisfiable")
    return begin, end


def _put_object(buckets: Buckets, request: Request) -> Reply:
    record = buckets.put(request.bucket, request.key, request.body, request=request.headers)
    return Reply(200, {"etag": f'"{record.etag}"'})


def _copy_object(buckets: Buckets, request: Request) -> Reply:
    source = _decode_once(request.headers["x-amz-copy-source"])
    bucket, _, key = source.removeprefix("/").partition("/")
    record, file = buckets.open(bucket, key)
    with file:
        body = file.read()
    headers = dict(request.headers)
    if headers.get("x-amz-metadata-directive", "COPY").upper() == "COPY":
        headers |= record.headers
    copy = buckets.put(request.bucket, request.key, body, request=headers)
    modified = _iso_time(copy.modified)
    content = f"<ETag>&#34;{copy.etag}&#34;</ETag><LastModified>{modified}</LastModified>"
    return _xml("CopyObjectResult", content)


def _delete_object(buckets: Buckets, request: Request) -> Reply:
    buckets.delete(request.bucket, request.key)
    return Reply(204)


def _delete_objects(buckets: Buckets, request: Request) -> Reply:
    keys = [item.text or "" for item in _parse_xml(request.body).findall("{*}Object/{*}Key")]
    for key in keys:
        buckets.delete(request.bucket, key)
    content = "".join(f"<Deleted><Key>{escape(key)}</Key></Deleted>" for key in keys)
    return _xml("DeleteResult", content)


def _parse_xml(body: bytes) -> ElementTree.Element:
    try:
        return ElementTree.fromstring(body)
    except ElementTree.ParseError:
        raise S3Error(400, "MalformedXML") from None


def _create_bucket(buckets: Buckets, request: Request) -> Reply:
    buckets.create(request.bucket)
    return Reply(200, {"location": f"/{request.bucket}"})


def _head_bucket(buckets: Buckets, request: Request) -> Reply:
    buckets.index(request.bucket)
    return Reply(200)


def _get_bucket_location(buckets: Buckets, request: Request) -> Reply:
    buckets.index(request.bucket)
    return _xml("LocationConstraint", "")


def _begin_upload(buckets: Buckets, request: Request) -> Reply:
    upload = buckets.begin_upload(request.bucket, request.key, request=request.headers)
    content = f"<Bucket>{request.bucket}</Bucket><Key>{escape(request.key)}</Key>"
    return _xml("InitiateMultipartUploadResult", f"{content}<UploadId>{upload}</UploadId>")


def _put_part(buckets: Buckets, request: Request) -> Reply:
    if "x-amz-copy-source" in request.headers:
        raise S3Error(501, "NotImplemented")
    number = request.query.get("partNumber", "")
    if not re.fullmatch(r"[1-9]\d{0,3}|10000", number):
        raise S3Error(400, "InvalidArgument")
    upload = request.query["uploadId"]
    etag = buckets.put_part(request.bucket, request.key, upload, int(number), request.body)
    return Reply(200, {"etag": f'"{etag}"'})


def _finish_upload(buckets: Buckets, request: Request) -> Reply:
    try:
        parts = [
            (int(part.findtext("{*}PartNumber", "")), part.findtext("{*}ETag", "").strip('"'))
            for part in _parse_xml(request.body).findall("{*}Part")
        ]
    except ValueError:
        raise S3Error(400, "MalformedXML") from None
    record = buckets.finish_upload(
        request.bucket,
        request.key,
        request.query["uploadId"],
        parts=parts,
        request=request.headers,
    )
    content = f"<Bucket>{request.bucket}</Bucket><Key>{escape(request.key)}</Key>"
    return _xml("CompleteMultipartUploadResult", f"{content}<ETag>&#34;{record.etag}&#34;</ETag>")


def _abort_upload(buckets: Buckets, request: Request) -> Reply:
    buckets.abort_upload(request.bucket, request.key, request.query["uploadId"])
    return Reply(204)


def _list_uploads(buckets: Buckets, request: Request) -> Reply:
    content = "".join(
        f"<Upload><Key>{escape(key)}</Key><UploadId>{upload}</UploadId></Upload>"
        for key, upload in buckets.uploads(request.bucket)
        if key.startswith(request.query.get("prefix", ""))
    )
    bucket = f"<Bucket>{request.bucket}</Bucket><IsTruncated>false</IsTruncated>"
    return _xml("ListMultipartUploadsResult", bucket + content)


HANDLERS: dict[str, Callable[[Buckets, Request], Reply]] = {
    "GetObject": _get_object,
    "HeadObject": _head_object,
    "PutObject": _put_object,
    "CopyObject": _copy_object,
    "DeleteObject": _delete_object,
    "DeleteObjects": _delete_objects,
    "CreateBucket": _create_bucket,
    "HeadBucket": _head_bucket,
    "GetBucketLocation": _get_bucket_location,
    "CreateMultipartUpload": _begin_upload,
    "UploadPart": _put_part,
    "CompleteMultipartUpload": _finish_upload,
    "AbortMultipartUpload": _abort_upload,
    "ListMultipartUploads": _list_uploads,
}
"""Every operation but ListObjectsV2, which needs more than the buckets."""


# Listing


@dataclass(frozen=True)
class Page:
    """One page of a listing; ``bound`` is the least key of the next one, None at the end."""

    records: list[Record]
    folders: list[str]
    bound: str | None


def select_page(index: Index, *, prefix: str, delimiter: str, bound: str, limit: int) -> Page:
    """Up to ``limit`` records and common prefixes, from the key ``bound`` on."""
    records: list[Record] = []
    folders: list[str] = []
    position = bisect.bisect_left(index.keys, max(prefix, bound))
    while position < len(index.keys) and (key := index.keys[position]).startswith(prefix):
        if len(records) + len(folders) == limit:
            return Page(records, folders, bound=key if limit else None)
        end = key.find(delimiter, len(prefix)) if delimiter else -1
        if end < 0:
            records.append(index.records[key])
            position += 1
        else:
            folder = key[: end + len(delimiter)]
            folders.append(folder)
            beyond = folder[:-1] + chr(ord(folder[-1]) + 1)
            position = bisect.bisect_left(index.keys, beyond)
    return Page(records, folders, bound=None)


def list_objects(buckets: Buckets, request: Request, *, page_size: int, age: float) -> Reply:
    """The reply to ListObjectsV2, of the bucket as it was ``age`` seconds ago."""
    query = request.query
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    try:
        wanted = int(query.get("max-keys", 1000))
        token = base64.urlsafe_b64decode(query.get("continuation-token", "")).decode()
    except (ValueError, binascii.Error):
        raise S3Error(400, "InvalidArgument") from None
    start_after = query.get("start-after", "")
    with buckets.lock:
        index = buckets.index(request.bucket)
        page = select_page(
            index.before(time.time() - age) if age else index,
            prefix=prefix,
            delimiter=delimiter,
            bound=token or (start_after + "\0" if start_after else ""),
            limit=max(0, min(wanted, page_size)),
        )
    encoded = query.get("encoding-type") == "url"

    def name(tag: str, text: str) -> str:
        return f"<{tag}>{quote(text, safe='/') if encoded else escape(text)}</{tag}>"

    content = [f"<Name>{request.bucket}</Name><MaxKeys>{wanted}</MaxKeys>", name("Prefix", prefix)]
    content += [name("Delimiter", delimiter)] if delimiter else []
    content += [name("StartAfter", start_after)] if start_after else []
    content += ["<EncodingType>url</EncodingType>"] if encoded else []
    content.append(f"<KeyCount>{len(page.records) + len(page.folders)}</KeyCount>")
    content.append(f"<IsTruncated>{str(page.bound is not None).lower()}</IsTruncated>")
    if page.bound is not None:
        following = base64.urlsafe_b64encode(page.bound.encode()).decode()
        content.append(f"<NextContinuationToken>{following}</NextContinuationToken>")
    content += [f"<Contents>{name('Key', r.key)}{_listed(r)}</Contents>" for r in page.records]
    content += [f"<CommonPrefixes>{name('Prefix', f)}</CommonPrefixes>" for f in page.folders]
    return _xml("ListBucketResult", "".join(content))


def _listed(record: Record) -> str:
    return (
        f"<LastModified>{_iso_time(record.modified)}</LastModified><ETag>&#34;{record.etag}&#34;"
        f"</ETag><Size>{record.size}</Size><StorageClass>STANDARD</StorageClass>"
    )


def _iso_time(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


# Rules and the log


@dataclass
class Rule:
    """Which requests fail, and how.

    ``method``, ``operation`` and ``client`` (access key id) are regular expressions for the whole
    value, ``key`` is searched for in the key, or in the prefix of a listing. Of the requests that
    fit, those at the 1-based positions ``nth`` are struck, or each with ``probability`` (by
    ``seed``), or all; at most ``times`` of them. A request is for the first rule that strikes it,
    and later rules do not count it.
    """

    action: str
    method: str = ".*"
    operation: str = ".*"
    client: str = ".*"
    key: str = ""
    nth: int | Sequence[int] | None = None
    probability: float | None = None
    seed: int = 0
    times: int | None = None
    seconds: float = 1.0
    bytes_per_second: float = 10.0

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise ValueError(f"no such action: {self.action!r}; there are {', '.join(ACTIONS)}")
        for pattern in (self.method, self.operation, self.client, self.key):
            re.compile(pattern)
        self.seen = 0
        self.struck = 0
        self._random = random.Random(self.seed)

    def report(self) -> dict[str, Any]:
        """Its fields, how many requests it has ``seen`` and how many it ``struck``."""
        return asdict(self) | {"seen": self.seen, "struck": self.struck}

    def strikes(self, request: Request) -> bool:
        """Count the request, if it fits, and decide."""
        fits = (
            re.fullmatch(self.method, request.method)
            and re.fullmatch(self.operation, request.operation)
            and re.fullmatch(self.client, request.client)
            and re.search(self.key, request.subject)
        )
        if not fits or (self.times is not None and self.struck >= self.times):
            return False
        self.seen += 1
        if self.nth is not None:
            chosen = self.seen in ([self.nth] if isinstance(self.nth, int) else self.nth)
        else:
            chosen = self.probability is None or self._random.random() < self.probability
        self.struck += chosen
        return chosen


class Operation(NamedTuple):
    """One line of the log. ``status`` is 0 for a request that was dropped before it was done."""

    number: int
    time: float
    method: str
    operation: str
    bucket: str
    key: str  # the prefix of a listing
    status: int
    etag: str
    client: str  # access key id
    condition: str
    fault: str


class OperationLog:
    """The operations in memory and, if asked, in a file that a later server goes on with."""

    def __init__(self, path: Path | None = None) -> None:
        self.operations: list[Operation] = []
        self._lock = threading.Lock()
        self._file = None
        if path is not None:
            lines = path.read_text().splitlines(keepends=True) if path.exists() else []
            whole = [line for line in lines if line.endswith("\n")]  # a kill may cut the last
            self.operations = [Operation(**json.loads(line)) for line in whole]
            path.write_text("".join(whole))
            self._file = path.open("a", buffering=1)

    def append(self, request: Request, *, status: int, etag: str, fault: str) -> None:
        """Number an operation and note it."""
        with self._lock:
            operation = Operation(
                number=self.operations[-1].number + 1 if self.operations else 1,
                time=time.time(),
                method=request.method,
                operation=request.operation,
                bucket=request.bucket,
                key=request.subject,
                status=status,
                etag=etag.strip('"'),
                client=request.client,
                condition=request.condition,
                fault=fault,
            )
            self.operations.append(operation)
            if self._file is not None:
                self._file.write(json.dumps(operation._asdict()) + "\n")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def select_operations(operations: Iterable[Operation], **wanted: Any) -> list[Operation]:
    """Those whose fields have the values asked for."""
    return [
        item
        for item in operations
        if all(getattr(item, name) == value for name, value in wanted.items())
    ]


def count_puts(operations: Iterable[Operation], *, bucket: str | None = None) -> Counter[str]:
    """How often each key was written, whether or not the client was told."""
    writes = ("PutObject", "CopyObject", "CompleteMultipartUpload")
    return Counter(
        item.key
        for item in operations
        if item.operation in writes and item.status == 200 and bucket in (None, item.bucket)
    )


# The server


class ChaosServer:
    """The server in this process, as a context manager; its load shares this process's GIL."""

    def __init__(
        self,
        folder: Path | str,
        *,
        port: int = 0,
        page_size: int = PAGE_SIZE,
        rules: Iterable[Mapping[str, Any]] = (),
        log: Path | None = None,
    ) -> None:
        self.page_size = page_size
        self._buckets = Buckets(Path(folder))
        self._log = OperationLog(log)
        self._lock = threading.Lock()
        self._rules: list[Rule] = []
        self.set_rules(*rules)
        self._stopping = threading.Event()
        self._connections: set[socket.socket] = set()
        self._listener = socket.create_server((HOST, port), backlog=256)
        self.endpoint = f"http://{HOST}:{self._listener.getsockname()[1]}"

    def __enter__(self) -> ChaosServer:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # close() alone would not wake accept()
        self._listener.close()
        with self._lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        self._log.close()

    def create_bucket(self, bucket: str) -> None:
        """Add a bucket."""
        self._buckets.create(bucket)

    def set_rules(self, *rules: Mapping[str, Any]) -> None:
        """Replace all rules; ``Rule`` has their fields. ``ValueError`` for one that is wrong."""
        try:
            parsed = [Rule(**rule) for rule in rules]
        except (TypeError, re.error) as error:
            raise ValueError(f"not a rule: {error}") from error
        with self._lock:
            self._rules = parsed

    def operations(self, **wanted: Any) -> list[Operation]:
        """The log, or the operations whose fields have these values."""
        return select_operations(list(self._log.operations), **wanted)

    def puts_per_key(self, bucket: str | None = None) -> Counter[str]:
        """How often each key was written."""
        return count_puts(self.operations(), bucket=bucket)

    def _accept(self) -> None:
        while not self._stopping.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                continue  # out of descriptors for a moment, or stopping
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            self._connections.add(connection)
        try:
            with connection, connection.makefile("rb") as stream:
                while request := read_request(stream, connection):
                    last = request.headers.get("connection", "").lower() == "close"
                    if not self._answer(request, connection) or last:
                        return
        except OSError:
            pass  # the client has gone
        finally:
            with self._lock:
                self._connections.discard(connection)

    def _answer(self, request: Request, connection: socket.socket) -> bool:
        """Do one request and reply to it; whether the connection is still good."""
        if request.bucket == "-":
            return _send(self._control(request), connection)
        with self._lock:
            rule = next((rule for rule in self._rules if rule.strikes(request)), None)
        fault = rule.action if rule else ""
        if rule and fault in ("reset", "no_headers"):
            self._log.append(request, status=0, etag="", fault=fault)
            (_reset if fault == "reset" else _wait_until_gone)(connection)
            return False
        if rule and fault == "delay":
            self._stopping.wait(rule.seconds)
        reply = self._perform(request, rule)
        etag = reply.headers.get("etag", "")
        self._log.append(request, status=reply.status, etag=etag, fault=fault)
        return _send(reply, connection, rule=rule, stopping=self._stopping)

    def _perform(self, request: Request, rule: Rule | None) -> Reply:
        action = rule.action if rule else ""
        try:
            if action in REFUSALS:
                raise S3Error(*REFUSALS[action])
            _check_request(request)
            if action == "ignore_condition":
                request = replace(request, headers={**request.headers, "if-none-match": ""})
            if request.operation == "ListObjectsV2":
                age = rule.seconds if rule and action == "stale_list" else 0.0
                return list_objects(self._buckets, request, page_size=self.page_size, age=age)
            if request.operation not in HANDLERS:
                raise S3Error(501, "NotImplemented", f"no {request.operation} here")
            return HANDLERS[request.operation](self._buckets, request)
        except S3Error as error:
            return _error(request, error)

    def _control(self, request: Request) -> Reply:
        """Steering: paths that no bucket can have; no operations, so no rule strikes them."""
        steps: dict[str, Callable[[Any], None]] = {
            "rules": lambda rules: self.set_rules(*rules),
            "buckets": self.create_bucket,
            "settings": lambda settings: setattr(self, "page_size", int(settings["page_size"])),
        }
        match request.method, request.key:
            case "POST", name if name in steps:
                try:
                    steps[name](json.loads(request.body))
                except (ValueError, TypeError, S3Error) as error:
                    return Reply(400, body=str(error).encode())
            case "GET", "rules":
                with self._lock:
                    return _json([rule.report() for rule in self._rules])
            case "GET", "operations":
                since = int(request.query.get("since", 0))
                known = list(self._log.operations)
                return _json([item._asdict() for item in known if item.number > since])
            case _:
                return Reply(404)
        return Reply(204)


def _json(value: Any) -> Reply:
    return Reply(200, {"content-type": "application/json"}, json.dumps(value).encode())


def _send(
    reply: Reply,
    connection: socket.socket,
    *,
    rule: Rule | None = None,
    stopping: threading.Event | None = None,
) -> bool:
    """Send a reply as the rule has it; whether the connection is still good."""
    head, body = reply.head(), reply.body
    action = rule.action if rule else ""
    good = len(head) if body else len("HTTP/1.1")
    if action == "lost_reply":
        return False
    if action in ("stall", "truncate"):
        connection.sendall((head + body)[: good + len(body) // 2])
        if action == "stall":
            _wait_until_gone(connection)
        return False
    if rule and stopping and action == "drip":
        connection.sendall(head[:good])
        for byte in head[good:] + body:
            if stopping.wait(1 / rule.bytes_per_second):
                return False
            connection.sendall(bytes([byte]))
        return True
    if action == "flip" and body:
        middle = len(body) // 2
        body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
    connection.sendall(head + body)
    return True


def _wait_until_gone(connection: socket.socket) -> None:
    while connection.recv(MAX_LINE_BYTES):
        pass


def _reset(connection: socket.socket) -> None:
    """Make the close that follows send RST instead of FIN."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


# The server in another process


class ChaosProcess:
    """A server in a process of its own: start, steer, kill, start again at the same address."""

    def __init__(self, folder: Path, *, page_size: int = PAGE_SIZE) -> None:
        self._folder = folder
        self._page_size = page_size
        self._port = 0
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> ChaosProcess:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def endpoint(self) -> str:
        """Where it listens, or did."""
        return f"http://{HOST}:{self._port}"

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None
        return self._process.pid

    @property
    def environment(self) -> dict[str, str]:
        """The AWS variables that lead a client there and nowhere else."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "chaos",
            "AWS_SECRET_ACCESS_KEY": "correct-horse-battery",
            "AWS_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def start(self) -> None:
        """Start it and wait until it listens. ``RuntimeError`` when it does not in time."""
        command = [sys.executable, __file__, f"--folder={self._folder}", f"--port={self._port}"]
        command += [f"--page-size={self._page_size}", f"--lifetime={LIFETIME_SECONDS}"]
        command += [f"--log={self._folder / 'operations.jsonl'}"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE)
        output = self._process.stdout
        assert output is not None
        ready = select.select([output], [], [], START_SECONDS)[0] and output.readline()
        if not ready:
            self.kill()
            raise RuntimeError("the server did not start")
        self._port = int(ready.rpartition(b":")[2])

    def kill(self) -> None:
        """End it with SIGKILL."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """End it with SIGTERM; with SIGKILL when it does not listen."""
        self._end(signal.SIGTERM)

    def _end(self, number: int) -> None:
        if self._process is None:
            return
        self._process.send_signal(number)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(STOP_SECONDS)
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._process = None

    def create_bucket(self, bucket: str) -> None:
        """Add a bucket."""
        self._ask("POST", "/-/buckets", json.dumps(bucket))

    def set_rules(self, *rules: Mapping[str, Any]) -> None:
        """Replace all rules; ``Rule`` has their fields. ``ValueError`` for one that is wrong."""
        self._ask("POST", "/-/rules", json.dumps(rules))

    def rules(self) -> list[dict[str, Any]]:
        """The rules with what they have ``seen`` and ``struck``."""
        rules: list[dict[str, Any]] = json.loads(self._ask("GET", "/-/rules"))
        return rules

    def set_page_size(self, page_size: int) -> None:
        """The most keys that a page of a listing has."""
        self._ask("POST", "/-/settings", json.dumps({"page_size": page_size}))

    def operations(self, *, since: int = 0, **wanted: Any) -> list[Operation]:
        """The log from number ``since + 1`` on, or those whose fields have these values."""
        found = json.loads(self._ask("GET", f"/-/operations?since={since}"))
        return select_operations((Operation(**item) for item in found), **wanted)

    def puts_per_key(self, bucket: str | None = None) -> Counter[str]:
        """How often each key was written."""
        return count_puts(self.operations(), bucket=bucket)

    def _ask(self, method: str, path: str, body: str | None = None) -> bytes:
        connection = http.client.HTTPConnection(HOST, self._port, timeout=STOP_SECONDS)
        with contextlib.closing(connection):
            connection.request(method, path, body=body)
            reply = connection.getresponse()
            content = reply.read()
        if reply.status >= 400:
            raise ValueError(content.decode(errors="replace"))
        return content


def main() -> None:
    """Serve until SIGTERM or SIGINT, or to the end of the lifetime."""
    parser = argparse.ArgumentParser(description="An S3 server on loopback that fails on request.")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--port", type=int, default=0, help="0: a free one, printed at the start")
    parser.add_argument("--rules", type=Path, help="a JSON list of rules")
    parser.add_argument("--page-size", type=int, default=PAGE_SIZE)
    parser.add_argument("--log", type=Path, help="JSON lines, one an operation")
    parser.add_argument("--lifetime", type=int, default=0, help="seconds; 0: no end")
    arguments = parser.parse_args()
    signal.alarm(arguments.lifetime)  # whatever hangs, the process ends
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    with ChaosServer(
        arguments.folder,
        port=arguments.port,
        page_size=arguments.page_size,
        rules=json.loads(arguments.rules.read_text()) if arguments.rules else (),
        log=arguments.log,
    ) as server:
        sys.stdout.write(server.endpoint + "\n")
        sys.stdout.flush()
        signal.sigwait({signal.SIGTERM, signal.SIGINT})


if __name__ == "__main__":
    main()
