"""What is left of a network at each stage of pruning, and how good it is then."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from wspace.prune.cost import Latency


@dataclass(frozen=True, kw_only=True)
class Point:
    """A network at one stage of pruning.

    Attributes:
        step: Steps of the optimizer before the units were switched off.
        kept: Prunable group → units left (in each of its contexts).
        parameters: Parameters of the small network, ties once.
        macs: Its multiply-accumulates on the example inputs.
        latency: Seconds that it takes for these, compacted; None if that was not measured.
        metric: How good it is; None if that was not measured.
    """

    step: int
    kept: Mapping[str, int]
    parameters: int
    macs: int
    latency: Latency | None = None
    metric: float | None = None

    @property
    def units(self) -> int:
        """Units left, each group counted in one of its contexts."""
        return sum(self.kept.values())

    def plain(self) -> dict[str, Any]:
        """The point as plain data, for checkpoints and JSON."""
        found = asdict(self) | {"kept": dict(self.kept)}
        return found | {"latency": None if self.latency is None else list(self.latency)}

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Self:
        """The inverse of `plain`.

        Args:
            plain: What `plain` gave.

        Returns:
            The point.
        """
        given = dict(plain)
        took = given.pop("latency")
        return cls(**given, latency=None if took is None else Latency(*took))
