"""The settings of every job: frozen, complete, checked when built; unknown names are refused.

Flags beat the YAML file, the file beats the defaults; the environment is not read. The text under
each field is its help: units and defaults are there because that is where people look.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from cnnray.errors import SettingsError

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


def _whole_number(value: Any) -> Any:
    """A flag's text as the number that a Literal wants."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


class Section(BaseModel):
    """A group of settings, ``--section.key value`` on the command line."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ColumnSettings(Section):
    """Names of the columns of an input table; found by convention when not given."""

    path: str | None = None
    """column with the path or s3:// URI of the image (uri, path, image, file, filename, url)"""
    label: str | None = None
    """column with the class (label, class, category, target)"""
    split: str | None = None
    """column with train, val or test (split, subset)"""
    key: str | None = None
    """column with the unique key of the image (key; otherwise the path)"""

    def options(self) -> dict[str, Any]:
        """The names that were given, as options of a source."""
        return {
            f"{name}_column": value for name, value in self.model_dump(exclude_none=True).items()
        }


class LimitSettings(Section):
    """What one image may cost, checked from its header before it is decoded."""

    max_pixels: PositiveInt = 50_000_000
    """pixels, width times height"""
    max_bytes: PositiveInt = 32 * 1024 * 1024
    """bytes, encoded"""


class BudgetSettings(Section):
    """How many bad images a job accepts: beyond both bounds it ends with exit code 3, rows kept."""

    max_fraction: Fraction = 0.01
    """fraction of the inputs"""
    min_rows: Annotated[int, Field(ge=0)] = 100
    """rows that are always accepted, however small the collection"""

    def exceeded(self, *, bad: int, total: int) -> bool:
        """Whether ``bad`` of ``total`` images is more than is accepted."""
        return bad > max(self.min_rows, self.max_fraction * total)


class ClusterSettings(Section):
    """Where Ray runs. A job connects to RAY_ADDRESS when it is set, else starts a local Ray."""

    address: str | None = None
    """host:port of a running cluster, auto for the one on this machine, local for a new one"""
    num_cpus: PositiveInt | None = None
    """logical CPUs of a local Ray (the machine's)"""
    worker_logs: bool = False
    """copy all that workers print to this log (errors and warnings are shown anyway)"""
    progress_seconds: PositiveFloat = 10.0
    """seconds between two progress lines in a log"""
    stall_seconds: PositiveFloat = 600.0
    """seconds without any progress after which the job fails instead of waiting on"""


class ScalingSettings(Section):
    """Workers of training."""

    num_workers: PositiveInt = 1
    """data-parallel processes"""
    use_gpu: bool = False
    """one GPU for each worker"""
    cpus_per_worker: PositiveFloat | None = None
    """CPUs reserved for each worker (as many as leave room for reading the data)"""
    threads_per_worker: PositiveInt | None = None
    """torch threads of each worker (the node's cores shared among its workers)"""


class InferenceScalingSettings(Section):
    """Actors that decode and infer."""

    num_workers: PositiveInt | None = None
    """actors (one for each GPU with use_gpu, else one for each CPU)"""
    use_gpu: bool = False
    """one GPU for each actor"""
    cpus_per_worker: PositiveFloat = 1.0
    """CPUs reserved for each actor; also its torch threads"""


class SplitSettings(Section):
    """Fractions that a stable hash of the key assigns when the source names no split."""

    val: Fraction = 0.1
    """fraction of the images for validation"""
    test: Fraction = 0.1
    """fraction of the images for the test"""

    @model_validator(mode="after")
    def _leave_some_to_train(self) -> SplitSettings:
        if self.val + self.test >= 1.0:
            raise ValueError("split.val + split.test must leave images to train on")
        return self


class ModelSettings(Section):
    """The network."""

    name: str = "tutorial_cnn"
    """tutorial_cnn, a torchvision classifier (resnet18) or timm/NAME with the timm extra"""
    weights: str | None = None
    """safetensors file to start from, local or s3://; the head is replaced when it does not fit"""
    freeze: Literal["none", "backbone"] = "none"
    """backbone: train the head only"""


class ImageSettings(Section):
    """How images are brought to the network's size; saved in the bundle."""

    size: Annotated[int, Field(ge=4, le=2048)] | None = None
    """pixels, height and width (the images' own where all are alike, else the model's or 224)"""
    resize: PositiveInt | None = None
    """pixels of the short side before the centre crop (size / 0.875; size where all are alike)"""
    interpolation: Literal["bilinear", "bicubic"] | None = None
    """resampling filter (that of the pretrained model, else bilinear)"""
    channels: Annotated[Literal[1, 3], BeforeValidator(_whole_number)] | None = None
    """1 grey, 3 colour (1 for a grey dataset and tutorial_cnn, else 3)"""


