"""Image classifiers trained with hyper-parameters of their own: zoos for predicting accuracy.

After the Small CNN Zoo: Unterthiner et al. (2020), "Predicting Neural Network Accuracy from
Weights" (arXiv 2002.11448), whose network, published variation of hyper-parameters and checkpoints
over training it follows, on small images and with fewer steps. With more than one family it is a
zoo of diverse architectures: every cohort draws a family, widths, depth and an activation.

What is drawn for every network (log-uniform unless said otherwise): learning rate, weight decay,
share of the training images (a window of one fixed shuffle), share of labels that are wrong
(0.6 u², u uniform), factor on the initial weights, number of steps. For every cohort: optimizer
(Adam or SGD with momentum), architecture. The learning rate is constant.

Checkpoints are rows of their own with the column ``network``, which no split parts unless it is
told to.

Known flaws: images of the data set's test part are shared by all networks, so accuracies of all
networks have one common sampling error. Accuracies are measured on `judged` images, which resolves
them to about ``0.5 / sqrt(judged)``: with 2,000 images and accuracies that vary by 0.075, as on
small CIFAR images, no predictor can have a Kendall's τ above about 0.91. A network that diverged is
kept as it was before it did, and marked.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from math import log
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from datasets_zoo import architectures
from datasets_zoo.images import images
from wspace.errors import ZooError, message
from wspace.zoo.architecture import Architecture, InputSpec
from wspace.zoo.recipe import Cohort, Counted, check_options, generator_of
from wspace.zoo.train import (
    Trained,
    Training,
    cross_entropy,
    evaluate_many,
    initial_states,
    train_many,
    vmapped,
)

BATCH = 64
"""Images in one step."""

RANGES = {
    "learning_rate": (1e-3, 3e-2),
    "weight_decay": (1e-5, 1e-1),
    "fraction": (0.05, 1.0),
    "init": (0.5, 2.0),
}
SGD = 10.0
"""Factor on the learning rate of SGD, whose steps are not normalised."""

Draw = Callable[[tuple[Any, ...]], Any]


def _family(name: str, channels: int, side: int, draw: Draw) -> tuple[str, dict[str, Any]]:
    """A factory in `architectures` and options drawn for it."""
    act = draw(("relu", "gelu", "tanh", "silu", "leaky_relu"))
    if name == "small_cnn":
        return "cnn", {"channels": channels, "activation": draw(("relu", "tanh"))}
    if name == "mlp":
        widths = [draw((16, 24, 32)) for _ in range(draw((1, 2, 3)))]
        return "mlp", {"inputs": channels * side**2, "hidden": widths, "activation": act}
    if name in {"cnn", "batch_norm"}:
        widths = [draw((8, 12, 16, 20)) for _ in range(draw((2, 3, 4)))]
        kernel = draw((3, 3, 5))
        options = {"channels": channels, "widths": widths, "kernel": kernel, "activation": act}
        return "cnn", options | {"norm": name == "batch_norm"}
    if name in {"residual", "depthwise"}:
        width, blocks = draw((8, 12, 16)), draw((1, 2, 3))
        return name, {"channels": channels, "width": width, "blocks": blocks, "activation": act}
    if name == "vit":
        width, blocks, heads = draw((12, 16, 20)), draw((1, 2)), draw((1, 2, 4))
        patch = 4 if side % 4 == 0 else side // 4
        options = {"channels": channels, "image": side, "patch": patch, "width": width}
        return name, options | {"blocks": blocks, "heads": heads, "activation": act}
    raise ZooError(
        message("classifiers: no such family", expected=", ".join(FAMILIES), got=repr(name))
    )


FAMILIES = ("small_cnn", "mlp", "cnn", "batch_norm", "residual", "depthwise", "vit")


@lru_cache(maxsize=4)
def _data(dataset: str, root: str, grey: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # noqa: FBT001
    """Images ``(N, C, n, n)`` with mean 0 and deviation 1, and labels, in a fixed shuffle."""
    data = images(dataset, root or None)
    out: list[Tensor] = []
    for x, y in ((data.train_x, data.train_y), (data.test_x, data.test_y)):
        pixels, labels = x[..., None] if x.dim() == 3 else x, y.long()
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        pixels = pixels[order].permute(0, 3, 1, 2).float()
        out += [pixels.mean(1, keepdim=True) if grey else pixels, labels[order]]
    center, spread = out[0].mean((0, 2, 3), keepdim=True), out[0].std()
    return (out[0] - center) / spread, out[1], (out[2] - center) / spread, out[3]


@dataclass(frozen=True)
class ImageClassifiers(Counted):
    """A zoo of trained classifiers; see the top of this file.

    Attributes:
        dataset: Any of `datasets_zoo.images`.
        root: Folder or file of the images; no part of what the zoo is.
        count: Number of networks; each gives `checkpoints` rows.
        families: Of `FAMILIES`; cohorts draw one of them.
        activation: The one of all networks; drawn for every cohort if empty.
        seed: Decides everything that is drawn.
        grey: Average the colours.
        steps: Smallest and largest number of steps.
        checkpoints: States over training, at equal distances, the last one included.
        judged: Test images, and at most 2,000 training images, on which accuracies are measured.
        size: Networks in one cohort.
    """

    dataset: str = "cifar10_16x16"
    root: str = field(default="", compare=False)
    count: int = 1024
    families: tuple[str, ...] = ("small_cnn",)
    activation: str = ""
    seed: int = 0
    grey: bool = False
    steps: tuple[int, int] = (50, 2000)
    checkpoints: int = 3
    judged: int = 10_000
    size: int = 32

    grouped_by: ClassVar[str] = "network"

    def __post_init__(self) -> None:
        check_options(self, "count", "steps", "checkpoints", "judged", "size")
        known = ("", *architectures.ACTIVATIONS)
        if self.activation not in known:
            expected = ", ".join(known[1:])
            raise ZooError(
                message("classifiers: no such activation", expected=expected, got=self.activation)
            )

    def cohort(self, index: int) -> Cohort:
        """Trains the networks of one cohort.

        Args:
            index: Which.

        Returns:
            States, one row for each checkpoint, with columns ``network``, ``checkpoint``,
            ``family``, ``activation``, ``optimizer``, ``step``, ``test_accuracy``, ``test_loss``,
            ``train_accuracy``, the hyper-parameters, and ``diverged``.

        Raises:
            ZooError: If a family is unknown.
        """
        generator = generator_of(self.seed, index)

        def draw(choices: tuple[Any, ...]) -> Any:
            return choices[int(torch.randint(len(choices), (1,), generator=generator))]

        data = self.images()
        family, factory, options = self.architecture(data[0].shape[1], data[0].shape[-1], draw)
        if self.activation:
            options["activation"] = self.activation
        optimizer = draw(("adam", "sgd"))
        count = self.rows(index)
        meta = self._hyper_parameters(optimizer, generator)
        make = getattr(architectures, factory)
        state = initial_states(lambda: make(**options), self.size, generator)
        scale = meta["init"]
        for x in state.values():
            if x.dim() > 2:  # matrices and kernels
                x.mul_(scale.reshape(-1, *[1] * (x.dim() - 1)))
        with torch.device("meta"):
            module: nn.Module = make(**options)
        done = self._train(module, state, meta, data, generator)
        rows = torch.arange(count).repeat_interleave(self.checkpoints)
        states = {name: x[:count].flatten(0, 1) for name, x in done.saved.items()}
        table = {name: x[rows] for name, x in meta.items()}
        table["step"] = self._saved_at(meta["steps"])[:count].flatten()
        table["diverged"] = done.diverged[rows]
        table |= self._judge(module.eval(), states, data)
        table |= {"network": index * self.size + rows}
        table |= {"checkpoint": torch.arange(self.checkpoints).repeat(count)}
        words = {"family": family, "activation": options["activation"], "optimizer": optimizer}
        columns: dict[str, Any] = {k: [v] * len(rows) for k, v in words.items()} | table
        spec = InputSpec((1, *data[0].shape[1:]))
        architecture = Architecture(f"datasets_zoo.architectures:{factory}", options, (spec,))
        return Cohort(architecture, states, columns)

    def images(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Images ``(N, C, n, n)`` and labels to train on, and those to test on, shuffled."""
        return _data(self.dataset, self.root, self.grey)

    def architecture(self, channels: int, side: int, draw: Draw) -> tuple[str, str, dict[str, Any]]:
        """What the networks of a cohort are.

        Args:
            channels: Of the images.
            side: Pixels along a side of them.
            draw: Takes one of several choices.

        Returns:
            Name of the family, of a factory in `architectures`, and its options.

        Raises:
            ZooError: If a family is unknown.
        """  # noqa: DOC502 (a helper raises)
        family = draw(self.families)
        return family, *_family(family, channels, side, draw)

    def examples(self, count: int) -> Tensor:
        """Training images as the networks see them, ``(count, channels, side, side)``.

        Args:
            count: How many; the same for every zoo of the data set.

        Returns:
            Images, such as first values of probes (`wspace.lit.build_metanet`).
        """
        return self.images()[0][:count].clone()

    def _hyper_parameters(self, optimizer: str, generator: torch.Generator) -> dict[str, Tensor]:
        """Hyper-parameters of a whole cohort, ``(size,)`` each."""
        ranges = RANGES | {"steps": (float(self.steps[0]), float(self.steps[-1]))}
        meta = {
            name: torch.empty(self.size).uniform_(log(low), log(high), generator=generator).exp()
            for name, (low, high) in ranges.items()
        }
        meta["steps"] = meta["steps"].round().long().clamp(min=self.checkpoints)
        meta["noise"] = 0.6 * torch.rand(self.size, generator=generator).square()
        if optimizer == "sgd":
            meta["learning_rate"] *= SGD
            meta["weight_decay"] *= 0.1  # SGD adds it to the gradient
        meta["adam"] = torch.full((self.size,), optimizer == "adam")
        return meta

    def _saved_at(self, steps: Tensor) -> Tensor:
        """Steps of the checkpoints of every network, ``(size, checkpoints)``."""
        shares = torch.arange(1, self.checkpoints + 1)
        return steps[:, None] * shares // self.checkpoints

    def _train(
        self,
        module: nn.Module,
        state: dict[str, Tensor],
        meta: dict[str, Tensor],
        data: tuple[Tensor, ...],
        generator: torch.Generator,
    ) -> Trained:
        pixels, labels = data[:2]
        total, n = len(labels), self.size
        wrong = torch.rand(n, total, generator=generator) < meta["noise"][:, None]
        drawn = torch.randint(10, (n, total), generator=generator)
        targets = torch.where(wrong, drawn, labels)
        first = (torch.rand(n, generator=generator) * total).long()
        seen = (meta["fraction"] * total).round().clamp(min=1)

        def batch(step: int, rows: Tensor) -> tuple[Tensor, Tensor]:
            del step
            place = (torch.rand(n, BATCH, generator=generator) * seen[:, None]).long()
            chosen = ((place + first[:, None]) % total)[rows]
            seen_now = pixels.index_select(0, chosen.flatten()).unflatten(0, chosen.shape)
            return seen_now, targets[rows].gather(1, chosen)

        adam = bool(meta["adam"][0])
        how = Training(
            meta["steps"],
            meta["learning_rate"],
            meta["weight_decay"],
            "adamw" if adam else "sgd",
            clip=None if adam else 5.0,
        )
        gradient = vmapped(module.train(), batch, cross_entropy)
        buffers = [name for name, _ in module.named_buffers() if name in state]
        return train_many(
            state, gradient, how, buffers=buffers, save_at=self._saved_at(meta["steps"])
        )

    def _judge(
        self, module: nn.Module, states: dict[str, Tensor], data: tuple[Tensor, ...]
    ) -> dict[str, Tensor]:
        """Accuracies and mean cross-entropy of every state."""
        out: dict[str, Tensor] = {}
        for part, (x, y) in (("train", data[:2]), ("test", data[2:])):
            count = min(self.judged, 2000) if part == "train" else self.judged
            truth = y[:count]

            def read(answers: Tensor, truth: Tensor = truth) -> Tensor:
                right = (answers.argmax(-1) == truth).float().mean(1)
                return torch.stack([right, cross_entropy(answers, truth)], 1)

            read_off = evaluate_many(
                module, states, x[:count], read, networks=8, inputs_at_once=2 * BATCH
            )
            out[f"{part}_accuracy"], out[f"{part}_loss"] = read_off.unbind(1)
        return out
