"""Small language models: transformers that predict the next character of a text.

Network: the decoder of GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask
Learners") in small: learned embeddings of tokens and positions, blocks with LayerNorm first, causal
attention, a perceptron four times as wide with the tanh form of GELU, a last LayerNorm, and a head
that shares the embedding's matrix unless `tied` is off. No dropout. Tokens are the characters of
the text, sorted (`datasets_zoo.text.Tokenizer`).

Training: AdamW with a constant rate after a short warm-up, gradient norm clipped at 1, windows
drawn anywhere in the first nine tenths of the text; the last tenth is for testing. For every
network are drawn: learning rate, weight decay, share of the training text that it sees, share of
characters replaced by random ones (0.3 u², u uniform), factor on its initial matrices, number of
steps. For every cohort: width, blocks, heads. Losses are means over `judged` windows at equal
distances, in nats per character.

Checkpoints are rows of their own with the column ``network``, which no split parts unless it is
told to. A network that diverged is kept as it was before it did, and marked.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import log
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from datasets_zoo.architectures import Block
from datasets_zoo.text import Tokenizer, text
from wspace.errors import ZooError, message
from wspace.zoo.architecture import Architecture, InputSpec
from wspace.zoo.recipe import Cohort, Counted, check_options, generator_of
from wspace.zoo.train import (
    Batch,
    Trained,
    Training,
    cross_entropy,
    evaluate_many,
    initial_states,
    train_many,
    vmapped,
)

Item = TypeVar("Item")

RANGES = {
    "learning_rate": (1e-3, 2e-2),
    "weight_decay": (1e-3, 1.0),
    "fraction": (0.02, 1.0),
    "init": (0.5, 2.0),
}
WARMUP, CLIP = 20, 1.0


class GPT(nn.Module):
    """A transformer that predicts the next token; see the top of this file.

    Args:
        vocabulary: Number of tokens.
        context: Longest input.
        width: Width of the stream; `heads` divides it.
        blocks: Number of blocks.
        heads: Attention heads.
        tied: Whether the head shares the embedding's matrix.
    """

    def __init__(
        self, vocabulary: int, context: int, width: int, blocks: int, heads: int, tied: bool
    ) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(0.02 * torch.randn(context, width))
        self.blocks = nn.ModuleList(
            Block(width, heads, nn.GELU(approximate="tanh"), expand=4, causal=True)
            for _ in range(blocks)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for matrix in (self.token.weight, self.head.weight):
            nn.init.normal_(matrix, std=0.02)
        if tied:
            self.head.weight = self.token.weight

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(batch, tokens, vocabulary)`` of what follows each of ``(batch, tokens)``."""
        x = self.token(x) + self.position[: x.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def gpt(
    vocabulary: int = 65,
    context: int = 32,
    *,
    width: int = 16,
    blocks: int = 2,
    heads: int = 2,
    tied: bool = True,
) -> nn.Module:
    """The network of `GPT`."""
    return GPT(vocabulary, context, width, blocks, heads, tied)


def characters(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of every network over batch and positions, ``(m,)``."""
    return cross_entropy(outputs.flatten(1, 2), targets.flatten(1))


@lru_cache(maxsize=4)
def tokens_of(name: str, root: str) -> tuple[Tensor, Tensor, int]:
    """A text as tokens: the first nine tenths, the last one, and the size of the vocabulary.

    Args:
        name: As for `datasets_zoo.text.text`.
        root: Folder or file of the text, or ``""``.

    Returns:
        Training tokens, test tokens, number of different tokens.
    """
    sample = text(name, root or None)
    tokenizer = Tokenizer.of(sample)
    tokens = tokenizer.encode(sample)
    cut = len(tokens) * 9 // 10
    return tokens[:cut], tokens[cut:], len(tokenizer)


def windows(tokens: Tensor, starts: Tensor, context: int) -> Tensor:
    """Windows one token longer than the context, ``(*starts.shape, context + 1)``."""
    return tokens[starts[..., None] + torch.arange(context + 1)]


def fixed_windows(tokens: Tensor, count: int, context: int) -> tuple[Tensor, Tensor]:
    """Windows at equal distances: inputs and targets, ``(count, context)`` each."""
    starts = torch.linspace(0, len(tokens) - context - 1, count).long()
    chosen = windows(tokens, starts, context)
    return chosen[:, :-1], chosen[:, 1:]


def log_uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """Numbers whose logarithm is uniform, ``(count,)``."""
    return torch.empty(count).uniform_(log(low), log(high), generator=generator).exp()


def pick(choices: Sequence[Item], generator: torch.Generator) -> Item:
    """One of several, each as likely as the others."""
    return choices[int(torch.randint(len(choices), (1,), generator=generator))]


@dataclass(frozen=True)
class LanguageModels(Counted):
    """A zoo of small language models; see the top of this file.

    Attributes:
        text: One of `datasets_zoo.text`.
        root: Folder or file of the text; no part of what the zoo is.
        count: Number of networks; each gives `checkpoints` rows.
        seed: Decides everything that is drawn.
        widths: Widths to draw from.
        blocks: Numbers of blocks to draw from.
        heads: Numbers of heads to draw from; each divides all widths.
        tied: Whether the head shares the embedding's matrix.
        context: Characters in a window.
        batch: Windows in one step.
        steps: Smallest and largest number of steps.
        checkpoints: States over training, at equal distances, the last one included.
        judged: Windows on which losses are measured.
        size: Networks in one cohort.
    """

    text: str = "tinyshakespeare"
    root: str = field(default="", compare=False)
    count: int = 256
    seed: int = 0
    widths: tuple[int, ...] = (16, 24, 32)
    blocks: tuple[int, ...] = (1, 2)
    heads: tuple[int, ...] = (2, 4)
    tied: bool = True
    context: int = 32
    batch: int = 16
    steps: tuple[int, int] = (50, 2000)
    checkpoints: int = 3
    judged: int = 128
    size: int = 16

    grouped_by: ClassVar[str] = "network"

    def __post_init__(self) -> None:
        check_options(self, "count", "steps", "checkpoints", "context", "batch", "judged", "size")

    def cohort(self, index: int) -> Cohort:
        """Trains the networks of one cohort.

        Args:
            index: Which.

        Returns:
            States, one row for each checkpoint, with columns ``network``, ``checkpoint``, ``step``,
            ``test_loss``, ``train_loss`` (nats per character), ``width``, ``blocks``, ``heads``,
            the hyper-parameters, and ``diverged``.
        """
        generator = generator_of(self.seed, index)
        train, test, vocabulary = self._tokens()
        drawn = {
            "width": pick(self.widths, generator),
            "blocks": pick(self.blocks, generator),
            "heads": pick(self.heads, generator),
        }
        options = drawn | {"vocabulary": vocabulary, "context": self.context, "tied": self.tied}
        spec = InputSpec((1, self.context), "int64", vocabulary)
        architecture = Architecture("datasets_zoo.language:gpt", options, (spec,))
        module = architecture.module()
        meta = self._hyper_parameters(generator)
        saved_at = meta["steps"][:, None] * torch.arange(1, self.checkpoints + 1)
        saved_at = saved_at // self.checkpoints
        done = self._train(module, options, meta, saved_at, generator)
        count = self.rows(index)
        rows = torch.arange(count).repeat_interleave(self.checkpoints)
        states = {name: x[:count].flatten(0, 1) for name, x in done.saved.items()}
        table: dict[str, Any] = {name: x[rows] for name, x in meta.items()}
        table |= {"step": saved_at[:count].flatten(), "diverged": done.diverged[rows]}
        for part, tokens in (("train", train), ("test", test)):
            table[f"{part}_loss"] = judge(module, states, tokens, self.judged, self.context)
        table |= {"network": index * self.size + rows}
        table |= {"checkpoint": torch.arange(self.checkpoints).repeat(count)}
        table |= {name: [value] * len(rows) for name, value in drawn.items()}
        return Cohort(architecture, states, table)

    def _tokens(self) -> tuple[Tensor, Tensor, int]:
        train, test, vocabulary = tokens_of(self.text, self.root)
        if min(len(train), len(test)) < self.context + 2:
            raise ZooError(
                message(
                    f"language: {self.text} is too short",
                    expected=f"{self.context + 2} characters in its last tenth",
                    got=str(len(test)),
                )
            )
        return train, test, vocabulary

    def _hyper_parameters(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Hyper-parameters of a whole cohort, ``(size,)`` each."""
        ranges = RANGES | {"steps": (float(self.steps[0]), float(self.steps[1]))}
        meta = {name: log_uniform(self.size, *ends, generator) for name, ends in ranges.items()}
        meta["steps"] = meta["steps"].round().long().clamp(min=self.checkpoints)
        meta["noise"] = 0.3 * torch.rand(self.size, generator=generator).square()
        return meta

    def _train(
        self,
        module: nn.Module,
        options: dict[str, Any],
        meta: dict[str, Tensor],
        saved_at: Tensor,
        generator: torch.Generator,
    ) -> Trained:
        state = initial_states(lambda: gpt(**options), self.size, generator)
        for x in state.values():
            if x.dim() == 3:  # matrices
                x.mul_(meta["init"][:, None, None])
        train = self._tokens()[0]
        batch = text_batches(
            train, (self.size, self.batch, self.context), generator, meta["fraction"], meta["noise"]
        )
        how = Training(
            meta["steps"],
            meta["learning_rate"],
            meta["weight_decay"],
            "adamw",
            warmup=WARMUP,
            clip=CLIP,
        )
        return train_many(state, vmapped(module.train(), batch, characters), how, save_at=saved_at)


def text_batches(
    tokens: Tensor,
    shape: tuple[int, int, int],
    generator: torch.Generator,
    fraction: Tensor | None = None,
    noise: Tensor | None = None,
) -> Batch:
    """Random windows of a text for every network of a stack.

    Args:
        tokens: The text.
        shape: Networks, windows in a batch, context.
        generator: Drawn from for the whole stack in every step, so that a network gets the same
            windows whoever else is still in training.
        fraction: Share of the text, from its start, that every network sees.
        noise: Share of characters that every network gets wrong.

    Returns:
        Batches for `wspace.zoo.train.vmapped`.
    """
    n, size, context = shape
    places = torch.full((n,), float(len(tokens) - context))
    if fraction is not None:
        places = (places * fraction).floor().clamp(min=1)
    last = int(tokens.max()) + 1

    def batch(step: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        del step
        starts = (torch.rand(n, size, generator=generator) * places[:, None]).long()
        chosen = windows(tokens, starts.clamp(max=len(tokens) - context - 1), context)
        if noise is not None:
            wrong = torch.rand(chosen.shape, generator=generator) < noise[:, None, None]
            chosen = torch.where(
                wrong, torch.randint(last, chosen.shape, generator=generator), chosen
            )
        return chosen[rows, :, :-1], chosen[rows, :, 1:]

    return batch


def judge(
    module: nn.Module, states: dict[str, Tensor], tokens: Tensor, count: int, context: int
) -> Tensor:
    """Mean loss of every network on windows at equal distances, nats per token, ``(n,)``.

    Args:
        module: The architecture.
        states: Stacked.
        tokens: The text.
        count: Number of windows.
        context: Their length.

    Returns:
        Losses.
    """
    inputs, targets = fixed_windows(tokens, count, context)

    def read(outputs: Tensor) -> Tensor:
        return characters(outputs, targets.expand(len(outputs), -1, -1))

    return evaluate_many(module.eval(), states, inputs, read, networks=8)
