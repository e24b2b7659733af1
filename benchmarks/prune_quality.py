"""What pruned ResNets are worth, beside torch-pruning: one-shot, and after equal fine-tuning.

The networks of `prune_models` (CIFAR-10 at 16 x 16) lose units until 4/5, 1/2 or 1/3 of their
multiply-accumulates are left (counted for all by `wspace.prune.Cost`), by one criterion at a time:
with one threshold for all groups ("global") or the same share of each ("local"). torch-pruning gets
the smallest ratio that reaches the budget, found by bisection. Criteria with data see the same
2,000 training images. Fine-tuning is the same for all: steps, batches, rates.

`python benchmarks/prune_quality.py FOLDER` runs what is missing (a file per run in FOLDER/runs) and
prints the tables. Intervals are bootstrapped over the 10,000 test images, of means over networks.
"""

import argparse
import copy
import json
import os
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from align_models import Data, loss_of
from harness import machine, peer, table
from prune_models import FAMILY, SHARED, load
from torch import Tensor, nn

import wspace
from wspace.batchnorm import reestimate
from wspace.errors import WSpaceError
from wspace.prune import Cost, Pruner, Selection

Scope = Literal["global", "group"]
STEPS, RATE = 390, 2e-3
"""Two passes; the rate rises for a tenth of them, then falls along a cosine."""
FACTORS = (1.25, 2.0, 3.0)
"""Below 2, networks are judged one-shot only."""
DRAWS = 2000


class Run(NamedTuple):
    """A way to prune."""

    tool: str
    criterion: str
    scope: Scope
    tune: bool

    @property
    def name(self) -> str:
        return f"{self.tool}-{self.criterion}-{self.scope}"


RUNS = [
    *(Run(t, "magnitude", s, True) for s in ("global", "group") for t in ("wspace", "peer")),
    *(Run(t, "taylor", "global", False) for t in ("wspace", "peer")),
    Run("wspace", "random", "group", False),
    *(Run(t, c, "global", False) for c in ("bn_scale", "lamp", "fpgm") for t in ("wspace", "peer")),
    *(Run("wspace", c, "global", False) for c in ("random", "hessian", "activation")),
    *(Run("wspace", "predicted", s, False) for s in ("global", "group")),
    *(Run("wspace", c, "group", False) for c in ("taylor", "hessian", "activation")),
]
"""Random scores with one threshold keep equal shares in expectation; in groups, exactly."""


# ---------------------------------------------------------------------- pruning


def calibration(data: Data) -> list[tuple[Tensor, Tensor]]:
    """2,000 training images, not augmented, in batches of 200."""
    x, y = data.train
    return [(a, b) for a, b in zip(x[:2000].split(200), y[:2000].split(200), strict=True)]


def importance(criterion: str, batches: list[tuple[Tensor, Tensor]], seed: int) -> Any:
    """One of ours; ImportError, or an error that says so, if it is not there."""
    if criterion == "random":
        from wspace.prune.importance.weights import Random

        return Random(torch.Generator().manual_seed(seed))
    if criterion == "predicted":
        from wspace.prune.learned.predicted import Predicted

        return Predicted()
    if criterion in ("taylor", "hessian", "activation"):
        from wspace.prune.importance import measured

        if criterion == "taylor":
            return measured.Taylor(batches, loss_of)
        if criterion == "hessian":
            return measured.HessianDiagonal(batches, loss_of)
        return measured.ActivationNorm(batches)
    return criterion


def ours(run: Run, module: nn.Module, factor: float, data: Data, seed: int) -> nn.Module:
    x = data.train[0][:1]
    pruner = Pruner(module, wspace.trace(module, (x,)))
    losses = run.criterion == "predicted"  # which compare as they are
    how = Selection(
        amount=1 - 1 / factor,
        of="flops",
        scope=run.scope,
        normalize="none" if losses else "mean",
    )
    scores = importance(run.criterion, calibration(data), seed)
    return pruner.prune(pruner.choose(scores, how))


