"""How many steps does nowcasting save? Against Adam with a tuned learning rate, on held-out tasks.

For every task Adam's constant learning rate is tuned by the final validation loss with a seed that
is not tested; the peak of Adam with a cosine schedule is that rate or twice it, and likewise the
rate of nowcasters with a rate of their own. Others use Adam's rate. Nowcasters with a predictor
have one period, one decay of horizons, and a guard on held training examples. For one seed, all
methods see the same initial weights and batches.

`drift` has its defaults and no guard. It, "Adam, averaged" and "SNOO, averaged" are measured at the
short running average that `Drift` keeps, whatever moves the parameters; "not averaged" is the same
run of `drift` at the parameters themselves.

Validation loss is measured every `EVERY` steps on fixed examples. A run's final loss is the mean of
its last `LAST` measurements. It has reached a target at the first step at which the mean of its
last `RUN` measurements is no larger; "at first sight" is by single measurements, of which one may
be right after a jump. The target is Adam's final loss with the same seed; "saved" is a method's
steps to it against the steps that Adam itself takes by the same rule. A run that does not reach it
is counted with all of its steps. Intervals are bootstrapped over seeds. Seconds are processor time,
measuring left out; jumps, their guard and BatchNorm's refresh are in.

Results are added to a file of JSON lines as they come, what is there is not run again, `--show`
prints the tables, `--plot FILE` draws the curves.
"""

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from math import cos, pi
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from harness import machine, table
from nowcast_controls import Snoo
from nowcast_tasks import HELD_OUT, TASKS, TUNING, Data, Task, loss_of
from torch import nn

import wspace
from wspace import nowcast
from wspace.batchnorm import reestimate
from wspace.nowcast import Average, Decay, Drift, Guard, LinearFit, Nowcaster
from wspace.nowcast.predictor import Predictor

ADAM, COSINE, TUNING_SEED = "Adam", "Adam, cosine", 1000
EVERY, LAST, RUN = 25, 5, 3
PREDICTORS: dict[str, Callable[[argparse.Namespace], Predictor]] = {
    "LAWA": lambda options: Average(),
    "linear fit": lambda options: LinearFit(),
    "NiNo MLP, published": lambda options: nowcast.load_published(options.published),
    "MLP": lambda options: nowcast.load(options.mlp),
    "graph": lambda options: nowcast.load(options.graph),
    "MLP, own rate": lambda options: nowcast.load(options.mlp),
    "graph, own rate": lambda options: nowcast.load(options.graph),
}
AVERAGED: dict[str, Callable[[Any, nn.Module], Any]] = {
    "Adam, averaged": lambda adam, module: Nowcaster(adam, module, predictor=Drift(speed=0.0)),
    "SNOO, averaged": Snoo,
    "drift": lambda adam, module: Nowcaster(adam, module, predictor=Drift(), on_error="raise"),
    "drift, own rate": lambda adam, module: Nowcaster(adam, module, predictor=Drift()),
    "drift, cosine": lambda adam, module: Nowcaster(adam, module, predictor=Drift()),
}
METHODS = (ADAM, COSINE, *AVERAGED, *PREDICTORS)
OWN_RATE = {
    COSINE: (1, 2),
    "MLP, own rate": (1, 2),
    "graph, own rate": (1, 2),
    "drift, own rate": (0.5, 1, 2),
    "drift, cosine": (1, 2),
}
"""Factors of Adam's rate of which the best is taken."""
RAW = ", not averaged"


def nowcaster(
    options: argparse.Namespace, method: str, parts: tuple[nn.Module, Data], adam: Any
) -> Nowcaster:
    module, data = parts
    norms = any(isinstance(m, nn.BatchNorm2d) for m in module.modules())
    held = data.held[0]
    guard = Guard(
        lambda: loss_of(module, data.held),
        shrink=options.shrink,
        attempts=options.attempts,
        choose=options.choose,
    )
    predictor = PREDICTORS[method](options)
    ours = method.startswith(("MLP", "graph"))  # the others do not ask
    space = wspace.trace(module, (data.example,)) if ours else None
    return Nowcaster(
        adam,
        module,
        space,
        predictor,
        period=options.period,
        horizon=Decay(options.longest, options.power),
        total_steps=options.steps,
        guard=None if options.choose == "off" else guard,
        refresh=[held[:128], held[128:]] if norms else None,
        moments=options.moments,
        on_error="raise",
    )


