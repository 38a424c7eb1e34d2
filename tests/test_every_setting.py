"""Any value that a field declares as right is taken by its job, or refused as a user's mistake.

The values are drawn from what the fields declare: types, ranges, alternatives. Every job runs up to
the moment in which Ray would be started; a training also makes a step by hand.
"""

from __future__ import annotations

import contextlib
import functools
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from colours import COLOURS, paint, write_bundle
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from cnnray.cluster.classify.dry_run import bench
from cnnray.cluster.classify.job import classify
from cnnray.cluster.evaluate.job import evaluate
from cnnray.cluster.pack.job import pack
from cnnray.cluster.train.build import (
    make_batch_transform,
    make_learning_rate,
    make_loss,
    make_optimizer,
)
from cnnray.cluster.train.data import make_transforms
from cnnray.cluster.train.job import train
from cnnray.cluster.train.plan import TrainPlan, plan_training
from cnnray.cluster.tune.job import tune
from cnnray.cluster.verify.job import verify
from cnnray.config import (
    BenchSettings,
    ClassifySettings,
    DemoSettings,
    EvaluateSettings,
    JobSettings,
    PackSettings,
    TrainSettings,
    TuneSettings,
    VerifySettings,
    build_settings,
    load_settings,
)
from cnnray.datasets.packing import build_manifest, plan_pack
from cnnray.datasets.shards import pack_shard
from cnnray.datasets.sources import open_source
from cnnray.errors import CnnrayError, SettingsError
from cnnray.options import DEFAULT_LIMITS
from cnnray.storage import open_store

pytestmark = pytest.mark.timeout(300)

JOBS: dict[type[JobSettings], Callable[[Any], Any] | None] = {
    PackSettings: pack,
    TrainSettings: train,
    TuneSettings: tune,
    EvaluateSettings: evaluate,
    ClassifySettings: classify,
    BenchSettings: bench,
    VerifySettings: verify,
    DemoSettings: None,  # the jobs above, one after the other
}

