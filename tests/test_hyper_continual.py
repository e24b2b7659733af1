"""Continual learning: the penalty against a loop, the step ahead against a step, Fisher by hand."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from datasets_zoo.architectures import mlp
from wspace.errors import HyperError
from wspace.hyper import ChunkedHead, FullHead, HyperNetwork, RecurrentHead, TaskEmbedding
from wspace.hyper.continual import (
    OutputRegularizer,
    TaskStatistics,
    by_entropy,
    lookahead,
    used_outputs,
)
from wspace.hyper.ewc import EWC, fisher
from wspace.testing import assert_close, assert_same

HEADS: dict[str, Callable[[], Any]] = {
    "full": lambda: FullHead([5]),
    "chunked": lambda: ChunkedHead(17, [12], embedding=3),
    "recurrent": lambda: RecurrentHead(17, 5, embedding=3),
}
each_head = pytest.mark.parametrize("head", HEADS)


def hyper_of(head: str = "chunked", tasks: int = 4) -> HyperNetwork:
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    return HyperNetwork(net, TaskEmbedding(tasks, 2), HEADS[head]())


def moved(hyper: nn.Module, amount: float = 0.1) -> None:
    with torch.no_grad():
        for p in hyper.parameters():
            p.add_(amount * torch.randn_like(p))


def naive(
    now: HyperNetwork, before: HyperNetwork, tasks: list[int], beta: float, **factors: Tensor
) -> Tensor:
    """The sum of squares of equation 2, task by task, weight by weight; embeddings of `before`."""
    total = torch.zeros(())
    for row, t in enumerate(tasks):
        old = before.generate(t)
        new = now.generate_from(before.embed(t).detach())
        for name, x in new.items():
            square = (x - old[name].detach()) ** 2
            if name in factors:
                square = square * factors[name][row]
            total = total + square.sum()
    return beta / len(tasks) * total


# --- output regulariser ---------------------------------------------------------------------------


@pytest.mark.parametrize("targets", ["snapshot", "stored"])
@each_head
def test_penalty_is_the_naive_loop(head: str, targets: str, float64: None) -> None:
    hyper = hyper_of(head)
    keep = OutputRegularizer(hyper, 0.3, targets=targets)
    keep.start(torch.tensor([0, 2, 3]))
    before = copy.deepcopy(hyper)
    with torch.no_grad():  # embeddings are constants: those of earlier tasks do not move
        for name, p in hyper.named_parameters():
            if not name.startswith("condition."):
                p.add_(0.1 * torch.randn_like(p))
    expected = naive(hyper, before, [0, 2, 3], 0.3)
    found = keep.penalty()
    assert found > 0
    assert_close(found, expected)
    params = [p for n, p in hyper.named_parameters() if not n.startswith("condition.")]
    for a, b in zip(
        torch.autograd.grad(found, params), torch.autograd.grad(expected, params), strict=True
    ):
        assert_close(a, b)
    with pytest.raises(AssertionError):  # a mean over weights is another thing
        assert_close(found, expected / hyper.generated)
    with pytest.raises(AssertionError):  # and so is a sum over tasks
        assert_close(found, 3 * expected)


@each_head
def test_old_embeddings_get_no_gradient(head: str) -> None:
    hyper = hyper_of(head)
    keep = OutputRegularizer(hyper, 1.0)
    keep.start(torch.tensor([0, 1]))
    moved(hyper)
    keep.penalty().backward()
    (table,) = hyper.condition.parameters()  # type: ignore[union-attr]
    assert table.grad is None
    trained = OutputRegularizer(hyper, 1.0, constant=())
    trained.start(torch.tensor([0, 1]))
    moved(hyper)
    trained.penalty().backward()
    assert table.grad is not None
    assert table.grad[:2].abs().max() > 0  # the option does something
    assert_same(table.grad[2:], torch.zeros_like(table.grad[2:]))


def test_at_first_there_is_no_penalty() -> None:
    keep = OutputRegularizer(hyper_of(), 1.0)
    assert keep.penalty() == 0
    keep.start(torch.tensor([1]))
    assert keep.penalty().detach() == 0
    keep.start(None)
    moved(keep.hyper)
    assert keep.penalty() == 0


def test_snapshot_needs_constant_memory_and_stored_does_not(float64: None) -> None:
    def memory(targets: str, tasks: int) -> int:
        keep = OutputRegularizer(hyper_of(tasks=9), targets=targets)
        keep.start(torch.arange(tasks))
        return sum(x.numel() for x in (*keep.snapshot.values(), *keep.stored.values()))

    assert memory("snapshot", 2) == memory("snapshot", 8)
    assert memory("stored", 8) == 4 * memory("stored", 2)


@each_head
def test_shift_is_where_the_step_leads(head: str, float64: None) -> None:
    """With ΔΘ the penalty is that of the parameters after the step; no gradient goes through it."""
    hyper = hyper_of(head)
    keep = OutputRegularizer(hyper, 0.7)
    keep.start(torch.arange(3))
    moved(hyper)
    names = [n for n, _ in hyper.named_parameters() if not n.startswith("condition.")]
    shift = {n: 0.1 * torch.randn_like(p) for n, p in hyper.named_parameters()}
    shift = {n: s.requires_grad_() for n, s in shift.items()}
    ahead = copy.deepcopy(hyper)
    other = OutputRegularizer(ahead, 0.7)
    other.load_state_dict(keep.state_dict())
    with torch.no_grad():
        for name, p in ahead.named_parameters():
            if name in names:
                p.add_(shift[name])
    one, two = keep.penalty(shift), other.penalty()
    assert_close(one, two)
    one.backward()
    two.backward()
    there = dict(ahead.named_parameters())
    for name, p in hyper.named_parameters():
        if name in names:
            assert_close(p.grad, there[name].grad)
    assert all(s.grad is None for s in shift.values())


def test_importance_weighs_squares(float64: None) -> None:
    hyper = hyper_of()
    before = copy.deepcopy(hyper)
    tasks = torch.tensor([0, 2])
    each = {"0.weight": torch.rand(2, 5, 6), "2.bias": torch.rand(2, 4)}
    keep = OutputRegularizer(hyper, 1.0)
    keep.start(tasks, each)
    with torch.no_grad():
        hyper.head.last.weight.mul_(1.2)  # type: ignore
    assert_close(keep.penalty(), naive(hyper, before, [0, 2], 1.0, **each))
    with pytest.raises(AssertionError):  # rows of tasks are not mixed up
        other = {name: x.flip(0) for name, x in each.items()}
        assert_close(keep.penalty(), naive(hyper, before, [0, 2], 1.0, **other))


def test_masks_leave_out_unused_outputs(float64: None) -> None:
    """Weights to outputs that a task does not use may change for free."""
    hyper = hyper_of()
    mask = used_outputs({"2.weight": (4, 5), "2.bias": (4,)}, [(0, 1), (2, 3)])
    assert mask["2.weight"].shape == (2, 4, 1)
    keep = OutputRegularizer(hyper, 1.0)
    keep.start(torch.tensor([0, 1]), mask)
    before = hyper.generate(torch.tensor([0, 1]))
    moved(hyper)
    (table,) = hyper.condition.parameters()  # type: ignore[union-attr]
    now = hyper.generate(torch.tensor([0, 1]))
    del table
    ones = {n: mask.get(n, torch.ones(())) for n in now}
    expected = sum((ones[n] * (now[n] - before[n]) ** 2).sum() for n in now) / 2
    assert_close(keep.penalty(), expected.detach())  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "importance",
    [
        {"0.weights": torch.ones(2, 5, 6)},
        {"0.weight": torch.ones(2, 6, 5)},
        {"0.bias": -torch.ones(2, 5)},
        {"0.bias": torch.ones(3, 5)},
    ],
)
def test_importance_that_does_not_fit(importance: dict[str, Tensor]) -> None:
    keep = OutputRegularizer(hyper_of(), 1.0)
    with pytest.raises(HyperError, match="importances do not fit"):
        keep.start(torch.tensor([0, 1]), importance)


def test_subset_is_unbiased(float64: None) -> None:
    """The mean over all subsets of two of three tasks is the penalty itself."""
    hyper = hyper_of()
    keep, every = OutputRegularizer(hyper, 1.0, subset=2), OutputRegularizer(hyper, 1.0)
    keep.start(torch.arange(3))
    every.load_state_dict(keep.state_dict())
    moved(hyper)
    g = torch.Generator().manual_seed(0)
    drawn = {round(float(keep.penalty(generator=g).detach()), 13) for _ in range(40)}
    assert len(drawn) == 3
    assert_close(torch.tensor(sum(drawn) / 3), every.penalty().detach())


def test_states_may_be_what_stays(float64: None) -> None:
    """Hidden states of a recurrent head instead of weights: the output map is then free."""
    hyper = hyper_of("recurrent")
    read: Any = lambda h, c: {"states": h.head.states(h.embed(c))}  # noqa: E731
    keep = OutputRegularizer(hyper, 1.0, read=read)
    keep.start(torch.arange(2))
    before = hyper.head.states(hyper.embed(torch.arange(2))).detach()  # type: ignore
    with torch.no_grad():
        hyper.head.shift.add_(1.0)  # type: ignore
    assert keep.penalty().detach() == 0
    moved(hyper.head)
    after = hyper.head.states(hyper.embed(torch.arange(2)))  # type: ignore
    assert_close(keep.penalty(), (after - before).square().sum() / 2)


@pytest.mark.parametrize("options", [{"weight": -1.0}, {"targets": "copy"}, {"subset": 0}])
def test_options_of_the_regulariser(options: dict[str, Any]) -> None:
    with pytest.raises(HyperError, match="options"):
        OutputRegularizer(hyper_of(), **options)


# --- the step ahead -------------------------------------------------------------------------------

OPTIMISERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, dampening=0.2, weight_decay=0.03),
    "nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 0.1),
    "adam, decay": lambda p: torch.optim.Adam(p, 0.1, (0.8, 0.95), weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, 0.1, (0.5, 0.5), amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1),
}


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_step_ahead_is_the_step(name: str, steps: int, float64: None) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = OPTIMISERS[name](net.parameters())

    def gradients() -> None:
        optimizer.zero_grad()
        (net(torch.randn(5, 3)) ** 2).sum().backward()

    for _ in range(steps):
        gradients()
        optimizer.step()
    gradients()
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    state = copy.deepcopy(optimizer.state_dict()["state"])
    found = lookahead(optimizer, net.named_parameters())
    for n, p in net.named_parameters():
        assert_same(before[n], p)  # nothing is moved by looking
    assert_same(state, optimizer.state_dict()["state"])
    optimizer.step()
    for n, p in net.named_parameters():
        assert_close(before[n] + found[n], p)


def test_step_ahead_leaves_out_what_has_no_gradient() -> None:
    net = nn.Linear(2, 3)
    optimizer = torch.optim.Adam(net.parameters())
    net.weight.grad = torch.ones_like(net.weight)
    assert list(lookahead(optimizer, net.named_parameters())) == ["weight"]


def test_step_ahead_of_others() -> None:
    net = nn.Linear(2, 3)
    for wrong in (
        torch.optim.RMSprop(net.parameters()),
        torch.optim.SGD(net.parameters(), 0.1, maximize=True),
    ):
        with pytest.raises(HyperError, match="SGD, Adam or AdamW"):
            lookahead(wrong, net.named_parameters())


# --- elastic weight consolidation -----------------------------------------------------------------


def running(net: nn.Module) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    return lambda params, x: functional_call(net, params, (x,))


@pytest.mark.parametrize("method", ["vmap", "loop"])
@pytest.mark.parametrize("labelled", [True, False])
def test_fisher_is_the_loop(labelled: bool, method: str, float64: None) -> None:
    """Per-sample gradients, squared, one after another."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5))
    x, y = torch.randn(7, 3), torch.randint(5, (7,))
    expected = {n: torch.zeros_like(p) for n, p in net.named_parameters()}
    for i in range(7):
        logp = net(x[i : i + 1]).log_softmax(-1)[0]
        for c in [int(y[i])] if labelled else range(5):
            share = 1.0 if labelled else float(logp[c].detach().exp())
            grads = torch.autograd.grad(logp[c], list(net.parameters()), retain_graph=True)
            for (n, _), g in zip(net.named_parameters(), grads, strict=True):
                expected[n] += share * g**2 / 7
    params = dict(net.named_parameters())
    found = fisher(running(net), params, x, y if labelled else None, chunk=3, method=method)
    for n, f in found.items():
        assert_close(f, expected[n])
    net.zero_grad()
    F.cross_entropy(net(x), y).backward()
    with pytest.raises(AssertionError):  # the square of the mean gradient is another thing
        assert_close(found["0.weight"], net[0].weight.grad.square())  # type: ignore[union-attr]