def trained(
    options: argparse.Namespace, name: str, method: str, rate: float, seed: int
) -> dict[str, Any]:
    """One training run; its curve and its jumps."""
    task: Task = TASKS[name]
    data = task.data(str(options.data))
    torch.manual_seed(seed)
    module = task.make()
    drawn = torch.Generator().manual_seed(seed)
    adam = torch.optim.Adam(module.parameters(), lr=rate)
    optimizer: Any = adam
    if method in PREDICTORS:
        optimizer = nowcaster(options, method, (module, data), adam)
    elif method in AVERAGED:
        optimizer = AVERAGED[method](adam, module)
    curve, spent, jumping = [[0, measured(module, data), 0.0]], 0.0, 0.0
    raw = [list(curve[0])]
    for step in range(1, options.steps + 1):
        start = time.thread_time()
        if method.endswith("cosine"):
            adam.param_groups[0]["lr"] = rate * (1 + cos(pi * (step - 1) / options.steps)) / 2
        optimizer.zero_grad()
        loss_of(module, data.draw(task.batch, drawn)).backward()
        before = time.thread_time()
        optimizer.step()
        end = time.thread_time()
        spent += end - start
        if method in PREDICTORS and step % options.period == 0:
            jumping += end - before
        if step % EVERY == 0:
            raw.append([step, measured(module, data), round(spent, 3)])
            curve.append(list(raw[-1]))
            if method in AVERAGED:
                with optimizer.averaged():
                    refresh(module, data)
                    curve[-1][1] = measured(module, data)
    jumps = getattr(optimizer, "jumps", []) if method in PREDICTORS else []
    return {
        "task": name,
        "method": method,
        "rate": rate,
        "seed": seed,
        "steps": options.steps,
        "setting": setting(options, method),
        "parameters": sum(p.numel() for p in module.parameters()),
        "seconds": round(spent, 3),
        "jumping": round(jumping, 3),
        "jumps": [[j.step, list(j.tried), j.horizon] for j in jumps],
        "curve": curve,
        **({"raw": raw} if method.startswith("drift") else {}),
    }


def setting(options: argparse.Namespace, method: str) -> str:
    """What of the options a run depends on."""
    if method not in PREDICTORS:
        return ""
    names = ("period", "longest", "power", "choose", "shrink", "attempts", "moments")
    text = " ".join(f"{n}={getattr(options, n)}" for n in names)
    file = {"MLP": options.mlp, "graph": options.graph}.get(method.removesuffix(", own rate"), "")
    return f"{text} {Path(file).name}".strip()


@torch.no_grad()
def measured(module: nn.Module, data: Data) -> float:
    module.eval()
    found = float(loss_of(module, data.validation))
    module.train()
    return found


def refresh(module: nn.Module, data: Data) -> None:
    """Estimates BatchNorm's statistics on the held training examples; `averaged` undoes it."""
    if any(isinstance(m, nn.BatchNorm2d) for m in module.modules()):
        reestimate(module, [data.held[0][:128], data.held[0][128:]])


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[k] for k in ("task", "method", "rate", "seed", "steps", "setting"))


