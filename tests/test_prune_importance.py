"""Importance from weights alone: equivariant on every case, and equal to slow loops over units."""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from cases import CASES, build
from torch import Tensor, nn

import wspace
from wspace.action import shape_of
from wspace.errors import PruneError, SpaceMismatch
from wspace.prune.importance.slices import weights_of
from wspace.prune.importance.sparse import GroupSparsity
from wspace.prune.importance.weights import (
    FPGM,
    LAMP,
    BatchNormScale,
    Importance,
    Magnitude,
    Random,
    importance_of,
    unit_sums,
)
from wspace.prune.restriction import prunable
from wspace.space import Axis, Concat, Param, Role, WeightSpace

EXACT = 1e-10
EVERY = [
    pytest.param(n, marks=pytest.mark.slow) if c.slow or (i > 60 and i % 8) else n
    for i, (n, c) in enumerate(CASES.items())
]
FEW = [
    "lstm",
    "attention_gqa",
    "grouped_se",
    "moe_dense",
    "autoencoder_tied",
    "pixel_shuffle",
    "fno",
]
each_case = pytest.mark.parametrize("name", EVERY)
CRITERIA: list[Any] = [
    Magnitude(),
    Magnitude(p=1, reduction="sum", normalize="mean"),
    Magnitude(p=0.5, reduction="max", normalize="max", shifts=True),
    Magnitude(reduction="prod"),
    Magnitude(reduction="first", normalize="sum"),
    BatchNormScale(otherwise=Magnitude()),
    LAMP(),
    FPGM(),
]


class Given(NamedTuple):
    """A case with generic weights."""

    module: nn.Module
    space: WeightSpace
    state: dict[str, Tensor]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def given() -> Callable[[str], Given]:
    @functools.cache
    def get(name: str) -> Given:
        module, args, kwargs = build(name)
        space = wspace.trace(module, args, kwargs)
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        with torch.no_grad():
            for x in module.parameters():
                noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
                x.add_(0.3 * noise)
        return Given(module, space, dict(weights_of(module)))

    return get


def moved(
    scores: Mapping[str, Tensor], t: wspace.Transform, space: WeightSpace
) -> dict[str, Tensor]:
    """Scores in the order that a transform leaves the units in."""
    out: dict[str, Tensor] = {}
    for name, x in scores.items():
        names = (*space.groups[name].over, name)
        at = torch.meshgrid(*(torch.arange(n) for n in x.shape), indexing="ij")
        index = dict(zip(names, at, strict=True))
        source = []
        for h in names:
            here = space.all_groups[h]
            p = t.permutations.get(h, torch.arange(here.size).expand(shape_of(here, space)))
            source.append(p[tuple(index[o] for o in (*here.over, h))])
        out[name] = x[tuple(source)]
    return out


def near(a: Tensor, b: Tensor) -> bool:
    return float((a - b).abs().max()) <= EXACT * max(float(b.abs().max()), 1e-300)


# -------------------------------------------------------------------------- the laws


@each_case
def test_permuted_weights_have_permuted_scores(
    name: str, given: Callable[[str], Given], generator: torch.Generator
) -> None:
    case = given(name)
    t = wspace.sample(case.space, generator=generator)
    after = wspace.act(t, case.state, case.space)
    for criterion in CRITERIA:
        one = criterion.of(case.state, case.space)
        two = criterion.of(after, case.space)
        assert [*one] == [*prunable(case.space)]
        for g, x in moved(one, t, case.space).items():
            assert x.dtype == torch.float64
            assert tuple(x.shape) == shape_of(case.space.groups[g], case.space)
            assert near(two[g], x), (criterion, g)
        if one and criterion != Magnitude(reduction="prod"):
            assert any(not near(two[g], one[g]) for g in one), criterion  # control


def entries(
    p: Param, space: WeightSpace
) -> Iterator[tuple[tuple[int, ...], list[tuple[Any, ...]]]]:
    """Every entry of a parameter, and the unit of every group at it: slow, by its definition."""

    def at(axis: Axis, i: int) -> list[tuple[str, int]]:
        found: list[tuple[str, int]] = []
        for f in reversed(axis.factors):
            i, k = divmod(i, f.size)
            if isinstance(f, Concat):
                for part in f.parts:
                    if k < part.size:
                        found = at(part, k) + found
                        break
                    k -= part.size
            else:
                found = [(f.name, k), *found]
        return found

    for index in product(*map(range, p.shape)):
        held = [at(axis, i) for axis, i in zip(p.axes, index, strict=True)]
        units: list[tuple[Any, ...]] = []
        top = [p.at] if p.at else []
        for d, here in enumerate(held):
            others = [u for e, there in enumerate(held) if e != d for u in there]
            known = dict([*top, *others, *here])
            units += [(g, *(known[o] for o in space.all_groups[g].over), k) for g, k in here]
        units += [(g, *(dict(top)[o] for o in space.all_groups[g].over), k) for g, k in top]
        yield index, units