@each_head
def test_fisher_of_a_generator(head: str, float64: None) -> None:
    """By vmap as by the loop: also where the generator is recurrent."""
    hyper = hyper_of(head)
    parts = nn.ModuleDict({"h": hyper})

    def logits(params: dict[str, Tensor], x: Tensor) -> Tensor:
        named = {f"h.{n}": p for n, p in params.items()}
        runs = _Runs(parts["h"])
        return functional_call(runs, named, (1, x))

    x, params = torch.randn(5, 6), dict(hyper.named_parameters())
    one, two = (fisher(logits, params, x, method=m) for m in ("vmap", "loop"))
    for n in params:
        assert_close(one[n], two[n])
    table = one["condition.table"]
    assert table[1].min() > 0
    assert_same(table[[0, 2, 3]], torch.zeros(3, 2))  # other tasks' embeddings are not needed


class _Runs(nn.Module):
    def __init__(self, h: nn.Module) -> None:
        super().__init__()
        self.h = h

    def forward(self, task: int, x: Tensor) -> Any:
        return self.h.run(task, x)  # type: ignore[operator]


def test_fisher_without_examples() -> None:
    net = nn.Linear(2, 3)
    with pytest.raises(HyperError, match="0 examples"):
        fisher(running(net), dict(net.named_parameters()), torch.zeros(0, 2))


