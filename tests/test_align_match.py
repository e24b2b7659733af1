"""Matching: what it recovers, what it cannot miss, and what it refuses."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping

import pytest
import torch
from oracles_align import best_by_force, closeness, random_state
from torch import Tensor, nn

import wspace
from wspace.action import KINDS, State, Transform, act, compose, identity, inverse, sample
from wspace.align import Matching, match, match_many, objective
from wspace.errors import SpaceMismatch
from wspace.space import Axis, Gauge, Group, Param, WeightSpace
from wspace.testing import TOLERANCE, assert_close, assert_same

TIGHT = TOLERANCE[torch.float64]
PERMUTATION = ("permutation",)


class Sine(nn.Module):
    """The activation of a SIREN."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(3 * x)


def network(*widths: int, activation: type[nn.Module] = nn.ReLU) -> WeightSpace:
    """The space of a multi-layer perceptron."""
    layers: list[nn.Module] = []
    for a, b in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(a, b), activation()]
    return wspace.trace(nn.Sequential(*layers[:-1]), torch.zeros(2, widths[0]))


def free(name: str, size: int, *over: str) -> Group:
    return Group(name, size, PERMUTATION, over)


def space_of(**axes: tuple[Axis | Group, ...]) -> WeightSpace:
    """A space by hand, of parameters by name."""
    made = {n: tuple(x if isinstance(x, Axis) else Axis((x,)) for x in v) for n, v in axes.items()}
    return WeightSpace(tuple(Param(n, v) for n, v in made.items()))


def attention(heads: int, size: int, value: int) -> WeightSpace:
    """One attention layer between fixed axes."""
    h, e = free("h", heads), Group("e", 7)
    d, c = free("d", size, "h"), free("c", value, "h")
    return space_of(q=(h * d, e), k=(h * d, e), v=(h * c, e), o=(e, h * c))


def reached(found: Matching, b: State, space: WeightSpace) -> dict[str, Tensor]:
    return act(found, b, space)


# ------------------------------------------------------------------------ recovery


@pytest.mark.parametrize("kinds", [PERMUTATION, ("permutation", "sign", "phase"), KINDS])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, Sine, nn.GELU])
def test_one_hidden_layer_is_always_recovered(
    activation: type[nn.Module], kinds: tuple[str, ...], generator: torch.Generator
) -> None:
    """L8, for 60 random networks at once."""
    space = network(3, 11, 2, activation=activation)
    a = random_state(space, generator, 60)
    t = sample(space, batch=(60,), generator=generator, kinds=kinds)
    found = match(a, act(t, a, space), space, kinds=kinds)
    back = inverse(t)
    for g, p in back.permutations.items():
        assert_same(p, found.permutations[g])
    assert_close(a, act(found, act(t, a, space), space))
    other = random_state(space, generator, 60)  # the control: another network is not recovered
    worst = (
        act(match(a, other, space, kinds=kinds), other, space)["0.weight"] - a["0.weight"]
    ).abs()
    assert float(worst.flatten(1).amax(1).min()) > 0.1


@pytest.mark.parametrize("start", ["forward", "sinkhorn", "identity", "random"])
def test_heads_are_recovered(start: str, generator: torch.Generator) -> None:
    space = attention(4, 3, 5)
    for _ in range(5):
        a = random_state(space, generator)
        t = sample(space, generator=generator)
        found = match(a, act(t, a, space), space, start=start, generator=generator)
        assert_same(dict(inverse(t).permutations), dict(found.permutations))


def test_deep_networks_are_recovered_layer_by_layer(generator: torch.Generator) -> None:
    """From the inputs on, each layer is certain, however weak; the identity often fails."""
    space = network(2, 20, 21, 22, 23, 3)
    a = {
        n: x * (0.0 if n.endswith("bias") else 0.1 if n == "0.weight" else 1.0)
        for n, x in random_state(space, generator, 20).items()
    }
    t = sample(space, batch=(20,), generator=generator)
    b = act(t, a, space)
    assert_same(a, act(match(a, b, space), b, space))
    plain = act(match(a, b, space, start="identity"), b, space)
    wrong = (plain["2.weight"] != a["2.weight"]).flatten(1).any(1)
    assert bool(wrong.any())


# --------------------------------------------------------------- against brute force


