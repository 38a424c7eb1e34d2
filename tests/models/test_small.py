import pytest
import torch

from cnnray.errors import ModelError
from cnnray.models.registry import build_model
from cnnray.models.small import SmallCNN


@pytest.mark.parametrize("image_size", [8, 9, 28, 64])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_size_from_8_px_gives_one_logit_a_class(image_size: int, channels: int) -> None:
    model = SmallCNN(5, channels, image_size)
    assert model(torch.zeros(2, channels, image_size, image_size)).shape == (2, 5)


def test_images_from_40_px_on_have_one_more_stage_and_no_other_size_matters() -> None:
    counts = [
        sum(parameter.numel() for parameter in SmallCNN(10, 1, size).parameters())
        for size in (8, 28, 39, 40, 64)
    ]
    assert counts[0] == counts[1] == counts[2] < counts[3] == counts[4]


def test_images_below_8_px_are_refused() -> None:
    with pytest.raises(ModelError, match="needs images of 8 px, got 7"):
        SmallCNN(5, 3, 7)


def test_its_dropout_can_be_set_and_nothing_else() -> None:
    model = build_model("small_cnn", num_classes=3, channels=1, image_size=28, dropout=0.3)
    assert [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)] == [0.3]
    with pytest.raises(ModelError, match="does not take"):
        build_model("small_cnn", num_classes=3, channels=1, image_size=28, width=3)
