"""Equivariant layers on features, for use between equivariant linear maps in an `nn.Sequential`.

Features are a dict from parameter name to ``(*batch, *shape, C)``; every module here maps features
to features. What has statistics or weights of its own has one set for each parameter, shared by the
slices of a family (``Param.at``), since these change places. Dropout aside, all are equivariant in
training as in evaluation.
"""

from collections.abc import Callable, Iterable, Mapping
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wspace.action import State
from wspace.errors import SpaceMismatch, message
from wspace.nn.basis import stacks
from wspace.nn.cells import Features, checked, shapes
from wspace.space import WeightSpace

Formula = Callable[[Tensor, Tensor, Tensor], Tensor]


def to_features(state: State, space: WeightSpace) -> dict[str, Tensor]:
    """A state as features of one channel; tied names are dropped.

    Args:
        state: Tensors by name, ``(*batch, *shape)``.
        space: Its weight space.

    Returns:
        For each parameter ``(*batch, *shape, 1)``, a view.

    Raises:
        SpaceMismatch: If the state does not fit the space.
    """
    space.validate(state)
    return {p.name: state[p.name].unsqueeze(-1) for p in space.params}


def from_features(features: Features, space: WeightSpace) -> dict[str, Tensor]:
    """The state held by features of one channel, tied names included: inverts `to_features`.

    Args:
        features: For each parameter ``(*batch, *shape, 1)``.
        space: Its weight space.

    Returns:
        Tensors by name, ``(*batch, *shape)``, views.

    Raises:
        SpaceMismatch: If the features do not fit the space, or have more than one channel.
    """
    checked(shapes(space, 1), features, "from_features")
    return {n: features[p.name].squeeze(-1) for p in space.params for n in (p.name, *p.ties)}


def _numbers(space: WeightSpace) -> dict[str, int]:
    """Parameter name → number of its stack: what shares weights and statistics."""
    return {name: i for i, stack in enumerate(stacks(space)) for name in stack.names}


def _gathered(space: WeightSpace, features: Features, batch: tuple[int, ...]) -> list[Tensor]:
    """Each stack as ``(*batch, entries, C)``: its slices behind one another."""
    out: list[Tensor] = []
    for stack in stacks(space):
        parts = [features[n].reshape(*batch, prod(stack.shape), -1) for n in stack.names]
        out.append(parts[0] if len(parts) == 1 else torch.cat(parts, -2))
    return out


def _spread(space: WeightSpace, found: list[Tensor], batch: tuple[int, ...]) -> dict[str, Tensor]:
    """Inverts `_gathered`."""
    out: dict[str, Tensor] = {}
    for stack, x in zip(stacks(space), found, strict=True):
        parts = x.split(prod(stack.shape), -2)
        for name, part in zip(stack.names, parts, strict=True):
            out[name] = part.reshape(*batch, *stack.shape, x.shape[-1])
    return out


