"""What is decayed, and the learning rate at its turning points."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from cnnray.training.optimizers import build_optimizer, learning_rate_factor, restore_optimizer


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_weights_are_decayed_and_biases_and_norms_are_not(name: str) -> None:
    model = network()
    optimizer = build_optimizer(model, name=name, lr=0.1, weight_decay=0.5)
    decay = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    by_name = {key: decay[id(parameter)] for key, parameter in model.named_parameters()}
    assert by_name == {
        "0.weight": 0.5,
        "0.bias": 0.0,
        "1.weight": 0.0,
        "1.bias": 0.0,
        "3.weight": 0.5,
        "3.bias": 0.0,
    }


def test_decay_shrinks_a_weight_that_has_no_gradient_and_leaves_its_bias() -> None:
    model = nn.Linear(2, 2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, name="adamw", lr=0.1, weight_decay=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.allclose(model.weight, before["weight"] * (1 - 0.1 * 0.5))
    assert torch.equal(model.bias, before["bias"])


def test_frozen_parameters_are_left_out() -> None:
    model = network()
    model[0].requires_grad_(False)
    optimizer = build_optimizer(model, name="adam", lr=0.1)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in (*model[1].parameters(), *model[3].parameters())}


def test_sgd_uses_nesterov_momentum_and_none_when_asked() -> None:
    model = nn.Linear(1, 1)
    with_it = build_optimizer(model, name="sgd", lr=0.1, momentum=0.8).param_groups[0]
    without = build_optimizer(model, name="sgd", lr=0.1, momentum=0.0).param_groups[0]
    assert (with_it["momentum"], with_it["nesterov"]) == (0.8, True)
    assert (without["momentum"], without["nesterov"]) == (0.0, False)


def test_an_unknown_optimizer_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown optimizer lion"):
        build_optimizer(nn.Linear(1, 1), name="lion", lr=0.1)


def factor(step: int, name: str = "cosine", warmup: int = 10, total: int = 101) -> float:
    return learning_rate_factor(
        step, name=name, total_steps=total, warmup_steps=warmup, min_fraction=0.2
    )


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 1 / 10),
        (4, 5 / 10),
        (9, 1.0),  # the end of warm-up
        (10, 1.0),  # the start of the cosine
        (55, 0.2 + 0.8 * 0.5),  # half of the way
        (100, 0.2),  # the last step
        (500, 0.2),  # beyond it
    ],
)
def test_cosine_with_warm_up(step: int, expected: float) -> None:
    assert factor(step) == pytest.approx(expected)


def test_cosine_follows_its_formula_and_never_rises() -> None:
    values = [factor(step) for step in range(10, 101)]
    assert values[30] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 3)) / 2)
    assert values == sorted(values, reverse=True)


def test_constant_stays_at_the_peak_after_warm_up() -> None:
    assert [factor(step, "constant", warmup=2) for step in (0, 1, 2, 100)] == [0.5, 1, 1, 1]
    assert [factor(step, "constant", warmup=0) for step in (0, 100)] == [1, 1]


@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (5, 5), (5, 9), (6, 5)])
def test_short_runs_have_a_learning_rate_too(total: int, warmup: int) -> None:
    values = [factor(step, total=total, warmup=warmup) for step in range(total)]
    assert all(0 < value <= 1 for value in values)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_a_restored_optimizer_goes_on_as_the_saved_one_in_any_memory_format(name: str) -> None:
    def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = torch.empty_like(parameter).copy_(gradient)  # as autograd lays it
        optimizer.step()

    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    optimizer = build_optimizer(model, name=name, lr=0.1)
    step(model, optimizer, 1)
    state = copy.deepcopy(optimizer.state_dict())
    for moments in state["state"].values():  # as a file gives them back
        moments |= {key: value.contiguous() for key, value in moments.items()}
    resumed = copy.deepcopy(model)
    restored = build_optimizer(resumed, name=name, lr=0.1)
    restore_optimizer(restored, state)
    step(model, optimizer, 2)
    step(resumed, restored, 2)
    for ours, theirs in zip(resumed.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