def test_elastic_penalty_by_hand(float64: None) -> None:
    """λ / 2 Σ_t Σ F_t (θ - θ_t)²; online one anchor, and F decays."""
    at = [{"a": torch.randn(3), "b": torch.randn(2, 2)} for _ in range(3)]
    need = [{n: torch.rand_like(x) for n, x in p.items()} for p in at]
    now = {n: torch.randn_like(x).requires_grad_() for n, x in at[0].items()}
    offline, online = EWC(3.0), EWC(3.0, online=True, decay=0.5)
    for p, f in zip(at, need, strict=True):
        offline.consolidate(p, f)
        online.consolidate(p, f)
    expected = sum(
        1.5 * (f[n] * (now[n] - p[n]) ** 2).sum() for p, f in zip(at, need, strict=True) for n in p
    )
    assert_close(offline.penalty(now), expected)
    total = {n: need[2][n] + 0.5 * need[1][n] + 0.25 * need[0][n] for n in now}
    expected = sum(1.5 * (total[n] * (now[n] - at[2][n]) ** 2).sum() for n in now)
    assert_close(online.penalty(now), expected)
    (grad,) = torch.autograd.grad(online.penalty(now), now["a"])
    assert_close(grad, 3 * total["a"] * (now["a"] - at[2]["a"]).detach())
    assert (len(offline.anchors), len(online.anchors)) == (3, 1)
    with pytest.raises(AssertionError):
        assert_close(offline.penalty(now), online.penalty(now))


