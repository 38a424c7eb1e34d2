"""What replies and failures mean."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from botocore.exceptions import (
    ClientError,
    HTTPClientError,
    NoCredentialsError,
    PartialCredentialsError,
)

from cnnray.errors import AccessDeniedError, MissingObjectError, StorageError
from cnnray.storage.replies import (
    DamagedBodyError,
    Fault,
    check_body,
    classify,
    reason,
    storage_error,
)

DATA = b"the content"
MD5 = hashlib.md5(DATA).hexdigest()


def refusal(status: int, code: str) -> ClientError:
    reply: dict[str, Any] = {"Error": {"Code": code, "Message": "no"}}
    return ClientError(reply | {"ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject")


@pytest.mark.parametrize(
    ("status", "code", "fault"),
    [
        (503, "SlowDown", Fault.THROTTLED),
        (503, "503", Fault.THROTTLED),
        (429, "TooManyRequests", Fault.THROTTLED),
        (500, "InternalError", Fault.TRANSIENT),
        (502, "", Fault.TRANSIENT),
        (504, "", Fault.TRANSIENT),
        (409, "ConditionalRequestConflict", Fault.TRANSIENT),
        (400, "RequestTimeout", Fault.TRANSIENT),
        (400, "BadDigest", Fault.TRANSIENT),
        (400, "InvalidArgument", Fault.PERMANENT),
        (403, "AccessDenied", Fault.PERMANENT),
        (404, "NoSuchKey", Fault.PERMANENT),
        (412, "PreconditionFailed", Fault.PERMANENT),
        (416, "InvalidRange", Fault.PERMANENT),
        (501, "NotImplemented", Fault.PERMANENT),
    ],
)
def test_a_refusal_is_asked_again_only_where_that_helps(
    status: int, code: str, fault: Fault
) -> None:
    assert classify(refusal(status, code)) is fault


def test_a_programming_error_is_not_asked_again() -> None:
    assert classify(TypeError("no")) is Fault.PERMANENT


def test_a_wrapped_programming_error_is_not_asked_again() -> None:
    assert classify(HTTPClientError(error=ValueError("no"))) is Fault.PERMANENT
    assert classify(HTTPClientError(error=ConnectionResetError())) is Fault.TRANSIENT


@pytest.mark.parametrize("error", [TimeoutError(), ConnectionResetError(), EOFError()])
def test_a_failure_on_the_way_is_asked_again(error: Exception) -> None:
    assert classify(error) is Fault.TRANSIENT


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (refusal(404, "NoSuchKey"), MissingObjectError, "no such object: s3://b/k"),
        (refusal(404, "NoSuchBucket"), StorageError, "no such bucket: b"),
        (refusal(403, "AccessDenied"), AccessDeniedError, "check the key's permissions"),
        (refusal(400, "ExpiredToken"), AccessDeniedError, "renew the session token"),
        (refusal(403, "RequestTimeTooSkewed"), AccessDeniedError, "set the clock"),
        (refusal(400, "InvalidArgument"), StorageError, "s3://b/k: .*InvalidArgument"),
        (NoCredentialsError(), AccessDeniedError, "no credentials for s3://b/k\nhint: set AWS_"),
        (
            PartialCredentialsError(provider="env", cred_var="AWS_SECRET_ACCESS_KEY"),
            AccessDeniedError,
            "no credentials for s3://b/k\nhint: set AWS_",
        ),
    ],
)
def test_the_user_is_told_what_and_where(error: Exception, kind: type, text: str) -> None:
    named = storage_error(error, bucket="b", key="k")
    with pytest.raises(kind, match=text):
        raise named


def test_a_reason_is_one_bounded_line_without_credentials() -> None:
    text = reason(ValueError("http://me:hunter2@host/\n\x1b[31m" + "x" * 1000))
    assert text.startswith(r"http://host/ \x1b[31mxxx")
    assert len(text) == 300


# Bodies


@pytest.mark.parametrize(
    "reply",
    [
        {"ETag": f'"{MD5}"', "ContentLength": len(DATA)},
        {"ETag": f'"{MD5}"', "ContentRange": "bytes 0-10/11"},
        {"ETag": f'"{MD5}"', "ServerSideEncryption": "AES256"},
        {},
    ],
)
def test_a_whole_body_is_good(reply: dict[str, Any]) -> None:
    check_body(reply, DATA)


@pytest.mark.parametrize("reply", [{}, {"ContentRange": "bytes 0-10/11"}])
def test_a_body_with_another_digest_is_damaged(reply: dict[str, Any]) -> None:
    with pytest.raises(DamagedBodyError, match=MD5):
        check_body({"ETag": f'"{MD5}"'} | reply, b"the CONTENT")


@pytest.mark.parametrize(
    "reply",
    [
        {"ETag": f'"{MD5}-2"'},
        {"ETag": f'"{MD5.upper()}"'},
        {"ETag": f'"{MD5}"', "ServerSideEncryption": "aws:kms"},
        {"ETag": f'"{MD5}"', "SSECustomerAlgorithm": "AES256"},
        {"ETag": f'"{MD5}"', "ContentRange": "bytes 0-10/12"},
        {"ETag": f'"{MD5}"', "ContentRange": "bytes 1-11/12"},
    ],
)
def test_an_etag_that_is_no_digest_of_these_bytes_is_not_compared(reply: dict[str, Any]) -> None:
    check_body(reply, b"the CONTENT")


def test_a_body_that_is_too_short_is_no_body() -> None:
    with pytest.raises(EOFError, match="11 of 12 bytes"):
        check_body({"ContentLength": 12}, DATA)
