"""Distillation: what a student minimises, what its teacher sees, and whose answers are whose."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from cnnray.datasets.order import Batch
from cnnray.errors import ConflictError, ModelError, SettingsError
from cnnray.images.decode import decode_image
from cnnray.images.transforms import Preprocessing
from cnnray.models.bundle import BundleSpec, load_bundle, save_bundle
from cnnray.models.classifier import Classifier
from cnnray.models.registry import build_model
from cnnray.storage import open_store
from cnnray.training.distillation import Distillation, find_teacher, refit
from cnnray.training.loop import EpochData, EpochResult, Trainer, in_turn, run_epochs
from cnnray.training.mixing import Mixing
from cnnray.training.resizing import Resizing

MakeTrainer = Callable[..., Trainer]
MakeBatch = Callable[..., Batch]

CPU = torch.device("cpu")


def oracle(image: Tensor) -> Tensor:
    """(B, 2) logits of who knows the toy's images: dark or light."""
    light = (image.float().mean(dim=(1, 2, 3)) > 125).float()
    return 8 * torch.stack([1 - light, light], dim=1)


def preprocessing(
    *, channels: int = 3, size: int = 8, interpolation: str = "bilinear"
) -> Preprocessing:
    return Preprocessing(
        channels=channels,
        size=size,
        resize=size,
        interpolation=interpolation,
        mean=(0.5,) * channels,
        std=(0.25,) * channels,
    )


def save_teacher(
    folder: Path, *, classes: tuple[str, ...] = ("cat", "dog", "fox"), size: int = 8
) -> str:
    """An untrained tutorial_cnn as a bundle; its path."""
    torch.manual_seed(0)
    expected = preprocessing(size=size)
    backbone = build_model(
        "tutorial_cnn", num_classes=len(classes), channels=3, image_size=expected.size
    )
    classifier = Classifier(backbone, mean=expected.mean, std=expected.std, head="head")
    spec = BundleSpec("tutorial_cnn", {}, classes, expected, temperature=1.5)
    save_bundle(open_store(str(folder)), classifier, spec)
    return str(folder)


