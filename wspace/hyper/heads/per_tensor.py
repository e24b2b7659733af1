"""`PerTensorHead`: a map of its own for every tensor, behind layers that all share."""

from collections.abc import Mapping, Sequence
from math import sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wspace.errors import HyperError, message
from wspace.hyper.heads.head import Head, linear, normal_vectors, perceptron


class PerTensorHead(Head):
    """Shared layers, then for every tensor layers of its own and a linear map ("split heads").

    Without own layers it makes what `FullHead` makes, with parameters that can be told apart:
    ``maps["0.weight"]`` is the map of one tensor. That is the form of Shamsian, Navon, Fetaya,
    Chechik (2021), arXiv 2103.04628.

    Args:
        hidden: Widths of the shared layers.
        own: Widths of each tensor's own layers, which are computed together.
        steady: As in `FullHead`, for what each tensor's map sees.
    """

    def __init__(
        self, hidden: Sequence[int] = (100,), *, own: Sequence[int] = (), steady: bool = False
    ) -> None:
        super().__init__()
        self.hidden, self.own, self.steady = tuple(hidden), tuple(own), steady

    def build(self, generator: torch.Generator | None) -> None:
        """Makes the layers.

        Args:
            generator: Source of randomness.

        Raises:
            HyperError: If there is no condition.
        """
        if not self.width:
            raise HyperError(
                message("hypernetwork: PerTensorHead needs a condition",
                        help="TaskEmbedding(1, width) is one vector that is learned")
            )  # fmt: skip
        sizes, k = [self.width, *self.hidden], len(self.weights)
        self.trunk = perceptron(sizes, generator)
        every = [sizes[-1], *self.own]
        rectified = bool(self.hidden)
        self.inner = nn.ParameterList()
        self.shifts = nn.ParameterList()
        for n, m in zip(every[:-1], every[1:], strict=True):
            drawn = torch.randn(k, m, n, generator=generator)
            self.inner.append(nn.Parameter(drawn * sqrt((2 if rectified else 1) / n)))
            self.shifts.append(nn.Parameter(torch.zeros(k, m)))
            rectified = True
        maps = {w.name: linear(every[-1], w.numel, 1 / every[-1], generator) for w in self.weights}
        self.layers = nn.ModuleList(maps.values())

    @property
    def maps(self) -> dict[str, nn.Module]:
        """The last map of every tensor, by name."""
        return {w.name: m for w, m in zip(self.weights, self.layers, strict=True)}

    def make(self, e: Tensor) -> dict[str, Tensor]:
        """All weights of a vector.

        Args:
            e: Vectors, ``(*batch, width)``.

        Returns:
            By name, ``(*batch, *shape)``.
        """
        batch = e.shape[:-1]
        return {
            w.name: layer(h).reshape((*batch, *w.shape))
            for w, layer, h in zip(self.weights, self.layers, self._seen(e), strict=True)
        }

    def reset(self, variances: Mapping[str, float], generator: torch.Generator | None) -> None:
        """Draws the map of every weight with the variance that gives it the wanted one.

        Args:
            variances: Second moment of the entries of every weight, by name.
            generator: Source of randomness.
        """
        with torch.no_grad():
            seen = self._seen(normal_vectors(self, self.width, generator))
            for w, layer, h in zip(self.weights, self.layers, seen, strict=True):
                size = h.square().sum(-1).mean().sqrt()
                weight = layer.get_parameter("weight")
                weight.normal_(generator=generator).mul_(sqrt(variances[w.name]) / size)
                layer.get_parameter("bias").zero_()

    def silence(self) -> None:
        """Sets the last maps to zero."""
        with torch.no_grad():
            for p in self.layers.parameters():
                p.zero_()

    def _seen(self, e: Tensor) -> Sequence[Tensor]:
        """What the last map of every tensor sees, ``(*batch, n)``."""
        x = self.trunk(e)[..., None, :]
        for inner, shift in zip(self.inner, self.shifts, strict=True):
            x = F.relu((inner @ x[..., None]).squeeze(-1) + shift)
        x = F.rms_norm(x, x.shape[-1:]) if self.steady else x
        return x.expand(*x.shape[:-2], len(self.weights), -1).unbind(-2)
