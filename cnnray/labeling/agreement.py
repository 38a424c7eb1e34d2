"""Whether an engine gives the labels of the eager model, on a sample of a run's own images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from cnnray.images.transforms import as_tensor
from cnnray.labeling.decoding import Sample, SampleDecoder, images_of
from cnnray.labeling.plan import LabelPlan
from cnnray.models.engines import Engine
from cnnray.schema import PLAN_SCHEMA

SAMPLE_PARTS = 16
"""Parts of a plan that a sample is from, at most: each may be in another file of the plan."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """How many of some images have the same label twice."""

    same: int
    images: int

    @property
    def fraction(self) -> float | None:
        """Of the images; None of none."""
        return self.same / self.images if self.images else None

    def __str__(self) -> str:
        if not self.images:
            return "no image of the sample can be decoded, so no label was compared"
        labels = f"{self.same} of {self.images} labels as in eager"
        return f"{labels} ({self.same / self.images:.2%})"


def sample_plan(plan: LabelPlan, size: int) -> pa.Table:
    """Inputs from all over a plan (``PLAN_SCHEMA``), ``size`` at most; the same ones every time."""
    parts = spread(plan.num_parts, min(size, SAMPLE_PARTS))
    each = size // max(1, len(parts))
    tables = [planned.take(spread(planned.num_rows, each)) for _, planned in plan.read_parts(parts)]
    return pa.concat_tables([PLAN_SCHEMA.empty_table(), *tables])


def decode_good(samples: Sequence[Sample], decoder: SampleDecoder) -> Tensor:
    """The images of some samples as a model takes them, (N, C, S, S) uint8; bad ones are left out.

    Raises ``UnavailableError`` and ``AccessDeniedError``: no image is at fault.
    """
    decoded = decoder.decode(samples)
    is_good = decoded["error_code"].is_null().to_numpy()
    images = images_of(decoded, decoder.preprocessing)[is_good]
    return as_tensor(images).permute(0, 3, 1, 2)


def count_agreement(
    engine: Engine, reference: Engine, images: Tensor, *, batch_size: int
) -> Agreement:
    """Compare the labels that two engines give to (N, C, S, S) uint8 images."""
    batches = torch.split(images, batch_size) if len(images) else ()
    same = [_labels(engine, batch).eq(_labels(reference, batch)).sum().item() for batch in batches]
    return Agreement(same=int(sum(same)), images=len(images))


def _labels(engine: Engine, images: Tensor) -> Tensor:
    logits, _ = engine(images)
    return logits.argmax(dim=1).cpu()


def spread(number: int, count: int) -> list[int]:
    """``count`` of the numbers below ``number``, evenly; all of them where there are fewer."""
    chosen: Iterable[int] = np.linspace(0, number - 1, min(number, count)).astype(int)
    return [int(place) for place in chosen]
