"""Options that are flags of the jobs and arguments of the layers below them: declared once, here.

The text under a field is its help on the command line; ranges are checked whoever builds it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveInt = Annotated[int, Field(gt=0, le=2**53)]
"""As a float exactly, too: sums and products of such must not overflow."""
PositiveFloat = Annotated[float, Field(gt=0.0, le=1e30)]
"""Within float32, which is what tensors hold."""
NonNegativeInt = Annotated[int, Field(ge=0, le=2**53)]
NonNegativeFloat = Annotated[float, Field(ge=0.0, le=1e30)]
Seconds = Annotated[float, Field(gt=0.0, le=1e8)]
"""Up to three years: clocks and timers overflow not far beyond."""
Cores = Annotated[float, Field(ge=0.01, le=4096.0)]
"""CPUs of one process, or a part of one."""
Threads = Annotated[int, Field(gt=0, le=4096)]


class Options(BaseModel):
    """Named values, checked when built. Wrong ones raise ``pydantic.ValidationError``."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class DecodeLimits(Options):
    """What one image may cost, checked from its header before it is decoded."""

    max_pixels: PositiveInt = 50_000_000
    """pixels, width times height"""
    max_bytes: PositiveInt = 32 * 1024 * 1024
    """bytes, encoded"""


DEFAULT_LIMITS = DecodeLimits()


class Augmentation(Options):
    """Random changes of training images, in this order; everything is off by default."""

    # Pixels that are uncovered or erased get the mean color, which normalization makes zero.

    crop: Literal["center", "random_resized", "random_pad"] = "center"
    """random_resized: a part of random area and shape; random_pad: shift by up to pad pixels"""
    scale_min: Annotated[float, Field(gt=0.0, le=1.0)] = 0.35
    """smallest area of random_resized, fraction of the image"""
    ratio_max: Annotated[float, Field(ge=1.0, le=100.0)] = 4 / 3
    """widest aspect of random_resized (and its inverse)"""
    pad: Annotated[int, Field(ge=0, le=1024)] = 4
    """pixels mirrored around the image, for random_pad; fewer than its size"""
    flip: Fraction = 0.0
    """probability of a left-right flip"""
    vertical_flip: Fraction = 0.0
    """probability of an up-down flip"""
    rotation: Annotated[float, Field(ge=0.0, le=180.0)] = 0.0
    """largest rotation either way, degrees"""
    # arXiv:1909.13719, arXiv:2103.10158 (wide), and arXiv:1912.02781 without its consistency loss:
    # mixed with three chains of operations.
    policy: Literal["none", "randaugment", "trivialaugment", "augmix"] = "none"
    """automatic augmentation"""
    policy_magnitude: Annotated[int, Field(ge=0, le=30)] = 9
    """strength of randaugment and augmix (a third of it is the severity), 0 to 30"""
    policy_ops: Annotated[int, Field(ge=1, le=16)] = 2
    """operations a sample, for randaugment"""
    # A factor of up to 1 plus or minus the strength; hue moves by a quarter of it, in turns.
    color_jitter: Fraction = 0.0
    """strength of random brightness, contrast, saturation and hue (grey images: the first two)"""
    # arXiv:1708.04896
    erasing: Fraction = 0.0
    """probability that a random rectangle is blanked"""
