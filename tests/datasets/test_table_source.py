"""CSV and Parquet tables of paths and labels."""

import socket
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cnnray.datasets.sources import open_source
from cnnray.datasets.sources.base import MAX_TABLE_ROWS
from cnnray.datasets.sources.rows import BLOCK_BYTES
from cnnray.datasets.sources.table import TableSource
from cnnray.errors import (
    ChangedObjectError,
    DataError,
    MissingObjectError,
    SettingsError,
    StorageError,
)
from cnnray.storage import open_store


def write_csv(folder, *, text: str, name: str = "data.csv") -> str:
    (folder / name).write_bytes(text.encode())
    return str(folder / name)


def write_parquet(folder, *, columns: dict, name: str = "data.parquet", **options) -> str:
    pq.write_table(pa.table(columns), folder / name, **options)
    return str(folder / name)


def test_columns_are_found_by_convention(tmp_path, rows_of):
    uri = write_csv(tmp_path, text="width,Filename,category,subset\n3,a.jpg,cat,Train\n")
    [row] = rows_of(open_source(uri))
    assert row == {
        "key": "a.jpg",
        "path": "a.jpg",
        "offset": 0,
        "length": -1,
        "etag": "",
        "label": "cat",
        "split": "train",
    }


def test_earlier_conventional_name_wins(tmp_path, rows_of):
    uri = write_csv(tmp_path, text="image,path\na,b\n")
    assert [row["path"] for row in rows_of(open_source(uri))] == ["b"]


def test_named_columns_win_over_conventional_ones(tmp_path, rows_of):
    uri = write_csv(tmp_path, text="path,label,where,breed,fold,id\nx,y,a.jpg,pug,test,7\n")
    source = open_source(
        uri,
        path_column="where",
        label_column="breed",
        split_column="fold",
        key_column="id",
    )
    [row] = rows_of(source)
    assert (row["key"], row["path"], row["label"], row["split"]) == ("7", "a.jpg", "pug", "test")


def test_csv_values_stay_the_text_they_are(tmp_path, rows_of):
    uri = write_csv(tmp_path, text="path,label\n001,007\n1e3,NA\nnull,true\n")
    rows = rows_of(open_source(uri))
    assert [(row["path"], row["label"]) for row in rows] == [
        ("001", "007"),
        ("1e3", "NA"),
        ("null", "true"),
    ]


def test_empty_label_or_split_is_none(tmp_path, rows_of):
    uri = write_csv(tmp_path, text="path,label,split\na,,\n")
    [row] = rows_of(open_source(uri))
    assert (row["label"], row["split"]) == (None, None)


def test_csv_with_bom_and_hostile_names_is_read_byte_exact(tmp_path, rows_of, read_all):
    names = ["a b.jpg", 'quo"te', "new\nline", "100%20", "-rf", "é", "e\u0301", "com,ma"]
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    quoted = "".join('"{}",x\n'.format(name.replace('"', '""')) for name in names)
    source = open_source(write_csv(tmp_path, text=f"\ufeffpath,label\n{quoted}"))
    assert [row["key"] for row in rows_of(source)] == names
    assert read_all(source) == [name.encode() for name in names]


def test_long_csv_is_streamed_in_order_with_all_its_rows(tmp_path, entries_of):
    count = 2 * BLOCK_BYTES // 8  # two blocks; more short rows in one than a table may hold
    assert count > 2 * MAX_TABLE_ROWS
    uri = write_csv(tmp_path, text="path\n" + "".join(f"{n:07}\n" for n in range(count)))
    tables = list(open_source(uri).list("data.csv"))
    assert max(table.num_rows for table in tables) <= MAX_TABLE_ROWS
    assert pa.concat_tables(tables)["key"].to_pylist() == [f"{n:07}" for n in range(count)]


def test_long_parquet_is_streamed_in_bounded_memory(tmp_path):
    count = 500_000  # in one row group
    paths = pa.array([f"{n:0100}" for n in range(count)])
    columns = {"path": paths, "etag": paths}
    plain = {"use_dictionary": False, "compression": "none"}
    uri = write_parquet(tmp_path, columns=columns, row_group_size=count, **plain)
    assert (tmp_path / "data.parquet").stat().st_size > 100_000_000
    del paths, columns
    before = pa.total_allocated_bytes()
    rows = peak = 0
    tracemalloc.start()  # what is read comes as Python's bytes
    try:
        for table in open_source(uri, labelled=False).list("data.parquet"):
            assert table.num_rows <= MAX_TABLE_ROWS
            rows += table.num_rows
            peak = max(peak, pa.total_allocated_bytes() - before)
        peak += tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert rows == count
    assert peak < 25_000_000


