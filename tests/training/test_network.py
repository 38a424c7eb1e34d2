"""What the dataset, the model and the user say of the input, settled into one preprocessing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cnnray.datasets.manifest import Statistics
from cnnray.errors import ModelError, SettingsError
from cnnray.models.registry import default_preprocessing
from cnnray.training.network import Network, plan_preprocessing


def statistics(*, channels: int = 3, size: int | None = 28) -> Statistics:
    return Statistics(
        channels=channels,
        mean=(0.2, 0.4, 0.6)[:channels],
        std=(0.1, 0.2, 0.3)[:channels],
        min_width=size or 10,
        max_width=size or 500,
        min_height=size or 20,
        max_height=size or 400,
    )


def planned(name: str = "tutorial_cnn", **changes: Any) -> Any:
    given = changes.pop("statistics", statistics())
    return plan_preprocessing(name, given, **{"pretrained": False, **changes})


def test_small_images_that_are_all_alike_keep_their_size() -> None:
    found = planned()
    assert (found.size, found.resize) == (28, 28)
    assert planned("resnet18").size == 28


def test_images_of_different_sizes_get_the_models() -> None:
    found = planned("resnet18", statistics=statistics(size=None))
    assert (found.size, found.resize) == (224, 256)


def test_large_images_that_are_all_alike_are_made_smaller() -> None:
    assert planned("resnet18", statistics=statistics(size=1000)).size == 224


def test_a_pretrained_network_brings_its_own_preprocessing() -> None:
    published = default_preprocessing("resnet18", pretrained=True)
    found = planned("resnet18", pretrained=True)
    assert (found.mean, found.std) == (tuple(published.mean), tuple(published.std))
    assert (found.size, found.interpolation) == (published.size, published.interpolation)
    assert found.resize == round(published.size / published.crop_fraction)


def test_a_network_from_scratch_is_normalised_by_the_dataset() -> None:
    found = planned("resnet18")
    assert (found.mean, found.std) == ((0.2, 0.4, 0.6), (0.1, 0.2, 0.3))


@pytest.mark.parametrize(
    ("name", "channels", "expected"),
    [("tutorial_cnn", 1, 1), ("tutorial_cnn", 3, 3), ("resnet18", 1, 3), ("resnet18", 3, 3)],
)
def test_grey_datasets_are_grey_for_the_tutorials_network_alone(
    name: str, channels: int, expected: int
) -> None:
    found = planned(name, statistics=statistics(channels=channels))
    assert found.channels == len(found.mean) == len(found.std) == expected


def test_the_mean_of_one_channel_is_that_of_three() -> None:
    assert planned(channels=1).mean == pytest.approx((0.4,))
    assert planned("resnet18", statistics=statistics(channels=1)).mean == (0.2, 0.2, 0.2)


def test_what_the_user_says_is_done() -> None:
    found = planned("resnet18", size=64, resize=80, interpolation="bicubic", channels=1)
    assert (found.size, found.resize, found.interpolation) == (64, 80, "bicubic")
    assert found.channels == 1
    assert planned("resnet18", size=64).resize == round(64 / 0.875)


def test_a_crop_larger_than_the_image_is_refused_by_its_flags() -> None:
    with pytest.raises(ModelError, match=r"image settings: .*\nhint: see --image\.size"):
        planned(size=64, resize=32)


def network(seed: int = 3, *, freeze: bool = False) -> Network:
    return Network(
        name="tutorial_cnn",
        classes=("a", "b", "c"),
        preprocessing=planned(statistics=statistics(size=12)),
        weights=None,
        freeze_backbone=freeze,
        seed=seed,
    )


def test_every_worker_builds_the_same_network() -> None:
    one = network().build().state_dict()
    torch.manual_seed(999)
    other = network().build().state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    different = network(seed=4).build().state_dict()
    assert not all(torch.equal(one[name], different[name]) for name in one)


def test_it_maps_images_to_a_logit_a_class() -> None:
    assert network().build()(torch.zeros((2, 3, 12, 12), dtype=torch.uint8)).shape == (2, 3)


def test_a_frozen_backbone_trains_its_head_alone() -> None:
    model = network(freeze=True).build()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"backbone.head.weight", "backbone.head.bias"}


def test_the_bundle_says_what_was_trained() -> None:
    spec = network().describe(metrics={"val_loss": 0.5}, provenance={"seed": 3})
    assert (spec.architecture, spec.classes) == ("tutorial_cnn", ("a", "b", "c"))
    assert spec.preprocessing == network().preprocessing
    assert (spec.metrics, spec.provenance) == ({"val_loss": 0.5}, {"seed": 3})


def with_rates(name: str, **rates: float) -> Network:
    return Network(
        name=name,
        classes=("a", "b"),
        preprocessing=planned(name, size=64, resize=64),
        weights=None,
        freeze_backbone=False,
        seed=0,
        **rates,
    )


def regularised(name: str, **rates: float) -> torch.nn.Module:
    network = with_rates(name, **rates)
    with torch.device("meta"):
        return network._build_backbone(network._rates().values())


def dropout_rates(model: torch.nn.Module) -> set[float]:
    return {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}


def depth_rates(model: torch.nn.Module, *, kind: str, rate: str) -> list[float]:
    found = [module for module in model.modules() if type(module).__name__ == kind]
    return [getattr(module, rate) for module in found]


def test_dropout_and_drop_path_reach_the_layers_of_torchvision_and_timm() -> None:
    assert dropout_rates(regularised("efficientnet_b0", dropout=0.45)) == {0.45}
    assert (
        regularised("densenet121", dropout=0.45).features.denseblock1.denselayer1.drop_rate == 0.45
    )
    convnext = regularised("convnext_tiny", drop_path=0.3)
    assert max(depth_rates(convnext, kind="StochasticDepth", rate="p")) == pytest.approx(0.3)
    resnet = regularised("timm/resnet18", dropout=0.45, drop_path=0.3)
    assert resnet.drop_rate == 0.45
    assert max(depth_rates(resnet, kind="DropPath", rate="drop_prob")) == pytest.approx(0.3)


def test_rates_that_are_not_given_stay_the_models_own() -> None:
    assert dropout_rates(regularised("efficientnet_b0")) == {0.2}
    assert dropout_rates(regularised("efficientnet_b0", dropout=0.0)) == {0.0}


@pytest.mark.parametrize(
    ("name", "rates", "flag"),
    [
        ("tutorial_cnn", {"dropout": 0.1}, "dropout"),
        ("resnet18", {"dropout": 0.1}, "dropout"),
        ("resnet18", {"drop_path": 0.1}, "drop_path"),
        ("mobilenet_v3_small", {"dropout": 0.1, "drop_path": 0.1}, "drop_path"),
        ("timm/vgg11", {"dropout": 0.1, "drop_path": 0.1}, "drop_path"),
    ],
)
def test_a_model_without_the_rate_is_refused_with_the_flag(
    name: str, rates: dict[str, float], flag: str
) -> None:
    network = with_rates(name, **rates)
    with torch.device("meta"), pytest.raises(SettingsError, match=f"{name} has no {flag} that"):
        network.build()
