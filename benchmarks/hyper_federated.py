"""Personalised federated learning: a network alone, one for all, and networks by hypernetworks.

Clients of two classes each; some take part in training, some do not. All methods have the same
clients, rounds, local steps and batches; a client that did not take part gets as many rounds as
another has had on average, where its method trains or fits. Rates are tuned for each method with
a seed that is not reported, by the mean accuracy on validation examples of clients that take part:
first the server's rate at the middle local rate (methods that have one), then the local rate.
FedAvg with tuning has rates of its own, chosen by the accuracy after tuning.

Results are added to a file of JSON lines as they come, what is there is not run again; `--show`
prints the tables. Intervals are Student's t over seeds (means over clients; 95 %).

    WSPACE_DATA=… python benchmarks/hyper_federated.py --out federated.jsonl --datasets mnist
    python benchmarks/hyper_federated.py --out federated.jsonl --show
"""

import argparse
import json
import logging
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import table
from lightning.pytorch import Trainer
from scipy import stats

from datasets_zoo.experiments.clients import Clients
from wspace.hyper.federated import LocalTraining, PeFLL, PFedHN, descriptors
from wspace.lit.hyper.federated import Federated
from wspace.lit.task import Optimization

IMAGES = {"digits": (1, 8, 1), "mnist": (1, 14, 2), "cifar10_16x16": (3, 16, 1)}
"""Channels, size, and the side of the squares of pixels that are averaged to get it."""
ARMS: dict[str, dict[str, Any]] = {
    "local only": {"method": "local"},
    "FedAvg": {"method": "fedavg"},
    "FedAvg + tuning": {"method": "fedavg"},
    "pFedHN": {"method": "pfedhn"},
    "PeFLL": {"method": "pefll"},
    "PeFLL, labels alone": {"method": "pefll", "descriptor": "labels"},
}
SERVER_RATES, LOCAL_RATES = (3e-4, 1e-3, 3e-3), (0.01, 0.03, 0.1)
TUNING_SEED = 1000
JUDGE = {"FedAvg + tuning": "tuned"}


def clients(options: argparse.Namespace, dataset: str, seed: int) -> Clients:
    made = Clients(
        dataset,
        pool=IMAGES[dataset][2],
        seen=options.seen,
        unseen=options.unseen,
        examples=options.examples,
        per_round=options.per_round,
        rounds=options.rounds,
        seed=seed,
    )
    made.setup()
    return made


def run(
    options: argparse.Namespace, dataset: str, arm: str, rates: tuple[float, float], seed: int
) -> dict[str, Any]:
    """One training run and everything that is measured after it."""
    data, (channels, size, _) = clients(options, dataset, seed), IMAGES[dataset]
    own = round(options.rounds * options.per_round / options.seen)
    task = Federated(
        **ARMS[arm],
        channels=channels,
        size=size,
        clients=options.seen,
        kernels=options.kernels,
        taps=options.taps,
        local=LocalTraining(steps=options.steps, lr=rates[1], batch_size=options.batch_size),
        tune=options.steps,
        new_rounds=own,
        optimization=Optimization(lr=rates[0], weight_decay=0.0),
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
    )
    start = time.process_time()
    trainer.fit(task, datamodule=data)
    spent = time.process_time() - start
    found = {k: float(v) for k, v in trainer.callback_metrics.items()}
    for part in trainer.test(task, datamodule=data, verbose=False) if seed != TUNING_SEED else []:
        found |= {k: float(v) for k, v in part.items()}
    return {
        **key(options, dataset, arm, rates, seed),
        "parameters": sum(p.numel() for p in task.method.target.parameters()),
        "trained": sum(p.numel() for p in task.parameters() if p.requires_grad),
        "bytes": task.traffic,
        "seconds": round(spent, 1),
        **found,
        **(correlations(task, data) if seed != TUNING_SEED else {}),
    }


@torch.no_grad()
def correlations(task: Federated, data: Clients) -> dict[str, Any]:
    """Spearman's rank correlation of distances of vectors and of label distributions."""
    every = data.clients
    if isinstance(task.method, PeFLL):
        v = descriptors(task.method.describe, every)
    elif isinstance(task.method, PFedHN):
        v = task.method.vectors
    else:
        return {}
    shares = torch.stack([c.shares(task.classes) for c in every[: len(v)]])
    apart, labels = torch.cdist(v, v), torch.cdist(shares, shares, p=1) / 2
    upper = torch.triu_indices(len(v), len(v), 1)
    new = upper[1] >= data.seen
    found = {"spearman": rank(apart, labels, upper)}
    if bool(new.any()):
        found["spearman_unseen"] = rank(apart, labels, upper[:, new])
    return found


def rank(a: torch.Tensor, b: torch.Tensor, pairs: torch.Tensor) -> float:
    x, y = (m[pairs[0], pairs[1]].numpy() for m in (a, b))
    return float(np.asarray(stats.spearmanr(x, y))[0])


# ------------------------------------------------------------------------- what is run


