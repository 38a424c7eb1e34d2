"""Folders of classes, of splits, and of anything."""

import os
import unicodedata
from pathlib import Path

import pytest

from cnnray.datasets.sources import open_source
from cnnray.datasets.sources.folder import FolderSource
from cnnray.errors import (
    ChangedObjectError,
    DataError,
    MissingObjectError,
    SettingsError,
    StorageError,
)
from cnnray.schema import ENTRY_SCHEMA
from cnnray.storage import open_store


def put(root: Path, *keys: str) -> None:
    for key in keys:
        path = root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"bytes of {key}".encode())


def labels(rows: list[dict]) -> dict[str, tuple[str | None, str | None]]:
    return {row["key"]: (row["label"], row["split"]) for row in rows}


def test_label_is_the_name_of_the_class_folder(tmp_path, rows_of):
    put(tmp_path, "cat/1.jpg", "cat/deep/er/2.jpg", "dog/1.jpg")
    rows = rows_of(open_source(str(tmp_path)))
    assert labels(rows) == {
        "cat/1.jpg": ("cat", None),
        "cat/deep/er/2.jpg": ("cat", None),
        "dog/1.jpg": ("dog", None),
    }


def test_split_folders_hold_the_class_folders(tmp_path, rows_of):
    put(tmp_path, "Train/cat/1.jpg", "valid/cat/1.jpg", "validation/dog/1.jpg", "test/dog/a/1.jpg")
    assert labels(rows_of(open_source(str(tmp_path)))) == {
        "Train/cat/1.jpg": ("cat", "train"),
        "valid/cat/1.jpg": ("cat", "val"),
        "validation/dog/1.jpg": ("dog", "val"),
        "test/dog/a/1.jpg": ("dog", "test"),
    }


def test_one_other_folder_makes_split_names_classes(tmp_path, rows_of):
    put(tmp_path, "train/1.jpg", "bus/1.jpg")  # vehicles
    assert labels(rows_of(open_source(str(tmp_path)))) == {
        "train/1.jpg": ("train", None),
        "bus/1.jpg": ("bus", None),
    }


def test_files_beside_the_classes_are_listed_once_without_a_label(tmp_path, rows_of):
    put(tmp_path, "train/cat/1.jpg", "train/stray.jpg", "stray.txt")
    assert labels(rows_of(open_source(str(tmp_path)))) == {
        "stray.txt": (None, None),
        "train/stray.jpg": (None, "train"),
        "train/cat/1.jpg": ("cat", "train"),
    }


def test_unlabelled_tree_has_neither_labels_nor_splits(tmp_path, rows_of):
    put(tmp_path, "train/cat/1.jpg", "a/b/c/2.jpg", "3.jpg")
    source = open_source(str(tmp_path), labelled=False)
    assert source.partitions() == ["", "a/", "train/"]
    assert labels(rows_of(source)) == dict.fromkeys(
        ["3.jpg", "a/b/c/2.jpg", "train/cat/1.jpg"], (None, None)
    )


def test_hidden_files_and_folders_are_no_inputs_and_all_else_is(tmp_path, rows_of):
    put(tmp_path, "cat/.DS_Store", "cat/.cache/1.jpg", ".git/1.jpg", ".x.jpg", "cat/a.txt", "cat/b")
    assert [row["key"] for row in rows_of(open_source(str(tmp_path)))] == ["cat/a.txt", "cat/b"]


def test_hidden_files_are_no_inputs_without_labels_either(tmp_path, rows_of):
    put(tmp_path, "cat/.DS_Store", ".git/1.jpg", ".x.jpg", "a.jpg", "cat/b..jpg")
    rows = rows_of(open_source(str(tmp_path), labelled=False))
    assert [row["key"] for row in rows] == ["a.jpg", "cat/b..jpg"]


def test_very_many_folders_are_one_partition_with_the_same_inputs(tmp_path, rows_of, monkeypatch):
    put(tmp_path, *(f"{number:02}/1.jpg" for number in range(12)), "beside.jpg", ".git/1.jpg")
    source = open_source(str(tmp_path), labelled=False)
    rows = rows_of(source)
    assert len(source.partitions()) == 13
    monkeypatch.setattr("cnnray.datasets.sources.folder.MAX_FOLDERS", 11)
    assert len(source.partitions()) == 1
    assert sorted(rows_of(source), key=str) == sorted(rows, key=str)
    assert len(open_source(str(tmp_path)).partitions()) == 13  # labels come from the partitions


def test_hidden_folder_does_not_hide_that_the_others_are_splits(tmp_path, rows_of):
    put(tmp_path, ".cache/1", "train/cat/1.jpg")
    assert labels(rows_of(open_source(str(tmp_path)))) == {"train/cat/1.jpg": ("cat", "train")}


HOSTILE_NAMES = [
    "with space.jpg",
    " lead and trail ",
    "-rf",
    "100%20.jpg",
    "quote'\".jpg",
    "new\nline.jpg",
    "*.jpg",
    "a:b?#.jpg",
    "back\\slash",
    unicodedata.normalize("NFC", "é.jpg"),
    unicodedata.normalize("NFD", "é.jpg"),
    "日本\u202e.jpg",
]


