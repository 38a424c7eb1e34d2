"""Counts of steps: what adding them up one by one would give, to the bit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from cnnray.training.counts import Counts, Pass
from cnnray.training.places import Tally


def steps_of(sizes: list[list[int]]) -> Iterator[list[Pass]]:
    generator = torch.Generator().manual_seed(0)
    for passes in sizes:
        yield [
            (torch.rand(size, generator=generator), torch.rand(size, generator=generator) < 0.3)
            for size in passes
        ]


def one_by_one(steps: list[list[Pass]]) -> list[float]:
    sums = torch.zeros(3, dtype=torch.float64)
    for passes in steps:
        step = torch.zeros(3, dtype=torch.float64)
        for losses, hits in passes:
            samples = torch.tensor(float(len(losses)), dtype=torch.float64)
            step += torch.stack([losses.double().sum(), hits.sum().double(), samples])
        sums += step
    return sums.tolist()


@pytest.mark.parametrize(
    "sizes",
    [
        [[32]] * 50 + [[45]],
        [[1], [7], [7], [1]],
        [[11, 11, 10]] * 20,  # several passes a step
        [[256]] * 60,
        [],
    ],
)
def test_counts_are_those_of_adding_up_each_step_to_the_bit(sizes: list[list[int]]) -> None:
    steps = list(steps_of(sizes))
    counts = Counts(Tally())
    for passes in steps:
        counts.add(passes)
    assert counts.tolist() == one_by_one(steps)


def test_a_look_in_between_changes_nothing() -> None:
    steps = list(steps_of([[32]] * 10))
    counts = Counts(Tally())
    for passes in steps:
        counts.add(passes)
        counts.tolist()
    assert counts.tolist() == counts.tolist() == one_by_one(steps)


def test_counts_go_on_from_those_of_a_place() -> None:
    counts = Counts(Tally(1.5, 2.0, 4.0))
    counts.add([(torch.tensor([0.5, 1.0]), torch.tensor([True, False]))])
    assert counts.tolist() == [3.0, 3.0, 6.0]
