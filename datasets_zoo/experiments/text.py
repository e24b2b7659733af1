"""`TextData`: a text as contiguous streams of characters, for recurrent language models."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datasets_zoo.text import Tokenizer, text
from wspace.errors import ZooError, message

PARTS = ("train", "val", "test")
TOKENS = ("characters", "bytes")


class Streams(Dataset[tuple[Tensor, Tensor]]):
    """Tokens in several streams side by side, cut along time.

    A batch goes on where the one before it ended, in every stream, so that a recurrent network can
    keep its state. Targets are the tokens one step later. All tokens are used but for fewer than
    `streams` at the end; the last batch may be shorter in time.

    Args:
        tokens: Tokens, ``(n,)``.
        streams: Number of streams B.
        length: Steps of a batch T.

    Raises:
        ZooError: If there are not two tokens for each stream, or a number is not positive.

    Example:
        >>> [x.tolist() for x, y in Streams(torch.arange(11), 2, 3)]
        [[[0, 1, 2], [5, 6, 7]], [[3, 4], [8, 9]]]
    """

    def __init__(self, tokens: Tensor, streams: int, length: int) -> None:
        if min(streams, length) < 1:
            got = f"{streams} streams, length {length}"
            raise ZooError(message("Streams: sizes", expected="positive numbers", got=got))
        if (steps := (len(tokens) - 1) // streams) < 1:
            raise ZooError(
                message(
                    f"Streams: {len(tokens)} tokens for {streams} streams",
                    expected="at least one step for each",
                    help="choose a smaller batch_size, or a longer text",
                )
            )
        used = steps * streams
        self.inputs = tokens[:used].view(streams, steps).contiguous()
        self.targets = tokens[1 : used + 1].view(streams, steps).contiguous()
        self.length = length

    def __len__(self) -> int:
        return (self.inputs.shape[1] + self.length - 1) // self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a batch, ``(B, T)`` each."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        some = slice(index * self.length, (index + 1) * self.length)
        return self.inputs[:, some], self.targets[:, some]


class TextData(LightningDataModule):
    """Batches ``(x, y)`` of characters as numbers, int64 ``(batch_size, length)`` each.

    The text is cut into training, validation and test text in this order. Every part runs in
    `batch_size` streams, see `Streams`; batches come in order, since the state of a model may be
    kept from one to the next.

    Args:
        name: A text of `datasets_zoo.text`.
        root: Where it lies; see there.
        batch_size: Streams.
        length: Steps of a batch.
        fractions: Shares of training, validation and test text.
        tokens: ``"characters"`` of the text, or ``"bytes"`` of UTF-8, of which there are 256
            whatever the text.

    Raises:
        ZooError: If the shares are not three positive numbers with sum 1, or there are no such
            tokens.

    Attributes:
        tokenizer: Characters of the whole text, sorted, or bytes; filled by `setup`.
        parts: Streams of ``"train"``, ``"val"`` and ``"test"``; filled by `setup`.

    Example:
        >>> data = TextData("zen", batch_size=4, length=16)
        >>> data.setup("fit")
        >>> x, y = data.parts["train"][0]
        >>> data.tokenizer.decode(x[0]), data.vocabulary
        ('The Zen of Pytho', 45)
    """

    def __init__(
        self,
        name: str = "tinyshakespeare",
        root: str | None = None,
        *,
        batch_size: int = 32,
        length: int = 64,
        fractions: Sequence[float] = (0.9, 0.05, 0.05),
        tokens: str = "characters",
    ) -> None:
        super().__init__()
        if tokens not in TOKENS:
            expected = f"one of {', '.join(TOKENS)}"
            raise ZooError(message("TextData: no such tokens", expected=expected, got=tokens))
        if len(fractions) != 3 or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
            raise ZooError(
                message(
                    "TextData: fractions",
                    expected="three positive numbers with sum 1",
                    got=str(tuple(fractions)),
                )
            )
        self.text, self.root = name, root
        self.batch_size, self.length, self.fractions = batch_size, length, tuple(fractions)
        self.tokens, self.tokenizer = tokens, Tokenizer()
        self.parts: dict[str, Streams] = {}

    @property
    def vocabulary(self) -> int:
        """Number of different tokens."""
        return len(self.tokenizer)

    def setup(self, stage: str) -> None:
        """Reads the text, once.

        Args:
            stage: Any of Lightning's stages; all parts are read.

        Raises:
            ZooError: If the text is too short, or there are several processes (each would get
                every other batch, not streams).
        """
        del stage
        if self.trainer is not None and self.trainer.world_size > 1:
            got = f"{self.trainer.world_size} processes"
            raise ZooError(message("TextData: streams", expected="one process", got=got))
        if self.parts:
            return
        sample = text(self.text, self.root)
        if self.tokens == "characters":
            self.tokenizer = Tokenizer.of(sample)
        tokens = self.tokenizer.encode(sample)
        first = round(self.fractions[0] * len(tokens))
        second = first + round(self.fractions[1] * len(tokens))
        cuts = torch.tensor_split(tokens, (first, second))
        self.parts = {
            part: Streams(some, self.batch_size, self.length)
            for part, some in zip(PARTS, cuts, strict=True)
        }

    def train_dataloader(self) -> DataLoader[Any]:
        """Training text, in order."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Any]:
        """Validation text, in order."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Test text, in order."""
        return self._loader("test")

    def _loader(self, part: str) -> DataLoader[Any]:
        return DataLoader(self.parts[part], batch_size=None)
