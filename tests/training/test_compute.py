"""How a step is computed: precisions, the scaler of float16, compilation, batch norm over ranks."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler

from cnnray.datasets.order import Batch
from cnnray.errors import NonFiniteLossError, SettingsError
from cnnray.models.classifier import Classifier
from cnnray.models.registry import build_model
from cnnray.storage import open_store
from cnnray.training.averaging import build_average
from cnnray.training.checkpoints import Checkpoint, load_latest, model_tensors, save_checkpoint
from cnnray.training.compute import (
    Precision,
    choose_precision,
    compile_in_place,
    require_computable,
    synchronize_batch_norms,
)
from cnnray.training.loop import FINITE_CHECK_STEPS, EpochData, EpochResult, Trainer, run_epochs
from cnnray.training.optimizers import restore_optimizer

MakeTrainer = Callable[..., Trainer]
MakeBatch = Callable[..., Batch]

CPU = torch.device("cpu")


def float16(*, scale: float = 2.0**16) -> Precision:
    """As on a GPU, on the CPU, which can do it slowly."""
    return Precision("cpu", torch.float16, GradScaler("cpu", init_scale=scale))


def run(
    trainer: Trainer, make_batch: MakeBatch, *, first: int = 0, epochs: int
) -> list[EpochResult]:
    def data(epoch: int) -> EpochData:
        batches = [make_batch(16, seed=1000 * epoch + step) for step in range(4)]
        return EpochData(batches, np.full(4, 16), [make_batch(32, seed=99)])

    return list(run_epochs(trainer, first_epoch=first, epochs=epochs, data=data, seed=5))


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


# Precisions


@pytest.mark.parametrize("precision", [Precision(dtype=torch.bfloat16), float16()])
def test_layers_compute_in_the_precision_and_all_else_stays_float32(
    make_trainer: MakeTrainer, make_batch: MakeBatch, precision: Precision
) -> None:
    trainer = make_trainer(lr=0.03)
    trainer.precision = precision
    plain = trainer.loss
    hidden: set[torch.dtype] = set()
    logits: set[torch.dtype] = set()
    trainer.model.hidden.register_forward_hook(lambda *args: hidden.add(args[2].dtype))

    def loss(given: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        logits.add(given.dtype)
        return plain(given, label)

    trainer.loss = loss
    results = run(trainer, make_batch, epochs=6)
    assert hidden == {precision.dtype}
    assert logits == {torch.float32}
    kept = [tensor.dtype for p in trainer.model.parameters() for tensor in (p, p.grad)]
    assert set(kept) == {torch.float32}
    assert results[-1].val_accuracy == 1.0
    assert results[-1].val_loss < 0.5 * results[0].val_loss


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("auto", torch.float32), ("fp32", torch.float32), ("bf16", torch.bfloat16)],
)
def test_on_a_cpu_auto_is_float32_and_bfloat16_is_there_for_the_asking(
    name: str, dtype: torch.dtype
) -> None:
    precision = choose_precision(name, CPU)
    assert (precision.device_type, precision.dtype) == ("cpu", dtype)
    assert not precision.scaler.is_enabled()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_auto_is_bfloat16_where_the_gpu_has_it_and_float16_is_scaled() -> None:
    gpu = torch.device("cuda")
    is_recent = torch.cuda.get_device_capability()[0] >= 8
    assert choose_precision("auto", gpu).dtype is (torch.bfloat16 if is_recent else torch.float32)
    assert choose_precision("fp16", gpu).scaler.is_enabled()


# The scaler of float16


def test_updates_that_overflow_are_skipped_and_their_steps_count(
    make_trainer: MakeTrainer, make_batch: MakeBatch
) -> None:
    trainer = make_trainer()
    trainer.precision = float16(scale=2.0**40)
    trainer.average = build_average(trainer.model, decay=0.5)
    asked: list[int] = []
    trainer.learning_rate = lambda step: asked.append(step) or 0.01
    before = weights_of(trainer)
    [result] = run(trainer, make_batch, epochs=1)
    assert (result.step, asked) == (4, [0, 1, 2, 3])
    assert math.isfinite(result.train_loss)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(trainer).items())
    assert int(trainer.average.n_averaged) == 4  # as a resumed run takes it from the step
    assert trainer.precision.scaler.get_scale() == 2.0**36


def test_a_scale_that_is_too_large_finds_its_place_and_the_model_learns(
    make_trainer: MakeTrainer, make_batch: MakeBatch
) -> None:
    trainer = make_trainer(lr=0.03)
    trainer.precision = float16(scale=2.0**24)
    results = run(trainer, make_batch, epochs=8)
    assert 1 < trainer.precision.scaler.get_scale() < 2.0**24
    assert results[-1].val_accuracy == 1.0


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "lamb"])
def test_a_run_that_goes_on_with_its_scale_is_the_uninterrupted_one_bit_for_bit(
    make_trainer: MakeTrainer, make_batch: MakeBatch, tmp_path: Path, optimizer: str
) -> None:
    def begin() -> Trainer:
        trainer = make_trainer(optimizer=optimizer, dropout=0.5)
        trainer.precision = float16(scale=2.0**24)  # still falling when the first epoch ends
        return trainer

    whole = begin()
    results = run(whole, make_batch, epochs=4)

    first = begin()
    [result] = run(first, make_batch, epochs=1)
    store = open_store(str(tmp_path))
    state = Checkpoint(
        model=model_tensors(first.model),
        optimizer=first.optimizer.state_dict(),
        step=first.step,
        history=(result.to_dict(),),
        scaler=first.precision.scaler.state_dict(),
    )
    save_checkpoint(store, state, keep=1)
    loaded = load_latest(store)
    assert loaded.scaler == state.scaler
    assert loaded.scaler["scale"] == 2.0**20

    resumed = begin()
    resumed.model.load_state_dict(loaded.model)
    restore_optimizer(resumed.optimizer, loaded.optimizer)
    resumed.precision.scaler.load_state_dict(loaded.scaler)
    resumed.step = loaded.step
    rest = run(resumed, make_batch, first=1, epochs=4)

    for name, tensor in weights_of(whole).items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    assert [r.train_loss for r in results[1:]] == [r.train_loss for r in rest]
    assert whole.precision.scaler.state_dict() == resumed.precision.scaler.state_dict()


def test_gradients_are_clipped_by_their_own_norm_and_not_by_that_of_the_scaled_ones(
    make_trainer: MakeTrainer, make_batch: MakeBatch
) -> None:
    def gradients(scale: float | None) -> list[torch.Tensor]:
        trainer = make_trainer(optimizer="sgd", lr=0.0)
        trainer.clip_norm = 0.01
        if scale is not None:
            trainer.precision = Precision(scaler=GradScaler("cpu", init_scale=scale))
        run(trainer, make_batch, epochs=1)
        return [p.grad for p in trainer.model.parameters()]

    for scaled, plain in zip(gradients(2.0**10), gradients(None), strict=True):
        torch.testing.assert_close(scaled, plain)


def test_a_loss_of_nan_is_named_whatever_the_scaler_does(
    make_trainer: MakeTrainer, make_batch: MakeBatch
) -> None:
    trainer = make_trainer()
    trainer.precision = float16(scale=2.0**40)  # the steps before it overflow
    plain = trainer.loss
    trainer.loss = lambda logits, label: (
        plain(logits, label) + (math.nan if trainer.step == 2 else 0.0)
    )
    with pytest.raises(NonFiniteLossError, match="the loss is not finite at step 3"):
        run(trainer, make_batch, epochs=1)


def test_gradients_that_are_not_finite_at_any_scale_end_the_run(
    make_trainer: MakeTrainer, make_batch: MakeBatch
) -> None:
    trainer = make_trainer()
    trainer.precision = float16()
    trainer.model.head.weight.register_hook(lambda gradient: gradient * math.nan)
    steps = 3 * FINITE_CHECK_STEPS
    data = EpochData([make_batch(2, seed=1)] * steps, np.full(steps, 2), ())
    with pytest.raises(NonFiniteLossError, match="gradients are not finite in float16"):
        list(run_epochs(trainer, first_epoch=0, epochs=1, data=lambda _: data, seed=0))
    assert trainer.step == FINITE_CHECK_STEPS


# Compilation


@pytest.fixture
def plain_backend(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The real backend takes a minute: this one leaves the graphs as they are, and counts them."""
    graphs: list[int] = []

    def backend(graph: Any, inputs: list[Any]) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    return graphs


