"""`TiledHead`: convolution kernels put together from basic ones, each with its own vector."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn

from wspace.errors import HyperError, message
from wspace.hyper.heads.head import Head, linear
from wspace.hyper.target import Weight


class TiledHead(Head):
    """The static hypernetwork of convolutional networks.

    A basic kernel has ``basic`` channels. A kernel that is larger consists of several, side by side
    along both of its channel axes, and each has a learned vector of its own. Two linear maps turn
    that vector into the basic kernel: one of each input channel, then one that all channels share.
    Kernels of one size share the maps. Ha, Dai, Le (2016), "HyperNetworks", section 3.1
    (arXiv 1609.09106).

    No condition is needed; the vector of one is appended to every tile's own.

    Args:
        embedding: Length of a tile's vector.
        basic: Input and output channels of the basic kernel.
        hidden: Width between the maps; that of the vectors if None, as in the paper.
    """

    def __init__(
        self, embedding: int = 64, *, basic: tuple[int, int] = (16, 16), hidden: int | None = None
    ) -> None:
        super().__init__()
        self.embedding, self.basic, self.hidden = embedding, basic, hidden or embedding

    def build(self, generator: torch.Generator | None) -> None:
        """Makes the maps of every size of kernel, and the vectors of all tiles.

        Args:
            generator: Source of randomness.

        Raises:
            HyperError: If a weight is no kernel, or has channels that basic ones do not fill.
        """
        self._check()
        self.sizes = sorted({w.shape[2:] for w in self.weights})
        self.kernels = nn.ModuleList()
        for size in self.sizes:
            weights = [w for w in self.weights if w.shape[2:] == size]
            self.kernels.append(_Kernels(self, weights, size, generator))

    def make(self, e: Tensor) -> dict[str, Tensor]:
        """All kernels of a vector.

        Args:
            e: Vectors, ``(*batch, width)``.

        Returns:
            By name, ``(*batch, *shape)``.
        """
        made: dict[str, Tensor] = {}
        for kernels in self.kernels:
            made |= kernels(e)
        return made

    def silence(self) -> None:
        """Sets the shared maps to zero."""
        with torch.no_grad():
            for kernels in self.kernels:
                for p in kernels.get_submodule("last").parameters():
                    p.zero_()

    def _check(self) -> None:
        n_in, n_out = self.basic
        wrong = [
            f"{w.name} {w.shape}"
            for w in self.weights
            if len(w.shape) != 4 or w.shape[0] % n_out or w.shape[1] % n_in
        ]
        if wrong:
            raise HyperError(
                message(
                    "hypernetwork: TiledHead cannot make these weights",
                    expected=f"kernels (a × {n_out}, b × {n_in}, height, width)",
                    got=wrong,
                    help="choose others with select=, or another kernel with basic=(in, out)",
                )
            )


class _Kernels(nn.Module):
    """The kernels of one size."""

    def __init__(
        self,
        head: TiledHead,
        weights: Sequence[Weight],
        size: tuple[int, ...],
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        self.weights, self.size = list(weights), size
        self.n_in, self.n_out = head.basic
        self.counts = [w.shape[0] * w.shape[1] // (self.n_in * self.n_out) for w in weights]
        self.z = nn.Parameter(torch.randn(sum(self.counts), head.embedding, generator=generator))
        n, d = head.embedding + head.width, head.hidden
        self.first = linear(n, self.n_in * d, 1 / n, generator)
        self.last = linear(d, self.n_out * prod(size), 1 / d, generator)

    def forward(self, e: Tensor) -> dict[str, Tensor]:
        """Kernels by name; all tiles at once."""
        z = self.z
        if e.shape[-1]:
            own, shared = (*e.shape[:-1], *z.shape), (*e.shape[:-1], len(z), e.shape[-1])
            z = torch.cat([z.expand(own), e[..., None, :].expand(shared)], -1)
        tiles = self.last(self.first(z).unflatten(-1, (self.n_in, -1)))
        tiles = tiles.unflatten(-1, (self.n_out, *self.size))  # (*batch, tiles, in, out, h, w)
        parts = tiles.split(self.counts, dim=e.dim() - 1)
        return {w.name: self._joined(t, w) for w, t in zip(self.weights, parts, strict=True)}

    def _joined(self, tiles: Tensor, weight: Weight) -> Tensor:
        rows, columns = weight.shape[0] // self.n_out, weight.shape[1] // self.n_in
        grid = tiles.unflatten(-5, (rows, columns))  # (…, rows, columns, in, out, h, w)
        return grid.movedim(-3, -5).reshape(*tiles.shape[:-5], *weight.shape)
