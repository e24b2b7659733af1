"""Do self-referential weights learn what labels mean? Few-shot episodes of MNIST, with controls.

Every episode gives three digits the labels 0, 1, 2 at random and shows five labelled images of
each, then a query; the loss is that of the query alone. Seven digits are for training; tests are on
the three others and on new images of the seven. `FakeSR`, the same network without modification of
itself, cannot do it: it must be at chance.

The LSTM is also given more steps. In the second experiment the labels change their meaning in the
middle of the episode (each digit gets another label than before): accuracy by the number of
examples seen since, of models trained as in the first experiment, and after some more steps of
training with such changes. (From scratch, 1,500 of them left SRWM and DeltaNet at chance.)

Models have nearly the same number of parameters and one feature extractor. The learning rate of
each is chosen from `RATES` by validation accuracy with a seed that is not tested, in the first
experiment; the second takes it over. Intervals are Student's over seeds. Results are added to a
file of JSON lines as they come, what is there is not run again; `--show` prints the tables.
"""

import argparse
import json
import logging
import time
import warnings
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from harness import machine, table
from lightning.pytorch import Trainer, seed_everything

from datasets_zoo.experiments.episodes import Episodes
from wspace.lit.hyper.fewshot import FewShot
from wspace.lit.task import Optimization

RATES, TUNING, SEEDS = (1e-3, 3e-3), 1000, (0, 1, 2)
ARMS: dict[str, dict[str, Any]] = {
    "srwm": {"width": 64, "feedforward": 128},
    "fake_sr": {"width": 64, "feedforward": 128},
    "delta_net": {"width": 64, "feedforward": 57},
    "lstm": {"width": 55},
}
NAMES = {"srwm": "SRWM", "fake_sr": "Fake SR", "delta_net": "DeltaNet", "lstm": "LSTM"}
PIXELS = "nearest neighbour of pixels"
SWITCHED = ("srwm", "delta_net")  # the others learn nothing in the first experiment
WAYS, SHOTS, BEFORE, AFTER = 3, 5, 3, 3
SHOWN = (0, 1, 2, 3, 6, 9)  # examples under the new labels
READ: dict[str, Any] = {}  # images are read once
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}


def data_of(options: argparse.Namespace, kind: str, seed: int, switch: int = AFTER) -> Episodes:
    data = Episodes(
        options.data,
        pool=2 if options.data == "mnist" else 1,
        ways=WAYS,
        shots=BEFORE if kind == "switch" else SHOTS,
        switch=switch if kind == "switch" else 0,
        batches=options.steps[kind] // options.epochs,
        eval_batches=options.eval_batches,
        seed=seed,
    )
    data.pools = READ
    data.setup()
    return data


def trained(
    options: argparse.Namespace, kind: str, arm: str, rate: float, seed: int
) -> dict[str, Any]:
    data = data_of(options, kind, seed)
    seed_everything(seed, verbose=False)
    image: Any = tuple(data.pools["train"].images.shape[1:])
    optimization = Optimization(lr=rate, weight_decay=0.0)
    model = FewShot(arm, ways=WAYS, image=image, optimization=optimization, **ARMS[arm])
    start, steps = time.thread_time(), options.steps[kind]
    early: dict[str, list[float]] = {}
    if kind == "switch":
        first = data_of(options, "labels", seed)
        trainer_of(options).fit(model, first)
        early = recovery(model.eval(), data, data_of(options, kind, seed, switch=0))
        model.train()
        steps += options.steps["labels"]
    trainer = trainer_of(options)
    trainer.fit(model, data)
    seconds = time.thread_time() - start
    row: dict[str, Any] = {
        "kind": kind,
        "arm": arm,
        "rate": rate,
        "seed": seed,
        "steps": steps,
        "data": options.data,
        "parameters": sum(p.numel() for p in model.parameters()),
        "in_sequence_model": sum(p.numel() for p in model.model.parameters()),
        "seconds": round(seconds, 1),
        "val": float(trainer.callback_metrics["val/accuracy"]),
    }
    if kind != "switch":
        found = trainer.test(model, data, verbose=False)[0]
        row |= {k.removeprefix("test/accuracy_"): v for k, v in found.items() if "accuracy" in k}
    else:
        before = data_of(options, kind, seed, switch=0)
        row |= recovery(model.eval(), data, before)
        row |= {f"{name}_untrained": curve for name, curve in early.items()}
    return row


def trainer_of(options: argparse.Namespace) -> Trainer:
    return Trainer(
        max_epochs=options.epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
        limit_val_batches=10,
        num_sanity_val_steps=0,
    )


@torch.no_grad()
def recovery(model: FewShot, data: Episodes, before: Episodes) -> dict[str, list[float]]:
    """Accuracy after 0 … examples under the new labels; at 0 the old labels still hold."""
    old = WAYS * BEFORE
    out: dict[str, list[float]] = {}
    for name, first in (("held_out", 0), ("seen", data.eval_batches)):
        right = torch.zeros(len(SHOWN))
        half = data.eval_batches // 2
        for number in range(first, first + half):
            for i, shown in enumerate(SHOWN):
                e = (data if shown else before).batch("test", 0, number)
                x, y = (torch.cat((t[:, : old + shown], t[:, -1:]), 1) for t in e[:2])
                answer = model(x, y)[:, -1].argmax(-1)
                right[i] += (answer == e.target).float().mean() / half
        out[name] = right.tolist()
    return out


