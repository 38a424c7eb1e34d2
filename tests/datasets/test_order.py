"""The order of training: every row once an epoch, the same batches for any number of workers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnnray.datasets import order as order_module
from cnnray.datasets.order import (
    NUM_LANES,
    Batch,
    EpochOrder,
    Unit,
    assemble,
    lanes_of,
    permutation,
    plan_epoch,
    row_groups_of,
)

WORKERS = (1, 2, 3, 4, 5, 8, 24)

layouts = st.lists(st.lists(st.integers(1, 90), min_size=1, max_size=5), min_size=1, max_size=5)
batch_sizes = st.one_of(st.integers(1, 70), st.integers(100, 1000))
unit_sizes = st.integers(1, 100)
seeds = st.integers(0, 2**63 - 1)


def plan(layout: Sequence[Sequence[int]], *, batch: int, seed: int = 0, epoch: int = 0, unit=40):
    return plan_epoch(
        row_groups_of(layout), seed=seed, epoch=epoch, global_batch_size=batch, max_unit_rows=unit
    )


def read(unit: Unit, *, seed: int = 0, epoch: int = 0) -> Batch:
    """What a reader produces of a unit: rows named by where they are."""
    rows = unit.start + permutation(unit, seed=seed, epoch=epoch)
    place = f"{unit.row_group.shard}/{unit.row_group.index}"
    return Batch(
        image=rows.astype(np.uint8).reshape(-1, 1, 1, 1),
        label=rows,
        key=np.array([f"{place}/{row}" for row in rows], dtype=object),
    )


def batches_of(
    order: EpochOrder,
    *,
    rank: int,
    num_workers: int,
    seed: int = 0,
    epoch: int = 0,
    first_step: int = 0,
) -> Iterator[Batch]:
    lanes = lanes_of(rank, num_workers=num_workers)
    units = order.units_of(lanes, first_step=first_step)
    blocks = ((unit.lane, read(unit, seed=seed, epoch=epoch)) for unit in units)
    return assemble(order, blocks, lanes=lanes, first_step=first_step)


def keys_of(order: EpochOrder, *, num_workers: int = 1, seed: int = 0, epoch: int = 0):
    """The keys of each global batch, rank after rank."""
    ranks = [
        list(batches_of(order, rank=rank, num_workers=num_workers, seed=seed, epoch=epoch))
        for rank in range(num_workers)
    ]
    assert {len(batches) for batches in ranks} == {order.num_steps}
    return [[key for part in step for key in part["key"]] for step in zip(*ranks, strict=True)]


def all_keys(layout: Sequence[Sequence[int]]) -> list[str]:
    return [
        f"{shard}/{group}/{row}"
        for shard, groups in enumerate(layout)
        for group, rows in enumerate(groups)
        for row in range(rows)
    ]


@settings(max_examples=60, deadline=None)
@given(layouts, batch_sizes, unit_sizes, seeds, st.integers(0, 1000))
def test_an_epoch_holds_every_row_exactly_once(layout, batch, unit, seed, epoch) -> None:
    order = plan(layout, batch=batch, unit=unit, seed=seed, epoch=epoch)
    keys = [key for step in keys_of(order, seed=seed, epoch=epoch) for key in step]
    assert sorted(keys) == sorted(all_keys(layout))


@settings(max_examples=60, deadline=None)
@given(layouts, batch_sizes, unit_sizes)
def test_units_are_bounded_and_cover_every_row_group_without_overlap(layout, batch, unit) -> None:
    order = plan(layout, batch=batch, unit=unit)
    covered: Counter[str] = Counter()
    for piece in order.units:
        assert 1 <= piece.num_rows <= unit
        assert 0 <= piece.lane < NUM_LANES
        place = f"{piece.row_group.shard}/{piece.row_group.index}"
        covered.update(f"{place}/{row}" for row in range(piece.start, piece.stop))
    assert covered == Counter(all_keys(layout))


@settings(max_examples=20, deadline=None)
@given(layouts, st.integers(24, 200), unit_sizes, seeds)
def test_a_global_batch_holds_the_same_samples_for_any_number_of_workers(
    layout, batch, unit, seed
) -> None:
    layout = [*layout, [30]]  # at least one row for each of 24 workers
    order = plan(layout, batch=batch, unit=unit, seed=seed)
    alone = [sorted(step) for step in keys_of(order, seed=seed)]
    for num_workers in WORKERS[1:]:
        shared = [sorted(step) for step in keys_of(order, num_workers=num_workers, seed=seed)]
        assert shared == alone


@settings(max_examples=60, deadline=None)
@given(layouts, batch_sizes)
def test_batches_have_the_promised_sizes(layout, batch) -> None:
    order = plan(layout, batch=batch)
    assert [len(step) for step in keys_of(order)] == order.batch_sizes.tolist()
    assert order.batch_sizes.sum() == len(all_keys(layout))
    assert set(order.batch_sizes[:-1].tolist()) <= {batch}
    assert order.batch_sizes[-1] < batch + 2 * NUM_LANES


@pytest.mark.parametrize(
    ("rows", "batch", "sizes"),
    [
        (128, 64, [64, 64]),
        (128 + 47, 64, [64, 64 + 47]),  # too small for a batch of its own: joins the last one
        (128 + 48, 64, [64, 64, 48]),  # two samples a lane
        (47, 64, [47]),  # nothing to join
        (1, 64, [1]),
        (100, 32, [32, 32, 36]),
        (7, 1, [1] * 7),
    ],
)
def test_a_remainder_is_a_batch_only_if_it_is_not_tiny(rows, batch, sizes) -> None:
    assert plan([[rows]], batch=batch).batch_sizes.tolist() == sizes


def test_of_no_rows_there_is_no_step() -> None:
    order = plan([], batch=8)
    assert (order.num_steps, order.units) == (0, ())
    assert list(assemble(order, [], lanes=range(NUM_LANES))) == []


def test_the_order_is_that_of_seed_and_epoch() -> None:
    layout = [[50, 60, 70], [80, 90]]

    def keys(seed: int, epoch: int):
        return keys_of(plan(layout, batch=32, seed=seed, epoch=epoch), seed=seed, epoch=epoch)

    assert keys(1, 5) == keys(1, 5)
    assert keys(1, 5) != keys(1, 6)
    assert keys(1, 5) != keys(2, 5)
    assert keys(1, 5) != keys(5, 1)


def test_the_order_of_rows_is_that_of_the_unit() -> None:
    first, second = (Unit(0, row_groups_of([[100, 100]])[index], 0, 100) for index in (0, 1))
    assert sorted(permutation(first, seed=1, epoch=2)) == list(range(100))
    assert permutation(first, seed=1, epoch=2).tolist() == (
        permutation(first, seed=1, epoch=2).tolist()
    )
    assert permutation(first, seed=1, epoch=2).tolist() != (
        permutation(second, seed=1, epoch=2).tolist()
    )
    assert permutation(first, seed=1, epoch=2).tolist() != (
        permutation(first, seed=1, epoch=3).tolist()
    )


def test_a_batch_mixes_row_groups() -> None:
    layout = [[100] * 24]
    for step in keys_of(plan(layout, batch=48, unit=20)):
        assert len({key.split("/")[1] for key in step}) >= 12


def test_the_order_of_an_epoch_is_frozen() -> None:
    # A checkpoint of one version goes on in the next one: this must not change by accident.
    order = plan([[4, 3], [5]], batch=6, seed=7, epoch=1, unit=2)
    assert [sorted(step) for step in keys_of(order, seed=7, epoch=1)] == [
        ["0/0/1", "0/0/3", "0/1/2", "1/0/1", "1/0/2", "1/0/4"],
        ["0/0/0", "0/0/2", "0/1/0", "0/1/1", "1/0/0", "1/0/3"],
    ]


def test_every_rank_gets_rows_in_every_step_if_a_batch_has_one_for_each() -> None:
    order = plan([[300, 41], [7]], batch=24)
    for num_workers in WORKERS:
        for rank in range(num_workers):
            batches = batches_of(order, rank=rank, num_workers=num_workers)
            assert all(len(batch["label"]) for batch in batches)


def test_a_lane_uses_its_units_in_order() -> None:
    order = plan([[300, 41], [70]], batch=48, unit=5)
    for lane in range(NUM_LANES):
        batches = batches_of(order, rank=lane, num_workers=NUM_LANES)
        used = [key for batch in batches for key in batch["key"]]
        assert used == [key for unit in order.units_of([lane]) for key in read(unit)["key"]]


@pytest.mark.parametrize("num_workers", range(1, NUM_LANES + 1))
def test_the_lanes_are_dealt_to_the_workers_without_rest(num_workers: int) -> None:
    dealt = [lanes_of(rank, num_workers=num_workers) for rank in range(num_workers)]
    assert sorted(lane for lanes in dealt for lane in lanes) == list(range(NUM_LANES))
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


def test_image_label_and_key_stay_together() -> None:
    order = plan([[60, 50]], batch=32, unit=7)
    for batch in batches_of(order, rank=0, num_workers=1):
        rows = [int(key.rsplit("/", 1)[1]) for key in batch["key"]]
        assert batch["label"].tolist() == batch["image"].ravel().tolist() == rows
        assert batch["label"].dtype == np.int64
        assert batch["image"].dtype == np.uint8


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_data_that_ends_early_is_an_error(missing: int) -> None:
    order = plan([[100, 40]], batch=32, unit=10)
    blocks = [(unit.lane, read(unit)) for unit in order.units][:-missing]
    with pytest.raises(ValueError, match="the data ended at step"):
        list(assemble(order, blocks, lanes=range(NUM_LANES)))


def test_a_block_that_lost_a_row_is_an_error() -> None:
    order = plan([[100]], batch=32, unit=10)
    blocks = [(unit.lane, read(unit)) for unit in order.units]
    lane, short = blocks[2]
    blocks[2] = (
        lane,
        Batch(image=short["image"][1:], label=short["label"][1:], key=short["key"][1:]),
    )
    with pytest.raises(ValueError, match="the data ended at step"):
        list(assemble(order, blocks, lanes=range(NUM_LANES)))


def test_a_worker_holds_back_about_a_unit_a_lane() -> None:
    unit = 16
    order = plan([[400] * 12], batch=48, unit=unit)
    for num_workers in (1, 4, 24):
        lanes = lanes_of(0, num_workers=num_workers)
        pulled = 0

        def blocks(units: Sequence[Unit]) -> Iterator[tuple[int, Batch]]:
            nonlocal pulled
            for piece in units:
                pulled += piece.num_rows
                yield piece.lane, read(piece)

        used = 0
        for batch in assemble(order, blocks(order.units_of(lanes)), lanes=lanes):
            used += len(batch["label"])
            assert pulled - used <= 2 * unit * len(lanes)


@settings(max_examples=60, deadline=None)
@given(layouts, batch_sizes, unit_sizes, st.integers(1, NUM_LANES), st.data())
def test_an_epoch_begun_at_a_step_is_the_tail_of_the_whole_one_on_every_rank(
    layout, batch, unit, num_workers, data
) -> None:
    order = plan([*layout, [30]], batch=max(batch, num_workers), unit=unit)
    first_step = data.draw(st.integers(0, order.num_steps))
    for rank in range(num_workers):
        whole = list(batches_of(order, rank=rank, num_workers=num_workers))
        tail = list(batches_of(order, rank=rank, num_workers=num_workers, first_step=first_step))
        assert len(tail) == order.num_steps - first_step
        for one, other in zip(whole[first_step:], tail, strict=True):
            for name in ("image", "label", "key"):
                assert one[name].tolist() == other[name].tolist()


@settings(max_examples=30, deadline=None)
@given(layouts, st.integers(24, 300), unit_sizes, st.integers(1, 24), st.integers(1, 24), st.data())
def test_an_epoch_begun_by_other_workers_at_a_step_has_the_same_global_batches(
    layout, batch, unit, before, after, data
) -> None:
    order = plan([*layout, [30]], batch=batch, unit=unit)
    first_step = data.draw(st.integers(0, order.num_steps))
    whole = [sorted(step) for step in keys_of(order, num_workers=before)]
    ranks = [
        list(batches_of(order, rank=rank, num_workers=after, first_step=first_step))
        for rank in range(after)
    ]
    tail = [
        sorted(key for part in step for key in part["key"]) for step in zip(*ranks, strict=True)
    ]
    assert tail == whole[first_step:]


@settings(max_examples=60, deadline=None)
@given(layouts, batch_sizes, unit_sizes, st.data())
def test_only_units_that_later_steps_need_are_read_again(layout, batch, unit, data) -> None:
    order = plan(layout, batch=batch, unit=unit)
    first_step = data.draw(st.integers(0, order.num_steps))
    units = order.units_of(range(NUM_LANES), first_step=first_step)
    rows_left = int(order.batch_sizes[first_step:].sum())
    rows_read = sum(piece.num_rows for piece in units)
    assert rows_read == rows_left + order.rows_to_skip(first_step).sum()
    assert all(order.rows_to_skip(first_step) < unit)  # of one unit for each lane, never all of it
    assert [piece for piece in order.units if piece in set(units)] == units


@pytest.mark.parametrize("staged_bytes", [1, 40, 10**9])
def test_batches_are_the_same_however_many_are_put_together_at_a_time(
    monkeypatch: pytest.MonkeyPatch, staged_bytes: int
) -> None:
    plan_of_two = plan([[90, 41], [77]], batch=50, unit=7)
    expected = list(batches_of(plan_of_two, rank=1, num_workers=3))
    monkeypatch.setattr(order_module, "STAGED_BYTES", staged_bytes)
    found = list(batches_of(plan_of_two, rank=1, num_workers=3))
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one["key"].tolist() == other["key"].tolist()
        np.testing.assert_array_equal(one["image"], other["image"])
        np.testing.assert_array_equal(one["label"], other["label"])


def test_no_block_is_drawn_before_a_batch_needs_it() -> None:
    order = plan([[500]], batch=24, unit=4)
    drawn = 0

    def blocks() -> Iterator[tuple[int, Batch]]:
        nonlocal drawn
        for unit in order.units:
            drawn += 1
            yield unit.lane, read(unit)

    next(assemble(order, blocks(), lanes=range(NUM_LANES)))
    assert drawn == NUM_LANES  # one row of each lane, of four that its first unit has


def test_a_worker_without_a_sample_in_a_batch_is_an_error() -> None:
    order = plan([[40]], batch=2)
    with pytest.raises(ValueError, match="more workers"):
        list(batches_of(order, rank=5, num_workers=24))
