"""Training many small networks of one architecture side by side, each in its own way.

States are stacked along a leading axis and one step moves all of them: the forward and backward
pass layer by layer (`vmapped`) or by a gradient written by hand, the optimizer on one flat
tensor, a row for each network. Networks that have finished leave the stack, so they cost nothing.
Every network gets what it would have got alone, to rounding; `tests/test_zoo_train.py` holds this
against `torch.optim`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import pi, prod
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from wspace.errors import ZooError, message
from wspace.zoo.stacked import Stacked

Gradient = Callable[[dict[str, Tensor], int, Tensor], tuple[Tensor, Mapping[str, Tensor]]]
"""(states ``(m, *shape)``, step, places ``(m,)`` of these networks in the whole stack) → losses
``(m,)`` and the gradient of each network's loss in its parameters, by name. Buffers among the
states may be changed in place."""

Batch = Callable[[int, Tensor], tuple[Tensor, Tensor]]
"""(step, places ``(m,)``) → inputs and targets, ``(m, b, …)``, or ``(b, …)`` for all networks."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""(outputs ``(m, b, …)``, targets) → losses ``(m,)``."""


@dataclass(frozen=True)
class Training:
    """How networks are trained; a tensor ``(n,)`` gives every network a number of its own.

    Attributes:
        steps: Steps of the optimizer.
        learning_rate: Its rate at the peak of the schedule.
        weight_decay: Added to the gradient (``"adam"``, ``"sgd"``), or decoupled from it
            (``"adamw"``), as in `torch.optim`.
        optimizer: ``"adam"``, ``"adamw"`` or ``"sgd"`` (with momentum).
        momentum: Decay of the first moment; that of the second is 0.999.
        schedule: ``"constant"``, or ``"cosine"`` down to zero at each network's last step.
        warmup: Steps over which the rate rises linearly.
        clip: Bound of each network's gradient norm; None for no bound.
    """

    steps: int | Tensor
    learning_rate: float | Tensor = 1e-3
    weight_decay: float | Tensor = 0.0
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    momentum: float = 0.9
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: int = 0
    clip: float | None = None


class Trained(NamedTuple):
    """What training made.

    Attributes:
        state: Stacked states, ``(n, *shape)`` by name.
        loss: Loss before every network's last step, ``(n,)``.
        steps: Steps that every network took, ``(n,)``.
        diverged: Networks whose loss or gradient stopped being finite, ``(n,)``; they are as they
            were before that step.
        saved: States at the steps that were asked for, ``(n, T, *shape)`` by name; empty if none
            were. A network that stopped earlier keeps its last state.
    """

    state: dict[str, Tensor]
    loss: Tensor
    steps: Tensor
    diverged: Tensor
    saved: dict[str, Tensor]


def train_many(
    state: Mapping[str, Tensor],
    gradient: Gradient,
    training: Training,
    *,
    buffers: Sequence[str] = (),
    save_at: Tensor | None = None,
    stop: Callable[[int, Tensor, Tensor], Tensor] | None = None,
) -> Trained:
    """Trains a stack of networks.

    Args:
        state: Initial parameters and buffers, ``(n, *shape)`` by name; left as they are.
        gradient: Losses and gradients, see `Gradient`; `vmapped` makes one from a module.
        training: Optimizer, with numbers for all networks or for each.
        buffers: Names in `state` that are not trained.
        save_at: Steps after which states are kept, ``(T,)``, or ``(n, T)`` for each network; 0 is
            the initial state.
        stop: (steps taken, losses ``(m,)`` before the last step, places ``(m,)``) → which networks
            are done, ``(m,)`` booleans. Called after every step.

    Returns:
        Final states and what happened.

    Raises:
        ZooError: If the stack is empty, or its tensors disagree about its size.

    Example:
        >>> net = nn.Linear(3, 1)
        >>> state = initial_states(lambda: nn.Linear(3, 1), 5, torch.Generator().manual_seed(0))
        >>> x = torch.randn(5, 20, 3, generator=torch.Generator().manual_seed(1))
        >>> square = lambda out, y: (out - y).square().mean((1, 2))
        >>> slope = vmapped(net, lambda step, rows: (x[rows], x[rows].sum(-1, True)), square)
        >>> done = train_many(state, slope, Training(steps=300, learning_rate=0.1))
        >>> bool((done.loss < 1e-3).all()), done.state["weight"].shape
        (True, torch.Size([5, 1, 3]))
    """
    stack = _Stack(state, set(buffers), training)
    saver = _Saver(stack, save_at)
    saver.save(0, stack)
    step = 0
    stack.retire(stack.steps[stack.rows] <= 0)
    while len(stack.rows):
        before = {name: x.clone() for name, x in stack.buffers.items()}
        losses, slopes = gradient(stack.views | stack.buffers, step, stack.rows)
        slope = torch.cat([slopes[name].flatten(1) for name in stack.names], 1)
        good = losses.isfinite() & slope.isfinite().all(1)
        if not bool(good.all()):
            stack.diverged[stack.rows[~good]] = True
            slope, losses = slope[good], losses[good]
            for name, x in stack.buffers.items():
                x[~good] = before[name][~good]
            stack.retire(~good)
            if not len(stack.rows):
                break
        stack.move(slope, step)
        step += 1
        stack.note(losses, step)
        saver.save(step, stack)
        done = stack.steps[stack.rows] <= step
        if stop is not None:
            done = done | stop(step, losses, stack.rows)
        if bool(done.any()):
            stack.retire(done)
    saver.fill(stack)
    return Trained(stack.final, stack.loss, stack.taken, stack.diverged, saver.saved)


