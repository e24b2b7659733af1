"""A run that drifts ahead: against formulas written again, and all that must not change."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.test_nowcaster import (
    OPTIMIZERS,
    assert_equal,
    differs,
    each_optimizer,
    net,
    snapshot,
    train,
)
from wspace.errors import NowcastError
from wspace.nowcast import Drift, LinearFit, Nowcaster

SOON = Drift(begin=20, every=2, short=0.2, long=0.5)


def drifting(
    model: nn.Module, *, drift: Drift = SOON, lr: float = 0.05, **options: Any
) -> Nowcaster:
    base = torch.optim.SGD(model.parameters(), lr=lr)
    return Nowcaster(base, model, predictor=drift, **{"period": 4, **options})


# --- what a jump is -----------------------------------------------------------


def again(
    first: Tensor, step: Callable[[Tensor, int], Tensor], steps: int, how: Drift, period: int
) -> tuple[Tensor, Tensor]:
    """A run and its short average, by the definitions, for one vector in float64."""
    x = first.clone()
    kept: list[list[Any]] = []  # average and its time; the short one first
    for t in range(1, steps + 1):
        x = step(x, t)
        if t % how.every:
            continue
        if kept:
            age = t - how.every
            for pair, share, least in zip(kept, (how.short, how.long), (1, 3), strict=True):
                w = min(1.0, how.every / max(least * how.every, share * age))
                pair[0] = (1 - w) * pair[0] + w * x
                pair[1] = (1 - w) * pair[1] + w * age
        else:
            kept = [[x.clone(), 0.0], [x.clone(), 0.0]]
        (a, s), (b, r) = kept
        if t % period == 0 and t >= how.begin and s > r:
            move = (a - b) / (s - r) * min(how.speed * period, how.reach * (s - r))
            x, kept[0][0], kept[1][0] = x + move, a + move, b + move
    return x, kept[0][0]


@pytest.mark.parametrize("seed", range(6))
def test_runs_are_those_of_the_definition(seed: int) -> None:
    """On random quadratics with noise, with random options."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda low, high: float(torch.empty(()).uniform_(low, high, generator=g))  # noqa: E731
    every = 1 + seed % 4
    how = Drift(
        speed=draw(0.5, 3), reach=draw(0.1, 0.9), short=draw(0.02, 0.2), long=draw(0.21, 0.6),
        begin=10 + 3 * seed, every=every,
    )  # fmt: skip
    period, size = every * (1 + seed % 3), 7
    scale = torch.rand(size, generator=g, dtype=torch.float64)
    start = torch.randn(size, generator=g, dtype=torch.float64)
    noise = torch.randn(90, size, generator=g, dtype=torch.float64)
    module = nn.Module()
    module.w = nn.Parameter(start.clone())
    base = torch.optim.SGD(module.parameters(), lr=0.05)
    optimizer = Nowcaster(base, module, predictor=how, period=period, on_error="raise")
    for t in range(90):
        module.w.grad = scale * module.w.detach() + noise[t]
        optimizer.step()

    def step(x: Tensor, t: int) -> Tensor:
        return x - 0.05 * (scale * x + noise[t - 1])

    x, average = again(start, step, 90, how, period)
    torch.testing.assert_close(module.w.detach(), x, rtol=1e-12, atol=1e-12)
    with optimizer.averaged():
        torch.testing.assert_close(module.w.detach(), average, rtol=1e-12, atol=1e-12)
    half = replace(how, speed=how.speed / 2, reach=how.reach / 2)
    other, _ = again(start, step, 90, half, period)
    assert float((x - other).abs().max()) > 1e-3  # the comparison sees the jumps


@pytest.mark.parametrize(("reach", "begin"), [(50.0, 40), (0.5, 20)])
def test_a_line_is_followed_exactly(reach: float, begin: int) -> None:
    """`speed` steps for every step, whatever the windows; or as far as they reach."""
    module = nn.Linear(2, 3, bias=False).double()
    start, velocity = module.weight.detach().clone(), torch.randn(3, 2, dtype=torch.float64)
    optimizer = drifting(
        module, lr=1.0, drift=Drift(speed=1.5, reach=reach, begin=begin, every=1), on_error="raise"
    )
    for _ in range(100):
        module.weight.grad = -velocity
        optimizer.step()
    steps = 100 + sum(4 * jump.horizon for jump in optimizer.jumps)
    torch.testing.assert_close(module.weight.detach(), start + steps * velocity, rtol=1e-12, atol=0)
    if reach == 50.0:
        assert [j.horizon for j in optimizer.jumps] == [1.5] * 16
    else:
        assert optimizer.jumps[0].horizon < optimizer.jumps[-1].horizon < 1.5


