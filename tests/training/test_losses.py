"""Losses against their formulas, by hand."""

import math

import pytest
import torch
from torchvision.ops import sigmoid_focal_loss

from cnnray.training.losses import build_loss, focal

NAMES = ["cross_entropy", "mse", "focal", "bce"]
LOGITS = torch.tensor([[0.0, math.log(3.0)], [math.log(4.0), 0.0]])  # softmax: 1/4 3/4, 4/5 1/5


def test_cross_entropy_is_minus_the_log_of_the_labels_probability() -> None:
    losses = build_loss("cross_entropy")(LOGITS, torch.tensor([1, 1]))
    assert losses.tolist() == pytest.approx([-math.log(3 / 4), -math.log(1 / 5)])


def test_mse_is_the_mean_over_classes_of_softmax_minus_one_hot_squared() -> None:
    losses = build_loss("mse")(LOGITS, torch.tensor([1, 1]))
    by_hand = [((1 / 4) ** 2 + (3 / 4 - 1) ** 2) / 2, ((4 / 5) ** 2 + (1 / 5 - 1) ** 2) / 2]
    assert losses.tolist() == pytest.approx(by_hand)


def test_focal_takes_the_cross_entropy_times_the_error_to_the_gamma() -> None:
    losses = build_loss("focal", focal_gamma=2.0)(LOGITS, torch.tensor([1, 1]))
    by_hand = [-((1 / 4) ** 2) * math.log(3 / 4), -((4 / 5) ** 2) * math.log(1 / 5)]
    assert losses.tolist() == pytest.approx(by_hand)


def test_focal_of_two_classes_is_torchvisions_binary_one() -> None:
    logit = torch.linspace(-6, 6, 9)
    two = torch.stack([torch.zeros(9), logit], dim=1)
    ours = build_loss("focal", focal_gamma=1.5)(two, torch.ones(9, dtype=torch.int64))
    theirs = sigmoid_focal_loss(logit, torch.ones(9), alpha=-1, gamma=1.5)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_has_a_finite_gradient_where_the_network_is_certain(gamma: float) -> None:
    logits = torch.tensor([[200.0, 0.0], [0.0, 200.0]], requires_grad=True)
    focal(logits, torch.tensor([0, 0]), gamma=gamma).sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_bce_is_the_mean_over_classes_of_one_against_all() -> None:
    losses = build_loss("bce")(LOGITS, torch.tensor([1, 1]))  # sigmoid: 1/2 3/4, 4/5 1/2
    by_hand = [-(math.log(1 / 2) + math.log(3 / 4)) / 2, -(math.log(1 / 5) + math.log(1 / 2)) / 2]
    assert losses.tolist() == pytest.approx(by_hand)


def test_label_smoothing_is_that_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, generator=generator)
    label = torch.tensor([0, 1, 2, 3, 4, 0])
    ours = build_loss("cross_entropy", label_smoothing=0.1)(logits, label)
    theirs = torch.nn.functional.cross_entropy(logits, label, reduction="none", label_smoothing=0.1)
    torch.testing.assert_close(ours, theirs)


def test_label_smoothing_moves_the_targets_of_bce() -> None:
    losses = build_loss("bce", label_smoothing=0.2)(LOGITS[:1], torch.tensor([1]))
    # Targets 0.1 and 0.9 for probabilities 1/2 and 3/4.
    by_hand = -(math.log(1 / 2) + 0.9 * math.log(3 / 4) + 0.1 * math.log(1 / 4)) / 2
    assert losses.tolist() == pytest.approx([by_hand])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", NAMES)
def test_a_label_and_its_distribution_cost_the_same(name: str, smoothing: float) -> None:
    loss = build_loss(name, label_smoothing=smoothing)
    soft = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    torch.testing.assert_close(loss(LOGITS, torch.tensor([1, 0])), loss(LOGITS, soft))


@pytest.mark.parametrize("name", ["cross_entropy", "focal", "bce"])
def test_a_mixed_sample_costs_the_mix_of_its_labels(name: str) -> None:
    loss = build_loss(name)
    mixed = loss(LOGITS, torch.tensor([[0.3, 0.7], [0.3, 0.7]]))
    parts = 0.3 * loss(LOGITS, torch.tensor([0, 0])) + 0.7 * loss(LOGITS, torch.tensor([1, 1]))
    torch.testing.assert_close(mixed, parts)


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_is_one_float32_for_each_sample_whatever_the_logits_type(name: str) -> None:
    losses = build_loss(name)(LOGITS.bfloat16(), torch.tensor([0, 1]))
    assert (losses.shape, losses.dtype) == ((2,), torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_a_right_answer_costs_nothing(name: str) -> None:
    losses = build_loss(name)(torch.tensor([[100.0, -100.0, -100.0]]), torch.tensor([0]))
    assert losses.item() == pytest.approx(0.0, abs=1e-6)