@pytest.mark.parametrize("name", FEW)
def test_sums_are_those_of_a_slow_loop(name: str, given: Callable[[str], Given]) -> None:
    case = given(name)
    sums = unit_sums(case.state, case.space)
    slow = {
        g: torch.zeros(shape_of(x, case.space)).double() for g, x in prunable(case.space).items()
    }
    for p in case.space.params:
        if p.buffer:
            continue
        x = case.state[p.name]
        values = (x.real + x.imag if x.is_complex() else x).flatten().tolist()
        for value, (_, units) in zip(values, entries(p, case.space), strict=True):
            for g, *where in units:
                if g in slow:
                    slow[g][tuple(where)] += value
    assert sums.keys() == slow.keys() and slow
    for g, x in slow.items():
        total = torch.stack(sums[g]).sum(0)
        assert float((total - x).abs().max()) <= EXACT * (1 + float(x.abs().max())), g
    wrong = {g: x.flip(-1) for g, x in slow.items()}  # control
    assert any(not near(torch.stack(sums[g]).sum(0), x) for g, x in wrong.items())


@pytest.mark.parametrize("name", ["mlp_batchnorm", "moe_dense", "grouped_se", "attention_gqa"])
def test_a_stack_has_the_scores_of_each(name: str, given: Callable[[str], Given]) -> None:
    case = given(name)
    scale = [1.0, 0.5, -2.0, 3.0, 0.25, 1.5]
    many = {
        n: torch.stack([x * c if x.is_floating_point() else x for c in scale]).reshape(
            2, 3, *x.shape
        )
        for n, x in case.state.items()
        if n in case.space.by_name
    }
    many = {n: x + 0.1 * torch.randn_like(x) for n, x in many.items()}
    for p in case.space.params:
        many |= dict.fromkeys(p.ties, many[p.name])
    for criterion in CRITERIA:
        batch = criterion.of(many, case.space)
        for i, j in product(range(2), range(3)):
            one = criterion.of({n: x[i, j] for n, x in many.items()}, case.space)
            for g, x in one.items():
                assert near(batch[g][i, j], x), (criterion, g)


# ------------------------------------------------------------------- single criteria


def three() -> tuple[nn.Module, WeightSpace]:
    torch.manual_seed(3)
    module = (
        nn.Sequential(nn.Linear(3, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 2))
        .double()
        .eval()
    )
    nn.init.normal_(module[1].weight)
    return module, wspace.trace(module, torch.zeros(2, 3, dtype=torch.float64))


def test_magnitude_by_hand() -> None:
    module, space = three()
    a, g, b = (x.weight.detach() for x in (module[0], module[1], module[3]))
    parts = torch.stack([(a**2).sum(1), g**2, (b**2).sum(0)])
    for how, expected in {
        "mean": parts.mean(0), "sum": parts.sum(0), "max": parts.amax(0),
        "prod": parts.prod(0), "first": parts[0],
    }.items():  # fmt: skip
        assert near(Magnitude(reduction=how)(module, space)["h1"], expected), how
    more = torch.cat(
        [parts, module[0].bias.detach()[None] ** 2, module[1].bias.detach()[None] ** 2]
    )
    assert near(Magnitude(reduction="sum", shifts=True)(module, space)["h1"], more.sum(0))
    cubic = (a.abs() ** 3).sum(1) + g.abs() ** 3 + (b.abs() ** 3).sum(0)
    found = Magnitude(p=3, reduction="sum", normalize="mean")(module, space)["h1"]
    assert near(found, cubic / cubic.mean())
    assert near(importance_of("magnitude_l1")(module, space)["h1"],
                (a.abs().sum(1) + g.abs() + b.abs().sum(0)) / 3)  # fmt: skip


def test_norm_scales_by_hand_and_only_of_batch_norms() -> None:
    module, space = three()
    assert near(BatchNormScale()(module, space)["h1"], module[1].weight.detach().abs())
    layered, args, kwargs = build("mlp_layernorm_tanh")
    space = wspace.trace(layered, args, kwargs)
    with pytest.raises(PruneError, match=r"BatchNormScale: groups without .*\n.*\n.*'h1', 'h2'"):
        BatchNormScale()(layered, space)
    assert bool((BatchNormScale(otherwise=3)(layered, space)["h1"] == 3).all())
    with pytest.raises(PruneError, match="does not say which gains"):
        BatchNormScale()(layered, replace(space, wiring=None))


