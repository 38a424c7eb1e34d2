"""The promises of the classify job at full size: kills by the hundred, pairs, nights, readers.

``python tests/faults/soak.py kills --count 200 --seed 1`` proves one of them, ``all`` each in turn.
It prints a line a round and one that sums up. The first violation ends it with exit code 1, and
leaves the folder where it happened. The jobs are real processes on a Ray head that it starts.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from checker import find_problems
from colours import COLOURS, paint, write_bundle, write_images
from ray_jobs import (
    JOB_SECONDS,
    ROOT,
    Job,
    RayNode,
    environment,
    label_workers,
    parts_of,
    ray_head,
    verify,
    wait_until,
)
from read_counter import ReadCounter, ReadsAfterKills
from soak_checks import READERS, Witness, find_differences, poll

PART_ROWS, CHUNK_ROWS = 50, 10
KILLS_A_RUN = 2  # of workers: a worker may be restarted three times
CHUNKS_A_WORKER = 2  # that are with it at a time, at most: one at work, one that waits
KILLS_A_NIGHT = 2
IDLE_SECONDS = 30
REAP_SECONDS = 30
SEEDS_A_PIECE = 500
PIECE_SECONDS = 1800


class Violation(Exception):
    """A promise was broken."""


@dataclass(frozen=True)
class Pace:
    """Seconds from the start of an undisturbed job to its first write, first part and end."""

    first_write: float
    first_part: float
    end: float

    def scaled(self, factor: float) -> Pace:
        return Pace(factor * self.first_write, factor * self.first_part, factor * self.end)


class Soak:
    """A folder with images and a model, a Ray head, and dice."""

    def __init__(self, name: str, folder: Path, head: RayNode, *, images: int, seed: int) -> None:
        self.name = name
        self.folder = folder
        self.head = head
        self.dice = random.Random(seed)
        self.images = folder / "images"
        self.answers = write_images(self.images, range(images))
        self.bundle = write_bundle(folder / "bundle")
        self.variables = environment()
        self.tables = 0
        self.pace = self.measure()

    def say(self, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {self.name}: {text}", flush=True)

    def new_table(self) -> Path:
        """Where the next table will be; the one before is removed."""
        shutil.rmtree(self.folder / f"table-{self.tables}", ignore_errors=True)
        self.tables += 1
        return self.folder / f"table-{self.tables}"

    def start(self, table: Path, *flags: str) -> Job:
        """The job that labels the images into a table."""
        command = [f"--model={self.bundle}", f"--input={self.images}", f"--output={table}"]
        command += [f"--part_rows={PART_ROWS}", f"--chunk_rows={CHUNK_ROWS}"]
        command += [f"--cluster.address={self.head.address}", "--cluster.progress_seconds=1"]
        return Job(self.folder, *command, *flags, variables=self.variables)

    def measure(self) -> Pace:
        """How long the job takes when it is left alone."""
        table = self.new_table()
        with self.start(table) as job:
            wait_until(lambda: table.exists() or not job.is_running, "a first write")
            first_write = job.seconds
            job.wait_for_parts(table, 1)
            first_part = job.seconds
            self.require_success(job)
        self.require_whole(table)
        self.say(
            f"undisturbed, first write after {first_write:.1f} s, first part after"
            f" {first_part:.1f} s, end after {job.seconds:.1f} s"
        )
        return Pace(first_write, first_part, job.seconds)

    def kill(self, job: Job, table: Path) -> bool:
        """Kill a driver at a moment between its first write and its end; False when it has ended.

        Most of that time is the workers' start. So half of the kills strike before the first part
        of this driver's, at any moment, and half after it.
        """
        pace, before = self.pace, len(parts_of(table))
        if self.dice.random() < 0.5:
            is_killed = job.kill_after(self.dice.uniform(pace.first_write, pace.first_part))
        else:
            wait_until(lambda: len(parts_of(table)) > before or not job.is_running, "a new part")
            moment = job.seconds + self.dice.uniform(0, pace.end - pace.first_part)
            is_killed = job.kill_after(moment)
        if not is_killed and not before:  # all the work: the machine is not as busy as it was
            self.pace = pace.scaled(job.seconds / pace.end)
        return is_killed

    def require(self, holds: object, what: str) -> None:
        if not holds:
            raise Violation(what)

    def require_success(self, job: Job) -> None:
        self.require(job.wait() == 0, f"exit code {job.wait()}:\n{job.log}")
        self.require("Traceback" not in job.log, f"a traceback:\n{job.log}")

    def require_whole(self, table: Path) -> None:
        """Each image once, with its own label, and the table's own proof."""
        self.require_none(find_problems(table, self.answers))
        self.require_proof(table)

    def require_proof(self, table: Path) -> None:
        proof = verify(str(table), self.variables)
        self.require(proof.returncode == 0, proof.stderr)
        self.require("no run is open" in proof.stderr, proof.stderr)

    def require_no_workers(self) -> None:
        """Those of a driver that was killed end, too."""
        try:
            wait_until(lambda: not label_workers(self.head.pid), "no workers", seconds=REAP_SECONDS)
        except TimeoutError:
            raise Violation("workers of a killed driver live on") from None

    def require_sight(self, witness: Witness) -> None:
        self.require_none(witness.look())

    def require_none(self, problems: list[str]) -> None:
        self.require(not problems, "; ".join(problems))


