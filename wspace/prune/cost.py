"""What a network costs when some units of its groups are gone, without building it.

Parameters and multiply-accumulates are polynomials in the sizes of groups, added up once. What a
unit really saves on a machine is another matter: `latency` measures it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import lcm
from time import perf_counter
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from wspace.errors import PruneError, message
from wspace.restore import drawn_again
from wspace.space import Axis, WeightSpace
from wspace.trace.polynomials import Polynomial, of_axis
from wspace.trace.sandbox import attributes_restored, evaluation_mode, state_restored
from wspace.trace.work import Survey, survey


@dataclass(frozen=True)
class Cost:
    """Parameters and multiply-accumulates (MACs) of a network as functions of what is kept.

    Tied parameters count once, buffers not at all. Each member of a family (one expert of a
    mixture) counts as long as it is kept. MACs are those of `wspace.trace.work.survey`: matrix
    products, convolutions and attention on the example inputs; one MAC is two FLOPs.

    Attributes:
        space: The weight space of the whole network.
        survey: What a run of it costs and counts; None if only parameters are known.

    Example:
        >>> import torch, wspace
        >>> mlp = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
        >>> space = wspace.trace(mlp, torch.zeros(7, 3))
        >>> cost = Cost.measured(mlp, space, torch.zeros(7, 3))
        >>> cost.parameters(), cost.parameters({"h1": 4}), cost.macs(), cost.macs({"h1": 4})
        (32, 26, 175, 140)
    """

    space: WeightSpace
    survey: Survey | None = None

    @classmethod
    def of(cls, space: WeightSpace) -> Self:
        """The cost in parameters; `macs` is not known.

        Args:
            space: Weight space of the network.

        Returns:
            The cost.
        """
        return cls(space)

    @classmethod
    def measured(
        cls,
        module: nn.Module,
        space: WeightSpace,
        args: tuple[Any, ...] | Tensor = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Self:
        """The cost in parameters, and in MACs on these inputs.

        Args:
            module: The network; run once in evaluation mode and left as it was.
            space: Its weight space.
            args: Example positional inputs (a single tensor stands for a tuple of one); batch and
                lengths count, so give one sample for MACs per sample.
            kwargs: Example keyword inputs.

        Returns:
            The cost.

        Raises:
            SpaceMismatch: If the module is not of this space.
            TraceError: If the module fails on these inputs.
        """  # noqa: DOC502 (survey raises)
        return cls(space, survey(space, module, args, kwargs))

    def parameters(self, counts: Mapping[str, int] | None = None) -> int:
        """Elements of parameters, ties once.

        Args:
            counts: Kept units by group (in each context); absent groups keep all.

        Returns:
            The number.

        Raises:
            PruneError: If a group is unknown or cannot keep that many units.
        """  # noqa: DOC502 (_sizes raises)
        return self._parameters(self._sizes(counts or {}))

    def macs(self, counts: Mapping[str, int] | None = None) -> int:
        """Multiply-accumulates of one run on the example inputs.

        Args:
            counts: Kept units by group (in each context); absent groups keep all.

        Returns:
            The number.

        Raises:
            PruneError: If a group is unknown or cannot keep that many units, or only parameters
                were counted.
        """
        if self.survey is None:
            raise PruneError(
                message(
                    "cost: multiplications were not counted",
                    expected="a cost that was measured on example inputs",
                    got="one made from a weight space alone",
                    help="Cost.measured(module, space, args, kwargs)",
                )
            )
        return self._macs(self._sizes(counts or {}))

    @cached_property
    def _parameters(self) -> "_Sum":
        terms: list[tuple[tuple[str, ...], Fraction]] = []
        for p in self.space.params:
            if p.buffer:
                continue
            whole = of_axis(Axis(tuple(f for axis in p.axes for f in axis.factors)))
            index = self.space.all_groups[p.at[0]] if p.at else None
            if index is not None and not index.fixed:  # this member is there in so many of its size
                whole = {(*k, index.name): c / index.size for k, c in whole.items()}
            terms += whole.items()
        return _Sum(self._names, terms)

    @cached_property
    def _macs(self) -> "_Sum":
        works = self.survey.works if self.survey else ()
        return _Sum(self._names, (term for work in works for term in work.terms))

    @cached_property
    def _names(self) -> tuple[str, ...]:
        return tuple(n for n, g in self.space.groups.items() if not g.fixed)

    def _sizes(self, counts: Mapping[str, int]) -> list[int]:
        """Size of every free group, in order."""
        groups = self.space.groups
        wrong = [
            f"{n!r}: {k}"
            for n, k in counts.items()
            if n not in groups or not 1 <= k <= groups[n].size
        ]
        if wrong:
            raise PruneError(
                message(
                    "cost: no such sizes",
                    expected="for free groups of the space, between 1 unit and all of them",
                    got=wrong,
                    help="`space.groups` lists the groups and their sizes",
                )
            )
        return [counts.get(n, groups[n].size) for n in self._names]


class _Sum:
    """A polynomial with whole values, at whole sizes: one gather, product and dot product.

    Exact while values times the common denominator stay under 2**63.
    """

    def __init__(
        self, names: tuple[str, ...], terms: Iterable[tuple[tuple[str, ...], Fraction]]
    ) -> None:
        total: Polynomial = {}
        for factors, c in terms:
            key = tuple(sorted(factors))
            total[key] = total.get(key, Fraction(0)) + c
        self.whole = lcm(*(c.denominator for c in total.values()))
        width = max((len(key) for key in total), default=0)
        place = {n: i for i, n in enumerate(names)}
        rows = [[place[g] for g in key] + [len(names)] * (width - len(key)) for key in total]
        self.factors = torch.tensor(rows, dtype=torch.long).reshape(len(rows), width)
        self.coefficients = torch.tensor([int(c * self.whole) for c in total.values()])

    def __call__(self, sizes: list[int]) -> int:
        x = torch.tensor([*sizes, 1])
        return int((x[self.factors].prod(1) * self.coefficients).sum()) // self.whole


# -------------------------------------------------------------------------------- latency


class Latency(NamedTuple):
    """Seconds that a run takes.

    Attributes:
        median: Half of the runs took no longer.
        spread: Distance between the quartiles.
    """

    median: float
    spread: float

    def __str__(self) -> str:
        return f"{self.median * 1e3:.3g} ms ± {self.spread * 1e3:.2g}"


@torch.no_grad()
def latency(
    module: nn.Module,
    args: tuple[Any, ...] | Tensor = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    repeats: int = 30,
    warmup: int = 5,
) -> Latency:
    """How long a run in evaluation mode takes on this machine as it is set now.

    Fewer multiplications are not always less time: odd widths can be slower than even ones, and
    small layers spend their time elsewhere. To compare two modules, measure them in turns.

    Args:
        module: The module; left as it was.
        args: Positional inputs, where the module is (a single tensor stands for a tuple of one).
        kwargs: Keyword inputs.
        repeats: Runs that are measured.
        warmup: Runs before those.

    Returns:
        Median and distance between the quartiles, in seconds.

    Raises:
        PruneError: If `repeats` is not positive or `warmup` is negative.
    """
    if repeats < 1 or warmup < 0:
        raise PruneError(
            message(
                "latency: nothing to measure",
                expected="repeats ≥ 1 and warmup ≥ 0",
                got=f"repeats={repeats}, warmup={warmup}",
            )
        )
    args = (args,) if isinstance(args, Tensor) else tuple(args)
    devices = {t.device for t in (*module.parameters(), *module.buffers()) if t.is_cuda}
    seconds: list[float] = []
    with (
        drawn_again(module),
        attributes_restored(module),
        state_restored(module, values=False),
        evaluation_mode(module),
    ):
        for i in range(warmup + repeats):
            for device in devices:
                torch.cuda.synchronize(device)
            start = perf_counter()
            module(*args, **(kwargs or {}))
            for device in devices:
                torch.cuda.synchronize(device)
            if i >= warmup:
                seconds.append(perf_counter() - start)
    low, middle, high = torch.tensor(seconds, dtype=torch.float64).quantile(
        torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    )
    return Latency(float(middle), float(high - low))
