"""Sources in a bucket: keys of every legal form, and objects replaced after the listing."""

from __future__ import annotations

import io
import json
import tarfile
import uuid

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cnnray.datasets.sources import open_source
from cnnray.datasets.sources.folder import FolderSource
from cnnray.errors import ChangedObjectError, MissingObjectError

pytestmark = pytest.mark.s3

ODD_KEYS = (
    "root.jpg",
    "a/b.jpg",
    "a//b.jpg",
    "a///b.jpg",
    "//x",
    "//x/y",
    "/lead.jpg",
    "/",
    "..",
    "../up.jpg",
    "a/../b.jpg",
    "./dot.jpg",
    ".hidden.jpg",
    ".git/1.jpg",
    "a/.DS_Store",
    "body/",
    "body/inside/",
    "with space.jpg",
    " ",
    "100%20+&?#.jpg",
    "quo'\"te<tag>.jpg",
    "back\\slash.jpg",
    "new\nline.jpg",
    "new\n/line.jpg",
    "return\r.jpg",
    "bell\x07.jpg",
    "é/\u732b.jpg",
    "e\u0301/\u732b.jpg",
    "*",
    "*/star.jpg",
)


class Bucket:
    """What a user does to a bucket, through a client that is not cnnray's."""

    def __init__(self) -> None:
        import botocore.session

        self.client = botocore.session.Session().create_client("s3")
        self.name = f"photos-{uuid.uuid4().hex}"
        self.client.create_bucket(Bucket=self.name)

    def put(self, key: str, data: bytes | None = None) -> None:
        body = f"bytes of {key}".encode() if data is None else data
        if "\n" in key:  # the server lists such a key, but has no route to it
            from moto.core import DEFAULT_ACCOUNT_ID
            from moto.s3.models import s3_backends

            s3_backends[DEFAULT_ACCOUNT_ID]["aws"].put_object(self.name, key, body)
            return
        self.client.put_object(Bucket=self.name, Key=key, Body=body)

    def etag(self, key: str) -> str:
        return self.client.head_object(Bucket=self.name, Key=key)["ETag"].strip('"')


