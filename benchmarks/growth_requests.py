"""What a labelling run asks of an object store, in requests and bytes, for any number of images.

Three runs tell the cost of an image, of a part and of a run apart: n images in one part, 4 n images
in one part, 4 n images in four.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import note
from benchmarks.labelling import Setting
from benchmarks.processes import run_process
from benchmarks.seaweed import BUCKET, Server, seaweed

FACTOR = 4
PART_ROWS = 65_536
"""Images of a part by default."""
EXTRAPOLATED = (10**6, 10**9)


@dataclass(frozen=True)
class Requests:
    """Costs by kind: requests LIST, GET (HEAD, too) and PUT; bytes sent and received."""

    image: Mapping[str, float]
    part: Mapping[str, float]
    run: Mapping[str, float]

    def of(self, images: int, *, part_rows: int = PART_ROWS) -> dict[str, float]:
        """What one run over so many images asks for."""
        parts = -(-images // part_rows)
        return {
            kind: self.image[kind] * images + self.part[kind] * parts + self.run[kind]
            for kind in self.image
        }

    def lines(self) -> list[str]:
        """For people."""
        costs = {"an image": self.image, "a part": self.part, "a run": self.run}
        costs |= {f"{images:,} images": self.of(images) for images in EXTRAPOLATED}
        return [
            f"requests of {name}: " + ", ".join(f"{kind} {n:,.4g}" for kind, n in cost.items())
            for name, cost in costs.items()
        ]

    def document(self) -> dict[str, Any]:
        """For programs."""
        costs = {"image": self.image, "part": self.part, "run": self.run}
        totals = {str(images): self.of(images) for images in EXTRAPOLATED}
        return {name: dict(cost) for name, cost in costs.items()} | {"extrapolated": totals}


def solve(
    small: Mapping[str, int], large: Mapping[str, int], in_parts: Mapping[str, int], *, images: int
) -> Requests:
    """Costs from three runs: ``images`` in one part, 4 times as many in one part and in four."""
    kinds = sorted(large.keys() | in_parts.keys())
    more = (FACTOR - 1) * images
    image = {kind: (large.get(kind, 0) - small.get(kind, 0)) / more for kind in kinds}
    part = {kind: (in_parts.get(kind, 0) - large.get(kind, 0)) / (FACTOR - 1) for kind in kinds}
    run = {kind: small.get(kind, 0) - image[kind] * images - part[kind] for kind in kinds}
    return Requests(image, part, run)


def measure_requests(setting: Setting, *, images: int) -> Requests:
    """Label objects of a server on this machine into the same bucket, and ask it what it did."""
    files = [Path(url) for url in setting.urls()[: FACTOR * images]]
    if len(files) < FACTOR * images:
        raise ValueError(f"requests of {FACTOR * images} images, but there are {len(files)}")
    with seaweed(setting.folder / "seaweed") as server:
        note(f"uploading {FACTOR * images + images:,} images to count requests")
        server.upload(files[:images], "small")
        server.upload(files, "large")
        runs = (("small", images), ("large", FACTOR * images), ("large", images))
        small, large, in_parts = (
            _count(setting, server, prefix, part_rows=rows, labels=f"labels-{number}")
            for number, (prefix, rows) in enumerate(runs)
        )
    return solve(small, large, in_parts, images=images)


def _count(
    setting: Setting, server: Server, prefix: str, *, part_rows: int, labels: str
) -> Counter[str]:
    before = server.traffic()
    command = [sys.executable, "jobs/classify.py", f"--model={setting.bundle}"]
    command += [f"--input=s3://{BUCKET}/{prefix}", f"--output=s3://{BUCKET}/{labels}"]
    command += [f"--part_rows={part_rows}"]
    run_process(command, seconds=setting.deadline, environment=server.environment)
    after = server.traffic()
    after.subtract(before)
    return after
