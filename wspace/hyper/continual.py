"""Tasks one after another: a hypernetwork that keeps the weights it made for earlier ones.

Von Oswald et al. (2020), "Continual learning with hypernetworks" (arXiv 1906.00695), section 2: of
task T the loss is

    loss(Θ, e_T) + β / (T - 1) · Σ_{t < T} ‖ f(e_t, Θ*) - f(e_t, Θ + ΔΘ) ‖²

with the parameters Θ* before the task, the step ΔΘ that the optimiser would take on the task's loss
alone (a constant, and optional), and the conditions e_t of earlier tasks, which stay as they are.
The squares are summed over weights, not averaged.
"""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm  # pyright: ignore[reportPrivateUsage]
from torch.utils._pytree import tree_map

from wspace.errors import HyperError, message

Read = Callable[[nn.Module, Any], Mapping[str, Tensor]]
"""(hypernetwork, conditions of n tasks) → what is to stay, by name, ``(n, …)``."""

TARGETS = ("snapshot", "stored")
"""How the weights of earlier tasks are remembered."""


def generated(hyper: nn.Module, conditions: Any) -> Mapping[str, Tensor]:
    """The generated weights, ``(n, *shape)`` by name; see `Read`."""
    return hyper.generate(conditions)  # pyright: ignore[reportCallIssue]


