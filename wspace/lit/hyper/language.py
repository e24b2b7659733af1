"""`CharacterModel`: recurrent language models of characters, HyperLSTM beside its controls."""

from dataclasses import asdict
from math import log
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from wspace.errors import HyperError, message
from wspace.hyper.cells.gates import orthogonal, with_forget_bias
from wspace.hyper.cells.hyper_lstm import HyperLSTM
from wspace.hyper.cells.layer_norm_lstm import LayerNormLSTM
from wspace.lit.hyper.task import HyperTask
from wspace.lit.task import Optimization

CELLS = ("lstm", "layer_norm_lstm", "hyper_lstm", "hyper_lstm_ln")


class CharacterModel(HyperTask):
    """Reads characters as one-hot vectors, and says which one comes next.

    Logs ``loss`` (nats) and ``bpc`` (bits), means over characters.

    Args:
        vocabulary: Number of different tokens: 65 for tinyshakespeare, 256 for bytes.
        cell: ``"lstm"`` (`torch.nn.LSTM` with the initial weights and forget bias of the others),
            ``"layer_norm_lstm"``, ``"hyper_lstm"``, or ``"hyper_lstm_ln"`` with layer
            normalisation.
        hidden_size: Units of each layer.
        num_layers: Layers.
        hyper_size: Units of the small cell of a HyperLSTM.
        embedding_size: Length of its embeddings.
        noise: Breaks the symmetry of its published start, see `wspace.hyper.HyperLSTMCell`.
        recurrent_dropout: Share of candidates that are dropped; not of ``"lstm"``.
        carry: Whether the state at the end of a batch is that at the start of the next one, as
            batches of `datasets_zoo.experiments.text` want it; else every batch begins with zeros.
            An epoch begins with zeros in either case. Gradients end with the batch.
        optimization: Optimiser and learning rate; by default without weight decay.

    Raises:
        HyperError: If there is no such cell, or it has no such option.

    Example:
        >>> model = CharacterModel(7, hidden_size=5, hyper_size=4, embedding_size=2)
        >>> logits, state = model(torch.randint(7, (3, 11)))
        >>> logits.shape, state.h.shape
        (torch.Size([3, 11, 7]), torch.Size([1, 3, 5]))
    """

    monitor = ("val/bpc", "min")

    def __init__(
        self,
        vocabulary: int = 65,
        cell: str = "hyper_lstm",
        *,
        hidden_size: int = 128,
        num_layers: int = 1,
        hyper_size: int = 32,
        embedding_size: int = 8,
        noise: float = 0.0,
        recurrent_dropout: float = 0.0,
        carry: bool = True,
        optimization: Optimization | None = None,
    ) -> None:
        super().__init__(optimization)
        options = {k: v for k, v in locals().items() if k not in {"self", "__class__"}}
        self.save_hyperparameters({**options, "optimization": asdict(self.optimization)})
        self.vocabulary, self.cell, self.carry = vocabulary, cell, carry
        sizes = vocabulary, hidden_size
        small = hyper_size, embedding_size, num_layers
        how: dict[str, Any] = {"batch_first": True, "recurrent_dropout": recurrent_dropout}
        if cell not in CELLS:
            expected = f"one of {', '.join(CELLS)}"
            raise HyperError(message("CharacterModel: no such cell", expected=expected, got=cell))
        if (noise and not cell.startswith("hyper")) or (recurrent_dropout and cell == "lstm"):
            got = f"noise {noise}, recurrent_dropout {recurrent_dropout}"
            raise HyperError(message(f"CharacterModel: options of {cell}", expected="0", got=got))
        if cell == "lstm":
            self.body: nn.Module = lstm(*sizes, num_layers)
        elif cell == "layer_norm_lstm":
            self.body = LayerNormLSTM(*sizes, num_layers, **how)
        else:
            how |= {"layer_norm": cell == "hyper_lstm_ln", "noise": noise}
            self.body = HyperLSTM(*sizes, *small, **how)
        self.head = nn.Linear(hidden_size, vocabulary)
        self._states: dict[str, Any] = {}

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """What comes next, for every step.

        Args:
            x: Characters, int64 ``(B, T)``.
            state: State at the start; zeros for None.

        Returns:
            Logits ``(B, T, vocabulary)``, and the state at the end.
        """
        shown = F.one_hot(x, self.vocabulary).to(self.head.weight.dtype)
        hidden, state = self.body(shown, state)
        return self.head(hidden), state

    def setup(self, stage: str) -> None:
        """Checks that the model knows the characters of the data.

        Args:
            stage: Any of Lightning's.

        Raises:
            HyperError: If it does not.
        """
        del stage
        data: Any = getattr(self.trainer, "datamodule", None)
        found = getattr(data, "vocabulary", self.vocabulary)
        if found != self.vocabulary:
            raise HyperError(
                message(
                    "CharacterModel: the vocabulary is not that of the text",
                    expected=f"{found} tokens",
                    got=str(self.vocabulary),
                    help=f"--model.vocabulary {found}",
                )
            )

    def _step(self, batch: Any, stage: str, index: int) -> Tensor:
        x, y = batch
        state = self._states.pop(stage, None) if self.carry and index else None
        logits, state = self(x, state)
        if self.carry:
            self._states[stage] = tree_map_only(Tensor, Tensor.detach, state)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        values = {"loss": loss, "bpc": loss.detach() / log(2)}
        self.log_all(values, stage, y.numel())
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss of a batch.

        Args:
            batch: Characters and those that follow, ``(B, T)`` each.
            batch_idx: Its number.

        Returns:
            The loss in nats.
        """
        return self._step(batch, "train", batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Logs the loss of a batch.

        Args:
            batch: As in training.
            batch_idx: Its number.
        """
        self._step(batch, "val", batch_idx)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Logs the loss of a batch.

        Args:
            batch: As in training.
            batch_idx: Its number.
        """
        self._step(batch, "test", batch_idx)

    @torch.no_grad()
    def sample(
        self,
        start: Tensor,
        count: int,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Writes on.

        Args:
            start: Characters to begin with, ``(n,)``.
            count: Characters to write.
            temperature: Divides the logits.
            generator: Source of randomness, on the model's device.

        Returns:
            Both together, ``(n + count,)``.
        """
        x, state, written = start[None], None, [start]
        for _ in range(count):
            logits, state = self(x, state)
            shares = (logits[:, -1] / temperature).softmax(-1)
            x = torch.multinomial(shares, 1, generator=generator)
            written.append(x[0])
        return torch.cat(written)


@torch.no_grad()
def lstm(input_size: int, hidden_size: int, num_layers: int) -> nn.LSTM:
    """A fused LSTM that begins like the other cells: orthogonal for each gate, forget bias 1.

    Args:
        input_size: Length of an input.
        hidden_size: Units of each layer.
        num_layers: Layers.

    Returns:
        The LSTM, with `batch_first`.
    """
    made = nn.LSTM(input_size, hidden_size, num_layers, batch_first=True)
    for name, p in made.named_parameters():
        if name.startswith("weight"):
            p.copy_(orthogonal(hidden_size, p.shape[1], None))
        else:
            p.copy_(with_forget_bias(torch.zeros_like(p), float(name.startswith("bias_ih"))))
    return made
