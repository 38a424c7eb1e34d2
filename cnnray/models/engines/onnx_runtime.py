"""ONNX Runtime on CPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from cnnray.models.engines.onnx_export import INPUT


class OnnxRuntimeEngine:
    """An exported model on a number of threads."""

    def __init__(self, content: bytes, *, threads: int, embeddings: bool) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Threads that wait actively take the cores of other workers.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(
            content, options, providers=["CPUExecutionProvider"]
        )
        self.embeddings = embeddings

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        outputs = self.session.run(None, {INPUT: images.contiguous().numpy()})
        logits, *features = map(torch.from_numpy, outputs)
        return logits, features[0] if features else None
