"""What a client does: it trains a network on its own examples, and judges it there.

Several clients of a round run side by side: their states are stacked along a leading axis, a step
is one computation for all of them, and every client gets what it would have got alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wspace.errors import HyperError, message
from wspace.hyper.call import call

Part = Literal["train", "val", "test"]


class Examples(NamedTuple):
    """Inputs and labels of one part of a client's data.

    Attributes:
        x: Inputs, ``(n, …)``.
        y: Labels, int64 ``(n,)``.
    """

    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Client:
    """One client's data, which never leave it.

    Attributes:
        train: Examples that it trains on and describes itself by.
        val: Examples by which options are chosen.
        test: Examples that are reported.
    """

    train: Examples
    val: Examples
    test: Examples

    def __post_init__(self) -> None:
        parts = {"train": self.train, "val": self.val, "test": self.test}
        bad = [
            f"{name}: {len(part.x)} inputs, {len(part.y)} labels"
            for name, part in parts.items()
            if len(part.x) != len(part.y) or not len(part.y)
        ]
        if bad:
            raise HyperError(
                message(
                    "Client: parts without examples, or with labels missing",
                    expected="as many labels as inputs, at least one",
                    got=bad,
                )
            )

    def to(self, device: torch.device | str) -> Self:
        """The same client, its examples on a device."""
        parts = (self.train, self.val, self.test)
        return type(self)(*[Examples(part.x.to(device), part.y.to(device)) for part in parts])

    def shares(self, classes: int) -> Tensor:
        """How often each class is among the training examples, ``(classes,)``, summing to 1."""
        return torch.bincount(self.train.y, minlength=classes).double() / len(self.train.y)


@dataclass(frozen=True)
class LocalTraining:
    """Gradient steps on a client: `torch.optim.SGD` with clipped gradients.

    Attributes:
        steps: How many, k.
        lr: Learning rate, η.
        momentum: Decay of the velocity, which begins at zero in every round.
        weight_decay: Added to the gradient, times the weights.
        batch_size: Examples in a step. Batches run on through shuffles of a client's data, so a
            client with fewer examples sees some of them twice.
        clip: Bound of each client's gradient norm; None for no bound.
    """

    steps: int = 20
    lr: float = 5e-3
    momentum: float = 0.9
    weight_decay: float = 5e-5
    batch_size: int = 32
    clip: float | None = 50.0

    def __post_init__(self) -> None:
        if self.steps < 0 or self.batch_size < 1:
            raise HyperError(
                message(
                    "LocalTraining: cannot train like this",
                    expected="steps of at least 0, a batch_size of at least 1",
                    got=str(self),
                )
            )


def draw_batches(
    clients: Sequence[Client], steps: int, size: int, generator: torch.Generator | None = None
) -> Examples:
    """Training batches of several clients.

    Args:
        clients: B clients.
        steps: Batches for each.
        size: Examples in a batch.
        generator: Source of the shuffles.

    Returns:
        Inputs ``(B, steps, size, …)`` and labels ``(B, steps, size)``.
    """
    drawn: list[Examples] = []
    for client in clients:
        n, wanted = len(client.train.y), steps * size
        shuffles = [torch.randperm(n, generator=generator) for _ in range(-(-wanted // n))]
        rows = torch.cat([*shuffles, torch.empty(0, dtype=torch.long)])[:wanted]
        rows = rows.view(steps, size).to(client.train.y.device)
        drawn.append(Examples(client.train.x[rows], client.train.y[rows]))
    return Examples(torch.stack([d.x for d in drawn]), torch.stack([d.y for d in drawn]))


def local_steps(
    module: nn.Module, states: Mapping[str, Tensor], batches: Examples, how: LocalTraining
) -> tuple[dict[str, Tensor], Tensor]:
    """Trains the networks of several clients side by side.

    Args:
        module: The network that clients train; its own weights are not used.
        states: What each client begins with, ``(B, *shape)`` by name; left as they are.
        batches: Inputs ``(B, steps, size, …)`` and labels, of as many steps as are taken.
        how: Rate, momentum, weight decay, clipping.

    Returns:
        States after the last step, and each client's loss in its first step, ``(B,)`` (NaN if
        there is no step).
    """
    now = {name: x.detach().clone() for name, x in states.items()}
    velocity = {name: torch.zeros_like(x) for name, x in now.items()}
    clients, steps = batches.y.shape[:2]
    first = next(iter(now.values())).new_full((clients,), float("nan"))
    for k in range(steps):
        losses, slopes = _gradients(module, now, batches.x[:, k], batches.y[:, k])
        first = losses if k == 0 else first
        slopes = slopes if how.clip is None else _clipped(slopes, how.clip)
        for name, x in now.items():
            slope = slopes[name].add(x, alpha=how.weight_decay)
            velocity[name].mul_(how.momentum).add_(slope)
            x.add_(velocity[name], alpha=-how.lr)
    return now, first


def train_locally(
    module: nn.Module,
    states: Mapping[str, Tensor],
    clients: Sequence[Client],
    how: LocalTraining,
    generator: torch.Generator | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Trains on the clients' own examples: `draw_batches`, then `local_steps`.

    Args:
        module: The network that clients train.
        states: What each client begins with, ``(B, *shape)`` by name.
        clients: B clients.
        how: Steps and their options.
        generator: Source of the shuffles.

    Returns:
        As `local_steps`.
    """
    batches = draw_batches(clients, how.steps, how.batch_size, generator)
    return local_steps(module, states, batches, how)


