"""Importance predicted from weights: equivariant, for any architecture, and it learns."""

import json
from math import prod
from pathlib import Path

import pytest
import torch
from cases import CASES, build
from torch import Tensor, nn

import wspace
from datasets_zoo import architectures
from wspace.action import act, sample, shape_of
from wspace.errors import CheckpointError, PruneError, SpaceMismatch
from wspace.graph import encode
from wspace.prune.learned.effects import removal_effects, strips
from wspace.prune.learned.features import FEATURES, unit_features
from wspace.prune.learned.learning import Learning, Measured, effect_loss, learn, targets
from wspace.prune.learned.nodes import unit_nodes
from wspace.prune.learned.predicted import MeanField, Predicted
from wspace.prune.learned.predictor import (
    SHIPPED,
    UnitPredictor,
    load_predictor,
    predictor_card,
    save_predictor,
)
from wspace.prune.restriction import prunable
from wspace.space import WeightSpace

TIGHT = {"rtol": 1e-10, "atol": 1e-10}
MAKE = {
    "perceptron": (lambda: architectures.mlp(6, (5, 7), classes=3), (1, 6)),
    "convolution": (lambda: architectures.cnn(2, (3, 5), classes=3, norm=True), (1, 2, 8, 8)),
    "residual": (lambda: architectures.resnet(2, (3, 5), classes=3), (1, 2, 8, 8)),
    "depthwise": (lambda: architectures.depthwise(2, 5, classes=3), (1, 2, 8, 8)),
    "transformer": (lambda: architectures.vit(2, 8, width=6, blocks=1, classes=3), (1, 2, 8, 8)),
}
WITHOUT_NODES = {"nerf", "moe_averaged"}
"""Cases with a group that no edge or feature of the graph is attached to."""


def network(name: str) -> tuple[nn.Module, WeightSpace]:
    make, shape = MAKE[name]
    module = make().double().eval()
    for x in module.state_dict().values():
        if x.is_floating_point():
            x.copy_(torch.rand_like(x) + 0.5 if x.dim() == 1 else torch.randn_like(x))
    return module, wspace.trace(module, torch.zeros(shape, dtype=torch.float64))


def moved(scores: dict[str, Tensor], t: wspace.Transform, space: WeightSpace) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, x in scores.items():
        for d, o in enumerate(space.groups[name].over):
            x = x.index_select(d, t.permutations.get(o, torch.arange(x.shape[d])))  # noqa: PLW2901
        out[name] = x.gather(-1, t.permutations[name])
    return out


def predictor() -> UnitPredictor:
    torch.manual_seed(0)
    made = UnitPredictor(channels=8, layers=2).double()
    for p in made.parameters():  # weights that start at zero would hide a mistake
        nn.init.normal_(p, std=0.3)
    return made.eval()


# ---------------------------------------------------------------------- nodes and units


@pytest.mark.parametrize("name", [*MAKE])
def test_every_unit_has_nodes_and_no_node_two_units(name: str) -> None:
    check_nodes(network(name)[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n, c in CASES.items() if not c.slow])
def test_every_unit_of_the_cases_has_nodes(name: str) -> None:
    module, args, kwargs = build(name)
    if name not in WITHOUT_NODES:
        check_nodes(wspace.trace(module, args, kwargs))


def check_nodes(space: WeightSpace) -> None:
    found = unit_nodes(space)
    assert found.keys() == prunable(space).keys()
    for name, (nodes, units) in found.items():
        count = prod(shape_of(space.groups[name], space))
        assert units.unique().tolist() == list(range(count)), name
        assert len(nodes.unique()) == len(nodes), name


@pytest.mark.parametrize("name", [*MAKE])
def test_nodes_of_a_unit_touch_its_entries(name: str) -> None:
    """Entries that are nonzero only for one unit reach only that unit's nodes, and all of them."""
    module, space = network(name)
    for group, (nodes, units) in unit_nodes(space).items():
        for unit in range(prod(shape_of(space.groups[group], space))):
            state = {k: torch.zeros_like(x) for k, x in module.state_dict().items()}
            for parameter, places in strips(space, space.groups[group]).items():
                for numbers in places:
                    hit = (numbers == unit).expand(state[parameter].shape)
                    state[parameter] = torch.where(hit, 1.0, state[parameter])
            touched = touches(space, state)
            assert touched[nodes[units == unit]].all()
            others = torch.ones_like(touched)
            others[nodes[units != unit]] = False
            assert not touched[~others].any() or len(strips(space, space.groups[group])) > 2


