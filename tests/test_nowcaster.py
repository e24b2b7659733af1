"""The nowcaster as an optimizer: when it jumps, what moves, and that training is else unchanged."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wspace.errors import NowcastError
from wspace.nowcast import Decay, Guard, LinearFit, NoChange, Nowcaster, Predictor
from wspace.nowcast.predictor import Past

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
}
each_optimizer = pytest.mark.parametrize("kind", OPTIMIZERS)


class Shift(Predictor):
    """Adds a constant, and notes what it was asked."""

    def __init__(self, by: float = 1.0, **options: Any) -> None:
        super().__init__(still=False, **options)
        self.by, self.asked = by, list[tuple[int, tuple[str, ...]]]()

    def _ahead(self, past: Past, horizon: int) -> Iterator[tuple[str, Tensor]]:
        self.asked.append((horizon, past.names))
        for name in past.names:
            yield name, past.windows[name][-1] + self.by * horizon


def net(seed: int = 0, *, dropout: float = 0.3) -> nn.Sequential:
    """A net with every nuisance: dropout, batch normalisation, a 0-d parameter's worth of bias."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(3, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Dropout(dropout), nn.Linear(7, 2)
    )


def data(step: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(step)
    return torch.randn(11, 3, generator=g), torch.randn(11, 2, generator=g)


def loss_of(model: nn.Module, step: int) -> Tensor:
    x, y = data(step)
    return nn.functional.mse_loss(model(x), y)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {n: x.clone() for n, x in model.state_dict().items()}


def assert_equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    """Bitwise, and the same names."""
    assert a.keys() == b.keys()
    different = [n for n in a if not torch.equal(a[n], b[n])]
    assert different == []


def differs(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> list[str]:
    return [n for n in a if not torch.equal(a[n], b[n])]


def test_the_comparison_sees_a_bit() -> None:
    a = snapshot(net())
    b = {**a, "4.bias": a["4.bias"].nextafter(torch.tensor(9.0))}
    with pytest.raises(AssertionError):
        assert_equal(a, b)


# --- schedule -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "table"),
    [
        (10_000, "40 33 26 21 16 11 8 5 3 1"),
        (15_000, "40 35 31 27 23 20 16 13 11 8 6 5 3 2 1"),
        (5_000, "40 25 13 5 1"),
        (900, "40"),
    ],
)
def test_horizons_are_the_published_table(total: int, table: str) -> None:
    assert Decay().table(total, 1000) == tuple(map(int, table.split()))


@pytest.mark.parametrize("longest", [1, 2, 17, 40, 100])
@pytest.mark.parametrize("power", [1.0, 2.0, 3.5])
def test_horizons_fall_from_the_longest_to_one(longest: int, power: float) -> None:
    for count in range(2, 30):
        table = Decay(longest, power).table(count * 10 + 3, 10)
        assert (table[0], table[-1], len(table)) == (longest, 1, count)
        assert list(table) == sorted(table, reverse=True)


def asked(steps: int, **options: Any) -> list[int]:
    model, predictor = net(), Shift(1e-3)
    base = torch.optim.SGD(model.parameters(), lr=0.01)
    options = {"period": 10} | options
    optimizer = Nowcaster(base, model, None, predictor, **options)
    train(model, optimizer, range(steps))
    assert [j.step for j in optimizer.jumps] == list(range(10, steps + 1, 10))
    return [j.horizon for j in optimizer.jumps]


def test_horizon_is_fixed_decaying_or_a_function() -> None:
    assert asked(35, horizon=3) == [3, 3, 3]
    assert asked(50, horizon=Decay(), total_steps=50) == [40, 25, 13, 5, 1]
    assert asked(40, horizon=Decay(9), total_steps=20) == [9, 1, 1, 1]
    assert asked(30, horizon=lambda step: step // 10 - 1) == [0, 1, 2]


@pytest.mark.parametrize("context", [1, 2, 5])
@pytest.mark.parametrize("spacing", [1, 3, 7])
@pytest.mark.parametrize("micro", [1, 2, 4])
def test_jumps_at_multiples_of_the_period_of_real_steps(
    context: int, spacing: int, micro: int
) -> None:
    """Micro-batches do not count, and the past is that of the model, `spacing` steps apart."""
    seen: list[list[Tensor]] = []

    class Watch(NoChange):
        def _ahead(self, past: Past, horizon: int) -> Iterator[tuple[str, Tensor]]:
            seen.append([x.clone() for x in past.windows["4.weight"]])
            return super()._ahead(past, horizon)

    model, period = net(), context * spacing
    base = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer = Nowcaster(base, model, None, Watch(context=context), period=period, horizon=2)
    after: list[Tensor] = []
    for step in range(4 * period - 1):
        optimizer.zero_grad()
        for part in range(micro):
            (loss_of(model, step * micro + part) / micro).backward()
        optimizer.step()
        after.append(model[4].weight.detach().clone())
    assert [j.step for j in optimizer.jumps] == [period, 2 * period, 3 * period]
    for j, window in enumerate(seen):
        wanted = [after[j * period + (i + 1) * spacing - 1] for i in range(context)]
        assert [torch.equal(x, y) for x, y in zip(window, wanted, strict=True)] == [True] * context


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"period": 12}, "multiple of the context 5"),
        ({"period": 0}, "multiple of the context 5"),
        ({"context": 4}, "LinearFit needs"),
        ({"horizon": 41}, "horizon of 0 to 40"),
        ({"horizon": -1}, "horizon of 0 to 40"),
        ({"horizon": Decay()}, "total_steps"),
        ({"moments": "zero"}, "'keep' or 'reset'"),
        ({"on_error": "ignore"}, "'skip' or 'raise'"),
        ({"refresh": iter([1])}, "read again"),
        ({"history_dtype": torch.int8}, "floating-point history"),
        ({"history_dtype": torch.float8_e4m3fn}, "floating-point history"),
        ({"predictor": None}, "predictor is missing"),
        ({"module": nn.Linear(1, 1)}, "none of the optimizer's parameters"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, Any], match: str) -> None:
    model = net()
    given: dict[str, Any] = {"module": model, "predictor": LinearFit(), "period": 10, "horizon": 2}
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(NowcastError, match=match):
        Nowcaster(base, **(given | options))


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"predictor": "nino-mlp-small"}, "predictor is a str(.|\n)*load\\('nino-mlp-small'"),
        ({"guard": lambda: 0.0}, "guard is a function(.|\n)*Guard\\(function\\)"),
        ({"optimizer": nn.Linear(1, 1)}, "optimizer is a Linear(.|\n)*comes first"),
    ],
)
def test_what_is_passed_instead_is_named(given: dict[str, Any], match: str) -> None:
    model = net()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    usual = {"optimizer": base, "module": model, "predictor": LinearFit(), "horizon": 1}
    with pytest.raises(NowcastError, match=match):
        Nowcaster(**{**usual, **given})


