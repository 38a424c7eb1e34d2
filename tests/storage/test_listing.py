"""What every store promises of its listings."""

from __future__ import annotations

import pytest

from cnnray.errors import StorageError
from cnnray.storage import LocalStore, S3Store, Store, s3


def test_list_finds_everything_below_with_sizes_and_etags(store: Store) -> None:
    for key in ("z", "a/2", "a/1", "a/b/c"):
        store.write(key, key.encode())
    found = list(store.list())
    assert sorted(item.key for item in found) == ["a/1", "a/2", "a/b/c", "z"]
    assert all(item.size == len(item.key) for item in found)
    assert all(item.etag == store.head(item.key).etag for item in found)


def test_list_goes_over_all_pages(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "LIST_PAGE_SIZE", 3)
    keys = [f"k/{number:02d}" for number in range(10)]
    for key in reversed(keys):
        store.write(key, b"x")
    assert [item.key for item in store.list("k/")] == keys


def test_list_is_in_the_order_of_the_keys_bytes(store: Store) -> None:
    names = ["Z", "a", "a b", "a-b", "B", "é", "猫", "1", "10", "2", "🐈", "\uffee"]
    for name in names:
        store.write(name, b"x")
    assert [item.key for item in store.list()] == sorted(names, key=str.encode)


def test_list_of_a_prefix_leaves_the_rest_out(store: Store) -> None:
    for key in ("a/1", "ab/2", "b/a/3"):
        store.write(key, b"x")
    assert [item.key for item in store.list("a/")] == ["a/1"]


def test_list_folders_names_the_immediate_ones(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "LIST_PAGE_SIZE", 3)
    for key in ("b/1", "a/1", "a/deep/er/2", "c d/3", "é/4", "e/1", "f/1", "file"):
        store.write(key, b"x")
    assert store.list_folders() == ["a", "b", "c d", "e", "f", "é"]


def test_an_object_that_a_console_made_for_a_folder_is_not_listed(store: Store) -> None:
    if isinstance(store, LocalStore):
        pytest.skip("a folder is a folder")
    store._call("put_object", Key=store._key("folder/"), Body=b"")
    store.write("folder/key", b"x")
    assert [item.key for item in store.list()] == ["folder/key"]


def test_an_object_with_content_is_listed_whatever_its_name(moto_store: S3Store) -> None:
    moto_store.write("folder/", b"content")
    assert [(item.key, item.size) for item in moto_store.list()] == [("folder/", 7)]


@pytest.mark.parametrize("prefix", ["", "a/", "a/b/"])
def test_a_flat_listing_is_of_one_folder(
    store: Store, monkeypatch: pytest.MonkeyPatch, prefix: str
) -> None:
    monkeypatch.setattr(s3, "LIST_PAGE_SIZE", 3)
    for folder in ("", "a/", "a/b/", "a/b/c/"):
        for number in range(5):
            store.write(f"{folder}{number}", b"x")
    listed = [item.key for item in store.list(prefix, recursive=False)]
    assert listed == [f"{prefix}{number}" for number in range(5)]


LEGAL_KEYS = [
    "100%20off%.png",
    "a+b=c&d?e#f.png",
    'it\'s "quoted".png',
    "a//b",
    "a/../b",
    " ",
    "é/猫",
]


@pytest.mark.parametrize("recursive", [True, False])
def test_every_legal_key_is_listed_as_it_is(
    moto_store: S3Store, monkeypatch: pytest.MonkeyPatch, recursive: bool
) -> None:
    monkeypatch.setattr(s3, "LIST_PAGE_SIZE", 2)
    for key in LEGAL_KEYS:
        moto_store.write(f"odd +%/{key}", key.encode())
    expected = [key for key in LEGAL_KEYS if recursive or "/" not in key]
    found = [item.key for item in moto_store.list("odd +%/", recursive=recursive)]
    assert sorted(found) == sorted(f"odd +%/{key}" for key in expected)
    assert all(moto_store.read(key) == key.removeprefix("odd +%/").encode() for key in found)


def test_a_key_with_a_newline_is_listed_as_it_is(moto_store: S3Store) -> None:
    import moto.backends  # its server answers 404 to such a path: put it there from within

    backend = moto.backends.get_backend("s3")["123456789012"]["aws"]
    backend.put_object(moto_store.bucket, f"{moto_store.prefix}/two\nlines", b"x")
    assert [item.key for item in moto_store.list()] == ["two\nlines"]


def test_a_listing_that_does_not_go_on_is_an_error(
    moto_store: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = {"IsTruncated": True, "NextContinuationToken": "same", "Contents": []}
    monkeypatch.setattr(S3Store, "_call", lambda *arguments, **named: page)
    with pytest.raises(StorageError, match="does not go on"):
        list(moto_store.list())