def small_spaces() -> Iterator[tuple[str, WeightSpace]]:
    g, h, x, y = free("g", 5), free("h", 4), Group("x", 3), Group("y", 2)
    yield "one group", space_of(w=(g, x), b=(g,), v=(y, g))
    yield "one group, twice", space_of(w=(h, x), u=(h, h), v=(y, h))
    yield "one group, thrice", space_of(w=(h, x), u=(h, h, h))
    yield "two groups", space_of(w=(h, x), b=(h,), u=(g, h), v=(y, g))
    yield "two groups, one twice", space_of(w=(h, x), u=(h, h), v=(free("f", 3), h))
    yield "heads", attention(3, 2, 2)
    heads, dims = free("heads", 2), free("dims", 3, "heads")
    yield "heads that meet", space_of(w=(heads * dims, x), u=(heads, heads), b=(heads,))
    yield "within heads, twice", space_of(w=(heads * dims, x), u=(heads, dims, dims))
    yield "heads twice, with dims", space_of(w=(heads * dims, x), u=(heads * dims, heads * dims))
    deep = free("deep", 2, "heads", "pairs")
    pairs = free("pairs", 2, "heads")
    yield "heads in heads", space_of(w=(heads * pairs * deep, x), v=(heads, y))
    fixed = Group("fixed", 3)
    yield "within fixed", space_of(w=(fixed * free("d", 3, "fixed"), x))
    a, b = free("a", 2), free("b", 3)
    yield "parts", space_of(w=(a + b + a, x), u=(y, a * b))


SMALL = dict(small_spaces())
EXACT = {"one group", "one group, twice", "heads", "heads in heads", "within fixed"}
EXACT |= {"within heads, twice", "one group, thrice"}


@pytest.mark.parametrize("name", SMALL)
def test_no_element_is_better(name: str, generator: torch.Generator) -> None:
    """Brute force over whole groups; where a step is not exact, with restarts."""
    space = SMALL[name]
    below = 0
    for _ in range(4):
        a, b = random_state(space, generator), random_state(space, generator)
        best = best_by_force(a, b, space)
        restarts = 0 if name in EXACT else 20
        found = match(a, b, space, restarts=restarts, generator=generator)
        size = float(closeness(a, a, a, space))
        assert float(found.objective) == pytest.approx(best, abs=TIGHT * size)
        below += float(found.start_objective) < best - 1e-6 * size
    assert below  # the identity is not the best, so there was something to find


def test_steps_that_lose_are_taken_back(generator: torch.Generator) -> None:
    """Seven units on three axes, and dims on two of one tensor: steps are only guesses there."""
    g, x, heads = free("g", 7), Group("x", 2), free("heads", 2)
    wide = heads * free("dims", 6, "heads")
    for space in (space_of(w=(g, x), u=(g, g, g)), space_of(w=(wide, x), u=(wide, wide))):
        a, b = random_state(space, generator, 20), random_state(space, generator, 20)
        found = match(a, b, space, start="identity")
        assert bool((found.history.diff(dim=0) >= 0).all())
        assert_close(closeness(a, b, act(found, b, space), space), found.objective)
        assert_close(found.start_objective, found.history[0])
        assert bool((found.objective > found.start_objective).any())


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_no_element_with_signs_is_better(
    activation: type[nn.Module], generator: torch.Generator
) -> None:
    space = network(3, 4, 2, activation=activation)
    kinds = ("permutation", "sign")
    gains = 0
    for _ in range(4):
        a, b = random_state(space, generator), random_state(space, generator)
        found = match(a, b, space, kinds=kinds)
        best = best_by_force(a, b, space, kinds)
        assert float(found.objective) == pytest.approx(best, abs=TIGHT)
        gains += best > float(match(a, b, space).objective) + 1e-6
    assert gains == (4 if activation is nn.Tanh else 0)


def signed_heads() -> WeightSpace:
    """Heads that may change sign as a whole, and dimensions that may within them."""
    h, x, y = free("h", 2), Group("x", 3), Group("y", 2)
    d = free("d", 2, "h")
    plain = space_of(w=(h * d, x), v=(y, h * d), u=(h, x))
    whole = Gauge("sign", "h", (("w", 0, 0, 1), ("u", 0, 0, 1)))
    within = Gauge("sign", "d", (("w", 0, 0, 1), ("v", 1, 0, 1)))
    return WeightSpace(plain.params, (whole, within))


