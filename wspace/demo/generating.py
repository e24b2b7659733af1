"""Step of the demonstration in which one hypernetwork makes the networks of five tasks in turn."""

import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wspace.hyper import ChunkedHead, HyperNetwork, TaskEmbedding
from wspace.hyper.continual import OutputRegularizer
from wspace.report import plot_tasks

if TYPE_CHECKING:
    from wspace.demo import Stage

TASKS, EACH, BATCH, SEED = 5, 2, 32, 0
PENALTY = 10.0


def generate(stage: "Stage") -> None:
    """Learns to tell 0 from 1, then 2 from 3, and so on, with and without a penalty."""
    start, steps = time.perf_counter(), 40 if stage.fast else 300
    found = {name: _learn(stage, beta, steps) for name, beta in _ARMS.items()}
    hyper = found["with the penalty"][0]
    seconds = time.perf_counter() - start
    rows: list[tuple[object, ...]] = []
    for name, (_, matrix) in found.items():
        last, then = matrix[-1], matrix.diagonal()
        rows.append((name, *(f"{100 * float(x.mean()):.1f}%" for x in (then, last)),
                     f"{100 * float(last[0]):.1f}%"))  # fmt: skip
        stage.say(f"{name}: {rows[-1][2]} of the digits right after the last task, "
                  f"{rows[-1][3]} of the first task")  # fmt: skip
    own = sum(p.numel() for p in hyper.parameters())
    stage.page.text(
        "A hypernetwork makes the weights of a classifier from a vector for each task, in chunks. "
        "It learns five tasks one after another, each to tell two digits apart, and never sees "
        "those of earlier tasks again. What keeps it from forgetting them is a penalty on changes "
        "of the weights that it made for them; without it, it makes something else. The task of a "
        "test digit is told."
    ).table(
        ["", "each task when it was learned", "all tasks at the end", "the first task at the end"],
        rows,
    ).figure(
        plot_tasks({n: m for n, (_, m) in found.items()}, names=_NAMES, chance=0.5),
        "Test accuracy of each task (column) after each task (row), in per cent.",
    ).code(str(hyper.coverage), summary="What is generated")
    stage.page.text(
        f"{own:,} parameters make {TASKS} networks of {hyper.generated:,} weights. One seed; "
        f"both took {seconds:.1f} s. docs/hypernetworks.md has the other systems."
    )


_NAMES = [f"{EACH * k}/{EACH * k + 1}" for k in range(TASKS)]
_ARMS = {"with the penalty": PENALTY, "without": 0.0}


def _learn(stage: "Stage", beta: float, steps: int) -> tuple[HyperNetwork, Tensor]:
    """The hypernetwork after all tasks, and the accuracy of each task after each."""
    drawn = torch.Generator().manual_seed(SEED)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, EACH))
    hyper = HyperNetwork(
        net,
        TaskEmbedding(TASKS, 16, generator=drawn),
        ChunkedHead(300, hidden=(16, 16), embedding=8),
        generator=drawn,
    )
    keep = OutputRegularizer(hyper, beta)
    images, labels = stage.found["images"], stage.found["labels"]
    matrix = torch.full((TASKS, TASKS), torch.nan)
    for task in range(TASKS):
        optimizer = torch.optim.Adam(hyper.parameters(), lr=5e-3)
        rows = (labels // EACH == task).nonzero()[:, 0]
        if beta and task:
            keep.start(torch.arange(task))
        for _ in range(steps):
            batch = rows[torch.randint(len(rows), (BATCH,), generator=drawn)]
            optimizer.zero_grad()
            loss = F.cross_entropy(_logits(hyper, task, images[batch]), labels[batch] % EACH)
            (loss + keep.penalty()).backward()
            optimizer.step()
        for old in range(task + 1):
            matrix[task, old] = _right(stage, hyper, old)
    return hyper, matrix


def _logits(hyper: HyperNetwork, task: int, images: Tensor) -> Tensor:
    """Answers for a task."""
    return hyper.run(task, images)


@torch.no_grad()
def _right(stage: "Stage", hyper: HyperNetwork, task: int) -> float:
    truth = stage.found["truth"]
    rows = truth // EACH == task
    answers = _logits(hyper, task, stage.found["test"][rows]).argmax(1)
    return float((answers == truth[rows] % EACH).double().mean())
