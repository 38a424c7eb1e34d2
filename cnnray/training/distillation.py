"""Distillation: a student learns from its labels and from what a trained model, its teacher, says.

Source: Hinton et al. 2015, arXiv:1503.02531. The teacher answers for the very pixels that the
student sees, cropped and mixed, not for the whole image: Beyer et al. 2022, arXiv:2106.05237.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cnnray.errors import ConflictError, SettingsError
from cnnray.images.transforms import Preprocessing
from cnnray.models.bundle import Bundle, load_bundle
from cnnray.storage import Store, open_store

NAMES_SHOWN = 3
"""Classes that a message lists before it gives the count."""


@dataclass(frozen=True)
class Distillation:
    """What a student minimises: ``distillation(losses, logits, image)``.

    (1 - alpha) x loss + alpha x T² x KL(teacher || student) of each sample, the probabilities of
    both softened by T = ``temperature``. T² keeps the gradients as large as they are without it.
    """

    teacher: Callable[[Tensor], Tensor]  # (B, C, H, W) images of 0 to 255 → (B, K) logits
    alpha: float
    temperature: float

    def __call__(self, losses: Tensor, logits: Tensor, image: Tensor) -> Tensor:
        """(B,) losses from the labels' own, the student's (B, K) logits and its images."""
        with torch.no_grad():  # not inference_mode, whose tensors no backward pass may use
            answers = self.teacher(image)
        theirs, ours = (
            torch.log_softmax(values.float() / self.temperature, dim=1)
            for values in (answers, logits)
        )
        divergence = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(dim=1)
        return (1 - self.alpha) * losses + self.alpha * self.temperature**2 * divergence


@dataclass(frozen=True)
class Teacher:
    """A bundle's model, for a student's images of any size, grey or in colour.

    ``teacher(image)``: (B, C, H, W) of 0 to 255 → (B, K) logits in the student's order, scaled by
    the temperature of the bundle.
    """

    bundle: Bundle
    order: Tensor  # (K,) where each of the student's classes is among the teacher's

    def __call__(self, image: Tensor) -> Tensor:
        spec = self.bundle.spec
        logits: Tensor = self.bundle.model(refit(image, spec.preprocessing))
        return logits[:, self.order] / spec.temperature


@dataclass(frozen=True)
class TeacherBundle:
    """Where a teacher is, for any worker to load, and which one it is."""

    store: Store
    digest: str  # the bundle's
    classes: tuple[str, ...]  # the student's, in the order of its logits

    def describe(self) -> dict[str, str]:
        """What the student's bundle will say of it."""
        return {"uri": self.store.uri, "model": self.digest}

    def load(self, device: torch.device) -> Teacher:
        """The teacher, in eval mode. Raises ``ConflictError`` for any other than was found."""
        bundle = load_bundle(self.store)
        if bundle.digest != self.digest:
            raise ConflictError(
                f"the teacher at {self.store.uri} is not the one that this run began with",
                hint="put that one back, or choose another --run_name",
            )
        bundle.model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        order = class_order(self.classes, bundle.spec.classes)
        return Teacher(bundle, torch.tensor(order, device=device))


def find_teacher(uri: str, *, classes: tuple[str, ...]) -> TeacherBundle:
    """The bundle at ``uri`` as the teacher of a student of ``classes``.

    Raises ``ModelError`` where there is no bundle or a damaged one, ``SettingsError`` for other
    classes.
    """
    store = open_store(uri)
    bundle = load_bundle(store)
    class_order(classes, bundle.spec.classes)
    return TeacherBundle(store, bundle.digest, classes)


def class_order(student: Sequence[str], teacher: Sequence[str]) -> list[int]:
    """Where each of the student's classes is among the teacher's, by name.

    Raises ``SettingsError`` unless both know the same ones.
    """
    missing, unknown = set(student) - set(teacher), set(teacher) - set(student)
    if missing or unknown:
        differences = [
            f"{verb} {_some(names)}"
            for verb, names in (("lacks", missing), ("also has", unknown))
            if names
        ]
        raise SettingsError(
            f"the teacher's classes are not those of the data: it {' and '.join(differences)}",
            hint="--distill.teacher takes a bundle that was trained on the same classes",
        )
    return [teacher.index(name) for name in student]


def _some(names: Iterable[str]) -> str:
    first, *others = sorted(names)
    shown = ", ".join(repr(name[:80]) for name in (first, *others[: NAMES_SHOWN - 1]))
    left = len(others) + 1 - NAMES_SHOWN
    return shown if left <= 0 else f"{shown} and {left} more"


def refit(image: Tensor, preprocessing: Preprocessing) -> Tensor:
    """(B, C, H, W) images of 0 to 255 with the channels and at the size that are expected.

    As files are decoded: a grey image has three equal channels, one in colour its luma, and
    resizing is antialiased. Images that fit are given back as they are.
    """
    if image.shape[1] != preprocessing.channels:
        image = image.expand(-1, 3, -1, -1) if preprocessing.channels == 3 else _luma(image)
    size = (preprocessing.size, preprocessing.size)
    if image.shape[2:] != size:
        image = F.interpolate(
            image.float(), size, mode=preprocessing.interpolation, antialias=True
        ).clamp(0, 255)  # bicubic overshoots
    return image.contiguous(memory_format=torch.channels_last)


def _luma(image: Tensor) -> Tensor:
    """(B, 1, H, W) from (B, 3, H, W), by ITU-R 601-2."""
    red, green, blue = image.float().chunk(3, dim=1)
    return 0.299 * red + 0.587 * green + 0.114 * blue