def test_signs_of_heads_and_within_them(generator: torch.Generator) -> None:
    """All are chosen in one step, but for those of units with more signs than are tried."""
    space, kinds = signed_heads(), ("permutation", "sign")
    more = WeightSpace(space.params, (*[space.gauges[0]] * 3, *space.gauges))
    turned = 0
    for _ in range(10):
        a, b = random_state(space, generator), random_state(space, generator)
        found = match(a, b, space, kinds=kinds)
        assert_close(closeness(a, b, act(found, b, space), space), found.objective)
        best = best_by_force(a, b, space, kinds)
        assert float(found.objective) == pytest.approx(best, abs=TIGHT)
        turned += best > best_by_force(a, b, space, ("permutation",)) + TIGHT
        again = match(a, b, more, kinds=kinds)
        assert_close(closeness(a, b, act(again, b, more), more), again.objective)
        assert float(again.objective) == pytest.approx(best, abs=TIGHT)
    assert turned == 10


def test_each_tensor_counts_once(generator: torch.Generator) -> None:
    """A tensor counted twice (as rebasin does) changes the optimum; a tie is one tensor."""
    g, x, y = free("g", 5), Group("x", 2), Group("y", 2)
    one = space_of(w=(g, x), v=(y, g))
    doubled = space_of(w=(g, x), again=(g, x), v=(y, g))
    tied = WeightSpace((Param("w", one["w"].axes, ties=("again",)), Param("v", one["v"].axes)))
    changed = 0
    for _ in range(20):
        a, b = random_state(doubled, generator), random_state(doubled, generator)
        a["again"], b["again"] = a["w"], b["w"]
        found = match(a, b, one)
        assert_same(dict(found.permutations), dict(match(a, b, tied).permutations))
        changed += not torch.equal(found.permutations["g"], match(a, b, doubled).permutations["g"])
    assert changed > 3


# --------------------------------------------------------------- objective and course


def test_the_objective_is_what_it_says(generator: torch.Generator) -> None:
    space = network(3, 6, 5, 2, activation=Sine)
    a, b = random_state(space, generator, 4), random_state(space, generator, 4)
    assert_close(closeness(a, b, b, space), objective(a, b, space))
    for kinds in (PERMUTATION, ("permutation", "sign", "phase"), ("sign",), ("phase",)):
        found = match(a, b, space, kinds=kinds, restarts=2, generator=generator)
        moved = act(found, b, space)
        assert_close(closeness(a, b, moved, space), found.objective)
        assert_close(found.objective, found.history[-1])
        assert_close(found.objective, found.restarts.amax(0))
        assert_close(found.start_objective, objective(a, b, space))
        assert bool((found.history.diff(dim=0) >= 0).all())
        assert found.converged
        assert bool((found.objective > found.start_objective).all())
        assert set(found.permutations) == (set(space.groups) if "permutation" in kinds else set())


@pytest.mark.parametrize("start", ["forward", "identity", "sinkhorn"])
@pytest.mark.parametrize("kinds", [PERMUTATION, ("permutation", "sign")])
def test_no_step_gains_on_the_result(
    start: str, kinds: tuple[str, ...], generator: torch.Generator
) -> None:
    """Every group is asked again after what it meets has changed."""
    steps = 0
    wide = network(30, 9, 8, 7, 2, activation=nn.Tanh)  # a first layer whose table is kept
    for space in (wide, network(3, 9, 8, 7, 2), attention(3, 4, 2)):
        a, b = random_state(space, generator, 10), random_state(space, generator, 10)
        found = match(a, b, space, start=start, kinds=kinds)
        steps += len(found.history) - 1
        again = match(a, act(found, b, space), space, start="identity", kinds=kinds)
        assert found.converged
        assert_close(closeness(a, b, act(found, b, space), space), found.history[-1])
        assert len(again.history) == 1
    assert steps


def test_a_start_is_where_the_ascent_starts(generator: torch.Generator) -> None:
    space = network(3, 8, 9, 2)
    a = random_state(space, generator)
    t = sample(space, generator=generator, kinds=KINDS)
    b = act(t, a, space)
    found = match(a, b, space, start=inverse(t))
    assert_close(a, act(found, b, space))
    assert len(found.history) == 1  # nothing was left to do
    assert len(match(a, b, space, start="identity").history) > 1


