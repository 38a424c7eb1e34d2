"""Imports point down only, and Ray stays in its room."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Each layer may import those further down, and its own room.
LAYERS = (
    {"jobs"},
    {"cluster"},
    {"tuning"},
    {"training", "evaluation", "labeling"},
    {"models", "datasets"},
    {"images"},
    {"storage", "config", "console", "process", "cli"},
    {"schema", "errors", "options"},
)
LEVEL = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}
ALSO_ALLOWED = {("cli", "config")}
SETTINGS_READERS = {"cluster", "cli", "jobs"}
RAY_ROOM = "cluster"


def _room(module: str) -> str:
    """cnnray.images.decode → images; jobs.pack → jobs; cnnray → (nothing)."""
    parts = module.split(".")
    return "jobs" if parts[0] == "jobs" else ".".join(parts[1:2])


def _modules(root: Path) -> Iterator[tuple[str, Path]]:
    for folder in ("cnnray", "jobs"):
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def _imports(path: Path, module: str) -> Iterator[str]:
    """Every module that a file imports, anywhere in it."""
    is_package = path.name == "__init__.py"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + is_package]
                base = ".".join([*parents, base]).rstrip(".")
            if base == "cnnray":
                yield from (f"cnnray.{alias.name}" for alias in node.names)
            else:
                yield base


def find_violations(root: Path) -> list[str]:
    """'module imports other' for every import that the architecture forbids."""
    return [
        f"{module} imports {name}"
        for module, path in _modules(root)
        for name in _imports(path, module)
        if not _is_allowed(_room(module), name)
    ]


def _is_allowed(room: str, name: str) -> bool:
    top = name.split(".")[0]
    if top == "ray":
        return room == RAY_ROOM
    if top not in ("cnnray", "jobs"):
        return True
    target = _room(name)
    if not room:  # cnnray/__init__.py
        return False
    if target not in LEVEL:  # cnnray.__version__
        return target.startswith("__")
    if target == "config" and room not in SETTINGS_READERS | {"config"}:
        return False
    return room == target or (room, target) in ALSO_ALLOWED or LEVEL[room] < LEVEL[target]


def test_imports_point_down_only() -> None:
    assert find_violations(ROOT) == []


def test_every_room_has_a_layer() -> None:
    rooms = {_room(module) for module, _ in _modules(ROOT)} - {""}
    assert rooms <= set(LEVEL)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("cnnray/images/bad.py", "from cnnray.datasets.order import Batch"),
        ("cnnray/images/bad.py", "from ..datasets import order"),
        ("cnnray/images/bad.py", "import cnnray.cluster.train.job"),
        ("cnnray/models/bad.py", "from cnnray.datasets import order"),
        ("cnnray/training/bad.py", "from cnnray.config import TrainSettings"),
        ("cnnray/training/bad.py", "from cnnray.labeling import plan"),
        ("cnnray/training/bad.py", "def f():\n    import ray.train"),
        ("cnnray/errors.py", "from cnnray import storage"),
        ("cnnray/cluster/bad.py", "from jobs.train import main"),
        ("cnnray/__init__.py", "from cnnray import errors"),
        ("jobs/bad.py", "import ray"),
    ],
)
def test_the_check_finds_what_is_forbidden(tmp_path: Path, path: str, text: str) -> None:
    bad = tmp_path / path
    bad.parent.mkdir(parents=True)
    bad.write_text(text)
    assert len(find_violations(tmp_path)) == 1


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("cnnray/cluster/good.py", "import ray\nfrom cnnray.config import TrainSettings"),
        ("cnnray/training/good.py", "from cnnray.datasets.order import Batch\nimport torch"),
        ("cnnray/images/good.py", "from cnnray import schema\nfrom . import decode"),
        ("cnnray/datasets/good.py", "from cnnray import __version__"),
        (
            "jobs/good.py",
            "from cnnray.cli import run_job\nfrom cnnray.cluster.pack.job import pack",
        ),
    ],
)
def test_the_check_lets_the_rest_pass(tmp_path: Path, path: str, text: str) -> None:
    good = tmp_path / path
    good.parent.mkdir(parents=True)
    good.write_text(text)
    assert find_violations(tmp_path) == []


def _run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_pure_layer_does_not_load_ray() -> None:
    pure = [
        module
        for module, _ in _modules(ROOT)
        if module.startswith("cnnray") and _room(module) != RAY_ROOM
    ]
    assert len(pure) > 30
    imports = "\n".join(f"import {module}" for module in pure)
    assert _run(f"import sys\n{imports}\nprint('ray' in sys.modules)") == "False"


def test_the_package_alone_loads_nothing() -> None:
    code = "import sys; before = set(sys.modules); import cnnray; print(*set(sys.modules) - before)"
    assert _run(code) == "cnnray"


@pytest.mark.parametrize("module", ["errors", "schema", "config", "storage"])
def test_the_foundations_do_not_load_torch(module: str) -> None:
    heavy = "('torch', 'torchvision', 's3fs', 'matplotlib', 'PIL')"
    code = f"import sys, cnnray.{module}; print([m for m in {heavy} if m in sys.modules])"
    assert _run(code) == "[]"


def test_importing_does_not_touch_the_log_the_devices_or_the_threads() -> None:
    modules = "storage, cnnray.cli, cnnray.training.loop, cnnray.labeling.labeler"
    code = (
        "import logging, os, threading\n"
        "environment = dict(os.environ)\n"
        f"import cnnray.{modules}, cnnray.evaluation.metrics\n"
        "import torch\n"
        "print(logging.getLogger().handlers, logging.getLogger('cnnray').handlers,"
        " torch.cuda.is_initialized(), threading.active_count())\n"
        "assert all(os.environ.get(k) == v for k, v in environment.items())\n"
    )
    assert _run(code) == "[] [] False 1"


def test_a_process_that_decodes_images_loads_no_more_than_it_needs() -> None:
    heavy = "{'torch', 'pyarrow', 'pydantic', 'ray'}"
    code = f"import sys, cnnray.images.decoder_process; print({heavy} & set(sys.modules))"
    assert _run(code) == "set()"
