"""Which augmentations help a metanet that reads weights? Classification of image networks.

One zoo, one split, one metanet and one number of epochs for all: only `data.augment` differs
(label smoothing, which is an option of the task, aside). For each number of training networks every
augmentation is trained with several seeds; the weights that are best on validation are tested.
Intervals are bootstrapped over test networks, for each run; the summary gives means over seeds and
the difference to no augmentation, seed by seed. The training networks are the same for all seeds.

    wspace zoo build image_inrs zoos/mnist_inr --set dataset=mnist count=14000
    python benchmarks/augment_quality.py zoos/mnist_inr --limits 1000 3000 10000 --epochs 80 30 9

Results are added to a file of JSON lines as they come, and those that it holds are not run again;
`--show` prints it as tables.
"""

import argparse
import json
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import machine, table
from lightning.pytorch import Callback, Trainer
from metanet_quality import FIXED, Best

from wspace.augment import (
    AlignedMixUp,
    Augment,
    Compose,
    Drop,
    MixUp,
    Noise,
    PermutedMixUp,
    Quantile,
    Rotate,
    SelfMixUp,
    Symmetry,
    Translate,
    Zoom,
)
from wspace.lit import Classification, Optimization, ZooDataModule

KEEP = ("permutation", "sign", "phase")
SMALL = (0.8, 1.0)
"""Bounds of the weight of a network itself, where others are to have small shares."""
AUGMENTATIONS: dict[str, Callable[[], list[Augment]]] = {
    "none": list,
    "symmetry": lambda: [Symmetry(KEEP)],
    "translate": lambda: [Translate(0.25)],
    "rotate": lambda: [Rotate(15)],
    "zoom": lambda: [Zoom(0.2)],
    "noise": lambda: [Noise(0.05)],
    "drop": lambda: [Drop(0.1)],
    "quantile": lambda: [Quantile(0.1)],
    "label smoothing": list,
    "mixup": lambda: [MixUp()],
    "mixup, weights only": lambda: [MixUp(targets="nearest")],
    "mixup, permuted": lambda: [PermutedMixUp(kinds=KEEP)],
    "mixup, aligned": lambda: [AlignedMixUp()],
    "mixup, self": lambda: [SelfMixUp()],
    "mixup, small shares": lambda: [MixUp(SMALL)],
    "mixup, permuted, small shares": lambda: [PermutedMixUp(SMALL, kinds=KEEP)],
    "mixup, aligned, small shares": lambda: [AlignedMixUp(SMALL)],
    "input maps": lambda: [Rotate(15), Zoom(0.2), Translate(0.25)],
    "combined": lambda: [Translate(0.25), Noise(0.05), Symmetry(KEEP), AlignedMixUp()],
    "translate, a little": lambda: [Translate(0.08)],
    "input maps, small": lambda: [Rotate(8), Zoom(0.08), Translate(0.08)],
    "small maps, then aligned, small shares": lambda: [
        *(Rotate(8), Zoom(0.08), Translate(0.08)),
        AlignedMixUp(SMALL),
    ],
    "aligned, small shares, half of networks": lambda: [Compose([AlignedMixUp(SMALL)], [0.5])],
}
"""What is done to training networks; the first is what the others are compared with."""

METANETS: dict[str, tuple[str, dict[str, Any], float]] = {
    "NFN": ("NFN", {"hidden": 16, "layers": 3}, 3e-3),
    "DWS": ("DWSNet", {"hidden": 16, "layers": 3}, 3e-3),
    "GMN": ("GraphMetanet", {"channels": 16, "layers": 2}, 4e-3),
    "GMN + probes": ("GraphMetanet", {"channels": 16, "layers": 2, "probes": 16}, 4e-3),
}
"""Name, class of `wspace.nn`, its options, and the learning rate."""


MEANS = ("accuracy", "accuracy_low", "accuracy_high", "last_loss", "cpu_minutes")
"""What is averaged over seeds."""


def task_of(metanet: str, augmentation: str) -> Classification:
    made, options, rate = METANETS[metanet]
    smoothing = 0.1 if augmentation == "label smoothing" else 0.0
    how = Optimization(lr=rate)
    return Classification(made, options, optimization=how, smoothing=smoothing)


