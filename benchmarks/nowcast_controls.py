"""Optimizers beside which `nowcast_quality` sets nowcasters, with running averages of their own.

`Snoo` is written after the description of Kallusky et al. (2025), "SNOO: Step-K Nesterov Outer
Optimizer" (arXiv:2510.15830): Nesterov's momentum on the way of K steps of another optimizer.
"""

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from wspace.nowcast import Drift, Nowcaster


class Snoo:
    """K steps of an optimizer, then one of Nesterov's momentum on what they have moved.

    Args:
        optimizer: What makes the steps.
        module: What is trained.
        every: Steps K between outer steps.
        rate: Outer learning rate.
        momentum: Outer momentum.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        module: nn.Module,
        *,
        every: int = 50,
        rate: float = 0.8,
        momentum: float = 0.5,
    ) -> None:
        self.base = Nowcaster(optimizer, module, predictor=Drift(speed=0.0))
        self.parameters = list(module.parameters())
        self.every, self.rate, self.momentum = every, rate, momentum
        self.start = [p.detach().clone() for p in self.parameters]
        self.buffer: list[Tensor] = [torch.zeros_like(p) for p in self.parameters]

    def zero_grad(self) -> None:
        """As the optimizer's."""
        self.base.zero_grad()

    @torch.no_grad()
    def step(self) -> None:
        """A step, and every K of them an outer one."""
        with torch.enable_grad():
            self.base.step()
        if self.base.steps % self.every:
            return
        for p, start, buffer in zip(self.parameters, self.start, self.buffer, strict=True):
            way = p - start
            buffer.mul_(self.momentum).add_(way)
            start.add_(way + self.momentum * buffer, alpha=self.rate)
            p.copy_(start)

    @contextmanager
    def averaged(self) -> Generator[None]:
        """Within it, the module has its running averages."""
        with self.base.averaged():
            yield
