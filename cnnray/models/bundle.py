"""The bundle: all that a trained model needs to label images, in two files and without pickle.

``model.safetensors`` holds float32 weights with the normalisation, ``model.json`` everything else.
``model.json`` is written last: a folder without it is no bundle. A bundle's digest names the
model in every row it labels, and covers whatever changes a prediction.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import safetensors.torch
import torch
from torch import Tensor

from cnnray.errors import CnnrayError, MissingObjectError, ModelError, StorageError
from cnnray.images.transforms import Preprocessing
from cnnray.models.classifier import Classifier
from cnnray.models.registry import build_model, check_arguments, head_name
from cnnray.models.weights import check_finite, check_tensors, read_tensors
from cnnray.schema import BUNDLE_KEY, BUNDLE_VERSION
from cnnray.storage import Store, encode_json, read_json, sha256

WEIGHTS_KEY = "model.safetensors"
DOCUMENT_KEY = BUNDLE_KEY

T = TypeVar("T")


@dataclass(frozen=True)
class BundleSpec:
    """What a bundle says of its model.

    ``architecture`` and ``arguments`` are ``build_model``'s; ``classes`` are the K names in the
    order of the logits; probs are softmax(logits / ``temperature``).
    """

    architecture: str
    arguments: dict[str, Any]
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    temperature: float = 1.0
    metrics: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Bundle:
    """A loaded bundle: the model in eval mode, what it is, and its digest (SHA-256, hex)."""

    model: Classifier
    spec: BundleSpec
    digest: str


def save_bundle(store: Store, model: Classifier, spec: BundleSpec) -> str:
    """Write the bundle and return its digest.

    Raises ``ModelError`` for weights that are NaN or infinite and for a spec that does not describe
    the model, ``AlreadyExistsError`` when another bundle is there.
    """
    tensors = {name: _portable(tensor) for name, tensor in model.state_dict().items()}
    check_finite(tensors, source="the model")
    weights = safetensors.torch.save(tensors)
    document = _document(spec, weights_sha256=sha256(weights))
    parsed, weights_sha256 = _parse(json.loads(document), source="the bundle's spec")
    _check_describes(parsed, model)
    store.create(WEIGHTS_KEY, weights)
    store.create(DOCUMENT_KEY, document)
    return _digest(parsed, weights_sha256)


def delete_bundle(store: Store) -> None:
    """Remove a bundle, its document first: without it there is none."""
    for key in (DOCUMENT_KEY, WEIGHTS_KEY):
        store.delete(key)


class StoredBundle:
    """A bundle whose files are whole; its network is built when it is asked for, once."""

    def __init__(self, spec: BundleSpec, digest: str, *, weights: bytes, source: str) -> None:
        self.spec = spec
        self.digest = digest
        self._weights = weights
        self._source = source
        self._loaded: Bundle | None = None

    def load(self) -> Bundle:
        """Bit for bit what was saved. Raises ``ModelError`` for weights that do not fit."""
        if self._loaded is None:
            tensors = read_tensors(self._weights, source=self._source)
            model = _build(self.spec)
            check_tensors(tensors, model.state_dict(), source=self._source)
            check_finite(tensors, source=self._source)
            model.load_state_dict(tensors, strict=False)  # only num_batches_tracked may be missing
            _check_describes(self.spec, model)
            self._loaded = Bundle(model=model.eval(), spec=self.spec, digest=self.digest)
            self._weights = b""
        return self._loaded


def open_bundle(store: Store) -> StoredBundle:
    """Read a bundle's files, without the seconds that libraries of networks take to import.

    Raises ``ModelError`` when there is none, and when it is not what was saved.
    """
    spec, weights_sha256 = _read(store)
    source = f"{store.uri}/{WEIGHTS_KEY}"
    try:
        weights = store.read(WEIGHTS_KEY)
    except MissingObjectError as error:
        raise ModelError(f"the bundle has no weights: {source}") from error
    if sha256(weights) != weights_sha256:
        raise ModelError(
            f"{source} is not the file that {DOCUMENT_KEY} describes: its digest differs",
            hint="copy the bundle again, both files together",
        )
    digest = _digest(spec, weights_sha256)
    return StoredBundle(spec, digest, weights=weights, source=source)


def load_bundle(store: Store) -> Bundle:
    """Read a bundle back, bit for bit. Raises ``ModelError`` when anything does not fit."""
    return open_bundle(store).load()


def read_bundle_spec(store: Store) -> BundleSpec:
    """Read what a bundle says of its model, without its weights. Raises ``ModelError``."""
    return _read(store)[0]


def _build(spec: BundleSpec) -> Classifier:
    preprocessing, num_classes = spec.preprocessing, len(spec.classes)
    backbone = build_model(
        spec.architecture,
        num_classes=num_classes,
        channels=preprocessing.channels,
        image_size=preprocessing.size,
        **spec.arguments,
    )
    return Classifier(
        backbone,
        mean=preprocessing.mean,
        std=preprocessing.std,
        head=head_name(backbone, num_classes),
    )


def _portable(tensor: Tensor) -> Tensor:
    """A copy that shares no memory: float32 on the CPU; whole numbers keep their type."""
    tensor = tensor.detach().to("cpu", copy=True).contiguous()
    return tensor.float() if tensor.is_floating_point() else tensor


def _check_describes(spec: BundleSpec, model: Classifier) -> None:
    """Catch a spec that could not be loaded, or would normalise otherwise than the model does."""
    head_name(model.backbone, len(spec.classes))
    for name in ("mean", "std"):
        said = torch.tensor(getattr(spec.preprocessing, name), dtype=torch.float32)
        if not torch.equal(said, getattr(model.normalize, name).detach().cpu().flatten()):
            raise ModelError(f"the preprocessing's {name} is not the one that the model applies")


def _document(spec: BundleSpec, *, weights_sha256: str) -> bytes:
    value = {
        "schema_version": BUNDLE_VERSION,
        "architecture": {"name": spec.architecture, "arguments": spec.arguments},
        "classes": list(spec.classes),
        "preprocessing": spec.preprocessing.to_dict(),
        "temperature": spec.temperature,
        "metrics": spec.metrics,
        "provenance": spec.provenance,
        "weights_sha256": weights_sha256,
    }
    try:
        return encode_json(value)
    except (TypeError, ValueError) as error:  # an object, a NaN or a lone surrogate
        raise ModelError(f"the bundle's spec is not JSON: {error}") from error


def _digest(spec: BundleSpec, weights_sha256: str) -> str:
    """SHA-256 of the weights' digest and of everything in the spec that changes predictions."""
    identity = {
        "weights_sha256": weights_sha256,
        "architecture": [spec.architecture, spec.arguments],
        "classes": list(spec.classes),
        "preprocessing": spec.preprocessing.to_dict(),
        "temperature": spec.temperature,
    }
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _read(store: Store) -> tuple[BundleSpec, str]:
    try:
        document = read_json(store, DOCUMENT_KEY)
    except MissingObjectError as error:
        raise ModelError(
            f"no bundle at {store.uri}", hint=f"name the folder that holds {DOCUMENT_KEY}"
        ) from error
    except (StorageError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"cannot read the bundle at {store.uri}: {reason}") from error
    return _parse(document, source=f"{store.uri}/{DOCUMENT_KEY}")


