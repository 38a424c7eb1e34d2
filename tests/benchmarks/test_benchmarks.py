"""The benchmarks' own machinery, on toys: no contestant is raced here."""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks import harness, labelling, options, processes
from benchmarks.bundles import LIKE_TORCHVISION, write_network
from benchmarks.collection import count_rows, find_photos, repeat_files
from benchmarks.gpu import busy_fraction
from benchmarks.growth_requests import solve
from benchmarks.harness import Contestant, ContestantFailed, Ratio, Summary, race
from benchmarks.memory import is_worker
from benchmarks.peers.fashion_mnist import read_split, write_part
from benchmarks.peers.network import load_network, normalize
from benchmarks.peers.task import mark
from benchmarks.report import Column, Report, describe_machine, publish
from benchmarks.training import history_figures, peer_figures
from cnnray.models.bundle import load_bundle
from cnnray.storage import open_store

ROOT = Path(__file__).parents[2]
BENCHMARKS = (
    "classify_pipeline",
    "agreement",
    "classify_compute",
    "classify_gpu",
    "train_tutorial",
    "train_photos",
    "growth",
    "step_overhead",
)
COLUMNS = (Column("rate", "img/s", 1),)

pytestmark = pytest.mark.timeout(60)


def contestant(name, rates, order=None):
    """A toy with one rate a round; None fails."""
    left = iter(rates)

    def run():
        if order is not None:
            order.append(name)
        rate = next(left)
        if rate is None:
            raise ContestantFailed("exit code 1: out of memory")
        return {"rate": rate}

    return Contestant(name, run)


# Statistics


def test_a_summary_is_the_median_and_the_spread():
    summary = Summary.of([250.0, 260.0, 254.0])
    assert (summary.median, summary.min, summary.max) == (254, 250, 260)
    assert summary.show(0) == "254 (250-260)"
    assert summary.runs == [250, 260, 254]  # in the order of the rounds


def test_a_summary_of_one_run_shows_no_spread():
    assert Summary.of([1234.56]).show(1) == "1,234.6"


def test_contestants_alternate():
    order = []
    race([contestant(name, [1, 2, 3], order) for name in "abc"], repeats=3)
    assert "".join(order) == "abcabcabc"


def test_a_ratio_is_taken_within_each_round():
    drifting = [contestant("ours", [100, 20, 60]), contestant("theirs", [50, 10, 20])]
    summary = race(drifting, repeats=3).ratio(Ratio("rate", ("ours",), ("theirs",)))
    assert summary.runs == [2, 2, 3]
    assert summary.median == 2


def test_a_ratio_to_several_is_to_the_best_of_each_round():
    results = race(
        [contestant("ours", [12, 12]), contestant("a", [3, 6]), contestant("b", [4, 2])], repeats=2
    )
    assert results.ratio(Ratio("rate", ("ours",), ("a", "b"))).runs == [3, 2]


def test_there_is_no_ratio_to_a_contestant_that_did_not_run():
    results = race([contestant("ours", [1])], repeats=1)
    assert results.ratio(Ratio("rate", ("ours",), ("keras",))) is None


def test_a_contestant_that_fails_is_left_out_of_later_rounds_and_the_others_go_on():
    order = []
    toys = [contestant("good", [1, 2, 3], order), contestant("bad", [5, None], order)]
    results = race(toys, repeats=3)
    assert order == ["good", "bad", "good", "bad", "good"]
    assert results.failed == {"bad": "exit code 1: out of memory"}
    assert results.summary("bad", "rate").runs == [5]
    assert results.ratio(Ratio("rate", ("good",), ("bad",))).runs == [0.2]


def test_the_steady_rate_is_that_of_all_workers_from_the_first_batch_on():
    marks = [  # two workers in step, 256 images a second each, the second one a little late
        (10 + second + worker / 10, 256 * (2 * second + worker + 1))
        for second in range(20)
        for worker in (0, 1)
    ]
    assert processes.steady_rate(marks) == pytest.approx(512, rel=0.01)
    assert processes.steady_rate(marks[:4]) is None  # too few to speak of


def test_figures_of_a_run_without_batches_are_those_of_the_whole_run():
    finished = processes.Finished(seconds=20.0, marks=[], result={})
    assert labelling.labelling_figures(finished, 1000) == {
        "seconds": 20,
        "images_per_second": 50,
    }


