"""Do networks from different seeds lie in one basin once they are aligned? Barriers and merges.

For every pair of networks of a family of `align_models`, losses are measured along the straight
line between them: as they are, matched by weights, by weights with restarts, by weights with signs
and scales where the space has them, and matched by activations; for BatchNorm networks with and
without statistics estimated anew at every point. The barrier is how far the loss rises above the
line between its ends. Then `match_many` brings three networks into one frame, and their mean is
tested.

Results are added to a file of JSON lines as they come, what is there is not run again, `--show`
prints the tables, `--plot FOLDER` draws the pictures.
"""

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from align_models import FAMILIES, Data, Pair, judged, load
from harness import machine, table
from torch import Tensor, nn

import wspace
from wspace.align import match, match_many, objective
from wspace.align.activations.pairs import match_activations
from wspace.align.barrier import LossPath, lent, loss_path
from wspace.align.merge import merge
from wspace.batchnorm import reestimate

State = dict[str, Tensor]
GAUGES = ("sign", "scale", "phase")


@dataclass(frozen=True)
class Budget:
    """What is measured in a family.

    Attributes:
        points: On the line; of pairs after the first at most `FEWER`.
        examples: Training and test examples at each point.
        restarts: Of the matching with restarts.
        pairs: How many, disjoint ones first.
    """

    points: int
    examples: tuple[int, int]
    restarts: int
    pairs: int = 1


FEWER = 11
BUDGETS = {
    "mlp-64": Budget(25, (10_000, 10_000), 20, 6),
    "mlp-512": Budget(25, (5_000, 10_000), 10, 6),
    "resnet-16": Budget(25, (2_000, 5_000), 20, 2),
    "resnet-64": Budget(11, (2_000, 5_000), 10),
    "gpt2": Budget(25, (256, 256), 10),
    "gpt2-shared": Budget(25, (256, 256), 10),
}
REFRESH = 10
"""Batches of 256 training images that statistics are estimated with."""


