"""A model as ONNX: the same numbers for engines that are not PyTorch.

``torch.export`` rather than the TorchScript exporter, which is deprecated: constants are folded on
the way, so that batch norms and the padding arithmetic of EfficientNets are gone from the graph.
"""

from __future__ import annotations

import copy

import torch

from cnnray.errors import ModelError
from cnnray.models.bundle import Bundle
from cnnray.models.engines.base import Network

INPUT = "images"
OUTPUTS = ("logits", "features")


def export_onnx(bundle: Bundle, *, embeddings: bool) -> bytes:
    """An ONNX model: ``images`` uint8 (B, C, S, S) -> ``logits`` (B, K), ``features`` (B, D).

    B is free, normalisation is inside; ``features`` are there with ``embeddings``. Raises
    ``ModelError`` for a model that cannot be exported.
    """
    preprocessing = bundle.spec.preprocessing
    size = preprocessing.size
    images = torch.zeros((2, preprocessing.channels, size, size), dtype=torch.uint8)
    # A model in channels-last order, as eager has it, is exported with strides in the graph, which
    # OpenVINO gets wrong in int8 (EfficientNet-Lite0: 70 of 100 labels).
    model = copy.deepcopy(bundle.model).to(memory_format=torch.contiguous_format)
    try:
        program = torch.onnx.export(
            Network(model, embeddings=embeddings).eval(),
            (images,),
            dynamo=True,
            input_names=[INPUT],
            output_names=OUTPUTS[: 1 + embeddings],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
        assert program is not None
        content: bytes = program.model_proto.SerializeToString()
    except Exception as error:  # layers and the exporter raise whatever they like
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(
            f"{bundle.spec.architecture} cannot be exported to ONNX: {reason[:200]}",
            hint="--engine.name eager",
        ) from error
    return content