def read(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def measure(options: argparse.Namespace) -> None:
    """Runs whatever is missing: learning rates first, then all methods seed by seed."""
    for name in options.tasks:
        for rate in TASKS[name].rates:
            ensure(options, name, ADAM, rate, TUNING_SEED)
        for method, factors in OWN_RATE.items():
            rate = best_rate(read(options.out), options, name, ADAM)
            for factor in factors if method in options.methods else ():
                ensure(options, name, method, factor * rate, TUNING_SEED)
    for seed in options.seeds:
        for name in options.tasks:
            for method in options.methods:
                rate = best_rate(read(options.out), options, name, method)
                ensure(options, name, method, rate, seed)


def ensure(options: argparse.Namespace, name: str, method: str, rate: float, seed: int) -> None:
    known = {key_of(row) for row in read(options.out)}
    if (name, method, rate, seed, options.steps, setting(options, method)) in known:
        return
    row = trained(options, name, method, rate, seed)
    with options.out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    accepted = sum(j[2] > 0 for j in row["jumps"])
    text = f"{name}  {method}  rate {rate:g}  seed {seed}  final {final(row):.4f}"
    print(f"{text}  jumps {accepted}/{len(row['jumps'])}  {row['seconds']} s", file=sys.stderr)


def best_rate(rows: list[dict[str, Any]], options: Any, name: str, method: str) -> float:
    """The tuned rate: of `OWN_RATE` its own, of other nowcasters Adam's."""
    judge = method if method in OWN_RATE else ADAM
    tuned = [
        r
        for r in rows
        if r["task"] == name
        and r["method"] == judge
        and r["seed"] == TUNING_SEED
        and r["steps"] == options.steps
    ]
    return min(tuned, key=final)["rate"]


# ------------------------------------------------------------------------- reading the curves


def final(row: dict[str, Any]) -> float:
    return fmean(loss for _, loss, _ in row["curve"][-LAST:])


def reached(row: dict[str, Any], target: float, run: int = RUN) -> tuple[int, float, bool]:
    """Step and seconds at which the running mean is at the target, and whether it ever is."""
    curve = row["curve"]
    for i in range(run, len(curve)):
        if fmean(loss for _, loss, _ in curve[i - run + 1 : i + 1]) <= target:
            return curve[i][0], curve[i][2], True
    return curve[-1][0], curve[-1][2], False


def interval(values: list[float]) -> str:
    """Mean, and where 95 % of the means of resampled seeds lie."""
    x = np.asarray(values, float)
    draws = np.random.default_rng(0).integers(len(x), size=(4000, len(x)))
    low, high = np.quantile(x[draws].mean(1), [0.025, 0.975])
    return f"{x.mean():.0f} ({low:.0f} – {high:.0f})"


def compared(rows: list[dict[str, Any]], name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every method and setting of a task, against Adam seed by seed."""
    mine = [r for r in rows if r["task"] == name and r["seed"] != TUNING_SEED]
    control = {r["seed"]: r for r in mine if r["method"] == ADAM}
    for method, how in dict.fromkeys((r["method"], r["setting"]) for r in mine):
        runs = [r for r in mine if (r["method"], r["setting"]) == (method, how)]
        runs = [r for r in runs if r["seed"] in control]
        if runs:
            yield method, {"setting": how, **figures(runs, control)}


def figures(runs: list[dict[str, Any]], control: dict[int, dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, list[float]] = {"steps": [], "first": [], "seconds": [], "worse": []}
    hits, steps = 0, []
    for run in runs:
        adam = control[run["seed"]]
        target = final(adam)
        own, own_seconds, _ = reached(adam, target)
        step, seconds, hit = reached(run, target)
        hits += hit
        steps.append(step)
        found["steps"].append(100 * (1 - step / own))
        first = reached(run, target, 1)[0] / reached(adam, target, 1)[0]
        found["first"].append(100 * (1 - first))
        found["seconds"].append(100 * (1 - seconds / own_seconds))
        found["worse"].append(1000 * (final(run) - target))
    jumps = [j for run in runs for j in run["jumps"]]
    return found | {
        "hits": f"{hits}/{len(runs)}",
        "to": fmean(steps),
        "final": fmean(final(r) for r in runs),
        "rate": runs[0]["rate"],
        "accepted": f"{100 * sum(j[2] > 0 for j in jumps) / len(jumps):.0f} %" if jumps else "",
        "share": f"{100 * fmean(r['jumping'] / r['seconds'] for r in runs):.1f} %" if jumps else "",
    }


def expanded(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows, and for those with a second curve another of it."""
    return rows + [
        {**r, "method": r["method"] + RAW, "curve": r["raw"]} for r in rows if "raw" in r
    ]


def show(file: Path, *, settings: bool = False) -> None:
    """Prints a table for each task, and the means over held-out tasks."""
    rows = expanded(read(file))
    means: dict[tuple[str, str], list[dict[str, Any]]] = {}
    head = ["method", "rate", "final loss", "minus Adam's, × 1000", "steps to target", "reached"]
    head += ["steps saved, %", "at first sight, %", "seconds saved, %", "kept", "time in jumps"]
    for name in TASKS:
        lines = []
        for method, f in compared(rows, name):
            label = f"{method} [{f['setting']}]" if settings and f["setting"] else method
            lines.append(
                [label, f"{f['rate']:g}", f"{f['final']:.4f}", interval(f["worse"])]
                + [f"{f['to']:.0f}", f["hits"], interval(f["steps"]), interval(f["first"])]
                + [interval(f["seconds"]), f["accepted"], f["share"]]
            )
            group = "tuning" if name in TUNING else "held out"
            means.setdefault((group, label), []).append(f)
        if lines:
            print(f"\n### {name}\n")
            table(head, lines)
    for group in ("tuning", "held out"):
        some = {label: f for (g, label), f in means.items() if g == group}
        if some:
            print(f"\n### Mean of {group} tasks\n")
            columns = ["steps saved, %", "at first sight, %", "seconds saved, %"]
            table(["method", "tasks", *columns], list(averages(some)))


def averages(some: dict[str, list[dict[str, Any]]]) -> Iterator[list[str]]:
    """Means over tasks; seeds are resampled within tasks."""
    for label, found in some.items():
        cells = []
        for what in ("steps", "first", "seconds"):
            draws = np.random.default_rng(0)
            per = [np.asarray(f[what], float) for f in found]
            means = [x[draws.integers(len(x), size=(4000, len(x)))].mean(1) for x in per]
            low, high = np.quantile(np.mean(means, 0), [0.025, 0.975])
            cells.append(f"{fmean(x.mean() for x in per):.0f} ({low:.0f} – {high:.0f})")
        yield [label, str(len(found)), *cells]


def plot(file: Path, image: Path) -> None:
    """Draws mean curves of methods with all of Adam's seeds, a panel for each held-out task."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [r for r in expanded(read(file)) if r["seed"] != TUNING_SEED]
    names = [n for n in HELD_OUT if any(r["task"] == n for r in rows)]
    figure, axes = pyplot.subplots(1, len(names), figsize=(3.4 * len(names), 3.3), squeeze=False)
    for panel, name in zip(axes[0], names, strict=True):
        whole = sum((r["task"], r["method"]) == (name, ADAM) for r in rows)
        for i, method in enumerate(METHODS):
            curves = [r["curve"] for r in rows if (r["task"], r["method"]) == (name, method)]
            if len(curves) == whole:
                steps = [point[0] for point in curves[0]]
                mean = np.mean([[point[1] for point in curve] for curve in curves], 0)
                color = "black" if method == ADAM else f"C{i}"
                panel.plot(steps[2:], mean[2:], label=method, color=color, lw=1.1)
        target = fmean(final(r) for r in rows if (r["task"], r["method"]) == (name, ADAM))
        panel.axhline(target, color="black", lw=0.6, ls=":")
        finals = [loss for r in rows if r["task"] == name for _, loss, _ in r["curve"][-LAST:]]
        low, room = min(finals), 2.5 * (target - min(finals)) + 0.25 * target
        panel.set(title=name, xlabel="steps", ylim=(low - 0.03 * room, low + room))
    axes[0][0].set_ylabel("validation loss, nats")
    shown = {
        n: line for a in axes[0] for line, n in zip(*a.get_legend_handles_labels(), strict=True)
    }
    handles, labels = list(shown.values()), list(shown)
    figure.legend(handles, labels, loc="lower center", ncol=len(labels), frameon=False)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image)


def parsed() -> argparse.Namespace:
    shared = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tasks", nargs="*", default=list(HELD_OUT), help="names, or 'tuning'")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(range(5)))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--period", type=int, default=50)
    parser.add_argument("--longest", type=int, default=4, help="horizon of the first jump")
    parser.add_argument("--power", type=float, default=2.0, help="of the decay of horizons")
    parser.add_argument("--choose", choices=("first", "best", "off"), default="best")
    parser.add_argument("--shrink", type=float, default=0.5)
    parser.add_argument("--attempts", type=int, default=3)
    parser.add_argument("--moments", choices=("keep", "reset"), default="keep")
    parser.add_argument("--data", type=Path, default=shared)
    parser.add_argument("--published", type=Path, default=shared / "nino" / "nino_mlp.pt")
    parser.add_argument("--mlp", default="nino-mlp-small", help="name or file")
    parser.add_argument("--graph", default="nino-graph-small", help="name or file")
    parser.add_argument("--out", type=Path, default=Path("nowcast_quality.jsonl"))
    parser.add_argument("--show", action="store_true", help="print the tables only")
    parser.add_argument("--settings", action="store_true", help="with settings in the tables")
    parser.add_argument("--plot", type=Path, help="draw the curves into this file")
    options = parser.parse_args()
    options.tasks = list(TUNING) if options.tasks == ["tuning"] else options.tasks
    return options


def main() -> None:
    options = parsed()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(f"# {(__doc__ or '').splitlines()[0]}\n\n{machine()}", flush=True)
    if not options.show and not options.plot:
        measure(options)
    show(options.out, settings=options.settings)
    if options.plot:
        plot(options.out, options.plot)


if __name__ == "__main__":
    main()
