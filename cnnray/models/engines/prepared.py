"""From a choice to an engine: what is done once for all workers, and what each of them does."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cnnray.models.bundle import Bundle
from cnnray.models.engines.base import EagerEngine, Engine
from cnnray.models.engines.choice import EngineChoice
from cnnray.models.engines.compiled import CompiledEngine
from cnnray.models.engines.onnx_export import export_onnx
from cnnray.models.engines.onnx_runtime import OnnxRuntimeEngine
from cnnray.models.engines.open_vino import OpenVinoEngine
from cnnray.models.engines.quantization import quantize


@dataclass(frozen=True, slots=True)
class PreparedEngine:
    """What workers open their engines from, beside the bundle: the ONNX model, if it takes one."""

    choice: EngineChoice = EngineChoice()
    onnx: bytes = b""


def prepare_engine(
    choice: EngineChoice, bundle: Bundle, *, embeddings: bool, calibration: Tensor
) -> PreparedEngine:
    """Export the model, and quantise it for int8, with ranges from (N, C, S, S) uint8 images.

    Without any image, int8 becomes fp32. Raises ``ModelError`` for what cannot be exported.
    """
    if choice.precision == "int8" and not len(calibration):
        choice = choice.in_fp32
    if not choice.takes_onnx:
        return PreparedEngine(choice)
    content = export_onnx(bundle, embeddings=embeddings)
    if choice.precision == "int8":
        content = quantize(content, calibration)
    return PreparedEngine(choice, content)


def open_engine(
    prepared: PreparedEngine,
    bundle: Bundle,
    *,
    device: torch.device,
    embeddings: bool,
    batch_size: int,
) -> Engine:
    """An engine of this process, on as many threads as torch has here."""
    name, precision = prepared.choice.name, prepared.choice.precision
    threads = torch.get_num_threads()
    if name == "onnxruntime":
        return OnnxRuntimeEngine(prepared.onnx, threads=threads, embeddings=embeddings)
    if name == "openvino":
        return OpenVinoEngine(
            prepared.onnx, precision=precision, threads=threads, embeddings=embeddings
        )
    if name == "compile":
        return CompiledEngine(
            bundle.model,
            device=device,
            embeddings=embeddings,
            precision=precision,
            batch_size=batch_size,
        )
    return EagerEngine(bundle.model, device=device, embeddings=embeddings, precision=precision)