# --- what it does not change ---------------------------------------------------


@each_optimizer
def test_without_speed_training_is_the_plain_optimizers(kind: str) -> None:
    plain, followed = net(), net()
    other = OPTIMIZERS[kind](plain.parameters())
    base = OPTIMIZERS[kind](followed.parameters())
    drift = Drift(speed=0.0, begin=0, every=2, short=0.5, long=0.9)
    optimizer = Nowcaster(base, followed, predictor=drift, period=2)
    for steps in (range(10), range(10, 23)):
        torch.manual_seed(1)
        train(plain, other, steps)
        torch.manual_seed(1)
        train(followed, optimizer, steps)
        with optimizer.averaged():
            assert differs(snapshot(plain), snapshot(followed))
        assert_equal(snapshot(plain), snapshot(followed))


def test_what_stands_still_stays_bit_for_bit() -> None:
    model = net(dropout=0.0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = drifting(model, lr=0.0)
    train(model, optimizer, range(60))
    assert_equal(before, {n: p.detach() for n, p in model.named_parameters()})
    assert all(j.reason == "accepted" for j in optimizer.jumps)


class Odd(nn.Module):
    """Frozen, tied, 0-d, bf16, empty, and one that gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(3, 3)
        self.tied = nn.Linear(3, 3, bias=False)
        self.tied.weight = self.a.weight
        self.scale = nn.Parameter(torch.tensor(1.3))
        self.low = nn.Parameter(torch.randn(3).bfloat16())
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.unused = nn.Parameter(torch.randn(4))
        self.empty = nn.Parameter(torch.randn(0, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.tied(self.a(x)) + self.low.float() + self.frozen


@pytest.mark.parametrize(
    ("drift", "reason"),
    [
        (Drift(speed=0.0, begin=0, every=1), "the jump is 0 steps long"),
        (Drift(begin=0, every=4), "the averages are of one time"),
    ],
)
def test_the_log_says_why_nothing_moved(drift: Drift, reason: str) -> None:
    model = net(dropout=0.0)
    optimizer = drifting(model, drift=drift)
    train(model, optimizer, range(4))
    assert [(j.horizon, j.tried, j.reason) for j in optimizer.jumps] == [(0, (), reason)]


def test_odd_parameters() -> None:
    model = Odd()
    frozen, unused = model.frozen.clone(), model.unused.detach().clone()
    places = {n: p.data_ptr() for n, p in model.named_parameters()}
    optimizer = drifting(model, lr=0.02, on_error="raise")
    plain = copy.deepcopy(model)
    other = torch.optim.SGD(plain.parameters(), lr=0.02)
    g = torch.Generator().manual_seed(0)
    for _ in range(40):
        x = torch.randn(8, 3, generator=g)
        for m, o in ((model, optimizer), (plain, other)):
            o.zero_grad()
            m(x).square().mean().backward()
            o.step()
    assert torch.equal(model.frozen, frozen)
    assert torch.equal(model.unused, unused)
    assert model.tied.weight is model.a.weight
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == places
    moved = differs(dict(model.named_parameters()), dict(plain.named_parameters()))
    assert set(moved) == {"a.weight", "a.bias", "scale", "low"}
    assert model.low.dtype == torch.bfloat16
    assert optimizer.core.averages._short["low"].dtype == torch.float32
    assert "frozen" not in optimizer.core.averages
    assert set(optimizer.core.averages._clocks) == {
        "a.weight", "a.bias", "scale", "low", "unused", "empty",
    }  # fmt: skip


def test_parameters_that_come_go_or_are_replaced_begin_anew() -> None:
    model = net(dropout=0.0)
    optimizer = drifting(model, on_error="raise")
    train(model, optimizer, range(24))
    core = optimizer.core
    assert core.averages._clocks["0.weight"].age == 22
    model[0].weight.requires_grad_(False)
    held = model[0].weight.detach().clone()
    train(model, optimizer, range(24, 30))
    assert "0.weight" not in core.averages
    assert torch.equal(model[0].weight, held)
    model[0].weight.requires_grad_(True)
    model[4] = nn.Linear(7, 2)
    optimizer.add_param_group({"params": list(model[4].parameters())})
    train(model, optimizer, range(30, 36))
    assert core.averages._clocks["0.weight"].age == 4
    assert core.averages._clocks["4.weight"].age == 4
    assert core.averages._clocks["0.bias"].age == 34
    assert core.averages._owners["4.weight"][0] is model[4].weight


# --- what goes wrong ----------------------------------------------------------


def test_what_is_not_finite_moves_nothing() -> None:
    model = net(dropout=0.0)
    optimizer = drifting(model)
    train(model, optimizer, range(23))
    before = snapshot(model)
    core = optimizer.core
    core.averages._short["4.bias"][0] = math.inf
    with pytest.warns(RuntimeWarning, match="averages or what they predict are not finite"):
        core._jump()
    assert_equal(before, snapshot(model))
    assert "4.bias" not in core.averages
    assert "4.weight" in core.averages
    train(model, optimizer, range(23, 60))  # and later ones are made again
    assert optimizer.jumps[-1].reason == "accepted"
    assert "4.bias" in core.averages
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_a_crash_while_writing_leaves_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net(dropout=0.0)
    optimizer = drifting(model, on_error="raise")
    train(model, optimizer, range(23))
    before = snapshot(model)
    kept = copy.deepcopy(optimizer.core.averages.state_dict()["tensors"])
    import wspace.nowcast.kept as module

    whole = module.copy_all
    calls = [0]

    def breaks(into: list[Tensor], values: list[Tensor]) -> None:
        calls[0] += 1
        if calls[0] == 1:
            whole(into[:2], values[:2])
            raise RuntimeError("half of it")
        whole(into, values)

    monkeypatch.setattr(module, "copy_all", breaks)
    with pytest.raises(RuntimeError, match="half of it"):
        optimizer.core._jump()
    assert calls[0] == 2
    assert_equal(before, snapshot(model))
    for name, pair in optimizer.core.averages.state_dict()["tensors"].items():
        assert all(torch.equal(x, y) for x, y in zip(pair, kept[name], strict=True))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"speed": -1.0}, "speed and reach"),
        ({"reach": math.inf}, "speed and reach"),
        ({"speed": math.nan}, "speed and reach"),
        ({"short": 0.2}, "short < long"),
        ({"long": 1.5}, "short < long"),
        ({"every": 0}, "every and judged"),
        ({"begin": -1}, "begin of at least 0"),
        ({"judged": 0}, "every and judged"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(NowcastError, match=match):
        Drift(**options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"period": 7}, "multiple of Drift.every"),
        ({"horizon": 3}, "no horizon"),
        ({"context": 5}, "no context"),
        ({"moments": "reset"}, "no moments"),
        ({"history_dtype": torch.bfloat16}, "no history_dtype"),
        ({"topology": "published"}, "no topology"),
        ({"on_error": "retry"}, "on_error"),
        ({"refresh": iter([1])}, "read again"),
    ],
)
def test_settings_without_meaning_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(NowcastError, match=match):
        drifting(net(), drift=Drift(), **{"period": 10, **options})


def test_periods_are_said_by_what_jumps() -> None:
    def interval(predictor: Any) -> int:
        model = net()
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        return Nowcaster(base, model, predictor=predictor, total_steps=10).core.settings.interval

    assert interval(Drift()) == 10
    assert interval(LinearFit()) == 1000


# --- what it is for -----------------------------------------------------------


def test_noisy_ill_conditioned_runs_arrive_sooner() -> None:
    """Curvatures over three orders of magnitude: mean loss of six runs of 400 noisy steps."""

    def run(drift: Drift, seed: int) -> float:
        g = torch.Generator().manual_seed(seed)
        scale = torch.logspace(-3, 0, 40, dtype=torch.float64)
        module = nn.Module()
        module.w = nn.Parameter(torch.randn(40, generator=g, dtype=torch.float64) * 5)
        base = torch.optim.SGD(module.parameters(), lr=0.3)
        optimizer = Nowcaster(base, module, predictor=drift)
        for _ in range(400):
            noise = torch.randn(40, generator=g, dtype=torch.float64) * scale.sqrt()
            module.w.grad = scale * module.w.detach() + 0.3 * noise
            optimizer.step()
        with optimizer.averaged():
            return float((scale * module.w.detach().square()).sum()) / 2

    plain = [run(Drift(speed=0.0), s) for s in range(6)]
    ahead = [run(Drift(begin=50), s) for s in range(6)]
    ratios = [b / a for a, b in zip(plain, ahead, strict=True)]
    assert max(ratios) < 0.75, ratios