def theirs(run: Run, module: nn.Module, factor: float, data: Data, seed: int) -> nn.Module:
    pruning = peer("torch_pruning")
    if pruning is None:
        raise ImportError("torch_pruning")
    kinds = pruning.importance
    x = data.train[0][:1]
    goal = macs(module, x) / factor

    def pruned(ratio: float) -> nn.Module:
        small = copy.deepcopy(module)
        scores = {
            "magnitude": kinds.MagnitudeImportance,
            "taylor": kinds.TaylorImportance,
            "bn_scale": kinds.BNScaleImportance,
            "lamp": kinds.LAMPImportance,
            "fpgm": kinds.FPGMImportance,
        }[run.criterion]()
        pruner = pruning.pruner.BasePruner(
            small,
            x,
            importance=scores,
            global_pruning=run.scope == "global",
            pruning_ratio=ratio,
            ignored_layers=[small.get_submodule("head")],
            in_channel_groups={},
            out_channel_groups={},
        )
        if run.criterion == "taylor":
            for pair in calibration(data):
                loss_of(small, pair).backward()
        pruner.step()
        small.zero_grad(set_to_none=True)
        return small.eval()

    low, high = 0.0, 1.0
    best = None
    for _ in range(9):
        middle = (low + high) / 2
        small = pruned(middle)
        if macs(small, x) <= goal:
            high, best = middle, small
        else:
            low = middle
    if best is None:
        raise RuntimeError("no ratio reaches the budget")
    return best


def macs(module: nn.Module, x: Tensor) -> int:
    return Cost.measured(module, wspace.trace(module, (x,)), (x,)).macs()


# ---------------------------------------------------------------------- judging


@torch.no_grad()
def right(module: nn.Module, pair: tuple[Tensor, Tensor]) -> Tensor:
    """Which examples are classified rightly: bool, ``(n,)``."""
    module.eval()
    return torch.cat(
        [module(x).argmax(-1) == y for x, y in zip(*(z.split(500) for z in pair), strict=True)]
    )


def tuned(module: nn.Module, data: Data, seed: int, steps: int = STEPS) -> nn.Module:
    """The module trained on, in place."""
    module.train()
    adam = torch.optim.AdamW(module.parameters(), lr=RATE, weight_decay=FAMILY.decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        adam, RATE, steps, pct_start=0.1, cycle_momentum=False
    )
    for pair in data.batches(steps, FAMILY.batch, torch.Generator().manual_seed(1000 + seed)):
        adam.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(module, pair)
        loss.backward()
        adam.step()
        schedule.step()
    return module.eval()


def done(run: Run, folder: Path, seed: int, factor: float, data: Data) -> dict[str, Any]:
    """Prunes one network in one way and judges it."""
    module = load(folder, seed)
    make: Callable[..., nn.Module] = ours if run.tool == "wspace" else theirs
    start = time.process_time()
    small = make(run, module, factor, data, seed)
    seconds = time.process_time() - start
    x = data.train[0][:1]
    out: dict[str, Any] = {
        "factor": macs(module, x) / macs(small, x),
        "parameters": sum(p.numel() for p in small.parameters()),
        "widths": [m.out_channels for m in small.modules() if isinstance(m, nn.Conv2d)],
        "prune_s": seconds,
        "one_shot": right(small, data.test),
    }
    fresh = copy.deepcopy(small)
    reestimate(fresh, [data.train[0][i : i + 500] for i in range(0, 10_000, 500)], frozen=True)
    out["statistics"] = right(fresh, data.test)
    if run.tune and factor >= 2:
        out["tuned"] = right(tuned(small.to(memory_format=torch.channels_last), data, seed),
                             data.test)  # fmt: skip
    return out


def interval(rights: Iterable[Tensor]) -> tuple[float, float, float]:
    """Mean over networks and examples of a number per example, with a 95 % interval, in percent."""
    x = torch.stack([r.double() for r in rights]).mean(0)
    generator = torch.Generator().manual_seed(0)
    n = len(x)
    means = torch.stack(
        [x[torch.randint(n, (n,), generator=generator)].mean() for _ in range(DRAWS)]
    )
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return 100 * float(x.mean()), 100 * low, 100 * high


