"""Runs that would be over before a cluster has started: the same labeller, in this process.

Images are decoded by limited child processes, one for each CPU: whatever an image does to its
decoder, this process goes on, and the image is a row with a code.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import pyarrow as pa
import torch

from cnnray.cluster.classify.work import PlannedImages, make_predictor
from cnnray.cluster.inference.choices import engine_choice, make_decoder
from cnnray.config import ClassifySettings
from cnnray.datasets.sources import Source
from cnnray.labeling.commit import Run
from cnnray.labeling.decoding import Sample, SampleDecoder
from cnnray.labeling.prediction import Predictor
from cnnray.labeling.units import PlanUnit, plan_units
from cnnray.models.bundle import Bundle
from cnnray.models.engines import PreparedEngine
from cnnray.process import keep_freed_memory

logger = logging.getLogger(__name__)

CLUSTER_SECONDS = 10.0
"""What starting a local Ray and its workers is worth: a run that has more left gets one."""
MEASURED_SECONDS = 1.0
"""Until then a run's pace is not judged."""
MAX_UNITS = 1_000
BATCHES_AHEAD = 2
"""Batches of each decoder that wait or are under way."""


def may_run_here(settings: ClassifySettings) -> bool:
    """Whether nothing in the settings, nor around this process, asks for Ray or for a GPU."""
    scaling = settings.scaling
    asks_for_cluster = (
        settings.cluster.address is not None
        or settings.cluster.num_cpus is not None
        or "RAY_ADDRESS" in os.environ
        or _ray_is_running()
    )
    asks_for_workers = (
        scaling.use_gpu
        or scaling.num_workers is not None
        or settings.decode_workers is not None
        or settings.placement == "split"
    )
    return not asks_for_cluster and not asks_for_workers and engine_choice(settings).is_reference


def _ray_is_running() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


class SmallRunLabeler:
    """Labels the parts of a small run, as far as it is quicker than starting a cluster."""

    def __init__(self, settings: ClassifySettings, bundle: Bundle, *, source: Source) -> None:
        self.settings = settings
        self.bundle = bundle
        self.source = source
        self.is_whole = True  # all that was asked for has been labelled

    def label(self, run: Run, parts: Sequence[int]) -> Iterator[pa.Table]:
        """Label rows with their places; ``is_whole`` is False where a cluster should go on.

        Raises what reading and decoding raise; images at fault are rows.
        """
        units = plan_units(
            run.plan,
            parts,
            chunk_rows=self.settings.chunk_rows,
            workers=1,
            max_units=MAX_UNITS,
        )
        total = sum(map(run.plan.rows_of, parts))
        predictor = self._open_predictor()
        pace = _Pace(total)
        with _Decoders(self.settings, self.bundle) as decoders:
            for rows, samples in self._read(run, units):
                for decoded in decoders.decode(samples, batch_rows=predictor.batch_size):
                    answers = predictor.predict(decoded)
                    yield _placed(answers, rows.slice(0, answers.num_rows))
                    rows = rows.slice(answers.num_rows)
                    pace.add(answers.num_rows)
                    if self._is_slow(pace):
                        logger.info("%s images left: Ray labels them", f"{pace.left:,}")
                        self.is_whole = False
                        return

    def _is_slow(self, pace: _Pace) -> bool:
        return pace.seconds > MEASURED_SECONDS and pace.seconds_left > CLUSTER_SECONDS

    def _open_predictor(self) -> Predictor:
        keep_freed_memory()
        device = torch.device("cpu")
        return make_predictor(self.bundle, self.settings, device=device, prepared=PreparedEngine())

    def _read(
        self, run: Run, units: Iterable[PlanUnit]
    ) -> Iterator[tuple[pa.Table, Iterator[Sample]]]:
        reader = PlannedImages(self.source, run)
        for unit in units:
            yield from reader.read(unit.to_table())


class _Pace:
    """How fast images are done, from the first batch on, which starts the decoders' processes."""

    def __init__(self, total: int) -> None:
        self.left = total
        self.counted = 0
        self.started: float | None = None

    def add(self, images: int) -> None:
        """Count a batch that has just been done."""
        self.left -= images
        if self.started is None:
            self.started = time.perf_counter()
        else:
            self.counted += images

    @property
    def seconds(self) -> float:
        """Since the first batch."""
        return 0.0 if self.started is None else time.perf_counter() - self.started

    @property
    def seconds_left(self) -> float:
        """For the images that are left, at the pace so far."""
        return self.seconds / max(1, self.counted) * self.left


class _Decoders:
    """A decoder in a child process for each CPU, each used by one thread at a time."""

    def __init__(self, settings: ClassifySettings, bundle: Bundle) -> None:
        number = os.cpu_count() or 1
        self.resources = contextlib.ExitStack()
        self.free: queue.Queue[SampleDecoder] = queue.Queue()
        for _ in range(number):
            decoder = make_decoder(bundle.spec.preprocessing, settings, careful=True)
            self.free.put(self.resources.enter_context(contextlib.closing(decoder)))
        self.threads = ThreadPoolExecutor(number, thread_name_prefix="decode")
        self.ahead = BATCHES_AHEAD * number

    def __enter__(self) -> _Decoders:
        return self

    def __exit__(self, *exception: object) -> None:
        self.threads.shutdown(cancel_futures=True)
        self.resources.close()

    def decode(self, samples: Iterable[Sample], *, batch_rows: int) -> Iterator[pa.Table]:
        """Decoded rows of the samples, batch by batch, in order; some batches ahead."""
        iterator = iter(samples)
        batches = iter(lambda: list(islice(iterator, batch_rows)), [])
        ahead: deque[Future[pa.Table]] = deque()
        for batch in batches:
            ahead.append(self.threads.submit(self._decode, batch))
            if len(ahead) > self.ahead:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()

    def _decode(self, batch: Sequence[Sample]) -> pa.Table:
        decoder = self.free.get()
        try:
            return decoder.decode(batch)
        finally:
            self.free.put(decoder)


def _placed(answers: pa.Table, rows: pa.Table) -> pa.Table:
    return answers.append_column("part", rows["part"]).append_column("row", rows["row"])
