"""MixUp: what is mixed, with whom, and what the targets are."""

from collections.abc import Callable
from dataclasses import replace
from types import MappingProxyType

import pytest
import torch
from test_augment import answers, networks, norms, seeded
from torch import Tensor, nn
from torch.nn import functional as F

import wspace
from wspace.action import KINDS
from wspace.augment import (
    AlignedMixUp,
    Augmentation,
    Compose,
    Mixture,
    MixUp,
    Noise,
    PermutedMixUp,
    SelfMixUp,
    Symmetry,
    augmented,
)
from wspace.augment.mixup import PartnerMixing, circle
from wspace.graph import ParameterGraph
from wspace.testing import assert_close, assert_same

B = 7
PARTNERS: list[Callable[..., PartnerMixing]] = [MixUp, PermutedMixUp, AlignedMixUp]
partners = pytest.mark.parametrize("make", PARTNERS)


def shares_of(mixture: Mixture) -> Tensor:
    """The mixture as a matrix: row by row, what each network counts for."""
    out = torch.zeros(len(mixture), len(mixture), dtype=torch.float64)
    return out.scatter_add(1, mixture.rows, mixture.shares)


def mixed(
    change: Augmentation, graph: ParameterGraph, seed: int = 0
) -> tuple[dict[str, Tensor], Mixture]:
    made = change.apply(graph, seeded(seed))
    assert made.mixture is not None
    return dict(made.graph.values), made.mixture


# ------------------------------------------------------------------------------- Mixture


def random_mixture(rows: int, width: int, seed: int = 0) -> Mixture:
    g = seeded(seed)
    shares = torch.rand(rows, width, dtype=torch.float64, generator=g)
    shares = shares / shares.sum(1, keepdim=True)
    return Mixture(torch.randint(rows, (rows, width), generator=g), shares)


def test_targets_are_weighted_means() -> None:
    m = random_mixture(5, 3)
    for values in (torch.randn(5, dtype=torch.float64), torch.randn(5, 2, 3, dtype=torch.float64)):
        assert_close(m.targets(values), torch.einsum("bc,c...->b...", shares_of(m), values))
    whole = torch.tensor([4, 0, 2, 1, 3])
    assert m.targets(whole).dtype == torch.float32
    assert m.targets(whole.double()).dtype == torch.float64


def test_cross_entropy_is_the_mean_of_both() -> None:
    """λ CE(y1) + (1 − λ) CE(y2), label smoothing included."""
    weight = torch.tensor([0.3, 1.0, 0.0, 0.5], dtype=torch.float64)
    partner = torch.tensor([2, 3, 1, 0])
    pairs = torch.stack([torch.arange(4), partner], 1)
    m = Mixture(pairs, torch.stack([weight, 1 - weight], 1))
    logits, labels = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 2, 1, 2])
    for smoothing in (0.0, 0.2):

        def entropy(y: Tensor, s: float = smoothing) -> Tensor:
            return F.cross_entropy(logits, y, reduction="none", label_smoothing=s)

        expected = weight * entropy(labels) + (1 - weight) * entropy(labels[partner])
        found = entropy(m.classes(labels, 3).double())
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_mixing_twice_is_one_mixture() -> None:
    a, b = random_mixture(6, 2, 1), random_mixture(6, 3, 2)
    both = a.then(b)
    assert both.rows.shape == (6, 6)
    assert_close(shares_of(both), shares_of(b) @ shares_of(a))
    assert not torch.allclose(shares_of(both), shares_of(a) @ shares_of(b))
    assert_close(shares_of(Mixture.none(6).then(b)), shares_of(b))


def test_some_rows_are_kept() -> None:
    m, chosen = random_mixture(4, 3), torch.tensor([True, False, True, False])
    found = shares_of(m.kept(chosen))
    assert_close(found[chosen], shares_of(m)[chosen])
    assert_close(found[~chosen], torch.eye(4, dtype=torch.float64)[~chosen])


def test_batches_one_after_another() -> None:
    a, b = random_mixture(3, 2), Mixture.none(2)
    found = shares_of(Mixture.cat([b, a, b]))
    assert_close(found, torch.block_diag(shares_of(b), shares_of(a), shares_of(b)))
    assert repr(a) == "Mixture(3 rows of 2 each)"


# -------------------------------------------------------------------------------- mixing


def test_partners_form_one_circle() -> None:
    for rows in (2, 3, 8):
        for seed in range(20):
            partner, at, seen = circle(rows, seeded(seed)), 0, set[int]()
            for _ in range(rows):
                at = int(partner[at])
                seen.add(at)
            assert len(seen) == rows and not bool((partner == torch.arange(rows)).any())
    assert len({tuple(circle(5, seeded(s)).tolist()) for s in range(30)}) > 10


