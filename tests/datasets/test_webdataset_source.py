"""Tars of samples, whole and hostile."""

import gzip
import io
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from cnnray.datasets.sources import open_source, webdataset
from cnnray.datasets.sources.webdataset import WebDatasetSource
from cnnray.errors import ChangedObjectError, DataError, StorageError
from cnnray.storage import open_store


def tar_bytes(*members: tuple[str, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def write_tar(folder: Path, *members: tuple[str, bytes], name: str = "a.tar") -> str:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(tar_bytes(*members))
    return str(folder / name)


def list_until_break(source, partition: str) -> tuple[list[str], str]:
    keys = []
    try:
        for table in source.list(partition):
            keys += table["key"].to_pylist()
    except DataError as error:
        return keys, str(error)
    raise AssertionError(f"no break after {keys}")


def test_sample_is_the_members_of_one_name(tmp_path, rows_of, read_all):
    uri = write_tar(
        tmp_path,
        ("n/x.cls", b"7\n"),
        ("n/x.jpg", b"image x"),
        ("y.PNG", b"image y"),
        ("y.cls", b"cat"),
    )
    source = open_source(uri)
    rows = rows_of(source)
    assert [(row["key"], row["label"], row["split"]) for row in rows] == [
        ("a.tar/n/x.jpg", "7", None),
        ("a.tar/y.PNG", "cat", None),
    ]
    assert [row["length"] for row in rows] == [7, 7]
    assert read_all(source) == [b"image x", b"image y"]


def test_image_is_the_first_suffix_by_preference(tmp_path, rows_of):
    uri = write_tar(
        tmp_path, ("x.gif", b"1"), ("x.png", b"2"), ("x.jpeg", b"3"), ("x.mask.jpg", b"4")
    )
    assert [row["key"] for row in rows_of(open_source(uri))] == ["a.tar/x.jpeg"]


@pytest.mark.parametrize(
    ("name", "data", "label"),
    [
        ("x.cls", b"007", "007"),
        ("x.CLS", b" tabby cat \n", "tabby cat"),
        ("x.cls", "é".encode(), "é"),
        ("x.cls", b"\xff\xfe", None),
        ("x.cls", b"  ", None),
        ("x.cls", b"1" * (webdataset.MAX_LABEL_BYTES + 1), None),
        ("x.txt", b"a caption", None),
        ("x.json", b'{"label": "cat", "class": "dog"}', "cat"),
        ("x.json", b'{"class": 3}', "3"),
        ("x.json", b'{"cls": "a"}', "a"),
        ("x.json", b'{"label": true}', None),
        ("x.json", b'{"label": {"a": 1}}', None),
        ("x.json", b'{"label": "\\ud800"}', None),
        ("x.json", b'{"label": ' + b"9" * 5000 + b"}", None),
        ("x.json", b"[" * 60_000, None),
        ("x.json", b"[1]", None),
        ("x.json", b"12", None),
        ("x.json", b"{", None),
    ],
)
def test_label_is_stated_by_cls_or_json(tmp_path, rows_of, name, data, label):
    source = open_source(write_tar(tmp_path, ("x.jpg", b"image"), (name, data)))
    assert [row["label"] for row in rows_of(source)] == [label]


def test_cls_wins_over_json(tmp_path, rows_of):
    uri = write_tar(tmp_path, ("x.json", b'{"label": 1}'), ("x.cls", b"2"), ("x.jpg", b""))
    assert [row["label"] for row in rows_of(open_source(uri))] == ["2"]


def test_unlabelled_has_no_labels(tmp_path, rows_of):
    uri = write_tar(tmp_path, ("x.jpg", b"image"), ("x.cls", b"1"))
    assert [row["label"] for row in rows_of(open_source(uri, labelled=False))] == [None]


def test_repeated_names_get_a_suffix_and_their_own_bytes(tmp_path, rows_of, read_all):
    pairs = [[("x.jpg", b"image %d" % n), ("x.cls", b"%d" % n)] for n in range(3)]
    source = open_source(write_tar(tmp_path, *pairs[0], *pairs[1], ("y.jpg", b"y"), *pairs[2]))
    assert [(row["key"], row["label"]) for row in rows_of(source)] == [
        ("a.tar/x.jpg", "0"),
        ("a.tar/x.jpg#2", "1"),
        ("a.tar/y.jpg", None),
        ("a.tar/x.jpg#3", "2"),
    ]
    assert read_all(source) == [b"image 0", b"image 1", b"y", b"image 2"]


HOSTILE_NAMES = ["a b.jpg", "-rf.jpg", "new\nline.jpg", "100%20.jpg", "'\".jpg", "../../up.jpg"]
HOSTILE_NAMES += ["/abs.jpg", "./here.jpg", "é.jpg", "e\u0301.jpg", "deep/" * 100 + "long.jpg"]


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_hostile_and_long_names_are_byte_exact(tmp_path, rows_of, read_all, format):
    members = [(name, name.encode()) for name in HOSTILE_NAMES]
    (tmp_path / "a.tar").write_bytes(tar_bytes(*members, format=format))
    source = open_source(str(tmp_path / "a.tar"))
    assert [row["key"] for row in rows_of(source)] == [f"a.tar/{name}" for name in HOSTILE_NAMES]
    assert read_all(source) == [name.encode() for name in HOSTILE_NAMES]
    assert os.listdir(tmp_path) == ["a.tar"]


def test_name_that_is_not_utf8_is_shown_escaped_and_still_read(tmp_path, rows_of, read_all):
    data = tar_bytes(("XXX.jpg", b"image"), format=tarfile.GNU_FORMAT)
    header = bytearray(data[:512].replace(b"XXX", b"\xff\xfeX"))
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "a.tar").write_bytes(bytes(header) + data[512:])
    source = open_source(str(tmp_path / "a.tar"))
    assert [row["key"] for row in rows_of(source)] == ["a.tar/\\xff\\xfeX.jpg"]
    assert read_all(source) == [b"image"]


def test_only_regular_files_are_samples(tmp_path, rows_of):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        kinds = [
            tarfile.SYMTYPE,
            tarfile.LNKTYPE,
            tarfile.CHRTYPE,
            tarfile.FIFOTYPE,
            tarfile.DIRTYPE,
        ]
        for number, kind in enumerate(kinds):
            info = tarfile.TarInfo(f"{number}.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        tar.addfile(tarfile.TarInfo("real.jpg"))
        tar.addfile(tarfile.TarInfo("._real.jpg"))  # what macOS adds
        tar.addfile(tarfile.TarInfo(".jpg"))
    assert [row["key"] for row in rows_of(open_source(str(tmp_path / "a.tar")))] == [
        "a.tar/real.jpg"
    ]


@dataclass
class Recorder:
    """A file that notes which bytes were asked for."""

    file: io.BufferedReader
    asked: list[range]

    def read(self, size: int) -> bytes:
        self.asked.append(range(self.file.tell(), self.file.tell() + size))
        return self.file.read(size)

    def seek(self, position: int) -> int:
        return self.file.seek(position)

    def tell(self) -> int:
        return self.file.tell()


def test_bodies_of_pickles_and_images_are_never_read_when_listing(tmp_path):
    secret = b"S" * 5000
    uri = write_tar(tmp_path, *((f"x.{s}", secret) for s in ("pkl", "pyd", "pt", "jpg", "npy")))
    data = Path(uri).read_bytes()
    with open(uri, "rb") as file:
        recorder = Recorder(file, [])
        members = webdataset._walk(recorder, size=len(data), where=uri)
        [sample] = [s for s in webdataset._samples(members, file=recorder, labelled=True) if s.name]
    assert sample.image.name == "x.jpg"
    touched = b"".join(data[r.start : r.stop] for r in recorder.asked)
    assert touched.count(b"S") < 100  # one byte at the end of each body tells that it is whole


def test_folder_of_tars_has_a_partition_per_tar(tmp_path, rows_of):
    write_tar(tmp_path, ("x.jpg", b"1"), name="b.tar")
    write_tar(tmp_path, ("x.jpg", b"2"), name="a.tar")
    (tmp_path / "info.json").write_text("{}")
    source = open_source(str(tmp_path))
    assert source.partitions() == ["a.tar", "b.tar"]
    assert [row["key"] for row in rows_of(source)] == ["a.tar/x.jpg", "b.tar/x.jpg"]


def test_tars_below_split_folders_belong_to_the_split(tmp_path, rows_of):
    for folder in ("train", "valid", "more"):
        write_tar(tmp_path, ("x.jpg", b"1"), name=f"{folder}/0.tar")
    assert {row["key"]: row["split"] for row in rows_of(open_source(str(tmp_path)))} == {
        "more/0.tar/x.jpg": None,
        "train/0.tar/x.jpg": "train",
        "valid/0.tar/x.jpg": "val",
    }


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar"])
@pytest.mark.parametrize("format", ["auto", "webdataset"])
def test_compressed_tar_is_refused_with_a_remedy(tmp_path, rows_of, name, format):
    (tmp_path / name).write_bytes(gzip.compress(tar_bytes(("x.jpg", b"1"))))
    for uri in (tmp_path / name, tmp_path):
        with pytest.raises(DataError, match=r"compressed tar\nhint: decompress it first"):
            rows_of(open_source(str(uri), format=format))


def test_cut_tar_lists_what_precedes_the_break_and_names_the_offset(tmp_path):
    members = [(f"{number}.jpg", b"x" * 1000) for number in range(4)]  # 512 + 1024 bytes each
    whole = tar_bytes(*members)
    for size, keys, offset in (
        (3 * 1536 + 512 + 999, 3, 3 * 1536),  # in the body of the fourth
        (3 * 1536 + 100, 3, 3 * 1536),  # in its header
        (3 * 1536, 3, 3 * 1536),  # before it
        (1535, 1, 1536),  # in the padding of the first
    ):
        (tmp_path / "a.tar").write_bytes(whole[:size])
        listed, message = list_until_break(WebDatasetSource(open_store(str(tmp_path))), "a.tar")
        assert listed == [f"a.tar/{number}.jpg" for number in range(keys)]
        assert f"{tmp_path}/a.tar is broken at byte {offset}" in message


def test_damaged_header_is_a_break_not_the_end(tmp_path):
    data = bytearray(tar_bytes(("0.jpg", b"x"), ("1.jpg", b"y"), ("2.jpg", b"z")))
    data[1024 + 20] ^= 0xFF
    (tmp_path / "a.tar").write_bytes(bytes(data))
    keys, message = list_until_break(open_source(str(tmp_path)), "a.tar")
    assert keys == ["a.tar/0.jpg"]
    assert "broken at byte 1024" in message


@pytest.mark.parametrize("data", [b"", b"not a tar at all" * 100, b"\x00" * 100])
def test_what_is_no_tar_is_named(tmp_path, data):
    (tmp_path / "a.tar").write_bytes(data)
    keys, message = list_until_break(open_source(str(tmp_path)), "a.tar")
    assert keys == []
    assert "a.tar is broken at byte 0" in message


def raw_header(name: bytes, *, size: bytes, kind: bytes = b"0") -> bytes:
    header = bytearray(512)
    header[: len(name)] = name
    header[100:108] = b"0000644\0"
    header[124:136] = size
    header[136:148] = b"00000000000\0"
    header[156:157] = kind
    header[257:265] = b"ustar\x0000"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def test_sparse_member_is_no_sample(tmp_path, rows_of):
    sparse = raw_header(b"0.jpg", size=b"00000000000\0", kind=b"S")
    (tmp_path / "a.tar").write_bytes(sparse + tar_bytes(("1.jpg", b"")))
    assert [row["key"] for row in rows_of(open_source(str(tmp_path)))] == ["a.tar/1.jpg"]


NEGATIVE = b"\xff" * 10 + b"\xfc\x00"  # -1024 in base 256: back to its own header
HUGE = b"\x80" + b"\x00" * 3 + b"\x7f" + b"\xff" * 7  # 2 ** 63 - 1


@pytest.mark.parametrize("size", [NEGATIVE, HUGE])
@pytest.mark.parametrize("kind", [b"0", b"x", b"L", b"g", b"S", b"Z"])
def test_hostile_sizes_are_a_break(tmp_path, size, kind):
    first = tar_bytes(("0.jpg", b""))[:512]
    data = first + raw_header(b"1.jpg", size=size, kind=kind) + b"\x00" * 2048
    (tmp_path / "a.tar").write_bytes(data)
    keys, message = list_until_break(open_source(str(tmp_path)), "a.tar")
    assert keys == ["a.tar/0.jpg"]
    assert "a.tar is broken at byte" in message


def test_extended_headers_have_a_limit(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar_bytes(("0.jpg", b""), ("x" * (1 << 20) + ".jpg", b"")))
    keys, message = list_until_break(open_source(str(tmp_path)), "a.tar")
    assert keys == ["a.tar/0.jpg"]
    assert "headers of more than 1 MiB" in message


def test_chain_of_extended_headers_is_a_break(tmp_path):
    link = raw_header(b"x", size=b"00000000002\0", kind=b"L") + b"y\0".ljust(512, b"\0")
    (tmp_path / "a.tar").write_bytes(link * 1500)
    assert "broken at byte 0" in list_until_break(open_source(str(tmp_path)), "a.tar")[1]


def test_names_and_members_have_a_limit(tmp_path, monkeypatch):
    (tmp_path / "a.tar").write_bytes(tar_bytes(("0.jpg", b""), ("x" * 4093 + ".jpg", b"")))
    assert "a name of more than 4,096" in list_until_break(open_source(str(tmp_path)), "a.tar")[1]
    monkeypatch.setattr(webdataset, "MAX_MEMBERS", 2)
    (tmp_path / "a.tar").write_bytes(tar_bytes(*((f"{n}.jpg", b"") for n in range(3))))
    keys, message = list_until_break(open_source(str(tmp_path)), "a.tar")
    assert keys == ["a.tar/0.jpg", "a.tar/1.jpg"]
    assert "more than 2 members" in message


def test_tar_without_images_is_refused_and_an_empty_one_is_empty(tmp_path, rows_of):
    with pytest.raises(DataError, match="no images at all in"):
        rows_of(open_source(write_tar(tmp_path, ("x.npy", b"1"), ("y.2020.jpg", b"2"))))
    assert rows_of(open_source(write_tar(tmp_path))) == []


def test_images_of_a_tar_that_was_replaced_have_changed(tmp_path, entries_of):
    source = open_source(write_tar(tmp_path, ("x.jpg", b"x" * 2000), ("y.jpg", b"y" * 2000)))
    entries = entries_of(source)
    assert set(entries["etag"].to_pylist()) == {source.store.head("a.tar").etag}
    write_tar(tmp_path, ("y.jpg", b"y" * 2000), ("x.jpg", b"x" * 2000))  # as long as it was
    assert all(isinstance(result, ChangedObjectError) for result in source.read(entries))


def test_read_of_a_tar_that_changed_is_an_error_of_each_image(tmp_path, entries_of):
    source = open_source(write_tar(tmp_path, ("x.jpg", b"x" * 2000), ("y.jpg", b"y" * 2000)))
    entries = entries_of(source)
    os.truncate(tmp_path / "a.tar", 1000)
    assert all(isinstance(result, StorageError) for result in source.read(entries))
    os.unlink(tmp_path / "a.tar")
    assert all(isinstance(result, StorageError) for result in source.read(entries))


@dataclass(frozen=True)
class RemoteStore:
    """A store whose reader is unbuffered, as that of an object store is."""

    local: object
    requests: list

    @property
    def uri(self) -> str:
        return "s3://toy"

    def head(self, key):
        return self.local.head(key)

    def open(self, key):
        store = self

        class Raw(io.RawIOBase):
            file = store.local.open(key)

            def readable(self):
                return True

            def seekable(self):
                return True

            def seek(self, offset, whence=0):
                return self.file.seek(offset, whence)

            def readinto(self, buffer):
                store.requests.append(len(buffer))
                return self.file.readinto(buffer)

        return Raw()


def test_small_members_of_a_remote_tar_take_few_requests(tmp_path):
    members = [pair for n in range(500) for pair in ((f"{n}.jpg", b"x"), (f"{n}.cls", b"1"))]
    write_tar(tmp_path, *members)  # about 1 MiB of 1,000 members
    remote = RemoteStore(open_store(str(tmp_path)), [])
    [table] = WebDatasetSource(remote).list("a.tar")
    assert table.num_rows == 500
    assert len(remote.requests) < 10


def test_source_travels_by_pickle(tmp_path, rows_of, travelled):
    source = open_source(write_tar(tmp_path, ("x.jpg", b"1")))
    copy = travelled(source)
    assert copy == source
    assert rows_of(copy) == rows_of(source)
