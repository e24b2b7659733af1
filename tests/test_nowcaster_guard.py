"""The nowcaster's guard, its re-estimation of BatchNorm, and what happens when a jump fails."""

import copy
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from tests.test_nowcaster import (
    Shift,
    assert_equal,
    assert_same,
    data,
    differs,
    loss_of,
    net,
    snapshot,
    train,
)
from wspace.errors import NowcastError
from wspace.nowcast import Guard, LinearFit, Nowcaster, Predictor
from wspace.nowcast.guard import measured, reestimate
from wspace.nowcast.predictor import Past


class Wild(Predictor):
    """Random moves, better ones among them: a fraction of the gradient's way, either way."""

    def __init__(self, generator: torch.Generator, size: float = 0.3) -> None:
        super().__init__()
        self.generator, self.size = generator, size

    def _ahead(self, past: Past, horizon: int) -> Iterator[tuple[str, Tensor]]:
        for name in past.names:
            first, last = past.windows[name][0], past.windows[name][-1]
            noise = torch.randn(last.shape, generator=self.generator, dtype=last.dtype)
            yield name, last + horizon * (0.3 * (last - first) + self.size * 0.05 * noise)


def held(model: nn.Module) -> Callable[[], Tensor]:
    x, y = data(99)
    return lambda: nn.functional.mse_loss(model(x), y)


# --- the guard ----------------------------------------------------------------


@pytest.mark.parametrize("choose", ["first", "best"])
@pytest.mark.parametrize("refresh", [False, True])
def test_the_guard_never_lets_the_held_loss_rise(
    choose: Any, refresh: bool, generator: torch.Generator
) -> None:
    kept = rejected = shrunk = 0
    for seed in range(12):
        model = net(seed)
        base = torch.optim.Adam(model.parameters(), lr=0.01)
        loss = held(model)
        optimizer = Nowcaster(
            base, model, None, Wild(generator), period=5, horizon=10,
            guard=Guard(loss, choose=choose), refresh=[data(7), data(8)] if refresh else None,
        )  # fmt: skip
        plain = copy.deepcopy((model, base))
        for step in range(20):
            if step % 5 == 4:
                plain = copy.deepcopy((model, base))
                torch.manual_seed(step)
                train(*plain, range(step, step + 1))
            torch.manual_seed(step)
            train(model, optimizer, range(step, step + 1))
            if step % 5 < 4:
                continue
            jump = optimizer.jumps[-1]
            before = measured(plain[0], held(plain[0]))
            assert jump.before == before
            assert measured(model, loss) <= before
            kept += jump.horizon > 0
            shrunk += 0 < jump.horizon < 10
            if jump.horizon:
                assert jump.after == measured(model, loss)
                assert jump.reason == "accepted"
                assert differs(plain[0].state_dict(), model.state_dict())
            else:
                rejected += 1
                assert_equal(plain[0].state_dict(), model.state_dict())
                assert jump.tried == (10, 5, 2, 1)
                assert jump.reason == "the held loss rose"
            assert_same(plain[1].state_dict(), base.state_dict())
    assert min(kept, rejected, shrunk) >= 3  # all three were seen


def test_without_the_guard_it_rises(generator: torch.Generator) -> None:
    """The control of the test above."""
    model = net()
    base = torch.optim.Adam(model.parameters(), lr=0.01)
    optimizer = Nowcaster(base, model, None, Wild(generator), period=5, horizon=10)
    train(model, optimizer, range(4))
    before = measured(model, held(model))
    train(model, optimizer, range(4, 5))
    assert measured(model, held(model)) > before


