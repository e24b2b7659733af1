"""Training trajectories: states of small networks every few steps of Adam, for nowcasting.

After the training data of NiNo: Knyazev et al. (2025), "Accelerating Training with Neuron
Interaction and Nowcasting Networks" (arXiv 2409.04434). Every network of a cohort starts from
weights of its own and sees batches of its own; the learning rate is constant and drawn
log-uniformly.

Networks (`network`):

- ``"mlp"``: perceptron with two hidden layers of `width`, ReLU (`datasets_zoo.architectures.mlp`).
- ``"cnn"``: 3 × 3 convolutions with `width`, 2 `width`, 2 `width` channels, the first with stride
  2, ReLU, no normalisation, global average pooling, a linear layer. With width 16 these are the
  sizes of NiNo's FM-16 (14,378 parameters on grey images) and C10-16 (14,666 on colour images).
  What padding theirs have is not known to us; ours is 1.
- ``"language"``: `datasets_zoo.language.gpt` with one block and two heads.

States have a time axis: ``(network, time, *shape)``, at steps 0, `every`, 2 `every` … `steps`.
Columns ``loss_00020``: mean training loss of the state at step 20 on the same `judged` training
examples (windows of text at equal distances), nats. Build with ``dtype="float16"`` for half the
size.

`Mixed` makes trajectories of several such tasks in turn, for one zoo.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from datasets_zoo import architectures
from datasets_zoo.images import standardised
from datasets_zoo.language import fixed_windows, gpt, log_uniform, text_batches, tokens_of
from wspace.errors import ZooError, message
from wspace.zoo.architecture import Architecture, InputSpec
from wspace.zoo.recipe import Cohort, Counted, check_options, generator_of, recipe_from
from wspace.zoo.train import (
    Batch,
    Training,
    cross_entropy,
    evaluate_many,
    initial_states,
    train_many,
    vmapped,
)

NETWORKS = ("mlp", "cnn", "language")
CONTEXT = 32
"""Characters in a window of text."""


def plain_cnn(channels: int, widths: Sequence[int] = (16, 32, 32), classes: int = 10) -> nn.Module:
    """Convolutions of which the first has stride 2, global average pooling, a linear layer.

    Args:
        channels: Channels of the images.
        widths: Channels of the convolutions.
        classes: Length of the answer.

    Returns:
        The module.
    """
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(zip([channels, *widths[:-1]], widths, strict=True)):
        layers += [nn.Conv2d(a, b, 3, 1 if i else 2, 1), nn.ReLU()]
    return nn.Sequential(*layers, Average(), nn.Linear(widths[-1], classes))


class Average(nn.Module):
    """Mean over pixels."""

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, channels, height, width)`` → ``(batch, channels)``."""
        return x.mean((2, 3))


