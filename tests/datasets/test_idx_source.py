"""IDX files of images and labels."""

import gzip
import io
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cnnray.datasets.sources import idx, open_source
from cnnray.errors import ChangedObjectError, DataError, MissingObjectError

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (12, 5, 7), dtype=np.uint8)
LABELS = RNG.integers(0, 10, 12, dtype=np.uint8)


def images_file(pixels: np.ndarray = PIXELS, *, magic: int = 0x803) -> bytes:
    return struct.pack(">4I", magic, *pixels.shape) + pixels.tobytes()


def labels_file(labels: np.ndarray = LABELS, *, magic: int = 0x801) -> bytes:
    return struct.pack(">2I", magic, len(labels)) + labels.tobytes()


def write_pair(folder: Path, *, split: str = "train", dot: str = "-", suffix: str = "") -> None:
    pack = gzip.compress if suffix else bytes
    (folder / f"{split}-images{dot}idx3-ubyte{suffix}").write_bytes(pack(images_file()))
    (folder / f"{split}-labels{dot}idx1-ubyte{suffix}").write_bytes(pack(labels_file()))


def pixels_of(png: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(png))
    assert (image.format, image.mode) == ("PNG", "L")
    return np.asarray(image)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("dot", ["-", "."])
def test_images_are_read_losslessly_with_their_labels(tmp_path, rows_of, read_all, dot, suffix):
    write_pair(tmp_path, dot=dot, suffix=suffix)
    source = open_source(str(tmp_path))
    rows = rows_of(source)
    assert [row["key"] for row in rows] == [f"train/{n:02}" for n in range(12)]
    assert [row["label"] for row in rows] == [str(label) for label in LABELS]
    assert {row["split"] for row in rows} == {"train"}
    assert [(row["offset"], row["length"]) for row in rows] == [(35 * n, 35) for n in range(12)]
    assert rows[0]["etag"]
    np.testing.assert_array_equal([pixels_of(png) for png in read_all(source)], PIXELS)


def test_t10k_is_the_test_split_and_validation_is_val(tmp_path, rows_of):
    for split in ("train", "t10k", "validation"):
        write_pair(tmp_path, split=split)
    splits = [row["split"] for row in rows_of(open_source(str(tmp_path)))]
    assert splits == ["test"] * 12 + ["train"] * 12 + ["val"] * 12


def test_plain_file_wins_over_its_gzipped_copy(tmp_path):
    write_pair(tmp_path)
    write_pair(tmp_path, suffix=".gz")
    assert open_source(str(tmp_path)).partitions() == ["train-images-idx3-ubyte"]


def test_two_pairs_of_one_split_are_refused(tmp_path):
    write_pair(tmp_path, split="test")
    write_pair(tmp_path, split="t10k")
    with pytest.raises(DataError, match="are 'test'"):
        open_source(str(tmp_path)).partitions()


def test_single_file_is_its_split_alone(tmp_path):
    write_pair(tmp_path, split="train")
    write_pair(tmp_path, split="t10k", suffix=".gz")
    source = open_source(str(tmp_path / "t10k-images-idx3-ubyte.gz"))
    assert source.partitions() == ["t10k-images-idx3-ubyte.gz"]


def test_labels_are_needed_only_when_wanted(tmp_path, rows_of):
    write_pair(tmp_path)
    os.unlink(tmp_path / "train-labels-idx1-ubyte")
    rows = rows_of(open_source(str(tmp_path), labelled=False))
    assert [row["label"] for row in rows] == [None] * 12
    with pytest.raises(DataError, match=r"no labels for .*\nhint: add train-labels-idx1-ubyte"):
        open_source(str(tmp_path)).partitions()


