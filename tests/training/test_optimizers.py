"""What is decayed, what learns how fast, and how an optimizer's state comes back."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler

from cnnray.errors import SettingsError
from cnnray.models.registry import build_model
from cnnray.training.layers import layer_scales
from cnnray.training.optimizers import build_optimizer, hidden_matrices, restore_optimizer


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "lamb"])
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


@pytest.fixture
def no_stale_memory() -> Iterator[None]:
    """What was never written is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("no_stale_memory")
@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "lamb"])
def test_a_first_update_that_the_scaler_skips_leaves_no_trace(name: str) -> None:
    def step(model: nn.Module, optimizer: torch.optim.Optimizer, gradient: float) -> None:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        scaler = GradScaler("cpu", init_scale=1.0)
        scaler.scale(torch.ones(()))
        scaler.unscale_(optimizer)
        scaler.step(optimizer)

    model = nn.Linear(2, 2)
    other = copy.deepcopy(model)
    optimizer = build_optimizer(model, name=name, lr=0.1)
    step(model, optimizer, torch.inf)
    step(model, optimizer, 0.5)
    step(other, build_optimizer(other, name=name, lr=0.1), 0.5)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_an_unknown_optimizer_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown optimizer lion"):
        build_optimizer(nn.Linear(1, 1), name="lion", lr=0.1)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "lamb", "muon"])
def test_a_restored_optimizer_goes_on_as_the_saved_one_in_any_memory_format(name: str) -> None:
    def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = torch.empty_like(parameter).copy_(gradient)  # as autograd lays it
        optimizer.step()

    layers = nn.Conv2d(3, 4, 3), nn.Linear(4, 4), nn.Linear(4, 2)
    model = nn.Sequential(*layers).to(memory_format=torch.channels_last)
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


def test_layers_learn_the_slower_the_further_they_are_from_the_head() -> None:
    model = nn.Module()
    model.stem = nn.Conv2d(1, 4, 3)
    model.norm = nn.BatchNorm2d(4)
    model.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))])
    model.head = nn.Linear(4, 2)
    scales = layer_scales(model, decay=0.5)
    assert {name: scales[name] for name in scales if name.endswith("weight")} == {
        "stem.weight": 1 / 8,
        "norm.weight": 1 / 8,  # with the convolution that it follows
        "blocks.0.weight": 1 / 4,
        "blocks.1.0.weight": 1 / 2,
        "blocks.1.1.weight": 1 / 2,
        "head.weight": 1.0,
    }
    optimizer = build_optimizer(model, name="sgd", lr=0.1, layer_decay=0.5)
    rates = {id(p): g["lr_scale"] for g in optimizer.param_groups for p in g["params"]}
    assert {name: rates[id(p)] for name, p in model.named_parameters()} == scales


@pytest.mark.parametrize(
    ("name", "layers"), [("resnet18", 6), ("vit_b_16", 16), ("timm/vit_tiny_patch16_224", 15)]
)
def test_the_layers_of_real_networks_are_their_stages_or_blocks(name: str, layers: int) -> None:
    with torch.device("meta"):
        model = build_model(name, num_classes=3, channels=3, image_size=224)
    scales = layer_scales(model, decay=0.5)
    assert sorted(set(scales.values())) == [0.5**n for n in reversed(range(layers))]
    assert list(scales.values())[-1] == 1.0


def test_without_layer_decay_all_learn_alike() -> None:
    assert set(layer_scales(network(), decay=1.0).values()) == {1.0}


def test_lamb_moves_a_weight_by_its_own_norm_and_never_clips_by_itself() -> None:
    model = nn.Linear(2, 2, bias=False)
    before = model.weight.detach().clone()
    optimizer = build_optimizer(model, name="lamb", lr=0.1, weight_decay=0.01)
    model.weight.grad = 100 * torch.ones_like(model.weight)
    optimizer.step()
    moved = (model.weight.detach() - before).norm()
    torch.testing.assert_close(moved, 0.1 * before.norm())
    assert model.weight.grad.norm() == 200


