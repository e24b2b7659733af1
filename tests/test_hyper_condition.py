"""Conditions: tasks, sets, noise, hyperparameters, graphs."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wspace
from wspace.errors import HyperError
from wspace.hyper import (
    FullHead,
    GraphCondition,
    HyperNetwork,
    Hyperparameters,
    Noise,
    SetEncoder,
    TaskEmbedding,
    Vector,
)
from wspace.testing import assert_close, assert_same

pytestmark = pytest.mark.usefixtures("float64")


# ------------------------------------------------------------------------------ tasks


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
        lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1, amsgrad=True),
    ],
)
def test_frozen_tasks_stay_bit_by_bit(make: Any) -> None:
    tasks = TaskEmbedding(4, 5)
    optimizer = make(tasks.parameters())

    def train() -> None:
        for _ in range(3):
            optimizer.zero_grad()
            tasks(torch.tensor([0, 1, 2, 3])).sin().sum().backward()
            optimizer.step()

    train()  # momentum is there before they are frozen
    tasks.freeze([0, 2])
    held, free = tasks.vectors().detach()[[0, 2]], tasks.vectors().detach()[[1, 3]]
    train()
    assert_same(held, tasks.vectors()[[0, 2]])
    assert_same(held, tasks(torch.tensor([0, 2])))
    assert not torch.equal(free, tasks.vectors()[[1, 3]])
    assert not torch.equal(held, tasks.table[[0, 2]])  # the control: the parameter itself moved
    tasks.release(2)
    assert_same(held[1], tasks(2))
    train()
    assert not torch.equal(held[1], tasks(2))


def test_new_tasks_begin_near_others() -> None:
    tasks = TaskEmbedding(3, 5)
    tasks.freeze(1)
    before = tasks.vectors().detach()
    assert tasks.add(2) == [3, 4]
    assert_same(before, tasks.vectors()[:3])
    assert_close(torch.full((5,), 5.0), tasks.vectors().square().sum(-1))
    assert tasks.add(2, near=1) == [5, 6]
    assert_same(before[[1, 1]], tasks.vectors()[5:])
    assert tasks.add(2, near=[2, 0]) == [7, 8]
    assert_same(before[[2, 0]], tasks.vectors()[7:])
    assert tasks.add(1, near=before[[1]] + 0.01) == [9]
    assert_same(before[1], tasks(9))
    assert tasks.frozen.tolist() == [n == 1 for n in range(10)]
    assert (tasks.count, len(tasks.kept), len(tasks.table)) == (10, 10, 10)
    tasks(9).sum().backward()  # a copy learns by itself
    assert [bool(g.any()) for g in tasks.table.grad] == [n == 9 for n in range(10)]


def test_nearest_is_by_distance() -> None:
    tasks = TaskEmbedding(7, 3)
    x = torch.randn(2, 4, 3)
    expected = torch.cdist(x, tasks.vectors().detach().expand(2, 7, 3)).argmin(-1)
    assert_same(expected, tasks.nearest(x))


@pytest.mark.parametrize("near", [3, [0, 1, 2], torch.zeros(2, 4), [0, -1]])
def test_near_has_to_fit(near: Any) -> None:
    tasks = TaskEmbedding(3, 5)
    with pytest.raises(HyperError, match="near= does not fit"):
        tasks.add(2, near=near)
    assert tasks.count == 3


def test_tasks_are_numbers() -> None:
    with pytest.raises(HyperError, match="takes numbers of tasks"):
        TaskEmbedding(3, 5)(torch.tensor([0.0]))
    assert TaskEmbedding(3, 5)(torch.zeros(2, 3, dtype=torch.long)).shape == (2, 3, 5)


# ------------------------------------------------------------------------------- sets

SETS = [
    pytest.param(6, {}, id="vectors"),
    pytest.param(6, {"values": 2}, id="values"),
    pytest.param(6, {"values": 2, "use": "linear"}, id="values-linear"),
    pytest.param(6, {"classes": 4}, id="classes"),
    pytest.param(6, {"classes": 4, "use": "linear"}, id="classes-linear"),
    pytest.param(6, {"classes": 4, "use": "only"}, id="classes-only"),
    pytest.param((2, 7, 5), {}, id="images"),
    pytest.param((2, 7, 5), {"classes": 4}, id="images-classes"),
    pytest.param((2, 7, 5), {"classes": 4, "use": "linear"}, id="images-linear"),
]


def labels(options: dict[str, Any], *batch: int) -> Tensor | None:
    if options.get("classes"):
        return torch.randint(options["classes"], batch)
    return torch.randn(*batch, options["values"]) if "values" in options else None


@pytest.mark.parametrize(("inputs", "options"), SETS)
def test_sets_have_no_order_and_no_padding(inputs: Any, options: dict[str, Any]) -> None:
    shape = (inputs,) if isinstance(inputs, int) else inputs
    encoder = SetEncoder(inputs, 9, (8, 7), **options)
    x, y = torch.randn(2, 3, 8, *shape), labels(options, 2, 3, 8)
    v = encoder((x, y))
    assert v.shape == (2, 3, 9)
    order = torch.randperm(8)
    assert_close(v, encoder((x[:, :, order], None if y is None else y[:, :, order])))
    if y is not None:  # the control: labels belong to their examples
        wrong = encoder((x, y[:, :, order]))
        assert options.get("use") == "only" or options.get("use") == "linear" or not torch.allclose(
            v, wrong)  # fmt: skip
    mask = torch.rand(2, 3, 8) < 0.6
    mask[..., 0] = True
    padded = x.masked_fill(~mask.reshape(2, 3, 8, *[1] * len(shape)), torch.nan)
    got = encoder((padded, y, mask))
    for i, j in product(range(2), range(3)):
        there = mask[i, j]
        alone = encoder((x[i, j, there], None if y is None else y[i, j, there]))
        assert_close(alone, got[i, j])
    assert not torch.allclose(v, got)


def test_the_first_call_sets_the_scale() -> None:
    encoder = SetEncoder(6, 9)
    v = encoder(torch.randn(4, 20, 6) * 3 + 1)
    assert_close(torch.tensor([0.0, 1.0]), torch.stack([v.mean(), v.std(correction=0)]))
    x = torch.randn(4, 20, 6) * 5
    again = encoder(x)
    assert not torch.allclose(again.std(correction=0), torch.tensor(1.0))
    copy = SetEncoder(6, 9)
    copy.load_state_dict(encoder.state_dict())
    assert_same(again, copy(x))
    plain = SetEncoder(6, 9, standardize=False)
    plain.load_state_dict(encoder.state_dict())
    assert_close(again, (plain(x) - encoder.shift) / encoder.size)


def test_gradients_do_not_reach_the_scale_and_reach_all_else() -> None:
    encoder = SetEncoder((1, 6, 6), 5, classes=3)
    encoder((torch.randn(2, 4, 1, 6, 6), torch.randint(3, (2, 4)))).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in encoder.parameters())


@pytest.mark.parametrize(
    ("cond", "said"),
    [
        (torch.zeros(3, 5), "examples of shape"),
        ((torch.zeros(3, 6), None), "no labels"),
        ((torch.zeros(3, 6), torch.zeros(4).long()), "labels of shape"),
        ((torch.zeros(3, 6), torch.zeros(3).long(), torch.zeros(3)), "a mask of"),
        ((torch.zeros(2, 3, 6), torch.zeros(2, 3).long(),
          torch.tensor([[True] * 3, [False] * 3])), "without examples"),
        ((torch.zeros(0, 6), torch.zeros(0).long()), "without examples"),
    ],
)  # fmt: skip
def test_sets_that_do_not_fit(cond: Any, said: str) -> None:
    with pytest.raises(HyperError, match=said):
        SetEncoder(6, 5, classes=3)(cond)


def test_encoders_that_cannot_be_made() -> None:
    with pytest.raises(HyperError, match="labels, but neither"):
        SetEncoder(6, 5)((torch.zeros(3, 6), torch.zeros(3)))
    wrong: list[dict[str, Any]] = [
        {"inputs": (3, 4)},
        {"classes": 2, "values": 2},
        {"use": "only"},
        {"classes": 2, "use": "sum"},
    ]
    for options in wrong:
        with pytest.raises(HyperError, match="cannot be made"):
            SetEncoder(**({"inputs": 6, "width": 5} | options))


def test_a_set_makes_a_network() -> None:
    net = nn.Linear(3, 2)
    hyper = HyperNetwork(net, SetEncoder(4, 6, classes=2), FullHead([8]))
    cond = torch.randn(5, 7, 4), torch.randint(2, (5, 7))
    assert hyper.run(cond, torch.randn(5, 9, 3)).shape == (5, 9, 2)


# ------------------------------------------------------------------------ what is left


@pytest.mark.parametrize("distribution", ["normal", "uniform", "sign"])
def test_noise(distribution: Any) -> None:
    g = torch.Generator().manual_seed(0)
    noise = Noise(7, distribution, generator=g)
    x = noise(3000)
    assert x.shape == (3000, 7) and x.dtype == torch.float64
    assert abs(float(x.mean())) < 0.02 and abs(float(x.var()) - 1) < 0.03
    assert noise().shape == (7,) and noise((2, 3)).shape == (2, 3, 7)
    assert not torch.equal(noise(), noise())
    assert_same(x, noise(x))
    again = Noise(7, distribution, generator=torch.Generator().manual_seed(0))
    assert_same(x, again(3000))
    with pytest.raises(HyperError, match="another length"):
        noise(x[:, :6])


def test_noise_of_another_kind() -> None:
    with pytest.raises(HyperError, match="unknown distribution"):
        Noise(3, "cauchy")  # pyright: ignore


def test_hyperparameters_are_quarter_turns() -> None:
    encode = Hyperparameters({"rate": (1e-4, 1e-1), "drop": (0, 1)}, logarithmic=["rate"])
    rate, drop = torch.tensor([1e-4, 1e-2, 1e-1]), torch.tensor([0.0, 0.3, 1.0])
    made = encode({"drop": drop, "rate": rate})
    quarter = torch.pi / 2
    angle = torch.stack([torch.tensor([0.0, 2 / 3, 1.0]) * quarter, drop * quarter], -1)
    expected = torch.stack([angle[:, 0].cos(), angle[:, 0].sin(), angle[:, 1].cos(),
                            angle[:, 1].sin()], -1) * 2**0.5  # fmt: skip
    assert_close(expected, made)
    assert_close(made, encode(torch.stack([rate, drop], -1)))
    assert_close(torch.full((3,), 4.0), made.square().sum(-1))
    assert encode({"rate": 1e-3, "drop": drop}).shape == (3, 4)  # one for all


@pytest.mark.parametrize(
    "cond",
    [
        {"rate": 1e-3},
        {"rate": 1e-3, "drop": 0.5, "depth": 3},
        {"rate": 1e-3, "drop": 1.5},
        {"rate": 0.0, "drop": 0.5},
        {"rate": float("nan"), "drop": 0.5},
        torch.zeros(2, 3),
    ],
)
def test_hyperparameters_have_ranges(cond: Any) -> None:
    encode = Hyperparameters({"rate": (1e-4, 1e-1), "drop": (0, 1)}, logarithmic=["rate"])
    with pytest.raises(HyperError, match="cannot take these numbers"):
        encode(cond)


@pytest.mark.parametrize(
    ("ranges", "logarithmic"),
    [({}, ()), ({"a": (1, 1)}, ()), ({"a": (0, 1)}, ["a"]), ({"a": (0, 1)}, ["b"])],
)
def test_ranges_that_are_none(ranges: Any, logarithmic: Any) -> None:
    with pytest.raises(HyperError, match="needs ranges"):
        Hyperparameters(ranges, logarithmic=logarithmic)


def test_graphs_as_conditions() -> None:
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    space = wspace.trace(net, torch.randn(1, 3))
    graph = wspace.encode(space, net.state_dict())
    condition = GraphCondition(wspace.nn.GraphMetanet(6, channels=8, layers=1), 6)
    assert condition(graph).shape == (6,)
    assert condition([graph, graph]).shape == (2, 6)
    moved = wspace.act(wspace.sample(space), net.state_dict(), space)
    assert_close(condition(graph), condition(wspace.encode(space, moved)))
    hyper = HyperNetwork(nn.Linear(3, 2), condition, FullHead([8]))
    assert hyper.run([graph, graph], torch.randn(2, 4, 3)).shape == (2, 4, 2)
    for wrong in (GraphCondition(condition.metanet, 5), GraphCondition(nn.Identity(), 6)):
        with pytest.raises(HyperError, match="one vector per network"):
            wrong(graph)


def test_vectors_are_passed_on() -> None:
    x = torch.randn(2, 3)
    assert Vector(3)(x) is x
    with pytest.raises(HyperError, match="another length"):
        Vector(4)(x)


def test_a_first_call_without_numbers_decides_nothing() -> None:
    encode = SetEncoder(3, 4, (5,))
    assert encode(torch.zeros(0, 6, 3)).shape == (0, 4)
    with pytest.raises(HyperError, match="no finite numbers"):
        encode(torch.full((2, 6, 3), torch.nan))
    found = encode(torch.randn(40, 6, 3))
    assert abs(float(found.mean().detach())) < 1e-9
    assert abs(float(found.std(correction=0).detach()) - 1) < 1e-9
    constant = SetEncoder(3, 4, (5,))
    same = constant(torch.ones(1, 6, 3))[:, :1]
    assert same.isfinite().all() and constant.size > 0


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: TaskEmbedding(3, 4)(7), "TaskEmbedding has no such task(.|\n)*got 7"),
        (lambda: TaskEmbedding(3, 4)(torch.tensor([0, -4])), "got -4"),
        (lambda: TaskEmbedding(3, 4)(True), "takes numbers of tasks(.|\n)*got True"),  # noqa: FBT003
        (lambda: TaskEmbedding(3, 4)("a"), "takes numbers of tasks(.|\n)*got 'a'"),
        (lambda: TaskEmbedding(3, 4).freeze(3), "freeze has no such task"),
        (lambda: Noise(4)(-1), "Noise takes how many vectors"),
        (lambda: Noise(4)(2.5), "Noise takes how many vectors"),
        (lambda: Hyperparameters({"a": (0, 1), "b": (0, 1)})(0.5), r"shape \(\)"),
        (
            lambda: SetEncoder(3, 4, classes=5)((torch.randn(6, 3), torch.full((6,), 5))),
            "labels from 5",
        ),
        (
            lambda: SetEncoder(3, 4, classes=5)((torch.randn(6, 3), torch.zeros(6))),
            "labels of torch.fl",
        ),
    ],
)
def test_conditions_refuse_what_is_none(build: Any, match: str) -> None:
    with pytest.raises(HyperError, match=match):
        build()


def test_tasks_by_any_whole_numbers() -> None:
    tasks = TaskEmbedding(3, 4)
    expected = tasks.table[[0, 2]]
    for cond in ([0, 2], (0, 2), torch.tensor([0, 2], dtype=torch.uint8), torch.tensor([-3, -1])):
        assert torch.equal(tasks(cond), expected)
    tasks.freeze(torch.tensor([0, 1]))
    tasks.freeze([1])
    assert tasks.frozen.tolist() == [True, True, False]
    assert Noise(4)(torch.tensor([2, 3])).shape == (2, 3, 4)
    assert Noise(4)(0).shape == (0, 4)


def test_freezing_twice_keeps_the_first_vector() -> None:
    tasks = TaskEmbedding(2, 4)
    tasks.freeze(0)
    kept = tasks(0).clone()
    with torch.no_grad():
        tasks.table.add_(1.0)
    tasks.freeze(0)
    assert torch.equal(tasks(0), kept)


def test_tasks_under_vmap() -> None:
    tasks = TaskEmbedding(3, 4)
    found = torch.func.vmap(tasks)(torch.tensor([2, 0]))
    assert torch.equal(found, tasks(torch.tensor([2, 0])))