def test_newlines_in_names_do_not_break_a_block(tmp_path, rows_of):
    names = [f"{number}\n" * 50 for number in range(10_000)]  # 3 MiB, mostly line breaks
    text = "path\n" + "".join(f'"{name}"\n' for name in names)
    assert len(text) > 2 * BLOCK_BYTES
    rows = rows_of(open_source(write_csv(tmp_path, text=text)))
    assert [row["key"] for row in rows] == names


def test_parquet_integer_and_dictionary_labels_become_text(tmp_path, rows_of):
    numbers = write_parquet(tmp_path, columns={"path": ["a", "b"], "label": [7, None]})
    assert [row["label"] for row in rows_of(open_source(numbers))] == ["7", None]
    names = pa.array(["cat", "dog"]).dictionary_encode()
    encoded = write_parquet(tmp_path, columns={"path": ["a", "b"], "label": names})
    assert [row["label"] for row in rows_of(open_source(encoded))] == ["cat", "dog"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_parquet_text_of_any_kind_is_a_path(tmp_path, rows_of, kind):
    uri = write_parquet(tmp_path, columns={"uri": pa.array(["a", "b"], kind)}, row_group_size=1)
    assert [row["path"] for row in rows_of(open_source(uri))] == ["a", "b"]


def test_folder_of_parquet_is_a_table_with_a_partition_per_file(tmp_path, rows_of):
    (tmp_path / "more").mkdir()
    for name, path in (("b.parquet", "2"), ("a.parquet", "1"), ("more/c.parquet", "3")):
        write_parquet(tmp_path, columns={"path": [path]}, name=name)
    source = open_source(str(tmp_path))
    assert source.partitions() == ["a.parquet", "b.parquet", "more/c.parquet"]
    assert [row["path"] for row in rows_of(source)] == ["1", "2", "3"]


def test_other_columns_are_not_read(tmp_path, rows_of):
    uri = write_parquet(
        tmp_path, columns={"path": ["a"], "thumbnail": [b"\xff" * 10], "boxes": [[1, 2]]}
    )
    assert len(rows_of(open_source(uri))) == 1


def test_splits_are_normalised(tmp_path, rows_of):
    given = ["train", "VAL", "valid", "Validation", "test", None]
    uri = write_parquet(tmp_path, columns={"path": [*"abcdef"], "split": given})
    splits = [row["split"] for row in rows_of(open_source(uri))]
    assert splits == ["train", "val", "val", "val", "test", None]


def test_unknown_split_is_named_with_its_row(tmp_path, rows_of):
    uri = write_csv(tmp_path, text="path,split\na,train\nb,holdout\n")
    with pytest.raises(DataError, match=r"'holdout' is not a split in .*data.csv, row 2"):
        rows_of(open_source(uri))


def test_row_of_an_error_counts_from_the_start_of_the_file(tmp_path, rows_of, monkeypatch):
    monkeypatch.setattr("cnnray.datasets.sources.table.MAX_TABLE_ROWS", 3)
    uri = write_csv(tmp_path, text="path\n" + "a\n" * 7 + '""\n')
    with pytest.raises(DataError, match="no path in .*, row 8"):
        rows_of(open_source(uri))


def test_unlabelled_ignores_labels_and_splits(tmp_path, rows_of):
    uri = write_csv(tmp_path, text="path,label,split\na,cat,holdout\n")
    [row] = rows_of(open_source(uri, labelled=False))
    assert (row["label"], row["split"]) == (None, None)


def test_missing_path_column_lists_the_columns(tmp_path, rows_of):
    uri = write_csv(tmp_path, text="foo,bar\n1,2\n")
    with pytest.raises(DataError, match="its columns are foo, bar"):
        rows_of(open_source(uri))
    with pytest.raises(DataError, match="no column 'baz'"):
        rows_of(open_source(uri, label_column="baz", path_column="foo"))


def test_column_that_is_no_text_is_refused(tmp_path, rows_of):
    uri = write_parquet(tmp_path, columns={"image": [{"bytes": b"x", "path": "a"}]})
    with pytest.raises(DataError, match="column 'image' of .* holds struct"):
        rows_of(open_source(uri))


def test_repeated_column_is_refused(tmp_path, rows_of):
    with pytest.raises(DataError, match="more than one column 'path'"):
        rows_of(open_source(write_csv(tmp_path, text="path,path\na,b\n")))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("empty.csv", b""),
        ("ragged.csv", b"path,label\na\n"),
        ("latin1.csv", b"path,label\ncaf\xe9,x\n"),
        ("not.parquet", b"PAR1 but not really"),
        ("empty.parquet", b""),
    ],
)
def test_damaged_table_is_named(tmp_path, rows_of, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=f"cannot read .*{name}"):
        rows_of(open_source(str(tmp_path / name)))


