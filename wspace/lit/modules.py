"""What metanets are trained for: classification, prediction, editing."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wspace.errors import ZooError, message
from wspace.lit.data import column
from wspace.lit.metrics import (
    Paired,
    accuracy,
    kendall,
    mean,
    mean_target,
    r_squared,
    rank_loss,
    rmse,
)
from wspace.lit.task import Optimization, Task
from wspace.space import WeightSpace
from wspace.zoo import Zoo, ZooBatch
from wspace.zoo.images import decoded, dilated, grid

RESAMPLES = 1000


class Measured(Task):
    """Base of tasks that log metrics of all networks of a stage, in tests with intervals."""

    def measure(self, metrics: Mapping[str, Callable[..., Tensor]]) -> None:
        """Chooses the metrics; for a subclass's ``__init__``.

        Args:
            metrics: Functions such as `wspace.lit.metrics.kendall` by name.
        """
        self.val_metrics = Paired(dict(metrics))
        self.test_metrics = Paired(dict(metrics), resamples=RESAMPLES)

    def metrics_of(self, stage: str) -> Paired:
        """The metrics of validation or of tests."""
        return self.val_metrics if stage == "val" else self.test_metrics

    def on_validation_epoch_end(self) -> None:
        """Logs the metrics of all networks."""
        finish(self, "val", self.val_metrics)

    def on_test_epoch_end(self) -> None:
        """Logs the metrics of all networks, with intervals."""
        finish(self, "test", self.test_metrics)


class Classification(Measured):
    """Networks into classes, by cross entropy: the digit that an image network shows, say.

    Logs ``accuracy``, in tests with a 95 % interval.

    Args:
        metanet: See `Task`.
        options: Options of the metanet.
        target: Column of the zoo that holds the class, from 0.
        classes: Number of classes; None takes it from the zoo.
        smoothing: Share of the target that is spread over all classes (label smoothing).
        optimization: Optimiser and learning rate.
        statistics: See `Task`.
        trust: See `Task`.
        pretrained: See `Task`.
    """

    monitor = ("val/accuracy", "max")
    mixed_targets = True

    def __init__(
        self,
        metanet: str | nn.Module = "GraphMetanet",
        options: dict[str, Any] | None = None,
        *,
        target: str = "label",
        classes: int | None = None,
        smoothing: float = 0.0,
        optimization: Optimization = Optimization(),  # noqa: B008  (frozen)
        statistics: int = 1024,
        trust: Sequence[str] = (),
        pretrained: str | Path | None = None,
    ) -> None:
        own = {"target": target, "classes": classes, "smoothing": smoothing}
        super().__init__(
            metanet, options, optimization, statistics, trust, own, pretrained=pretrained
        )
        self.target, self.classes, self.smoothing = target, classes, smoothing
        self.measure({"accuracy": accuracy})

    def prepare(self, zoo: Zoo) -> int:
        """Number of classes; checks the labels."""
        return classes_of(zoo, self.target, self.out or self.classes, "Classification")

    def loss(self, batch: ZooBatch, stage: str) -> Tensor:
        """Cross entropy; of mixed networks the mean of those with each label, by shares."""
        logits, labels = self(batch.graphs), batch.table[self.target].long()
        if stage != "train":
            self.metrics_of(stage).update(logits.argmax(1), labels)
        if batch.mixture is not None:
            labels = batch.mixture.classes(labels, logits.shape[1])
        return F.cross_entropy(logits.float(), labels, label_smoothing=self.smoothing)

    def columns(self, answer: Tensor) -> dict[str, Tensor]:
        """Class, and its probability."""
        probability, label = answer.float().softmax(-1).max(-1)
        return {self.target: label, "probability": probability}


class Prediction(Measured):
    """A number for each network: test accuracy or generalisation gap.

    Logs Kendall's τ_b, R² and the root mean squared error, in tests with 95 % intervals.

    Args:
        metanet: See `Task`.
        options: Options of the metanet.
        target: Column of the zoo.
        link: ``"sigmoid"`` for targets between 0 and 1, ``"identity"`` for any.
        loss: ``"bce"`` (needs the sigmoid; Zhou et al. 2023 predict accuracies so) or ``"mse"``.
        rank_weight: Weight of the pairwise rank loss (`wspace.lit.metrics.rank_loss`).
        optimization: Optimiser and learning rate.
        statistics: See `Task`.
        trust: See `Task`.
        pretrained: See `Task`.

    Raises:
        ZooError: If `link` and `loss` do not go together.
    """

    monitor = ("val/kendall", "max")
    mixed_targets = True

    def __init__(
        self,
        metanet: str | nn.Module = "GraphMetanet",
        options: dict[str, Any] | None = None,
        *,
        target: str = "test_accuracy",
        link: str = "sigmoid",
        loss: str = "bce",
        rank_weight: float = 0.0,
        optimization: Optimization = Optimization(),  # noqa: B008  (frozen)
        statistics: int = 1024,
        trust: Sequence[str] = (),
        pretrained: str | Path | None = None,
    ) -> None:
        known = {("sigmoid", "bce"), ("sigmoid", "mse"), ("identity", "mse")}
        if (link, loss) not in known:
            raise ZooError(
                message(
                    f"Prediction: link {link!r} with loss {loss!r}",
                    expected="sigmoid with bce or mse, or identity with mse",
                )
            )
        own = {"target": target, "link": link, "loss": loss, "rank_weight": rank_weight}
        super().__init__(
            metanet, options, optimization, statistics, trust, own, pretrained=pretrained
        )
        self.target, self.link, self.kind, self.rank_weight = target, link, loss, rank_weight
        self.measure({"kendall": kendall, "r2": r_squared, "rmse": rmse})
        self.first = {"center": 0.0, "spread": 1.0}

    def prepare(self, zoo: Zoo) -> int:
        """One number; checks the targets."""
        values = column(zoo, self.target, "Prediction").astype(np.float64)
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            raise ZooError(
                message(
                    f"Prediction: {len(bad)} values of {self.target!r} are not finite",
                    got=f"rows {bad[:8].tolist()}",
                    help="leave these networks out",
                )
            )
        if self.link == "sigmoid" and len(values) and (values.min() < 0 or values.max() > 1):
            raise ZooError(
                message(
                    f"Prediction: {self.target!r} is no share",
                    expected="values between 0 and 1 for link 'sigmoid'",
                    got=f"{values.min():g} to {values.max():g}",
                    help="link: identity, loss: mse",
                )
            )
        return 1

    def learn_targets(self, zoo: Zoo) -> None:
        """For the identity, takes mean and spread of the targets, which answers are scaled by.

        Args:
            zoo: Training networks.
        """
        if self.link == "identity":
            values = column(zoo, self.target, "Prediction").astype(np.float64)
            self.first = {"center": float(values.mean()), "spread": float(values.std()) or 1.0}

    def learned(self) -> dict[str, Any]:
        """Length of the answer, mean and spread of the target."""
        return {**super().learned(), **self.first}

    def restore(self, learned: Mapping[str, Any]) -> None:
        """Takes back what `learned` gave."""
        super().restore(learned)
        self.first = {key: float(learned[key]) for key in ("center", "spread")}

    def predicted(self, scores: Tensor) -> Tensor:
        """Targets from the metanet's scores."""
        if self.link == "sigmoid":
            return scores.float().sigmoid()
        return scores.float() * self.first["spread"] + self.first["center"]

    def loss(self, batch: ZooBatch, stage: str) -> Tensor:
        """Distance to the targets, and the rank loss with its weight; to mixed targets if mixed."""
        scores, target = self(batch.graphs)[:, 0].float(), batch.table[self.target].float()
        if batch.mixture is not None:
            target = batch.mixture.targets(target)
        if stage != "train":
            self.metrics_of(stage).update(self.predicted(scores), target)
        if self.kind == "bce":
            loss = F.binary_cross_entropy_with_logits(scores, target)
        else:
            spread = self.first["spread"]
            loss = F.mse_loss(self.predicted(scores) / spread, target / spread)
        if self.rank_weight:
            loss = loss + self.rank_weight * rank_loss(scores, target)
        return loss

    def columns(self, answer: Tensor) -> dict[str, Tensor]:
        """The predicted target."""
        return {self.target: self.predicted(answer[:, 0])}


