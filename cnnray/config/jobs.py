"""The settings of each job: frozen, complete, checked when built."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from cnnray.config.sections import (
    BudgetSettings,
    ClusterSettings,
    ColumnSettings,
    EngineSettings,
    InferenceScalingSettings,
    ScalingSettings,
    SplitSettings,
    absolute_path,
)
from cnnray.config.training import (
    AugmentSettings,
    CheckpointSettings,
    ComputeSettings,
    DistillSettings,
    EarlyStoppingSettings,
    EmaSettings,
    ImageSettings,
    ImbalanceSettings,
    IngestSettings,
    LossSettings,
    MixSettings,
    ModelSettings,
    OptimizerSettings,
    ScheduleSettings,
    TrackingSettings,
)
from cnnray.options import DecodeLimits, NonNegativeInt, PositiveFloat, PositiveInt, Seconds


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
    decode_seconds: Seconds = 30.0
    """time after which an image that is still being decoded is rejected (decoder_timeout)"""
    limits: DecodeLimits = DecodeLimits()
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
    accumulate_steps: PositiveInt = 1
    """passes that a worker cuts its part of a batch into, for less memory: the order stays"""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """of the initial weights, the sample order, augmentation, mixing and dropout"""
    model: ModelSettings = ModelSettings()
    image: ImageSettings = ImageSettings()
    augment: AugmentSettings = AugmentSettings()
    mix: MixSettings = MixSettings()
    ingest: IngestSettings = IngestSettings()
    compute: ComputeSettings = ComputeSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    loss: LossSettings = LossSettings()
    imbalance: ImbalanceSettings = ImbalanceSettings()
    distill: DistillSettings = DistillSettings()
    ema: EmaSettings = EmaSettings()
    early_stopping: EarlyStoppingSettings = EarlyStoppingSettings()
    scaling: ScalingSettings = ScalingSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    tracking: TrackingSettings = TrackingSettings()
    decode_seconds: Seconds = 30.0
    """time after which an image that is still being decoded ends the job, with its key"""
    limits: DecodeLimits = DecodeLimits()
    order_log: str | None = None
    """folder to write (epoch, step, rank, key) of every sample to, as Parquet"""
    overwrite: bool = False
    """start anew: remove the bundle and this run's checkpoints at output first"""

    @model_validator(mode="after")
    def _imbalance_fits_the_loss(self) -> TrainSettings:
        method, loss = self.imbalance.method, self.loss.name
        takes = {"focal": ("cross_entropy", "focal"), "logit_adjustment": ("cross_entropy",)}
        if loss not in takes.get(method, (loss,)):
            raise ValueError(f"imbalance.method {method} does not go with loss.name {loss}")
        return self

    def with_absolute_paths(self) -> TrainSettings:
        """The same settings for a process that works in another folder."""
        return self.model_copy(
            update={
                "data": absolute_path(self.data),
                "output": absolute_path(self.output),
                "order_log": absolute_path(self.order_log),
                "model": self.model.with_absolute("weights"),
                "distill": self.distill.with_absolute("teacher"),
                "tracking": self.tracking.with_absolute("tensorboard"),
            }
        )


class TuneSettings(TrainSettings):
    """Train many times over a space of settings, and keep the best bundle."""

    output: str
    """where the best bundle, report.html and trials.parquet are written, and trials/ with all"""
    space: str
    """YAML file of settings and the values to try: lists, or {min: 0.0003, max: 0.01, log: true}"""
    trials: PositiveInt = 16
    """points to try, the settings as given being the first"""
    search: Literal["random", "grid", "optuna"] = "random"
    """random, grid (lists only) or optuna, which learns from trials (the optuna extra)"""
    metric: Literal["val_accuracy", "val_loss"] = "val_accuracy"
    """what the best trial is best at, on the validation split"""
    scheduler: Literal["asha", "none"] = "asha"
    """asha: stop trials that are behind others at the same epoch; none: all to their end"""
    grace_epochs: PositiveInt = 2
    """of asha: epochs that each trial gets"""
    reduction_factor: Annotated[float, Field(gt=1.0, le=16.0)] = 3.0
    """of asha: one in so many goes on, at grace_epochs and at each multiple of it by this factor"""
    max_concurrent: PositiveInt | None = None
    """trials at a time (as many as the cluster has CPUs or GPUs for)"""
    refit_epochs: NonNegativeInt = 0
    """train the best settings anew for so many epochs (0: the bundle is that of the best trial)"""


