"""From what a user writes to the store that is meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from cnnray.errors import StorageError
from cnnray.storage import LocalStore, S3Store, open_store, split_uri


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("http://host/data", "only local paths and s3://"),
        ("gs://bucket/data", "only local paths and s3://"),
        ("s3://", "no bucket"),
        ("s3:///prefix", "no bucket"),
        ("s3://KEYID:hunter2@bucket/prefix", "credentials in a URI are refused"),
        ("https://me:hunter2@host/data", "only local paths and s3://"),
        ("", "an empty path"),
        ("file://", "an empty path"),
    ],
)
def test_what_cannot_be_opened_is_refused_with_a_remedy(uri: str, message: str) -> None:
    with pytest.raises(StorageError, match=message) as caught:
        open_store(uri)
    assert "hint: " in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_uris_name_the_store_that_one_expects(tmp_path: Path) -> None:
    assert open_store("s3://bucket/a/b/") == S3Store(bucket="bucket", prefix="a/b/")
    assert open_store("s3://bucket/a/b/").uri == "s3://bucket/a/b"
    assert open_store("s3://bucket").uri == "s3://bucket"
    assert open_store(f"file://{tmp_path}") == LocalStore(root=str(tmp_path))
    assert open_store("relative") == LocalStore(root=str(Path("relative").absolute()))
    assert split_uri("s3://bucket/a/b") == (S3Store(bucket="bucket", prefix=""), "a/b")