def trained(
    options: argparse.Namespace, what: str, seed: int, limit: int, epochs: int
) -> dict[str, Any]:
    """Trains and tests with one augmentation; the figures."""
    torch.manual_seed(seed)
    data = ZooDataModule(
        options.zoo,
        batch_size=options.batch,
        limit=limit,
        augment=AUGMENTATIONS[what](),
        seed=FIXED,
    )
    data.setup("fit")
    data.seed = seed  # of the order and the augmentations; the choice of networks is made
    task = task_of(options.metanet, what)
    best = Best(task.monitor[0])
    callbacks: list[Callback] = [best]
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=max(1, epochs // 15),
        gradient_clip_val=1.0,
        callbacks=callbacks,
    )
    begin, spent = time.perf_counter(), time.process_time()
    trainer.fit(task, datamodule=data)
    spent = time.process_time() - spent
    last = float(trainer.callback_metrics.get("train/loss", float("nan")))
    if best.kept:
        task.load_state_dict(best.kept)
    found = trainer.test(task, datamodule=data, verbose=False)[0]
    return {
        "zoo": options.zoo.name,
        "metanet": options.metanet,
        "augmentation": what,
        "seed": seed,
        "train": limit,
        "test": len(data.parts["test"]),
        "epochs": epochs,
        "best_epoch": best.epoch,
        "validation": round(best.best, 5),
        "last_loss": round(last, 4),
        "cpu_minutes": round(spent / 60, 2),
        "minutes": round((time.perf_counter() - begin) / 60, 2),
    } | {key.removeprefix("test/"): round(value, 5) for key, value in found.items()}


def rows_of(files: list[Path]) -> list[dict[str, Any]]:
    lines = [x for f in files if f.exists() for x in f.read_text(encoding="utf-8").splitlines()]
    return [json.loads(line) for line in lines]


def show(rows: list[dict[str, Any]]) -> None:
    """Prints the results as one table for each metanet and number of training networks."""
    keys = sorted({(r["metanet"], r["train"], r["epochs"]) for r in rows})
    for key in keys:
        some = [r for r in rows if (r["metanet"], r["train"], r["epochs"]) == key]
        plain = {r["seed"]: r["accuracy"] for r in some if r["augmentation"] == "none"}
        print(f"\n### {key[0]}, {key[1]:,} training networks, {key[2]} epochs\n")
        lines = []
        for name in AUGMENTATIONS:
            mine = sorted((r for r in some if r["augmentation"] == name), key=lambda r: r["seed"])
            if not mine:
                continue
            means = [statistics.fmean(r[k] for r in mine) for k in MEANS]
            gains = [r["accuracy"] - plain[r["seed"]] for r in mine if r["seed"] in plain]
            lines.append([
                name, f"{means[0]:.4f} ({means[1]:.4f}–{means[2]:.4f})",
                " ".join(f"{r['accuracy']:.3f}" for r in mine),
                f"{statistics.fmean(gains):+.4f}" if gains else "",
                " ".join(f"{g:+.3f}" for g in gains),
                f"{means[3]:.2f}", f"{means[4]:.2f}",
            ])  # fmt: skip
        head = ["augmentation", "test accuracy, mean (and of its bounds)", "by seed",
                "gain", "by seed", "last loss", "CPU min"]  # fmt: skip
        table(head, lines)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("zoo", type=Path, help="folder of the zoo")
    parser.add_argument("--metanet", choices=METANETS, default="GMN + probes")
    parser.add_argument("--only", nargs="*", choices=AUGMENTATIONS, default=list(AUGMENTATIONS))
    parser.add_argument("--limits", nargs="*", type=int, default=[1000, 3000, 10000])
    parser.add_argument("--epochs", nargs="*", type=int, default=[80, 30, 9], help="each limit's")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path("augment_quality.jsonl"))
    parser.add_argument("--show", nargs="*", type=Path, help="print tables of these files only")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if len(options.limits) != len(options.epochs):
        parser.error("--epochs: one number for each limit")
    return options


def main() -> None:
    options = parsed()
    warnings.simplefilter("ignore")
    for part in ("pytorch", "fabric"):
        logging.getLogger(f"lightning.{part}").setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    print(f"# {(__doc__ or '').splitlines()[0]}\n\n{machine()}", flush=True)
    if options.show is not None:
        show(rows_of(options.show))
        return
    keys = ("metanet", "augmentation", "seed", "train", "epochs")
    done = {tuple(r[k] for k in keys) for r in rows_of([options.out])}
    for seed in options.seeds:
        for limit, epochs in zip(options.limits, options.epochs, strict=True):
            for what in options.only:
                if (options.metanet, what, seed, limit, epochs) in done:
                    continue
                found = trained(options, what, seed, limit, epochs)
                with options.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(found) + "\n")
                print(json.dumps(found), file=sys.stderr, flush=True)
    show(rows_of([options.out]))


if __name__ == "__main__":
    main()
