"""Groups of settings of the train and tune jobs, as in ``sections``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_serializer, field_validator, model_validator

from cnnray.config.sections import Section
from cnnray.errors import hide_credentials
from cnnray.options import (
    Augmentation,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)


def _whole_number(value: Any) -> Any:
    """A flag's text as the number that a Literal wants."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


class ModelSettings(Section):
    """The network."""

    name: str = "tutorial_cnn"
    """tutorial_cnn, small_cnn, a torchvision classifier (resnet18) or timm/NAME (the timm extra)"""
    weights: str | None = None
    """safetensors file to start from, local or s3://; the head is replaced when it does not fit"""
    freeze: Literal["none", "backbone"] = "none"
    """backbone: train the head only"""
    frozen_epochs: NonNegativeInt = 0
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


class AugmentSettings(Augmentation):
    """Random changes of training images; everything is off by default."""

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

    decoded_bytes: NonNegativeInt = 1024**3
    """decoded images kept in a node's memory instead of read every epoch, at most (0: none)"""


class OptimizerSettings(Section):
    """The optimizer."""

    name: Literal["adam", "adamw", "sgd", "lamb", "muon"] = "adam"
    """adam, adamw, sgd (with Nesterov momentum), lamb (timm extra) or muon (for transformers)"""
    lr: PositiveFloat = 0.001
    """peak learning rate, for the global batch (or for lr_reference_batch)"""
    lr_reference_batch: PositiveInt | None = None
    """samples that lr is meant for: it is scaled linearly to global_batch_size (not scaled)"""
    weight_decay: NonNegativeFloat = 0.0
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
    warmup_epochs: NonNegativeFloat = 0.0
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
    tau: NonNegativeFloat = 1.0
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
    min_delta: NonNegativeFloat = 0.0
    """how much lower the loss must be to count as better"""


class CheckpointSettings(Section):
    """Checkpoints of training: one after each epoch, and inside epochs."""

    every_steps: NonNegativeInt = 0
    """optimizer steps from one inside epochs to the next (0: not by steps)"""
    every_minutes: NonNegativeFloat = 10.0
    """minutes after which one is written inside an epoch, within 50 steps (0: not by time)"""
    keep: PositiveInt = 2
    """latest ones after epochs that are kept (the best one, and two inside epochs, besides)"""
    max_restarts: NonNegativeInt = 3
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
