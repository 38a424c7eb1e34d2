import json
import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.nn import functional
from torchmetrics.functional.classification import (
    binary_calibration_error,
    multiclass_confusion_matrix,
    multiclass_f1_score,
)

from cnnray.errors import DataError
from cnnray.evaluation.metrics import (
    UNPREDICTED,
    UNRANKED,
    compute_metrics,
    predictions_from_logits,
    worst_mistakes,
)
from cnnray.schema import PREDICTIONS_SCHEMA

CLASSES = ["cat", "dog", "fox", "owl"]
SIX_ROWS = [
    # key, label, prediction, confidence, loss, label_rank
    ("a", 0, 0, 0.9, 0.1, 0),
    ("b", 0, 0, 0.8, 0.2, 0),
    ("c", 0, 1, 0.7, 1.2, 1),
    ("d", 1, 1, 0.6, 0.5, 0),
    ("e", 1, 0, 0.9, 2.0, 5),  # the only label outside of the top five
    ("f", 1, 3, 0.7, 2.0, 3),  # there is no owl, but one prediction of it; no fox at all
]


def random_table(*, num_samples, num_classes, seed=0):
    random = np.random.default_rng(seed)
    label = random.integers(0, num_classes, num_samples)
    is_right = random.random(num_samples) < 0.6
    prediction = np.where(is_right, label, random.integers(0, num_classes, num_samples))
    columns = [
        pa.array([f"k{i}" for i in range(num_samples)]),
        pa.array(label, pa.int32()),
        pa.array(prediction, pa.int32()),
        pa.array(random.random(num_samples).astype(np.float32)),
        pa.array(random.exponential(size=num_samples).astype(np.float32)),
        pa.array(np.where(label == prediction, 0, random.integers(1, 20, num_samples)), pa.int32()),
    ]
    return pa.table(columns, schema=PREDICTIONS_SCHEMA)


def test_headline_numbers_of_six_samples(make_predictions):
    metrics = compute_metrics(make_predictions(SIX_ROWS), classes=CLASSES)
    assert metrics.samples == 6
    assert metrics.loss == pytest.approx(1.0)  # (0.1 + 0.2 + 1.2 + 0.5 + 2.0 + 2.0) / 6
    assert metrics.accuracy == 3 / 6  # a, b, d
    assert metrics.top5_accuracy == 5 / 6  # all but e
    assert metrics.balanced_accuracy == pytest.approx(1 / 2)  # cat 2/3, dog 1/3
    # cat: 2 * 2 / (3 + 3), dog: 2 * 1 / (3 + 2), owl: 0 / (0 + 1); fox has none
    assert metrics.macro_f1 == pytest.approx((4 / 6 + 2 / 5 + 0) / 3)
    # Bins of 1/15: {a, e} 0.9 -> 1/2 right; {b} 0.8 -> 1; {c, f} 0.7 -> 0; {d} 0.6 -> 1.
    # 0.8 and 0.6 sit on edges in decimals; as float32 both are just above, alone in their bins.
    assert metrics.ece == pytest.approx((2 * 0.4 + 1 * 0.2 + 2 * 0.7 + 1 * 0.4) / 6)


def test_confusion_rows_are_labels(make_predictions):
    metrics = compute_metrics(make_predictions(SIX_ROWS), classes=CLASSES)
    assert metrics.confusion.dtype == np.int64
    assert metrics.confusion.tolist() == [[2, 1, 0, 0], [1, 1, 0, 1], [0] * 4, [0] * 4]


def test_class_without_samples_or_predictions_has_none(make_predictions):
    cat, dog, fox, owl = compute_metrics(make_predictions(SIX_ROWS), classes=CLASSES).per_class
    assert cat == {"label": "cat", "support": 3, "precision": 2 / 3, "recall": 2 / 3, "f1": 4 / 6}
    assert dog == {"label": "dog", "support": 3, "precision": 1 / 2, "recall": 1 / 3, "f1": 2 / 5}
    assert fox == {"label": "fox", "support": 0, "precision": None, "recall": None, "f1": None}
    assert owl == {"label": "owl", "support": 0, "precision": 0.0, "recall": None, "f1": 0.0}


def test_class_never_predicted_has_no_precision(make_predictions):
    metrics = compute_metrics(make_predictions([("a", 0, 1, 0.9, 1.0, 1)]), classes=["cat", "dog"])
    assert metrics.per_class[0] == {
        "label": "cat",
        "support": 1,
        "precision": None,
        "recall": 0.0,
        "f1": 0.0,
    }


