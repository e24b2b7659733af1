"""Distances of functions and weights, maps of many models, and the functional dimension."""

import math
from typing import Any

import pytest
import torch
from cases import build
from oracles import state_of
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import wspace
import wspace.align
from wspace.align.dimension import dimension_bound, functional_dimension
from wspace.align.distances import embed, function_distances, weight_distances
from wspace.errors import MeasureError, MergeError
from wspace.testing import TOLERANCE, assert_close, assert_same

pytestmark = pytest.mark.usefixtures("float64")
EXACT = TOLERANCE[torch.float64]
State = dict[str, Tensor]


def mlp(*widths: int, act: type[nn.Module] = nn.ReLU, bias: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(a, b, bias=bias), act()]
    return nn.Sequential(*layers[:-1])


def some_states(module: nn.Module, generator: torch.Generator, count: int) -> list[State]:
    out = []
    for _ in range(count):
        state = {}
        for n, x in state_of(module).items():
            noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
            state[n] = (noise.abs() if "var" in n else noise) if x.is_floating_point() else x
        out.append(state)
    return out


# --- functions ------------------------------------------------------------------------


def pair(kind: str, a: Tensor, b: Tensor) -> float:
    """The distance of two models' outputs, by its definition."""
    if kind == "l2":
        return math.sqrt(float((a - b).square().reshape(len(a), -1).sum(1).mean()))
    if kind == "kl":
        p, q = a.softmax(-1), b.softmax(-1)
        return float((p * (p / q).log()).sum(-1).mean())
    return float((a.argmax(-1) != b.argmax(-1)).double().mean())


@pytest.mark.parametrize("kind", ["l2", "kl", "disagreement"])
@pytest.mark.parametrize("shape", [(11, 3), (11, 2, 3)])
def test_function_distances_are_those_of_each_pair(
    kind: Any, shape: tuple[int, ...], generator: torch.Generator
) -> None:
    module = nn.Sequential(nn.Linear(3, 7), nn.BatchNorm1d(7) if len(shape) == 2 else nn.Tanh(),
                           nn.ReLU(), nn.Dropout(0.5), nn.Linear(7, 5)).train()  # fmt: skip
    states = some_states(module, generator, 5)
    x = torch.randn(shape, generator=generator)
    found = function_distances(module, states, x, kind=kind)
    assert all(m.training for m in module.modules())
    module.eval()
    y = [functional_call(module, s, x) for s in states]
    want = torch.tensor([[pair(kind, a, b) for b in y] for a in y])
    assert_close(want, found)
    assert float(found.diagonal().abs().max()) == 0
    for options in ({"chunk": 1}, {"chunk": 2}, {"chunk": 5}):
        assert_close(found, function_distances(module, states, x, kind=kind, **options))
    batches = [(x[:4], "label"), {"input": x[4:5]}, [x[5:]]]
    assert_close(found, function_distances(module, states, batches, kind=kind))
    if kind != "kl":
        assert torch.equal(found, found.mT)
    else:
        assert not torch.allclose(found, found.mT)


def test_what_two_models_say_does_not_depend_on_the_others(generator: torch.Generator) -> None:
    module = mlp(3, 7, 2)
    states = some_states(module, generator, 6)
    x = torch.randn(5, 3, generator=generator)
    found = function_distances(module, states, x)
    assert_close(found[1:4, 1:4], function_distances(module, states[1:4], x))


@pytest.mark.parametrize("kind", ["l2", "kl", "disagreement"])
def test_moved_models_are_one_function(kind: Any, generator: torch.Generator) -> None:
    module = mlp(3, 7, 5, 2)
    space = wspace.trace(module, torch.zeros(1, 3))
    (a,) = some_states(module, generator, 1)
    kinds = ("permutation", "scale")
    moved = [
        wspace.act(wspace.sample(space, generator=generator, kinds=kinds), a, space)
        for _ in range(4)
    ]
    x = torch.randn(9, 3, generator=generator)
    assert float(function_distances(module, moved, x, kind=kind).max()) < 1e3 * EXACT
    assert float(weight_distances(moved, space).max()) > 1


