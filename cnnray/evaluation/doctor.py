"""What a training run suffers from, told from its numbers: findings, each with what to try next.

A finding is a rule that fired, with the numbers that made it fire; it is no proof. The rules are
few and cautious: an accuracy from n samples has a binomial standard error, and differences count
from three of them on, for one in 44 of all comparisons exceeds two by chance, one in 740 three.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
from pydantic import TypeAdapter

from cnnray.evaluation import fit_rules, prediction_rules, rate_rules
from cnnray.evaluation.findings import Finding, TrainingRun
from cnnray.evaluation.metrics import ClassMetrics


def read_run(provenance: Mapping[str, Any], *, classes: Sequence[str]) -> TrainingRun | None:
    """The run that a bundle's provenance tells of; None where it tells less than is needed."""
    try:
        dataset = provenance["dataset"]
        mix = provenance.get("settings", {}).get("mix", {})
        return TypeAdapter(TrainingRun).validate_python(
            {
                "history": provenance["history"],
                "class_counts": dict(zip(classes, dataset["class_counts"], strict=True)),
                "num_val": dataset["num_val"],
                "is_mixed": any(mix.get(name) for name in ("mixup_alpha", "cutmix_alpha")),
            }
        )
    except (AttributeError, KeyError, TypeError, ValueError):  # pydantic's are ValueErrors
        return None


def diagnose(
    run: TrainingRun | None,
    *,
    per_class: Sequence[ClassMetrics] = (),
    predictions: pa.Table | None = None,
) -> list[Finding]:
    """Apply every rule that there are numbers for; a healthy run has no finding.

    Args:
        run: how the model was trained; None when nobody knows.
        per_class: metrics of each class of the run, in the order of the classes.
        predictions: rows of ``PREDICTIONS_SCHEMA`` that the model was not trained on.
    """
    findings = [] if run is None else _read_curves(run)
    has_learned = all(finding.name in ("overfitting", "label_noise") for finding in findings)
    imbalance = None
    if run is not None:
        imbalance = prediction_rules.imbalance(run.class_counts, per_class)
    if imbalance is not None:
        findings.append(imbalance)
    if predictions is not None and has_learned:  # else it is the model that errs, not the labels
        harmed = () if imbalance is None else imbalance.evidence["classes"]
        noise = prediction_rules.label_noise(predictions, per_class, ignored=harmed)
        if noise is not None:  # it says more than the curves can
            findings = [finding for finding in findings if finding.name != "label_noise"]
            findings.append(noise)
    return findings


def _read_curves(run: TrainingRun) -> list[Finding]:
    """A wrong learning rate explains a bad fit, and what is not learned is not memorised."""
    if not run.history:
        return []
    rate = rate_rules.rate_too_high(run) or rate_rules.rate_too_low(run)
    if rate is not None:
        return [rate]
    overfitting = fit_rules.overfitting(run)
    underfitting = None if overfitting else fit_rules.underfitting(run)
    noise = None if underfitting else fit_rules.memorised_noise(run)
    return [finding for finding in (overfitting, underfitting, noise) if finding is not None]
