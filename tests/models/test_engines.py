"""Engines: the numbers of the eager model, on as many threads as there are, or a clear refusal."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from cnnray.errors import ModelError, SettingsError
from cnnray.images.transforms import Preprocessing
from cnnray.labeling.agreement import count_agreement
from cnnray.models.bundle import Bundle, BundleSpec
from cnnray.models.classifier import Classifier
from cnnray.models.engines import (
    EagerEngine,
    Engine,
    EngineChoice,
    PreparedEngine,
    choose_engine,
    open_engine,
    prepare_engine,
)
from cnnray.models.engines.onnx_export import export_onnx
from cnnray.models.registry import build_model, head_name

CPU = torch.device("cpu")
NO_IMAGES = torch.zeros((0, 3, 12, 12), dtype=torch.uint8)
NETWORKS = {
    "colour": ("tutorial_cnn", 3, 12),
    "grey": ("tutorial_cnn", 1, 12),
    "resnet18": ("resnet18", 3, 32),
}


def make_bundle(architecture: str, channels: int, size: int) -> Bundle:
    torch.manual_seed(0)
    backbone = build_model(architecture, num_classes=4, channels=channels, image_size=size)
    mean, std = (0.45, 0.5, 0.4)[:channels], (0.2, 0.25, 0.3)[:channels]
    model = Classifier(backbone, mean=mean, std=std, head=head_name(backbone, 4)).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after training, not 0 and 1
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 2.0)
    preprocessing = Preprocessing(channels, size, size, "bilinear", mean, std)
    return Bundle(model, BundleSpec(architecture, {}, tuple("abcd"), preprocessing), "digest")


@functools.cache
def exported(network: str, *, embeddings: bool) -> tuple[Bundle, bytes]:
    bundle = make_bundle(*NETWORKS[network])
    choice = EngineChoice("onnxruntime")
    made = prepare_engine(choice, bundle, embeddings=embeddings, calibration=NO_IMAGES)
    return bundle, made.onnx


def prepared(network: str, engine: str, *, embeddings: bool) -> tuple[Bundle, PreparedEngine]:
    """As ``prepare_engine`` makes it, but that both engines share an export: it takes seconds."""
    bundle, onnx = exported(network, embeddings=embeddings)
    return bundle, PreparedEngine(EngineChoice(engine), onnx)


def opened(bundle: Bundle, made: PreparedEngine, **changes: Any) -> Engine:
    options: dict[str, Any] = {"device": CPU, "embeddings": False, "batch_size": 16}
    return open_engine(made, bundle, **(options | changes))


def noise(bundle: Bundle, count: int) -> Tensor:
    """Images in the memory order in which a worker has them."""
    preprocessing = bundle.spec.preprocessing
    shape = (count, preprocessing.size, preprocessing.size, preprocessing.channels)
    generator = torch.Generator().manual_seed(count)
    pixels = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    return pixels.permute(0, 3, 1, 2)


def assert_close(found: Tensor, expected: Tensor, *, fraction: float = 1e-4) -> None:
    assert found.dtype == torch.float32
    scale = expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=fraction * scale)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_logits_and_features_are_those_of_eager_for_any_batch(name: str, network: str) -> None:
    bundle, made = prepared(network, name, embeddings=True)
    engine = opened(bundle, made, embeddings=True)
    eager = EagerEngine(bundle.model, device=CPU, embeddings=True)
    kept = []
    for count in (16, 5, 1, 16):
        logits, features = engine(noise(bundle, count))
        expected_logits, expected_features = eager(noise(bundle, count))
        assert features is not None
        assert expected_features is not None
        kept.append((logits, expected_logits))
        assert_close(features, expected_features)
    for logits, expected in kept:  # and later calls do not write into them
        assert_close(logits, expected)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_without_embeddings_there_are_no_features(name: str) -> None:
    bundle, made = prepared("colour", name, embeddings=False)
    logits, features = opened(bundle, made)(noise(bundle, 3))
    assert features is None
    assert_close(logits, bundle.model(noise(bundle, 3)).detach())


@pytest.mark.parametrize("embeddings", [False, True])
def test_a_compiled_model_is_compiled_once_for_all_sizes_of_a_batch(
    embeddings: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def backend(graph: Any, inputs: list[Any]) -> Any:
        sizes.extend(len(tensor) for tensor in inputs if tensor.dtype == torch.uint8)
        return graph.forward

    # The real backend takes a minute, and what it makes of the graph is PyTorch's.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    bundle, made = prepared("colour", "compile", embeddings=embeddings)
    engine = opened(bundle, made, batch_size=8, embeddings=embeddings)
    for count in (8, 3, 1, 8):
        logits, features = engine(noise(bundle, count))
        assert_close(logits, bundle.model(noise(bundle, count)).detach())
        assert (features is not None) == embeddings
        assert features is None or len(features) == count
    assert sizes == [8]


@pytest.mark.parametrize("name", ["eager", "openvino"])
def test_bfloat16_is_close_and_comes_as_float32(name: str) -> None:
    bundle, exact = prepared("resnet18", name, embeddings=True)
    made = PreparedEngine(choose_engine(name, "bf16", use_gpu=False), exact.onnx)
    logits, _ = opened(bundle, made, embeddings=True)(noise(bundle, 8))
    expected = bundle.model(noise(bundle, 8)).detach()
    assert_close(logits, expected, fraction=0.05)
    assert not torch.equal(logits, expected)


@functools.cache
def shades() -> tuple[Bundle, Tensor]:
    """A model that has learned to tell four brightnesses, and such images in random order."""
    bundle = make_bundle(*NETWORKS["colour"])
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (256,), generator=generator)
    pixels = torch.randint(40, (256, 3, 12, 12), generator=generator)
    images = (pixels + 60 * labels.view(-1, 1, 1, 1)).to(torch.uint8)
    optimizer = torch.optim.Adam(bundle.model.parameters(), lr=0.002)
    for _ in range(25):
        optimizer.zero_grad()
        functional.cross_entropy(bundle.model(images), labels).backward()
        optimizer.step()
    assert (bundle.model(images).argmax(1) == labels).float().mean() > 0.95
    return bundle, images


@functools.cache
def quantised(name: str) -> PreparedEngine:
    bundle, images = shades()
    choice = EngineChoice(name, "int8")
    return prepare_engine(choice, bundle, embeddings=True, calibration=images[::2])


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_int8_keeps_the_labels_of_what_is_easy_to_tell_apart(name: str) -> None:
    bundle, images = shades()
    made = quantised(name)
    _, full = prepared("colour", name, embeddings=True)
    assert len(made.onnx) < 0.6 * len(full.onnx)
    engine = opened(bundle, made, embeddings=True)
    eager = EagerEngine(bundle.model, device=CPU, embeddings=True)
    agreement = count_agreement(engine, eager, images[1::2], batch_size=16)
    assert agreement.images == 128
    assert agreement.same >= 125
    logits, features = engine(images)
    assert_close(logits, eager(images)[0], fraction=0.1)
    assert features is not None
    assert not torch.equal(logits, eager(images)[0])  # it is another model


def test_int8_calibrated_on_other_images_is_seen() -> None:
    bundle, images = shades()
    dark = torch.zeros_like(images[:1])
    made = prepare_engine(
        EngineChoice("onnxruntime", "int8"), bundle, embeddings=False, calibration=dark
    )
    eager = EagerEngine(bundle.model, device=CPU, embeddings=False)
    assert count_agreement(opened(bundle, made), eager, images, batch_size=16).same < 200


def test_int8_without_an_image_to_be_calibrated_on_is_fp32() -> None:
    bundle, _ = shades()
    made = prepare_engine(
        EngineChoice("onnxruntime", "int8"), bundle, embeddings=False, calibration=NO_IMAGES
    )
    assert made.choice == EngineChoice("onnxruntime", "fp32")
    images = noise(bundle, 2)
    assert_close(opened(bundle, made)(images)[0], bundle.model(images).detach())


@pytest.mark.parametrize("threads", [1, 2])
def test_an_engine_has_as_many_threads_as_torch(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        runtime: Any = opened(*prepared("colour", "onnxruntime", embeddings=False))
        vino: Any = opened(*prepared("colour", "openvino", embeddings=False))
    finally:
        torch.set_num_threads(before)
    options = runtime.session.get_session_options()
    assert options.intra_op_num_threads == threads
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    compiled = vino.request.get_compiled_model()
    assert compiled.get_property("INFERENCE_NUM_THREADS") == threads
    assert compiled.get_property("ENABLE_CPU_PINNING") is False
    assert compiled.get_property("INFERENCE_PRECISION_HINT").to_string() == "f32"
    assert sys.modules["openvino_telemetry"] is None  # which reports to Intel


def test_an_export_is_the_same_after_eager_has_turned_the_weights() -> None:
    pooled = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )
    model = Classifier(pooled, mean=(0.5,) * 3, std=(0.5,) * 3, head="3").eval()
    bundle = Bundle(model, make_bundle(*NETWORKS["colour"]).spec, "digest")
    before = export_onnx(bundle, embeddings=False)
    EagerEngine(model, device=CPU, embeddings=False)
    weight = next(model.parameters())
    assert not weight.is_contiguous()
    assert export_onnx(bundle, embeddings=False) == before
    assert not weight.is_contiguous()  # nor has the export turned them back


class Undecided(nn.Module):
    """Its graph depends on its input."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 12 * 12, 4)

    def forward(self, images: Tensor) -> Tensor:
        flat = images.flatten(1)
        return self.head(flat) if flat.sum() > 0 else self.head(-flat)


