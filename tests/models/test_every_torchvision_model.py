from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.regnet import BlockParams

from cnnray.models.registry import build_model, head_name, stem_name


@pytest.fixture
def _regnet_plans_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """RegNet computes its widths with tensors and reads them: those need real numbers."""
    plan = BlockParams.from_init_params

    def plan_on_cpu(*args: Any, **kwargs: Any) -> BlockParams:
        with torch.device("cpu"):
            return plan(*args, **kwargs)

    monkeypatch.setattr(BlockParams, "from_init_params", plan_on_cpu)


@pytest.mark.usefixtures("_regnet_plans_on_cpu")
@pytest.mark.parametrize("name", torchvision.models.list_models(module=torchvision.models))
def test_builds_for_grey_images_and_has_a_head(name: str) -> None:
    with torch.device("meta"):
        model = build_model(name, num_classes=5, channels=1, image_size=224)
    head = model.get_submodule(head_name(model, 5))
    assert isinstance(head, nn.Linear | nn.Conv2d)
    assert head.weight.shape[0] == 5
    stem = model.get_submodule(stem_name(model) or "")
    assert isinstance(stem, nn.Conv2d)
    assert stem.weight.shape[1] == 1