bounded = settings(
    max_examples=int(__import__("os").environ.get("EX", "20")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


# What there is to work on


@dataclass(frozen=True)
class Places:
    """Images, what was made of them, and a folder for what is made."""

    images: str
    dataset: str
    bundle: str
    space: str
    output: str

    def required(self, job: type[JobSettings]) -> dict[str, str]:
        """Right values of what has no default."""
        known = {
            "input": self.images,
            "data": self.dataset,
            "model": self.bundle,
            "space": self.space,
            "output": self.output,
        }
        return {name: known[name] for name, f in job.model_fields.items() if f.is_required()}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    root = tmp_path_factory.mktemp("places")
    for colour in COLOURS:
        (root / "images" / colour).mkdir(parents=True)
        for number in range(20):
            (root / "images" / colour / f"{number}.png").write_bytes(paint(colour, number))
    write_dataset(root / "images", root / "dataset")
    (root / "space.yaml").write_text("optimizer.lr: {min: 0.001, max: 0.1, log: true}\n")
    return Places(
        images=str(root / "images"),
        dataset=str(root / "dataset"),
        bundle=str(write_bundle(root / "bundle")),
        space=str(root / "space.yaml"),
        output=str(root / "output"),
    )


def write_dataset(images: Path, output: Path) -> None:
    """What ``pack`` makes, without Ray."""
    source, store = open_source(str(images), format="folder"), open_store(str(output))
    entries = pa.concat_tables(
        [table for part in source.partitions() for table in source.list(part)]
    )
    plan = plan_pack(entries, val=0.2, test=0.2, shard_bytes=2**20)
    packed = [
        pack_shard(shard, source=source, store=store, classes=plan.classes, limits=DEFAULT_LIMITS)
        for shard in plan.shards
    ]
    manifest, _ = build_manifest(plan, packed, source={"uri": str(images), "format": "folder"})
    store.create("manifest.json", manifest.to_bytes())


class _Started(Exception):
    """A job has come to where it starts Ray."""


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # a drawn text may be a path

    @contextlib.contextmanager
    def start(*arguments: Any, **options: Any) -> Iterator[NoReturn]:
        raise _Started
        yield

    for job in ("pack", "train", "tune", "evaluate", "classify"):
        monkeypatch.setattr(f"cnnray.cluster.{job}.job.ray_cluster", start)


# Values, from what the fields declare

WORDS = ("tutorial_cnn", "small_cnn", "resnet18", "2:4", "local", "key", "Größe 5", "a\0b", "")


@functools.cache
def leaves(model: type[BaseModel], prefix: str = "") -> dict[str, st.SearchStrategy[Any]]:
    """Dotted names of all settings, with strategies of right values."""
    found: dict[str, st.SearchStrategy[Any]] = {}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= leaves(field.annotation, f"{prefix}{name}.")
        elif name not in ("config", "output"):
            found[prefix + name] = values_of(field.annotation, field.metadata)
    return found


def values_of(annotation: Any, metadata: typing.Sequence[Any] = ()) -> st.SearchStrategy[Any]:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is typing.Annotated:
        return values_of(arguments[0], [*metadata, *arguments[1:]])
    if origin in (types.UnionType, typing.Union):
        return st.one_of([values_of(each, metadata) for each in arguments])
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is tuple:
        return st.lists(values_of(arguments[0]), max_size=4)
    return {
        type(None): lambda bounds: st.none(),
        bool: lambda bounds: st.booleans(),
        int: whole_numbers,
        float: numbers,
        str: texts,
    }[annotation](bounds_of(metadata))


def bounds_of(metadata: typing.Sequence[Any]) -> dict[str, Any]:
    """The constraints by name, those in pydantic's own containers as well."""
    found: dict[str, Any] = {}
    for item in metadata:
        found |= bounds_of(getattr(item, "metadata", ()))
        for kind, name in ((Ge, "ge"), (Gt, "gt"), (Le, "le"), (Lt, "lt")):
            if isinstance(item, kind):
                found[name] = getattr(item, name)
        if isinstance(item, MinLen):
            found["min_length"] = item.min_length
        if isinstance(item, MaxLen):
            found["max_length"] = item.max_length
    return found


def whole_numbers(bounds: Mapping[str, Any]) -> st.SearchStrategy[int]:
    low = bounds["ge"] if "ge" in bounds else bounds.get("gt", -(10**400)) + 1
    high = bounds["le"] if "le" in bounds else bounds.get("lt", 10**400) - 1
    small = st.integers(low, min(high, low + 40))
    return st.one_of(small, st.integers(low, high), st.just(high))


def numbers(bounds: Mapping[str, Any]) -> st.SearchStrategy[float]:
    low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt"))
    return st.floats(
        low,
        high,
        exclude_min="ge" not in bounds and low is not None,
        exclude_max="le" not in bounds and high is not None,
        allow_nan=low is None,
    )


def texts(bounds: Mapping[str, Any]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.sampled_from(WORDS), st.text(st.characters(exclude_characters="/"), max_size=20)
    )


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted names as sections."""
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *sections, last = name.split(".")
        branch = tree
        for section in sections:
            branch = branch.setdefault(section, {})
        branch[last] = value
    return tree


@st.composite
def some_of(draw: st.DrawFn, choices: dict[str, st.SearchStrategy[Any]]) -> dict[str, Any]:
    names = draw(st.lists(st.sampled_from(sorted(choices)), max_size=5, unique=True))
    return {name: draw(choices[name]) for name in names}


# Right values


def outcome(job: Callable[[Any], Any], job_settings: JobSettings) -> str:
    try:
        job(job_settings)
    except _Started:
        return "started"
    except CnnrayError as error:
        return type(error).__name__
    return "done"


@pytest.mark.parametrize("job", [job for job, run in JOBS.items() if run is not None])
@given(data=st.data())
@bounded
def test_right_values_start_a_job_or_are_a_users_mistake(
    places: Places, job: type[JobSettings], data: st.DataObject
) -> None:
    slow = {"engine.name"} if job is BenchSettings else set()  # it compiles, for minutes
    choices = {name: drawn for name, drawn in leaves(job).items() if name not in slow}
    values = data.draw(some_of(choices))
    overwrite = {"overwrite": True} if "overwrite" in job.model_fields else {}
    try:
        built = build_settings(
            job, nested(places.required(job) | overwrite | values), where="the test"
        )
    except SettingsError:
        return
    run = JOBS[job]
    assert run is not None
    assert outcome(run, built)


@given(data=st.data())
@bounded
def test_right_values_train_a_step(places: Places, data: st.DataObject) -> None:
    skipped = {"data", "overwrite"}
    choices = {
        name: values for name, values in leaves(TrainSettings).items() if name not in skipped
    }
    values = data.draw(some_of(choices))
    try:
        job_settings = build_settings(
            TrainSettings,
            nested(places.required(TrainSettings) | {"overwrite": True} | values),
            where="the test",
        )
        plan = plan_training(job_settings)
    except CnnrayError:
        return
    train_a_step(job_settings, plan)


def train_a_step(job_settings: TrainSettings, plan: TrainPlan) -> None:
    """What a worker makes of the settings, on two images."""
    transform = make_transforms(job_settings, plan.network)["train"]
    steps = 2
    learning_rate = make_learning_rate(job_settings, steps_per_epoch=steps)
    loss = make_loss(job_settings, (10, 20, 30), torch.device("cpu"))
    change = make_batch_transform(job_settings, plan.network, steps_per_epoch=steps)
    model = plan.network.build().train()
    optimizer = make_optimizer(job_settings, model)
    images = [
        transform.augment(
            np.full((8, 8, plan.network.preprocessing.channels), shade, np.uint8),
            epoch=0,
            key=str(shade),
        )
        for shade in (20, 200)
    ]
    image, label = torch.from_numpy(np.stack(images)), torch.tensor([0, 1])
    for step in (0, steps * job_settings.epochs - 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step) * group["lr_scale"]
        given_image, target = (image, label) if change is None else change(image, label, step)
        loss(model(given_image), target).mean().backward()
        optimizer.step()
        assert learning_rate(step) >= 0


# Wrong values

WRONG_TEXTS = (
    "",
    "nan",
    "inf",
    "-inf",
    "1e999",
    "-1",
    "9" * 5000,
    "x",
    "é馬",
    "\ud800",
    "{}",
)
WRONG_VALUES = (None, [], {}, [1], {"a": 1}, {1: 2}, -1, math.nan, math.inf, 10**400, "\0", "馬")
WRONG_FILES = (
    "a: " + "9" * 5000,
    "epochs: 2001-99-99",
    "epochs: 2001-12-24",
    "[" * 400,
    "? {a: 1}\n: 2",
    "? [a]\n: 2",
    "1: 2",
    "null: 2",
    "optimizer: {1: 2}",
    "epochs: !!binary x",
    "a: &a [*a]",
    "epochs: \ud800",
)


def require_settings_or_a_users_mistake(job: type[JobSettings], flags: list[str]) -> None:
    problem: SettingsError | None = None
    try:
        load_settings(job, flags)
    except SettingsError as error:
        problem = error
    if problem is not None:
        assert problem.exit_code == 2
        assert len(str(problem).split("\n")) <= 2
        assert len(str(problem)) < 1000


@pytest.mark.parametrize("job", JOBS)
@given(data=st.data())
@bounded
def test_any_text_of_a_flag_is_taken_or_is_a_users_mistake(
    places: Places, job: type[JobSettings], data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(sorted(leaves(job))))
    text = data.draw(st.one_of(st.sampled_from(WRONG_TEXTS), st.text(max_size=50)))
    required = [f"--{name}={value}" for name, value in places.required(job).items()]
    require_settings_or_a_users_mistake(job, [*required, f"--{name}={text}"])


@pytest.mark.parametrize("job", JOBS)
@given(data=st.data())
@bounded
def test_any_value_in_a_file_is_taken_or_is_a_users_mistake(
    places: Places, tmp_path: Path, job: type[JobSettings], data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(sorted(leaves(job))))
    value = data.draw(st.sampled_from(WRONG_VALUES))
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(places.required(job) | nested({name: value})))
    require_settings_or_a_users_mistake(job, ["--config", str(path)])


@pytest.mark.parametrize("text", WRONG_FILES)
def test_any_file_is_taken_or_is_a_users_mistake(tmp_path: Path, text: str) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    flags = ["--data", "d", "--output", "o", "--config", str(path)]
    with pytest.raises(SettingsError):
        load_settings(TrainSettings, flags)
    require_settings_or_a_users_mistake(TrainSettings, flags)
