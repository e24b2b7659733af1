"""Kernels from a static hypernetwork, beside the same network trained as it is.

``mnist``: the network of Ha et al. (2016), section 4.1; its second kernel, 12,544 weights, is made
from 4,244 parameters. ``cifar``: WRN-16-1 on 10,000 images of CIFAR-10 at 16 x 16 pixels; all
kernels of its blocks are made. Both arms have the same data, batches, epochs and optimiser (AdamW
without decay, its rate rising and falling once), which was not tuned for either. What is shown is
the test error after the last epoch.

Results are added to a file of JSON lines as they come, what is there is not run again; `--show`
prints the table. Intervals are 95 %, Student's t over seeds; that of the gap is paired by seed.
"""

import argparse
import json
import os
import time
import warnings
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from harness import machine, table
from lightning.pytorch import Trainer, seed_everything
from scipy.stats import t as student

from datasets_zoo.experiments.images import ImageData
from wspace.lit.hyper.classify import HyperClassifier
from wspace.lit.task import Optimization

NETWORKS = "datasets_zoo.experiments.networks"
CASES: dict[str, dict[str, Any]] = {
    "mnist": {
        "data": {"name": "mnist", "batch_size": 128, "validation": 5000, "pad": 1},
        "model": {
            "target": f"{NETWORKS}:two_convolutions",
            "head_options": {"embedding": 4},
            "select": ["3.weight"],
        },
        "lr": 2e-3,
        "epochs": 10,
    },
    "cifar": {
        "data": {
            "name": "cifar10_16x16",
            "batch_size": 128,
            "validation": 5000,
            "limit": 10_000,
            "pad": 2,
            "flip": True,
        },
        "model": {
            "target": f"{NETWORKS}:wide_resnet",
            "target_options": {"depth": 16, "widen": 1},
            "head_options": {"embedding": 64},
            "select": ["blocks.*.conv?.weight"],
        },
        "lr": 4e-3,
        "epochs": 10,
    },
}


def run(setting: dict[str, Any]) -> dict[str, Any]:
    """One training."""
    case, seed = CASES[setting["case"]], setting["seed"]
    seed_everything(seed, verbose=False)
    data = ImageData(**case["data"], seed=seed)
    model = HyperClassifier(
        **case["model"],
        method=setting["method"],
        optimization=Optimization(lr=case["lr"], weight_decay=0.0),
    )
    trainer = Trainer(
        max_epochs=setting["epochs"],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    start = time.process_time()
    trainer.fit(model, datamodule=data)
    seconds = time.process_time() - start
    validated = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
    tested = trainer.test(model, data, verbose=False)[0]
    return {
        **setting,
        "error": 1 - tested["test/accuracy"],
        "val_error": 1 - validated["val/accuracy"],
        **model.parameters_used(),
        "seconds": round(seconds, 1),
        "machine": machine(),
    }


def interval(values: list[float]) -> str:
    """Mean in per cent, with half the width of its interval."""
    if len(values) < 2:
        return f"{100 * values[0]:.2f}"
    half = float(student.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return f"{100 * fmean(values):.2f} ± {100 * half:.2f}"


def show(rows: list[dict[str, Any]]) -> None:
    groups: dict[tuple[str, int], dict[str, dict[int, dict[str, Any]]]] = {}
    for row in rows:
        group = groups.setdefault((row["case"], row["epochs"]), {})
        group.setdefault(row["method"], {})[row["seed"]] = row
    lines: list[list[str]] = []
    for (case, epochs), group in groups.items():
        plain = group.get("plain", {})
        for method, by_seed in group.items():
            some = next(iter(by_seed.values()))
            both = sorted(by_seed.keys() & plain.keys())
            gap = [by_seed[s]["error"] - plain[s]["error"] for s in both]
            lines.append(
                [
                    f"{case}, {epochs} epochs",
                    method,
                    str(len(by_seed)),
                    f"{some['total']:,}",
                    f"{some['made']:,} from {some['generator']:,}" if some["made"] else "",
                    interval([r["error"] for r in by_seed.values()]),
                    interval(gap) if gap and method != "plain" else "",
                    f"{fmean([r['seconds'] for r in by_seed.values()]):.0f}",
                ]
            )
    table(["case", "method", "seeds", "trained", "made", "error %", "gap, points", "s"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--file", type=Path, default=Path("hyper_static.jsonl"))
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="by default those of the case")
    parser.add_argument("--show", action="store_true")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="lightning")  # advice on workers and logging
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    done = [json.loads(line) for line in options.file.open()] if options.file.exists() else []
    if options.show:
        show(done)
        return
    for case in options.cases:
        epochs = options.epochs or CASES[case]["epochs"]
        for seed in options.seeds:
            for method in ("plain", "hyper"):
                setting = {"case": case, "method": method, "seed": seed, "epochs": epochs}
                if any(all(row[k] == v for k, v in setting.items()) for row in done):
                    continue
                row = run(setting)
                with options.file.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(*setting.values(), f"error {row['error']:.4f}", row["seconds"], flush=True)


if __name__ == "__main__":
    main()