class Task(NamedTuple):
    """What the networks of a recipe are, and what they learn.

    Attributes:
        factory: Name of the function that makes them.
        make: The function.
        options: Its arguments.
        inputs: Their example input.
        batches: (networks, examples in a batch, generator) → random batches of each network.
        train: Examples on which the training loss is measured: inputs and targets.
        test: The same for testing.
    """

    factory: str
    make: Callable[..., nn.Module]
    options: dict[str, Any]
    inputs: InputSpec
    batches: Callable[[int, int, torch.Generator], Batch]
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Trajectories(Counted):
    """States of small networks every few steps of Adam, for nowcasting.

    See the top of this file.

    Attributes:
        network: One of `NETWORKS`.
        data: A data set of `datasets_zoo.images`; for language, a text of `datasets_zoo.text`.
        root: Folder or file of the data; no part of what the zoo is.
        count: Number of networks.
        seed: Decides everything that is drawn.
        width: Width of the networks.
        steps: Steps of Adam.
        every: Steps between states.
        batch: Examples in one step.
        learning_rate: Smallest and largest rate.
        judged: Examples on which losses are measured.
        size: Networks in one cohort.
        pool: Means of so many pixels by so many take the place of an image's pixels.
    """

    network: str = "mlp"
    data: str = "digits"
    root: str = field(default="", compare=False)
    count: int = 128
    seed: int = 0
    width: int = 16
    steps: int = 1000
    every: int = 20
    batch: int = 64
    learning_rate: tuple[float, float] = (1e-3, 1e-2)
    judged: int = 500
    size: int = 16
    pool: int = 1

    def __post_init__(self) -> None:
        check_options(self, "count", "width", "steps", "every", "batch", "judged", "size", "pool")

    def cohort(self, index: int) -> Cohort:
        """Trains the networks of one cohort.

        Args:
            index: Which.

        Returns:
            Trajectories with columns ``loss_…``, ``learning_rate``, ``train_loss``, ``test_loss``,
            ``test_accuracy`` (of the last state; of the next character for language) and
            ``diverged``.

        Raises:
            ZooError: If the network is unknown, or the text too short.
        """
        task = _task(self.network, self.data, self.root, self.width, (self.judged, self.pool))
        generator = generator_of(self.seed, index)
        rate = log_uniform(self.size, *self.learning_rate, generator)
        state = initial_states(lambda: task.make(**task.options), self.size, generator)
        architecture = Architecture(task.factory, task.options, (task.inputs,))
        module = architecture.module()
        steps = torch.arange(0, self.steps + 1, self.every)
        batches = task.batches(self.size, self.batch, generator)
        how = Training(self.steps, rate)
        done = train_many(state, vmapped(module.train(), batches, _loss), how, save_at=steps)
        count = self.rows(index)
        states = {name: x[:count] for name, x in done.saved.items()}
        table = {"learning_rate": rate[:count], "diverged": done.diverged[:count]}
        table |= _judge(module.eval(), states, steps, task)
        return Cohort(architecture, states, table, steps)


def _loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of every network over all that it was asked, ``(m,)``."""
    outputs = outputs.flatten(1, -2)
    return cross_entropy(outputs, targets.flatten(1))


def _judge(
    module: nn.Module, states: dict[str, Tensor], steps: Tensor, task: Task
) -> dict[str, Tensor]:
    """Losses of all states on the same examples, and of the last ones on test examples."""

    def read(targets: Tensor) -> Callable[[Tensor], Tensor]:
        def measure(outputs: Tensor) -> Tensor:
            truth = targets.expand(len(outputs), *targets.shape)
            right = (outputs.argmax(-1) == truth).float().flatten(1).mean(1)
            return torch.stack([_loss(outputs, truth), right], 1)

        return measure

    every = {name: x.flatten(0, 1) for name, x in states.items()}
    losses = evaluate_many(module, every, task.train[0], read(task.train[1]), networks=16)
    losses = losses[:, 0].unflatten(0, (-1, len(steps)))
    last = {name: x[:, -1] for name, x in states.items()}
    tested = evaluate_many(module, last, task.test[0], read(task.test[1]), networks=16)
    table = {f"loss_{step:05d}": losses[:, i] for i, step in enumerate(steps.tolist())}
    table |= {"train_loss": losses[:, -1], "test_loss": tested[:, 0]}
    return table | {"test_accuracy": tested[:, 1]}


@lru_cache(maxsize=4)
def _task(network: str, data: str, root: str, width: int, judged_pool: tuple[int, int]) -> Task:
    judged, pool = judged_pool
    if network == "language":
        return _language(data, root, width, judged)
    if network not in NETWORKS:
        raise ZooError(
            message(
                "trajectories: no such network",
                expected=f"one of {', '.join(NETWORKS)}",
                got=repr(network),
            )
        )
    train_x, train_y, test_x, test_y = standardised(data, root or None)
    train_x, test_x = (nn.functional.avg_pool2d(x, pool) for x in (train_x, test_x))
    shape = train_x.shape[1:]
    if network == "mlp":
        make, options = architectures.mlp, {"inputs": shape.numel(), "hidden": [width, width]}
        factory = "datasets_zoo.architectures:mlp"
    else:
        make, options = plain_cnn, {"channels": shape[0], "widths": [width, 2 * width, 2 * width]}
        factory = "datasets_zoo.trajectories:plain_cnn"
    classes = int(train_y.max()) + 1

    def batches(n: int, size: int, generator: torch.Generator) -> Batch:
        def batch(step: int, rows: Tensor) -> tuple[Tensor, Tensor]:
            del step
            chosen = torch.randint(len(train_y), (n, size), generator=generator)[rows]
            return train_x[chosen], train_y[chosen]

        return batch

    return Task(
        factory,
        make,
        options | {"classes": classes},
        InputSpec((1, *shape)),
        batches,
        _spread(train_x, train_y, judged),
        _spread(test_x, test_y, judged),
    )


def _spread(x: Tensor, y: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Examples at equal distances."""
    chosen = torch.linspace(0, len(y) - 1, min(count, len(y))).long()
    return x[chosen], y[chosen]


