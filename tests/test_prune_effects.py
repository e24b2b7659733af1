"""Measured effects of taking units away, against brute force: one masked copy for each unit."""

import copy
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from cases import build
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import wspace
from datasets_zoo import architectures
from datasets_zoo.pruning import SEEN, UNSEEN, UnitEffects, effects_of
from wspace.action import act, sample, shape_of
from wspace.errors import PruneError, ZooError
from wspace.prune.learned.effects import removal_effects, stacked_effects, strips
from wspace.prune.restriction import Restriction, prunable
from wspace.space import WeightSpace

TIGHT = {"rtol": 1e-10, "atol": 1e-10}
FEW = ["lstm", "attention_gqa", "shufflenet_v1", "moe_dense", "grouped_se", "language_model_tied"]


def tied() -> nn.Module:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 7, bias=False), nn.Linear(7, 7)
            self.c = nn.Linear(7, 5, bias=False)
            self.c.weight = nn.Parameter(self.a.weight.detach().T.clone())
            self.d = nn.Linear(7, 7)
            self.d.weight = self.b.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.d(self.b(self.a(x)).relu()).relu())

    return Tied()


def square(module: nn.Module, batch: Any) -> Tensor:
    return module(batch).square().mean()


def brute(module: nn.Module, space: WeightSpace, loss: Callable[[nn.Module], Tensor]) -> Any:
    """The same with a deep copy for every unit, zeroed through the core's restriction."""
    with torch.no_grad():
        before, out = loss(module), {}
        for name, group in prunable(space).items():
            shape = shape_of(group, space)
            out[name] = torch.zeros(shape, dtype=torch.float64)
            for place in product(*map(range, shape)):
                one = copy.deepcopy(module)
                if group.over:  # a restriction keeps equal counts in every context
                    one.load_state_dict(zeroed(space, name, place, module.state_dict()))
                else:
                    keep = torch.ones(shape, dtype=torch.bool)
                    keep[place] = False
                    one.load_state_dict(Restriction(space, {name: keep}).masked(one.state_dict()))
                out[name][place] = loss(one) - before
    return out


def zeroed(space: WeightSpace, name: str, place: tuple[int, ...], state: Any) -> dict[str, Tensor]:
    """Zeros where scaling this unit alone changes something, entry by entry."""
    shape = shape_of(space.all_groups[name], space)
    number = int(torch.arange(torch.Size(shape).numel()).reshape(shape)[place])
    out = {k: x.clone() for k, x in state.items()}
    for parameter, places in strips(space, space.all_groups[name]).items():
        for numbers in places:
            hit = (numbers == number).expand(out[parameter].shape)
            for k in (parameter, *space[parameter].ties):
                out[k] = torch.where(hit, 0.0, out[k])
    return out


MAKE = {
    "perceptron": (lambda: architectures.mlp(6, (5, 7), classes=3), (11, 6)),
    "convolution": (lambda: architectures.cnn(2, (3, 5), classes=3, norm=True), (5, 2, 8, 8)),
    "residual": (lambda: architectures.resnet(2, (3, 5), classes=3), (5, 2, 8, 8)),
    "transformer": (lambda: architectures.vit(2, 8, width=6, blocks=1, classes=3), (5, 2, 8, 8)),
    "tied": (tied, (11, 5)),
}


@pytest.mark.parametrize("at_once", [1, 3])
@pytest.mark.parametrize("name", [*MAKE])
@pytest.mark.usefixtures("float64")
def test_effects_are_those_of_copies(name: str, at_once: int) -> None:
    make, shape = MAKE[name]
    module, batches = make().eval(), [torch.randn(shape), torch.randn(shape)]
    space = wspace.trace(module, batches[0])
    found = removal_effects(module, space, batches, square, at_once=at_once)
    wanted = brute(module, space, lambda m: sum(square(m, b) for b in batches) / 2)
    assert found.keys() == wanted.keys() == prunable(space).keys()
    for group, x in wanted.items():
        torch.testing.assert_close(found[group], x, **TIGHT)
        assert float(x.abs().max()) > 1e-6  # zeros somewhere would not be noticed else


