"""Optimizers, and how their state is restored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn, optim

from cnnray.errors import SettingsError
from cnnray.training.layers import layer_scales
from cnnray.training.sharding import is_sharded, laid_out_like

Group = dict[str, Any]
"""Parameters and how they are moved, as torch's optimizers know them."""


def build_optimizer(
    model: nn.Module,
    *,
    name: str,
    lr: float,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    layer_decay: float = 1.0,
) -> optim.Optimizer:
    """Adam, AdamW, SGD with Nesterov momentum (all fused), timm's LAMB (You et al. 2020) or Muon.

    They move the parameters that are trained. Biases and normalisation parameters (all that have
    one dimension) are not decayed, as in Goyal et al. 2017 and He et al. 2019. Each group's
    ``lr_scale`` is its part of the learning rate, ``layer_decay`` to the power of the layers up to
    the last (``layers.layer_scales``). Raises ``SettingsError`` for LAMB without timm, and for Muon
    where there is no hidden matrix to train.
    """
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    scales = layer_scales(model, decay=layer_decay)
    if name == "muon":
        hidden = {key: trained.pop(key) for key in hidden_matrices(model) if key in trained}
        if not hidden:
            raise SettingsError(
                "--optimizer.name muon: this model has no hidden linear layer to train",
                hint="muon is for transformers such as vit_b_16; choose sgd or adamw",
            )
        matrices = _groups(hidden, scales, weight_decay=weight_decay)
        rest = _groups(trained, scales, weight_decay=weight_decay)
        return MuonAndAdamW(matrices, rest, lr=lr, momentum=momentum)
    groups = _groups(trained, scales, weight_decay=weight_decay)
    if name == "adam":
        return optim.Adam(groups, lr=lr, fused=True)
    if name == "adamw":
        return optim.AdamW(groups, lr=lr, fused=True)
    if name == "sgd":
        fused = not is_sharded(model)  # torch 2.14 has no fused SGD for shards
        sgd = optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0, fused=fused)
        return _with_momentum(sgd) if momentum > 0 else sgd
    if name == "lamb":
        return _lamb()(groups, lr=lr, max_grad_norm=None)  # clipping is a setting of its own
    raise ValueError(f"unknown optimizer {name}")


def _groups(
    parameters: Mapping[str, nn.Parameter], scales: Mapping[str, float], *, weight_decay: float
) -> list[Group]:
    """Parameters that are decayed alike and learn at the same part of the rate, together."""
    members: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for key, parameter in parameters.items():
        members.setdefault((parameter.ndim <= 1, scales[key]), []).append(parameter)
    return [
        {"params": params, "weight_decay": 0.0 if is_flat else weight_decay, "lr_scale": scale}
        for (is_flat, scale), params in sorted(members.items(), key=lambda item: item[0])
    ]


def hidden_matrices(model: nn.Module) -> list[str]:
    """Names of the weights of linear layers and of attention, but for the last: that is the head.

    Not of tables, from which rows are taken: embeddings, biases by relative position.
    """
    names = [
        name
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.MultiheadAttention)
        for name, parameter in module.named_parameters(prefix=path, recurse=False)
        if parameter.ndim == 2
    ]
    return names[:-1]


class MuonAndAdamW(optim.Optimizer):
    """torch's Muon for hidden matrices and AdamW for the rest, as one optimizer.

    Muon moves a matrix by the nearest orthogonal one to its gradient's momentum, so that all its
    directions learn (Jordan et al. 2024, kellerjordan.github.io/posts/muon). Its steps are scaled
    to the size of AdamW's, so one learning rate and one decay serve both (Liu et al. 2025,
    arXiv:2502.16982). Convolutions go to AdamW: torch's Muon takes matrices alone.
    """

    def __init__(
        self, matrices: list[Group], rest: list[Group], *, lr: float, momentum: float
    ) -> None:
        self.muon: optim.Optimizer = optim.Muon(
            matrices, lr=lr, momentum=momentum, adjust_lr_fn="match_rms_adamw"
        )
        self.adamw: optim.Optimizer = optim.AdamW(rest, lr=lr, fused=True)
        super().__init__([*matrices, *rest], defaults={})  # groups have them by now
        self.defaults = self.adamw.defaults  # Muon's groups have none of torch's switches
        self._share()

    def _share(self) -> None:
        """Have both work on this optimizer's groups and state."""
        count = len(self.muon.param_groups)
        self.muon.param_groups = self.param_groups[:count]
        self.adamw.param_groups = self.param_groups[count:]
        self.muon.state = self.adamw.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()  # groups and state are new objects

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.muon.step()
        self.adamw.step()


def _with_momentum(sgd: optim.SGD) -> optim.SGD:
    """With buffers of 0, from which the first step is the one that it is without any.

    By itself the fused SGD of torch 2.14 makes them in a step of all parameters of a group: a
    ``GradScaler`` that skips that step leaves in them what was in memory, and one for parameters
    that were frozen until then fails.
    """
    for group in sgd.param_groups:
        for parameter in group["params"]:
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


def _lamb() -> Callable[..., optim.Optimizer]:
    try:
        from timm.optim import Lamb
    except ImportError as error:
        raise SettingsError(
            "--optimizer.name lamb needs timm, which is not installed",
            hint="pip install 'cnnray[timm]'",
        ) from error
    return cast(Callable[..., optim.Optimizer], Lamb)


def restore_optimizer(optimizer: optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a ``state_dict`` of whole tensors, each in the memory format of its parameter.

    The fused optimizers of torch 2.14 go through memory as it lies: a channels-last weight and a
    contiguous moment of it would be paired wrongly, and nothing would say so.
    """
    optimizer.load_state_dict(state)
    for group in optimizer.param_groups:
        if "fused" in optimizer.defaults:  # the saved one may have had shards, or none
            group["fused"] = optimizer.defaults["fused"]
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                moments[name] = laid_out_like(value, parameter)
