import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from cnnray.errors import AlreadyExistsError, ModelError
from cnnray.models.bundle import (
    BundleSpec,
    load_bundle,
    open_bundle,
    read_bundle_spec,
    save_bundle,
)
from cnnray.models.classifier import Classifier
from cnnray.models.registry import build_model, head_name
from cnnray.storage import Store, open_store, sha256


def rewrite(store: Store, **changes: Any) -> None:
    """Change fields of model.json; None removes one."""
    document = json.loads(store.read("model.json")) | changes
    kept = {name: value for name, value in document.items() if value is not None}
    store.write("model.json", json.dumps(kept).encode())


def replace_weights(store: Store, data: bytes) -> None:
    """Put other weights in the bundle, with the digest of an attacker who knows the format."""
    store.write("model.safetensors", data)
    rewrite(store, weights_sha256=sha256(data))


def test_a_loaded_bundle_gives_bit_identical_logits(
    store: Store, classifier: Classifier, spec: BundleSpec
) -> None:
    digest = save_bundle(store, classifier, spec)
    bundle = load_bundle(store)
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(bundle.model(images), classifier(images))
    assert (bundle.spec, bundle.digest) == (spec, digest)
    assert not bundle.model.training
    assert bundle.model.embed(images).shape == (4, 64)


def test_a_bundle_of_a_model_with_arguments_and_batch_norm_loads(
    store: Store, spec: BundleSpec
) -> None:
    name = "mobilenet_v3_small"
    backbone = build_model(name, num_classes=3, channels=3, image_size=32, dropout=0.5)
    preprocessing = replace(spec.preprocessing, size=32, resize=36)
    model = Classifier(backbone, mean=preprocessing.mean, std=preprocessing.std)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    model(images)  # moves the batch-norm statistics
    spec = replace(
        spec,
        architecture=name,
        arguments={"dropout": 0.5},
        preprocessing=preprocessing,
    )
    save_bundle(store, model, spec)
    assert torch.equal(load_bundle(store).model(images), model.eval()(images))


def test_the_spec_is_read_without_the_weights(
    store: Store, classifier: Classifier, spec: BundleSpec
) -> None:
    save_bundle(store, classifier, spec)
    store.delete("model.safetensors")
    assert read_bundle_spec(store) == spec


def test_an_opened_bundle_is_whole_and_its_network_is_built_when_it_is_asked_for(
    store: Store, classifier: Classifier, spec: BundleSpec
) -> None:
    digest = save_bundle(store, classifier, spec)
    rewrite(store, architecture={"name": "of another version", "arguments": {}})
    opened = open_bundle(store)  # builds nothing yet
    assert (opened.spec.classes, opened.digest != digest) == (spec.classes, True)
    with pytest.raises(ModelError, match="of another version"):
        opened.load()

    replace_weights(store, b"other")
    store.write("model.safetensors", b"and again others")
    with pytest.raises(ModelError, match="its digest differs"):
        open_bundle(store)


def test_weights_are_float32_with_the_normalisation(
    store: Store, classifier: Classifier, spec: BundleSpec
) -> None:
    save_bundle(store, classifier.double(), spec)
    tensors = safetensors.torch.load(store.read("model.safetensors"))
    assert {"normalize.mean", "normalize.std", "backbone.head.weight"} <= set(tensors)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_saving_the_same_bundle_again_succeeds(
    store: Store, classifier: Classifier, spec: BundleSpec
) -> None:
    assert save_bundle(store, classifier, spec) == save_bundle(store, classifier, spec)


def test_another_bundle_is_not_overwritten(
    store: Store, classifier: Classifier, spec: BundleSpec
) -> None:
    save_bundle(store, classifier, spec)
    with pytest.raises(AlreadyExistsError):
        save_bundle(store, classifier, replace(spec, temperature=2.0))


@pytest.mark.parametrize(
    ("change", "is_same_model"),
    [
        ({"metrics": {"val_accuracy": 0.1}}, True),
        ({"provenance": {}}, True),
        ({"temperature": 2.0}, False),
        ({"classes": ("dog", "cat", "Ä/\u732b")}, False),
    ],
)
def test_the_digest_covers_what_changes_predictions(
    tmp_path: Path,
    classifier: Classifier,
    spec: BundleSpec,
    change: dict[str, Any],
    is_same_model: bool,
) -> None:
    first = save_bundle(open_store(str(tmp_path / "a")), classifier, spec)
    second = save_bundle(open_store(str(tmp_path / "b")), classifier, replace(spec, **change))
    assert (first == second) is is_same_model


