"""Tasks one after another: what a hypernetwork remembers, on split MNIST with known tasks.

Five tasks of two digits, a perceptron of two hidden layers of 100 (89,610 weights), 2,000 steps of
32 images a task, Adam. The hypernetwork has fewer parameters than the network. Arms: its head makes
chunks side by side or one after another, the latter with the penalty on weights, on hidden states,
or elastic weight consolidation of the generator; no penalty; elastic weight consolidation of the
plain network; all tasks at once. λ of elastic weight consolidation and β are swept with a seed of
their own (`--sweep`), by a tenth of the training images that is put aside; shown too.

Results are added to a file of JSON lines as they come, what is there is not run again; `--show`
prints the tables. Intervals are 95 %, Student's t over seeds.
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

from datasets_zoo.experiments.split import SplitTasks
from wspace.lit.hyper.continual import Continual

TUNING_SEED = 1000
CHUNKED = {"chunk": 8000, "hidden": [10, 10], "embedding": 32}
RECURRENT = {"chunk": 8000, "hidden": 9, "embedding": 32}
KEPT = {"beta": 0.01, "targets": "stored"}
ARMS: dict[str, dict[str, Any]] = {
    "chunked": {"method": "chunked", "head_options": CHUNKED, **KEPT},
    "chunked, lookahead": {"method": "chunked", "head_options": CHUNKED, **KEPT, "ahead": True},
    "no penalty": {"method": "finetune", "head_options": CHUNKED},
    "EWC": {"method": "ewc", "ewc": 1e3},
    "EWC, online": {"method": "ewc", "ewc": 1e3, "online": True},
    "plain, no penalty": {"method": "ewc", "ewc": 0.0},
    "joint": {"method": "joint"},
    "recurrent": {"method": "recurrent", "head_options": RECURRENT, **KEPT},
    "recurrent, states": {
        "method": "recurrent",
        "head_options": RECURRENT,
        **KEPT,
        "penalty": "states",
    },
    "recurrent, EWC": {"method": "recurrent", "head_options": RECURRENT, "penalty": "ewc"},
}
BETAS = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)
LAMBDAS = (1e1, 1e2, 1e3, 1e4, 1e5, 1e6)


def settings(arm: str, seed: int, steps: int, **more: Any) -> dict[str, Any]:
    model = {"target_options": {"inputs": 784, "hidden": [100, 100]}, **ARMS[arm], **more}
    return {"arm": arm, "seed": seed, "steps": steps, "model": model}


def run(setting: dict[str, Any]) -> dict[str, Any]:
    """One training; accuracies are of the test images."""
    seed_everything(setting["seed"], verbose=False)
    joint = setting["model"]["method"] == "joint"
    data = SplitTasks(
        "mnist",
        steps=setting["steps"],
        joint=joint,
        validation=setting.get("validation", 0.0),
        seed=setting["seed"],
    )
    task = Continual(**setting["model"])
    trainer = Trainer(
        max_epochs=5,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    start = time.process_time()
    trainer.fit(task, datamodule=data)
    seconds = time.process_time() - start
    drift = float(trainer.callback_metrics.get("val/drift", torch.tensor(torch.nan)))
    tested = {
        k.removeprefix("test/"): v for k, v in trainer.test(task, data, verbose=False)[0].items()
    }
    return {
        **setting,
        "matrix": task.matrix.tolist(),
        "mean": float(task.matrix[-1].mean()) if setting.get("validation") else tested["mean"],
        "forgetting": 0.0 if joint else task.forgetting(),
        "by_entropy": tested["mean_by_entropy"],
        "task_found": tested["task_found"],
        "drift": drift,
        "parameters": sum(p.numel() for p in task.network.parameters()),
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
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        model = row["model"]
        label = row["arm"]
        if row["seed"] == TUNING_SEED:
            named = {"beta": model.get("beta"), "lambda": model.get("ewc")}
            told = [f"{name} {x:g}" for name, x in named.items() if x is not None]
            label += f", {', '.join(told)} (tuning seed, validation)"
        groups.setdefault(f"{label}, {row['steps']} steps", []).append(row)
    lines = [
        [
            label,
            str(len(group)),
            f"{group[0]['parameters']:,}",
            *[interval([r[k] for r in group]) for k in ("mean", "forgetting", "by_entropy")],
            f"{fmean([r['drift'] for r in group]):.4f}",
            f"{fmean([r['seconds'] for r in group]):.0f}",
        ]
        for label, group in groups.items()
    ]
    head = ["arm", "seeds", "parameters", "mean %", "forgetting %", "by entropy %", "drift", "s"]
    table(head, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--file", type=Path, default=Path("hyper_continual.jsonl"))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--sweep", choices=("beta", "lambda"))
    parser.add_argument("--show", action="store_true")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="lightning")  # advice on workers and logging
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    done = [json.loads(line) for line in options.file.open()] if options.file.exists() else []
    if options.show:
        show(done)
        return
    values = {"beta": ("beta", BETAS), "lambda": ("ewc", LAMBDAS)}
    if options.sweep:
        name, swept = values[options.sweep]
        wanted = [
            {**settings(a, TUNING_SEED, options.steps, **{name: x}), "validation": 0.1}
            for x in swept
            for a in options.arms
        ]
    else:
        wanted = [settings(a, s, options.steps) for s in options.seeds for a in options.arms]
    for setting in wanted:
        if any(all(row.get(k) == v for k, v in setting.items()) for row in done):
            continue
        row = run(setting)
        with options.file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(
            row["arm"],
            row["seed"],
            setting["model"],
            f"{row['mean']:.4f}",
            row["seconds"],
            flush=True,
        )


if __name__ == "__main__":
    main()
