"""Image classifiers of which the effect of taking away each unit was measured.

What importance is learned from and judged on (`wspace.prune.Predicted`). Networks are those of
`datasets_zoo.classifiers`, with its hyper-parameters, on several data sets and of more
architectures; every cohort draws both. The column ``effects`` holds, as JSON text, for each group
of the weight space the rise of the mean cross-entropy on `measured` training images (with their
true labels, whatever the network was trained on) when a unit's parameters are zero, in the shape
``(*sizes of over, size)``. `effects_of` reads it.

The column ``split`` parts networks by architecture. ``test`` is what no predictor that was trained
on the rest has seen: residual networks (both forms), and networks wider or deeper than all others
of their family. A cohort, and so one exact architecture, is never in two parts but by chance: two
cohorts may draw the same.

======================  ==========================================================================
part                    families
======================  ==========================================================================
``train``, ``val``      mlp, cnn, batch_norm, plain, depthwise, vit
``test``                residual, resnet; large_mlp, large_cnn, large_plain, large_vit
======================  ==========================================================================

Known flaws: effects are of single units, on one sample of images (their error is that of a mean of
`measured` differences); networks have at most 80,000 parameters.
"""

import json
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from datasets_zoo.classifiers import ImageClassifiers
from wspace.errors import ZooError, message
from wspace.prune.learned.effects import removal_effects
from wspace.zoo.recipe import Cohort, Counted, check_options, generator_of

SEEN = ("mlp", "cnn", "batch_norm", "plain", "depthwise", "vit")
UNSEEN = ("residual", "resnet", "large_mlp", "large_cnn", "large_plain", "large_vit")
SIGNIFICANT = 7
"""Digits of effects that are kept: those of float32."""