def test_metrics_equal_naive_loops():
    table = random_table(num_samples=500, num_classes=7)
    metrics = compute_metrics(table, classes=list("abcdefg"))
    rows = table.to_pylist()
    recalls, f1s = [], []
    for index, row in enumerate(metrics.per_class):
        labelled = [r for r in rows if r["label"] == index]
        predicted = [r for r in rows if r["prediction"] == index]
        right = sum(r["prediction"] == index for r in labelled)
        precision, recall = right / len(predicted), right / len(labelled)
        assert (row["support"], row["precision"], row["recall"]) == (
            len(labelled),
            precision,
            recall,
        )
        recalls.append(recall)
        f1s.append(2 * precision * recall / (precision + recall))
    assert metrics.accuracy == np.mean([r["label"] == r["prediction"] for r in rows])
    assert metrics.top5_accuracy == np.mean([r["label_rank"] < 5 for r in rows])
    assert metrics.loss == pytest.approx(np.mean([r["loss"] for r in rows]), rel=1e-12)
    assert metrics.balanced_accuracy == pytest.approx(np.mean(recalls), rel=1e-12)
    assert metrics.macro_f1 == pytest.approx(np.mean(f1s), rel=1e-12)


def test_metrics_equal_torchmetrics():
    table = random_table(num_samples=2000, num_classes=5, seed=1)
    label, prediction = (torch.tensor(table[name].to_numpy()) for name in ("label", "prediction"))
    confidence = torch.tensor(table["confidence"].to_numpy()).double()
    metrics = compute_metrics(table, classes=list("abcde"))
    expected = multiclass_confusion_matrix(prediction, label, num_classes=5)
    assert metrics.confusion.tolist() == expected.tolist()
    f1 = multiclass_f1_score(prediction, label, num_classes=5, average="macro")
    assert metrics.macro_f1 == pytest.approx(f1.item(), rel=1e-6)
    ece = binary_calibration_error(confidence, (label == prediction).int(), n_bins=15)
    assert metrics.ece == pytest.approx(ece.item(), rel=1e-9)


def test_ece_of_a_calibrated_model_is_zero(make_predictions):
    rows = [(f"k{i}", 0, int(i >= 7), 0.7, 1.0, 0) for i in range(10)]  # 7 of 10 right at 70%
    metrics = compute_metrics(make_predictions(rows), classes=["cat", "dog"])
    assert metrics.ece == pytest.approx(0, abs=1e-7)


def test_ece_of_an_overconfident_model_is_its_excess(make_predictions):
    rows = [(f"k{i}", 0, i % 2, 1.0, 1.0, 0) for i in range(10)]  # half are right, all are sure
    metrics = compute_metrics(make_predictions(rows), classes=["cat", "dog"])
    assert metrics.ece == 0.5
    assert [row["samples"] for row in metrics.calibration] == [0] * 14 + [10]


def test_confidence_of_one_shares_the_last_bin(make_predictions):
    rows = [("a", 0, 0, 1.0, 0.0, 0), ("b", 0, 1, 0.99, 3.0, 1)]
    metrics = compute_metrics(make_predictions(rows), classes=["cat", "dog"])
    assert metrics.ece == pytest.approx(abs(0.5 - (1.0 + 0.99) / 2))  # one bin, not two


def test_to_dict_is_strict_json_even_with_a_diverged_loss(make_predictions):
    rows = [*SIX_ROWS, ("g", 2, UNPREDICTED, 0.0, math.nan, UNRANKED)]
    metrics = compute_metrics(make_predictions(rows), classes=CLASSES)
    document = json.loads(json.dumps(metrics.to_dict(), allow_nan=False))
    assert document["loss"] is None
    assert document["samples"] == 7
    assert document["confusion"][0] == [2, 1, 0, 0]
    assert document["per_class"][2]["recall"] == 0.0


def test_sample_without_prediction_is_wrong_and_in_no_cell(make_predictions):
    rows = [("a", 0, 0, 0.9, 0.1, 0), ("b", 0, UNPREDICTED, 0.0, math.nan, UNRANKED)]
    metrics = compute_metrics(make_predictions(rows), classes=["cat"])
    assert metrics.accuracy == metrics.top5_accuracy == metrics.balanced_accuracy == 0.5
    assert metrics.confusion.tolist() == [[1]]
    assert metrics.per_class[0]["support"] == 2


