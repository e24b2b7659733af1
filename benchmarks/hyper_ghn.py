"""Parameters of unseen architectures from a graph hypernetwork.

    python benchmarks/hyper_ghn.py train ghn
    python benchmarks/hyper_ghn.py train alone --body none   # the ablation without a graph
    python benchmarks/hyper_ghn.py zero ghn                  # accuracy of predicted parameters
    python benchmarks/hyper_ghn.py zero alone
    python benchmarks/hyper_ghn.py start ghn                 # as an initialisation; mean of trained
    python benchmarks/hyper_ghn.py edge ghn                  # its control with a larger rate still
    python benchmarks/hyper_ghn.py show

Data: MNIST (``WSPACE_DATA``), pixels averaged to 14 × 14, and the architectures of
`datasets_zoo.experiments.genotypes`: 2,000 for training, others in every regime. Every command
appends records to `--out` (JSON lines) and goes on where it stopped; `train` keeps checkpoints in
`--runs`.

*zero*: accuracy on the first 2,000 test images, BatchNorm with the statistics of batches of 500;
and how many channels are distinct. *start*, on architectures of the regime ``between``: a control,
from PyTorch's initialisation, is trained with Adam for `--budget` steps, with every rate of a grid,
and with the best one (accuracy at the end on 1,000 images put aside from training) from two further
seeds. The target is the mean accuracy of these three there. The mean of their parameters is the
baseline "mean of trained". Then the same from predicted parameters: the best rate of the same grid,
two further seeds (order of the images), and the first evaluation at which the mean curve reaches
the target; `budget` if it does not. *edge*: where the control's best rate is the largest of the
grid, a larger one is tried with three seeds too, and is the control if it is better.
"""

import argparse
import json
import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from harness import table
from lightning.pytorch import Callback, Trainer
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from datasets_zoo import architectures
from datasets_zoo.experiments.genotypes import REGIMES, Genotype, GenotypeImages
from wspace.hyper.graph import channel_diversity, save_ghn
from wspace.lit.checkpoint import Checkpoints, SafeCheckpoints
from wspace.lit.checkpoint import read as read_checkpoint
from wspace.lit.hyper.graph import ParameterPrediction
from wspace.lit.task import Optimization

EVERY = 500
JUDGED = 2000
RATES, BEYOND = (1e-3, 3e-3, 1e-2), 3e-2


def data_of(options: argparse.Namespace) -> GenotypeImages:
    data = GenotypeImages(
        "mnist", pool=2, steps=EVERY, genotypes=options.genotypes, seed=options.seed,
        meta_batch=options.meta_batch, held_out=12, tested=options.tested,
    )  # fmt: skip
    data.setup()
    return data


class Log(Callback):
    """A line for every epoch of a training, which ends early at a step."""

    def __init__(self, name: str, out: Path, stop: int) -> None:
        self.name, self.out, self.stop = name, out, stop
        self.begun = time.process_time()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        del pl_module
        trainer.should_stop = trainer.should_stop or trainer.global_step >= self.stop

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        del pl_module
        if not trainer.sanity_checking:
            found = {k: round(float(v), 4) for k, v in trainer.callback_metrics.items()}
            seconds = round(time.process_time() - self.begun)
            write(self.out, {"what": "train", "name": self.name, "step": trainer.global_step,
                             "cpu_seconds": seconds, **found})  # fmt: skip


def write(out: Path, record: dict[str, Any]) -> None:
    with out.open("a") as file:
        file.write(json.dumps(record) + "\n")


def train(options: argparse.Namespace) -> None:
    torch.manual_seed(options.seed)
    network = {"body": options.body, "layers": options.layers, "width": options.width}
    task = ParameterPrediction(
        network, penalty=options.penalty, optimization=Optimization(options.lr, weight_decay=1e-2)
    )
    folder = options.runs / options.name
    keep = Checkpoints(dirpath=folder, monitor=None, save_last=True, every_n_epochs=1)
    last = folder / "last.safetensors"
    trainer = Trainer(
        max_epochs=options.steps // EVERY, accelerator="cpu", logger=False,
        gradient_clip_val=1.0, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[keep, Log(options.name, options.out, options.stop or options.steps)],
        plugins=[SafeCheckpoints()],
    )  # fmt: skip
    trainer.fit(task, data_of(options), ckpt_path=str(last) if last.exists() else None)


