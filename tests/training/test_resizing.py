"""Progressive resizing: which sizes, what pixels, and models that cannot."""

from __future__ import annotations

import pytest
import torch
from torchvision.transforms import v2

from cnnray.errors import SettingsError
from cnnray.models.registry import build_model
from cnnray.training.loop import in_turn
from cnnray.training.resizing import Resizing, require_size


def test_images_grow_linearly_and_are_whole_in_the_last_fifth() -> None:
    resizing = Resizing(size=128, first=0.5, epochs=10, steps_per_epoch=3)
    sizes = [resizing.size_in(epoch) for epoch in range(10)]
    assert sizes == [64, 72, 80, 88, 96, 104, 112, 120, 128, 128]


@pytest.mark.parametrize("epochs", [1, 2, 3, 90])
@pytest.mark.parametrize("size", [5, 28, 224])
def test_sizes_never_fall_nor_exceed_the_whole(epochs: int, size: int) -> None:
    resizing = Resizing(size=size, first=0.3, epochs=epochs, steps_per_epoch=1)
    sizes = [resizing.size_in(epoch) for epoch in range(epochs)]
    assert sizes == sorted(sizes)
    assert sizes[0] >= 4
    assert sizes[-1] == size


def test_an_epochs_steps_have_its_size() -> None:
    resizing = Resizing(size=16, first=0.5, epochs=2, steps_per_epoch=3)
    image, label = torch.zeros(2, 3, 16, 16, dtype=torch.uint8), torch.tensor([0, 1])
    sizes = [resizing(image, label, step)[0].shape[2:] for step in range(6)]
    assert sizes == [(8, 8)] * 3 + [(16, 16)] * 3


def test_smaller_images_are_torchvisions() -> None:
    image = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    resizing = Resizing(size=32, first=0.5, epochs=9, steps_per_epoch=1)
    small, label = resizing(image.to(torch.uint8), torch.tensor([3, 4]), 0)
    expected = v2.functional.resize(image.float(), [16, 16], antialias=True)
    torch.testing.assert_close(small, expected)
    assert small.is_contiguous(memory_format=torch.channels_last)
    assert label.tolist() == [3, 4]


def test_whole_images_are_left_as_they_are() -> None:
    image = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    resizing = Resizing(size=32, first=0.5, epochs=9, steps_per_epoch=1)
    assert resizing(image, torch.tensor([0]), 8)[0] is image


def test_a_model_that_takes_one_size_only_is_refused() -> None:
    model = build_model("tutorial_cnn", num_classes=3, channels=3, image_size=32)
    require_size(model, channels=3, size=32)
    with pytest.raises(SettingsError, match="takes no images of 16 px"):
        require_size(model, channels=3, size=16)


def test_a_model_of_any_size_is_taken() -> None:
    require_size(
        build_model("squeezenet1_1", num_classes=3, channels=3, image_size=96), channels=3, size=64
    )


def test_transforms_follow_each_other_and_are_told_the_step() -> None:
    def add(image: torch.Tensor, label: torch.Tensor, step: int):
        return image + step, label

    def double(image: torch.Tensor, label: torch.Tensor, step: int):
        return 2 * image, label + 1

    image, label = in_turn([add, double])(torch.tensor([1.0]), torch.tensor([5]), 3)
    assert (image.item(), label.item()) == (8.0, 6)
