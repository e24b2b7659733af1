"""Step of the demonstration that aligns networks of the zoo, and merges them."""

import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from wspace import align

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from matplotlib.figure import Figure

    from wspace.align import Barrier
    from wspace.demo import Stage
    from wspace.space import WeightSpace
    from wspace.zoo import Zoo

POINTS = 11
PAIRS = 8
"""Networks that are brought to the best one."""
KINDS = ("permutation", "sign")


def align_zoo(stage: "Stage") -> None:
    """Brings networks of the zoo to the best of them, and says what is between them."""
    zoo: Zoo = stage.found["zoo"]
    best, *others = _alike(zoo, 3 if stage.fast else 1 + PAIRS)
    space, a = zoo[best]
    module = zoo.architectures[zoo.kind[best]].module(device="cpu")
    accuracy = _accuracy(stage)
    start = time.perf_counter()
    found: list[Barrier] = []
    for row in others:
        b = zoo[row][1]
        transform = align.match(a, b, space, kinds=KINDS, generator=stage.generator)
        found.append(align.barrier(module, a, b, accuracy, transform=transform, points=POINTS))
    merged = _merged(stage, module, [zoo[row][1] for row in (best, *others)], space)
    seconds = time.perf_counter() - start
    straight, aligned = (_middle(found, aligned=which) for which in (False, True))
    ends = torch.stack([b.straight.losses[[0, -1]].mean() for b in found]).mean()
    said = (
        f"half way to {len(found)} others, {100 * straight:.0f}% of the digits are right on "
        f"average, and {100 * aligned:.0f}% once they are aligned ({100 * ends:.0f}% at the ends)"
    )
    stage.say(said)
    stage.say(merged)
    stage.page.text(
        "Networks of one architecture that were trained from different seeds have their units in "
        "different orders, and those with tanh units of different signs. Matching finds the order "
        f"and the signs that bring a network nearest to the best one of the zoo; what it computes "
        f"stays the same. A network between two of the zoo: {said}. And {merged}."
    ).figure(_curves(found), "Digits that are right along the way from the best network to others.")
    stage.page.text(
        f"Matching and measuring took {seconds:.1f} s. These networks are small, of different "
        "training and not very alike; what matching can and cannot do is in docs/aligning.md."
    )


def _merged(
    stage: "Stage", module: nn.Module, states: "list[dict[str, Tensor]]", space: "WeightSpace"
) -> str:
    """How good the mean of all networks is, as they are and brought to each other."""
    accuracy, right = _accuracy(stage), list[float]()
    for how in (False, "many"):
        mean = align.merge(states, space, align=how, kinds=KINDS, generator=stage.generator)
        module.load_state_dict(mean)
        with torch.no_grad():
            right.append(100 * float(accuracy(module)))
    return (
        f"the mean of all {len(states)} has {right[0]:.0f}% right as they are, and {right[1]:.0f}% "
        "if all are brought to each other first"
    )


def _alike(zoo: "Zoo", count: int) -> list[int]:
    """Rows of the most accurate networks that have the architecture of the best one."""
    accuracy = torch.tensor(zoo.table["test_accuracy"])
    order: list[int] = accuracy.argsort(descending=True, stable=True).tolist()
    return [row for row in order if zoo.kind[row] == zoo.kind[order[0]]][:count]


def _accuracy(stage: "Stage") -> "Callable[[nn.Module], Tensor]":
    """Share of the test digits that a network of the zoo has right."""
    test, truth, seen = stage.found["test"], stage.found["truth"], stage.found["images"]
    images = (test - seen.mean()) / seen.std()  # the zoo's networks were trained on such

    def accuracy(module: nn.Module) -> Tensor:
        return (module(images).argmax(1) == truth).double().mean()

    return accuracy


def _middle(found: "Sequence[Barrier]", *, aligned: bool) -> float:
    paths = [b.aligned if aligned else b.straight for b in found]
    return float(torch.stack([p.losses[POINTS // 2] for p in paths if p is not None]).mean())


def _curves(found: "Sequence[Barrier]") -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 3), layout="constrained")
    ax = figure.add_subplot()
    for label, color, aligned in (("as they are", "#9aa3b4", False), ("aligned", "#2f5fb3", True)):
        paths = [p for b in found if (p := b.aligned if aligned else b.straight) is not None]
        for path in paths:
            ax.plot(path.points, path.losses, color=color, linewidth=0.6, alpha=0.5)
        mean = torch.stack([path.losses for path in paths]).mean(0)
        ax.plot(paths[0].points, mean, color=color, linewidth=2, label=label)
    ax.set(xlabel="from the best network (0) to another (1)", ylabel="test accuracy", ylim=(0, 1))
    ax.legend(frameon=False, fontsize=8)
    return figure
