"""A run that drifts ahead: against formulas written again, and all that must not change."""

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.test_nowcaster import (
    OPTIMIZERS,
    assert_equal,
    data,
    differs,
    each_optimizer,
    loss_of,
    net,
    snapshot,
    train,
)
from wspace.errors import NowcastError
from wspace.nowcast import Drift, Guard, LinearFit, Nowcaster
from wspace.nowcast.follow import LOGGED

SOON = Drift(begin=20, every=2, short=0.2, long=0.5)


def drifting(
    model: nn.Module, *, drift: Drift = SOON, lr: float = 0.05, **options: Any
) -> Nowcaster:
    base = torch.optim.SGD(model.parameters(), lr=lr)
    return Nowcaster(base, model, predictor=drift, **{"period": 4, **options})


def through(state: Any, path: Any) -> Any:
    torch.save(state, path)
    return torch.load(path, weights_only=True)


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


# --- averages -----------------------------------------------------------------


def test_averages_are_shown_for_a_while_and_everything_is_put_back() -> None:
    model = net()
    batches = [data(900)[0], data(901)[0]]
    optimizer = drifting(model, refresh=batches)
    train(model, optimizer, range(30))
    before = snapshot(model)
    places = {n: p.data_ptr() for n, p in model.named_parameters()}
    with optimizer.averaged():
        for name, p in model.named_parameters():
            assert torch.equal(p, optimizer.core.averages._short[name])
        twin = net()
        twin.load_state_dict(model.state_dict())
        twin[1].momentum = None
        twin[1].reset_running_stats()
        for x in batches:
            twin(x)
        torch.testing.assert_close(model[1].running_mean, twin[1].running_mean)
        torch.testing.assert_close(model[1].running_var, twin[1].running_var)
        with pytest.raises(NowcastError, match="holds its averages now"):
            optimizer.step()
        with pytest.raises(NowcastError, match="holds its averages now"), optimizer.averaged():
            pass
        with pytest.raises(NowcastError, match="holds its averages now"):
            optimizer.finish()
        model.eval()
    assert not model.training  # modes are the user's
    model.train()
    assert_equal(before, snapshot(model))
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == places
    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), optimizer.averaged():
        _ = 1 / 0
    assert_equal(before, snapshot(model))
    assert torch.equal(state, torch.get_rng_state())
    train(model, optimizer, range(30, 34))  # the run goes on


def test_a_cast_within_does_not_keep_the_averages() -> None:
    model = net(dropout=0.0)
    optimizer = drifting(model)
    train(model, optimizer, range(30))
    before = snapshot(model)
    with optimizer.averaged():
        shown = snapshot(model)
        model.double().float()
    assert_equal(before, snapshot(model))
    assert differs(before, shown)
    with optimizer.averaged(), pytest.raises(NowcastError, match="holds its averages now"):
        copy.deepcopy(optimizer)