class Editing(Measured):
    """Networks that show images into networks that show the dilated images.

    The metanet returns parameters. Both the given and the edited network are decoded on the pixel
    grid; the target is the given image dilated by a square of 3 × 3 pixels, the loss the mean
    squared error. Logs ``mse`` and ``unedited_mse``, the error of leaving networks as they are.

    Zhou et al. (2023), "Permutation Equivariant Neural Functionals", section 3.4 (arXiv
    2302.14040); there, the target is the image that was fitted, not what the network shows.

    Args:
        metanet: See `Task`; a graph metanet, ``DWSNet``, ``NFN`` or ``UNF``.
        options: Options of the metanet.
        side: Height and width in pixels; coordinates as in `wspace.zoo.images.grid`.
        radius: Pixels by which bright parts grow.
        optimization: Optimiser and learning rate.
        statistics: See `Task`.
        trust: See `Task`.
        pretrained: See `Task`.
    """

    monitor = ("val/mse", "min")
    mixed_targets = True  # the target is what a network shows, mixed or not

    def __init__(
        self,
        metanet: str | nn.Module = "GraphMetanet",
        options: dict[str, Any] | None = None,
        *,
        side: int = 28,
        radius: int = 1,
        optimization: Optimization = Optimization(),  # noqa: B008  (frozen)
        statistics: int = 1024,
        trust: Sequence[str] = (),
        pretrained: str | Path | None = None,
    ) -> None:
        own = {"side": side, "radius": radius}
        super().__init__(
            metanet, options, optimization, statistics, trust, own, pretrained=pretrained
        )
        self.side, self.radius = side, radius
        self.measure({"mse": mean, "unedited_mse": mean_target})
        self.register_buffer("pixels", grid(side, side), persistent=False)
        self._modules_by_space: dict[WeightSpace, nn.Module] = {}

    def prepare(self, zoo: Zoo) -> None:
        """Checks that the networks show images of two coordinates."""
        for architecture in zoo.architectures:
            shapes = [tuple(spec.shape) for spec in architecture.inputs]
            if len(shapes) != 1 or shapes[0][-1:] != (2,):
                raise ZooError(
                    message(
                        f"Editing: {architecture.factory} shows no image",
                        expected="networks of two coordinates",
                        got=f"inputs of shapes {shapes}",
                    )
                )

    def loss(self, batch: ZooBatch, stage: str) -> Tensor:
        """Mean squared error of the pixels."""
        edited = self(batch.graphs)
        losses: list[Tensor] = []
        for graph, state in zip(batch.graphs, edited, strict=True):
            with torch.no_grad():
                given = self.images(graph.values, graph.space)
                target = dilated(given, self.radius)
            shown = self.images(state, graph.space)
            losses.append((shown - target).square().flatten(1).mean(1))
            if stage != "train":
                before = (given - target).square().flatten(1).mean(1)
                self.metrics_of(stage).update(losses[-1], before)
        return torch.cat(losses).mean()

    def images(self, state: Mapping[str, Tensor], space: WeightSpace) -> Tensor:
        """What networks show, ``(rows, channels, side, side)``."""
        assert self.known is not None
        if space not in self._modules_by_space:
            architecture = next(a for a, s in self.known.pairs() if s == space)
            self._modules_by_space[space] = architecture.module(trust=self.trust)
        shown = decoded(self._modules_by_space[space], space, state, self.get_buffer("pixels"))
        return shown.mT.unflatten(-1, (self.side, self.side))

    def columns(self, answer: Any) -> dict[str, Tensor]:
        """Root mean square of the edited network's weights."""
        rows = [torch.cat([x.flatten(1) for x in s.values() if x.is_floating_point()], 1)
                for s in answer]  # fmt: skip
        return {"edited_rms": torch.cat([x.square().mean(1).sqrt() for x in rows])}


def classes_of(zoo: Zoo, target: str, classes: int | None, what: str) -> int:
    """Number of classes of a column of whole numbers from 0.

    Args:
        zoo: The zoo.
        target: Name of the column.
        classes: The number that is expected; None takes one more than the largest label.
        what: Who asks, for the message.

    Returns:
        The number.

    Raises:
        ZooError: If there is no such column or a label is no class.
    """
    labels = column(zoo, target, what)
    whole = labels.astype(np.int64)
    most = int(whole.max(initial=0)) + 1 if classes is None else classes
    bad = np.unique(labels[(whole != labels) | (whole < 0) | (whole >= most)])
    if len(bad):
        raise ZooError(
            message(
                f"{what}: labels of {target!r} are no classes",
                expected=f"whole numbers from 0 to {most - 1}",
                got=f"{', '.join(map(str, bad[:8].tolist()))}",
            )
        )
    return most


def finish(task: Task, stage: str, metrics: Paired) -> None:
    """Logs the metrics of a stage and forgets its networks.

    Args:
        task: Where to log.
        stage: ``"val"`` or ``"test"``.
        metrics: Of all networks of the stage.
    """
    found = metrics.compute()
    metrics.reset()
    task.report(stage, found)