class AugmentSettings(Section):
    """Random changes of training images; everything is off by default."""

    crop: Literal["center", "random_resized", "random_pad"] = "center"
    """random_resized: a part of random area and shape; random_pad: shift by up to pad pixels"""
    scale_min: Annotated[float, Field(gt=0.0, le=1.0)] = 0.35
    """smallest area of random_resized, fraction of the image"""
    ratio_max: Annotated[float, Field(ge=1.0)] = 4 / 3
    """widest aspect of random_resized (and its inverse)"""
    pad: Annotated[int, Field(ge=0)] = 4
    """pixels, for random_pad"""
    flip: Fraction = 0.0
    """probability of a left-right flip"""
    vertical_flip: Fraction = 0.0
    """probability of an up-down flip"""
    rotation: Annotated[float, Field(ge=0.0, le=180.0)] = 0.0
    """largest rotation either way, degrees"""
    color_jitter: Fraction = 0.0
    """strength of random brightness, contrast and saturation"""
    policy: Literal["none", "randaugment", "trivialaugment"] = "none"
    """automatic augmentation"""
    policy_magnitude: Annotated[int, Field(ge=0, le=30)] = 9
    """strength of randaugment, 0 to 30"""
    policy_ops: PositiveInt = 2
    """operations a sample, for randaugment"""
    erasing: Fraction = 0.0
    """probability that a random rectangle is blanked"""


class OptimizerSettings(Section):
    """The optimizer."""

    name: Literal["adam", "adamw", "sgd"] = "adam"
    """adam, adamw or sgd (with Nesterov momentum)"""
    lr: PositiveFloat = 0.001
    """peak learning rate, for the global batch"""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """decay of weights (not of biases and normalisation layers)"""
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """momentum of sgd"""


class ScheduleSettings(Section):
    """The learning rate over time."""

    name: Literal["constant", "cosine"] = "constant"
    """constant, or cosine to min_fraction of the peak"""
    warmup_epochs: Annotated[float, Field(ge=0.0)] = 0.0
    """epochs of linear warm-up"""
    min_fraction: Fraction = 0.0
    """last learning rate of cosine, fraction of the peak"""


class LossSettings(Section):
    """The loss."""

    name: Literal["cross_entropy", "mse"] = "cross_entropy"
    """cross_entropy, or the tutorial's mean squared error of the softmax outputs"""


class CheckpointSettings(Section):
    """Checkpoints of training."""

    keep: PositiveInt = 2
    """latest checkpoints kept (the best one is kept besides)"""
    max_restarts: Annotated[int, Field(ge=0)] = 3
    """restarts from the last checkpoint after a worker died"""


class JobSettings(BaseSettings):
    """Base of every job's settings."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        cli_exit_on_error=False,
        protected_namespaces=(),
    )

    config: str | None = Field(default=None, exclude=True)
    """YAML file with settings; flags beat it"""
    cluster: ClusterSettings = ClusterSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)  # the command line comes before it; the environment is not read


class PackSettings(JobSettings):
    """Validate, split and pack images into a dataset of Parquet shards."""

    input: str
    """folder of class folders, table (CSV, Parquet), WebDataset tars or IDX files; local or s3://"""
    output: str
    """where the dataset is written; refused when one is there, unless --overwrite"""
    format: Literal["auto", "folder", "table", "webdataset", "idx"] = "auto"
    """kind of input"""
    columns: ColumnSettings = ColumnSettings()
    split: SplitSettings = SplitSettings()
    shard_bytes: PositiveInt = 256 * 1024 * 1024
    """encoded bytes of one shard, at most about"""
    limits: LimitSettings = LimitSettings()
    budget: BudgetSettings = BudgetSettings()
    overwrite: bool = False
    """replace the dataset at output, once the new one is complete"""