def touches(space: WeightSpace, state: dict[str, Tensor]) -> Tensor:
    """Nodes with a nonzero entry attached."""
    graph = encode(space, state)
    s = graph.structure
    out = torch.zeros(s.total, dtype=torch.bool)
    for i, block in enumerate(s.blocks):
        if block.structural:
            continue
        hit = graph.block(i) != 0
        for ends, units in ((block.source, s.source(i)), (block.target, s.target(i))):
            if ends is not None and units is not None:
                some = (units + s.offsets[ends.nodes]).expand(hit.shape)[hit]
                out[some] = True
    return out


# ------------------------------------------------------------------------- equivariance


@pytest.mark.parametrize("name", [*MAKE])
def test_predictions_move_with_the_units(name: str, generator: torch.Generator) -> None:
    module, space = network(name)
    t = sample(space, generator=generator)
    before = module.state_dict()
    after = act(t, before, space)
    for importance in (Predicted(predictor()), MeanField()):
        one, two = importance.of_state(before, space), importance.of_state(after, space)
        assert one.keys() == prunable(space).keys()
        for group, x in moved(one, t, space).items():
            torch.testing.assert_close(two[group], x, **TIGHT)
        assert any(float(x.std()) > 1e-6 for x in one.values())
    still = moved(Predicted(predictor()).of_state(before, space), t, space)
    assert any(  # the negative control
        not torch.allclose(still[g], x)
        for g, x in Predicted(predictor()).of_state(before, space).items()
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["lstm", "attention_gqa", "shufflenet_v1", "moe_top2", "densenet", "gpt2"]
)
def test_predictions_move_with_the_units_of_cases(name: str, generator: torch.Generator) -> None:
    module, args, kwargs = build(name)
    space = wspace.trace(module, args, kwargs)
    t = sample(space, generator=generator)
    state = module.state_dict()
    one = Predicted(predictor()).of_state(state, space)
    two = Predicted(predictor()).of_state(act(t, state, space), space)
    for group, x in one.items():
        torch.testing.assert_close(two[group], moved({group: x}, t, space)[group], **TIGHT)


def test_features_of_a_batch_are_those_of_each() -> None:
    module, space = network("residual")
    states = [
        {k: torch.rand_like(x) for k, x in module.state_dict().items() if x.dim()} for _ in "ab"
    ]
    both = {k: torch.stack([s[k] for s in states]) for k in states[0]}
    found = unit_features(encode(space, both))
    assert found.shape[-1] == FEATURES
    importance = Predicted(predictor())
    batch = importance.of_state(both, space)
    for k, state in enumerate(states):
        torch.testing.assert_close(found[k], unit_features(encode(space, state))[0], **TIGHT)
        for group, x in importance.of_state(state, space).items():
            torch.testing.assert_close(batch[group][k], x, **TIGHT)


