"""Weights and offsets by hand, and what they do to a network that sees one class too often."""

from __future__ import annotations

import math

import pytest
import torch

from cnnray.training.imbalance import (
    balance_loss,
    effective_number,
    inverse_frequency,
    log_prior,
)
from cnnray.training.losses import Loss, build_loss

COUNTS = torch.tensor([900.0, 90.0, 10.0], dtype=torch.float64)
METHODS = ["class_weights", "effective_number", "logit_adjustment"]


def balanced(method: str, counts: list[int], *, beta: float = 0.9, tau: float = 1.0) -> Loss:
    return balance_loss(
        build_loss("cross_entropy"),
        method=method,
        class_counts=counts,
        beta=beta,
        tau=tau,
        device=torch.device("cpu"),
    )


def test_inverse_frequency_gives_every_class_the_same_sum() -> None:
    weights = inverse_frequency(COUNTS)
    assert (weights * COUNTS).tolist() == pytest.approx([1000 / 3] * 3)


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.999])
def test_effective_number_is_the_papers_formula_with_a_mean_of_one_over_samples(
    beta: float,
) -> None:
    weights = effective_number(COUNTS, beta=beta)
    by_hand = [(1 - beta) / (1 - beta**n) for n in (900, 90, 10)]
    assert (weights / weights[0]).tolist() == pytest.approx([w / by_hand[0] for w in by_hand])
    assert float((weights * COUNTS).sum() / COUNTS.sum()) == pytest.approx(1.0)


def test_effective_number_goes_from_no_weights_to_inverse_frequency() -> None:
    assert effective_number(COUNTS, beta=0.0).tolist() == pytest.approx([1.0] * 3)
    nearly = effective_number(COUNTS, beta=1 - 1e-9)
    assert nearly.tolist() == pytest.approx(inverse_frequency(COUNTS).tolist(), rel=1e-4)


def test_the_log_prior_is_that_of_the_shares() -> None:
    assert log_prior(COUNTS).exp().tolist() == pytest.approx([0.9, 0.09, 0.01])


def test_weights_are_those_of_torchs_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, label = torch.randn(8, 3, generator=generator), torch.tensor([0, 1, 2, 0, 1, 2, 0, 0])
    ours = balanced("class_weights", [900, 90, 10])(logits, label)
    theirs = torch.nn.functional.cross_entropy(
        logits, label, weight=inverse_frequency(COUNTS).float(), reduction="none"
    )
    torch.testing.assert_close(ours, theirs)


def test_a_mixed_sample_weighs_the_mean_of_its_classes() -> None:
    loss = balanced("class_weights", [30, 10])  # weights 2/3 and 2
    mixed = loss(torch.zeros(1, 2), torch.tensor([[0.25, 0.75]]))
    assert mixed.item() == pytest.approx((0.25 * 2 / 3 + 0.75 * 2) * math.log(2))


@pytest.mark.parametrize("tau", [0.5, 1.0])
def test_logit_adjustment_is_the_papers_pairwise_formula(tau: float) -> None:
    logits, label = torch.tensor([[0.3, -1.0, 2.0]]), torch.tensor([2])
    prior = [0.9, 0.09, 0.01]
    margins = [(prior[k] / prior[2]) ** tau * math.exp(logits[0, k].item() - 2.0) for k in range(3)]
    loss = balanced("logit_adjustment", [900, 90, 10], tau=tau)(logits, label)
    assert loss.item() == pytest.approx(math.log(sum(margins)), rel=1e-5)


def test_a_network_without_information_rests_at_the_prior_until_it_is_balanced() -> None:
    label = torch.tensor([0] * 9 + [1])
    at_prior, at_equal = torch.tensor([0.9, 0.1]).log(), torch.zeros(2)

    def pull_to_the_rare_class(loss: Loss, logits: torch.Tensor) -> float:
        bias = logits.clone().requires_grad_()
        loss(bias.expand(10, 2), label).mean().backward()
        return -float(bias.grad[1])

    assert pull_to_the_rare_class(balanced("none", [9, 1]), at_prior) == pytest.approx(0, abs=1e-6)
    for method in ("class_weights", "logit_adjustment"):
        loss = balanced(method, [9, 1])
        assert pull_to_the_rare_class(loss, at_equal) == pytest.approx(0, abs=1e-6)
        assert pull_to_the_rare_class(loss, at_prior) > 0.05
    between = balanced("effective_number", [9, 1], beta=0.8)
    assert pull_to_the_rare_class(between, at_prior) > 0.01
    assert pull_to_the_rare_class(between, at_equal) < -0.01


@pytest.mark.parametrize("method", METHODS)
def test_a_class_without_training_images_leaves_every_loss_finite(method: str) -> None:
    losses = balanced(method, [5, 0, 3])(torch.zeros(3, 3), torch.tensor([0, 1, 2]))
    assert torch.isfinite(losses).all()


def test_a_mixed_samples_weighted_loss_is_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 3, generator=generator)
    target = torch.softmax(torch.randn(8, 3, generator=generator), dim=1)
    theirs = torch.nn.functional.cross_entropy(
        logits, target, weight=inverse_frequency(COUNTS).float(), reduction="none"
    )
    torch.testing.assert_close(balanced("class_weights", [900, 90, 10])(logits, target), theirs)


@pytest.mark.parametrize("name", ["cross_entropy", "focal", "bce"])
@pytest.mark.parametrize("method", ["none", "class_weights", "effective_number"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_mixtures_loss_is_the_mixture_of_its_parts_losses(
    name: str, method: str, smoothing: float
) -> None:
    loss = balance_loss(
        build_loss(name, label_smoothing=smoothing),
        method=method,
        class_counts=[900, 90, 10],
        beta=0.9,
        tau=1.0,
        device=torch.device("cpu"),
    )
    check_mixture(loss)


def test_an_adjusted_mixtures_loss_is_the_mixture_of_its_parts_losses() -> None:
    check_mixture(balanced("logit_adjustment", [900, 90, 10]))


def check_mixture(loss: Loss) -> None:
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    one, other = torch.tensor([0, 1, 2, 0]), torch.tensor([2, 2, 1, 0])
    target = 0.3 * torch.eye(3)[one] + 0.7 * torch.eye(3)[other]
    parts = 0.3 * loss(logits, one) + 0.7 * loss(logits, other)
    torch.testing.assert_close(loss(logits, target), parts)


@pytest.mark.parametrize("method", METHODS)
def test_a_label_and_its_distribution_cost_the_same(method: str) -> None:
    logits = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    loss, label = balanced(method, [900, 90, 10]), torch.tensor([0, 1, 2])
    torch.testing.assert_close(loss(logits, torch.eye(3)), loss(logits, label))
