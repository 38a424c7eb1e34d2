"""Label rows into parts: collected by (part, chunk), checked against the plan, published once."""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq

from cnnray.errors import CnnrayError, MissingObjectError
from cnnray.labeling.plan import LabelPlan
from cnnray.storage import Store

DATA_FOLDER = "data"


class PartAssembler:
    """Collects chunks in any order; a part is ready when all of its rows are there.

    A chunk that arrives twice (a retried task) is dropped the second time.
    """

    def __init__(self, plan: LabelPlan) -> None:
        self.plan = plan
        self.chunks: dict[int, dict[int, pa.Table]] = {}
        self.finished: set[int] = set()

    def add(self, part: int, chunk: int, rows: pa.Table) -> pa.Table | None:
        """Take a chunk; the whole part, in the order of the plan, when this was its last one."""
        if part in self.finished:
            return None
        chunks = self.chunks.setdefault(part, {})
        chunks.setdefault(chunk, rows)
        planned = self.plan.part(part)
        if sum(table.num_rows for table in chunks.values()) < planned.num_rows:
            return None
        self.finished.add(part)
        whole = pa.concat_tables([table for _, table in sorted(self.chunks.pop(part).items())])
        if not whole["key"].combine_chunks().equals(planned["key"].combine_chunks()):
            raise CnnrayError(f"part {part} does not hold the keys that were planned")
        return whole

    @property
    def num_missing(self) -> int:
        """Parts that are not complete."""
        return self.plan.num_parts - len(self.finished)


def publish_part(store: Store, name: str, rows: pa.Table) -> None:
    """Write one part by one conditional create, after reading its bytes back.

    Raises ``AlreadyExistsError`` when another part is there.
    """
    buffer = io.BytesIO()
    pq.write_table(rows, buffer, compression="zstd")
    data = buffer.getvalue()
    written = pq.read_table(io.BytesIO(data), columns=["key"])
    assert written["key"].combine_chunks().equals(rows["key"].combine_chunks())
    store.create(name, data)


def labels_exist(output: Store) -> bool:
    """Whether there are labels at an output already."""
    try:
        return next(output.list(f"{DATA_FOLDER}/"), None) is not None
    except MissingObjectError:
        return False
