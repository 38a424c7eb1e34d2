"""The manifest of a packed dataset: an output without one does not exist."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from cnnray.errors import DataError, MissingObjectError
from cnnray.schema import DATASET_VERSION, SPLITS
from cnnray.storage import Store, encode_json

MANIFEST = "manifest.json"
REJECTED = "rejected.parquet"

Count = Annotated[int, Field(ge=0)]


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Shard(_Document):
    """One Parquet file: its path below the dataset, and the rows of each of its row groups."""

    path: str
    num_samples: Annotated[int, Field(gt=0)]
    bytes: Count
    sha256: str
    row_groups: tuple[Annotated[int, Field(gt=0)], ...]


class Split(_Document):
    """The shards of one split; ``class_counts`` follows the manifest's classes."""

    num_samples: Count
    class_counts: tuple[Count, ...]
    files: tuple[Shard, ...]


class Statistics(_Document):
    """Of the training split: channels (1 when all is grey), mean and std in units of pixel / 255.

    Sizes are those of all packed images after EXIF rotation, in pixels.
    """

    channels: Literal[1, 3]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    min_width: int
    max_width: int
    min_height: int
    max_height: int

    @property
    def common_size(self) -> int | None:
        """The side of the images when all of them are the same square, else None."""
        sides = {self.min_width, self.max_width, self.min_height, self.max_height}
        return sides.pop() if len(sides) == 1 else None


class Rejected(_Document):
    """How many inputs were not packed, by error code; the rows are in ``rejected.parquet``."""

    total: Count
    by_code: dict[str, Count]


class Manifest(_Document):
    """What is in a dataset; written last, by a conditional create."""

    schema_version: int
    classes: tuple[str, ...]
    statistics: Statistics
    splits: dict[str, Split]
    source: dict[str, str]
    inputs: Count
    rejected: Rejected
    cnnray_version: str

    @property
    def num_samples(self) -> int:
        """Packed samples, all splits together."""
        return sum(split.num_samples for split in self.splits.values())

    def to_bytes(self) -> bytes:
        """The JSON document."""
        return encode_json(self.model_dump(mode="json"))


def read_manifest(store: Store) -> Manifest:
    """The manifest of the dataset at ``store``.

    Raises ``DataError`` when there is none, or when it is not one that this version reads.
    """
    try:
        data = store.read(MANIFEST)
    except MissingObjectError:
        raise DataError(
            f"no dataset at {store.uri}: it has no {MANIFEST}", hint="pack it with jobs/pack.py"
        ) from None
    try:
        manifest = Manifest.model_validate_json(data)
    except pydantic.ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = " ".join(".".join(map(str, problem["loc"])).split()) or "document"
        raise DataError(
            f"bad manifest {store.uri}/{MANIFEST}: {where}: {problem['msg']}",
            hint="pack the dataset again",
        ) from None
    _check(manifest, store)
    return manifest


def _check(manifest: Manifest, store: Store) -> None:
    where = f"bad manifest {store.uri}/{MANIFEST}"
    if manifest.schema_version != DATASET_VERSION:
        raise DataError(
            f"{where}: schema_version {manifest.schema_version}, not {DATASET_VERSION}",
            hint="pack the dataset again with this version of cnnray",
        )
    if set(manifest.splits) - set(SPLITS):
        raise DataError(f"{where}: unknown splits {sorted(set(manifest.splits) - set(SPLITS))}")
    if len(set(manifest.classes)) != len(manifest.classes):
        raise DataError(f"{where}: a class is named twice")
    channels = manifest.statistics.channels
    if not len(manifest.statistics.mean) == len(manifest.statistics.std) == channels:
        raise DataError(f"{where}: mean and std must have {channels} values")
    for name, split in manifest.splits.items():
        if len(split.class_counts) != len(manifest.classes):
            raise DataError(
                f"{where}: {name} counts {len(split.class_counts)} classes,"
                f" the manifest names {len(manifest.classes)}"
            )
        sums = (sum(split.class_counts), sum(shard.num_samples for shard in split.files))
        if sums != (split.num_samples, split.num_samples):
            raise DataError(f"{where}: the samples of {name} do not add up")
        for shard in split.files:
            _check_shard(shard, where)


def _check_shard(shard: Shard, where: str) -> None:
    if sum(shard.row_groups) != shard.num_samples:
        raise DataError(f"{where}: {shard.path!r} does not add up")
    if shard.path.startswith("/") or ".." in shard.path.split("/"):
        raise DataError(f"{where}: {shard.path!r} leaves the dataset")


def manifest_exists(store: Store) -> bool:
    """Whether a dataset is complete at ``store``."""
    return store.head(MANIFEST) is not None


def get_split(manifest: Manifest, name: str, *, uri: str) -> Split:
    """A split that holds samples. Raises ``DataError`` when it does not."""
    split = manifest.splits.get(name)
    if split is None or split.num_samples == 0:
        there = [f"{key} ({value.num_samples})" for key, value in manifest.splits.items()]
        raise DataError(f"no samples in split {name} of {uri}", hint=f"it has {', '.join(there)}")
    return split
