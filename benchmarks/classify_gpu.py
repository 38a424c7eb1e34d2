"""B6: label full-size JPEGs with ResNet-50 on a GPU.

Contestants: cnnray's job, the benchmark scripts of Ray and of Daft, a PyTorch loop in bfloat16;
and the network alone, in bfloat16, channels-last and compiled. The GPU's busy time is what
nvidia-smi reports between the first labelled batch and the last. ``--device cpu`` runs the same
without a GPU, to test it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks.gpu import watch_gpu
from benchmarks.harness import Ratio, SkipBenchmark, race, run_benchmark
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
from benchmarks.report import Column, Report, describe_machine, publish


def main(argv: Sequence[str] | None = None) -> int:
    """Race, print, and return the exit code."""
    parser = labelling_parser(__doc__, full=100_000, short=5_000)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options = settle(parser.parse_args(argv))
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SkipBenchmark("no GPU on this machine")
    machine = describe_machine()
    with set_up(options, network="resnet50", device=options.device) as (setting, _):
        engines, skipped = scripts(setting)
        contestants = [
            *cnnray_jobs(setting, options.variant),
            *engines,
            loop(setting, decoder="torchvision", workers=num_cores(), channels_last=True),
            limit(setting, "network alone", "forward"),
        ]
        entered = [watch_gpu(contestant) for contestant in select(contestants, options.only)]
        results = race(entered, repeats=options.repeats)
    report = Report(
        benchmark="classify on a GPU (B6)",
        results=results,
        columns=[*COLUMNS, Column("gpu_busy_fraction", "GPU busy", 2)],
        ratios=[
            Ratio(STEADY, ("cnnray",), ("limit: network alone",)),
            Ratio(STEADY, ("cnnray",), (contestants[-2].name,)),
            Ratio(WHOLE, ("cnnray",), ("daft script",)),
            Ratio(WHOLE, ("cnnray",), ("ray script",)),
        ],
        settings={**setting.described, "device": options.device, "rounds": options.repeats},
        skipped=skipped,
    )
    return publish(report, machine)


if __name__ == "__main__":
    run_benchmark(main)
