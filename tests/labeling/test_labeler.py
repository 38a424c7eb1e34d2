"""Labelling: one row an image whatever its bytes, and the same numbers as in training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
import torch

from cnnray.errors import (
    MAX_ERROR_DETAIL,
    AccessDeniedError,
    ChangedObjectError,
    MissingObjectError,
    StorageError,
    UnavailableError,
)
from cnnray.images.augment import TrainTransform
from cnnray.images.transforms import EvalTransform
from cnnray.labeling.decoding import Sample, SampleDecoder
from cnnray.labeling.labeler import Labeler
from cnnray.labeling.prediction import Predictor
from cnnray.models.bundle import Bundle
from cnnray.models.classifier import Classifier
from cnnray.models.engines import EagerEngine
from cnnray.options import Augmentation, DecodeLimits
from cnnray.schema import LABELS_SCHEMA, labels_schema

MakeBundle = Callable[..., Bundle]
Photo = Callable[[int], bytes]

POISON = Path(__file__).parents[1] / "images" / "poison"


def labeler(bundle: Bundle, **changes: Any) -> Labeler:
    options = {"top_k": 3, "batch_size": 4, "embeddings": False} | changes
    top_k, batch_size, embeddings = (
        options.pop(name) for name in ("top_k", "batch_size", "embeddings")
    )
    engine = EagerEngine(bundle.model, device=torch.device("cpu"), embeddings=embeddings)
    return Labeler(
        SampleDecoder(bundle.spec.preprocessing, **options),
        Predictor(engine, bundle.spec, digest=bundle.digest, top_k=top_k, batch_size=batch_size),
    )


def sample(key: str, data: bytes | StorageError) -> Sample:
    return Sample(key, f"etag of {key}", data)


def test_there_is_one_row_an_image_in_their_order(make_bundle: MakeBundle, photo: Photo) -> None:
    bundle = make_bundle()
    samples = [sample(f"k{n}", photo(n)) for n in range(11)]
    rows = labeler(bundle).label(iter(samples))
    rows.validate(full=True)
    assert rows.schema.equals(LABELS_SCHEMA)
    assert rows["key"].to_pylist() == [f"k{n}" for n in range(11)]
    assert rows["etag"].to_pylist() == [f"etag of k{n}" for n in range(11)]
    assert set(rows["model"].to_pylist()) == {bundle.digest}
    assert set(rows["status"].to_pylist()) == {"ok"}
    assert rows["error_code"].null_count == rows["error_detail"].null_count == 11
    assert set(zip(rows["width"].to_pylist(), rows["height"].to_pylist(), strict=True)) == {
        (20, 16)
    }


def test_no_image_is_no_row(make_bundle: MakeBundle) -> None:
    assert labeler(make_bundle()).label([]).equals(LABELS_SCHEMA.empty_table())
    empty = labeler(make_bundle(), embeddings=True).label([])
    assert (empty.num_rows, empty.schema) == (0, labels_schema(embeddings=True))


def test_what_cannot_be_labelled_is_a_row_with_its_code(
    make_bundle: MakeBundle, photo: Photo
) -> None:
    samples = [
        sample("empty", b""),
        sample("good", photo(1)),
        sample("text", b"hello, world"),
        sample("cut", photo(2)[:-30]),
        sample("gone", MissingObjectError("no such file: x")),
        sample("replaced", ChangedObjectError("it is another one now: x")),
        sample("unreadable", StorageError("wrong checksum " + "x" * 1000)),
        sample("large", photo(3)),
    ]
    samples[-1] = sample("large", photo(3) * 100)
    rows = labeler(make_bundle(), limits=DecodeLimits(max_bytes=50_000)).label(samples).to_pylist()
    assert {row["key"]: row["error_code"] for row in rows} == {
        "empty": "empty",
        "good": None,
        "text": "not_image",
        "cut": "truncated",
        "gone": "missing",
        "replaced": "changed",
        "unreadable": "read_failed",
        "large": "too_large",
    }
    for row in rows:
        assert (row["status"] == "ok") == (row["key"] == "good")
        if row["status"] == "error":
            assert len(row["error_detail"]) <= MAX_ERROR_DETAIL
            nothing = ("label", "label_index", "confidence", "top_k", "width", "height")
            assert [row[name] for name in nothing] == [None] * 6


def test_a_batch_of_bad_images_alone_is_rows_too(make_bundle: MakeBundle) -> None:
    rows = labeler(make_bundle(), embeddings=True).label([sample(f"{n}", b"") for n in range(9)])
    assert rows["status"].to_pylist() == ["error"] * 9
    assert rows["embedding"].null_count == 9


def test_the_same_image_gets_the_same_row_among_others(
    make_bundle: MakeBundle, photo: Photo
) -> None:
    bundle = make_bundle()
    alone = labeler(bundle).label([sample("k", photo(1))]).to_pylist()[0]
    others = [sample("a", b""), sample("b", photo(2)), sample("k", photo(1)), sample("c", photo(3))]
    among = labeler(bundle).label(others).to_pylist()[2]
    assert among["label"] == alone["label"]
    assert among["confidence"] == pytest.approx(alone["confidence"], abs=1e-6)


@pytest.mark.parametrize(("top_k", "kept"), [(1, 1), (3, 3), (4, 4), (50, 4)])
def test_top_k_is_sorted_and_begins_with_the_label(
    make_bundle: MakeBundle, photo: Photo, top_k: int, kept: int
) -> None:
    bundle = make_bundle()
    rows = labeler(bundle, top_k=top_k).label([sample(f"{n}", photo(n)) for n in range(6)])
    for row in rows.to_pylist():
        probabilities = [item["probability"] for item in row["top_k"]]
        assert len(probabilities) == len({item["label"] for item in row["top_k"]}) == kept
        assert probabilities == sorted(probabilities, reverse=True)
        assert sum(probabilities) <= 1 + 1e-6
        assert row["confidence"] == probabilities[0]
        assert row["label"] == row["top_k"][0]["label"]
        assert bundle.spec.classes[row["label_index"]] == row["label"]


def test_embeddings_are_the_heads_input_as_float16(
    make_bundle: MakeBundle, photo: Photo, classifier: Classifier
) -> None:
    bundle = make_bundle()
    maker = labeler(bundle, embeddings=True)
    rows = maker.label([sample("a", photo(1)), sample("bad", b""), sample("b", photo(2))])
    assert {len(row) for row in rows["embedding"].to_pylist() if row is not None} == {64}
    assert rows.schema.equals(labels_schema(embeddings=True))
    assert rows.schema.field("embedding").type == pa.list_(pa.float16())
    transform = EvalTransform(bundle.spec.preprocessing)
    batch = torch.from_numpy(np.stack([transform(photo(1)), transform(photo(2))]))
    with torch.inference_mode():
        expected = classifier.embed(batch).half().numpy()
    found = rows["embedding"].to_pylist()
    assert found[1] is None
    np.testing.assert_allclose(np.array([found[0], found[2]]), expected, rtol=2e-3, atol=1e-3)


def test_embeddings_change_no_label(make_bundle: MakeBundle, photo: Photo) -> None:
    samples = [sample(f"{n}", photo(n)) for n in range(6)]
    plain = labeler(make_bundle()).label(samples)
    embedded = labeler(make_bundle(), embeddings=True).label(samples)
    assert embedded.drop_columns(["embedding"]).equals(plain)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_probabilities_are_of_the_logits_divided_by_the_temperature(
    make_bundle: MakeBundle, photo: Photo, classifier: Classifier, temperature: float
) -> None:
    bundle = make_bundle(temperature)
    batch = torch.from_numpy(EvalTransform(bundle.spec.preprocessing)(photo(1))[None])
    with torch.inference_mode():
        expected = torch.softmax(classifier(batch) / temperature, dim=1)[0].max().item()
    [row] = labeler(bundle).label([sample("k", photo(1))]).to_pylist()
    assert row["confidence"] == pytest.approx(expected, abs=1e-6)


def test_training_evaluation_and_labelling_see_the_same_pixels(
    make_bundle: MakeBundle, photo: Photo
) -> None:
    bundle = make_bundle()
    preprocessing = bundle.spec.preprocessing
    trained = TrainTransform(preprocessing, Augmentation(), seed=3)(photo(1), epoch=2, key="k")
    evaluated = EvalTransform(preprocessing)(photo(1))
    seen: list[torch.Tensor] = []
    bundle.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    labeler(bundle).label([sample("k", photo(1))])
    assert np.array_equal(trained, evaluated)
    assert np.array_equal(seen[0][0].numpy(), evaluated)
    assert (evaluated.shape, evaluated.dtype) == ((3, 12, 12), np.uint8)


def test_the_logits_survive_the_bundle(
    make_bundle: MakeBundle, photo: Photo, classifier: Classifier
) -> None:
    bundle = make_bundle()
    batch = torch.from_numpy(EvalTransform(bundle.spec.preprocessing)(photo(1))[None])
    with torch.inference_mode():
        assert torch.equal(bundle.model(batch), classifier(batch))


def test_samples_are_drawn_batch_by_batch(make_bundle: MakeBundle, photo: Photo) -> None:
    bundle = make_bundle()
    drawn = 0
    at_inference: list[int] = []
    bundle.model.register_forward_pre_hook(lambda *_: at_inference.append(drawn))

    def samples() -> Iterator[Sample]:
        nonlocal drawn
        for number in range(10):
            drawn += 1
            yield sample(f"{number}", photo(number))

    labeler(bundle, batch_size=4).label(samples())
    assert at_inference == [4, 8, 10]


@pytest.mark.parametrize("error", [UnavailableError("no answer"), AccessDeniedError("no right")])
def test_a_store_that_fails_is_no_row(
    make_bundle: MakeBundle, photo: Photo, error: StorageError
) -> None:
    samples = [sample("good", photo(1)), sample("unknown", error)]
    with pytest.raises(type(error)):
        labeler(make_bundle()).label(samples)


def test_careful_labelling_gives_the_same_rows(make_bundle: MakeBundle, photo: Photo) -> None:
    samples = [sample(f"{n}", photo(n)) for n in range(6)]
    samples[1:1] = [sample("empty", b""), sample("text", b"hello"), sample("cut", photo(7)[:-30])]
    samples += [sample("gone", MissingObjectError("x")), sample("large", photo(8) * 1000)]
    limits = DecodeLimits(max_bytes=50_000)
    fast = labeler(make_bundle(), limits=limits)
    with closing(labeler(make_bundle(), limits=limits, careful=True)) as careful:
        assert careful.label(samples).equals(fast.label(samples))


def test_poison_is_a_row_of_careful_labelling(
    make_bundle: MakeBundle, photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(POISON))
    samples = [
        sample("first", photo(1)),
        sample("crash", photo(2) + b"cnnray-poison:abort;"),
        sample("hang", photo(3) + b"cnnray-poison:spin;"),
        sample("hunger", photo(4) + b"cnnray-poison:huge;"),
        sample("last", photo(5)),
    ]
    with closing(labeler(make_bundle(), careful=True, decode_seconds=0.7)) as careful:
        rows = careful.label(samples).to_pylist()
    assert {row["key"]: row["error_code"] for row in rows} == {
        "first": None,
        "crash": "decoder_crash",
        "hang": "decoder_timeout",
        "hunger": "decoder_oom",
        "last": None,
    }
    [alone] = labeler(make_bundle()).label([samples[-1]]).to_pylist()
    assert rows[-1]["label"] == alone["label"]
    assert rows[-1]["confidence"] == pytest.approx(alone["confidence"], abs=1e-6)


def test_closing_leaves_no_process(make_bundle: MakeBundle, photo: Photo) -> None:
    before = set(psutil.Process().children())  # of other tests: servers, Ray
    careful = labeler(make_bundle(), careful=True)
    careful.label([sample("k", photo(1))])
    [decoder] = set(psutil.Process().children()) - before
    careful.close()
    assert not decoder.is_running()
    labeler(make_bundle()).close()