@pytest.mark.slow
@pytest.mark.parametrize("name", FEW)
def test_effects_of_cases(name: str) -> None:
    module, args, kwargs = build(name)
    space = wspace.trace(module, args, kwargs)

    def loss(m: nn.Module, batch: Any) -> Tensor:
        made = pytree.tree_leaves(m(*batch[0], **batch[1]))
        tensors = [y for y in made if isinstance(y, Tensor) and y.is_floating_point()]
        return torch.stack([y.double().square().mean() for y in tensors]).sum()

    found = removal_effects(module, space, [(args, kwargs)], loss)
    wanted = brute(module, space, lambda m: loss(m, (args, kwargs)))
    for group, x in wanted.items():
        torch.testing.assert_close(found[group], x, **TIGHT)


@pytest.mark.usefixtures("float64")
def test_effects_move_with_the_units(generator: torch.Generator) -> None:
    module, x = (
        architectures.vit(2, 8, width=6, blocks=1, classes=3).eval(),
        torch.randn(5, 2, 8, 8),
    )
    space = wspace.trace(module, x)
    before = removal_effects(module, space, [x], square)
    t = sample(space, generator=generator)
    module.load_state_dict(act(t, module.state_dict(), space))
    after = removal_effects(module, space, [x], square)
    for name, e in before.items():
        p = t.permutations[name]
        outer = [t.permutations[o] for o in space.groups[name].over]
        moved = e[outer[0]] if outer else e
        torch.testing.assert_close(after[name], moved.gather(-1, p), **TIGHT)


