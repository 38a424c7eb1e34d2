"""What a reading task does with the samples that it is asked for, and how they travel."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cnnray.cluster.train.reading import Decode, SplitReader, to_batch, to_table
from cnnray.datasets.manifest import Shard, Split
from cnnray.datasets.order import RowGroup, Unit, plan_epoch
from cnnray.datasets.sampling import BalancedSampler, Picks, PlainSampler, spread_copies
from cnnray.errors import DataError
from cnnray.images.augment import TrainTransform
from cnnray.images.transforms import Preprocessing
from cnnray.options import Augmentation
from cnnray.storage import open_store

LABELS = [0] * 18 + [1] * 2
GROUP_ROWS = 10


def image(number: int) -> bytes:
    """9 x 9 pixels of noise, as PNG."""
    pixels = np.random.default_rng(number).integers(0, 256, (9, 9, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def make_reader(tmp_path: Path) -> Callable[..., SplitReader]:
    """Readers of one shard of 20 images in two row groups."""
    table = pa.table(
        {
            "key": [f"photo {number}.png" for number in range(20)],
            "image": [image(number) for number in range(20)],
            "label": pa.array(LABELS, pa.int32()),
        }
    )
    pq.write_table(table, tmp_path / "shard.parquet", row_group_size=GROUP_ROWS)
    shard = Shard(
        path="shard.parquet", num_samples=20, bytes=1, sha256="", row_groups=(GROUP_ROWS,) * 2
    )

    def make(*, augmentation: Augmentation, images: list[bytes] | None = None) -> SplitReader:
        if images:
            changed = table.set_column(1, "image", pa.array(images))
            pq.write_table(changed, tmp_path / "shard.parquet", row_group_size=GROUP_ROWS)
        preprocessing = Preprocessing(
            channels=3,
            size=9,
            resize=9,
            interpolation="bilinear",
            mean=(0.5,) * 3,
            std=(0.25,) * 3,
        )
        return SplitReader(
            store=open_store(str(tmp_path)),
            split=Split(num_samples=20, class_counts=(18, 2), files=(shard,)),
            transform=TrainTransform(preprocessing, augmentation, seed=1),
        )

    return make


def plain(reader: SplitReader) -> Decode:
    return lambda data, keys: [reader.transform(data, epoch=0, key=key) for key in keys]


def test_rows_come_as_often_and_in_the_order_in_which_they_are_picked(make_reader) -> None:
    reader = make_reader(augmentation=Augmentation())
    picks = Picks(np.array([9, 2, 9, 0]), copies=np.array([0, 0, 1, 0]))
    batch = reader.read(reader.row_groups[1], picks, plain(reader))
    assert batch["key"].tolist() == [f"photo {number}.png" for number in (19, 12, 19, 10)]
    assert batch["label"].tolist() == [1, 0, 1, 0]
    assert batch["image"].shape == (4, 3, 9, 9)
    np.testing.assert_array_equal(batch["image"][0], batch["image"][2])


def test_each_copy_of_an_image_is_augmented_in_its_own_way(make_reader) -> None:
    reader = make_reader(augmentation=Augmentation(color_jitter=0.5))
    picks = Picks(np.zeros(5, dtype=np.int64), copies=np.arange(5))
    batch = reader.read(RowGroup(0, 0, GROUP_ROWS), picks, plain(reader))
    assert len({one.tobytes() for one in batch["image"]}) == 5
    expected = reader.transform(image(0), epoch=0, key="photo 0.png")
    np.testing.assert_array_equal(batch["image"][0], expected)  # the first as without a sampler


def test_repeats_are_side_by_side_and_each_augmented_in_its_own_way(make_reader) -> None:
    reader = replace(make_reader(augmentation=Augmentation(color_jitter=0.5)), repeats=3)
    picks = Picks(np.array([4, 0, 4]), copies=np.array([0, 0, 1]))
    batch = reader.read(RowGroup(0, 0, GROUP_ROWS), picks, plain(reader))
    assert batch["image"].shape == (3, 3, 3, 9, 9)  # images, copies, then pixels
    assert batch["key"].tolist() == ["photo 4.png", "photo 0.png", "photo 4.png"]
    samples = spread_copies(batch)
    assert len({one.tobytes() for one in samples["image"]}) == 9
    assert (
        samples["key"].tolist() == ["photo 4.png"] * 3 + ["photo 0.png"] * 3 + ["photo 4.png"] * 3
    )
    first = reader.transform(image(4), epoch=0, key="photo 4.png")
    np.testing.assert_array_equal(samples["image"][0], first)


def test_without_a_sampler_an_epoch_has_the_rows_of_the_split(make_reader) -> None:
    reader = make_reader(augmentation=Augmentation())
    sample = PlainSampler(tuple(reader.row_groups), seed=1).sample(7)
    assert sample.row_groups == reader.row_groups
    picks = [sample.pick(Unit(0, reader.row_groups[0], *ends)) for ends in ((0, 4), (4, 10))]
    assert [sorted(some.rows.tolist()) for some in picks] == [[0, 1, 2, 3], [4, 5, 6, 7, 8, 9]]
    assert not np.concatenate([some.copies for some in picks]).any()


def test_with_a_balanced_sampler_an_epoch_has_as_many_of_each_class(make_reader) -> None:
    reader = make_reader(augmentation=Augmentation())
    labels = np.split(np.array(LABELS), 2)
    sample = BalancedSampler(dict(zip(reader.row_groups, labels, strict=True)), seed=1).sample(3)
    order = plan_epoch(sample.row_groups, seed=1, epoch=3, global_batch_size=5, max_unit_rows=4)
    batches = [
        reader.read(unit.row_group, sample.pick(unit), plain(reader)) for unit in order.units
    ]
    label = np.concatenate([batch["label"] for batch in batches])
    assert np.bincount(label).tolist() == [10, 10]


def test_an_image_that_cannot_be_decoded_any_more_is_named(make_reader) -> None:
    reader = make_reader(augmentation=Augmentation(), images=[b"damaged"] * 20)
    picks = Picks(np.array([3]), copies=np.array([2]))
    with pytest.raises(DataError, match=r"'photo 3.png' of .* cannot be decoded any more"):
        reader.read(reader.row_groups[0], picks, plain(reader))


@pytest.mark.parametrize("repeats", [1, 3])
def test_a_batch_is_the_same_after_it_went_through_arrow(make_reader, repeats) -> None:
    reader = replace(make_reader(augmentation=Augmentation()), repeats=repeats)
    picks = Picks(np.array([4, 0, 7]), copies=np.zeros(3, dtype=np.int64))
    batch = reader.read(reader.row_groups[0], picks, plain(reader))
    table = to_table(batch)
    for rows in (slice(0, 3), slice(1, 3)):  # a slice begins within the memory of its table
        again = to_batch(table.slice(rows.start, rows.stop - rows.start), reader.image_shape)
        for name in ("image", "label", "key"):
            assert again[name].dtype == batch[name].dtype
            np.testing.assert_array_equal(again[name], batch[name][rows])
