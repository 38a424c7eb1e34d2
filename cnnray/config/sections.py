"""Groups of settings that jobs share: ``--section.key value`` on the command line.

The text under each field is its help: units and defaults are there because that is where people
look.
"""

from __future__ import annotations

import os
import re
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, model_validator

from cnnray.options import (
    Cores,
    Fraction,
    NonNegativeInt,
    Options,
    PositiveInt,
    Seconds,
    Threads,
)

WORKER_COUNT = re.compile(r"(?P<least>[1-9]\d*)(:(?P<most>[1-9]\d*))?", re.ASCII)


def _worker_count(value: Any) -> Any:
    """A number as one, MIN:MAX as the text that it is."""
    match = WORKER_COUNT.fullmatch(str(value))
    if match is None or int(match["most"] or match["least"]) < int(match["least"]):
        raise ValueError("must be a number from 1 on, or MIN:MAX of such")
    return value if match["most"] else int(match["least"])


def absolute_path(path: str | None) -> str | None:
    """A local path, also after ``file://``, from the root on; any other address as it is."""
    if path is None:
        return None
    plain = path.removeprefix("file://")
    return plain if "://" in plain else os.path.abspath(os.path.expanduser(plain))


class Section(Options):
    """A group of settings, ``--section.key value`` on the command line."""

    def with_absolute(self, name: str) -> Self:
        """The same settings with a path that does not depend on the working folder."""
        return self.model_copy(update={name: absolute_path(getattr(self, name))})


class ColumnSettings(Section):
    """Names of the columns of an input table; found by convention when not given."""

    path: str | None = None
    """column with the path or s3:// URI of the image (uri, path, image, file, filename, url)"""
    label: str | None = None
    """column with the class (label, class, category, target)"""
    split: str | None = None
    """column with train, val or test (split, subset)"""
    key: str | None = None
    """column with the unique key of the image (key; otherwise the path)"""
    etag: str | None = None
    """column with the etag that the store gives the image, to tell a change (etag, e_tag)"""

    def options(self) -> dict[str, Any]:
        """The names that were given, as options of a source."""
        return {
            f"{name}_column": value for name, value in self.model_dump(exclude_none=True).items()
        }


class BudgetSettings(Section):
    """How many bad images a job accepts: beyond both bounds it ends with exit code 3, rows kept."""

    max_fraction: Fraction = 0.01
    """fraction of the inputs"""
    min_rows: NonNegativeInt = 100
    """rows that are always accepted, however small the collection"""

    def exceeded(self, *, bad: int, total: int) -> bool:
        """Whether ``bad`` of ``total`` images is more than is accepted."""
        return bad > max(self.min_rows, self.max_fraction * total)


class ClusterSettings(Section):
    """Where Ray runs. A job connects to RAY_ADDRESS when it is set, else starts a local Ray."""

    address: str | None = None
    """host:port of a running cluster, auto for the one on this machine, local for a new one"""
    trusted_network: bool = False
    """join a Ray that asks for no token: nobody but its users reaches its ports"""
    num_cpus: Threads | None = None
    """logical CPUs of a local Ray (the machine's)"""
    worker_logs: bool = False
    """copy all that workers print to this log (errors and warnings are shown anyway)"""
    progress_seconds: Seconds = 10.0
    """seconds between two progress lines in a log"""
    stall_seconds: Seconds = 600.0
    """seconds without any progress after which the job fails instead of waiting on"""


WorkerCount = Annotated[int | str, BeforeValidator(_worker_count)]
"""N, or MIN:MAX as a text."""


def split_worker_count(count: int | str) -> tuple[int, int]:
    """The least and the greatest number of N or MIN:MAX."""
    least, _, most = str(count).partition(":")
    return int(least), int(most or least)


class ScalingSettings(Section):
    """Workers of training."""

    num_workers: WorkerCount = 1
    """data-parallel processes; MIN:MAX (quoted in YAML): as many as the cluster has room for"""
    use_gpu: bool = False
    """one GPU for each worker"""
    cpus_per_worker: Cores | None = None
    """CPUs reserved for each worker (as many as leave room for reading the data)"""
    threads_per_worker: Threads | None = None
    """torch threads of each worker (the node's cores shared among its workers)"""

    @property
    def is_elastic(self) -> bool:
        """Whether the number of workers may change while they train."""
        return isinstance(self.num_workers, str)

    @property
    def min_workers(self) -> int:
        """The least number of workers that training goes on with."""
        return split_worker_count(self.num_workers)[0]

    @property
    def max_workers(self) -> int:
        """The greatest number of workers."""
        return split_worker_count(self.num_workers)[1]


class InferenceScalingSettings(Section):
    """Actors that decode and infer."""

    num_workers: WorkerCount | None = None
    """actors; MIN:MAX (quoted in YAML): more as the cluster grows (one for each GPU, else CPU)"""
    use_gpu: bool = False
    """one GPU for each actor"""
    cpus_per_worker: Cores = 1.0
    """CPUs reserved for each actor; also its torch threads"""

    @property
    def min_workers(self) -> int | None:
        """The least number of actors; None: as many as fit."""
        return None if self.num_workers is None else split_worker_count(self.num_workers)[0]

    @property
    def max_workers(self) -> int | None:
        """The greatest number of actors; None: as many as fit."""
        return None if self.num_workers is None else split_worker_count(self.num_workers)[1]


class EngineSettings(Section):
    """What computes the labels; other engines than eager are compared with it before they start."""

    name: Literal["auto", "eager", "compile", "onnxruntime", "openvino"] = "auto"
    """eager, compile (for GPUs), or on CPUs onnxruntime or openvino, which are extras (eager)"""
    precision: Literal["auto", "fp32", "bf16", "int8"] = "auto"
    """int8 is quantised on images of the run (fp32; on a GPU bf16 if the labels stay)"""
    min_agreement: Fraction = 0.99
    """fraction of a sample that must have the label of eager in fp32; below it the job ends"""
    sample: PositiveInt = 256
    """images to compare, at most (as many again to quantise)"""


class SplitSettings(Section):
    """Fractions that a stable hash of the key assigns when the source names no split."""

    val: Fraction = 0.1
    """fraction of the images for validation"""
    test: Fraction = 0.1
    """fraction of the images for the test"""

    @model_validator(mode="after")
    def _leave_some_to_train(self) -> SplitSettings:
        if self.val + self.test >= 1.0:
            raise ValueError("split.val + split.test must leave images to train on")
        return self