def test_other_refusals() -> None:
    model = net()
    base = torch.optim.Adagrad(model.parameters())
    with pytest.raises(NowcastError, match="Adagrad"):
        Nowcaster(base, model, None, LinearFit(), horizon=1, moments="reset")
    once = Nowcaster(base, model, None, LinearFit(), horizon=1)
    with pytest.raises(NowcastError, match="already jumps"):
        Nowcaster(once, model, None, LinearFit(), horizon=1)
    for bad in ({"shrink": 1.0}, {"attempts": 0}, {"choose": "last"}, {"tolerance": -1.0}):
        with pytest.raises(NowcastError, match=next(iter(bad))):
            Guard(lambda: 0.0, **bad)  # pyright: ignore[reportArgumentType]
    with pytest.raises(NowcastError, match="Decay"):
        Decay(0)


# --- the plain optimizer ------------------------------------------------------


@each_optimizer
@pytest.mark.parametrize("how", ["horizon 0", "rejected", "fails", "before the first"])
def test_without_a_jump_that_is_kept_training_is_the_plain_optimizers(kind: str, how: str) -> None:
    """Bit for bit, with dropout and batch normalisation: no random number, no mode is changed."""
    plain, model = net(), net()
    one, base = OPTIMIZERS[kind](plain.parameters()), OPTIMIZERS[kind](model.parameters())
    options: dict[str, Any] = {"period": 10, "horizon": 3}
    predictor: Predictor = Shift(0.1)
    if how == "horizon 0":
        options["horizon"] = 0
    elif how == "rejected":
        losses = iter(range(1000))
        options["guard"] = Guard(lambda: float(next(losses)) + 0 * noisy(model))
        options["refresh"] = [data(1)]
    elif how == "fails":
        predictor = Shift(math.nan)
    else:
        options["period"] = 100
    other = Nowcaster(base, model, None, predictor, **options)
    torch.manual_seed(1)
    train(plain, one, range(35))
    torch.manual_seed(1)
    if how == "fails":
        with pytest.warns(RuntimeWarning, match="not finite"):
            train(model, other, range(35))
    else:
        train(model, other, range(35))
    assert_equal(plain.state_dict(), model.state_dict())
    assert_same(one.state_dict(), base.state_dict())
    assert len(other.jumps) == (0 if how == "before the first" else 3)
    assert [j.horizon for j in other.jumps] == [0] * len(other.jumps)


