r"""Images as networks: SIRENs fitted to the pixels of digits, MNIST or CIFAR images.

Every detail of the variant, because published zoos differ in them and are then not comparable:

- Network: :math:`h_0` = coordinates, :math:`h_{l+1} = \sin(\omega (W_l h_l + b_l))` for the hidden
  layers, :math:`f = W_L h_L + b_L + 0.5`. Parameters by name: ``layers.0.weight`` … With hidden
  layers 32, 32 and one output: 1,185 parameters. :math:`\omega = 30`.
- Coordinates: (row, column) on the grid of pixel centres from -1 to 1, the first and the last pixel
  at the ends; pixels are fitted in [0, 1].
- Initial weights: uniform in ±1/fan-in in the first layer and ±sqrt(6/fan-in)/ω in the others;
  biases uniform in ±1/sqrt(fan-in). Sitzmann et al. (2020), "Implicit Neural Representations with
  Periodic Activation Functions", section 3.2 (arXiv 2006.09661); biases as in PyTorch. Every
  network has initial weights of its own, several views of one image too.
- Fit: Adam (0.9, 0.999), all pixels in every step, mean squared error, learning rate falling to
  zero along a cosine; a network stops early when its PSNR reaches `target_db`.
- Images: training and test images shuffled together by one fixed seed, network ``i`` is view
  ``i % views`` of image ``i // views``. The column ``split`` is ``test`` for test images of the
  data set, ``val`` for one of twelve training images, ``train`` else: views never cross it.

Navon et al. (2023), "Equivariant Architectures for Learning in Deep Weight Spaces" (arXiv
2301.12780), introduced such a zoo for MNIST with this size of network.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from typing import ClassVar

import torch
from torch import Tensor, nn

from datasets_zoo.images import Images, images
from wspace.errors import ZooError, message
from wspace.zoo.architecture import Architecture, InputSpec
from wspace.zoo.images import grid
from wspace.zoo.recipe import Cohort, Counted, check_options, generator_of
from wspace.zoo.train import Training, train_many

SHIFT = 0.5
"""Added to the output, so that a network starts at grey."""


class Siren(nn.Module):
    """A multilayer perceptron with sines.

    Args:
        sizes: Widths of the layers, inputs and outputs included.
        omega: Frequency of the sines.
    """

    def __init__(self, sizes: tuple[int, ...] = (2, 32, 32, 1), omega: float = 30.0) -> None:
        super().__init__()
        pairs = zip(sizes[:-1], sizes[1:], strict=True)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairs)
        self.omega = omega

    def forward(self, x: Tensor) -> Tensor:
        """Pixels ``(points, out)`` at coordinates ``(points, in)``."""
        *hidden, last = self.layers
        for layer in hidden:
            x = torch.sin(self.omega * layer(x))
        return last(x) + SHIFT


def siren(sizes: tuple[int, ...] = (2, 32, 32, 1), omega: float = 30.0) -> nn.Module:
    """The network of `Siren`."""
    return Siren(tuple(sizes), omega)


def siren_init(
    count: int, sizes: tuple[int, ...], omega: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """Initial states, ``(count, *shape)`` by name; see the top of this file."""
    state: dict[str, Tensor] = {}
    for i, (a, b) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        bound = (6 / a) ** 0.5 / omega if i else 1 / a
        for name, shape, most in (("weight", (b, a), bound), ("bias", (b,), a**-0.5)):
            x = torch.empty(count, *shape).uniform_(-most, most, generator=generator)
            state[f"layers.{i}.{name}"] = x
    return state


class SirenGradient:
    """Mean squared errors of a stack of SIRENs and their gradients, written out by hand.

    The same as `wspace.zoo.train.vmapped`, to rounding. It runs in buffers that are kept from step
    to step, which fresh memory and automatic differentiation forbid; sines and cosines then take
    about half of the time.

    Args:
        x: Coordinates of the points, ``(points, in)``.
        y: Values to fit, ``(networks, points, out)``.
        layers: Number of layers.
        omega: Frequency of the sines.
    """

    def __init__(self, x: Tensor, y: Tensor, layers: int, omega: float) -> None:
        self.x, self.y = x.T.contiguous(), y.mT.contiguous()
        self.depth, self.omega = layers, omega
        self.kept: dict[tuple[str, int], Tensor] = {}

    def _buffer(self, kind: str, layer: int, m: int, width: int) -> Tensor:
        old = self.kept.get((kind, layer))
        if old is None or len(old) < m:
            old = self.kept[kind, layer] = self.x.new_empty(m, width, self.x.shape[1])
        return old[:m]

    def __call__(
        self, state: dict[str, Tensor], step: int, rows: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses ``(m,)`` and gradients; see `wspace.zoo.train.Gradient`."""
        m, last, omega = len(rows), self.depth - 1, self.omega
        given = [self.x.expand(m, *self.x.shape)]
        sums: list[Tensor] = []
        for i in range(self.depth):
            weight, bias = state[f"layers.{i}.weight"], state[f"layers.{i}.bias"][..., None]
            z = self._buffer("z", i, m, weight.shape[1])
            scale = omega if i < last else 1.0
            torch.baddbmm(bias, weight, given[-1], beta=scale, alpha=scale, out=z)
            sums.append(z)
            if i < last:
                given.append(torch.sin(z, out=self._buffer("h", i, m, weight.shape[1])))
        target = self.y if m == len(self.y) else self.y[rows]
        error = sums[-1].add_(SHIFT).sub_(target)
        points = prod(error.shape[1:])
        losses = error.square().mean((1, 2))
        error = error.mul_(2 / points)
        slopes: dict[str, Tensor] = {}
        for i in reversed(range(self.depth)):
            scale = omega if i < last else 1.0
            slopes[f"layers.{i}.weight"] = torch.bmm(error, given[i].mT).mul_(scale)
            slopes[f"layers.{i}.bias"] = error.sum(2).mul_(scale)
            if i:
                below = given[i]
                torch.bmm(state[f"layers.{i}.weight"].mT * scale, error, out=below)
                error = below.mul_(sums[i - 1].cos_())
        return losses, slopes