def test_elastic_penalty_of_other_parameters() -> None:
    ewc = EWC(1.0)
    assert ewc.penalty({"a": torch.ones(2)}) == 0
    with pytest.raises(HyperError, match="information differ"):
        ewc.consolidate({"a": torch.ones(2)}, {"a": torch.ones(3)})
    ewc.consolidate({"a": torch.ones(2)}, {"a": torch.ones(2)})
    with pytest.raises(HyperError, match="b: "):
        ewc.penalty({"a": torch.ones(2), "b": torch.ones(1)})
    with pytest.raises(HyperError, match="decay"):
        EWC(1.0, decay=1.5)


# --- statistics, entropy, growth, counts ----------------------------------------------------------


def test_statistics_of_each_task(float64: None) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    hyper = HyperNetwork(net, TaskEmbedding(2, 3), FullHead([4]))
    statistics = TaskStatistics(hyper)
    answers: list[Tensor] = []
    x = torch.randn(6, 3)
    for task in range(2):
        statistics.reset()
        hyper.train()
        for _ in range(3):
            hyper.run(task, torch.randn(9, 3) * (task + 1))
        statistics.keep(task)
        hyper.eval()
        answers.append(hyper.run(0, x))
    with statistics.of(0):
        assert_same(hyper.run(0, x), answers[0])
    assert_same(hyper.run(0, x), answers[1])  # put back
    assert not torch.equal(answers[0], answers[1])


def test_entropy_finds_the_surest(generator: torch.Generator) -> None:
    logits = torch.randn(3, 50, 6, generator=generator)
    classes = [range(0, 2), range(2, 4), range(4, 6)]
    task, label = by_entropy(logits, classes)
    for i in range(50):
        entropies = [
            float(torch.distributions.Categorical(logits=logits[t, i, list(c)]).entropy())
            for t, c in enumerate(classes)
        ]
        t = min(range(3), key=entropies.__getitem__)
        assert int(task[i]) == t
        assert int(label[i]) == 2 * t + int(logits[t, i, 2 * t : 2 * t + 2].argmax())


def test_growth_keeps_the_function_and_the_penalty(float64: None) -> None:
    """Units that are appended change nothing at first, to the bit, and then learn alone."""
    hyper = hyper_of("recurrent")
    before = hyper.generate(torch.arange(4))
    new = hyper.head.grow(3, freeze=True)  # type: ignore
    assert_same(hyper.generate(torch.arange(4)), before)
    keep = OutputRegularizer(hyper, 1.0)
    keep.start(torch.arange(2))
    trained = [p for p in hyper.head.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in new}
    moved(nn.ParameterList(new))
    assert keep.penalty().detach() > 0


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (ChunkedHead(8000, [10, 10], embedding=32), 89_304),
        (ChunkedHead(8000, [10, 10, 10, 10], embedding=32), 89_524),
        (RecurrentHead(8000, 9, embedding=32), 83_208),
    ],
)
def test_hypernetworks_smaller_than_their_target(head: Any, expected: int) -> None:
    """Five tasks of split MNIST from fewer parameters than one network has."""
    net = mlp(784, [100, 100])
    hyper = HyperNetwork(net, TaskEmbedding(5, 32), head)
    assert count(net) == hyper.generated == 89_610
    assert count(hyper) == expected < 89_610
