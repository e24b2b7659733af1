"""How well two networks lie on each other, in all and group by group."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from wspace.action import Transform
from wspace.nowcast.predictor import pieces
from wspace.space import WeightSpace


@dataclass(frozen=True)
class Fit:
    """How well two networks, or parts of them, lie on each other.

    Attributes:
        objective: Inner product of their parameters.
        distance: Euclidean distance of their parameters.
        size: Norm of the first one's.
        other: Norm of the second one's.
    """

    objective: float
    distance: float
    size: float
    other: float

    @property
    def cosine(self) -> float | None:
        """The objective as a number between −1 and 1; None if one of the two is zero."""
        whole = self.size * self.other
        return self.objective / whole if whole else None


def fits_of(
    space: WeightSpace, a: Mapping[str, Tensor], b: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Products of each parameter of two states; buffers aside, ties once.

    Args:
        space: Weight space of both.
        a: A state.
        b: Another; tensors are read one at a time.

    Returns:
        By name: <a, b>, |a − b|², |a|² and |b|², ``(4,)``, float64.
    """
    return {
        p.name: products(a[p.name], b[p.name])
        for p in space.params
        if not p.buffer and a[p.name].is_floating_point()
    }


def products(a: Tensor, b: Tensor) -> Tensor:
    """What of two tensors adds up to a `Fit`: <a, b>, |a − b|², |a|² and |b|².

    Args:
        a: A tensor.
        b: Another of its shape.

    Returns:
        ``(4,)``, float64.
    """
    found = torch.zeros(4, dtype=torch.float64)
    for some in pieces(a, b):  # in float64 all of them would be twice as large
        x, y = (part.double() for part in some)
        d = x - y
        found += torch.stack([x.dot(y), d.dot(d), x.dot(x), y.dot(y)])
    return found


def summed_up(found: Iterable[Tensor]) -> Fit:
    """The fit of all tensors together, from the products of each."""
    total = sum(found, torch.zeros(4, dtype=torch.float64))
    objective, distance, size, other = total.tolist()
    return Fit(objective, distance**0.5, size**0.5, other**0.5)


def summed(
    space: WeightSpace, matching: Transform, fits: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Any]:
    """Figures of all parameters, and of those that each group indexes, as plain data.

    Args:
        space: The weight space.
        matching: What moved the second state.
        fits: What `fits_of` found, by what it is called.

    Returns:
        The figures.
    """
    indexed = {name: _indexed(space, name) for name in space.groups}
    return {
        **{when: _figures(summed_up(fits[when].values())) for when in fits},
        "groups": [
            {
                "name": group.name,
                "size": group.size,
                "own_for": list(group.over),
                "tensors": len(indexed[group.name]),
                "moved": share_moved(matching, group.name),
                "factors": _factors(matching, group.name),
                **{
                    when: _figures(summed_up(fits[when][name] for name in indexed[group.name]))
                    for when in fits
                },
            }
            for group in space.groups.values()
        ],
    }


def _figures(fit: Fit) -> dict[str, float | None]:
    return {**asdict(fit), "cosine": fit.cosine}


def _indexed(space: WeightSpace, group: str) -> list[str]:
    """Parameters that a group moves."""
    return [
        p.name
        for p in space.params
        if not p.buffer
        and (
            any(g.name == group for axis in p.axes for g in axis.groups())
            or (p.at is not None and p.at[0] == group)
        )
    ]


def share_moved(transform: Transform, group: str) -> float:
    """Share of a group's units that change their place.

    Args:
        transform: The group element.
        group: Name of the group.

    Returns:
        Between 0 and 1.
    """
    p = transform.permutations.get(group)
    return 0.0 if p is None else float((p != torch.arange(p.shape[-1])).double().mean())


def _factors(transform: Transform, group: str) -> dict[str, float | list[float]]:
    """Signs: share flipped; phases: share shifted; scales: the smallest and the largest factor."""
    found: dict[str, float | list[float]] = {}
    for i, factor in transform.factors.items():
        gauge = transform.space.gauges[i]
        if gauge.group != group:
            continue
        if gauge.kind == "scale":
            found["scale"] = [float(factor.min()), float(factor.max())]
        else:
            neutral = 1 if gauge.kind == "sign" else 0
            found[gauge.kind] = float((factor != neutral).double().mean())
    return found
