"""Activations of a module by group: which result of which operator shows which units.

The module is run for real, in evaluation mode, by the recorder that tracing uses; where each group
stands in each result follows from the solved program (`sites`), so this holds for any architecture.
Results are handed over one by one while the module runs, and none is kept.

For every shape of inputs the module is run once more to make the plan. The plan then holds for all
inputs of that shape that make the module run the same operators on the same shapes; where they do
not (control flow that depends on data), a new plan is made.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten

from wspace.errors import SpaceMismatch, TraceError, message
from wspace.space import WeightSpace
from wspace.trace import named
from wspace.trace.capture import Watch, watched
from wspace.trace.derive import build_params
from wspace.trace.program import Call, Program
from wspace.trace.rules import known
from wspace.trace.sandbox import persistent_float_buffers
from wspace.trace.sites import CONTRACTION, KINDS, NONLINEARITY, Site, find_sites

Use = Callable[[int, Tensor], None]
"""Takes the number of a site and its features ``(samples, *over, size)``."""
Key = tuple[str, str, str, int]
_Signature = tuple[tuple[str, tuple[tuple[int, ...], ...]], ...]


@dataclass(frozen=True)
class Plan:
    """Where the groups of a space are seen while a module runs on inputs of some shape.

    Attributes:
        sites: Sites to read, in the order of the operators.
        unobserved: Groups without a site, and why.
    """

    sites: tuple[Site, ...]
    unobserved: Mapping[str, str]
    calls: _Signature

    @cached_property
    def keys(self) -> tuple[Key, ...]:
        """What tells each site from the others in any plan: group, kind, label, and which of these.

        Plans differ where control flow depends on data; sites of equal keys show the same.
        """
        count: Counter[tuple[str, str, str]] = Counter()
        keys: list[Key] = []
        for site in self.sites:
            head = (site.group, site.kind, site.label)
            keys.append((*head, count[head]))
            count[head] += 1
        return tuple(keys)


class Observer:
    """Reads activations of modules of one space, with a plan for each shape of inputs."""

    def __init__(
        self,
        space: WeightSpace,
        *,
        groups: Iterable[str] | None = None,
        kinds: Sequence[str] = (CONTRACTION, NONLINEARITY),
        most: int | None = 4,
    ) -> None:
        """See `observe` for the options.

        Raises:
            SpaceMismatch: If a group or a kind is unknown, or `most` is not positive.
        """
        self.space = space
        self.groups = tuple(space.groups if groups is None else groups)
        self.kinds, self.most = tuple(kinds), most
        wrong = [f"group {g!r}" for g in self.groups if g not in space.groups]
        wrong += [f"kind {k!r}" for k in self.kinds if k not in KINDS]
        wrong += [f"most={most}"] if most is not None and most < 1 else []
        if wrong or not self.kinds:
            raise SpaceMismatch(
                message(
                    "observe: no such sites",
                    expected=f"groups among {tuple(space.groups)}, kinds among {KINDS}, most ≥ 1",
                    got=wrong or "no kind",
                )
            )
        self._plans: dict[Hashable, Plan] = {}

    def plan(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Plan:
        """The plan for inputs of this shape; made by running the module, where it is new."""
        key = _shape_of(args, kwargs)
        if key not in self._plans:
            self._plans[key] = self._new_plan(module, args, kwargs)
        return self._plans[key]

    def run(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        use: Callable[[Plan], Use],
    ) -> Plan:
        """Runs a module once and shows the features at every site.

        Args:
            module: A module of the space, with real weights; left as it was.
            args: Positional inputs.
            kwargs: Keyword inputs.
            use: Given the plan, what is called with the number of a site and its features. Called
                again, after a false start, if the inputs made the module run other operators than
                the plan has: what was shown so far is void then.

        Returns:
            The plan.

        Raises:
            TraceError: If the module runs other operators each time.
        """
        plan = self.plan(module, args, kwargs)
        for _ in range(2):
            reader = _Reader(plan, use(plan))
            self._watched(module, args, kwargs, reader)
            if reader.finished():
                return plan
            plan = self._new_plan(module, args, kwargs)
            self._plans[_shape_of(args, kwargs)] = plan
        raise TraceError(
            message(
                f"observe: {type(module).__name__} does not run the same operators twice",
                expected="a forward pass that depends on the inputs and weights only",
                help="make the module deterministic in evaluation mode",
            )
        )

    def _watched(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        watch: Watch | None = None,
    ) -> Program:
        if any(t.is_meta for t in (*module.parameters(), *module.buffers())):
            raise TraceError(
                message(
                    f"observe: {type(module).__name__} has no weights",
                    expected="a module with real weights",
                    got="parameters or buffers on the meta device",
                )
            )
        with ExitStack() as stack:
            if self.space.capture == "abstract":  # as it was traced: attention in its parts
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            return watched(module, args, kwargs, known, watch)

    def _new_plan(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Plan:
        program = self._watched(module, args, kwargs)
        naming, _ = named(program)
        buffers = {name for name, _ in persistent_float_buffers(module)}
        params = build_params(naming, program, buffers, {})
        shapes = {p.name: p.shape for p in params}
        if shapes != {p.name: p.shape for p in self.space.params}:
            raise SpaceMismatch(
                message(
                    f"observe: {type(module).__name__} is not a module of this space",
                    expected="the parameters and buffers that the space lists",
                    got=sorted(
                        f"{n}: {shapes.get(n)}"
                        for n in {*shapes, *(p.name for p in self.space.params)}
                        if n not in self.space.by_name or shapes.get(n) != self.space[n].shape
                    ),
                    help="trace this module: wspace.trace(module, args, kwargs)",
                )
            )
        every = find_sites(self.space, program, naming, params)
        chosen: list[Site] = []
        unobserved: dict[str, str] = {}
        for group in self.groups:
            sites = [s for s in every if s.group == group]
            chosen += _choose(sites, self.kinds, self.most)
            if not sites:
                unobserved[group] = "no result that depends on the inputs shows its units apart"
        chosen.sort(key=lambda s: (s.places[0].call, s.places[0].output))
        return Plan(tuple(chosen), unobserved, tuple(_signature(c) for c in program.calls))


def _choose(sites: Sequence[Site], kinds: Sequence[str], most: int | None) -> list[Site]:
    """The sites to read of one group: see `observe`."""
    clear = [s for s in sites if not s.beside] or list(sites)
    wanted = [s for s in clear if s.kind in kinds]
    for kind in KINDS:
        wanted = wanted or [s for s in clear if s.kind == kind]
    if most is None or len(wanted) <= most:
        return wanted
    last = len(wanted) - 1
    if most == 1:
        return wanted[-1:]
    return [wanted[round(i * last / (most - 1))] for i in range(most)]


class _Reader:
    """Follows a run with a plan in hand, and says whether it went as planned."""

    def __init__(self, plan: Plan, use: Use) -> None:
        self.plan, self.use = plan, use
        self.at: dict[int, list[tuple[int, int]]] = {}
        for i, site in enumerate(plan.sites):
            for k, place in enumerate(site.places):
                self.at.setdefault(place.call, []).append((i, k))
        self.parts: dict[int, dict[int, Tensor]] = {}
        self.seen = 0
        self.astray = False

    def __call__(self, number: int, call: Call, made: list[Tensor]) -> None:
        self.seen = number + 1
        if self.astray or number >= len(self.plan.calls):
            self.astray = True
            return
        if self.plan.calls[number] != _signature(call):
            self.astray = True
            return
        for i, k in self.at.get(number, ()):
            site = self.plan.sites[i]
            x = site.places[k].read(made[site.places[k].output])
            if site.family < 0:
                self.use(i, x)
                continue
            parts = self.parts.setdefault(i, {})
            parts[k] = x.clone()  # the module may write to it before the last branch has run
            if len(parts) == len(site.places):
                self.use(i, site.join([parts[j] for j in range(len(parts))]))
                del self.parts[i]

    def finished(self) -> bool:
        """True if the run went as planned to its end."""
        return not self.astray and self.seen == len(self.plan.calls)


def _signature(call: Call) -> tuple[str, tuple[tuple[int, ...], ...]]:
    return call.name, tuple(v.shape for v in call.outs)


def _shape_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Hashable:
    leaves, spec = tree_flatten((args, dict(kwargs)))
    return str(spec), tuple(
        (tuple(x.shape), x.dtype) if isinstance(x, Tensor) else repr(x) for x in leaves
    )


# ------------------------------------------------------------------------ all at once


@dataclass(frozen=True)
class Observation:
    """Activations by group.

    Attributes:
        features: Group → ``(samples, *sizes of over, size)`` for each of its sites.
        sites: Group → the sites, in the same order.
        unobserved: Groups that no activation shows, and why.
    """

    features: Mapping[str, tuple[Tensor, ...]]
    sites: Mapping[str, tuple[Site, ...]]
    unobserved: Mapping[str, str]


def observe(
    space: WeightSpace,
    module: nn.Module,
    args: tuple[Any, ...] | Tensor = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    groups: Iterable[str] | None = None,
    kinds: Sequence[str] = (CONTRACTION, NONLINEARITY),
    most: int | None = 4,
) -> Observation:
    """Activations of a module on some inputs, by the group whose units they show.

    Which results are read: of a group, those of the `kinds` asked for (else of the first of
    ``"contraction"``, ``"nonlinearity"``, ``"computed"``, ``"rearranged"`` that has any) in which
    no other group stands beside it (else the mean over the others); of more than `most` such
    results an even spread with the first and the last. Batch, token and space are samples.

    Args:
        space: Weight space of the module.
        module: Module with real weights; run twice in evaluation mode and left as it was.
        args: Positional inputs (a single tensor stands for a tuple of one); their sizes may differ
            from those that the space was traced with.
        kwargs: Keyword inputs.
        groups: Names of groups; all free ones when None.
        kinds: Kinds of results, see `Site`.
        most: Results per group at most; None for all.

    Returns:
        The activations, copied.

    Raises:
        SpaceMismatch: If the module is not of this space, or a name is unknown.
        TraceError: If the module cannot be run.

    Example:
        >>> import torch, wspace
        >>> mlp = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
        >>> space = wspace.trace(mlp, torch.zeros(1, 3))
        >>> seen = observe(space, mlp, torch.randn(7, 3))
        >>> [(s.label, tuple(x.shape)) for s, x in zip(seen.sites["h1"], seen.features["h1"])]
        [('0: addmm', (7, 5)), ('0: relu', (7, 5))]
    """
    args = (args,) if isinstance(args, Tensor) else tuple(args)
    observer = Observer(space, groups=groups, kinds=kinds, most=most)
    features: dict[int, Tensor] = {}

    def use(plan: Plan) -> Use:
        features.clear()
        return lambda i, x: features.__setitem__(i, x.clone())

    plan = observer.run(module, args, kwargs or {}, use)
    names = [g for g in observer.groups if g not in plan.unobserved]
    where = {g: [i for i, s in enumerate(plan.sites) if s.group == g] for g in names}
    return Observation(
        {g: tuple(features[i] for i in where[g]) for g in names},
        {g: tuple(plan.sites[i] for i in where[g]) for g in names},
        plan.unobserved,
    )