def test_the_digest_covers_the_resize(
    tmp_path: Path, classifier: Classifier, spec: BundleSpec
) -> None:
    other = replace(spec, preprocessing=replace(spec.preprocessing, resize=12))
    first = save_bundle(open_store(str(tmp_path / "a")), classifier, spec)
    assert save_bundle(open_store(str(tmp_path / "b")), classifier, other) != first


def test_the_digest_covers_the_weights(
    tmp_path: Path, classifier: Classifier, spec: BundleSpec
) -> None:
    first = save_bundle(open_store(str(tmp_path / "a")), classifier, spec)
    with torch.no_grad():
        classifier.get_parameter("backbone.head.bias").add_(1)
    assert save_bundle(open_store(str(tmp_path / "b")), classifier, spec) != first


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_not_saved(
    store: Store, classifier: Classifier, spec: BundleSpec, value: float
) -> None:
    with torch.no_grad():
        classifier.get_parameter("backbone.head.bias")[0] = value
    with pytest.raises(ModelError, match="NaN or infinity"):
        save_bundle(store, classifier, spec)
    assert store.head("model.safetensors") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": ("cat", "dog")}, "no single classifier layer with 2 outputs"),
        ({"classes": ("cat", "dog", "cat")}, "classes is malformed: a name appears twice"),
        ({"metrics": {"loss": float("nan")}}, "not JSON"),
        ({"provenance": {"when": object()}}, "not JSON"),
        ({"arguments": {"weights": "DEFAULT"}}, "'weights' is not allowed"),
    ],
)
def test_a_spec_that_could_not_be_loaded_is_not_saved(
    store: Store, classifier: Classifier, spec: BundleSpec, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        save_bundle(store, classifier, replace(spec, **change))
    assert store.head("model.safetensors") is None


def test_preprocessing_that_the_model_does_not_apply_is_not_saved(
    store: Store, classifier: Classifier, spec: BundleSpec
) -> None:
    other = replace(spec, preprocessing=replace(spec.preprocessing, mean=(0.0, 0.0, 0.0)))
    with pytest.raises(ModelError, match="preprocessing's mean is not the one"):
        save_bundle(store, classifier, other)


def test_a_folder_without_model_json_is_no_bundle(store: Store) -> None:
    with pytest.raises(ModelError, match="no bundle at .*bundle\nhint"):
        load_bundle(store)


def test_weights_without_model_json_are_no_bundle(
    store: Store, classifier: Classifier, spec: BundleSpec
) -> None:
    save_bundle(store, classifier, spec)
    store.delete("model.json")
    with pytest.raises(ModelError, match="no bundle at"):
        load_bundle(store)


def test_a_bundle_without_weights_is_refused(
    store: Store, classifier: Classifier, spec: BundleSpec
) -> None:
    save_bundle(store, classifier, spec)
    store.delete("model.safetensors")
    with pytest.raises(ModelError, match="the bundle has no weights"):
        load_bundle(store)


def test_one_flipped_bit_in_the_weights_is_refused(
    store: Store, classifier: Classifier, spec: BundleSpec
) -> None:
    save_bundle(store, classifier, spec)
    data = bytearray(store.read("model.safetensors"))
    data[-1] ^= 1
    store.write("model.safetensors", bytes(data))
    with pytest.raises(ModelError, match="its digest differs"):
        load_bundle(store)


def test_a_pickle_with_a_matching_digest_is_refused_without_running_it(
    store: Store, classifier: Classifier, spec: BundleSpec, tmp_path: Path
) -> None:
    canary = tmp_path / "canary"

    class Touch:
        def __reduce__(self) -> tuple[Any, tuple[Path]]:
            return Path.touch, (canary,)

    save_bundle(store, classifier, spec)
    replace_weights(store, pickle.dumps(Touch()))
    with pytest.raises(ModelError, match="not a safetensors file"):
        load_bundle(store)
    assert not canary.exists()


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("backbone.head.bias", None, "1 missing tensors"),
        ("backbone.extra", torch.zeros(1), "1 unexpected tensors"),
        ("backbone.head.bias", torch.zeros(4), r"float32\[4\], the model's is float32\[3\]"),
        ("backbone.head.bias", torch.full((3,), torch.nan), "NaN or infinity"),
        ("normalize.mean", torch.zeros(3, 1, 1), "preprocessing's mean is not the one"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    store: Store,
    classifier: Classifier,
    spec: BundleSpec,
    name: str,
    tensor: torch.Tensor | None,
    message: str,
) -> None:
    save_bundle(store, classifier, spec)
    tensors = safetensors.torch.load(store.read("model.safetensors"))
    tensors.pop(name, None)
    replace_weights(
        store, safetensors.torch.save(tensors if tensor is None else tensors | {name: tensor})
    )
    with pytest.raises(ModelError, match=message):
        load_bundle(store)


PREPROCESSING = {
    "channels": 3,
    "size": 8,
    "resize": 9,
    "interpolation": "bilinear",
    "mean": [0.4, 0.5, 0.6],
    "std": [0.2, 0.25, 0.3],
}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("schema_version", 2),
        ("schema_version", True),
        ("schema_version", "1"),
        ("schema_version", None),
        ("architecture", None),
        ("architecture", "tutorial_cnn"),
        ("architecture", {"name": "tutorial_cnn"}),
        ("architecture", {"name": ["tutorial_cnn"], "arguments": {}}),
        ("architecture", {"name": "no_such_model", "arguments": {}}),
        ("architecture", {"name": "hf-hub:someone/model", "arguments": {}}),
        ("architecture", {"name": "tutorial_cnn", "arguments": {"num_classes": 9}}),
        ("architecture", {"name": "tutorial_cnn", "arguments": {"name": "resnet18"}}),
        ("architecture", {"name": "resnet18", "arguments": {"weights": "IMAGENET1K_V1"}}),
        ("architecture", {"name": "timm/resnet18", "arguments": {"checkpoint_path": "/x.pt"}}),
        ("architecture", {"name": "timm/resnet18", "arguments": {"layers": [2, 2]}}),
        ("classes", None),
        ("classes", []),
        ("classes", "cat"),
        ("classes", ["cat", 3, "dog"]),
        ("classes", ["cat", "cat", "dog"]),
        ("classes", ["cat", "\ud800", "dog"]),
        ("classes", ["cat", "dog"]),
        ("preprocessing", None),
        ("preprocessing", []),
        ("preprocessing", PREPROCESSING | {"channels": 1}),
        ("preprocessing", PREPROCESSING | {"size": -8}),
        ("preprocessing", PREPROCESSING | {"size": "8"}),
        ("preprocessing", PREPROCESSING | {"interpolation": ["bilinear"]}),
        ("preprocessing", PREPROCESSING | {"mean": [10**400, 0, 0]}),
        ("preprocessing", PREPROCESSING | {"mean": [10**30, 0, 0]}),
        ("preprocessing", PREPROCESSING | {"std": [1e-60, 1, 1]}),
        ("temperature", None),
        ("temperature", 0),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", 10**400),
        ("temperature", True),
        ("temperature", "1"),
        ("metrics", []),
        ("provenance", "me"),
        ("weights_sha256", None),
        ("weights_sha256", 5),
        ("weights_sha256", "0" * 64),
    ],
)
def test_malformed_fields_are_model_errors_of_one_line(
    store: Store, classifier: Classifier, spec: BundleSpec, field: str, value: Any
) -> None:
    save_bundle(store, classifier, spec)
    rewrite(store, **{field: value})
    with pytest.raises(ModelError) as caught:
        load_bundle(store)
    message, _, hint = str(caught.value).partition("\nhint: ")
    assert "\n" not in message + hint
    assert len(message) < 600


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"null", b"{", b"\xff\xfe", b"[" * 100_000, b"\x80\x04K\x01."]
)
def test_documents_that_are_no_object_are_model_errors(store: Store, data: bytes) -> None:
    store.write("model.json", data)
    with pytest.raises(ModelError):
        read_bundle_spec(store)


def test_a_grey_bundle_of_a_torchvision_model_loads(store: Store, spec: BundleSpec) -> None:
    preprocessing = replace(
        spec.preprocessing, channels=1, size=32, resize=32, mean=(0.5,), std=(0.5,)
    )
    backbone = build_model("squeezenet1_1", num_classes=3, channels=1, image_size=32)
    head = head_name(backbone, 3)
    model = Classifier(backbone, mean=(0.5,), std=(0.5,), head=head).eval()
    save_bundle(
        store,
        model,
        replace(spec, architecture="squeezenet1_1", preprocessing=preprocessing),
    )
    images = torch.randint(0, 256, (2, 1, 32, 32), dtype=torch.uint8)
    assert torch.equal(load_bundle(store).model(images), model(images))