def noisy(model: nn.Module) -> float:
    """A loss that draws random numbers, and checks that it is asked for an evaluation."""
    assert not model.training
    assert not torch.is_grad_enabled()
    return float(model(torch.randn(4, 3)).sum() * 0) + float(torch.rand(()) * 0)


def assert_same(a: Any, b: Any) -> None:
    """Equal state dicts, tensors bitwise."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def test_the_random_generators_are_as_before_an_accepted_jump() -> None:
    model = net()
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    guard = Guard(lambda: noisy(model))
    optimizer = Nowcaster(base, model, None, Shift(), period=5, horizon=1, guard=guard)
    model.train()
    model[3].eval()  # modes of parts are kept
    train(model, optimizer, range(4))
    before = torch.get_rng_state()
    optimizer.step()
    assert optimizer.jumps[0].reason == "accepted"
    assert torch.equal(before, torch.get_rng_state())
    assert [m.training for m in model] == [True, True, True, False, True]


# --- what moves ---------------------------------------------------------------


class Odd(nn.Module):
    """Parameters of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 5)
        self.tied = nn.Linear(3, 5)
        self.tied.weight = self.a.weight
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.frozen = nn.Parameter(torch.randn(4), requires_grad=False)
        self.low = nn.Parameter(torch.randn(6).bfloat16())
        self.turned = nn.Parameter(torch.randn(3, dtype=torch.complex64))
        self.outside = nn.Parameter(torch.randn(2))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.across = nn.Parameter(torch.randn(4, 5).t())
        self.register_buffer("running", torch.zeros(3))
        self.register_buffer("count", torch.tensor(3))

    def forward(self, x: Tensor) -> Tensor:
        y = (self.a(x) + self.tied(x)).sum() * self.scale + self.turned.abs().sum()
        return y + self.low.sum().float() + self.outside.sum() + self.across.sum()


