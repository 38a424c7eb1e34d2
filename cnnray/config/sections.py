"""Groups of settings that jobs share: ``--section.key value`` on the command line.

The text under each field is its help: units and defaults are there because that is where people
look.
"""

from __future__ import annotations

import os
import re
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_serializer,
    field_validator,
    model_validator,
)

from cnnray.errors import hide_credentials

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]

WORKER_COUNT = re.compile(r"(?P<least>[1-9]\d*)(:(?P<most>[1-9]\d*))?", re.ASCII)


def _whole_number(value: Any) -> Any:
    """A flag's text as the number that a Literal wants."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def _worker_count(value: Any) -> Any:
    """A number as one, MIN:MAX as the text that it is."""
    match = WORKER_COUNT.fullmatch(str(value))
    if match is None or int(match["most"] or match["least"]) < int(match["least"]):
        raise ValueError("must be a number from 1 on, or MIN:MAX of such")
    return value if match["most"] else int(match["least"])


def absolute_path(path: str | None) -> str | None:
    """A local path from the root on; an address as it is."""
    return path if path is None or "://" in path else os.path.abspath(os.path.expanduser(path))


class Section(BaseModel):
    """A group of settings, ``--section.key value`` on the command line."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def with_absolute(self, name: str) -> Self:
        """The same settings with a path that does not depend on the working folder."""
        return self.model_copy(update={name: absolute_path(getattr(self, name))})


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
    etag: str | None = None
    """column with the etag that the store gives the image, to tell a change (etag, e_tag)"""

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
    trusted_network: bool = False
    """join a Ray that asks for no token: nobody but its users reaches its ports"""
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

    num_workers: Annotated[int | str, BeforeValidator(_worker_count)] = 1
    """data-parallel processes; MIN:MAX (quoted in YAML): as many as the cluster has room for"""
    use_gpu: bool = False
    """one GPU for each worker"""
    cpus_per_worker: PositiveFloat | None = None
    """CPUs reserved for each worker (as many as leave room for reading the data)"""
    threads_per_worker: PositiveInt | None = None
    """torch threads of each worker (the node's cores shared among its workers)"""

    @property
    def is_elastic(self) -> bool:
        """Whether the number of workers may change while they train."""
        return isinstance(self.num_workers, str)

    @property
    def min_workers(self) -> int:
        """The least number of workers that training goes on with."""
        return int(str(self.num_workers).partition(":")[0])

    @property
    def max_workers(self) -> int:
        """The greatest number of workers."""
        return int(str(self.num_workers).rpartition(":")[2])


class InferenceScalingSettings(Section):
    """Actors that decode and infer."""

    num_workers: PositiveInt | None = None
    """actors (one for each GPU with use_gpu, else one for each CPU)"""
    use_gpu: bool = False
    """one GPU for each actor"""
    cpus_per_worker: PositiveFloat = 1.0
    """CPUs reserved for each actor; also its torch threads"""


class EngineSettings(Section):
    """What computes the labels; other engines than eager are compared with it before they start."""

    name: Literal["auto", "eager", "compile", "onnxruntime", "openvino"] = "auto"
    """eager, compile (for GPUs), or on CPUs onnxruntime or openvino, which are extras (eager)"""
    precision: Literal["auto", "fp32", "bf16", "int8"] = "auto"
    """int8 is quantised on images of the run (fp32; on a GPU bf16 if the labels stay)"""
    min_agreement: Fraction = 0.99
    """fraction of a sample that must have the label of eager in fp32; below it the job ends"""
    sample: PositiveInt = 256
    """images to compare, at most (as many again to quantise)"""


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
    """tutorial_cnn, small_cnn, a torchvision classifier (resnet18) or timm/NAME (the timm extra)"""
    weights: str | None = None
    """safetensors file to start from, local or s3://; the head is replaced when it does not fit"""
    freeze: Literal["none", "backbone"] = "none"
    """backbone: train the head only"""
    frozen_epochs: Annotated[int, Field(ge=0)] = 0
    """first epochs in which the head alone is trained (0: none)"""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    """rate of dropout, for models that have it (the model's own)"""
    drop_path: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    """rate of stochastic depth in the last block, for models that have it (the model's own)"""

    @model_validator(mode="after")
    def _frozen_once(self) -> ModelSettings:
        if self.frozen_epochs > 0 and (self.weights is None or self.freeze == "backbone"):
            raise ValueError("frozen_epochs is for fine-tuning: it needs weights and freeze none")
        return self


