"""Packing: a plan of shards from listed entries, and the manifest of what was written.

The plan is a function of the entries alone, so packing the same input again writes the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cnnray import __version__
from cnnray.datasets.manifest import Manifest, Rejected, Split, Statistics
from cnnray.datasets.shards import PackedShard, ShardPlan
from cnnray.datasets.sources import copy_rows, is_first_of_key
from cnnray.datasets.splits import ORDER_SALT, assign_splits, hash_keys
from cnnray.errors import DataError
from cnnray.schema import DATASET_VERSION, REJECTED_SCHEMA, SPLITS

ROW_GROUP_BYTES = 32 * 1024 * 1024
ROW_GROUP_ROWS = 8192
ROW_GROUPS_PER_SPLIT = 32
"""A small split is cut in as many row groups, so that reading it can be shared among workers."""
MIN_ROW_GROUP_ROWS = 64
SMALL_SHARD_ROWS = 4096
"""A small split is cut in up to 8 shards of this many rows, so that packing it can be shared."""
UNKNOWN_IMAGE_BYTES = 128 * 1024
"""Assumed size of an image whose listing names none."""


@dataclass(frozen=True)
class PackPlan:
    """Everything there is to pack, and what was refused from its listing alone."""

    classes: tuple[str, ...]
    shards: tuple[ShardPlan, ...]
    rejected: pa.Table  # REJECTED_SCHEMA
    num_inputs: int


def plan_pack(
    entries: pa.Table, *, val: float, test: float, shard_bytes: int, suffix: str = ""
) -> PackPlan:
    """Which sample goes in which shard: splits by hash, classes mixed by another hash.

    ``suffix`` goes into the file names, for a dataset that replaces another one. Splits that the
    source names are kept; validation samples are then taken from train where it names none.
    Raises ``DataError`` when there are no images, or none with a label.
    """
    if entries.num_rows == 0:
        raise DataError("no images at all in the input", hint="check --input")
    rejected, entries = _refuse(entries)
    if entries.num_rows == 0:
        raise DataError(
            "no image has a label",
            hint="one folder for each class, or a table with --columns.label",
        )
    classes = sort_classes(pc.unique(entries["label"]).to_pylist())
    splits = _splits(entries, val=val, test=test)
    shards: list[ShardPlan] = []
    for split in SPLITS:
        members = entries.filter(pa.array(splits == split))
        if members.num_rows:
            shards.extend(_cut(members, split=split, shard_bytes=shard_bytes, suffix=suffix))
    return PackPlan(classes, tuple(shards), rejected, entries.num_rows + rejected.num_rows)


def sort_classes(names: Sequence[str]) -> tuple[str, ...]:
    """Class names in order: as numbers when all of them are (2 before 10), else as text."""
    if all(name.isascii() and name.isdecimal() for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def _refuse(entries: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Entries without a label and second uses of a key, and the others."""
    is_first = is_first_of_key(entries)
    has_label = pc.is_valid(entries["label"])
    duplicates = entries.filter(pc.invert(is_first))
    unlabelled = entries.filter(pc.and_(is_first, pc.invert(has_label)))
    rejected = pa.concat_tables(
        [
            _rejected_table(
                duplicates["key"].to_pylist(), "list", "duplicate_key", "key seen before"
            ),
            _rejected_table(unlabelled["key"].to_pylist(), "list", "no_label", "in no class"),
        ]
    )
    return rejected, entries.filter(pc.and_(is_first, has_label))


def _rejected_table(keys: list[str], stage: str, code: str, detail: str) -> pa.Table:
    count = len(keys)
    return pa.table([keys, [stage] * count, [code] * count, [detail] * count], REJECTED_SCHEMA)


def _splits(entries: pa.Table, *, val: float, test: float) -> npt.NDArray[np.str_]:
    given = entries["split"]
    if given.null_count == entries.num_rows:
        return assign_splits(entries["key"].to_pylist(), val=val, test=test)
    splits = np.array(given.fill_null("train").to_pylist())
    if "val" not in splits and val > 0:
        train = splits == "train"
        keys = entries["key"].filter(pa.array(train)).to_pylist()
        splits[train] = assign_splits(keys, val=val, test=0.0)
    return splits


