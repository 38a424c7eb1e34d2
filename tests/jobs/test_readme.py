"""What the README, the recipes and the scripts' docstrings say is true."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from cnnray import config
from cnnray.config import JobSettings, load_settings

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
JOBS: dict[str, type[JobSettings]] = {
    name: getattr(config, f"{name.capitalize()}Settings")
    for name in ("pack", "train", "tune", "evaluate", "classify", "bench", "verify", "demo")
}
RAY_FLAGS = {"working-dir", "head", "generate", "address", "block", "reason", "reason-message"}
RAY_FLAGS |= {"deadline-remaining-seconds"}
"""Of ``ray job submit``, ``ray start``, ``ray drain-node`` and ``ray get-auth-token``."""


def texts() -> Iterator[str]:
    """Every text that shows command lines; comment signs and line continuations removed."""
    for pattern in ("README.md", "cluster.yaml", "jobs/*.py", "jobs/configs/*.yaml"):
        for path in sorted(ROOT.glob(pattern)):
            text = re.sub(r"^# ?", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
            yield re.sub(r"\\\n\s*", " ", text)


COMMANDS = sorted(
    {
        command
        for text in texts()
        for command in re.findall(r"python (jobs/\w+\.py[^`\n#&|]*)", text)
    }
)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_line_that_is_shown_is_accepted(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    recipe = "jobs/configs/flowers-scratch.yaml"
    script, *flags = shlex.split(command.replace("FILE.yaml", recipe))
    assert (ROOT / script).is_file()
    settings_class = JOBS[Path(script).stem]
    if flags and flags[-1] in ("…", "..."):
        flags = flags[:-1] + [
            f"--{name}=x"
            for name, field in settings_class.model_fields.items()
            if field.is_required() and f"--{name}" not in flags
        ]
    load_settings(settings_class, flags)


def test_there_are_commands_for_every_job():
    assert {Path(command.split()[0]).stem for command in COMMANDS} == set(JOBS)


def names(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from names(field.annotation, f"{prefix}{name}.")


def test_every_flag_that_the_readme_names_exists():
    text = README.replace("error: unknown flag --lr", "")
    flags = set(re.findall(r"(?<![\w-])--([a-z][\w.-]*\w)", text))
    known = {name for job in JOBS.values() for name in names(job)}
    assert flags - known - {"help"} - RAY_FLAGS == set()
    assert len(flags) > 15


def test_the_recipes_are_settings_of_train():
    recipes = sorted((ROOT / "jobs/configs").glob("*.yaml"))
    assert recipes
    for recipe in recipes:
        load_settings(JOBS["train"], ["--config", str(recipe), "--data", "d", "--output", "o"])


def test_the_cluster_file_is_one_that_ray_accepts():
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text())))


def test_the_tree_names_what_there_is():
    [tree] = re.findall(r"## The tree\n+```\n(.*?)```", README, flags=re.DOTALL)
    named = set()
    for line in tree.splitlines():
        folder = "cnnray/" if line.startswith("  ") else ""
        first, rest = line.split(maxsplit=1) if len(line.split()) > 1 else (line.strip(), "")
        found = [first, *re.findall(r"(?<=   )\w+\.py", rest)]
        named |= {folder + name for name in found}
    missing = {name for name in named if not (ROOT / name).exists()}
    assert missing == set()
    rooms = {f"cnnray/{path.parent.name}/" for path in (ROOT / "cnnray").glob("*/__init__.py")}
    modules = {f"cnnray/{path.name}" for path in (ROOT / "cnnray").glob("[a-z]*.py")}
    assert (rooms | modules) - named == set()


@pytest.fixture(scope="module")
def journey(run, head, shades, tmp_path_factory):
    """The commands of "Your own images", run as they stand but for the epochs."""
    [block] = re.findall(r"## Your own images.*?```sh\n(.*?)```", README, flags=re.DOTALL)
    folder = tmp_path_factory.mktemp("journey")
    (folder / "jobs").symlink_to(ROOT / "jobs")
    (folder / "photos").symlink_to(shades)
    activate, *commands = block.splitlines()
    assert activate == ". .venv/bin/activate"
    assert len(commands) == 4
    results = {}
    for command in commands:
        command, count = re.subn(r"--epochs \d+", "--epochs 1", command)
        assert count == ("jobs/train.py" in command)
        done = run(*shlex.split(command), cwd=folder, RAY_ADDRESS=head.address)
        assert done.returncode == 0, done.stderr
        results[command.split()[1]] = json.loads(done.stdout.splitlines()[-1])
    return folder, results


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_commands_for_your_own_images_work(journey):
    folder, results = journey
    assert results["jobs/pack.py"]["samples"] == 120
    assert results["jobs/train.py"]["epochs"] == 1
    assert 0 <= results["jobs/evaluate.py"]["accuracy"] <= 1
    assert results["jobs/classify.py"]["labeled"] == 120
    assert (folder / "work/evaluation/report.html").is_file()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_queries_of_the_readme_read_the_labels(journey, monkeypatch):
    import duckdb

    folder, _ = journey
    monkeypatch.chdir(folder)
    block, latest, _, whole_runs = re.findall(r"```sql\n(.*?)```", README, flags=re.DOTALL)
    labels, errors = (duckdb.sql(query).fetchall() for query in block.strip().splitlines())
    assert len(labels) == 120
    assert {label for _, label, _ in labels} <= {"dark", "light"}
    assert errors == []
    assert len(duckdb.sql(latest).fetchall()) == 120
    assert duckdb.connect().execute(whole_runs).fetchall() == [(120,)]
    [columns] = re.findall(r"Columns: `(.*?)`", README, flags=re.DOTALL)
    found = duckdb.sql("SELECT * FROM 'work/labels/data/**/*.parquet'").columns
    shown = [name.strip() for name in columns.split(",") if "[" not in name]
    assert [name for name in found if name != "run"] == shown