@pytest.mark.parametrize("start", ["forward", "sinkhorn"])
def test_models_of_one_ancestor_stay_together(start: str, generator: torch.Generator) -> None:
    """Where the first layers alone differ, going forward would lead away; in some rows only."""
    space = network(4, 20, 21, 22, 2)
    biases = {n for n in space.by_name if n.endswith("bias")}
    a, b = random_state(space, generator, 20), random_state(space, generator, 20)
    a, b = ({n: x * (0.0 if n in biases else 1.0) for n, x in s.items()} for s in (a, b))
    related = torch.arange(20) < 10  # half of the rows
    for n in b:
        if not n.startswith("0."):
            b[n][related] = a[n][related] + 0.3 * b[n][related]
    last = torch.arange(22)
    last[:2] = torch.tensor([1, 0])  # two units of the last group, which going forward is sure of
    b = act(Transform(space, {"h3": last}, {}), b, space)
    found = match(a, b, space, start=start)
    plain = match(a, b, space, start="identity")
    assert bool((found.objective >= found.start_objective).all())
    ahead = found.history[0] - found.start_objective
    assert bool((ahead >= -1e-9).all())
    if start == "forward":
        assert int((ahead.abs() < 1e-9)[:10].sum()) > 5
    assert_close(plain.objective[:10], found.objective[:10])
    assert float((found.objective - plain.objective)[10:].mean()) > 0.1
    assert bool((ahead[10:] > 0.1).all())
    assert len(match(a, act(found, b, space), space, start="identity").history) == 1


def test_restarts_find_more(generator: torch.Generator) -> None:
    space = network(4, 10, 11, 12, 3)
    a, b = random_state(space, generator, 5), random_state(space, generator, 5)
    one = match(a, b, space, start="identity")
    more = match(a, b, space, start="identity", restarts=10, generator=generator)
    assert more.restarts.shape == (11, 5)
    assert_same(one.objective, more.restarts[0])
    assert bool((more.objective >= one.objective).all())
    assert bool((more.objective > one.objective).any())


def test_few_sweeps_do_not_converge(generator: torch.Generator) -> None:
    space = network(4, 20, 21, 22, 3)
    a, b = random_state(space, generator), random_state(space, generator)
    found = match(a, b, space, start="identity", sweeps=1)
    assert (found.sweeps, found.converged) == (1, False)
    assert match(a, b, space, start="identity").converged


def test_groups_are_chosen(generator: torch.Generator) -> None:
    space = network(4, 6, 7, 3)
    a, b = random_state(space, generator), random_state(space, generator)
    found = match(a, b, space, groups=["h2"])
    assert list(found.permutations) == ["h2"]
    everything = match(a, b, space)
    assert set(everything.permutations) == {"h1", "h2"}


def test_buffers_count_if_asked(generator: torch.Generator) -> None:
    """A network with constant weights is told from itself by its running statistics only."""
    module = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)).double()
    space = wspace.trace(module.eval(), torch.zeros(2, 3, dtype=torch.float64))
    a = {n: torch.ones(p.shape, dtype=torch.float64) for n, p in space.by_name.items()}
    a["1.running_mean"] = torch.randn(6, generator=generator, dtype=torch.float64)
    t = sample(space, generator=generator)
    b = act(t, a, space)
    with_buffers = act(match(a, b, space, buffers=True), b, space)
    assert_same(a["1.running_mean"], with_buffers["1.running_mean"])
    without = act(match(a, b, space), b, space)
    assert not torch.equal(a["1.running_mean"], without["1.running_mean"])


# ------------------------------------------------------------------- batch, precision


