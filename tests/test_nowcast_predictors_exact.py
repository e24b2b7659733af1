"""Predictors keep their numbers and their form whatever surrounds them."""

from collections.abc import Callable

import pytest
import torch
from test_nowcast_predictors import State, randomised, walk
from torch import Tensor, nn

import wspace
from wspace.nowcast import WNN, NiNoGraph, NiNoMLP, Predictor
from wspace.nowcast.wiring import traced

MAKE: dict[str, Callable[[], Predictor]] = {
    "WNN": lambda: WNN(8),
    "NiNoMLP": lambda: NiNoMLP(8),
    "NiNoGraph": lambda: NiNoGraph(8),
    "NiNoGraph codes": lambda: NiNoGraph(8, laplacian=True),
}


def predictor(name: str) -> Predictor:
    made = randomised(MAKE[name]())
    assert isinstance(made, Predictor)
    return made


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def history(module: nn.Module, seed: int = 0) -> list[State]:
    """Past states in the module's type."""
    like = module.state_dict()
    return [{n: x.to(like[n].dtype) for n, x in s.items()} for s in walk(module, seed=seed)]


def windows(module: nn.Module) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {n: torch.randn(2, 5, *p.shape, generator=g) for n, p in module.named_parameters()}


@pytest.mark.parametrize("name", MAKE)
def test_autocast_around_a_prediction_changes_no_bit(name: str) -> None:
    module, net = small(), predictor(name)
    space, states = wspace.trace(module, (torch.zeros(1, 6),)), history(module)
    want = net.predict(module, states, horizon=3, space=space)
    with torch.autocast("cpu", torch.bfloat16):
        out = net.predict(module, states, horizon=3, space=space)
        assert torch.is_autocast_enabled("cpu")
    assert all(torch.equal(out[n], x) for n, x in want.items())
    assert any(not torch.equal(x, states[-1][n]) for n, x in want.items())


@pytest.mark.parametrize("name", ["NiNoGraph", "NiNoGraph codes"])
def test_autocast_around_the_training_pass_changes_no_bit(name: str) -> None:
    module, net = small(), predictor(name)
    assert isinstance(net, NiNoGraph)
    topology = traced(wspace.trace(module, (torch.zeros(1, 6),)))
    found: list[tuple[list[Tensor], list[Tensor]]] = []
    for low in (False, True):
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            changes = net(topology, windows(module))
            total = sum((x.square().sum() for x in changes.values()), torch.zeros(()))
        total.backward()
        grads = [p.grad.clone() for p in net.parameters() if p.grad is not None]
        found.append(([*changes.values()], grads))
    for a, b in zip(*found, strict=True):
        assert len(a) == len(b) > 0
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def untrained(name: str) -> Predictor:
    """A predictor that says that nothing changes."""
    net = MAKE[name]()
    for p in net.parameters():
        with torch.no_grad():
            p.zero_()
    return net


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_network_that_is_zero_moves_nothing(name: str, dtype: torch.dtype) -> None:
    """Exactly: neither the unit's small constant nor the type of the network matters."""
    module, net = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(1, 2, 4)).to(dtype), untrained(name)
    base = history(module)[0]
    states = [{n: (x * 1e-5 * (1 + 1e-3 * i)).to(dtype) for n, x in base.items()} for i in range(5)]
    args = (torch.zeros(1, 1, 4, 4, dtype=dtype),)
    out = net.predict(module, states, horizon=7, args=args)
    assert all(torch.equal(out[n], x) for n, x in states[-1].items())


@pytest.mark.parametrize("name", ["NiNoMLP", "NiNoGraph"])
def test_changes_are_in_the_units_of_training(name: str) -> None:
    """A change of 1 is a standard deviation and the small constant, of a small tensor too."""
    module, net = nn.Linear(4, 3, bias=False).double(), untrained(name).double()
    head = net.head if isinstance(net, NiNoGraph) else net.layers[-1]  # type: ignore[union-attr]
    with torch.no_grad():
        head.bias.fill_(1.0)
    states = [{n: x * 1e-6 for n, x in s.items()} for s in history(module)]
    out = net.predict(module, states, horizon=7, args=(torch.zeros(1, 4).double(),))["weight"]
    unit = torch.stack([s["weight"] for s in states]).std() + 1e-6
    assert ((out - states[-1]["weight"]) / unit - 1).abs().max() <= 1e-9
    net.drift = True
    head.bias.data.zero_()
    out = net.predict(module, states, horizon=7, args=(torch.zeros(1, 4).double(),))["weight"]
    x = torch.stack([s["weight"] for s in states])
    want = (x[-1] - x.mean()) / (x.std() + 1e-6) * x.std() + x.mean()
    assert (out - want).abs().max() <= 1e-12 * want.abs().max()
    assert (out - x[-1]).abs().max() > 1e-8


def test_bfloat16_stays_within_a_hundredth_of_the_update() -> None:
    module = nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 32)).float()
    space = wspace.trace(module, (torch.zeros(1, 40),))
    states = walk(module)
    out = []
    for precision in ("float32", "bfloat16"):
        predictor = NiNoGraph(64, precision=precision)
        g = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in predictor.parameters():
                p.copy_(torch.randn(p.shape, generator=g) / p.shape[-1] ** 0.5)
        out.append(predictor.predict(module, states, horizon=3, space=space))
    moved = sum(float((out[0][n] - states[-1][n]).square().sum()) for n in out[0])
    apart = sum(float((out[0][n] - out[1][n]).square().sum()) for n in out[0])
    assert 0 < apart <= 1e-4 * moved