def test_a_compiled_model_keeps_its_names_and_trains_as_before(
    make_trainer: MakeTrainer, make_batch: MakeBatch, plain_backend: list[int]
) -> None:
    eager, compiled = make_trainer(lr=0.03), make_trainer(lr=0.03)
    names = list(eager.model.state_dict())
    module = compiled.model
    compile_in_place(module)
    compiled.average = build_average(compiled.model, decay=0.5)
    results = run(compiled, make_batch, epochs=3)
    assert plain_backend
    assert compiled.trained is module
    assert list(module.state_dict()) == list(compiled.served.state_dict()) == names
    expected = [result.train_loss for result in run(eager, make_batch, epochs=3)]
    assert [result.train_loss for result in results] == pytest.approx(expected)


def test_without_a_compiler_compilation_is_refused_before_the_first_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SettingsError, match="there is no no-such-compiler on") as caught:
        compile_in_place(nn.Linear(1, 1))
    assert len(str(caught.value).splitlines()) == 2


# Batch norm over ranks


@pytest.mark.parametrize("name", ["resnet18", "timm/efficientnet_lite0"])
def test_synchronized_batch_norms_keep_names_weights_and_outputs(name: str) -> None:
    if name.startswith("timm/"):
        pytest.importorskip("timm")  # whose norms have an activation inside
    torch.manual_seed(0)
    backbone = build_model(name, num_classes=3, channels=3, image_size=32)
    model = Classifier(backbone, mean=[0.5] * 3, std=[0.25] * 3).eval()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    expected = model(images)
    converted = synchronize_batch_norms(model)
    assert any(isinstance(module, nn.SyncBatchNorm) for module in converted.modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in converted.modules())
    assert list(converted.state_dict()) == list(before)
    assert all(torch.equal(before[key], t) for key, t in converted.state_dict().items())
    assert torch.equal(converted(images), expected)


