"""The proof: random group elements leave the module's output unchanged, others do not."""

import copy
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from wspace.action import Transform, act, sample, shape_of
from wspace.errors import NotASymmetry, message
from wspace.space import Group, Param, WeightSpace
from wspace.trace.sandbox import (
    attributes_restored,
    dense_experts,
    double_precision,
    persistent_float_buffers,
    tensors_in,
)

TOLERANCE = 1e-10
CONTROL = 1e-6
CONTROLS = 12  # groups that get a negative control, evenly spread
GAUGES = 16  # diagonal symmetries that are also moved alone, evenly spread
ALONE = 40  # groups that are also permuted alone, evenly spread


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` measured.

    Attributes:
        max_error: Worst relative change of any output under a group element.
        moved: Groups that were moved, all at once and each alone.
        control_error: Smallest relative change of the output under the negative controls.
        errors: Worst relative change with only this group moved, by group name (``"*"``: all).
        controls: Relative change under each negative control, by what it broke.
        ok: True if the outputs held and the controls changed them.
    """

    max_error: float
    moved: tuple[str, ...]
    control_error: float
    errors: Mapping[str, float] = field(default_factory=dict)
    controls: Mapping[str, float] = field(default_factory=dict)
    ok: bool = True

    def __str__(self) -> str:
        return (
            f"{'proved' if self.ok else 'FAILED'}: {len(self.moved)} groups moved, "
            f"largest relative change {self.max_error:.1e}; "
            f"controls change the output by at least {self.control_error:.1e}"
        )


def verify(
    space: WeightSpace,
    module: nn.Module,
    args: tuple[Any, ...] | Tensor = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    generator: torch.Generator | None = None,
    kinds: tuple[str, ...] = ("permutation", "scale", "sign", "phase"),
    randomize: bool = True,
) -> VerifyReport:
    """Proves on real weights, in float64, that the group of `space` preserves the function.

    A float64 copy of the module is run with its state moved by random group elements: all groups
    at once, then each alone (an even spread of 40 of them, where there are more). Constant tensors
    (zero-initialised heads, fresh norm statistics) are first replaced by random ones in the copy,
    since any permutation of a constant "passes".
    *Negative controls*, permutations outside the group, must change the output. The module itself,
    its mode, hooks and the random state are not touched.

    Args:
        space: The claim to prove.
        module: Module with real weights.
        args: Example positional inputs (a single tensor stands for a tuple of one).
        kwargs: Example keyword inputs.
        generator: Source of randomness; seeded with 0 when None, so that a failure repeats.
        kinds: Symmetries to move.
        randomize: Replace constant tensors in the copy.

    Returns:
        The measured errors; `ok` is always true, since failure raises.

    Raises:
        NotASymmetry: If a group element changes the output, or no control does.
        SpaceMismatch: If the module's state does not fit the space.
    """
    args = (args,) if isinstance(args, Tensor) else tuple(args)
    generator = generator or torch.Generator().manual_seed(0)
    with _sandbox(module, args, kwargs or {}) as run:
        if randomize:
            run.randomize(generator)
        return _prove(space, run, generator, kinds)


class _Run:
    """A float64 copy of a module, run on float64 copies of the inputs with any state."""

    def __init__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.module = module
        self.args, self.kwargs = args, kwargs
        named = [
            *module.named_parameters(remove_duplicate=False),
            *persistent_float_buffers(module),
        ]
        self._live = {name: t.detach() for name, t in named}
        self.state = {name: t.clone() for name, t in self._live.items()}

    def randomize(self, generator: torch.Generator) -> None:
        """Gives every constant tensor random entries; permuting a constant proves nothing."""
        _randomize(self._live, generator)
        self.state = {name: t.clone() for name, t in self._live.items()}

    def __call__(self, state: Mapping[str, Tensor]) -> list[Tensor]:
        """Outputs with another state; only tensors that are not the module's own are copied."""
        changed = [name for name, t in self.state.items() if state[name] is not t]
        args, kwargs = tree_map_only(Tensor, Tensor.clone, (self.args, self.kwargs))
        try:
            for name in changed:
                self._live[name].copy_(state[name])
            torch.manual_seed(0)
            with attributes_restored(self.module):
                return [t.detach().clone() for t in tensors_in(self.module(*args, **kwargs))]
        finally:
            for name in changed:
                self._live[name].copy_(self.state[name])


@contextmanager
def _sandbox(module: nn.Module, args: Any, kwargs: Any):
    with torch.random.fork_rng(devices=[]), torch.no_grad(), double_precision():
        twin = copy.deepcopy(module).double().eval()
        args, kwargs = tree_map_only(
            Tensor, lambda t: t.double() if t.is_floating_point() else t, (args, kwargs)
        )
        with dense_experts(twin):
            yield _Run(twin, args, dict(kwargs))


def _randomize(state: Mapping[str, Tensor], generator: torch.Generator) -> None:
    """Gives every constant float tensor random entries of its own scale; positive stay positive."""
    for t in state.values():
        if not t.is_floating_point() or t.numel() < 2 or not bool((t == t.flatten()[0]).all()):
            continue
        noise = torch.rand(t.shape, generator=generator, dtype=torch.float64)
        value = float(t.flatten()[0])
        t.copy_(value * (0.5 + noise) if value else 0.4 * (noise - 0.5))


def _generic(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state with every matrix scaled to unit gain, so that all of it reaches the output."""
    out = {}
    for name, t in state.items():
        gain = float(t.std()) * (t.numel() / t.shape[0]) ** 0.5 if _is_matrix(t) else 0.0
        out[name] = t / gain if 0.0 < gain < float("inf") else t
    return out


def _redrawn(
    state: Mapping[str, Tensor], names: set[str], generator: torch.Generator
) -> dict[str, Tensor]:
    """The state with every entry of some tensors multiplied by a factor in [1/2, 3/2]."""
    factor = {
        name: 0.5 + torch.rand(t.shape, generator=generator, dtype=torch.float64)
        for name, t in state.items()
        if name in names
    }
    return {name: t * factor[name] if name in names else t for name, t in state.items()}


def _is_matrix(t: Tensor) -> bool:
    return t.is_floating_point() and t.dim() >= 2 and t.numel() > 1


def _prove(
    space: WeightSpace, run: _Run, generator: torch.Generator, kinds: tuple[str, ...]
) -> VerifyReport:
    state = run.state
    errors = _errors(space, run, state, generator, kinds)
    generic = _generic(state)
    before = run(generic)
    if all(bool(torch.isfinite(t).all()) for t in before):
        moved = act(sample(space, generator=generator, kinds=kinds), generic, space)
        errors["* at unit gain"] = difference(before, run(moved))
    else:
        generic, before = state, run(state)
    wrong = [k for k, e in errors.items() if not e <= TOLERANCE]
    worst = max(errors, key=lambda k: errors[k])
    if wrong:
        alone = [k for k in wrong if not k.startswith("*")]
        where = f"moving {alone[0]} alone" if alone else "moving all groups at once"
        raise NotASymmetry(
            message(
                f"verify: {where} changed the output",
                expected=f"a relative change of at most {TOLERANCE:g} in float64",
                got=f"{errors[worst]:.2e}; wrong: {', '.join(alone or wrong)}",
                help="the space was traced from another module or other inputs, or a rule is "
                "wrong: please report it with the module",
            )
        )
    controls = _controls(space, run, generic, before, generator)
    if not max(controls.values(), default=0.0) > CONTROL:  # perhaps no permutation is outside
        moved = {n for p in space.params if not p.fixed for n in (p.name, *p.ties)}
        controls["other weights"] = difference(before, run(_redrawn(generic, moved, generator)))
    if not max(controls.values()) > CONTROL:
        raise NotASymmetry(
            message(
                "verify: the negative controls did not change the output",
                expected=f"a relative change above {CONTROL:g} for a permutation outside the group",
                got=f"{max(controls.values()):.2e}",
                help="the outputs do not depend on the weights with these inputs; pass others",
            )
        )
    control = min(controls.values(), default=float("inf"))
    return VerifyReport(errors[worst], tuple(space.groups), control, errors, controls)


def _errors(
    space: WeightSpace,
    run: _Run,
    state: Mapping[str, Tensor],
    generator: torch.Generator,
    kinds: tuple[str, ...],
) -> dict[str, float]:
    """Relative change of the output with everything moved, and with each symmetry alone."""
    before = run(state)
    trials: dict[str, tuple[tuple[str, ...], list[str] | None]] = {"*": (kinds, None)}
    if "permutation" in kinds:
        names = list(space.groups)
        trials |= {g: (("permutation",), [g]) for g in names[:: -(-len(names) // ALONE) or 1]}
    gauged = list(dict.fromkeys((g.kind, g.group) for g in space.gauges if g.kind in kinds))
    trials |= {f"* {kind}": ((kind,), None) for kind in dict.fromkeys(k for k, _ in gauged)}
    trials |= {
        f"{kind} of {group}": ((kind,), [group])
        for kind, group in gauged[:: -(-len(gauged) // GAUGES) or 1]
    }
    return {
        key: difference(
            before,
            run(act(sample(space, generator=generator, kinds=k, groups=groups), state, space)),
        )
        for key, (k, groups) in trials.items()
    }


def difference(before: list[Tensor], after: list[Tensor]) -> float:
    """Largest difference between two lists of outputs, relative to each output's largest entry.

    Args:
        before: Reference outputs.
        after: Outputs to compare, of the same shapes.

    Returns:
        The difference; infinite where one is finite and the other is not.
    """
    worst = 0.0
    for a, b in zip(before, after, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if a.numel() == 0:
            continue
        if not a.is_floating_point() and not a.is_complex():
            worst = max(worst, float((a != b).any()))
            continue
        finite = torch.isfinite(a)
        if bool((torch.isfinite(b) != finite).any()):
            return float("inf")
        if bool(finite.any()):
            scale = float(a[finite].abs().max())
            gap = float((a[finite] - b[finite]).abs().max())
            worst = max(worst, gap / scale if scale else gap)
    return worst


def _controls(
    space: WeightSpace,
    run: _Run,
    state: Mapping[str, Tensor],
    before: list[Tensor],
    generator: torch.Generator,
) -> dict[str, float]:
    """Changes of the output when one tensor alone is moved along one of its axes.

    For each group (a spread of them, when there are many), the first parameter that it indexes is
    moved without its partners, or shifted along all its axes if it has none; for a space without
    groups, every axis of the largest matrix is.

    Returns:
        Relative change of the output by what was moved.
    """
    out: dict[str, float] = {}
    groups = list(space.groups.values())
    for g in groups[:: -(-len(groups) // CONTROLS) or 1]:
        t = Transform(space, {g.name: _nontrivial(space, g, generator)}, {})
        moved = act(t, state, space)
        users = [p for p in space.params if not p.buffer and _uses(p, g)]
        for p in users[:2]:
            x = moved[p.name] if len(users) > 1 and not p.at else _rolled(state[p.name])
            broken = {**state, **{n: x for n in (p.name, *p.ties)}}
            out[g.name] = max(out.get(g.name, 0.0), difference(before, run(broken)))
            if out[g.name] > CONTROL:
                break
    if not out:
        p = max((p for p in space.params if not p.buffer), key=lambda p: p.numel)
        for d, size in enumerate(p.shape):
            if size > 1:
                x = state[p.name].roll(1, d)
                broken = {**state, **{n: x for n in (p.name, *p.ties)}}
                out[f"axis {d} of {p.name}"] = difference(before, run(broken))
    return out


def _uses(p: Param, group: Group) -> bool:
    return any(g.name == group.name for axis in p.axes for g in axis.groups())


def _rolled(x: Tensor) -> Tensor:
    """The tensor with every axis shifted by one."""
    dims = [d for d, size in enumerate(x.shape) if size > 1]
    return x.roll([1] * len(dims), dims)


def _nontrivial(space: WeightSpace, group: Group, generator: torch.Generator) -> Tensor:
    shape = shape_of(group, space)
    shift = int(torch.randint(1, group.size, (1,), generator=generator))
    return torch.arange(group.size).roll(shift).expand(shape).contiguous()