def records_of(options: argparse.Namespace, **wanted: Any) -> list[dict[str, Any]]:
    lines = options.out.read_text().splitlines() if options.out.exists() else []
    records = [json.loads(line) for line in lines]
    return [r for r in records if all(r.get(k) == v for k, v in wanted.items())]


def trained(options: argparse.Namespace, name: str) -> ParameterPrediction:
    """A task with the weights of a training."""
    header, tensors = read_checkpoint(options.runs / name / "last.safetensors")
    kept = header["hyper_parameters"]
    task = ParameterPrediction(kept["network"])
    task.load_state_dict(tensors)
    return task.eval()


def module_of(genotype: Genotype, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    with torch.device("cpu"):
        return getattr(architectures, genotype.family)(**genotype.architecture.options)


@torch.no_grad()
def accuracy(module: nn.Module, x: Tensor, y: Tensor) -> float:
    """With BatchNorm's statistics of batches of 500 images."""
    copy = deepcopy(module).train()
    right = [
        (copy(a).argmax(-1) == b).sum() for a, b in zip(x.split(500), y.split(500), strict=True)
    ]
    return float(torch.stack(right).sum() / len(y))


@torch.no_grad()
def put(module: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    named = dict(module.named_parameters())
    for name, value in state.items():
        named[name].copy_(value)
    return module


@torch.no_grad()
def zero(options: argparse.Namespace) -> None:
    """Accuracy of predicted parameters in every regime."""
    task, data = trained(options, options.name), data_of(options)
    assert data.images is not None
    x, y = data.images.test_x[:JUDGED], data.images.test_y[:JUDGED]
    for regime in data.regimes:
        for i in range(options.tested):
            about = {"what": "zero", "name": options.name, "regime": regime, "seed": i}
            if records_of(options, **about):
                continue
            genotype = data.genotype(data.held_out + i, regime)
            space = genotype.architecture.space()
            state = cast("dict[str, Tensor]", task.ghn(space))
            module = put(module_of(genotype), state)
            shares = channel_diversity(state, space).values()
            write(options.out, about | {
                "family": genotype.family, "architecture": str(genotype.architecture),
                "parameters": sum(p.numel() for p in module.parameters()),
                "accuracy": round(accuracy(module, x, y), 4),
                "distinct": round(float(np.mean([*shares])), 4),
            })  # fmt: skip


def curve(
    module: nn.Module, data: GenotypeImages, rate: float, seed: int, budget: int
) -> list[float]:
    """Accuracies on images put aside, at every step of `looked`; trains the module."""
    assert data.images is not None
    put_aside = data.judged
    x, y = data.images.train_x, data.images.train_y
    judged = x[-put_aside:], y[-put_aside:]
    g = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(module.parameters(), rate)
    out: list[float] = []
    for step in range(budget + 1):
        if step in looked(budget):
            out.append(accuracy(module, *judged))
        rows = torch.randint(len(y) - put_aside, (64,), generator=g)
        optimizer.zero_grad()
        F.cross_entropy(module.train()(x[rows]), y[rows]).backward()
        if step < budget:
            optimizer.step()
    return out


def looked(budget: int) -> list[int]:
    steps = {0, 5, 10, 20, 30, 40, 50, *range(60, budget, 20), budget}
    return sorted(k for k in steps if k <= budget)


def best_of(
    make: Callable[[int], nn.Module], data: GenotypeImages, budget: int
) -> tuple[float, NDArray[Any], list[nn.Module]]:
    """The best rate of the grid, curves with it from three seeds, and the modules."""
    tried: dict[float, tuple[list[float], nn.Module]] = {}
    for rate in RATES:
        module = make(0)
        tried[rate] = curve(module, data, rate, 0, budget), module
    rate = max(tried, key=lambda r: tried[r][0][-1])
    curves, modules = [tried[rate][0]], [tried[rate][1]]
    for seed in (1, 2):
        modules.append(make(seed))
        curves.append(curve(modules[-1], data, rate, seed, budget))
    return rate, np.array(curves), modules


def started(genotype: Genotype, state: dict[str, Tensor], seed: int) -> nn.Module:
    return put(module_of(genotype, seed), state)


def start(options: argparse.Namespace) -> None:
    """Predicted parameters as an initialisation, and the mean of trained ones."""
    task, data = trained(options, options.name), data_of(options)
    assert data.images is not None
    x, y = data.images.test_x[:JUDGED], data.images.test_y[:JUDGED]
    at = looked(options.budget)
    for i in range(options.started):
        about = {"what": "start", "name": options.name, "regime": "between", "seed": i,
                 "budget": options.budget}  # fmt: skip
        if records_of(options, **about):
            continue
        genotype = data.genotype(data.held_out + i, "between")
        with torch.no_grad():
            state = cast("dict[str, Tensor]", task.ghn(genotype.architecture.space()))
        fresh = partial(module_of, genotype)
        rate, curves, modules = best_of(fresh, data, options.budget)
        mean = deepcopy(modules[0])
        every = [dict(m.named_parameters()) for m in modules]
        put(mean, {n: torch.stack([m[n].detach() for m in every]).mean(0) for n in every[0]})
        begun, better, _ = best_of(partial(started, genotype, state), data, options.budget)
        target = curves.mean(0)[-1]
        reached = [int(np.argmax(c.mean(0) >= target)) if (c.mean(0) >= target).any() else -1
                   for c in (curves, better)]  # fmt: skip
        write(options.out, about | {
            "family": genotype.family, "architecture": str(genotype.architecture),
            "rate": rate, "rate_predicted": begun, "looked": at,
            "curve": curves.mean(0).round(4).tolist(),
            "curve_predicted": better.mean(0).round(4).tolist(),
            "target": round(float(target), 4),
            "steps": at[reached[0]] if reached[0] >= 0 else None,
            "steps_predicted": at[reached[1]] if reached[1] >= 0 else None,
            "each_trained": [round(accuracy(m, x, y), 4) for m in modules],
            "mean_of_trained": round(accuracy(mean, x, y), 4),
            "zero": round(accuracy(put(module_of(genotype), state), x, y), 4),
        })  # fmt: skip


def edge(options: argparse.Namespace) -> None:
    """The control with a rate beyond the grid, where the grid's largest was its best."""
    data = data_of(options)
    for r in records_of(
        options, what="start", name=options.name, regime="between", rate=max(RATES)
    ):
        about = {"what": "edge", "regime": "between", "seed": r["seed"], "rate": BEYOND}
        about["budget"] = r["budget"]
        if not records_of(options, **about):
            genotype = data.genotype(data.held_out + r["seed"], "between")
            curves = [curve(module_of(genotype, s), data, BEYOND, s, r["budget"]) for s in range(3)]
            write(options.out, about | {"curve": np.mean(curves, 0).round(4).tolist()})


def beyond(options: argparse.Namespace, record: dict[str, Any]) -> dict[str, Any]:
    """A record of `start` with the better of two controls."""
    found = records_of(options, what="edge", regime="between", seed=record["seed"],
                       budget=record["budget"])  # fmt: skip
    if not found or found[0]["curve"][-1] <= record["target"]:
        return record
    target, at = found[0]["curve"][-1], record["looked"]
    first = [next((k for k, a in zip(at, c, strict=True) if a >= target), None)
             for c in (found[0]["curve"], record["curve_predicted"])]  # fmt: skip
    new = {"rate": BEYOND, "curve": found[0]["curve"], "target": target}
    return record | new | {"steps": first[0], "steps_predicted": first[1]}


def ship(options: argparse.Namespace) -> None:
    """Writes the hypernetwork of a training to a file, with a card."""
    task = trained(options, options.name)
    header, _ = read_checkpoint(options.runs / options.name / "last.safetensors")
    card = {
        "data": "MNIST, training images but the last 1,000, averaged to 14 x 14, standardised",
        "architectures": f"datasets_zoo.experiments.genotypes, {options.genotypes} of 'train'",
        "steps": header["global_step"], "seed": options.seed,
        "training": header["hyper_parameters"],
    }  # fmt: skip
    save_ghn(task.ghn, options.file, card=card, half=True)
    print(options.file, options.file.stat().st_size, json.dumps(card))


def interval(values: list[float]) -> str:
    """Mean, and its 95 % interval: architectures are drawn 2,000 times."""
    if not values:
        return "–"
    some = np.array(values)
    draws = np.random.default_rng(0).integers(len(some), size=(2000, len(some)))
    low, high = np.quantile(some[draws].mean(1), (0.025, 0.975))
    return f"{some.mean():.3f} ({low:.3f}–{high:.3f})"


def show(options: argparse.Namespace) -> None:
    """Prints the tables."""
    found = [r for r in records_of(options, what="zero") if r["regime"] in REGIMES]
    names = list(dict.fromkeys(r["name"] for r in found))
    regimes = list(dict.fromkeys(r["regime"] for r in found))
    rows = [
        [regime, *[interval([r["accuracy"] for r in found
                             if (r["name"], r["regime"]) == (name, regime)]) for name in names]]
        for regime in regimes
    ]  # fmt: skip
    table(["regime", *names], rows)
    families = list(dict.fromkeys(r["family"] for r in found))
    rows = [
        [regime, *[interval([r["accuracy"] for r in found
                             if (r["name"], r["regime"], r["family"]) == (names[0], regime, f)])
                   for f in families]]
        for regime in regimes
    ]  # fmt: skip
    table([f"{names[0]}, by family", *families], rows)
    table(["distinct channels", *names], [
        ["all", *[f"{np.mean([r['distinct'] for r in found if r['name'] == n]):.3f}"
                  for n in names]]
    ])  # fmt: skip
    for name in dict.fromkeys(
        r["name"] for r in records_of(options, what="start", regime="between")
    ):
        some = [
            beyond(options, r)
            for r in records_of(options, what="start", regime="between", name=name)
        ]
        parts = [some, [r for r in some if r["family"] != "vit"]]
        head = [f"all {len(some)}", f"the {len(parts[1])} that are no transformers"]
        columns = [_start_rows(part) for part in parts]
        table([f"{name} as a start, {some[0]['budget']} steps", *head],
              [[row, *[c[row] for c in columns]] for row in columns[0]])  # fmt: skip


def _start_rows(some: list[dict[str, Any]]) -> dict[str, str]:
    budget = some[0]["budget"]
    steps = [r["steps_predicted"] if r["steps_predicted"] is not None else budget for r in some]
    saved = [1 - s / (r["steps"] or budget) for s, r in zip(steps, some, strict=True)]
    ends = [r["curve_predicted"][-1] - r["curve"][-1] for r in some]
    return {
        "accuracy as predicted": interval([r["zero"] for r in some]),
        "of the mean of three trained": interval([r["mean_of_trained"] for r in some]),
        "of each trained": interval([float(np.mean(r["each_trained"])) for r in some]),
        "share of steps saved": interval(saved),
        "networks that save any": f"{sum(s > 0 for s in saved)} of {len(some)}",
        "control's steps": interval([float(r["steps"] or budget) for r in some]),
        "steps from predicted": interval([float(s) for s in steps]),
        "accuracy after all steps, less the control's": interval(ends),
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("what", choices=["train", "zero", "start", "edge", "show", "ship"])
    options.add_argument("name", nargs="?", default="ghn", help="of a training")
    options.add_argument("--out", type=Path, default=Path("hyper_ghn.jsonl"))
    options.add_argument("--runs", type=Path, default=Path("runs_ghn"))
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--steps", type=int, default=3000)
    options.add_argument("--stop", type=int, default=0, help="step to end at; the rate stays as is")
    options.add_argument("--lr", type=float, default=2e-3)
    options.add_argument("--penalty", type=float, default=0.0)
    options.add_argument("--body", default="graphormer")
    options.add_argument("--layers", type=int, default=3)
    options.add_argument("--width", type=int, default=64)
    options.add_argument("--genotypes", type=int, default=2000)
    options.add_argument("--meta-batch", type=int, default=4)
    options.add_argument("--tested", type=int, default=30, help="architectures of each regime")
    options.add_argument("--started", type=int, default=16, help="architectures to be trained")
    options.add_argument("--file", type=Path, default=Path("ghn.safetensors"), help="to ship")
    options.add_argument("--budget", type=int, default=200, help="steps of these")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    {"train": train, "zero": zero, "start": start, "edge": edge, "show": show, "ship": ship}[
        chosen.what
    ](chosen)


if __name__ == "__main__":
    main()
