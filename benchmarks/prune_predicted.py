"""How well does importance predicted from weights rank units, on architectures it never saw?

    WSPACE_DATA=images wspace zoo build unit_effects zoos/unit_effects --workers 2
    python benchmarks/prune_predicted.py zoos/unit_effects --train predictor.safetensors
    python benchmarks/prune_predicted.py zoos/unit_effects --predictor predictor.safetensors

The first trains a predictor on the part ``train`` of the zoo; the second judges it, and simpler
importance, on the part ``test``: residual networks and networks wider or deeper than all of
training. Two questions. *Ranking*: Spearman's correlation between importance and the measured
effect, over all units of a network (global scope) and inside its groups of at least 8 units (mean).
*One shot*: test accuracy after the least important 20, 40 or 60 % of all units are zeroed, at most
80 % of a group, without fine-tuning. Networks that never learned are left out: those of an accuracy
under 0.2 (chance is 0.1), or with a mean effect below 0.002. Means over networks with bootstrapped
95 % intervals; architectures are drawn, and of each all its networks (here two at most).

``Taylor`` sees the 512 training images on which the effects were measured, and their labels;
``effect`` is the measured effect itself, the best that judging units one by one can do, in one shot
by no means the best. Everything else sees weights only.
"""

import argparse
import collections
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from harness import table
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

from datasets_zoo.pruning import UnitEffects, effects_of
from wspace import zoo
from wspace.action import shape_of
from wspace.prune.learned.effects import strips
from wspace.prune.learned.learning import Learning, Measured, learn
from wspace.prune.learned.predicted import MeanField, Predicted
from wspace.prune.learned.predictor import UnitPredictor, save_predictor
from wspace.prune.restriction import prunable
from wspace.space import WeightSpace
from wspace.zoo.architecture import Architecture

Scores = dict[str, Tensor]
SHARES = (0.2, 0.4, 0.6)
MOST = 0.8
LEAST_ACCURACY, LEAST_EFFECT = 0.2, 2e-3
WIDE = 8
JUDGED = 1000


class Part(NamedTuple):
    """Networks of one architecture and part, and their rows in the zoo."""

    architecture: Architecture
    measured: Measured
    rows: list[int]
    family: str
    dataset: str


def parts_of(made: zoo.Zoo, split: str, *, learned: bool) -> list[Part]:
    """Networks of a split by architecture and data set."""
    columns, found = made.table, collections.defaultdict[Any, list[int]](list)
    for i in range(len(made)):
        if columns["split"][i] == split:
            found[made.kind[i], columns["dataset"][i]].append(i)
    out: list[Part] = []
    for (kind, dataset), rows in found.items():
        effects = [effects_of(columns["effects"][i]) for i in rows]
        means = [torch.cat([x.flatten() for x in e.values()]).clamp(min=0).mean() for e in effects]
        good = [
            k
            for k, i in enumerate(rows)
            if means[k] > LEAST_EFFECT
            and (not learned or columns["test_accuracy"][i] >= LEAST_ACCURACY)
        ]
        if not good:
            continue
        states = [made[rows[k]][1] for k in good]
        stacked = {n: torch.stack([s[n] for s in states]) for n in states[0]}
        all_effects = {n: torch.stack([effects[k][n] for k in good]) for n in effects[0]}
        family = str(columns["family"][rows[0]])
        networks = Measured(made.spaces[kind], stacked, all_effects)
        places = [rows[k] for k in good]
        out.append(Part(made.architectures[kind], networks, places, family, str(dataset)))
    return out


# ------------------------------------------------------------------------- importance


def slots(space: WeightSpace, values: dict[str, Tensor], name: str) -> list[Tensor]:
    """For every place of a group in a parameter the sums of values over all else, ``(units,)``."""
    size, out = torch.Size(shape_of(space.all_groups[name], space)).numel(), []
    for parameter, places in strips(space, space.all_groups[name]).items():
        x = values[parameter].double()
        for numbers in places:
            which = numbers.expand(x.shape).flatten()
            known = which >= 0
            zero = torch.zeros(size, dtype=torch.float64)
            out.append(zero.index_add(0, which[known], x.flatten()[known]))
    return out


def over_groups(space: WeightSpace, one: Callable[[str], Tensor]) -> Scores:
    return {n: one(n).reshape(shape_of(g, space)) for n, g in prunable(space).items()}


def magnitude(p: int, *, relative: bool) -> Callable[..., Scores]:
    """Norm of everything that belongs to a unit; over the group's mean if relative."""

    def scores(part: Part, k: int, module: nn.Module) -> Scores:
        del module
        powers = {n: x[k].abs() ** p for n, x in part.measured.states.items()}

        def one(name: str) -> Tensor:
            norm = torch.stack(slots(part.measured.space, powers, name)).sum(0) ** (1 / p)
            return norm / norm.mean() if relative else norm

        return over_groups(part.measured.space, one)

    return scores


