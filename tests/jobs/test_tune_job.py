"""Model selection as users run it: a Ray of its own, trials that end, are stopped, fail, go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from cnnray.models.bundle import load_bundle
from cnnray.storage import open_store

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

SPACE = "optimizer.lr: [1.0e-7, 1.0e+30, 0.01]\n"
"""Beside the 0.02 that is given: it learns nothing; its loss is not finite; it is as good."""


def rows_of(folder: Path) -> dict[str | None, dict[str, Any]]:
    """The table of trials, by the learning rate."""
    rows = pq.read_table(folder / "trials.parquet").to_pylist()
    return {row["optimizer.lr"]: row for row in rows}


def test_a_search_stops_what_is_behind_keeps_the_best_and_goes_on_with_more_trials(
    run, shades, tmp_path
):
    data, best = tmp_path / "dataset", tmp_path / "best"
    packed = run("python", "jobs/pack.py", "--input", str(shades), "--output", str(data))
    assert packed.returncode == 0, packed.stderr
    (tmp_path / "space.yaml").write_text(SPACE)
    command = ["python", "jobs/tune.py", f"--data={data}", f"--output={best}", "--epochs=40"]
    command += [f"--space={tmp_path / 'space.yaml'}", "--search=grid", "--grace_epochs=1"]
    command += ["--optimizer.name=sgd", "--optimizer.lr=0.02", "--cluster.num_cpus=2"]

    # On two CPUs a trial finds room only once what was reserved by one that was stopped is free.
    done = run(*command, "--trials=3")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert [result[name] for name in ("trials", "done", "stopped", "failed")] == [3, 1, 1, 1]
    assert result["val_accuracy"] == result["default"] == 1.0
    first = rows_of(best)
    assert first["1e-07"]["epochs"] < 40  # it trains on until it is told
    assert "not finite" in first["1e+30"]["error"]
    assert load_bundle(open_store(str(best))).digest == result["model"]

    done = run(*command, "--trials=3")
    assert done.returncode == 2
    assert "holds the best of 3 trials already" in done.stderr

    done = run(*command, "--trials=9", "--refit_epochs=2")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert [result[name] for name in ("trials", "done", "stopped", "failed")] == [4, 2, 1, 1]
    rows = rows_of(best)
    assert {lr: rows[lr] for lr in first} == first, "trials that were over ran again"
    bundle = load_bundle(open_store(str(best)))
    assert bundle.digest == result["model"]
    assert len(bundle.spec.provenance["history"]) == 2
    chosen = result["best"].get("optimizer.lr", 0.02)
    assert bundle.spec.provenance["settings"]["optimizer"]["lr"] == chosen
    assert not list((best / "trials").glob("*/training/main/epoch-*"))
