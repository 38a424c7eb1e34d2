import sys

import pytest
import torch
from torch import nn

from cnnray.errors import ModelError
from cnnray.models.registry import (
    build_model,
    default_preprocessing,
    head_name,
    list_models,
    stem_name,
)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["torchvision/resnet18", "squeezenet1_0", "timm/resnet18.a1_in1k"])
def test_models_return_one_logit_a_class(name: str, channels: int) -> None:
    model = build_model(name, num_classes=4, channels=channels, image_size=32).eval()
    with torch.no_grad():
        logits = model(torch.zeros(2, channels, 32, 32))
    assert logits.shape == (2, 4)


@pytest.mark.parametrize("name", ["inception_v3", "googlenet"])
def test_auxiliary_heads_are_not_built(name: str) -> None:
    with torch.device("meta"):
        model = build_model(name, num_classes=4, channels=3, image_size=75)
    assert not [n for n, _ in model.named_parameters() if n.lower().startswith("aux")]


@pytest.mark.parametrize(
    ("name", "image_size"), [("vit_b_16", 32), ("timm/vit_tiny_patch16_224", 48)]
)
def test_transformers_are_built_for_the_image_size(name: str, image_size: int) -> None:
    model = build_model(name, num_classes=4, channels=3, image_size=image_size)
    positions = next(p for n, p in model.named_parameters() if "pos_embed" in n)
    assert (
        positions.shape[1] == (image_size // 16) ** 2 + 1
    )  # patches of 16 px, and the class token


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("tutorial_cnn", "head"),
        ("resnet18", "fc"),
        ("squeezenet1_0", "classifier.1"),
        ("mobilenet_v3_small", "classifier.3"),
        ("timm/resnet18", "fc"),
        ("timm/tf_efficientnet_lite0", "classifier"),
    ],
)
def test_the_head_is_the_layer_that_computes_the_logits(name: str, head: str) -> None:
    model = build_model(name, num_classes=4, channels=3, image_size=32)
    assert head_name(model, 4) == head


def test_the_head_is_the_last_of_several_layers_with_as_many_outputs() -> None:
    model = build_model("tutorial_cnn", num_classes=64, channels=3, image_size=8)  # dense: 64 too
    assert head_name(model, 64) == "head"


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(ModelError, match="no single classifier layer with 4 outputs"):
        head_name(nn.Sequential(nn.Linear(3, 5)), 4)


def test_a_distilled_model_with_two_heads_is_refused() -> None:
    name = "timm/deit_tiny_distilled_patch16_224"
    model = build_model(name, num_classes=4, channels=3, image_size=32)
    with pytest.raises(ModelError, match="no single classifier layer"):
        head_name(model, 4)


def test_a_grey_torchvision_model_treats_grey_as_the_colour_model_treats_equal_channels() -> None:
    torch.manual_seed(3)
    colour = build_model("squeezenet1_0", num_classes=4, channels=3, image_size=32).eval()
    torch.manual_seed(3)
    grey = build_model("squeezenet1_0", num_classes=4, channels=1, image_size=32).eval()
    images = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(grey(images), colour(images.expand(-1, 3, -1, -1)))


def test_the_stem_is_the_first_convolution() -> None:
    model = build_model("squeezenet1_0", num_classes=4, channels=3, image_size=32)
    assert stem_name(model) == "features.0"


def test_building_leaves_the_model_in_training_mode() -> None:
    assert build_model("squeezenet1_0", num_classes=4, channels=3, image_size=32).training


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [("resnet19", "resnet18"), ("timm/resnet19", "timm/resnet18"), ("tutorial", "tutorial_cnn")],
)
def test_an_unknown_name_suggests_close_ones(name: str, suggestion: str) -> None:
    with pytest.raises(
        ModelError, match=f"unknown model '{name}'\nhint: did you mean .*{suggestion}"
    ):
        build_model(name, num_classes=4, channels=3, image_size=32)