def test_mixup_is_what_the_mixture_says() -> None:
    graph = networks(B)
    values, mixture = mixed(MixUp(), graph)
    shares = shares_of(mixture)
    assert_close(
        values, {n: torch.einsum("bc,c...->b...", shares, x) for n, x in graph.values.items()}
    )
    wrong = {n: torch.einsum("cb,c...->b...", shares, x) for n, x in graph.values.items()}
    with pytest.raises(AssertionError, match="not close"):
        assert_close(values, wrong)
    assert torch.equal(mixture.rows[:, 0], torch.arange(B))
    assert_close(mixture.shares.sum(1), torch.ones(B, dtype=torch.float64))


@partners
def test_weight_one_is_the_network_itself(make: Callable[..., PartnerMixing]) -> None:
    graph = networks(B)
    values, mixture = mixed(make(bounds=(1.0, 1.0)), graph)
    assert_same(values, dict(graph.values))
    labels = torch.arange(B)
    assert torch.equal(mixture.classes(labels, B), F.one_hot(labels).float())


@partners
def test_weight_zero_is_the_partner(make: Callable[..., PartnerMixing]) -> None:
    graph, x = networks(B), torch.randn(6, 2, dtype=torch.float64)
    made = make(bounds=(0.0, 0.0)).apply(graph, seeded())
    assert made.mixture is not None
    before = answers(graph, x)
    partner = made.mixture.rows[:, 1].tolist()
    assert torch.equal(made.mixture.shares[:, 1], torch.ones(B, dtype=torch.float64))
    assert_close(answers(made.graph, x), [before[i] for i in partner])


@partners
def test_equal_labels_stay(make: Callable[..., PartnerMixing]) -> None:
    _, mixture = mixed(make(), networks(B))
    labels = torch.full((B,), 2)
    torch.testing.assert_close(mixture.classes(labels, 4), F.one_hot(labels, 4).float())
    values = torch.full((B,), 0.7, dtype=torch.float64)
    assert_close(mixture.targets(values), values)


def test_permuted_partners_are_moved_first() -> None:
    graph = networks(B)
    plain, permuted = (mixed(make(), graph)[0] for make in (MixUp, PermutedMixUp))
    last = "layers.2.bias"  # of outputs, which nothing moves
    assert_same(plain[last], permuted[last])
    assert not torch.equal(plain["layers.0.bias"], permuted["layers.0.bias"])


def test_nearest_targets() -> None:
    graph = networks(40)
    values, mixture = mixed(MixUp(targets="nearest"), graph)
    same, both = mixed(MixUp(), graph)
    assert_same(values, same)
    nearest = both.rows.gather(1, both.shares.argmax(1, keepdim=True))
    assert torch.equal(mixture.rows, nearest)
    assert torch.equal(mixture.shares, torch.ones(40, 1, dtype=torch.float64))
    assert 5 < int((mixture.rows[:, 0] == torch.arange(40)).sum()) < 35


@pytest.mark.parametrize(
    ("options", "mean", "spread"),
    [
        ({}, 0.5, 1 / 12**0.5),
        ({"bounds": (0.6, 0.9)}, 0.75, 0.3 / 12**0.5),
        ({"beta": 0.2}, 0.5, 0.5 / 1.4**0.5),
        ({"beta": 5.0, "bounds": (0.5, 1.0)}, 0.75, 0.25 / 11**0.5),
    ],
)
def test_weights(options: dict[str, float], mean: float, spread: float) -> None:
    change = MixUp(**options)  # type: ignore[arg-type]
    drawn = change.weights(20000, seeded())
    low, high = change.bounds
    assert low <= float(drawn.min()) and float(drawn.max()) <= high
    assert abs(float(drawn.mean()) - mean) < 0.01 and abs(float(drawn.std()) - spread) < 0.01
    assert torch.equal(drawn, change.weights(20000, seeded()))


@partners
def test_a_row_without_partner_stays(make: Callable[..., PartnerMixing]) -> None:
    for graph in (networks(1), networks()):
        made = make().apply(graph, seeded())
        assert made.graph is graph and made.mixture is None


def test_each_space_is_mixed_within_itself() -> None:
    graphs = [networks(3), networks(1, width=5), networks(4, width=6)]
    new, mixture = augmented(graphs, [Noise(0.0), MixUp()], seeded())
    assert mixture is not None
    shares = shares_of(mixture)
    blocks = torch.block_diag(*(torch.ones(n, n, dtype=torch.float64) for n in (3, 1, 4)))
    assert torch.equal(shares * (1 - blocks), torch.zeros(8, 8, dtype=torch.float64))
    assert float(shares[3, 3]) == 1
    assert_same(dict(new[1].values), dict(graphs[1].values))
    start = 0
    for old, made in zip(graphs, new, strict=True):
        part = shares[start : (start := start + old.batch[0])][:, start - old.batch[0] : start]
        expected = {n: torch.einsum("bc,c...->b...", part, x) for n, x in old.values.items()}
        assert_close(dict(made.values), expected)
    assert augmented(graphs, [Noise()], seeded())[1] is None