class ImageSettings(Section):
    """How images are brought to the network's size; saved in the bundle."""

    size: Annotated[int, Field(ge=4, le=2048)] | None = None
    """pixels, height and width (the images' own where all are alike, else the model's or 224)"""
    resize: PositiveInt | None = None
    """pixels of the short side before the centre crop (size / 0.875; size where all are alike)"""
    interpolation: Literal["bilinear", "bicubic"] | None = None
    """resampling filter (that of the pretrained model, else bilinear)"""
    channels: Annotated[Literal[1, 3], BeforeValidator(_whole_number)] | None = None
    """1 grey, 3 colour (1 for a grey dataset and tutorial_cnn or small_cnn, else 3)"""
    progressive: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """size that training begins with, fraction of the whole, for models of any size (1: whole)"""


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
    policy: Literal["none", "randaugment", "trivialaugment", "augmix"] = "none"
    """automatic augmentation"""
    policy_magnitude: Annotated[int, Field(ge=0, le=30)] = 9
    """strength of randaugment and augmix, 0 to 30"""
    policy_ops: PositiveInt = 2
    """operations a sample, for randaugment"""
    erasing: Fraction = 0.0
    """probability that a random rectangle is blanked"""
    repeats: Annotated[int, Field(ge=1, le=16)] = 1
    """copies of each image in its batch, changed each in its own way: as many times the samples"""


class MixSettings(Section):
    """Mixing of training images with others of their batch, and of their labels; off by default."""

    mixup_alpha: Annotated[float, Field(ge=0.0, le=100.0)] = 0.0
    """MixUp, weighted means of two images: weights from Beta(alpha, alpha) (0: none)"""
    cutmix_alpha: Annotated[float, Field(ge=0.0, le=100.0)] = 0.0
    """CutMix, a rectangle of another image: areas from Beta(alpha, alpha) (0: none)"""
    probability: Fraction = 1.0
    """probability of a step to be mixed"""


class IngestSettings(Section):
    """How images reach the workers of training."""

    decoded_bytes: Annotated[int, Field(ge=0)] = 1024**3
    """decoded images kept in a node's memory instead of read every epoch, at most (0: none)"""


class OptimizerSettings(Section):
    """The optimizer."""

    name: Literal["adam", "adamw", "sgd", "lamb", "muon"] = "adam"
    """adam, adamw, sgd (with Nesterov momentum), lamb (timm extra) or muon (for transformers)"""
    lr: PositiveFloat = 0.001
    """peak learning rate, for the global batch (or for lr_reference_batch)"""
    lr_reference_batch: PositiveInt | None = None
    """samples that lr is meant for: it is scaled linearly to global_batch_size (not scaled)"""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """decay of weights (not of biases and normalisation layers)"""
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """momentum of sgd and muon"""
    clip_norm: PositiveFloat | None = None
    """largest norm of the gradient of all parameters together (not clipped)"""
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """for fine-tuning: the learning rate of each layer, fraction of the next one's"""


class ComputeSettings(Section):
    """How a training step is computed; every worker does it alike."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """of the forward pass; weights and losses are fp32 with any (bf16 on a GPU that has it)"""
    compile: bool = False
    """torch.compile: minutes at first, then faster on GPUs; needs a C++ compiler on each machine"""
    sync_batch_norm: bool = False
    """batch norm over the batches of all workers, which then wait for each other; on GPUs"""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """what workers hold: all of the training's state, or a shard of it, where it fits no GPU"""


