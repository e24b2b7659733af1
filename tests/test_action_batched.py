"""Batched group elements: one for each row of a batch, and the same as a loop over the rows."""

import functools

import pytest
import torch
from cases import CASES, FEW, build
from torch import Tensor, nn

import wspace
from wspace.action import KINDS, State, Transform
from wspace.errors import SpaceMismatch
from wspace.space import Axis, Gauge, Group, Param, WeightSpace
from wspace.testing import ROUNDING, assert_same

BATCH = (1, 3)


@functools.cache
def space_of(name: str) -> WeightSpace:
    module, args, kwargs = build(name)
    return wspace.trace(module, args, kwargs)


def states(space: WeightSpace, *lead: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    out: dict[str, Tensor] = {}
    for p in space.params:
        dtype = torch.complex128 if "complex" in p.dtype else torch.float64
        x = torch.randn(*lead, *p.shape, generator=generator, dtype=dtype)
        out |= dict.fromkeys((p.name, *p.ties), x)
    return out


def row(t: Transform, *index: int) -> Transform:
    """The element of one row."""
    return Transform(
        t.space,
        {name: p[index] for name, p in t.permutations.items()},
        {i: s[index] for i, s in t.factors.items()},
    )


def rows() -> list[tuple[int, int]]:
    return [(i, j) for i in range(BATCH[0]) for j in range(BATCH[1])]


def parts(t: Transform) -> dict[str, Tensor]:
    return {**t.permutations, **{str(i): s for i, s in t.factors.items()}}


def assert_rounded(a: State, b: State) -> None:
    for name, x in a.items():
        assert float((x - b[name]).abs().amax()) <= ROUNDING * float(x.abs().amax()), name


@pytest.mark.parametrize(
    "name", [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)
def test_rows_move_as_if_alone(name: str, generator: torch.Generator) -> None:
    space = space_of(name)
    t, u = (wspace.sample(space, batch=BATCH, generator=generator, kinds=KINDS) for _ in range(2))
    state = states(space, *BATCH)
    out, both, back = wspace.act(t, state, space), wspace.compose(t, u), wspace.inverse(t)
    assert t.batch == both.batch == back.batch == (BATCH if space.groups else ())
    for index in rows():
        a, b = row(t, *index), row(u, *index)
        alone = wspace.act(a, {n: x[index] for n, x in state.items()}, space)
        assert_same({n: x[index] for n, x in out.items()}, alone, space=space)
        assert_same(parts(row(both, *index)), parts(wspace.compose(a, b)))
        assert_same(parts(row(back, *index)), parts(wspace.inverse(a)))


@pytest.mark.parametrize(
    "name", [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)
def test_batched_elements_are_a_group(name: str, generator: torch.Generator) -> None:
    space = space_of(name)
    t, u = (wspace.sample(space, batch=(3,), generator=generator, kinds=KINDS) for _ in range(2))
    state = states(space, 3, 2)
    once, twice = wspace.act(u, state, space), wspace.act(wspace.compose(t, u), state, space)
    assert_rounded(wspace.act(t, once, space), twice)
    assert_rounded(state, wspace.act(wspace.inverse(u), once, space))
    for j in range(2):  # axes behind those of the transform are moved alike
        alone = wspace.act(u, {n: x[:, j] for n, x in state.items()}, space)
        assert_same(alone, {n: x[:, j] for n, x in once.items()}, space=space)


def test_rows_have_elements_of_their_own() -> None:
    """What the laws above would not see: the element of the first row on every row."""
    space = space_of("mlp")
    t, state = wspace.sample(space, batch=(3,), kinds=KINDS), states(space, 1)
    out = wspace.act(t, {n: x.expand(3, *x.shape[1:]) for n, x in state.items()}, space)
    with pytest.raises(AssertionError, match=r"not the same: 0\.weight"):
        assert_same({"0.weight": out["0.weight"][0]}, {"0.weight": out["0.weight"][1]})


def test_one_for_all_and_one_for_each_compose(generator: torch.Generator) -> None:
    space = space_of("attention_per_head")
    draw = functools.partial(wspace.sample, space, generator=generator, kinds=KINDS)
    for t, u in ((draw(batch=(3,)), draw()), (draw(), draw(batch=(3,)))):
        state, both = states(space, 3), wspace.compose(t, u)
        assert both.batch == (3,)
        assert {x.shape[0] for x in parts(both).values()} == {3}
        steps = wspace.act(t, wspace.act(u, state, space), space)
        assert_rounded(steps, wspace.act(both, state, space))
    t = draw(batch=(3,))
    assert_same(parts(t), parts(wspace.compose(t, wspace.identity(space))))


def test_an_element_of_part_of_the_group(generator: torch.Generator) -> None:
    """Groups that only one of two elements moves are filled in for every row."""
    space = space_of("mlp")
    t = wspace.sample(space, batch=(3,), groups=["h1"], generator=generator)
    u = wspace.sample(space, groups=["h2"], generator=generator)
    state = states(space, 3)
    both = wspace.compose(t, u)
    assert {n: tuple(p.shape) for n, p in both.permutations.items()} == {
        "h1": (3, 12),
        "h2": (3, 20),
    }
    assert_same(wspace.act(t, wspace.act(u, state, space), space), wspace.act(both, state, space))


def test_graphs_are_moved_row_by_row(generator: torch.Generator) -> None:
    space = space_of("mlp")
    t, state = wspace.sample(space, batch=(3,), generator=generator), states(space, 3, 2)
    moved = wspace.decode(wspace.encode(space, state).act(t))
    assert_same(moved, wspace.act(t, state, space))


def test_slices_of_a_family_change_places_in_each_row() -> None:
    a, d = Group("a", 3, ("permutation",)), Group("d", 2, ("permutation",), ("a",))
    params = tuple(Param(f"e{i}", (Axis((d,)),), at=("a", i), family="e0") for i in range(3))
    space = WeightSpace(params, extra=(a,))
    state = {f"e{i}": torch.arange(4).reshape(2, 2) + 10 * i for i in range(3)}
    p = torch.tensor([[2, 0, 1], [0, 2, 1]])
    q = torch.tensor([[[1, 0], [0, 1], [1, 0]], [[0, 1], [1, 0], [0, 1]]])
    out = wspace.act(Transform(space, {"a": p, "d": q}, {}), state, space)
    for r in range(2):
        for i in range(3):
            want = [int(state[f"e{int(p[r, i])}"][r, q[r, i, j]]) for j in range(2)]
            assert out[f"e{i}"][r].tolist() == want


def test_slices_with_axes_that_depend_on_each_other(generator: torch.Generator) -> None:
    a = Group("a", 3, ("permutation",))
    h, d = Group("h", 2, ("permutation",), ("a",)), Group("d", 4, ("permutation",), ("a", "h"))
    params = tuple(
        Param(f"e{i}", (Axis((d,)), Axis((h,))), at=("a", i), family="e0") for i in range(3)
    )
    space = WeightSpace(params, extra=(a,))
    t, state = wspace.sample(space, batch=(5,), generator=generator), states(space, 5)
    out = wspace.act(t, state, space)
    p, q, r = (t.permutations[n] for n in "ahd")
    for b in range(5):
        for i in range(3):
            x = state[f"e{int(p[b, i])}"][b]
            for j in range(2):
                want = x[r[b, i, j], q[b, i, j]]
                assert torch.equal(out[f"e{i}"][b, :, j], want)


def test_what_does_not_move_is_the_same_object() -> None:
    space = space_of("mlp")
    state = states(space, 3) | {"other": torch.ones(1)}
    out = wspace.act(wspace.sample(space, batch=(3,)), state, space)
    assert out["6.bias"] is state["6.bias"]
    assert out["other"] is state["other"]


def test_ties_stay_tied_in_a_batch() -> None:
    space = space_of("language_model_tied")
    (p,) = (p for p in space.params if p.ties)
    out = wspace.act(wspace.sample(space, batch=(3,)), states(space, 3), space)
    assert out[p.name] is out[p.ties[0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64])
def test_dtypes_are_kept_in_a_batch(dtype: torch.dtype) -> None:
    space = space_of("mlp")
    state = {p.name: torch.ones(3, *p.shape, dtype=dtype) for p in space.params}
    kinds = ("permutation",) if dtype == torch.int64 else KINDS
    out = wspace.act(wspace.sample(space, batch=(3,), kinds=kinds), state, space)
    assert {x.dtype for x in out.values()} == {dtype}


def test_gradients_flow_through_a_batch(generator: torch.Generator) -> None:
    space = space_of("moe_dense")
    state = {n: x.requires_grad_() for n, x in states(space, 3).items()}
    t = wspace.sample(space, batch=(3,), generator=generator, kinds=KINDS)
    sum((x**2).sum() for x in wspace.act(t, state, space).values()).backward()
    assert all(x.grad is not None and bool(x.grad.any()) for x in state.values())


def test_no_rows() -> None:
    space = space_of("moe_dense")
    t = wspace.sample(space, batch=(0,), kinds=KINDS)
    out = wspace.act(t, states(space, 0, 2), space)
    assert all(out[p.name].shape == (0, 2, *p.shape) for p in space.params)
    assert wspace.compose(t, wspace.inverse(t)).batch == (0,)


def test_errors_name_the_batch_axes() -> None:
    space = space_of("mlp")
    t = wspace.sample(space, batch=(3,))
    for lead in ((), (4,), (2, 3)):
        with pytest.raises(SpaceMismatch, match=r"'0\.weight' does not have the batch axes"):
            wspace.act(t, states(space, *lead), space)
    family = space_of("moe_dense")
    with pytest.raises(SpaceMismatch, match="does not have the batch axes of the transform"):
        wspace.act(wspace.sample(family, batch=(3,)), states(family, 2), family)
    with pytest.raises(SpaceMismatch, match=r"different batch axes\n.*\n.*\(3,\) and \(4,\)"):
        wspace.compose(t, wspace.sample(space, batch=(4,)))
    uneven = Transform(space, {**t.permutations, "h1": t.permutations["h1"][:2]}, {})
    with pytest.raises(SpaceMismatch, match=r"different batch axes\n(.*\n)*.*\(2,\) of 'h1'"):
        wspace.act(uneven, states(space, 3), space)
    with pytest.raises(SpaceMismatch, match="indices of 'h1' do not fit"):
        _ = Transform(space, {"h1": torch.tensor(0)}, {}).batch


def test_text_says_the_batch() -> None:
    space = space_of("mlp")
    assert "batch (3,)" in repr(wspace.sample(space, batch=(3,)))
    assert "batch" not in repr(wspace.sample(space))


def test_factors_alone_carry_the_batch() -> None:
    a = Group("a", 2, ("permutation", "scale"))
    gauge = Gauge("scale", "a", (("w", 0, 0, 2),))
    space = WeightSpace((Param("w", (Axis((a,)),)),), gauges=(gauge,))
    s = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).double()
    out = wspace.act(Transform(space, {}, {0: s}), {"w": torch.ones(2, 5, 2)}, space)["w"]
    assert out[0].tolist() == [[1, 4]] * 5
    assert out[1].tolist() == [[9, 16]] * 5


def test_inrs_move_in_one_go() -> None:
    """No Python loop over the rows: as many tensor operations for 200 rows as for 2."""
    net = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
    space = wspace.trace(net, torch.zeros(1, 2))
    counts = []
    for n in (2, 200):
        t, state = wspace.sample(space, batch=(n,), kinds=KINDS), states(space, n)
        with torch.profiler.profile() as seen:
            wspace.act(t, state, space)
        counts.append(sum(e.count for e in seen.key_averages()))
    assert counts[0] == counts[1]