def test_the_mean_field_knows_gauges() -> None:
    """Rescaling the units of a rectifier network changes no estimate of their effects."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 3))
    module = module.double()
    space = wspace.trace(module, torch.zeros(1, 6).double())
    t = sample(space, kinds=("scale",))
    one = MeanField()(module, space)
    module.load_state_dict(act(t, module.state_dict(), space))
    for group, x in MeanField()(module, space).items():
        torch.testing.assert_close(x, one[group], rtol=1e-8, atol=0)


def test_a_unit_that_nobody_hears_comes_last() -> None:
    for name in ("perceptron", "convolution"):
        module, space = network(name)
        last = [p for p in space.params if len(p.axes) > 1][-1]
        with torch.no_grad():
            module.get_parameter(last.name)[:, 2] = 0
        group = next(iter(last.axes[1].groups())).name
        scores = MeanField()(module, space)[group]
        assert int(scores.argmin()) == 2 and float(scores[2]) < 1e-4 * float(scores.max())


# ------------------------------------------------------------------------------ learning


def measured(count: int) -> Measured:
    torch.manual_seed(1)
    space, states, effects = None, [], []
    x = torch.randn(64, 4)
    for _ in range(count):
        module = nn.Sequential(
            nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
        )
        space = wspace.trace(module, x)
        y = module(x).detach()
        loss = lambda m, b, y=y: (m(b) - y).square().mean()  # noqa: E731
        effects.append(removal_effects(module, space, [x], loss))
        states.append(module.state_dict())
    assert space is not None
    return Measured(
        space,
        {k: torch.stack([s[k] for s in states]) for k in states[0]},
        {k: torch.stack([e[k] for e in effects]) for k in effects[0]},
    )


def test_learning_lowers_the_loss(generator: torch.Generator) -> None:
    networks = measured(3)
    made = UnitPredictor(channels=8, layers=1)
    losses = learn(made, [networks], Learning(steps=40, spaces=1), generator=generator)
    assert len(losses) == 40 and sum(losses[-10:]) < 0.8 * sum(losses[:10])
    again = UnitPredictor(channels=8, layers=1)
    again.load_state_dict(made.state_dict())
    rows = made(encode(networks.space, networks.states))
    assert all(
        torch.equal(x, again.eval()(encode(networks.space, networks.states))[k])
        for k, x in rows.items()
    )
    with pytest.raises(PruneError, match="no networks"):
        learn(made, [])


def test_the_loss_wants_order_and_size() -> None:
    target = targets({"a": torch.tensor([[4.0, 2.0, 1.0]]), "b": torch.tensor([[0.5, -3.0]])})
    assert target.shape == (1, 5) and target.argsort(descending=True).tolist() == [[0, 1, 2, 3, 4]]
    torch.testing.assert_close(target[0, :2].exp(), torch.tensor([4, 2]) / 1.5 + 0.02)
    best = effect_loss(target, target)
    assert best < effect_loss(target + 1, target) < effect_loss(-target, target)
    assert best < effect_loss(0.5 * target, target)


# --------------------------------------------------------------------- files and importance


def test_files_go_round(tmp_path: Path) -> None:
    made = predictor().float()
    save_predictor(made, tmp_path / "mine.safetensors", card={"seed": 3})
    again = load_predictor(tmp_path / "mine.safetensors")
    assert again.options == made.options and predictor_card(tmp_path / "mine.safetensors") == {
        "seed": 3
    }
    assert all(torch.equal(x, again.state_dict()[k]) for k, x in made.state_dict().items())
    module, space = network("residual")
    one, two = (Predicted(p)(module, space) for p in (made, tmp_path / "mine.safetensors"))
    for k, x in one.items():
        torch.testing.assert_close(x, two[k], rtol=1e-4, atol=0)
    with pytest.raises(CheckpointError, match="nowhere"):
        Predicted(tmp_path / "nowhere")
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="another network"):
        Predicted(tmp_path / "other.safetensors")


@pytest.mark.parametrize("name", [*MAKE])
def test_the_shipped_one_scores_every_network(name: str) -> None:
    assert "small" in SHIPPED
    module, space = network(name)
    before = {k: x.clone() for k, x in module.state_dict().items()}
    scores = Predicted("small")(module, space)
    assert all(torch.equal(x, before[k]) for k, x in module.state_dict().items())
    for group, g in prunable(space).items():
        x = scores[group]
        assert x.shape == shape_of(g, space) and x.dtype == torch.float64
        assert bool((x > 0).all()) and bool(x.isfinite().all())


def test_what_cannot_be_judged_comes_first() -> None:
    module, args, kwargs = build("nerf")
    space = wspace.trace(module, args, kwargs)
    (name,) = [n for n, (nodes, _) in unit_nodes(space).items() if not len(nodes)]
    for importance in (Predicted(predictor()), MeanField()):
        scores = importance(module, space)
        assert scores.keys() == prunable(space).keys()
        most = max(float(x.max()) for n, x in scores.items() if n != name)
        assert bool((scores[name] >= most).all()) and bool(scores[name].isfinite().all())


def test_the_shipped_one_has_a_card() -> None:
    card = predictor_card("small")
    assert card["networks"] > 100 and json.dumps(card)


def test_a_wrong_space_is_refused() -> None:
    module, _ = network("perceptron")
    _, space = network("residual")
    with pytest.raises(SpaceMismatch):
        Predicted(predictor())(module, space)