def test_empty_table_is_refused():
    with pytest.raises(DataError, match="empty"):
        compute_metrics(PREDICTIONS_SCHEMA.empty_table(), classes=CLASSES)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("a", 4, 0, 0.9, 0.1, 0), "label 4 in row 1"),
        (("a", -1, 0, 0.9, 0.1, 0), "label -1 in row 1"),
        (("a", 0, 4, 0.9, 0.1, 0), "prediction 4 in row 1"),
        (("a", 0, 0, math.nan, 0.1, 0), "confidence nan in row 1"),
        (("a", 0, 0, 1.5, 0.1, 0), "confidence 1.5 in row 1"),
    ],
)
def test_values_out_of_range_are_refused(make_predictions, row, message):
    with pytest.raises(DataError, match=message):
        compute_metrics(make_predictions([SIX_ROWS[0], row]), classes=CLASSES)


def test_worst_mistakes_come_by_confidence_then_key(make_predictions):
    rows = [("z", 0, 1, 0.7, 1.0, 1), *SIX_ROWS, ("n", 0, UNPREDICTED, 0.0, math.nan, UNRANKED)]
    worst = worst_mistakes(make_predictions(rows), count=3)
    assert worst["key"].to_pylist() == ["e", "c", "f"]  # 0.9, then c, f, z with 0.7
    assert worst.schema == PREDICTIONS_SCHEMA
    assert worst_mistakes(make_predictions(rows))["key"].to_pylist() == ["e", "c", "f", "z"]


def test_predictions_agree_with_torch():
    logits = torch.randn(64, 10, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(64) % 10
    table = predictions_from_logits(keys=[f"k{i}" for i in range(64)], labels=labels, logits=logits)
    assert table.schema == PREDICTIONS_SCHEMA
    assert table["key"].to_pylist()[:2] == ["k0", "k1"]
    assert table["label"].to_pylist() == labels.tolist()
    assert table["prediction"].to_pylist() == logits.argmax(dim=1).tolist()
    expected = functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(torch.tensor(table["loss"].to_numpy()), expected)
    probs = logits.softmax(dim=1)
    torch.testing.assert_close(torch.tensor(table["confidence"].to_numpy()), probs.amax(dim=1))
    order = logits.argsort(dim=1, descending=True)
    assert table["label_rank"].to_pylist() == (order == labels[:, None]).int().argmax(1).tolist()


def test_tied_logits_rank_like_argmax():
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0]] * 4)  # argmax says 1
    table = predictions_from_logits(keys=list("abcd"), labels=torch.arange(4), logits=logits)
    assert table["prediction"].to_pylist() == [1, 1, 1, 1]
    assert table["label_rank"].to_pylist() == [3, 0, 1, 2]


@pytest.mark.parametrize("label", [0, 1, 2])
@pytest.mark.parametrize("bad", [[math.nan] * 3, [0.0, math.nan, 1.0], [math.inf, 0.0, 0.0]])
def test_undefined_logits_are_never_right(bad, label):
    table = predictions_from_logits(
        keys=["a"], labels=torch.tensor([label]), logits=torch.tensor([bad])
    )
    row = table.to_pylist()[0]
    assert (row["prediction"], row["confidence"], row["label_rank"]) == (UNPREDICTED, 0.0, UNRANKED)
    assert math.isnan(row["loss"])
    metrics = compute_metrics(table, classes=["cat", "dog", "fox"])
    assert metrics.accuracy == metrics.top5_accuracy == 0


def test_masked_class_keeps_the_others_predicted():
    table = predictions_from_logits(
        keys=["a"], labels=torch.tensor([1]), logits=torch.tensor([[-math.inf, 2.0, 1.0]])
    )
    assert table["prediction"].to_pylist() == [1]


def test_half_precision_is_raised_before_the_softmax():
    logits = torch.tensor([[8.0, 0.0]], dtype=torch.bfloat16)
    table = predictions_from_logits(keys=["a"], labels=torch.tensor([0]), logits=logits)
    assert table["loss"].to_pylist() == pytest.approx([math.log1p(math.exp(-8))], rel=1e-3)


def test_label_that_the_model_does_not_know_is_refused():
    with pytest.raises(DataError, match="label 3 in row 1 is not between 0 and 2"):
        predictions_from_logits(
            keys=["a", "b"], labels=torch.tensor([0, 3]), logits=torch.zeros(2, 3)
        )
