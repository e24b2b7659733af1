"""A drift's averages: seen for a while or for good, judged by a guard, saved and loaded."""

import copy
import math
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.test_nowcaster import (
    assert_equal,
    data,
    differs,
    loss_of,
    net,
    snapshot,
    train,
)
from tests.test_nowcaster_drift import SOON, drifting
from wspace.errors import NowcastError
from wspace.nowcast import Drift, Guard, LinearFit, Nowcaster, Settings, follower
from wspace.nowcast.follow import LOGGED


def through(state: Any, path: Any) -> Any:
    torch.save(state, path)
    return torch.load(path, weights_only=True)


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


def test_an_end_that_fails_changes_nothing() -> None:
    model = net(dropout=0.0)
    optimizer = drifting(model, refresh=[])
    train(model, optimizer, range(30))
    before = snapshot(model)
    with pytest.raises(NowcastError):
        optimizer.finish()
    assert_equal(before, snapshot(model))
    assert optimizer.core.averages._clocks


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
    assert {j.reason for j in optimizer.jumps if j.horizon} == {"accepted"}
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
    assert optimizer.jumps[-1].reason == "accepted, but not judged: ValueError: no data"
    assert optimizer.jumps[-1].horizon > 0
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
    again = drifting(nn.Linear(1, 1), drift=Drift(begin=0, every=1), period=1, lr=0.0)
    again.load_state_dict(optimizer.state_dict())
    assert (again.core.made, len(again.jumps)) == (LOGGED + 50, LOGGED)


def test_an_optimizer_that_is_followed_cannot_step_within() -> None:
    """Also where it is not wrapped, as by the callbacks; and it can again when that has ended."""
    model = net(dropout=0.0)
    base = torch.optim.SGD(model.parameters(), lr=0.05)
    core = follower(base, model, None, SOON, Settings(period=4))
    handle = core.attach()
    train(model, base, range(24))
    assert [j.step for j in core.log] == [20, 24]
    with core.averaged(), pytest.raises(NowcastError, match="holds its averages now"):
        base.step()
    train(model, base, range(24, 26))
    handle.remove()
    with core.averaged():
        base.step()
    assert core.step == 26


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
