"""How well do metanets read networks? Every one on the same zoo, the same split, the same budget.

`inr` classifies image networks, `accuracy` predicts the test accuracy of classifiers. A zoo is
built first, by `wspace zoo build`. Every metanet trains for the same processor time on one thread,
at most `--epochs` passes: a few steps are timed and the schedule is fitted to the budget. The
weights that are best on validation are tested; intervals are bootstrapped over test networks.
Results are added to a file of JSON lines as they come, and `--show` prints it as tables.

To add a metanet, add a line to `METANETS`.
"""

import argparse
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import machine, table
from lightning.pytorch import Callback, Trainer
from torch import nn

from wspace.augment import Augment, Symmetry
from wspace.lit import Classification, Optimization, Prediction, Task, ZooDataModule

GRAPH = {"channels": 32, "layers": 3, "dropout": 0.1}
PROBED = GRAPH | {"probes": 64}
METANETS: dict[str, tuple[str, dict[str, Any], float]] = {
    "FlatMLP": ("FlatMLP", {"dropout": 0.1}, 1e-3),
    "StatNN": ("StatNN", {"hidden": [256, 256]}, 1e-3),
    "DeepSets": ("ParameterDeepSets", {}, 1e-3),
    "DWS": ("DWSNet", {"hidden": 32, "layers": 3, "dropout": 0.1}, 1e-3),
    "NFN": ("NFN", {"hidden": 32, "layers": 3, "dropout": 0.1}, 1e-3),
    "GMN": ("GraphMetanet", GRAPH, 2e-3),
    "NG-GNN": ("NeuralGraphGNN", GRAPH, 2e-3),
    "NG-T": ("NeuralGraphTransformer", GRAPH, 2e-3),
    "ScaleGMN": ("ScaleGMN", GRAPH, 2e-3),
    "probes only": ("ProbeOnly", {"count": 128, "hidden": [512, 256], "dropout": 0.2}, 1e-3),
    "probes of classes": (
        "ProbeOnly",
        {"count": 128, "hidden": [512, 256], "dropout": 0.2, "classes": True},
        1e-3,
    ),
    "GMN + probes": ("GraphMetanet", PROBED, 2e-3),
    "NG-GNN + probes": ("NeuralGraphGNN", PROBED, 2e-3),
    "NG-T + probes": ("NeuralGraphTransformer", PROBED, 2e-3),
    "ScaleGMN + probes": ("ScaleGMN", PROBED, 2e-3),
}
"""Name, class of `wspace.nn`, its options, and the learning rate."""

FIXED = 0
"""Seed of the split, and of which training networks are used: the same for all."""


class Best(Callback):
    """Keeps the weights that are best on validation, in memory."""

    def __init__(self, monitor: str) -> None:
        self.monitor, self.best, self.epoch = monitor, -float("inf"), 0
        self.kept: dict[str, torch.Tensor] = {}

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        value = float(trainer.callback_metrics.get(self.monitor, -float("inf")))
        if not trainer.sanity_checking and value > self.best:
            self.best, self.epoch = value, trainer.current_epoch
            self.kept = {n: x.clone() for n, x in pl_module.state_dict().items()}


def task_of(kind: str, name: str, inputs: Path | None = None) -> Task:
    made, given, rate = METANETS[name]
    options, how = dict(given), Optimization(lr=rate)
    if inputs is not None and ("probes" in options or made == "ProbeOnly"):
        options["probe_inputs"] = str(inputs)
    if kind == "inr":
        return Classification(made, options, optimization=how)
    return Prediction(made, options, optimization=how, rank_weight=0.1)


def data_of(options: argparse.Namespace, limit: int | None) -> ZooDataModule:
    augment: list[Augment] = [Symmetry(tuple(options.augment))] if options.augment else []
    return ZooDataModule(
        options.zoo,
        batch_size=options.batch,
        by=options.by,
        fractions=tuple(options.fractions) if options.fractions else None,
        held_out=dict([options.held_out]) if options.held_out else None,
        limit=limit,
        augment=augment,
        seed=FIXED,
        where=dict(options.where),
        split_name=options.split,
    )


def trainer_of(steps: int, callbacks: list[Callback], every: int, precision: Any) -> Trainer:
    return Trainer(
        precision=precision,
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=every,
        gradient_clip_val=1.0,
        callbacks=callbacks,
    )