def scalar(choose: Any, best: float, horizon: int = 20, **options: Any) -> tuple[Nowcaster, float]:
    """One parameter at 0 that `Shift` moves by the horizon; the loss is least at `best`."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    guard = Guard(lambda: abs(float(model.weight.detach()) - best), choose=choose, **options)
    optimizer = Nowcaster(base, model, None, Shift(), period=5, horizon=horizon, guard=guard)
    model.weight.grad = torch.zeros(1, 1)
    for _ in range(5):
        optimizer.step()
    return optimizer, float(model.weight.detach())


@pytest.mark.parametrize(
    ("choose", "best", "tried", "at"),
    [
        ("first", 30.0, (20,), 20),
        ("first", 6.0, (20, 10), 10),
        ("best", 6.0, (20, 10, 5, 2), 5),
        ("best", 30.0, (20, 10, 5, 2), 20),
        ("first", 1.2, (20, 10, 5, 2), 2),
        ("first", 0.4, (20, 10, 5, 2), 0),
        ("best", 0.4, (20, 10, 5, 2), 0),
    ],
)
def test_horizons_are_tried_from_where_the_model_was(
    choose: str, best: float, tried: tuple[int, ...], at: int
) -> None:
    optimizer, value = scalar(choose, best)
    assert optimizer.jumps[0].tried == tried
    assert (optimizer.jumps[0].horizon, value) == (at, at)
    assert optimizer.jumps[0].before == best
    if at:
        assert optimizer.jumps[0].after == abs(at - best)


def test_shrink_attempts_and_tolerance() -> None:
    assert scalar("first", 0.4, attempts=2)[0].jumps[0].tried == (20, 10)
    assert scalar("first", 0.4, shrink=0.1)[0].jumps[0].tried == (20, 2, 1)
    assert scalar("first", 0.4, horizon=1)[0].jumps[0].tried == (1,)
    assert scalar("first", 0.4, tolerance=9.5)[1] == 10
    assert scalar("first", 10.0)[1] == 20  # as good as before is good enough


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_never_accepted(bad: float) -> None:
    for before, after in ((1.0, bad), (bad, 1.0), (bad, bad)):
        model = net()
        base = torch.optim.SGD(model.parameters(), lr=0.01)
        losses = iter([before] + [after] * 9)
        guard = Guard(lambda found=losses: next(found), tolerance=1e9)
        optimizer = Nowcaster(base, model, None, Shift(), period=5, horizon=8, guard=guard)
        train(model, optimizer, range(4))
        twin = copy.deepcopy((model, base))
        for m, o in (twin, (model, optimizer)):
            torch.manual_seed(0)
            train(m, o, range(4, 5))
        assert optimizer.jumps[0].horizon == 0
        assert optimizer.jumps[0].tried == ((8, 4, 2, 1) if math.isfinite(before) else ())
        assert_equal(twin[0].state_dict(), model.state_dict())


def test_the_guard_is_not_fooled_by_autocasts_cache() -> None:
    """Within an autocast region weights are cached in bf16; the guard must see the new ones."""
    model = net(dropout=0.0)
    base = torch.optim.SGD(model.parameters(), lr=0.01)
    x, y = data(99)
    losses: list[float] = []

    def loss() -> Tensor:
        with torch.enable_grad():  # only then does autocast cache
            found = nn.functional.mse_loss(model(x).float(), y)
        losses.append(float(found.detach()))
        return found.detach()

    optimizer = Nowcaster(base, model, None, Shift(3.0), period=5, horizon=9, guard=Guard(loss))
    train(model, optimizer, range(4))
    with torch.autocast("cpu", torch.bfloat16):
        x0, y0 = data(0)
        nn.functional.mse_loss(model(x0).float(), y0)
        optimizer.step()
    assert len(set(losses)) == len(losses) == 5
    assert optimizer.jumps[0].horizon == 0


class Restless(nn.Module):
    """Replaces a buffer in every pass, counts in another, also in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net(dropout=0.0)
        self.register_buffer("last", torch.zeros(2))
        self.register_buffer("passes", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        self.last = y.detach().mean(0)
        self.passes += 1
        return y


def test_buffers_are_put_back_also_those_that_a_pass_replaces() -> None:
    model = Restless()
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    guard = Guard(held(model))
    optimizer = Nowcaster(base, model, None, Shift(0.01), period=5, horizon=2, guard=guard)
    train(model, optimizer, range(4))
    loss_of(model, 4).backward()
    objects, values = dict(model.named_buffers()), snapshot(model)
    optimizer.step()
    assert all(x is objects[n] for n, x in model.named_buffers())
    assert_equal({n: values[n] for n in objects}, dict(model.named_buffers()))
    assert int(model.passes) == 5


# --- BatchNorm ----------------------------------------------------------------


class Layers(nn.Sequential):
    """Batch normalisation of all kinds, with and without statistics and affine maps."""

    def __init__(self, *, dropout: float = 0.0) -> None:
        super().__init__(
            nn.Linear(3, 6), nn.BatchNorm1d(6, momentum=0.3), nn.Dropout(dropout),
            nn.Unflatten(1, (2, 3, 1)), nn.BatchNorm2d(2, affine=False), nn.Flatten(),
            nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 2),
            nn.BatchNorm1d(2, momentum=None),
        )  # fmt: skip


def test_reestimation_equals_torchs() -> None:
    batches = [data(i) for i in range(4)]
    for seed in range(5):
        torch.manual_seed(seed)
        model = Layers()
        other = copy.deepcopy(model)
        modes = [m.training for m in model.modules()]
        momenta = [getattr(m, "momentum", 0) for m in model.modules()]
        with torch.no_grad():
            assert reestimate(model, batches) == 4
        update_bn(batches, other)
        assert_equal(other.state_dict(), model.state_dict())
        assert differs(Layers().state_dict(), model.state_dict())
        assert modes == [m.training for m in model.modules()]
        assert momenta == [getattr(m, "momentum", 0) for m in model.modules()]


