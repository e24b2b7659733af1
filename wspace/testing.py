"""Assertions for tests: a space's group acts as it should, and layers on states respect it.

For the authors of layers and of tracing rules. Every function here returns None or raises
`AssertionError` with the worst element and the axes it lies on. Whatever is compared, `TOLERANCE`
says how exactly.

A layer works on *features*: a dict of tensors by parameter name, ``(*batch, *shape)``, or
``(*batch, *shape, channels)`` if it is called with ``channels=True``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

from wspace.action import KINDS, State, Transform, act, compose, identity, inverse, sample
from wspace.errors import NotASymmetry, message
from wspace.space import WeightSpace
from wspace.trace.sandbox import attributes_restored, double_precision, evaluation_mode, tensors_in
from wspace.trace.verify import verify

TOLERANCE: Mapping[torch.dtype, float] = {
    torch.float64: 1e-10,
    torch.complex128: 1e-10,
    torch.float32: 1e-4,
    torch.complex64: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}
"""Largest difference allowed, relative to the largest entry of a tensor; others are exact."""

ROUNDING = 1e-12
"""Largest relative difference allowed after factors (scale, sign, phase) were applied twice."""


def assert_same(a: Any, b: Any, *, space: WeightSpace | None = None) -> None:
    """Asserts that two tensors, or dicts or sequences of tensors, are equal bit by bit.

    Args:
        a: What is expected.
        b: What was computed; the same names or length, shapes and types. NaN equals NaN.
        space: Names the axes in the message, for dicts by parameter name.

    Raises:
        AssertionError: With the worst element.

    Example:
        >>> assert_same({"w": torch.ones(2)}, {"w": torch.ones(2)})
        >>> assert_same(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.5]))
        Traceback (most recent call last):
        AssertionError: not the same: the result
          expected 1.0 at [1]
          got 1.5, a relative difference of 0.5 (allowed: 0)
    """
    __tracebackhide__ = True
    _compare(a, b, "not the same", dict.fromkeys(TOLERANCE, 0.0), space)


def assert_close(a: Any, b: Any, *, space: WeightSpace | None = None) -> None:
    """Asserts that tensors, or dicts or sequences of tensors, differ by no more than rounding.

    Args:
        a: What is expected.
        b: What was computed; the same names or length, shapes and types.
        space: Names the axes in the message, for dicts by parameter name.

    Raises:
        AssertionError: With the worst element.
    """
    __tracebackhide__ = True
    _compare(a, b, "not close", TOLERANCE, space)


def assert_function_preserved(
    space: WeightSpace,
    module: nn.Module,
    args: tuple[Any, ...] | Tensor = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    kinds: Sequence[str] = KINDS,
    generator: torch.Generator | None = None,
) -> None:
    """Asserts that moving a module's weights by the group of `space` leaves its outputs.

    First on the weights as they are, in the module's own precision and with each group alone; then
    by `wspace.verify`, which replaces constant weights and demands that something else fails.

    Args:
        space: The claim.
        module: Module with real weights; run in evaluation mode and left as it was.
        args: Example positional inputs (a single tensor stands for a tuple of one).
        kwargs: Example keyword inputs.
        kinds: Symmetries to move.
        generator: Source of randomness; seeded with 0 when None.

    Raises:
        AssertionError: Naming what was moved and the output element that changed most.

    Example:
        >>> import wspace
        >>> mlp, x = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)), torch.randn(4, 3)
        >>> assert_function_preserved(wspace.trace(mlp, x), mlp, x)
    """
    __tracebackhide__ = True
    args = (args,) if isinstance(args, Tensor) else tuple(args)
    generator = _seeded(generator)
    state: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    state.update(module.named_buffers(remove_duplicate=False))
    before = _outputs(module, state, args, kwargs)
    for label, t in _elements(space, kinds, generator):
        after = _outputs(module, act(t, state, space), args, kwargs)
        _compare(before, after, f"moving {label} changed the output", TOLERANCE, None)
    try:
        verify(space, module, args, kwargs, generator=generator, kinds=tuple(kinds))
    except NotASymmetry as error:
        raise AssertionError(str(error)) from error


def assert_equivariant(
    layer: Callable[[State], State],
    space: WeightSpace,
    features: State,
    *,
    channels: bool = False,
    kinds: Sequence[str] = ("permutation",),
    generator: torch.Generator | None = None,
) -> None:
    """Asserts that a layer commutes with the group: ``layer(act(t, x)) = act(t, layer(x))``.

    Args:
        layer: Maps features to features, with any batch axes and number of channels.
        space: Weight space of both.
        features: Input; should be random, since constant features hide what a layer does.
        channels: True if the last axis of every tensor counts channels.
        kinds: Symmetries to move.
        generator: Source of randomness; seeded with 0 when None.

    Raises:
        AssertionError: Naming what was moved and the element that is worst.

    Example:
        >>> import wspace
        >>> space = wspace.trace(nn.Linear(3, 4), torch.zeros(1, 3))
        >>> x = {"weight": torch.randn(4, 3), "bias": torch.randn(4)}
        >>> assert_equivariant(lambda x: {name: 2 * t for name, t in x.items()}, space, x)
    """
    __tracebackhide__ = True
    plain = layer(features)
    for label, t in _elements(space, kinds, _seeded(generator)):
        moved = layer(_act(t, features, space, channels=channels))
        _compare(
            _act(t, plain, space, channels=channels),
            moved,
            f"not equivariant: moving {label} and then applying the layer is not the same as "
            "applying it first",
            TOLERANCE,
            space,
        )


def assert_invariant(
    function: Callable[[State], Any],
    space: WeightSpace,
    features: State,
    *,
    channels: bool = False,
    kinds: Sequence[str] = ("permutation",),
    generator: torch.Generator | None = None,
) -> None:
    """Asserts that a function does not see the group: ``function(act(t, x)) = function(x)``.

    Args:
        function: Maps features to a tensor, or to a dict or sequence of tensors.
        space: Weight space of the features.
        features: Input; should be random.
        channels: True if the last axis of every tensor counts channels.
        kinds: Symmetries to move.
        generator: Source of randomness; seeded with 0 when None.

    Raises:
        AssertionError: Naming what was moved and the element that is worst.
    """
    __tracebackhide__ = True
    plain = function(features)
    for label, t in _elements(space, kinds, _seeded(generator)):
        moved = function(_act(t, features, space, channels=channels))
        _compare(plain, moved, f"not invariant: moving {label} changed", TOLERANCE, None)


def assert_group_action(
    space: WeightSpace, state: State, *, generator: torch.Generator | None = None
) -> None:
    """Asserts that `act` is an action of a group: identity, composition and inverses.

    Permutations must agree bit by bit, factors up to `ROUNDING`. The state is not modified.

    Args:
        space: The weight space.
        state: A state of it; should be random.
        generator: Source of randomness; seeded with 0 when None.

    Raises:
        AssertionError: Naming the law, and the worst element.
    """
    __tracebackhide__ = True
    generator = _seeded(generator)
    kept = {name: t.clone() for name, t in state.items()}
    for kinds in (("permutation",), KINDS):
        exact = kinds == ("permutation",) or not space.gauges
        allowed = dict.fromkeys(TOLERANCE, 0.0 if exact else ROUNDING)
        t, u = (sample(space, generator=generator, kinds=kinds) for _ in range(2))
        once, other = act(t, state, space), act(u, state, space)
        laws = {
            "the identity moves nothing": (state, act(identity(space), state, space)),
            "compose(t, u) acts as u and then t": (
                act(t, other, space),
                act(compose(t, u), state, space),
            ),
            "inverse(t) undoes t": (state, act(inverse(t), once, space)),
            "t undoes inverse(t)": (state, act(t, act(inverse(t), state, space), space)),
            "compose(inverse(t), t) moves nothing": (
                state,
                act(compose(inverse(t), t), state, space),
            ),
            "act leaves its input as it was": (kept, state),
        }
        for law, (expected, got) in laws.items():
            _compare(expected, got, f"no group action: it fails that {law}", allowed, space)


# ------------------------------------------------------------------ what is moved


def _seeded(generator: torch.Generator | None) -> torch.Generator:
    return generator or torch.Generator().manual_seed(0)


def _elements(
    space: WeightSpace, kinds: Sequence[str], generator: torch.Generator
) -> Iterator[tuple[str, Transform]]:
    """Random group elements, with what they move: everything, then each symmetry alone."""
    yield "all groups at once", sample(space, generator=generator, kinds=kinds)
    moves = [("permutation", name) for name, g in space.groups.items() if not g.fixed]
    moves += [(gauge.kind, gauge.group) for gauge in space.gauges]
    for kind, name in dict.fromkeys(moves):
        if kind in kinds:
            label = name if kind == "permutation" else f"{name} by {kind}"
            yield label, sample(space, generator=generator, kinds=(kind,), groups=[name])


def _act(t: Transform, features: State, space: WeightSpace, *, channels: bool) -> State:
    """The action on features, whose channels are treated as one more batch axis."""
    if not channels:
        return act(t, features, space)
    moved = act(t, {name: x.movedim(-1, 0) for name, x in features.items()}, space)
    return {name: x.movedim(0, -1) for name, x in moved.items()}


def _outputs(
    module: nn.Module, state: State, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None
) -> list[Tensor]:
    """Tensors that a module returns with copies of a state and of the inputs; it is left alone."""
    copies = {id(t): t.detach().clone() for t in state.values()}
    state = {name: copies[id(t)] for name, t in state.items()}  # tied tensors stay tied
    inputs, options = tree_map_only(Tensor, Tensor.clone, (args, dict(kwargs or {})))
    double = any(t.dtype == torch.float64 for t in state.values())
    with (
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
        attributes_restored(module),
        evaluation_mode(module),
        double_precision() if double else nullcontext(),
    ):
        torch.manual_seed(0)
        return [t.clone() for t in tensors_in(functional_call(module, state, inputs, options))]


# -------------------------------------------------------------------- comparison


def _compare(
    expected: Any,
    got: Any,
    what: str,
    allowed: Mapping[torch.dtype, float],
    space: WeightSpace | None,
) -> None:
    """Raises `AssertionError` for the worst element of two trees of tensors, if it is too bad."""
    __tracebackhide__ = True
    left, right = dict(_leaves(expected, "")), dict(_leaves(got, ""))
    if left.keys() != right.keys():
        odd = sorted(left.keys() ^ right.keys())
        raise AssertionError(
            message(f"{what}: other tensors", got=[f"only one side has {k or 'it'}" for k in odd])
        )
    total = max((_magnitude(t) for t in left.values()), default=0.0)
    worst: tuple[float, str] = (-1.0, "")
    for name, a in left.items():
        b = right[name]
        if a.shape != b.shape or a.dtype != b.dtype:
            raise AssertionError(
                message(
                    f"{what}: {name or 'the result'}",
                    expected=f"shape {tuple(a.shape)} of {a.dtype}",
                    got=f"shape {tuple(b.shape)} of {b.dtype}",
                )
            )
        limit = allowed.get(a.dtype, 0.0)
        gap, scale = _gap(a, b), _magnitude(a)
        if gap.numel() and not float(gap.max()) <= limit * scale + _rounding(a, limit) * total:
            worst = max(worst, (float(gap.max()) / (scale or 1.0), name), key=lambda pair: pair[0])
    error, name = worst
    if error >= 0:
        a, b = left[name], right[name]
        place = _unravel(int(_gap(a, b).argmax()), a.shape)
        raise AssertionError(
            message(
                f"{what}: {name or 'the result'}",
                expected=f"{a[place].item()} at {_place(name, place, space)}",
                got=f"{b[place].item()}, a relative difference of {error:.3g} "
                f"(allowed: {allowed.get(a.dtype, 0.0):g})",
            )
        )


def _leaves(tree: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a tree of dicts and sequences, with its place."""
    if isinstance(tree, Tensor):
        yield path, tree.detach()
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    elif isinstance(tree, Sequence) and not isinstance(tree, str):
        for i, value in enumerate(tree):
            yield from _leaves(value, f"{path}[{i}]" if path else f"output {i}")
    else:
        raise TypeError(f"testing: {type(tree).__name__} is not a tensor, dict or sequence")