def test_lamp_by_hand_with_equal_units() -> None:
    module, space = three()
    for x in (module[0], module[1], module[3]):
        nn.init.zeros_(x.weight)
    with torch.no_grad():
        module[0].weight[:, 0] = torch.tensor([1.0, 2, 2, 3, 0, 4, 4])
    m = [1, 4, 4, 9, 0, 16, 16]
    expected = [x / sum(y for y in m if y >= x) for x in m]
    assert near(LAMP()(module, space)["h1"], torch.tensor(expected, dtype=torch.float64))
    with torch.no_grad():  # equal to rounding is equal: sums of permuted weights differ so much
        module[0].weight[2, 0] = torch.nextafter(module[0].weight[2, 0], torch.tensor(9.0).double())
    assert near(LAMP()(module, space)["h1"], torch.tensor(expected, dtype=torch.float64))


def test_distances_are_those_of_all_pairs() -> None:
    module, space = three()
    with torch.no_grad():
        module[0].weight[5], module[1].weight[5] = module[0].weight[2], module[1].weight[2]
        module[3].weight[:, 5] = module[3].weight[:, 2]
    w = torch.cat([module[0].weight, module[1].weight[:, None], module[3].weight.T], 1).detach()
    slow = [sum(float((w[u] - w[v]).norm()) for v in range(7)) for u in range(7)]
    found = FPGM()(module, space)["h1"]
    assert near(found, torch.tensor(slow, dtype=torch.float64))
    one = nn.init.constant_
    for x in (module[0], module[1], module[3]):
        one(x.weight, 0.7)
    assert not bool(FPGM()(module, space)["h1"].any())  # nothing but rounding tells them apart


def test_random_scores_are_the_generators(generator: torch.Generator) -> None:
    module, space = three()
    copy = torch.Generator().manual_seed(generator.initial_seed())
    one, two = Random(generator)(module, space)["h1"], Random(copy)(module, space)["h1"]
    assert torch.equal(one, two) and not torch.equal(one, Random(generator)(module, space)["h1"])
    state = torch.get_rng_state()
    assert importance_of("random")(module, space)["h1"].shape == (7,)
    assert not torch.equal(state, torch.get_rng_state())  # torch's own, never seeded


# ---------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(bad: float) -> None:
    module, space = three()
    with torch.no_grad():
        module[3].weight[1, 2] = bad
    for criterion in (Magnitude(), LAMP(), FPGM(), Magnitude(normalize="max")):
        with pytest.raises(PruneError, match=r"not finite\n.*\n.*'3\.weight'"):
            criterion(module, space)


def test_refusals() -> None:
    module, space = three()
    known = r"'magnitude', 'magnitude_l1', 'bn_scale', 'lamp', 'fpgm', 'random', 'predicted', "
    known += r"'mean_field'\n  got 'taylor'"
    with pytest.raises(PruneError, match=known):
        importance_of("taylor")
    with pytest.raises(PruneError, match="not its class"):
        importance_of(Magnitude)  # type: ignore[arg-type]
    with pytest.raises(PruneError, match="no such importance"):
        importance_of(3)  # type: ignore[arg-type]
    own: Importance = lambda m, s: {}  # noqa: E731
    assert importance_of(own) is own
    for options in ({"p": 0}, {"p": float("nan")}, {"reduction": "min"}, {"normalize": "l2"}):
        with pytest.raises(PruneError, match="Magnitude: no such"):
            Magnitude(**options)
    with pytest.raises(SpaceMismatch, match=r"3\.weight"):
        Magnitude().of({n: x for n, x in module.state_dict().items() if n != "3.weight"}, space)
    with pytest.raises(PruneError, match="meta"):
        Magnitude()(module.to("meta"), space)


# ----------------------------------------------------------------------- sparse training


def test_factors_are_those_of_the_paper_and_use_alpha() -> None:
    module, space = three()
    a, g, b = (x.weight.detach() for x in (module[0], module[1], module[3]))
    norm = ((a**2).sum(1) + g**2 + (b**2).sum(0)).sqrt()
    share = (norm.max() - norm) / (norm.max() - norm.min())
    two, nine = GroupSparsity(space, alpha=2), GroupSparsity(space, alpha=9, strength=5)
    assert near(two.factors(module.state_dict())["h1"], 2**share)
    assert near(nine.factors(module.state_dict())["h1"], 9**share)
    assert (two.alpha, two.strength) == (2, 1e-4)  # nothing of the other


