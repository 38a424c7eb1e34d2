"""FSDP: each rank holds a shard of the weights, of their gradients and of the optimizer's state.

Torch's ``fully_shard`` does it in place (Zhao et al. 2023, arXiv:2304.11277): the parameters become
``DTensor``, which know their whole shape, under the names that they had. What a checkpoint holds is
whole again, so that any number of ranks goes on from it, sharded or not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from cnnray.training.layers import numbered_layers


def shard(model: nn.Module, *, device: torch.device, num_workers: int) -> nn.Module:
    """``model`` itself, on the device, each of its parameters cut among all ranks.

    A numbered layer is whole only while it computes; the stem and the head for a whole step.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)  # the mesh takes the current one
    mesh = init_device_mesh(device.type, (num_workers,))
    model.to(memory_format=torch.contiguous_format)  # FSDP takes no other
    for layer in numbered_layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def is_sharded(model: nn.Module) -> bool:
    """Whether this rank holds a shard of it alone."""
    return isinstance(model, FSDPModule)


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """All weights on every rank for a while, so that none waits for others in its forward passes.

    Not for training. All ranks enter it together.
    """
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in shards:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    yield
    for module in shards:
        module.set_reshard_after_forward(module is not model, recurse=False)
        module.reshard()


def whole(state: Any) -> Any:
    """The same at any depth, its shards put together; all ranks call it, in the same order."""
    if isinstance(state, DTensor):
        return state.full_tensor().cpu()
    if isinstance(state, Mapping):
        return {name: whole(value) for name, value in state.items()}
    if isinstance(state, list):
        return [whole(value) for value in state]
    return state


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def laid_out_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor in the memory format of a parameter; of a shard, this rank's part of it."""
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        return distribute_tensor(tensor, mesh, placements, src_data_rank=None)
    return torch.empty_like(parameter).copy_(tensor)
