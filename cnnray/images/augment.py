"""Random variations of training images: the same for the same (seed, epoch, key), anywhere.

All in uint8: shifts and flips by ``geometry``, the rest by torchvision.transforms.v2, which draws
from torch's default CPU generator and from nothing else; so that generator is seeded for each image
and put back afterwards.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch import nn

from cnnray.errors import SettingsError
from cnnray.images.decode import decode_image
from cnnray.images.geometry import shift_and_flip
from cnnray.images.transforms import Preprocessing, as_tensor, fit, min_side
from cnnray.options import DEFAULT_LIMITS, Augmentation, DecodeLimits

_generator_lock = threading.Lock()
"""Two threads that share torch's default generator would take each other's numbers."""


class TrainTransform:
    """Decode, fit and augment: what training feeds a model.

    Raises ``SettingsError`` when ``pad`` is not smaller than the image.
    """

    def __init__(
        self,
        preprocessing: Preprocessing,
        augmentation: Augmentation,
        *,
        seed: int,
        limits: DecodeLimits = DEFAULT_LIMITS,
    ) -> None:
        self.preprocessing = preprocessing
        self.augmentation = augmentation
        self.seed = seed
        self.limits = limits
        size, pad = preprocessing.size, augmentation.pad
        if augmentation.crop == "random_pad" and pad >= size:  # only so many can be mirrored
            raise SettingsError(
                f"augment.pad {pad} is not smaller than the image, {size} px",
                hint="lower --augment.pad or raise --image.size",
            )
        self._window, self._steps = _build_steps(preprocessing, augmentation)

    @property
    def is_quick(self) -> bool:
        """Whether all that differs between epochs is what ``vary`` does."""
        return not (self._window or self._steps)

    @property
    def min_side(self) -> int | None:
        """``decode_image`` may reduce images to a short side of so many pixels."""
        return None if self._window else min_side(self.preprocessing)

    def __call__(self, data: bytes, *, epoch: int, key: str) -> np.ndarray:
        """(C, size, size) uint8, a pure function of the arguments. Raises ``ImageError``."""
        decoded = decode_image(
            data,
            channels=self.preprocessing.channels,
            limits=self.limits,
            min_side=self.min_side,
        )
        return self.augment(decoded.pixels, epoch=epoch, key=key)

    def augment(self, pixels: np.ndarray, *, epoch: int, key: str) -> np.ndarray:
        """The same from decoded (H, W, C) uint8 pixels."""
        # Seeding takes longer than a flip, and what is quick draws nothing of torch's generator.
        seed = None if self.is_quick else _image_seed(self.seed, epoch=epoch, key=key)
        with nullcontext() if seed is None else _seeded(seed):
            if self._window:
                image = self._window(as_tensor(np.moveaxis(pixels, 2, 0))).numpy()
            else:
                image = fit(pixels, preprocessing=self.preprocessing)
            [image] = self.vary(image[None], epoch=epoch, keys=[key])
            augmented = as_tensor(image)
            for step in self._steps:
                augmented = step(augmented)
        return np.ascontiguousarray(augmented.numpy())

    def vary(self, images: np.ndarray, *, epoch: int, keys: Iterable[str]) -> np.ndarray:
        """Shift and flip fitted (N, C, size, size) images: the rest of a quick transform."""
        how = self.augmentation
        pad = how.pad if how.crop == "random_pad" else 0
        if not (pad or how.flip or how.vertical_flip):
            return images
        return shift_and_flip(
            images,
            keys,
            seed=self.seed,
            epoch=epoch,
            pad=pad,
            flip=how.flip,
            vertical_flip=how.vertical_flip,
        )


def copy_key(key: str, copy: int) -> str:
    """The key by which another copy of an image is varied in an epoch; the first has its own."""
    return f"{key}\0{copy}" if copy else key


def _build_steps(
    preprocessing: Preprocessing, augmentation: Augmentation
) -> tuple[nn.Module | None, list[nn.Module]]:
    """What takes a part of an image, if anything, and what happens to it after shifts and flips."""
    how = augmentation
    is_plain = how.crop != "random_resized" and how.policy == "none"
    if is_plain and not (how.rotation or how.color_jitter or how.erasing):
        return None, []
    from cnnray.images.random_steps import build_steps, build_window

    return build_window(preprocessing, how), build_steps(preprocessing, how)


def _image_seed(seed: int, *, epoch: int, key: str) -> int:
    """A stable hash; Python's own differs between processes."""
    text = f"{seed}/{epoch}/{key}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator alone (no device is touched) and restore it afterwards."""
    generator = torch.default_generator
    with _generator_lock:
        state = generator.get_state()
        generator.manual_seed(seed)
        try:
            yield
        finally:
            generator.set_state(state)
