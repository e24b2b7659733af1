"""`SetEncoder`: the vector of a set of examples, whatever their order and number."""

from collections.abc import Sequence
from math import sqrt
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wspace.errors import HyperError, message
from wspace.hyper.heads.head import linear, perceptron

Use = Literal["channels", "linear", "only"]


class SetEncoder(nn.Module):
    """Mean over a set of what a network says of each example, φ(x, y).

    Zaheer et al. (2017), "Deep Sets" (arXiv 1703.06114); for weights of clients Scott, Zakerinia,
    Lampert (2024), "PeFLL" (arXiv 2306.05515), where the vector is also standardised with two
    numbers that are taken from the first one.

    Args:
        inputs: Length of x, or its shape, (channels, height, width), for images.
        width: Length of the vector.
        hidden: Widths of φ: of its layers for vectors, of its convolutions for images.
        classes: Number of classes, where y is a class.
        values: Length of y, where it is a vector of numbers.
        use: How y enters: ``"channels"`` appended to x (to every pixel), ``"linear"`` by a linear
            map added to what is said of x, ``"only"`` by that map alone, without x.
        standardize: True to shift and scale the vectors by two numbers, so that the entries of
            those of the first call in training mode have mean 0 and variance 1; until then they
            are left as they are.
        generator: Source of randomness.

    Attributes:
        shift: Number that is subtracted; a buffer.
        size: Number that is divided by; a buffer. 0 before the first call.
    """

    shift: Tensor
    size: Tensor

    def __init__(
        self,
        inputs: int | Sequence[int],
        width: int,
        hidden: Sequence[int] = (64,),
        *,
        classes: int = 0,
        values: int = 0,
        use: Use = "channels",
        standardize: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.shape = (inputs,) if isinstance(inputs, int) else tuple(inputs)
        self.width, self.classes, self.values, self.use = width, classes, values, use
        self.standardize = standardize
        self._check()
        extra = (classes or values) if use == "channels" else 0
        self.phi = None
        if use != "only":
            sizes = [self.shape[0] + extra, *hidden]
            self.phi = nn.Sequential(*self._layers(sizes, generator))
        self.labels = None
        if use != "channels":
            n = classes or values
            self.labels = linear(n, width, 1.0 if classes else 1 / n, generator)
        self.register_buffer("shift", torch.zeros(()))
        self.register_buffer("size", torch.zeros(()))

    def forward(self, cond: Tensor | Sequence[Tensor | None]) -> Tensor:
        """Vectors of sets.

        Args:
            cond: Examples x, ``(*batch, n, *inputs)``; or x and y, or x, y and a mask: y is
                ``(*batch, n)`` of classes or ``(*batch, n, values)``, the mask ``(*batch, n)`` is
                True for examples that are there.

        Returns:
            ``(*batch, width)``.

        Raises:
            HyperError: If shapes do not fit, or a set has no example.
        """
        x, y, mask = self._parts(cond)
        batch = x.shape[: x.dim() - len(self.shape)]
        if mask is not None:
            x = x.masked_fill(~mask.reshape(*batch, *[1] * len(self.shape)), 0.0)
            y = None if y is None else y.masked_fill(~mask[..., None], 0.0)
        said = self._said(x, y, batch)
        if mask is None:
            pooled = said.mean(-2)
        else:
            there = mask[..., None].to(said.dtype)
            pooled = (said * there).sum(-2) / there.sum(-2)
        return self._standard(pooled)

    def _said(self, x: Tensor, y: Tensor | None, batch: Sequence[int]) -> Tensor:
        """φ of every example, ``(*batch, n, width)``."""
        said: Tensor | None = None
        if self.phi is not None:
            if self.use == "channels" and y is not None:
                spread = y.reshape(*y.shape, *[1] * (len(self.shape) - 1))
                spread = spread.expand(*y.shape, *self.shape[1:])
                x = torch.cat([x, spread.to(x.dtype)], x.dim() - len(self.shape))
            flat = x.reshape(-1, *x.shape[len(batch) :])
            said = cast(Tensor, self.phi(flat)).unflatten(0, tuple(batch))
        if self.labels is not None and y is not None:
            from_labels = self.labels(y.to(self.labels.weight.dtype))
            said = from_labels if said is None else said + from_labels
        return cast(Tensor, said)

    def _standard(self, pooled: Tensor) -> Tensor:
        if not self.standardize:
            return pooled
        if self.training and pooled.numel() and not bool(self.size > 0):
            with torch.no_grad():
                spread, middle = pooled.std(correction=0), pooled.mean()
                if not bool(spread.isfinite()):
                    self._refuse(["examples of which the network says no finite numbers"])
                self.shift.copy_(middle)
                self.size.copy_(torch.where(spread > 0, spread, 1.0))
        return (pooled - self.shift) / torch.where(self.size > 0, self.size, 1.0)

    def _layers(self, sizes: Sequence[int], generator: torch.Generator | None) -> list[nn.Module]:
        last = sizes[-1]
        if len(self.shape) == 1:
            moment = 0.5 if len(sizes) > 1 else 1.0
            return [perceptron(sizes, generator),
                    linear(last, self.width, 1 / (moment * last), generator)]  # fmt: skip
        layers: list[nn.Module] = []
        for n, m in zip(sizes[:-1], sizes[1:], strict=True):
            with torch.random.fork_rng([]):
                conv = nn.Conv2d(n, m, 3, 2, 1)
            with torch.no_grad():
                conv.weight.normal_(0.0, sqrt(2 / (9 * n)), generator=generator)
                nn.init.zeros_(cast(Tensor, conv.bias))
            layers += [conv, nn.ReLU()]
        pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        return [*layers, *pool, linear(last, self.width, 2 / last, generator)]

    def _parts(
        self, cond: Tensor | Sequence[Tensor | None]
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Examples, labels as vectors of numbers, and the mask."""
        parts = [cond] if isinstance(cond, Tensor) else list(cond)
        x, y, mask = (*parts, None, None)[:3]
        wants = bool(self.classes or self.values)
        wrong: list[str] = []
        if x is None or len(parts) > 3 or x.shape[x.dim() - len(self.shape) :] != self.shape:
            shape = None if x is None else tuple(x.shape)
            self._refuse([f"examples of shape {shape}"])
        x = cast(Tensor, x)
        batch = x.shape[: x.dim() - len(self.shape)]
        if wants and y is None:
            wrong.append("no labels")
        if not wants and y is not None:
            wrong.append("labels, but neither classes= nor values=")
        if y is not None and y.shape != (batch if self.classes else (*batch, self.values)):
            wrong.append(f"labels of shape {tuple(y.shape)}")
        if mask is not None and (mask.shape != batch or mask.dtype != torch.bool):
            wrong.append(f"a mask of {mask.dtype} and shape {tuple(mask.shape)}")
        elif not batch or not batch[-1] or (mask is not None and not bool(mask.any(-1).all())):
            wrong.append("a set without examples")
        if wrong:
            self._refuse(wrong)
        if y is not None and self.classes:
            y = self._whole(y, mask)
            y = F.one_hot(y, self.classes)
        return x, y, mask

    def _whole(self, y: Tensor, mask: Tensor | None) -> Tensor:
        """Labels that are classes; 0 where there is no example."""
        if y.is_floating_point() or y.dtype == torch.bool:
            self._refuse([f"labels of {y.dtype}"])
        y = (y if mask is None else y.masked_fill(~mask, 0)).long()
        if y.numel() and (bool(y.min() < 0) or bool(y.max() >= self.classes)):
            self._refuse([f"labels from {int(y.min())} to {int(y.max())}"])
        return y

    def _refuse(self, wrong: list[str]) -> None:
        inputs = "".join(f", {n}" for n in self.shape)
        labels = "none"
        if self.classes or self.values:
            labels = (
                f"(*batch, n) below {self.classes}"
                if self.classes
                else f"(*batch, n, {self.values})"
            )
        raise HyperError(
            message(
                "condition: SetEncoder cannot take this set",
                expected=f"(x, y, mask): x (*batch, n{inputs}), y {labels}, a boolean mask "
                "(*batch, n) or none; at least one example",
                got=wrong,
            )
        )

    def _check(self) -> None:
        wrong: list[str] = []
        if len(self.shape) not in {1, 3}:
            wrong.append(f"inputs={self.shape}")
        if self.classes and self.values:
            wrong.append("classes and values")
        if self.use != "channels" and not (self.classes or self.values):
            wrong.append(f"use={self.use!r} without classes or values")
        if self.use not in {"channels", "linear", "only"}:
            wrong.append(f"use={self.use!r}")
        if wrong:
            raise HyperError(
                message(
                    "condition: SetEncoder cannot be made",
                    expected="inputs of one number or (channels, height, width), classes= or "
                    "values= or neither, use='channels', 'linear' or 'only'",
                    got=wrong,
                )
            )
