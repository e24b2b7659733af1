"""Small classifiers of handwritten digits, trained many at once: a zoo for accuracy prediction.

Data: scikit-learn's bundled digits (1797 images of 8 × 8 pixels, from the UCI "Optical Recognition
of Handwritten Digits" test set, CC BY 4.0), which need no download. One fixed shuffle puts 1297
images aside for training and 500 for testing; every network is judged on the same 500.

Networks: a perceptron ``64-32-32-10`` (3466 parameters) or a convolutional network ``1-8-16``,
3 × 3 kernels, global average pooling and a linear layer (1418 parameters), both with ReLU. Each is
trained by AdamW with its own learning rate, weight decay, share of the training images, share of
wrong labels, number of steps and scale of the initial weights, so that accuracies spread from
chance to nearly perfect, as in Unterthiner et al. (2020), "Predicting Neural Network Accuracy from
Weights" (arXiv 2002.11448), whose zoos this one imitates at a thousandth of the cost.

Known flaws: 500 test images resolve accuracy to about 0.02 (one standard error in mid-range);
images of one writer may be on both sides of the split.
"""

from collections.abc import Callable
from math import log, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from wspace.errors import MissingExtra, ZooError, message

TRAIN, BATCH, CHUNK = 1297, 32, 64
"""Training images, images in a step of one network, and networks trained side by side."""

_SHARED = {"weight_decay": (1e-4, 1.0), "fraction": (0.02, 1.0), "init": (0.5, 2.0)}

RANGES = {
    "mlp": {"learning_rate": (1e-3, 3e-2), "steps": (6.0, 600.0), **_SHARED},
    "cnn": {"learning_rate": (3e-3, 3e-2), "steps": (40.0, 1200.0), **_SHARED},
}
"""Hyper-parameters, drawn from log-uniform distributions; label noise is 0.6 u², u uniform."""


class Classifiers(NamedTuple):
    """A zoo of one architecture in memory.

    Attributes:
        module: The architecture, on the meta device: shapes and a forward, no weights.
        state: Stacked float32 states, ``(count, *shape)`` by parameter name.
        meta: Arrays of length `count`: ``test_accuracy``, ``test_loss``, ``learning_rate``,
            ``weight_decay``, ``fraction`` (of the training images), ``noise`` (share of labels
            drawn at random), ``init`` (factor on the initial weights), ``steps``.
    """

    module: nn.Module
    state: dict[str, Tensor]
    meta: dict[str, Tensor]


def digit_images() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The digits and their fixed split.

    Returns:
        Training images ``(1297, 1, 8, 8)`` in [0, 1] and labels, test images ``(500, 1, 8, 8)`` and
        labels.

    Raises:
        MissingExtra: If scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise MissingExtra(
            message("digits: needs scikit-learn", help="pip install 'wspace[demo]'")
        ) from error
    data: Any = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    return images[:TRAIN], labels[:TRAIN], images[TRAIN:], labels[TRAIN:]


def mlp() -> nn.Module:
    """The perceptron, on the meta device."""
    with torch.device("meta"):
        sizes = [nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)]
        return nn.Sequential(nn.Flatten(), *sizes)


def cnn() -> nn.Module:
    """The convolutional network, on the meta device."""
    with torch.device("meta"):
        first, second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
        return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), *pool)


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "cnn": cnn}


def digit_classifiers(count: int, seed: int = 0, *, architecture: str = "mlp") -> Classifiers:
    """Trains classifiers of digits with hyper-parameters of their own, many at once.

    Args:
        count: Number of networks.
        seed: Decides hyper-parameters, initial weights and order of the images. The result is the
            same in every run on one machine; another `count` gives other networks.
        architecture: ``"mlp"`` or ``"cnn"``.

    Returns:
        Architecture, trained states and what is known about each network.

    Raises:
        ZooError: If the architecture is unknown, or training produced a number that is not finite.
    """
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ZooError(
            message("digits: no such architecture", expected=known, got=repr(architecture))
        )
    generator = torch.Generator().manual_seed(seed)
    module = ARCHITECTURES[architecture]()
    meta = _hyper_parameters(count, RANGES[architecture], generator)
    start = _initial(module, meta["init"], generator)
    order = meta["steps"].argsort(descending=True, stable=True)
    data = digit_images()
    trained = {name: torch.empty_like(p) for name, p in start.items()}
    for rows in order.split(CHUNK):
        state = {name: p[rows] for name, p in start.items()}
        _train(module, state, {k: x[rows] for k, x in meta.items()}, data[:2], generator)
        for name, p in state.items():
            trained[name][rows] = p
        if not all(bool(p.isfinite().all()) for p in state.values()):
            raise ZooError("digits: a network diverged")
    return Classifiers(module, trained, meta | _judge(module, trained, data[2:]))


