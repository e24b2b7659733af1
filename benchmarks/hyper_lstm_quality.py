"""Is a HyperLSTM a better language model than an LSTM, at equal steps and at equal size?

Every arm trains on the characters of tinyshakespeare with equal steps, batches, clipping and
schedule. Learning rates come from one grid: short runs with a seed of their own leave the two that
are best on validation text, full runs with the first seed leave one, which the other seeds take.
The last weights are judged on validation and test text. Results are added to a file of JSON lines
as they come; what is in it is not run again. `--show` prints it as tables.

    WSPACE_DATA=/work/shared/data python benchmarks/hyper_lstm_quality.py --out hyper_lstm.jsonl
"""

import argparse
import json
import logging
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from harness import machine, table
from lightning.pytorch import Callback, Trainer
from scipy.stats import t as student

from datasets_zoo.experiments.text import TextData
from wspace.lit.hyper.language import CharacterModel
from wspace.lit.task import Optimization

Row = dict[str, Any]
ARMS: dict[str, dict[str, Any]] = {
    "LSTM": {"cell": "lstm"},
    "LSTM, size of HyperLSTM": {"cell": "lstm", "hidden_size": 158},
    "LN-LSTM": {"cell": "layer_norm_lstm"},
    "HyperLSTM": {"cell": "hyper_lstm"},
    "LN-HyperLSTM": {"cell": "hyper_lstm_ln"},
    "HyperLSTM, noise": {"cell": "hyper_lstm", "noise": 0.01},
    "LN-LSTM, size of LN-HyperLSTM": {"cell": "layer_norm_lstm", "hidden_size": 158},
}
"""Options of `CharacterModel`; sizes are 128, 32 for the small cell, 8 for embeddings."""

GRID = (3e-3, 1e-2, 3e-2, 1e-1)
TUNING_SEED = 1000


class Curve(Callback):
    """Validation bits per character after every epoch."""

    def __init__(self) -> None:
        self.points: list[tuple[int, float]] = []

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.points.append((trainer.global_step, float(trainer.callback_metrics["val/bpc"])))


def trained(options: argparse.Namespace, arm: str, lr: float, seed: int, steps: int) -> Row:
    """Trains one model; its figures."""
    torch.manual_seed(seed)
    data = TextData(options.text, batch_size=options.batch, length=options.length)
    data.setup("fit")
    how = Optimization(lr=lr, weight_decay=0.0)
    model = CharacterModel(data.vocabulary, **ARMS[arm], optimization=how)
    curve = Curve()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        callbacks=[curve],
    )
    wall, cpu = time.perf_counter(), time.process_time()
    trainer.fit(model, datamodule=data)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    val = trainer.validate(model, datamodule=data, verbose=False)[0]
    found = {"val": round(val["val/bpc"], 5)}
    if seed != TUNING_SEED:
        test = trainer.test(model, datamodule=data, verbose=False)[0]
        found["test"] = round(test["test/bpc"], 5)
    return found | {
        "parameters": sum(p.numel() for p in model.parameters()),
        "wall_s": round(wall, 1),
        "cpu_s": round(cpu, 1),
        "curve": [(k, round(v, 4)) for k, v in curve.points],
    }


class Book:
    """The file of results."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.file = options, options.out
        text = self.file.read_text(encoding="utf-8") if self.file.exists() else ""
        self.rows: list[Row] = [json.loads(line) for line in text.splitlines()]

    def get(self, arm: str, lr: float, seed: int, steps: int) -> Row:
        """A result: as it stands in the file, or a new one."""
        o = self.options
        key = {"text": o.text, "batch": o.batch, "length": o.length, "arm": arm, "lr": lr}
        key |= {"seed": seed, "steps": steps, "model": ARMS[arm]}
        for row in self.rows:
            if key.items() <= row.items():
                return row
        row = key | trained(o, arm, lr, seed, steps) | {"threads": torch.get_num_threads()}
        self.rows.append(row)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), file=sys.stderr, flush=True)
        return row


def interval(values: list[float]) -> str:
    """Mean and 95 % interval of the mean (Student)."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.4f}"
    half = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.4f} ± {half:.4f}"


