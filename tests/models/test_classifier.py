import pytest
import torch
from torch import Tensor, nn

from cnnray.errors import ModelError
from cnnray.models.classifier import Classifier, Normalize
from cnnray.models.registry import build_model, head_name

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def resnet(*, frozen_backbone: bool = False) -> Classifier:
    torch.manual_seed(0)
    backbone = build_model("resnet18", num_classes=4, channels=3, image_size=32)
    return Classifier(
        backbone,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        frozen_backbone=frozen_backbone,
        head=head_name(backbone, 4),
    )


@pytest.fixture
def images() -> Tensor:
    torch.manual_seed(1)
    return torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)


def test_normalisation_is_of_pixels_scaled_to_one() -> None:
    normalize = Normalize(mean=(0.5,), std=(0.25,))
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 1, 1, 3)
    # 51 / 255 = 0.2; (0.2 - 0.5) / 0.25 = -1.2
    torch.testing.assert_close(normalize(pixels), torch.tensor([-2.0, -1.2, 2.0]).view(1, 1, 1, 3))


def test_float_pixels_give_the_logits_of_the_same_bytes(images: Tensor) -> None:
    model = resnet().eval()
    assert torch.equal(model(images), model(images.float()))


def test_normalisation_travels_with_the_weights() -> None:
    state = resnet().state_dict()
    assert state["normalize.mean"].flatten().tolist() == pytest.approx(IMAGENET_MEAN)
    assert state["normalize.std"].flatten().tolist() == pytest.approx(IMAGENET_STD)


def test_normalisation_stays_float32_under_autocast(images: Tensor) -> None:
    normalize = Normalize(mean=IMAGENET_MEAN, std=IMAGENET_STD)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert normalize(images).dtype == torch.float32


def test_grey_images_are_not_broadcast_to_a_colour_model() -> None:
    with pytest.raises(ModelError, match="takes 3 channels, got 1"):
        resnet()(torch.zeros(1, 1, 32, 32))


@pytest.mark.parametrize(
    ("mean", "std"), [((), ()), ((0.5,), (0.5, 0.5)), ((0.5,), (0.0,)), ((0.5,), (1e-60,))]
)
def test_impossible_normalisation_is_refused(
    mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    with pytest.raises(ModelError, match="normalisation needs"):
        Normalize(mean=mean, std=std)


def test_features_are_what_the_head_turns_into_the_logits(images: Tensor) -> None:
    model = resnet().eval()
    features, logits = model.features_and_logits(images)
    assert features.shape == (2, 512)
    assert torch.equal(model.backbone.get_submodule("fc")(features), logits)
    assert torch.equal(logits, model(images))


def test_features_take_one_pass(images: Tensor) -> None:
    model = resnet().eval()
    passes: list[int] = []
    model.backbone.register_forward_hook(lambda *_: passes.append(1))
    model.features_and_logits(images)
    assert len(passes) == 1


def test_features_of_a_convolutional_head_are_averaged_over_positions(images: Tensor) -> None:
    backbone = build_model("squeezenet1_0", num_classes=4, channels=3, image_size=32)
    model = Classifier(backbone, mean=IMAGENET_MEAN, std=IMAGENET_STD, head="classifier.1")
    assert model.eval().embed(images).shape == (2, 512)


def test_features_leave_no_hook_behind(images: Tensor) -> None:
    model = resnet().eval()
    model.embed(images)
    assert not model.backbone.get_submodule("fc")._forward_pre_hooks


def test_features_need_the_name_of_the_head(images: Tensor) -> None:
    model = Classifier(nn.Flatten(), mean=IMAGENET_MEAN, std=IMAGENET_STD)
    with pytest.raises(ModelError, match="without the name of its head"):
        model.embed(images)


def test_training_a_frozen_backbone_moves_the_head_alone(images: Tensor) -> None:
    model = resnet(frozen_backbone=True)
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    model(images).square().mean().backward()
    optimizer.step()
    after = model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"backbone.fc.weight", "backbone.fc.bias"}  # no batch-norm statistics
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_training_a_whole_model_moves_batch_norm_statistics(images: Tensor) -> None:
    model = resnet().train()
    before = model.get_buffer("backbone.bn1.running_mean").clone()
    model(images)
    assert not torch.equal(model.get_buffer("backbone.bn1.running_mean"), before)


def test_the_head_of_a_frozen_backbone_is_in_training_mode() -> None:
    model = resnet(frozen_backbone=True).eval().train()
    assert model.backbone.get_submodule("fc").training
    assert not model.backbone.training