def images(count: int = 4, *, channels: int = 3, size: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    image = torch.randint(0, 256, (count, channels, size, size), generator=generator)
    return image.to(torch.uint8).contiguous(memory_format=torch.channels_last)


def train(
    trainer: Trainer, batches: list[Batch], *, val: list[Batch], epochs: int = 1
) -> list[EpochResult]:
    sizes = np.array([len(batch["label"]) for batch in batches])
    results = run_epochs(
        trainer,
        first_epoch=0,
        epochs=epochs,
        data=lambda _: EpochData(batches, sizes, val),
        seed=3,
    )
    return [result for result in results if isinstance(result, EpochResult)]


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


# What is minimised


def test_a_student_learns_what_its_teacher_knows_and_its_labels_do_not_tell(
    make_trainer: MakeTrainer, make_batch: MakeBatch
) -> None:
    batches = [make_batch(16, seed=seed) for seed in range(8)]
    for batch in batches:
        batch["label"][:] = 0
    val = [make_batch(64, seed=99)]
    alone, taught = make_trainer(lr=0.03), make_trainer(lr=0.03)
    taught.distillation = Distillation(oracle, alpha=0.9, temperature=2.0)
    assert train(alone, batches, val=val, epochs=6)[-1].val_accuracy < 0.7
    assert train(taught, batches, val=val, epochs=6)[-1].val_accuracy == 1.0


def test_alpha_of_zero_is_no_teacher_bit_for_bit(
    make_trainer: MakeTrainer, make_batch: MakeBatch
) -> None:
    batches = [make_batch(16, seed=seed) for seed in range(4)]
    alone, taught = make_trainer(dropout=0.5), make_trainer(dropout=0.5)
    taught.distillation = Distillation(oracle, alpha=0.0, temperature=2.0)
    for one, other in zip(
        train(alone, batches, val=batches, epochs=2),
        train(taught, batches, val=batches, epochs=2),
        strict=True,
    ):
        assert (one.train_loss, one.val_loss) == (other.train_loss, other.val_loss)
    for name, tensor in weights(alone).items():
        assert torch.equal(weights(taught)[name], tensor), name


@pytest.mark.parametrize(("alpha", "temperature"), [(0.3, 1.0), (0.5, 2.0), (1.0, 4.0)])
def test_the_loss_is_the_papers(alpha: float, temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (3 * torch.randn(5, 4, generator=generator) for _ in range(2))
    losses = torch.rand(5, generator=generator)
    distillation = Distillation(lambda image: theirs, alpha, temperature)
    softened = [
        torch.distributions.Categorical(logits=x / temperature, validate_args=False)
        for x in (theirs, ours)
    ]
    divergence = torch.distributions.kl_divergence(*softened)
    torch.testing.assert_close(
        distillation(losses, ours, images()),
        (1 - alpha) * losses + alpha * temperature**2 * divergence,
    )


def test_logits_in_half_precision_are_compared_in_single() -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(5, 4, generator=generator).bfloat16() for _ in range(2))
    in_half = Distillation(lambda image: theirs, alpha=1.0, temperature=2.0)
    in_single = Distillation(lambda image: theirs.float(), alpha=1.0, temperature=2.0)
    losses = torch.zeros(5)
    expected = in_single(losses, ours.float(), images())
    assert torch.equal(in_half(losses, ours, images()), expected)


def test_the_reported_losses_are_those_of_the_labels(
    make_trainer: MakeTrainer, make_batch: MakeBatch
) -> None:
    batches = [make_batch(16, seed=1)]
    alone, taught = make_trainer(lr=0.0), make_trainer(lr=0.0)
    taught.distillation = Distillation(oracle, alpha=1.0, temperature=2.0)
    [one], [other] = (train(trainer, batches, val=batches) for trainer in (alone, taught))
    assert (other.train_loss, other.val_loss) == (one.train_loss, one.val_loss)


# What the teacher sees


def test_the_teacher_sees_the_very_images_of_the_student_in_every_pass(
    make_trainer: MakeTrainer, make_batch: MakeBatch
) -> None:
    seen: list[Tensor] = []
    told: list[Tensor] = []

    def teacher(image: Tensor) -> Tensor:
        told.append(image)
        return oracle(image)

    trainer = make_trainer()
    trainer.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    trainer.distillation = Distillation(teacher, alpha=0.5, temperature=2.0)
    trainer.transform = in_turn(
        [
            lambda image, label, step: (image.flip(3), label),
            Mixing(num_classes=2, seed=0, mixup_alpha=1.0),
        ]
    )
    trainer.accumulate_steps = 3
    train(trainer, [make_batch(16, seed=1), make_batch(5, seed=2)], val=[])
    assert [len(image) for image in told] == [6, 5, 5, 2, 2, 1]
    for ours, theirs in zip(seen, told, strict=True):
        assert torch.equal(ours, theirs)


def test_a_batch_in_several_passes_gives_the_same_step_as_in_one(
    make_trainer: MakeTrainer, make_batch: MakeBatch
) -> None:
    whole, cut = (make_trainer(optimizer="sgd", lr=0.1) for _ in range(2))
    for trainer in (whole, cut):
        trainer.distillation = Distillation(oracle, alpha=0.7, temperature=3.0)
    cut.accumulate_steps = 3
    for trainer in (whole, cut):
        train(trainer, [make_batch(16, seed=1)], val=[])
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(cut)[name], tensor)


def test_a_teacher_of_one_size_answers_for_images_of_any(tmp_path: Path) -> None:
    uri = save_teacher(tmp_path, size=12)
    teacher = find_teacher(uri, classes=("cat", "dog", "fox")).load(CPU)
    growing = Resizing(size=16, first=0.5, epochs=9, steps_per_epoch=1)
    label = torch.zeros(4, dtype=torch.int64)
    for step in range(9):
        image, _ = growing(images(size=16), label, step)
        assert teacher(image).shape == (4, 3)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [5, 24])