def test_what_moves_and_what_is_left_alone() -> None:
    model, stranger = Odd(), nn.Parameter(torch.ones(2))
    ours = [p for n, p in model.named_parameters() if n != "outside"]
    base = torch.optim.SGD([*ours, stranger], lr=1e-3)
    predictor = Shift(0.25)
    optimizer = Nowcaster(base, model, None, predictor, period=5, horizon=2)
    places = {n: x.data_ptr() for n, x in model.state_dict().items()}
    for step in range(5):
        if step == 4:
            before = snapshot(model) | {"stranger": stranger.detach().clone()}
            grads = {
                n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()
            }
        else:
            optimizer.zero_grad()
            (model(torch.ones(2, 3)) + stranger.sum()).backward()
        optimizer.step()
    twin = torch.optim.SGD([p for p in ours if p.grad is not None], lr=1e-3)
    assert twin.param_groups
    moved = {"a.weight", "a.bias", "tied.weight", "tied.bias", "scale", "low", "across"}
    after = snapshot(model)
    for name, x in before.items():
        if name == "stranger":
            assert torch.equal(stranger, x - 1e-3 * 1.0)
            continue
        stepped = x
        grad = grads.get(name, grads["a.weight"] if name == "tied.weight" else None)
        if grad is not None and name != "outside":
            stepped = x - 1e-3 * grad
        if name in moved:
            wanted = stepped.float() + 0.5
            rtol = 2**-8 if x.dtype == torch.bfloat16 else 1e-6  # one rounding
            torch.testing.assert_close(after[name].float(), wanted, rtol=rtol, atol=0)
        else:
            assert torch.equal(after[name], stepped)
    assert places == {n: x.data_ptr() for n, x in model.state_dict().items()}
    storages = {p.untyped_storage().data_ptr() for p in model.parameters() if p.numel()}
    assert len(storages) == sum(p.numel() > 0 for p in model.parameters())
    assert model.low.dtype == torch.bfloat16
    assert optimizer.core.left_alone == {
        "frozen": "frozen",
        "turned": "of dtype torch.complex64",
        "outside": "not in the optimizer",
        "param_groups[0][9]": "not in the module",
    }
    assert predictor.asked[0][1].count("a.weight") == 1
    assert "frozen" not in optimizer.core.history._slots[0]


def test_bf16_parameters_are_predicted_in_float32() -> None:
    """A movement below the resolution of bf16 at each snapshot adds up in float32."""
    model = nn.Linear(64, 1, bias=False).bfloat16()
    base = torch.optim.SGD(model.parameters(), lr=1.0)
    seen: list[torch.dtype] = []

    class Watch(LinearFit):
        def _ahead(self, past: Past, horizon: int) -> Iterator[tuple[str, Tensor]]:
            seen.append(past.windows["weight"][-1].dtype)
            return super()._ahead(past, horizon)

    optimizer = Nowcaster(base, model, None, Watch(), period=5, horizon=7)
    start = model.weight.detach().clone()
    exact: list[Tensor] = []
    for _ in range(5):
        model.weight.grad = torch.full_like(model.weight, -0.01)
        optimizer.step()
        exact.append(model.weight.detach().float() if len(exact) < 4 else torch.empty(0))
    plain = nn.Linear(64, 1, bias=False).bfloat16()
    plain.weight.data.copy_(start)
    for _ in range(5):
        plain.weight.data -= torch.full_like(start, -0.01)
    states = [{"weight": x} for x in [*exact[:4], plain.weight.detach().float()]]
    wanted = LinearFit().predict(plain, states, horizon=7)["weight"].bfloat16()
    assert seen == [torch.float32]
    assert torch.equal(model.weight, wanted)
    assert model.weight.dtype == torch.bfloat16


def test_freezing_and_thawing_within_a_window() -> None:
    model = net(dropout=0.0)
    base = torch.optim.SGD(model.parameters(), lr=0.0)  # only jumps move anything
    predictor = Shift(1.0)
    optimizer = Nowcaster(base, model, None, predictor, period=10, horizon=1)
    start = snapshot(model)
    for step in range(20):
        model[0].weight.requires_grad_(step >= 5)  # thawed in the first window
        model[4].bias.requires_grad_(step != 5)  # frozen at one snapshot of it
        model[4].weight.requires_grad_(not 8 <= step < 10)  # frozen at the jump
        train(model, optimizer, range(step, step + 1))
        if step == 9:
            assert sorted(predictor.asked[0][1]) == ["0.bias", "1.bias", "1.weight"]
    after = snapshot(model)
    jumps = {"0.weight": 1, "4.bias": 1, "4.weight": 1, "0.bias": 2, "1.bias": 2, "1.weight": 2}
    for name, times in jumps.items():
        assert torch.equal(
            after[name], (start[name] + 1.0) + 1.0 if times == 2 else start[name] + 1.0
        )


