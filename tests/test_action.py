"""The action by hand: which entry goes where, for every kind of axis and every kind of symmetry."""

import math

import pytest
import torch
from cases import CASES, build
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import wspace
from wspace import action
from wspace.action import State, Transform
from wspace.errors import SpaceMismatch
from wspace.space import Axis, Concat, Gauge, Group, Param, WeightSpace
from wspace.testing import assert_group_action, assert_same

A = Group("a", 3, ("permutation",))
B = Group("b", 4, ("permutation",))
D = Group("d", 2, ("permutation",), ("a",))
X = Group("5", 5)

P, Q = torch.tensor([2, 0, 1]), torch.tensor([1, 3, 0, 2])
W = torch.tensor([[1, 0], [0, 1], [1, 0]])  # d under each output index of a


def moved(axes: tuple[Axis, ...], *names: str) -> tuple[Tensor, Tensor]:
    """A tensor of labels with these axes, before and after the permutations named."""
    space = WeightSpace((Param("x", axes, dtype="int64"),), extra=(A, B, D, X))
    table = {"a": P, "b": Q, "d": W}
    x = torch.arange(space.params[0].numel).reshape(space.params[0].shape)
    t = Transform(space, {name: table[name] for name in names}, {})
    return x, wspace.act(t, {"x": x}, space)["x"]


# --------------------------------------------------------------------------- permutations


def test_permutations_gather() -> None:
    x, y = moved((Axis((A,)),), "a")
    assert all(y[i] == x[P[i]] for i in range(3))


def test_two_axes() -> None:
    x, y = moved((Axis((A,)), Axis((B,))), "a", "b")
    assert all(y[i, j] == x[P[i], Q[j]] for i in range(3) for j in range(4))


def test_a_group_twice() -> None:
    x, y = moved((Axis((A,)), Axis((A,))), "a")
    assert all(y[i, j] == x[P[i], P[j]] for i in range(3) for j in range(3))


def test_product_with_fixed() -> None:
    x, y = moved((A * X,), "a")
    assert all(y[5 * i + k] == x[5 * P[i] + k] for i in range(3) for k in range(5))
    x, y = moved((X * A,), "a")
    assert all(y[3 * k + i] == x[3 * k + P[i]] for i in range(3) for k in range(5))


def test_concatenation() -> None:
    x, y = moved((A + X + B + A,), "a", "b")
    assert y[:3].tolist() == x[P].tolist()
    assert y[3:8].tolist() == x[3:8].tolist()
    assert y[8:12].tolist() == x[8 + Q].tolist()
    assert y[12:].tolist() == x[12 + P].tolist()


@pytest.mark.parametrize("together", [True, False])
def test_wreath(together: bool) -> None:
    """``out[i, j] = in[p[i], q[i, j]]``: dependent permutations are read at output indices."""
    axes = (A * D,) if together else (Axis((A,)), Axis((D,)))
    x, y = moved(axes, "a", "d")
    x, y = x.reshape(3, 2), y.reshape(3, 2)
    assert all(y[i, j] == x[P[i], W[i, j]] for i in range(3) for j in range(2))


def test_wreath_in_other_orders() -> None:
    x, y = moved((D * A,), "a", "d")
    x, y = x.reshape(2, 3), y.reshape(2, 3)
    assert all(y[j, i] == x[W[i, j], P[i]] for i in range(3) for j in range(2))
    x, y = moved((Axis((D,)), Axis((B,)), Axis((A,))), "a", "d", "b")
    for i in range(3):
        for j in range(2):
            assert all(y[j, k, i] == x[W[i, j], Q[k], P[i]] for k in range(4))


def test_wreath_in_concatenations() -> None:
    x, y = moved((A * Axis((Concat((Axis((D,)), D * X)),)),), "a", "d")
    x, y = x.reshape(3, 12), y.reshape(3, 12)
    for i in range(3):
        for j in range(2):
            assert y[i, j] == x[P[i], W[i, j]]
            assert all(y[i, 2 + 5 * j + k] == x[P[i], 2 + 5 * W[i, j] + k] for k in range(5))


