"""Workers that ask a model, in one process or in two; they read, and write nothing."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import pyarrow as pa
import ray
import torch

from cnnray.labeling.decoding import Sample, SampleDecoder
from cnnray.labeling.labeler import Labeler, RowPredictor, with_columns
from cnnray.process import keep_freed_memory


class UnitReader(Protocol):
    """Reads what units describe."""

    def read(self, units: pa.Table) -> Iterator[tuple[pa.Table, Iterable[Sample]]]:
        """The rows of some units, chunk by chunk, each with its samples."""


class InferenceJob(Protocol):
    """What every worker of a job is made from; it travels to each of them."""

    @property
    def kept(self) -> Sequence[str]:
        """Columns of a reader's rows that stay beside the decoded images and the answers."""

    def open_reader(self) -> UnitReader:
        """What reads in a worker."""

    def open_decoder(self, *, careful: bool) -> SampleDecoder:
        """What decodes in a worker."""

    def open_predictor(self) -> RowPredictor:
        """What computes in a worker."""


class LabelActor:
    """One worker that does everything, with its own copy of the model."""

    def __init__(self, *, job: InferenceJob) -> None:
        self.reader = job.open_reader()
        self.labeler = Labeler(_open_decoder(job), job.open_predictor())
        self.kept = list(job.kept)

    def __call__(self, units: pa.Table) -> Iterator[pa.Table]:
        """Answers for the rows of some units."""
        for rows, samples in self.reader.read(units):
            answers = self.labeler.label(samples, rows.select(self.kept))
            yield with_columns(answers, rows, self.kept)


class DecodeActor:
    """One worker of those that read and decode for others."""

    def __init__(self, *, job: InferenceJob) -> None:
        set_up_actor(use_gpu=False)
        self.reader = job.open_reader()
        self.decoder = _open_decoder(job)
        self.kept = list(job.kept)

    def __call__(self, units: pa.Table) -> Iterator[pa.Table]:
        """Decoded rows of some units."""
        for rows, samples in self.reader.read(units):
            yield with_columns(self.decoder.decode(list(samples)), rows, self.kept)


class PredictActor:
    """One worker of those that ask the model about what others have decoded."""

    def __init__(self, *, job: InferenceJob) -> None:
        self.predictor = job.open_predictor()
        self.kept = list(job.kept)

    def __call__(self, decoded: pa.Table) -> pa.Table:
        """Answers for decoded rows."""
        return with_columns(self.predictor.predict(decoded), decoded, self.kept)


def set_up_actor(*, use_gpu: bool) -> torch.device:
    """This actor's device; sets its torch threads to the CPUs that it reserved."""
    keep_freed_memory()
    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    return torch.device("cuda" if use_gpu else "cpu")


def _open_decoder(job: InferenceJob) -> SampleDecoder:
    # An actor that died may have been killed by an image, which it will be given again.
    return job.open_decoder(careful=ray.get_runtime_context().was_current_actor_reconstructed)
