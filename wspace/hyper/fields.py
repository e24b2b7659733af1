r"""Neural fields from partial observations: a set of readings in, the weights of a field out.

A field is a network from coordinates to values. An image is seen only through sensors, a forward
map :math:`F` from the field's values to readings: some pixels, or line integrals. Encoder and
head are trained by the Gaussian log-likelihood of readings,

.. math:: -\log p(y | \theta) = \tfrac{1}{2} \left( \frac{y - F(f_\theta)}{\sigma} \right)^2
   + \log \sigma + \tfrac{1}{2} \log 2 \pi, \qquad \theta = h(\text{mean}_j\, \phi(p_j, y_j)),

with :math:`p_j` the place of a sensor. Steps at test time (`refine`) go on from there, by the same
readings. After Gu, Wang, Yeung (2023), "Generalizable Neural Fields as Partially Observed Neural
Processes" (arXiv 2309.06660), as far as forward map, likelihood and set encoder go; what is
conditioned here are weights.
"""

from collections.abc import Callable, Mapping, Sequence
from math import log, pi, sqrt
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from wspace.errors import HyperError, message
from wspace.hyper.call import call
from wspace.hyper.sets import SetEncoder

SHIFT = 0.5
"""Added to the output of a field, so that it starts at grey; as in `datasets_zoo.inr`."""


