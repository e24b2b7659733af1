"""Networks of the federated recipes: what clients train, and what describes a client.

Shamsian et al. (2021), "Personalized Federated Learning using Hypernetworks" (arXiv 2103.04628):
a small LeNet as target. Scott et al. (2023), "PeFLL: Personalized Federated Learning by Learning
to Learn" (arXiv 2306.05515): a client is described by the mean of φ(x, y) over its examples, φ a
LeNet that gets the label as further input channels, or a linear map of the label alone.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wspace.errors import HyperError, message


def lenet(
    channels: int = 1,
    size: int = 28,
    classes: int = 10,
    *,
    kernels: int = 4,
    hidden: int = 32,
    taps: int = 5,
) -> nn.Sequential:
    """Two convolutions that keep the size, each with ReLU and 2 × 2 pooling; two linear layers.

    Args:
        channels: Of the images.
        size: Their height and width.
        classes: Number of logits.
        kernels: Channels of the first convolution; the second has twice as many.
        hidden: Width of the first linear layer.
        taps: Height and width of the kernels, odd.

    Returns:
        The network.

    Raises:
        HyperError: If nothing of the image would be left.
    """
    left = size // 2 // 2
    if left < 1 or taps % 2 == 0:
        raise HyperError(
            message(
                "lenet: no network for these images",
                expected="size of at least 4, odd taps",
                got=f"size {size}, taps {taps}",
            )
        )
    return nn.Sequential(
        nn.Conv2d(channels, kernels, taps, padding=taps // 2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(kernels, 2 * kernels, taps, padding=taps // 2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * kernels * left * left, hidden),
        nn.ReLU(),
        nn.Linear(hidden, classes),
    )


class ImageLabels(nn.Module):
    """φ(x, y): a small convolutional network; the label comes in as one-hot input channels.

    Args:
        channels: Of the images.
        size: Their height and width.
        classes: Number of labels.
        width: Length of the answer.
        kernels: As for `lenet`.
    """

    def __init__(
        self,
        channels: int = 1,
        size: int = 28,
        classes: int = 10,
        width: int = 32,
        kernels: int = 8,
    ) -> None:
        super().__init__()
        self.classes, self.width = classes, width
        self.layers = lenet(channels + classes, size, width, kernels=kernels, hidden=2 * width)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Answers ``(n, width)`` for images ``(n, channels, size, size)``, labels ``(n,)``."""
        planes = F.one_hot(y, self.classes).to(x)[..., None, None]
        return self.layers(torch.cat([x, planes.expand(-1, -1, *x.shape[-2:])], 1))


class Labels(nn.Module):
    """φ(x, y) that looks at the label alone: one vector for each class.

    Args:
        classes: Number of labels.
        width: Length of the answer.
    """

    def __init__(self, classes: int = 10, width: int = 32) -> None:
        super().__init__()
        self.width = width
        self.vectors = nn.Embedding(classes, width)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Answers ``(n, width)`` for labels ``(n,)``."""
        del x
        return self.vectors(y)


class Standardised(nn.Module):
    """A condition that is a vector already: (v - m) / s.

    The numbers m and s are the mean and the standard deviation of the entries of the first
    descriptor that `fit` sees. They are kept in the checkpoint; a second call changes nothing.

    Args:
        width: Length of the vector.
        fixed: True for m = 0 and s = 1 (vectors that are learned need no scale).
    """

    mean: Tensor
    deviation: Tensor
    fitted: Tensor

    def __init__(self, width: int, *, fixed: bool = False) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("deviation", torch.ones(()))
        self.register_buffer("fitted", torch.tensor(fixed))

    @torch.no_grad()
    def fit(self, v: Tensor) -> None:
        """Takes m and s from the first descriptor, once.

        Args:
            v: Descriptors ``(B, width)``; the first row is used.
        """
        if not bool(self.fitted):
            deviation, mean = torch.std_mean(v[0])
            self.mean.copy_(mean)
            self.deviation.copy_(deviation.clamp(min=1e-6))
            self.fitted.fill_(True)

    def forward(self, v: Tensor) -> Tensor:
        """Standardises.

        Args:
            v: Vectors, ``(B, width)``.

        Returns:
            ``(B, width)``.

        Raises:
            HyperError: If no descriptor was seen yet.
        """
        if not bool(self.fitted):
            raise HyperError(
                message(
                    "Standardised: mean and deviation are not known yet",
                    help="fit(v) takes them from the first descriptor; training does that",
                )
            )
        return (v - self.mean) / self.deviation