# What is proven


def prove_kills(soak: Soak, count: int) -> str:
    """Drivers are killed at any moment from their first write on, table after table."""
    killed, tables, states = 0, 0, Counter[str]()
    again, in_flight, most = 0, 0, 0
    with closing(ReadCounter(soak.images)) as counter:
        while killed < count:
            table, runs, is_killed = soak.new_table(), 0, True
            witness, reads = Witness(table), ReadsAfterKills()
            while is_killed:
                with soak.start(table) as job:
                    is_killed = killed < count and soak.kill(job, table)
                    if not is_killed:
                        soak.require_success(job)
                runs += 1
                soak.require_no_workers()  # which read on for a moment
                soak.require_sight(witness)
                soak.require_none(reads.add(counter.take(), witness.keys))
                if is_killed:
                    killed += 1
                    states[state := state_of(table, len(soak.answers))] += 1
                    soak.say(
                        f"kill {killed} of {count} after {job.seconds:.1f} s, {state},"
                        f" {witness.num_rows} rows visible, {reads.in_flight} images in flight"
                        f" so far and {reads.again} read again"
                    )
            soak.require_whole(table)
            tables, again, in_flight = tables + 1, again + reads.again, in_flight + reads.in_flight
            most = max(most, reads.most_in_flight)
            soak.say(f"table {tables} is whole after {runs} runs")
    killed_when = ", ".join(f"{number} {state}" for state, number in states.most_common())
    return (
        f"{killed} drivers killed ({killed_when}), {tables} tables whole, {in_flight} images in"
        f" flight when killed (at most {most} at once) and {again} read again"
    )