def test_figures_of_training_are_medians_over_the_epochs():
    history = [
        {"samples_per_second": rate, "data_wait_fraction": wait, "seconds": 10.0}
        for rate, wait in ((50, 0.5), (100, 0.02), (102, 0.01))  # the first one has to start
    ]
    assert history_figures(history) == {
        "samples_per_second": 100,
        "data_wait_fraction": 0.02,
        "epochs_seconds": 30,
    }


def test_a_peer_that_prints_no_result_has_failed():
    with pytest.raises(ContestantFailed, match="no result"):
        peer_figures(processes.Finished(seconds=1.0, marks=[], result={}))


def test_requests_are_told_apart_into_those_of_an_image_a_part_and_a_run():
    def count(images, parts):
        return {"GET": images + parts + 7, "PUT": parts + 8, "LIST": 11, "sent": 100 * images}

    requests = solve(count(64, 1), count(256, 1), count(256, 4), images=64)
    assert requests.image == {"GET": 1, "LIST": 0, "PUT": 0, "sent": 100}
    assert requests.part == {"GET": 1, "LIST": 0, "PUT": 1, "sent": 0}
    assert requests.run == {"GET": 7, "LIST": 11, "PUT": 8, "sent": 0}
    assert requests.of(10_000, part_rows=1_000)["GET"] == 10_000 + 10 + 7


def test_the_gpu_is_watched_from_the_first_batch_on():
    assert busy_fraction(["0", "0", "80", "[N/A]", "60"], first_batch_seconds=0.4) == 0.7
    assert busy_fraction([], first_batch_seconds=1.0) is None


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("ray::MapWorker(MapBatches(LabelActor)).submit", True),
        ("ray::IDLE", False),
        ("/venv/bin/raylet/raylet --session=1", False),
        ("python jobs/classify.py", False),
    ],
)
def test_a_worker_is_known_by_its_title(title, expected):
    assert is_worker(title) is expected


# Table and JSON line


@pytest.fixture
def report():
    results = race([contestant("ours", [100.0, 110.0]), contestant("bad", [None])], repeats=2)
    return Report(
        benchmark="toys",
        results=results,
        columns=[*COLUMNS, Column("wait", "waiting", 3)],
        ratios=[Ratio("rate", ("ours",), ("ours",), goal=0.9)],
        settings={"images": 100},
        skipped={"keras": "not installed"},
        remarks=["a remark"],
    )


def test_the_table_names_machine_versions_settings_and_what_did_not_run(report):
    lines = report.text({"cpu": "Toy", "cores": 2}, {"python": "3.11"}).splitlines()
    assert lines[:3] == ["toys: images 100", "cpu Toy, cores 2", "python 3.11"]
    assert [line.split() for line in lines[4:7]] == [
        ["contestant", "img/s", "waiting"],
        ["ours", "105.0", "(100.0-110.0)", "-"],
        ["bad", "-", "-"],
    ]
    assert len({len(line) for line in lines[4:7]}) == 1  # aligned
    assert lines[7:] == [
        "ratio: rate: ours / ours = 1.00 (1.00-1.00), goal 0.9",
        "skipped: keras: not installed",
        "failed: bad: exit code 1: out of memory",
        "a remark",
    ]


def test_the_last_line_is_json_and_a_failed_contestant_is_exit_code_1(report, capsys):
    assert publish(report, {"cores": 2}) == 1
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["contestants"]["ours"]["rate"]["runs"] == [100, 110]
    assert document["ratios"][0]["value"]["median"] == 1
    assert document["machine"] == {"cores": 2}
    assert document["versions"]["python"]
    assert document["failed"] == {"bad": "exit code 1: out of memory"}


def test_the_machine_is_described():
    machine = describe_machine()
    assert machine["cpu"]
    assert machine["cores"] == len(os.sched_getaffinity(0))


