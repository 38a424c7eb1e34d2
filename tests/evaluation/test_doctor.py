"""The doctor on real runs, each made to suffer from one thing, on 1,797 handwritten digits."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from cnnray.config import TrainSettings
from cnnray.datasets.order import Batch
from cnnray.evaluation.doctor import diagnose, read_run
from cnnray.evaluation.findings import Finding, TrainingRun, standard_error
from cnnray.evaluation.metrics import compute_metrics, predictions_from_logits
from cnnray.training.loop import EpochData, Trainer, run_epochs
from cnnray.training.losses import cross_entropy
from cnnray.training.optimizers import build_optimizer

pytestmark = pytest.mark.timeout(60)

CLASSES = [f"digit {n}" for n in range(10)]
Split = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]  # (N, 1, 8, 8) uint8, (N,) int64


class Net(nn.Module):
    """(B, 1, 8, 8) uint8 to (B, 10) logits, with one hidden layer."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10)
        )

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.layers(image.float() / 128 - 1)


@dataclass
class Patient:
    """A run that is over: what its bundle would tell, and its best weights' logits."""

    provenance: dict[str, Any]
    predictions: Any

    def curves(self) -> dict[str, Finding]:
        """What the train job finds."""
        run = read_run(self.provenance, classes=CLASSES)
        assert run is not None
        return {finding.name: finding for finding in diagnose(run)}

    def findings(self) -> dict[str, Finding]:
        """What the evaluate job finds."""
        run = read_run(self.provenance, classes=CLASSES)
        per_class = compute_metrics(self.predictions, classes=CLASSES).per_class
        found = diagnose(run, per_class=per_class, predictions=self.predictions)
        return {finding.name: finding for finding in found}


@pytest.fixture(scope="module")
def digits() -> Split:
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    pixels = (images * 15.9).astype(np.uint8).reshape(-1, 1, 8, 8)
    return pixels[order], labels[order].astype(np.int64)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def part(split: Split, begin: int, end: int) -> Split:
    return split[0][begin:end], split[1][begin:end]


def mislabel(split: Split, *, fraction: float, seed: int) -> Split:
    """The same images; a fraction of them get one of the nine other labels."""
    generator = np.random.default_rng(seed)
    image, label = split
    is_wrong = generator.random(len(label)) < fraction
    shift = generator.integers(1, 10, len(label))
    return image, np.where(is_wrong, (label + shift) % 10, label)


def long_tail(split: Split, counts: list[int]) -> Split:
    """The first ``counts[k]`` images of each class k."""
    rows = [np.flatnonzero(split[1] == label)[:count] for label, count in enumerate(counts)]
    chosen = np.concatenate(rows)
    return split[0][chosen], split[1][chosen]


def batches(split: Split, order: np.ndarray[Any, Any], *, size: int = 32) -> list[Batch]:
    parts = [order[begin : begin + size] for begin in range(0, len(order), size)]
    return [Batch(image=split[0][p], label=split[1][p], key=p.astype(str)) for p in parts]