def test_only_the_inner_group_moves() -> None:
    x, y = moved((A * D,), "d")
    assert all(y[2 * i + j] == x[2 * i + W[i, j]] for i in range(3) for j in range(2))


def test_slices_of_a_family() -> None:
    """Experts in a list: the tensors change places, and what depends on them is read there."""
    params = tuple(
        Param(f"e{i}", (Axis((D,)), Axis((B,))), at=("a", i), family="e0", dtype="int64")
        for i in range(3)
    )
    space = WeightSpace(params, extra=(A,))
    state = {f"e{i}": torch.arange(8).reshape(2, 4) + 100 * i for i in range(3)}
    t = Transform(space, {"a": P, "b": Q, "d": W}, {})
    out = wspace.act(t, state, space)
    for i in range(3):
        want = state[f"e{int(P[i])}"][W[i]][:, Q]
        assert torch.equal(out[f"e{i}"], want)
    assert_group_action(space, state)
    assert space.coverage == 1.0


def test_families_compose_with_batches() -> None:
    params = tuple(Param(f"e{i}", (Axis((D,)),), at=("a", i), family="e0") for i in range(3))
    space = WeightSpace(params, extra=(A,))
    assert_group_action(space, {p.name: torch.randn(4, 2) for p in params})


# ------------------------------------------------------------------- scale, sign and phase


def mlp_gauge(kind: str, *more: tuple) -> WeightSpace:
    w, b, v = (
        Param("w", (Axis((A,)), Axis((X,)))),
        Param("b", (Axis((A,)),)),
        Param("v", (Axis((Group("2", 2),)), Axis((A,)))),
    )
    slots = (("w", 0, 0, 1), ("b", 0, 0, 1), ("v", 1, 0, -1))
    return WeightSpace((w, b, v), gauges=(Gauge(kind, "a", slots, *more),))


def state_of(space: WeightSpace) -> dict[str, Tensor]:
    return {p.name: torch.randn(p.shape, dtype=torch.float64) for p in space.params}


def test_scale_multiplies_after_the_permutation() -> None:
    space = mlp_gauge("scale")
    state, s = state_of(space), torch.tensor([2.0, 3.0, 0.5]).double()
    out = wspace.act(Transform(space, {"a": P}, {0: s}), state, space)
    assert_same(out["w"], s[:, None] * state["w"][P])
    assert_same(out["b"], s * state["b"][P])
    assert_same(out["v"], state["v"][:, P] * s**-1.0)


def test_sampled_factors_are_of_their_kind(generator: torch.Generator) -> None:
    draw = lambda kind: wspace.sample(  # noqa: E731
        mlp_gauge(kind), generator=generator, kinds=(kind,)
    ).factors[0]
    scales = torch.cat([draw("scale") for _ in range(50)])
    assert bool(((scales >= 0.25) & (scales <= 4)).all())
    assert scales.log().std() > 0.5
    assert set(torch.cat([draw("sign") for _ in range(20)]).tolist()) == {-1.0, 1.0}
    phases = torch.cat([draw("phase") for _ in range(60)])
    assert set(phases.tolist()) == {-2.0, -1.0, 0.0, 1.0, 2.0}


@pytest.mark.parametrize(
    ("act", "kind", "more"),
    [
        (nn.ReLU(), "scale", ()),
        (nn.Tanh(), "sign", ()),
        (torch.sin, "phase", ((("b", 0, 0, math.pi),),)),
    ],
)
def test_gauges_preserve_a_network(
    act: nn.Module, kind: str, more: tuple, generator: torch.Generator
) -> None:
    space = mlp_gauge(kind, *more)
    if kind == "phase":  # sin(u + πk) = (-1)^k sin u: the shift is undone behind it
        (gauge,) = space.gauges
        space = WeightSpace(
            space.params, gauges=(Gauge("phase", "a", (("v", 1, 0, 1),), gauge.shifts),)
        )
    state, x = state_of(space), torch.randn(7, 5, dtype=torch.float64)

    def run(s: dict[str, Tensor]) -> Tensor:
        return act(x @ s["w"].T + s["b"]) @ s["v"].T

    t = wspace.sample(space, generator=generator, kinds=("permutation", kind))
    torch.testing.assert_close(run(wspace.act(t, state, space)), run(state))
    assert_group_action(space, state)


