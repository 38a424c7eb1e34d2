"""Losses against their formulas, by hand."""

import math

import pytest
import torch

from cnnray.training.losses import LOSSES, cross_entropy, mean_squared_error

LOGITS = torch.tensor([[0.0, math.log(3.0)], [math.log(4.0), 0.0]])  # softmax: 1/4 3/4, 4/5 1/5


def test_cross_entropy_is_minus_the_log_of_the_labels_probability() -> None:
    losses = cross_entropy(LOGITS, torch.tensor([1, 1]))
    assert losses.tolist() == pytest.approx([-math.log(3 / 4), -math.log(1 / 5)])


def test_mse_is_the_mean_over_classes_of_softmax_minus_one_hot_squared() -> None:
    losses = mean_squared_error(LOGITS, torch.tensor([1, 1]))
    by_hand = [((1 / 4) ** 2 + (3 / 4 - 1) ** 2) / 2, ((4 / 5) ** 2 + (1 / 5 - 1) ** 2) / 2]
    assert losses.tolist() == pytest.approx(by_hand)


@pytest.mark.parametrize("name", ["cross_entropy", "mse"])
def test_a_loss_is_one_float32_for_each_sample_whatever_the_logits_type(name: str) -> None:
    losses = LOSSES[name](LOGITS.bfloat16(), torch.tensor([0, 1]))
    assert (losses.shape, losses.dtype) == ((2,), torch.float32)


@pytest.mark.parametrize("name", ["cross_entropy", "mse"])
def test_a_right_answer_costs_nothing(name: str) -> None:
    losses = LOSSES[name](torch.tensor([[100.0, -100.0, 0.0]]), torch.tensor([0]))
    assert losses.item() == pytest.approx(0.0, abs=1e-6)
