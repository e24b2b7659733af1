"""Networks that show images: decoding on a pixel grid, and dilation."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

from wspace.space import WeightSpace


def grid(height: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
    """Coordinates (row, column) of all pixels, row by row, ``(height * width, 2)``.

    The first and the last pixel of each axis are at -1 and 1, as `datasets_zoo.inr` fits them.

    Args:
        height: Pixels from top to bottom.
        width: Pixels from left to right.
        dtype: Of the coordinates.

    Returns:
        The coordinates.
    """
    lines = [torch.linspace(-1, 1, n, dtype=dtype) for n in (height, width)]
    return torch.stack(torch.meshgrid(*lines, indexing="ij"), -1).flatten(0, 1)


def decoded(
    module: nn.Module, space: WeightSpace, state: Mapping[str, Tensor], x: Tensor
) -> Tensor:
    """What networks of one architecture answer at shared coordinates.

    Args:
        module: The architecture; its weights are not used and may be on the meta device.
        space: Its weight space.
        state: Parameters by name, ``(rows, *shape)``.
        x: Coordinates, ``(points, 2)``.

    Returns:
        ``(rows, points, channels)``; differentiable in the state.
    """
    names = {name: p.name for p in space.params for name in (p.name, *p.ties)}

    def one(values: dict[str, Tensor]) -> Tensor:
        all_names = {name: values[of] for name, of in names.items()}
        return functional_call(module, all_names, (x,), tie_weights=False)

    return vmap(one)({p.name: state[p.name] for p in space.params})


def dilated(images: Tensor, radius: int = 1) -> Tensor:
    """Images whose bright parts have grown: the largest value in a square around each pixel.

    Args:
        images: ``(rows, channels, height, width)``.
        radius: Half the square's side, less the pixel itself.

    Returns:
        As `images`.
    """
    return F.max_pool2d(images, 2 * radius + 1, stride=1, padding=radius)
