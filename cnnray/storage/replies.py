"""What S3's replies and failures mean: whether to ask again, and what to tell the user."""

from __future__ import annotations

import enum
import hashlib
import re
from collections.abc import Mapping
from typing import Any

from cnnray.errors import (
    AccessDeniedError,
    ChangedObjectError,
    MissingObjectError,
    StorageError,
    hide_credentials,
)
from cnnray.storage.base import shown

MAX_REASON = 300
"""Characters kept of what a store or a library says."""

THROTTLED_CODES = {"SlowDown", "ServiceUnavailable", "Throttling", "TooManyRequests"}
TRANSIENT_CODES = {"RequestTimeout", "BadDigest", "XAmzContentChecksumMismatch", "InternalError"}
TRANSIENT_STATUSES = {408, 409, 500, 502, 504}
DENIED_HINTS = {
    "ExpiredToken": "renew the session token",
    "RequestTimeTooSkewed": "set the clock of this machine",
}

DAMAGED_KINDS = {"DamagedBodyError", "FlexibleChecksumError"}
UNREACHABLE_KINDS = {"ConnectTimeoutError", "ProxyConnectionError", "SSLError"}
TRANSIENT_KINDS = {
    "HTTPClientError",  # of botocore, as are the next four
    "ConnectionError",
    "IncompleteReadError",
    "CredentialRetrievalError",
    "ResponseParserError",
    "ClientError",  # of aiohttp
    "OSError",  # and TimeoutError
    "EOFError",
}

_PLAIN_MD5 = re.compile(r"[0-9a-f]{32}", re.ASCII)


class Fault(enum.Enum):
    """What kind of failure an attempt met."""

    PERMANENT = enum.auto()  # an answer that will be the same again
    TRANSIENT = enum.auto()
    THROTTLED = enum.auto()  # the store asks for fewer requests
    UNREACHABLE = enum.auto()  # no connection came about
    DAMAGED = enum.auto()  # all bytes came, but not the right ones


class DamagedBodyError(Exception):
    """The bytes read do not have the digest that the store tells."""


def classify(error: BaseException) -> Fault:
    """What kind of failure ``error`` is; what nobody foresaw is permanent."""
    status, code = http_status(error), error_code(error)
    if status in (429, 503) or code in THROTTLED_CODES:
        return Fault.THROTTLED
    if status in TRANSIENT_STATUSES or code in TRANSIENT_CODES:
        return Fault.TRANSIENT
    if status is not None:
        return Fault.PERMANENT
    return _classify_failure(error)


def _classify_failure(error: BaseException) -> Fault:
    """The same for a request that no reply answered, by the names that the libraries give it."""
    cause = getattr(error, "kwargs", {}).get("error")
    is_wrapper = type(error).__name__ == "HTTPClientError" and cause is not None
    kinds = _kinds(cause if is_wrapper else error)
    if kinds & DAMAGED_KINDS:
        return Fault.DAMAGED
    # EndpointConnectionError stands for an open connection that was reset, too.
    if kinds & UNREACHABLE_KINDS or "ClientConnectorError" in _kinds(cause):
        return Fault.UNREACHABLE
    return Fault.TRANSIENT if kinds & TRANSIENT_KINDS else Fault.PERMANENT


def _kinds(error: object) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


def check_body(reply: Mapping[str, Any], data: bytes) -> None:
    """Raise unless ``data`` is the whole body of ``reply``, with the digest of its etag.

    Only an etag in the form of a plain MD5 says anything of the content, and only of all of it.
    Raises ``EOFError`` for a body that is too short, ``DamagedBodyError`` for a wrong one.
    """
    expected = reply.get("ContentLength", len(data))
    if len(data) < expected:
        raise EOFError(f"{len(data)} of {expected} bytes came")
    of_all = str(reply.get("ContentRange") or f"bytes 0-/{len(data)}")
    is_whole = of_all.startswith("bytes 0-") and of_all.endswith(f"/{len(data)}")
    is_plain = reply.get("ServerSideEncryption") in (None, "AES256")
    is_plain = is_plain and not reply.get("SSECustomerAlgorithm")
    etag = etag_of(reply)
    if is_whole and is_plain and _PLAIN_MD5.fullmatch(etag):
        found = hashlib.md5(data, usedforsecurity=False).hexdigest()
        if found != etag:
            raise DamagedBodyError(f"the bytes have the MD5 {found}, the store says {etag}")


def etag_of(reply: Mapping[str, Any]) -> str:
    """The etag of a reply or of a listed object, without its quotes."""
    return str(reply.get("ETag") or "").strip('"')


def http_status(error: BaseException | None) -> int | None:
    """The HTTP status of the reply behind an error, or None when there was none."""
    response = getattr(error, "response", None)
    if not isinstance(response, dict):
        return None
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status if isinstance(status, int) else None


def error_code(error: BaseException | None) -> str:
    """The S3 error code of the reply behind an error, or ""."""
    response = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def reason(error: BaseException) -> str:
    """What a library says of an error: one bounded line, without credentials of an address."""
    text = hide_credentials(" ".join(str(error).split())) or type(error).__name__
    return shown(text)[:MAX_REASON]


def storage_error(error: BaseException, *, bucket: str, key: str | None) -> StorageError:
    """What went wrong for good, in one line with the remedy."""
    where = object_name(bucket, key)
    status, code, kind = http_status(error), error_code(error), type(error).__name__
    if code == "NoSuchBucket" or (status == 404 and key is None):
        return StorageError(
            f"no such bucket: {bucket}", hint="create it, or check AWS_ENDPOINT_URL"
        )
    if status == 404:
        return MissingObjectError(f"no such object: {where}")
    if status == 412:
        return ChangedObjectError(f"{where} is no longer the object that was listed")
    if kind in ("NoCredentialsError", "PartialCredentialsError"):
        return AccessDeniedError(
            f"no credentials for {where}", hint="set AWS_ACCESS_KEY_ID or AWS_PROFILE"
        )
    if status in (401, 403) or code in DENIED_HINTS:
        hint = DENIED_HINTS.get(code, "check the key's permissions")
        return AccessDeniedError(f"access denied: {where}", hint=hint)
    if classify(error) is Fault.DAMAGED:
        return StorageError(
            f"wrong checksum, read twice: {where}: {reason(error)}", hint="upload the object again"
        )
    return StorageError(f"{where}: {reason(error)}")


def object_name(bucket: str, key: str | None) -> str:
    """An object or a bucket as messages name it."""
    return shown(f"s3://{bucket}/{key}" if key else f"s3://{bucket}")