# Flags and skips


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_has_help(name, capsys):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"benchmarks.{name}").main(["--help"])
    assert ended.value.code == 0
    assert "--short" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "flags", "reason"),
    [
        ("classify_pipeline", ["--images=."], "no JPEG files in .: name a folder of them with"),
        ("classify_compute", ["--images=."], "no JPEG files in .: name a folder of them with"),
        ("growth", ["--images=."], "no JPEG files in .: name a folder of them with"),
        ("train_photos", ["--images=."], "no JPEG files in .: name a folder of them with"),
        ("train_tutorial", ["--data=."], "no Fashion-MNIST in .: apt install"),
    ],
)
def test_what_is_not_there_is_one_line_and_no_failure(
    name, flags, reason, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    benchmark = importlib.import_module(f"benchmarks.{name}")
    with pytest.raises(SystemExit) as ended:
        harness.run_benchmark(lambda: benchmark.main(flags))
    assert ended.value.code == 0
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith(f"skipped: {reason}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_its_benchmark_says_so(capsys):
    benchmark = importlib.import_module("benchmarks.classify_gpu")
    with pytest.raises(SystemExit) as ended:
        harness.run_benchmark(lambda: benchmark.main([]))
    assert ended.value.code == 0
    assert capsys.readouterr().out == "skipped: no GPU on this machine\n"


def test_the_short_form_has_its_own_defaults_and_flags_beat_them():
    def parse(*flags):
        parser = labelling.labelling_parser(None, full=16_000, short=2_000)
        return options.settle(parser.parse_args(flags))

    assert (parse().count, parse().repeats) == (16_000, 3)
    assert (parse("--short").count, parse("--short").repeats) == (2_000, 1)
    assert parse("--short", "--count=7", "--repeats=5").count == 7
    assert parse("--variant", "b8=--batch_size 8").variant == [("cnnray b8", ["--batch_size", "8"])]


def test_contestants_can_be_selected_by_a_part_of_their_name():
    toys = [contestant(name, []) for name in ("cnnray", "ray script", "daft script")]
    assert [toy.name for toy in options.select(toys, ["daft", "cnn"])] == ["cnnray", "daft script"]
    assert options.select(toys, None) == toys


def test_make_bench_and_the_readme_name_every_benchmark():
    [listed] = re.findall(r"^BENCHMARKS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    readme = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    assert listed.split() == [*BENCHMARKS]
    assert set(BENCHMARKS) <= set(re.findall(r"python -m benchmarks\.(\w+)", readme))


# Processes


def python(code):
    return [sys.executable, "-c", code]


def test_progress_lines_of_the_job_become_marks():
    code = (
        "import sys, time\n"
        "for done in ('256', '1,024'):\n"
        "    print(f'12:00:00 I classify: {done} / 2,000 images, 9 images/s', file=sys.stderr)\n"
        "    sys.stderr.flush(); time.sleep(0.2)\n"
        "print('{\"labeled\": 2000}')\n"
    )
    finished = processes.run_process(python(code), seconds=30)
    assert [done for _, done in finished.marks] == [256, 1024]
    assert finished.marks[1][0] - finished.marks[0][0] > 0.1
    assert finished.result == {"labeled": 2000}
    assert finished.marks[1][0] < finished.seconds < 30


def test_marks_of_several_processes_are_added_up_in_the_order_of_time(tmp_path):
    marks = tmp_path / "marks"
    code = f"from benchmarks.peers.task import mark; mark({str(marks)!r}, 100)"
    finished = processes.run_process(python(code), seconds=30, marks=marks)
    assert [done for _, done in finished.marks] == [100]
    mark(str(marks), 50)
    before = marks.read_text().splitlines()
    marks.write_text("\n".join(reversed(before)))  # written late by another process
    finished = processes.run_process(python("pass"), seconds=30, marks=marks)
    assert [done for _, done in finished.marks] == [100, 150]


def test_a_process_that_fails_says_why():
    with pytest.raises(ContestantFailed, match="exit code 3: no such table"):
        processes.run_process(
            python("import sys; print('no such table', file=sys.stderr); exit(3)"), seconds=30
        )


def test_a_process_is_killed_at_its_deadline():
    with pytest.raises(ContestantFailed, match="deadline"):
        processes.run_process(python("import time; time.sleep(60)"), seconds=0.5)


def test_a_contestant_joins_no_ray_that_is_named_in_the_environment(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert "RAY_ADDRESS" not in processes.clean_environment({})


def test_a_process_is_watched_while_it_runs():
    seen = []
    code = "import time; time.sleep(0.5)"
    processes.run_process(python(code), seconds=30, watch=lambda process: seen.append(process.pid))
    assert len(set(seen)) == 1


# A small training step


def test_the_step_overhead_is_measured_in_turn_with_the_loops(capsys):
    flags = ["--short", "--repeats=2", "--images=96", "--size=10", "--threads=1"]
    assert importlib.import_module("benchmarks.step_overhead").main(flags) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(document["contestants"]) == {"cnnray", "loop", "loop, fused Adam"}
    for figures in document["contestants"].values():
        assert len(figures["samples_per_second"]["runs"]) == 2
        assert 0 < figures["trainer_step_us"]["median"] <= figures["cpu_step_us"]["median"] * 1.01
    assert len(document["ratios"]) == 4


# Collection


def test_photos_are_repeated_as_links(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("b.JPEG", "a.jpg", "notes.txt"):
        (photos / name).write_bytes(name.encode())
    found = find_photos(str(photos))
    assert [photo.name for photo in found] == ["a.jpg", "b.JPEG"]
    files = repeat_files(found, 5, tmp_path / "repeated")
    assert [file.read_bytes() for file in files] == [b"a.jpg", b"b.JPEG"] * 2 + [b"a.jpg"]
    assert len({file.name for file in files}) == 5
    assert files[0].samefile(photos / "a.jpg")


def test_rows_of_all_files_below_a_folder_are_counted(tmp_path):
    for folder, rows in (("x", 3), ("x/y", 4)):
        (tmp_path / folder).mkdir()
        pq.write_table(pa.table({"label": ["a"] * rows}), tmp_path / folder / "part.parquet")
    assert count_rows(tmp_path) == 7


def test_a_peer_that_labels_too_few_images_has_failed(tmp_path, monkeypatch):
    setting = labelling.Setting(tmp_path / "t", 10, "tiny", tmp_path / "b", tmp_path / "runs")
    finished = processes.Finished(seconds=1.0, marks=[], result={"labeled": 9})
    monkeypatch.setattr(labelling, "run_process", lambda *_, **__: finished)
    with pytest.raises(ContestantFailed, match="9 of 10 images"):
        labelling.cnnray_job(setting).run()


def test_a_part_of_fashion_mnist_reads_back(tmp_path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    whole.mkdir()
    part.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (6, 28, 28)).astype(np.uint8)
    labels = np.arange(6, dtype=np.uint8)
    write_idx(whole, pixels, labels)
    write_part(whole, part, split="train", images=4)
    found_pixels, found_labels = read_split(str(part), "train")
    assert np.array_equal(found_pixels, pixels[:4])
    assert np.array_equal(found_labels, labels[:4])


def write_idx(folder, pixels, labels):
    import gzip
    import struct

    header = struct.pack(">IIII", 0x803, *pixels.shape)
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + pixels.tobytes()))
    header = struct.pack(">II", 0x801, len(labels))
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(header + labels.tobytes()))


# Networks


@pytest.mark.parametrize("name", ["tiny", "resnet18"])
def test_peers_run_the_network_of_the_bundle(name, tmp_path):
    bundle = load_bundle(open_store(str(write_network(name, tmp_path / "bundle"))))
    theirs = load_network(name, str(tmp_path / "bundle" / "model.safetensors"))
    images = torch.randint(256, (2, 3, 224, 224), dtype=torch.uint8)
    with torch.inference_mode():
        torch.testing.assert_close(
            theirs(normalize(images)), bundle.model(images), rtol=1e-3, atol=1e-3
        )


def test_peers_import_nothing_of_cnnray():
    for file in (ROOT / "benchmarks/peers").glob("*.py"):
        modules = re.findall(r"^\s*(?:from|import) (\S+)", file.read_text(), re.MULTILINE)
        ours = {name for name in modules if name.startswith(("cnnray", "benchmarks"))}
        assert all(name.startswith("benchmarks.peers.") for name in ours), file


def test_peers_and_bundle_have_the_transform_of_torchvisions_weights():
    from torchvision.models import ResNet18_Weights

    transform = ResNet18_Weights.DEFAULT.transforms()
    assert (transform.crop_size, transform.resize_size) == ([224], [256])
    assert tuple(transform.mean) == LIKE_TORCHVISION.mean
    assert tuple(transform.std) == LIKE_TORCHVISION.std
    assert transform.interpolation.value == LIKE_TORCHVISION.interpolation
    pixels = torch.randint(256, (3, 224, 224), dtype=torch.uint8)
    expected = (pixels / 255 - torch.tensor(transform.mean)[:, None, None]) / torch.tensor(
        transform.std
    )[:, None, None]
    torch.testing.assert_close(normalize(pixels[None])[0], expected)