class InferenceSettings(JobSettings):
    """Base of the jobs that ask a model about images: what computes, and where."""

    model: str
    """bundle, local or s3://"""
    chunk_rows: PositiveInt = 256
    """images of one task"""
    batch_size: PositiveInt | None = None
    """images of one forward pass (64 on a GPU, else 16, which stay in the CPU's caches)"""
    placement: Literal["auto", "fused", "split"] = "auto"
    """fused: every worker does all; split: CPUs read and decode for the workers (auto: on GPUs)"""
    decode_workers: PositiveInt | None = None
    """processes of one CPU that decode, with split (one for each CPU that is left)"""
    decode_seconds: Seconds = 30.0
    """time after which an image that is still being decoded is given up (decoder_timeout)"""
    engine: EngineSettings = EngineSettings()
    scaling: InferenceScalingSettings = InferenceScalingSettings()
    limits: DecodeLimits = DecodeLimits()


class EvaluateSettings(InferenceSettings):
    """Evaluate a bundle on a split of a dataset, every row once."""

    data: str
    """packed dataset, local or s3://"""
    output: str
    """where metrics.json, predictions.parquet and report.html are written"""
    split: Literal["train", "val", "test"] = "test"
    """split to evaluate"""
    tta: Literal["none", "flips", "crops"] = "none"
    """average over views of each image: 2 (flips: its mirror) or 10 (crops: corners), as slow"""
    budget: BudgetSettings = BudgetSettings()
    overwrite: bool = False
    """replace the evaluation at output"""


class LabelingSettings(InferenceSettings):
    """What labels images, and which: shared by the jobs that label and that predict it."""

    input: str
    """folder or prefix, table of URIs, S3 Inventory manifest.json, WebDataset tars or dataset"""
    output: str | None = None
    """where the results go"""
    format: Literal["auto", "folder", "table", "inventory", "webdataset", "idx", "dataset"] = "auto"
    """kind of input"""
    columns: ColumnSettings = ColumnSettings()
    top_k: PositiveInt = 5
    """labels kept for each image, with their probabilities"""
    embeddings: bool = False
    """add the input of the network's head as float16"""
    part_rows: PositiveInt = 65_536
    """rows of one output file; also what a driver that is killed may have to do again"""
    price_per_hour: PositiveFloat | None = None
    """USD an hour of one machine, for the predicted cost"""


class ClassifySettings(LabelingSettings):
    """Label what is new in a collection of images into Parquet: one row for each image, once."""

    output: str
    """table of labels to make or to add to: data/run=ID/part-*.parquet"""
    on_changed: Literal["relabel", "ignore", "error"] = "relabel"
    """what to do with an image whose content has changed since it was labelled"""
    delta: bool = False
    """keep a Delta table over the same files, OUTPUT/_delta_log, too (needs the delta extra)"""
    dry_run: bool = False
    """write nothing: say what would be labelled, and predict the time and the cost from a sample"""
    single_writer: bool = False
    """go on with a store that has no conditional writes: you see to it that nobody else writes"""
    budget: BudgetSettings = BudgetSettings()


class BenchSettings(LabelingSettings):
    """Measure labelling on a sample, in one process without Ray, and predict a run from it."""

    output: str | None = None
    """JSON file to write the result to as well, local or s3:// (replaced)"""
    sample: PositiveInt = 256
    """images to measure, at about, from all over the input"""
    images: PositiveInt | None = None
    """images to predict a run for (as many as there are)"""


class VerifySettings(JobSettings):
    """Prove from its files that a table of labels is whole: each planned image once."""

    output: str
    """the table, as given to classify"""
    abort: bool = False
    """end a run that is open: what it has not published will be planned again by the next one"""


class DemoSettings(JobSettings):
    """Run the whole path on the handwritten digits that come with scikit-learn."""

    output: str = "demo"
    """folder for the images, the dataset, the model, the report and the labels"""
    epochs: PositiveInt = 20
    """passes over the training split"""
