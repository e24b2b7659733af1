r"""Networks nobody trained: random weights, and how complex a function they make.

After Teney, Nicolicioiu, Hartmann, Abbasnejad (2024), "Neural Redshift: Random Networks are not
Random Functions" (arXiv 2403.02241): which functions a random network is likely to be depends on
its activation, the magnitude of its weights and its depth. A zoo of them costs seconds, has no
limit in size, and its labels are exact: a test bed for metanetworks.

Network: a multilayer perceptron from 2 coordinates to 1 number, `depth` hidden layers of one width,
one activation. A weight is normal with deviation ``magnitude / sqrt(fan-in)``, a bias uniform in
±`bias`; magnitude is drawn log-uniformly for every network, activation, width and depth for every
cohort.

Labels, of the function :math:`f` on a grid of `grid` × `grid` points in :math:`[-1, 1]^2`, ends
included, in float64:

- ``fourier``: :math:`\sum_k |\hat f(k)| \, \lVert k \rVert / \sum_k |\hat f(k)|`, the mean
  frequency, in cycles per side of the grid, of the discrete Fourier transform of :math:`f` less its
  mean, weighted by magnitude; 0 where :math:`f` is constant. The grid is mirrored at its borders
  before, or every smooth function would have a jump there.
- ``energy``: the same weighted by :math:`|\hat f(k)|^2`.
- ``lempel_ziv``: :math:`c \log_2(n) / n` with :math:`c` the number of phrases into which Lempel and
  Ziv (1976) parse the :math:`n` signs of :math:`f` less its median, read row by row, alternately
  forwards and backwards; about 1 for coin flips.
- ``deviation``: standard deviation of :math:`f`.

The definitions are this file's; those of the paper differ in detail.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log2
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from datasets_zoo.language import log_uniform, pick
from wspace.zoo.architecture import Architecture, InputSpec
from wspace.zoo.images import grid
from wspace.zoo.recipe import Cohort, Counted, check_options, generator_of

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
    "sin": torch.sin,
    "gaussian": lambda x: torch.exp(-(x**2)),
}


class Perceptron(nn.Module):
    """A multilayer perceptron with one activation.

    Args:
        sizes: Widths of the layers, inputs and outputs included.
        activation: One of `ACTIVATIONS`.
    """

    def __init__(self, sizes: Sequence[int], activation: str) -> None:
        super().__init__()
        pairs = zip(sizes[:-1], sizes[1:], strict=True)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairs)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Values ``(points, out)`` at ``(points, in)``."""
        *hidden, last = self.layers
        for layer in hidden:
            x = ACTIVATIONS[self.activation](layer(x))
        return last(x)


def perceptron(
    inputs: int = 2, width: int = 16, depth: int = 2, outputs: int = 1, activation: str = "relu"
) -> nn.Module:
    """The network of `Perceptron` with hidden layers of one width."""
    return Perceptron((inputs, *[width] * depth, outputs), activation)


@dataclass(frozen=True)
class Untrained(Counted):
    """A zoo of random networks; see the top of this file.

    Attributes:
        count: Number of networks.
        seed: Decides everything that is drawn.
        activations: Of `ACTIVATIONS`.
        widths: Widths to draw from.
        depths: Numbers of hidden layers to draw from.
        magnitude: Smallest and largest factor on the weights.
        bias: Largest bias.
        grid: Points along a side.
        size: Networks in one cohort.
    """

    count: int = 10_000
    seed: int = 0
    activations: tuple[str, ...] = tuple(ACTIVATIONS)
    widths: tuple[int, ...] = (16, 32)
    depths: tuple[int, ...] = (1, 2, 3, 4)
    magnitude: tuple[float, float] = (0.5, 8.0)
    bias: float = 1.0
    grid: int = 32
    size: int = 250

    def __post_init__(self) -> None:
        check_options(self, "count", "grid", "size")

    def cohort(self, index: int) -> Cohort:
        """Draws the networks of one cohort.

        Args:
            index: Which.

        Returns:
            Networks with columns ``fourier``, ``energy``, ``lempel_ziv``, ``deviation``,
            ``magnitude``, ``activation``, ``width``, ``depth``.
        """
        generator = generator_of(self.seed, index)
        options = {
            "width": pick(self.widths, generator),
            "depth": pick(self.depths, generator),
            "activation": pick(self.activations, generator),
        }
        architecture = Architecture(
            "datasets_zoo.untrained:perceptron", options, (InputSpec((1, 2)),)
        )
        count = self.rows(index)
        magnitude = log_uniform(self.size, *self.magnitude, generator)
        module = architecture.module()
        state = {
            name: x[:count]
            for name, x in random_states(module, magnitude, self.bias, generator).items()
        }
        table: dict[str, Any] = {
            "magnitude": magnitude[:count],
            **complexity(self._values(module, state)),
        }
        words: dict[str, Any] = {name: [value] * count for name, value in options.items()}
        return Cohort(architecture, state, table | words)

    def _values(self, module: nn.Module, state: dict[str, Tensor]) -> Tensor:
        """Every function on the grid, ``(count, grid, grid)`` in float64."""
        points = grid(self.grid, self.grid, torch.float64)
        exact = {name: x.double() for name, x in state.items()}
        run = vmap(lambda values: functional_call(module, values, (points,)))
        with torch.no_grad():
            return run(exact).reshape(-1, self.grid, self.grid)


