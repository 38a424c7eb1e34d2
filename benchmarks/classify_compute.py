"""B2: label full-size JPEGs with ResNet-18 in float32: the network is most of the work.

Contestants: cnnray's job with each of its engines, the benchmark scripts of Ray and of Daft,
PyTorch loops; and the network alone. ``--variant 'NAME=FLAGS'`` enters cnnray again with other
flags, such as another precision. "labels as eager" is what the job finds on its sample; the network
has random weights, so it says little of a trained one.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.harness import Ratio, race, run_benchmark
from benchmarks.labelling import (
    AGREEMENT,
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
from benchmarks.report import Column, Report, describe_machine, publish
from cnnray.errors import SettingsError
from cnnray.models.engines import choose_engine

ENGINES = ("onnxruntime", "openvino", "compile")


def main(argv: Sequence[str] | None = None) -> int:
    """Race, print, and return the exit code."""
    options = settle(labelling_parser(__doc__, full=2_000, short=600).parse_args(argv))
    machine = describe_machine()
    engines, without = _engines()
    variants = [*engines, *options.variant]
    with set_up(options, network="resnet18") as (setting, _):
        peers, skipped = scripts(setting, replicas=num_cores())
        loops = [
            loop(setting, decoder="torchvision", workers=0),
            loop(setting, decoder="torchvision", workers=0, channels_last=True),
            loop(setting, decoder="torchvision", workers=num_cores()),
        ]
        contestants = [
            *cnnray_jobs(setting, variants),
            *peers,
            *loops,
            limit(setting, "network alone", "forward"),
        ]
        results = race(select(contestants, options.only), repeats=options.repeats)
    report = Report(
        benchmark="classify, compute-bound (B2)",
        results=results,
        columns=[*COLUMNS, Column(AGREEMENT, "labels as eager", 4)],
        ratios=_ratios([name for name, _ in variants], tuple(c.name for c in loops)),
        settings={**setting.described, "rounds": options.repeats},
        skipped=without | skipped,
    )
    return publish(report, machine)


def _engines() -> tuple[list[tuple[str, list[str]]], dict[str, str]]:
    """cnnray's flags for each engine, by name; and those that cannot be had, with the reason."""
    variants, without = [], {}
    for name in ENGINES:
        try:
            choose_engine(name, "auto", use_gpu=False)
        except SettingsError as error:
            without[f"cnnray {name}"] = str(error).replace("\nhint: ", ": ")
        else:
            variants.append((f"cnnray {name}", ["--engine.name", name]))
    return variants, without


def _ratios(variants: Sequence[str], loops: tuple[str, ...]) -> list[Ratio]:
    ratios = [
        Ratio(STEADY, ("cnnray",), loops, 1.2),
        Ratio(STEADY, ("cnnray",), ("daft script",), 2.0),
        Ratio(WHOLE, ("cnnray",), loops),
        Ratio(WHOLE, ("cnnray",), ("daft script",)),
        Ratio(STEADY, ("cnnray",), ("ray script",)),
        Ratio(STEADY, ("cnnray",), ("limit: network alone",)),
        Ratio(STEADY, tuple(f"cnnray {name}" for name in ENGINES), loops, 1.4),
    ]
    return ratios + [Ratio(STEADY, (name,), loops) for name in variants]


if __name__ == "__main__":
    run_benchmark(main)