@pytest.mark.parametrize("labelled", [True, False])
def test_hostile_names_are_listed_and_read_byte_exact(tmp_path, rows_of, read_all, labelled):
    keys = [f"{name}/{name}" for name in HOSTILE_NAMES]
    put(tmp_path, *keys)
    source = open_source(str(tmp_path), labelled=labelled)
    rows = rows_of(source)
    assert sorted(row["key"] for row in rows) == sorted(keys)
    assert all(row["label"] == (row["key"].split("/")[0] if labelled else None) for row in rows)
    assert read_all(source) == [f"bytes of {row['key']}".encode() for row in rows]


def test_order_is_that_of_the_names_in_utf8(tmp_path, rows_of):
    put(tmp_path, "b/2", "b/10", "a/z", "a/Z", "a/é")
    keys = [row["key"] for row in rows_of(open_source(str(tmp_path)))]
    assert keys == ["a/Z", "a/z", "a/é", "b/10", "b/2"]


def test_entries_know_size_and_etag(tmp_path, rows_of):
    put(tmp_path, "cat/1.jpg")
    [row] = rows_of(open_source(str(tmp_path)))
    assert (row["path"], row["offset"], row["length"]) == (
        "cat/1.jpg",
        0,
        len("bytes of cat/1.jpg"),
    )
    assert row["etag"] == open_store(str(tmp_path)).head("cat/1.jpg").etag


def test_read_is_in_the_order_asked_and_a_vanished_file_is_an_error(tmp_path, entries_of):
    put(tmp_path, *(f"cat/{number:03}" for number in range(100)))
    source = open_source(str(tmp_path))
    backwards = entries_of(source).take([*range(99, -1, -1)])
    os.unlink(tmp_path / "cat/050")
    results = list(source.read(backwards))
    assert isinstance(results.pop(49), MissingObjectError)
    kept = [number for number in range(99, -1, -1) if number != 50]
    assert results == [f"bytes of cat/{number:03}".encode() for number in kept]


def test_a_file_that_was_replaced_after_the_listing_has_changed(tmp_path, entries_of):
    put(tmp_path, "cat/1", "cat/2")
    source = open_source(str(tmp_path))
    entries = entries_of(source)
    (tmp_path / "cat/1").write_bytes(b"another image")
    changed, same = source.read(entries)
    assert isinstance(changed, ChangedObjectError)
    assert same == b"bytes of cat/2"


def test_read_of_what_is_no_file_is_an_error_of_that_image(tmp_path, entries_of):
    put(tmp_path, "cat/1")
    source = open_source(str(tmp_path))
    entries = entries_of(source)
    os.unlink(tmp_path / "cat/1")
    (tmp_path / "cat/1").mkdir()
    [result] = source.read(entries)
    assert isinstance(result, StorageError)


def test_listing_comes_in_tables_of_bounded_size(tmp_path, monkeypatch):
    monkeypatch.setattr("cnnray.datasets.sources.base.MAX_TABLE_ROWS", 4)
    put(tmp_path, *(f"cat/{number}" for number in range(10)))
    tables = list(open_source(str(tmp_path)).list("cat/"))
    assert [table.num_rows for table in tables] == [4, 4, 2]
    assert all(table.schema.equals(ENTRY_SCHEMA) for table in tables)


def test_source_travels_by_pickle(tmp_path, rows_of, travelled):
    put(tmp_path, "cat/1.jpg")
    source = open_source(str(tmp_path))
    copy = travelled(source)
    assert copy == source
    assert rows_of(copy) == rows_of(source)


@pytest.mark.parametrize("format", ["auto", "folder"])
def test_empty_folder_has_no_images_at_all(tmp_path, format):
    (tmp_path / "cat").mkdir()
    put(tmp_path, ".hidden")
    with pytest.raises(DataError, match="no images at all in"):
        open_source(str(tmp_path), format=format)


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        open_source(str(tmp_path / "nowhere"))


def test_folder_without_any_image_says_what_it_holds(tmp_path):
    put(tmp_path, "images.zip", "notes/README.md")
    with pytest.raises(DataError, match=r"found 'images.zip', 'notes/README.md'"):
        open_source(str(tmp_path))


def test_single_image_file_is_no_source(tmp_path):
    put(tmp_path, "cat.jpg")
    with pytest.raises(DataError, match=r"found 'cat.jpg'"):
        open_source(str(tmp_path / "cat.jpg"))


def test_images_without_extension_are_a_folder(tmp_path):
    put(tmp_path, "cat/0a1b2c")
    assert isinstance(open_source(str(tmp_path)), FolderSource)


def test_a_table_or_tar_among_images_leaves_it_a_folder(tmp_path, rows_of):
    put(tmp_path, "cat/1.jpg", "cat/more.tar", "labels.csv")
    rows = rows_of(open_source(str(tmp_path)))
    assert [row["key"] for row in rows] == ["labels.csv", "cat/1.jpg", "cat/more.tar"]


def test_unknown_format_is_refused(tmp_path):
    put(tmp_path, "cat/1.jpg")
    with pytest.raises(SettingsError, match="zarr"):
        open_source(str(tmp_path), format="zarr")


def test_column_options_need_a_table(tmp_path):
    put(tmp_path, "cat/1.jpg")
    assert open_source(str(tmp_path), path_column=None)
    with pytest.raises(SettingsError, match="path_column"):
        open_source(str(tmp_path), path_column="x")