def seconds_of(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def trained(options: argparse.Namespace, name: str, seed: int, limit: int | None) -> dict[str, Any]:
    """Trains and tests one metanet; its figures."""
    torch.manual_seed(seed)
    data, pilot = data_of(options, limit), 4
    data.setup("fit")
    how = options.precision
    what = options.kind, name, options.probe_inputs

    def timed(steps: int) -> float:
        one = trainer_of(steps, [], 10**6, how)
        return seconds_of(lambda: one.fit(task_of(*what), datamodule=data))

    timed(1)  # traces, and makes what is made once
    each = max(1e-4, (timed(1 + pilot) - timed(1)) / pilot)
    batches = len(data.sampler("train"))
    steps = max(batches, min(options.epochs * batches, int(60 * options.minutes / each)))
    torch.manual_seed(seed)
    task = task_of(*what)
    best = Best(task.monitor[0])
    trainer = trainer_of(steps, [best], max(1, steps // batches // 20), how)
    begin = time.perf_counter()
    spent = seconds_of(lambda: trainer.fit(task, datamodule=data))
    if best.kept:
        task.load_state_dict(best.kept)
    found = trainer.test(task, datamodule=data, verbose=False)[0]
    tested = len(data.parts["test"])
    if options.tested:
        data.parts["test"] = data.parts["test"].where(**dict(options.tested))
        some = trainer.test(task, datamodule=data, verbose=False)[0]
        found |= {f"some_{k.removeprefix('test/')}": x for k, x in some.items()}
        found["some"] = len(data.parts["test"])
    metanet: nn.Module = task.metanet if task.metanet is not None else nn.Identity()
    return {
        "kind": options.kind,
        "zoo": options.zoo.name,
        "metanet": name,
        "seed": seed,
        "train": len(data.parts["train"]),
        "test": tested,
        "parameters": sum(p.numel() for p in metanet.parameters() if p.requires_grad),
        "epochs": round(steps / batches, 1),
        "best_epoch": best.epoch,
        "cpu_minutes": round(spent / 60, 2),
        "minutes": round((time.perf_counter() - begin) / 60, 2),
        "held_out": options.held_out,
        "augment": options.augment,
        "precision": how,
        "probe_inputs": options.probe_inputs is not None,
    } | {key.removeprefix("test/"): round(value, 5) for key, value in found.items()}


def show(file: Path) -> None:
    """Prints the results in a file as tables, one for each zoo."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    keys = {(r["kind"], r["zoo"], str(r["held_out"]), str(r["augment"])) for r in rows}
    for key in sorted(keys):
        print(f"\n### {key[0]}, {key[1]}, held out {key[2]}, augmented {key[3]}\n")
        some = [
            r for r in rows if key == (r["kind"], r["zoo"], str(r["held_out"]), str(r["augment"]))
        ]
        metrics = ["accuracy"] if key[0] == "inr" else ["kendall", "r2", "rmse"]
        head = ["metanet", "networks", "test", *metrics, "parameters", "epochs", "CPU min", "seed"]
        lines = []
        for r in sorted(some, key=lambda r: (r["train"], r[metrics[0]], r["seed"])):
            values = [f"{r[m]:.4f} ({r[m + '_low']:.4f}–{r[m + '_high']:.4f})" for m in metrics]
            numbers = [f"{r['parameters']:,}", r["epochs"], r["cpu_minutes"], r["seed"]]
            lines.append([r["metanet"], r["train"], r["test"], *values, *numbers])
        table(head, lines)


def parsed() -> argparse.Namespace:
    def pair(text: str) -> tuple[str, Any]:
        key, _, value = text.partition("=")
        return key, int(value) if value.isdigit() else value

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kind", choices=("inr", "accuracy"))
    parser.add_argument("zoo", type=Path, help="folder of the zoo")
    parser.add_argument("--only", nargs="*", choices=METANETS, default=list(METANETS))
    parser.add_argument("--limits", nargs="*", type=int, default=[0], help="training networks")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--minutes", type=float, default=6, help="of processor time (%(default)s)")
    parser.add_argument("--epochs", type=int, default=200, help="at most (%(default)s)")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--by", help="column that no split divides")
    parser.add_argument("--fractions", nargs=3, type=float, help="train, val, test")
    parser.add_argument("--split", default="default", help="name of the split")
    parser.add_argument("--held-out", type=pair, help="column=value of the test networks")
    parser.add_argument("--where", nargs="*", type=pair, default=[], help="column=value kept")
    parser.add_argument("--tested", nargs="*", type=pair, help="column=value of a second test")
    parser.add_argument("--probe-inputs", type=Path, help="file of the probes' first values")
    parser.add_argument("--augment", nargs="*", help="symmetries to augment by")
    parser.add_argument("--out", type=Path, default=Path("metanet_quality.jsonl"))
    parser.add_argument("--precision", default="32-true", help="Lightning's (%(default)s)")
    parser.add_argument("--show", action="store_true", help="print the tables only")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if options.held_out:
        options.held_out = (options.held_out[0], [options.held_out[1]])
    return options


def main() -> None:
    options = parsed()
    warnings.simplefilter("ignore")
    for part in ("pytorch", "fabric"):
        logging.getLogger(f"lightning.{part}").setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    print(f"# {(__doc__ or '').splitlines()[0]}\n\n{machine()}", flush=True)
    if not options.show:
        for seed in options.seeds:
            for limit in options.limits:
                for name in options.only:
                    found = trained(options, name, seed, limit or None)
                    with options.out.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(found) + "\n")
                    print(json.dumps(found), file=sys.stderr, flush=True)
    show(options.out)


if __name__ == "__main__":
    main()