class OutputRegularizer:
    """Penalty on changes of what a hypernetwork made for earlier tasks, whatever its head.

    Args:
        hyper: The hypernetwork.
        weight: β.
        targets: ``"snapshot"`` makes the old weights anew from a copy of the parameters in every
            step: memory for one hypernetwork. ``"stored"`` keeps them: memory for T - 1 targets.
            The penalty is the same.
        subset: Earlier tasks that are drawn in each step; None for all. The mean over them is
            unbiased for the mean over all.
        constant: Beginnings of names of parameters that the penalty takes as constants: those of
            the condition, so that earlier tasks' embeddings get no gradient.
        read: What is to stay; by default the generated weights.

    Raises:
        HyperError: If an option makes no sense.

    Example:
        >>> class Affine(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.condition, self.head = nn.Embedding(3, 4), nn.Linear(4, 6)
        ...     def generate(self, task):
        ...         return {"weight": self.head(self.condition(task)).view(-1, 2, 3)}
        >>> hyper = Affine()
        >>> keep = OutputRegularizer(hyper, weight=0.5)
        >>> keep.start(torch.arange(2))  # tasks 0 and 1 are done
        >>> keep.penalty().item()
        0.0
        >>> with torch.no_grad():
        ...     _ = hyper.head.bias.add_(2.0)
        >>> round(keep.penalty().item(), 4)  # half of the mean over tasks of 6 · 2²
        12.0
    """

    def __init__(
        self,
        hyper: nn.Module,
        weight: float = 0.01,
        *,
        targets: str = "snapshot",
        subset: int | None = None,
        constant: Sequence[str] = ("condition.",),
        read: Read = generated,
    ) -> None:
        if targets not in TARGETS or weight < 0 or (subset is not None and subset < 1):
            raise HyperError(
                message(
                    "OutputRegularizer: options",
                    expected=f"weight from 0, targets {' or '.join(TARGETS)}, subset from 1",
                    got=f"{weight}, {targets!r}, {subset}",
                )
            )
        self.hyper, self.weight, self.targets, self.subset = hyper, weight, targets, subset
        self.constant, self.read = tuple(constant), read
        self.conditions: Any = None
        self.count = 0
        self.importance: dict[str, Tensor] = {}
        self.snapshot: dict[str, Tensor] = {}
        self.stored: dict[str, Tensor] = {}

    @torch.no_grad()
    def start(self, conditions: Any, importance: Mapping[str, Tensor] | None = None) -> None:
        """Before a new task: what the hypernetwork makes now for earlier ones is to stay.

        Args:
            conditions: Of the earlier tasks, along the first axis of each of its tensors; None if
                there are none.
            importance: Factors of the squares, by name, that broadcast to ``(n, *shape)``: Fisher
                information (`wspace.hyper.fisher`), or 0 for what no task uses (`used_outputs`).
                What is not named has factor 1.

        Raises:
            HyperError: If importances name nothing that is kept, or do not fit, or are negative.
        """
        self.snapshot, self.stored, self.importance, self.count = {}, {}, {}, 0
        self.conditions = None
        if conditions is None:
            return
        made = self._made(conditions, self._now())
        count = len(next(iter(made.values())))
        self.importance = _fitting(importance or {}, made)
        self.conditions = tree_map(lambda c: c.detach().clone(), conditions)
        self.count = count
        if self.targets == "stored":
            self.stored = {name: x.clone() for name, x in made.items()}
        else:
            named = self.hyper.named_parameters()
            self.snapshot = {name: p.detach().clone() for name, p in named}

    def penalty(
        self,
        shift: Mapping[str, Tensor] | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The penalty, with its weight; 0 if there are no earlier tasks.

        Args:
            shift: ΔΘ by names of the hypernetwork's parameters, see `lookahead`; no gradient goes
                through it, and what is constant is not shifted.
            generator: Draws the subset.

        Returns:
            A number, with a gradient in the hypernetwork's parameters that are not constant.
        """
        if not self.count:
            return next(iter(self.hyper.parameters())).new_zeros(())
        rows = self._rows(generator)
        chosen = tree_map(lambda c: c[rows], self.conditions)
        now = self._now(shift)
        if self.stored:
            before: Mapping[str, Tensor] = {name: x[rows] for name, x in self.stored.items()}
        else:
            with torch.no_grad():
                before = self._made(chosen, self.snapshot)
        squares: list[Tensor] = []
        for name, x in self._made(chosen, now).items():
            square = (x - before[name]).square()
            if name in self.importance:
                factor = self.importance[name]
                square = square * (factor[rows] if len(factor) == self.count else factor)
            squares.append(square.flatten(1).sum(1))
        return self.weight * torch.stack(squares).sum(0).mean()

    def _rows(self, generator: torch.Generator | None) -> Tensor:
        device = next(self.hyper.parameters()).device
        if self.subset is None or self.subset >= self.count:
            return torch.arange(self.count, device=device)
        return torch.randperm(self.count, generator=generator)[: self.subset].to(device)

    def _now(self, shift: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Parameters as the penalty takes them, by name."""
        found: dict[str, Tensor] = {}
        for name, p in self.hyper.named_parameters():
            if name.startswith(self.constant) or not p.requires_grad:
                found[name] = p.detach()
            else:
                found[name] = p if not shift or name not in shift else p + shift[name].detach()
        return found

    def _made(self, conditions: Any, params: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        named = {f"hyper.{name}": p for name, p in params.items()}
        return functional_call(_Reading(self.hyper, self.read), named, (conditions,))

    def state_dict(self) -> dict[str, Any]:
        """What the penalty remembers, as tensors: for a checkpoint."""
        names = ("conditions", "count", "importance", "snapshot", "stored")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        for name, value in state.items():
            setattr(self, name, value)


class _Reading(nn.Module):
    """A module whose call is `read`, for `functional_call`."""

    def __init__(self, hyper: nn.Module, read: Read) -> None:
        super().__init__()
        self.hyper, self.read = hyper, read

    def forward(self, conditions: Any) -> Mapping[str, Tensor]:
        return self.read(self.hyper, conditions)


def _fitting(importance: Mapping[str, Tensor], made: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Importances with the axis of tasks, once it is seen that they fit."""
    bad = [f"{name}: no such weights" for name in importance.keys() - made.keys()]
    found: dict[str, Tensor] = {}
    for name, given in importance.items():
        if name not in made:
            continue
        shape = made[name].shape
        factor = given.detach()[(None,) * (len(shape) - given.dim())]
        fits = factor.dim() == len(shape) and all(
            n in {1, m} for n, m in zip(factor.shape, shape, strict=True)
        )
        if not fits or bool((factor < 0).any()):
            bad.append(f"{name}: {tuple(factor.shape)} for {tuple(shape)}, or negative")
        found[name] = factor
    if bad:
        raise HyperError(
            message(
                "OutputRegularizer: importances do not fit",
                expected=f"factors from 0 of {', '.join(made)}",
                got=sorted(bad),
            )
        )
    return found


def used_outputs(
    shapes: Mapping[str, Sequence[int]], classes: Sequence[Sequence[int]]
) -> dict[str, Tensor]:
    """Importances that leave out the outputs that a task does not use.

    Args:
        shapes: Shapes of the last layer's tensors by name; their first axis is that of the outputs.
        classes: Outputs that each earlier task uses.

    Returns:
        1 for what is used and 0 for what is not, ``(n, outputs, 1 …)`` by name.

    Example:
        >>> used_outputs({"last.bias": (4,)}, [(0, 1), (2, 3)])["last.bias"].tolist()
        [[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]
    """
    found: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        used = torch.zeros(len(classes), shape[0])
        for row, those in zip(used, classes, strict=True):
            row[list(those)] = 1
        found[name] = used.reshape(len(classes), shape[0], *[1] * (len(shape) - 1))
    return found


@torch.no_grad()
def lookahead(
    optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, Tensor]]
) -> dict[str, Tensor]:
    """The step that an optimiser would take with the gradients that are there; it takes none.

    Args:
        optimizer: `torch.optim.SGD`, `Adam` or `AdamW`, with any of their options except
            ``maximize``.
        named: Parameters by name, ``hyper.named_parameters()``; those without a gradient have no
            step, as with the optimiser.

    Returns:
        Change of each parameter by name.

    Raises:
        HyperError: If the optimiser is another one.
    """
    step = _STEPS.get(type(optimizer))
    if step is None or any(group.get("maximize") for group in optimizer.param_groups):
        raise HyperError(
            message(
                f"lookahead: no rule for {type(optimizer).__name__}",
                expected="SGD, Adam or AdamW, that minimise",
                help="without lookahead the penalty is at the present parameters",
            )
        )
    names = {p: name for name, p in named}
    return {
        names[p]: step(p, p.grad, group, optimizer.state.get(p, {}))
        for group in optimizer.param_groups
        for p in group["params"]
        if p in names and p.grad is not None
    }


def _sgd(p: Tensor, grad: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> Tensor:
    grad = grad + group["weight_decay"] * p
    momentum = group["momentum"]
    if momentum:
        before = state.get("momentum_buffer")
        moved = grad if before is None else momentum * before + (1 - group["dampening"]) * grad
        grad = grad + momentum * moved if group["nesterov"] else moved
    return -group["lr"] * grad


def _adam(p: Tensor, grad: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> Tensor:
    lr, (first, second) = group["lr"], group["betas"]
    decay, decoupled = group["weight_decay"], group.get("decoupled_weight_decay", False)
    shrunk = torch.zeros_like(p)
    if decay and decoupled:
        shrunk = -lr * decay * p
    elif decay:
        grad = grad + decay * p
    count = float(state.get("step", 0.0)) + 1
    zero = torch.zeros_like(p)
    mean = first * state.get("exp_avg", zero) + (1 - first) * grad
    square = second * state.get("exp_avg_sq", zero) + (1 - second) * grad.square()
    if group["amsgrad"]:
        square = torch.maximum(square, state.get("max_exp_avg_sq", zero))
    root = square.sqrt() / (1 - second**count) ** 0.5 + group["eps"]
    return shrunk - lr / (1 - first**count) * mean / root


def _adamw(p: Tensor, grad: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> Tensor:
    return _adam(p, grad, {**group, "decoupled_weight_decay": True}, state)


_Step = Callable[[Tensor, Tensor, Mapping[str, Any], Mapping[str, Any]], Tensor]
_STEPS: dict[type, _Step] = {
    torch.optim.SGD: _sgd,
    torch.optim.Adam: _adam,
    torch.optim.AdamW: _adamw,
}


class TaskStatistics:
    """Running statistics of BatchNorm layers, a set for each task.

    Args:
        module: What runs: a hypernetwork, or a plain network.

    Attributes:
        kept: Values of each task that was kept, in the order of the module's layers.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> statistics = TaskStatistics(norm)
        >>> statistics.keep(0)
        >>> _ = norm(torch.randn(5, 2) + 3)
        >>> with statistics.of(0):
        ...     norm.running_mean.tolist()
        [0.0, 0.0]
        >>> bool(norm.running_mean.min() > 0)
        True
    """

    def __init__(self, module: nn.Module) -> None:
        layers = [m for m in module.modules() if isinstance(m, BatchNorm)]
        self.layers = [m for m in layers if m.track_running_stats]
        self.kept: dict[int, list[Tensor]] = {}

    def keep(self, task: int) -> None:
        """Copies the present statistics as those of a task."""
        self.kept[task] = [x.detach().clone() for x in self.buffers()]

    def reset(self) -> None:
        """Begins statistics anew, for a new task."""
        for layer in self.layers:
            layer.reset_running_stats()

    @contextmanager
    def of(self, task: int) -> Generator[None]:
        """Puts a task's statistics in, and afterwards back what was there.

        Args:
            task: The task; of one that was not kept, the present statistics are used.

        Yields:
            Nothing.
        """
        before = [x.detach().clone() for x in self.buffers()]
        self._put(self.kept.get(task, before))
        try:
            yield
        finally:
            self._put(before)

    def buffers(self) -> list[Tensor]:
        """The present statistics themselves, in the order of the module's layers."""
        return [
            x
            for m in self.layers
            for x in (m.running_mean, m.running_var, m.num_batches_tracked)
            if x is not None
        ]

    @torch.no_grad()
    def _put(self, values: Sequence[Tensor]) -> None:
        for x, value in zip(self.buffers(), values, strict=True):
            x.copy_(value)


def by_entropy(logits: Tensor, classes: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Task and label of inputs whose task nobody says: where the prediction is the surest.

    Von Oswald et al. (2020), section 3, HNET+ENT: the task with the lowest entropy of the predicted
    distribution over its classes. Tasks should have equally many classes.

    Args:
        logits: What the network of each task answers, ``(tasks, n, outputs)``.
        classes: Outputs that each task uses.

    Returns:
        Tasks ``(n,)``, and labels ``(n,)``: indices of outputs.

    Example:
        >>> logits = torch.tensor([[[0.0, 0.1, 9.0, 0.0]], [[9.0, 0.0, 0.0, 5.0]]])
        >>> by_entropy(logits, [(0, 1), (2, 3)])
        (tensor([1]), tensor([3]))
    """
    entropies: list[Tensor] = []
    labels: list[Tensor] = []
    for row, those in zip(logits, classes, strict=True):
        used = torch.tensor(list(those), device=logits.device)
        logp = row[:, used].log_softmax(-1)
        entropies.append(-(logp.exp() * logp).sum(-1))
        labels.append(used[logp.argmax(-1)])
    task = torch.stack(entropies).argmin(0)
    return task, torch.stack(labels).gather(0, task[None])[0]
