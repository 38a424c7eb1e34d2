"""B2: label full-size JPEGs with ResNet-18 in float32: the network is most of the work.

Contestants: cnnray's job, the benchmark scripts of Ray and of Daft, PyTorch loops; and the network
alone. ``--variant 'NAME=FLAGS'`` enters cnnray again with other flags, such as another engine.
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
    options = settle(labelling_parser(__doc__, full=2_000, short=600).parse_args(argv))
    machine = describe_machine()
    with set_up(options, network="resnet18") as (setting, _):
        engines, skipped = scripts(setting, replicas=num_cores())
        loops = [
            loop(setting, decoder="torchvision", workers=0),
            loop(setting, decoder="torchvision", workers=0, channels_last=True),
            loop(setting, decoder="torchvision", workers=num_cores()),
        ]
        contestants = [
            *cnnray_jobs(setting, options.variant),
            *engines,
            *loops,
            limit(setting, "network alone", "forward"),
        ]
        results = race(select(contestants, options.only), repeats=options.repeats)
    report = Report(
        benchmark="classify, compute-bound (B2)",
        results=results,
        columns=COLUMNS,
        ratios=_ratios([name for name, _ in options.variant], tuple(c.name for c in loops)),
        settings={**setting.described, "rounds": options.repeats},
        skipped=skipped,
    )
    return publish(report, machine)


def _ratios(variants: Sequence[str], loops: tuple[str, ...]) -> list[Ratio]:
    ratios = [
        Ratio(STEADY, ("cnnray",), loops, 1.2),
        Ratio(STEADY, ("cnnray",), ("daft script",), 2.0),
        Ratio(WHOLE, ("cnnray",), loops),
        Ratio(WHOLE, ("cnnray",), ("daft script",)),
        Ratio(STEADY, ("cnnray",), ("ray script",)),
        Ratio(STEADY, ("cnnray",), ("limit: network alone",)),
    ]
    return ratios + [Ratio(STEADY, (name,), loops, 1.4) for name in variants]


if __name__ == "__main__":
    run_benchmark(main)