@lru_cache(maxsize=4)
def _shuffled(dataset: str, root: str) -> tuple[Tensor, Tensor, list[str]]:
    """All images of a data set in the order of the zoo: pixels, labels, and parts."""
    data: Images = images(dataset, root or None)
    pixels = torch.cat([data.train_x, data.test_x])
    labels = torch.cat([data.train_y, data.test_y]).long()
    pixels = pixels[..., None] if pixels.dim() == 3 else pixels
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    first = len(data.train_y)
    parts = ["test" if i >= first else "val" if i % 12 == 0 else "train" for i in order.tolist()]
    return pixels[order], labels[order], parts


@dataclass(frozen=True)
class ImageINRs(Counted):
    """A zoo of SIRENs, one for each view of an image; see the top of this file.

    Attributes:
        dataset: ``"digits"``, ``"mnist"``, ``"fashion_mnist"``, ``"cifar10"`` or
            ``"cifar10_16x16"``.
        root: Folder or file of the images; see `datasets_zoo.images.images`. No part of what the
            zoo is.
        count: Number of networks.
        views: Networks fitted to one image.
        seed: Decides initial weights.
        hidden: Widths of the hidden layers.
        omega: Frequency of the sines.
        steps: Steps of Adam at most.
        learning_rate: Its first learning rate.
        target_db: PSNR in decibels at which a network is finished.
        size: Networks in one cohort.
    """

    dataset: str = "mnist"
    root: str = field(default="", compare=False)
    count: int = 10_000
    views: int = 1
    seed: int = 0
    hidden: tuple[int, ...] = (32, 32)
    omega: float = 30.0
    steps: int = 800
    learning_rate: float = 2e-3
    target_db: float = 40.0
    size: int = 500

    grouped_by: ClassVar[str] = "image"

    def __post_init__(self) -> None:
        check_options(self, "count", "views", "steps", "size")

    def cohort(self, index: int) -> Cohort:
        """Fits the networks of one cohort.

        Args:
            index: Which.

        Returns:
            Fitted networks with columns ``label``, ``image`` (place in the shuffled data set),
            ``view``, ``split``, ``psnr`` (decibels) and ``steps``.

        Raises:
            ZooError: If there are more networks than images and views.
        """
        pixels, labels, parts = _shuffled(self.dataset, self.root)
        if self.count > self.views * len(labels):
            raise ZooError(
                message(
                    f"image_inrs: {self.dataset} has too few images",
                    expected=f"count of at most {self.views * len(labels)}",
                    got=f"{self.count} networks, {self.views} for each of {len(labels)} images",
                    help="set `count`, or more `views`",
                )
            )
        ids = index * self.size + torch.arange(self.rows(index))
        image, view = ids // self.views, ids % self.views
        generator = generator_of(self.seed, index)
        sizes = (2, *self.hidden, pixels.shape[-1])
        state = siren_init(self.size, sizes, self.omega, generator)
        state = {name: x[: len(ids)] for name, x in state.items()}
        x = grid(pixels.shape[1], pixels.shape[2])
        y = pixels[image].flatten(1, 2).float() / 255
        fitted, error, taken = self._fit(state, x, y, sizes)
        architecture = Architecture(
            "datasets_zoo.inr:siren",
            {"sizes": list(sizes), "omega": self.omega},
            (InputSpec((1, 2)),),
        )
        table = {
            "label": labels[image],
            "image": image,
            "view": view,
            "split": [parts[i] for i in image.tolist()],
            "psnr": -10 * error.log10(),
            "steps": taken,
        }
        return Cohort(architecture, fitted, table)

    def _fit(
        self, state: dict[str, Tensor], x: Tensor, y: Tensor, sizes: tuple[int, ...]
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Fitted states, mean squared errors and steps, a few networks at a time."""
        goal = 10 ** (-self.target_db / 10)
        how = Training(self.steps, self.learning_rate, schedule="cosine")
        parts: list[tuple[dict[str, Tensor], Tensor, Tensor]] = []
        for rows in torch.arange(len(y)).split(CHUNK):
            slope = SirenGradient(x, y[rows], len(sizes) - 1, self.omega)
            some = {name: p[rows] for name, p in state.items()}
            done = train_many(some, slope, how, stop=lambda step, losses, _: losses < goal)
            final, _ = slope(done.state, 0, torch.arange(len(rows)))
            parts.append((done.state, final, done.steps))
        states, errors, steps = zip(*parts, strict=True)
        return (
            {name: torch.cat([s[name] for s in states]) for name in state},
            torch.cat(errors),
            torch.cat(steps),
        )


CHUNK = 16
"""Networks side by side: their activations stay in the cache."""