def state_of(table: Path, rows: int) -> str:
    """How far a killed driver, or those before it, had come."""
    parts, log = len(parts_of(table)), sorted((table / "_cnnray/log").glob("*.json"))
    if not log:
        return "before the run was opened"
    if len(log) > 1:
        return "after the commit"
    if not parts:
        return "before the first part"
    return "between parts" if parts < -(-rows // PART_ROWS) else "between last part and commit"


def prove_workers(soak: Soak, count: int) -> str:
    """Workers are killed at any moment of their lives: half while they start, half at work."""
    killed, runs, again = 0, 0, 0
    with closing(ReadCounter(soak.images)) as counter:
        while killed < count:
            table, before = soak.new_table(), killed
            with soak.start(table) as job:
                for _ in range(min(KILLS_A_RUN, count - killed)):
                    if not kill_a_worker(soak, job, table):
                        break
                    killed += 1
                    soak.say(f"kill {killed} of {count}, {len(parts_of(table))} parts were there")
                soak.require_success(job)
            soak.require_whole(table)
            runs += 1
            reads = counter.take()
            again += (twice := reads.total() - len(reads))
            in_flight = (killed - before) * CHUNKS_A_WORKER * CHUNK_ROWS
            soak.require(twice <= in_flight, f"{twice} images were read again, above {in_flight}")
            soak.say(f"table {runs} is whole, {twice} images were read again")
    return f"{killed} workers killed in {runs} runs, all tables whole, {again} images read again"


def kill_a_worker(soak: Soak, job: Job, table: Path) -> bool:
    """Kill one, unless the job is faster than the dice."""
    pace, before, is_early = soak.pace, len(parts_of(table)), soak.dice.random() < 0.5
    wait_until(
        lambda: (
            not job.is_running
            or (label_workers(soak.head.pid) if is_early else len(parts_of(table)) > before)
        ),
        "a worker, or a part",
    )
    longest = pace.first_part - pace.first_write if is_early else pace.end - pace.first_part
    job.wait_at_most(soak.dice.uniform(0, longest))
    workers = label_workers(soak.head.pid)
    if not workers or not job.is_running:
        return False
    with suppress(psutil.NoSuchProcess):
        soak.dice.choice(workers).kill()
        return True
    return False


def prove_pairs(soak: Soak, count: int) -> str:
    """Two drivers label the same images at once; the second starts at any moment of the first."""
    planned = Counter[int]()
    for number in range(1, count + 1):
        table, offset = soak.new_table(), soak.dice.uniform(0, soak.pace.end)
        workers = f"--scaling.num_workers={soak.dice.choice((1, 2))}"
        with soak.start(table, workers) as first:
            first.wait_at_most(offset)
            with soak.start(table, workers) as second:
                for job in (first, second):
                    soak.require_success(job)
        soak.require_whole(table)
        runs = sorted((table / "_cnnray/log").glob("*.json"))
        soak.require(len(runs) == 2, f"{len(runs)} entries in the log instead of two")
        worked = sum(job.result["planned"] > 0 for job in (first, second))
        planned[worked] += 1
        soak.say(f"pair {number} of {count}, {offset:.1f} s apart, {worked} had a run to work on")
    return f"{count} pairs ({planned[2]} worked on the same run), each image once"


def prove_nights(soak: Soak, count: int) -> str:
    """After the first night, images come, change and go between runs, which are killed, too."""
    table = soak.new_table()
    witness, rows, idle_seconds = Witness(table), [*soak.answers.items()], 0.0
    for night in range(count + 1):
        rows += change_images(soak, night) if night else []
        started, killed, is_killed = time.monotonic(), 0, True
        while is_killed:
            with soak.start(table) as job:
                is_killed = killed < KILLS_A_NIGHT and soak.kill(job, table)
                if not is_killed:
                    soak.require_success(job)
            killed += is_killed
            soak.require_sight(witness)
        soak.require_none(find_differences(table, rows))
        soak.require_proof(table)
        seconds = time.monotonic() - started
        idle_seconds = max(idle_seconds, require_idle(soak, table))
        soak.say(
            f"night {night} of {count}, {killed} kills, {len(rows)} rows, {seconds:.0f} s;"
            f" nothing new: {idle_seconds:.1f} s"
        )
    return f"{count} nights, {len(witness.seen or [])} rows, idle within {idle_seconds:.1f} s"


def require_idle(soak: Soak, table: Path) -> float:
    """A job that finds nothing new writes nothing and starts no Ray; its seconds."""
    before = files_of(table)
    with soak.start(table) as job:
        soak.require_success(job)
    soak.require(files_of(table) == before, "a run with nothing new has written something")
    soak.require(job.result["run"] is None, f"there was something new: {job.result}")
    soak.require("Ray" not in job.log, "Ray was started for nothing")
    soak.require(job.seconds < IDLE_SECONDS, f"nothing new took {job.seconds:.0f} s")
    return job.seconds


def change_images(soak: Soak, night: int) -> list[tuple[str, str]]:
    """A tenth of the images are new, a twentieth change, a twentieth go; the rows to come."""
    present = sorted(str(path.relative_to(soak.images)) for path in files_of(soak.images))
    share = len(present) // 20
    chosen = soak.dice.sample(present, 2 * share)
    for key in chosen[:share]:
        (soak.images / key).unlink()
    first = night * 1_000_000
    rows = [*write_images(soak.images, range(first, first + 2 * share)).items()]
    for number, key in enumerate(chosen[share:], first + 2 * share):
        colour = soak.dice.choice(COLOURS)
        (soak.images / key).write_bytes(paint(colour, number))
        rows.append((key, colour))
    return rows


def files_of(folder: Path) -> dict[Path, tuple[int, int]]:
    """Every file: its inode and the time of its last change."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path: (status.st_ino, status.st_mtime_ns) for path in files for status in [path.stat()]}


def prove_readers(soak: Soak, count: int) -> str:
    """Three readers poll the table while it grows."""
    total = Counter[str]()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(READERS), mp_context=context) as pool:
        for number in range(1, count + 1):
            table, end = soak.new_table(), soak.folder / f"end-{number}"
            polls = {name: pool.submit(poll, name, table, end, JOB_SECONDS) for name in READERS}
            with soak.start(table) as job:
                soak.require_success(job)
            end.touch()
            for name, future in polls.items():
                times, rows, problem = future.result(JOB_SECONDS)
                soak.require(not problem, problem)
                soak.require(rows == len(soak.answers), f"{name} saw {rows} rows in the end")
                total[name] += times
            soak.require_whole(table)
            soak.say(f"run {number} of {count}, polls so far: {dict(total)}")
    return f"{count} runs, polls: {dict(total)}, no error, no duplicate, only growing"


PROOFS: dict[str, tuple[Callable[[Soak, int], str], int]] = {
    "kills": (prove_kills, 200),
    "workers": (prove_workers, 20),
    "pairs": (prove_pairs, 20),
    "nights": (prove_nights, 5),
    "readers": (prove_readers, 5),
}
"""What needs Ray, with its count by default."""


def prove_seeds(first: int, count: int) -> str:
    """Simulated worlds, in as many processes as there are CPUs."""
    started, pieces = time.monotonic(), range(first, first + count, SEEDS_A_PIECE)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        futures = [
            pool.submit(simulate, start, min(SEEDS_A_PIECE, first + count - start))
            for start in pieces
        ]
        for start, future in zip(pieces, futures, strict=True):
            found = future.result()
            if found:
                raise Violation(f"seeds {found}")
            print(f"{time.strftime('%H:%M:%S')} seeds: from {start} on, none violated", flush=True)
    return f"{count} seeds from {first} on, no violation, {time.monotonic() - started:.0f} s"


def simulate(first: int, count: int) -> dict[str, list[str]]:
    """The violations of some seeds."""
    command = [sys.executable, str(ROOT / "tests/labeling/simulation.py"), str(first), str(count)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, timeout=PIECE_SECONDS
    )
    return dict(json.loads(done.stdout))


# The command line


@contextmanager
def soaking(name: str, options: argparse.Namespace) -> Iterator[Soak]:
    """Ray, images and a model; the folder is removed unless something goes wrong."""
    folder = Path(tempfile.mkdtemp(prefix=f"cnnray-soak-{name}-"))
    print(f"{name}: {options.images} images, seed {options.seed}, in {folder}", flush=True)
    with ray_head(environment()) as head:
        yield Soak(name, folder, head, images=options.images, seed=options.seed)
    shutil.rmtree(folder)


def prove(name: str, options: argparse.Namespace) -> str:
    """Prove one thing and return the summary. Raises ``Violation``, and ``TimeoutError``."""
    if name == "seeds":
        return prove_seeds(options.seed, options.count or options.seeds)
    function, count = PROOFS[name]
    with soaking(name, options) as soak:
        started = time.monotonic()
        summary = function(soak, options.count or count)
        return f"{summary}, {time.monotonic() - started:.0f} s"


def main() -> int:
    """Prove what is asked for; 1 when anything was violated."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("name", choices=[*PROOFS, "seeds", "all"])
    parser.add_argument("--count", type=int, help="kills, pairs, nights, runs or seeds")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--seeds", type=int, default=20_000, help="of seeds, where --count is not")
    parser.add_argument("--seed", type=int, default=1, help="of the dice; the first one of seeds")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that Ray is ended, too
    code = 0
    for name in [*PROOFS, "seeds"] if options.name == "all" else [options.name]:
        try:
            print(f"{name}: PROVEN: {prove(name, options)}", flush=True)
        except (Violation, TimeoutError) as error:
            print(f"{name}: VIOLATED: {error}", flush=True)
            code = 1
    return code


if __name__ == "__main__":
    sys.exit(main())
