"""How a step is computed: in which precision, compiled or not, alike on all ranks."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from cnnray.errors import SettingsError
from cnnray.training.finite import Ranks

SMALLEST_SCALE = 2.0**-14
"""Of gradients, from 2**16 down: 31 updates skipped in a row go below. Also float16's tiniest."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """In what the forward pass is computed; weights, losses and their gradients are float32.

    ``scaler`` multiplies the loss so that float16 does not round small gradients to 0, and skips
    the updates that this makes infinite (Micikevicius et al. 2018, arXiv:1710.03740). A disabled
    one does nothing.
    """

    device_type: str = "cpu"
    dtype: torch.dtype = torch.float32
    scaler: GradScaler = field(default_factory=lambda: GradScaler("cpu", enabled=False))

    def forward(self, model: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
        """(B, K) float32 logits of (B, C, H, W) images."""
        if self.dtype is torch.float32:
            return model(image).float()
        with torch.autocast(self.device_type, self.dtype):
            return model(image).float()

    @property
    def is_hopeless(self) -> bool:
        """Whether gradients overflow however small their scale, so that no update is made."""
        return self.scaler.get_scale() < SMALLEST_SCALE


def choose_precision(name: str, device: torch.device) -> Precision:
    """The precision that a setting means: ``auto`` is bf16 on a GPU that has it, else fp32."""
    if name == "auto":
        # Older GPUs emulate it, which is slower than float32.
        is_fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        name = "bf16" if is_fast else "fp32"
    scaler = GradScaler(device.type, enabled=name == "fp16")
    return Precision(device.type, DTYPES[name], scaler)


def require_computable(
    *,
    precision: str,
    compile: bool,
    sync_batch_norm: bool,
    strategy: str,
    num_workers: int,
    use_gpu: bool,
    accumulate_steps: int,
    has_average: bool,
    optimizer: str,
) -> None:
    """Raise ``SettingsError`` for what does not go together, before anything is started."""
    if precision == "fp16" and not use_gpu:
        raise SettingsError(
            "--compute.precision fp16 is for GPUs",
            hint="on CPUs --compute.precision bf16, or leave it out",
        )
    syncs, shards = (num_workers > 1 and on for on in (sync_batch_norm, strategy == "fsdp"))
    if syncs and not use_gpu:  # torch 2.14 raises ValueError in the first step
        raise SettingsError(
            "torch has --compute.sync_batch_norm on GPUs only",
            hint="leave it out, or --scaling.use_gpu",
        )
    pairs = {
        # A rank with a small part of a batch takes fewer passes, and others would wait in theirs.
        ("--compute.sync_batch_norm", "--accumulate_steps"): syncs and accumulate_steps > 1,
        ("--compute.strategy fsdp", "--accumulate_steps"): shards and accumulate_steps > 1,
        # Its hooks would be compiled, its shards averaged, overflows seen by one rank alone.
        ("--compute.strategy fsdp", "--compute.compile"): shards and compile,
        ("--compute.strategy fsdp", "--ema.decay"): shards and has_average,
        ("--compute.strategy fsdp", "--compute.precision fp16"): shards and precision == "fp16",
        ("--compute.strategy fsdp", "--optimizer.name muon"): shards and optimizer == "muon",
    }
    for (one, other), are_both in pairs.items():
        if are_both:
            raise SettingsError(f"{one} does not go with {other}", hint="leave one of them out")


def synchronize_batch_norms(model: nn.Module) -> nn.Module:
    """``model``, its batch norms replaced by ones over all ranks (Peng et al. 2018).

    The names of its state stay.
    """
    convert: Callable[[nn.Module], nn.Module] = nn.SyncBatchNorm.convert_sync_batchnorm
    if any(type(module).__module__.startswith("timm.") for module in model.modules()):
        from timm.layers import convert_sync_batchnorm

        convert = convert_sync_batchnorm  # torch's would drop the activations inside of norms
    return convert(model)


def compile_in_place(model: nn.Module) -> None:
    """Have ``model`` compiled at its first batches; it stays the same module, its names as well.

    Copies of it, such as its average, are not compiled. Raises ``SettingsError`` where there is no
    C++ compiler, which torch would say in a hundred lines and after the first batch.
    """
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        raise SettingsError(
            f"--compute.compile needs a C++ compiler: there is no {compiler} on"
            f" {socket.gethostname()}",
            hint="install one there, or leave out --compute.compile",
        )
    model.compile()


def share_buffers(model: nn.Module, ranks: Ranks) -> None:
    """Give all ranks the buffers of rank 0, whose batch-norm statistics are those that are saved.

    DDP does so before each step, so that after the last one each rank has its own.
    """
    if ranks.num_workers == 1:
        return
    with torch.no_grad():
        for buffer in model.buffers():
            part = buffer.clone() if ranks.rank == 0 else torch.zeros_like(buffer)
            buffer.copy_(ranks.reduce(part))
