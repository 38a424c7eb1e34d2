"""MixUp and CutMix: torchvision's formulas, the papers' distributions, and only (seed, step)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from cnnray.training.mixing import Mixing, blend, cut_box, paste

K = 5


def batch(size: int = 8, *, height: int = 12, width: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(size)
    image = torch.randint(0, 256, (size, 3, height, width), generator=generator)
    label = torch.arange(size) % K
    return image.to(torch.uint8).contiguous(memory_format=torch.channels_last), label


def mixing(**options: float) -> Mixing:
    return Mixing(num_classes=K, seed=3, **options)


def test_blended_images_and_targets_are_torchvisions_mixup() -> None:
    image, label = batch()
    transform = v2.MixUp(num_classes=K)
    one_hot = torch.nn.functional.one_hot(label, K).float()
    expected = transform.transform(image.float(), {"lam": 0.3, "labels": None, "batch_size": 8})
    torch.testing.assert_close(blend(image, 0.3, shift=1), expected)
    expected = transform._mixup_label(label, lam=0.3)
    torch.testing.assert_close(blend(one_hot, 0.3, shift=1), expected)


def test_pasted_rectangles_are_torchvisions_cutmix() -> None:
    image, _ = batch()
    params = {"box": (4, 2, 15, 9), "labels": None, "batch_size": 8}  # left, top, right, bottom
    expected = v2.CutMix(num_classes=K).transform(image, params)
    assert torch.equal(paste(image, (2, 9, 4, 15), shift=1), expected)


def test_a_whole_rectangle_has_the_part_of_the_area_that_is_not_kept() -> None:
    box = cut_box(0.64, np.array([0.5, 0.5]), height=100, width=200)
    assert box == (20, 80, 40, 160)  # sqrt(0.36) of either side


def test_a_rectangle_at_an_edge_is_cut_off_there() -> None:
    assert cut_box(0.64, np.array([0.0, 0.999]), height=100, width=200) == (0, 30, 139, 200)


@pytest.mark.parametrize("kept", [0.0, 0.2, 0.99, 1.0])
@pytest.mark.parametrize("center", [(0.0, 0.0), (0.5, 0.5), (0.9999, 0.9999)])
def test_a_rectangle_lies_in_the_image(kept: float, center: tuple[float, float]) -> None:
    top, bottom, left, right = cut_box(kept, np.array(center), height=7, width=9)
    assert 0 <= top <= bottom <= 7
    assert 0 <= left <= right <= 9


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_the_kept_part_is_beta_distributed(alpha: float) -> None:
    image, label = batch(2)
    kept = np.array([mixing(mixup_alpha=alpha)(image, label, n)[1][0, 0] for n in range(1500)])
    assert kept.mean() == pytest.approx(0.5, abs=0.04)
    assert kept.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.12)  # of Beta(a, a)


def test_targets_of_cutmix_are_the_parts_of_the_pixels() -> None:
    _, label = batch(4)
    image = label.to(torch.uint8)[:, None, None, None].expand(4, 1, 12, 20)  # pixels tell the label
    for step in range(50):
        mixed, target = mixing(cutmix_alpha=1.0)(image, label, step)
        shares = torch.stack([(mixed == k).float().mean(dim=(1, 2, 3)) for k in range(K)], dim=1)
        torch.testing.assert_close(shares, target)


def test_targets_of_mixup_are_the_weights_of_the_images() -> None:
    label = torch.arange(4)
    image = torch.eye(4)[:, :, None, None].expand(4, 4, 3, 3)  # channel k is image k
    for step in range(50):
        mixed, target = mixing(mixup_alpha=1.0)(image, label, step)
        torch.testing.assert_close(mixed.mean(dim=(2, 3)), target[:, :4])


@pytest.mark.parametrize("options", [{"mixup_alpha": 0.4}, {"cutmix_alpha": 0.4}])
def test_targets_are_distributions(options: dict[str, float]) -> None:
    for step in range(50):
        target = mixing(**options)(*batch(), step)[1]
        assert target.shape == (8, K)
        assert (target >= 0).all()
        torch.testing.assert_close(target.sum(dim=1), torch.ones(8))


def test_a_step_repeats_itself_whatever_torch_has_drawn_since() -> None:
    image, label = batch()
    mix = mixing(mixup_alpha=1.0, cutmix_alpha=1.0)
    before = [mix(image, label, step) for step in range(6)]
    torch.manual_seed(99)
    np.random.seed(99)
    for step, (pixels, target) in enumerate(before):
        again, same = mix(image, label, step)
        assert torch.equal(again, pixels)
        assert torch.equal(same, target)
    assert len({target.numpy().tobytes() for _, target in before}) == 6
    other = Mixing(num_classes=K, seed=4, mixup_alpha=1.0, cutmix_alpha=1.0)
    assert not torch.equal(other(image, label, 0)[1], before[0][1])


def test_mixing_draws_nothing_from_torch() -> None:
    state = torch.get_rng_state()
    for step in range(6):
        mixing(mixup_alpha=1.0, cutmix_alpha=1.0)(*batch(), step)
    assert torch.equal(torch.get_rng_state(), state)


def test_ranks_with_unequal_parts_keep_the_same_share() -> None:
    mix = mixing(mixup_alpha=1.0)
    for step in range(10):
        shares = {float(mix(*batch(size), step)[1][0, 0]) for size in (2, 3, 5)}
        assert len(shares) == 1


def test_every_sample_meets_every_other_one_but_never_itself() -> None:
    image, label = batch(4)
    partners = set()
    for step in range(60):
        target = mixing(mixup_alpha=1.0)(image, label, step)[1]
        partners.add(int((target[0] > 0).nonzero().flatten()[-1]))
    assert partners == {1, 2, 3}


def test_with_both_either_happens_equally_often() -> None:
    mix = mixing(mixup_alpha=1.0, cutmix_alpha=1.0)
    kinds = [mix(*batch(2), step)[0].dtype for step in range(400)]
    assert kinds.count(torch.uint8) == pytest.approx(200, abs=40)  # CutMix leaves pixels whole


def test_a_step_is_left_alone_as_often_as_it_says() -> None:
    image, label = batch()
    mix = mixing(mixup_alpha=1.0, probability=0.25)
    mixed = 0
    for step in range(400):
        pixels, target = mix(image, label, step)
        mixed += target.ndim == 2
        assert target.ndim == 2 or (pixels is image and target is label)
    assert mixed == pytest.approx(100, abs=35)


@pytest.mark.parametrize("options", [{"mixup_alpha": 1.0}, {"cutmix_alpha": 1.0}])
def test_the_given_images_stay_and_the_mixed_ones_are_channels_last(
    options: dict[str, float],
) -> None:
    image, label = batch()
    before = image.clone()
    mixed, _ = mixing(**options)(image, label, 0)
    assert torch.equal(image, before)
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    assert mixed.shape == image.shape


@pytest.mark.parametrize("size", [0, 1])
def test_a_part_without_two_samples_is_left_alone(size: int) -> None:
    image, label = batch(size)
    pixels, target = mixing(mixup_alpha=1.0)(image, label, 0)
    assert pixels is image
    assert target is label


@pytest.mark.parametrize("alpha", [1e-9, 1e-3, 100.0])
def test_extreme_alphas_give_finite_targets(alpha: float) -> None:
    for step in range(20):
        target = mixing(mixup_alpha=alpha)(*batch(2), step)[1]
        assert torch.isfinite(target).all()