def test_parquet_text_that_is_not_utf8_is_refused(tmp_path, rows_of):
    raw = pa.StringArray.from_buffers(
        1, pa.py_buffer(b"\x00\x00\x00\x00\x02\x00\x00\x00"), pa.py_buffer(b"\xff\xfe")
    )
    uri = write_parquet(tmp_path, columns={"path": raw})
    with pytest.raises(DataError, match="cannot read"):
        rows_of(open_source(uri))


def test_header_alone_is_an_empty_table(tmp_path, rows_of):
    assert rows_of(open_source(write_csv(tmp_path, text="path,label\n"))) == []


def test_missing_table_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere.csv"):
        open_source(str(tmp_path / "nowhere.csv"))
    with pytest.raises(MissingObjectError):
        list(open_source(write_csv(tmp_path, text="path\n")).list("other.csv"))


def test_folder_without_parquet_is_no_table(tmp_path):
    write_csv(tmp_path, text="path\na\n")
    with pytest.raises(DataError, match=r"no \.parquet files"):
        open_source(str(tmp_path), format="table").partitions()


def test_relative_absolute_and_file_paths_are_read(tmp_path, read_all):
    (tmp_path / "images").mkdir()
    (tmp_path / "tables").mkdir()
    image = tmp_path / "images" / "a.jpg"
    image.write_bytes(b"image")
    text = f"path\n../images/a.jpg\n{image}\nfile://{image}\n"
    source = open_source(write_csv(tmp_path / "tables", text=text))
    assert read_all(source) == [b"image"] * 3


@pytest.mark.parametrize("name", ["etag", "e_tag", "ETag"])
def test_etags_are_taken_from_the_table(tmp_path, rows_of, name):
    uri = write_parquet(tmp_path, columns={"path": [*"abc"], name: ["e1", '"e2"', None]})
    assert [row["etag"] for row in rows_of(open_source(uri))] == ["e1", "e2", ""]
    csv = write_csv(tmp_path, text=f'path,{name}\na,e1\nb,"""e2"""\nc,\n')
    assert [row["etag"] for row in rows_of(open_source(csv))] == ["e1", "e2", ""]


def test_etag_column_can_be_named(tmp_path, rows_of):
    uri = write_csv(tmp_path, text="path,etag,version\na,e1,e2\n")
    assert [row["etag"] for row in rows_of(open_source(uri, etag_column="version"))] == ["e2"]


def test_an_image_that_is_not_that_of_the_table_has_changed(tmp_path, read_all):
    for name in "abc":
        (tmp_path / name).write_bytes(b"image")
    etag = open_store(str(tmp_path)).head("a").etag
    uri = write_csv(tmp_path, text=f"path,etag\na,{etag}\nb,0-5\nc,\n")
    same, changed, unknown = read_all(open_source(uri))
    assert same == unknown == b"image"
    assert isinstance(changed, ChangedObjectError)


def test_other_schemes_are_an_error_of_that_image_and_never_fetched(
    tmp_path, read_all, monkeypatch
):
    def refuse(*_):
        raise AssertionError("a connection was attempted")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    (tmp_path / "a.jpg").write_bytes(b"image")
    uri = write_csv(
        tmp_path, text="path\na.jpg\nhttp://127.0.0.1/x\ngone.jpg\ngs://b/x\ns3://k@b/x\na.jpg\n"
    )
    first, http, gone, gs, credentials, last = read_all(open_source(uri))
    assert first == last == b"image"
    assert isinstance(gone, MissingObjectError)
    for error in (http, gs):
        assert isinstance(error, StorageError)
        assert "only local paths and s3://" in str(error)
    assert isinstance(credentials, StorageError)


def test_source_travels_by_pickle(tmp_path, rows_of, travelled):
    source = open_source(write_csv(tmp_path, text="path,x\na,1\n"), label_column="x")
    copy = travelled(source)
    assert isinstance(copy, TableSource)
    assert copy == source
    assert rows_of(copy) == rows_of(source)


def test_format_table_takes_options_on_a_folder(tmp_path, rows_of):
    write_parquet(tmp_path, columns={"x": ["a"]})
    (tmp_path / "README.md").write_text("notes")
    source = open_source(str(tmp_path), format="table", path_column="x")
    assert [row["path"] for row in rows_of(source)] == ["a"]
    with pytest.raises(SettingsError):
        open_source(str(tmp_path), format="folder", path_column="x")
