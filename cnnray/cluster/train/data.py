"""What a training run reads: its splits, with the sampler it asks for, decoded where they fit."""

from __future__ import annotations

import logging
import math

import ray

from cnnray.cluster.core.nodes import read_nodes
from cnnray.cluster.core.tasks import IN_FLIGHT_PER_CPU
from cnnray.cluster.train.ingest import UNIT_BYTES, UNIT_ROWS, SplitReader
from cnnray.config import TrainSettings
from cnnray.datasets.manifest import Manifest, get_split
from cnnray.images.augment import TrainTransform
from cnnray.options import Augmentation
from cnnray.storage import Store
from cnnray.training.network import Network

logger = logging.getLogger(__name__)

MIN_AHEAD = 4
"""Units of a worker that are read at a time, at least."""


def make_readers(
    data: Store, manifest: Manifest, settings: TrainSettings, network: Network, *, num_workers: int
) -> dict[str, SplitReader]:
    """Readers of ``train`` and, if there are images to validate on, of ``val``.

    Each worker reads as far ahead as ``num_workers`` can on the cluster as it is.
    Reading labels or images raises ``DataError`` for what is damaged.
    """
    readers = _readers(data, manifest, settings, network, num_workers=num_workers)
    if settings.imbalance.method == "balanced_sampler":
        readers["train"] = readers["train"].balance()
    return _decode_what_fits(readers, settings, network)


def make_transforms(settings: TrainSettings, network: Network) -> dict[str, TrainTransform]:
    """What becomes of the images of each split. Raises ``SettingsError`` for a pad too large."""
    return {
        split: TrainTransform(
            network.preprocessing, augmentation, seed=settings.seed, limits=settings.limits
        )
        for split, augmentation in (("val", Augmentation()), ("train", settings.augment))
    }


def _readers(
    data: Store, manifest: Manifest, settings: TrainSettings, network: Network, *, num_workers: int
) -> dict[str, SplitReader]:
    """Of the splits that there are: validation, if any, and training."""
    repeats = settings.augment.repeats
    cpus = ray.cluster_resources().get("CPU", 1.0)
    ahead = max(MIN_AHEAD, math.ceil(IN_FLIGHT_PER_CPU * cpus / num_workers))
    transforms = make_transforms(settings, network)
    if manifest.splits["val"].num_samples == 0:
        logger.warning("no validation split: the best epoch is chosen by its training loss")
        del transforms["val"]
    return {
        split: SplitReader(
            store=data,
            split=get_split(manifest, split, uri=settings.data),
            transform=transform,
            unit_rows=max(1, min(UNIT_ROWS, UNIT_BYTES // (repeats * _image_bytes(network)))),
            seed=settings.seed,
            ahead=ahead,
            stall_seconds=settings.cluster.stall_seconds,
            repeats=repeats if split == "train" else 1,
        )
        for split, transform in transforms.items()
    }


def _decode_what_fits(
    readers: dict[str, SplitReader], settings: TrainSettings, network: Network
) -> dict[str, SplitReader]:
    """The same readers; splits that are small, and quick to vary, have been decoded.

    They take half of a node's object store at most: what tasks read needs some of it, too.
    """
    room = min(node.resources.get("object_store_memory", 0.0) for node in read_nodes()) / 2
    room = min(room, settings.ingest.decoded_bytes)
    ready = dict(readers)
    for name, reader in readers.items():
        num_bytes = reader.split.num_samples * _image_bytes(network)
        if reader.transform.is_quick and num_bytes <= room:
            room -= num_bytes
            ready[name] = reader.decode_once()
            logger.info("%s split: decoded once, %.0f MB", name, num_bytes / 1e6)
    return ready


def _image_bytes(network: Network) -> int:
    """Of one decoded image."""
    return network.preprocessing.channels * network.preprocessing.size**2