def shown(rights: list[Tensor]) -> str:
    if not rights:
        return ""
    mean, low, high = interval(rights)
    return f"{mean:.2f} ({low:.2f} to {high:.2f})"


JUDGED = {"one_shot": "one-shot", "statistics": "statistics anew", "tuned": "fine-tuned"}


def report(runs: Path, seeds: list[int]) -> dict[str, Any]:
    """Tables of the runs that are there."""
    found = {p.stem: torch.load(p, weights_only=True) for p in sorted(runs.glob("*.pt"))}
    figures: dict[str, Any] = {}
    for factor in FACTORS:
        rows, between = [], []
        for run in RUNS:
            mine = {s: f for s in seeds if (f := found.get(f"{run.name}-{factor:g}-{s}"))}
            if not mine:
                continue
            f = list(mine.values())
            rights = {k: [x[k] for x in f if k in x] for k in JUDGED}
            figures[f"{run.name}-{factor:g}"] = {
                "networks": len(f), **{k: interval(v) for k, v in rights.items() if v},
            }  # fmt: skip
            scope = "global" if run.scope == "global" else "local"
            count = sum(x["parameters"] for x in f) / len(f)
            less = sum(x["factor"] for x in f) / len(f)
            tool = "torch-pruning" if run.tool == "peer" else run.tool
            rows.append([
                run.criterion, scope, tool, len(f), f"{less:.2f}", f"{count / 1e3:.0f}",
                *(shown(rights[k]) for k in JUDGED),
            ])  # fmt: skip
            if run.tool == "wspace":
                other = run._replace(tool="peer")
                pairs = [
                    (a, b) for s, a in mine.items()
                    if (b := found.get(f"{other.name}-{factor:g}-{s}"))
                ]  # fmt: skip
                if pairs:
                    gaps = [
                        shown(
                            [a[k].double() - b[k].double() for a, b in pairs if k in a and k in b]
                        )
                        for k in JUDGED
                    ]
                    between.append([run.criterion, scope, len(pairs), *gaps])
        print(f"\n## {factor:g} × fewer multiply-accumulates: test accuracy, %\n")
        head = ["criterion", "scope", "tool", "networks", "× fewer", "10³ parameters"]
        table([*head, *JUDGED.values()], rows)
        print("\nwspace less torch-pruning, in points:\n")
        table(["criterion", "scope", "pairs", *JUDGED.values()], between)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="of the networks of prune_models")
    parser.add_argument("--data", default=os.environ.get("WSPACE_DATA", str(SHARED)))
    parser.add_argument("--seeds", type=int, nargs="*", default=list(range(FAMILY.seeds)))
    parser.add_argument("--only", nargs="*", help="only these runs, as wspace-magnitude-global")
    parser.add_argument("--factors", type=float, nargs="*", default=list(FACTORS))
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(f"# {(__doc__ or '').splitlines()[0]}\n\n{machine()}", flush=True)
    folder, runs = options.folder, options.folder / "runs"
    runs.mkdir(exist_ok=True)
    data = FAMILY.data(options.data)
    for run in [r for r in RUNS if options.only is None or r.name in options.only]:
        for factor in options.factors:
            for seed in options.seeds:
                path = runs / f"{run.name}-{factor:g}-{seed}.pt"
                if path.exists() or not (folder / f"resnet-{seed}.json").exists():
                    continue
                try:
                    out = done(run, folder, seed, factor, data)
                except (ImportError, WSpaceError) as error:
                    print(f"<!-- {path.stem}: {str(error).splitlines()[0]} -->", flush=True)
                    continue
                torch.save(out, path)
                words = {k: f"{100 * out[k].double().mean():.2f}" for k in JUDGED if k in out}
                print(f"<!-- {path.stem}: {out['factor']:.2f} {words} -->", flush=True)
    base = [right(load(folder, s), data.test) for s in options.seeds
            if (folder / f"resnet-{s}.json").exists()]  # fmt: skip
    print(f"\nNot pruned, {len(base)} networks: {shown(base)} %")
    figures = {"base": interval(base), "runs": report(runs, options.seeds)}
    if options.json:
        text = json.dumps({"machine": machine(), **figures}, indent=1, allow_nan=False)
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
