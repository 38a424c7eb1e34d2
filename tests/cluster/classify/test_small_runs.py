"""Runs that need no cluster: who gets one all the same, and the same rows without one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow.dataset as ds
import pytest

from cnnray.cluster.classify import job
from cnnray.cluster.classify.small_runs import SmallRunLabeler, may_run_here
from cnnray.config import ClassifySettings
from cnnray.datasets.sources import open_source
from cnnray.errors import ModelError, SettingsError
from cnnray.storage import open_store
from tests.faults.colours import write_bundle, write_images

ROOT = Path(__file__).parents[3]
POISON = ROOT / "tests/images/poison"


@pytest.fixture
def settings(tmp_path: Path) -> ClassifySettings:
    write_images(tmp_path / "images", range(9))
    return ClassifySettings(
        model=str(write_bundle(tmp_path / "bundle")),
        input=str(tmp_path / "images"),
        output=str(tmp_path / "labels"),
    )


def run_job(settings: ClassifySettings, **environment: str) -> subprocess.CompletedProcess[str]:
    """``jobs/classify.py`` as a process of its own, whose images may be poisonous."""
    flags = [f"--{name}={getattr(settings, name)}" for name in ("model", "input", "output")]
    return subprocess.run(
        [sys.executable, "jobs/classify.py", *flags, "--decode_seconds=1"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{POISON}:{ROOT}", **environment},
        timeout=120,
    )


def rows_of(settings: ClassifySettings) -> dict[str, dict[str, object]]:
    rows = ds.dataset(f"{settings.output}/data").to_table().to_pylist()
    return {row["key"]: row for row in rows}


@pytest.mark.slow
def test_a_small_run_labels_every_image_and_starts_no_ray(settings, tmp_path):
    answers = write_images(tmp_path / "images", range(9))
    done = run_job(settings)
    assert done.returncode == 0, done.stderr
    assert "Ray" not in done.stderr
    assert {key: row["label"] for key, row in rows_of(settings).items()} == answers


@pytest.mark.slow
def test_what_an_image_does_to_its_decoder_is_a_row_of_a_small_run_too(settings, tmp_path):
    good = next(iter((tmp_path / "images").rglob("*.png"))).read_bytes()
    for action in ("segfault", "spin", "huge"):
        path = tmp_path / "images" / f"{action}.png"
        path.write_bytes(good + f"cnnray-poison:{action};".encode())
    done = run_job(settings)
    assert done.returncode == 0, done.stderr
    codes = {key: row["error_code"] for key, row in rows_of(settings).items() if row["error_code"]}
    assert codes == {
        "segfault.png": "decoder_crash",
        "spin.png": "decoder_timeout",
        "huge.png": "decoder_oom",
    }


def label(settings: ClassifySettings) -> tuple[SmallRunLabeler, int]:
    """The labeler of a run over all images, once it has ended, and the rows that it gave."""
    from cnnray.datasets.listing import list_in_order
    from cnnray.labeling.runs import begin_run
    from cnnray.models.bundle import load_bundle

    source = open_source(settings.input, labelled=False)
    begun = begin_run(
        open_store(settings.output),
        config={},
        list_inputs=lambda: list_in_order(source),
        part_rows=4,
        on_changed="relabel",
    )
    assert begun is not None
    run, _ = begun
    labeler = SmallRunLabeler(settings, load_bundle(open_store(settings.model)), source=source)
    rows = list(labeler.label(run, range(run.plan.num_parts)))
    return labeler, sum(table.num_rows for table in rows)


def test_a_quick_run_is_labelled_whole(settings):
    labeler, rows = label(settings)
    assert labeler.is_whole
    assert rows == 9


def test_a_run_that_turns_out_slow_is_left_to_a_cluster(settings, monkeypatch):
    monkeypatch.setattr(SmallRunLabeler, "_is_slow", lambda self, pace: True)
    labeler, rows = label(settings)
    assert not labeler.is_whole
    assert rows < 9


@pytest.mark.parametrize(
    "asked",
    [
        {"cluster": {"address": "local"}},
        {"cluster": {"num_cpus": 2}},
        {"scaling": {"num_workers": 2}},
        {"scaling": {"use_gpu": True}},
        {"decode_workers": 1},
        {"placement": "split"},
        {"engine": {"precision": "bf16"}},
    ],
)
def test_settings_that_ask_for_workers_get_a_cluster(settings, monkeypatch, asked):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    assert may_run_here(settings)
    assert not may_run_here(ClassifySettings(**{**settings.model_dump(), **asked}))
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    assert not may_run_here(settings)


def test_nothing_heavy_is_imported_before_it_is_needed():
    code = "import sys, cnnray.cluster.classify.job; print({'torch', 'ray'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.stdout.strip() == "set()", done.stderr


@pytest.mark.parametrize("images", [2_000, 2_001])
def test_ray_starts_beside_the_model_for_a_first_run_of_many_images(settings, images):
    class Many:
        """A source that lists so many images."""

        def partitions(self):
            return [None]

        def list(self, partition):
            from cnnray.schema import ENTRY_SCHEMA

            names = [f"{number}" for number in range(images)]
            yield from [
                ENTRY_SCHEMA.empty_table(),
                *[_entries(names[:1000]), _entries(names[1000:])],
            ]

    output = open_store(settings.output)
    assert job._is_large_first_run(settings, Many(), output) is (images > 2_000)
    dry = settings.model_copy(update={"dry_run": True})
    assert not job._is_large_first_run(dry, Many(), output)


def _entries(keys: list[str]):
    import pyarrow as pa

    from cnnray.schema import ENTRY_SCHEMA

    columns = {
        field.name: pa.array(keys if field.name == "key" else [None] * len(keys), field.type)
        for field in ENTRY_SCHEMA
    }
    return pa.table(columns)


def test_a_broken_bundle_is_named_and_nothing_is_written(settings):
    (Path(settings.model) / "model.json").write_text("{}")
    with pytest.raises(ModelError, match="model.json"):
        job.classify(settings)
    assert not Path(settings.output).exists()


def test_an_engine_that_cannot_be_is_named_and_nothing_is_written(settings):
    wrong = {"engine": {"name": "openvino"}, "scaling": {"use_gpu": True}}
    with pytest.raises(SettingsError, match="openvino"):
        job.classify(ClassifySettings(**{**settings.model_dump(), **wrong}))
    assert not Path(settings.output).exists()