def test_impossible_probabilities_do_not_spoil_kl() -> None:
    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.y = nn.Parameter(torch.zeros(1, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.y + x

    rows = ([0.0, 1.0, -math.inf], [2.0, 1.0, -math.inf], [0.0, 0.0, 0.0])
    states = [{"y": torch.tensor([r])} for r in rows]
    found = function_distances(Logits(), states, torch.zeros(1, 1), kind="kl")
    p, q = torch.tensor(rows[0][:2]).softmax(0), torch.tensor(rows[1][:2]).softmax(0)
    assert_close((p * (p / q).log()).sum(), found[0, 1])
    assert_close((p * (3 * p).log()).sum(), found[0, 2])
    assert found[2, 0] > 1e300


class Counting(nn.Module):
    """Counts its passes in a buffer, and returns more than one thing."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp(3, 5, 2)
        self.register_buffer("passes", torch.tensor(0))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.passes += 1
        y = self.inner(x)
        return {"first": y, "second": -2 * y}


@pytest.mark.parametrize("chunk", [1, 3])
def test_models_and_module_are_left_alone(chunk: int, generator: torch.Generator) -> None:
    module = Counting()
    states = some_states(module, generator, 3)
    kept = [{n: x.clone() for n, x in s.items()} for s in states]
    own = {n: x.clone() for n, x in state_of(module).items()}
    x = torch.randn(5, 3, generator=generator)
    found = function_distances(module, states, x, chunk=chunk)
    double = function_distances(module, states, x, chunk=chunk, output=lambda y: y["second"])
    assert_close(2 * found, double)
    assert_same(kept, states)
    assert_same(own, state_of(module))


def test_wrong_arguments_of_distances(generator: torch.Generator) -> None:
    module = mlp(3, 7, 2)
    states = some_states(module, generator, 2)
    with pytest.raises(MeasureError, match="unknown kind 'cosine'"):
        function_distances(module, states, torch.zeros(1, 3), kind="cosine")  # type: ignore[arg-type]
    with pytest.raises(MeasureError, match="no inputs"):
        function_distances(module, states, [])
    del states[1]["0.bias"]
    with pytest.raises(MergeError, match="'0.bias' in state 1, not in state 2"):
        function_distances(module, states, torch.zeros(1, 3))


# --- weights --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp_batchnorm", "language_model_tied", "fno"])
def test_weight_distances_count_parameters_once(name: str, generator: torch.Generator) -> None:
    module, args, kwargs = build(name)
    space = wspace.trace(module, args, kwargs)
    states, own = [], state_of(module)
    for _ in range(3):
        once: dict[int, Tensor] = {}
        for x in own.values():
            once.setdefault(id(x), torch.randn(x.shape, generator=generator).to(x.dtype))
        states.append({n: once[id(x)] for n, x in own.items()})
    found = weight_distances(states, space)
    names = [n for n, _ in module.named_parameters()]
    for i, a in enumerate(states):
        for j, b in enumerate(states):
            want = math.sqrt(sum(float((a[n] - b[n]).abs().square().sum()) for n in names))
            assert abs(float(found[i, j]) - want) <= EXACT * max(want, 1)


def test_aligned_distances_are_those_of_orbits(generator: torch.Generator) -> None:
    module = mlp(3, 11, 2)
    space = wspace.trace(module, torch.zeros(1, 3))
    bases = some_states(module, generator, 3)
    states = [
        wspace.act(wspace.sample(space, generator=generator), bases[i % 3], space) for i in range(7)
    ]
    plain = weight_distances(states, space)
    for chunk in (1, 4, 100):
        found = weight_distances(states, space, align=True, chunk=chunk)
        assert torch.equal(found, found.mT)
        assert bool((found <= plain + EXACT).all())
        for i in range(7):
            for j in range(7):
                if i % 3 == j % 3:
                    assert found[i, j] < EXACT
                else:
                    t = wspace.align.match(states[min(i, j)], states[max(i, j)], space)
                    moved = wspace.act(t, states[max(i, j)], space)
                    want = weight_distances([states[min(i, j)], moved], space)[0, 1]
                    assert_close(want, found[i, j])
                    assert found[i, j] > 1
    assert float(plain[0, 3]) > 1  # moved copies of one model, before matching


# --- maps -----------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_points_come_back_from_their_distances(dims: int, generator: torch.Generator) -> None:
    for _ in range(5):
        points = torch.randn(11, dims, generator=generator) * torch.tensor([3.0, 2.0, 1.0])[:dims]
        distances = torch.cdist(points, points)
        found = embed(distances, dims)
        assert_close(distances, torch.cdist(found.points, found.points))
        assert found.explained == pytest.approx(1)
        assert float(found.points.mean(0).abs().max()) < EXACT
        assert_same(found.points, embed(distances.clone(), dims).points)
        assert bool((found.points.max(0).values >= -found.points.min(0).values).all())
        spread = found.points.square().sum(0)
        assert bool((spread[:-1] >= spread[1:]).all())
        assert_close(found.eigenvalues[:dims], spread)
        less = embed(distances, 1)
        assert_close(found.points[:, :1], less.points)
        if dims > 1:
            assert 0.3 < less.explained < 1 - 1e-3


def test_maps_of_few_models() -> None:
    assert embed(torch.zeros(1, 1)).points.tolist() == [[0.0, 0.0]]
    two = embed(torch.tensor([[0.0, 3.0], [3.0, 0.0]])).points
    assert_close(torch.tensor(3.0), (two[0] - two[1]).norm())
    assert embed(torch.zeros(3, 3)).explained == 0


@pytest.mark.parametrize(
    ("matrix", "match"),
    [
        (torch.zeros(2, 3), r"shape \(2, 3\)"),
        (torch.tensor([[0.0, 1.0], [2.0, 0.0]]), "not symmetric"),
        (torch.tensor([[0.0, math.nan], [math.nan, 0.0]]), "not finite"),
    ],
)
def test_matrices_that_are_no_distances(matrix: Tensor, match: str) -> None:
    with pytest.raises(MeasureError, match=match):
        embed(matrix)


# --- functional dimension -------------------------------------------------------------


def inputs(count: int, width: int, generator: torch.Generator) -> Tensor:
    return 2 * torch.randn(count, width, generator=generator)


@pytest.mark.parametrize(
    ("widths", "want"),
    [
        ((3, 2), 6),
        ((3, 5, 2), 6),
        ((3, 2, 5), 2 * (3 + 5 - 2)),
        ((5, 2, 7), 20),
        ((5, 3, 2, 7), 20),
    ],
)
def test_linear_nets_have_the_dimension_of_their_matrices(
    widths: tuple[int, ...], want: int, generator: torch.Generator
) -> None:
    """Matrices of rank r are r (m + n - r) dimensions, whatever the factors' number of entries."""
    module = mlp(*widths, act=nn.Identity, bias=False)
    (state,) = some_states(module, generator, 1)
    found = functional_dimension(module, inputs(20, widths[0], generator), state=state)
    assert found.rank == want
    assert found.params == sum(a * b for a, b in zip(widths, widths[1:], strict=False))
    assert found.gap > 1e8


@pytest.mark.parametrize("widths", [(2, 5, 3), (3, 7, 2), (2, 3, 5, 1), (2, 5, 3, 2)])
def test_relu_nets_lose_one_dimension_for_each_hidden_unit(
    widths: tuple[int, ...], generator: torch.Generator
) -> None:
    """Grigsby et al., theorem 7.1: none is larger, and for widths that do not narrow some is equal.

    Whether weights are generic in their sense is a matter of luck: of several draws the best one
    reaches the bound, and none passes it.
    """
    module = mlp(*widths)
    space = wspace.trace(module, torch.zeros(1, widths[0]))
    hidden = sum(widths[1:-1])
    ranks = []
    for drawn in some_states(module, generator, 8):
        state = {n: x / 2 if "bias" in n else x for n, x in drawn.items()}
        x = inputs(400, widths[0], generator)
        found = functional_dimension(module, x, state=state, space=space, rows=50)
        assert found.bound == found.params - hidden
        ranks.append(found.rank)
    assert max(ranks) == sum(x.numel() for x in module.parameters()) - hidden


def test_tanh_nets_lose_none(generator: torch.Generator) -> None:
    module = mlp(3, 7, 2, act=nn.Tanh)
    space = wspace.trace(module, torch.zeros(1, 3))
    (state,) = some_states(module, generator, 1)
    found = functional_dimension(module, inputs(80, 3, generator), state=state, space=space)
    assert found.rank == found.params == found.bound == 3 * 7 + 7 + 7 * 2 + 2


def test_dead_units_lose_all_they_have(generator: torch.Generator) -> None:
    module = mlp(3, 7, 2)
    space = wspace.trace(module, torch.zeros(1, 3))
    (state,) = some_states(module, generator, 1)
    x = inputs(200, 3, generator)
    alive = functional_dimension(module, x, state=state, space=space)
    state["0.bias"] = state["0.bias"].clone()
    state["0.bias"][4] = -1e3
    dead = functional_dimension(module, x, state=state, space=space)
    assert alive.rank == alive.bound
    assert dead.rank == alive.rank - (3 + 1 + 2 - 1)


def test_both_ways_of_reduction_give_the_singular_values(generator: torch.Generator) -> None:
    module = mlp(3, 7, 5, 2)
    (state,) = some_states(module, generator, 1)
    for count in (5, 11, 60):  # fewer outputs than parameters, and more
        x = inputs(count, 3, generator)
        params = {n: p.detach() for n, p in state.items()}
        jacobian = torch.func.jacrev(lambda p, x=x: functional_call(module, p, x).reshape(-1))(
            params
        )
        whole = torch.cat([j.flatten(1) for j in jacobian.values()], 1)
        want = torch.linalg.svdvals(whole)
        for options in ({"rows": 3}, {"rows": 64, "chunk": 7}):
            found = functional_dimension(module, x, state=state, **options)
            assert_close(want, found.singular_values[: len(want)])
            assert found.rank == int(torch.linalg.matrix_rank(whole, rtol=1e-12))
        for at, rank in functional_dimension(module, x, state=state, rows=3).growth:
            assert rank == int(torch.linalg.matrix_rank(whole[: 2 * at], rtol=1e-12))


def test_growth_with_inputs(generator: torch.Generator) -> None:
    module = mlp(2, 5, 3)
    (state,) = some_states(module, generator, 1)
    found = functional_dimension(module, inputs(100, 2, generator), state=state, rows=1)
    counts, ranks = zip(*found.growth, strict=True)
    assert counts[:4] == (1, 2, 3, 4) and counts[-1] == 100
    assert ranks[0] == 3 and list(ranks) == sorted(ranks)
    assert ranks[-1] == ranks[-2] == found.rank


def test_parameters_alone_and_batches_of_any_kind(generator: torch.Generator) -> None:
    module = mlp(3, 7, 2)
    (state,) = some_states(module, generator, 1)
    x = inputs(60, 3, generator)
    bias = functional_dimension(module, x, state=state, names=["2.bias"])
    assert (bias.rank, bias.params) == (2, 2)
    last = functional_dimension(module, x, state=state, names=["2.weight", "2.bias"])
    assert last.rank == last.params == 16
    whole = functional_dimension(module, x, state=state)
    mixed = functional_dimension(module, [(x[:20], 1), {"input": x[20:41]}, x[41:]], state=state)
    assert_close(whole.singular_values, mixed.singular_values)
    with pytest.raises(MeasureError, match="no inputs"):
        functional_dimension(module, [])
    with pytest.raises(MeasureError, match="not parameters"):
        functional_dimension(module, x, names=["3.weight"])


def test_ties_and_buffers_and_modes(generator: torch.Generator) -> None:
    module, args, kwargs = build("autoencoder_tied")
    found = functional_dimension(module, args[0])
    assert found.params == sum(p.numel() for p in module.parameters())
    module = Counting().train()
    before = {n: x.clone() for n, x in state_of(module).items()}
    drawn = torch.get_rng_state()
    functional_dimension(module, inputs(9, 3, generator))
    assert_same(before, state_of(module))
    assert module.training and torch.equal(drawn, torch.get_rng_state())
    assert all(p.grad is None for p in module.parameters())


def test_single_precision_is_judged_in_double(generator: torch.Generator) -> None:
    module = mlp(3, 7, 2)
    x = inputs(80, 3, generator)
    double = functional_dimension(module, x)
    single = functional_dimension(module.float(), x.float())
    assert single.rank == double.rank
    assert single.gap > 1e6


BOUNDED = "mlp mlp_batchnorm mlp_residual vgg lenet prelu attention_linear swiglu maxout"


@pytest.mark.parametrize("name", BOUNDED.split())
def test_no_rank_exceeds_the_bound(name: str, generator: torch.Generator) -> None:
    """And symmetries that the bound counts are directions in which the outputs stay."""
    module, args, kwargs = build(name)
    space = wspace.trace(module, args, kwargs)
    bound = dimension_bound(space)
    total = sum(p.numel for p in space.params if not p.buffer)
    assert 0 < bound <= total
    if total > 1500:
        return
    shape = (200 // len(args[0]), *args[0].shape)
    x = [2 * torch.randn(s, generator=generator) for s in [tuple(args[0].shape)] * shape[0]]
    found = functional_dimension(module, x, space=space)
    assert found.rank <= bound
    assert found.growth[-1][0] == 200 // len(args[0]) * len(args[0])


def test_statistics_hold_the_scale_of_what_they_normalise() -> None:
    """Before BatchNorm the scale of a unit moves the statistics too, so it is not free."""
    module, args, kwargs = build("mlp_batchnorm")
    space = wspace.trace(module, args, kwargs)
    assert dimension_bound(space) == sum(p.numel() for p in module.parameters()) - 32
    assert dimension_bound(space, ["0.weight"]) == 60


def test_gaussian_fits_are_near() -> None:
    """Sanity of the oracle `pair`: equal outputs are at no distance, others are."""
    a, b = torch.eye(3), torch.eye(3).flip(0)
    for kind in ("l2", "kl", "disagreement"):
        assert pair(kind, a, a) == 0
        assert pair(kind, a, b) > 0.1
    assert F.kl_div(b.log_softmax(-1), a.softmax(-1), reduction="batchmean") == pytest.approx(
        pair("kl", a, b)
    )