@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_a_state_of_another_precision_is_taken(wide: torch.dtype) -> None:
    other = torch.float32 if wide == torch.float64 else torch.float64
    model = net(dropout=0.0).to(other)
    optimizer = drifting(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for _ in range(24):
        optimizer.step()
    again_model = net(dropout=0.0).to(wide)
    again_ = drifting(again_model, on_error="raise")
    again_.core.load_state_dict(optimizer.core.state_dict())
    averages = again_.core.averages
    assert {x.dtype for x in averages._short.values()} == {wide}
    torch.testing.assert_close(
        averages._long["4.bias"], optimizer.core.averages._long["4.bias"].to(wide)
    )
    for p in again_model.parameters():
        p.grad = torch.ones_like(p)
    for _ in range(8):
        again_.step()
    assert again_.jumps[-1].horizon > 0


def test_a_cast_of_the_model_begins_anew() -> None:
    model = net(dropout=0.0)
    optimizer = drifting(model, on_error="raise")
    train(model, optimizer, range(24))
    model.double()
    for step in range(24, 36):
        x, y = (t.double() for t in data(step))
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    averages = optimizer.core.averages
    assert {clock.age for clock in averages._clocks.values()} == {10}
    assert {x.dtype for x in averages._long.values()} == {torch.float64}
    model[4].weight.data = torch.zeros(2, 7, dtype=torch.float64)
    model[4].bias.data = torch.zeros(1, dtype=torch.float64)
    averages.update(dict(model.named_parameters()))
    assert averages._clocks["4.weight"].age == 12
    assert averages._clocks["4.bias"].age == 0


def test_infinite_losses_and_restarts() -> None:
    model = net(dropout=0.0)
    guard = Guard(lambda: math.inf, shrink=0.5)
    optimizer = drifting(model, drift=replace(SOON, begin=4, judged=1), guard=guard)
    train(model, optimizer, range(8))
    assert optimizer.core.share == 0.25
    with pytest.warns(UserWarning, match="plain optimizer"):
        optimizer.load_state_dict(optimizer.base.state_dict())
    core = optimizer.core
    assert (core.share, core.step, core.made, core.log) == (1.0, 0, 0, [])
    assert not core.averages._clocks
    assert core._last == math.inf


def test_averages_that_fail_begin_anew_and_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net(dropout=0.0)
    optimizer = drifting(model)
    train(model, optimizer, range(24))
    averages = optimizer.core.averages
    with monkeypatch.context() as patch:

        def fails(tensors: Any) -> None:
            raise MemoryError("no room")

        patch.setattr(averages, "update", fails)
        train(model, optimizer, range(24, 26))
    assert not averages._clocks
    with pytest.warns(RuntimeWarning, match="no room"):
        train(model, optimizer, range(26, 28))
    assert optimizer.jumps[-1].reason == "MemoryError: no room"
    train(model, optimizer, range(28, 40))
    assert optimizer.jumps[-1].reason == "accepted"


def test_the_end_is_at_the_averages() -> None:
    model = net(dropout=0.0)
    optimizer = drifting(model, refresh=lambda: [data(900)[0]])
    train(model, optimizer, range(30))
    with optimizer.averaged():
        shown = snapshot(model)
    assert differs(shown, snapshot(model))
    optimizer.finish()
    assert_equal(shown, snapshot(model))
    assert not optimizer.core.averages._clocks
    train(model, optimizer, range(30, 40))
    assert optimizer.core.averages._clocks["0.weight"].age == 8


def test_predictors_keep_no_averages() -> None:
    model = net()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = Nowcaster(base, model, predictor=LinearFit(), total_steps=10)
    with pytest.raises(NowcastError, match="no running averages"), optimizer.averaged():
        pass
    with pytest.raises(NowcastError, match="no running averages"):
        optimizer.finish()


# --- the guard ----------------------------------------------------------------


def test_the_guard_shortens_jumps_while_the_average_gets_worse() -> None:
    given = iter([5.0, 4.0, 4.5, 4.4, 4.6, math.nan, 4.6, 1.0, 1.0])
    seen: list[dict[str, Tensor]] = []
    model = net()

    def loss() -> float:
        assert not model.training
        seen.append(snapshot(model))
        return next(given)

    drift = Drift(begin=4, every=2, judged=2)
    optimizer = drifting(model, drift=drift, guard=Guard(loss, shrink=0.25, tolerance=0.05))
    plain = net()
    other = drifting(plain, drift=drift)
    shares: list[float] = []
    for step in range(72):
        torch.manual_seed(step)
        train(model, optimizer, range(step, step + 1))
        if (step + 1) % 8 == 0:
            shares.append(optimizer.core.share)
        if step < 24:  # until the first jump that is shorter, nothing differs
            torch.manual_seed(step)
            train(plain, other, range(step, step + 1))
            assert_equal(snapshot(model), snapshot(plain))
    # falls, falls, rises, falls, rises, nan, as the last finite one, falls, the same
    assert shares == pytest.approx([1, 1, 0.25, 0.5, 0.125, 1 / 32, 1 / 16, 1 / 8, 1 / 4])
    judged = [(j.before, j.after) for j in optimizer.jumps if j.after is not None]
    assert judged[:3] == [(None, 5.0), (5.0, 4.0), (4.0, 4.5)]
    assert len(seen) == 9
    assert_equal(
        {n: seen[-1][n] for n, _ in model.named_parameters()}, optimizer.core.averages._short
    )


def test_a_loss_that_fails_only_leaves_the_judgement_out() -> None:
    model = net(dropout=0.0)

    def fails() -> float:
        raise ValueError("no data")

    optimizer = drifting(model, drift=Drift(begin=4, every=2, judged=1), guard=Guard(fails))
    with pytest.warns(RuntimeWarning, match="no data"):
        train(model, optimizer, range(8))
    other = net(dropout=0.0)
    train(other, drifting(other, drift=Drift(begin=4, every=2)), range(8))
    assert_equal(snapshot(model), snapshot(other))


# --- resumption ---------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 2, 19, 20, 21, 22, 33])
@pytest.mark.parametrize("guarded", [False, True])
def test_a_resumed_run_is_the_unbroken_one(tmp_path: Any, stop: int, guarded: bool) -> None:
    def made() -> tuple[nn.Module, Nowcaster]:
        model = net(dropout=0.0)
        guard = Guard(lambda: loss_of(model, 99), shrink=0.3) if guarded else None
        return model, drifting(model, drift=replace(SOON, begin=8, judged=2), guard=guard)

    whole, optimizer = made()
    train(whole, optimizer, range(50))
    first, before = made()
    train(first, before, range(stop))
    saved = through({"m": first.state_dict(), "o": before.state_dict()}, tmp_path / "x.pt")
    second, after = made()
    second.load_state_dict(saved["m"])
    after.load_state_dict(saved["o"])
    train(second, after, range(stop, 50))
    assert_equal(snapshot(whole), snapshot(second))
    brief = [[(j.step, j.horizon, j.before, j.after) for j in o.jumps] for o in (optimizer, after)]
    assert brief[0] == brief[1]
    assert optimizer.core.share == after.core.share
    third, fresh = made()  # and the averages matter
    third.load_state_dict(saved["m"])
    fresh.load_state_dict(
        {k: v for k, v in saved["o"].items() if k != "nowcast"}
    ) if False else None
    fresh.core.step = stop
    train(third, fresh, range(stop, 50))
    if stop > 8:
        assert differs(snapshot(whole), snapshot(third))


def test_a_loaded_state_is_a_copy() -> None:
    model = net(dropout=0.0)
    optimizer = drifting(model)
    train(model, optimizer, range(24))
    other = net(dropout=0.0)
    again = drifting(other)
    again.load_state_dict(optimizer.state_dict())
    kept = {n: x.clone() for n, x in again.core.averages._short.items()}
    train(model, optimizer, range(24, 40))
    assert_equal(kept, again.core.averages._short)
    assert differs(kept, optimizer.core.averages._short)


def test_states_of_the_other_kind_begin_afresh() -> None:
    model = net(dropout=0.0)
    base = torch.optim.SGD(model.parameters(), lr=0.05)
    windows = Nowcaster(base, model, predictor=LinearFit(), period=10, horizon=1)
    train(model, windows, range(14))
    drift = drifting(model)
    drift.load_state_dict(windows.state_dict())
    assert drift.steps == 14
    assert [j.step for j in drift.jumps] == [10]
    assert not drift.core.averages._clocks
    train(model, drift, range(14, 30))
    back = Nowcaster(base, model, predictor=LinearFit(), period=10, horizon=1)
    back.load_state_dict(drift.state_dict())
    assert back.steps == 30
    assert back.core.history.filled == 0


def test_states_that_do_not_fit_change_nothing() -> None:
    model = net(dropout=0.0)
    optimizer = drifting(model)
    train(model, optimizer, range(24))
    state = optimizer.state_dict()
    kept = copy.deepcopy(optimizer.core.state_dict())
    for change in (
        lambda h: h["tensors"].update({"0.weight": [torch.zeros(2, 2)] * 2}),
        lambda h: h["tensors"].update({"other": [torch.zeros(2)] * 2}),
        lambda h: h["tensors"]["0.weight"].pop(),
        lambda h: h["clocks"].pop("0.weight"),
        lambda h: h.pop("clocks"),
        lambda h: h.pop("tensors"),
    ):
        bad = copy.deepcopy(state)
        change(bad["nowcast"]["history"])
        with pytest.raises(NowcastError, match="do not fit"):
            optimizer.load_state_dict(bad)
        now = optimizer.core.state_dict()
        assert now["step"] == kept["step"] == 24
        assert all(
            torch.equal(x, y)
            for n, pair in kept["history"]["tensors"].items()
            for x, y in zip(pair, now["history"]["tensors"][n], strict=True)
        )


def test_the_log_is_bounded_and_none_is_told_twice() -> None:
    module = nn.Linear(1, 1)
    optimizer = drifting(module, drift=Drift(begin=0, every=1), period=1, lr=0.0)
    told: list[int] = []
    count = 0
    for step in range(LOGGED + 50):
        for p in module.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        if step % 7 == 0:
            told += [j.step for j in optimizer.core.news(count)]
            count = optimizer.core.made
    assert len(optimizer.jumps) == LOGGED
    assert optimizer.core.made == LOGGED + 50
    assert optimizer.jumps[-1].step == LOGGED + 50
    assert told == list(range(1, told[-1] + 1))
    assert optimizer.core.news(optimizer.core.made) == []


def test_copies_go_their_own_way() -> None:
    model = net(dropout=0.0)
    optimizer = drifting(model)
    train(model, optimizer, range(25))
    twin, other = copy.deepcopy((model, optimizer))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, range(25, 40))
        train(twin, other, range(25, 40))
    assert_equal(snapshot(model), snapshot(twin))
    kept, its = optimizer.core.averages._short, other.core.averages._short
    assert all(kept[n].data_ptr() != its[n].data_ptr() for n in kept)


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