def test_a_model_that_cannot_be_exported_is_named_with_the_remedy() -> None:
    spec = make_bundle(*NETWORKS["colour"]).spec
    model = Classifier(Undecided(), mean=(0.5,) * 3, std=(0.5,) * 3, head="head").eval()
    with pytest.raises(ModelError, match="tutorial_cnn cannot be exported.*\nhint: --engine.name"):
        prepare_engine(
            EngineChoice("onnxruntime"),
            Bundle(model, spec, "digest"),
            embeddings=False,
            calibration=NO_IMAGES,
        )


# What goes together


@pytest.mark.parametrize(
    ("name", "precision", "use_gpu", "chosen"),
    [
        ("auto", "auto", False, EngineChoice("eager", "fp32")),
        ("auto", "auto", True, EngineChoice("eager", "bf16", or_fp32=True)),
        ("compile", "auto", True, EngineChoice("compile", "bf16", or_fp32=True)),
        ("auto", "bf16", True, EngineChoice("eager", "bf16")),
        ("openvino", "auto", False, EngineChoice("openvino", "fp32")),
        ("openvino", "int8", False, EngineChoice("openvino", "int8")),
    ],
)
def test_auto_is_eager_in_the_precision_of_the_device(
    name: str, precision: str, use_gpu: bool, chosen: EngineChoice
) -> None:
    assert choose_engine(name, precision, use_gpu=use_gpu) == chosen