def pixels(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """The label of the nearest image shown: what needs no training at all."""
    data = data_of(options, "labels", seed)
    row: dict[str, Any] = {"kind": "labels", "arm": PIXELS, "seed": seed, "data": options.data}
    row |= {"rate": 0.0, "steps": 0}
    for name, first in (("held_out", 0), ("seen", data.eval_batches)):
        right = []
        for number in range(first, first + data.eval_batches):
            e = data.batch("test", 0, number)
            x = e.images.flatten(2)
            near = torch.cdist(x[:, -1:], x[:, :-1])[:, 0].argmin(-1, keepdim=True)
            right.append(float((e.labels.gather(1, near)[:, 0] == e.target).float().mean()))
        row[name] = fmean(right)
    return row


class Results:
    """Rows of a file of JSON lines."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.file = options, options.out
        lines = self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else []
        self.rows = [r for r in map(json.loads, lines) if r["data"] == options.data]

    def find(self, kind: str, arm: str, rate: float, seed: int) -> dict[str, Any] | None:
        steps = self.options.steps[kind] if rate else 0
        steps += self.options.steps["labels"] if kind == "switch" else 0
        key = (kind, arm, rate, seed, steps)
        names = ("kind", "arm", "rate", "seed", "steps")
        return next((r for r in self.rows if tuple(r[n] for n in names) == key), None)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        with self.file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    def rate(self, arm: str) -> float | None:
        """The tuned learning rate, where all were tried."""
        found = {r: self.find("labels", arm, r, TUNING) for r in RATES}
        if not all(found.values()):
            return None
        return max(RATES, key=lambda r: (found[r] or {})["val"])


def run(options: argparse.Namespace) -> None:
    results = Results(options)
    for seed in SEEDS:
        if results.find("labels", PIXELS, 0.0, seed) is None:
            results.add(pixels(options, seed))
    plan = [("labels", arm, rate, TUNING) for arm in ARMS for rate in RATES]
    plan += [("labels", arm, None, seed) for seed in SEEDS for arm in ARMS]
    plan += [("switch", arm, None, seed) for seed in SEEDS for arm in SWITCHED]
    plan += [("longer", "lstm", None, seed) for seed in SEEDS]
    for kind, arm, fixed, seed in plan:
        rate = results.rate(arm) if fixed is None else fixed
        assert rate is not None
        if kind in options.kinds and results.find(kind, arm, rate, seed) is None:
            results.add(trained(options, kind, arm, rate, seed))


# --- tables ---------------------------------------------------------------------------------------


def interval(values: list[float]) -> str:
    """Mean and 95 % interval over seeds, in percent."""
    values = [100 * v for v in values]
    if len(values) < 2:
        return f"{values[0]:.1f} (one seed)" if values else "not run"
    half = STUDENT[len(values) - 1] * stdev(values) / sqrt(len(values))
    return f"{fmean(values):.1f} ± {half:.1f}"


def show(options: argparse.Namespace) -> None:
    results = Results(options)
    rows: list[list[object]] = []
    for kind, arm in (*(("labels", a) for a in ARMS), ("longer", "lstm"), ("labels", PIXELS)):
        rate = 0.0 if arm == PIXELS else results.rate(arm)
        found = [results.find(kind, arm, rate, s) for s in SEEDS] if rate is not None else []
        found = [f for f in found if f]
        if not found:
            continue
        trained = [found[0]["in_sequence_model"], f"{rate:g}"] if rate else ["", ""]
        seconds = f"{fmean(f['seconds'] for f in found):.0f}" if rate else ""
        both = [interval([f[k] for f in found]) for k in ("held_out", "seen")]
        name = NAMES.get(arm, arm) + (f", {options.steps[kind]} steps" if kind == "longer" else "")
        rows.append([name, *trained, *both, seconds, len(found)])
    print(f"\n## {WAYS} labels, {SHOTS} shots, {options.steps['labels']} steps\n")
    head = ["model", "parameters", "rate", "held-out digits, %", "seen digits, %", "s", "seeds"]
    table(head, rows)
    more = options.steps["switch"]
    print(f"\n## Recovery after the labels changed, {more} more steps with such changes\n")
    for name in ("seen", "held_out"):
        rows = []
        for arm in SWITCHED:
            rate = results.rate(arm) or -1.0
            found = [f for s in SEEDS if (f := results.find("switch", arm, rate, s))]
            for kind in ("_untrained", "") if found else ():
                curves = [f[name + kind] for f in found]
                cells = [interval([c[n] for c in curves]) for n in range(len(SHOWN))]
                trained = "without changes" if kind else "with changes"
                rows.append([NAMES[arm], trained, *cells, len(found)])
        print(f"\n{name.replace('_', '-')} digits, % right after so many examples:\n")
        table(["model", "trained", *map(str, SHOWN), "seeds"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("hyper_srwm.jsonl"))
    parser.add_argument("--data", default="mnist", help="mnist or digits (%(default)s)")
    parser.add_argument("--kinds", nargs="*", default=["labels", "switch", "longer"])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--switch-steps", type=int, default=700)
    parser.add_argument("--longer-steps", type=int, default=3000, help="of the LSTM alone")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--eval-batches", type=int, default=40, help="32 episodes each")
    parser.add_argument("--show", action="store_true")
    options = parser.parse_args()
    options.steps = {"labels": options.steps, "switch": options.switch_steps}
    options.steps["longer"] = options.longer_steps
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    print(machine(), flush=True)
    if not options.show:
        run(options)
    show(options)


if __name__ == "__main__":
    main()
