"""A stack of networks run layer by layer, all networks in every layer, and its gradient.

The layers of an `nn.Sequential` that are known here take the whole stack without
`torch.func.vmap`, and the commonest have their gradients by hand: the time that vmap and the tape
of autograd take themselves is as long as the arithmetic of small networks. Between layers the batch
comes last (see `wspace.zoo.convolve`). Everything else runs under vmap, one child at a time, and a
module that is no chain is one such child.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

from wspace.zoo.convolve import Geometry, answers, convolve, side_by_side, slopes, suits

States = Mapping[str, Tensor]
"""Stacked parameters and buffers, ``(m, *shape)`` by name."""

Back = Callable[[Tensor, bool], tuple[Tensor | None, dict[str, Tensor]]]
"""(gradient in a layer's answers, whether that in its inputs is wanted) → that, and the gradients
in the layer's parameters by name."""

ELEMENTWISE = (nn.GELU, nn.SiLU, nn.LeakyReLU, nn.Sigmoid, nn.ELU, nn.Softplus, nn.Identity)


class Stacked:
    """A module as a function of a stack of its states.

    Args:
        module: The architecture, on any device (the meta device too), in the mode it is run in.
        shared: True if all networks see the same inputs, ``(b, …)``.
    """

    def __init__(self, module: nn.Module, *, shared: bool = False) -> None:
        self.shared = shared
        chain = type(module) is nn.Sequential and len(module) > 0
        self.layers = _chain(module, "") if chain else [_Other(module, "")]

    def __call__(self, states: States, x: Tensor) -> Tensor:
        """Runs all networks.

        Args:
            states: Stacked states; float buffers may be changed in place (BatchNorm).
            x: Inputs, ``(m, b, …)``, or ``(b, …)`` for all networks.

        Returns:
            ``(m, b, …)``.
        """
        x = self._inputs(states, x)
        for layer in self.layers:
            x = layer(states, x)
        return x.movedim(-1, 1)

    def gradient(
        self, states: States, x: Tensor, loss: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses of all networks, and the gradient of each in its parameters.

        Args:
            states: As for a call.
            x: As for a call.
            loss: Outputs ``(m, b, …)`` → losses ``(m,)``.

        Returns:
            Losses, and gradients by name.
        """
        backs: list[Back] = []
        with torch.no_grad():
            x = self._inputs(states, x)
            for layer in self.layers:
                x, back = layer.step(states, x)
                backs.append(back)
        outputs = x.detach().requires_grad_()
        losses = loss(outputs.movedim(-1, 1))
        found: dict[str, Tensor] = {}
        (g,) = torch.autograd.grad(losses.sum(), outputs)
        for k in reversed(range(len(backs))):
            before, some = backs.pop()(g, k > 0)
            found |= some
            g = g if before is None else before
        return losses.detach(), found

    def _inputs(self, states: States, x: Tensor) -> Tensor:
        x = x.expand(len(next(iter(states.values()))), *x.shape) if self.shared else x
        return x.movedim(1, -1)


class _Layer(ABC):
    """One layer of all networks, activations ``(m, …, b)``."""

    def __init__(self, module: nn.Module, at: str) -> None:
        self.module, self.at = module, at
        self.trained = [at + name for name, _ in module.named_parameters()]

    @abstractmethod
    def __call__(self, states: States, x: Tensor) -> Tensor:
        """The layer, for autograd."""

    def step(self, states: States, x: Tensor) -> tuple[Tensor, Back]:
        """The layer, and the way back: by autograd, where it is not written by hand."""
        with torch.enable_grad():
            leaves = {name: states[name].detach().requires_grad_() for name in self.trained}
            start = x.detach().requires_grad_(x.is_floating_point())
            y = self({**states, **leaves}, start)

        def back(g: Tensor, wanted: bool) -> tuple[Tensor | None, dict[str, Tensor]]:  # noqa: FBT001
            into = [*leaves.values(), *([start] if wanted else [])]
            found = list(torch.autograd.grad(y, into, g, materialize_grads=True)) if into else []
            return found.pop() if wanted else None, dict(zip(leaves, found, strict=True))

        return y.detach(), back


class _Other(_Layer):
    """What is not known here, under vmap."""

    def __init__(self, module: nn.Module, at: str) -> None:
        super().__init__(module, at)
        run = side_by_side(module)
        self.every = vmap(lambda states, x: functional_call(run, states, (x,)))
        self.bare = vmap(run)

    def __call__(self, states: States, x: Tensor) -> Tensor:
        n = len(self.at)
        mine = {name[n:]: v for name, v in states.items() if name.startswith(self.at)}
        x = x.movedim(-1, 1)
        return (self.every(mine, x) if mine else self.bare(x)).movedim(1, -1)


class _Elementwise(_Layer):
    def __call__(self, states: States, x: Tensor) -> Tensor:
        return self.module(x)


class _ReLU(_Layer):
    def __call__(self, states: States, x: Tensor) -> Tensor:
        return torch.relu(x)

    def step(self, states: States, x: Tensor) -> tuple[Tensor, Back]:
        y = torch.relu(x)
        return y, lambda g, wanted: (torch.ops.aten.threshold_backward(g, y, 0), {})


class _Tanh(_Layer):
    def __call__(self, states: States, x: Tensor) -> Tensor:
        return torch.tanh(x)

    def step(self, states: States, x: Tensor) -> tuple[Tensor, Back]:
        y = torch.tanh(x)
        return y, lambda g, wanted: (torch.ops.aten.tanh_backward(g, y), {})


class _Flatten(_Layer):
    def __call__(self, states: States, x: Tensor) -> Tensor:
        return x.flatten(1, -2)

    def step(self, states: States, x: Tensor) -> tuple[Tensor, Back]:
        return x.flatten(1, -2), lambda g, wanted: (g.view(x.shape), {})


class _Linear(_Layer):
    """Of vectors."""

    def __call__(self, states: States, x: Tensor) -> Tensor:
        w, b = states[self.at + "weight"], states.get(self.at + "bias")
        if x.dim() == 3:
            return w @ x if b is None else torch.baddbmm(b[..., None], w, x)
        y = torch.einsum("m...fb,mof->m...ob", x, w)
        return y if b is None else y + b.reshape(len(b), *[1] * (x.dim() - 3), -1, 1)

    def step(self, states: States, x: Tensor) -> tuple[Tensor, Back]:
        if x.dim() > 3:
            return super().step(states, x)
        w = states[self.at + "weight"]

        def back(g: Tensor, wanted: bool) -> tuple[Tensor | None, dict[str, Tensor]]:  # noqa: FBT001
            found = {self.at + "weight": g @ x.mT}
            if self.at + "bias" in states:
                found[self.at + "bias"] = g.sum(2)
            return w.mT @ g if wanted else None, found

        return self(states, x), back


class _Convolution(_Layer):
    """With the ReLU after it, if there is one."""

    def __init__(self, module: nn.Conv2d, at: str) -> None:
        super().__init__(module, at)
        self.geometry, self.relu = Geometry.of(module), False

    def __call__(self, states: States, x: Tensor) -> Tensor:
        w, b = states[self.at + "weight"], states.get(self.at + "bias")
        y = convolve(x, w, b, self.geometry)
        return y.relu() if self.relu else y

    def step(self, states: States, x: Tensor) -> tuple[Tensor, Back]:
        w, b = states[self.at + "weight"], states.get(self.at + "bias")
        x = x.contiguous()
        y = answers(x, w, b, self.geometry, relu=self.relu)
        kept = y if self.relu else None

        def back(g: Tensor, wanted: bool) -> tuple[Tensor | None, dict[str, Tensor]]:  # noqa: FBT001
            dx, dw, db = slopes(g, x, w, self.geometry, images=wanted, y=kept)
            found = {self.at + "weight": dw, self.at + "bias": db}
            return dx, {name: found[name] for name in self.trained}

        return y, back


class _BatchNorm(_Layer):
    """Networks are further channels; statistics in the stack are changed in place."""

    def __call__(self, states: States, x: Tensor) -> Tensor:
        module = cast("nn.BatchNorm2d", self.module)
        w, b = (states.get(self.at + part) for part in ("weight", "bias"))
        w, b = (v if v is None else v.reshape(-1) for v in (w, b))
        mean, variance = (states.get(self.at + part) for part in ("running_mean", "running_var"))
        if mean is not None and variance is not None:  # views, through which they are changed
            mean, variance = mean.view(-1), variance.view(-1)
        training = module.training or mean is None
        rows = x.reshape(1, x.shape[0] * x.shape[1], -1)
        rate = 0.0 if module.momentum is None else module.momentum
        return F.batch_norm(rows, mean, variance, w, b, training, rate, module.eps).view(x.shape)


def _chain(module: nn.Module, prefix: str) -> list[_Layer]:
    out: list[_Layer] = []
    for name, child in module.named_children():
        at = prefix + name + "."
        before = out[-1] if out else None
        if type(child) is nn.Sequential:
            out += _chain(child, at)
        elif type(child) is nn.ReLU and isinstance(before, _Convolution):
            before.relu = True
        else:
            out.append(_layer(child, at))
    return out


def _layer(module: nn.Module, at: str) -> _Layer:
    """One child of a chain; subclasses of the layers known here may do anything, so are not."""
    kind = type(module)
    if suits(module):
        return _Convolution(cast("nn.Conv2d", module), at)
    if kind in {nn.BatchNorm1d, nn.BatchNorm2d} and getattr(module, "momentum", None) is not None:
        return _BatchNorm(module, at)
    if kind is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
        return _Flatten(module, at)
    simple = {nn.Linear: _Linear, nn.ReLU: _ReLU, nn.Tanh: _Tanh}
    if kind in simple:
        return simple[kind](module, at)
    return (_Elementwise if kind in ELEMENTWISE else _Other)(module, at)