@pytest.mark.parametrize(
    ("name", "precision", "use_gpu", "message"),
    [
        ("onnxruntime", "auto", True, "runs on CPUs\nhint: leave out --scaling.use_gpu"),
        ("openvino", "int8", True, "runs on CPUs"),
        ("onnxruntime", "bf16", False, "in bf16\nhint: --engine.precision fp32 or int8"),
        ("auto", "int8", False, "or --engine.name onnxruntime or openvino"),
        ("compile", "int8", True, "engine compile does not compute in int8"),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_remedy(
    name: str, precision: str, use_gpu: bool, message: str
) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        choose_engine(name, precision, use_gpu=use_gpu)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("name", "precision", "missing", "extras"),
    [
        ("onnxruntime", "fp32", "onnxruntime", "onnxruntime"),
        ("onnxruntime", "fp32", "onnxscript", "onnxruntime"),
        ("openvino", "fp32", "openvino", "openvino"),
        ("openvino", "int8", "onnxruntime", "openvino,onnxruntime"),
    ],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    name: str, precision: str, missing: str, extras: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find: Callable[..., Any] = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda wanted: None if wanted == missing else find(wanted)
    )
    with pytest.raises(SettingsError) as caught:
        choose_engine(name, precision, use_gpu=False)
    message, hint = str(caught.value).splitlines()
    assert f"needs the package {missing}," in message
    assert hint == f"hint: pip install 'cnnray[{extras}]'"


def test_openvino_in_fp32_does_not_need_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    find: Callable[..., Any] = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda wanted: None if wanted == "onnxruntime" else find(wanted),
    )
    assert choose_engine("openvino", "fp32", use_gpu=False).name == "openvino"
