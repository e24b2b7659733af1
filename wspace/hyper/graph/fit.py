"""From a tile of one size to tensors of any: which entry of the tile goes where, and unit codes.

A hypernetwork on graphs decodes tiles of one largest size; a tensor that is smaller takes part of
its tile, one that is larger repeats it (Knyazev et al. 2021, arXiv 2110.13100; 2023, arXiv
2303.04143). Repeating makes channels identical, and gradients keep them so. `UnitCodes` tells
repeated units apart: every unit has a code, which is the same in all tensors that its group
indexes, and adds a mixture of all units of the tile to the one that is repeated.
"""

from collections.abc import Sequence
from math import pi, prod

import torch
from torch import Tensor, nn

from wspace.errors import HyperError, message
from wspace.hyper.graph.form import Units


def tile_index(size: int, tile: int, *, centred: bool = False) -> Tensor:
    """Which index of a tile every index of an axis takes: a crop if it fits, else repetition.

    Args:
        size: Length of the axis.
        tile: Length of the tile.
        centred: Crop around the middle (kernels) instead of from the start (channels).

    Returns:
        int64 ``(size,)``.

    Example:
        >>> tile_index(3, 5, centred=True).tolist(), tile_index(5, 3).tolist()
        ([1, 2, 3], [0, 1, 2, 0, 1])
    """
    if size <= tile:
        start = (tile - size) // 2 if centred else 0
        return torch.arange(start, start + size)
    return torch.arange(size) % tile


def fit_shape(tile: Tensor, sizes: Sequence[int]) -> Tensor:
    """A tensor of any size out of a tile.

    Channels are cropped from the start or repeated, taps are cropped around the middle or repeated.
    Taps that are absent from `sizes` take the middle of the tile.

    Args:
        tile: ``(*batch, C, C, S, S)``.
        sizes: ``(out, in, *taps)``. One tap axis is the middle row, or all S × S entries in a row
            if it is longer than S; three or more are taken in a row.

    Returns:
        ``(*batch, out, in, *taps)``.

    Raises:
        HyperError: If a size is not positive.
    """
    if len(sizes) < 2 or min(sizes) < 1:
        raise HyperError(
            message("fit_shape: no such shape", expected="(out, in, *taps), all positive",
                    got=str(tuple(sizes)))
        )  # fmt: skip
    out, into, *taps = sizes
    tile = tile.index_select(-4, tile_index(out, tile.shape[-4]).to(tile.device))
    tile = tile.index_select(-3, tile_index(into, tile.shape[-3]).to(tile.device))
    flat = tile.flatten(-2).index_select(-1, tap_index(taps, tile.shape[-1]).to(tile.device))
    return flat.unflatten(-1, taps) if taps else flat.squeeze(-1)


def tap_index(taps: Sequence[int], side: int) -> Tensor:
    """Which of the S × S entries of a tile every tap takes, row by row.

    Args:
        taps: Sizes of the tap axes.
        side: S.

    Returns:
        int64 ``(prod(taps),)``.
    """
    count = prod(taps)
    if len(taps) > 2 or (len(taps) == 1 and count > side):
        return tile_index(count, side * side)
    rows, columns = (1, *taps)[-2:] if taps else (1, 1)
    row, column = (tile_index(n, side, centred=True) for n in (rows, columns))
    return (row[:, None] * side + column).reshape(-1)


class UnitCodes(nn.Module):
    """What every unit takes from the C units of a tile: ``(n, C)`` matrices.

    A unit takes the one at its place. One beyond the tile repeats an earlier one and adds a code
    that depends on its number within the group and on its piece, so that no two are alike. Fixed
    places beyond the tile (pixels, words) have learned codes of their own.

    Args:
        channels: Units C of the tile.
        places: Learned codes of fixed places; further ones repeat them and add a code too.
        strength: Size of the added codes at first, relative to the units that are repeated.
        waves: Random frequencies by which numbers are told apart.
        generator: Draws frequencies and first values.
    """

    frequency: Tensor
    phase: Tensor

    def __init__(
        self,
        channels: int,
        places: int = 256,
        strength: float = 0.5,
        *,
        waves: int = 32,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.channels = channels

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        self.register_buffer("frequency", torch.rand(2, waves, generator=generator))
        self.register_buffer("phase", torch.rand(2, waves, generator=generator))
        size = strength * (waves * channels) ** -0.5
        self.units = nn.Parameter(size * normal(waves, channels))
        self.pieces = nn.Parameter(size * normal(waves, channels))
        self.places = nn.Parameter(channels**-0.5 * normal(places, channels))

    def forward(self, units: Units) -> Tensor:
        """The matrix of an axis.

        Args:
            units: Its n units.

        Returns:
            ``(n, C)``: rows of the unit matrix for the first C units.
        """
        n, c, like = units.size, self.channels, self.units
        index = torch.arange(n, device=like.device)
        same = torch.eye(c, dtype=like.dtype, device=like.device)[index % c]
        if n <= c:
            return same
        beyond = (index >= c).to(like)[:, None]
        if units.fixed:
            count = len(self.places)
            same, beyond = self.places[index % count], (index >= count).to(like)[:, None]
        unit, piece = units.unit.to(like.device), units.piece.to(like.device)
        codes = self._waves(unit, 0) @ self.units
        codes = codes + (piece > 0).to(like)[:, None] * (self._waves(piece, 1) @ self.pieces)
        return same + beyond * codes

    def _waves(self, number: Tensor, which: int) -> Tensor:
        turns = number[:, None].to(self.phase) * self.frequency[which] + self.phase[which]
        return (2 * pi * turns).cos() * 2**0.5