def test_reestimation_draws_no_random_numbers_and_takes_batches_of_all_kinds() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Layers(dropout=0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    found: list[dict[str, Tensor]] = []
    x, y = data(3)
    for batches in ([x], [(x, y)], [[x, y]], [{"x": x}], lambda: iter([x])):
        torch.manual_seed(0)
        model = Named()
        before = torch.get_rng_state()
        assert reestimate(model, batches) == 1
        assert torch.equal(before, torch.get_rng_state())
        found.append(model.state_dict())
    for other in found[1:]:
        assert_equal(found[0], other)
    with pytest.raises(NowcastError, match="no batches"):
        reestimate(Named(), [])
    assert reestimate(nn.Linear(1, 1), lambda: iter(["never", "asked"])) == 0


@pytest.mark.parametrize("accept", [True, False])
def test_statistics_are_those_of_where_the_model_is(accept: bool) -> None:
    model = net()
    base = torch.optim.SGD(model.parameters(), lr=0.01)
    batches = [data(i) for i in (5, 6, 7)]
    losses = iter([1.0] + [0.5 if accept else 2.0] * 9)
    seen: list[Tensor] = []

    def loss() -> float:
        seen.append(model[1].running_mean.clone())
        return next(losses)

    optimizer = Nowcaster(
        base, model, None, Shift(0.2), period=5, horizon=4, guard=Guard(loss), refresh=batches
    )
    train(model, optimizer, range(4))
    plain = copy.deepcopy((model, base))
    for m, o in (plain, (model, optimizer)):
        torch.manual_seed(0)
        train(m, o, range(4, 5))
    assert torch.equal(seen[0], plain[0][1].running_mean)
    assert not torch.equal(seen[1], seen[0])
    if accept:
        manual = copy.deepcopy(model)
        reestimate(manual, batches)
        assert_equal(manual.state_dict(), model.state_dict())
        assert torch.equal(seen[1], model[1].running_mean)
        assert int(model[1].num_batches_tracked) == 3
        assert model[1].momentum == 0.1
    else:
        assert len(seen) == 4
        assert not torch.equal(seen[1], seen[2])
        assert_equal(plain[0].state_dict(), model.state_dict())


def test_buffers_stay_without_refresh() -> None:
    model = net()
    base = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer = Nowcaster(base, model, None, Shift(0.5), period=5, horizon=4)
    train(model, optimizer, range(4))
    model.zero_grad()
    loss_of(model, 4).backward()
    before = {n: x.clone() for n, x in model.named_buffers()}
    optimizer.step()
    assert optimizer.jumps[0].horizon == 4
    assert_equal(before, dict(model.named_buffers()))


# --- failures -----------------------------------------------------------------


class Fails(Predictor):
    """Spoils what it can reach, then raises."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def predict(self, module: Any, *args: Any, **options: Any) -> dict[str, Tensor]:
        module.eval()
        torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
        for x in module.buffers():
            x.add_(1)
        raise self.error


def spoiling(model: nn.Module, error: BaseException, at: int) -> Guard:
    calls: list[int] = []

    def loss() -> float:
        calls.append(1)
        model(torch.randn(4, 3)), random.random(), np.random.rand()  # noqa: NPY002
        for x in model.buffers():
            x.add_(1)
        if len(calls) == at:
            model.train()
            raise error
        return 10.0 - len(calls) if at == 2 else float(len(calls))

    return Guard(loss)


def refreshing(error: BaseException) -> Iterator[Tensor]:
    yield data(1)[0]
    raise error


@pytest.mark.parametrize("where", ["predict", "before", "after", "later", "refresh"])
@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize("on_error", ["skip", "raise"])
def test_a_failure_within_a_jump_leaves_everything_as_it_was(
    where: str, kind: type[BaseException], on_error: Any
) -> None:
    model = net()
    base = torch.optim.Adam(model.parameters(), lr=0.01)
    error = kind("nothing works")
    options: dict[str, Any] = {"on_error": on_error}
    predictor: Predictor = Fails(error) if where == "predict" else Shift(0.3)
    if where in {"before", "after", "later"}:
        at = {"before": 1, "after": 2, "later": 3}[where]
        options["guard"] = spoiling(model, error, at)
    elif where == "refresh":
        options["refresh"] = lambda: refreshing(error)
    optimizer = Nowcaster(base, model, None, predictor, period=5, horizon=8, **options)
    train(model, optimizer, range(4))
    model[3].eval()
    twin = copy.deepcopy((model, base))
    for m in (model, twin[0]):
        torch.manual_seed(3)
        m.zero_grad()
        loss_of(m, 4).backward()
    twin[1].step()
    modes = [m.training for m in model.modules()]
    drawn = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    if kind is KeyboardInterrupt or on_error == "raise":
        with pytest.raises(kind, match="nothing works"):
            optimizer.step()
    else:
        with pytest.warns(RuntimeWarning, match="nothing works"):
            optimizer.step()
        assert kind.__name__ in optimizer.jumps[0].reason
        assert optimizer.jumps[0].horizon == 0
    assert_equal(twin[0].state_dict(), model.state_dict())
    assert_same(twin[1].state_dict(), base.state_dict())
    assert modes == [m.training for m in model.modules()]
    assert torch.equal(drawn[0], torch.get_rng_state())
    assert drawn[1:] == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    assert (optimizer.steps, optimizer.core.history.filled) == (5, 0)


@pytest.mark.parametrize("where", ["history", "prediction", "rounding", "missing", "shape"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_never_reaches_the_model(where: str, bad: float) -> None:
    class Careless(Predictor):
        """Checks nothing, and hides what is not finite in the past."""

        def predict(self, module: Any, states: Any, **options: Any) -> dict[str, Tensor]:
            made = {n: x.nan_to_num() + 1.0 for n, x in states[-1].items()}
            if where == "prediction":
                made["4.bias"][1] = bad
            if where == "rounding":
                made["4.bias"] = made["4.bias"] + 1e30
            if where == "missing":
                del made["4.bias"]
            if where == "shape":
                made["4.bias"] = made["4.bias"][:1]
            return made

    model = net().half() if where == "rounding" else net()
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer = Nowcaster(base, model, None, Careless(), period=5, horizon=1)
    for step in range(15):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        if where == "history" and step % 5 == 2:
            optimizer.core.history._slots[1]["4.bias"][0] = bad
        before = snapshot(model)
        if step == 4:
            with pytest.warns(RuntimeWarning, match=r"4\.bias"):
                optimizer.step()
        else:
            optimizer.step()  # the second time it is only noted
        assert_equal(before, model.state_dict())
    assert [j.horizon for j in optimizer.jumps] == [0, 0, 0]
    assert all("NowcastError" in j.reason for j in optimizer.jumps)


def test_a_snapshot_that_fails_costs_a_window() -> None:
    model = net()
    base = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer = Nowcaster(base, model, None, Shift(), period=5, horizon=1)
    room = optimizer.core.history.room
    optimizer.core.history.room = lambda x: (_ for _ in ()).throw(torch.OutOfMemoryError("full"))
    with pytest.warns(RuntimeWarning, match="full"):
        train(model, optimizer, range(1))
    optimizer.core.history.room = room
    train(model, optimizer, range(1, 10))
    reasons = [(j.step, j.horizon, j.reason) for j in optimizer.jumps]
    assert reasons == [
        (1, 0, "the snapshot failed: OutOfMemoryError: full"),
        (5, 0, "no complete history"),
        (10, 1, "accepted"),
    ]


def test_a_prediction_may_be_the_parameter_itself() -> None:
    class Same(Predictor):
        def predict(self, module: Any, states: Any, **options: Any) -> dict[str, Tensor]:
            return dict(states[-1])

    model = net()
    base = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = iter([3.0, 1.0, 2.0, 3.0, 4.0])
    guard = Guard(lambda: next(losses), choose="best")
    optimizer = Nowcaster(base, model, None, Same(), period=5, horizon=8, guard=guard)
    train(model, optimizer, range(5))
    assert (optimizer.jumps[0].horizon, optimizer.jumps[0].after) == (8, 1.0)


def test_a_guard_gives_one_number() -> None:
    model = net()
    for loss in (torch.tensor([0.5]), torch.tensor(0.5), 0.5):
        assert measured(model, lambda loss=loss: loss) == 0.5
    with pytest.raises(NowcastError, match=r"not one number\n.*shape \(4, 1\)"):
        measured(model, lambda: torch.zeros(4, 1))
    assert model.training


def test_the_best_horizon_keeps_its_own_statistics() -> None:
    """Not those of the horizon that was tried last."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    batch, losses = torch.randn(16, 3), iter([5.0, 2.0, 3.0, 4.0])  # before, then of each horizon
    guard = Guard(lambda: next(losses), choose="best", attempts=3)
    base = torch.optim.SGD(net.parameters(), lr=0.1)
    how: dict[str, Any] = {"period": 10, "horizon": 8, "guard": guard, "refresh": [batch]}
    optimizer = Nowcaster(base, net, None, LinearFit(), **how)
    for _ in range(10):
        optimizer.zero_grad()
        net(batch).square().mean().backward()
        optimizer.step()
    (jump,) = optimizer.jumps
    assert jump.tried == (8, 4, 2) and jump.horizon == 8 and jump.after == 2.0
    again = copy.deepcopy(net)
    reestimate(again, [batch])
    for name, x in again.named_buffers():
        if "running" in name:
            assert torch.equal(x, net.get_buffer(name)), name
