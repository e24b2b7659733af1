"""The nowcaster among schedulers, scalers, closures and hooks; its state, and copies of it."""

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel
from torch.optim import lr_scheduler as lrs

import wspace
from tests.test_nowcaster import (
    OPTIMIZERS,
    Shift,
    assert_equal,
    assert_same,
    data,
    differs,
    each_optimizer,
    loss_of,
    net,
    snapshot,
    train,
)
from wspace.errors import NowcastError
from wspace.nowcast import Decay, Guard, LinearFit, Nowcaster

# --- history ------------------------------------------------------------------


def test_buffers_of_the_history_are_used_again() -> None:
    model = net()
    base = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer = Nowcaster(base, model, None, Shift(0.0), period=5, horizon=1)
    train(model, optimizer, range(5))
    slots = optimizer.core.history._slots
    places = [{n: x.data_ptr() for n, x in slot.items()} for slot in slots]
    assert len(slots) == 4
    train(model, optimizer, range(5, 25))
    assert places == [{n: x.data_ptr() for n, x in slot.items()} for slot in slots]
    model[0].requires_grad_(False)
    train(model, optimizer, range(25, 30))
    assert all("0.weight" not in slot and "4.weight" in slot for slot in slots)


def test_a_rounded_history_moves_the_exact_parameters() -> None:
    def run(dtype: torch.dtype | None, lr: float, steps: int) -> nn.Module:
        model = net(dropout=0.0)
        base = torch.optim.SGD(model.parameters(), lr=lr)
        optimizer = Nowcaster(
            base, model, None, LinearFit(still=False), period=10, horizon=4,
            history_dtype=dtype, history_device="cpu",
        )  # fmt: skip
        train(model, optimizer, range(steps))
        for slot in optimizer.core.history._slots:
            assert {x.dtype for x in slot.values()} == {dtype or torch.float32}
            assert {x.device.type for x in slot.values()} == {"cpu"}
        assert optimizer.jumps[0].horizon == 4
        return model

    start = net(dropout=0.0)
    still = run(torch.bfloat16, 0.0, 10)  # not even a rounding moves what has not moved
    for p, q in zip(start.parameters(), still.parameters(), strict=True):
        assert torch.equal(p, q)
    exact, rounded = run(None, 0.3, 10), run(torch.bfloat16, 0.3, 10)
    wide = run(torch.float64, 0.3, 10)
    models = (start, exact, rounded, wide)
    for s, p, q, r in zip(*(m.parameters() for m in models), strict=True):
        largest = float(torch.cat([s.flatten(), p.flatten()]).detach().abs().max())
        bound = 3 * 2**-9 * largest  # weights of the line: 1, 0.4, 0.2, 0.8
        torch.testing.assert_close(q, p, rtol=0, atol=bound)
        assert torch.equal(p, r)
    assert differs(exact.state_dict(), rounded.state_dict())


# --- schedulers, scalers, closures, hooks -------------------------------------

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "lambda": lambda o: lrs.LambdaLR(o, lambda s: 1 / (1 + s)),
    "multiplicative": lambda o: lrs.MultiplicativeLR(o, lambda s: 0.95),
    "step": lambda o: lrs.StepLR(o, 7),
    "multistep": lambda o: lrs.MultiStepLR(o, [3, 11]),
    "constant": lrs.ConstantLR,
    "linear": lrs.LinearLR,
    "exponential": lambda o: lrs.ExponentialLR(o, 0.9),
    "polynomial": lambda o: lrs.PolynomialLR(o, 20),
    "cosine": lambda o: lrs.CosineAnnealingLR(o, 20),
    "restarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 5),
    "cyclic": lambda o: lrs.CyclicLR(o, 0.01, 0.1, 4),
    "onecycle": lambda o: lrs.OneCycleLR(o, 0.1, 40),
    "plateau": lambda o: lrs.ReduceLROnPlateau(o, patience=2),
    "sequential": lambda o: lrs.SequentialLR(
        o, [lrs.LinearLR(o, 0.1, total_iters=5), lrs.CosineAnnealingLR(o, 15)], [5]
    ),
    "chained": lambda o: lrs.ChainedScheduler([lrs.ConstantLR(o), lrs.ExponentialLR(o, 0.9)]),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers_work(scheduler: str) -> None:
    """The same rates as for the plain optimizer, and no warning of a step that was missed."""
    rates: list[list[float]] = []
    for wrap in (False, True):
        model = net()
        base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        optimizer: torch.optim.Optimizer = base
        if wrap:
            optimizer = Nowcaster(base, model, None, Shift(0.0), period=5, horizon=1)
        schedule = SCHEDULERS[scheduler](optimizer)
        found: list[float] = []
        torch.manual_seed(0)
        for step in range(25):
            train(model, optimizer, range(step, step + 1))
            schedule.step(1.0) if scheduler == "plateau" else schedule.step()
            found.append(base.param_groups[0]["lr"])
        rates.append(found)
        if isinstance(optimizer, Nowcaster):
            assert optimizer.steps == 25
            assert len(optimizer.jumps) == 5
    assert rates[0] == rates[1]
    assert len(set(rates[1])) > 1


