"""The sample of a run that engines are compared on, and the comparison."""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa
import pytest
import torch
from torch import Tensor

from cnnray.errors import AccessDeniedError, MissingObjectError, StorageError
from cnnray.images.transforms import EvalTransform
from cnnray.labeling.agreement import (
    SAMPLE_PARTS,
    Agreement,
    count_agreement,
    decode_good,
    sample_plan,
)
from cnnray.labeling.commit import Run
from cnnray.labeling.decoding import Sample, SampleDecoder
from cnnray.models.bundle import Bundle

Begin = Callable[..., tuple[Run, bool]]


@pytest.mark.parametrize(
    ("images", "size", "chosen"),
    [
        (1, 8, [0]),
        (7, 100, [*range(7)]),
        (60, 5, [0, 12, 27, 42, 57]),  # a part has 3
        (8, 3, [0, 3, 6]),
    ],
)
def test_a_sample_is_from_all_over_the_plan_and_always_the_same(
    begin: Begin,
    inputs: Callable[..., pa.Table],
    images: int,
    size: int,
    chosen: list[int],
) -> None:
    run, _ = begin(inputs(*(f"{n:03d}" for n in range(images))))
    found = sample_plan(run.plan, size)
    assert found.equals(sample_plan(run.plan, size))
    keys = [int(key) for key in found["key"].to_pylist()]
    assert keys == chosen


def test_a_sample_is_from_a_few_parts_of_a_long_plan(
    begin: Begin, inputs: Callable[..., pa.Table]
) -> None:
    run, _ = begin(inputs(*(f"{n:03d}" for n in range(90))))
    keys = [int(key) for key in sample_plan(run.plan, 40)["key"].to_pylist()]
    parts = {key // 3 for key in keys}
    assert len(parts) == SAMPLE_PARTS
    assert (min(parts), max(parts)) == (0, 29)
    assert len(keys) == len(set(keys)) == 2 * SAMPLE_PARTS


def test_bad_images_are_no_part_of_a_comparison(
    make_bundle: Callable[..., Bundle], photo: Callable[[int], bytes]
) -> None:
    preprocessing = make_bundle().spec.preprocessing

    def images_of(*files: bytes | StorageError) -> Tensor:
        samples = [Sample(f"{number}", "etag", data) for number, data in enumerate(files)]
        return decode_good(samples, SampleDecoder(preprocessing))

    images = images_of(photo(0), b"", photo(1)[:-30], MissingObjectError("gone"), photo(2))
    transform = EvalTransform(preprocessing)
    expected = torch.stack([torch.from_numpy(transform(photo(n))) for n in (0, 2)])
    assert torch.equal(images, expected)
    assert len(images_of(b"", b"text")) == 0
    with pytest.raises(AccessDeniedError):
        images_of(AccessDeniedError("no right"))


class Labels:
    """An engine that labels an image with its first pixel, or with 0 if that is above a limit."""

    embeddings = False

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def __call__(self, images: Tensor) -> tuple[Tensor, None]:
        pixel = images[:, 0, 0, 0].long()
        return torch.nn.functional.one_hot(torch.where(pixel > self.limit, 0, pixel), 10), None


def test_labels_that_are_the_same_are_counted_over_all_batches() -> None:
    images = torch.arange(10, dtype=torch.uint8).view(-1, 1, 1, 1)
    agreement = count_agreement(Labels(limit=6), Labels(limit=9), images, batch_size=4)
    assert agreement == Agreement(same=7, images=10)
    assert agreement.fraction == 0.7
    assert str(agreement) == "7 of 10 labels as in eager (70.00%)"


def test_of_no_image_there_is_no_fraction() -> None:
    nothing = count_agreement(Labels(1), Labels(2), torch.zeros((0, 1, 1, 1)), batch_size=4)
    assert nothing.fraction is None
    assert "no label was compared" in str(nothing)
