"""Convolutional networks whose kernels a static hypernetwork makes: Ha et al. (2016).

Factories with JSON options, as in `datasets_zoo.architectures`.
"""

import torch
from torch import Tensor, nn


def two_convolutions(
    channels: int = 1, side: int = 28, *, width: int = 16, kernel: int = 7, classes: int = 10
) -> nn.Module:
    """Two convolutions of odd kernels, each with ReLU and max pooling by 2, and a linear layer.

    With the defaults the network of Ha et al. (2016), section 4.1: its second kernel, ``3.weight``
    of 7 x 7 x 16 x 16, has 12,544 weights.

    Args:
        channels: Channels of the images.
        side: Their height and width; 4 divides it.
        width: Channels of both convolutions.
        kernel: Height and width of the kernels.
        classes: Length of the answer.

    Returns:
        The module.
    """
    return nn.Sequential(
        nn.Conv2d(channels, width, kernel, padding=kernel // 2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, width, kernel, padding=kernel // 2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(width * (side // 4) ** 2, classes),
    )


class _PreActivation(nn.Module):
    """Norm, activation and convolution, twice, beside a shortcut: 1 x 1 between other sizes."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(before), nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        same = stride == 1 and before == width
        self.shortcut = None if same else nn.Conv2d(before, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(x))
        beside = x if self.shortcut is None else self.shortcut(y)
        return beside + self.conv2(torch.relu(self.norm2(self.conv1(y))))


class _Pooled(nn.Module):
    """Global average pooling."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def wide_resnet(
    depth: int = 10, widen: int = 1, *, channels: int = 3, width: int = 16, classes: int = 10
) -> nn.Module:
    """WRN-depth-widen: Zagoruyko and Komodakis (2016), table 1 (arXiv 1605.07146).

    Kernels of its blocks are ``blocks.*.conv?.weight``, 3 x 3 and without biases.

    Args:
        depth: 6 n + 4 for n blocks in each of three groups.
        widen: Factor of the channels, 16, 32 and 64.
        channels: Channels of the images.
        width: Channels of the first convolution.
        classes: Length of the answer.

    Returns:
        The module.

    Raises:
        ValueError: If there is no network of that depth.
    """
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f"wide_resnet: depth {depth} is not 6 n + 4")
    sizes = [width * widen * k for k in (1, 2, 4)]
    blocks: list[nn.Module] = []
    before = width
    for group, size in enumerate(sizes):
        for i in range((depth - 4) // 6):
            blocks.append(_PreActivation(before, size, 2 if group and not i else 1))
            before = size
    net = nn.Sequential()
    net.add_module("first", nn.Conv2d(channels, width, 3, 1, 1, bias=False))
    net.add_module("blocks", nn.Sequential(*blocks))
    net.add_module("norm", nn.BatchNorm2d(before))
    net.add_module("act", nn.ReLU())
    net.add_module("pool", _Pooled())
    net.add_module("last", nn.Linear(before, classes))
    return net