@pytest.fixture
def bucket(moto: str, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """A new bucket of a server on this machine."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return Bucket()


def parquet(**columns: list) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("prefix", ["", "in/here"])
def test_every_legal_key_is_an_input_exactly_once(bucket, rows_of, prefix):
    base = f"{prefix}/" if prefix else ""
    for key in ODD_KEYS:
        bucket.put(base + key)
    bucket.put("in/hereafter.jpg")  # not below the prefix
    source = open_source(f"s3://{bucket.name}/{prefix}", format="folder", labelled=False)
    keys = [row["key"] for row in rows_of(source)]
    expected = [*ODD_KEYS, *([] if prefix else ["in/hereafter.jpg"])]
    assert sorted(keys) == sorted(expected)


def test_very_many_folders_lose_and_repeat_nothing(bucket, rows_of, monkeypatch):
    monkeypatch.setattr("cnnray.datasets.sources.folder.MAX_FOLDERS", 3)
    for key in ODD_KEYS:
        bucket.put(key)
    source = open_source(f"s3://{bucket.name}", format="folder", labelled=False)
    assert len(source.partitions()) == 1
    assert sorted(row["key"] for row in rows_of(source)) == sorted(ODD_KEYS)


def test_odd_keys_are_read_with_their_own_bytes(bucket, entries_of):
    for key in ODD_KEYS:
        bucket.put(key)
    source = open_source(f"s3://{bucket.name}", labelled=False)
    entries = entries_of(source)
    for key, data in zip(entries["key"].to_pylist(), source.read(entries), strict=True):
        if "\n" not in key:
            assert data == f"bytes of {key}".encode()


def test_an_empty_object_that_stands_for_a_folder_is_no_input(bucket, rows_of):
    bucket.put("a/", b"")
    bucket.put("a/1.jpg")
    bucket.put("empty.jpg", b"")
    rows = rows_of(open_source(f"s3://{bucket.name}", labelled=False))
    assert [row["key"] for row in rows] == ["empty.jpg", "a/1.jpg"]


def test_a_bucket_of_dotted_names_alone_is_not_empty(bucket, rows_of):
    bucket.put(".a/1.jpg")
    rows = rows_of(open_source(f"s3://{bucket.name}", labelled=False))
    assert [row["key"] for row in rows] == [".a/1.jpg"]


def test_with_labels_dotted_names_stay_hidden(bucket, rows_of):
    for key in ("cat/1.jpg", "cat/.DS_Store", ".git/1.jpg", ".x.jpg"):
        bucket.put(key)
    source = open_source(f"s3://{bucket.name}")
    assert isinstance(source, FolderSource)
    assert [(row["key"], row["label"]) for row in rows_of(source)] == [("cat/1.jpg", "cat")]


def test_an_object_that_was_replaced_after_the_listing_has_changed(bucket, entries_of):
    for key in ("a/1", "a/2", "a/3"):
        bucket.put(key)
    source = open_source(f"s3://{bucket.name}", labelled=False)
    entries = entries_of(source)
    assert entries["etag"][0].as_py() == bucket.etag("a/1")
    bucket.put("a/1", b"another image")
    bucket.client.delete_object(Bucket=bucket.name, Key="a/2")
    changed, missing, same = source.read(entries)
    assert isinstance(changed, ChangedObjectError)
    assert isinstance(missing, MissingObjectError)
    assert same == b"bytes of a/3"


def tar_of(*members: tuple[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def test_images_of_a_tar_that_was_replaced_have_changed(bucket, entries_of):
    first, second = ("x.jpg", b"x" * 100), ("y.jpg", b"y" * 100)
    bucket.put("a.tar", tar_of(first, second))
    source = open_source(f"s3://{bucket.name}/a.tar", labelled=False)
    entries = entries_of(source)
    assert list(source.read(entries)) == [b"x" * 100, b"y" * 100]
    bucket.put("a.tar", tar_of(second, first))
    assert all(isinstance(result, ChangedObjectError) for result in source.read(entries))


def test_a_table_names_keys_byte_exact_and_its_etags_count(bucket, entries_of):
    keys = [key for key in ODD_KEYS if "\n" not in key]
    for key in keys:
        bucket.put(key)
    uris = [f"s3://{bucket.name}/{key}" for key in keys]
    bucket.put("table.parquet", parquet(uri=uris, etag=[bucket.etag(key) for key in keys]))
    source = open_source(f"s3://{bucket.name}/table.parquet", labelled=False)
    entries = entries_of(source)
    bucket.put(keys[3], b"another image")
    results = list(source.read(entries))
    assert isinstance(results.pop(3), ChangedObjectError)
    assert results == [f"bytes of {key}".encode() for key in keys if key != keys[3]]


def test_an_inventory_is_found_in_its_destination_bucket_and_its_objects_are_read(
    bucket, entries_of
):
    keys = [key for key in ODD_KEYS if "\n" not in key]
    for key in keys:
        bucket.put(key)
    columns = {"key": keys, "e_tag": [bucket.etag(key) for key in keys], "size": [9] * len(keys)}
    prefix = f"inventory/{bucket.name}/daily"
    bucket.put(f"{prefix}/data/0 1.parquet", parquet(bucket=[bucket.name] * len(keys), **columns))
    manifest = {
        "sourceBucket": bucket.name,
        "destinationBucket": f"arn:aws:s3:::{bucket.name}",
        "fileFormat": "Parquet",
        "files": [{"key": f"{prefix}/data/0 1.parquet", "size": 1, "MD5checksum": "f1c6"}],
    }
    bucket.put(f"{prefix}/2026-01-01T01-00Z/manifest.json", json.dumps(manifest).encode())
    source = open_source(
        f"s3://{bucket.name}/{prefix}/2026-01-01T01-00Z/manifest.json", labelled=False
    )
    entries = entries_of(source)
    assert entries["key"].to_pylist() == [f"s3://{bucket.name}/{key}" for key in keys]
    bucket.put(keys[0], b"another image")
    changed, *rest = source.read(entries)
    assert isinstance(changed, ChangedObjectError)
    assert rest == [f"bytes of {key}".encode() for key in keys[1:]]
