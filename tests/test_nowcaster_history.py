"""Which past is a parameter's own, what is refused before a change, and what is not redone."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.test_nowcaster import Shift, assert_equal, assert_same, loss_of, net, snapshot, train
from tests.test_nowcaster_state import Fixed
from wspace.errors import NowcastError
from wspace.nowcast import Guard, LinearFit, NiNoGraph, Nowcaster, wiring


def replaced(model: nn.Sequential, base: torch.optim.Optimizer, out: int = 2) -> None:
    """Another last layer, in the module and in the optimizer."""
    model[4] = nn.Linear(7, out)
    base.param_groups[0]["params"][-2:] = list(model[4].parameters())


@pytest.mark.parametrize("at", [1, 2, 5, 6, 8, 9])
def test_another_parameter_of_the_same_shape_has_no_past(at: int) -> None:
    """At a learning rate of zero nothing moves, unless states of two parameters are mixed."""
    model = net(dropout=0.0)
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer = Nowcaster(base, model, None, LinearFit(), period=10, horizon=5)
    train(model, optimizer, range(at))
    replaced(model, base)
    before = snapshot(model)
    train(model, optimizer, range(at, 10))
    assert_equal({"x": before["4.weight"]}, {"x": model.state_dict()["4.weight"]})
    assert optimizer.jumps[0].horizon == 5
    assert optimizer.core.history.filled == 0
    assert not optimizer.core.history._owners  # what was replaced is let go
    train(model, optimizer, range(10, 20))
    assert optimizer.jumps[1].horizon == 5


def test_what_is_replaced_between_windows_is_in_the_next() -> None:
    model = net(dropout=0.0)
    base = torch.optim.SGD(model.parameters(), lr=0.01)
    predictor = Shift(0.0)
    optimizer = Nowcaster(base, model, None, predictor, period=10, horizon=1)
    train(model, optimizer, range(10))
    assert "4.weight" in predictor.asked[0][1]
    model[4] = nn.Linear(7, 4)
    base.param_groups[0]["params"][-2:] = list(model[4].parameters())
    for _ in range(10):
        base.zero_grad()
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
    assert predictor.asked[1] == predictor.asked[0]


def test_parameters_of_another_dtype_begin_anew() -> None:
    model = nn.Linear(3, 1)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = Nowcaster(base, model, None, LinearFit(), period=5, horizon=1)

    def steps(count: int) -> None:
        for _ in range(count):
            base.zero_grad()
            model(torch.ones(2, 3, dtype=model.weight.dtype)).mean().backward()
            optimizer.step()

    steps(6)
    model.double()
    steps(9)
    assert [j.horizon for j in optimizer.jumps] == [1, 0, 1]
    for slot in optimizer.core.history._slots:
        assert {x.dtype for x in slot.values()} == {torch.float64}


@pytest.mark.parametrize("when", ["past", "now"])
def test_a_history_that_overflows_says_so(when: str) -> None:
    model = nn.Linear(3, 1)
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer = Nowcaster(
        base, model, None, LinearFit(), period=5, horizon=1, history_dtype=torch.float16
    )
    for step in range(5):
        if step == (0 if when == "past" else 4):
            nn.init.constant_(model.weight, 1e5)
        model.weight.grad = torch.zeros_like(model.weight)
        if step < 4:
            optimizer.step()
    with pytest.warns(RuntimeWarning, match=r"overflows torch\.float16[\s\S]*bfloat16"):
        optimizer.step()
    assert "overflows torch.float16" in optimizer.jumps[0].reason
    assert bool((model.weight == 1e5).all())


@pytest.mark.parametrize("wrong", ["version", "shape", "count", "missing", "log"])
def test_a_state_that_does_not_fit_changes_nothing(wrong: str) -> None:
    model = net(dropout=0.0)
    base = torch.optim.Adam(model.parameters(), lr=0.01)
    optimizer = Nowcaster(base, model, None, LinearFit(), period=10, horizon=1)
    train(model, optimizer, range(13))
    saved: dict[str, Any] = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, range(13, 17))
    entry = saved["nowcast"]
    past = entry["history"]["tensors"]
    if wrong == "version":
        entry["version"] = 9
    elif wrong == "shape":
        past["4.bias"] = [torch.zeros(3)] * len(past["4.bias"])
    elif wrong == "count":
        past["4.bias"] = past["4.bias"] * 2
    elif wrong == "missing":
        del entry["step"]
    else:
        entry["log"][0]["more"] = 1
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises((NowcastError, TypeError)):
        optimizer.load_state_dict(saved)
    assert_same(before, optimizer.state_dict())


def test_a_graph_predictor_traces_once_as_long_as_the_module_is_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[int] = []
    trace = wiring.trace

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(1)
        return trace(*args, **options)

    monkeypatch.setattr(wiring, "trace", counted)
    torch.manual_seed(0)
    model = net(dropout=0.0)
    base = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = iter(range(99))
    guard = Guard(lambda: next(losses))
    optimizer = Nowcaster(
        base, model, None, NiNoGraph(8), period=5, horizon=8, guard=guard, on_error="raise"
    )
    train(model, optimizer, range(10))
    assert [len(j.tried) for j in optimizer.jumps] == [4, 4]
    assert len(calls) == 1
    replaced(model, base)  # as it was wired
    train(model, optimizer, range(10, 15))
    assert len(calls) == 1
    model.append(nn.Linear(2, 2))
    base.add_param_group({"params": list(model[5].parameters())})
    train(model, optimizer, range(15, 20))
    assert len(calls) == 2


class Counted(torch.Tensor):
    """A tensor that counts how often its value is asked for."""

    asked = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in {"item", "__float__", "__bool__", "tolist"}:
            Counted.asked += 1
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_fused_optimizer_is_waited_for_only_when_something_may_be_due() -> None:
    model = net(dropout=0.0)
    base = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    optimizer = Nowcaster(base, model, None, Shift(0.0), period=50, horizon=1)
    core = optimizer.core
    core.attach()
    skips = {3, 9, 10, 30, 51, 52}
    Counted.asked = 0
    jumps: list[int] = []
    for step in range(70):
        base.found_inf = torch.tensor(float(step in skips)).as_subclass(Counted)  # as a scaler does
        loss_of(model, step).backward()
        base.step()
        if len(core.log) > len(jumps):
            jumps.append(step)
    assert jumps == [55]
    assert Counted.asked < 20
    assert core.step == 64
    assert core.log[0].horizon == 1


def test_steps_are_right_whenever_they_are_asked_for() -> None:
    model = net(dropout=0.0)
    base = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    optimizer = Nowcaster(base, model, None, Shift(0.0), period=50, horizon=1)
    optimizer.core.attach()
    scaler, real = Fixed(), 0
    for step in range(23):
        base.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        bad = step in {2, 3, 9, 11}
        if bad:
            assert isinstance(model[4].bias.grad, Tensor)
            model[4].bias.grad[0] = math.inf
        scaler.step(base)
        scaler.update()
        real += not bad
        if step % 4 == 3:
            assert optimizer.core.step == real
    assert optimizer.core.state_dict()["step"] == real == 19
