"""Tables through pools of actors: bounded, retried, and never waited for in vain."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
import ray.data
from ray.data import DataContext

from cnnray.cluster.core import streaming
from cnnray.cluster.core.streaming import (
    Pause,
    Stage,
    data_context,
    is_retried,
    map_items,
    map_units,
)
from cnnray.errors import CnnrayError, DataError, IncompleteError, UnavailableError

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(180),
    pytest.mark.usefixtures("ray_session"),
]


def tables(count: int) -> list[pa.Table]:
    return [pa.table({"n": [number]}) for number in range(count)]


def numbers(results: Iterator[pa.Table]) -> list[int]:
    return sorted(table["n"][0].as_py() for table in results)


class Add:
    """Adds to the number."""

    def __init__(self, *, summand: int = 0, folder: Path | None = None) -> None:
        self.summand = summand
        self.folder = folder

    def __call__(self, table: pa.Table) -> pa.Table:
        return pa.table({"n": [table["n"][0].as_py() + self.summand]})


def test_every_table_passes_all_stages():
    stages = [Stage(Add, {"summand": 10}, 1, 1, 0.5), Stage(Add, {"summand": 200}, 2, 2, 0.5)]
    assert numbers(map_units(tables(20), stages, stall_seconds=60)) == [210 + n for n in range(20)]


def test_no_tables_and_fewer_tables_than_workers_end_at_once():
    stage = Stage(Add, {}, 2, 2, 1.0)
    assert numbers(map_units([], [stage], stall_seconds=60)) == []
    assert numbers(map_units(tables(1), [stage], stall_seconds=60)) == [0]


class Noted(Add):
    """Leaves a file for each table that it was given."""

    def __call__(self, table: pa.Table) -> pa.Table:
        assert self.folder is not None
        (self.folder / str(table["n"][0].as_py())).touch()
        return super().__call__(table)


class Inflating(Noted):
    """Makes 20 MB of each table."""

    def __call__(self, table: pa.Table) -> pa.Table:
        super().__call__(table)
        return table.append_column("pixels", pa.array([bytes(20_000_000)]))


class Slow(Add):
    def __call__(self, table: pa.Table) -> pa.Table:
        time.sleep(0.3)
        return super().__call__(table)


def test_a_stage_runs_ahead_of_the_next_one_by_a_bounded_number_of_bytes(tmp_path):
    # The object store of these tests has 300 MB: 40 tables of 20 MB would not fit.
    stages = [Stage(Inflating, {"folder": tmp_path}, 1, 1, 0.5), Stage(Slow, {}, 1, 1, 0.5)]
    results = map_units(tables(40), stages, stall_seconds=60)
    next(results)
    time.sleep(2)
    assert len(list(tmp_path.iterdir())) <= 15
    assert len([*results]) == 39


class Mortal(Noted):
    """Is killed by the third table, once."""

    def __call__(self, table: pa.Table) -> pa.Table:
        assert self.folder is not None
        if table["n"][0].as_py() == 2 and not (self.folder / "2").exists():
            (self.folder / "2").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(table)


def test_what_was_with_an_actor_that_died_is_done_again(tmp_path):
    stage = Stage(Mortal, {"folder": tmp_path}, 1, 1, 1.0)
    assert numbers(map_units(tables(6), [stage], stall_seconds=60)) == list(range(6))


class Doomed(Add):
    def __call__(self, table: pa.Table) -> pa.Table:
        os.kill(os.getpid(), signal.SIGKILL)
        return table


def test_a_table_that_kills_every_actor_ends_the_work():
    with pytest.raises(IncompleteError, match="a worker failed"):
        numbers(map_units(tables(2), [Stage(Doomed, {}, 1, 1, 1.0)], stall_seconds=60))


class Failing(Add):
    def __init__(self, *, error: Exception, at_start: bool = False) -> None:
        super().__init__()
        self.error = error
        if at_start:
            raise error

    def __call__(self, table: pa.Table) -> pa.Table:
        raise self.error


@pytest.mark.parametrize("at_start", [False, True])
def test_the_error_of_an_actor_is_raised_as_it_is(at_start):
    error = DataError("the shard is damaged", hint="pack it again")
    stage = Stage(Failing, {"error": error, "at_start": at_start}, 1, 1, 1.0)
    with pytest.raises(DataError, match="the shard is damaged\nhint: pack it again"):
        numbers(map_units(tables(2), [stage], stall_seconds=60))


def test_a_bug_and_an_actor_that_cannot_start_are_named():
    for at_start in (False, True):
        stage = Stage(Failing, {"error": ValueError("so wrong"), "at_start": at_start}, 1, 1, 1.0)
        with pytest.raises(CnnrayError, match="so wrong"):
            numbers(map_units(tables(2), [stage], stall_seconds=60))


def free_cpus() -> float:
    """Of the two of these tests, after some seconds for what was to be let go of."""
    deadline = time.monotonic() + 30
    while (free := ray.available_resources().get("CPU", 0.0)) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    return free


@pytest.mark.parametrize("at_start", [False, True])
def test_what_failed_keeps_no_cpus(at_start):
    stage = Stage(Failing, {"error": ValueError("so wrong"), "at_start": at_start}, 2, 2, 1.0)
    with pytest.raises(CnnrayError) as failure:  # which lives on, with its traceback
        numbers(map_units(tables(4), [stage], stall_seconds=60))
    assert free_cpus() == 2
    assert "so wrong" in str(failure.value)


def test_what_nobody_wants_any_more_ends():
    results = map_units(tables(50), [Stage(Slow, {}, 2, 2, 1.0)], stall_seconds=60)
    next(results)
    results.close()
    assert free_cpus() == 2
    assert not [thread for thread in threading.enumerate() if "Streaming" in thread.name]


def test_an_actor_that_finds_no_room_holds_nothing_up():
    stage = Stage(Add, {}, 3, 3, 1.0)  # of which two fit
    assert numbers(map_units(tables(12), [stage], stall_seconds=60)) == list(range(12))


class Patient(Noted):
    """Works on its first table until a second actor has one, too."""

    def __call__(self, table: pa.Table) -> pa.Table:
        assert self.folder is not None
        (self.folder / str(os.getpid())).touch()
        deadline = time.monotonic() + 100
        while len(list(self.folder.iterdir())) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        return table


def test_a_pool_grows_while_there_is_work_for_more(tmp_path):
    stage = Stage(Patient, {"folder": tmp_path}, 1, 2, 1.0)
    assert len([*map_units(tables(20), [stage], stall_seconds=120)]) == 20
    assert len(list(tmp_path.iterdir())) == 2


class Stuck(Add):
    def __call__(self, table: pa.Table) -> pa.Table:
        time.sleep(12)  # it keeps its CPU for so long, also after the work was given up
        return table


def test_nothing_is_waited_for_without_end():
    started = time.monotonic()
    with pytest.raises(IncompleteError, match="no worker has finished anything for 3 s"):
        numbers(map_units(tables(1), [Stage(Stuck, {}, 1, 1, 1.0)], stall_seconds=3))
    assert time.monotonic() - started < 30


class Generous(Add):
    """Yields two tables of each."""

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        yield table
        yield pa.table({"n": [table["n"][0].as_py() + 1]})


def test_what_a_generator_yields_for_a_unit_comes_as_one_block():
    [block] = map_units(tables(1), [Stage(Generous, {}, 1, 1, 1.0)], stall_seconds=60)
    assert block["n"].to_pylist() == [0, 1]


def test_items_come_back_with_their_numbers():
    items = [{"text": "a"}, {"text": "b" * 10}]
    results = dict(map_items(lambda item: len(item["text"]), items, stall_seconds=60))
    assert results == {0: 1, 1: 10}
    assert dict(map_items(len, [], stall_seconds=60)) == {}


def test_a_store_that_gave_no_answer_is_asked_again(tmp_path):
    def ask(number: int) -> int:
        tries = tmp_path / str(number)
        if not tries.exists():
            tries.touch()
            raise UnavailableError("the store gave no usable answer")
        return number

    assert sorted(map_items(ask, [0, 1, 2], stall_seconds=60)) == [(0, 0), (1, 1), (2, 2)]


def test_an_item_that_kills_every_worker_ends_the_work(tmp_path):
    def die(number: int) -> None:
        (tmp_path / str(time.monotonic_ns())).touch()
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(IncompleteError, match="a worker failed"):
        dict(map_items(die, [0], stall_seconds=60))
    assert len(list(tmp_path.iterdir())) <= 4


def test_a_waiting_executor_makes_few_steps():
    steps = 0

    class Counted(Pause):
        def on_execution_step(self, executor: Any) -> None:
            nonlocal steps
            steps += 1
            super().on_execution_step(executor)

    context = data_context(
        stall_seconds=60, ordered=True, read_ahead_bytes=10_000_000, pause=Counted
    )
    with DataContext.current(context):
        dataset = ray.data.range(40, override_num_blocks=40).map_batches(
            lambda batch: {"x": np.zeros((len(batch["id"]), 4_000_000), np.uint8)},
            batch_size=None,
        )
    blocks = iter(dataset.iter_batches(batch_size=None, batch_format="numpy"))
    next(blocks)
    time.sleep(2)  # until its output waits
    before = steps
    time.sleep(2)
    blocks.close()
    assert 0 < steps - before < 120  # of some 1,200 without the pause


def die_first(number: int) -> tuple[int, bool]:
    """Odd numbers kill the worker that is given them first."""
    if number % 2 and not is_retried():
        os.kill(os.getpid(), signal.SIGKILL)
    return 10 * number, is_retried()


def test_an_item_whose_worker_died_is_done_again_and_knows_it(monkeypatch):
    monkeypatch.setattr(streaming, "MAX_UNITS", 3)  # in two executions
    results = dict(map_items(die_first, range(4), stall_seconds=60))
    assert results == {0: (0, False), 1: (10, True), 2: (20, False), 3: (30, True)}
