"""The promise of the train job at full size: one order of samples, whoever is killed.

``python tests/faults/order_soak.py --kills 20 --seed 1`` trains without disturbance on 1, 2 and 4
workers, then again while drivers and workers are killed at random: on one worker throughout, and
going on with another number of workers after each kill of a driver. Every log of the order must
be the same, with each image once an epoch, and on one worker the losses, too. It prints a line a
kill and one that sums up. The first violation ends it with exit code 1 and leaves its folder.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
from ray_jobs import ROOT, environment, wait_until

IMAGES, CLASSES, EPOCHS = 16_000, 4, 5
WORKERS = (1, 2, 4)
START_SECONDS, RUN_SECONDS = 180.0, 1200.0
RESTARTS = 3  # of its workers, before a job gives up
MOST_SECONDS = 4.0
"""From the first step on to a kill, at most."""
PROGRESS = re.compile(r"epoch (\d+)/\d+ step (\d+)/")

Order = list[list[list[str]]]
"""The sorted keys of each step of each epoch."""


class Violation(Exception):
    """A promise was broken."""


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} order: {text}", flush=True)


def write_images(folder: Path) -> None:
    """Noise with a brightness that tells its class, as IDX files."""
    dice = np.random.default_rng(0)
    folder.mkdir()
    for split, count in (("train", IMAGES), ("t10k", 100)):
        labels = dice.integers(0, CLASSES, count).astype(np.uint8)
        pixels = dice.integers(0, 120, (count, 28, 28)) + 30 * labels[:, None, None]
        for name, values in (("images-idx3", pixels.astype(np.uint8)), ("labels-idx1", labels)):
            header = np.array([0x0800 + values.ndim, *values.shape], dtype=">u4").tobytes()
            path = folder / f"{split}-{name}-ubyte.gz"
            path.write_bytes(gzip.compress(header + values.tobytes(), compresslevel=1))


class Run:
    """A training run at a folder, submitted as often as it takes."""

    def __init__(self, data: Path, folder: Path) -> None:
        self.data = data
        self.folder = folder
        self.log = folder / "log.txt"
        folder.mkdir()

    @contextlib.contextmanager
    def submit(self, workers: int) -> Iterator[subprocess.Popen[bytes]]:
        """``jobs/train.py``; whatever is left of it afterwards is killed."""
        command = [sys.executable, "jobs/train.py", f"--data={self.data}"]
        command += [f"--output={self.folder / 'model'}", f"--order_log={self.folder / 'order'}"]
        command += [f"--epochs={EPOCHS}", f"--scaling.num_workers={workers}", "--augment.flip=0.5"]
        command += ["--cluster.num_cpus=8", "--scaling.cpus_per_worker=1", "--seed=3"]
        command += ["--checkpoint.every_steps=40", "--cluster.progress_seconds=0.3"]
        with self.log.open("wb") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment(), stderr=log, stdout=subprocess.DEVNULL
            )
        family = psutil.Process(process.pid)
        try:
            yield process
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                left = [*family.children(recursive=True), family]
                for one in left:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        one.kill()
                psutil.wait_procs(left, 20)
            process.wait(20)

    def finish(self, workers: int) -> None:
        """Submit and wait for the end. Raises ``Violation`` when it fails."""
        with self.submit(workers) as process:
            code = process.wait(RUN_SECONDS)
        if code != 0:
            raise Violation(f"exit code {code}: {self.log.read_text()[-2000:]}")

    def steps(self) -> list[tuple[str, ...]]:
        """The places that the log of this submission names."""
        return PROGRESS.findall(self.log.read_text(errors="replace"))

    def order(self) -> Order:
        """What was trained on, from the log of the order."""
        epochs = []
        for epoch in range(EPOCHS):
            table = pq.read_table(self.folder / f"order/epoch-{epoch:05d}", columns=["step", "key"])
            steps: list[list[str]] = [[] for _ in range(1 + max(table["step"].to_pylist()))]
            for step, key in zip(
                *(table[name].to_pylist() for name in ("step", "key")), strict=True
            ):
                steps[step].append(key)
            epochs.append([sorted(keys) for keys in steps])
        return epochs

    def losses(self) -> np.ndarray:
        """Of training and validation, epoch by epoch."""
        document = json.loads((self.folder / "model/model.json").read_text())
        history = document["provenance"]["history"]
        return np.array([[epoch["train_loss"], epoch["val_loss"]] for epoch in history])


def require_whole(order: Order, keys: list[str]) -> None:
    """Each image once an epoch."""
    for epoch, steps in enumerate(order):
        taken = sorted(key for step in steps for key in step)
        if taken != keys:
            raise Violation(f"epoch {epoch}: {len(taken)} images taken, {len(keys)} there are")


def kill_at_random(run: Run, process: subprocess.Popen[bytes], dice: random.Random) -> str | None:
    """Kill the driver or a worker some time after the first step; None when the job has ended."""
    seen = len(run.steps())
    wait_until(
        lambda: len(run.steps()) > seen or process.poll() is not None,
        "a step",
        seconds=START_SECONDS,
    )
    time.sleep(dice.uniform(0, MOST_SECONDS))
    if process.poll() is not None:
        return None
    place = "epoch {} step {}".format(*run.steps()[-1])
    workers = [
        one
        for one in psutil.Process(process.pid).children(recursive=True)
        if "TrainWorker" in "".join(one.cmdline()[:1])
    ]
    if dice.random() < 0.5 and workers:
        dice.choice(workers).kill()
        return f"worker of {len(workers)} killed after {place}"
    os.kill(process.pid, signal.SIGKILL)
    return f"driver killed after {place}"


def disturb(run: Run, kills: int, dice: random.Random, *, counts: tuple[int, ...]) -> int:
    """Train to the end through so many kills; returns how many there were before it ended."""
    done = 0
    while done < kills:
        workers = dice.choice(counts)
        with run.submit(workers) as process:
            for _ in range(min(RESTARTS, kills - done)):
                killed = kill_at_random(run, process, dice)
                if killed is None:
                    if process.wait() != 0:
                        raise Violation(f"the job failed: {run.log.read_text()[-2000:]}")
                    return done
                done += 1
                say(f"kill {done}/{kills}, {workers} workers: {killed}")
                if killed.startswith("driver"):
                    break
    run.finish(dice.choice(counts))
    return done


def prove(folder: Path, *, kills: int, seed: int) -> str:
    dice = random.Random(seed)
    write_images(folder / "idx")
    pack = [
        sys.executable,
        "jobs/pack.py",
        f"--input={folder / 'idx'}",
        f"--output={folder / 'data'}",
    ]
    subprocess.run(pack, cwd=ROOT, env=environment(), check=True, capture_output=True, timeout=300)
    data = folder / "data"
    keys = sorted(pq.read_table(data / "train", columns=["key"])["key"].to_pylist())
    undisturbed = {}
    for workers in WORKERS:
        run = undisturbed[workers] = Run(data, folder / f"workers-{workers}")
        run.finish(workers)
        require_whole(run.order(), keys)
        if run.order() != undisturbed[1].order():
            raise Violation(f"{workers} workers take another order than one")
        say(f"{workers} workers: {len(keys):,} images an epoch, each once, in the same batches")
    total, expected = 0, undisturbed[1].order()
    for name, counts in (("one", (1,)), ("changing", WORKERS)):
        run = Run(data, folder / f"killed-{name}")
        total += disturb(run, kills // 2, dice, counts=counts)
        if run.order() != expected:
            raise Violation(f"{run.folder}: another order than without kills")
        apart = np.abs(run.losses() - undisturbed[1].losses()).max()
        say(f"{name} number of workers: the same order; losses at most {apart:.2g} apart")
        if name == "one" and apart > 1e-5:
            raise Violation(f"losses are {apart:.2g} apart")
    return f"{total} kills, {EPOCHS} epochs of {len(keys):,} images: no image lost or taken twice"


def main() -> int:
    """Prove, print, and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, help="kills in all (20)")
    parser.add_argument("--seed", type=int, default=1, help="of the dice (1)")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="cnnray-order-"))
    try:
        say(prove(folder, kills=options.kills, seed=options.seed))
    except Violation as violation:
        say(f"VIOLATION in {folder}: {violation}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