# What does not go together


PLAIN: dict[str, Any] = {
    "precision": "auto",
    "compile": False,
    "sync_batch_norm": False,
    "strategy": "ddp",
    "num_workers": 2,
    "use_gpu": False,
    "accumulate_steps": 1,
    "has_average": False,
    "optimizer": "adamw",
}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"precision": "fp16"}, "--compute.precision fp16 is for GPUs"),
        ({"sync_batch_norm": True}, "--compute.sync_batch_norm on GPUs only"),
        (
            {"sync_batch_norm": True, "use_gpu": True, "accumulate_steps": 2},
            "--compute.sync_batch_norm does not go with --accumulate_steps",
        ),
        ({"strategy": "fsdp", "accumulate_steps": 2}, "fsdp does not go with --accumulate_steps"),
        ({"strategy": "fsdp", "compile": True}, "fsdp does not go with --compute.compile"),
        ({"strategy": "fsdp", "has_average": True}, "fsdp does not go with --ema.decay"),
        (
            {"strategy": "fsdp", "precision": "fp16", "use_gpu": True},
            "fsdp does not go with --compute.precision fp16",
        ),
    ],
)
def test_what_cannot_be_computed_is_refused_in_two_lines(
    changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(SettingsError, match=said) as caught:
        require_computable(**PLAIN | changes)
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": "bf16", "compile": True},
        {"precision": "fp16", "use_gpu": True},
        {"sync_batch_norm": True, "use_gpu": True},
        {"strategy": "fsdp", "sync_batch_norm": True, "use_gpu": True},
        {"strategy": "fsdp", "num_workers": 1, "has_average": True, "accumulate_steps": 2},
        {"sync_batch_norm": True, "num_workers": 1, "accumulate_steps": 2},
    ],
)
def test_what_can_be_computed_is_not_refused(changes: dict[str, Any]) -> None:
    require_computable(**PLAIN | changes)


def test_a_checkpoint_without_a_scale_has_none(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    state = Checkpoint(
        model={"weight": torch.ones(1)},
        optimizer={"state": {}, "param_groups": []},
        step=1,
        history=({"train_loss": 1.0, "val_loss": None},),
    )
    save_checkpoint(store, replace(state, scaler=Precision().scaler.state_dict()), keep=1)
    assert load_latest(store).scaler == {}
