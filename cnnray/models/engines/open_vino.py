"""OpenVINO on CPUs."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}
"""What is not int8 in the model is computed in this; OpenVINO's default is bf16 where a CPU can."""


class OpenVinoEngine:
    """An exported model on a number of threads."""

    def __init__(self, content: bytes, *, precision: str, threads: int, embeddings: bool) -> None:
        # Imported with it, OpenVINO reports its use to Intel; without it, it has a stub of its own.
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
        import openvino

        core = openvino.Core()
        compiled = core.compile_model(
            core.read_model(content),
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": HINTS[precision],
                "INFERENCE_NUM_THREADS": threads,
                "NUM_STREAMS": 1,
                "ENABLE_CPU_PINNING": False,  # each worker would pin its threads to the first cores
            },
        )
        self.request = compiled.create_infer_request()
        self.embeddings = embeddings

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        outputs = self.request.infer([images.contiguous().numpy()], share_inputs=True)
        logits, *features = (torch.from_numpy(outputs[n]) for n in range(len(outputs)))
        return logits, features[0] if features else None
