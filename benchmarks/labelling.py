"""Contestants that label one table of images: cnnray's job as users run it, peers, limits."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow.parquet as pq

from benchmarks.bundles import write_network
from benchmarks.collection import count_rows, find_photos, repeat_files, write_table
from benchmarks.harness import Contestant, ContestantFailed, Figures, note
from benchmarks.options import add_count, add_variants, make_parser, scratch_folder
from benchmarks.processes import Finished, run_process, steady_rate
from benchmarks.report import Column
from benchmarks.seaweed import seaweed

WHOLE, STEADY = "images_per_second", "steady_images_per_second"
AGREEMENT = "agreement"
"""Of an engine's labels with eager's: the job measures it itself."""
COLUMNS = (
    Column(WHOLE, "whole run, img/s", 1),
    Column(STEADY, "steady, img/s", 1),
    Column("first_batch_seconds", "first batch, s", 1),
    Column("seconds", "whole run, s", 1),
)
PROGRESS_SECONDS = "0.01"
"""So that each labelled chunk has a progress line, which says when how many images were done."""
MIN_RATE = 2.0
"""Images a second below which a contestant is given up, after ``START_SECONDS``."""
START_SECONDS = 300.0


@dataclass(frozen=True)
class Setting:
    """What all contestants of a race label, with which network, and where they may write."""

    table: Path
    images: int
    network: str
    bundle: Path
    folder: Path
    device: str = "cpu"
    environment: Mapping[str, str] = field(default_factory=dict)
    described: Mapping[str, str | int] = field(default_factory=dict)
    runs: Iterator[int] = field(default_factory=itertools.count)

    @property
    def deadline(self) -> float:
        """Seconds that a run may take."""
        return START_SECONDS + self.images / MIN_RATE

    def urls(self) -> list[str]:
        """The images, in the order of the table."""
        urls: list[str] = pq.read_table(self.table)["url"].to_pylist()
        return urls

    def new_folder(self) -> Path:
        """A folder for one run; its path does not exist yet."""
        return self.folder / f"run-{next(self.runs):03d}"


def labelling_parser(description: str | None, *, full: int, short: int) -> argparse.ArgumentParser:
    """The flags of every benchmark that labels photos."""
    parser = make_parser(description)
    parser.add_argument("--images", metavar="FOLDER", help="full-size JPEGs to repeat")
    add_count(parser, "--count", full=full, short=short, what="images to label")
    add_variants(parser)
    return parser


@contextlib.contextmanager
def set_up(
    options: argparse.Namespace, *, network: str, store: str = "local", device: str = "cpu"
) -> Iterator[tuple[Setting, Setting]]:
    """Photos, repeated, and the network's bundle: as contestants see them, and on the local disk.

    With the store ``s3`` images are read from a server on this machine; labels are local always.
    """
    photos = find_photos(options.images)
    with scratch_folder(options.scratch) as scratch:
        files = repeat_files(photos, options.count, scratch / "images")
        setting = Setting(
            table=write_table([str(file) for file in files], scratch / "images.parquet"),
            images=len(files),
            network=network,
            bundle=write_network(network, scratch / "bundle"),
            folder=scratch / "runs",
            device=device,
            described={
                "images": len(files),
                "photos": len(photos),
                "mean bytes": sum(photo.stat().st_size for photo in photos) // len(photos),
                "network": network,
                "store": store,
            },
        )
        if store == "local":
            yield setting, setting
            return
        with seaweed(scratch / "seaweed") as server:
            note(f"uploading {len(files):,} images")
            table = write_table(server.upload(files, "images"), scratch / "objects.parquet")
            yield replace(setting, table=table, environment=server.environment), setting


def cnnray_job(setting: Setting, name: str = "cnnray", flags: Sequence[str] = ()) -> Contestant:
    """``jobs/classify.py`` as its users run it."""

    def run() -> Figures:
        output = setting.new_folder()
        command = [sys.executable, "jobs/classify.py", f"--model={setting.bundle}"]
        command += [f"--input={setting.table}", f"--output={output}"]
        command += [f"--cluster.progress_seconds={PROGRESS_SECONDS}", *flags]
        if setting.device == "cuda":
            command.append("--scaling.use_gpu")
        finished = run_process(command, seconds=setting.deadline, environment=setting.environment)
        _require_rows(finished.result.get("labeled", 0), setting)
        shutil.rmtree(output)
        return labelling_figures(finished, setting.images)

    return Contestant(name, run)


def cnnray_jobs(setting: Setting, variants: Sequence[tuple[str, list[str]]]) -> list[Contestant]:
    """cnnray with its defaults, and with the flags that ``--variant`` names."""
    return [cnnray_job(setting), *(cnnray_job(setting, name, flags) for name, flags in variants)]


def peer(setting: Setting, name: str, module: str, *flags: str, writes: bool = True) -> Contestant:
    """A program of ``benchmarks.peers``; what writes nothing is a limit."""

    def run() -> Figures:
        folder = setting.new_folder()
        folder.mkdir(parents=True)
        marks, output = folder / "marks", folder / "labels"
        command = [sys.executable, "-m", f"benchmarks.peers.{module}", *flags]
        command += [f"--table={setting.table}", f"--output={output}", f"--marks={marks}"]
        command += [f"--network={setting.network}", f"--device={setting.device}"]
        command += [f"--weights={setting.bundle / 'model.safetensors'}"]
        finished = run_process(
            command, seconds=setting.deadline, environment=setting.environment, marks=marks
        )
        if writes:
            _require_rows(count_rows(output), setting)
        shutil.rmtree(folder)
        return labelling_figures(finished, setting.images)

    return Contestant(name, run)


def scripts(setting: Setting, *, replicas: int = 1) -> tuple[list[Contestant], dict[str, str]]:
    """The engines' own benchmark scripts; and those that cannot run here, with the reason.

    ``replicas``: of the network in Ray's, which gives each one thread; Daft's takes every core.
    """
    found = [peer(setting, "ray script", "ray_script", f"--replicas={replicas}")]
    if importlib.util.find_spec("daft") is None:
        return found, {"daft script": "daft is not installed: pip install 'cnnray[bench]'"}
    return [*found, peer(setting, "daft script", "daft_script")], {}


def loop(
    setting: Setting, *, decoder: str, workers: int, channels_last: bool = False
) -> Contestant:
    """The hand-written loop."""
    place = f"{workers} workers" if workers else "in process"
    name = f"loop, {decoder}, {place}{', channels-last' if channels_last else ''}"
    flags = [f"--decoder={decoder}", f"--workers={workers}"]
    flags += ["--channels_last"] if channels_last else []
    return peer(setting, name, "dataloader", *flags)


def limit(setting: Setting, name: str, module: str, *flags: str) -> Contestant:
    """What the machine can do at the most at one part of the work."""
    return peer(setting, f"limit: {name}", module, *flags, writes=False)


def labelling_figures(finished: Finished, images: int) -> Figures:
    """Rates of the whole run, start-up included, and after the first labelled batch."""
    figures = {"seconds": finished.seconds, WHOLE: images / finished.seconds}
    if finished.marks:
        figures["first_batch_seconds"] = finished.marks[0][0]
    if finished.result.get(AGREEMENT) is not None:
        figures[AGREEMENT] = finished.result[AGREEMENT]
    steady = steady_rate(finished.marks)
    return figures if steady is None else {**figures, STEADY: steady}


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _require_rows(rows: int, setting: Setting) -> None:
    if rows != setting.images:
        raise ContestantFailed(f"{rows} of {setting.images} images were labelled")
