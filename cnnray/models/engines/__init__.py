"""Engines: what computes a model's logits. All take uint8 pixels; normalisation is the model's.

``choose_engine`` settles which one a job asks for; ``prepare_engine`` does once what all workers
share, the export to ONNX and the quantisation; each worker opens its own with ``open_engine``.
"""

from cnnray.models.engines.base import EagerEngine, Engine
from cnnray.models.engines.choice import EngineChoice, choose_engine
from cnnray.models.engines.prepared import PreparedEngine, open_engine, prepare_engine

__all__ = [
    "EagerEngine",
    "Engine",
    "EngineChoice",
    "PreparedEngine",
    "choose_engine",
    "open_engine",
    "prepare_engine",
]
