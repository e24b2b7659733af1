"""Step of the demonstration that prunes the network on digits, and trains what is left."""

import copy
import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wspace import trace
from wspace.prune import (
    ActivationNorm,
    Importance,
    Magnitude,
    Point,
    Pruner,
    Random,
    Selection,
    Taylor,
)
from wspace.prune.learned.predicted import Predicted
from wspace.report import plot_pruning

if TYPE_CHECKING:
    from wspace.demo import Stage

AMOUNTS = (0.25, 0.5, 0.75)
"""Shares of the multiply-accumulates that go."""
EPOCHS, BATCH, SEED = 1, 64, 0
LOSSES = ("Taylor", "predicted")
"""Importances whose scores are losses, which compare between groups as they are."""
Curves = dict[str, list[Point]]


def prune_network(stage: "Stage") -> None:
    """Prunes the network of the first step by several importances, and fine-tunes what is left."""
    model: nn.Module = stage.found["model"]
    test, start = stage.found["test"], time.perf_counter()
    pruner = Pruner(model, trace(model, test[:1]))
    before = _right(stage, model)
    raw, tuned = (
        {name: [_point(pruner, {}, before)] for name in _importances(stage)} for _ in range(2)
    )
    for name, importance in _importances(stage).items():
        scores = importance(model, pruner.space)
        for amount in AMOUNTS[1:2] if stage.fast else AMOUNTS:
            how = "none" if name in LOSSES else "mean"
            selection = Selection(amount=amount, of="flops", at_most=0.9, normalize=how)
            few = pruner.restrict(scores, selection)
            small = pruner.prune(few)
            raw[name].append(_point(pruner, few.counts(), _right(stage, small)))
            _train(stage, small)
            tuned[name].append(_point(pruner, few.counts(), _right(stage, small)))
    _tell(stage, raw, tuned, time.perf_counter() - start)


def _tell(stage: "Stage", raw: Curves, tuned: Curves, seconds: float) -> None:
    rows = [_row(name, raw[name], tuned[name]) for name in raw]
    for name, left, _, accuracy, after in rows:
        stage.say(f"{name}: {left} of the work, {accuracy} right, {after} once trained on")
    first = next(iter(raw.values()))[0]
    stage.page.text(
        "The space says in which tensors every channel stands, so it says as well what there is to "
        "cut when a channel goes: the row of one convolution, the entries of BatchNorm and its "
        f"statistics, the columns of the next layer. Here the network ({_percent(first.metric)} of "
        "the test digits right) loses a quarter, half and three quarters of its multiply-"
        "accumulates; several importances say which channels. Nothing in this network counts its "
        "channels, so the small module computes what the large one does with zeros in their "
        "place."
    ).table(
        ["importance", "work left", "parameters left", "right", "after training on"], rows
    ).figure(
        plot_pruning(raw, against=["parameters", "MACs"], title="As they are cut"),
        "Test accuracy of the pruned networks, before any training.",
    ).figure(
        plot_pruning(tuned, against=["parameters", "MACs"], title="After training on"),
        f"The same networks after {EPOCHS} epoch of training.",
    )
    stage.page.text(
        "One network and one seed: differences of a per cent mean nothing, and training on makes "
        f"up for most of what importances differ by. All of it took {seconds:.1f} s; "
        "docs/pruning.md says what each importance is."
    )


def _importances(stage: "Stage") -> dict[str, Importance]:
    images, labels = stage.found["images"], stage.found["labels"]
    batches = [(images[i : i + 128], labels[i : i + 128]) for i in (0, 128, 256)]
    return {
        "magnitude": Magnitude(),
        "activations": ActivationNorm([x for x, _ in batches]),
        "Taylor": Taylor(batches, _loss),
        "predicted": Predicted(),
        "random": Random(torch.Generator().manual_seed(SEED)),
    }


def _loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def _point(pruner: Pruner, counts: dict[str, int], metric: float) -> Point:
    return Point(
        step=0,
        kept=counts,
        parameters=pruner.cost.parameters(counts),
        macs=pruner.cost.macs(counts),
        metric=metric,
    )


def _half(curve: list[Point]) -> Point:
    """The point with half of the work."""
    return curve[AMOUNTS.index(0.5) + 1] if len(curve) > 2 else curve[-1]


def _row(name: str, raw: list[Point], tuned: list[Point]) -> tuple[str, ...]:
    """The networks with half of the work."""
    whole, point = raw[0], _half(raw)
    left = point.macs / whole.macs, point.parameters / whole.parameters
    return (
        name,
        *(f"{100 * share:.0f}%" for share in left),
        _percent(point.metric),
        _percent(_half(tuned).metric),
    )


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}%"


@torch.no_grad()
def _right(stage: "Stage", module: nn.Module) -> float:
    module = copy.deepcopy(module).eval()
    return float((module(stage.found["test"]).argmax(1) == stage.found["truth"]).double().mean())


def _train(stage: "Stage", module: nn.Module) -> None:
    images, labels = stage.found["images"], stage.found["labels"]
    module.train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3, weight_decay=1e-2)
    order = torch.Generator().manual_seed(SEED)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(labels), generator=order).split(BATCH):
            optimizer.zero_grad()
            _loss(module, (images[batch], labels[batch])).backward()
            optimizer.step()
    module.eval()
