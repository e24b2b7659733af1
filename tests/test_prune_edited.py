"""Meta-pruning: edits that keep the symmetry, leave the network alone, and concentrate norms."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wspace
from datasets_zoo import architectures
from wspace.action import act, sample
from wspace.errors import PruneError
from wspace.nn import GraphMetanet
from wspace.prune.importance.sparse import GroupSparsity
from wspace.prune.learned.edited import (
    OPEN,
    SHARP,
    Editable,
    Editor,
    MetaPruner,
    asked,
    concentration,
    edit,
    refreshed,
    unit_norms,
)
from wspace.prune.learned.predictor import UnitPredictor
from wspace.prune.restriction import prunable
from wspace.space import WeightSpace

TIGHT = {"rtol": 1e-10, "atol": 1e-10}
MAKE = {
    "perceptron": (lambda: architectures.mlp(6, (5, 7), classes=3), (9, 6)),
    "residual": (lambda: architectures.resnet(2, (3, 5), classes=3), (9, 2, 8, 8)),
    "transformer": (lambda: architectures.vit(2, 8, width=6, blocks=1, classes=3), (9, 2, 8, 8)),
}


def network(name: str) -> tuple[nn.Module, WeightSpace, Tensor]:
    make, shape = MAKE[name]
    module, x = make().double().eval(), torch.randn(shape, dtype=torch.float64)
    return module, wspace.trace(module, x), x


def editable(name: str) -> Editable:
    module, space, x = network(name)
    y = module(x).detach()
    batches = [(x[:5], y[:5]), (x[5:], y[5:])]
    return Editable(module, space, batches, lambda m, b: (m(b[0]) - b[1]).square().mean())


def editor() -> Editor:
    torch.manual_seed(0)
    made = Editor(
        GraphMetanet(channels=8, layers=1, head="parameter"), UnitPredictor(channels=8, layers=1)
    ).double()
    for p in made.parameters():
        nn.init.normal_(p, std=0.3)
    return made


@pytest.mark.parametrize("name", [*MAKE])
def test_edits_move_with_the_units(name: str, generator: torch.Generator) -> None:
    module, space, _ = network(name)
    state = {k: v for k, v in module.state_dict().items() if k in space.by_name}
    t, net = sample(space, generator=generator), editor()
    with torch.no_grad():
        one = act(t, net(wspace.encode(space, state)), space)
        two = net(wspace.encode(space, act(t, state, space)))
    for k, x in one.items():
        torch.testing.assert_close(two[k], x, **TIGHT)
    assert any(not torch.allclose(one[k], x) for k, x in state.items())


def test_gates_multiply_all_that_belongs_to_a_unit() -> None:
    module, space, _ = network("perceptron")
    net = Editor(gates=UnitPredictor(channels=8, layers=1)).double()
    plain = Editor(net.metanet, gates=False)
    graph = wspace.encode(space, module.state_dict())
    assert net.gates is not None
    one, two, made = plain(graph), net(graph), net.gates(graph)
    gate, other = (torch.sigmoid(SHARP * made[name] + OPEN) for name in ("h1", "h2"))
    first, second = [p.name for p in space.params if len(p.axes) > 1][:2]
    torch.testing.assert_close(two[first], one[first] * gate[:, None], **TIGHT)
    torch.testing.assert_close(two[second], one[second] * other[:, None] * gate, **TIGHT)


def test_norms_are_those_of_slices() -> None:
    module, space, _ = network("residual")
    state = {k: x.detach() for k, x in module.named_parameters()}
    norms = unit_norms(state, space)
    assert norms.keys() == prunable(space).keys()
    inner = next(n for n in norms if any(n in str(a) for a in space["3.norm1.weight"].axes))
    wanted = sum(state[f"3.{k}"].square().flatten(1).sum(1) for k in ("first.weight",))
    wanted = wanted + state["3.second.weight"].square().sum((0, 2, 3))
    wanted = wanted + state["3.norm1.weight"].square() + state["3.norm1.bias"].square()
    torch.testing.assert_close(norms[inner], wanted.sqrt(), rtol=1e-9, atol=1e-9)


def test_concentration_is_scale_free_and_has_its_bounds() -> None:
    mlp = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    space = wspace.trace(mlp, torch.zeros(1, 3).double())
    state = {k: x.detach().clone() for k, x in mlp.named_parameters()}
    one = concentration(state, space)
    torch.testing.assert_close(concentration({k: 3 * x for k, x in state.items()}, space), one)
    even = {k: torch.ones_like(x) for k, x in state.items()}
    torch.testing.assert_close(concentration(even, space), torch.ones(()).double())
    even["0.weight"][1:], even["0.bias"][1:], even["2.weight"][:, 1:] = 0, 0, 0
    half = torch.full((), 0.5).double()
    torch.testing.assert_close(concentration(even, space), half, rtol=0, atol=1e-5)


def test_a_network_is_never_modified() -> None:
    net = editable("residual")
    net.module.train()
    net.module[3].eval()
    before = {k: x.clone() for k, x in net.module.state_dict().items()}
    modes = [m.training for m in net.module.modules()]
    pruner = MetaPruner(Editor().double())
    history = pruner.fit([net], steps=3)
    made = pruner.edit(net.module, net.space, net.batches)
    assert all(torch.equal(x, before[k]) for k, x in net.module.state_dict().items())
    assert [m.training for m in net.module.modules()] == modes
    assert all(p.grad is None for p in net.module.parameters())
    assert len(history) == 3 and made.keys() == before.keys()
    assert all(x.shape == before[k].shape and x.isfinite().all() for k, x in made.items())
    net.module.load_state_dict(made)


def test_statistics_are_estimated_anew() -> None:
    net = editable("residual")
    state = dict(net.module.state_dict())
    new = refreshed(net.module, state, net.batches)
    name = next(k for k in state if k.endswith("running_mean"))
    assert not torch.allclose(new[name], state[name])
    assert all(torch.equal(refreshed(net.module, state, None)[k], x) for k, x in state.items())


def test_the_loss_of_an_edited_network_is_differentiable() -> None:
    net = editable("perceptron")
    state = {k: x.detach().clone().requires_grad_() for k, x in net.module.named_parameters()}
    loss = asked(net, {k: 1.1 * x for k, x in state.items()}, net.batches[0])
    loss.backward()
    assert float(loss.detach()) > 0 and all(x.grad is not None for x in state.values())


def test_fitting_lowers_the_objective(generator: torch.Generator) -> None:
    module, x = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 3)), torch.randn(64, 4)
    with torch.no_grad():
        module[2].weight[:, 6:] *= 0.05  # half of the units hardly matter
    space, y = wspace.trace(module, x), module(x).detach()
    net = Editable(module, space, [x], lambda m, b: (m(b) - y).square().mean())
    pruner = MetaPruner(strength=1.0, learning_rate=1e-2)
    history = pruner.fit([net], steps=60, generator=generator)
    assert history[-1][1] < 0.97 and history[-1][0] < 0.1 * float(y.square().mean())
    first, last = (
        concentration(s, space) for s in (module.state_dict(), pruner.edit(module, space))
    )
    assert float(last) < 0.97 * float(first)


def test_the_penalty_may_be_a_sum_of_group_norms() -> None:
    net = editable("perceptron")
    sparsity = GroupSparsity(net.space)
    pruner = MetaPruner(Editor().double(), penalty=lambda state, space: sparsity.penalty(state))
    history = pruner.fit([net], steps=8)
    assert history[-1][1] < history[0][1] and all(r > 0 for _, r in history)


@pytest.mark.slow
def test_one_editor_for_several_networks(generator: torch.Generator) -> None:
    nets = [editable(name) for name in MAKE]
    pruner = MetaPruner(Editor().double(), learning_rate=1e-2)
    history = pruner.fit(nets, steps=90, generator=generator)
    means = [sum(r for _, r in part) / 9 for part in (history[:9], history[-9:])]
    assert means[1] < means[0]
    made = edit(*_parts(nets[0]), steps=2, metanet=Editor().double())
    assert made.keys() == nets[0].module.state_dict().keys()


def _parts(net: Editable) -> tuple[Any, ...]:
    return net.module, net.space, net.batches, net.loss


def test_errors() -> None:
    with pytest.raises(PruneError, match="head='graph'"):
        MetaPruner(GraphMetanet(channels=8, layers=1))
    with pytest.raises(PruneError, match="no networks"):
        MetaPruner().fit([])
    module, space, _ = network("perceptron")
    with pytest.raises(PruneError, match="nothing to learn from"):
        MetaPruner().fit([Editable(module, space, [], lambda m, b: m(b).mean())])