def random_states(
    module: nn.Module, magnitude: Tensor, bias: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """Random weights: normal with deviation magnitude/sqrt(fan-in), biases uniform.

    Args:
        module: Its parameters are matrices and biases.
        magnitude: Of every network, ``(n,)``.
        bias: Largest bias.
        generator: Source of randomness.

    Returns:
        States, ``(n, *shape)`` by name.
    """
    state: dict[str, Tensor] = {}
    for name, p in module.named_parameters():
        shape = (len(magnitude), *p.shape)
        if p.dim() == 1:
            state[name] = torch.empty(shape).uniform_(-bias, bias, generator=generator)
        else:
            scale = magnitude.reshape(-1, 1, 1) * p.shape[1] ** -0.5
            state[name] = torch.randn(shape, generator=generator) * scale
    return state


def complexity(values: Tensor) -> dict[str, Tensor]:
    """Complexities of functions on a square grid; defined at the top of this file.

    Args:
        values: ``(n, grid, grid)``.

    Returns:
        Columns ``(n,)`` in float32.

    Example:
        >>> x = (torch.arange(16, dtype=torch.float64) + 0.5) / 16
        >>> wave = torch.cos(2 * torch.pi * 3 * x).expand(1, 16, 16)
        >>> round(float(complexity(wave)["fourier"]), 6)
        3.0
    """
    n, grid = values.shape[:2]
    centred = values - values.mean((1, 2), keepdim=True)
    mirrored = torch.cat([centred, centred.flip(1)], 1)
    size = torch.fft.fft2(torch.cat([mirrored, mirrored.flip(2)], 2)).abs()
    size = torch.where(size < 1e-9 * size.amax((1, 2), keepdim=True), 0.0, size)  # rounding
    cycles = torch.fft.fftfreq(2 * grid, 1 / grid, dtype=values.dtype)
    norm = torch.hypot(cycles[:, None], cycles)
    signs = values > values.flatten(1).median(1).values[:, None, None]
    signs[:, 1::2] = signs[:, 1::2].flip(2)
    columns = {
        "fourier": _mean_of(norm, size),
        "energy": _mean_of(norm, size.square()),
        "lempel_ziv": torch.tensor([lempel_ziv(row) for row in signs.reshape(n, -1).tolist()]),
        "deviation": values.flatten(1).std(1),
    }
    return {name: column.float() for name, column in columns.items()}


def _mean_of(x: Tensor, weight: Tensor) -> Tensor:
    total = weight.sum((1, 2))
    return (x * weight).sum((1, 2)) / torch.where(total > 0, total, 1.0)


def lempel_ziv(bits: Sequence[bool]) -> float:
    """Number of phrases of a sequence of bits, times log2(n) / n.

    Each phrase is the shortest that is not a part of what came before its own end (Lempel and Ziv,
    1976, "On the Complexity of Finite Sequences").

    Args:
        bits: The sequence, at least two long.

    Returns:
        The normalised number; about 1 for coin flips, near 0 for a constant.

    Example:
        >>> lempel_ziv([bool(int(bit)) for bit in "0001101001000101"])  # 0 001 10 100 1000 101
        1.5
    """
    word, n = "".join("01"[bit] for bit in bits), len(bits)
    start = phrases = 0
    while start < n:
        end = start + 1
        while end <= n and word.find(word[start:end], 0, end - 1) >= 0:
            end += 1
        phrases, start = phrases + 1, end
    return phrases * log2(n) / n
