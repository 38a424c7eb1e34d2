"""The order log: which sample went into which step on which rank, as Parquet.

    <folder>/epoch-00003/rank-00001.parquet

A rank writes its file when its epoch ends; an epoch that is repeated after a restart replaces it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pyarrow as pa

from cnnray.datasets.order import Batch
from cnnray.schema import ORDER_SCHEMA
from cnnray.storage import Store, encode_parquet


def log_order(
    batches: Iterable[Batch], *, store: Store, epoch: int, rank: int, num_workers: int
) -> Iterator[Batch]:
    """The same batches; their keys are written to ``store`` (``ORDER_SCHEMA``) after the last."""
    if rank == 0:
        _remove_other_ranks(store, epoch=epoch, num_workers=num_workers)
    keys: list[str] = []
    steps: list[int] = []
    for step, batch in enumerate(batches):
        keys += batch["key"].tolist()
        steps += [step] * len(batch["key"])
        yield batch
    columns = [[epoch] * len(keys), steps, [rank] * len(keys), keys]
    store.write(_name(epoch, rank), encode_parquet(pa.table(columns, ORDER_SCHEMA)))


def _name(epoch: int, rank: int) -> str:
    return f"epoch-{epoch:05d}/rank-{rank:05d}.parquet"


def _remove_other_ranks(store: Store, *, epoch: int, num_workers: int) -> None:
    """Remove what ranks that are no more wrote of an epoch that is now repeated."""
    rank = num_workers
    while store.head(_name(epoch, rank)) is not None:
        store.delete(_name(epoch, rank))
        rank += 1
