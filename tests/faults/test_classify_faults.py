"""The classify job on a real Ray that loses drivers, workers, a node and the store.

The images' colours are their labels, and one image in each part takes half a second to decode, so
that there is time for something to happen in the middle of a run. Whatever happens, the same
command finishes the work, no published part is touched again, and each image has its one right row.
"""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from checker import find_problems
from colours import paint, write_bundle, write_images
from ray_jobs import (
    Job,
    RayNode,
    environment,
    label_workers,
    parts_of,
    ray_head,
    ray_node,
    verify,
    wait_until,
)

from cnnray.storage import open_store

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]

NUM_IMAGES, PART_ROWS, CHUNK_ROWS = 240, 20, 10
NUM_PARTS = NUM_IMAGES // PART_ROWS
MID_RUN = 3  # parts
POISON = b"cnnray-poison:%b;"
POISONS = {
    "abort": "decoder_crash",
    "segfault": "decoder_crash",
    "spin": "decoder_timeout",
    "bloat": "decoder_oom",
}
STORE_SECONDS = 90
"""After which a job must have given up on a store that is gone."""

Start = Callable[..., Job]


@pytest.fixture(scope="module")
def chaos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """An S3 server that these tests may kill and start again."""
    from chaos_s3 import ChaosProcess

    with ChaosProcess(tmp_path_factory.mktemp("chaos")) as process:
        process.create_bucket("bucket")
        yield process


@pytest.fixture(scope="module")
def variables(chaos: Any) -> dict[str, str]:
    """The environment of the jobs and of Ray's workers."""
    return environment(**chaos.environment)


@pytest.fixture(scope="module")
def head(variables: dict[str, str]) -> Iterator[RayNode]:
    """One Ray for most of the jobs: they come and go, and it stays."""
    # A node that does not answer three times in a row is dead; by default it takes 15 s and more.
    quick = {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "3"}
    with ray_head(variables | quick) as head:
        yield head


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("images")