class SineField(nn.Module):
    """A multilayer perceptron with sines: sin(ω (W h + b)) in hidden layers. See `sine_field`.

    Sitzmann et al. (2020), "Implicit Neural Representations with Periodic Activation Functions"
    (arXiv 2006.09661). Names and function are those of `datasets_zoo.inr.Siren`.

    Args:
        sizes: Widths of the layers, inputs and outputs included.
        omega: Frequency ω of the sines.
    """

    def __init__(self, sizes: Sequence[int] = (2, 32, 32, 1), omega: float = 30.0) -> None:
        super().__init__()
        pairs = zip(sizes[:-1], sizes[1:], strict=True)
        self.layers = nn.ModuleList(nn.utils.skip_init(nn.Linear, a, b) for a, b in pairs)
        self.omega = omega
        self.draw(None)

    @torch.no_grad()
    def draw(self, generator: torch.Generator | None) -> None:
        """Draws weights: uniform in ±1/n in the first layer and ±sqrt(6/n)/ω in others, n inputs.

        Args:
            generator: Source of randomness.
        """
        for k, layer in enumerate(self.layers):
            weight, bias = layer.get_parameter("weight"), layer.get_parameter("bias")
            n = weight.shape[1]
            bound = sqrt(6 / n) / self.omega if k else 1 / n
            weight.uniform_(-bound, bound, generator=generator)
            bias.uniform_(-1 / sqrt(n), 1 / sqrt(n), generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """Values ``(points, out)`` at coordinates ``(points, in)``."""
        *hidden, last = self.layers
        for layer in hidden:
            x = torch.sin(self.omega * layer(x))
        return last(x) + SHIFT


def sine_field(sizes: Sequence[int] = (2, 32, 32, 1), omega: float = 30.0) -> nn.Module:
    """The network of `SineField`: a factory for a zoo's `Architecture`.

    Args:
        sizes: Widths of the layers.
        omega: Frequency of the sines.

    Returns:
        The module.
    """
    return SineField(tuple(sizes), omega)


# ------------------------------------------------------------------------ forward maps


class Sensors(Protocol):
    """A forward map, and where its sensors are."""

    @property
    def coordinates(self) -> Tensor:
        """Where fields are evaluated, ``(points, in)``, or ``(B, points, in)`` for each image."""
        ...

    @property
    def places(self) -> Tensor:
        """What tells sensors apart, ``(m, p)`` or ``(B, m, p)``."""
        ...

    def __call__(self, values: Tensor) -> Tensor:
        """Readings ``(B, m, channels)`` of values ``(B, points, channels)``; differentiable."""
        ...


class PixelSensors(NamedTuple):
    """Sensors that read the field at points: the identity.

    Attributes:
        coordinates: ``(m, in)``, or ``(B, m, in)`` where images have sensors at different points.
    """

    coordinates: Tensor

    @property
    def places(self) -> Tensor:
        """The coordinates themselves."""
        return self.coordinates

    def __call__(self, values: Tensor) -> Tensor:
        """The values themselves."""
        return values


class RadonSensors(NamedTuple):
    """Sensors that read line integrals of an image on a grid of pixels; see `radon`.

    Attributes:
        coordinates: Of the pixels, ``(points, 2)``.
        places: Cosine and sine of the angle, and offset, of every line, ``(m, 3)``.
        matrix: Integrals of the lines as a linear map of pixels, ``(m, points)``.
    """

    coordinates: Tensor
    places: Tensor
    matrix: Tensor

    def __call__(self, values: Tensor) -> Tensor:
        """Integrals ``(*batch, m, channels)`` of values ``(*batch, points, channels)``."""
        return self.matrix.to(values) @ values


def radon(
    size: int,
    angles: Tensor,
    bins: int | None = None,
    *,
    samples: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> RadonSensors:
    """Line integrals of square images, at several angles.

    Pixel centres are on a grid from -1 to 1. The line of angle a and offset s is the points
    s (cos a, sin a) + t (-sin a, cos a), as (row, column); |s|, |t| ≤ √2. The image between pixel
    centres is bilinear and falls to zero over one pixel beyond the border; the integral over t is a
    sum over equal steps.

    Args:
        size: Pixels along a side.
        angles: In radians, ``(angles,)``.
        bins: Offsets for each angle, equally spaced; `size` if None.
        samples: Steps along a line; four for each pixel if None.
        dtype: Of the map.

    Returns:
        The sensors, angle by angle.

    Raises:
        HyperError: If the image has less than two pixels along a side.
    """
    if size < 2:
        raise HyperError(message("radon: no image", expected="size of at least 2", got=str(size)))
    bins, samples = bins or size, samples or 4 * size
    a = angles.to(torch.float64)
    s = torch.linspace(-sqrt(2), sqrt(2), bins, dtype=torch.float64)
    step = 2 * sqrt(2) / samples
    t = (torch.arange(samples, dtype=torch.float64) + 0.5) * step - sqrt(2)
    across = torch.stack([a.cos(), a.sin()], -1)[:, None, None] * s[:, None, None]
    along = torch.stack([-a.sin(), a.cos()], -1)[:, None, None] * t[:, None]
    at = (across + along + 1) * (size - 1) / 2  # (angles, bins, samples, 2), in pixels
    low = at.floor()
    part = at - low
    matrix = torch.zeros(len(a) * bins, size * size, dtype=torch.float64)
    for i in (0, 1):
        for j in (0, 1):
            row, column = low[..., 0].long() + i, low[..., 1].long() + j
            weight = (part[..., 0] if i else 1 - part[..., 0]) * (
                part[..., 1] if j else 1 - part[..., 1]
            )
            inside = (row >= 0) & (row < size) & (column >= 0) & (column < size)
            pixel = (row * size + column).where(inside, 0).flatten(0, 1)
            matrix.scatter_add_(1, pixel, (step * weight * inside).flatten(0, 1))
    lines = torch.linspace(-1, 1, size, dtype=torch.float64)
    coordinates = torch.stack(torch.meshgrid(lines, lines, indexing="ij"), -1).flatten(0, 1)
    places = torch.cat(
        [
            torch.stack([a.cos(), a.sin()], -1)[:, None].expand(-1, bins, -1),
            s[None, :, None].expand(len(a), -1, -1),
        ],
        -1,
    ).flatten(0, 1)
    return RadonSensors(coordinates.to(dtype), places.to(dtype), matrix.to(dtype))


# --------------------------------------------------------------------- reading fields


def read(module: nn.Module, states: Mapping[str, Tensor], sensors: Sensors) -> Tensor:
    """Readings of the fields of several images, all in one pass.

    Args:
        module: The field; its own weights are not used where states give them.
        states: Weights, ``(B, *shape)`` by name.
        sensors: Forward map.

    Returns:
        ``(B, m, channels)``.
    """
    x = sensors.coordinates
    return sensors(call(module, states, (x,), inputs="shared" if x.dim() == 2 else "paired"))


def gaussian_nll(mean: Tensor, readings: Tensor, log_sigma: Tensor | float) -> Tensor:
    """Negative log-likelihood of readings with Gaussian noise, in nats for each reading.

    Args:
        mean: Predicted readings.
        readings: What sensors read.
        log_sigma: Logarithm of the noise's standard deviation.

    Returns:
        Of the shape of the two.
    """
    sigma = torch.as_tensor(log_sigma, dtype=mean.dtype, device=mean.device)
    scaled = (readings - mean) * torch.exp(-sigma)
    return 0.5 * scaled.square() + sigma + 0.5 * log(2 * pi)


def psnr(shown: Tensor, images: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of images with values from 0 to 1, in decibels.

    Args:
        shown: ``(B, …)``; clipped to 0 … 1.
        images: ``(B, …)``.

    Returns:
        ``(B,)``, at most 100.
    """
    error = (shown.clamp(0, 1) - images).square().flatten(1).mean(1)
    return -10 * error.clamp(min=1e-10).log10()


class SensorEncoder(nn.Module):
    """Condition: a set of readings and their places to one vector, by `SetEncoder`.

    Places are given by themselves, and by sines and cosines of π 2^k times them: a perceptron alone
    hardly tells neighbouring sensors apart.

    Args:
        places: Numbers of a place.
        channels: Numbers of a reading.
        width: Length of the vector.
        hidden: Widths of the layers of φ.
        bands: Frequencies k = 0 … bands - 1.
        generator: Source of initial weights.
    """

    def __init__(
        self,
        places: int,
        channels: int,
        width: int,
        hidden: Sequence[int] = (128, 128),
        bands: int = 3,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.width, self.bands = width, bands
        inputs = places * (1 + 2 * bands)
        self.sets = SetEncoder(inputs, width, hidden, values=channels, generator=generator)

    def forward(self, cond: Sequence[Tensor]) -> Tensor:
        """Vectors of sets of readings.

        Args:
            cond: Places ``(m, p)`` or ``(B, m, p)``, readings ``(B, m, channels)``.

        Returns:
            ``(B, width)``.
        """
        places, readings = cond
        places = places.expand(*readings.shape[:-1], places.shape[-1])
        turns = [pi * 2**k * places for k in range(self.bands)]
        waves = [wave for turn in turns for wave in (turn.sin(), turn.cos())]
        return self.sets((torch.cat([places, *waves], -1), readings))


# ------------------------------------------------------------------- steps at test time


def refine(
    objective: Callable[[dict[str, Tensor]], Tensor],
    start: Mapping[str, Tensor],
    steps: int,
    lr: float,
    keep: Sequence[int] = (),
) -> dict[int, dict[str, Tensor]]:
    """Adam on what belongs to each of several images: weights, or vectors.

    Args:
        objective: Tensors ``(B, *shape)`` by name to each image's loss, ``(B,)``.
        start: What to begin with; left as it is.
        steps: How many.
        lr: Learning rate.
        keep: Numbers of steps after which a copy is kept; the last is kept always.

    Returns:
        Copies by number of steps.
    """
    with torch.inference_mode(False), torch.enable_grad():
        now = {name: x.detach().clone().requires_grad_() for name, x in start.items()}
        adam = torch.optim.Adam(now.values(), lr)
        kept: dict[int, dict[str, Tensor]] = {}
        for step in range(steps + 1):
            if step in keep or step == steps:
                kept[step] = {name: x.detach().clone() for name, x in now.items()}
            if step < steps:
                losses = objective(now).sum()
                slopes = torch.autograd.grad(losses, list(now.values()), materialize_grads=True)
                for x, slope in zip(now.values(), slopes, strict=True):
                    x.grad = slope
                adam.step()
    return kept


class InitialField(nn.Module):
    """The control without a hypernetwork: initial weights that few steps adapt to any image.

    ``"reptile"`` moves them towards what `steps` steps on the readings made of them (Nichol et al.
    2018, arXiv 1803.02999; Tancik et al. 2021, arXiv 2012.02189, for fields); ``"maml"`` along the
    gradient that the loss on target readings has behind steps on the context, without derivatives
    of the steps themselves (first-order MAML: Finn et al. 2017, arXiv 1703.03400).

    Args:
        module: The field, with initial weights.
        steps: Inner steps, of Adam.
        lr: Their rate.
        rule: ``"reptile"`` or ``"maml"``.
    """

    def __init__(
        self,
        module: nn.Module,
        steps: int = 5,
        lr: float = 1e-3,
        rule: Literal["reptile", "maml"] = "maml",
    ) -> None:
        super().__init__()
        if rule not in {"reptile", "maml"}:
            raise HyperError(
                message("InitialField: no such rule", expected="reptile or maml", got=repr(rule))
            )
        self.steps, self.lr, self.rule = steps, lr, rule
        self.names = [name for name, _ in module.named_parameters()]
        values = [nn.Parameter(p.detach().clone()) for p in module.parameters()]
        self.values = nn.ParameterList(values)

    def states(self, count: int) -> dict[str, Tensor]:
        """The initial weights for several images, ``(count, *shape)`` by name."""
        pairs = zip(self.names, self.values, strict=True)
        return {n: p.detach().expand(count, *p.shape).clone() for n, p in pairs}

    def loss(
        self,
        inner: Callable[[dict[str, Tensor]], Tensor],
        outer: Callable[[dict[str, Tensor]], Tensor],
        count: int,
    ) -> Tensor:
        """A number whose gradient in the initial weights is what the rule says.

        Args:
            inner: Losses ``(B,)`` on what images are adapted to.
            outer: Losses ``(B,)`` on target readings; not used by ``"reptile"``.
            count: Images, B.

        Returns:
            A scalar. Its value means nothing.
        """
        start = self.states(count)
        after = refine(inner, start, self.steps, self.lr)[self.steps]
        if self.rule == "reptile":
            slopes = {name: start[name] - x for name, x in after.items()}
        else:
            leaves = {name: x.requires_grad_() for name, x in after.items()}
            with torch.enable_grad():
                found = torch.autograd.grad(outer(leaves).sum(), list(leaves.values()))
            slopes = dict(zip(leaves, found, strict=True))
        pairs = zip(self.names, self.values, strict=True)
        return torch.stack([(slopes[n].mean(0) * p).sum() for n, p in pairs]).sum()
