import pytest
import torch

from cnnray.errors import ModelError
from cnnray.models.tutorial import TutorialCNN


@pytest.mark.parametrize("image_size", [4, 8, 9, 10, 11, 28, 128])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_size_from_4_px_gives_one_logit_a_class(image_size: int, channels: int) -> None:
    model = TutorialCNN(5, channels, image_size)
    assert model(torch.zeros(2, channels, image_size, image_size)).shape == (2, 5)


def test_parameters_are_those_of_the_tutorial_at_28_px() -> None:
    model = TutorialCNN(10, 1, 28)
    counts = [parameter.numel() for parameter in model.parameters()]
    # conv1 9*32+32 = 320, conv2 9*32*64+64 = 18,496, dense 5*5*64*64+64 = 102,464, head 650
    assert sum(counts) == 121_930


def test_images_below_4_px_are_refused() -> None:
    with pytest.raises(ModelError, match="needs images of 4 px, got 3"):
        TutorialCNN(5, 3, 3)


def test_weights_start_as_in_keras() -> None:
    torch.manual_seed(0)
    dense = TutorialCNN(10, 1, 28).dense
    assert not dense.bias.any()
    limit = (6 / (1600 + 64)) ** 0.5  # Glorot uniform: sqrt(6 / (fan in + fan out))
    assert 0.99 * limit < dense.weight.abs().max() <= limit
