"""One shard: written from entries, read back by row group."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import cnnray.datasets.shards as shards_module
from cnnray.datasets.shards import PackedShard, ShardPlan, pack_shard, read_row_group
from cnnray.errors import (
    MAX_ERROR_DETAIL,
    AlreadyExistsError,
    DataError,
    MissingObjectError,
    StorageError,
)
from cnnray.options import DecodeLimits
from cnnray.schema import ENTRY_SCHEMA, SHARD_SCHEMA
from cnnray.storage import LocalStore, Store, open_store, sha256

POISON = Path(__file__).parents[1] / "images" / "poison"


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 5), (value, 0, 255 - value)).save(buffer, "PNG")
    return buffer.getvalue()


@dataclass(frozen=True)
class Memory:
    """A source of these bytes, or errors."""

    data: dict[str, bytes | StorageError]

    def read(self, entries: pa.Table) -> Iterator[bytes | StorageError]:
        return (self.data[key] for key in entries["key"].to_pylist())


def pack(
    store: Store, data: dict[str, bytes | StorageError], *, rows: int = 4, **options: Any
) -> PackedShard:
    entries = pa.Table.from_pylist(
        [
            {"key": key, "path": f"at/{key}", "offset": 0, "length": 9, "etag": "e", "label": "x"}
            for key in data
        ],
        ENTRY_SCHEMA,
    )
    return pack_shard(
        ShardPlan("train", "train/shard.parquet", entries, rows),
        source=Memory(data),
        store=store,
        classes=("w", "x"),
        limits=DecodeLimits(max_pixels=1000),
        **options,
    )


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return open_store(str(tmp_path))


def test_a_shard_is_read_back_row_group_by_row_group(store: Store) -> None:
    images = {f"{n}": png(n) for n in range(10)}
    packed = pack(store, images)
    assert packed.shard.row_groups == (4, 4, 2)
    assert packed.shard.sha256 == sha256(store.read(packed.shard.path))
    assert packed.shard.bytes == store.head(packed.shard.path).size
    assert packed.class_counts.tolist() == [0, 10]
    assert packed.sizes == (6, 6, 5, 5)
    assert pq.read_schema(io.BytesIO(store.read(packed.shard.path))).equals(SHARD_SCHEMA)
    rows = pa.concat_tables(
        [
            read_row_group(store, packed.shard.path, group, columns=("key", "image", "source"))
            for group in range(3)
        ]
    ).to_pylist()
    assert {row["key"]: row["image"] for row in rows} == images
    assert rows[3]["source"] == "at/3"


def test_only_the_columns_asked_for_are_read(store: Store) -> None:
    pack(store, {"a": png(1)})
    rows = read_row_group(store, "train/shard.parquet", 0, columns=("label", "key"))
    assert sorted(rows.column_names) == ["key", "label"]


def test_bad_images_are_rejected_with_stage_and_code(store: Store) -> None:
    packed = pack(
        store,
        {
            "good": png(1),
            "gone": MissingObjectError("no such file"),
            "denied": StorageError("access denied " + "x" * 1000),
            "text": b"hello, world",
            "cut": png(2)[:-20],
            "nothing": b"",
        },
    )
    rejected = {r["key"]: (r["stage"], r["error_code"]) for r in packed.rejected.to_pylist()}
    assert rejected == {
        "gone": ("read", "missing"),
        "denied": ("read", "read_failed"),
        "text": ("decode", "not_image"),
        "cut": ("decode", "truncated"),
        "nothing": ("decode", "empty"),
    }
    details = packed.rejected["error_detail"].to_pylist()
    assert max(map(len, details)) <= MAX_ERROR_DETAIL
    assert packed.shard.num_samples == 1


def test_a_shard_is_the_same_file_when_it_is_packed_carefully(tmp_path: Path) -> None:
    images = {**{f"{n}": png(n) for n in range(10)}, "text": b"hello"}
    stores = [open_store(str(tmp_path / name)) for name in ("fast", "careful")]
    fast, careful = (pack(store, images, careful=store is stores[1]) for store in stores)
    assert careful.shard == fast.shard
    assert careful.rejected.equals(fast.rejected)
    assert (careful.histogram == fast.histogram).all()


def test_poison_is_rejected_when_it_is_packed_carefully(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(POISON))
    images = {
        "first": png(1),
        "crash": png(2) + b"cnnray-poison:abort;",
        "hang": png(3) + b"cnnray-poison:spin;",
        "last": png(4),
    }
    packed = pack(store, images, careful=True, decode_seconds=0.7)
    assert {row["key"]: row["error_code"] for row in packed.rejected.to_pylist()} == {
        "crash": "decoder_crash",
        "hang": "decoder_timeout",
    }
    assert packed.shard.num_samples == 2


@pytest.mark.parametrize("batch_bytes", [1, 300])
def test_images_are_packed_in_batches_without_losing_one(
    store: Store, monkeypatch: pytest.MonkeyPatch, batch_bytes: int
) -> None:
    monkeypatch.setattr(shards_module, "BATCH_BYTES", batch_bytes)
    images: dict[str, bytes | StorageError] = {f"{n}": png(n) for n in range(7)}
    packed = pack(store, {**images, "gone": MissingObjectError("no such file")})
    assert packed.shard.row_groups == (4, 3)
    assert packed.rejected["key"].to_pylist() == ["gone"]


def test_a_shard_of_bad_images_alone_is_not_written(store: Store) -> None:
    packed = pack(store, {"a": b"", "b": b"x"})
    assert packed.shard is None
    assert packed.rejected.num_rows == 2
    assert store.head("train/shard.parquet") is None


def test_writing_it_again_is_writing_the_same(store: Store) -> None:
    assert pack(store, {"a": png(1)}).shard == pack(store, {"a": png(1)}).shard
    with pytest.raises(AlreadyExistsError):
        pack(store, {"a": png(2)})
    assert pack(store, {"a": png(2)}, replace=True).shard.sha256 == sha256(
        store.read("train/shard.parquet")
    )


def test_the_histogram_counts_the_pixels(store: Store) -> None:
    packed = pack(store, {"a": png(10), "b": png(20)})
    assert packed.histogram.sum() == 2 * 30 * 3
    assert packed.histogram[0, 10] == packed.histogram[0, 20] == 30
    assert packed.histogram[1, 0] == 60
    assert not packed.is_grey


@pytest.mark.parametrize("damage", ["footer", "magic", "truncated", "empty", "other", "pages"])
def test_a_damaged_shard_is_named_with_the_remedy(store: Store, damage: str) -> None:
    pack(store, {f"{n}": png(n) for n in range(4)})
    data = bytearray(store.read("train/shard.parquet"))
    if damage == "footer":
        for at in range(len(data) - 400, len(data) - 8):
            data[at] = 0xFF
    elif damage == "magic":
        data[-1] = 0
    elif damage == "truncated":
        del data[len(data) // 2 :]
    elif damage == "empty":
        data.clear()
    elif damage == "pages":
        data[4:60] = bytes(56)
    else:
        data[:] = png(1)
    store.write("train/shard.parquet", bytes(data))
    with pytest.raises(DataError, match=r"train/shard\.parquet is damaged: (?s:.*)hint: pack it"):
        read_row_group(store, "train/shard.parquet", 0, columns=("key", "image", "label"))


def test_a_row_group_or_a_column_that_is_not_there_is_damage(store: Store) -> None:
    pack(store, {"a": png(1)})
    with pytest.raises(DataError, match="is damaged"):
        read_row_group(store, "train/shard.parquet", 5, columns=("key",))
    buffer = io.BytesIO()
    pq.write_table(pa.table({"key": ["a"]}), buffer)
    store.write("other.parquet", buffer.getvalue())
    with pytest.raises(DataError, match="is damaged"):
        read_row_group(store, "other.parquet", 0, columns=("key", "image"))


def test_a_shard_that_is_gone_is_missing(store: Store) -> None:
    with pytest.raises(MissingObjectError):
        read_row_group(store, "train/shard.parquet", 0, columns=("key",))


def test_large_images_are_sampled_for_the_statistics_on_a_grid(store: Store) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((1100, 30, 3), np.uint8)).save(buffer, "PNG")
    plan_limits = DecodeLimits()
    entries = pa.Table.from_pylist(
        [{"key": "k", "path": "k", "offset": 0, "length": 9, "etag": "", "label": "x"}],
        ENTRY_SCHEMA,
    )
    packed = pack_shard(
        ShardPlan("train", "s.parquet", entries, 4),
        source=Memory({"k": buffer.getvalue()}),
        store=store,
        classes=("x",),
        limits=plan_limits,
    )
    assert packed.histogram[0].sum() == 550 * 15  # every second pixel either way
