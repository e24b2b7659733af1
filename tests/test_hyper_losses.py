"""Losses on generated states: zero on orbits, right gradients, and what they are good for."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

import wspace
from wspace.errors import HyperError, SpaceMismatch
from wspace.hyper import FullHead, HyperNetwork, TaskEmbedding, functional_loss, orbit_loss
from wspace.testing import assert_close

pytestmark = pytest.mark.usefixtures("float64")

loss_of = partial(orbit_loss, align=wspace.align.match)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 2))


def states(count: int) -> dict[str, Tensor]:
    nets = [net().state_dict() for _ in range(count)]
    return {n: torch.stack([s[n] for s in nets]) for n in nets[0]}


def plain(a: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
    n = sum(x[0].numel() for x in a.values())
    return torch.stack([(a[k] - b[k]).square().flatten(1).sum(1) for k in a]).sum(0) / n


def test_networks_of_one_orbit_are_at_distance_zero(generator: torch.Generator) -> None:
    module = net()
    space = wspace.trace(module, torch.zeros(1, 3))
    one = states(4)
    moved = wspace.act(wspace.sample(space, generator=generator), one, space)
    assert loss_of(moved, one, space).abs().max() < 1e-20
    assert plain(moved, one).min() > 1e-3  # control: the plain distance sees only positions
    other = states(4)
    assert loss_of(other, one, space).min() > 1e-3
    assert (loss_of(other, one, space) <= plain(other, one)).all()
    x = torch.randn(6, 3)
    assert functional_loss(module, moved, one, x) < 1e-20
    assert functional_loss(module, other, one, x) > 1e-4


def test_gradient_is_that_of_the_moved_goal(generator: torch.Generator) -> None:
    space = wspace.trace(net(), torch.zeros(1, 3))
    made = {n: x.requires_grad_() for n, x in states(2).items()}
    wanted = states(2)
    loss_of(made, wanted, space).sum().backward()
    t = wspace.align.match({n: x.detach() for n, x in made.items()}, wanted, space)
    moved = wspace.act(t, wanted, space)
    count = sum(x[0].numel() for x in wanted.values())
    for n, x in made.items():
        assert_close(x.grad, 2 * (x.detach() - moved[n]) / count)


def test_states_have_to_fit(generator: torch.Generator) -> None:
    space = wspace.trace(net(), torch.zeros(1, 3))
    with pytest.raises(HyperError, match="orbit_loss: other batch axes"):
        loss_of(states(2), states(3), space)
    broken = {**states(2), "0.bias": torch.zeros(2, 6)}
    with pytest.raises(SpaceMismatch, match=r"0\.bias"):
        loss_of(broken, states(2), space)


def test_a_generator_learns_networks_up_to_symmetry(generator: torch.Generator) -> None:
    """Each network is shown in another order every time: only the orbit loss can learn it."""
    module = net()
    space = wspace.trace(module, torch.zeros(1, 3))
    wanted, conds = states(3), torch.arange(3)
    x, left = torch.randn(20, 3), {}
    for name, loss in (("orbit", loss_of), ("plain", lambda a, b, _: plain(a, b))):
        torch.manual_seed(1)
        hyper = HyperNetwork(module, TaskEmbedding(3, 8), FullHead([32]))
        optimizer = torch.optim.Adam(hyper.parameters(), 1e-2)
        for _ in range(60):
            shown = wspace.act(wspace.sample(space, generator=generator), wanted, space)
            optimizer.zero_grad()
            loss(hyper(conds), shown, space).sum().backward()
            optimizer.step()
        left[name] = float(functional_loss(module, hyper(conds), wanted, x).detach())
    assert left["orbit"] < 0.2 * left["plain"]
