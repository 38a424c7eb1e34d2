"""S3 Inventories in Parquet, from a manifest on disk."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cnnray.datasets.sources import inventory, open_source
from cnnray.datasets.sources.inventory import InventorySource
from cnnray.errors import DataError, MissingObjectError, StorageError
from cnnray.storage import open_store


def write_inventory(
    folder: Path, *files: pa.Table, file_format: str = "Parquet", data: str = "data"
) -> str:
    """An inventory as S3 writes it, copied to a folder; the URI of its manifest."""
    names = [f"{number}-8f2c.parquet" for number in range(len(files))]
    (folder / data).mkdir(parents=True, exist_ok=True)
    for name, table in zip(names, files, strict=True):
        pq.write_table(table, folder / data / name)
    manifest = {
        "sourceBucket": "photos",
        "destinationBucket": "arn:aws:s3:::inventories",
        "version": "2016-11-30",
        "creationTimestamp": "1514944800000",
        "fileFormat": file_format,
        "fileSchema": "message s3.inventory { required binary bucket (STRING); ... }",
        "files": [
            {"key": f"daily/photos/all/data/{name}", "size": 1, "MD5checksum": "f1c6"}
            for name in names
        ],
    }
    path = folder / "manifest.json"
    path.write_text(json.dumps(manifest))
    return str(path)


def objects(*keys: str, **columns: list) -> pa.Table:
    return pa.table({"bucket": ["photos"] * len(keys), "key": [*keys], **columns})


def test_every_object_is_an_input_with_its_size_and_etag(tmp_path, rows_of):
    table = objects("a.jpg", "b/c.jpg", size=[10, 20], e_tag=["e1", '"e2"'])
    rows = rows_of(open_source(write_inventory(tmp_path, table), labelled=False))
    assert [(row["key"], row["length"], row["etag"]) for row in rows] == [
        ("s3://photos/a.jpg", 10, "e1"),
        ("s3://photos/b/c.jpg", 20, "e2"),
    ]
    assert all(row["path"] == row["key"] for row in rows)
    assert {(row["offset"], row["label"], row["split"]) for row in rows} == {(0, None, None)}


ODD_KEYS = [
    "/lead",
    "//",
    "a//b",
    "../up",
    ".hidden",
    "100%20+",
    "new\nline",
    "quo'\"te",
    "é",
    "e\u0301",
    "s3://x",
]


def test_keys_are_byte_exact(tmp_path, rows_of):
    uri = write_inventory(tmp_path, objects(*ODD_KEYS))
    assert [row["key"] for row in rows_of(open_source(uri))] == [
        f"s3://photos/{k}" for k in ODD_KEYS
    ]


def test_optional_columns_may_be_left_out_of_the_inventory(tmp_path, rows_of):
    rows = rows_of(open_source(write_inventory(tmp_path, objects("a.jpg", "folder/"))))
    assert [(row["length"], row["etag"]) for row in rows] == [(-1, "")] * 2


def test_old_versions_and_delete_markers_are_left_out(tmp_path, rows_of):
    table = objects(
        *("old", "new", "deleted", "unversioned"),
        is_latest=[False, True, True, None],
        is_delete_marker=[False, False, True, None],
    )
    keys = [row["key"] for row in rows_of(open_source(write_inventory(tmp_path, table)))]
    assert keys == ["s3://photos/new", "s3://photos/unversioned"]


def test_empty_objects_that_stand_for_folders_are_left_out(tmp_path, rows_of):
    table = objects("folder/", "body/", "empty.jpg", "unknown/", size=[0, 3, 0, None])
    keys = [row["key"] for row in rows_of(open_source(write_inventory(tmp_path, table)))]
    assert keys == ["s3://photos/body/", "s3://photos/empty.jpg", "s3://photos/unknown/"]


def test_an_inventory_has_a_partition_per_data_file_in_the_manifest_s_order(tmp_path, rows_of):
    source = open_source(write_inventory(tmp_path, objects("z"), objects("a"), objects("x")[:0]))
    assert len(source.partitions()) == 3
    assert [row["key"] for row in rows_of(source)] == ["s3://photos/z", "s3://photos/a"]


def test_a_long_data_file_comes_in_bounded_tables(tmp_path, monkeypatch):
    monkeypatch.setattr("cnnray.datasets.sources.rows.MAX_TABLE_ROWS", 4)
    source = open_source(write_inventory(tmp_path, objects(*map(str, range(10)))))
    [partition] = source.partitions()
    assert [table.num_rows for table in source.list(partition)] == [4, 4, 2]


@pytest.mark.parametrize("data", [".", "data", "../data"])
def test_data_files_of_a_manifest_on_disk_are_found_near_it(tmp_path, rows_of, data):
    uri = write_inventory(tmp_path / "2026-01-01T01-00Z", objects("a"), data=data)
    assert len(rows_of(open_source(uri))) == 1


def test_a_data_file_that_was_not_copied_is_named(tmp_path):
    uri = write_inventory(tmp_path, objects("a"))
    (tmp_path / "data" / "0-8f2c.parquet").unlink()
    with pytest.raises(DataError, match="'0-8f2c.parquet' of the inventory is not beside"):
        open_source(uri).partitions()


def test_a_key_cannot_lead_out_of_the_folder(tmp_path):
    uri = write_inventory(tmp_path / "deep", objects("a"))
    (tmp_path / "secret").write_text("x")
    document = json.loads(Path(uri).read_text())
    for key in ("../secret", "data/../../secret", "/", "..", "a\0b"):
        document["files"] = [{"key": key}]
        Path(uri).write_text(json.dumps(document))
        with pytest.raises((DataError, StorageError)):
            open_source(uri).partitions()


@pytest.mark.parametrize("file_format", ["CSV", "ORC"])
def test_other_formats_are_refused_with_the_remedy(tmp_path, file_format):
    uri = write_inventory(tmp_path, objects("a"), file_format=file_format)
    with pytest.raises(DataError, match=f"is in '{file_format}'\nhint: .*Apache Parquet"):
        open_source(uri).partitions()


def test_an_inventory_without_files_is_refused(tmp_path):
    with pytest.raises(DataError, match="has no data files"):
        open_source(write_inventory(tmp_path)).partitions()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"fileFormat": "Parquet"}', '{"schema_version": 1}', "[" * 100_000]
)
def test_another_manifest_is_no_inventory(tmp_path, text):
    path = tmp_path / "manifest.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"found 'manifest.json'"):
        open_source(str(path))
    with pytest.raises(DataError, match="is not the manifest of an S3 Inventory"):
        open_source(str(path), format="inventory").partitions()


def test_a_manifest_has_a_size_limit(tmp_path, monkeypatch):
    uri = write_inventory(tmp_path, objects("a"))
    monkeypatch.setattr(inventory, "MAX_MANIFEST_BYTES", 10)
    with pytest.raises(DataError, match="is not the manifest"):
        open_source(uri, format="inventory").partitions()


def test_a_folder_is_an_inventory_when_it_is_said_to_be_one(tmp_path, rows_of):
    write_inventory(tmp_path, objects("a"))
    assert len(rows_of(open_source(str(tmp_path), format="inventory"))) == 1
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(MissingObjectError, match=r"manifest\.json"):
        open_source(str(tmp_path), format="inventory").partitions()


@pytest.mark.parametrize(
    "table",
    [
        pa.table({"key": ["a"]}),
        pa.table({"bucket": ["b"], "key": [1]}),
        objects("a", size=["10"]),
        objects("a", is_latest=["true"]),
    ],
)
def test_a_table_that_is_no_inventory_is_named(tmp_path, rows_of, table):
    with pytest.raises(DataError, match=r"0-8f2c\.parquet is no inventory: its columns are"):
        rows_of(open_source(write_inventory(tmp_path, table)))


@pytest.mark.parametrize(
    ("bucket", "key", "message"),
    [("photos", "", "no key"), ("", "a", "no key"), ("photos/a", "b", "no bucket's name")],
)
def test_a_row_that_names_no_object_is_refused_with_its_number(
    tmp_path, rows_of, bucket, key, message
):
    table = pa.table({"bucket": ["photos", bucket], "key": ["x", key]})
    with pytest.raises(DataError, match=f"{message} in .*, row 2"):
        rows_of(open_source(write_inventory(tmp_path, table)))


def test_a_damaged_data_file_is_named(tmp_path, rows_of):
    uri = write_inventory(tmp_path, objects("a"))
    (tmp_path / "data" / "0-8f2c.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(DataError, match=r"cannot read .*0-8f2c\.parquet"):
        rows_of(open_source(uri))


def test_source_travels_by_pickle(tmp_path, rows_of, travelled):
    source = open_source(write_inventory(tmp_path, objects("a")))
    copy = travelled(source)
    assert copy == source == InventorySource(open_store(str(tmp_path)), "manifest.json")
    assert rows_of(copy) == rows_of(source)
