"""int8 by post-training static quantisation: another model, whose labels are close to the first's.

ONNX Runtime's tools for both engines, since OpenVINO's own (nncf) bring scikit-learn, pandas and
more. Weights are symmetric, a scale a channel; activations take their ranges from a few images.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cnnray.models.engines.onnx_export import INPUT

BATCH = 16


def quantize(content: bytes, images: Tensor) -> bytes:
    """The ONNX model in int8, with ranges from (N, C, S, S) uint8 images, N > 0."""
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.quant_utils import add_pre_process_metadata

    model = onnx.load_model_from_string(content)
    add_pre_process_metadata(model)  # the exporter has done it: folded constants, known shapes
    with tempfile.TemporaryDirectory(prefix="cnnray-") as folder:
        path = Path(folder) / "int8.onnx"
        quantize_static(
            model,
            path,
            _Calibration(images),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            # Seven bits of a weight: CPUs without VNNI add two products in 16 bits, which eight
            # overflow, and labels would depend on which CPU a worker has.
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return path.read_bytes()


class _Calibration:
    """Batches as ONNX Runtime's ``CalibrationDataReader`` hands them out."""

    def __init__(self, images: Tensor) -> None:
        self.batches: Iterator[Tensor] = iter(torch.split(images, BATCH))

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self.batches, None)
        return None if batch is None else {INPUT: batch.contiguous().numpy()}
