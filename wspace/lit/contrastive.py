"""Training without labels: a network is told from others by two changed views of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wspace.augment import Augment, Drop, Noise, Symmetry, augmented, mixes
from wspace.errors import WSpaceError, message
from wspace.lit.metrics import accuracy
from wspace.lit.modules import Measured, classes_of
from wspace.lit.task import Optimization
from wspace.zoo import Zoo, ZooBatch


class Contrastive(Measured):
    """Representations without labels: two changed views of one network shall be told from others.

    The metanet's answer is the representation; a small perceptron on it, used in training only,
    gives the vectors that are compared (NT-Xent). At validation a linear classifier is fitted to
    representations of training networks, and ``probe_accuracy`` is what it reaches.

    Chen et al. (2020), "A Simple Framework for Contrastive Learning of Visual Representations"
    (SimCLR), equation 1 (arXiv 2002.05709).

    Args:
        metanet: See `Task`.
        options: Options of the metanet.
        dimension: Length of a representation.
        temperature: Of the softmax over similarities.
        augment: What makes a view; None takes all symmetries, noise and dropped weights. A view
            is one of one network, so nothing may mix several.
        target: Column with classes for the linear classifier; None for none.
        probe_networks: Training networks that the linear classifier is fitted to.
        optimization: Optimiser and learning rate.
        statistics: See `Task`.
        trust: See `Task`.
        pretrained: See `Task`.

    Raises:
        WSpaceError: If `augment` mixes networks.
    """

    monitor = ("val/loss", "min")

    def __init__(
        self,
        metanet: str | nn.Module = "GraphMetanet",
        options: dict[str, Any] | None = None,
        *,
        dimension: int = 64,
        temperature: float = 0.1,
        augment: Sequence[Augment] | None = None,
        target: str | None = None,
        probe_networks: int = 2048,
        optimization: Optimization = Optimization(),  # noqa: B008  (frozen)
        statistics: int = 1024,
        trust: Sequence[str] = (),
        pretrained: str | Path | None = None,
    ) -> None:
        own = {
            "dimension": dimension,
            "temperature": temperature,
            "target": target,
            "probe_networks": probe_networks,
        }
        super().__init__(
            metanet, options, optimization, statistics, trust, own, pretrained=pretrained
        )
        usual = (Symmetry(("permutation", "scale", "sign", "phase")), Noise(0.1), Drop(0.1))
        self.augment = list(usual if augment is None else augment)
        if mixes(self.augment):
            raise WSpaceError(
                message(
                    "Contrastive: a mix of networks is a view of none of them",
                    expected="augmentations that mix nothing, or mix a network with itself",
                    help="leave MixUp out of `augment`; SelfMixUp will do",
                )
            )
        self.dimension, self.temperature = dimension, temperature
        self.target, self.probe_networks = target, probe_networks
        wide = 2 * dimension
        self.project = nn.Sequential(
            nn.Linear(dimension, wide), nn.SiLU(), nn.Linear(wide, dimension)
        )
        self.measure({"probe_accuracy": accuracy})
        self._probe: Tensor | None = None

    def prepare(self, zoo: Zoo) -> int:
        """Length of a representation; checks the labels, if there shall be any."""
        if self.target is not None:
            classes_of(zoo, self.target, None, "Contrastive")
        return self.dimension

    def loss(self, batch: ZooBatch, stage: str) -> Tensor:
        """NT-Xent between two views of every network."""
        views = [
            augmented(batch.graphs, self.augment, self.data.generator(batch, k))[0] for k in (1, 2)
        ]
        first, second = (self.project(self(graphs)).float() for graphs in views)
        if stage != "train" and self._probe is not None and self.target is not None:
            scores = _with_one(self(batch.graphs).float()) @ self._probe
            self.metrics_of(stage).update(scores.argmax(1), batch.table[self.target].long())
        return nt_xent(first, second, self.temperature)

    def on_validation_epoch_start(self) -> None:
        """Fits the linear classifier."""
        self._fit_probe()

    def on_test_epoch_start(self) -> None:
        """Fits the linear classifier."""
        self._fit_probe()

    def on_validation_epoch_end(self) -> None:
        """Logs what the linear classifier reaches."""
        if self._probe is not None:
            super().on_validation_epoch_end()

    def on_test_epoch_end(self) -> None:
        """Logs what the linear classifier reaches, with its interval."""
        if self._probe is not None:
            super().on_test_epoch_end()

    def _fit_probe(self) -> None:
        if self.target is None:
            return
        batch = self.data.batch("train", self.probe_networks).to(self.device)
        with torch.no_grad():
            x = self(batch.graphs).float()
        self._probe = ridge(x, batch.table[self.target].long())

    def columns(self, answer: Tensor) -> dict[str, Tensor]:
        """The representation."""
        return {"representation": answer}


def nt_xent(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """Cross entropy of finding a network's other view among all views of the batch.

    Args:
        a: Vectors of the first views, ``(rows, n)``.
        b: Vectors of the second views, ``(rows, n)``.
        temperature: By which cosines are divided.

    Returns:
        The mean over both directions.
    """
    z = F.normalize(torch.cat([a, b]), dim=1)
    similar = z @ z.T / temperature
    similar = similar.masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -torch.inf)
    other = torch.arange(len(z), device=z.device).roll(len(a))
    return F.cross_entropy(similar, other)


def ridge(x: Tensor, labels: Tensor, penalty: float = 1e-3) -> Tensor:
    """Linear classifier by ridge regression on one-hot labels, in closed form.

    Args:
        x: Representations, ``(rows, n)``.
        labels: Classes, ``(rows,)``.
        penalty: Of squared weights, in units of the mean square of `x`.

    Returns:
        ``(n + 1, classes)``; the last row is for a constant 1.
    """
    x = _with_one(x).double()
    y = F.one_hot(labels).double()
    gram = x.T @ x
    scale = penalty * gram.diagonal().mean()
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram + scale * eye, x.T @ y).float()


def _with_one(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_ones(len(x), 1)], 1)