def test_a_gauge_of_one_part_of_a_concatenation() -> None:
    space = WeightSpace((Param("w", (A + A,)),), gauges=(Gauge("scale", "a", (("w", 0, 1, 1),)),))
    s = torch.tensor([2.0, 3.0, 5.0]).double()
    out = wspace.act(Transform(space, {}, {0: s}), {"w": torch.ones(6)}, space)["w"]
    assert out.tolist() == [1, 1, 1, 2, 3, 5]


def test_a_gauge_of_a_wreath() -> None:
    space = WeightSpace((Param("w", (A * D,)),), gauges=(Gauge("scale", "d", (("w", 0, 0, 1),)),))
    s = torch.arange(1.0, 7.0).double().reshape(3, 2)
    out = wspace.act(Transform(space, {}, {0: s}), {"w": torch.ones(6)}, space)["w"]
    assert out.tolist() == [1, 2, 3, 4, 5, 6]
    assert_group_action(space, {"w": torch.randn(6).double()})


# ------------------------------------------------------------------------------- the group


def space_for(sizes: list[int]) -> WeightSpace:
    """A product of groups, each of which may depend on those before it."""
    groups = [
        Group(f"g{i}", n, ("permutation",), tuple(f"g{j}" for j in range(i)))
        for i, n in enumerate(sizes)
    ]
    return WeightSpace((Param("x", (Axis(tuple(groups)),)),))


@given(st.lists(st.integers(2, 4), min_size=1, max_size=3), st.integers(0, 2**32))
def test_nested_wreath_products_are_groups(sizes: list[int], seed: int) -> None:
    space = space_for(sizes)
    generator = torch.Generator().manual_seed(seed)
    assert_group_action(space, {"x": torch.arange(math.prod(sizes)).float()}, generator=generator)


@given(st.integers(0, 2**32))
def test_composition_is_associative(seed: int) -> None:
    space, generator = space_for([3, 2, 2]), torch.Generator().manual_seed(seed)
    t, u, v = (wspace.sample(space, generator=generator) for _ in range(3))
    left = wspace.compose(wspace.compose(t, u), v)
    right = wspace.compose(t, wspace.compose(u, v))
    assert_same(dict(left.permutations), dict(right.permutations))


def test_composition_by_hand() -> None:
    space = WeightSpace((Param("x", (Axis((A,)),)),))
    p, q = Transform(space, {"a": P}, {}), Transform(space, {"a": torch.tensor([0, 2, 1])}, {})
    assert wspace.compose(p, q).permutations["a"].tolist() == [1, 0, 2]  # q[p]
    assert wspace.inverse(p).permutations["a"].tolist() == [1, 2, 0]
    assert wspace.compose(p, wspace.identity(space)).permutations["a"].tolist() == P.tolist()


def test_samples_cover_the_group() -> None:
    space, generator = space_for([2, 3]), torch.Generator().manual_seed(0)
    x = {"x": torch.arange(6)}
    seen = {
        tuple(wspace.act(wspace.sample(space, generator=generator), x, space)["x"].tolist())
        for _ in range(700)
    }
    assert len(seen) == 2 * 6**2


# ---------------------------------------------------------------------- states and errors


@pytest.fixture
def space() -> WeightSpace:
    module = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    return wspace.trace(module, torch.zeros(1, 3))


def test_what_does_not_move_is_the_same_object(space: WeightSpace) -> None:
    state = {p.name: torch.randn(p.shape) for p in space.params} | {"other": torch.ones(1)}
    out = wspace.act(wspace.sample(space), state, space)
    assert out["2.bias"] is state["2.bias"]
    assert out["other"] is state["other"]
    assert wspace.act(wspace.identity(space), state, space) == state