def test_a_frozen_network_is_bit_for_bit_as_before() -> None:
    model = net()
    model[0].requires_grad_(False)
    base = torch.optim.Adam(model.parameters(), lr=0.01)
    optimizer = Nowcaster(base, model, None, LinearFit(), period=5, horizon=9)
    start = snapshot(model[0])
    train(model, optimizer, range(20))
    assert_equal(start, model[0].state_dict())
    assert [j.horizon for j in optimizer.jumps] == [9] * 4


def test_added_parameters_join_in_the_next_window() -> None:
    model = net(dropout=0.0)
    base = torch.optim.SGD(model[:4].parameters(), lr=0.01)
    predictor = Shift(0.01)
    optimizer = Nowcaster(base, model, None, predictor, period=10, horizon=1)
    train(model, optimizer, range(5))
    optimizer.add_param_group({"params": list(model[4].parameters()), "lr": 0.1})
    assert len(base.param_groups) == 2
    train(model, optimizer, range(5, 20))
    first, second = (set(names) for _, names in predictor.asked)
    assert first == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert second == {*first, "4.weight", "4.bias"}


def test_a_parameter_that_is_replaced_begins_anew() -> None:
    model = net(dropout=0.0)
    base = torch.optim.SGD(model.parameters(), lr=0.01)
    predictor = Shift(0.01)
    optimizer = Nowcaster(base, model, None, predictor, period=10, horizon=1)
    train(model, optimizer, range(5))
    model[4] = nn.Linear(7, 4)
    base.param_groups[0]["params"][-2:] = list(model[4].parameters())
    for step in range(5, 20):
        optimizer.zero_grad()
        model(data(step)[0]).square().mean().backward()
        optimizer.step()
    assert not any(n.startswith("4.") for n in predictor.asked[0][1])
    assert {"4.weight", "4.bias"} <= set(predictor.asked[1][1])


@each_optimizer
def test_moments_are_kept(kind: str) -> None:
    model = net()
    base = OPTIMIZERS[kind](model.parameters())
    optimizer = Nowcaster(base, model, None, Shift(0.1), period=10, horizon=1)
    train(model, optimizer, range(9))
    twin = copy.deepcopy((model, base))
    model.zero_grad()
    twin[0].zero_grad()
    loss_of(model, 9).backward()
    for p, q in zip(model.parameters(), twin[0].parameters(), strict=True):
        q.grad = None if p.grad is None else p.grad.clone()
    optimizer.step()
    twin[1].step()
    assert optimizer.jumps[0].horizon == 1
    assert_same(base.state_dict(), twin[1].state_dict())
    assert differs(model.state_dict(), twin[0].state_dict())


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw-fused", "rmsprop"])
def test_moments_are_reset_for_what_moved(kind: str) -> None:
    model = net()
    base = OPTIMIZERS[kind](model.parameters())
    optimizer = Nowcaster(base, model, None, Shift(0.1), period=10, horizon=1, moments="reset")
    train(model, optimizer, range(9))
    model[4].requires_grad_(False)
    model.zero_grad()
    loss_of(model, 9).backward()
    optimizer.step()
    assert set(base.state) == set(model[4].parameters())
    model[4].requires_grad_(True)
    fresh = copy.deepcopy(model)
    anew = OPTIMIZERS[kind](fresh.parameters())
    for m, opt in ((model, optimizer), (fresh, anew)):
        torch.manual_seed(0)
        train(m, opt, range(1))
    assert torch.equal(model[0].weight, fresh[0].weight)
