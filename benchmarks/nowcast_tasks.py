"""What `nowcast_quality` trains: small networks on images and text, each with its data.

`HELD_OUT` are the tasks of the table; no trajectory of theirs, and of the last three no network of
their kind, was in meta-training. `TUNING` are tasks of the meta-training zoo (with other seeds):
settings of the nowcaster are chosen on them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from datasets_zoo.images import standardised
from datasets_zoo.language import fixed_windows, gpt, tokens_of, windows
from datasets_zoo.trajectories import plain_cnn

CONTEXT = 32
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """A network, its data, and how it is trained.

    Attributes:
        make: Makes the network from torch's global random numbers.
        data: (root) → `Data`.
        batch: Examples in a step.
        rates: Learning rates of which the best is taken.
    """

    make: Callable[[], nn.Module]
    data: Callable[[str], "Data"]
    batch: int
    rates: tuple[float, ...]


@dataclass(frozen=True)
class Data:
    """Examples.

    Attributes:
        draw: (count, generator) → a random batch of training examples.
        validation: On which curves are measured, and learning rates chosen.
        held: Training examples on which the guard judges jumps.
        example: An input for tracing.
    """

    draw: Callable[[int, torch.Generator], Pair]
    validation: Pair
    held: Pair
    example: Tensor


@lru_cache(maxsize=4)
def images(name: str, pool: int, root: str) -> Data:
    """The last 5,000 training images are put aside, of which 1,000 are for validation."""
    x, y, *_ = standardised(name, root)
    x = F.avg_pool2d(x, pool)
    cut = len(y) - 5000

    def draw(count: int, generator: torch.Generator) -> Pair:
        chosen = torch.randint(cut, (count,), generator=generator)
        return x[chosen], y[chosen]

    held = torch.linspace(0, cut - 1, 256).long()
    valid = torch.linspace(cut, len(y) - 1, 1000).long()
    return Data(draw, (x[valid], y[valid]), (x[held], y[held]), x[:1])


@lru_cache(maxsize=4)
def text(root: str) -> Data:
    """Shakespeare by characters: training text, and windows of the last tenth for validation."""
    train, test, _ = tokens_of("tinyshakespeare", root)

    def draw(count: int, generator: torch.Generator) -> Pair:
        starts = torch.randint(len(train) - CONTEXT - 1, (count,), generator=generator)
        chosen = windows(train, starts, CONTEXT)
        return chosen[:, :-1], chosen[:, 1:]

    valid, held = fixed_windows(test, 128, CONTEXT), fixed_windows(train, 64, CONTEXT)
    return Data(draw, valid, held, train[None, :CONTEXT])


class Logits(nn.Module):
    """A language model of transformers, as a function from tokens to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(input_ids=x, use_cache=False).logits


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    options: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    options |= {"bos_token_id": None, "eos_token_id": None}
    config = GPT2Config(
        vocab_size=65, n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=4, **options
    )
    return Logits(GPT2LMHeadModel(config))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=65,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    return Logits(LlamaForCausalLM(config))


class Residual(nn.Module):
    """Two convolutions with BatchNorm beside a shortcut."""

    def __init__(self, a: int, b: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b)
        self.conv2, self.norm2 = nn.Conv2d(b, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b)
        self.short = nn.Conv2d(a, b, 1, stride, bias=False) if a != b or stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return (y + (x if self.short is None else self.short(x))).relu()


class ResNet(nn.Module):
    """A stem, three residual blocks, average, a linear layer."""

    def __init__(self, channels: int = 3, width: int = 8) -> None:
        super().__init__()
        self.stem, self.norm = (
            nn.Conv2d(channels, width, 3, 2, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.blocks = nn.Sequential(
            Residual(width, width, 1),
            Residual(width, 2 * width, 2),
            Residual(2 * width, 4 * width, 2),
        )
        self.head = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.norm(self.stem(x)).relu()).mean((2, 3)))


def loss_of(module: nn.Module, pair: Pair) -> Tensor:
    """Mean cross-entropy, nats."""
    out = module(pair[0])
    return F.cross_entropy(out.flatten(0, -2), pair[1].flatten())


CIFAR, MNIST = partial(images, "cifar10_16x16", 1), partial(images, "mnist", 2)
RATES, HIGHER = (1e-3, 2e-3, 4e-3, 8e-3), (2e-3, 4e-3, 8e-3, 1.6e-2)

HELD_OUT = {
    "CNN, CIFAR-10": Task(lambda: plain_cnn(3, (12, 24, 24, 24)), CIFAR, 32, RATES),
    "CNN, MNIST": Task(lambda: plain_cnn(1, (24, 48)), MNIST, 32, RATES),
    "ResNet, CIFAR-10": Task(ResNet, CIFAR, 32, RATES),
    "GPT-2, text": Task(gpt2, text, 16, HIGHER),
    "Llama, text": Task(llama, text, 16, HIGHER),
}

TUNING = {
    "tune CNN, CIFAR-10": Task(lambda: plain_cnn(3, (8, 16, 16)), CIFAR, 32, RATES),
    "tune CNN, MNIST": Task(lambda: plain_cnn(1), MNIST, 32, RATES),
    "tune GPT, text": Task(lambda: gpt(65, CONTEXT, width=24, blocks=1), text, 16, HIGHER),
}
TASKS = HELD_OUT | TUNING
