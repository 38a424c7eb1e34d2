"""The manifest: what is written is read; what is broken is one line that says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cnnray.datasets.manifest import (
    MANIFEST,
    Manifest,
    Statistics,
    get_split,
    manifest_exists,
    read_manifest,
)
from cnnray.errors import DataError
from cnnray.storage import Store, open_store


def document() -> dict[str, Any]:
    shard = {
        "path": "train/shard-00000-of-00001.parquet",
        "num_samples": 5,
        "bytes": 1234,
        "sha256": "0" * 64,
        "row_groups": [3, 2],
    }
    return {
        "schema_version": 1,
        "classes": ["cat", "Ä/猫"],
        "statistics": {
            "channels": 3,
            "mean": [0.1, 0.2, 0.3],
            "std": [0.4, 0.5, 0.6],
            "min_width": 8,
            "max_width": 8,
            "min_height": 8,
            "max_height": 8,
        },
        "splits": {
            "train": {"num_samples": 5, "class_counts": [2, 3], "files": [shard]},
            "val": {"num_samples": 0, "class_counts": [0, 0], "files": []},
        },
        "source": {"uri": "photos", "format": "folder"},
        "inputs": 6,
        "rejected": {"total": 1, "by_code": {"empty": 1}},
        "cnnray_version": "0.1.0",
    }


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "dataset"))


def test_what_is_written_is_read_back(store: Store) -> None:
    manifest = Manifest.model_validate_json(json.dumps(document()))
    store.create(MANIFEST, manifest.to_bytes())
    assert read_manifest(store) == manifest
    assert read_manifest(store).to_bytes() == manifest.to_bytes()
    assert manifest.num_samples == 5


def test_a_dataset_without_a_manifest_does_not_exist(store: Store) -> None:
    assert not manifest_exists(store)
    with pytest.raises(DataError, match="no dataset at .*\nhint: pack it"):
        read_manifest(store)


def test_a_manifest_cannot_be_changed() -> None:
    manifest = Manifest.model_validate_json(json.dumps(document()))
    with pytest.raises(ValueError, match="frozen"):
        manifest.inputs = 7


Change = Callable[[dict[str, Any]], Any]


def shard(value: dict[str, Any]) -> dict[str, Any]:
    return value["splits"]["train"]["files"][0]


CHANGES: dict[str, Change] = {
    "another version": lambda d: d.update(schema_version=2),
    "an unknown key": lambda d: d.update(extra=1),
    "an unknown key of two lines": lambda d: d.update({"two\nlines": 1}),
    "no classes": lambda d: d.pop("classes"),
    "classes of numbers": lambda d: d.update(classes=[1, 2]),
    "too few classes": lambda d: d.update(classes=["cat"]),
    "a class twice": lambda d: d.update(classes=["cat", "cat"]),
    "negative inputs": lambda d: d.update(inputs=-1),
    "two channels": lambda d: d["statistics"].update(channels=2),
    "three means of one channel": lambda d: d["statistics"].update(channels=1),
    "no std": lambda d: d["statistics"].update(std=[]),
    "an unknown split": lambda d: d["splits"].update(trian=d["splits"].pop("train")),
    "an unknown split of two lines": lambda d: d["splits"].update(
        {"two\nlines": d["splits"].pop("train")}
    ),
    "an empty shard": lambda d: shard(d).update(num_samples=0, row_groups=[]),
    "row groups that do not add up": lambda d: shard(d).update(row_groups=[3, 3]),
    "an empty row group": lambda d: shard(d).update(row_groups=[5, 0]),
    "a negative row group": lambda d: shard(d).update(row_groups=[6, -1]),
    "shards that do not add up": lambda d: d["splits"]["train"].update(num_samples=6),
    "class counts that do not add up": lambda d: d["splits"]["train"].update(class_counts=[2, 2]),
    "a path that leaves": lambda d: shard(d).update(path="../../etc/passwd"),
    "a path that leaves in the middle": lambda d: shard(d).update(path="train/../../x"),
    "an absolute path": lambda d: shard(d).update(path="/etc/passwd"),
    "a path of two lines": lambda d: shard(d).update(path="../two\nlines"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_broken_manifest_is_one_line_that_names_the_file(store: Store, name: str) -> None:
    value = document()
    CHANGES[name](value)
    store.write(MANIFEST, json.dumps(value).encode())
    with pytest.raises(DataError, match=r"bad manifest .*manifest\.json: ") as caught:
        read_manifest(store)
    message, *hint = str(caught.value).split("\n")
    assert len(hint) <= 1
    assert all(line.startswith("hint: ") for line in hint)


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"null", b"[]", b"3", b"\xff\xfe", b"\0" * 100, b"[" * 100_000, b'{"a": 1}'],
)
def test_bytes_that_are_no_manifest_are_one_line(store: Store, data: bytes) -> None:
    store.write(MANIFEST, data)
    with pytest.raises(DataError, match="bad manifest") as caught:
        read_manifest(store)
    assert str(caught.value).count("\n") == 1


def test_a_split_with_samples_is_given_and_an_empty_one_is_refused(store: Store) -> None:
    manifest = Manifest.model_validate_json(json.dumps(document()))
    assert get_split(manifest, "train", uri="u").num_samples == 5
    for name in ("val", "test"):
        with pytest.raises(
            DataError, match=rf"no samples in split {name} of u\nhint: it has train"
        ):
            get_split(manifest, name, uri="u")


@pytest.mark.parametrize(
    ("sizes", "common"), [((8, 8, 8, 8), 8), ((8, 9, 8, 8), None), ((8, 8, 9, 9), None)]
)
def test_the_common_size_is_that_of_equal_squares(sizes: tuple[int, ...], common: int) -> None:
    names = ("min_width", "max_width", "min_height", "max_height")
    statistics = Statistics(
        channels=1, mean=(0.5,), std=(0.5,), **dict(zip(names, sizes, strict=True))
    )
    assert statistics.common_size == common
