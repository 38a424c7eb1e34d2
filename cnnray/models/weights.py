"""Initialise a model from a safetensors file; never from a pickle."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from cnnray import storage
from cnnray.errors import ModelError
from cnnray.models.registry import head_name, stem_name

AUXILIARY_HEADS = ("AuxLogits.", "aux1.", "aux2.")
"""Training-time heads in published Inception and GoogLeNet files, which cnnray does not build."""

NAMES_SHOWN = 3
"""Tensor names that a message lists before it gives the count."""


def load_weights(model: nn.Module, uri: str, *, num_classes: int) -> list[str]:
    """Copy the tensors of a safetensors file into ``model``; return the names of a head left new.

    The file (local or ``s3://``) names tensors as torchvision or timm do, or is a cnnray bundle's
    ``model.safetensors``, whose normalisation is dropped. Names and shapes must match, but for the
    head: its tensors are copied when all fit, and otherwise set to zero and returned. A head of
    zeros finds all classes equally likely, and its first gradients leave the backbone alone
    (Kolesnikov et al. 2020); some models draw heads of few classes so wide that fine-tuning begins
    at twice that loss. ``num_batches_tracked`` may be missing. When the model takes 1 channel and
    the file's stem 3, the stem is summed over its input channels: the model then does to a grey
    image what the file's does to R = G = B. Raises ``ModelError`` and leaves the model as it was.
    """
    store, key = storage.split_uri(uri)
    expected = model.state_dict()
    tensors = _of_backbone(read_tensors(store.read(key), source=uri), expected)
    prefix = f"{head_name(model, num_classes)}."
    body, head = _partition(tensors, prefix)
    expected_body, expected_head = _partition(expected, prefix)
    body = _grey_stem(body, expected_body, stem_name(model))
    check_tensors(body, expected_body, source=uri)
    keeps_head = all(_fits(head, expected_head, name) for name in expected_head)
    new_head = head if keeps_head else {n: torch.zeros_like(t) for n, t in expected_head.items()}
    loaded = body | {name: new_head[name] for name in expected_head}
    check_finite(loaded, source=uri)
    model.load_state_dict(loaded, strict=False)
    return [] if keeps_head else sorted(expected_head)


def freeze_backbone(model: nn.Module, head: str) -> None:
    """Stop gradients for every parameter outside of the module named ``head``."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(f"{head}."))


def read_tensors(data: bytes, *, source: str) -> dict[str, Tensor]:
    """Parse safetensors bytes; ``ModelError`` when they are anything else."""
    try:
        return safetensors.torch.load(data)
    except (SafetensorError, KeyError, ValueError, RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{source} is not a safetensors file: {reason}",
            hint="convert it with safetensors.torch.save_file; pickles are never read",
        ) from error


def check_tensors(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, source: str
) -> None:
    """Raise ``ModelError`` unless names, shapes and kinds of number match the model's."""
    missing = [n for n in expected if n not in tensors and not n.endswith("num_batches_tracked")]
    unexpected = [name for name in tensors if name not in expected]
    if missing or unexpected:
        found = [
            f"{len(names)} {kind} tensors ({_some(names)})"
            for kind, names in (("missing", missing), ("unexpected", unexpected))
            if names
        ]
        raise ModelError(
            f"{source} does not fit the model: {', '.join(found)}",
            hint="the weights are of another architecture or another version of it",
        )
    for name, tensor in tensors.items():
        if not _fits(tensors, expected, name):
            want = expected[name]
            raise ModelError(
                f"{source} does not fit the model: {name} is {_describe(tensor)}, "
                f"the model's is {_describe(want)}",
                hint="build the model with the channels and image size of the weights",
            )


def check_finite(tensors: Mapping[str, Tensor], *, source: str) -> None:
    """Raise ``ModelError`` when a weight is NaN or infinite."""
    bad = [n for n, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]
    if bad:
        raise ModelError(f"{source}: {len(bad)} tensors hold NaN or infinity ({_some(bad)})")


def _of_backbone(tensors: dict[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors named as in the backbone, from a bundle's file or a published one."""
    if all(name.startswith(("backbone.", "normalize.")) for name in tensors):
        tensors = {
            name.removeprefix("backbone."): tensor
            for name, tensor in tensors.items()
            if name.startswith("backbone.")
        }
    return {
        name: tensor
        for name, tensor in tensors.items()
        if name in expected or not name.startswith(AUXILIARY_HEADS)
    }


def _partition(
    tensors: Mapping[str, Tensor], prefix: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors outside of, and below, the module named ``prefix``."""
    inside = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return {name: tensor for name, tensor in tensors.items() if name not in inside}, inside


def _grey_stem(
    tensors: dict[str, Tensor], expected: Mapping[str, Tensor], stem: str | None
) -> dict[str, Tensor]:
    name = f"{stem}.weight"
    if name not in tensors or name not in expected:
        return tensors
    weight, target = tensors[name], expected[name]
    if weight.ndim != 4 or weight.shape[1] != 3 or target.shape[1] != 1:
        return tensors
    return tensors | {name: weight.float().sum(1, keepdim=True)}


def _fits(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], name: str) -> bool:
    if name not in tensors:
        return False
    tensor, want = tensors[name], expected[name]
    same_kind = tensor.is_floating_point() == want.is_floating_point()
    return tensor.shape == want.shape and same_kind and not tensor.is_complex()


def _some(names: Collection[str]) -> str:
    shown = ", ".join(repr(name[:80]) for name in sorted(names)[:NAMES_SHOWN])
    return shown if len(names) <= NAMES_SHOWN else f"{shown}, ..."


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
