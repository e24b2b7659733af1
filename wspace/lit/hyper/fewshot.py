"""`FewShot`: learning to learn labels from what a sequence shows, by cells that change themselves.

Setting of Irie et al. (2022), "A modern self-referential weight matrix that learns to modify
itself": each step of a sequence is an image's features beside its one-hot label; the query comes
last, with label 0 as a dummy; the loss is that of the last step alone.
"""

from dataclasses import asdict
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wspace.errors import HyperError, message
from wspace.hyper.cells.fast_weights import CELLS, FastWeightModel
from wspace.lit.hyper.task import HyperTask
from wspace.lit.task import Optimization

LAYERS = (*CELLS, "lstm")


class EpisodeBatch(Protocol):
    """What `FewShot` reads of a batch; `datasets_zoo.experiments.episodes` draws such.

    Attributes:
        images: ``(B, T, channels, height, width)``; the query is last.
        labels: Labels shown, ``(B, T)``; 0 for the query.
        target: Label of the query, ``(B,)``.
        held_out: Whether its classes never occur in training, ``(B,)``.
    """

    images: Tensor
    labels: Tensor
    target: Tensor
    held_out: Tensor


class LSTM(nn.Module):
    """Linear map, LSTM, linear map: with the interface of `FastWeightModel`.

    Args:
        inputs: Length of an input.
        outputs: Length of an output.
        width: Units of every layer.
        layers: Number of layers.
        dropout: Probability of being zeroed between layers.
    """

    def __init__(
        self, inputs: int, outputs: int, *, width: int, layers: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(inputs, width), nn.Linear(width, outputs)
        between = dropout if layers > 1 else 0.0
        self.cell = nn.LSTM(width, width, layers, batch_first=True, dropout=between)

    def forward(
        self, x: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Outputs ``(B, T, outputs)`` for ``(B, T, inputs)``, and the state."""
        y, after = self.cell(self.enter(x), state)
        return self.leave(y), after


class FewShot(HyperTask):
    """Reads labelled images one after another, and answers which label the last one has.

    Logs ``loss`` and ``accuracy`` (of the query), in tests as ``accuracy_held_out`` and
    ``accuracy_seen``.

    Args:
        layer: ``"srwm"``, ``"fake_sr"``, ``"delta_net"`` or ``"lstm"``.
        ways: Number of labels.
        image: Channels, height and width of the images.
        extractor: ``"conv"`` for two strided convolutions, batch norm, ReLU, and a linear map,
            ``"linear"`` for a linear map alone; features are batch-normalised in either case (else
            all images look alike to a fresh cell, and training does not begin).
        features: Length of an image's features.
        width: Width of the sequence model.
        layers: Its layers.
        heads: Heads of every cell; LSTMs have none.
        feedforward: Hidden units of feed-forward blocks, which LSTMs do not have; None for twice
            the width.
        dropout: Probability of being zeroed in the sequence model.
        options: Further options of the cells, see `wspace.hyper.cells.self_reference`.
        optimization: Optimiser and learning rate; by default without weight decay.

    Raises:
        HyperError: If there is no such layer or extractor, or the cell has no such option.
    """

    monitor = ("val/accuracy", "max")

    def __init__(
        self,
        layer: str = "srwm",
        *,
        ways: int = 3,
        image: tuple[int, int, int] = (1, 8, 8),
        extractor: str = "conv",
        features: int = 64,
        width: int = 64,
        layers: int = 2,
        heads: int = 4,
        feedforward: int | None = None,
        dropout: float = 0.0,
        options: dict[str, Any] | None = None,
        optimization: Optimization | None = None,
    ) -> None:
        known = {k: v for k, v in locals().items() if k not in {"self", "__class__"}}
        super().__init__(optimization)
        known |= {"image": list(image), "optimization": asdict(self.optimization)}
        self.save_hyperparameters(known)
        self.layer, self.ways = layer, ways
        self.extractor = _extractor(extractor, image, features)
        inputs = features + ways
        sizes: dict[str, Any] = {"width": width, "layers": layers, "dropout": dropout}
        if layer == "lstm":
            if options:
                raise HyperError(message("FewShot: an LSTM has no options", got=str(options)))
            self.model: nn.Module = LSTM(inputs, ways, **sizes)
        elif layer in CELLS:
            more: dict[str, Any] = {"heads": heads, "feedforward": feedforward, "options": options}
            self.model = FastWeightModel(inputs, ways, layer, **sizes, **more)
        else:
            expected = f"one of {', '.join(LAYERS)}"
            raise HyperError(message("FewShot: no such layer", expected=expected, got=layer))

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Answers at every step.

        Args:
            images: ``(B, T, channels, height, width)``.
            labels: Labels beside them, ``(B, T)``.

        Returns:
            Logits of the labels, ``(B, T, ways)``.
        """
        x = self.extractor(images.flatten(0, 1)).unflatten(0, images.shape[:2])
        shown = F.one_hot(labels, self.ways).to(x.dtype)
        return self.model(torch.cat((x, shown), -1))[0]

    def _values(self, batch: EpisodeBatch) -> dict[str, Tensor]:
        logits = self(batch.images, batch.labels)[:, -1]
        right = (logits.argmax(-1) == batch.target).to(logits.dtype)
        return {"loss": F.cross_entropy(logits, batch.target), "accuracy": right.mean()}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss of the query.

        Args:
            batch: Episodes, see `EpisodeBatch`.
            batch_idx: Its number.

        Returns:
            The loss.
        """
        del batch_idx
        values = self._values(batch)
        self.log_all(values, "train", len(batch.target))
        return values["loss"]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Logs loss and accuracy.

        Args:
            batch: Episodes, see `EpisodeBatch`.
            batch_idx: Its number.
        """
        del batch_idx
        self.log_all(self._values(batch), "val", len(batch.target))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Logs loss and accuracy of held-out and of seen classes.

        Args:
            batch: Episodes, all of one kind, see `EpisodeBatch`.
            batch_idx: Its number.
        """
        del batch_idx
        kind = "held_out" if bool(batch.held_out.all()) else "seen"
        values = {f"{name}_{kind}": value for name, value in self._values(batch).items()}
        self.log_all(values, "test", len(batch.target))


def _extractor(name: str, image: tuple[int, int, int], features: int) -> nn.Module:
    channels, height, width = image
    if name == "linear":
        inputs = channels * height * width
        parts: list[nn.Module] = [nn.Flatten(), nn.Linear(inputs, features)]
    elif name == "conv":
        h, w = (-(-n // 4) for n in (height, width))
        parts = [
            nn.Conv2d(channels, 16, 3, stride=2, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * h * w, features),
        ]
    else:
        expected = "conv or linear"
        raise HyperError(message("FewShot: no such extractor", expected=expected, got=name))
    return nn.Sequential(*parts, nn.BatchNorm1d(features))