def transformer() -> nn.Sequential:
    """Patches, a block without its attention, a head."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 2), nn.Flatten(), nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 2)
    )


def move(model: nn.Module, optimizer: torch.optim.Optimizer) -> set[str]:
    """One step along gradients that are no one's; the names of what it moved."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for number, parameter in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(number)
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def test_muon_moves_hidden_matrices_and_adamw_everything_else() -> None:
    model = transformer()
    optimizer = build_optimizer(model, name="muon", lr=0.1, weight_decay=0.5)
    assert move(model, optimizer) == dict(model.named_parameters()).keys()
    by_muon = {n for n, p in model.named_parameters() if "momentum_buffer" in optimizer.state[p]}
    by_adamw = {n for n, p in model.named_parameters() if "exp_avg" in optimizer.state[p]}
    assert by_muon == {"3.weight"}
    assert by_adamw == dict(model.named_parameters()).keys() - by_muon
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert {n for n, p in model.named_parameters() if decay[id(p)]} == {
        "0.weight",
        "3.weight",
        "4.weight",
    }


def test_a_step_of_muon_goes_as_far_in_all_directions_as_adamw_does_on_average() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2))
    before = model[0].weight.detach().clone()
    optimizer = build_optimizer(model, name="muon", lr=0.01)
    generator = torch.Generator().manual_seed(0)
    rotations = [torch.linalg.qr(torch.randn(64, 64, generator=generator))[0] for _ in range(2)]
    slopes = torch.logspace(0, -1.5, 64)  # the steepest 32 times the flattest
    model[0].weight.grad = rotations[0] @ slopes.diag() @ rotations[1]
    optimizer.step()
    moved = model[0].weight.detach() - before
    directions = torch.linalg.svdvals(moved)
    assert directions.max() < 3 * directions.min()
    assert float(moved.square().mean().sqrt()) == pytest.approx(0.2 * 0.01, rel=0.3)


@pytest.mark.parametrize("is_restored", [False, True])
def test_both_halves_of_muon_learn_at_the_rates_of_their_groups(is_restored: bool) -> None:
    model = transformer()
    optimizer = build_optimizer(model, name="muon", lr=0.1, layer_decay=0.5)
    rates = {id(p): g["lr_scale"] for g in optimizer.param_groups for p in g["params"]}
    scales = layer_scales(model, decay=0.5)
    assert {name: rates[id(p)] for name, p in model.named_parameters()} == scales
    if is_restored:
        move(model, optimizer)
        restore_optimizer(optimizer, copy.deepcopy(optimizer.state_dict()))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    assert move(model, optimizer) == set()
    for group in optimizer.param_groups:
        group["lr"] = 0.1 * (group["lr_scale"] == 0.5)  # the layer before the head
    assert move(model, optimizer) == {"3.weight", "3.bias"}


def test_gradients_are_forgotten_in_both_halves_of_muon() -> None:
    model = transformer()
    optimizer = build_optimizer(model, name="muon", lr=0.1)
    move(model, optimizer)
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("vit_b_16", 12 * 4),  # attention in and out, and two of the perceptron, a block
        ("swin_t", 12 * 4 + 3),  # and one after each stage but the last
        ("convnext_tiny", 18 * 2),
        ("tutorial_cnn", 1),
        ("resnet18", 0),
        ("timm/vit_tiny_patch16_224", 12 * 4),
    ],
)
def test_hidden_matrices_of_real_networks(name: str, count: int) -> None:
    with torch.device("meta"):
        model = build_model(name, num_classes=3, channels=3, image_size=224)
    names = hidden_matrices(model)
    assert len(names) == count
    assert not [name for name in names if "head" in name or "pos" in name or "classifier" in name]


def test_muon_is_refused_where_it_has_nothing_to_move() -> None:
    frozen = transformer()
    frozen[3].requires_grad_(False)
    for model in (network(), frozen):
        with pytest.raises(SettingsError, match="no hidden linear layer") as caught:
            build_optimizer(model, name="muon", lr=0.1)
        assert len(str(caught.value).splitlines()) == 2
