"""Settings: flags over the file over the defaults, and mistakes that name their remedy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pydantic
import pytest
import yaml

from cnnray import config
from cnnray.config import (
    BenchSettings,
    BudgetSettings,
    ClassifySettings,
    DemoSettings,
    EvaluateSettings,
    InferenceSettings,
    JobSettings,
    LabelingSettings,
    PackSettings,
    ScalingSettings,
    TrainSettings,
    TuneSettings,
    VerifySettings,
    load_settings,
)
from cnnray.errors import SettingsError

JOBS = (
    PackSettings,
    TrainSettings,
    TuneSettings,
    EvaluateSettings,
    ClassifySettings,
    BenchSettings,
    VerifySettings,
    DemoSettings,
)
CONFIGS = sorted((Path(__file__).parents[1] / "jobs" / "configs").glob("*.yaml"))
"""Of the train job, unless the name begins with another one."""

OTHERS = {"pack": PackSettings, "evaluate": EvaluateSettings, "classify": ClassifySettings}

WriteYaml = Callable[[str], str]


@pytest.fixture
def write_yaml(tmp_path: Path) -> WriteYaml:
    def write(text: str) -> str:
        path = tmp_path / "settings.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def train(*flags: str) -> TrainSettings:
    return load_settings(TrainSettings, ["--data", "d", "--output", "o", *flags])


def problem(*flags: str) -> str:
    with pytest.raises(SettingsError) as caught:
        train(*flags)
    message = str(caught.value)
    assert message.count("\n") <= 1
    return message


# Where values come from


def test_flags_beat_the_file_and_the_file_beats_the_defaults(write_yaml: WriteYaml) -> None:
    path = write_yaml("epochs: 7\nseed: 8\noptimizer: {lr: 0.5, name: sgd}\n")
    settings = train("--config", path, "--seed", "9", "--optimizer.lr", "0.25")
    assert (settings.epochs, settings.seed, settings.global_batch_size) == (7, 9, 32)
    assert (settings.optimizer.lr, settings.optimizer.name) == (0.25, "sgd")
    assert settings.optimizer.momentum == 0.9


def test_the_place_of_the_config_flag_does_not_matter(write_yaml: WriteYaml) -> None:
    path = write_yaml("data: d\noutput: o\nseed: 3\n")
    for flags in (["--seed", "4", f"--config={path}"], ["--config", path, "--seed=4"]):
        assert load_settings(TrainSettings, flags).seed == 4


def test_required_settings_may_stand_in_the_file(write_yaml: WriteYaml) -> None:
    settings = load_settings(TrainSettings, ["--config", write_yaml("data: d\noutput: o\n")])
    assert (settings.data, settings.output) == ("d", "o")


def test_an_empty_file_is_no_setting(write_yaml: WriteYaml) -> None:
    assert train("--config", write_yaml("# nothing\n")) == train()


def test_the_environment_is_never_read(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = train()
    for name in ("OUTPUT", "DATA", "EPOCHS", "SEED", "OPTIMIZER", "OPTIMIZER__LR", "CLUSTER"):
        monkeypatch.setenv(name, "99")
        monkeypatch.setenv(name.lower(), "99")
    assert train() == plain
    with pytest.raises(SettingsError, match="--output is required"):
        load_settings(TrainSettings, ["--data", "d"])


def test_the_arguments_of_the_process_are_never_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["job.py", "--epochs", "99"])
    assert train().epochs == 10
    assert TrainSettings(data="d", output="o").epochs == 10


@pytest.mark.parametrize(
    ("flags", "expected"), [((), False), (("--overwrite",), True), (("--no-overwrite",), False)]
)
def test_booleans_are_flags(flags: tuple[str, ...], expected: bool) -> None:
    assert train(*flags).overwrite is expected


def test_a_no_flag_beats_the_file(write_yaml: WriteYaml) -> None:
    path = write_yaml("overwrite: true\n")
    assert train("--config", path).overwrite is True
    assert train("--config", path, "--no-overwrite").overwrite is False


@pytest.mark.parametrize("channels", ["1", "3"])
def test_numbers_of_a_fixed_choice_can_be_given_as_flags(channels: str) -> None:
    assert train("--image.channels", channels).image.channels == int(channels)


@pytest.mark.parametrize(
    ("text", "value", "bounds"), [("4", 4, (4, 4)), ("2:8", "2:8", (2, 8)), ("3:3", "3:3", (3, 3))]
)
def test_workers_are_a_number_or_a_range(text: str, value: Any, bounds: tuple[int, int]) -> None:
    scaling = train("--scaling.num_workers", text).scaling
    assert scaling.num_workers == value
    assert (scaling.min_workers, scaling.max_workers) == bounds
    assert scaling.is_elastic == (":" in text)
    assert ScalingSettings(**scaling.model_dump(mode="json")) == scaling


def test_a_range_of_workers_in_yaml_is_quoted(write_yaml: WriteYaml) -> None:
    path = write_yaml('data: d\noutput: o\nscaling: {num_workers: "2:8"}\n')
    assert load_settings(TrainSettings, ["--config", path]).scaling.max_workers == 8


# Mistakes


@pytest.mark.parametrize("text", ["0:2", "3:2", "2:", ":2", "1:2:3", "2-8", "1.5", "-1", "all", ""])
def test_a_range_of_workers_that_makes_no_sense_is_named_with_its_flag(text: str) -> None:
    assert problem(f"--scaling.num_workers={text}").startswith(
        "--scaling.num_workers: must be a number from 1 on, or MIN:MAX of such, got "
    )


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--lr", "optimizer.lr"),
        ("--epoch", "epochs"),
        ("--optimiser.lr", "optimizer.lr"),
        ("--batch_size", "global_batch_size"),
        ("--warmup_epochs", "schedule.warmup_epochs"),
        ("--overwrit", "overwrite"),
    ],
)
def test_an_unknown_flag_is_refused_with_the_one_that_was_meant(flag: str, meant: str) -> None:
    expected = f"unknown flag {flag}\nhint: did you mean {meant}?"
    assert problem(flag, "1") == expected
    assert problem(f"{flag}=1") == expected


def test_a_flag_like_no_other_leads_to_the_help() -> None:
    assert problem("--zzzz", "1") == "unknown flag --zzzz\nhint: see --help"


@pytest.mark.parametrize(
    ("text", "name", "meant"),
    [
        ("epoch: 3\n", "epoch", "epochs"),
        ("lr: 3\n", "lr", "optimizer.lr"),
        ("optimizer:\n  lrr: 3\n", "optimizer.lrr", "optimizer.lr"),
    ],
)
def test_an_unknown_setting_in_the_file_is_refused_likewise(
    write_yaml: WriteYaml, text: str, name: str, meant: str
) -> None:
    path = write_yaml(text)
    assert problem("--config", path) == (
        f"unknown setting {name} in {path}\nhint: did you mean {meant}?"
    )


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--epochs", "x"),
        ("--epochs", "1.5"),
        ("--epochs", "0"),
        ("--seed", "-1"),
        ("--optimizer.lr", "0"),
        ("--optimizer.lr", "nan"),
        ("--optimizer.lr", "inf"),
        ("--optimizer.momentum", "1"),
        ("--augment.flip", "1.01"),
        ("--augment.flip", "nan"),
        ("--image.size", "3"),
        ("--loss.name", "hinge"),
        ("--scaling.num_workers", "0"),
        ("--run_name", "../up"),
    ],
)
def test_a_wrong_value_is_named_with_its_flag(flag: str, value: str) -> None:
    message = problem(flag, value)
    assert message.startswith(f"{flag}: ")
    assert f"got '{value}'" in message


def test_a_wrong_choice_of_a_number_is_named_with_its_flag() -> None:
    assert problem("--image.channels", "2").startswith("--image.channels: Input should be 1 or 3")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("epochs: many\n", "epochs"),
        ("optimizer: 3\n", "optimizer"),
        ("optimizer:\n", "optimizer"),
        ("overwrite: maybe\n", "overwrite"),
        ("schedule: {name: linear}\n", "schedule.name"),
        ("seed: [1, 2]\n", "seed"),
    ],
)
def test_a_wrong_value_in_the_file_is_named(write_yaml: WriteYaml, text: str, name: str) -> None:
    assert problem("--config", write_yaml(text)).startswith(f"--{name}: ")


@pytest.mark.parametrize(
    ("job", "missing"),
    [
        (PackSettings, "input"),
        (TrainSettings, "data"),
        (EvaluateSettings, "model"),
        (ClassifySettings, "model"),
    ],
)
def test_what_is_required_is_asked_for(job: type[JobSettings], missing: str) -> None:
    with pytest.raises(SettingsError, match=f"^--{missing} is required\nhint: see --help$"):
        load_settings(job, [])


@pytest.mark.parametrize("flags", [["junk"], ["-x"], ["--epochs"], ["--overwrite", "false"]])
def test_arguments_that_make_no_sense_are_one_line_and_a_hint(flags: list[str]) -> None:
    assert problem(*flags).endswith("\nhint: see --help")


def test_splits_must_leave_something_to_train_on() -> None:
    flags = ["--input", "i", "--output", "o", "--split.val", "0.6", "--split.test", "0.4"]
    with pytest.raises(SettingsError, match="must leave images to train on"):
        load_settings(PackSettings, flags)


@pytest.mark.parametrize(
    ("method", "loss"), [("focal", "mse"), ("logit_adjustment", "bce"), ("focal", "bce")]
)
def test_a_method_for_imbalance_that_the_loss_cannot_take_is_refused(
    method: str, loss: str
) -> None:
    message = problem("--imbalance.method", method, "--loss.name", loss)
    assert f"imbalance.method {method} does not go with loss.name {loss}" in message
    train("--imbalance.method", method)  # with the loss as it is by default


@pytest.mark.parametrize("flag", ["--mix.mixup_alpha", "--mix.cutmix_alpha"])
def test_alphas_of_mixing_are_checked(flag: str) -> None:
    for value in ("-0.1", "nan", "1e9"):
        assert flag.removeprefix("--") in problem(flag, value)
    train(flag, "0.2", "--mix.probability", "0.5", "--imbalance.method", "logit_adjustment")


def test_milestones_are_a_list_of_fractions() -> None:
    assert train("--schedule.milestones", "0.3,0.6,0.9").schedule.milestones == (0.3, 0.6, 0.9)
    assert "schedule.milestones" in problem("--schedule.milestones", "0.3,30")


def test_one_cycle_has_no_other_warm_up() -> None:
    message = problem("--schedule.name", "one_cycle", "--schedule.warmup_epochs", "1")
    assert "leave warmup_epochs out" in message


@pytest.mark.parametrize("flags", [(), ("--model.weights", "w", "--model.freeze", "backbone")])
def test_frozen_epochs_are_for_fine_tuning(flags: tuple[str, ...]) -> None:
    assert "it needs weights and freeze none" in problem("--model.frozen_epochs", "2", *flags)
    train("--model.frozen_epochs", "2", "--model.weights", "w")


def test_a_config_flag_without_a_file_is_refused() -> None:
    assert problem("--config") == "--config needs a file"


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = str(tmp_path / "nope.yaml")
    assert problem("--config", path) == f"cannot read {path}: No such file or directory"
    assert problem("--config", str(tmp_path)).startswith(f"cannot read {tmp_path}: ")


@pytest.mark.parametrize(
    "data", [b"a: [", b"\xff\xfe\x00", b"a: 1\n b: 2\n", b"!!python/object/apply:os.getcwd []\n"]
)
def test_a_file_that_is_not_yaml_is_named(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(data)
    assert problem("--config", str(path)).startswith(f"{path} is not YAML: ")


@pytest.mark.parametrize(("text", "kind"), [("- a\n- b\n", "list"), ("text", "str"), ("3", "int")])
def test_a_file_of_another_shape_is_named(write_yaml: WriteYaml, text: str, kind: str) -> None:
    assert f"settings are 'name: value' lines, found {kind}" in problem(
        "--config", write_yaml(text)
    )


# What holds for every settings class


def _fields(model: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, field in model.model_fields.items():
        yield f"{prefix}.{name}", field
        if isinstance(field.annotation, type) and issubclass(field.annotation, pydantic.BaseModel):
            yield from _fields(field.annotation, f"{prefix}.{name}")


FIELDS = dict(pair for job in JOBS for pair in _fields(job, job.__name__))


@pytest.mark.parametrize("name", FIELDS)
def test_every_setting_has_help(name: str) -> None:
    field = FIELDS[name]
    nested = isinstance(field.annotation, type) and issubclass(field.annotation, pydantic.BaseModel)
    text = field.annotation.__doc__ if nested else field.description
    assert text
    assert text.strip()


@pytest.mark.parametrize("job", JOBS)
def test_settings_are_frozen_and_complete(job: type[JobSettings]) -> None:
    assert job.__doc__
    values = {name: "x" for name, field in job.model_fields.items() if field.is_required()}
    settings = job(**values)
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        settings.output = "other"
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        settings.cluster.address = "other"
    with pytest.raises(pydantic.ValidationError, match="not permitted"):
        job(**values, unknown=1)


@pytest.mark.parametrize("job", JOBS)
def test_every_job_is_covered_here(job: type[JobSettings]) -> None:
    found = {
        value
        for value in vars(config).values()
        if isinstance(value, type) and issubclass(value, JobSettings)
    }
    assert found - {JobSettings, InferenceSettings, LabelingSettings} == set(JOBS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_of_the_project_loads(path: Path) -> None:
    job = OTHERS.get(path.stem.split("-")[0], TrainSettings)
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    required = [name for name, field in job.model_fields.items() if field.is_required()]
    flags = [part for name in required if name not in given for part in (f"--{name}", "x")]
    load_settings(job, ["--config", str(path), *flags])


@pytest.mark.parametrize(
    ("bad", "total", "exceeded"),
    [(100, 200, False), (101, 200, True), (1000, 100_000, False), (1001, 100_000, True)],
)
def test_the_budget_is_exceeded_beyond_both_bounds(bad: int, total: int, exceeded: bool) -> None:
    assert (
        BudgetSettings(max_fraction=0.01, min_rows=100).exceeded(bad=bad, total=total) is exceeded
    )


def test_paths_can_be_made_independent_of_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = TrainSettings(
        data="data", output="s3://bucket/model", model={"weights": "net.safetensors"}
    ).with_absolute_paths()
    assert settings.data == str(tmp_path / "data")
    assert settings.output == "s3://bucket/model"
    assert settings.model.weights == str(tmp_path / "net.safetensors")
    assert settings.order_log is None
    assert settings.distill.teacher is None


def test_settings_of_a_trial_take_the_flags_of_train_and_what_the_search_needs():
    argv = ["--data=d", "--output=o", "--space=s.yaml", "--trials=3", "--optimizer.lr=0.1"]
    settings = load_settings(TuneSettings, argv)
    assert (settings.trials, settings.optimizer.lr, settings.search) == (3, 0.1, "random")
    with pytest.raises(SettingsError, match="--space is required"):
        load_settings(TuneSettings, argv[:2])
