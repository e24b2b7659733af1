"""Conditions: modules that turn what a network is conditioned on into a vector.

Each has an attribute ``width``, the length of the vector, and gives entries of second moment about
1 at initialisation, which is what heads expect. A set of examples has `wspace.hyper.sets`.
"""

from collections.abc import Collection, Mapping, Sequence
from math import log, pi, sqrt
from typing import Any, Literal

import torch
from torch import Tensor, nn

from wspace.errors import HyperError, message
from wspace.graph import ParameterGraph


class Vector(nn.Module):
    """A vector that is there already, passed on.

    Args:
        width: Its length.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, cond: Tensor) -> Tensor:
        """The vector itself.

        Args:
            cond: ``(*batch, width)``.

        Returns:
            The same.
        """
        return _vector(cond, self.width)


def _vector(x: Tensor, width: int) -> Tensor:
    if x.shape[-1:] != (width,):
        raise HyperError(
            message("condition: a vector of another length", expected=f"length {width}",
                    got=f"shape {tuple(x.shape)}")
        )  # fmt: skip
    return x


class TaskEmbedding(nn.Module):
    """A learned vector for each of several tasks; at first in random directions, all of one length.

    Args:
        count: Number of tasks.
        width: Length of the vectors.
        generator: Source of randomness.

    Attributes:
        table: Vectors of all tasks, ``(count, width)``; those of frozen tasks are not used.
        kept: Vectors of frozen tasks, ``(count, width)``; a buffer.
        frozen: Which tasks are frozen, ``(count,)``; a buffer.

    Example:
        >>> tasks = TaskEmbedding(2, 8)
        >>> tasks.freeze(0)
        >>> tasks.add(1, near=0)  # a third one, which begins as a copy of the first
        [2]
        >>> torch.equal(tasks(2), tasks(0))
        True
    """

    kept: Tensor
    frozen: Tensor

    def __init__(self, count: int, width: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.width = width
        self.table = nn.Parameter(_directions(count, width, generator))
        self.register_buffer("kept", torch.zeros(count, width))
        self.register_buffer("frozen", torch.zeros(count, dtype=torch.bool))

    @property
    def count(self) -> int:
        """Number of tasks."""
        return len(self.table)

    def vectors(self) -> Tensor:
        """Vectors of all tasks.

        Returns:
            ``(count, width)``; gradients reach those that are not frozen.
        """
        return torch.where(self.frozen[:, None], self.kept, self.table)

    def forward(self, cond: int | Tensor) -> Tensor:
        """Vectors of tasks.

        Args:
            cond: Numbers of tasks, ``(*batch,)``; negative ones count from the end.

        Returns:
            ``(*batch, width)``.

        Raises:
            HyperError: If it is no whole number, or there is no such task.
        """
        rows = self._rows(cond, "TaskEmbedding")
        return torch.where(self.frozen[rows][..., None], self.kept[rows], self.table[rows])

    def _rows(self, tasks: object, what: str) -> Tensor:
        """Numbers of tasks as a tensor that indexes rows."""
        whole = isinstance(tasks, int | Sequence | Tensor) and not isinstance(tasks, bool | str)
        try:
            rows = torch.as_tensor(tasks) if whole else None
        except (TypeError, ValueError, RuntimeError):
            rows = None
        if rows is None or rows.is_floating_point() or rows.dtype == torch.bool:
            raise HyperError(
                message(f"condition: {what} takes numbers of tasks",
                        got=repr(tasks) if rows is None else f"{rows.dtype}",
                        help="Vector(width) takes vectors as they are")
            )  # fmt: skip
        rows = rows.to(self.frozen.device, torch.long)
        try:
            outside = [n for n in rows.unique().tolist() if not -self.count <= n < self.count]
        except RuntimeError:  # inside of torch.func.vmap, where no value can be looked at
            outside = []
        if outside:
            raise HyperError(
                message(f"condition: {what} has no such task", expected=f"below {self.count}",
                        got=", ".join(map(str, outside[:8])))
            )  # fmt: skip
        return rows

    def add(
        self,
        count: int = 1,
        *,
        near: int | Sequence[int] | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> list[int]:
        """Adds tasks. `table` is a new parameter then: give the optimizer that one.

        Args:
            count: Number of new tasks.
            near: Where they begin: at tasks of these numbers (one for all, or one for each), or at
                the tasks whose vectors are nearest to given ones, ``(count, width)``. None for
                random vectors.
            generator: Source of randomness.

        Returns:
            Numbers of the new tasks.

        Raises:
            HyperError: If `near` does not fit.
        """
        old = self.vectors().detach()
        if near is None:
            new = _directions(count, self.width, generator).to(old)
        else:
            numbers = self._near(near, count)
            new = old[numbers]
        first = self.count
        self.table = nn.Parameter(torch.cat([self.table.detach(), new]))
        self.kept = torch.cat([self.kept, torch.zeros_like(new)])
        self.frozen = torch.cat([self.frozen, self.frozen.new_zeros(count)])
        return list(range(first, first + count))

    def nearest(self, vectors: Tensor) -> Tensor:
        """Tasks whose vectors are nearest to given ones.

        Args:
            vectors: ``(*batch, width)``.

        Returns:
            Their numbers, ``(*batch,)``, by Euclidean distance.
        """
        with torch.no_grad():
            return (vectors[..., None, :] - self.vectors()).square().sum(-1).argmin(-1)

    def freeze(self, tasks: int | Sequence[int] | Tensor) -> None:
        """Holds vectors of tasks, bit by bit, whatever an optimizer does (decay, momentum).

        Args:
            tasks: Numbers of the tasks.
        """
        chosen = self._rows(tasks, "freeze").reshape(-1)
        with torch.no_grad():
            self.kept[chosen] = self.vectors()[chosen]
            self.frozen[chosen] = True

    def release(self, tasks: int | Sequence[int] | Tensor) -> None:
        """Lets vectors of tasks be trained again, from where they are.

        Args:
            tasks: Numbers of the tasks.
        """
        chosen = self._rows(tasks, "release").reshape(-1)
        with torch.no_grad():
            self.table[chosen] = self.vectors()[chosen]
            self.frozen[chosen] = False

    def _near(self, near: int | Sequence[int] | Tensor, count: int) -> Tensor:
        """Numbers of the tasks at which new ones begin."""
        if isinstance(near, Tensor) and near.is_floating_point():
            fits = near.shape == (count, self.width)
            numbers = self.nearest(near) if fits else torch.tensor([-1])
        else:
            numbers = torch.as_tensor(near).reshape(-1)
            numbers = numbers.expand(count) if len(numbers) == 1 else numbers
            fits = len(numbers) == count and bool(((numbers >= 0) & (numbers < self.count)).all())
        if not fits:
            raise HyperError(
                message(
                    "add: near= does not fit the new tasks",
                    expected=f"one number below {self.count}, {count} of them, or vectors "
                    f"({count}, {self.width})",
                    got=f"shape {tuple(near.shape)}" if isinstance(near, Tensor) else f"{near}",
                )
            )
        return numbers


def _directions(count: int, width: int, generator: torch.Generator | None) -> Tensor:
    """Random vectors ``(count, width)`` whose entries have second moment 1, in each of them."""
    drawn = torch.randn(count, width, generator=generator)
    return drawn * (sqrt(width) / drawn.norm(dim=-1, keepdim=True))


Distribution = Literal["normal", "uniform", "sign"]


class Noise(nn.Module):
    """Random vectors of independent entries of mean 0 and variance 1: a network for each draw.

    Args:
        width: Length of the vectors.
        distribution: Of the entries: ``"normal"``, ``"uniform"``, or ``"sign"`` (-1 or 1).
        generator: Source of randomness.

    Raises:
        HyperError: If there is no such distribution.
    """

    def __init__(
        self,
        width: int,
        distribution: Distribution = "normal",
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if distribution not in {"normal", "uniform", "sign"}:
            raise HyperError(
                message(f"condition: unknown distribution {distribution!r}",
                        expected="'normal', 'uniform' or 'sign'")
            )  # fmt: skip
        self.width, self.distribution, self.generator = width, distribution, generator
        self.register_buffer("like", torch.zeros(()), persistent=False)

    def forward(self, cond: int | Sequence[int] | Tensor | None = None) -> Tensor:
        """Draws vectors.

        Args:
            cond: How many, a number or a shape; None for one without a batch axis. Vectors
                ``(*batch, width)`` are passed on.

        Returns:
            ``(*batch, width)``.

        Raises:
            HyperError: If it is no number, shape or vector.
        """
        if isinstance(cond, Tensor) and cond.is_floating_point():
            return _vector(cond, self.width)
        given: Any = cond.tolist() if isinstance(cond, Tensor) else cond
        batch = () if given is None else tuple(given) if isinstance(given, Sequence) else (given,)
        if any(not isinstance(n, int) or isinstance(n, bool) or n < 0 for n in batch):
            raise HyperError(
                message("condition: Noise takes how many vectors, or vectors", got=repr(cond),
                        expected=f"a number from 0, a shape, or (*batch, {self.width})")
            )  # fmt: skip
        like, shape = self.get_buffer("like"), (*batch, self.width)
        if self.distribution == "normal":
            drawn = torch.randn(shape, generator=self.generator)
        elif self.distribution == "uniform":
            drawn = (torch.rand(shape, generator=self.generator) * 2 - 1) * sqrt(3)
        else:
            drawn = torch.randint(2, shape, generator=self.generator) * 2.0 - 1
        return drawn.to(like)


class Hyperparameters(nn.Module):
    """Named numbers in known ranges, each as a cosine and a sine of a quarter turn.

    The vector has the same length everywhere in the ranges, and no entry fades at an end. Ortiz,
    Guttag, Dalca (2023), "Magnitude Invariant Parametrizations Improve Hypernetwork Learning",
    equation 6 (arXiv 2304.07645).

    Args:
        ranges: Least and greatest value of every number, by name.
        logarithmic: Names of those that are encoded by their logarithm.

    Raises:
        HyperError: If a range is empty, or has no logarithm.

    Example:
        >>> encode = Hyperparameters({"rate": (1e-4, 1e-1), "drop": (0, 1)}, logarithmic=["rate"])
        >>> encode({"rate": 1e-4, "drop": 0.5}).tolist()
        [1.414, 0.0, 1.0, 1.0]
    """

    def __init__(
        self, ranges: Mapping[str, tuple[float, float]], *, logarithmic: Collection[str] = ()
    ) -> None:
        super().__init__()
        wrong = [f"{n!r} from {a} to {b}" for n, (a, b) in ranges.items()
                 if not a < b or (n in logarithmic and a <= 0)]  # fmt: skip
        wrong += [f"{n!r}, which has no range" for n in logarithmic if n not in ranges]
        if wrong or not ranges:
            raise HyperError(
                message("condition: Hyperparameters needs ranges", got=wrong or "none",
                        expected="(least, greatest), positive for logarithms")
            )  # fmt: skip
        self.ranges, self.logarithmic = dict(ranges), frozenset(logarithmic)
        self.width = 2 * len(self.ranges)
        self.register_buffer("like", torch.zeros(()), persistent=False)

    def forward(self, cond: Mapping[str, float | Tensor] | Tensor) -> Tensor:
        """The vector of given numbers.

        Args:
            cond: Numbers by name, each ``(*batch,)``; or ``(*batch, n)`` in the order of `ranges`.

        Returns:
            ``(*batch, 2 n)``, second moment 1.

        Raises:
            HyperError: If a number is missing, unknown, or outside its range.
        """
        like = self.get_buffer("like")
        if not isinstance(cond, Mapping):
            x = torch.as_tensor(cond)
            given = dict(zip(self.ranges, x.unbind(-1) if x.dim() else [], strict=False))
            wrong = [] if x.shape[-1:] == (len(self.ranges),) else [f"shape {tuple(x.shape)}"]
        else:
            given = {n: torch.as_tensor(x) for n, x in cond.items()}
            wrong = [f"{n!r}" for n in given.keys() ^ self.ranges.keys()]
        slack = 1e-6
        turns: list[Tensor] = []
        for n, (a, b) in self.ranges.items():
            if n in given and not wrong:
                x = given[n].to(like)
                logs = n in self.logarithmic
                low, high = (log(a), log(b)) if logs else (a, b)
                turn = ((x.log() if logs else x) - low) / (high - low)
                turns.append(turn)
                if not bool(((turn >= -slack) & (turn <= 1 + slack)).all()):
                    wrong.append(f"{n!r} outside {a} … {b}")
        if wrong:
            raise HyperError(
                message("condition: Hyperparameters cannot take these numbers",
                        expected=f"one for each of {list(self.ranges)}, in its range", got=wrong)
            )  # fmt: skip
        angle = torch.stack(torch.broadcast_tensors(*turns), -1) * (pi / 2)
        return torch.stack([angle.cos(), angle.sin()], -1).flatten(-2) * sqrt(2)


class GraphCondition(nn.Module):
    """The vector of a network: what a metanet says of its parameter graph.

    Args:
        metanet: Module from a `wspace.ParameterGraph`, or a list of them, to ``(*batch, width)``.
        width: Length of the vector.
    """

    def __init__(self, metanet: nn.Module, width: int) -> None:
        super().__init__()
        self.metanet, self.width = metanet, width

    def forward(self, cond: ParameterGraph | Sequence[ParameterGraph]) -> Tensor:
        """Vectors of networks.

        Args:
            cond: A graph, whose batch axes lead, or a list of graphs.

        Returns:
            ``(*batch, width)``, or ``(rows, width)`` for a list.

        Raises:
            HyperError: If the metanet returns anything else.
        """
        made = self.metanet(cond)
        if not isinstance(made, Tensor) or made.shape[-1:] != (self.width,):
            got = f"shape {tuple(made.shape)}" if isinstance(made, Tensor) else type(made).__name__
            raise HyperError(
                message("condition: the metanet does not return one vector per network",
                        expected=f"length {self.width}", got=got)
            )  # fmt: skip
        return made
