"""Images from a tenth of their pixels: PSNR against steps at test time.

Arms: a hypernetwork that makes all weights of a field, one that scales and shifts the units of a
shared field, and learned initial weights (first-order MAML); all have the same field, images,
batches and training rate. Steps at test time are Adam on the context's readings, for all. Their
rate is chosen on validation images, as the one with the largest mean PSNR over all numbers of
steps; learned initial weights are trained with the same rate as they are adapted with, which is
chosen by trainings with a seed that is not reported. Beside them the mean training image, the same
with the known pixels put in, and the best linear prediction from the readings.

Results are added to a file of JSON lines as they come, what is there is not run again; `--show`
prints the table, `--plot FILE` draws images. Intervals are Student's t over seeds (95 %).

    WSPACE_DATA=… python benchmarks/hyper_fields.py --out fields.jsonl
    python benchmarks/hyper_fields.py --out fields.jsonl --show
"""

import argparse
import json
import logging
import sys
import time
import warnings
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from harness import table
from lightning.pytorch import Trainer
from scipy import stats

from datasets_zoo.experiments.pixels import Observed, Pixels
from wspace.hyper.fields import psnr
from wspace.lit.hyper.fields import NeuralField
from wspace.lit.task import Optimization

STEPS = (0, 1, 3, 10, 30)
STEP_RATES = (1e-4, 3e-4, 1e-3, 3e-3)
INNER_RATES = (1e-3, 3e-3)
TUNING_SEED = 1000
ARMS: dict[str, dict[str, Any]] = {
    "linear": {"method": "weights", "head_options": {"hidden": []}},
    "weights": {"method": "weights"},
    "modulation": {"method": "modulation"},
    "initial": {"method": "initial"},
}
NAMES = {
    "linear": "hypernetwork, all weights, linear head",
    "weights": "hypernetwork, all weights",
    "modulation": "hypernetwork, FiLM",
    "initial": "initial weights (MAML)",
}

LABELS = {
    "known pixels": "mean image, known pixels put in",
    "linear": "linear regression on the readings",
}


def pixels(options: argparse.Namespace, seed: int) -> Pixels:
    data = Pixels(
        options.dataset,
        pool=options.pool,
        sensors=options.sensors,
        share=options.share,
        targets=options.targets,
        batch_size=options.batch_size,
        batches=options.batches,
        tests=options.tests,
        seed=seed,
    )
    data.setup()
    return data


def trained(
    options: argparse.Namespace, data: Pixels, method: str, rate: float, seed: int
) -> tuple[NeuralField, float]:
    """A trained task, and the processor time it took."""
    task = NeuralField(
        **ARMS[method],
        hidden=(32, 32),
        omega=options.omega,
        places=2 if options.sensors == "pixels" else 3,
        step_lr=rate,
        steps=STEPS,
        optimization=Optimization(lr=options.lr, weight_decay=0.0),
        seed=seed,
    )
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        gradient_clip_val=1.0,
    )
    start = time.process_time()
    trainer.fit(task, datamodule=data)
    return task, time.process_time() - start


def judged(task: NeuralField, data: Pixels, part: str) -> list[float]:
    """Mean PSNR after each number of steps."""
    loader = data.val_dataloader() if part == "val" else data.test_dataloader()
    found = [task.judged(batch, STEPS) for batch in loader]
    return [float(torch.cat([f[k] for f in found]).mean()) for k in STEPS]