class Fixed(torch.amp.GradScaler):
    """A scaler on the CPU."""

    def __init__(self) -> None:
        super().__init__("cpu", init_scale=8.0, growth_interval=1000)


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw-fused"])
@pytest.mark.parametrize("attached", [False, True])
def test_steps_that_a_gradient_scaler_skips_do_not_count(kind: str, attached: bool) -> None:
    model = net()
    base = OPTIMIZERS[kind](model.parameters())
    predictor, scaler = Shift(0.0), Fixed()
    wrapped = Nowcaster(base, model, None, predictor, period=10, horizon=1)
    if attached:
        wrapped.core.attach()
    optimizer = base if attached else wrapped
    bad = {2, 3, 9, 11}
    jumps: list[int] = []
    for step in range(30):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, step).float()
        scaler.scale(loss).backward()
        if step in bad:
            assert model[4].bias.grad is not None
            model[4].bias.grad[0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        if len(wrapped.jumps) > len(jumps):
            jumps.append(step)
    assert wrapped.steps == 26
    assert jumps == [13, 23]
    assert all(bool(x.isfinite().all()) for x in model.parameters())


def test_closures_return_their_loss() -> None:
    model = net(dropout=0.0)
    base = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    optimizer = Nowcaster(base, model, None, Shift(0.0), period=5, horizon=1)
    calls: list[int] = []

    def closure() -> float:
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        calls.append(1)
        return float(loss.detach())

    found = [optimizer.step(closure) for _ in range(6)]
    assert all(isinstance(x, float) for x in found)
    assert found[-1] < found[0]
    assert len(calls) > 6
    assert (optimizer.steps, len(optimizer.jumps)) == (6, 1)


def test_hooks_run_once_and_around_the_jump() -> None:
    model = net(dropout=0.0)
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer = Nowcaster(base, model, None, Shift(1.0), period=5, horizon=1)
    seen: list[tuple[str, float]] = []

    def note(name: str) -> Callable[..., None]:
        return lambda *_: seen.append((name, round(float(model[4].bias.detach()[0] - start), 4)))

    start = float(model[4].bias.detach()[0])
    handles = [
        optimizer.register_step_pre_hook(note("pre")),
        optimizer.register_step_post_hook(note("post")),
        base.register_step_post_hook(note("base")),
    ]
    train(model, optimizer, range(5))
    assert seen[-3:] == [("pre", 0.0), ("base", 0.0), ("post", 1.0)]
    assert len(seen) == 15
    for handle in handles:
        handle.remove()
    train(model, optimizer, range(1))
    assert len(seen) == 15
    saved: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda o: saved.append("pre"))
    optimizer.register_state_dict_post_hook(lambda o, s: {**s, "more": 1})
    optimizer.register_load_state_dict_pre_hook(lambda o, s: saved.append(f"more {s['more']}"))
    optimizer.register_load_state_dict_post_hook(lambda o: saved.append("post"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert saved == ["pre", "more 1", "post"]


def test_it_is_an_optimizer_that_shares_everything() -> None:
    model = net()
    base = torch.optim.Adam(model.parameters(), lr=0.01)
    optimizer = Nowcaster(base, DataParallel(model), None, LinearFit(), period=5, horizon=1)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is base.param_groups
    assert optimizer.state is base.state
    assert optimizer.defaults is base.defaults
    optimizer.param_groups[0]["lr"] = 0.5
    assert base.param_groups[0]["lr"] == 0.5
    train(model, optimizer, range(6))
    assert len(optimizer.jumps) == 1
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    base.load_state_dict(base.state_dict())
    assert optimizer.param_groups is base.param_groups
    assert "period: 5, step: 6, jumps: 1" in repr(optimizer)


# --- resumption ---------------------------------------------------------------


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@each_optimizer
@pytest.mark.parametrize("stop", [1, 10, 15, 19])
def test_resumption_is_bit_identical(kind: str, stop: int) -> None:
    dtype = torch.bfloat16 if kind == "rmsprop" else None

    def begin() -> tuple[nn.Module, Nowcaster, Any]:
        model = net()
        base = OPTIMIZERS[kind](model.parameters())
        held = data(99)

        def held_loss() -> Tensor:
            return nn.functional.mse_loss(model(held[0]), held[1])

        optimizer = Nowcaster(
            base, model, None, LinearFit(), period=10, horizon=Decay(), total_steps=40,
            guard=Guard(held_loss, tolerance=0.1), refresh=[data(98)], history_dtype=dtype,
        )  # fmt: skip
        return model, optimizer, lrs.StepLR(optimizer, 7, gamma=0.7)

    def go_on(run: tuple[nn.Module, Nowcaster, Any], steps: range) -> None:
        for step in steps:
            torch.manual_seed(step)
            train(run[0], run[1], range(step, step + 1))
            run[2].step()

    whole = begin()
    go_on(whole, range(40))
    first, second = begin(), begin()
    go_on(first, range(stop))
    saved = through_a_file(
        {"m": first[0].state_dict(), "o": first[1].state_dict(), "s": first[2].state_dict()}
    )
    go_on(first, range(stop, stop + 3))  # what goes on does not change what was saved
    second[0].load_state_dict(saved["m"])
    second[1].load_state_dict(saved["o"])
    second[2].load_state_dict(saved["s"])
    go_on(second, range(stop, 40))
    assert_equal(whole[0].state_dict(), second[0].state_dict())
    assert_same(whole[1].base.state_dict(), second[1].base.state_dict())
    without = [
        [(j.step, j.tried, j.horizon, j.before, j.after) for j in r[1].jumps]
        for r in (whole, second)
    ]
    assert without[0] == without[1]
    assert any(j.horizon for j in second[1].jumps)


def test_a_plain_optimizers_state_and_back() -> None:
    model = net()
    base = torch.optim.Adam(model.parameters(), lr=0.01)
    optimizer = Nowcaster(base, model, None, LinearFit(), period=10, horizon=1)
    train(model, optimizer, range(13))
    state = copy.deepcopy(optimizer.state_dict())
    plain = torch.optim.Adam(net().parameters(), lr=0.5)
    plain.load_state_dict(state)
    assert plain.param_groups[0]["lr"] == 0.01
    assert_same(plain.state_dict(), base.state_dict())
    with pytest.warns(UserWarning, match="counted from zero"):
        optimizer.load_state_dict(plain.state_dict())
    assert (optimizer.steps, optimizer.jumps) == (0, [])
    assert optimizer.core.history.filled == 0
    optimizer.load_state_dict(state)
    assert (optimizer.steps, len(optimizer.jumps), optimizer.core.history.filled) == (13, 1, 1)


def test_a_state_that_does_not_fit() -> None:
    model = net()
    base = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer = Nowcaster(base, model, None, LinearFit(), period=10, horizon=1)
    train(model, optimizer, range(15))
    state = copy.deepcopy(optimizer.state_dict())
    slower = Nowcaster(base, model, None, LinearFit(), period=20, horizon=1)
    slower.load_state_dict(state)
    assert (slower.steps, slower.core.history.filled) == (15, 0)
    train(model, slower, range(15, 20))
    assert [(j.horizon, j.reason) for j in slower.jumps][1:] == [(0, "no complete history")]
    state["nowcast"]["history"]["tensors"]["0.weight"][0] = torch.zeros(2)
    with pytest.raises(NowcastError, match=r"'0\.weight' of shape \(2,\)"):
        optimizer.load_state_dict(state)
    state["nowcast"]["version"] = 0
    with pytest.raises(NowcastError, match="version"):
        optimizer.load_state_dict(state)


def test_copies_are_whole_and_apart() -> None:
    model = net(dropout=0.0)
    base = torch.optim.Adam(model.parameters(), lr=0.01)
    optimizer = Nowcaster(base, model, None, LinearFit(), period=10, horizon=3)
    train(model, optimizer, range(7))
    frozen = snapshot(model)
    text = pickle.dumps((model, optimizer))
    twin, other = copy.deepcopy((model, optimizer))
    assert other.core.module is twin
    assert other.param_groups[0]["params"][0] is twin[0].weight
    train(twin, other, range(7, 25))
    assert_equal(frozen, model.state_dict())
    train(model, optimizer, range(7, 25))
    assert_equal(twin.state_dict(), model.state_dict())
    assert [j.horizon for j in other.jumps] == [3, 3]
    again, third = pickle.loads(text)  # noqa: S301
    train(again, third, range(7, 25))
    assert_equal(again.state_dict(), model.state_dict())
    guarded = Nowcaster(base, model, None, LinearFit(), horizon=1, guard=Guard(lambda: 0.0))
    with pytest.raises(NowcastError, match="cannot be copied"):
        copy.deepcopy(guarded)


# --- with what else there is --------------------------------------------------


def test_a_compiled_module_keeps_its_names_and_sees_the_jump() -> None:
    model = net(dropout=0.0)
    compiled = torch.compile(model, backend="eager")
    base = torch.optim.SGD(model.parameters(), lr=0.01)
    guard = Guard(lambda: float(compiled(data(9)[0]).sum().abs()) * 0)
    optimizer = Nowcaster(base, compiled, None, Shift(1.0), period=5, horizon=1, guard=guard)
    train(compiled, optimizer, range(5))
    assert optimizer.jumps[0].reason == "accepted"
    assert set(optimizer.core.movable()) == {n for n, _ in model.named_parameters()}
    compiled.eval()
    model.eval()
    assert torch.equal(compiled(data(9)[0]), model(data(9)[0]))


@pytest.mark.parametrize("kind", ["NiNoMLP", "NiNoGraph", "WNN"])
def test_networks_predict_for_it(kind: str) -> None:
    """Untrained ones: that they are asked rightly, not that they are any good."""
    from wspace import nowcast

    model = net(dropout=0.0)
    space = wspace.trace(model, torch.zeros(2, 3))
    base = torch.optim.Adam(model.parameters(), lr=0.01)
    torch.manual_seed(0)
    predictor = getattr(nowcast, kind)()
    model[0].bias.requires_grad_(False)
    optimizer = Nowcaster(base, model, space, predictor, period=10, horizon=7, on_error="raise")
    train(model, optimizer, range(9))
    twin = copy.deepcopy((model, base))
    states = [{n: x[i] for n, x in window(optimizer).items()} for i in range(4)]
    train(twin[0], twin[1], range(9, 10))
    train(model, optimizer, range(9, 10))
    last = {**dict(twin[0].named_parameters()), **dict(twin[0].named_buffers())}
    past = [{**last, **s} for s in states]
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    wanted = predictor.predict(twin[0], [*past, last], horizon=7, space=space, names=names)
    for name, p in model.named_parameters():
        assert torch.equal(p, wanted[name])
        assert torch.equal(p, last[name]) == (name == "0.bias")


def window(optimizer: Nowcaster) -> dict[str, list[Tensor]]:
    history = optimizer.core.history
    return {n: history.window(n) for n in optimizer.core.movable()}


def test_a_step_hands_on_what_it_is_given() -> None:
    """Options of the optimizer's own, with and without a closure."""
    seen: list[tuple[bool, dict[str, Any]]] = []

    class Own(torch.optim.SGD):
        def step(self, closure: Any = None, **options: Any) -> Any:
            seen.append((closure is not None, options))
            return super().step(closure)

    net = nn.Linear(2, 1)
    optimizer = Nowcaster(
        Own(net.parameters(), lr=0.1), net, None, LinearFit(), period=5, horizon=1
    )
    assert optimizer.step(lambda: 3.0, factor=2) == 3.0
    assert optimizer.step(factor=4) is None
    assert seen == [(True, {"factor": 2}), (False, {"factor": 4})]