@pytest.mark.parametrize("kinds", [PERMUTATION, ("permutation", "sign", "phase")])
@pytest.mark.parametrize("start", ["forward", "identity", "sinkhorn"])
def test_batched_is_looped(start: str, kinds: tuple[str, ...], generator: torch.Generator) -> None:
    space = network(2, 6, 7, 3, activation=Sine)
    a, b = random_state(space, generator, 3, 2), random_state(space, generator, 3, 2)
    both = match(a, b, space, kinds=kinds, start=start)
    assert both.batch == (3, 2)
    different = set()
    for i in range(3):
        for j in range(2):
            x, y = ({n: t[i, j] for n, t in s.items()} for s in (a, b))
            one = match(x, y, space, kinds=kinds, start=start)
            for g, p in one.permutations.items():
                assert_same(p, both.permutations[g][i, j])
            for k, f in one.factors.items():
                assert_same(f, both.factors[k][i, j])
            assert_close(one.objective, both.objective[i, j])
            different.add(tuple(one.permutations["h1"].tolist()))
    assert len(different) > 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_mix(dtype: torch.dtype, generator: torch.Generator) -> None:
    space = network(5, 16, 17, 3)
    a = random_state(space, generator)
    t = sample(space, generator=generator)
    b = {n: x.to(dtype) for n, x in act(t, a, space).items()}
    assert_same(dict(inverse(t).permutations), dict(match(a, b, space).permutations))
    low = {n: x.to(dtype) for n, x in a.items()}
    assert_same(dict(inverse(t).permutations), dict(match(low, b, space).permutations))
    assert match(low, b, space).objective.dtype == torch.float64


class Counted(Mapping[str, Tensor]):
    """A state that counts what is read, and holds nothing else."""

    def __init__(self, state: State) -> None:
        self.state, self.read = state, dict[str, int]()

    def __getitem__(self, name: str) -> Tensor:
        self.read[name] = self.read.get(name, 0) + 1
        return self.state[name].clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


def test_states_are_read_as_needed_and_left_alone(generator: torch.Generator) -> None:
    space = network(5, 16, 17, 3)
    a, b = random_state(space, generator), random_state(space, generator)
    kept = {n: x.clone() for n, x in b.items()}
    b |= {"steps": torch.tensor(3), "other.weight": torch.full((2,), torch.nan)}
    lazy = Counted(b)
    found = match(a, lazy, space)
    assert_same(dict(match(a, b, space).permutations), dict(found.permutations))
    assert_same(kept, {n: b[n] for n in kept})
    assert set(lazy.read) == set(space.by_name)  # nothing else is touched


def test_results_do_not_depend_on_the_process(generator: torch.Generator) -> None:
    """samuela's implementation depended on PYTHONHASHSEED."""
    code = (
        "import torch, wspace; from torch import nn; from wspace.align import match\n"
        "m = nn.Sequential(nn.Linear(4, 30), nn.ReLU(), nn.Linear(30, 20), nn.ReLU(),"
        " nn.Linear(20, 3))\n"
        "space = wspace.trace(m, torch.zeros(2, 4))\n"
        "g = torch.Generator().manual_seed(5)\n"
        "a, b = ({n: torch.randn(p.shape, generator=g) for n, p in space.by_name.items()}"
        " for _ in 'ab')\n"
        "for k in (('permutation',), ('permutation', 'scale', 'sign')):\n"
        "    f = match(a, b, space, kinds=k, restarts=2, generator=g)\n"
        "    print([p.tolist() for p in f.permutations.values()], float(f.objective))\n"
    )
    seen = set()
    for seed in ("1", "77"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
        run = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
        )
        seen.add(run.stdout)
    assert len(seen) == 1
    assert len(seen.pop()) > 100


def test_threads_change_nothing(generator: torch.Generator) -> None:
    space = network(4, 120, 130, 140, 3)
    a, b = random_state(space, generator), random_state(space, generator)
    for start in ("identity", "forward"):
        one, two = (match(a, b, space, threads=n, start=start) for n in (1, 2))
        assert one.converged
        assert two.converged
        assert float(two.objective) == pytest.approx(float(one.objective), rel=0.05)
    again = match(a, b, space, threads=2)
    assert_same(dict(two.permutations), dict(again.permutations))


# ------------------------------------------------------------------------- many states


def test_many_copies_meet(generator: torch.Generator) -> None:
    space = network(5, 12, 13, 3)
    a = random_state(space, generator)
    states = [act(sample(space, generator=generator), a, space) for _ in range(4)]
    ways = match_many(states, space)
    first, *others = (act(t, x, space) for t, x in zip(ways, states, strict=True))
    for other in others:
        assert_same(first, other)


def test_many_copies_of_other_scales_meet(generator: torch.Generator) -> None:
    space = network(5, 12, 13, 3)
    a = random_state(space, generator)
    more = [act(sample(space, generator=generator, kinds=KINDS), a, space) for _ in range(3)]
    ways = match_many([a, *more], space, kinds=KINDS)
    for t, x in zip(ways, [a, *more], strict=True):
        assert_close(a, act(t, x, space))
    plain = match_many([a, *more], space)
    assert not torch.allclose(a["0.weight"], act(plain[1], more[0], space)["0.weight"])


