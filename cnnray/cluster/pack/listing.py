"""Listing a source: workers list its partitions, the driver gets their entries."""

from __future__ import annotations

import pyarrow as pa

from cnnray.cluster.core.streaming import map_items
from cnnray.console import ProgressLine
from cnnray.datasets.sources import Source
from cnnray.schema import ENTRY_SCHEMA


def list_entries(source: Source, *, stall_seconds: float) -> pa.Table:
    """Every entry of a source (``ENTRY_SCHEMA``), partition by partition, in the source's order."""
    partitions = source.partitions()

    def list_partition(number: int) -> pa.Table:
        return pa.concat_tables([ENTRY_SCHEMA.empty_table(), *source.list(partitions[number])])

    tables: dict[int, pa.Table] = {}
    with ProgressLine(total=len(partitions), unit="folders", label="list", seconds=10) as progress:
        for number, table in map_items(
            list_partition, range(len(partitions)), stall_seconds=stall_seconds
        ):
            tables[number] = table
            progress.update(len(tables), f"{sum(t.num_rows for t in tables.values()):,} images")
    ordered = [tables[number] for number in sorted(tables)]
    return pa.concat_tables([ENTRY_SCHEMA.empty_table(), *ordered])