@pytest.mark.parametrize(
    "name",
    ["", "/", "timm/", "hf-hub:timm/resnet18", "timm/hf-hub:timm/resnet18", "timm/../resnet18"]
    + ["timm/resnet18.no_such_tag", "quantized_resnet18", "fasterrcnn_resnet50_fpn", "x" * 10**6],
)
def test_names_that_are_no_classifier_of_a_registry_are_refused(name: str) -> None:
    with pytest.raises(ModelError, match="unknown model"):
        build_model(name, num_classes=4, channels=3, image_size=32)


def test_a_missing_timm_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModelError, match=r"pip install 'cnnray\[timm\]'"):
        build_model("timm/resnet18", num_classes=4, channels=3, image_size=32)
    assert not any(name.startswith("timm/") for name in list_models())


@pytest.mark.parametrize(
    "argument",
    ["weights", "pretrained", "pretrained_cfg", "checkpoint_path", "cache_dir", "aux_logits"]
    + ["in_chans", "features_only"],
)
def test_arguments_that_load_files_or_change_the_contract_are_refused(argument: str) -> None:
    with pytest.raises(ModelError, match=f"model argument '{argument}' is not allowed"):
        build_model("timm/resnet18", num_classes=4, channels=3, image_size=32, **{argument: "x"})


def test_arguments_reach_the_constructor() -> None:
    model = build_model(
        "mobilenet_v3_small", num_classes=4, channels=3, image_size=32, dropout=0.75
    )
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.75]


def test_an_unknown_argument_is_a_model_error() -> None:
    with pytest.raises(ModelError, match="resnet18 does not work for .* 'colour'"):
        build_model("resnet18", num_classes=4, channels=3, image_size=32, colour=1)


@pytest.mark.parametrize(
    ("name", "image_size"), [("alexnet", 28), ("vit_b_16", 40), ("maxvit_t", 100)]
)
def test_an_image_size_that_the_model_cannot_take_is_a_model_error(
    name: str, image_size: int
) -> None:
    with pytest.raises(ModelError, match=f"{name} does not work for 3 x {image_size} px images"):
        build_model(name, num_classes=4, channels=3, image_size=image_size)


@pytest.mark.parametrize(
    ("num_classes", "channels", "image_size"), [(0, 3, 32), (4, 0, 32), (4, 3, 0), (4, 3, 10**9)]
)
def test_impossible_sizes_are_refused(num_classes: int, channels: int, image_size: int) -> None:
    with pytest.raises(ModelError, match="no model of"):
        build_model(
            "tutorial_cnn", num_classes=num_classes, channels=channels, image_size=image_size
        )


def test_list_models_names_each_family() -> None:
    assert {"tutorial_cnn", "resnet18", "vit_b_16", "timm/resnet18"} <= set(list_models())


def test_published_input_of_a_torchvision_model_is_imagenets() -> None:
    published = default_preprocessing("resnet18", pretrained=True)
    assert (published.size, published.crop_fraction) == (224, 224 / 256)
    assert published.interpolation == "bilinear"
    assert (published.mean, published.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_published_input_of_a_timm_model_is_its_configurations() -> None:
    published = default_preprocessing("timm/tf_efficientnet_lite0", pretrained=True)
    assert (published.size, published.crop_fraction) == (224, 0.875)
    assert published.interpolation == "bicubic"
    assert published.mean == published.std == (0.5, 0.5, 0.5)


def test_published_inception_sees_what_torchvisions_pretrained_model_sees() -> None:
    published = default_preprocessing("inception_v3", pretrained=True)
    imagenet_mean, imagenet_std = 0.485, 0.229  # of red, as its published transform normalises
    pixel = 0.7
    inside = (pixel - imagenet_mean) / imagenet_std * (imagenet_std / 0.5) + (
        imagenet_mean - 0.5
    ) / 0.5
    assert (pixel - published.mean[0]) / published.std[0] == pytest.approx(inside)


def test_without_published_weights_only_the_size_is_the_models() -> None:
    fresh = default_preprocessing("timm/resnet18", pretrained=False)
    assert (fresh.size, fresh.crop_fraction, fresh.mean) == (224, 1.0, (0.5, 0.5, 0.5))