IMAGES, LABELS_NAME = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (IMAGES, images_file(magic=0x801), "magic number 0x00000801, not 0x00000803"),
        (IMAGES, images_file()[:-1], "419 bytes of values, its header says 420"),
        (IMAGES, images_file() + b"x", "421 bytes of values, its header says 420"),
        (IMAGES, images_file()[:10], "too short for an IDX file: 10 bytes"),
        (IMAGES, b"", "too short for an IDX file: 0 bytes"),
        (IMAGES, images_file(PIXELS[:0]), "0 images of 5 x 7 pixels"),
        (IMAGES, struct.pack(">4I", 0x803, *[2**32 - 1] * 3), "its header says"),
        (IMAGES, gzip.compress(images_file())[:-9], "is damaged"),
        (IMAGES, b"\x1f\x8bnot gzip", "is damaged"),
        (LABELS_NAME, labels_file(magic=0x803), "magic number 0x00000803, not 0x00000801"),
        (LABELS_NAME, labels_file(LABELS[:-1]), "11 labels for 12 images"),
        (LABELS_NAME, labels_file()[:-1], "11 bytes of values, its header says 12"),
    ],
)
def test_damaged_file_is_named(tmp_path, rows_of, name, data, message):
    write_pair(tmp_path)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=f"{name}.*{message}"):
        rows_of(open_source(str(tmp_path)))


def test_decompressed_size_has_a_limit(tmp_path, rows_of, monkeypatch):
    monkeypatch.setattr(idx, "MAX_FILE_BYTES", 400)  # the images take 436
    write_pair(tmp_path, suffix=".gz")
    with pytest.raises(DataError, match=r"images-idx3-ubyte\.gz is larger than"):
        rows_of(open_source(str(tmp_path)))


def test_read_follows_the_order_and_mix_of_the_entries(tmp_path, entries_of):
    write_pair(tmp_path, split="train")
    write_pair(tmp_path, split="test")
    source = open_source(str(tmp_path))
    order = [20, 3, 15, 0]
    pngs = list(source.read(entries_of(source).take(order)))
    np.testing.assert_array_equal([pixels_of(png) for png in pngs], PIXELS[np.array(order) % 12])


def test_file_is_loaded_once_for_all_reads(tmp_path, entries_of):
    write_pair(tmp_path)
    source = open_source(str(tmp_path))
    entries = entries_of(source)
    misses = idx._load_images.cache_info().misses
    for start in range(0, 12, 3):
        assert len(list(source.read(entries.slice(start, 3)))) == 3
    assert idx._load_images.cache_info().misses == misses


def test_changed_or_vanished_file_is_an_error_of_each_image(tmp_path, entries_of):
    write_pair(tmp_path)
    source = open_source(str(tmp_path))
    entries = entries_of(source)
    (tmp_path / IMAGES).write_bytes(images_file(PIXELS[::-1]))
    os.utime(tmp_path / IMAGES, ns=(1, 1))
    results = list(source.read(entries))
    assert len(results) == 12
    assert all(isinstance(result, ChangedObjectError) for result in results)
    assert "changed after it was listed" in str(results[0])
    os.unlink(tmp_path / IMAGES)
    assert all(isinstance(result, MissingObjectError) for result in source.read(entries))
    with pytest.raises(MissingObjectError):
        list(source.list(IMAGES))


def test_file_that_is_replaced_while_it_is_loaded_has_changed(tmp_path, monkeypatch):
    write_pair(tmp_path)
    source = open_source(str(tmp_path))
    heads = []

    def replace_after_head(store, key):
        found = head(store, key)
        if not heads:
            (tmp_path / IMAGES).write_bytes(images_file(PIXELS[::-1]))
            os.utime(tmp_path / IMAGES, ns=(1, 1))
        heads.append(key)
        return found

    head = type(source.store).head
    monkeypatch.setattr(type(source.store), "head", replace_after_head)
    with pytest.raises(ChangedObjectError):
        list(source.list(IMAGES))


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_file_beyond_the_limit_is_refused(tmp_path, rows_of, monkeypatch, suffix):
    monkeypatch.setattr(idx, "MAX_FILE_BYTES", 100)
    write_pair(tmp_path, suffix=suffix)
    with pytest.raises(DataError, match="is larger than"):
        rows_of(open_source(str(tmp_path)))


@pytest.mark.parametrize("format", ["auto", "idx"])
def test_folder_above_the_files_is_told_where_to_point(tmp_path, format):
    (tmp_path / "raw").mkdir()
    write_pair(tmp_path / "raw")
    with pytest.raises(DataError, match="no IDX files directly in"):
        open_source(str(tmp_path), format=format).partitions()


def test_source_travels_by_pickle(tmp_path, rows_of, travelled):
    write_pair(tmp_path)
    source = open_source(str(tmp_path))
    copy = travelled(source)
    assert copy == source
    assert rows_of(copy) == rows_of(source)
