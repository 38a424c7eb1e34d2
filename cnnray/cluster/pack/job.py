"""The pack job: workers list and write shards; the driver holds names, never images."""

from __future__ import annotations

import functools
import logging
import time
from typing import Any

import pyarrow as pa

from cnnray.cluster.core.session import ray_cluster
from cnnray.cluster.core.streaming import is_retried, map_items
from cnnray.cluster.pack.listing import list_entries
from cnnray.config import PackSettings
from cnnray.console import ProgressLine
from cnnray.datasets.manifest import (
    MANIFEST,
    REJECTED,
    Manifest,
    manifest_exists,
    read_manifest,
)
from cnnray.datasets.packing import PackPlan, build_manifest, plan_pack
from cnnray.datasets.shards import PackedShard, ShardPlan, pack_shard
from cnnray.datasets.sources import Source, open_source
from cnnray.errors import AlreadyExistsError, TooManyBadImagesError, UsageError
from cnnray.storage import Store, encode_parquet, open_store, sha256

logger = logging.getLogger(__name__)

ENTRY_ORDER = [("key", "ascending"), ("path", "ascending"), ("offset", "ascending")]


def pack(settings: PackSettings) -> dict[str, Any]:
    """Pack, and return the job's result.

    Raises ``UsageError`` when a dataset is there already, ``DataError`` when there is nothing to
    pack, and ``TooManyBadImagesError`` (the dataset is complete) when too much was rejected.
    """
    started = time.perf_counter()
    output = open_store(settings.output)
    replaced = _check_output(output, overwrite=settings.overwrite)
    source = open_source(settings.input, format=settings.format, **settings.columns.options())
    with ray_cluster(settings.cluster):
        entries = list_entries(source, stall_seconds=settings.cluster.stall_seconds)
        entries = entries.sort_by(ENTRY_ORDER)  # the plan depends on the keys alone
        plan = plan_pack(
            entries,
            val=settings.split.val,
            test=settings.split.test,
            shard_bytes=settings.shard_bytes,
            suffix="" if replaced is None else f"-{_generation(entries)}",
        )
        try:
            packed = _pack_shards(plan, source=source, output=output, settings=settings)
        except AlreadyExistsError as error:
            raise UsageError(
                f"{output.uri} holds files of a packing that broke off: {error}",
                hint="choose another --output, or --overwrite",
            ) from error
    manifest, rejected = build_manifest(
        plan, packed, source={"uri": settings.input, "format": settings.format}
    )
    _publish(output, manifest, rejected, replaced=replaced)
    return _result(
        manifest, output=output, settings=settings, seconds=time.perf_counter() - started
    )


def _check_output(output: Store, *, overwrite: bool) -> Manifest | None:
    """The dataset that will be replaced, or None. Raises ``UsageError`` when that is not asked."""
    if not manifest_exists(output):
        return None
    if not overwrite:
        raise UsageError(
            f"{output.uri} holds a dataset already", hint="choose another --output, or --overwrite"
        )
    return read_manifest(output)


def _generation(entries: pa.Table) -> str:
    """Short name of this packing, so that a new dataset's files never touch the old one's."""
    keys = "\n".join(entries["key"].to_pylist()) + str(time.time_ns())
    return sha256(keys.encode())[:8]


def _pack_shards(
    plan: PackPlan, *, source: Source, output: Store, settings: PackSettings
) -> list[PackedShard]:
    """Write every shard, and give what was written in the order of the plan."""
    write = functools.partial(
        pack_shard,
        source=source,
        store=output,
        classes=plan.classes,
        limits=settings.limits,
        decode_seconds=settings.decode_seconds,
        replace=settings.overwrite,
    )

    def write_safely(shard: ShardPlan) -> PackedShard:
        # A worker that died before may have been killed by an image of this shard.
        return write(shard, careful=is_retried())

    packed: dict[int, PackedShard] = {}
    total = sum(shard.entries.num_rows for shard in plan.shards)
    done = rejected = 0
    with ProgressLine(
        total=total, unit="images", label="pack", seconds=settings.cluster.progress_seconds
    ) as progress:
        for number, result in map_items(
            write_safely, plan.shards, stall_seconds=settings.cluster.stall_seconds
        ):
            packed[number] = result
            done += plan.shards[number].entries.num_rows
            rejected += result.rejected.num_rows
            progress.update(done, f"{rejected:,} rejected")
    return [packed[number] for number in range(len(plan.shards))]


def _publish(
    output: Store, manifest: Manifest, rejected: pa.Table, *, replaced: Manifest | None
) -> None:
    """Make the dataset exist: its manifest comes last, and old files go once it is there."""
    output.write(REJECTED, encode_parquet(rejected))
    if replaced is None:
        output.create(MANIFEST, manifest.to_bytes())
        return
    output.write(MANIFEST, manifest.to_bytes())
    kept = {shard.path for split in manifest.splits.values() for shard in split.files}
    for split in replaced.splits.values():
        for shard in split.files:
            if shard.path not in kept:
                output.delete(shard.path)


def _result(
    manifest: Manifest, *, output: Store, settings: PackSettings, seconds: float
) -> dict[str, Any]:
    rejected = manifest.rejected
    logger.info(
        "packed %s + rejected %s = %s inputs%s",
        f"{manifest.num_samples:,}",
        f"{rejected.total:,}",
        f"{manifest.inputs:,}",
        f" ({', '.join(f'{code} {n}' for code, n in rejected.by_code.items())})"
        if rejected.total
        else "",
    )
    result = {
        "samples": manifest.num_samples,
        "rejected": rejected.total,
        "inputs": manifest.inputs,
        "classes": len(manifest.classes),
        "splits": {name: split.num_samples for name, split in manifest.splits.items()},
        "bytes": sum(shard.bytes for split in manifest.splits.values() for shard in split.files),
        "manifest": f"{output.uri}/{MANIFEST}",
        "seconds": round(seconds, 1),
    }
    if settings.budget.exceeded(bad=rejected.total, total=manifest.inputs):
        raise TooManyBadImagesError(
            f"{rejected.total:,} of {manifest.inputs:,} images were rejected:"
            f" see {output.uri}/{REJECTED}",
            hint="the dataset is complete; raise --budget.max_fraction to accept it",
            result=result,
        )
    return result
