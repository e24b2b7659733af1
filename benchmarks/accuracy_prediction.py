"""How well do metanets predict a network's test accuracy from its weights?

The zoo is that of `datasets_zoo.digits`: classifiers of 8 × 8 digits with accuracies from chance to
0.95, kept in the temporary folder so that re-runs are quick. Every seed shuffles the networks
anew (70 % training, 10 % validation, 20 % test); a metanet is trained by AdamW on the binary
cross-entropy between its sigmoid and the accuracy, and the epoch that is best on validation is
judged. On "both", perceptrons and convolutional networks are mixed in every batch.

To add a metanet, add a line to `METANETS`.
"""

import statistics
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from harness import ROOT, finish, start, table
from scipy.stats import kendalltau
from torch import Tensor, nn
from torch.nn import functional as F

import wspace
from datasets_zoo.digits import ARCHITECTURES, Classifiers, digit_classifiers
from wspace.graph import ParameterGraph
from wspace.nn import (
    Baseline,
    DWSNet,
    FlatMLP,
    GraphMetanet,
    NeuralGraphGNN,
    ParameterDeepSets,
    ProbeOnly,
    Probes,
    ScaleGMN,
    StatNN,
)

SMALL = {"channels": 32, "layers": 3, "dropout": 0.1}

COUNT, EPOCHS, PATIENCE, BATCH = 400, 300, 40, 32
SHARES = (0.7, 0.1)  # training, validation; the rest is the test
EXAMPLE = torch.zeros(1, 1, 8, 8)


@dataclass
class Zoo:
    """Networks of one architecture as one graph, and their accuracies."""

    module: nn.Module
    graph: ParameterGraph
    accuracy: Tensor

    def rows(self, index: Tensor) -> ParameterGraph:
        return wspace.encode(
            self.graph.space, {name: x[index] for name, x in self.graph.values.items()}
        )


@dataclass
class Metanet:
    """A row of the table: `make` takes (zoo, out), and `mixed` says that any space will do."""

    make: Callable[[Zoo, int], nn.Module]
    mixed: bool = False
    rate: float = 2e-3
    epochs: int = 300


def probes(zoo: Zoo) -> Probes:
    return Probes(zoo.module, zoo.graph.space, count=32, example=EXAMPLE)


def dws(zoo: Zoo, out: int) -> nn.Module:
    net = DWSNet(zoo.graph.space, hidden=16, layers=3, out=out, dropout=0.1)
    return OnStates(net)