@pytest.fixture(scope="module")
def images(folder: Path) -> dict[str, str]:
    """Keys and colours of the images in ``folder``."""
    answers = write_images(folder, range(NUM_IMAGES))
    for key in sorted(answers)[PART_ROWS // 2 :: PART_ROWS]:
        with (folder / key).open("ab") as file:
            file.write(POISON % b"slow")
    return answers


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return tmp_path / "labels"


@pytest.fixture
def start(
    head: RayNode,
    variables: dict[str, str],
    bundle: Path,
    folder: Path,
    table: Path,
    tmp_path: Path,
) -> Iterator[Start]:
    """Start the job that labels ``folder`` into ``table``: on the head, or on a Ray of its own."""
    with ExitStack() as jobs:

        def start_job(
            *flags: str,
            input: Path | str = folder,
            output: Path | str = table,
            address: str = head.address,
        ) -> Job:
            command = [f"--model={bundle}", f"--input={input}", f"--output={output}"]
            command += [f"--part_rows={PART_ROWS}", f"--chunk_rows={CHUNK_ROWS}"]
            command += [f"--cluster.address={address}", "--cluster.progress_seconds=1", *flags]
            return jobs.enter_context(Job(tmp_path, *command, variables=variables))

        yield start_job


def require_whole(table: Path, images: dict[str, str], variables: dict[str, str]) -> None:
    """The table holds each image once, with its own label, and its proof holds."""
    assert find_problems(table, images) == []
    proof = verify(str(table), variables)
    assert proof.returncode == 0, proof.stderr
    assert "no run is open" in proof.stderr


def require_no_wrong_row(table: Path, images: dict[str, str]) -> None:
    """Rows may be missing, but those that are there are right."""
    wrong = [line for line in find_problems(table, images) if "without a row" not in line]
    assert wrong == []


def require_finished(job: Job) -> None:
    assert job.wait() == 0, job.log
    assert "Traceback" not in job.log
    assert (job.result["errors"], job.result["duplicates"]) == (0, 0)


# Drivers


def test_a_job_that_is_stopped_has_published_whole_parts_and_the_same_command_does_the_rest(
    start, table, images, variables
):
    job = start(address="local")
    job.wait_for_parts(table, MID_RUN)
    job.send(signal.SIGTERM)
    assert job.wait(60) == 4, job.log
    assert [line.partition(":")[0] for line in job.error_lines] == ["error", "hint"]
    assert "stopped by SIGTERM" in job.error_lines[0]
    published = parts_of(table)
    assert MID_RUN <= len(published) < NUM_PARTS
    require_no_wrong_row(table, images)

    require_finished(start())
    require_whole(table, images, variables)
    assert published.items() <= parts_of(table).items()


def test_a_driver_that_is_killed_takes_its_workers_along_and_the_same_command_does_the_rest(
    start, table, images, variables
):
    job = start(address="local")
    job.wait_for_parts(table, MID_RUN)
    workers = label_workers(job.process.pid)
    assert len(workers) == 2
    job.send(signal.SIGKILL)
    job.wait()
    published = parts_of(table)
    assert MID_RUN <= len(published) < NUM_PARTS
    require_no_wrong_row(table, images)
    _, orphans = psutil.wait_procs(workers, timeout=30)
    assert orphans == []

    require_finished(start())
    require_whole(table, images, variables)
    assert published.items() <= parts_of(table).items()


def test_two_drivers_at_once_share_the_work_and_both_succeed(start, table, images, variables):
    jobs = [start("--scaling.num_workers=1") for _ in range(2)]
    for job in jobs:
        require_finished(job)
    assert NUM_IMAGES in [job.result["planned"] for job in jobs]
    require_whole(table, images, variables)


def test_a_driver_that_sleeps_while_another_finishes_wakes_up_and_changes_nothing(
    start, table, images, variables
):
    sleeper = start("--scaling.num_workers=1")
    sleeper.wait_for_parts(table, MID_RUN)
    sleeper.send(signal.SIGSTOP)
    asleep = parts_of(table)
    assert len(asleep) < NUM_PARTS
    require_finished(start("--scaling.num_workers=1"))
    require_whole(table, images, variables)
    finished = parts_of(table)
    assert asleep.items() <= finished.items()

    sleeper.send(signal.SIGCONT)
    require_finished(sleeper)
    assert parts_of(table) == finished
    require_whole(table, images, variables)


# Workers and nodes


def test_a_worker_that_is_killed_costs_no_row(start, head, table, images, variables):
    job = start()
    job.wait_for_parts(table, MID_RUN)
    victim = label_workers(head.pid)[0]
    victim.kill()
    assert len(parts_of(table)) < NUM_PARTS
    require_finished(job)
    require_whole(table, images, variables)


def test_a_node_that_is_lost_costs_no_row_though_its_workers_fit_nowhere_else(
    start, head, table, images, variables
):
    with ray_node(head, variables, num_cpus=1) as node:
        job = start("--scaling.num_workers=3", "--cluster.stall_seconds=60")
        wait_until(lambda: label_workers(node.pid), "a worker on the node")
        job.wait_for_parts(table, 1)
        node.kill()
        assert len(parts_of(table)) < NUM_PARTS
        require_finished(job)
    require_whole(table, images, variables)


def test_images_that_crash_hang_or_exhaust_their_decoder_are_rows_with_a_code(
    start, variables, tmp_path
):
    folder, table = tmp_path / "poison", tmp_path / "poisoned"
    answers = write_images(folder, range(80))
    for action, code in POISONS.items():
        poisoned = paint("red", 1) + POISON % action.encode()
        (folder / f"{action}.png").write_bytes(poisoned)
        answers[f"{action}.png"] = code
    job = start("--decode_seconds=3", input=folder, output=table)
    assert job.wait(120) == 0, job.log
    assert job.result["errors"] == len(POISONS)
    require_whole(table, answers, variables)


# The store


def copy_data(uri: str, table: Path) -> None:
    """What readers of a table in a bucket see, as a table on disk."""
    store = open_store(uri)
    for item in store.list("data/"):
        path = table / item.key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(store.read(item.key))


def keys_of(table: Path) -> list[str]:
    """The images that have a row."""
    return [key for path in parts_of(table) for key in pq.read_table(path)["key"].to_pylist()]


def test_a_store_that_goes_away_ends_the_job_and_the_same_command_finishes_when_it_is_back(
    start, chaos, variables, folder, images, tmp_path, monkeypatch
):
    for name, value in chaos.environment.items():
        monkeypatch.setenv(name, value)
    store = open_store("s3://bucket/images")
    for key in images:
        store.write(key, (folder / key).read_bytes())

    places = {"input": "s3://bucket/images", "output": "s3://bucket/labels"}
    job = start(**places)
    wait_until(lambda: len(puts(chaos)) >= MID_RUN or not job.is_running, "parts in the store")
    assert MID_RUN <= len(puts(chaos)) < NUM_PARTS, job.log
    chaos.kill()
    assert job.wait(STORE_SECONDS) == 4, job.log
    assert [line.partition(":")[0] for line in job.error_lines] in (["error"], ["error", "hint"])
    assert "the store" in job.error_lines[0]

    chaos.start()
    copy_data(places["output"], tmp_path / "before")
    require_no_wrong_row(tmp_path / "before", images)
    published = keys_of(tmp_path / "before")
    require_finished(start(**places))
    copy_data(places["output"], tmp_path / "after")
    assert find_problems(tmp_path / "after", images) == []
    assert verify(places["output"], variables).returncode == 0
    assert set(puts(chaos).values()) == {1}
    done = {item.operation for item in chaos.operations() if item.key.startswith("labels/data/")}
    assert done <= {"PutObject", "HeadObject", "GetObject", "ListObjectsV2"}
    reads = Counter(item.key for item in chaos.operations(operation="GetObject", status=200))
    assert {reads[f"images/{key}"] for key in published} == {1}
    assert max(reads[f"images/{key}"] for key in images) <= 2  # what the first job read in vain


def puts(chaos: Any) -> dict[str, int]:
    """How often each part was written."""
    written = chaos.puts_per_key()
    return {key: count for key, count in written.items() if key.startswith("labels/data/")}