class Deciding(nn.Module):
    """Takes a branch on a value, which vmap refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        return self.b(y) if float(y.sum()) > -1 else y[:, :2]


@pytest.mark.usefixtures("float64")
def test_what_cannot_be_vectorised_goes_one_by_one() -> None:
    module, x = Deciding(), torch.randn(9, 4)
    space = wspace.trace(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), x)
    state = dict(zip(module.state_dict(), space.by_name, strict=True))
    plain = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    plain.load_state_dict({state[k]: v for k, v in module.state_dict().items()})
    calls = [0]

    def counted(m: nn.Module, batch: Tensor) -> Tensor:
        calls[0] += 1
        return square(m, batch)

    space2 = wspace.trace(module, x)
    found = removal_effects(module, space2, [x], counted, at_once=4)
    wanted = removal_effects(plain, space, [x], square, at_once=4)
    torch.testing.assert_close(found["h1"], wanted["h1"], **TIGHT)
    assert calls[0] >= 1 + 6


@pytest.mark.usefixtures("float64")
def test_a_loss_that_fools_vmap_is_found_out() -> None:
    module, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(9, 4)
    space = wspace.trace(module, x)

    def fooled(m: nn.Module, batch: Tensor) -> Tensor:
        y = m(batch)
        wrong = torch._C._functorch.is_batchedtensor(y)  # pyright: ignore
        return y.square().mean() + (1.0 if wrong else 0.0)

    found = removal_effects(module, space, [x], fooled, at_once=4)
    wanted = removal_effects(module, space, [x], square, at_once=1)
    torch.testing.assert_close(found["h1"], wanted["h1"], **TIGHT)


@pytest.mark.usefixtures("float64")
def test_the_module_is_left_as_it_was() -> None:
    module = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(6, 2)
    ).train()
    module[1].eval()
    x = torch.randn(9, 4)
    space = wspace.trace(module, x)
    state = {k: v.clone() for k, v in module.state_dict().items()}
    tensors = [id(t) for t in (*module.parameters(), *module.buffers())]
    modes, seed = [m.training for m in module.modules()], torch.get_rng_state()
    first = removal_effects(module, space, [x], lambda m, b: m(b + torch.rand(9, 4)).mean())
    assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())
    assert [id(t) for t in (*module.parameters(), *module.buffers())] == tensors
    assert [m.training for m in module.modules()] == modes
    assert torch.equal(torch.get_rng_state(), seed)
    assert all(p.grad is None for p in module.parameters())
    again = removal_effects(module, space, [x], lambda m, b: m(b + torch.rand(9, 4)).mean())
    assert all(torch.equal(first[k], again[k]) for k in first)  # the loss draws the same noise


@pytest.mark.usefixtures("float64")
def test_a_stack_of_networks_gives_what_each_gives() -> None:
    module, x = (
        architectures.vit(2, 8, width=6, blocks=1, classes=3).eval(),
        torch.randn(5, 2, 8, 8),
    )
    space = wspace.trace(module, x)
    states = [{k: torch.randn_like(v) for k, v in module.state_dict().items()} for _ in range(3)]
    stacked = {k: torch.stack([s[k] for s in states]) for k in states[0]}

    def losses(some: dict[str, Tensor]) -> Tensor:
        run = torch.func.vmap(lambda s: torch.func.functional_call(module, s, (x,)).square().mean())
        return run(some)

    found = stacked_effects(space, stacked, losses, at_once=7, groups=["h1", "h3"])
    assert found.keys() == {"h1", "h3"}
    for k, state in enumerate(states):
        module.load_state_dict(state)
        for name, e in removal_effects(module, space, [x], square, groups=["h3", "h1"]).items():
            torch.testing.assert_close(found[name][k], e, **TIGHT)


def test_errors_name_what_is_wrong() -> None:
    module, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(9, 4)
    space = wspace.trace(module, x)
    with pytest.raises(PruneError, match="'h9'"):
        removal_effects(module, space, [x], square, groups=["h9"])
    with pytest.raises(PruneError, match="no batches"):
        removal_effects(module, space, [], square)
    for at_once in (1, 4):
        with pytest.raises(PruneError, match=r"not one number.*\n.*shape \(9, 2\)"):
            removal_effects(module, space, [x], lambda m, b: m(b), at_once=at_once)
    with pytest.raises(ZeroDivisionError):  # the loss's own error is its own
        removal_effects(module, space, [x], lambda m, b: m(b).mean() / (1 // 0), at_once=4)


# ------------------------------------------------------------------------------- the zoo


def test_the_zoo_measures_its_networks() -> None:
    recipe = UnitEffects(
        datasets=("digits",), count=3, size=2, steps=(2, 4), judged=20, measured=30
    )
    made = recipe.cohort(1)  # the last one, cut
    assert len(made.table["effects"]) == 1 and made.table["split"][0] in {"train", "val"}
    module = made.architecture.module(device="cpu")
    module.load_state_dict({k: x[0] for k, x in made.state.items()}, strict=False)
    x, y = (part[:30] for part in recipe.images("digits")[:2])
    wanted = removal_effects(
        module,
        made.architecture.space(),
        [(x, y)],
        lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]),
    )
    found = effects_of(made.table["effects"][0])
    for name, e in wanted.items():
        torch.testing.assert_close(found[name], e, rtol=1e-3, atol=1e-5)


def test_parts_of_the_zoo_share_no_family() -> None:
    recipe = UnitEffects(datasets=("digits",), count=10, size=1, steps=(1, 1), judged=5, measured=5)
    for index in range(10):
        table = recipe.cohort(index).table
        test = table["split"][0] == "test"
        assert table["family"][0] in (UNSEEN if test else SEEN)
        assert test == (index % recipe.unseen == recipe.unseen - 1)
    assert not {*SEEN} & {*UNSEEN}


def test_a_text_that_holds_no_effects() -> None:
    with pytest.raises(ZooError, match="effects_of"):
        effects_of("nothing")