def _hyper_parameters(
    count: int, ranges: dict[str, tuple[float, float]], generator: torch.Generator
) -> dict[str, Tensor]:
    """Hyper-parameters of every network, ``(count,)`` each."""
    meta = {
        name: torch.empty(count).uniform_(log(low), log(high), generator=generator).exp()
        for name, (low, high) in ranges.items()
    }
    meta["steps"] = meta["steps"].round().long()
    meta["noise"] = 0.6 * torch.rand(count, generator=generator).square()
    return meta


def _initial(module: nn.Module, scale: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """PyTorch's initial weights and biases, uniform within 1/sqrt(fan-in), times a factor each."""
    state: dict[str, Tensor] = {}
    for path, layer in module.named_modules():
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            continue
        bound = prod(layer.weight.shape[1:]) ** -0.5
        for name, p in layer.named_parameters():
            x = torch.empty(len(scale), *p.shape).uniform_(-bound, bound, generator=generator)
            state[f"{path}.{name}"] = x * scale.reshape(-1, *[1] * p.dim())
    return state


def _train(
    module: nn.Module,
    state: dict[str, Tensor],
    meta: dict[str, Tensor],
    data: tuple[Tensor, ...],
    generator: torch.Generator,
) -> None:
    """AdamW on every network of a stack, in place; they come in order of falling `steps`."""
    images, labels = data
    n, total = len(meta["steps"]), len(labels)
    own = torch.rand(n, total, generator=generator).argsort(1)  # each network's order of images
    wrong = torch.rand(n, total, generator=generator) < meta["noise"][:, None]
    drawn = torch.randint(10, (n, total), generator=generator)
    targets = torch.where(wrong, drawn, labels)
    seen = (meta["fraction"] * total).round().clamp(min=1)
    forward = vmap(lambda p, x: functional_call(module, p, (x,)))
    first = {name: torch.zeros_like(p) for name, p in state.items()}
    second = {name: torch.zeros_like(p) for name, p in state.items()}
    for step in range(int(meta["steps"].max())):
        alive = int((meta["steps"] > step).sum())
        place = (torch.rand(n, BATCH, generator=generator) * seen[:, None]).long()
        chosen = own.gather(1, place)[:alive]
        leaves = {name: p[:alive].detach().requires_grad_() for name, p in state.items()}
        out = forward(leaves, images[chosen])
        loss = nn.functional.cross_entropy(
            out.flatten(0, 1), targets[:alive].gather(1, chosen).flatten(), reduction="sum"
        )
        grads = torch.autograd.grad(loss / BATCH, list(leaves.values()))
        for (name, p), g in zip(state.items(), grads, strict=True):
            rates = [meta[k][:alive].reshape(-1, *[1] * (g.dim() - 1)) for k in _RATES]
            a = first[name][:alive].lerp_(g, 0.1)
            b = second[name][:alive].lerp_(g * g, 0.001)
            move = (a / (1 - 0.9 ** (step + 1))) / ((b / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
            p[:alive] -= rates[0] * (move + rates[1] * p[:alive])


_RATES = ("learning_rate", "weight_decay")


def _judge(
    module: nn.Module, state: dict[str, Tensor], data: tuple[Tensor, ...]
) -> dict[str, Tensor]:
    """Accuracy and mean cross-entropy of every network on the test images."""
    images, labels = data
    forward = vmap(lambda p: functional_call(module, p, (images,)))
    accuracy: list[Tensor] = []
    loss: list[Tensor] = []
    with torch.no_grad():
        for start in range(0, len(next(iter(state.values()))), CHUNK):
            out = forward({name: p[start : start + CHUNK] for name, p in state.items()})
            accuracy.append((out.argmax(-1) == labels).float().mean(1))
            right = out.log_softmax(-1).gather(2, labels.expand(len(out), -1)[..., None])
            loss.append(-right.mean((1, 2)))
    return {"test_accuracy": torch.cat(accuracy), "test_loss": torch.cat(loss)}
