"""Laws of selecting units by their scores, over many random spaces, scores and options."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import floor

import pytest
import torch
from cases import build
from torch import Tensor

import wspace
from wspace.action import shape_of
from wspace.errors import PruneError
from wspace.prune.cost import Cost
from wspace.prune.restriction import Restriction, prunable
from wspace.prune.select import Selection, select
from wspace.space import Axis, Group, Param, WeightSpace
from wspace.trace.work import Survey, Work

Keep = Mapping[str, Tensor]
FREE = ("permutation",)


def chain(*sizes: int) -> WeightSpace:
    """A multilayer perceptron of these hidden sizes, groups ``h1``, ``h2``, …; 3 in and 2 out."""
    groups = [Group("3", 3), *(Group(f"h{i + 1}", n, FREE) for i, n in enumerate(sizes))]
    groups.append(Group("2", 2))
    params = []
    for i, (a, b) in enumerate(zip(groups, groups[1:], strict=False)):
        params.append(Param(f"{i}.weight", (Axis((b,)), Axis((a,)))))
        params.append(Param(f"{i}.bias", (Axis((b,)),)))
    return WeightSpace(tuple(params))


def rich() -> WeightSpace:
    """A stream, heads with dimensions of their own, experts with hidden units of their own."""
    stream, heads = Group("stream", 13, FREE), Group("heads", 5, FREE)
    dims = Group("dims", 7, FREE, ("heads",))
    experts, hidden = Group("experts", 3, FREE), Group("hidden", 11, FREE, ("experts",))
    inp, out = Group("4", 4), Group("2", 2)
    params = [
        Param("inp", (Axis((stream,)), Axis((inp,)))),
        Param("v", (heads * dims, Axis((stream,)))),
        Param("o", (Axis((stream,)), heads * dims)),
        Param("gate", (Axis((experts,)), Axis((stream,)))),
        Param("out", (Axis((out,)), Axis((stream,))), ties=("again",)),
        Param("statistic", (Axis((stream,)),), buffer=True),
    ]
    for k in range(3):
        member = {"at": ("experts", k)}
        params.append(Param(f"e{k}.a", (Axis((hidden,)), Axis((stream,))), family="e0.a", **member))
        params.append(Param(f"e{k}.b", (Axis((stream,)), Axis((hidden,))), family="e0.b", **member))
    return WeightSpace(tuple(params))


def random_scores(space: WeightSpace, generator: torch.Generator) -> dict[str, Tensor]:
    """Positive scores without ties."""
    return {
        n: torch.rand(shape_of(g, space), generator=generator, dtype=torch.float64) + 0.1
        for n, g in prunable(space).items()
    }


def draw(low: int, high: int, generator: torch.Generator) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))


def spaces(generator: torch.Generator, count: int = 20) -> Iterator[WeightSpace]:
    yield rich()
    for _ in range(count):
        yield chain(*(draw(2, 17, generator) for _ in range(draw(1, 5, generator))))


def options(generator: torch.Generator) -> Selection:
    """Random options that any space can meet."""
    return Selection(
        amount=draw(0, 40, generator) / 100,
        of=("units", "parameters")[draw(0, 1, generator)],
        scope=("global", "group")[draw(0, 1, generator)],
        normalize=("mean", "max", "sum", "none")[draw(0, 3, generator)],
    )


def counts(space: WeightSpace, keep: Keep) -> dict[str, int]:
    return {n: int(mask.reshape(-1, mask.shape[-1])[0].sum()) for n, mask in keep.items()}


def same(a: Keep, b: Keep) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def assert_sound(space: WeightSpace, scores: Mapping[str, Tensor], keep: Keep) -> None:
    """Masks of every group, of equal counts in all contexts, that keep the highest scores."""
    assert list(keep) == list(prunable(space))
    for name, group in prunable(space).items():
        assert keep[name].dtype == torch.bool
        assert keep[name].shape == shape_of(group, space)
        rows = keep[name].reshape(-1, group.size)
        values = scores[name].reshape(-1, group.size)
        assert len(set(rows.sum(1).tolist())) == 1
        assert bool(rows.any(1).all())
        for row, value in zip(rows, values, strict=True):
            assert not (~row).any() or value[~row].max() <= value[row].min()
    Restriction(space, keep)  # and it takes them


def test_helper_sees_unsound_masks() -> None:
    space = rich()
    scores = random_scores(space, torch.Generator().manual_seed(1))
    keep = select(space, scores, Selection(amount=0.3))
    assert_sound(space, scores, keep)
    for name in keep:
        for wrong in (~keep[name], torch.zeros_like(keep[name]), keep[name].float()):
            with pytest.raises((AssertionError, PruneError, RuntimeError)):
                assert_sound(space, scores, {**keep, name: wrong})
    uneven = keep["dims"].clone()
    uneven[0] = True
    with pytest.raises(AssertionError):
        assert_sound(space, scores, {**keep, "dims": uneven})


# ------------------------------------------------------------------------------------ laws


def test_masks_are_sound_and_the_same_each_time(generator: torch.Generator) -> None:
    for space in spaces(generator):
        scores, selection = random_scores(space, generator), options(generator)
        before = {n: x.clone() for n, x in scores.items()}
        state = torch.get_rng_state()
        keep = select(space, scores, selection)
        assert_sound(space, scores, keep)
        assert same(keep, select(space, scores, selection))
        assert torch.equal(state, torch.get_rng_state())
        assert all(torch.equal(scores[n], before[n]) for n in scores)


def test_permuted_scores_give_permuted_masks(generator: torch.Generator) -> None:
    for space in spaces(generator):
        scores, selection = random_scores(space, generator), options(generator)
        keep = select(space, scores, selection)
        order = {n: torch.rand(x.shape, generator=generator).argsort(-1) for n, x in scores.items()}
        moved = {n: x.gather(-1, order[n]) for n, x in scores.items()}
        expected = {n: mask.gather(-1, order[n]) for n, mask in keep.items()}
        assert same(select(space, moved, selection), expected)


def test_order_of_contexts_does_not_matter(generator: torch.Generator) -> None:
    space = rich()
    scores = random_scores(space, generator)
    keep = select(space, scores, Selection(amount=0.4))
    order = torch.randperm(5, generator=generator)
    moved = {**scores, "heads": scores["heads"][order], "dims": scores["dims"][order]}
    expected = {**keep, "heads": keep["heads"][order], "dims": keep["dims"][order]}
    assert same(select(space, moved, Selection(amount=0.4)), expected)


def test_larger_amounts_remove_supersets(generator: torch.Generator) -> None:
    for space in spaces(generator):
        scores, selection = random_scores(space, generator), options(generator)
        rounds = draw(1, 2, generator)
        masks = []
        for amount in (0.0, 0.1, 0.2, 0.3, 0.35):
            try:
                masks.append(
                    select(space, scores, replace(selection, amount=amount, round_to=rounds))
                )
            except PruneError:
                break
        assert all(mask.all() for mask in masks[0].values())
        for less, more in zip(masks, masks[1:], strict=False):
            assert all(bool((less[n] | ~more[n]).all()) for n in less)


@pytest.mark.parametrize("normalize", ["mean", "max", "sum"])
def test_scale_of_one_group_does_not_matter(normalize: str, generator: torch.Generator) -> None:
    for space in spaces(generator, 5):
        scores = random_scores(space, generator)
        selection = Selection(amount=0.4, normalize=normalize)
        scaled = {n: x * 2.0 ** draw(-9, 9, generator) for n, x in scores.items()}
        assert same(select(space, scores, selection), select(space, scaled, selection))


def test_without_normalising_scale_matters() -> None:
    space = chain(7, 7)
    scores = {"h1": torch.arange(7.0) + 1, "h2": (torch.arange(7.0) + 1) * 100}
    plain = Selection(amount=0.3, normalize="none")
    assert counts(space, select(space, scores, plain)) == {"h1": 3, "h2": 7}
    assert counts(space, select(space, scores, replace(plain, normalize="mean"))) == {
        "h1": 5,
        "h2": 5,
    }


def test_equal_scores_go_by_index() -> None:
    space = chain(5, 5)
    scores = {"h1": torch.ones(5), "h2": torch.ones(5)}
    keep = select(space, scores, Selection(amount=0.6))
    assert keep["h1"].tolist() == [False] * 4 + [True]  # the first group first, one unit stays
    assert keep["h2"].tolist() == [False] * 2 + [True] * 3


def test_negative_scores_go_first() -> None:
    space = chain(5, 5)
    scores = {"h1": torch.tensor([1.0, -1, 2, -2, 3]), "h2": torch.ones(5)}
    keep = select(space, scores, Selection(amount=0.2, normalize="mean"))
    assert keep["h1"].tolist() == [True, False, True, False, True]
    assert keep["h2"].all()


def test_price_of_a_step_is_a_mean_over_the_units_it_takes() -> None:
    """A group in five contexts is compared by its units, not by their sum."""
    space = rich()
    scores = {n: torch.ones(shape_of(g, space)) for n, g in prunable(space).items()}
    scores["dims"] = torch.full((5, 7), 1.0)
    scores["dims"][:, 3] = 0.5  # 2.5 together, yet the least of all for each unit
    keep = select(space, scores, Selection(amount=0.02))
    assert not keep["dims"][:, 3].any()
    assert int(sum((~m).sum() for m in keep.values())) == 5


# --------------------------------------------------------------------------------- budgets


def with_macs(space: WeightSpace) -> Cost:
    """A cost whose MACs are the parameters of matrices, as for one sample through the network."""
    works = []
    for p in space.params:
        if len(p.axes) == 2 and not p.buffer:
            axis = Axis(tuple(f for a in p.axes for f in a.factors))
            rest, names = 1, []
            for g in axis.groups():
                rest, names = (rest * g.size, names) if g.fixed else (rest, [*names, g.name])
            works.append(Work("mm", p.name, ((tuple(sorted(names)), rest),)))
    return Cost(space, Survey(tuple(works)))


@pytest.mark.parametrize("round_to", [1, 2])
@pytest.mark.parametrize(
    ("of", "scope"),
    [
        ("units", "global"),
        ("parameters", "global"),
        ("parameters", "group"),
        ("flops", "global"),
        ("flops", "group"),
    ],
)
def test_budgets_are_met_with_as_few_steps_as_the_order_allows(
    of: str, scope: str, round_to: int, generator: torch.Generator
) -> None:
    """Adding back the last step that was taken breaks the budget."""
    for space in spaces(generator, 8):
        scores, cost = random_scores(space, generator), with_macs(space)
        selection = Selection(
            amount=draw(1, 30, generator) / 100, of=of, scope=scope, round_to=round_to
        )

        def left(keep: Keep, *, of: str = of, cost: Cost = cost) -> int:
            if of == "units":
                return sum(int(mask.sum()) for mask in keep.values())
            some = counts(cost.space, keep)
            return cost.parameters(some) if of == "parameters" else cost.macs(some)

        whole = {n: torch.ones_like(x, dtype=torch.bool) for n, x in scores.items()}
        goal = (1 - selection.amount) * left(whole)
        goal = left(whole) - floor(selection.amount * left(whole) + 1e-9) if of == "units" else goal
        try:
            keep = select(space, scores, selection, cost=cost)
        except PruneError as error:
            assert "cannot be removed" in str(error)  # noqa: PT017 (only small spaces, rounded)
            assert round_to > 1
            continue
        assert left(keep) <= goal + 1e-6
        before = last_step_back(space, scores, selection, keep, cost)
        assert before is None or left(before) > goal + 1e-6


def last_step_back(
    space: WeightSpace, scores: dict[str, Tensor], selection: Selection, keep: Keep, cost: Cost
) -> Keep | None:
    """The masks with one step less: those of the largest smaller amount that differ."""
    if all(mask.all() for mask in keep.values()):
        return None
    low, high = 0.0, selection.amount or 0.0
    for _ in range(30):
        middle = (low + high) / 2
        now = select(space, scores, replace(selection, amount=middle), cost=cost)
        low, high = (low, middle) if same(now, keep) else (middle, high)
    return select(space, scores, replace(selection, amount=low), cost=cost)


def test_share_of_every_group(generator: torch.Generator) -> None:
    for space in spaces(generator):
        scores, amount = random_scores(space, generator), draw(0, 99, generator) / 100
        keep = select(space, scores, Selection(amount=amount, scope="group"))
        for name, n in counts(space, keep).items():
            size = space.groups[name].size
            assert size - n == round(amount * 100) * size // 100


def test_shares_are_meant_as_written() -> None:
    """0.29 * 100 is 28.999999999999996."""
    space = chain(100)
    scores = {"h1": torch.arange(100.0)}
    for selection in (
        Selection(amount=0.29),
        Selection(amount=0.29, scope="group"),
        Selection(ratios={"h1": 0.29}),
        Selection(amount=0.29, at_most=0.29),
    ):
        assert counts(space, select(space, scores, selection)) == {"h1": 71}


def test_parameters_are_what_is_left_of_the_network(generator: torch.Generator) -> None:
    """The budget holds for the pruned space, recounted from its shapes."""
    space = rich()
    whole = sum(p.numel for p in space.params if not p.buffer)
    for amount in (0.1, 0.5, 0.8):
        scores = random_scores(space, generator)
        keep = select(space, scores, Selection(amount=amount, of="parameters"))
        small = Restriction(space, keep).small
        count = sum(p.numel for p in small.params if not p.buffer)
        assert count <= (1 - amount) * whole
        assert count == Cost.of(space).parameters(counts(space, keep))


def test_budget_in_flops_of_a_real_network(generator: torch.Generator) -> None:
    module, args, kwargs = build("mobilenet_v3")
    space = wspace.trace(module, args, kwargs)
    cost = Cost.measured(module, space, args, kwargs)
    scores = random_scores(space, generator)
    keep = select(space, scores, Selection(amount=0.5, of="flops"), cost=cost)
    left = cost.macs(counts(space, keep))
    assert left <= 0.5 * cost.macs()
    assert left > 0.4 * cost.macs()
    assert_sound(space, scores, keep)
    with pytest.raises(PruneError, match="multiplications were not counted"):
        select(space, scores, Selection(amount=0.5, of="flops"))


def test_what_cannot_be_reached_is_said() -> None:
    space = chain(10, 10)
    scores = random_scores(space, torch.Generator().manual_seed(0))
    for more in ({"at_most": 0.2}, {"ignore": ["h1"]}, {"round_to": 8}):
        of = "parameters" if "ignore" in more else "units"
        with pytest.raises(PruneError, match=r"at most 0\.\d+ can be removed"):
            select(space, scores, Selection(amount=0.8, of=of, **more))
    with pytest.raises(PruneError, match="a group that may lose units"):
        select(space, scores, Selection(amount=0.1, ignore=["h*"]))
    reachable = select(space, scores, Selection(amount=0.2, at_most=0.2))
    assert counts(space, reachable) == {"h1": 8, "h2": 8}


# --------------------------------------------------------------------------------- options


def test_counts_are_multiples(generator: torch.Generator) -> None:
    space = chain(24, 17, 5, 8)
    for _ in range(20):
        scores, rounds = random_scores(space, generator), draw(2, 8, generator)
        amount = draw(0, 50, generator) / 100
        for scope in ("global", "group"):
            selection = Selection(amount=amount, scope=scope, round_to=rounds)
            try:
                keep = select(space, scores, selection)
            except PruneError:
                continue
            assert_sound(space, scores, keep)
            for name, n in counts(space, keep).items():
                size = space.groups[name].size
                assert n == size or (n % rounds == 0 and n >= rounds)
                assert size >= rounds or n == size
    one = select(space, scores, Selection(amount=0.4, round_to={"h1": 8, "h[23]": 2}))
    now = counts(space, one)
    assert now["h1"] % 8 == 0
    assert now["h2"] in (17, *range(2, 17, 2))
    assert now["h3"] in (5, 2, 4)


def test_no_group_loses_more_than_it_may(generator: torch.Generator) -> None:
    for space in spaces(generator):
        scores = random_scores(space, generator)
        most = draw(40, 90, generator) / 100
        keep = select(space, scores, Selection(amount=0.15, at_most=most))
        for name, n in counts(space, keep).items():
            assert space.groups[name].size - n <= most * space.groups[name].size + 1e-9
    with pytest.raises(PruneError, match="cannot be removed"):
        select(chain(9, 9), random_scores(chain(9, 9), generator), Selection(amount=0.3, at_most=0))


def test_ratios_hold_and_count_towards_the_budget(generator: torch.Generator) -> None:
    space = chain(10, 20, 30)
    scores = random_scores(space, generator)
    only = select(space, scores, Selection(ratios={"h1": 0.35, "h2": 0.5}))
    assert counts(space, only) == {"h1": 7, "h2": 10, "h3": 30}
    both = Selection(amount=0.6, of="parameters", ratios={"h1": 0.3, "h*": 0.0}, ignore=[])
    with pytest.raises(PruneError, match="cannot be removed"):  # nothing else may go
        select(space, scores, both)
    keep = select(space, scores, replace(both, ratios={"h1": 0.3}))
    cost = Cost.of(space)
    now = counts(space, keep)
    assert now["h1"] == 7
    assert cost.parameters(now) <= 0.4 * cost.parameters()
    alone = counts(space, select(space, scores, replace(both, ratios={"h1": 0.0})))
    assert alone["h1"] == 10
    assert sum(alone.values()) - 10 <= sum(now.values()) - 7
    units = select(space, scores, Selection(amount=0.5, ratios={"h1": 0.3}))
    assert counts(space, units)["h1"] == 7
    assert counts(space, units)["h2"] + counts(space, units)["h3"] == 25


def test_ratios_of_groups_that_are_held_back_are_an_error(generator: torch.Generator) -> None:
    space = chain(10, 20, 30)
    scores = random_scores(space, generator)
    half = Selection(ratios={"h1": 0.5})
    for selection, least in (
        (replace(half, ignore=["h1"]), {}),
        (replace(half, groups=["h2", "h3"]), {}),
        (half, {"h1": 10}),
    ):
        with pytest.raises(PruneError, match="may not lose units[^$]*a ratio for 'h1'"):
            select(space, scores, selection, least=least)
    some = select(space, scores, replace(half, ratios={"h*": 0.5}, ignore=["h1"]))
    assert counts(space, some) == {"h1": 10, "h2": 10, "h3": 15}
    del scores["h1"]  # what must stay whole needs no scores
    held = select(space, scores, Selection(amount=0.5), least={"h1": 10})
    assert counts(space, held)["h1"] == 10 and sum(counts(space, held).values()) == 35


def test_equal_groups_obey_the_limits_of_each(generator: torch.Generator) -> None:
    """Kept counts are multiples of all their numbers, and as many stay as any of them needs."""
    space = chain(24, 24, 10)
    scores = random_scores(space, generator)
    for names in (("h1", "h2"), ("h2", "h1")):
        rounds = {"h1": 4, "h2": 6}
        keep = select(space, scores, Selection(ratios={"h1": 0.3}, round_to=rounds), equal=[names])
        assert counts(space, keep) == {"h1": 24, "h2": 24, "h3": 10}  # 18 and 20 fit one only
        keep = select(space, scores, Selection(ratios={"h1": 0.6}, round_to=rounds), equal=[names])
        assert counts(space, keep) == {"h1": 12, "h2": 12, "h3": 10}
        for least in ({"h1": 15}, {"h2": 15}, {"h1": 3, "h2": 15}, {"h1": 15, "h2": 3}):
            keep = select(space, scores, Selection(ratios={"h1": 0.9}), equal=[names], least=least)
            assert counts(space, keep) == {"h1": 15, "h2": 15, "h3": 10}


def test_ignored_groups_and_parameters_stay_whole(generator: torch.Generator) -> None:
    space = rich()
    scores = random_scores(space, generator)
    for ignore, whole in (
        (["heads"], {"heads"}),
        (["[hd]*s"], {"heads", "dims"}),
        (["gate"], {"experts", "stream"}),
        (["again"], {"stream"}),  # a tied name
        (["e1.a"], {"hidden", "stream", "experts"}),
        (["inp", "heads"], {"stream", "heads"}),
    ):
        keep = select(space, scores, Selection(amount=0.6, ignore=ignore))
        assert {n for n, mask in keep.items() if mask.all()} == whole
    keep = select(space, scores, Selection(amount=0.6, groups=["d*", "experts"]))
    assert {n for n, mask in keep.items() if not mask.all()} == {"dims", "experts"}
    few = {n: scores[n] for n in ("dims", "experts")}  # others need no scores then
    assert same(keep, select(space, few, Selection(amount=0.6, groups=["d*", "experts"])))


def test_bundles_keep_equal_counts(generator: torch.Generator) -> None:
    space = chain(9, 9, 9, 9, 7)
    for _ in range(10):
        scores, selection = random_scores(space, generator), options(generator)
        equal = [["h1", "h3"], ["h4", "h3"]]
        now = counts(space, select(space, scores, selection, equal=equal))
        assert now["h1"] == now["h3"] == now["h4"]
        again = counts(space, select(space, scores, selection, equal=[["h3", "h1", "h4"]]))
        assert now == again
    held = select(space, scores, Selection(amount=0.3, ignore=["h3"]), equal=equal)
    assert {n for n, mask in held.items() if mask.all()} == {"h1", "h3", "h4"}
    loose = counts(space, select(space, scores, Selection(amount=0.5)))
    assert len({loose["h1"], loose["h3"], loose["h4"]}) > 1  # it was the ties that held them
    with pytest.raises(PruneError, match=r"h1\[9\], h5\[7\]"):
        select(space, scores, selection, equal=[["h1", "h5"]])
    with pytest.raises(PruneError, match="h9"):
        select(space, scores, selection, equal=[["h1", "h9"]])
    with pytest.raises(PruneError, match="with ratios"):
        select(space, scores, Selection(ratios={"h1": 0.2, "h3": 0.4}), equal=equal)


def test_as_many_stay_as_are_needed(generator: torch.Generator) -> None:
    space = rich()
    scores = random_scores(space, generator)
    keep = select(space, scores, Selection(amount=0.75), least={"experts": 2, "heads": 5})
    assert int(keep["experts"].sum()) >= 2
    assert keep["heads"].all()
    assert int(select(space, scores, Selection(amount=0.8))["heads"].sum()) < 5


# ---------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({}, "nothing to do"),
        ({"amount": 1.0}, "amount=1.0"),
        ({"amount": -0.1}, "amount=-0.1"),
        ({"amount": float("nan")}, "amount=nan"),
        ({"ratios": {"h1": 1.0}}, "'h1'"),
        ({"amount": 0.5, "of": "neurons"}, "neurons"),
        ({"amount": 0.5, "scope": "layer"}, "layer"),
        ({"amount": 0.5, "normalize": "gauss"}, "gauss"),
        ({"amount": 0.5, "at_most": 1.5}, "at_most=1.5"),
        ({"amount": 0.5, "round_to": 0}, "round_to=0"),
        ({"amount": 0.5, "round_to": {"h1": 2.5}}, "round_to=2.5"),
        ({"amount": 0.5, "ignore": "h1"}, "ignore='h1'"),
    ],
)
def test_options_that_make_no_sense(wrong: dict[str, object], named: str) -> None:
    with pytest.raises(PruneError, match=named):
        Selection(**wrong)


def test_all_wrong_options_are_listed() -> None:
    with pytest.raises(PruneError, match=r"neurons[\s\S]*amount=2[\s\S]*round_to=-1"):
        Selection(amount=2, of="neurons", round_to=-1)


def test_names_that_fit_nothing() -> None:
    space = chain(5, 5)
    scores = random_scores(space, torch.Generator().manual_seed(0))
    for wrong in (
        {"ignore": ["h9"]},
        {"groups": ["conv*"]},
        {"ratios": {"h9": 0.5}},
        {"round_to": {"h9": 2}},
    ):
        with pytest.raises(PruneError, match=r"h9|conv\*"):
            select(space, scores, Selection(amount=0.2, **wrong))


def test_all_wrong_scores_are_listed() -> None:
    space = chain(5, 7, 3, 4)
    scores = {
        "h1": torch.rand(4),
        "h3": torch.tensor([1.0, float("nan"), 2.0]),
        "h4": torch.tensor([1.0, float("inf"), 2.0, 3.0]),
        "h8": torch.rand(3),
    }
    with pytest.raises(PruneError, match="do not fit") as caught:
        select(space, scores, Selection(amount=0.3))
    for name in ("h1", "h2", "h3", "h4", "h8"):
        assert f"'{name}'" in str(caught.value)
    with pytest.raises(PruneError, match=r"'dims' of shape \(7,\), expected \(5, 7\)"):
        rich_scores = random_scores(rich(), torch.Generator().manual_seed(0))
        select(rich(), {**rich_scores, "dims": torch.rand(7)}, Selection(amount=0.3))
