"""B5: what grows with the collection: memory, planning, a run with nothing new, requests.

The memory of driver and workers is that of ``jobs/classify.py`` on 1, 4 and 16 times the images;
the first labelled batch is timed in the same runs. A million keys are planned, then all of them
count as labelled, and the job finds nothing new. Requests are counted by SeaweedFS and extrapolated
from the cost of an image, of a part (output file) and of a run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from benchmarks.collection import write_table
from benchmarks.growth_keys import KeyTables
from benchmarks.growth_requests import measure_requests
from benchmarks.harness import Contestant, Figures, Ratio, race, run_benchmark
from benchmarks.labelling import (
    PROGRESS_SECONDS,
    Setting,
    labelling_figures,
    labelling_parser,
    set_up,
)
from benchmarks.memory import MemoryWatch
from benchmarks.options import add_count, select, settle
from benchmarks.processes import run_process
from benchmarks.report import Column, Report, describe_machine, publish

FACTORS = (1, 4, 16)
COLUMNS = (
    Column("seconds", "seconds", 1),
    Column("first_batch_seconds", "first batch, s", 1),
    Column("driver_mb", "driver, MB"),
    Column("worker_mb", "largest worker, MB"),
    Column("tree_mb", "all processes, MB"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit code."""
    options = _parse(argv)
    machine = describe_machine()
    base, options.count = options.count, options.count * max(FACTORS)
    with set_up(options, network="tiny") as (setting, _):
        tables = KeyTables(setting, num_keys=options.keys)
        contestants = [
            *(
                Contestant(_label(base, factor), partial(_label_part, setting, base * factor))
                for factor in FACTORS
            ),
            Contestant("plan keys", tables.plan),
            Contestant("nothing new", tables.find_nothing_new),
        ]
        results = race(select(contestants, options.only), repeats=options.repeats)
        requests = measure_requests(setting, images=options.request_images)
    largest, smallest = _label(base, max(FACTORS)), _label(base, 1)
    report = Report(
        benchmark="growth (B5)",
        results=results,
        columns=COLUMNS,
        ratios=[Ratio(figure, (largest,), (smallest,)) for figure in ("driver_mb", "worker_mb")],
        settings={**setting.described, "keys": options.keys, "rounds": options.repeats},
        remarks=[
            "goals: memory of 16 times the images within 1.15; planning 10^6 keys in 60 s and"
            " 500 MB, nothing new in 30 s; first batch in 15 s",
            *requests.lines(),
        ],
        extra={"requests": requests.document()},
    )
    return publish(report, machine)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = labelling_parser(__doc__, full=1_000, short=100)
    add_count(parser, "--keys", full=1_000_000, short=20_000, what="keys to plan")
    add_count(parser, "--request_images", full=1_024, short=256, what="images to count requests of")
    return settle(parser.parse_args(argv))


def _label(base: int, factor: int) -> str:
    return f"label {base * factor:,} images"


def _label_part(setting: Setting, images: int) -> Figures:
    """Label the first images of the table; the peaks of memory meanwhile."""
    folder = setting.new_folder()
    folder.mkdir(parents=True)
    part = replace(setting, images=images)
    urls = part.urls()[:images]
    command = [sys.executable, "jobs/classify.py", f"--model={setting.bundle}"]
    command += [f"--input={write_table(urls, folder / 'images.parquet')}"]
    command += [f"--output={folder / 'labels'}", f"--cluster.progress_seconds={PROGRESS_SECONDS}"]
    memory = MemoryWatch()
    finished = run_process(command, seconds=part.deadline, watch=memory)
    return {**labelling_figures(finished, images), **memory.figures()}


if __name__ == "__main__":
    run_benchmark(main)
