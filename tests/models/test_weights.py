import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from cnnray.errors import MissingObjectError, ModelError
from cnnray.models.classifier import Classifier
from cnnray.models.registry import build_model
from cnnray.models.weights import freeze_backbone, load_weights

REAL_WEIGHTS = (
    Path(__file__).parents[3] / "shared" / "data" / "weights" / "tf_efficientnet_lite0.safetensors"
)


def small_model(*, num_classes: int = 3, channels: int = 3, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build_model("tutorial_cnn", num_classes=num_classes, channels=channels, image_size=8)


@pytest.fixture
def save(tmp_path: Path) -> Callable[[dict[str, Tensor]], str]:
    def write(tensors: dict[str, Tensor]) -> str:
        path = tmp_path / "weights.safetensors"
        safetensors.torch.save_file(tensors, path)
        return str(path)

    return write


Save = Callable[[dict[str, Tensor]], str]


def test_a_file_of_the_same_model_is_loaded_whole(save: Save) -> None:
    saved, model = small_model(seed=1), small_model(seed=2)
    assert load_weights(model, save(saved.state_dict()), num_classes=3) == []
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(model(images), saved(images))


def test_a_head_for_other_classes_is_new_and_finds_them_equally_likely(save: Save) -> None:
    saved, model = small_model(num_classes=10, seed=1), small_model(num_classes=3, seed=2)
    replaced = load_weights(model, save(saved.state_dict()), num_classes=3)
    assert replaced == ["head.bias", "head.weight"]
    assert torch.equal(model(torch.rand(2, 3, 8, 8)), torch.zeros(2, 3))
    assert torch.equal(model.get_parameter("conv1.weight"), saved.get_parameter("conv1.weight"))


def test_a_file_without_a_head_replaces_it(save: Save) -> None:
    body = {n: t for n, t in small_model().state_dict().items() if not n.startswith("head.")}
    assert load_weights(small_model(), save(body), num_classes=3) == ["head.bias", "head.weight"]


def test_half_a_head_replaces_the_whole_head(save: Save) -> None:
    saved, model = small_model(seed=1), small_model(seed=2)
    tensors = saved.state_dict()
    del tensors["head.bias"]
    load_weights(model, save(tensors), num_classes=3)
    assert not model.get_parameter("head.weight").any()


def test_a_bundles_weights_are_loaded_without_their_normalisation(save: Save) -> None:
    saved, model = small_model(seed=1), small_model(seed=2)
    bundled = Classifier(saved, mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 1.0))
    assert load_weights(model, save(bundled.state_dict()), num_classes=3) == []
    assert torch.equal(model.get_parameter("head.weight"), saved.get_parameter("head.weight"))


def test_half_precision_weights_become_the_models_float32(save: Save) -> None:
    saved, model = small_model(seed=1), small_model(seed=2)
    load_weights(model, save({n: t.half() for n, t in saved.state_dict().items()}), num_classes=3)
    weight = model.get_parameter("conv1.weight")
    assert weight.dtype == torch.float32
    assert torch.equal(weight, saved.get_parameter("conv1.weight").half().float())


def test_a_colour_stem_is_summed_for_a_grey_model(save: Save) -> None:
    colour, grey = small_model(seed=1), small_model(channels=1, seed=2)
    load_weights(grey, save(colour.state_dict()), num_classes=3)
    images = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(grey(images), colour(images.expand(-1, 3, -1, -1)))


def test_batch_counters_may_be_missing(save: Save) -> None:
    model = build_model("resnet18", num_classes=3, channels=3, image_size=32)
    tensors = {n: t for n, t in model.state_dict().items() if "num_batches_tracked" not in n}
    assert load_weights(model, save(tensors), num_classes=3) == []


def test_auxiliary_heads_of_published_files_are_dropped(save: Save) -> None:
    model = small_model()
    tensors = model.state_dict() | {"AuxLogits.fc.weight": torch.zeros(1)}
    assert load_weights(model, save(tensors), num_classes=3) == []