def _cut(entries: pa.Table, *, split: str, shard_bytes: int, suffix: str) -> Iterator[ShardPlan]:
    hashes = hash_keys(entries["key"].to_pylist(), salt=ORDER_SALT)
    entries = entries.take(pa.array(np.argsort(hashes, kind="stable")))
    lengths = entries["length"].to_numpy()
    sizes = np.where(lengths < 0, UNKNOWN_IMAGE_BYTES, lengths)
    rows, num_bytes = len(sizes), int(sizes.sum())
    count = max(math.ceil(num_bytes / shard_bytes), min(8, math.ceil(rows / SMALL_SHARD_ROWS)))
    middles = np.cumsum(sizes) - sizes / 2
    shard_of = np.minimum((middles * count / max(num_bytes, 1)).astype(int), count - 1)
    group_rows = _row_group_rows(rows, num_bytes / rows)
    numbers = [number for number in range(count) if (shard_of == number).any()]
    for position, number in enumerate(numbers):
        start, stop = np.searchsorted(shard_of, [number, number + 1])
        path = f"{split}/shard-{position:05d}-of-{len(numbers):05d}{suffix}.parquet"
        yield ShardPlan(split, path, copy_rows(entries, start, stop - start), group_rows)


def _row_group_rows(rows: int, mean_bytes: float) -> int:
    by_bytes = int(ROW_GROUP_BYTES / max(mean_bytes, 1))
    by_sharing = max(MIN_ROW_GROUP_ROWS, math.ceil(rows / ROW_GROUPS_PER_SPLIT))
    return max(1, min(ROW_GROUP_ROWS, by_bytes, by_sharing))


def build_manifest(
    plan: PackPlan, packed: Sequence[PackedShard], *, source: dict[str, str]
) -> tuple[Manifest, pa.Table]:
    """The manifest and the rejected rows. Raises ``DataError`` when no image could be packed.

    Asserts the promise of packing: packed + rejected = inputs.
    """
    rejected = pa.concat_tables([plan.rejected, *(result.rejected for result in packed)])
    written = [result for result in packed if result.shard is not None]
    if not written:
        first = rejected.slice(0, 1).to_pylist()[0]
        raise DataError(
            f"none of {plan.num_inputs} images could be packed: {first['key']!r}:"
            f" {first['error_code']} ({first['error_detail']})"
        )
    splits = {
        split: _split([result for result in written if result.split == split], len(plan.classes))
        for split in SPLITS
    }
    counts = pc.value_counts(rejected["error_code"]).to_pylist()
    manifest = Manifest(
        schema_version=DATASET_VERSION,
        classes=plan.classes,
        statistics=_statistics(written),
        splits=splits,
        source=source,
        inputs=plan.num_inputs,
        rejected=Rejected(
            total=rejected.num_rows,
            by_code={item["values"]: item["counts"] for item in counts},
        ),
        cnnray_version=__version__,
    )
    assert manifest.num_samples + manifest.rejected.total == plan.num_inputs
    return manifest, rejected


def _split(packed: Sequence[PackedShard], num_classes: int) -> Split:
    shards = tuple(result.shard for result in packed if result.shard is not None)
    counts = sum((result.class_counts for result in packed), np.zeros(num_classes, dtype=np.int64))
    return Split(
        num_samples=sum(shard.num_samples for shard in shards),
        class_counts=tuple(int(count) for count in counts),
        files=shards,
    )


def _statistics(packed: Sequence[PackedShard]) -> Statistics:
    train = [result for result in packed if result.split == "train"] or packed
    is_grey = all(result.is_grey for result in packed)
    histogram = sum((result.histogram for result in train), np.zeros((3, 256), dtype=np.int64))
    histogram = histogram[:1] if is_grey else histogram
    values = np.arange(256) / 255
    total = histogram.sum(axis=1)
    mean = histogram @ values / total
    variance = histogram @ values**2 / total - mean**2
    # A constant channel has no scale of its own; one grey level keeps the division finite.
    std = np.sqrt(np.maximum(variance, (1 / 255) ** 2))
    return Statistics(
        channels=1 if is_grey else 3,
        mean=tuple(round(float(value), 6) for value in mean),
        std=tuple(round(float(value), 6) for value in std),
        min_width=min(result.sizes[0] for result in packed),
        max_width=max(result.sizes[1] for result in packed),
        min_height=min(result.sizes[2] for result in packed),
        max_height=max(result.sizes[3] for result in packed),
    )