def vmapped(module: nn.Module, batch: Batch, loss: Loss, *, shared: bool = False) -> Gradient:
    """Losses and gradients of a stack of networks, layer by layer (`Stacked`).

    Args:
        module: The architecture, on any device (the meta device too), in the mode it trains in;
            float buffers are taken from the stack and may be changed in place (BatchNorm).
        batch: Gives every step's inputs and targets.
        loss: One loss for each network.
        shared: True if all networks see the same inputs, ``(b, …)``.

    Returns:
        A function for `train_many`.
    """
    run = Stacked(module, shared=shared)

    def gradient(
        state: dict[str, Tensor], step: int, rows: Tensor
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        inputs, targets = batch(step, rows)
        return run.gradient(state, inputs, lambda outputs: loss(outputs, targets))

    return gradient


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of every network.

    Args:
        outputs: Logits, ``(m, b, classes)``.
        targets: Labels, ``(m, b)`` or ``(b,)``.

    Returns:
        ``(m,)``.
    """
    targets = targets.expand(outputs.shape[:2])
    return nn.functional.cross_entropy(outputs.mT, targets, reduction="none").mean(1)


def initial_states(
    factory: Callable[[], nn.Module], count: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Fresh networks as their own constructor initialises them, stacked.

    Args:
        factory: Makes one network with random weights, from torch's global random numbers, which
            are put back afterwards.
        count: How many.
        generator: Source of the seed.

    Returns:
        Parameters and float buffers, ``(count, *shape)`` by name; what is tied is there once.
    """
    seed = int(torch.randint(2**62, (1,), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = [factory() for _ in range(count)]
    states = [dict(m.named_parameters()) | dict(m.named_buffers()) for m in made]
    return {
        name: torch.stack([s[name].detach() for s in states])
        for name, x in states[0].items()
        if x.is_floating_point()
    }


def evaluate_many(
    module: nn.Module,
    state: Mapping[str, Tensor],
    inputs: Tensor,
    read: Callable[[Tensor], Tensor],
    *,
    networks: int = 64,
    inputs_at_once: int | None = None,
) -> Tensor:
    """A number, or several, from every network's answers to the same inputs.

    Args:
        module: The architecture, in the mode it is evaluated in.
        state: Stacked states, ``(n, *shape)`` by name.
        inputs: ``(b, …)``.
        read: Outputs ``(m, b, …)`` of some networks → ``(m, …)``.
        networks: How many run at once.
        inputs_at_once: How many inputs do, where the module treats each by itself; all by default.

    Returns:
        ``(n, …)``.
    """
    run = Stacked(module, shared=True)
    parts = inputs.split(inputs_at_once or max(1, len(inputs)))
    count = len(next(iter(state.values())))
    out: list[Tensor] = []
    with torch.no_grad():
        for start in range(0, count, networks):
            some = {name: x[start : start + networks] for name, x in state.items()}
            out.append(read(torch.cat([run(some, x) for x in parts], 1)))
    return torch.cat(out)


# ------------------------------------------------------------------------- the stack


class _Stack:
    """Networks in training: one row each in flat tensors, of which parameters are views."""

    def __init__(self, state: Mapping[str, Tensor], buffers: set[str], training: Training) -> None:
        self.names = [name for name in state if name not in buffers]
        self.shapes = {name: tuple(state[name].shape[1:]) for name in self.names}
        sizes = {len(x) for x in state.values()}
        if len(sizes) != 1 or 0 in sizes or not self.names:
            raise ZooError(
                message(
                    "train_many: not a stack of networks",
                    expected="tensors (n, *shape) with one n of at least 1",
                    got=[f"{name}: {tuple(x.shape)}" for name, x in state.items()],
                )
            )
        n = sizes.pop()
        self.flat = torch.cat([state[name].detach().flatten(1) for name in self.names], 1)
        self.buffers = {name: state[name].detach().clone() for name in state if name in buffers}
        self.final = {name: x.detach().clone() for name, x in state.items()}
        like = self.flat
        self.rows = torch.arange(n, device=like.device)
        self.how = training
        self.steps = torch.as_tensor(training.steps, device=like.device).expand(n)
        self.rate = torch.as_tensor(training.learning_rate).to(like).expand(n)
        self.decay = torch.as_tensor(training.weight_decay).to(like).expand(n)
        self.first = torch.zeros_like(like)
        self.second = torch.zeros_like(like) if training.optimizer != "sgd" else like[:, :0]
        self.loss = like.new_full((n,), float("nan"))
        self.taken = torch.zeros(n, dtype=torch.long, device=like.device)
        self.diverged = torch.zeros(n, dtype=torch.bool, device=like.device)
        self.views = self._views()

    def _views(self) -> dict[str, Tensor]:
        parts = self.flat.split([prod(s) for s in self.shapes.values()], 1)
        return {
            name: part.unflatten(1, shape) if shape else part.squeeze(1)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def note(self, losses: Tensor, step: int) -> None:
        """Writes down the losses of the networks that were moved, and the steps they took."""
        self.loss[self.rows], self.taken[self.rows] = losses, step

    def retire(self, done: Tensor) -> None:
        """Puts finished networks aside and closes the gap."""
        if not bool(done.any()):
            return
        for name, x in (self.views | self.buffers).items():
            self.final[name][self.rows[done]] = x[done]
        left = ~done
        self.rows, self.flat = self.rows[left], self.flat[left]
        self.first, self.second = self.first[left], self.second[left]
        self.buffers = {name: x[left] for name, x in self.buffers.items()}
        self.views = self._views()

    def move(self, slope: Tensor, step: int) -> None:
        """One step of the optimizer, in place."""
        how, rows = self.how, self.rows
        rate, decay = self._rates(step)[:, None], self.decay[rows][:, None]
        if how.clip is not None:
            norm = torch.linalg.vector_norm(slope, dim=1, keepdim=True)
            slope = slope * (how.clip / (norm + 1e-6)).clamp(max=1)
        if how.optimizer == "adamw":
            self.flat.mul_(1 - rate * decay)
        elif isinstance(how.weight_decay, Tensor) or how.weight_decay:
            slope = torch.addcmul(slope, decay, self.flat)
        if how.optimizer == "sgd":
            self.first.mul_(how.momentum).add_(slope)
            self.flat.addcmul_(rate, self.first, value=-1)
            return
        self.first.lerp_(slope, 1 - how.momentum)
        self.second.mul_(0.999).addcmul_(slope, slope, value=0.001)
        root = (self.second / (1 - 0.999 ** (step + 1))).sqrt_().add_(1e-8)
        move = torch.div(self.first, root, out=root).mul_(rate / (1 - how.momentum ** (step + 1)))
        self.flat.sub_(move)

    def _rates(self, step: int) -> Tensor:
        """Learning rate of every network in this step, ``(m,)``."""
        how, rate = self.how, self.rate[self.rows]
        if how.schedule == "cosine":
            share = step / self.steps[self.rows].to(rate)
            rate = rate * (0.5 + 0.5 * torch.cos(pi * share))
        return rate * min(1.0, (step + 1) / how.warmup) if how.warmup else rate


class _Saver:
    """Keeps the states of a stack at the steps that were asked for."""

    def __init__(self, stack: _Stack, at: Tensor | None) -> None:
        n = len(stack.rows)
        self.saved: dict[str, Tensor] = {}
        self.due: set[int] = set()
        self.at = torch.empty(n, 0, dtype=torch.long)
        if at is not None:
            self.at = at.to(stack.rows.device).expand(n, at.shape[-1])
            self.due = set(at.flatten().tolist())
            for name, x in stack.final.items():
                self.saved[name] = x[:, None].repeat(1, at.shape[-1], *[1] * (x.dim() - 1))

    def save(self, step: int, stack: _Stack) -> None:
        """Keeps the present state of the networks for which it is due."""
        if step not in self.due:
            return
        row, slot = (self.at[stack.rows] == step).nonzero(as_tuple=True)
        for name, x in (stack.views | stack.buffers).items():
            self.saved[name][stack.rows[row], slot] = x[row]

    def fill(self, stack: _Stack) -> None:
        """Gives networks that stopped before a slot was due their last state there."""
        row, slot = (self.at > stack.taken[:, None]).nonzero(as_tuple=True)
        for name, x in self.saved.items():
            x[row, slot] = stack.final[name][row]
