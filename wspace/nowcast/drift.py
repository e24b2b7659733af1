"""`Drift`: many small jumps along the way that running averages of a run have come.

Two running averages of the parameters, a short and a long one, grow with the run. Between them the
noise of single steps is gone, so their difference over their distance in time is the velocity of
training. Every few steps the parameters, and both averages with them, are moved ahead along it: the
averages never see the jumps, only what the optimizer does between them, so jumps do not feed on
themselves. The short average is what the run has reached without the noise of its last steps.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wspace.errors import NowcastError, message
from wspace.nowcast.history import copy_all
from wspace.nowcast.ranks import own_part


@dataclass(frozen=True)
class Drift:
    """Moves a run ahead along the difference of two running averages, a little and often.

    It stands where a predictor does, ``Nowcaster(optimizer, module, predictor=Drift())``, and reads
    averages that the run keeps, so there is nothing to train and no offline form. A jump at age t
    goes ``min(speed · period, reach · distance)`` steps ahead, with the distance of the averages in
    time about ``(long / (1 + long) - short / (1 + short)) · t`` steps: small at first, then `speed`
    steps for every step of the optimizer.

    Attributes:
        speed: Steps ahead for every step of the optimizer, at most.
        reach: Longest jump, as a share of the distance in time between the averages.
        short: Window of the short average, as a share of its age in steps.
        long: Window of the long one.
        begin: Steps before the first jump; averages are kept from the start.
        every: Steps from one update of the averages to the next.
        judged: With a guard, jumps from one judgement to the next.

    Raises:
        NowcastError: If an option is impossible.

    Example:
        >>> Drift().ahead(10, 50.0), Drift().ahead(10, 20.0)
        (20.0, 12.0)

    References:
        Growing averages: Shamir and Zhang (2013), arXiv:1212.1824. Momentum on averages of many
        steps: Zhang et al. (2019), Lookahead optimizer, arXiv:1907.08610; Pagliardini et al.
        (2024), The AdEMAMix optimizer, arXiv:2409.03137.
    """

    speed: float = 2.0
    reach: float = 0.6
    short: float = 0.05
    long: float = 0.15
    begin: int = 200
    every: int = 5
    judged: int = 10

    def __post_init__(self) -> None:
        """Checks the options."""
        wrong = ""
        if not (0 <= self.speed < float("inf") and 0 <= self.reach < float("inf")):
            wrong = f"speed and reach of at least 0\n  got {self.speed} and {self.reach}"
        elif not 0 < self.short < self.long <= 1:
            wrong = f"0 < short < long <= 1\n  got {self.short} and {self.long}"
        elif self.begin < 0 or self.every < 1 or self.judged < 1:
            got = f"begin={self.begin}, every={self.every}, judged={self.judged}"
            wrong = f"begin of at least 0, every and judged of at least 1\n  got {got}"
        if wrong:
            raise NowcastError(message("Drift: impossible options", expected=wrong))

    def ahead(self, period: int, distance: float) -> float:
        """Length of a jump.

        Args:
            period: Steps since the last one.
            distance: How far apart in time the averages are, steps.

        Returns:
            Steps ahead.
        """
        return min(self.speed * period, self.reach * distance)

    def windows(self, age: int) -> tuple[float, float]:
        """Windows of both averages.

        Args:
            age: Steps since the first value.

        Returns:
            Steps, the short one first.
        """
        return max(self.every, self.short * age), max(3 * self.every, self.long * age)


class Clock(NamedTuple):
    """When a pair of averages is of.

    Attributes:
        age: Steps since the first value.
        short: Mean time of the short average, steps since the first value.
        long: And of the long one.
    """

    age: int = 0
    short: float = 0.0
    long: float = 0.0

    @property
    def distance(self) -> float:
        """Steps between the averages."""
        return self.short - self.long


class Averages:
    """Two running averages of every tensor, in at least float32.

    A tensor that is missing at an update, or that another has replaced, begins anew.

    Args:
        drift: Windows, and steps between updates.
        device: Where they are kept; beside each tensor if None.
    """

    def __init__(self, drift: Drift, *, device: torch.device | str | None = None) -> None:
        self.drift = drift
        self.device = None if device is None else torch.empty(0, device=device).device
        self._short: dict[str, Tensor] = {}
        self._long: dict[str, Tensor] = {}
        self._clocks: dict[str, Clock] = {}
        self._owners: dict[str, tuple[Tensor, torch.dtype]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._clocks

    def _fits(self, name: str, x: Tensor, part: Tensor) -> bool:
        if name not in self._clocks:
            return False
        owner, dtype = self._owners[name]
        return owner is x and dtype == x.dtype and self._short[name].shape == part.shape

    @torch.no_grad()
    def update(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes the values that tensors have now, or of this process's parts of them.

        Args:
            tensors: Dense tensors by name.
        """
        for name in [n for n in self._clocks if n not in tensors]:
            self.forget(name)
        groups = defaultdict[Clock, list[str]](list)
        parts = {name: own_part(x) for name, x in tensors.items()}
        for name, part in parts.items():
            if self._fits(name, tensors[name], part):
                groups[self._clocks[name]].append(name)
            else:
                self._begin(name, tensors[name], part)
        for clock, names in groups.items():
            age = clock.age + self.drift.every
            values = [self._as_kept(parts[n]) for n in names]
            times: list[float] = []
            windows = self.drift.windows(age)
            for kept, window, time in zip(
                (self._short, self._long), windows, clock[1:], strict=True
            ):
                weight = min(1.0, self.drift.every / window)
                torch._foreach_lerp_([kept[n] for n in names], values, weight)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
                times.append(time + weight * (age - time))
            self._clocks.update(dict.fromkeys(names, Clock(age, *times)))

    def _as_kept(self, part: Tensor) -> Tensor:
        wide = torch.promote_types(part.dtype, torch.float32)
        return part.to(self.device or part.device, wide)

    def _begin(self, name: str, x: Tensor, part: Tensor) -> None:
        self._owners[name], self._clocks[name] = (x, x.dtype), Clock()
        for kept in (self._short, self._long):
            kept[name] = self._as_kept(part).clone(memory_format=torch.contiguous_format)

    def forget(self, name: str) -> None:
        """Lets go of the averages of a tensor, which begin anew at the next update."""
        for kept in (self._short, self._long, self._clocks, self._owners):
            kept.pop(name, None)

    def clear(self) -> None:
        """Lets go of all averages."""
        for name in list(self._clocks):
            self.forget(name)

    @torch.no_grad()
    def moves(
        self, tensors: Mapping[str, Tensor], length: Callable[[float], float]
    ) -> dict[str, Tensor]:
        """How far tensors go ahead.

        Args:
            tensors: Those that may move; of others nothing is said.
            length: Steps ahead for averages so many steps apart.

        Returns:
            What to add, by name, as averages are kept; nothing for tensors whose averages are of
            one time.
        """
        groups = defaultdict[float, list[str]](list)
        for name, x in tensors.items():
            if self._fits(name, x, own_part(x)) and self._clocks[name].distance > 0:
                groups[self._clocks[name].distance].append(name)
        found: dict[str, Tensor] = {}
        for distance, names in groups.items():
            steps = length(distance)
            if not steps:
                continue
            pairs = [self._short[n] for n in names], [self._long[n] for n in names]
            made = torch._foreach_sub(*pairs)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
            torch._foreach_mul_(made, steps / distance)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
            found.update(zip(names, made, strict=True))
        return found

    @torch.no_grad()
    def shift(self, moves: Mapping[str, Tensor]) -> None:
        """Moves both averages with their tensors.

        Args:
            moves: What to add, by name.
        """
        if moves:
            for kept in (self._short, self._long):
                torch._foreach_add_([kept[n] for n in moves], list(moves.values()))  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]

    def values(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The short averages of tensors that have one: new tensors, as the tensors are.

        Args:
            tensors: Tensors by name.

        Returns:
            Values of the dtypes and on the devices of this process's parts.
        """
        found: dict[str, Tensor] = {}
        for name, x in tensors.items():
            part = own_part(x)
            if self._fits(name, x, part):
                found[name] = torch.empty_like(part)
        copy_all(list(found.values()), [self._short[n] for n in found])
        return found

    # ------------------------------------------------------------ resumption

    def state_dict(self) -> dict[str, Any]:
        """What a resumption needs; the tensors are the averages themselves, as torch has it."""
        return {
            "filled": 2,
            "tensors": {n: [self._short[n], self._long[n]] for n in self._clocks},
            "clocks": {n: list(clock) for n, clock in self._clocks.items()},
        }

    def check(self, state: Mapping[str, Any], like: Mapping[str, Tensor]) -> None:
        """Raises unless `load_state_dict` can take a state.

        Args:
            state: What was saved.
            like: The tensors that averages are of.

        Raises:
            NowcastError: If an average is of a tensor that is missing or has another shape.
        """
        tensors, clocks = state.get("tensors", {}), state.get("clocks", {})
        wrong = [f"no {what}" for what in ("tensors", "clocks") if what not in state]
        wrong += [
            f"{name!r} of shape {tuple(x.shape)}"
            for name, pair in tensors.items()
            for x in pair[:1]
            if name not in like or own_part(like[name]).shape != own_part(x).shape
        ]
        wrong += [f"{n!r}, {len(pair)} averages" for n, pair in tensors.items() if len(pair) != 2]
        wrong += [f"no clock of {n!r}" for n in tensors if len(clocks.get(n, ())) != 3]
        if wrong:
            raise NowcastError(
                message(
                    "Nowcaster: the saved averages do not fit",
                    expected="two averages, with their times, of each of the module's parameters",
                    got=wrong,
                    help="resume with the same module",
                )
            )

    def load_state_dict(self, state: Mapping[str, Any], like: Mapping[str, Tensor]) -> None:
        """Takes back what `state_dict` gave.

        Args:
            state: What was saved.
            like: The tensors that averages are of.
        """
        self.check(state, like)
        self.clear()
        for name, pair in state["tensors"].items():
            part = own_part(like[name])
            room = self._as_kept(part)
            short, long = (torch.empty_like(room).copy_(own_part(x)) for x in pair)
            self._short[name], self._long[name] = short, long
            age, *times = state["clocks"][name]
            self._clocks[name] = Clock(int(age), *map(float, times))
            self._owners[name] = like[name], part.dtype


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether all entries of tensors are; one wait for the device for all of them."""
    filled = [x for x in tensors if x.numel()]
    if not filled:
        return True
    largest = torch._foreach_norm(filled, float("inf"))  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
    by_device = defaultdict[torch.device, list[Tensor]](list)
    for x in largest:
        by_device[x.device].append(x.double())
    return all(bool(torch.stack(xs).isfinite().all()) for xs in by_device.values())