def _parse(document: Any, *, source: str) -> tuple[BundleSpec, str]:
    """The spec and the weights' digest; ``ModelError`` names the first field that is wrong."""
    if not isinstance(document, dict):
        raise ModelError(f"{source}: expected an object")
    version = document.get("schema_version")
    if type(version) is not int or version != BUNDLE_VERSION:
        raise ModelError(
            f"{source}: schema_version {str(version)[:20]} is not supported",
            hint=f"this cnnray reads version {BUNDLE_VERSION}",
        )

    def read(name: str, parse: Callable[[Any], T]) -> T:
        try:
            return parse(document[name])
        except KeyError as error:
            raise ModelError(f"{source}: {name} is missing or incomplete") from error
        except (TypeError, ValueError, OverflowError, CnnrayError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ModelError(f"{source}: {name} is malformed: {reason}") from error

    name, arguments = read("architecture", _parse_architecture)
    spec = BundleSpec(
        architecture=name,
        arguments=arguments,
        classes=read("classes", _parse_classes),
        preprocessing=read("preprocessing", _parse_preprocessing),
        temperature=read("temperature", _parse_temperature),
        metrics=read("metrics", _parse_object),
        provenance=read("provenance", _parse_object),
    )
    return spec, read("weights_sha256", _parse_text)


def _parse_architecture(value: Any) -> tuple[str, dict[str, Any]]:
    architecture = _parse_object(value)
    arguments = _parse_object(architecture["arguments"])
    check_arguments(arguments)
    for name, argument in arguments.items():
        if not isinstance(argument, str | int | float | None):
            raise TypeError(f"argument {name!r} must be text, a number, true, false or null")
    return _parse_text(architecture["name"]), arguments


def _parse_classes(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError("expected a list of names")
    classes = tuple(_parse_text(name) for name in value)
    if len(set(classes)) != len(classes):
        raise ValueError("a name appears twice")
    return classes


def _parse_preprocessing(value: Any) -> Preprocessing:
    return Preprocessing.from_dict(_parse_object(value))


def _parse_temperature(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError("expected a number")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"expected a positive number, got {value}")
    return float(value)


def _parse_object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError("expected an object")
    return value


def _parse_text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("expected text")
    value.encode()  # a lone surrogate cannot be written to a table later
    return value