class TrainSettings(JobSettings):
    """Train an image classifier on a packed dataset."""

    data: str
    """packed dataset, local or s3://"""
    output: str
    """where the bundle is written, and the checkpoints under training/"""
    run_name: str = Field(default="main", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """name of the run: the same name continues from its last checkpoint"""
    epochs: PositiveInt = 10
    """passes over the training split"""
    global_batch_size: PositiveInt = 32
    """samples of one optimizer step, over all workers"""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """of the initial weights, the sample order, augmentation and dropout"""
    model: ModelSettings = ModelSettings()
    image: ImageSettings = ImageSettings()
    augment: AugmentSettings = AugmentSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    loss: LossSettings = LossSettings()
    scaling: ScalingSettings = ScalingSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    limits: LimitSettings = LimitSettings()
    order_log: str | None = None
    """folder to write (epoch, step, rank, key) of every sample to, as Parquet"""
    overwrite: bool = False
    """start anew: remove the bundle and this run's checkpoints at output first"""


class EvaluateSettings(JobSettings):
    """Evaluate a bundle on a split of a dataset, every row once."""

    model: str
    """bundle, local or s3://"""
    data: str
    """packed dataset, local or s3://"""
    output: str
    """where metrics.json, predictions.parquet and report.html are written"""
    split: Literal["train", "val", "test"] = "test"
    """split to evaluate"""
    batch_size: PositiveInt = 64
    """samples of one forward pass"""
    scaling: InferenceScalingSettings = InferenceScalingSettings()
    limits: LimitSettings = LimitSettings()
    overwrite: bool = False
    """replace the evaluation at output"""


class ClassifySettings(JobSettings):
    """Label a collection of images into Parquet: one row for each image."""

    model: str
    """bundle, local or s3://"""
    input: str
    """folder or prefix, table of URIs, WebDataset tars or packed dataset; local or s3://"""
    output: str
    """where data/run=ID/part-*.parquet are written; refused when labels are there"""
    format: Literal["auto", "folder", "table", "webdataset", "idx", "dataset"] = "auto"
    """kind of input"""
    columns: ColumnSettings = ColumnSettings()
    top_k: PositiveInt = 5
    """labels kept for each image, with their probabilities"""
    embeddings: bool = False
    """add the input of the network's head as float16"""
    part_rows: PositiveInt = 65_536
    """rows of one output file"""
    chunk_rows: PositiveInt = 256
    """images of one task"""
    batch_size: PositiveInt = 64
    """images of one forward pass"""
    scaling: InferenceScalingSettings = InferenceScalingSettings()
    limits: LimitSettings = LimitSettings()
    budget: BudgetSettings = BudgetSettings()


class DemoSettings(JobSettings):
    """Run the whole path on the handwritten digits that come with scikit-learn."""

    output: str = "demo"
    """folder for the images, the dataset, the model, the report and the labels"""
    epochs: PositiveInt = 12
    """passes over the training split"""


Settings = TypeVar("Settings", bound=JobSettings)


def load_settings(settings_class: type[Settings], argv: Sequence[str]) -> Settings:
    """Settings from flags over ``--config FILE.yaml`` over defaults. Raises ``SettingsError``."""
    config_path, flags = _take_config_flag(argv)
    known = set(_setting_names(settings_class))
    for flag in flags:
        if flag.startswith("--"):
            _check_known(flag[2:].split("=", 1)[0], known, kind="flag --")
    values = {} if config_path is None else _read_yaml(config_path, known)
    try:
        return settings_class(_cli_parse_args=list(flags), **values)
    except ValidationError as error:
        raise SettingsError(_first_problem(error), hint="see --help") from None
    except Exception as error:
        if type(error).__name__ != "SettingsError":
            raise
        raise SettingsError(
            str(error).replace("error parsing CLI: ", ""), hint="see --help"
        ) from None


def _take_config_flag(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    path, flags = None, []
    arguments = iter(argv)
    for argument in arguments:
        if argument == "--config":
            path = next(arguments, None)
            if path is None:
                raise SettingsError("--config needs a file")
        elif argument.startswith("--config="):
            path = argument.removeprefix("--config=")
        else:
            flags.append(argument)
    return path, flags


def _read_yaml(path: str, known: set[str]) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise SettingsError(
            f"{path}: settings are 'name: value' lines, found {type(values).__name__}"
        )
    for name in _dotted(values):
        _check_known(name, known, kind="setting ", where=f" in {path}")
    return values


def _dotted(values: Mapping[Any, Any], prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _dotted(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _setting_names(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _setting_names(field.annotation, f"{prefix}{name}.")


def _check_known(name: str, known: set[str], *, kind: str, where: str = "") -> None:
    plain = name.removeprefix("no-") if name.startswith("no-") else name
    if plain in known or name == "help":
        return
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if not close:  # "--lr" for "--optimizer.lr"
        close = [full for full in sorted(known) if full.rsplit(".", 1)[-1] == name][:1]
    raise SettingsError(
        f"unknown {kind}{name}{where}", hint=f"did you mean {close[0]}?" if close else "see --help"
    )


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    name = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "missing":
        return f"--{name} is required"
    message = problem["msg"].removeprefix("Value error, ")
    if not name:
        return message
    return f"--{name}: {message}, got {problem['input']!r}"