class ScheduleSettings(Section):
    """The learning rate over time."""

    name: Literal["constant", "cosine", "step", "one_cycle"] = "constant"
    """constant, cosine, step (times gamma at milestones) or one_cycle (up for 30 % of the steps)"""
    warmup_epochs: Annotated[float, Field(ge=0.0)] = 0.0
    """epochs of linear warm-up"""
    min_fraction: Fraction = 0.0
    """last learning rate of cosine and one_cycle, fraction of the peak"""
    milestones: tuple[Fraction, ...] = (0.5, 0.75)
    """of step: fractions of the training"""
    gamma: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1
    """of step: factor at each milestone"""

    @model_validator(mode="after")
    def _one_rise(self) -> ScheduleSettings:
        if self.name == "one_cycle" and self.warmup_epochs > 0:
            raise ValueError("one_cycle has a warm-up of its own: leave warmup_epochs out")
        return self


class LossSettings(Section):
    """The loss."""

    name: Literal["cross_entropy", "mse", "focal", "bce"] = "cross_entropy"
    """cross_entropy, focal, bce (a yes or no for each class) or mse of the softmax outputs"""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """part of each training target that is spread over all classes"""
    focal_gamma: Annotated[float, Field(ge=0.0, le=10.0)] = 2.0
    """how much less easy samples count in focal (0: no less, the cross-entropy)"""


class ImbalanceSettings(Section):
    """What is done about classes of unequal size; counts are the training split's."""

    method: Literal[
        "none",
        "class_weights",
        "effective_number",
        "focal",
        "logit_adjustment",
        "balanced_sampler",
    ] = "none"
    """weights 1/n or by effective number, focal loss, logits moved by the prior, or resampling"""
    beta: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.999
    """of effective_number: 0 weighs all alike, towards 1 it becomes class_weights"""
    tau: Annotated[float, Field(ge=0.0)] = 1.0
    """of logit_adjustment: how much of the log prior is added"""


class DistillSettings(Section):
    """Learning from another model's outputs, too; off without a teacher."""

    teacher: str | None = None
    """bundle of the same classes, local or s3:// (none)"""
    alpha: Fraction = 0.5
    """part of the loss that is the teacher's; the rest is the labels'"""
    temperature: PositiveFloat = 2.0
    """softens the outputs of both, so that what a teacher finds unlikely counts more (1: not)"""


class EmaSettings(Section):
    """An exponential moving average of the weights; it is what is evaluated and saved."""

    decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """part that each step keeps: the average of about 1 / (1 - decay) steps (0: no average)"""


class EarlyStoppingSettings(Section):
    """When training ends before its last epoch."""

    patience: PositiveInt | None = None
    """epochs without a better validation loss (trains to the last epoch)"""
    min_delta: Annotated[float, Field(ge=0.0)] = 0.0
    """how much lower the loss must be to count as better"""


class CheckpointSettings(Section):
    """Checkpoints of training: one after each epoch, and inside epochs."""

    every_steps: Annotated[int, Field(ge=0)] = 0
    """optimizer steps from one inside epochs to the next (0: not by steps)"""
    every_minutes: Annotated[float, Field(ge=0.0)] = 10.0
    """minutes after which one is written inside an epoch, within 50 steps (0: not by time)"""
    keep: PositiveInt = 2
    """latest ones after epochs that are kept (the best one, and two inside epochs, besides)"""
    max_restarts: Annotated[int, Field(ge=0)] = 3
    """restarts from the last checkpoint after a worker died (another number of workers is none)"""


class TrackingSettings(Section):
    """Where the curves of training go besides the log; nowhere by default."""

    mlflow: str | None = Field(default=None, min_length=1, repr=False)
    """MLflow's tracking URI, such as http://HOST:5000; needs the mlflow extra (no MLflow)"""
    experiment: Annotated[str, Field(min_length=1, max_length=500)] = "cnnray"
    """experiment in MLflow that the run is put into; made when there is none"""
    tensorboard: str | None = Field(default=None, min_length=1)
    """local folder that gets a subfolder of events for each run (no TensorBoard)"""

    @field_validator("tensorboard")
    @classmethod
    def _local_folder(cls, folder: str | None) -> str | None:
        if folder is not None and "://" in folder:
            raise ValueError("events are written to a local folder")
        return folder

    @field_serializer("mlflow", when_used="json")
    def _without_credentials(self, uri: str | None) -> str | None:
        return None if uri is None else hide_credentials(uri)
