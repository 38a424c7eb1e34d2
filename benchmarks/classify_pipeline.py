"""B1: label full-size JPEGs with a network that costs nothing: listing, reading, decoding, writing.

Contestants: cnnray's job, the benchmark scripts of Ray and of Daft, PyTorch loops; and two limits
of the machine. Steady is from the first labelled batch to the last, a whole run starts with the
process and ends with it.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.harness import Ratio, race, run_benchmark
from benchmarks.labelling import (
    COLUMNS,
    STEADY,
    WHOLE,
    cnnray_jobs,
    labelling_parser,
    limit,
    loop,
    num_cores,
    scripts,
    set_up,
)
from benchmarks.options import select, settle
from benchmarks.report import Report, describe_machine, publish


def main(argv: Sequence[str] | None = None) -> int:
    """Race, print, and return the exit code."""
    parser = labelling_parser(__doc__, full=16_000, short=2_000)
    parser.add_argument("--store", choices=["local", "s3"], default="local")
    options = settle(parser.parse_args(argv))
    machine, cores = describe_machine(), num_cores()
    with set_up(options, network="tiny", store=options.store) as (setting, local):
        engines, skipped = scripts(setting)
        contestants = [
            *cnnray_jobs(setting, options.variant),
            *engines,
            loop(setting, decoder="pil", workers=cores),
            loop(setting, decoder="torchvision", workers=cores),
            limit(local, "decode + resize", "ceiling", "--work=fused", f"--processes={cores}"),
            limit(local, "decode", "ceiling", "--work=decode", f"--processes={cores}"),
        ]
        results = race(select(contestants, options.only), repeats=options.repeats)
    report = Report(
        benchmark="classify, pipeline-bound (B1)",
        results=results,
        columns=COLUMNS,
        ratios=_ratios(["cnnray", *(name for name, _ in options.variant)], cores),
        settings={**setting.described, "rounds": options.repeats},
        skipped=skipped,
    )
    return publish(report, machine)


def _ratios(ours: Sequence[str], cores: int) -> list[Ratio]:
    under = [
        (WHOLE, "daft script", 2.5),
        (WHOLE, "ray script", 5.0),
        (STEADY, "limit: decode + resize", 0.85),
        (WHOLE, f"loop, torchvision, {cores} workers", None),
        (STEADY, f"loop, torchvision, {cores} workers", None),
        (STEADY, "daft script", None),
        (STEADY, "ray script", None),
    ]
    return [
        Ratio(figure, (name,), (other,), goal) for name in ours for figure, other, goal in under
    ]


if __name__ == "__main__":
    run_benchmark(main)