def taylor(part: Part, k: int, module: nn.Module) -> Scores:
    """Sum of |weight × gradient| over everything that belongs to a unit."""
    del k
    x, y = IMAGES(part.dataset)[:2]
    loss = F.cross_entropy(module(x[:512]), y[:512])
    named = dict(module.named_parameters())
    slopes = torch.autograd.grad(loss, [*named.values()])
    products = {n: (w * g).detach().abs() for (n, w), g in zip(named.items(), slopes, strict=True)}
    return over_groups(
        part.measured.space,
        lambda name: torch.stack(slots(part.measured.space, products, name)).sum(0),
    )


def uniform(part: Part, k: int, module: nn.Module) -> Scores:
    del module
    generator = torch.Generator().manual_seed(part.rows[k])
    return {
        n: torch.rand(x[k].shape, generator=generator) for n, x in part.measured.effects.items()
    }


def measured(part: Part, k: int, module: nn.Module) -> Scores:
    del module
    return {n: x[k] for n, x in part.measured.effects.items()}


def mean_field(part: Part, k: int, module: nn.Module) -> Scores:
    """The effect that `unit_features` estimates, without anything learned."""
    del k
    return MeanField()(module, part.measured.space)


def predicted(file: str) -> Callable[..., Scores]:
    importance = Predicted(file)
    return lambda part, k, module: importance(module, part.measured.space)


# ----------------------------------------------------------------------------- judging


def IMAGES(dataset: str) -> tuple[Tensor, ...]:  # noqa: N802
    return UnitEffects().images(dataset)


def ranked(scores: Scores, effects: Scores) -> tuple[float, float]:
    """Spearman's correlation over all units, and its mean inside wide groups."""
    names = [*effects]
    every = [torch.cat([x[n].flatten() for n in names]) for x in (scores, effects)]
    inside = [
        spearmanr(scores[n].flatten(), effects[n].flatten())[0]
        for n in names
        if effects[n].numel() >= WIDE and scores[n].std() > 0 and effects[n].std() > 0
    ]
    return float(spearmanr(*every)[0]), float(np.mean(inside)) if inside else float("nan")


def removed(scores: Scores, share: float) -> Scores:
    """The least important units, true where removed; at least one of a group stays, and a fifth."""
    rows = []
    for name, x in scores.items():
        order = x.flatten().argsort()
        most = min(x.numel() - 1, int(MOST * x.numel()))
        rows += [(float(x.flatten()[u]), name, int(u)) for u in order[:most]]
    total = sum(x.numel() for x in scores.values())
    out = {n: torch.zeros(x.numel(), dtype=torch.bool) for n, x in scores.items()}
    for _, name, unit in sorted(rows)[: round(share * total)]:
        out[name][unit] = True
    return out


@torch.no_grad()
def accuracy(part: Part, k: int, module: nn.Module, gone: Scores | None = None) -> float:
    """Test accuracy with the units of `gone` zeroed."""
    space = part.measured.space
    state = {n: x[k].clone() for n, x in part.measured.states.items()}
    for name, mask in (gone or {}).items():
        for parameter, places in strips(space, space.all_groups[name]).items():
            for numbers in places:
                zero = (numbers >= 0) & mask[numbers.clamp(min=0)]
                state[parameter] = state[parameter].masked_fill(zero, 0)
    x, y = (z[:JUDGED] for z in IMAGES(part.dataset)[2:])
    answers = torch.func.functional_call(module, state, (x,))
    return float((answers.argmax(-1) == y).float().mean())


def judge(
    parts: list[Part], kinds: dict[str, Callable[..., Scores]], most: int
) -> list[dict[str, Any]]:
    """One record for every network, at most so many of an architecture, and kind of importance."""
    out: list[dict[str, Any]] = []
    for number, part in enumerate(parts):
        module = part.architecture.module(device="cpu")
        for k, row in enumerate(part.rows[:most]):
            state = {n: x[k] for n, x in part.measured.states.items()}
            module.load_state_dict(state, strict=False)
            about = {"family": part.family, "architecture": number, "network": row}
            whole = accuracy(part, k, module)
            for kind, importance in kinds.items():
                scores = importance(part, k, module)
                both = ranked(scores, measured(part, k, module))
                shots = [accuracy(part, k, module, removed(scores, s)) for s in SHARES]
                out.append({**about, "kind": kind, "rank": both, "shots": [whole, *shots]})
    return out


