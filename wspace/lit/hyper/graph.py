"""`ParameterPrediction`: a graph hypernetwork, trained on many architectures at once.

Knyazev et al. (2021), "Parameter Prediction for Unseen Deep Architectures" (arXiv 2110.13100): in
every step the parameters of a few architectures are predicted, all of these see one batch of
images, and the mean of their losses trains the hypernetwork.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from wspace.errors import HyperError, message
from wspace.hyper.graph.network import GraphHyperNetwork, weight_norms
from wspace.lit.hyper.task import HyperTask
from wspace.lit.task import Optimization
from wspace.space import WeightSpace
from wspace.zoo.architecture import Architecture


class Candidate(Protocol):
    """An architecture that parameters are predicted for.

    Attributes:
        family: What kind it is, for the log.
        regime: Why it is looked at, for the log: ``"train"``, ``"wide"`` …
        architecture: Builds it.
    """

    @property
    def family(self) -> str: ...  # noqa: D102
    @property
    def regime(self) -> str: ...  # noqa: D102
    @property
    def architecture(self) -> Architecture: ...  # noqa: D102


class CandidateBatch(Protocol):
    """What `ParameterPrediction` reads of a batch; `datasets_zoo.experiments.genotypes` draws such.

    Attributes:
        genotypes: Architectures.
        images: ``(N, channels, n, n)``, which all of them see.
        labels: int64 ``(N,)``.
    """

    @property
    def genotypes(self) -> Sequence[Candidate]: ...  # noqa: D102
    @property
    def images(self) -> Tensor: ...  # noqa: D102
    @property
    def labels(self) -> Tensor: ...  # noqa: D102


class _Known(NamedTuple):
    """A network without values, in training mode; its buffers; its space."""

    module: nn.Module
    buffers: dict[str, Tensor]
    space: WeightSpace

    def run(self, state: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Its answer with these parameters, BatchNorm with the statistics of the batch."""
        copies = {
            n: b.to(x.device, x.dtype if b.is_floating_point() else b.dtype, copy=True)
            for n, b in self.buffers.items()
        }
        return functional_call(self.module, {**copies, **state}, (x,))


class ParameterPrediction(HyperTask):
    """Predicts the parameters of image classifiers from their architectures, by cross entropy.

    BatchNorm takes the statistics of the batch, in training and in judging: none are predicted.
    Logs ``loss`` and ``accuracy``, means over architectures, and the accuracy of every regime.

    Args:
        network: Options of `GraphHyperNetwork`.
        penalty: Weight of the sum of Frobenius norms of the predicted tensors (GHN-3: 3e-5).
        smoothing: Label smoothing.
        optimization: Optimiser and learning rate.
        trust: Packages whose factories may be imported, beside `datasets_zoo` and wspace.

    Raises:
        HyperError: If the hypernetwork has no such option.

    Attributes:
        ghn: The hypernetwork.
    """

    monitor = ("val/accuracy", "max")

    def __init__(
        self,
        network: dict[str, Any] | None = None,
        *,
        penalty: float = 0.0,
        smoothing: float = 0.0,
        optimization: Optimization | None = None,
        trust: Sequence[str] = (),
    ) -> None:
        super().__init__(optimization or Optimization(lr=1e-3, weight_decay=1e-2))
        try:
            self.ghn = GraphHyperNetwork(**(network or {}))
        except TypeError as error:
            raise HyperError(
                message("ParameterPrediction: no such network", got=f"{network}: {error}")
            ) from error
        self.penalty, self.smoothing, self.trust = penalty, smoothing, tuple(trust)
        self._known: dict[Architecture, _Known] = {}
        options = {"network": network, "penalty": penalty, "smoothing": smoothing}
        options |= {"trust": list(trust), "optimization": asdict(self.optimization)}
        self.save_hyperparameters(options)

    def forward(self, candidates: Sequence[Candidate], x: Tensor) -> list[Tensor]:
        """Answers of architectures with predicted parameters.

        Args:
            candidates: Architectures.
            x: Inputs.

        Returns:
            What each of them makes of the inputs.
        """
        return [y for y, _ in self._answers(candidates, x)]

    def _answers(
        self, candidates: Sequence[Candidate], x: Tensor
    ) -> list[tuple[Tensor, Mapping[str, Tensor]]]:
        known = [self._known_of(c.architecture) for c in candidates]
        states = cast("list[dict[str, Tensor]]", self.ghn([k.space for k in known]))
        return [(k.run(state, x), state) for k, state in zip(known, states, strict=True)]

    def _known_of(self, architecture: Architecture) -> _Known:
        if architecture not in self._known:
            module = architecture.module(trust=self.trust).train()
            real = {n: torch.zeros(b.shape, dtype=b.dtype) for n, b in module.named_buffers()}
            self._known[architecture] = _Known(module, real, architecture.space(self.trust))
        return self._known[architecture]

    def training_step(self, batch: CandidateBatch, batch_idx: int) -> Tensor:
        """Loss of a batch.

        Args:
            batch: Architectures, images and labels.
            batch_idx: Number of the batch.

        Returns:
            The mean of cross entropies over architectures, and the penalty.
        """
        del batch_idx
        answers = self._answers(batch.genotypes, batch.images)
        losses = [F.cross_entropy(y, batch.labels, label_smoothing=self.smoothing)
                  for y, _ in answers]  # fmt: skip
        loss = torch.stack(losses).mean()
        self.log_all({"loss": loss.detach()}, "train", len(batch.labels))
        if self.penalty:
            norms = [weight_norms(state) for _, state in answers]
            loss = loss + self.penalty * torch.stack(norms).mean()
        return loss

    def validation_step(self, batch: CandidateBatch, batch_idx: int) -> None:
        """Loss and accuracy of held-out architectures.

        Args:
            batch: Architectures, images and labels.
            batch_idx: Number of the batch.
        """
        del batch_idx
        self._judge(batch, "val")

    def test_step(self, batch: CandidateBatch, batch_idx: int) -> None:
        """Loss and accuracy of held-out architectures, also by regime.

        Args:
            batch: Architectures, images and labels.
            batch_idx: Number of the batch.

        Raises:
            HyperError: If there are several processes.
        """
        del batch_idx
        if self.trainer.world_size > 1:
            raise HyperError(
                message("ParameterPrediction: regimes are told apart in one process",
                        got=f"{self.trainer.world_size} processes", help="--trainer.devices 1")
            )  # fmt: skip
        self._judge(batch, "test")

    def _judge(self, batch: CandidateBatch, stage: str) -> None:
        for candidate, y in zip(batch.genotypes, self(batch.genotypes, batch.images), strict=True):
            right = (y.argmax(-1) == batch.labels).float().mean()
            values = {"loss": F.cross_entropy(y, batch.labels), "accuracy": right}
            if stage == "test":
                values[f"accuracy_{candidate.regime}"] = right
            self.log_all(values, stage, 1)
