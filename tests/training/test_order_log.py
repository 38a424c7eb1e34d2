"""The order log: exact across kills, because pieces break where checkpoints are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cnnray.datasets.order import Batch
from cnnray.schema import ORDER_SCHEMA
from cnnray.storage import LocalStore, encode_parquet
from cnnray.training.order_log import OrderLog, remove_order
from cnnray.training.places import Place


def batches(steps: range, *, size: int = 2) -> Iterator[Batch]:
    for step in steps:
        keys = np.array([f"{step}-{n}" for n in range(size)], dtype=object)
        yield Batch(image=np.zeros((size, 1, 1, 1), np.uint8), label=np.arange(size), key=keys)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path))


def names(store: LocalStore) -> list[str]:
    return [item.key for item in store.list()]


def rows(store: LocalStore, epoch: int) -> list[tuple[int, int, int, str]]:
    table = pq.read_table(Path(store.root) / f"epoch-{epoch:05d}")
    assert table.schema.equals(ORDER_SCHEMA)
    return sorted(tuple(row.values()) for row in table.to_pylist())


def test_an_epoch_without_a_place_is_one_piece_of_each_rank(store: LocalStore) -> None:
    for rank in (0, 1):
        log = OrderLog(store, rank=rank)
        given = list(batches(range(3)))
        passed = list(log.record(given, begin=Place(4)))
        assert [one is other for one, other in zip(given, passed, strict=True)] == [True] * 3
    assert names(store) == [
        "epoch-00004/step-00000000-rank-00000.parquet",
        "epoch-00004/step-00000000-rank-00001.parquet",
    ]
    assert rows(store, 4) == [
        (4, step, rank, f"{step}-{n}") for step in range(3) for rank in (0, 1) for n in (0, 1)
    ]


def test_a_flush_ends_a_piece_with_the_step_that_was_taken_last(store: LocalStore) -> None:
    log = OrderLog(store, rank=0)
    recorded = log.record(batches(range(5)), begin=Place(0))
    for _ in range(2):
        next(recorded)
    assert names(store) == []
    log.flush()
    log.flush()  # nothing new
    assert [row[1] for row in rows(store, 0)] == [0, 0, 1, 1]
    assert len(list(recorded)) == 3
    assert names(store) == [
        "epoch-00000/step-00000000-rank-00000.parquet",
        "epoch-00000/step-00000002-rank-00000.parquet",
    ]
    assert [row[1] for row in rows(store, 0)] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_what_was_taken_since_the_last_place_is_lost_with_the_process(store: LocalStore) -> None:
    recorded = OrderLog(store, rank=0).record(batches(range(5)), begin=Place(0))
    next(recorded)
    recorded.close()
    assert names(store) == []


def test_steps_are_counted_from_the_place_where_a_run_goes_on(store: LocalStore) -> None:
    list(OrderLog(store, rank=3).record(batches(range(7, 9)), begin=Place(2, 7)))
    assert names(store) == ["epoch-00002/step-00000007-rank-00003.parquet"]
    assert [row[:3] for row in rows(store, 2)] == [(2, 7, 3), (2, 7, 3), (2, 8, 3), (2, 8, 3)]


def test_pieces_from_the_place_on_are_removed_whatever_rank_wrote_them(store: LocalStore) -> None:
    for epoch, step, rank in ((0, 0, 0), (1, 0, 0), (1, 0, 7), (1, 4, 0), (1, 8, 7), (2, 0, 0)):
        list(OrderLog(store, rank=rank).record(batches(range(1)), begin=Place(epoch, step)))
    store.write("notes.txt", b"not ours")
    remove_order(store, begin=Place(1, 4))
    assert names(store) == [
        "epoch-00000/step-00000000-rank-00000.parquet",
        "epoch-00001/step-00000000-rank-00000.parquet",
        "epoch-00001/step-00000000-rank-00007.parquet",
        "notes.txt",
    ]


def test_the_files_of_older_versions_are_removed_with_their_epoch(store: LocalStore) -> None:
    table = encode_parquet(pa.table([[0], [0], [0], ["key"]], ORDER_SCHEMA))
    for epoch in (0, 1, 2):
        store.write(f"epoch-{epoch:05d}/rank-00000.parquet", table)
    remove_order(store, begin=Place(1))
    assert names(store) == ["epoch-00000/rank-00000.parquet"]


def test_of_a_log_that_is_not_there_nothing_is_removed(tmp_path: Path) -> None:
    remove_order(LocalStore(str(tmp_path / "none")), begin=Place(0))
