"""Do networks prune better after a metanet has edited them? Beside sparse training of equal time.

    python benchmarks/prune_edited.py zoos/unit_effects

Networks are those of the part ``test`` of the zoo (`prune_predicted.py`), of each architecture the
best one by training accuracy, if that is at least 0.7, families in turn. Each is pruned as it is,
and after one of these, all with the same loss, batches and penalty
(`wspace.prune.learned.edited.concentration`, relative to the network as it was):

* ``edited``: `MetaPruner` fitted to this network alone, `--steps` steps;
* ``edited unseen``: one `MetaPruner` for all, fitted to networks of the part ``train``, other
  architectures; the network at hand is only edited, no loss of it is ever asked for;
* ``sparse training``: Adam on the weights with the same objective, for as much processor time as
  ``edited`` took, at the better of two rates (by its training objective);
* ``training``: the same without the penalty.

Statistics of BatchNorm are estimated anew, also for the network as it is. Then units of least
norm, relative to the mean of their group, are zeroed: 20, 40 or 60 % of all units. Means over
networks of the test accuracy, with bootstrapped 95 % intervals over architectures.
"""

import argparse
import collections
import json
import time
from pathlib import Path
from typing import Any

import torch
from harness import table
from prune_predicted import IMAGES, SHARES, Part, accuracy, interval, parts_of, removed
from torch import Tensor, nn
from torch.nn import functional as F

from wspace import zoo
from wspace.prune.learned.edited import (
    Editable,
    MetaPruner,
    asked,
    batch_statistics,
    concentration,
    refreshed,
    unit_norms,
)

KINDS = ("as it is", "edited", "edited unseen", "sparse training", "training")
BATCH, BATCHES = 128, 16
RATES = (1e-3, 5e-3)
LEARNED = 0.7


def loss(module: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def best(made: zoo.Zoo, split: str) -> list[tuple[Part, int]]:
    """The best network of every architecture that learned enough, families in turn."""
    accuracies, turns, out = made.table["train_accuracy"], collections.Counter[str](), []
    for part in parts_of(made, split, learned=True):
        k = max(range(len(part.rows)), key=lambda k: accuracies[part.rows[k]])
        if accuracies[part.rows[k]] >= LEARNED:
            out.append((turns[part.family], part, k))
            turns[part.family] += 1
    return [(part, k) for _, part, k in sorted(out, key=lambda item: item[0])]


def editable(part: Part, k: int) -> Editable:
    module = part.architecture.module(device="cpu")
    module.load_state_dict({n: x[k] for n, x in part.measured.states.items()}, strict=False)
    x, y = (z[: BATCH * BATCHES] for z in IMAGES(part.dataset)[:2])
    batches = [*zip(x.split(BATCH), y.split(BATCH), strict=True)]
    return Editable(module, part.measured.space, batches, loss)


def trained(net: Editable, strength: float, rate: float, seconds: float) -> tuple[Any, float]:
    """Sparse training of the weights themselves, for so many seconds; its last objectives."""
    weights = {k: x.detach().clone().requires_grad_() for k, x in net.module.named_parameters()}
    before = float(concentration({k: x.detach() for k, x in weights.items()}, net.space))
    optimizer, start, step = torch.optim.Adam(weights.values(), rate), time.process_time(), 0
    history = []
    while time.process_time() - start < seconds:
        with batch_statistics(net.module):
            total = asked(net, weights, net.batches[step % len(net.batches)])
        total = total + strength * concentration(weights, net.space) / before
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        history.append(float(total.detach()))
        step += 1
    state = dict(net.module.state_dict()) | {k: x.detach() for k, x in weights.items()}
    last = history[-len(net.batches) :]
    return refreshed(net.module, state, net.batches), sum(last) / len(last)


def variants(net: Editable, shared: MetaPruner, options: argparse.Namespace) -> dict[str, Any]:
    out: dict[str, Any] = {"as it is": refreshed(net.module, net.module.state_dict(), net.batches)}
    start = time.process_time()
    own = MetaPruner(strength=options.strength, learning_rate=options.rate)
    own.fit([net], steps=options.steps)
    out["edited"] = own.edit(net.module, net.space, net.batches)
    seconds = time.process_time() - start
    out["edited unseen"] = shared.edit(net.module, net.space, net.batches)
    for kind, strength in (("sparse training", options.strength), ("training", 0.0)):
        runs = [trained(net, strength, rate, seconds) for rate in RATES]
        out[kind] = min(runs, key=lambda run: run[1])[0]
    out["seconds"] = seconds
    return out


def judged(part: Part, k: int, net: Editable, state: dict[str, Tensor]) -> list[float]:
    """Accuracies as it is and pruned, and how concentrated the norms are."""
    space = part.measured.space
    one = {n: state[n][None] for n in part.measured.states}
    here = part._replace(measured=type(part.measured)(space, one, part.measured.effects))
    norms = unit_norms({n: x[0].double() for n, x in one.items()}, space)
    scores = {n: x / x.mean() for n, x in norms.items()}
    net.module.eval()
    shots = [accuracy(here, 0, net.module, removed(scores, s)) for s in SHARES]
    whole = accuracy(here, 0, net.module)
    return [whole, *shots, float(concentration({n: x[0] for n, x in one.items()}, space))]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("zoo", type=Path)
    options.add_argument("--networks", type=int, default=8)
    options.add_argument("--steps", type=int, default=100)
    options.add_argument("--shared-steps", type=int, default=300)
    options.add_argument("--strength", type=float, default=1.0)
    options.add_argument("--rate", type=float, default=1e-3, help="of the metanets")
    options.add_argument("--json", type=Path)
    chosen = options.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    made = zoo.open(chosen.zoo)
    seen = [editable(part, k) for part, k in best(made, "train")]
    shared, start = (
        MetaPruner(strength=chosen.strength, learning_rate=chosen.rate),
        time.process_time(),
    )
    history = shared.fit(seen, steps=chosen.shared_steps)
    n = len(seen)
    ends = [[sum(c) / n for c in zip(*part, strict=True)] for part in (history[:n], history[-n:])]
    print(f"shared: {n} networks, {time.process_time() - start:.0f} s, loss, penalty", ends)
    records: list[dict[str, Any]] = []
    for number, (part, k) in enumerate(best(made, "test")):
        if len(records) >= len(KINDS) * chosen.networks:
            break
        net = editable(part, k)
        found = variants(net, shared, chosen)
        about = {"family": part.family, "architecture": number, "seconds": found["seconds"]}
        for kind in KINDS:
            row = judged(part, 0, net, found[kind])
            records.append({**about, "kind": kind, "row": row})
        print(part.family, part.dataset, f"{found['seconds']:.1f} s", flush=True)
        if chosen.json:
            chosen.json.write_text("\n".join(json.dumps(r) for r in records))
    whole = {r["architecture"]: r["row"] for r in records if r["kind"] == "as it is"}
    head = ["", "0 %", *[f"{100 * s:.0f} %" for s in SHARES], "evenness of norms"]
    print(f"\n{len(whole)} networks, one of each architecture; test accuracy\n")
    for less in (False, True):
        rows = []
        for kind in KINDS:
            some = [r for r in records if r["kind"] == kind]
            rows.append([kind])
            for i in range(len(head) - 1):
                base = {a: row[i] * less for a, row in whole.items()}
                values = [(r["architecture"], r["row"][i] - base[r["architecture"]]) for r in some]
                rows[-1].append(interval(values))
        table(head, rows)
        print("\nless the network as it is\n" if not less else "")


if __name__ == "__main__":
    main()