@pytest.mark.parametrize("name", [*FEW, "mlp_weight_norm", "shufflenet_v1", "bilinear"])
def test_gradients_are_those_of_the_penalty(name: str, given: Callable[[str], Given]) -> None:
    case = given(name)
    sparsity = GroupSparsity(case.space, strength=0.3, alpha=7)
    before = {n: x.clone() for n, x in case.module.state_dict().items()}
    named = dict(case.module.named_parameters(remove_duplicate=False))
    tensors = list(case.module.parameters())
    penalty = sparsity.penalty(named)
    expected = torch.autograd.grad(penalty, tensors, allow_unused=True)
    frozen = tensors[0].requires_grad_(False)
    for x in tensors[1:]:
        x.grad = torch.ones_like(x)
    try:
        sparsity.add_to_gradients(case.module)
        assert frozen.grad is None
        for x, g in zip(tensors[1:], expected[1:], strict=True):
            assert x.grad is not None
            assert torch.allclose(x.grad, torch.ones_like(x) + (0 if g is None else g), atol=1e-12)
    finally:
        for x in tensors:
            x.grad = None
        frozen.requires_grad_(True)
    assert all(torch.equal(x, before[n]) for n, x in case.module.state_dict().items())
    assert float(penalty.detach()) > 0


@pytest.mark.parametrize("name", FEW)
def test_the_penalty_is_the_sum_over_units(
    name: str, given: Callable[[str], Given], generator: torch.Generator
) -> None:
    """Two ways to one number: laid on the entries, and summed by unit."""
    case = given(name)
    sparsity = GroupSparsity(case.space, strength=2.0, alpha=5)
    squares = Magnitude(reduction="sum").of(case.state, case.space)
    gamma = sparsity.factors(case.state)
    expected = sum(float((gamma[g] * x).sum()) for g, x in squares.items())
    found = float(sparsity.penalty(case.state))
    assert abs(found - expected) <= EXACT * expected
    t = wspace.sample(case.space, generator=generator)
    after = float(sparsity.penalty(wspace.act(t, case.state, case.space)))
    assert abs(found - after) <= EXACT * expected
    assert abs(found - float(GroupSparsity(case.space, strength=2.0).penalty(case.state))) > 1e-6


def test_sparse_gradients_become_dense() -> None:
    ids = torch.tensor([[1, 2, 3]])
    module = nn.Sequential(nn.Embedding(9, 5, sparse=True), nn.Linear(5, 2)).double()
    space = wspace.trace(module, ids)
    module(ids).sum().backward()
    before = {n: p.grad.to_dense().clone() for n, p in module.named_parameters()}
    penalty = GroupSparsity(space, strength=0.1)
    penalty.add_to_gradients(module)
    added = torch.autograd.grad(penalty.penalty(dict(module.named_parameters())), module[0].weight)
    assert torch.allclose(module[0].weight.grad - before["0.weight"], added[0])


def test_training_makes_units_vanish() -> None:
    """The weakest unit of a plain decay by these factors shrinks α times as fast."""
    module, space = three()
    sparsity = GroupSparsity(space, strength=1.0, alpha=4)
    module.zero_grad()
    sparsity.add_to_gradients(module)
    norm = Magnitude(reduction="sum")(module, space)["h1"]
    ratio = module[0].weight.grad / module[0].weight.detach()
    assert abs(float(ratio[int(norm.argmin())].mean()) - 4) < EXACT
    assert abs(float(ratio[int(norm.argmax())].mean()) - 1) < EXACT
    assert module[0].bias.grad is None and module[1].weight.grad is not None
    assert module[3].weight.grad is not None


def test_no_tensor_is_without_a_role() -> None:
    module, space = three()
    assert {p.role for p in space.params} == {
        Role.MATRIX, Role.SHIFT, Role.SCALE, Role.STATISTIC,
    }  # fmt: skip
    for options in ({"strength": -1}, {"alpha": 0.5}, {"alpha": float("inf")}):
        with pytest.raises(PruneError, match="GroupSparsity: options"):
            GroupSparsity(space, **options)
    for x in (module[0], module[1], module[3]):
        nn.init.constant_(x.weight, 0.5)
    assert bool((GroupSparsity(space).factors(module.state_dict())["h1"] == 1).all())