def test_missing_and_unexpected_tensors_are_counted_and_named(save: Save) -> None:
    tensors = {f"layer.{i}": torch.zeros(1) for i in range(5)} | small_model().state_dict()
    del tensors["conv2.weight"]
    with pytest.raises(
        ModelError,
        match=r"1 missing tensors \('conv2.weight'\), 5 unexpected tensors "
        r"\('layer.0', 'layer.1', 'layer.2', \.\.\.\)",
    ):
        load_weights(small_model(), save(tensors), num_classes=3)


def test_a_wrong_shape_outside_of_the_head_is_refused_and_nothing_is_copied(save: Save) -> None:
    tensors = small_model(seed=1).state_dict() | {"dense.weight": torch.zeros(64, 100)}
    model = small_model(seed=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ModelError, match=r"dense.weight is float32\[64, 100\], the model's is"):
        load_weights(model, save(tensors), num_classes=3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_whole_numbers_in_place_of_weights_are_refused(save: Save) -> None:
    tensors = small_model().state_dict()
    tensors["conv1.bias"] = torch.zeros(32, dtype=torch.int64)
    with pytest.raises(ModelError, match=r"conv1.bias is int64\[32\]"):
        load_weights(small_model(), save(tensors), num_classes=3)


def test_nan_weights_are_refused(save: Save) -> None:
    tensors = small_model().state_dict()
    tensors["conv1.bias"] = torch.full((32,), torch.nan)
    with pytest.raises(ModelError, match=r"1 tensors hold NaN or infinity \('conv1.bias'\)"):
        load_weights(small_model(), save(tensors), num_classes=3)


class Canary:
    """A pickle that leaves a file behind when somebody loads it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("as_torch_file", [True, False])
def test_a_pickle_is_refused_without_running_it(tmp_path: Path, as_torch_file: bool) -> None:
    canary, weights = tmp_path / "canary", tmp_path / "weights.safetensors"
    if as_torch_file:
        torch.save({"weight": Canary(canary)}, weights)
    else:
        weights.write_bytes(pickle.dumps({"weight": Canary(canary)}))
    with pytest.raises(ModelError, match="not a safetensors file"):
        load_weights(small_model(), str(weights), num_classes=3)
    assert not canary.exists()


@pytest.mark.parametrize(
    "data",
    [b"", b"\x00" * 8, b"\xff" * 64, b"\x02\x00\x00\x00\x00\x00\x00\x00{}"]
    + [
        len(header).to_bytes(8, "little") + header + bytes(8)
        for header in (
            b'{"w":{"dtype":"F4","shape":[2],"data_offsets":[0,8]}}',
            b'{"w":{"dtype":"F32","shape":[9999999],"data_offsets":[0,8]}}',
            b'{"w":{"dtype":"F32","shape":[-1],"data_offsets":[0,8]}}',
        )
    ],
)
def test_hostile_bytes_are_model_errors(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(data)
    with pytest.raises(ModelError):
        load_weights(small_model(), str(path), num_classes=3)


def test_an_absent_file_is_a_missing_object(tmp_path: Path) -> None:
    with pytest.raises(MissingObjectError):
        load_weights(small_model(), str(tmp_path / "no.safetensors"), num_classes=3)


def test_freezing_leaves_only_the_head_to_learn() -> None:
    model = small_model()
    freeze_backbone(model, "head")
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert learning == ["head.weight", "head.bias"]


@pytest.mark.shared_data
@pytest.mark.skipif(not REAL_WEIGHTS.exists(), reason="no ../shared/data beside the project")
def test_published_efficientnet_weights_fit_the_timm_model() -> None:
    name = "timm/tf_efficientnet_lite0"
    model = build_model(name, num_classes=1000, channels=3, image_size=64)
    assert load_weights(model, str(REAL_WEIGHTS), num_classes=1000) == []