def run(options: argparse.Namespace, method: str, rate: float, seed: int) -> dict[str, Any]:
    data = pixels(options, seed)
    task, seconds = trained(options, data, method, rate, seed)
    rates = STEP_RATES if method != "initial" else (rate,)
    values: dict[float, list[float]] = {}
    for step_rate in rates:
        task.step_lr = step_rate
        values[step_rate] = judged(task, data, "val")
    task.step_lr = max(values, key=lambda r: fmean(values[r]))
    row = {
        **key(options, method, rate, seed),
        "step_rate": task.step_lr,
        "validation": values[task.step_lr],
        "seconds": round(seconds, 1),
        "parameters": sum(p.numel() for p in task.parameters() if p.requires_grad),
    }
    if seed == TUNING_SEED:
        return row
    if options.keep:
        options.keep.mkdir(parents=True, exist_ok=True)
        torch.save(task.state_dict(), options.keep / f"{method}_{seed}.pt")
    return row | {"test": judged(task, data, "test"), **controls(data)}


def controls(data: Pixels) -> dict[str, float]:
    """PSNR of the mean image, and of it with the known pixels put in."""
    mean = data.parts["train"].mean(0)
    plain: list[torch.Tensor] = []
    filled: list[torch.Tensor] = []
    linear: list[torch.Tensor] = []
    for batch in data.test_dataloader():
        shown = mean.expand_as(batch.images)
        plain.append(psnr(shown, batch.images))
        if data.sensors == "pixels":
            filled.append(psnr(known(shown, batch), batch.images))
        if data.sensors == "pixels":
            linear.append(psnr(regressed(data, batch), batch.images))
    found = {"mean image": float(torch.cat(plain).mean())}
    found |= {"linear": float(torch.cat(linear).mean())} if linear else {}
    return found | ({"known pixels": float(torch.cat(filled).mean())} if filled else {})


def regressed(data: Pixels, batch: Observed, noise: float = 1e-3) -> torch.Tensor:
    """The best linear prediction from the readings: mean and covariance of training images."""
    x = data.parts["train"][:20_000].flatten(1)
    mean, covariance = x.mean(0), torch.cov(x.T)
    apart = torch.cdist(batch.context.coordinates, batch.grid.expand(len(batch.images), -1, -1))
    k = apart.argmin(-1)  # (B, m)
    among = covariance[k[:, :, None], k[:, None]] + noise * torch.eye(k.shape[1])
    away = batch.readings.flatten(1) - mean[k]
    found = (
        mean + (covariance[:, k].movedim(0, 1) @ torch.linalg.solve(among, away)[..., None])[..., 0]
    )
    return found.view_as(batch.images)


def known(shown: torch.Tensor, batch: Observed) -> torch.Tensor:
    """Images with what was read put in."""
    apart = torch.cdist(batch.context.coordinates, batch.grid.expand(len(shown), -1, -1))
    index = apart.argmin(-1)[..., None].expand_as(batch.readings)
    return shown.clone().scatter(1, index, batch.readings)


# ------------------------------------------------------------------------- what is run


def key(options: argparse.Namespace, method: str, rate: float, seed: int) -> dict[str, Any]:
    names = ("dataset", "pool", "sensors", "share", "targets", "batch_size", "batches")
    names += ("tests", "omega", "lr")
    setting = " ".join(f"{n}={getattr(options, n)}" for n in names)
    return {"method": method, "rate": rate, "seed": seed, "setting": setting}


