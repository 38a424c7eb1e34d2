"""Layer-wise learning rates for fine-tuning: the further from the head, the smaller."""

from __future__ import annotations

from collections.abc import Iterator

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


def numbered_layers(model: nn.Module) -> Iterator[nn.Module]:
    """The layers whose names end in a digit and that are called as a module, without their parts.

    In other words what a network repeats: the blocks of a transformer, the stages of a ResNet.
    """
    for name in dict.fromkeys(_layer_of(name) for name, _ in model.named_parameters()):
        layer = model.get_submodule(name)
        if name[-1:].isdigit() and type(layer).forward is not nn.Module.forward:
            yield layer


def _layer_of(name: str) -> str:
    """backbone.blocks.3.norm.weight → backbone.blocks.3; backbone.fc.weight → backbone.fc."""
    modules = name.split(".")[:-1]
    numbered = (n for n, module in enumerate(modules, 1) if module[-1].isdigit())
    return ".".join(modules[: next(numbered, len(modules))])
