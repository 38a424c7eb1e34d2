"""What a training run reads: its splits, with the sampler it asks for, decoded where they fit."""

from __future__ import annotations

import logging
import math

import ray

from cnnray.cluster.core.nodes import read_nodes
from cnnray.cluster.core.ordered import ReadAhead
from cnnray.cluster.train.ingest import SplitFeed, StreamedSplit, balance, decode_once
from cnnray.cluster.train.reading import SplitReader
from cnnray.config import TrainSettings
from cnnray.datasets.manifest import Manifest, get_split
from cnnray.datasets.sampling import PlainSampler
from cnnray.images.augment import TrainTransform
from cnnray.options import Augmentation
from cnnray.storage import Store
from cnnray.training.network import Network

logger = logging.getLogger(__name__)

UNIT_BYTES = 16 * 1024 * 1024
"""Decoded bytes of one unit, at most: a rank holds one unit for each of its lanes."""
UNIT_ROWS = 512
"""Rows of one unit, at most: the first batch needs one unit of every lane."""
TASKS_PER_CPU = 2
"""Units under way for each CPU of the cluster, so that none waits for the next one to come."""
MIN_TASKS = 4
"""Units of a rank that are read at a time, at least."""
MIN_AHEAD_BYTES = 64e6
"""What a rank may have read ahead, at least; small units are many."""


def make_feeds(
    data: Store, manifest: Manifest, settings: TrainSettings, network: Network, *, num_workers: int
) -> dict[str, SplitFeed]:
    """What the ranks read of ``train`` and, if there are images to validate on, of ``val``.

    Each rank reads as far ahead as ``num_workers`` can on the cluster as it is.
    Reading labels or images raises ``DataError`` for what is damaged.
    """
    feeds = {
        name: _feed(reader, settings, network, num_workers=num_workers)
        for name, reader in _readers(data, manifest, settings, network).items()
    }
    if settings.imbalance.method == "balanced_sampler":
        feeds["train"] = balance(
            feeds["train"], seed=settings.seed, stall_seconds=settings.cluster.stall_seconds
        )
    return _decode_what_fits(feeds, settings, network)


def make_transforms(settings: TrainSettings, network: Network) -> dict[str, TrainTransform]:
    """What becomes of the images of each split. Raises ``SettingsError`` for a pad too large."""
    return {
        split: TrainTransform(
            network.preprocessing, augmentation, seed=settings.seed, limits=settings.limits
        )
        for split, augmentation in (("val", Augmentation()), ("train", settings.augment))
    }


def _readers(
    data: Store, manifest: Manifest, settings: TrainSettings, network: Network
) -> dict[str, SplitReader]:
    """Of the splits that there are: validation, if any, and training."""
    transforms = make_transforms(settings, network)
    if manifest.splits["val"].num_samples == 0:
        logger.warning("no validation split: the best epoch is chosen by its training loss")
        del transforms["val"]
    return {
        split: SplitReader(
            store=data,
            split=get_split(manifest, split, uri=settings.data),
            transform=transform,
            repeats=settings.augment.repeats if split == "train" else 1,
            decode_seconds=settings.decode_seconds,
        )
        for split, transform in transforms.items()
    }


def _feed(
    reader: SplitReader, settings: TrainSettings, network: Network, *, num_workers: int
) -> SplitFeed:
    """A split as it is read in every epoch."""
    row_bytes = settings.augment.repeats * _image_bytes(network)
    unit_rows = max(1, min(UNIT_ROWS, UNIT_BYTES // row_bytes))
    cpus = ray.cluster_resources().get("CPU", 1.0)
    tasks = max(MIN_TASKS, math.ceil(TASKS_PER_CPU * cpus / num_workers))
    ahead = ReadAhead(
        tasks=tasks,
        num_bytes=max(MIN_AHEAD_BYTES, 2 * tasks * unit_rows * row_bytes),
        stall_seconds=settings.cluster.stall_seconds,
    )
    sampler = PlainSampler(tuple(reader.row_groups), settings.seed)
    return SplitFeed(reader, sampler, StreamedSplit(reader, ahead), unit_rows)


def _decode_what_fits(
    feeds: dict[str, SplitFeed], settings: TrainSettings, network: Network
) -> dict[str, SplitFeed]:
    """The same; splits that are small, and quick to vary, have been decoded.

    They take half of a node's object store at most: what tasks read needs some of it, too.
    """
    room = min(node.resources.get("object_store_memory", 0.0) for node in read_nodes()) / 2
    room = min(room, settings.ingest.decoded_bytes)
    ready = dict(feeds)
    for name, feed in feeds.items():
        num_bytes = feed.split.num_samples * _image_bytes(network)
        if feed.reader.transform.is_quick and num_bytes <= room:
            room -= num_bytes
            ready[name] = decode_once(feed, stall_seconds=settings.cluster.stall_seconds)
            logger.info("%s split: decoded once, %.0f MB", name, num_bytes / 1e6)
    return ready


def _image_bytes(network: Network) -> int:
    """Of one decoded image."""
    return network.preprocessing.channels * network.preprocessing.size**2