def test_ties_stay_tied() -> None:
    space = WeightSpace((Param("x", (Axis((A,)),), ties=("y", "z")),))
    x = torch.arange(3)
    out = wspace.act(Transform(space, {"a": P}, {}), {"x": x, "y": x}, space)
    assert out["x"] is out["y"]
    assert set(out) == {"x", "y"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64])
def test_dtypes_are_kept(space: WeightSpace, dtype: torch.dtype) -> None:
    state = {p.name: torch.ones(p.shape, dtype=dtype) for p in space.params}
    kinds = ("permutation",) if dtype == torch.int64 else ("permutation", "scale")
    out = wspace.act(wspace.sample(space, kinds=kinds), state, space)
    assert {t.dtype for t in out.values()} == {dtype}


def test_gradients_flow(space: WeightSpace) -> None:
    state = {p.name: torch.randn(p.shape, requires_grad=True) for p in space.params}
    out = wspace.act(wspace.sample(space, kinds=("permutation", "scale")), state, space)
    sum(t.sum() for t in out.values()).backward()
    assert all(t.grad is not None for t in state.values())


def test_sampling_one_group_only() -> None:
    module = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2))
    space = wspace.trace(module, torch.zeros(1, 3))
    assert set(wspace.sample(space, groups=["h2"]).permutations) == {"h2"}
    assert not wspace.sample(space, groups=[]).permutations
    assert not wspace.sample(space, kinds=()).permutations


def test_errors(space: WeightSpace) -> None:
    state = {p.name: torch.randn(p.shape) for p in space.params}
    other = wspace.trace(nn.Linear(3, 4), torch.zeros(1, 3))
    t = wspace.sample(space)
    with pytest.raises(SpaceMismatch, match="unknown 'rotation'"):
        wspace.sample(space, kinds=("rotation",))
    with pytest.raises(SpaceMismatch, match="unknown 'h9'"):
        wspace.sample(space, groups=["h9"])
    with pytest.raises(SpaceMismatch, match="another weight space"):
        wspace.act(wspace.identity(other), state, space)
    with pytest.raises(SpaceMismatch, match=r"no tensor '0\.bias'"):
        wspace.act(t, {n: x for n, x in state.items() if n != "0.bias"}, space)
    with pytest.raises(SpaceMismatch, match="different weight spaces"):
        wspace.compose(t, wspace.identity(other))


def test_equal_seeds_give_equal_samples(space: WeightSpace) -> None:
    a, b = (wspace.sample(space, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert_same(dict(a.permutations), dict(b.permutations))


def test_the_global_generator_is_used_by_default(space: WeightSpace) -> None:
    torch.manual_seed(0)
    a = wspace.sample(space)
    assert not torch.equal(a.permutations["h1"], wspace.sample(space).permutations["h1"])
    torch.manual_seed(0)
    assert torch.equal(a.permutations["h1"], wspace.sample(space).permutations["h1"])


# --------------------------------------------------------------------------- tensor by tensor


class Watched(dict[str, Tensor]):
    """A state that remembers which tensors were read."""

    def __init__(self, state: State) -> None:
        super().__init__(state)
        self.read: list[str] = []

    def __getitem__(self, name: str) -> Tensor:
        self.read.append(name)
        return super().__getitem__(name)


@pytest.mark.parametrize("name", CASES)
def test_one_tensor_is_moved_as_in_the_whole(name: str) -> None:
    module, args, kwargs = build(name)
    space, kinds = wspace.trace(module, args, kwargs), ("permutation", "scale", "sign", "phase")
    state = {p.name: torch.randn(p.shape, dtype=torch.float64) for p in space.params}
    state |= {tie: state[p.name] for p in space.params for tie in p.ties} | {"other": torch.ones(2)}
    t = wspace.sample(space, generator=torch.Generator().manual_seed(0), kinds=kinds)
    whole = wspace.act(t, state, space)
    for tensor in state:
        watched = Watched(state)
        assert_same(action.moved(t, tensor, watched, space), whole[tensor])
        assert len(watched.read) == 1