def _language(data: str, root: str, width: int, judged: int) -> Task:
    train, test, vocabulary = tokens_of(data, root)
    if len(test) < CONTEXT + 2:
        raise ZooError(message(f"trajectories: {data} is too short", got=f"{len(test)} to test on"))
    options = {"vocabulary": vocabulary, "context": CONTEXT, "width": width, "blocks": 1}

    def batches(n: int, size: int, generator: torch.Generator) -> Batch:
        return text_batches(train, (n, size, CONTEXT), generator)

    return Task(
        "datasets_zoo.language:gpt",
        gpt,
        options,
        InputSpec((1, CONTEXT), "int64", vocabulary),
        batches,
        fixed_windows(train, judged, CONTEXT),
        fixed_windows(test, judged, CONTEXT),
    )


@dataclass(frozen=True)
class Mixed:
    """Trajectories of several tasks in one zoo, whose cohorts take turns.

    Attributes:
        tasks: Options of `Trajectories` that differ from its defaults, as words such as
            ``"network=cnn data=mnist pool=2"``; those below are not among them. The zoo's column
            ``task`` holds them.
        root: Folder of the data of all tasks; no part of what the zoo is.
        count: Networks of each task.
        seed: Decides everything that is drawn.
        steps: Steps of Adam.
        every: Steps between states.
        size: Networks in one cohort.
    """

    tasks: tuple[str, ...] = ("network=mlp data=digits",)
    root: str = field(default="", compare=False)
    count: int = 32
    seed: int = 0
    steps: int = 2000
    every: int = 20
    size: int = 16

    grows: ClassVar[tuple[str, ...]] = ("count",)

    def __post_init__(self) -> None:
        check_options(self, "count", "steps", "every", "size")
        if not self.tasks:
            raise ZooError(message("trajectories: no tasks", expected="at least one"))
        for index in range(len(self.tasks)):
            self.recipe(index)

    @property
    def cohorts(self) -> int:
        """Number of cohorts."""
        return len(self.tasks) * -(-self.count // self.size)

    def recipe(self, index: int) -> Trajectories:
        """The recipe of one task.

        Args:
            index: Which.

        Returns:
            The recipe, its seed its own.

        Raises:
            ZooError: If its words are no options of `Trajectories`.
        """
        words = [word.partition("=") for word in self.tasks[index].split()]
        options = {name: value for name, _, value in words}
        own = ("root", "count", "seed", "steps", "every", "size")
        if given := [name for name in own if name in options]:
            text = f"trajectories: {given[0]!r} is the same for all tasks"
            raise ZooError(message(text, got=repr(self.tasks[index])))
        made = cast(Trajectories, recipe_from("datasets_zoo.trajectories:Trajectories", options))
        seed = int(torch.randint(2**40, (1,), generator=generator_of(self.seed, index)))
        return replace(made, **{name: getattr(self, name) for name in own} | {"seed": seed})

    def cohort(self, index: int) -> Cohort:
        """Trains the networks of one cohort.

        Args:
            index: Which; tasks take turns.

        Returns:
            As of `Trajectories`, with the column ``task``.
        """
        turn, task = divmod(index, len(self.tasks))
        made = self.recipe(task).cohort(turn)
        rows = len(next(iter(made.state.values())))
        return replace(made, table=dict(made.table) | {"task": [self.tasks[task]] * rows})