@torch.no_grad()
def accuracies(
    module: nn.Module,
    states: Mapping[str, Tensor],
    clients: Sequence[Client],
    part: Part = "test",
    *,
    masked: bool = False,
) -> Tensor:
    """How often each client's network is right on its own examples.

    Args:
        module: The network.
        states: Weights for each client, ``(B, *shape)`` by name.
        clients: B clients.
        part: Which of their examples.
        masked: True to choose only among classes that the client has training examples of. (The
            logits of others are taken out. Code published for PeFLL multiplies them by zero, and a
            zero may still be the largest.)

    Returns:
        Shares between 0 and 1, ``(B,)``.
    """
    examples: list[Examples] = [getattr(client, part) for client in clients]
    most = max(len(e.y) for e in examples)
    x = torch.stack([_filled(e.x, most) for e in examples])
    logits = call(module, states, (x,), inputs="paired")
    found: list[Tensor] = []
    for answer, e, client in zip(logits, examples, clients, strict=True):
        answer = answer[: len(e.y)]  # noqa: PLW2901
        if masked:
            absent = client.shares(answer.shape[-1]) == 0
            answer = answer.masked_fill(absent, -torch.inf)  # noqa: PLW2901
        found.append((answer.argmax(-1) == e.y).double().mean())
    return torch.stack(found)


def _gradients(
    module: nn.Module, states: Mapping[str, Tensor], x: Tensor, y: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Every client's mean cross entropy, ``(B,)``, and its gradient in that client's weights."""
    with torch.enable_grad():
        leaves = {name: v.detach().requires_grad_() for name, v in states.items()}
        logits = call(module, leaves, (x,), inputs="paired")
        each = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none")
        losses = each.view(y.shape).mean(1)
        slopes = torch.autograd.grad(losses.sum(), list(leaves.values()), materialize_grads=True)
    return losses.detach(), dict(zip(leaves, slopes, strict=True))


def _clipped(slopes: dict[str, Tensor], most: float) -> dict[str, Tensor]:
    """Gradients of every client, scaled down where their norm exceeds a bound."""
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in slopes.values()]).norm(dim=0)
    factor = (most / (norms + 1e-6)).clamp(max=1)
    return {name: g * factor.view(-1, *[1] * (g.dim() - 1)) for name, g in slopes.items()}


def _filled(x: Tensor, length: int) -> Tensor:
    """Rows with zeros after the last, ``(length, …)``."""
    return torch.cat([x, x.new_zeros(length - len(x), *x.shape[1:])])
