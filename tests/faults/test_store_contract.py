"""What cnnray relies on in an S3 store: one suite for our own server, for others, for a real one.

It keeps our server honest: a fault test proves nothing against a store that no real one is like.
``CNNRAY_TEST_S3_BUCKET`` and the usual AWS variables add a real store; everything is done below a
prefix of the bucket and removed again.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from cnnray.errors import AlreadyExistsError, ChangedObjectError, MissingObjectError, StorageError
from cnnray.storage import Store, open_store

pytestmark = pytest.mark.timeout(120)

RACERS = 20

ODD_NAMES = {
    "space": "with space.png",
    "unicode": "Ünï/猫 🐈.png",
    "composed": "caf\u00e9.png",
    "decomposed": "cafe\u0301.png",
    "percent": "100%20off%2F%.png",
    "plus": "a+b=c&d?e#f.png",
    "quotes": 'it\'s "quoted" <tag>/[x]{y}.png',
    "backslash": "back\\slash.png",
    "hidden": "..hidden../...png",
    "partition": "_run=7/.dot",
    "newline": "two\nlines.png",
    "tab": "tab\tbed.png",
    "control": "bell\x01.png",
    "dots": "a/../b.png",
    "double slash": "a//b.png",
    "trailing slash": "folder/",
    "long": "/".join(["é" * 60] * 8),
    "long component": "é" * 450,
}

CANNOT_HOLD = {
    ("seaweed", "backslash"): "makes a slash of a backslash",
    ("seaweed", "dots"): "refuses a component ..",
    ("seaweed", "double slash"): "makes a/b of a//b",
    ("seaweed", "trailing slash"): "loses the body of a key that ends in /",
    ("seaweed", "long component"): "takes 255 bytes between two slashes",
    ("moto", "newline"): "answers 404",
}
"""Names that a server does not keep as they are: its known faults, each seen to be there."""


@pytest.fixture
def known_fault(request: pytest.FixtureRequest, target: Any) -> Callable[..., None]:
    """Expect the test to fail on one server."""

    def expect(server: str, reason: str, *, strict: bool = True) -> None:
        if target.name == server:
            request.applymarker(pytest.mark.xfail(reason=f"{server} {reason}", strict=strict))

    return expect


def _refusal(call: Callable[..., Any], *arguments: Any, **named: Any) -> tuple[int, str]:
    """The HTTP status and the code with which a store refuses."""
    from botocore.exceptions import ClientError

    with pytest.raises(ClientError) as caught:
        call(*arguments, **named)
    response = caught.value.response
    return response["ResponseMetadata"]["HTTPStatusCode"], response["Error"]["Code"]


def _race(create: Callable[[int], bool]) -> list[int]:
    """The racers that say they created the key."""
    barrier = threading.Barrier(RACERS, timeout=30)

    def run(number: int) -> bool:
        barrier.wait()
        return create(number)

    with ThreadPoolExecutor(RACERS) as pool:
        return [number for number, won in enumerate(pool.map(run, range(RACERS))) if won]


# Conditional creation


def test_a_new_key_is_created(place: Any) -> None:
    place.put("key", b"first", IfNoneMatch="*")
    assert place.get("key") == b"first"


def test_a_key_that_exists_is_not_created_again(place: Any) -> None:
    place.put("key", b"first")
    assert _refusal(place.put, "key", b"second", IfNoneMatch="*") == (412, "PreconditionFailed")
    assert place.get("key") == b"first"


def test_a_deleted_key_can_be_created(place: Any) -> None:
    place.put("key", b"first")
    place.call("delete_object", "key")
    place.put("key", b"second", IfNoneMatch="*")
    assert place.get("key") == b"second"


def test_one_of_many_creators_wins(place: Any, known_fault: Callable[..., None]) -> None:
    from botocore.exceptions import ClientError

    known_fault("moto", "checks, then sets, without a lock", strict=False)

    def create(number: int) -> bool:
        try:
            place.put("key", bytes([number]) * 20_000, IfNoneMatch="*")
        except ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] not in (409, 412):
                raise
            return False
        return True

    winners = _race(create)
    assert len(winners) == 1
    assert place.get("key") == bytes(winners) * 20_000


def test_the_store_creates_once(store: Store) -> None:
    store.create("key", b"first")
    store.create("key", b"first")
    with pytest.raises(AlreadyExistsError, match="key"):
        store.create("key", b"second")
    assert store.read("key") == b"first"


def test_the_store_has_one_winner(store: Store, known_fault: Callable[..., None]) -> None:
    known_fault("moto", "checks, then sets, without a lock", strict=False)
    store.head("key")  # the connection is there before the race

    def create(number: int) -> bool:
        try:
            store.create("key", bytes([number]) * 20_000)
        except AlreadyExistsError:
            return False
        return True

    winners = _race(create)
    assert len(winners) == 1
    assert store.read("key") == bytes(winners) * 20_000


def test_the_store_sees_that_creation_is_safe(store: Store) -> None:
    assert store.refuses_overwrite("probe")


# Reading


def test_an_object_is_read_with_its_md5_for_an_etag(place: Any) -> None:
    data = bytes(range(256)) * 1000
    etag = place.put("key", data)
    reply = place.call("get_object", "key")
    assert reply["Body"].read() == data
    assert reply["ETag"] == etag == f'"{hashlib.md5(data).hexdigest()}"'
    assert reply["ContentLength"] == len(data)


def test_an_empty_object_is_an_object(place: Any) -> None:
    place.put("empty", b"")
    assert place.get("empty") == b""
    assert place.call("head_object", "empty")["ContentLength"] == 0
    assert place.names() == ["empty"]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("bytes=0-2", b"012"),
        ("bytes=4-6", b"456"),
        ("bytes=4-", b"456789"),
        ("bytes=8-100", b"89"),
        ("bytes=-3", b"789"),
        ("bytes=-100", b"0123456789"),
    ],
)
def test_a_range_holds_what_there_is_of_it(place: Any, asked: str, expected: bytes) -> None:
    place.put("digits", b"0123456789")
    reply = place.call("get_object", "digits", Range=asked)
    assert reply["Body"].read() == expected
    assert reply["ResponseMetadata"]["HTTPStatusCode"] == 206
    first = 10 - len(expected) if asked.startswith("bytes=-") else expected[0] - ord("0")
    assert reply["ContentRange"] == f"bytes {first}-{first + len(expected) - 1}/10"


def test_a_range_beyond_the_end_is_refused(place: Any) -> None:
    place.put("digits", b"0123456789")
    assert _refusal(place.get, "digits", Range="bytes=10-") == (416, "InvalidRange")


def test_if_match_reads_the_version_that_was_meant(place: Any) -> None:
    etag = place.put("key", b"old")
    assert place.get("key", IfMatch=etag) == b"old"
    place.put("key", b"new")
    assert _refusal(place.get, "key", IfMatch=etag) == (412, "PreconditionFailed")


def test_a_missing_key_is_named(place: Any) -> None:
    assert _refusal(place.get, "gone") == (404, "NoSuchKey")
    assert _refusal(place.call, "head_object", "gone")[0] == 404


def test_a_missing_bucket_is_named(place: Any) -> None:
    bucket = "no-such-bucket-of-cnnray"
    assert _refusal(place.client.get_object, Bucket=bucket, Key="k") == (404, "NoSuchBucket")
    assert _refusal(place.client.list_objects_v2, Bucket=bucket) == (404, "NoSuchBucket")
    assert _refusal(place.client.head_bucket, Bucket=bucket)[0] == 404


def test_the_store_reads_all_and_ranges(store: Store) -> None:
    store.write("digits", b"0123456789")
    assert store.read("digits") == b"0123456789"
    assert store.read("digits", offset=4, length=3) == b"456"
    assert store.read("digits", offset=8) == b"89"
    assert store.read("digits", offset=10) == b""


def test_the_store_refuses_an_object_that_changed(store: Store) -> None:
    store.write("key", b"old")
    etag = store.head("key").etag
    assert store.read("key", if_match=etag) == b"old"
    store.write("key", b"new")
    with pytest.raises(ChangedObjectError, match="key"):
        store.read("key", if_match=etag)


def test_the_store_names_what_is_missing(store: Store) -> None:
    assert store.head("gone") is None
    with pytest.raises(MissingObjectError, match="gone"):
        store.read("gone")
    with pytest.raises(StorageError, match="no such bucket: no-such-bucket"):
        open_store("s3://no-such-bucket-of-cnnray").read("key")


# Writing


def test_metadata_comes_back(place: Any) -> None:
    metadata = {"cnnray-sha256": "0" * 64, "with-space": "two  words"}
    place.put("key", b"x", Metadata=metadata)
    assert place.call("head_object", "key")["Metadata"] == metadata
    assert place.call("get_object", "key")["Metadata"] == metadata


def test_an_overwrite_changes_the_etag_and_the_body(place: Any) -> None:
    before = place.put("key", b"old")
    after = place.put("key", b"newer")
    assert before != after
    head = place.call("head_object", "key")
    assert (head["ETag"], head["ContentLength"]) == (after, 5)
    assert place.get("key") == b"newer"


def test_a_copy_is_an_object_of_its_own(place: Any) -> None:
    place.put("a b/ü", b"body", Metadata={"colour": "red"})
    place.call(
        "copy_object", "copy", CopySource={"Bucket": place.bucket, "Key": place.key("a b/ü")}
    )
    place.call("delete_object", "a b/ü")
    assert place.get("copy") == b"body"
    assert place.call("head_object", "copy")["Metadata"] == {"colour": "red"}


def test_delete_removes_and_a_missing_key_is_no_error(place: Any) -> None:
    place.put("key")
    place.call("delete_object", "key")
    place.call("delete_object", "key")
    assert place.names() == []


def test_many_keys_are_deleted_at_once(place: Any) -> None:
    for name in ("a", "b & c", "d"):
        place.put(name)
    keys = [{"Key": place.key(name)} for name in ("a", "b & c", "gone")]
    place.client.delete_objects(Bucket=place.bucket, Delete={"Objects": keys})
    assert place.names() == ["d"]


def test_the_store_writes_and_deletes(store: Store) -> None:
    store.write("key", b"old")
    before = store.head("key")
    store.write("key", b"newer")
    assert (store.read("key"), store.head("key").size) == (b"newer", 5)
    assert store.head("key").etag != before.etag
    store.delete("key")
    store.delete("key")
    assert store.head("key") is None


# Multipart


def _upload(place: Any, name: str, bodies: list[bytes]) -> tuple[str, list[dict[str, Any]]]:
    upload = place.call("create_multipart_upload", name, Metadata={"colour": "red"})["UploadId"]
    parts = []
    for number, body in enumerate(bodies, start=1):
        reply = place.call("upload_part", name, UploadId=upload, PartNumber=number, Body=body)
        parts.append({"PartNumber": number, "ETag": reply["ETag"]})
    return upload, parts


def _finish(place: Any, name: str, upload: str, parts: list[Any], **condition: str) -> str:
    return place.call(
        "complete_multipart_upload",
        name,
        UploadId=upload,
        MultipartUpload={"Parts": parts},
        **condition,
    )["ETag"]


def test_parts_become_one_object_when_they_are_completed(place: Any) -> None:
    bodies = [b"a" * (5 << 20), b"end"]  # S3 wants 5 MiB of every part but the last
    upload, parts = _upload(place, "key", bodies)
    assert place.names() == []
    etag = _finish(place, "key", upload, parts)
    digests = b"".join(hashlib.md5(body).digest() for body in bodies)
    assert etag == f'"{hashlib.md5(digests).hexdigest()}-2"'
    assert place.get("key") == b"".join(bodies)
    assert place.call("head_object", "key")["Metadata"] == {"colour": "red"}


def test_parts_do_not_replace_an_object_that_must_not_exist(place: Any) -> None:
    upload, parts = _upload(place, "key", [b"parts"])
    place.put("key", b"first")
    refused = _refusal(_finish, place, "key", upload, parts, IfNoneMatch="*")
    assert refused == (412, "PreconditionFailed")
    assert place.get("key") == b"first"
    place.call("abort_multipart_upload", "key", UploadId=upload)


def test_an_upload_is_listed_until_it_is_aborted(place: Any) -> None:
    def pending() -> list[str]:
        reply = place.client.list_multipart_uploads(Bucket=place.bucket, Prefix=place.prefix)
        return [upload["UploadId"] for upload in reply.get("Uploads", ())]

    upload, _ = _upload(place, "key", [b"part"])
    assert pending() == [upload]
    place.call("abort_multipart_upload", "key", UploadId=upload)
    assert pending() == []


def test_an_aborted_upload_cannot_be_completed(
    place: Any, known_fault: Callable[..., None]
) -> None:
    known_fault("moto", "answers 500")
    upload, parts = _upload(place, "key", [b"part"])
    place.call("abort_multipart_upload", "key", UploadId=upload)
    assert _refusal(_finish, place, "key", upload, parts) == (404, "NoSuchUpload")
    assert place.names() == []


# Listing


def test_a_listing_is_in_the_order_of_the_keys_bytes(place: Any) -> None:
    names = ["Z", "a", "a b", "a-b", "B", "é", "猫", "1", "10", "2", "🐈", "\uffee"]
    for name in names:
        place.put(name)
    assert place.names() == sorted(names, key=str.encode)


def test_a_listing_tells_sizes_and_etags(place: Any) -> None:
    etag = place.put("key", b"12345")
    (page,) = place.pages()
    (item,) = page["Contents"]
    assert (item["Size"], item["ETag"]) == (5, etag)
    assert item["LastModified"].tzinfo is not None


def test_a_listing_goes_over_pages(place: Any) -> None:
    names = [f"k{number}" for number in range(8)]
    for name in reversed(names):
        place.put(name)
    pages = place.pages(MaxKeys=3)
    assert [len(page["Contents"]) for page in pages] == [3, 3, 2]
    assert [page["KeyCount"] for page in pages] == [3, 3, 2]
    assert place.names(MaxKeys=3) == names


def test_a_full_last_page_is_the_end(place: Any) -> None:
    for name in ("a", "b", "c"):
        place.put(name)
    assert [page["IsTruncated"] for page in place.pages(MaxKeys=3)] == [False]


def test_a_listing_starts_after_a_key(place: Any) -> None:
    for name in ("a", "b", "b0", "c"):
        place.put(name)
    assert place.names(StartAfter=place.key("b")) == ["b0", "c"]


def test_a_prefix_leaves_the_rest_out(place: Any) -> None:
    for name in ("a/1", "ab/2", "b/a/3"):
        place.put(name)
    assert place.names("a/") == ["a/1"]
    assert place.names("a") == ["a/1", "ab/2"]
    assert place.names("none") == []


def test_a_delimiter_makes_folders_once_over_all_pages(place: Any) -> None:
    for name in ("a/1", "a/2", "a/b/3", "c", "d e/4", "é/5", "f/6"):
        place.put(name)
    pages = place.pages(Delimiter="/", MaxKeys=2)
    folders = [item["Prefix"] for page in pages for item in page.get("CommonPrefixes", ())]
    assert folders == [place.key(name) for name in ("a/", "d e/", "f/", "é/")]
    assert place.names(Delimiter="/", MaxKeys=2) == ["c"]


def test_the_store_lists_in_order(store: Store) -> None:
    names = ["Z", "a", "a b", "a-b", "é", "猫", "1", "10", "2", "🐈", "\uffee"]
    for name in names:
        store.write(name, name.encode())
    found = list(store.list())
    assert [item.key for item in found] == sorted(names, key=str.encode)
    assert [item.size for item in found] == [len(item.key.encode()) for item in found]


def test_the_store_lists_folders(store: Store) -> None:
    for name in ("a/1", "a/b/2", "c d/3", "é/4", "file"):
        store.write(name, b"x")
    assert store.list_folders() == ["a", "c d", "é"]
    assert [item.key for item in store.list("a/")] == ["a/1", "a/b/2"]


# Names


@pytest.mark.parametrize("kind", ODD_NAMES)
def test_an_odd_name_is_kept_byte_for_byte(
    place: Any, kind: str, known_fault: Callable[..., None]
) -> None:
    if reason := CANNOT_HOLD.get((place.name, kind)):
        known_fault(place.name, reason)
    name = ODD_NAMES[kind]
    place.put(name, name.encode(), IfNoneMatch="*")
    assert place.get(name) == name.encode()
    assert place.names() == [name]
    assert place.call("head_object", name)["ContentLength"] == len(name.encode())
    assert _refusal(place.put, name, b"other", IfNoneMatch="*")[0] == 412
    place.call("delete_object", name)
    assert place.names() == []


@pytest.mark.parametrize("kind", ODD_NAMES)
def test_the_store_keeps_an_odd_name(
    store: Store, place: Any, kind: str, known_fault: Callable[..., None]
) -> None:
    if reason := CANNOT_HOLD.get((place.name, kind)):
        known_fault(place.name, reason)
    name = ODD_NAMES[kind]
    store.create(name, name.encode())
    assert store.read(name) == name.encode()
    assert [item.key for item in store.list()] == [name]
    with pytest.raises(AlreadyExistsError):
        store.create(name, b"other")


def test_composed_and_decomposed_names_are_two(place: Any) -> None:
    place.put("caf\u00e9", b"one")
    place.put("cafe\u0301", b"two")
    assert (place.get("caf\u00e9"), place.get("cafe\u0301")) == (b"one", b"two")


def test_a_key_of_1024_bytes_is_the_longest(place: Any, known_fault: Callable[..., None]) -> None:
    known_fault("moto", "counts characters, not bytes")
    longest = "/".join(["é" * 60] * 9)[: (1024 - len(place.key(""))) // 2]
    longest += "x" * (1024 - len(place.key(longest).encode()))
    place.put(longest)
    assert place.get(longest) == b"x"
    assert _refusal(place.put, longest + "x") == (400, "KeyTooLongError")
