"""Tiny recipes for the tests of zoos; spawned workers import this module too."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from wspace.zoo import Architecture, Cohort, InputSpec, generator_of


def perceptron(width: int = 5) -> nn.Module:
    return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 2))


class Normed(nn.Module):
    """BatchNorm (float and integer buffers), tied weights, and a buffer that no state holds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(3, 7), nn.BatchNorm1d(7)
        self.second = nn.Linear(3, 7)
        self.second.weight = self.first.weight
        self.out = nn.Linear(7, 2)
        self.register_buffer("shift", torch.full((7,), 0.1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.norm(self.first(x))) + self.second(x) + self.shift.mean())


def normed() -> Normed:
    return Normed()


def not_annotated():  # builds a module, but does not say so
    return nn.Linear(3, 2)


def mlp(width: int = 5) -> Architecture:
    return Architecture("zoo_recipes:perceptron", {"width": width}, [InputSpec((2, 3))])


NORMED = Architecture("zoo_recipes:normed", {}, [InputSpec((2, 3))])


def random_state(
    architecture: Architecture, lead: tuple[int, ...], generator: torch.Generator
) -> dict[str, Tensor]:
    return {
        p.name: 0.5 + torch.rand((*lead, *p.shape), generator=generator)
        if p.buffer
        else torch.randn((*lead, *p.shape), generator=generator)
        for p in architecture.space(("zoo_recipes",)).params
    }


@dataclass(frozen=True)
class Toy:
    """Random networks in cohorts of `size`; the last one may be short."""

    count: int = 10
    seed: int = 0
    size: int = 4
    views: int = 2
    mixed: bool = False
    times: int = 0

    @property
    def cohorts(self) -> int:
        return -(-self.count // self.size)

    def cohort(self, index: int) -> Cohort:
        g = generator_of(self.seed, index)
        n = min(self.size, self.count - index * self.size)
        architecture = NORMED if self.mixed and index % 2 else mlp()
        lead = (self.size, self.times) if self.times else (self.size,)
        state = {k: x[:n] for k, x in random_state(architecture, lead, g).items()}
        at = range(index * self.size, index * self.size + n)
        table = {
            "image": [i // self.views for i in at],
            "loss": torch.rand(self.size, generator=g)[:n],
            "noise": torch.rand(self.size, dtype=torch.float64)[:n],  # of the global generator
            "good": [i % 3 == 0 for i in at],
            "name": [f"net, {i}\n" for i in at],
        }
        steps = 10 * torch.arange(self.times) if self.times else None
        return Cohort(architecture, state, table, steps)


@dataclass(frozen=True)
class Views(Toy):
    """A toy that says that views of one image belong together."""

    grouped_by: ClassVar[str] = "image"


@dataclass(frozen=True)
class Given:
    """One cohort, of what the test says; no cohort depends on a count."""

    seed: int = 0
    cohorts: int = 1
    grows: ClassVar[tuple[str, ...]] = ("cohorts",)
    made: ClassVar[list[Cohort]] = []

    def cohort(self, index: int) -> Cohort:
        return self.made[index]


@dataclass(frozen=True)
class Dying(Toy):
    """A toy whose process dies while it makes cohort 1, as long as a file is not there."""

    token: str = ""

    def cohort(self, index: int) -> Cohort:
        if index == 1:
            token = Path(self.token)
            if not token.exists():
                if not self.token.endswith("always"):
                    token.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return super().cohort(index)
