"""The laws of pruning on every architecture of the trace suite.

Every group that the module's code lets lose units loses some, all groups at once. The small module
must be what its space says (L9), compute what the masked one does where nothing counts the units,
and not depend on the order of units (for every group).
"""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import pytest
import torch
from cases import CASES, FEW, Double, build
from oracles import disagreements, gap, outputs, state_of
from torch import Tensor, nn

import wspace
from wspace.action import shape_of
from wspace.errors import PruneError
from wspace.prune import Mask, Pruner, Restriction, counts_of, load, prunable, prune
from wspace.space import Axis, Concat, Group, WeightSpace
from wspace.trace.sandbox import tensors_in

EXACT = 1e-10
CONTROL = 1e-6
each_case = pytest.mark.parametrize(
    "name",
    [
        n if n in FEW and not CASES[n].slow else pytest.param(n, marks=pytest.mark.slow)
        for n in CASES
    ],
)


class Pruned(NamedTuple):
    """A case, what is kept of it, and the small module."""

    module: nn.Module
    args: tuple[object, ...]
    kwargs: dict[str, object]
    space: WeightSpace
    pruner: Pruner
    masks: dict[str, Tensor]
    few: Restriction
    small: nn.Module


def some(
    pruner: Pruner, generator: torch.Generator, names: Mapping[str, Group] | None = None
) -> dict[str, Tensor]:
    """Random units of every group that may lose some: about two thirds stay, at least two."""
    tied = {g: tie for tie in pruner.sizes.ties() for g in tie}
    keep: dict[str, Tensor] = {}
    for name, g in (names or prunable(pruner.space)).items():
        family = tied.get(name, [name])
        if any(x in pruner.pinned for x in family):
            continue
        least = max(2, *(pruner.sizes.least.get(x, 1) for x in family))
        count = max(least, (2 * g.size) // 3)
        if count < g.size:
            keys = torch.rand(shape_of(g, pruner.space), generator=generator)
            keep[name] = keys.argsort(-1) < count
    return keep


def generic(module: nn.Module, generator: torch.Generator) -> None:
    """Random weights of unit gain; vectors stay near what they were."""
    with torch.no_grad():
        for x in module.parameters():
            noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
            fan = x[0].numel() if x.dim() > 1 else 1
            x.copy_(noise / fan**0.5 if x.dim() > 1 else x + 0.1 * noise)


@pytest.fixture(scope="session")
def pruned() -> Callable[[str], Pruned]:
    """Builds, traces and prunes a case, once per session."""

    @functools.cache
    def get(name: str) -> Pruned:
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        module, args, kwargs = build(name)
        generic(module, generator)
        space = wspace.trace(module, args, kwargs)
        pruner = Pruner(module, space, rebuild="copy")
        masks = some(pruner, generator)
        few = Restriction(space, masks)
        small = pruner.prune(few, check=False)
        return Pruned(module, args, kwargs, space, pruner, masks, few, small)

    return get


def run(module: nn.Module, case: Pruned, state: Mapping[str, Tensor] | None = None) -> list[Tensor]:
    return outputs(module, state or state_of(module), case.args, case.kwargs, mode=Double())


# ---------------------------------------------------------------------------- the laws


@each_case
def test_units_of_zeros_can_go(
    name: str, pruned: Callable[[str], Pruned], generator: torch.Generator
) -> None:
    """Where no operator counts its units, a group of zeros computes what no group does."""
    case = pruned(name)
    inexact = {*case.pruner.counted(case.few)}
    keep = {g: m for g, m in case.masks.items() if g not in inexact}
    tied = [t for t in case.pruner.sizes.ties() if set(t) & inexact]
    keep = {g: m for g, m in keep.items() if not any(g in t for t in tied)}
    few = Restriction(case.space, keep)
    small = case.pruner.prune(few, check=False)
    masked = few.masked(state_of(case.module))
    assert gap(run(case.module, case, masked), run(small, case)) <= EXACT


@each_case
def test_the_order_of_units_does_not_matter(
    name: str, pruned: Callable[[str], Pruned], generator: torch.Generator
) -> None:
    """Permuted networks, pruned by the permuted masks, are the same function: for every group."""
    case = pruned(name)
    t = wspace.sample(case.space, generator=generator)
    state = {n: x.detach() for n, x in case.module.state_dict().items()}
    twin = build(name)[0]
    twin.load_state_dict(wspace.act(t, state, case.space))
    masks = wspace.act(t, lanes(case), case.space)
    other = Pruner(twin, case.space, case.args, case.kwargs, rebuild="copy")
    few = Restriction(case.space, moved(case, t))
    assert masks  # the same masks by another way: laid on every tensor and moved with it
    for p in case.space.params:
        assert torch.equal(few.kept(p), masks[p.name] > 0), p
    small = other.prune(few, check=False)
    assert gap(run(case.small, case), run(small, case)) <= EXACT
    if case.few.keep:
        assert differs(case, twin, other)


def lanes(case: Pruned) -> dict[str, Tensor]:
    """One for every entry of every tensor that stays."""
    return {p.name: case.few.kept(p).double() for p in case.space.params}


def moved(case: Pruned, t: wspace.Transform) -> dict[str, Tensor]:
    """The masks in the order that a transform leaves the units in."""
    out: dict[str, Tensor] = {}
    for name, mask in case.few.keep.items():
        g = case.space.groups[name]
        names = (*g.over, name)
        at = torch.meshgrid(*(torch.arange(n) for n in mask.shape), indexing="ij")
        index = dict(zip(names, at, strict=True))
        source = []
        for h in names:
            here = case.space.all_groups[h]
            p = t.permutations.get(h, torch.arange(here.size).expand(shape_of(here, case.space)))
            source.append(p[tuple(index[o] for o in (*here.over, h))])
        out[name] = mask[tuple(source)]
    return out


def differs(case: Pruned, twin: nn.Module, other: Pruner) -> bool:
    """Control: with the masks of the network as it was, something else is left."""
    small = other.prune(case.few, check=False)
    return gap(run(case.small, case), run(small, case)) > CONTROL


@each_case
def test_the_small_module_is_of_the_small_space(name: str, pruned: Callable[[str], Pruned]) -> None:
    """L9: the trace of the small module is the restricted space, up to the names of groups."""
    case = pruned(name)
    found = wspace.trace(case.small, case.args, case.kwargs)
    texts = {p.name: ", ".join(map(text, p.axes)) for p in case.few.small.params if p.axes}
    on_axes = {g.name for p in case.few.small.params for a in p.axes for g in a.groups()}
    over = {
        g.name: " ".join(
            o for o in g.over if o in on_axes and not case.few.small.all_groups[o].fixed
        )
        for g in case.few.small.groups.values()
    }
    assert {p.name: p.shape for p in found.params} == {
        p.name: p.shape for p in case.few.small.params
    }
    if found.capture == "concrete":  # what no token of the example reaches is frozen
        return
    wrong = disagreements(found, texts, over)
    scalars = [f"{p}: not expected" for p in case.few.small.params if not p.axes]
    hidden = set(case.few.small.all_groups) - on_axes  # they index families, and no axis
    assert [
        line
        for line in wrong
        if line not in scalars and "#" not in line and not (hidden and "depend on" in line)
    ] == []


def text(axis: Axis) -> str:
    """An axis as `oracles.parse` reads it."""

    def factor(f: Group | Concat) -> str:
        if isinstance(f, Group):
            return f"{f.size}!" if f.fixed else f.name
        return "(" + " + ".join(text(p) for p in f.parts) + ")"

    return "*".join(factor(f) for f in axis.factors) or "1"


@each_case
def test_the_module_is_left_alone_and_ties_stay(name: str, pruned: Callable[[str], Pruned]) -> None:
    case = pruned(name)
    before = {n: x.clone() for n, x in case.module.state_dict().items()}
    small = prune(case.module, case.space, case.few, rebuild="copy", check=False)
    after = case.module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    params = dict(small.named_parameters(remove_duplicate=False))
    own = {x.untyped_storage().data_ptr() for x in case.module.parameters()}
    for p in case.few.small.params:
        if not p.buffer:
            assert all(params[tie].data_ptr() == params[p.name].data_ptr() for tie in p.ties)
            assert not params[p.name].numel() or (
                params[p.name].untyped_storage().data_ptr() not in own
            )
    assert sum(x.numel() for x in small.parameters()) == case.pruner.cost.parameters(
        case.few.counts()
    )


@each_case
def test_a_pruned_state_finds_its_module_again(name: str, pruned: Callable[[str], Pruned]) -> None:
    case = pruned(name)
    state = case.small.state_dict()
    shapes = {n: tuple(x.shape) for n, x in state.items()}
    counts = case.few.counts()
    assert counts_of(case.space, shapes, counts) == counts
    again = load(case.module, case.space, state, counts)
    for a, b in zip(run(case.small, case), run(again, case), strict=True):
        assert torch.equal(a, b)


# ------------------------------------------------------------------------ refusals


def test_sizes_that_the_code_refuses_are_an_error() -> None:
    """A layer asks whether two of its widths differ; half of the second stage is as the first."""
    module, args, kwargs = build("hiera")
    space = wspace.trace(module, args, kwargs)
    with pytest.raises(PruneError, match="does not allow.*\\n.*\\n.*comparison that was false"):
        Pruner(module, space, rebuild="copy").prune({"h8": torch.arange(16) < 8})


def test_what_is_pinned_alone_can_go_together() -> None:
    """`nn.MultiheadAttention` is as wide as its heads together: the stream goes with them."""
    module, args, kwargs = build("encoder_pre_norm")
    space = wspace.trace(module, args, kwargs)
    pruner = Pruner(module, space)
    stream = next(g.name for g in space["embed.bias"].axes[0].groups())
    heads = [
        next(space[f"body.layers.{i}.self_attn.out_proj.weight"].axes[1].groups()).name
        for i in range(2)
    ]
    assert {stream, *heads} <= set(pruner.pinned)
    with pytest.raises(PruneError, match="embed_dim"):
        pruner.prune({heads[0]: torch.arange(3) < 2})
    keep = {stream: torch.arange(12) < 8, **dict.fromkeys(heads, torch.arange(3) > 0)}
    small = pruner.prune(keep)
    assert small.body.layers[0].self_attn.num_heads == 2
    assert small.body.layers[1].self_attn.embed_dim == 8


def test_masks_off_leave_the_network_as_it_was(pruned: Callable[[str], Pruned]) -> None:
    case = pruned("resnet18")
    before = {n: x.clone() for n, x in case.module.state_dict().items()}
    with Mask(case.module, case.space, case.few) as mask:
        gone = (~case.few.kept(case.few.touched[0])).sum()
        assert gone and len(mask.keep) == len(case.few.keep)
        assert not torch.equal(
            case.module.state_dict()[case.few.touched[0].name], before[case.few.touched[0].name]
        )
    after = case.module.state_dict()
    assert all(torch.equal(before[n], after[n]) for n in before)


@pytest.mark.parametrize("name", ["resnet18", "lstm", "vit", "attention_gqa"])
def test_small_modules_train_export_and_are_pruned_again(
    name: str, pruned: Callable[[str], Pruned], generator: torch.Generator
) -> None:
    case = pruned(name)
    small = case.pruner.prune(case.few).train()
    flat = [y for y in outputs(small, state_of(small), case.args, case.kwargs) if y.numel()]
    assert flat
    small.train()
    y = small(*case.args, **case.kwargs)
    loss = sum(t.square().sum() for t in tensors_in(y))
    assert isinstance(loss, Tensor)
    loss.backward()
    used = [x for x in small.parameters() if x.grad is not None]
    assert used and all(x.grad is not None and x.grad.shape == x.shape for x in used)
    if name != "lstm":  # torch warns of its own reference to the weights, pruned or not
        torch.export.export(small.eval(), tuple(case.args), dict(case.kwargs))
    space = wspace.trace(small, case.args, case.kwargs)
    again = Pruner(small, space, rebuild="copy")
    smaller = again.prune(some(again, generator))
    assert sum(x.numel() for x in smaller.parameters()) < sum(x.numel() for x in small.parameters())
