"""The GPU's script: once as a process on the CPU, and what becomes of a section out of time."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_readiness
from benchmarks.harness import Contestant, SkipBenchmark
from benchmarks.readiness.sections import Clock, Section
from benchmarks.report import Column

ROOT = Path(__file__).parents[2]
ABSENT = (
    *("ray", "pydantic_settings", "obstore", "s3fs", "jinja2", "yaml", "matplotlib"),
    *("simplejpeg", "psutil", "timm"),
)
"""What a machine with a GPU may not have."""

ENGINES = ("fp32, contiguous, no TF32", "fp32, channels-last", "bf16, channels-last")
COMPILED = ("bf16, channels-last, compiled", "fp32, channels-last, compiled")

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """The short form on the CPU, in processes that cannot import what is ``ABSENT``."""
    folder = tmp_path_factory.mktemp("readiness")
    blocked = f"import sys\nsys.modules.update(dict.fromkeys({ABSENT!r}))\n"
    (folder / "sitecustomize.py").write_text(blocked)
    output = folder / "figures.json"
    command = [sys.executable, "-m", "benchmarks.gpu_readiness", "--device=cpu", "--short"]
    done = subprocess.run(
        [*command, "--processes=1", "--minutes=3", f"--output={output}"],  # it needs a fraction
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=220,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(output.read_text())


def test_each_engine_has_its_labels_compared_and_its_speed_and_memory_measured(short_run):
    labels, *_ = short_run[1]["sections"]
    assert tuple(labels["rows"]) == ENGINES
    for figures in labels["rows"].values():
        assert 0.9 <= figures["labels_same"] <= 1
        assert 0 <= figures["confidence_difference"] <= figures["largest_difference"] < 0.1
        assert figures["accuracy"] > 0.3  # of 20 classes: it has learnt
        for name in ("network_images_per_second", "rows_per_second", "peak_mb"):
            assert figures[name] > 0
    assert labels["rows"][ENGINES[0]]["labels_same"] == 1
    # Float32 in another order is as good as equal; bfloat16 is other arithmetic.
    assert labels["rows"]["fp32, channels-last"]["largest_difference"] < 1e-4
    assert labels["rows"]["bf16, channels-last"]["largest_difference"] > 1e-4


def test_the_network_is_fed_by_decoding_processes(short_run):
    _, fed, _ = short_run[1]["sections"]
    assert list(fed["rows"]) == ["one process, in turn", "fed by decoding processes"]
    for figures in fed["rows"].values():
        assert figures["images_per_second"] > 0
        assert figures["of_network"] > 0
    figures = fed["rows"]["fed by decoding processes"]
    assert figures["processes"] == 1
    assert figures["decoded_per_second"] > 0
    assert 0 <= figures["waiting"] <= 1


def test_the_training_step_is_measured_in_each_precision(short_run):
    *_, steps = short_run[1]["sections"]
    assert list(steps["rows"]) == ["fp32", "bf16"]
    for figures in steps["rows"].values():
        assert figures["images_per_second"] == pytest.approx(16_000 / figures["step_ms"])
        assert figures["peak_mb"] > 0
    fp32, bf16 = steps["rows"].values()
    assert fp32["speedup"] == 1
    assert bf16["speedup"] == pytest.approx(bf16["images_per_second"] / fp32["images_per_second"])
    assert bf16["loss"] == pytest.approx(fp32["loss"], rel=0.05)
    assert bf16["loss"] != fp32["loss"]


def test_what_was_left_out_and_what_stood_in_is_named(short_run):
    text, document = short_run
    labels, fed, steps = document["sections"]
    assert tuple(labels["missing"]) == COMPILED
    assert tuple(steps["missing"]) == ("bf16, compiled", "fp32, compiled")
    assert "compiling takes" in labels["missing"][COMPILED[0]]
    assert not fed["missing"]
    assert [section["failed"] for section in (labels, fed, steps)] == [{}, {}, {}]
    assert "JPEG decoder: Pillow, as simplejpeg is missing" in document["remarks"]
    assert f"- not run: {COMPILED[0]}: compiling takes" in text
    assert "| fp32, channels-last |" in text


def test_a_section_stops_on_time_and_names_what_it_left_out():
    def slow():
        time.sleep(60)
        return {}

    section = Section("Toys", [Column("rate", "img/s")])
    toys = [
        Contestant("quick", lambda: {"rate": 1234.5}),
        Contestant("broken", lambda: {"rate": 1 / 0}),
        Contestant("slow", slow),
        Contestant("late", lambda: {"rate": 1.0}),
    ]
    started = time.monotonic()
    section.measure(toys, Clock(10))  # of which a busy machine needs some for "quick"
    assert time.monotonic() - started < 20
    assert section.rows == {"quick": {"rate": 1234.5}}
    text = re.sub(r"after \d+ s", "after N s", section.markdown())
    assert text.splitlines() == [
        "## Toys",
        "",
        "|  | img/s |",
        "| --- | ---: |",
        "| quick | 1,234 |",
        "",
        "- not run: slow: stopped after N s: out of time",
        "- not run: late: not begun: out of time",
        "- failed: broken: ZeroDivisionError: division by zero",
    ]


def test_a_network_that_does_not_exist_is_one_line_and_exit_code_2(capsys, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # other tests need them
    assert gpu_readiness.main(["--device=cpu", "--short", "--network=resnet19"]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert "unknown model 'resnet19'" in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_script_says_how_to_try_it():
    with pytest.raises(SkipBenchmark, match="no GPU on this machine: try it with --device cpu"):
        gpu_readiness.main([])
