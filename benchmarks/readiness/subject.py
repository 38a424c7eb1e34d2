"""What is measured: a network that has learnt to tell synthetic photos apart, and such photos.

Speed needs no training, but labels do: those of random weights are nearly the same for any image.
"""

from __future__ import annotations

import colorsys
import io
import resource
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from benchmarks.harness import note
from cnnray.datasets.order import Batch
from cnnray.images.transforms import Preprocessing, as_tensor
from cnnray.labeling.decoding import Sample, SampleDecoder, images_of
from cnnray.models.bundle import Bundle, BundleSpec
from cnnray.models.classifier import Classifier
from cnnray.models.registry import OWN_MODELS, build_model, head_name
from cnnray.training.compute import Precision
from cnnray.training.loop import EpochData, EpochResult, Trainer, run_epochs
from cnnray.training.losses import build_loss
from cnnray.training.optimizers import build_optimizer

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CROP = 0.875
HUES, ANGLES = 10, 2
CLASSES = tuple(f"hue-{hue} angle-{angle}" for angle in range(ANGLES) for hue in range(HUES))
HUE_SPREAD = 0.03
"""Standard deviation within a class; classes are 0.1 apart, so that some photos are unclear."""
NOISE = 12.0
"""Standard deviation of a pixel, of 255."""
QUALITY = 90
TEACH_BATCH = 64


@dataclass
class Subject:
    """The network as a bundle, the device, and photos as cnnray's decoder hands them out.

    ``labels`` (N,) are the classes of the rows of ``decoded``; ``seconds`` is what one speed takes
    to be measured.
    """

    bundle: Bundle
    device: torch.device
    decoded: pa.Table
    labels: npt.NDArray[np.int64]
    batch_size: int
    seconds: float
    remarks: list[str] = field(default_factory=list)

    @property
    def preprocessing(self) -> Preprocessing:
        """Of the network's input."""
        return self.bundle.spec.preprocessing

    def images(self) -> Tensor:
        """The first batch, (B, C, S, S) uint8, channels-last on the host."""
        pixels = images_of(self.decoded.slice(0, self.batch_size), self.preprocessing)
        return as_tensor(pixels).permute(0, 3, 1, 2)

    def batches(self, size: int) -> list[Batch]:
        """All photos as batches of a training, the last one left out where it is smaller."""
        pixels = images_of(self.decoded, self.preprocessing)
        images = np.ascontiguousarray(np.moveaxis(pixels, 3, 1))
        keys = np.array(self.decoded["key"].to_pylist(), dtype=object)
        starts = range(0, max(1, len(images) - size + 1), size)
        return [
            Batch(
                image=images[at : at + size],
                label=self.labels[at : at + size],
                key=keys[at:][:size],
            )
            for at in starts
        ]


def choose_network(wished: str) -> tuple[str, list[str]]:
    """The network to build, and a remark if it is cnnray's own because torchvision is missing."""
    if wished in OWN_MODELS:
        return wished, []
    try:
        import torchvision  # noqa: F401  a wheel for another torch raises RuntimeError
    except (ImportError, OSError, RuntimeError) as error:
        return "small_cnn", [f"small_cnn, not {wished}: torchvision does not import ({error})"]
    return wished, []


def prepare_subject(
    network: str,
    *,
    device: torch.device,
    size: int,
    photos: int,
    batch_size: int,
    steps: int,
    seconds: float,
) -> Subject:
    """Build the network, make its photos and teach it for a few ``steps``."""
    network, remarks = choose_network(network)
    preprocessing = Preprocessing(
        channels=3,
        size=size,
        resize=round(size / CROP),
        interpolation="bilinear",
        mean=MEAN,
        std=STD,
    )
    spec = BundleSpec(
        architecture=network, arguments={}, classes=CLASSES, preprocessing=preprocessing
    )
    side = preprocessing.resize
    files, labels = make_photos(photos, width=side, height=side)
    samples = [Sample(f"{number:05d}", "", data) for number, data in enumerate(files)]
    decoded = SampleDecoder(preprocessing).decode(samples)
    bundle = Bundle(model=build_classifier(spec), spec=spec, digest="0" * 64)
    subject = Subject(bundle, device, decoded, labels, batch_size, seconds, remarks)
    result = teach(bundle.model.to(device), subject, steps=steps)
    bundle.model.eval().cpu()
    note(f"{network} taught: loss {result.train_loss:.2f}, accuracy {result.train_accuracy:.2f}")
    return subject


def build_classifier(spec: BundleSpec) -> Classifier:
    """A network with seeded random weights."""
    torch.manual_seed(0)
    preprocessing, num_classes = spec.preprocessing, len(spec.classes)
    backbone = build_model(
        spec.architecture, num_classes=num_classes, channels=3, image_size=preprocessing.size
    )
    head = head_name(backbone, num_classes)
    return Classifier(backbone, mean=preprocessing.mean, std=preprocessing.std, head=head)


def teach(model: Classifier, subject: Subject, *, steps: int) -> EpochResult:
    """Train in float32, in cnnray's own loop."""
    batches = subject.batches(min(TEACH_BATCH, len(subject.labels)))
    chosen = [batches[step % len(batches)] for step in range(steps)]
    trainer = Trainer(
        model=model,
        optimizer=build_optimizer(model, name="adamw", lr=2e-3),
        loss=build_loss("cross_entropy"),
        learning_rate=lambda step: 2e-3 * (1 - step / steps),
        device=subject.device,
        precision=Precision(subject.device.type),
    )
    data = EpochData(chosen, np.array([len(batch["label"]) for batch in chosen]), validation=())
    [result] = run_epochs(trainer, first_epoch=0, epochs=1, data=lambda _: data, seed=0)
    assert isinstance(result, EpochResult)
    return result


def make_photos(
    count: int, *, width: int, height: int, seed: int = 0
) -> tuple[Sequence[bytes], npt.NDArray[np.int64]]:
    """JPEG files of striped colours in noise, and the index of each one's class (count,)."""
    random = np.random.default_rng(seed)
    labels = random.integers(len(CLASSES), size=count)
    return [_make_photo(int(label), random, width, height) for label in labels], labels


def _make_photo(label: int, random: np.random.Generator, width: int, height: int) -> bytes:
    angle, hue = divmod(label, HUES)
    colour = colorsys.hsv_to_rgb((hue / HUES + random.normal(0, HUE_SPREAD)) % 1, 0.7, 0.8)
    turn = np.pi * (angle / ANGLES + random.normal(0, 0.1))
    y, x = np.mgrid[:height, :width] / height
    waves = np.sin(30 * (x * np.cos(turn) + y * np.sin(turn)) + random.uniform(0, 6))
    pixels = 255 * np.multiply.outer(0.75 + 0.25 * waves, np.array(colour))
    pixels += random.normal(0, NOISE, pixels.shape)
    file = io.BytesIO()
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    image.save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


class PeakMemory:
    """Megabytes of the device that were taken since this was made, at the most at a time.

    On the CPU it is the resident peak of the whole process so far.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before = 0
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)

    def megabytes(self) -> float:
        """So far."""
        if self.device.type == "cuda":
            return (torch.cuda.max_memory_allocated(self.device) - self.before) / 1e6
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU still has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