def test_many_states_come_closer_than_one_by_one(generator: torch.Generator) -> None:
    space = network(3, 10, 11, 2)
    better = 0
    for _ in range(5):
        states = [random_state(space, generator) for _ in range(4)]
        ways = match_many(states, space)
        pairs: list[Transform] = [identity(space)]
        pairs += [match(states[0], x, space) for x in states[1:]]
        many, single = (spread(states, t, space) for t in (ways, pairs))
        assert many <= single + 1e-9
        better += many < single - 1e-6
    assert better


def spread(states: list[dict[str, Tensor]], ways: list[Transform], space: WeightSpace) -> float:
    """Sum of squared distances to the mean."""
    moved = [act(t, x, space) for t, x in zip(ways, states, strict=True)]
    total = 0.0
    for name in states[0]:
        x = torch.stack([m[name] for m in moved])
        total += float(((x - x.mean(0)) ** 2).sum())
    return total


def test_one_state_stays(generator: torch.Generator) -> None:
    space = network(3, 5, 2)
    (t,) = match_many([random_state(space, generator)], space)
    assert not t.permutations
    with pytest.raises(SpaceMismatch, match="match_many: no states"):
        match_many([], space)


# -------------------------------------------------------------------------- refusals


def test_all_that_does_not_fit_is_listed(generator: torch.Generator) -> None:
    space = network(3, 5, 2)
    a, b = random_state(space, generator), random_state(space, generator)
    del a["0.bias"]
    b["2.weight"] = b["2.weight"].T
    with pytest.raises(SpaceMismatch, match="(?s)a: no tensor '0.bias'.*b: '2.weight' of shape"):
        match(a, b, space)
    with pytest.raises(SpaceMismatch, match="(?s)objective: .*'0.bias'"):
        objective(a, b, space)
    a, b = random_state(space, generator, 2), random_state(space, generator, 3)
    with pytest.raises(SpaceMismatch, match=r"(?s)batch axes.*\(2,\) of a.*\(3,\) of b"):
        match(a, b, space)


def test_weights_that_are_not_finite_are_named(generator: torch.Generator) -> None:
    space = network(3, 5, 2)
    a, b = random_state(space, generator), random_state(space, generator)
    a["0.weight"][1, 1] = torch.nan
    b["2.bias"][0] = torch.inf
    with pytest.raises(SpaceMismatch, match="(?s)'0.weight' of a.*'2.bias' of b"):
        match(a, b, space)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kinds": ("permutation", "shear")}, "kind 'shear'"),
        ({"kinds": "sign"}, "a string"),
        ({"groups": ["h9"]}, "group 'h9'"),
        ({"start": "warm"}, "start 'warm'"),
        ({"restarts": -1}, "restarts -1"),
        ({"sweeps": 0}, "sweeps 0"),
        ({"threads": 0}, "threads 0"),
        ({"start": identity(network(3, 4, 2))}, "another weight space"),
    ],
)
def test_options_that_mean_nothing(
    options: dict[str, object], said: str, generator: torch.Generator
) -> None:
    space = network(3, 5, 2)
    a, b = random_state(space, generator), random_state(space, generator)
    with pytest.raises(SpaceMismatch, match=said):
        match(a, b, space, **options)


def test_nothing_free_is_nothing_to_do(generator: torch.Generator) -> None:
    space = network(3, 2)
    a, b = random_state(space, generator), random_state(space, generator)
    found = match(a, b, space)
    assert found.converged
    assert_close(found.objective, closeness(a, b, b, space))
    assert_same(b, act(compose(found, identity(space)), b, space))


def test_oracles_are_sensitive(generator: torch.Generator) -> None:
    space = network(3, 4, 2)
    a, b = random_state(space, generator), random_state(space, generator)
    assert best_by_force(a, b, space) > float(closeness(a, b, b, space))
    t = sample(space, generator=generator)
    assert best_by_force(a, act(t, a, space), space) == pytest.approx(
        float(closeness(a, a, a, space))
    )
    assert float(closeness(a, b, a, space)) != pytest.approx(float(closeness(a, b, b, space)))
