"""The settings of every job.

Flags beat the YAML file, the file beats the defaults; the environment is not read.
"""

from cnnray.config.jobs import (
    BenchSettings,
    ClassifySettings,
    DemoSettings,
    EvaluateSettings,
    InferenceSettings,
    JobSettings,
    LabelingSettings,
    PackSettings,
    TrainSettings,
    TuneSettings,
    VerifySettings,
)
from cnnray.config.loading import Settings, build_settings, check_names, load_settings
from cnnray.config.sections import (
    BudgetSettings,
    ClusterSettings,
    ColumnSettings,
    InferenceScalingSettings,
    ScalingSettings,
    SplitSettings,
    absolute_path,
)
from cnnray.config.training import (
    AugmentSettings,
    CheckpointSettings,
    ComputeSettings,
    ImageSettings,
    ImbalanceSettings,
    LossSettings,
    ModelSettings,
    OptimizerSettings,
    ScheduleSettings,
    TrackingSettings,
)

__all__ = [
    "AugmentSettings",
    "BenchSettings",
    "BudgetSettings",
    "CheckpointSettings",
    "ClassifySettings",
    "ClusterSettings",
    "ColumnSettings",
    "ComputeSettings",
    "DemoSettings",
    "EvaluateSettings",
    "ImageSettings",
    "ImbalanceSettings",
    "InferenceScalingSettings",
    "InferenceSettings",
    "JobSettings",
    "LabelingSettings",
    "LossSettings",
    "ModelSettings",
    "OptimizerSettings",
    "PackSettings",
    "ScalingSettings",
    "ScheduleSettings",
    "Settings",
    "SplitSettings",
    "TrackingSettings",
    "TrainSettings",
    "TuneSettings",
    "VerifySettings",
    "absolute_path",
    "build_settings",
    "check_names",
    "load_settings",
]