def train(
    training: Split,
    val: Split,
    test: Split,
    *,
    hidden: int = 64,
    epochs: int = 15,
    optimizer: str = "adam",
    lr: float = 0.003,
) -> Patient:
    """Train as the train job does, and predict the test split with the epoch of the lowest loss."""
    torch.manual_seed(0)
    model = Net(hidden)
    trainer = Trainer(
        model=model,
        optimizer=build_optimizer(model, name=optimizer, lr=lr),
        loss=cross_entropy,
        learning_rate=lambda step: lr,
        device=torch.device("cpu"),
    )

    def data(epoch: int) -> EpochData:
        order = np.random.default_rng(epoch).permutation(len(training[1]))
        shuffled = batches(training, order)
        sizes = np.array([len(batch["label"]) for batch in shuffled])
        return EpochData(shuffled, sizes, batches(val, np.arange(len(val[1])), size=256))

    history, best = [], (float("inf"), {})
    for result in run_epochs(trainer, first_epoch=0, epochs=epochs, data=data, seed=0):
        history.append(result.to_dict())
        if result.val_loss < best[0]:
            best = result.val_loss, {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(best[1])
    with torch.inference_mode():
        logits = model(torch.from_numpy(test[0]))
    return Patient(
        provenance={
            "history": history,
            "dataset": {
                "class_counts": np.bincount(training[1], minlength=10).tolist(),
                "num_val": len(val[1]),
            },
        },
        predictions=predictions_from_logits(
            keys=[str(n) for n in range(len(test[1]))],
            labels=torch.from_numpy(test[1]),
            logits=logits,
        ),
    )


@pytest.fixture(scope="module")
def fit(digits: Split) -> Callable[..., Patient]:
    """Train on the first ``images`` digits, all rightly labelled."""

    def fit(images: int = 1000, **options: Any) -> Patient:
        splits = part(digits, 0, images), part(digits, 1000, 1400), part(digits, 1400, 1797)
        return train(*splits, **options)

    return fit


@pytest.mark.parametrize(
    "options", [{}, {"optimizer": "sgd", "lr": 0.03}, {"hidden": 256, "epochs": 20, "lr": 0.001}]
)
def test_healthy_run_has_no_finding(fit, options):
    assert fit(**options).findings() == {}


def test_large_network_on_sixty_images_overfits(fit):
    found = fit(60, hidden=256, epochs=60).findings()
    assert set(found) == {"overfitting"}
    evidence = found["overfitting"].evidence
    assert evidence["train_accuracy"] == 1.0
    assert evidence["gap"] == pytest.approx(1.0 - evidence["val_accuracy"])
    assert evidence["gap"] > 3 * evidence["standard_error"]
    assert "100.0% right in training" in found["overfitting"].text


def test_gap_that_may_be_chance_is_no_overfitting(fit):
    patient = fit(60, hidden=256, epochs=60)
    patient.provenance["dataset"]["num_val"] = 15  # 84 % of 15 images: a standard error of 9 points
    assert patient.curves() == {}


def test_two_hidden_units_underfit_and_a_larger_network_is_the_advice(fit):
    found = fit(hidden=2, epochs=30, lr=0.02).findings()
    assert set(found) == {"underfitting"}
    assert "has stopped falling" in found["underfitting"].text
    assert "larger network" in found["underfitting"].advice[0]


def test_two_epochs_underfit_and_more_epochs_are_the_advice(fit):
    found = fit(300, hidden=32, epochs=2).findings()
    assert set(found) == {"underfitting"}
    assert found["underfitting"].evidence["loss_fall_per_epoch"] > 0.05
    assert found["underfitting"].advice == ("--epochs 6",)


@pytest.mark.parametrize(("optimizer", "lr"), [("adam", 0.5), ("sgd", 0.7), ("sgd", 1.5)])
def test_rate_that_does_not_settle_or_blows_up_is_too_high(fit, optimizer, lr):
    found = fit(optimizer=optimizer, lr=lr).findings()
    assert set(found) == {"learning_rate_too_high"}
    assert found["learning_rate_too_high"].advice[0] == f"--optimizer.lr {lr / 10:.2g}"


@pytest.mark.parametrize(
    ("mix", "found"),
    [
        ({"mixup_alpha": 0.0, "cutmix_alpha": 0.0}, ["learning_rate_too_high"]),
        ({"mixup_alpha": 0.2, "cutmix_alpha": 0.0}, []),
        ({"mixup_alpha": 0.0, "cutmix_alpha": 1.0}, []),
    ],
)
def test_training_accuracy_of_mixed_images_may_drop_at_a_good_rate(mix, found):
    train_accuracies = (0.5, 0.6, 0.7, 0.72, 0.74, 0.62, 0.75, 0.64, 0.76)
    history = [
        {
            "train_loss": 2.0 - accuracy,
            "train_accuracy": accuracy,
            "val_loss": 0.5,
            "val_accuracy": 0.5 + epoch / 20,
            "learning_rate": 0.05,
        }
        for epoch, accuracy in enumerate(train_accuracies)
    ]
    provenance = {
        "history": history,
        "dataset": {"class_counts": [100] * 10, "num_val": 400},
        "settings": {"mix": mix},
    }
    findings = diagnose(read_run(provenance, classes=CLASSES))
    assert [finding.name for finding in findings] == found


@pytest.mark.parametrize(("optimizer", "lr"), [("adam", 2e-5), ("sgd", 1e-4)])
def test_rate_at_which_the_loss_crawls_in_a_line_is_too_low(fit, optimizer, lr):
    found = fit(optimizer=optimizer, lr=lr).findings()
    assert set(found) == {"learning_rate_too_low"}
    assert 0 < found["learning_rate_too_low"].evidence["loss_fall_per_epoch"] < 0.05
    assert found["learning_rate_too_low"].advice == (f"--optimizer.lr {lr * 10:.2g}",)


@pytest.fixture(scope="module")
def long_tailed(digits: Split) -> Patient:
    """Trained and validated on a long tail, tested on classes of equal size."""
    counts = [100, 90, 80, 60, 50, 40, 30, 3, 2, 2]
    training = long_tail(part(digits, 0, 1000), counts)
    val = long_tail(part(digits, 1000, 1400), [count * 2 // 5 for count in counts])
    return train(training, val, part(digits, 1400, 1797))


def test_imbalance_is_found_with_the_classes_that_it_harms(long_tailed):
    assert long_tailed.curves() == {}  # the rare classes do not show in accuracies
    found = long_tailed.findings()
    assert set(found) == {"imbalance"}
    evidence = found["imbalance"].evidence
    assert set(evidence["classes"]) == {"digit 7", "digit 8", "digit 9"}
    assert max(evidence["recall"]) < evidence["recall_of_frequent_classes"] - 0.1
    assert "digit 9 (recall" in found["imbalance"].text


def test_rare_classes_that_are_learned_are_no_finding(digits):
    training = long_tail(part(digits, 0, 1000), [10, 100, 90, 90, 90, 90, 90, 90, 90, 90])
    test = part(digits, 1400, 1797)
    assert "imbalance" not in train(training, part(digits, 1000, 1400), test).findings()


@pytest.fixture(scope="module")
def mislabelled(digits: Split) -> Patient:
    """A fifth of all labels are wrong, and the network is large enough to learn them by heart."""
    bounds = [(0, 600), (600, 1400), (1400, 1797)]
    splits = [
        mislabel(part(digits, *bound), fraction=0.2, seed=seed) for seed, bound in enumerate(bounds)
    ]
    return train(*splits, hidden=256, epochs=30, lr=0.01)


def test_wrong_labels_are_suspected_where_sure_predictions_contradict_them(mislabelled):
    evidence = mislabelled.findings()["label_noise"].evidence
    assert 0.12 < evidence["error_of_surer_half"] < 0.28  # a fifth are wrong
    assert 0.12 < evidence["contradicted_fraction"] < 0.28
    assert sum(pair["samples"] for pair in evidence["pairs"]) <= evidence["contradicted_labels"]


def test_wrong_labels_are_suspected_from_the_curves_when_learning_them_costs_accuracy(mislabelled):
    found = mislabelled.curves()
    assert set(found) == {"overfitting", "label_noise"}
    evidence = found["label_noise"].evidence
    assert evidence["lost"] > 3 * evidence["standard_error"]
    assert evidence["train_accuracy"] > evidence["train_accuracy_at_peak"] + 0.05


def test_bundle_that_tells_nothing_of_its_training_is_judged_by_its_predictions(mislabelled):
    for provenance in ({}, {"history": [], "dataset": "elsewhere"}, {"history": [1], "dataset": 2}):
        assert read_run(provenance, classes=CLASSES) is None
    per_class = compute_metrics(mislabelled.predictions, classes=CLASSES).per_class
    found = diagnose(None, per_class=per_class, predictions=mislabelled.predictions)
    assert [finding.name for finding in found] == ["label_noise"]


def test_run_without_validation_is_read_as_far_as_it_goes(fit):
    patient = fit(lr=2e-5)
    patient.provenance["dataset"]["num_val"] = 0
    for epoch in patient.provenance["history"]:
        epoch |= {"val_loss": None, "val_accuracy": None}
    assert set(patient.curves()) == {"learning_rate_too_low"}


def test_every_setting_that_is_advised_exists(fit, mislabelled, long_tailed):
    patients = [fit(60, hidden=256, epochs=60), fit(lr=0.5), fit(lr=2e-5), mislabelled, long_tailed]
    findings = [finding for patient in patients for finding in patient.findings().values()]
    flags = set(re.findall(r"--([a-z_.]+)", " ".join(" ".join(f.advice) for f in findings)))
    assert {"optimizer.lr", "augment.policy", "imbalance.method", "epochs"} <= flags
    for flag in flags:
        section, _, name = flag.partition(".")
        field = TrainSettings.model_fields[section]
        assert not name or name in field.annotation.model_fields, flag


def test_fast_fall_that_ends_too_early_is_no_low_rate():
    losses = [2.3, 2.0, 1.7, 1.4, 1.1]  # in a line, by 13 % an epoch and more
    history = [
        {"train_loss": loss, "train_accuracy": 0.6, "val_loss": loss, "val_accuracy": 0.6}
        for loss in losses
    ]
    provenance = {
        "history": [{**epoch, "learning_rate": 0.001} for epoch in history],
        "dataset": {"class_counts": [100] * 10, "num_val": 400},
    }
    found = diagnose(read_run(provenance, classes=CLASSES))
    assert [(finding.name, finding.advice) for finding in found] == [
        ("underfitting", ("--epochs 15",))
    ]


def test_few_wrong_labels_are_no_finding(make_predictions):
    rows = [(str(n), 0, int(n % 250 == 0), 0.95, 0.05, 0) for n in range(1000)]  # 0.4 %
    predictions = make_predictions(rows)
    per_class = compute_metrics(predictions, classes=CLASSES).per_class
    assert diagnose(None, per_class=per_class, predictions=predictions) == []


def test_mistakes_on_harmed_classes_are_no_label_noise(make_predictions):
    frequent = [(f"a{n}", n % 2, n % 2, 0.9, 0.1, 0) for n in range(100)]
    rare = [(f"b{n}", 2, 0, 0.95, 5.0, 1) for n in range(30)]
    predictions = make_predictions(frequent + rare)
    run = TrainingRun(history=(), class_counts={"cat": 500, "dog": 400, "owl": 5}, num_val=0)
    per_class = compute_metrics(predictions, classes=["cat", "dog", "owl"]).per_class
    found = diagnose(run, per_class=per_class, predictions=predictions)
    assert [finding.name for finding in found] == ["imbalance"]
    assert found[0].evidence["classes"] == ["owl"]


def test_findings_are_json(mislabelled, long_tailed):
    for patient in (mislabelled, long_tailed):
        for finding in [*patient.findings().values(), *patient.curves().values()]:
            document = finding.to_dict()
            assert json.loads(json.dumps(document, allow_nan=False)) == document


def test_standard_error_is_binomial_and_never_zero():
    assert standard_error(0.5, 396) == pytest.approx(0.025)  # sqrt(0.25 / 400)
    assert standard_error(1.0, 96) == pytest.approx(np.sqrt(0.98 * 0.02 / 100))
