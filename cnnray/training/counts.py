"""Loss, hits and samples of one rank's steps, without work for each step but to keep its results.

A step of a small network takes a few milliseconds, and a dozen small operations on the device to
add its counts up would be several percent of that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple
from itertools import groupby

import torch
from torch import Tensor

from cnnray.training.places import Tally

Pass = tuple[Tensor, Tensor]
"""(B,) losses, and (B,) whether the label has the highest logit; on the device."""


class Counts:
    """Additive counts of the steps so far; those since the last look are still on the device."""

    def __init__(self, begin: Tally) -> None:
        self.sums: list[float] = list(astuple(begin))
        self.waiting: list[Sequence[Pass]] = []

    def add(self, passes: Sequence[Pass]) -> None:
        """Take note of a step, of one or more forward passes."""
        self.waiting.append(passes)

    def tolist(self) -> list[float]:
        """(loss sum, correct, samples) of all steps; waits for the device."""
        sums = _sums_of([part for passes in self.waiting for part in passes])
        for passes in self.waiting:
            # First a step's own sum, then all steps': the same number however often one looks.
            step = [sum(values) for values in zip(*(next(sums) for _ in passes), strict=True)]
            self.sums = [so_far + more for so_far, more in zip(self.sums, step, strict=True)]
        self.waiting = []
        return list(self.sums)


def _sums_of(passes: Sequence[Pass]) -> Iterator[tuple[float, float, float]]:
    """(loss sum, correct, samples) of each pass, by a few operations for all of one size."""
    for size, alike in groupby(passes, key=lambda one: len(one[0])):
        losses, hits = (torch.stack(values) for values in zip(*alike, strict=True))
        both = torch.stack([losses.double().sum(1), hits.sum(1).double()], dim=1)
        for loss_sum, correct in both.tolist():
            yield loss_sum, correct, float(size)