def interval(values: list[tuple[int, float]]) -> str:
    """Mean over networks, and its 95 % interval: architectures are drawn 2,000 times."""
    by: dict[int, list[float]] = collections.defaultdict(list)
    for architecture, value in values:
        if np.isfinite(value):
            by[architecture].append(value)
    sums = np.array([(sum(v), len(v)) for v in by.values()])
    if not len(sums):
        return "–"
    draws = np.random.default_rng(0).integers(len(sums), size=(2000, len(sums)))
    means = sums[draws, 0].sum(1) / sums[draws, 1].sum(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return f"{sums[:, 0].sum() / sums[:, 1].sum():.3f} ({low:.3f}–{high:.3f})"


def show(records: list[dict[str, Any]], base: str) -> None:
    """Prints the tables; differences are to `base`, network by network."""
    kinds = list(dict.fromkeys(r["kind"] for r in records))
    families = list(dict.fromkeys(r["family"] for r in records))
    of = {kind: [r for r in records if r["kind"] == kind] for kind in kinds}

    def cell(kind: str, read: Callable[[dict[str, Any]], float], family: str = "") -> str:
        some = [r for r in of[kind] if not family or r["family"] == family]
        return interval([(r["architecture"], read(r)) for r in some])

    n = {f: sum(r["family"] == f for r in of[kinds[0]]) for f in families}
    print(
        f"{sum(n.values())} networks of {len({r['architecture'] for r in records})} architectures"
    )
    head = ["importance", "all units", "inside groups", f"all units, less {base}"]
    ours = {r["network"]: r for r in of[base]}
    rows = [
        [
            kind,
            cell(kind, lambda r: r["rank"][0]),
            cell(kind, lambda r: r["rank"][1]),
            cell(kind, lambda r: r["rank"][0] - ours[r["network"]]["rank"][0]),
        ]
        for kind in kinds
    ]
    print("\nSpearman's correlation with the measured effect\n")
    table(head, rows)
    print("\nthe same by family, all units\n")
    rows = [[k, *[cell(k, lambda r: r["rank"][0], f) for f in families]] for k in kinds]
    table(["importance", *[f"{f} ({n[f]})" for f in families]], rows)
    print("\ntest accuracy after pruning in one shot\n")
    shots = [[k, *[cell(k, lambda r, i=i: r["shots"][i]) for i in range(4)]] for k in kinds]
    table(["importance", "0 %", *[f"{100 * s:.0f} %" for s in SHARES]], shots)
    print(f"\nthe same, less {base}, network by network\n")
    rows = [
        [
            k,
            *[
                cell(k, lambda r, i=i: r["shots"][i] - ours[r["network"]]["shots"][i])
                for i in range(1, 4)
            ],
        ]
        for k in kinds
    ]
    table(["importance", *[f"{100 * s:.0f} %" for s in SHARES]], rows)


def train(made: zoo.Zoo, options: argparse.Namespace) -> None:
    """Trains a predictor and writes it."""
    parts = parts_of(made, "train", learned=False)
    torch.manual_seed(options.seed)
    predictor = UnitPredictor(channels=options.channels, layers=options.layers)
    learning = Learning(options.steps, weight_decay=options.weight_decay, caution=options.caution)
    start = time.process_time()
    generator = torch.Generator().manual_seed(options.seed)
    losses = learn(predictor, [p.measured for p in parts], learning, generator=generator)
    card = {
        "data": "zoo unit_effects, part train",
        "recipe": made.header.recipe,
        "networks": sum(p.measured.count for p in parts),
        "architectures": len(parts),
        "learning": vars(learning),
        "seed": options.seed,
        "seconds": round(time.process_time() - start),
        "loss": round(float(np.mean(losses[-100:])), 4),
    }
    save_predictor(predictor, options.train, card=card)
    print(json.dumps(card))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("zoo", type=Path)
    options.add_argument("--train", type=Path, help="train, and write this file")
    options.add_argument("--predictor", default="small", help="what is judged: a name or a file")
    options.add_argument("--steps", type=int, default=600)
    options.add_argument("--channels", type=int, default=32)
    options.add_argument("--layers", type=int, default=1)
    options.add_argument("--weight-decay", type=float, default=0.01)
    options.add_argument("--caution", type=float, default=1.0)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--split", default="test")
    options.add_argument("--networks", type=int, default=2, help="of an architecture, at most")
    options.add_argument("--json", type=Path, help="also write one record for each network here")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    made = zoo.open(chosen.zoo)
    if chosen.train:
        train(made, chosen)
        return
    kinds = {
        "predicted": predicted(chosen.predictor),
        "mean field": mean_field,
        "L1": magnitude(1, relative=False),
        "L2": magnitude(2, relative=False),
        "L2, by group": magnitude(2, relative=True),
        "random": uniform,
        "Taylor (data)": taylor,
        "effect (data)": measured,
    }
    records = judge(parts_of(made, chosen.split, learned=True), kinds, chosen.networks)
    if chosen.json:
        chosen.json.write_text("\n".join(json.dumps(r) for r in records))
    show(records, "L2")


if __name__ == "__main__":
    main()
