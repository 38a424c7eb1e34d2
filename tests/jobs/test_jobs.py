"""The jobs as processes, alone and through ``ray job submit``."""

from __future__ import annotations

import json
import time

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.parametrize("name", ["pack", "train", "tune", "evaluate", "classify", "bench"])
def test_help_is_printed_without_starting_anything(name, run):
    done = run("python", f"jobs/{name}.py", "--help", seconds=60)
    assert done.returncode == 0
    assert "--output" in done.stdout
    assert "default:" in done.stdout


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("pack --input {0} --output {0}/out --shard_size 3", "unknown flag --shard_size"),
        ("pack --input {0}/none --output {0}/out", "no images at all in {0}/none"),
        ("train --data {0} --output {0}/out --lr 0.1", "unknown flag --lr"),
        ("train --data {0}/none --output {0}/out", "no dataset at {0}/none"),
        ("evaluate --model {0} --data {0} --output {0}/out", "no bundle at {0}"),
        ("classify --input {0} --output {0}/out", "--model is required"),
        ("bench --model {0} --input {0} --output {0}/out", "no bundle at {0}"),
        ("bench --model {0} --input {0} --images 0", "--images: "),
    ],
)
def test_a_mistake_ends_in_two_lines_and_exit_code_2_and_writes_nothing(
    command, said, run, tmp_path
):
    name, *flags = command.format(tmp_path).split()
    started = time.monotonic()
    done = run("python", f"jobs/{name}.py", *flags, seconds=90)
    assert done.returncode == 2, done.stderr
    assert time.monotonic() - started < 60
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert lines[0].startswith(f"error: {said.format(tmp_path)}")
    assert len(lines) == 2
    assert lines[1].startswith("hint: ")
    assert not (tmp_path / "out").exists()


def test_a_job_alone_starts_a_ray_of_its_own_and_leaves_no_token_behind(run, shades, tmp_path):
    flags = ("--input", str(shades), "--output", str(tmp_path / "dataset"))
    as_at_home = ("env", "-u", "RAY_AUTH_MODE", "-u", "RAY_AUTH_TOKEN")
    command = (*as_at_home, "python", "jobs/pack.py", *flags)
    done = run(*command, "--cluster.num_cpus", "1", HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["samples"], result["rejected"]) == (120, 0)
    assert "packed 120 + rejected 0 = 120 inputs" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / ".ray").exists()


def test_pack_and_train_run_through_ray_job_submit(run, head, shades, root, tmp_path):
    def submit(name: str, *flags: str) -> dict[str, object]:
        command = ("ray", "job", "submit", "--working-dir", ".", "--", "python", f"jobs/{name}.py")
        done = run(*command, *flags, cwd=root, RAY_API_SERVER_ADDRESS=head.dashboard)
        assert done.returncode == 0, done.stdout + done.stderr
        [line] = [line for line in done.stdout.splitlines() if line.startswith("{")]
        return json.loads(line)

    dataset, model = str(tmp_path / "dataset"), str(tmp_path / "model")
    packed = submit("pack", "--input", str(shades), "--output", dataset)
    assert packed["samples"] == 120
    trained = submit("train", "--data", dataset, "--output", model, "--epochs", "2")
    assert trained["bundle"] == model
    assert trained["epochs"] == 2

    command = ("ray", "job", "submit", "--working-dir", ".", "--", "python", "jobs/pack.py")
    again = run(
        *command, "--input", str(shades), "--output", dataset, RAY_API_SERVER_ADDRESS=head.dashboard
    )
    assert again.returncode == 1  # Ray's own code for a job that failed
    assert "holds a dataset already" in again.stdout + again.stderr