class Case:
    """A family with its module, space, data and budget."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name, self.folder = name, options.folder
        family, self.budget = FAMILIES[name], BUDGETS[name]
        data: Data = family.data(options.data)
        self.module = family.make().eval()
        self.train, self.test = (
            tuple(x[:n] for x in pair)
            for pair, n in zip((data.train, data.test), self.budget.examples, strict=True)
        )
        self.inputs = list(data.train[0][-256 * REFRESH :].split(256))
        self.space = wspace.trace(self.module, (self.train[0][:2],))
        self.norms = any(isinstance(m, nn.BatchNorm2d) for m in self.module.modules())

    def state(self, seed: int) -> State:
        return load(self.folder, self.name, seed)

    def seeds(self) -> list[int]:
        count = range(FAMILIES[self.name].seeds)
        return [s for s in count if (self.folder / f"{self.name}-{s}.json").exists()]

    def pairs(self) -> list[tuple[int, int]]:
        """Pairs of seeds: (0, 1), (2, 3), and then the others."""
        every = combinations(self.seeds(), 2)
        first = sorted(every, key=lambda p: (p[0] % 2 == 1 or p[1] != p[0] + 1, p))
        return first[: self.budget.pairs]

    def metrics(self, module: nn.Module) -> dict[str, float]:
        train_loss, _ = judged(module, _pair(self.train))
        test_loss, accuracy = judged(module, _pair(self.test))
        return {"test_loss": test_loss, "train_loss": train_loss, "test_accuracy": accuracy}

    def refreshes(self) -> list[bool]:
        return [False, True] if self.norms else [False]


def _pair(examples: tuple[Tensor, ...]) -> Pair:
    return examples[0], examples[1]


# ----------------------------------------------------------------------- matching

Found = wspace.Transform | None
Method = Callable[[Case, State, State], Found]


def by_weights(case: Case, a: State, b: State) -> Found:
    return match(a, b, case.space)


def from_soft(case: Case, a: State, b: State) -> Found:
    return match(a, b, case.space, start="sinkhorn")


def with_restarts(case: Case, a: State, b: State) -> Found:
    if not case.budget.restarts:
        return None
    generator = torch.Generator().manual_seed(0)
    return match(a, b, case.space, restarts=case.budget.restarts, generator=generator)


def with_gauges(case: Case, a: State, b: State) -> Found:
    kinds = {g.kind for g in case.space.gauges}
    if not kinds:
        return None
    return match(a, b, case.space, kinds=("permutation", *(k for k in GAUGES if k in kinds)))


def by_activations(case: Case, a: State, b: State) -> Found:
    return match_activations(case.space, a, b, case.inputs, module=case.module)


METHODS: dict[str, Method] = {
    "as they are": lambda case, a, b: wspace.identity(case.space),
    "weights": by_weights,
    "weights, sinkhorn": from_soft,
    "weights, restarts": with_restarts,
    "weights, all symmetries": with_gauges,
    "activations": by_activations,
}


# ---------------------------------------------------------------------- measuring


def measure(options: argparse.Namespace) -> None:
    """Runs whatever is missing."""
    for name in options.only:
        case = Case(name, options)
        for pair in case.pairs():
            for method in options.methods:
                ensure(options, case, pair, method)
        seeds = case.seeds()[:3]
        if len(seeds) == 3 and not name.startswith("gpt2"):
            for refresh in case.refreshes():
                many(options, case, seeds, refresh)


def ensure(options: argparse.Namespace, case: Case, pair: tuple[int, int], method: str) -> None:
    """One pair, matched in one way: its losses on the line."""
    known = {key_of(r) for r in read(options.out)}
    missing = [r for r in case.refreshes() if (case.name, pair, method, r) not in known]
    if not missing:
        return
    a, b = (case.state(seed) for seed in pair)
    start = time.perf_counter()
    found = METHODS[method](case, a, b)
    seconds = time.perf_counter() - start
    if found is None:
        return
    moved = wspace.act(found, b, case.space)
    points = case.budget.points if pair == (0, 1) else min(FEWER, case.budget.points)
    for refresh in missing:
        batches = case.inputs if refresh else None
        path = loss_path(case.module, a, moved, case.metrics, points=points, refresh=batches)
        add(options.out, {
            "family": case.name, "pair": pair, "method": method, "refresh": refresh,
            "objective": float(objective(a, moved, case.space)),
            "of_itself": float(objective(a, a, case.space)),
            "seconds": round(seconds, 3), "points": path.points.tolist(),
            "metrics": {k: v.tolist() for k, v in path.metrics.items()},
        })  # fmt: skip


def many(options: argparse.Namespace, case: Case, seeds: list[int], refresh: bool) -> None:
    """The mean of three networks: as they are, matched to the first, and in one frame."""
    known = {key_of(r) for r in read(options.out)}
    if (case.name, tuple(seeds), "mean", refresh) in known:
        return
    states = [case.state(seed) for seed in seeds]
    found = match_many(states, case.space)
    framed = [wspace.act(t, x, case.space) for t, x in zip(found, states, strict=True)]
    first = [states[0]]
    first += [wspace.act(match(states[0], x, case.space), x, case.space) for x in states[1:]]
    figures: dict[str, Any] = {}
    for key, some in (("as they are", states), ("to the first", first), ("many", framed)):
        figures[key] = tested(case, merge(some), refresh)
        figures[key]["objective"] = fmean(
            float(objective(x, y, case.space)) for x, y in combinations(some, 2)
        )
    figures["ends"] = [tested(case, x, refresh) for x in states]
    row = {"family": case.name, "pair": seeds, "method": "mean", "refresh": refresh}
    add(options.out, row | {"figures": figures})


def tested(case: Case, state: State, refresh: bool) -> dict[str, float]:
    with torch.no_grad(), lent(case.module) as put:
        put(state.__getitem__, {*state})
        if refresh:
            reestimate(case.module, case.inputs, frozen=True)
        return case.metrics(case.module.eval())


def add(file: Path, row: dict[str, Any]) -> None:
    with file.open("a", encoding="utf-8") as opened:
        opened.write(json.dumps(row) + "\n")
    print(f"{row['family']} {row['pair']} {row['method']} refresh {row['refresh']}",
          file=sys.stderr, flush=True)  # fmt: skip


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["family"], tuple(row["pair"]), row["method"], row["refresh"]


def read(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


# ------------------------------------------------------------------------- tables


def path_of(row: dict[str, Any]) -> LossPath:
    metrics = {k: torch.tensor(v, dtype=torch.float64) for k, v in row["metrics"].items()}
    return LossPath(torch.tensor(row["points"], dtype=torch.float64), metrics)


def span(values: list[float], form: str) -> str:
    """Mean, and least to most where there are several."""
    mean = format(fmean(values), form)
    if len(values) == 1:
        return mean
    return f"{mean} ({format(min(values), form)} to {format(max(values), form)})"


def grouped(rows: list[dict[str, Any]]) -> Iterator[tuple[str, str, bool, list[dict[str, Any]]]]:
    """Rows of every family, method and refresh."""
    for family in BUDGETS:
        for refresh in (False, True):
            for method in METHODS:
                key = (family, method, refresh)
                some = [r for r in rows if (r["family"], r["method"], r["refresh"]) == key]
                if some:
                    yield family, method, refresh, some


def show_ends(folder: Path) -> None:
    """The networks themselves."""
    lines = []
    for name, family in FAMILIES.items():
        files = [folder / f"{name}-{s}.json" for s in range(family.seeds)]
        rows = [json.loads(f.read_text(encoding="utf-8")) for f in files if f.exists()]
        if rows:
            cells = [span([r[k] for r in rows], ".4f") for k in ("train_loss", "test_loss")]
            cells += [span([100 * r["test_accuracy"] for r in rows], ".2f")]
            minutes = f"{fmean(r['cpu_seconds'] for r in rows) / 60:.1f}"
            lines.append([name, f"{rows[0]['parameters']:,}", len(rows), *cells, minutes])
    print("\n### The networks\n")
    head = ["family", "parameters", "seeds", "training loss", "test loss", "test accuracy, %"]
    table([*head, "CPU min each"], lines)


def show(options: argparse.Namespace) -> None:
    """Prints everything as tables."""
    show_ends(options.folder)
    rows = read(options.out)
    lines = []
    for family, method, refresh, some in grouped([r for r in rows if r["method"] != "mean"]):
        paths = [path_of(r) for r in some]
        middle = [float(p.metrics["test_accuracy"][len(p.points) // 2]) for p in paths]
        lines.append(
            [family, "yes" if refresh else "", method, len(some)]
            + [span([p.heights[k] for p in paths], ".3f") for k in ("train_loss", "test_loss")]
            + [span([100 * m for m in middle], ".1f")]
            + [span([100 * p.depths["test_accuracy"] for p in paths], ".1f")]
            + [f"{fmean(r['objective'] / r['of_itself'] for r in some):.3f}"]
            + [f"{fmean(r['seconds'] for r in some):.2f}"]
        )
    print("\n### Barriers\n")
    head = ["family", "statistics anew", "matched by", "pairs", "barrier, training", "test"]
    head += ["accuracy in the middle, %", "accuracy lost, %", "⟨a, b⟩ / ⟨a, a⟩", "s"]
    table(head, lines)
    show_means([r for r in rows if r["method"] == "mean"])


def show_means(rows: list[dict[str, Any]]) -> None:
    lines = []
    for row in rows:
        ends = [x["test_accuracy"] for x in row["figures"]["ends"]]
        for key, label in (
            ("as they are", "as they are"),
            ("to the first", "matched to the first"),
            ("many", "`match_many`"),
        ):
            f = row["figures"][key]
            lines.append(
                [row["family"], "yes" if row["refresh"] else "", label]
                + [f"{f['train_loss']:.4f}", f"{f['test_loss']:.4f}"]
                + [f"{100 * f['test_accuracy']:.2f}", f"{100 * fmean(ends):.2f}"]
                + [f"{f['objective']:.1f}"]
            )
    print("\n### Mean of three networks\n")
    head = ["family", "statistics anew", "matched", "training loss", "test loss"]
    head += ["test accuracy, %", "of the three, %", "mean inner product"]
    table(head, lines)


# ----------------------------------------------------------------------- pictures

COLOURS = {
    "as they are": "C3",
    "weights": "C0",
    "weights, sinkhorn": "C1",
    "weights, restarts": "C9",
    "weights, all symmetries": "C4",
    "activations": "C2",
}


def plot(options: argparse.Namespace) -> None:
    """Draws losses and accuracies along the lines."""
    import matplotlib

    matplotlib.use("Agg")
    rows = [r for r in read(options.out) if r["method"] != "mean"]
    options.plot.mkdir(parents=True, exist_ok=True)
    draw_paths(rows, options.plot / "align_paths.svg")


def draw_paths(rows: list[dict[str, Any]], image: Path) -> None:
    from matplotlib import pyplot

    names = {"mlp-512": "MLP, width 512, MNIST", "resnet-64": "ResNet-8, width 64, CIFAR-10"}
    names |= {"gpt2": "GPT-2, two seeds", "gpt2-shared": "GPT-2, first tenth shared"}
    names = {k: v for k, v in names.items() if any(r["family"] == k for r in rows)}
    shown = ("as they are", "weights", "activations")
    shape = (2, max(1, len(names)))
    figure, axes = pyplot.subplots(*shape, figsize=(3.3 * len(names), 5.2), squeeze=False)
    for column, (name, title) in enumerate(names.items()):
        upper, lower = axes[0][column], axes[1][column]
        for row in rows:
            if row["family"] != name or row["method"] not in shown or row["pair"] != [0, 1]:
                continue
            style = {"color": COLOURS[row["method"]], "ls": "-", "lw": 1.4}
            if name.startswith("resnet"):
                style["ls"] = "-" if row["refresh"] else ":"
            upper.plot(row["points"], row["metrics"]["test_loss"], label=row["method"], **style)
            accuracy = [100 * x for x in row["metrics"]["test_accuracy"]]
            lower.plot(row["points"], accuracy, **style)
        upper.set(title=title, xlim=(0, 1))
        lower.set(xlabel="from A to B", xlim=(0, 1))
        for panel in (upper, lower):
            panel.grid(lw=0.3)
        if name == "gpt2-shared" and "gpt2" in names:  # to be compared by eye
            upper.sharey(axes[0][column - 1])
            lower.sharey(axes[1][column - 1])
    axes[0][0].set_ylabel("test loss, nats")
    axes[1][0].set_ylabel("test accuracy, %")
    handles, labels = axes[0][0].get_legend_handles_labels()
    handles += axes[0][0].plot([], [], color="0.3", ls=":")
    labels.append("BatchNorm's statistics averaged, not estimated anew")
    figure.legend(handles, labels, loc="lower center", ncol=4, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(image)


def parsed() -> argparse.Namespace:
    shared = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="networks, as `align_models` keeps them")
    parser.add_argument("--only", nargs="*", choices=BUDGETS, default=list(BUDGETS))
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--data", default=os.environ.get("WSPACE_DATA", str(shared)))
    parser.add_argument("--out", type=Path, default=Path("align_quality.jsonl"))
    parser.add_argument("--show", action="store_true", help="print the tables only")
    parser.add_argument("--plot", type=Path, help="draw the pictures into this folder")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    options = parsed()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    print(f"# {(__doc__ or '').splitlines()[0]}\n\n{machine()}", flush=True)
    if not options.show and not options.plot:
        measure(options)
    show(options)
    if options.plot:
        plot(options)


if __name__ == "__main__":
    main()
