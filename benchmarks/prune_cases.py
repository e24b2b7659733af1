"""Which architectures of the trace suite wspace and torch-pruning prune correctly.

Both get the same module, in float64 (also where its code asks for float32) and evaluation mode,
with constant tensors replaced by random ones. About a third of the units of every group goes, group
by group. Before a group goes, everything that is about to be removed is set to zero, so that these
units are dead by the library's own account; then the outputs must not change (1e-10 relative; 1e-6
for networks that compute in float32 whatever is asked). Where an operator counts the units
(LayerNorm over them, a softmax, a mean, the root of a head's size) they may, and the group is only
run.

- wspace: every group that the code allows, one at a time, with those that must keep equal counts.
- torch-pruning: its pruner, used as its documentation says, yields the groups that its dependency
  graph finds from every convolution and linear layer, one after the other. It is told the output
  layers (by the weight space), the numbers of heads of attention layers, and prunes whole heads;
  head counts are corrected by hand after each group.

The outcome of an architecture is that of its worst group.
"""

import copy
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
from harness import finish, peer, start, table
from torch import Tensor, nn
from which_models import (
    USUAL,
    build,
    heads_of,
    limited,
    output_layer,
    tensors,
    update_heads,
)

import wspace
from wspace.action import shape_of
from wspace.errors import WSpaceError
from wspace.prune import Pruner, Restriction, prunable

SECONDS = 15
SHARE = 1 / 3
OUTCOMES = {
    "correct": "correct",
    "runs": "runs, not judged: operators count the units",
    "no group": "finds no group",
    "refused": "refuses with an error of its own that says why",
    "fails": "an exception while it analyses or prunes, or more than 15 s",
    "crashes": "the pruned network crashes",
    "ties": "weights that were tied are not any more",
    "wrong": "silently wrong: the pruned network runs, and computes something else",
}
"""From best to worst."""


class Found(NamedTuple):
    """What became of a group."""

    outcome: str
    gap: float = 0.0
    why: str = ""


class Subject(NamedTuple):
    """A network to prune."""

    model: nn.Module
    inputs: tuple[Tensor, ...]
    space: wspace.WeightSpace
    pruner: Pruner
    tolerance: float


def subject(name: str) -> Subject:
    from cases import CASES  # of the tests; `harness` has put them on the path

    model, inputs = build(name)
    space = wspace.trace(model, inputs)
    tolerance = 1e-6 if name in CASES and CASES[name].float32 else 1e-10
    return Subject(model, inputs, space, Pruner(model, space, rebuild="copy"), tolerance)


def ties_of(model: nn.Module) -> set[frozenset[str]]:
    """Names of parameters that are one parameter."""
    names: dict[int, set[str]] = {}
    for name, x in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(x), set()).add(name)
    return {frozenset(v) for v in names.values() if len(v) > 1}


def broken(before: set[frozenset[str]], model: nn.Module) -> bool:
    """Whether names that were one parameter, and are still there, are several."""
    here = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return not {frozenset(x & here) for x in before if len(x & here) > 1} <= ties_of(model)


@torch.no_grad()
def computed(model: nn.Module, inputs: Any, state: dict[str, Tensor] | None = None) -> Tensor:
    """What a model computes; in float64 even where its code asks for float32."""
    from cases import Double

    torch.manual_seed(0)
    with Double():
        return torch.func.functional_call(model, state or {}, inputs, tie_weights=False)


def judged(before: Tensor, small: nn.Module, s: Subject, ties: Any, counted: bool) -> Found:
    """Runs a pruned network beside the one with zeros."""
    from oracles import gap as difference

    try:
        after = computed(small, s.inputs)
    except TimeoutError:
        raise
    except Exception as error:
        return Found("crashes", why=f"{type(error).__name__}: {error}"[:200])
    gap = difference([before], [after])
    if not counted and not gap <= s.tolerance:
        return Found("wrong", gap)
    if broken(ties, small):
        return Found("ties", gap)
    return Found("runs" if counted else "correct", 0.0 if counted else gap)


# ------------------------------------------------------------------------- wspace


def ours(name: str) -> Iterator[Found]:
    s = subject(name)
    ties = ties_of(s.model)
    generator = torch.Generator().manual_seed(0)
    free, done = prunable(s.space), set()
    family = {g: tie for tie in s.pruner.sizes.ties() for g in tie}
    state = {n: x.detach() for n, x in s.model.state_dict().items()}
    for group in free:
        members = family.get(group, [group])
        if group in done or any(g in s.pruner.pinned for g in members):
            continue
        done |= set(members)
        least = max(s.pruner.sizes.least.get(g, 1) for g in members)
        keep: dict[str, Tensor] = {}
        for g in members:
            count = max(least, free[g].size - max(1, int(SHARE * free[g].size)))
            keys = torch.rand(shape_of(free[g], s.space), generator=generator)
            keep[g] = keys.argsort(-1).argsort(-1) < count
        few = Restriction(s.space, keep)
        if not few.keep:
            continue
        try:
            small = s.pruner.prune(few)
        except WSpaceError as error:
            yield Found("refused", why=f"{group}: {error}".replace("\n", " ")[:300])
            continue
        yield judged(
            computed(s.model, s.inputs, few.masked(state)),
            small,
            s,
            ties,
            bool(s.pruner.counted(few)),
        )