def read(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def ensure(options: argparse.Namespace, method: str, rate: float, seed: int) -> dict[str, Any]:
    wanted = key(options, method, rate, seed)
    for row in read(options.out):
        if all(row[k] == v for k, v in wanted.items()):
            return row
    row = run(options, method, rate, seed)
    with options.out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    shown = [round(x, 2) for x in row.get("test", row["validation"])]
    print(method, rate, seed, shown, f"{row['seconds']} s", file=sys.stderr, flush=True)
    return row


def measure(options: argparse.Namespace) -> None:
    for seed in options.seeds:
        for method in options.methods:
            rate = 1e-3  # of steps in training; hypernetworks take none
            if method == "initial":
                rows = [ensure(options, method, r, TUNING_SEED) for r in INNER_RATES]
                rate = max(rows, key=lambda row: fmean(row["validation"]))["rate"]
            ensure(options, method, rate, seed)


# -------------------------------------------------------------------------- what is shown


def interval(values: list[float]) -> str:
    x = np.asarray(values, float)
    if len(x) < 2:
        return f"{x.mean():.2f}"
    half = stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / len(x) ** 0.5
    return f"{x.mean():.2f} ± {half:.2f}"


def show(file: Path) -> None:
    rows = [r for r in read(file) if "test" in r]
    for setting in dict.fromkeys(r["setting"] for r in rows):
        print(f"\n### {setting}\n")
        lines: list[list[str]] = []
        for method in ARMS:
            mine = [r for r in rows if r["setting"] == setting and r["method"] == method]
            if mine:
                cells = [interval([r["test"][i] for r in mine]) for i in range(len(STEPS))]
                rates = ", ".join(f"{r['step_rate']:g}" for r in mine)
                size = f"{mine[0]['parameters']:,}"
                lines.append([NAMES[method], *cells, rates, size, str(len(mine))])
        for name in ("mean image", "known pixels", "linear"):
            seeds = {r["seed"]: r[name] for r in rows if r["setting"] == setting and name in r}
            if seeds:
                label = LABELS.get(name, name)
                lines.append([label, interval(list(seeds.values())), *[""] * 6, str(len(seeds))])
        head = ["PSNR in dB after steps", *map(str, STEPS), "rates of steps", "trained", "seeds"]
        table(head, lines)


def plot(options: argparse.Namespace) -> None:
    """Images, what was read of them, and what each arm shows; from `--keep`."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot as plt

    seed = options.seeds[0]
    data = pixels(options, seed)
    batch = next(iter(data.test_dataloader()))
    count, side = 6, data.size
    seen = known(torch.full_like(batch.images, float("nan")), batch)
    rows: list[tuple[str, torch.Tensor]] = [("image", batch.images), ("read", seen)]
    done = [r for r in read(options.out) if r["seed"] == seed and "test" in r]
    for method, how in ARMS.items():
        for row in (
            r for r in done if r["method"] == method and r["setting"] == setting_of(options)
        ):
            task = NeuralField(**how, omega=options.omega, step_lr=row["step_rate"], seed=seed)
            weights = torch.load(options.keep / f"{method}_{seed}.pt", weights_only=True)
            task.load_state_dict(weights)
            states = task.adapted(batch.context, batch.readings, (0, 10))
            for k in (0, 10):
                with torch.no_grad():
                    rows.append((f"{method}, {k} steps", task.shown(states[k], batch.grid)))
    figure, axes = plt.subplots(len(rows), count, figsize=(count * 0.8 + 1.6, len(rows) * 0.8))
    for line, (name, shown) in zip(axes, rows, strict=True):
        for i, axis in enumerate(line):
            picture = shown[i, :, 0].reshape(side, side).detach()
            axis.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="none")
            axis.set_facecolor("#d8c8a8")
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    figure.subplots_adjust(0.24, 0.01, 0.99, 0.99, 0.05, 0.05)
    figure.savefig(options.plot, metadata={"Date": None} if options.plot.suffix == ".svg" else None)


def setting_of(options: argparse.Namespace) -> str:
    return key(options, "", 0.0, 0)["setting"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("hyper_fields.jsonl"))
    parser.add_argument("--keep", type=Path, default=None, help="folder for trained weights")
    parser.add_argument("--dataset", default="mnist")
    parser.add_argument("--pool", type=int, default=2)
    parser.add_argument("--sensors", default="pixels", choices=["pixels", "radon"])
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--targets", type=int, default=98)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--batches", type=int, default=1000)
    parser.add_argument("--tests", type=int, default=200)
    parser.add_argument("--omega", type=float, default=10.0)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--methods", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--show", action="store_true")
    parser.add_argument("--plot", type=Path, default=None)
    options = parser.parse_args()
    if options.show:
        show(options.out)
        return
    if options.plot:
        plot(options)
        return
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    measure(options)


if __name__ == "__main__":
    main()