class Pointwise(nn.Module):
    """One module applied to every tensor: an activation, or a map of the channels.

    Args:
        module: Acts on each entry by itself, e.g. ``nn.ReLU()``, ``nn.Linear(c, d)``,
            ``nn.LayerNorm(c)``. What mixes entries (``nn.BatchNorm1d``) breaks equivariance.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, features: Features) -> dict[str, Tensor]:
        """The module's result for every tensor, ``(*batch, *shape, C')``."""
        return {name: self.module(x) for name, x in features.items()}


class Residual(nn.Module):
    """Features plus what a sequence of modules makes of them: ``x + f(x)``.

    Args:
        modules: Modules from features to features, applied in turn; channels must come out as
            they went in.
    """

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(*modules)

    def forward(self, features: Features) -> dict[str, Tensor]:
        """The sum, ``(*batch, *shape, C)`` for each parameter."""
        change: Features = self.inner(features)
        return {name: x + change[name] for name, x in features.items()}


class Dropout(nn.Module):
    """Zeroes entries, or whole channels of a parameter, at random; the identity in evaluation.

    In training the expectation is equivariant, a single draw is not (with ``over="channels"`` it
    is, but for the slices of a family).

    Args:
        space: Weight space of the features.
        p: Probability of being zeroed; the rest is multiplied by ``1 / (1 - p)``.
        over: ``"entries"`` draws for every number; ``"channels"`` once for each sample, parameter
            and channel, so that no unit is singled out.

    Raises:
        SpaceMismatch: If `over` is neither.
    """

    def __init__(self, space: WeightSpace, p: float = 0.5, *, over: str = "channels") -> None:
        super().__init__()
        if over not in {"channels", "entries"}:
            raise SpaceMismatch(f"Dropout: over {over!r}, expected 'channels' or 'entries'")
        self.space, self.p, self.over = space, p, over
        self._dims = {p.name: len(p.shape) for p in space.params}

    def forward(self, features: Features) -> dict[str, Tensor]:
        """Features with some channels or entries zeroed, ``(*batch, *shape, C)`` each."""
        if not self.training or not self.p:
            return dict(features)
        if self.over == "entries":
            return {name: F.dropout(x, self.p) for name, x in features.items()}
        out: dict[str, Tensor] = {}
        for name, n in self._dims.items():
            x = features[name]
            lead = x.shape[: x.dim() - n - 1]
            mask = F.dropout(x.new_ones(*lead, *[1] * n, x.shape[-1]), self.p)
            out[name] = x * mask
        return out

    def extra_repr(self) -> str:
        """Probability and scope."""
        return f"p={self.p}, over={self.over!r}"


class FeatureNorm(nn.Module):
    """Normalises features of each sample to mean 0 and variance 1, then scales and shifts channels.

    Args:
        space: Weight space of the features.
        channels: Number of channels.
        over: ``"channels"`` normalises every entry over its channels (layer norm).
            ``"tensor"`` normalises every parameter over all its entries and channels.
        eps: Added to the variance.

    Raises:
        SpaceMismatch: If `over` is neither.
    """

    def __init__(
        self, space: WeightSpace, channels: int, *, over: str = "channels", eps: float = 1e-5
    ) -> None:
        super().__init__()
        if over not in {"channels", "tensor"}:
            raise SpaceMismatch(f"FeatureNorm: over {over!r}, expected 'channels' or 'tensor'")
        self.space, self.channels, self.over, self.eps = space, channels, over, eps
        self.numbers, self._want = _numbers(space), shapes(space, channels)
        count = len(stacks(space))
        self.scale = nn.Parameter(torch.ones(count, channels))
        self.shift = nn.Parameter(torch.zeros(count, channels))

    def forward(self, features: Features) -> dict[str, Tensor]:
        """Normalised features, ``(*batch, *shape, C)`` for each parameter."""
        scale, shift = self.scale.unbind(), self.shift.unbind()
        if self.over == "channels":
            return {
                name: F.layer_norm(features[name], (self.channels,), scale[i], shift[i], self.eps)
                for name, i in self.numbers.items()
            }
        batch = checked(self._want, features, "FeatureNorm")
        out: list[Tensor] = []
        for i, x in enumerate(_gathered(self.space, features, batch)):
            y = F.layer_norm(x, x.shape[-2:], eps=self.eps)
            out.append(y * scale[i] + shift[i])
        return _spread(self.space, out, batch)

    def extra_repr(self) -> str:
        """Channels and scope."""
        return f"{self.channels}, over={self.over!r}"


class FeatureBatchNorm(nn.Module):
    """Batch norm with one mean and variance for each parameter and channel.

    Statistics run over the batch and all entries of a parameter (all slices of a family), so that
    training is equivariant as well; in evaluation the running averages are used.

    Args:
        space: Weight space of the features.
        channels: Number of channels.
        eps: Added to the variance.
        momentum: Weight of a new batch in the running averages.
    """

    mean: Tensor
    variance: Tensor

    def __init__(
        self, space: WeightSpace, channels: int, *, eps: float = 1e-5, momentum: float = 0.1
    ) -> None:
        super().__init__()
        self.space, self.channels, self.eps, self.momentum = space, channels, eps, momentum
        self._want = shapes(space, channels)
        count = len(stacks(space))
        self.scale = nn.Parameter(torch.ones(count, channels))
        self.shift = nn.Parameter(torch.zeros(count, channels))
        self.register_buffer("mean", torch.zeros(count, channels))
        self.register_buffer("variance", torch.ones(count, channels))

    def forward(self, features: Features) -> dict[str, Tensor]:
        """Normalised features.

        Args:
            features: For each parameter ``(*batch, *shape, C)``.

        Returns:
            The same shapes.

        Raises:
            SpaceMismatch: If the features do not fit the space.
            ValueError: In training, if a parameter of one entry comes in a batch of one.
        """
        batch = checked(self._want, features, "FeatureBatchNorm")
        out: list[Tensor] = []
        for i, x in enumerate(_gathered(self.space, features, batch)):
            flat, running = x.reshape(-1, self.channels), (self.mean[i], self.variance[i])
            affine = (self.scale[i], self.shift[i])
            y = F.batch_norm(flat, *running, *affine, self.training, self.momentum, self.eps)
            out.append(y.reshape(x.shape))
        return _spread(self.space, out, batch)

    def extra_repr(self) -> str:
        """Number of channels."""
        return f"{self.channels}, momentum={self.momentum}"


class Standardize(nn.Module):
    """Shifts and scales each parameter by the mean and deviation that it has over a data set.

    The two numbers of a parameter are the same for all its entries (all slices of a family), so
    this is equivariant. Until `fit` was called it is the identity. Layers on weights train badly
    without it: weights and biases of different layers differ by orders of magnitude.

    Args:
        space: Weight space of the features.
        channels: Number of channels.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, space: WeightSpace, channels: int = 1) -> None:
        super().__init__()
        self.space, self.channels = space, channels
        self.numbers = _numbers(space)
        self.register_buffer("mean", torch.zeros(len(stacks(space)), channels))
        self.register_buffer("std", torch.ones(len(stacks(space)), channels))

    @torch.no_grad()
    def fit(self, data: Iterable[Features]) -> None:
        """Sets mean and deviation to those of a data set.

        Args:
            data: Features, batched or not, all of them counted equally; read once. A parameter
                that is constant over the data is only shifted.

        Raises:
            SpaceMismatch: If features do not fit the space, or there are none.
        """
        mean = torch.zeros_like(self.mean, dtype=torch.float64)
        count, square = torch.zeros_like(mean[:, :1]), torch.zeros_like(mean)
        for features in data:
            batch = checked(shapes(self.space, self.channels), features, "Standardize.fit")
            for i, x in enumerate(_gathered(self.space, features, batch)):
                flat = x.reshape(-1, self.channels).to(mean)
                n = len(flat)
                var, new = torch.var_mean(flat, 0, correction=0)
                total, gap = count[i] + n, new - mean[i]
                square[i] += var * n + gap**2 * count[i] * n / total
                mean[i] += gap * n / total
                count[i] = total
        if not bool((count > 0).all()):
            raise SpaceMismatch(message("Standardize.fit: no data", expected="at least one sample"))
        std = (square / count).sqrt()
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > 1e-12 * (1 + mean.abs()), std, 1.0))

    def forward(self, features: Features) -> dict[str, Tensor]:
        """Features with mean 0 and deviation 1 over the data, ``(*batch, *shape, C)`` each."""
        return self._each(features, lambda x, mean, std: (x - mean) / std)

    def inverse(self, features: Features) -> dict[str, Tensor]:
        """What `forward` was given, ``(*batch, *shape, C)`` for each parameter."""
        return self._each(features, lambda x, mean, std: x * std + mean)

    def _each(self, features: Features, f: Formula) -> dict[str, Tensor]:
        return {n: f(features[n], self.mean[i], self.std[i]) for n, i in self.numbers.items()}


class Scale(nn.Module):
    """Multiplies each parameter by a learned number, the same for all its entries.

    Args:
        space: Weight space of the features.
        value: Initial factor.
    """

    def __init__(self, space: WeightSpace, value: float = 1.0) -> None:
        super().__init__()
        self.numbers: Mapping[str, int] = _numbers(space)
        self.factor = nn.Parameter(torch.full((len(stacks(space)),), value))

    def forward(self, features: Features) -> dict[str, Tensor]:
        """Scaled features, ``(*batch, *shape, C)`` for each parameter."""
        factor = self.factor.unbind()
        return {name: features[name] * factor[i] for name, i in self.numbers.items()}