# ------------------------------------------------------------------- torch-pruning


def theirs(pruning: ModuleType, name: str) -> Iterator[Found]:
    s = subject(name)
    counted = {*s.pruner.cost.survey.counted, *s.pruner.sizes.scaled}
    s.model.requires_grad_(True)
    ties = ties_of(s.model)
    ignored = [*_output_layers(s), output_layer(s.model, s.inputs)]
    pruner = pruning.pruner.BasePruner(
        s.model,
        s.inputs,
        importance=pruning.importance.RandomImportance(),
        pruning_ratio=SHARE,
        ignored_layers=ignored,
        num_heads=heads_of(s.model),
        in_channel_groups={},  # its default is one dictionary for all pruners
        out_channel_groups={},
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=0.5,
    )
    for group in pruner.step(interactive=True):
        before, gone = _prune(s, group)
        update_heads(s.model, pruner)
        found = judged(before, s.model, s, ties, bool(gone & counted))
        yield found
        if found.outcome == "crashes":
            return


def _output_layers(s: Subject) -> list[nn.Module]:
    """Layers whose output units the weight space holds fixed."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    named = dict(s.model.named_modules())
    found: list[nn.Module] = []
    for p in s.space.params:
        owner = named.get(p.name.rpartition(".")[0])
        if isinstance(owner, kinds) and p.name.endswith("weight"):
            free = [g for g in p.axes[0].groups() if not g.fixed and g.size > 1]
            if not free:
                found.append(owner)
    return found


def _prune(s: Subject, group: Any) -> tuple[Tensor, set[str]]:
    """Prunes the model in place; returns what a copy with zeros computed, and the groups cut.

    What is removed is read off the model: every tensor is filled with the positions of its
    entries, the group is pruned, and the positions that are left are the entries that were kept.
    """
    dead = copy.deepcopy(s.model)
    values = {n: t.detach().clone() for n, t in tensors(s.model).items()}
    with torch.no_grad():
        for t in tensors(s.model).values():
            t.copy_(torch.arange(t.numel()).reshape(t.shape))
    group.prune()
    left = tensors(s.model)
    kept = {name: t.long().flatten() for name, t in left.items()}
    zeroed, cut = tensors(dead), set()
    with torch.no_grad():
        for name, t in left.items():
            gone = torch.ones(values[name].numel(), dtype=torch.bool)
            gone[kept[name]] = False
            zeroed[name].view(-1)[gone] = 0
            t.copy_(values[name].flatten()[kept[name]].reshape(t.shape))
            if (p := s.space.by_name.get(name)) is not None:
                for d, axis in enumerate(p.axes):
                    if t.dim() == len(p.axes) and t.shape[d] < values[name].shape[d]:
                        cut |= {g.name for g in axis.groups()}
    return computed(dead, s.inputs), cut


# --------------------------------------------------------------------------- main


def attempt(judge: Callable[[], Iterator[Found]]) -> dict[str, Any]:
    """Everything that happened to an architecture; an exception or a time-out is a finding too."""
    found: list[Found] = []
    try:
        with limited(SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.extend(judge())
    except WSpaceError as error:
        found.append(Found("refused", why=str(error).replace("\n", " ")[:300]))
    except Exception as error:
        found.append(Found("fails", why=f"{type(error).__name__}: {error}"[:300]))
    return summary(found)


def summary(found: list[Found]) -> dict[str, Any]:
    counts = {k: sum(f.outcome == k for f in found) for k in OUTCOMES}
    order = list(OUTCOMES)
    worst = max((f.outcome for f in found), key=order.index, default="no group")
    if worst == "runs" and counts["correct"]:
        worst = "correct"
    gap = max((f.gap for f in found), default=0.0)
    why = next((f.why for f in found if f.outcome == worst and f.why), "")
    counts = {k: v for k, v in counts.items() if v}
    return {"outcome": worst, "groups": counts, "gap": min(gap, 1e300), "why": why}


def main() -> None:
    from cases import CASES

    options = start(__doc__ or "", only=True)
    pruning = peer("torch_pruning")
    figures: dict[str, dict[str, Any]] = {}
    for name in options.only or [*CASES, *USUAL]:
        figures[name] = found = {"wspace": attempt(lambda n=name: ours(n))}
        if pruning:
            found["torch-pruning"] = attempt(lambda n=name: theirs(pruning, n))
        words = "; ".join(
            f"{t}: {f['outcome']} {f['groups']} {f['gap']:.0e}" for t, f in found.items()
        )
        print(f"<!-- {name}: {words} -->", flush=True)
    tools = list(next(iter(figures.values())))
    print()
    table(
        [f"of {len(figures)} architectures", *tools],
        [
            [text, *(sum(f[t]["outcome"] == k for f in figures.values()) for t in tools)]
            for k, text in OUTCOMES.items()
        ],
    )
    for tool in tools:
        print(f"\n## Not correct with {tool}\n")
        for k, text in list(OUTCOMES.items())[1:]:
            names = [n for n, f in figures.items() if f[tool]["outcome"] == k]
            if names:
                print(f"- {text}: {', '.join(f'`{n}`' for n in names)}")
    finish(options, {"architectures": figures})


if __name__ == "__main__":
    main()
