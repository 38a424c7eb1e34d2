"""Layer-wise learning rates for fine-tuning: the further from the head, the smaller."""

from __future__ import annotations

from torch import nn


def layer_scales(model: nn.Module, *, decay: float) -> dict[str, float]:
    """By name of each parameter, ``decay`` to the number of layers between its own and the last.

    A layer is what shares its name up to the first part that ends in a digit: a block of a
    transformer, a stage of a convolutional network. A layer of normalisation alone belongs to the
    one before it. Layers are in the order of registration, which the head ends. Source: Bao et al.
    2022 (BEiT, arXiv:2106.08254), appendix.
    """
    depth, seen = -1, None
    depths: dict[str, int] = {}
    parameters = dict(model.named_parameters())
    with_weights = {_layer_of(name) for name, p in parameters.items() if p.ndim > 1}
    for name in parameters:
        layer = _layer_of(name)
        if layer != seen and (layer in with_weights or depth < 0):
            depth, seen = depth + 1, layer
        depths[name] = depth
    return {name: decay ** (depth - own) for name, own in depths.items()}


def _layer_of(name: str) -> str:
    """backbone.blocks.3.norm.weight → backbone.blocks.3; backbone.fc.weight → backbone.fc."""
    modules = name.split(".")[:-1]
    numbered = (n for n, module in enumerate(modules, 1) if module[-1].isdigit())
    return ".".join(modules[: next(numbered, len(modules))])
