"""What workers are given of a plan: rows of a part, in units that are small first and last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from cnnray.labeling.plan import LabelPlan

LARGE_UNIT_CHUNKS = 4
"""Chunks of one unit in the middle of a run: a quarter of the cost of handing units out."""
EDGE_CHUNKS_PER_WORKER = 2
"""Small units at each end of a run: the first rows come early, and no worker ends late."""


@dataclass(frozen=True, slots=True)
class PlanUnit:
    """Rows ``start`` to ``stop`` of a part."""

    part: int
    start: int
    stop: int

    def to_table(self) -> pa.Table:
        """One row."""
        return pa.table({"part": [self.part], "start": [self.start], "stop": [self.stop]})


def plan_units(
    plan: LabelPlan, parts: Sequence[int], *, chunk_rows: int, workers: int, max_units: int
) -> list[PlanUnit]:
    """Every row of some parts once, part by part; about ``max_units`` units at most.

    Units have ``chunk_rows`` rows at both ends of the run and more between them. None spans two
    parts, so that there are at least as many as parts.
    """
    total = sum(map(plan.rows_of, parts))
    large = max(LARGE_UNIT_CHUNKS * chunk_rows, -(-total // max_units))
    edge = EDGE_CHUNKS_PER_WORKER * workers * chunk_rows
    units: list[PlanUnit] = []
    done = 0
    for part in parts:
        start, end = 0, plan.rows_of(part)
        while start < end:
            before_last = total - edge - done  # rows until the small units of the end
            size = chunk_rows if done < edge or before_last <= 0 else min(large, before_last)
            stop = min(end, start + size)
            units.append(PlanUnit(part, start, stop))
            done += stop - start
            start = stop
    return units
