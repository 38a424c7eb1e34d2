"""Packing: every input is packed or rejected, and the same input gives the same bytes."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cnnray.datasets.manifest import Manifest
from cnnray.datasets.packing import PackPlan, build_manifest, plan_pack, sort_classes
from cnnray.datasets.shards import PackedShard, pack_shard
from cnnray.datasets.sources import open_source
from cnnray.errors import DataError
from cnnray.options import DecodeLimits
from cnnray.schema import ENTRY_SCHEMA, REJECTED_SCHEMA
from cnnray.storage import Store, open_store

MEGABYTE = 1024 * 1024


def entry(key: str, **changes: Any) -> dict[str, Any]:
    defaults = {"path": key, "offset": 0, "length": 1000, "etag": "e", "label": "a", "split": None}
    return {"key": key, **defaults, **changes}


def table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), ENTRY_SCHEMA)


def plan(rows: Sequence[dict[str, Any]], *, val=0.1, test=0.1, shard_bytes=MEGABYTE) -> PackPlan:
    return plan_pack(table(rows), val=val, test=test, shard_bytes=shard_bytes)


def splits_of(packing: PackPlan) -> dict[str, str]:
    return {
        key: shard.split for shard in packing.shards for key in shard.entries["key"].to_pylist()
    }


# The plan


def test_every_input_is_planned_once_or_rejected() -> None:
    rows = [entry(f"{n}", label="ab"[n % 2]) for n in range(500)]
    rows += [entry("7", path="again"), entry("x", label=None), entry("x", label="a")]
    rows += [entry("x", label=None)]
    packing = plan(rows)
    planned = [key for shard in packing.shards for key in shard.entries["key"].to_pylist()]
    rejected = packing.rejected.to_pylist()
    assert sorted(planned) == sorted(str(n) for n in range(500))
    assert Counter((r["key"], r["error_code"]) for r in rejected) == {
        ("7", "duplicate_key"): 1,
        ("x", "duplicate_key"): 2,
        ("x", "no_label"): 1,
    }
    assert {row["stage"] for row in rejected} == {"list"}
    assert packing.num_inputs == 504
    assert packing.rejected.schema == REJECTED_SCHEMA


def test_of_inputs_with_one_key_the_first_is_kept() -> None:
    packing = plan([entry("k", path="first"), entry("k", path="second")])
    [shard] = packing.shards
    assert shard.entries["path"].to_pylist() == ["first"]


@pytest.mark.parametrize(
    ("names", "in_order"),
    [
        (["10", "9", "1"], ("1", "9", "10")),
        (["01", "1", "0"], ("0", "01", "1")),
        (["10", "9", "x"], ("10", "9", "x")),
        (["b", "A", "ä", "a"], ("A", "a", "b", "ä")),
        (["²", "1"], ("1", "²")),
        (["-1", "1"], ("-1", "1")),
    ],
)
def test_classes_are_in_order_as_numbers_if_all_are(names: list[str], in_order: Any) -> None:
    assert sort_classes(names) == in_order
    assert plan([entry(name, label=name) for name in names]).classes == in_order


def test_new_images_move_no_old_one_to_another_split() -> None:
    old = splits_of(plan([entry(f"old/{n}") for n in range(1000)]))
    both = [entry(f"{name}/{n}") for n in range(1000) for name in ("new", "old")]
    after = splits_of(plan(both))
    assert {key: after[key] for key in old} == old


def test_the_splits_have_the_asked_fractions() -> None:
    counts = Counter(splits_of(plan([entry(f"k{n}") for n in range(20_000)])).values())
    for split, fraction in (("val", 0.1), ("test", 0.1), ("train", 0.8)):
        assert abs(counts[split] - 20_000 * fraction) < 4 * (20_000 * 0.16) ** 0.5


def test_given_splits_are_kept_and_val_is_taken_from_train_where_there_is_none() -> None:
    rows = [entry(f"{n}", split="test" if n < 200 else "train") for n in range(1000)]
    splits = splits_of(plan(rows))
    assert all((splits[f"{n}"] == "test") == (n < 200) for n in range(1000))
    assert 40 < Counter(splits.values())["val"] < 130


def test_a_given_val_split_is_left_as_it_is() -> None:
    rows = [entry(f"{n}", split="val" if n < 30 else None) for n in range(300)]
    assert Counter(splits_of(plan(rows)).values()) == {"val": 30, "train": 270}


def test_without_a_val_fraction_nothing_is_taken_from_train() -> None:
    rows = [entry(f"{n}", split="train") for n in range(300)]
    assert Counter(splits_of(plan(rows, val=0.0)).values()) == {"train": 300}


def test_a_source_of_test_images_alone_has_no_other_split() -> None:
    rows = [entry(f"{n}", split="test") for n in range(30)]
    assert Counter(splits_of(plan(rows)).values()) == {"test": 30}


def test_shards_are_about_equal_and_no_larger_than_asked() -> None:
    generator = np.random.default_rng(0)
    rows = [entry(f"{n}", length=int(generator.integers(500, 5000))) for n in range(3000)]
    packing = plan(rows, val=0.0, test=0.0, shard_bytes=500_000)
    sizes = [sum(shard.entries["length"].to_pylist()) for shard in packing.shards]
    assert len(sizes) == -(-sum(sizes) // 500_000)
    assert max(sizes) - min(sizes) <= 2 * 5000
    assert max(sizes) <= 500_000 + 5000


def test_shards_are_named_by_split_number_and_count() -> None:
    rows = [entry(f"{n}", length=1000) for n in range(3000)]
    packing = plan_pack(table(rows), val=0.5, test=0.0, shard_bytes=MEGABYTE, suffix="-new")
    names = [shard.path for shard in packing.shards if shard.split == "val"]
    assert names == [
        f"val/shard-{n:05d}-of-{len(names):05d}-new.parquet" for n in range(len(names))
    ]


def test_one_enormous_image_leaves_no_empty_shard() -> None:
    rows = [entry("huge", length=50 * MEGABYTE), *(entry(f"{n}", length=10) for n in range(20))]
    packing = plan(rows, val=0.0, test=0.0)
    assert all(shard.entries.num_rows for shard in packing.shards)
    assert sum(shard.entries.num_rows for shard in packing.shards) == 21
    assert packing.shards[-1].path.endswith(f"of-{len(packing.shards):05d}.parquet")


def test_images_of_unknown_or_no_size_are_planned() -> None:
    for length in (-1, 0):
        packing = plan([entry(f"{n}", length=length) for n in range(300)])
        assert sum(shard.entries.num_rows for shard in packing.shards) == 300
        assert all(shard.row_group_rows > 0 for shard in packing.shards)


def test_the_classes_are_mixed_within_a_shard() -> None:
    rows = [entry(f"{label}/{n}", label=label) for label in "abcd" for n in range(250)]
    packing = plan(rows, val=0.0, test=0.0)
    first = packing.shards[0].entries["label"].to_pylist()[:100]
    assert all(10 <= count <= 40 for count in Counter(first).values())
    assert len(set(first)) == 4


def test_nothing_to_pack_is_said_so() -> None:
    with pytest.raises(DataError, match="no images at all"):
        plan([])
    with pytest.raises(DataError, match="no image has a label"):
        plan([entry("a", label=None)])


# What is written


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_images(folder: Path, images: dict[str, bytes]) -> None:
    for key, data in images.items():
        path = folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def pack_folder(
    folder: Path, output: Store, **options: Any
) -> tuple[Manifest, pa.Table, list[PackedShard]]:
    source = open_source(str(folder))
    entries = pa.concat_tables([t for name in source.partitions() for t in source.list(name)])
    arguments = {"val": 0.2, "test": 0.2, "shard_bytes": MEGABYTE, **options}
    packing = plan_pack(entries, **arguments)
    packed = [
        pack_shard(
            shard, source=source, store=output, classes=packing.classes, limits=DecodeLimits()
        )
        for shard in packing.shards
    ]
    manifest, rejected = build_manifest(packing, packed, source={"uri": "photos"})
    return manifest, rejected, packed


Pixels = Callable[[int], np.ndarray]


def noise(seed: int, *, height: int = 9, width: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """60 images of two classes, two of which are broken."""
    images = {f"{'ab'[n % 2]}/{n:02d}.png": png(noise(n)) for n in range(60)}
    images["a/00.png"] = images["a/00.png"][:40]
    images["b/01.png"] = b""
    write_images(tmp_path / "photos", images)
    return tmp_path / "photos"


def test_packed_and_rejected_are_the_inputs(photos: Path, tmp_path: Path) -> None:
    output = open_store(str(tmp_path / "out"))
    manifest, rejected, _ = pack_folder(photos, output)
    keys = []
    for split in manifest.splits.values():
        for shard in split.files:
            rows = pq.read_table(io.BytesIO(output.read(shard.path)))
            keys += rows["key"].to_pylist()
            assert rows.num_rows == shard.num_samples == sum(shard.row_groups)
            for row in rows.to_pylist():
                assert row["image"] == (photos / row["source"]).read_bytes()
                assert manifest.classes[row["label"]] == row["key"].split("/")[0]
                assert (row["width"], row["height"]) == (7, 9)
    assert manifest.num_samples == len(set(keys)) == len(keys) == 58
    assert {row["key"]: row["error_code"] for row in rejected.to_pylist()} == {
        "a/00.png": "truncated",
        "b/01.png": "empty",
    }
    assert {row["stage"] for row in rejected.to_pylist()} == {"decode"}
    assert (manifest.inputs, manifest.rejected.total) == (60, 2)
    assert manifest.rejected.by_code == {"truncated": 1, "empty": 1}
    assert Manifest.model_validate_json(manifest.to_bytes()) == manifest


def test_packing_again_writes_the_same_bytes(photos: Path, tmp_path: Path) -> None:
    stores = [open_store(str(tmp_path / name)) for name in ("one", "two")]
    manifests = [pack_folder(photos, store)[0] for store in stores]
    assert manifests[0].to_bytes() == manifests[1].to_bytes()
    first, second = ({i.key: store.read(i.key) for i in store.list()} for store in stores)
    assert first == second
    pack_folder(photos, stores[0])  # in place: a retried task meets its own file


def test_statistics_are_numpys_of_the_training_images(tmp_path: Path) -> None:
    images = {f"a/{n}.png": png(noise(n)) for n in range(40)}
    write_images(tmp_path / "photos", images)
    output = open_store(str(tmp_path / "out"))
    manifest, _, _ = pack_folder(tmp_path / "photos", output)
    train = [
        key
        for shard in manifest.splits["train"].files
        for key in pq.read_table(io.BytesIO(output.read(shard.path)))["key"].to_pylist()
    ]
    assert 10 < len(train) < 40
    pixels = np.stack([np.array(Image.open(io.BytesIO(images[key]))) for key in train]) / 255
    statistics = manifest.statistics
    assert statistics.channels == 3
    assert statistics.mean == pytest.approx(pixels.mean(axis=(0, 1, 2)), abs=1e-6)
    assert statistics.std == pytest.approx(pixels.std(axis=(0, 1, 2)), abs=1e-6)


def test_sizes_are_the_extremes(tmp_path: Path) -> None:
    sizes = [(3, 50), (20, 5), (8, 8)]
    images = {f"a/{h}.png": png(noise(h, height=h, width=w)) for h, w in sizes}
    write_images(tmp_path / "photos", images)
    manifest, _, _ = pack_folder(tmp_path / "photos", open_store(str(tmp_path / "out")))
    found = manifest.statistics
    assert (found.min_width, found.max_width) == (5, 50)
    assert (found.min_height, found.max_height) == (3, 20)
    assert found.common_size is None


@pytest.mark.parametrize(("colourful", "channels"), [(0, 1), (1, 3)])
def test_a_dataset_is_grey_only_if_every_image_is(
    tmp_path: Path, colourful: int, channels: int
) -> None:
    grey = {f"a/{n}.png": png(noise(n)[:, :, 0]) for n in range(20)}
    colour = {f"a/c{n}.png": png(noise(n)) for n in range(colourful)}
    write_images(tmp_path / "photos", grey | colour)
    manifest, _, _ = pack_folder(tmp_path / "photos", open_store(str(tmp_path / "out")))
    assert manifest.statistics.channels == channels
    assert len(manifest.statistics.mean) == len(manifest.statistics.std) == channels


def test_a_constant_image_has_a_std_that_can_be_divided_by(tmp_path: Path) -> None:
    write_images(tmp_path / "photos", {f"a/{n}.png": png(np.full((4, 4), 51)) for n in range(5)})
    manifest, _, _ = pack_folder(
        tmp_path / "photos", open_store(str(tmp_path / "out")), val=0.0, test=0.0
    )
    assert manifest.statistics.mean == (0.2,)
    assert manifest.statistics.std == (pytest.approx(1 / 255, abs=1e-6),)


def test_when_every_image_is_bad_the_first_reason_is_named(tmp_path: Path) -> None:
    write_images(tmp_path / "photos", {f"a/{n}.png": b"not an image" for n in range(5)})
    output = open_store(str(tmp_path / "out"))
    with pytest.raises(DataError, match=r"none of 5 images could be packed: 'a/\d.png': not_image"):
        pack_folder(tmp_path / "photos", output)


def test_class_counts_follow_the_order_of_the_classes(photos: Path, tmp_path: Path) -> None:
    manifest, _, _ = pack_folder(photos, open_store(str(tmp_path / "out")))
    assert manifest.classes == ("a", "b")
    total = np.sum([split.class_counts for split in manifest.splits.values()], axis=0)
    assert total.tolist() == [29, 29]