def _gap(a: Tensor, b: Tensor) -> Tensor:
    """Distance of every pair of entries; infinite where only one is NaN, or infinities differ."""
    wide = torch.complex128 if a.is_complex() else torch.float64
    x, y = a.to(wide), b.to(wide)
    same = (x == y) | (x.isnan() & y.isnan())
    return torch.where(same, 0.0, (x - y).abs()).nan_to_num(nan=torch.inf)


def _magnitude(t: Tensor) -> float:
    finite = t[torch.isfinite(t)].to(torch.float64 if not t.is_complex() else t.dtype).abs()
    return float(finite.max()) if finite.numel() else 0.0


def _rounding(t: Tensor, limit: float) -> float:
    """What rounding of the largest tensor may leave in a small one; 0 if it must be exact."""
    return 8 * torch.finfo(t.dtype).eps if limit else 0.0


def _unravel(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Index of each dimension of a row-major position."""
    place: list[int] = []
    for size in reversed(shape):
        flat, i = divmod(flat, size)
        place.append(i)
    return tuple(reversed(place))


def _place(name: str, place: tuple[int, ...], space: WeightSpace | None) -> str:
    """``[i, j]``, and the axes of a parameter that they index."""
    text = str(list(place))
    param = None if space is None else space.by_name.get(name)
    return text if param is None else f"{text} of {param}"