def test_images_are_resized_as_files_are(size: int, interpolation: str) -> None:
    image = 64 + images(size=12) // 2  # bicubic stays in 0 to 255: files are clamped half-way, too
    fitted = refit(image, preprocessing(size=size, interpolation=interpolation))
    expected = v2.functional.resize(
        image, [size, size], interpolation=v2.InterpolationMode(interpolation), antialias=True
    )
    assert (fitted - expected).abs().max() <= 1.5  # rounded after each of two passes
    assert fitted.is_contiguous(memory_format=torch.channels_last)


def test_pixels_stay_within_their_range_when_bicubic_overshoots() -> None:
    fitted = refit(images(size=12), preprocessing(size=24, interpolation="bicubic"))
    assert (float(fitted.min()), float(fitted.max())) == (0.0, 255.0)


def test_a_grey_teacher_sees_the_luma_that_decoding_gives() -> None:
    colour = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(colour).save(buffer, "PNG")
    decoded = decode_image(buffer.getvalue(), channels=1).pixels[..., 0]
    image = torch.from_numpy(colour).permute(2, 0, 1)[None]
    grey = refit(image, preprocessing(channels=1))
    assert grey.shape == (1, 1, 8, 8)
    assert np.abs(grey[0, 0].numpy() - decoded).max() <= 1


def test_a_teacher_in_colour_sees_a_grey_image_in_each_channel() -> None:
    image = images(channels=1)
    assert torch.equal(refit(image, preprocessing()), torch.cat([image] * 3, dim=1))


def test_images_that_fit_the_teacher_are_not_copied() -> None:
    image = images()
    assert refit(image, preprocessing()) is image


# Who the teacher is


def test_the_teachers_classes_are_found_by_name_in_any_order(tmp_path: Path) -> None:
    uri = save_teacher(tmp_path, classes=("cat", "dog", "fox"))
    bundle = load_bundle(open_store(uri))
    teacher = find_teacher(uri, classes=("fox", "cat", "dog")).load(CPU)
    image = images()
    with torch.no_grad():
        answers, logits = teacher(image), bundle.model(image)
    assert not teacher.bundle.model.training
    calibrated = logits / 1.5  # as the bundle says
    torch.testing.assert_close(answers, calibrated[:, [2, 0, 1]])


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        (("cat", "dog"), "it also has 'fox'"),
        (("cat", "dog", "fox", "hen"), "it lacks 'hen'"),
        (("cat", "dog", "Fox"), "it lacks 'Fox' and also has 'fox'"),
        (("cat", "dog", "fox", "a", "b", "c", "d", "e"), "it lacks 'a', 'b', 'c' and 2 more"),
    ],
)
def test_a_teacher_of_other_classes_is_refused(
    tmp_path: Path, classes: tuple[str, ...], said: str
) -> None:
    uri = save_teacher(tmp_path)
    with pytest.raises(SettingsError) as caught:
        find_teacher(uri, classes=classes)
    message, hint = str(caught.value).splitlines()
    assert message == f"the teacher's classes are not those of the data: {said}"
    assert "--distill.teacher" in hint


def test_a_path_without_a_bundle_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no bundle at"):
        find_teacher(str(tmp_path), classes=("cat",))


def test_another_teacher_under_the_same_path_is_a_conflict(tmp_path: Path) -> None:
    found = find_teacher(save_teacher(tmp_path), classes=("cat", "dog", "fox"))
    document = json.loads((tmp_path / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps(document | {"temperature": 2.0}))
    with pytest.raises(ConflictError, match="is not the one that this run began with"):
        found.load(CPU)


def test_training_leaves_the_teacher_as_it_is_and_out_of_the_student(
    make_trainer: MakeTrainer, make_batch: MakeBatch
) -> None:
    torch.manual_seed(1)
    teacher = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.BatchNorm1d(16), torch.nn.Dropout(), torch.nn.Linear(16, 2)
    ).eval()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    trainer = make_trainer()
    names = set(weights(trainer))
    trainer.distillation = Distillation(
        lambda image: teacher(image.float()), alpha=0.5, temperature=2.0
    )
    train(trainer, [make_batch(16, seed=1)], val=[make_batch(16, seed=2)])
    assert set(weights(trainer)) == names
    assert all(torch.equal(before[name], t) for name, t in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not teacher.training