@dataclass(frozen=True)
class UnitEffects(Counted):
    """A zoo of classifiers with the effect of every unit; see the top of this file.

    Attributes:
        datasets: Of `datasets_zoo.images`; cohorts draw one of them.
        root: Folder or file of the images; no part of what the zoo is.
        count: Number of networks.
        seed: Decides everything that is drawn.
        steps: Smallest and largest number of steps of training.
        judged: Test images on which accuracies are measured.
        measured: Training images on which effects are.
        unseen: Of so many cohorts one is of `UNSEEN` families.
        size: Networks in one cohort.
    """

    datasets: tuple[str, ...] = ("cifar10_16x16", "mnist", "digits")
    root: str = field(default="", compare=False)
    count: int = 728
    seed: int = 0
    steps: tuple[int, int] = (100, 2000)
    judged: int = 2000
    measured: int = 1024
    unseen: int = 4
    size: int = 4

    def __post_init__(self) -> None:
        check_options(self, "count", "steps", "judged", "measured", "unseen", "size")

    def images(self, dataset: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Images as the networks see them, and labels.

        Args:
            dataset: One of `datasets`.

        Returns:
            Training images ``(N, channels, side, side)``, of which the first `measured` gave the
            effects, their labels, test images, and theirs.
        """
        return _Varied(dataset, self.root).images()

    def cohort(self, index: int) -> Cohort:
        """Trains the networks of one cohort and takes away every unit of each.

        Args:
            index: Which.

        Returns:
            States with the columns of `ImageClassifiers`, ``dataset``, ``split`` and ``effects``.
        """
        generator = generator_of(self.seed + 1, index)
        place = int(torch.randint(len(self.datasets), (1,), generator=generator))
        unseen = index % self.unseen == self.unseen - 1
        recipe = _Varied(
            self.datasets[place],
            self.root,
            count=self.count,
            families=UNSEEN if unseen else SEEN,
            seed=self.seed,
            steps=self.steps,
            checkpoints=1,
            judged=self.judged,
            size=self.size,
        )
        made = recipe.cohort(index)
        x, y = (part[: self.measured] for part in recipe.images()[:2])
        module = made.architecture.module(device="cpu")
        space = made.architecture.space()
        texts: list[str] = []
        for row in range(self.rows(index)):
            module.load_state_dict({k: v[row] for k, v in made.state.items()}, strict=False)
            found = removal_effects(
                module, space, [(x, y)], lambda m, batch: F.cross_entropy(m(batch[0]), batch[1])
            )
            texts.append(_text(found))
        part = "test" if unseen else "val" if index % (4 * self.unseen) == 0 else "train"
        n = len(texts)
        more = {"dataset": [recipe.dataset] * n, "split": [part] * n, "effects": texts}
        return Cohort(made.architecture, made.state, dict(made.table) | more)


def effects_of(text: str) -> dict[str, Tensor]:
    """The effects of a network from its column.

    Args:
        text: What the column ``effects`` holds.

    Returns:
        Group name → rise of the loss for every unit, ``(*sizes of over, size)``, float64.

    Raises:
        ZooError: If it is something else.
    """
    try:
        return {k: torch.tensor(v, dtype=torch.float64) for k, v in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ZooError(
            message("effects_of: no table of effects", got=f"{type(error).__name__}: {error}")
        ) from error


def _text(effects: dict[str, Tensor]) -> str:
    def short(x: Any) -> Any:
        return [short(v) for v in x] if isinstance(x, list) else float(f"{x:.{SIGNIFICANT}g}")

    return json.dumps({name: short(x.tolist()) for name, x in effects.items()})


@lru_cache(maxsize=4)
def _halved(recipe: ImageClassifiers) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images of at most 16 pixels along a side: means of 2 × 2."""
    x, y, test_x, test_y = recipe.images()
    if x.shape[-1] <= 16:
        return x, y, test_x, test_y
    return F.avg_pool2d(x, 2), y, F.avg_pool2d(test_x, 2), test_y


@dataclass(frozen=True)
class _Varied(ImageClassifiers):
    """Classifiers of the families at the top of this file."""

    grouped_by: ClassVar[str] = ""

    def images(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Images and labels, halved if they are large."""
        own = {f.name: getattr(self, f.name) for f in fields(ImageClassifiers)}
        kept: dict[str, Any] = {k: own[k] for k in ("dataset", "root", "grey")}
        return _halved(ImageClassifiers(**kept))

    def architecture(self, channels: int, side: int, draw: Any) -> tuple[str, str, dict[str, Any]]:
        """A family, a factory and its options."""
        family = draw(self.families)
        act = draw(("relu", "relu", "relu", "gelu", "tanh", "silu", "leaky_relu"))
        options: dict[str, Any] = {"channels": channels, "activation": act}
        if family in {"mlp", "large_mlp"}:
            del options["channels"]
            options |= {"inputs": channels * side**2, "hidden": _hidden(family, draw)}
            return family, "mlp", options
        if family in {"cnn", "batch_norm", "large_cnn"}:
            large = family == "large_cnn"
            norm = draw((False, True)) if large else family == "batch_norm"
            depth = draw((5, 3)) if large else draw((2, 3, 4))
            choices = (24, 32, 40) if large and depth == 3 else (4, 6, 8, 12, 16, 20)
            options |= {"widths": [draw(choices) for _ in range(depth)], "kernel": draw((3, 3, 5))}
            return family, "cnn", options | {"norm": norm}
        if family in {"plain", "large_plain"}:
            return family, "plain", options | _plain(family, draw)
        if family in {"residual", "depthwise"}:
            options |= {"width": draw((8, 12, 16, 24)), "blocks": draw((1, 2, 3))}
            return family, family, options
        if family == "resnet":
            wide, stages = draw((8, 12, 16)), draw((2, 3))
            blocks = draw((1, 2)) if stages == 2 else 1
            options |= {"widths": [wide * 2**i for i in range(stages)], "blocks": blocks}
            return family, "resnet", options | {"stem": 2 if side > 8 else 1}
        large = family == "large_vit"
        width, heads = draw((32, 40)) if large else draw((12, 16, 20, 24)), draw((1, 2, 4))
        options |= {"image": side, "patch": 4 if side % 4 == 0 else side // 4, "heads": heads}
        return family, "vit", options | {"width": width, "blocks": draw((1, 2)) + large}


def _hidden(family: str, draw: Any) -> list[int]:
    if family == "mlp":
        return [draw((8, 12, 16, 24, 32)) for _ in range(draw((1, 2, 3)))]
    if draw((False, True)):
        return [draw((48, 64)) for _ in range(draw((1, 2)))]
    return [draw((12, 16, 24, 32)) for _ in range(draw((4, 5)))]


def _plain(family: str, draw: Any) -> dict[str, Any]:
    wide, norm = draw((4, 6, 8, 12)), draw((False, True, True))
    if family == "large_plain":
        wide = draw((16, 20))
    shapes = (((1, 2), (2, 2)), ((1, 1, 2), (2, 1, 2)), ((1, 1, 2, 2), (2, 1, 2, 1)))
    if family == "large_plain" and wide == 16:
        shapes = (((1, 1, 2, 2, 2), (2, 1, 2, 1, 1)),)
    times, strides = draw(shapes)
    return {"widths": [wide * t for t in times], "strides": list(strides), "norm": norm}
