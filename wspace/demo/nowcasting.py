"""Step of the demonstration that nowcasts a training run: the same run, with jumps and without.

With a drift, which makes many small jumps, the run is measured at its running averages; and so is,
for comparison, a run of Adam that keeps such averages and never jumps.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wspace.nowcast import SHIPPED, Decay, Drift, Guard, Jump, LinearFit, Nowcaster, Predictor, load

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from wspace.demo import Stage

TRAINED = "nino-mlp-small"
"""The predictor that is used if it comes with the package; else a straight line."""
STEPS, JUMPS, BATCH, HELD = 1000, 10, 64, 237
RATES = (1e-3, 3e-3)
"""Adam's default, and one that is better for this task."""
SEED = 0
HOW = ("Adam", "Adam, averaged", "with jumps", "with drift")
COLORS = ("#9aa3b4", "#e0a030", "#2f5fb3", "#1a7f45")
MARKS = ((True, "v", "#1a7f45", "jump"), (False, "x", "#b3261e", "rejected"))


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        steps: When it was evaluated.
        losses: Loss on the test digits then.
        jumps: What the nowcaster did.
        seconds: How long training took, evaluations aside.
    """

    steps: tuple[int, ...]
    losses: tuple[float, ...]
    jumps: tuple[Jump, ...]
    seconds: float

    def reaches(self, loss: float) -> int | None:
        """The first step at which the loss is as low; None if it never is."""
        return next((s for s, x in zip(self.steps, self.losses, strict=True) if x <= loss), None)


def nowcast(stage: "Stage") -> None:
    """Trains a network in four ways, at two learning rates, and says what jumps bring."""
    steps = 100 if stage.fast else STEPS
    predictor = load(TRAINED) if TRAINED in SHIPPED else LinearFit()
    what = predictor.origin or "a straight line through the last five values of every parameter"
    drift = Drift(begin=steps // 10)
    stage.page.text(
        "A perceptron learns the digits by Adam, and again from the same initial weights on the "
        "same batches with a drift: two running averages say how fast the parameters move without "
        f"the noise of single steps, and every 10 steps they go up to {10 * drift.speed:g} steps "
        "ahead. It is measured at the shorter average; the second line of the figure is Adam "
        "measured at the same average, so what lies between is what the jumps bring."
    )
    stage.page.text(
        f"Last with jumps by a predictor: every {steps // JUMPS} steps, {what} says where the "
        "parameters are heading, and puts them there. The loss on digits that are held back for "
        "this judges each jump; of the distances tried the best is kept, and none if all make the "
        "loss rise."
    )
    if predictor.origin:
        stage.page.text(
            f"{predictor.origin} comes with the package. It was trained on runs of other seeds and "
            "sizes, among them perceptrons on these digits: this is no test on something new."
        )
    runs: dict[float, tuple[Run, ...]] = {}
    rows: list[tuple[object, ...]] = []
    for rate in RATES:
        ways = (None, replace(drift, speed=0.0), predictor, drift)
        runs[rate] = tuple(_trained(stage, steps, rate, how) for how in ways)
        plain, *others = runs[rate]
        found = f"Learning rate {rate:g}: {verdict(plain, runs[rate][-1], 'a drift')}"
        stage.say(found)
        stage.page.text(found)
        stage.page.text(verdict(plain, runs[rate][2], "jumps"))
        best = min(plain.losses)
        for how, run in zip(HOW, (plain, *others), strict=True):
            kept = sum(jump.horizon > 0 for jump in run.jumps)
            jumps = f"{kept} of {len(run.jumps)}" if kept else ""
            reached = str(run.reaches(best) or "never")
            cells = f"{min(run.losses):.4f}", reached, jumps, f"{run.seconds:.1f} s"
            rows.append((f"{rate:g}", how, *cells))
    columns = ["learning rate", "", "best test loss", "Adam's best after", "jumps kept", "time"]
    stage.page.table(columns, rows).figure(
        _curves(runs), "Loss on the test digits; marks are jumps of the predictor."
    )
    stage.page.text(
        "These are single runs of one seed, and the better the learning rate, the less is left to "
        "gain; docs/nowcasting.md has comparisons over seeds and tasks."
    )


def verdict(plain: Run, jumping: Run, what: str = "jumps") -> str:
    """What the jumps brought, in steps to the plain run's best loss."""
    best = min(plain.losses)
    before, after = plain.reaches(best), jumping.reaches(best)
    assert before is not None
    head = f"Adam's best test loss, {best:.4f} after {before} steps, "
    if after is None:
        return f"{head}is not reached with {what} ({min(jumping.losses):.4f}): no gain here."
    if after >= before:
        return f"{head}is reached with {what} after {after}: no gain here."
    return f"{head}is reached with {what} after {after}: {1 - after / before:.0%} fewer."


def _trained(stage: "Stage", steps: int, rate: float, predictor: Predictor | Drift | None) -> Run:
    images, labels = (stage.found[name] for name in ("images", "labels"))
    held, images = (images[:HELD], labels[:HELD]), (images[HELD:], labels[HELD:])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = _perceptron()
    optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    if isinstance(predictor, Drift):
        optimizer = Nowcaster(optimizer, model, predictor=predictor)
    elif predictor is not None:
        optimizer = Nowcaster(
            optimizer,
            model,
            predictor=predictor,
            period=steps // JUMPS,
            horizon=Decay(),
            total_steps=steps,
            guard=Guard(lambda: _loss(model, held), choose="best", attempts=6),
        )
    batches = torch.Generator().manual_seed(SEED)
    test = stage.found["test"], stage.found["truth"]
    at, losses, seconds = list[int](), list[float](), 0.0
    for step in range(1, steps + 1):
        start = time.perf_counter()
        rows = torch.randint(len(images[1]), (BATCH,), generator=batches)
        optimizer.zero_grad()
        _loss(model, (images[0][rows], images[1][rows])).backward()
        optimizer.step()
        seconds += time.perf_counter() - start
        if step % (steps // 100) == 0:
            at.append(step)
            measured = nullcontext()
            if isinstance(optimizer, Nowcaster) and isinstance(predictor, Drift):
                measured = optimizer.averaged()
            with torch.no_grad(), measured:
                losses.append(float(_loss(model, test)))
    jumps = tuple(optimizer.jumps) if isinstance(optimizer, Nowcaster) else ()
    return Run(tuple(at), tuple(losses), jumps, seconds)


def _perceptron() -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def _curves(runs: Mapping[float, Sequence[Run]]) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots(1, len(runs), sharey=True, squeeze=False)[0]
    for ax, (rate, some) in zip(axes, runs.items(), strict=True):
        ax.axhline(min(some[0].losses), color=COLORS[0], linewidth=0.8, linestyle=":")
        for run, color, how in zip(some, COLORS, HOW, strict=True):
            ax.plot(run.steps, run.losses, color=color, linewidth=1.4, label=how)
        jumping = some[2]
        height = dict(zip(jumping.steps, jumping.losses, strict=True))
        for kept, marker, color, label in MARKS:
            steps = [j.step for j in jumping.jumps if (j.horizon > 0) == kept]
            heights = [height[s] for s in steps]
            ax.scatter(steps, heights, s=34, marker=marker, color=color, label=label, zorder=3)
        ax.set(xlabel="steps of Adam", yscale="log")
        ax.set_title(f"learning rate {rate:g}", fontsize=9)
    axes[0].set_ylabel("test loss")
    axes[-1].legend(frameon=False, fontsize=8)
    return figure
