"""The balanced sampler: equal classes, equal rows, and all that the order promises of an epoch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnnray.datasets.order import (
    Batch,
    EpochOrder,
    RowGroup,
    assemble,
    lanes_of,
    plan_epoch,
    row_groups_of,
)
from cnnray.datasets.sampling import BalancedSampler, EpochSample, spread_copies

label_lists = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=60), min_size=1, max_size=6)


def sampler(labels: Sequence[Sequence[int]], *, seed: int = 0) -> BalancedSampler:
    groups = row_groups_of([[len(some)] for some in labels])
    return BalancedSampler(
        {group: np.array(some) for group, some in zip(groups, labels, strict=True)}, seed=seed
    )


def long_tail() -> list[list[int]]:
    """Six row groups with 300, 30 and 3 rows of the classes 0, 1 and 3."""
    labels = np.random.default_rng(1).permutation([0] * 300 + [1] * 30 + [3] * 3)
    return [part.tolist() for part in np.array_split(labels, 6)]


def plan(sample: EpochSample, *, batch: int = 48, unit: int = 16) -> EpochOrder:
    return plan_epoch(
        sample.row_groups, seed=0, epoch=0, global_batch_size=batch, max_unit_rows=unit
    )


def taken(sample: EpochSample, order: EpochOrder) -> Counter[tuple[int, int, int]]:
    """(shard, row, copy) of every sample of an epoch, as readers find them."""
    found: Counter[tuple[int, int, int]] = Counter()
    for unit in order.units:
        picks = sample.pick(unit)
        assert len(picks.rows) == len(picks.copies) == unit.num_rows
        shard = unit.row_group.shard
        found.update((shard, *pick) for pick in zip(picks.rows, picks.copies, strict=True))
    return found


def test_every_class_is_taken_equally_often_however_rare_it_is() -> None:
    labels = long_tail()
    sample = sampler(labels).sample(0)
    classes = Counter(labels[shard][row] for shard, row, _ in taken(sample, plan(sample)))
    assert classes == {0: 111, 1: 111, 3: 111}  # 333 rows


@settings(max_examples=60, deadline=None)
@given(label_lists, st.integers(0, 2**63 - 1), st.integers(0, 1000), st.integers(1, 40))
def test_an_epoch_has_as_many_samples_as_rows_and_equal_shares_of_classes_and_rows(
    labels, seed, epoch, unit
) -> None:
    sample = sampler(labels, seed=seed).sample(epoch)
    found = taken(sample, plan(sample, unit=unit))
    assert set(found.values()) == {1}  # a copy of a row comes once
    assert len(found) == sum(map(len, labels))
    times = Counter((shard, row) for shard, row, _ in found)
    rows = [(shard, row) for shard, some in enumerate(labels) for row in range(len(some))]
    by_class: dict[int, list[int]] = {}
    for shard, row in rows:
        by_class.setdefault(labels[shard][row], []).append(times[shard, row])
        assert all((shard, row, copy) in found for copy in range(times[shard, row]))
    assert all(max(some) - min(some) <= 1 for some in by_class.values())
    totals = [sum(some) for some in by_class.values()]
    assert max(totals) - min(totals) <= 1


def test_the_rows_of_a_frequent_class_take_turns() -> None:
    labels = long_tail()
    seen: Counter[tuple[int, int]] = Counter()
    for epoch in range(30):
        sample = sampler(labels).sample(epoch)
        seen.update((shard, row) for shard, row, _ in taken(sample, plan(sample)))
    times = [
        seen[shard, row]
        for shard, some in enumerate(labels)
        for row, label in enumerate(some)
        if label == 0
    ]
    assert sum(times) == 30 * 111
    assert min(times) > 0  # 11 of 30 on average
    assert max(times) < 24


def test_a_sample_is_that_of_seed_and_epoch() -> None:
    def found(seed: int, epoch: int) -> Counter[tuple[int, int, int]]:
        sample = sampler(long_tail(), seed=seed).sample(epoch)
        return taken(sample, plan(sample))

    assert found(1, 2) == found(1, 2)
    assert found(1, 2) != found(1, 3)
    assert found(1, 2) != found(2, 2)


def batches_of(
    sample: EpochSample, order: EpochOrder, *, rank: int, num_workers: int
) -> Iterator[Batch]:
    lanes = lanes_of(rank, num_workers=num_workers)

    def blocks() -> Iterator[tuple[int, Batch]]:
        for unit in order.units_of(lanes):
            picks = sample.pick(unit)
            names = [
                f"{unit.row_group.shard}/{row}/{copy}"
                for row, copy in zip(picks.rows, picks.copies, strict=True)
            ]
            yield (
                unit.lane,
                Batch(
                    image=picks.rows.astype(np.uint8).reshape(-1, 1, 1, 1),
                    label=picks.rows,
                    key=np.array(names, dtype=object),
                ),
            )

    return assemble(order, blocks(), lanes=lanes)


@pytest.mark.parametrize("num_workers", [2, 3, 4, 8])
def test_a_global_batch_holds_the_same_samples_for_any_number_of_workers(num_workers: int) -> None:
    sample = sampler(long_tail()).sample(3)
    order = plan(sample)

    def keys(count: int) -> list[list[str]]:
        ranks = [batches_of(sample, order, rank=n, num_workers=count) for n in range(count)]
        steps = zip(*ranks, strict=True)
        return [sorted(key for part in step for key in part["key"]) for step in steps]

    alone = keys(1)
    assert [len(step) for step in alone] == order.batch_sizes.tolist()
    assert keys(num_workers) == alone


def test_the_copies_of_a_row_are_spread_over_its_row_group() -> None:
    sample = sampler([[0] * 199 + [1]]).sample(0)  # 100 copies of the last row
    [group] = sample.row_groups
    for unit in plan(sample, unit=20).units:
        share = (sample.pick(unit).rows == 199).mean()
        assert unit.num_rows < 8 or 0 < share < 1
    assert group.num_rows == 200


def test_copies_in_a_dimension_of_their_own_become_samples() -> None:
    image = np.arange(2 * 3 * 4).reshape(2, 3, 1, 2, 2).astype(np.uint8)
    batch = Batch(image=image, label=np.array([7, 8]), key=np.array(["a", "b"], dtype=object))
    spread = spread_copies(batch)
    assert spread["image"].shape == (6, 1, 2, 2)
    assert spread["label"].tolist() == [7, 7, 7, 8, 8, 8]
    assert spread["key"].tolist() == ["a", "a", "a", "b", "b", "b"]
    np.testing.assert_array_equal(spread["image"][4], image[1, 1])
    alone = Batch(image=image[:, 0], label=batch["label"], key=batch["key"])
    assert spread_copies(alone) is alone


def test_the_order_cuts_batches_of_images_with_their_copies() -> None:
    order = plan_epoch(
        row_groups_of([[50, 30]]), seed=0, epoch=0, global_batch_size=32, max_unit_rows=9
    )

    def blocks() -> Iterator[tuple[int, Batch]]:
        for unit in order.units:
            rows = np.arange(unit.start, unit.stop) + 50 * unit.row_group.index
            image = np.tile(rows.astype(np.uint8).reshape(-1, 1, 1, 1, 1), (1, 4, 1, 1, 1))
            yield unit.lane, Batch(image=image, label=rows, key=rows.astype(object))

    batches = [spread_copies(batch) for batch in assemble(order, blocks(), lanes=range(24))]
    assert [len(batch["label"]) for batch in batches] == (4 * order.batch_sizes).tolist()
    for batch in batches:
        assert batch["image"].ravel().tolist() == batch["label"].tolist()
    assert Counter(np.concatenate([batch["label"] for batch in batches])) == dict.fromkeys(
        range(80), 4
    )


def test_of_no_rows_there_is_no_sample() -> None:
    assert BalancedSampler({}, seed=0).sample(0).row_groups == []


def test_a_balanced_split_is_taken_whole() -> None:
    sample = sampler([[0, 1], [1, 0]]).sample(5)
    assert [counts.tolist() for counts in sample.counts.values()] == [[1, 1], [1, 1]]
    assert sample.row_groups == [RowGroup(0, 0, 2), RowGroup(1, 0, 2)]


def test_the_sample_of_an_epoch_is_frozen() -> None:
    # A checkpoint of one version goes on in the next one: this must not change by accident.
    sample = sampler([[0, 0, 0, 1], [0, 0, 1, 2]], seed=7).sample(1)
    assert [counts.tolist() for counts in sample.counts.values()] == [[1, 1, 0, 1], [1, 0, 1, 3]]
    order = plan_epoch(
        sample.row_groups, seed=7, epoch=1, global_batch_size=4, max_unit_rows=9, num_lanes=1
    )
    picks = {unit.row_group.shard: sample.pick(unit) for unit in order.units}
    assert [picks[shard].rows.tolist() for shard in (0, 1)] == [[1, 3, 0], [3, 3, 0, 3, 2]]
    assert [picks[shard].copies.tolist() for shard in (0, 1)] == [[0, 0, 0], [0, 1, 0, 2, 0]]
