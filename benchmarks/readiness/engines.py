"""cnnray's engines: whether their labels are those of strict float32, how fast, on what memory."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from benchmarks.harness import Contestant, Figures
from benchmarks.readiness.subject import PeakMemory, Subject, synchronize
from benchmarks.report import Column
from cnnray.labeling.prediction import Predictor
from cnnray.models.bundle import Bundle
from cnnray.models.classifier import Classifier
from cnnray.models.engines import EagerEngine, Engine, EngineChoice, PreparedEngine, open_engine
from cnnray.models.engines.compiled import CompiledEngine

REFERENCE = "fp32, contiguous, no TF32"
CHOICES = {
    "fp32, channels-last": EngineChoice("eager", "fp32"),
    "bf16, channels-last": EngineChoice("eager", "bf16"),
    "bf16, channels-last, compiled": EngineChoice("compile", "bf16"),
    "fp32, channels-last, compiled": EngineChoice("compile", "fp32"),
}
COLUMNS = (
    Column("labels_same", "labels as the first", 4),
    Column("confidence_difference", "confidence apart, mean", 5),
    Column("largest_difference", "at most", 4),
    Column("accuracy", "accuracy", 3),
    Column("network_images_per_second", "network alone, images/s"),
    Column("rows_per_second", "rows of pixels to labels, images/s"),
    Column("first_batch_seconds", "first batch, s", 1),
    Column("peak_mb", "peak memory, MB"),
)
WARM_UP_BATCHES = 3
LAUNCHES = 8
"""Batches that a GPU is given before it is waited for."""
TOP_K = 5


class ReferenceEngine:
    """The model as a textbook runs it: float32 to the last bit, contiguous, eager."""

    embeddings = False

    def __init__(self, model: Classifier, device: torch.device) -> None:
        self.network = model.to(device)
        self.device = device

    def __call__(self, images: Tensor) -> tuple[Tensor, None]:
        with torch.inference_mode(), _without_tf32():
            return self.network(images.to(self.device).contiguous()), None


@dataclass
class Quickest:
    """The engine that was quickest so far, for what comes after; ``rate`` is its network's."""

    name: str = ""
    rate: float = 0.0
    engine: Engine | None = None


def engine_contestants(subject: Subject, quickest: Quickest) -> list[Contestant]:
    """The reference, then each engine; the first one that runs is what labels are compared with."""
    compared: list[pa.Table] = []

    def contestant(name: str, open_it: Callable[[Classifier], Engine]) -> Contestant:
        def run() -> Figures:
            memory = PeakMemory(subject.device)
            engine = open_it(copy.deepcopy(subject.bundle.model))
            figures, labels = _measure(engine, subject)
            if not compared and name == REFERENCE:
                compared.append(labels)
            if compared:
                figures |= _difference(labels, compared[0])
            rate = figures["network_images_per_second"]
            if name != REFERENCE and rate > quickest.rate:
                quickest.name, quickest.rate, quickest.engine = name, rate, engine
            return {**figures, "peak_mb": memory.megabytes()}

        return Contestant(name, run)

    return [
        contestant(REFERENCE, lambda model: ReferenceEngine(model, subject.device)),
        *(
            contestant(name, partial(_open, choice=choice, subject=subject))
            for name, choice in CHOICES.items()
        ),
    ]


def infer(engine: Engine, images: Tensor) -> Tensor:
    """(B, K) logits of images that are on the device, without the engine's copy to it."""
    if isinstance(engine, ReferenceEngine):
        return engine(images)[0]
    eager = engine.eager if isinstance(engine, CompiledEngine) else engine
    assert isinstance(eager, EagerEngine)
    autocast = torch.autocast(eager.device.type, torch.bfloat16, enabled=eager.is_bf16)
    with torch.inference_mode(), autocast:
        return eager.network(images)[0]


def _open(model: Classifier, *, choice: EngineChoice, subject: Subject) -> Engine:
    bundle: Bundle = replace(subject.bundle, model=model)
    return open_engine(
        PreparedEngine(choice),
        bundle,
        device=subject.device,
        embeddings=False,
        batch_size=subject.batch_size,
    )


def _measure(engine: Engine, subject: Subject) -> tuple[dict[str, float], pa.Table]:
    """Speeds and accuracy of an engine, and the rows that it labels."""
    predictor = Predictor(
        engine,
        subject.bundle.spec,
        digest=subject.bundle.digest,
        top_k=TOP_K,
        batch_size=subject.batch_size,
    )
    started = time.perf_counter()
    predictor.predict(subject.decoded.slice(0, subject.batch_size))
    first_batch_seconds = time.perf_counter() - started
    labels = predictor.predict(subject.decoded)  # the rows of a whole unit of work
    right = labels["label_index"].to_numpy() == subject.labels
    images = subject.images().to(subject.device, memory_format=torch.channels_last)
    if isinstance(engine, ReferenceEngine):
        images = images.contiguous()
    return {
        "accuracy": float(right.mean()),
        "network_images_per_second": len(images) * _rate(lambda: infer(engine, images), subject),
        "rows_per_second": len(labels)
        * _rate(lambda: predictor.predict(subject.decoded), subject, warm_up=0),
        "first_batch_seconds": first_batch_seconds,
    }, labels


def _rate(step: Callable[[], object], subject: Subject, *, warm_up: int = WARM_UP_BATCHES) -> float:
    """Steps a second, over ``subject.seconds``."""
    for _ in range(warm_up):
        step()
    synchronize(subject.device)
    launches = LAUNCHES if subject.device.type == "cuda" else 1
    started, steps = time.perf_counter(), 0
    while time.perf_counter() - started < subject.seconds:
        for _ in range(launches):
            step()
        synchronize(subject.device)
        steps += launches
    return steps / (time.perf_counter() - started)


def _difference(labels: pa.Table, reference: pa.Table) -> dict[str, float]:
    """How far two labellings of the same rows are apart; confidences where the labels agree."""
    same = labels["label_index"].to_numpy() == reference["label_index"].to_numpy()
    apart = np.abs(labels["confidence"].to_numpy() - reference["confidence"].to_numpy())[same]
    return {
        "labels_same": float(same.mean()),
        "confidence_difference": float(apart.mean()) if len(apart) else 0.0,
        "largest_difference": float(apart.max(initial=0.0)),
    }


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    """torch lets convolutions of float32 round their factors to 10 bits on GPUs, by default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