class OnStates(nn.Module):
    """A model of states, called on graphs."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, graph: ParameterGraph) -> Tensor:
        return self.net(dict(graph.values))


METANETS = {
    "FlatMLP": Metanet(lambda zoo, out: FlatMLP(zoo.graph.space, out, dropout=0.1)),
    "StatNN": Metanet(lambda zoo, out: StatNN(out, space=zoo.graph.space)),
    "StatNN, pooled": Metanet(lambda zoo, out: StatNN(out), mixed=True),
    "ParameterDeepSets": Metanet(lambda zoo, out: ParameterDeepSets(out), mixed=True),
    "ProbeOnly": Metanet(
        lambda zoo, out: ProbeOnly(zoo.module, zoo.graph.space, out, example=EXAMPLE)
    ),
    "DWSNet": Metanet(dws, rate=1e-3, epochs=40),
    "GMN": Metanet(lambda zoo, out: GraphMetanet(out, **SMALL), True, 1e-3, 40),
    "NG-GNN": Metanet(lambda zoo, out: NeuralGraphGNN(out, **SMALL), True, 1e-3, 40),
    "ScaleGMN": Metanet(lambda zoo, out: ScaleGMN(out, **SMALL), True, 1e-3, 40),
    "GMN + probes": Metanet(
        lambda z, out: GraphMetanet(out, probes=probes(z), **SMALL), False, 1e-3, 40
    ),
    "ScaleGMN + probes": Metanet(
        lambda z, out: ScaleGMN(out, probes=probes(z), **SMALL), False, 1e-3, 40
    ),
}


def load(architecture: str) -> Zoo:
    """The zoo of an architecture, from the cache if the recipe has not changed."""
    recipe = (ROOT / "datasets_zoo" / "digits.py").read_bytes()
    name = f"wspace-digits-{architecture}-{COUNT}-{zlib.crc32(recipe):08x}.pt"
    path = Path(tempfile.gettempdir()) / name
    if path.exists():
        state, meta = torch.load(path, weights_only=True)
        zoo = Classifiers(ARCHITECTURES[architecture](), state, meta)
    else:
        begin = time.perf_counter()
        zoo = digit_classifiers(COUNT, architecture=architecture)
        print(f"built {COUNT} × {architecture} in {time.perf_counter() - begin:.0f} s")
        torch.save((zoo.state, zoo.meta), path)
    space = wspace.trace(zoo.module, EXAMPLE)
    return Zoo(zoo.module, wspace.encode(space, zoo.state), zoo.meta["test_accuracy"])


def split(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    order = torch.randperm(count, generator=generator)
    first, second = (round(share * count) for share in (SHARES[0], sum(SHARES)))
    return order[:first], order[first:second], order[second:]


Batch = tuple[ParameterGraph | list[ParameterGraph], Tensor]


def batch(zoos: list[Zoo], indices: list[Tensor]) -> Batch:
    """Networks of every zoo (an only zoo: as one graph) and their accuracies, in one order."""
    graphs = [zoo.rows(index) for zoo, index in zip(zoos, indices, strict=True)]
    target = torch.cat([z.accuracy[i] for z, i in zip(zoos, indices, strict=True)])
    return graphs if len(graphs) > 1 else graphs[0], target


def predict(net: nn.Module, data: Batch) -> Tensor:
    net.eval()
    with torch.no_grad():
        out = net(data[0])[:, 0].sigmoid()
    net.train()
    return out


def fit(row: Metanet, zoos: list[Zoo], seed: int) -> dict[str, float]:
    """Trains one metanet on one split; its figures on the test networks."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    parts = [split(len(zoo.accuracy), generator) for zoo in zoos]
    valid, test = (batch(zoos, [p[k] for p in parts]) for k in (1, 2))
    net = row.make(zoos[0], 1)
    if isinstance(net, Baseline):
        net.fit_statistics(batch(zoos, [p[0] for p in parts])[0])
    optimizer = torch.optim.AdamW(net.parameters(), lr=row.rate, weight_decay=1e-2)
    begin, best, since, last, kept = time.perf_counter(), float("inf"), 0, 0, net.state_dict()
    steps = -(-sum(len(p[0]) for p in parts) // BATCH)
    for epoch in range(min(EPOCHS, row.epochs)):
        shuffled = [p[0][torch.randperm(len(p[0]), generator=generator)] for p in parts]
        for pieces in zip(*(s.tensor_split(steps) for s in shuffled), strict=True):
            graphs, target = batch(zoos, list(pieces))
            loss = F.binary_cross_entropy_with_logits(net(graphs)[:, 0], target)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
        error = float((predict(net, valid) - valid[1]).square().mean())
        if error < best:
            best, since, last = error, 0, epoch
            kept = {name: x.clone() for name, x in net.state_dict().items()}
        elif (since := since + 1) == PATIENCE:
            break
    net.load_state_dict(kept)
    out, target = predict(net, test), test[1]
    return {
        "r2": 1 - float((out - target).square().sum() / (target - target.mean()).square().sum()),
        "tau": float(kendalltau(out.numpy(), target.numpy()).statistic),
        "seconds": time.perf_counter() - begin,
        "parameters": sum(p.numel() for p in net.parameters()),
        "epoch": last,
    }


def spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} ± {deviation:.3f}"


def main() -> None:
    options = start(__doc__, rounds=3, only=True)
    loaded = {name: load(name) for name in ARCHITECTURES}
    figures: dict[str, dict[str, dict[str, float]]] = {}
    tasks = {name: [zoo] for name, zoo in loaded.items()} | {"both": list(loaded.values())}
    for task, zoos in tasks.items():
        accuracy = torch.cat([zoo.accuracy for zoo in zoos])
        low, middle, high = accuracy.quantile(torch.tensor([0.0, 0.5, 1.0])).tolist()
        print(
            f"\n## {task}: {len(accuracy)} networks, accuracy {low:.2f} {middle:.2f} {high:.2f}\n"
        )
        rows = []
        for name, row in METANETS.items():
            if (len(zoos) > 1 and not row.mixed) or (options.only and name not in options.only):
                continue
            runs = [fit(row, zoos, seed) for seed in range(options.rounds)]
            mean = {key: statistics.mean(run[key] for run in runs) for key in runs[0]}
            figures.setdefault(task, {})[name] = mean
            rows.append(
                [name, spread([run["r2"] for run in runs]), spread([run["tau"] for run in runs])]
                + [f"{mean['parameters']:.0f}", f"{mean['seconds']:.1f}", f"{mean['epoch']:.0f}"]
            )
        table(["metanet", "R²", "Kendall τ", "parameters", "seconds", "best epoch"], rows)
    finish(options, figures)


if __name__ == "__main__":
    main()