def test_mixing_twice_in_a_list() -> None:
    graph = networks(B)
    values, mixture = mixed(
        Compose([MixUp(), Symmetry(("permutation",)), MixUp()], [1, 0, 0.5]), graph
    )
    shares = shares_of(mixture)
    assert int((mixture.shares > 0).sum(1).max()) > 2
    assert_close(
        values, {n: torch.einsum("bc,c...->b...", shares, x) for n, x in graph.values.items()}
    )


def test_running_statistics_are_mixed() -> None:
    graph, space = norms()
    values, mixture = mixed(MixUp(), graph)
    buffers = [p.name for p in space.params if p.buffer]
    assert len(buffers) == 2
    for name in buffers:
        expected = torch.einsum("bc,c...->b...", shares_of(mixture), graph.values[name])
        assert_close(values[name], expected)


# ------------------------------------------------------------------------------- aligned


def one_hidden(rows: int) -> ParameterGraph:
    """Networks in which alignment always succeeds: one group, and copies moved by symmetries."""
    net = siren_of_one()
    space = wspace.trace(net, torch.zeros(1, 2, dtype=torch.float64))
    one = {
        p.name: torch.randn(p.shape, generator=seeded(3), dtype=torch.float64) for p in space.params
    }
    graph = wspace.encode(space, {n: x.expand(rows, *x.shape) for n, x in one.items()})
    return Symmetry(("permutation", "sign"))(graph, seeded(9))


def siren_of_one() -> nn.Module:
    from datasets_zoo.inr import siren as make  # noqa: PLC0415

    return make([2, 6, 3], omega=2.0).double()


def test_aligned_copies_mix_to_themselves() -> None:
    graph = one_hidden(B)
    values, _ = mixed(AlignedMixUp(), graph)
    assert_close(values, dict(graph.values))
    for worse in (MixUp(), AlignedMixUp(kinds=("permutation",)), AlignedMixUp(kinds=("sign",))):
        with pytest.raises(AssertionError, match="not close"):
            assert_close(mixed(worse, graph)[0], dict(graph.values))


def distance(a: ParameterGraph, b: ParameterGraph) -> Tensor:
    rows = [(x - b.values[n]).square().flatten(1).sum(1) for n, x in a.values.items()]
    return torch.stack(rows).sum(0)


def test_alignment_brings_partners_nearer() -> None:
    graph = networks(B)
    partner = replace(
        graph, values=MappingProxyType({n: x.roll(1, 0) for n, x in graph.values.items()})
    )
    brought = AlignedMixUp().brought(graph, partner, seeded())
    x = torch.randn(5, 2, dtype=torch.float64)
    assert_close(answers(partner, x), answers(brought, x))
    assert bool((distance(graph, brought) < distance(graph, partner)).all())


def test_trajectories_are_aligned_as_wholes() -> None:
    graph = networks(B, 3)
    last = replace(graph, values=MappingProxyType({n: x[:, -1] for n, x in graph.values.items()}))
    whole, one = (mixed(AlignedMixUp(), g)[0] for g in (graph, last))
    assert_close({n: x[:, -1] for n, x in whole.items()}, one)


def test_spaces_without_a_kind_do_without_it() -> None:
    net = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 2)).double()
    space = wspace.trace(net, torch.zeros(1, 3, dtype=torch.float64))
    graph = wspace.encode(space, {p.name: torch.randn(4, *p.shape).double() for p in space.params})
    a, b = mixed(AlignedMixUp(), graph)[0], mixed(AlignedMixUp(kinds=("permutation",)), graph)[0]
    assert_same(a, b)
    still = wspace.trace(nn.Linear(3, 2), torch.zeros(1, 3))
    linear = wspace.encode(still, {p.name: torch.randn(4, *p.shape) for p in still.params})
    assert_same(mixed(AlignedMixUp(), linear)[0], mixed(MixUp(), linear)[0])


def test_self_mixing_keeps_targets_and_nearly_the_function() -> None:
    graph = one_hidden(B)
    exact = SelfMixUp(augment=[Symmetry(("permutation", "sign"))])
    made = exact.apply(graph, seeded())
    assert made.mixture is None and not exact.mixes
    assert_close(dict(made.graph.values), dict(graph.values))
    noisy = SelfMixUp(augment=[Symmetry(("permutation", "sign")), Noise(0.1)])(graph, seeded())
    assert bool(
        (distance(graph, noisy) < 0.2 * distance(graph, Symmetry(KINDS)(graph, seeded()))).all()
    )
    with pytest.raises(AssertionError, match="not close"):
        assert_close(dict(noisy.values), dict(graph.values))
    alone = SelfMixUp()(replace(graph, values=MappingProxyType(
        {n: y[0] for n, y in graph.values.items()})), seeded())  # fmt: skip
    assert alone.batch == ()
