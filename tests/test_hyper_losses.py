"""Losses on generated states: zero on orbits, right gradients, and what they are good for."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import wspace
from wspace.errors import HyperError, SpaceMismatch
from wspace.hyper import FullHead, HyperNetwork, TaskEmbedding, call, functional_loss, orbit_loss
from wspace.space import WeightSpace
from wspace.testing import assert_close

pytestmark = pytest.mark.usefixtures("float64")

Way = Callable[[HyperNetwork, WeightSpace], dict[str, Tensor]]
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


def augmented(hyper: HyperNetwork, space: WeightSpace) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)
    graph = wspace.encode(space, hyper(torch.arange(3)))
    steps = wspace.augment.Compose(
        augment=[wspace.augment.Symmetry(kinds=("permutation", "sign")), wspace.augment.Noise()]
    )
    return wspace.decode(steps(graph, g))


def aligned(hyper: HyperNetwork, space: WeightSpace) -> dict[str, Tensor]:
    state = hyper(torch.arange(3))
    still = {n: x.detach() for n, x in state.items()}
    first = {n: x[:1].expand_as(x) for n, x in still.items()}
    return wspace.act(wspace.align.match(first, still, space), state, space)


def canonical(hyper: HyperNetwork, space: WeightSpace) -> dict[str, Tensor]:
    state = hyper(torch.arange(3))
    still = {n: x.detach() for n, x in state.items()}
    found = wspace.align.canonical(still, space, kinds=("permutation", "sign"))
    return wspace.act(found, state, space)


def merged(hyper: HyperNetwork, space: WeightSpace) -> dict[str, Tensor]:
    return wspace.align.merge([hyper(0), hyper(2)], space)


def pruned(hyper: HyperNetwork, space: WeightSpace) -> dict[str, Tensor]:
    keep = {name: torch.arange(g.size) < 3 for name, g in space.groups.items()}
    return wspace.prune.Restriction(space, keep).state(hyper(torch.arange(3)))


@pytest.mark.parametrize("way", [augmented, aligned, canonical, merged, pruned])
def test_what_is_made_of_generated_states_keeps_gradients(way: Way) -> None:
    module = net()
    space = wspace.trace(module, torch.zeros(1, 3))
    hyper = HyperNetwork(module, TaskEmbedding(3, 8), FullHead([32]))
    state = way(hyper, space)
    sum(x.square().sum() for x in state.values()).backward()
    used = [0, 2] if way is merged else [0, 1, 2]
    assert (hyper.condition.table.grad[used].abs().amax(1) > 0).all()
    if way in {aligned, canonical}:  # the same functions, in another order
        x = torch.randn(5, 3)
        found = call(module, state, (x,), inputs="shared")
        assert_close(found, hyper.run(torch.arange(3), x, inputs="shared"))


def test_buffers_count_only_if_asked() -> None:
    module = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2)).eval()
    space = wspace.trace(module, torch.zeros(2, 3))
    one = {n: x.clone() for n, x in module.state_dict().items() if x.is_floating_point()}
    other = {**one, "1.running_mean": one["1.running_mean"] + 1.0}
    assert loss_of(one, other, space) == 0
    assert loss_of(one, other, space, buffers=True) > 0.01