def short(book: Book, arm: str) -> dict[float, float]:
    """Validation bits per character of the short runs, by learning rate."""
    key = arm, TUNING_SEED, book.options.tuning_steps
    rows = [r for r in book.rows if (r["arm"], r["seed"], r["steps"]) == key]
    return {r["lr"]: r["val"] for r in rows}


def full(book: Book, arm: str, seed: int) -> dict[float, Row]:
    """Full runs with a seed, by learning rate."""
    key = arm, seed, book.options.steps
    return {r["lr"]: r for r in book.rows if (r["arm"], r["seed"], r["steps"]) == key}


def chosen(book: Book, arm: str) -> float | None:
    """The learning rate that was best in the full runs with the first seed; None without any."""
    found = full(book, arm, book.options.seeds[0])
    return min(found, key=lambda lr: found[lr]["val"]) if found else None


def show(book: Book) -> None:
    """Prints tables of what is there."""
    first = book.options.seeds[0]
    print("\n## Learning rates: validation bits per character, short run / full run\n")
    rows: list[list[object]] = []
    for arm in ARMS:
        some, whole = short(book, arm), full(book, arm, first)
        cells = [f"{some[lr]:.3f}" if lr in some else "" for lr in GRID]
        ends = [f" / {whole[lr]['val']:.3f}" if lr in whole else "" for lr in GRID]
        if some:
            rows.append([arm, *(a + b for a, b in zip(cells, ends, strict=True))])
    table(["model", *map(str, GRID)], rows)
    judged = {arm: final(book, arm) for arm in ARMS}
    print(f"\n## Bits per character after {book.options.steps} steps: mean and 95 % interval\n")
    rows = []
    for arm, found in judged.items():
        if found:
            one = next(iter(found.values()))
            values = [interval([r[part] for r in found.values()]) for part in ("val", "test")]
            cpu = statistics.median(r["cpu_s"] for r in found.values())
            size = f"{one['parameters']:,}"
            rows.append([arm, size, one["lr"], len(found), *values, f"{cpu:.0f}"])
    table(["model", "parameters", "lr", "seeds", "val", "test", "CPU s"], rows)
    print("\n## Test bits per character less those of another arm, seed by seed\n")
    rows = []
    for arm, found in judged.items():
        line: list[object] = [arm]
        for other in list(ARMS)[:3]:
            both = sorted(found.keys() & judged[other].keys())
            gaps = [found[s]["test"] - judged[other][s]["test"] for s in both]
            line.append(interval(gaps) if gaps and arm != other else "")
        if found:
            rows.append(line)
    table(["model", *(f"less {other}" for other in list(ARMS)[:3])], rows)


def final(book: Book, arm: str) -> dict[int, Row]:
    """Full runs of an arm at its learning rate, by seed."""
    lr = chosen(book, arm)
    some = {seed: full(book, arm, seed) for seed in book.options.seeds}
    return {seed: found[lr] for seed, found in some.items() if lr is not None and lr in found}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=ARMS, default=list(ARMS))
    parser.add_argument("--text", default="tinyshakespeare")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--tuning-steps", type=int, default=500)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("hyper_lstm.jsonl"))
    parser.add_argument("--show", action="store_true", help="print the tables only")
    return parser.parse_args()


def main() -> None:
    options = parsed()
    warnings.simplefilter("ignore")
    for part in ("pytorch", "fabric"):
        logging.getLogger(f"lightning.{part}").setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    print(f"# {(__doc__ or '').splitlines()[0]}\n\n{machine()}", flush=True)
    book = Book(options)
    if not options.show:
        for lr in GRID:
            for arm in options.only:
                book.get(arm, lr, TUNING_SEED, options.tuning_steps)
        first, *others = options.seeds
        for arm in options.only:
            found = short(book, arm)
            for lr in sorted(found, key=lambda lr: found[lr])[:2]:
                book.get(arm, lr, first, options.steps)
        for seed in others:
            for arm in options.only:
                lr = chosen(book, arm)
                assert lr is not None
                book.get(arm, lr, seed, options.steps)
    show(book)


if __name__ == "__main__":
    main()
