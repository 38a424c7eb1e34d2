"""A backbone that is held still for the first epochs, while a new head finds its place."""

from __future__ import annotations

from cnnray.models.classifier import Classifier


class FrozenEpochs:
    """Holds the backbone of ``classifier`` still for its first ``epochs`` epochs.

    Its gradients are dropped rather than never computed: DDP settles which parameters it averages
    when it wraps the model. So these epochs cost as much as others. Its normalisation layers are
    in eval mode for as long.
    """

    def __init__(self, classifier: Classifier, *, epochs: int) -> None:
        self.classifier = classifier
        self.epochs = epochs
        head = f"backbone.{classifier.head}."
        self.parameters = [p for n, p in classifier.named_parameters() if not n.startswith(head)]

    def begin_epoch(self, epoch: int) -> None:
        """Before the model is put in train mode for a 0-based epoch."""
        self.classifier.frozen_backbone = epoch < self.epochs

    def drop_gradients(self) -> None:
        """After the backward pass: optimizers leave parameters without a gradient alone."""
        if self.classifier.frozen_backbone:
            for parameter in self.parameters:
                parameter.grad = None