def key(
    options: argparse.Namespace, dataset: str, arm: str, rates: tuple[float, float], seed: int
) -> dict[str, Any]:
    names = ("seen", "unseen", "examples", "per_round", "rounds", "steps", "batch_size")
    names += ("kernels", "taps")
    setting = " ".join(f"{n}={getattr(options, n)}" for n in names)
    return {"dataset": dataset, "arm": arm, "rates": list(rates), "seed": seed, "setting": setting}


def read(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def ensure(options: argparse.Namespace, *what: Any) -> dict[str, Any]:
    """A result, of the file if it is there; arms that train alike share a run."""
    wanted = key(options, *what)
    row: dict[str, Any] = {}
    for known in read(options.out):
        if all(known[k] == v for k, v in wanted.items()):
            return known
        alike = ARMS[known["arm"]] == ARMS[wanted["arm"]]
        if alike and all(known[k] == v for k, v in wanted.items() if k != "arm"):
            row = {**known, **wanted}
    row = row or run(options, *what)
    with options.out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    shown = {k: round(v, 4) for k, v in row.items() if k.startswith(("val/", "test/"))}
    print(what, shown, f"{row['seconds']} s", file=sys.stderr, flush=True)
    return row


def tuned(options: argparse.Namespace, dataset: str, arm: str) -> tuple[float, float]:
    """Rates of the server and of clients, found with the number of clients that options say."""
    if options.tune_seen:
        counts = {"seen": options.tune_seen, "unseen": options.tune_unseen}
        options = argparse.Namespace(**{**vars(options), **counts})
    base = "PeFLL" if arm.startswith("PeFLL") else arm
    judge = f"val/{JUDGE.get(base, 'accuracy')}"
    servers = SERVER_RATES if ARMS[base]["method"] in {"pfedhn", "pefll"} else (1.0,)

    def best(tried: list[tuple[float, float]]) -> tuple[float, float]:
        rows = [ensure(options, dataset, base, rates, TUNING_SEED) for rates in tried]
        return max(zip(tried, rows, strict=True), key=lambda pair: pair[1][judge])[0]

    server, _ = best([(s, LOCAL_RATES[1]) for s in servers])
    return best([(server, rate) for rate in LOCAL_RATES])


def measure(options: argparse.Namespace) -> None:
    for dataset in options.datasets:
        for seed in options.seeds:
            for arm in options.arms:
                ensure(options, dataset, arm, tuned(options, dataset, arm), seed)


# -------------------------------------------------------------------------- what is shown


def interval(values: list[float], scale: float = 100.0) -> str:
    """Mean and half the width of the 95 % interval."""
    x = scale * np.asarray(values, float)
    if len(x) < 2:
        return f"{x.mean():.2f}"
    half = stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / len(x) ** 0.5
    return f"{x.mean():.2f} ± {half:.2f}"


def show(file: Path) -> None:
    rows = [r for r in read(file) if r["seed"] != TUNING_SEED]
    for dataset, setting in dict.fromkeys((r["dataset"], r["setting"]) for r in rows):
        print(f"\n### {dataset} ({setting})\n")
        lines: list[list[str]] = []
        correlated: list[list[str]] = []
        for arm in ARMS:
            mine = [
                r for r in rows if (r["dataset"], r["setting"], r["arm"]) == (dataset, setting, arm)
            ]
            if not mine:
                continue
            kind = JUDGE.get(arm, "accuracy")
            cells = [
                interval([r[f"test/{who}_{name}"] for r in mine])
                for who in ("seen", "unseen")
                for name in (kind, f"{kind}_masked", "tuned")
            ]
            rates = ", ".join(f"{x:g}" for x in mine[0]["rates"])
            sent = f"{mine[0]['bytes'][0] / 1000:.0f} + {mine[0]['bytes'][1] / 1000:.0f}"
            lines.append([arm, rates, *cells, sent, str(len(mine))])
            if "spearman" in mine[0]:
                pairs = [interval([r["spearman"] for r in mine], 1.0)]
                pairs += [interval([r["spearman_unseen"] for r in mine], 1.0)
                          if "spearman_unseen" in mine[0] else "–"]  # fmt: skip
                correlated.append([arm, *pairs])
        head = ["method", "rates", "seen, %", "masked", "after k steps"]
        head += ["unseen, %", "masked", "after k steps", "kB down + up", "seeds"]
        table(head, lines)
        print()
        table(["vectors of", "Spearman, all pairs", "pairs with an unseen client"], correlated)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("hyper_federated.jsonl"))
    parser.add_argument("--datasets", nargs="+", default=["mnist"], choices=list(IMAGES))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--seen", type=int, default=20)
    parser.add_argument("--unseen", type=int, default=5)
    parser.add_argument("--tune-seen", type=int, default=None, help="clients in tuning")
    parser.add_argument("--tune-unseen", type=int, default=5)
    parser.add_argument("--examples", type=int, default=100)
    parser.add_argument("--per-round", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--kernels", type=int, default=4)
    parser.add_argument("--taps", type=int, default=3)
    parser.add_argument("--show", action="store_true")
    options = parser.parse_args()
    if options.show:
        show(options.out)
        return
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    measure(options)


if __name__ == "__main__":
    main()
