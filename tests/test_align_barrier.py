"""Losses between models: heights, alignment, BatchNorm, and the module left as it was."""

import copy
import math
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from cases import build
from oracles import gap, state_of
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import wspace
from wspace.align.barrier import LossPath, barrier, lent, loss_path
from wspace.align.merge import interpolate
from wspace.batchnorm import reestimate
from wspace.errors import MeasureError, MergeError
from wspace.testing import TOLERANCE, assert_same

pytestmark = pytest.mark.usefixtures("float64")
EXACT = TOLERANCE[torch.float64]
State = dict[str, Tensor]


def mlp(*widths: int, norm: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(a, b), *([nn.BatchNorm1d(b)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers[: -2 if norm else -1])


def data(seed: int = 0, rows: int = 64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 3, generator=g)
    return x, torch.stack([x[:, 0] * x[:, 1], x[:, 2].abs()], 1)


def mse(module: nn.Module) -> Tensor:
    x, y = data()
    return F.mse_loss(module(x), y)


def states(module: nn.Module, generator: torch.Generator, count: int = 2) -> list[State]:
    """Random states of a module: weights, and statistics that some network could have."""
    out = []
    for _ in range(count):
        state = {}
        for n, x in state_of(module).items():
            noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
            if not x.is_floating_point():
                state[n] = x.clone()
            else:
                state[n] = (noise.abs() + 0.5 if "var" in n else noise).to(x)
        out.append(state)
    return out


def direct(module: nn.Module, state: State) -> float:
    """The loss at a state, by a copy of the module."""
    module = copy.deepcopy(module).eval()
    module.load_state_dict(state)
    with torch.no_grad():
        return float(mse(module))


# --- what is measured -----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "spherical"])
@pytest.mark.parametrize("norm", [False, True])
def test_losses_are_those_of_the_states_between(
    kind: Any, norm: bool, generator: torch.Generator
) -> None:
    module = mlp(3, 7, 5, 2, norm=norm)
    a, b = states(module, generator)
    path = loss_path(module, a, b, mse, points=[0, 0.3, 1, 1.5], kind=kind)
    assert path.points.tolist() == [0, 0.3, 1, 1.5]
    for t, found in zip(path.points.tolist(), path.losses.tolist(), strict=True):
        assert found == direct(module, interpolate(a, b, t, kind=kind))
    assert barrier(module, a, b, mse, points=5, kind=kind).points.tolist() == [
        0,
        0.25,
        0.5,
        0.75,
        1,
    ]
    assert len(barrier(module, a, b, mse).points) == 25


def test_height_is_above_the_line_between_the_ends() -> None:
    points = torch.tensor([-1.0, 0.0, 0.25, 0.5, 1.0, 2.0])
    path = LossPath(points, {"loss": torch.tensor([9.0, 1.0, 2.0, 4.0, 3.0, 9.0])})
    assert path.height == 2.0  # at 0.5 the line is at 2; what lies beyond the ends does not count
    path = LossPath(points, {"a": torch.tensor([0.0, 3.0, 2.0, 1.0, 2.0, 0.0]), "b": path.losses})
    assert path.heights == {"a": 0.0, "b": 2.0}
    assert path.depths == {"a": 1.5, "b": 0.0}
    with pytest.raises(MeasureError, match="points 0 and 1 among"):
        _ = LossPath(points[2:], {"a": torch.zeros(4)}).height
    for at in (1, 2, 3):
        values = torch.tensor([9.0, 1.0, 2.0, 4.0, 3.0, 9.0])
        values[at] = math.nan
        assert math.isnan(LossPath(points, {"a": values}).height)


def test_several_metrics_at_once(generator: torch.Generator) -> None:
    module = mlp(3, 7, 2)
    a, b = states(module, generator)
    x, y = data()

    def metrics(m: nn.Module) -> dict[str, Any]:
        out = m(x)
        return {"mse": F.mse_loss(out, y), "right": float((out.argmax(1) == y.argmax(1)).sum())}

    found = barrier(module, a, b, metrics, points=7)
    assert list(found.straight.metrics) == ["mse", "right"]
    assert torch.equal(found.losses, barrier(module, a, b, mse, points=7).losses)
    assert found.height == found.straight.heights["mse"]


def test_a_path_from_start_to_end_of_training() -> None:
    torch.manual_seed(0)
    module = mlp(3, 17, 2)
    start = {n: x.clone() for n, x in module.state_dict().items()}
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    for _ in range(200):
        optimizer.zero_grad()
        mse(module).backward()
        optimizer.step()
    path = loss_path(module, start, module.state_dict(), mse)  # the module's own tensors
    assert path.losses[-1] < 0.2 * path.losses[0]
    assert path.height < EXACT  # Goodfellow et al.: downhill all the way
    assert float(mse(module).detach()) == path.losses[-1]


# --- after matching -------------------------------------------------------------------


def test_a_moved_model_is_behind_a_barrier_until_it_is_brought_back(
    generator: torch.Generator,
) -> None:
    """The transform is known here; the loss at both ends is the same."""
    for widths in ((3, 7, 2), (3, 11, 7, 2)):
        module = mlp(*widths)
        space = wspace.trace(module, torch.zeros(1, 3))
        (a,) = states(module, generator, 1)
        t = wspace.sample(space, generator=generator)
        b = wspace.act(t, a, space)
        y = functional_call(module, a, data()[0])
        found = barrier(
            module, a, b, lambda m, y=y: F.mse_loss(m(data()[0]), y), transform=wspace.inverse(t)
        )
        assert found.aligned is not None
        assert found.height > 0.1
        assert found.aligned.height <= EXACT
        assert found.aligned.losses.max() <= EXACT
        assert max(found.losses[0], found.losses[-1]) <= EXACT


@pytest.mark.parametrize("norm", [False, True])
def test_matching_takes_the_barrier_away(norm: bool, generator: torch.Generator) -> None:
    """One hidden layer, where matching always finds the way back; also with statistics."""
    module = mlp(3, 11, 2, norm=norm)
    space = wspace.trace(module, torch.zeros(2, 3))
    for _ in range(5):
        (a,) = states(module, generator, 1)
        b = wspace.act(wspace.sample(space, generator=generator), a, space)
        loss = distance_to(functional_call(module.eval(), a, data()[0]))
        found = barrier(module, a, b, loss, space=space, points=5)
        assert found.aligned is not None and found.transform is not None
        assert found.height > 0.1 and found.straight.heights["worst"] > 0.1
        assert max(found.aligned.heights.values()) < EXACT
        assert_same(a, wspace.act(found.transform, b, space))
        again = barrier(module, a, b, loss, transform=found.transform, points=5)
        assert again.aligned is not None
        assert torch.equal(again.aligned.losses, found.aligned.losses)
        if norm:
            batches = [data(4)[0], data(5)[0]]
            loss = distance_to(reestimated(module, a, batches)(data()[0]))
            found = barrier(module, a, b, loss, space=space, points=5, refresh=batches)
            assert found.aligned is not None
            assert found.height > 0.1
            assert found.aligned.height < EXACT


def distance_to(y: Tensor) -> Any:
    def loss(m: nn.Module) -> dict[str, Tensor]:
        found = m(data()[0])
        return {"mse": F.mse_loss(found, y), "worst": (found - y).abs().max()}

    return loss


@torch.no_grad()
def reestimated(module: nn.Module, state: State, batches: list[Tensor]) -> nn.Module:
    module = copy.deepcopy(module)
    module.load_state_dict(state)
    reestimate(module, batches, frozen=True)
    return module.eval()


# --- BatchNorm ------------------------------------------------------------------------


def test_statistics_are_estimated_at_every_point(generator: torch.Generator) -> None:
    module = mlp(3, 7, 5, 2, norm=True)
    a, b = states(module, generator)
    batches = [data(i) for i in (5, 6, 7)]
    path = loss_path(module, a, b, mse, points=5, refresh=batches)
    plain = loss_path(module, a, b, mse, points=5)
    assert not any(torch.isclose(x, y) for x, y in zip(path.losses, plain.losses, strict=True))
    for t, found in zip(path.points.tolist(), path.losses.tolist(), strict=True):
        other = copy.deepcopy(module).train()
        other.load_state_dict(interpolate(a, b, t))
        reestimate(other, batches)
        assert found == direct(other, other.state_dict())
    module.eval()  # as it is once trained
    assert torch.equal(path.losses, loss_path(module, a, b, mse, points=5, refresh=batches).losses)
    made = [0]

    def again() -> list[Any]:
        made[0] += 1
        return batches

    assert torch.equal(path.losses, loss_path(module, a, b, mse, points=5, refresh=again).losses)
    assert made[0] == 5
    with pytest.raises(MeasureError, match="only once"):
        loss_path(module, a, b, mse, refresh=iter(batches))
    with pytest.raises(MeasureError, match="no batches"):
        loss_path(module, a, b, mse, refresh=[])


def test_a_loader_that_shuffles_gives_every_point_the_same(generator: torch.Generator) -> None:
    module = mlp(3, 7, 2, norm=True)
    (a,) = states(module, generator, 1)
    draws = torch.Generator().manual_seed(0)
    loader = torch.utils.data.DataLoader(data(3)[0], batch_size=5, shuffle=True, generator=draws)
    before = draws.get_state()
    path = loss_path(module, a, a, mse, points=4, refresh=loader)
    assert len(set(path.losses.tolist())) == 1
    assert torch.equal(before, draws.get_state())


def test_random_losses_are_compared_under_the_same_numbers(generator: torch.Generator) -> None:
    module = mlp(3, 7, 2)
    (a,) = states(module, generator, 1)
    path = loss_path(module, a, a, lambda m: mse(m) * (1 + torch.rand(()) + random.random()))
    assert len(set(path.losses.tolist())) == 1


# --- the module is left alone ---------------------------------------------------------


class Restless(nn.Module):
    """Replaces a buffer in every pass, counts in another, keeps an attribute, and drops out."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(mlp(3, 7, 5, 2, norm=True), nn.Dropout(0.5))
        self.register_buffer("last", torch.zeros(2))
        self.register_buffer("passes", torch.tensor(0))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        self.last = y.detach().mean(0)
        self.passes += 1
        self.scratch += 1
        self.seen.append(len(x))
        return y


def observed(module: nn.Module) -> dict[str, Any]:
    """Everything that a measurement might change."""
    seen: dict[str, Any] = {}
    named = [*module.named_parameters(), *module.named_buffers()]
    for name, x in named:
        seen[name] = (id(x), x.data_ptr(), x.dtype, x.requires_grad, x.stride())
        seen[f"{name} value"] = x.detach().clone().reshape(-1).view(torch.uint8).tolist()
        seen[f"{name} grad"] = None if x.grad is None else (id(x.grad), x.grad.tolist())
    seen["modes"] = [m.training for m in module.modules()]
    seen["momenta"] = [getattr(m, "momentum", None) for m in module.modules()]
    seen["attributes"] = [sorted(vars(m)) for m in module.modules()]
    seen["lists"] = [list(v) for m in module.modules() for v in vars(m).values() if type(v) is list]
    seen["torch"] = torch.get_rng_state().tolist()
    seen["python"], seen["numpy"] = random.getstate(), str(np.random.get_state())  # noqa: NPY002
    return seen


def spoiling(module: nn.Module) -> float:
    """A loss with every bad manner."""
    x, y = data()
    module.train()
    with torch.enable_grad():
        F.mse_loss(module(x), y).backward()
    for p in [*module.parameters(), *module.buffers()]:
        p.data.add_(1)
    module.extra = 1  # type: ignore[assignment]
    torch.rand(2), random.random(), np.random.rand()  # noqa: NPY002
    return 1.0


class Stop(Exception):
    """Raised by losses here."""


def failing(module: nn.Module) -> float:
    spoiling(module)
    raise Stop("the loss")


def failing_batches() -> Iterator[Tensor]:
    yield data()[0]
    raise Stop("the batches")


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("what", ["fine", "loss", "batches", "transform"])
def test_the_module_is_left_bit_for_bit(what: str, own: bool, generator: torch.Generator) -> None:
    module = Restless()
    space = wspace.trace(module, torch.randn(4, 3))
    mse(module).backward()
    module.inner[0][1].eval()
    for p in list(module.parameters())[::2]:
        p.grad = None
    a, b = states(module, generator)
    if own:  # the states are the module's tensors themselves
        a = dict(state_of(module))
    kept = {n: x.clone() for n, x in a.items()}
    before = observed(module)
    t = wspace.sample(space, generator=generator)
    options: dict[str, Any] = {"refresh": [data(3)], "points": 3, "transform": t}
    if what in {"fine", "transform"}:
        barrier(module, a, b, spoiling, **options)
    else:
        options["refresh"] = failing_batches if what == "batches" else [data(3)]
        with pytest.raises(Stop, match=f"the {what}"):
            barrier(module, a, b, failing if what == "loss" else mse, **options)
    after = observed(module)
    assert {k: v for k, v in after.items() if before[k] != v} == {}
    assert before.keys() == after.keys()
    assert_same(kept, a)


def test_observed_sees_changes() -> None:
    module = Restless().eval()
    before = observed(module)
    spoiling(module)
    after = observed(module)
    changed = {k for k in before if before[k] != after[k]}
    weight = "inner.0.0.weight"
    assert {f"{weight} value", f"{weight} grad", "passes value", "last", "scratch value"} <= changed
    assert {"torch", "python", "numpy", "attributes", "lists", "modes"} <= changed


def test_views_of_a_lent_module_come_back(generator: torch.Generator) -> None:
    """Memory that others look at, such as an optimizer's flat view, is the same as before."""
    module = mlp(3, 7, 2)
    view = module[0].weight.data.view(-1)
    kept = view.clone()
    a, b = states(module, generator)
    with lent(module) as put:
        put(lambda n: a[n], set(a))
        assert torch.equal(module[0].weight, a["0.weight"])
        assert torch.equal(view, kept)
    assert torch.equal(view, kept)
    assert module[0].weight.data_ptr() == view.data_ptr()


LENT = """mlp_batchnorm mlp_weight_norm autoencoder_tied moe_top2 lstm gru resnet18 unet
          language_model_tied""".split()


@pytest.mark.parametrize("name", LENT)
def test_any_module_can_be_lent(name: str, generator: torch.Generator) -> None:
    module, args, kwargs = build(name)
    space = wspace.trace(module, args, kwargs)
    (a,) = states(module, generator, 1)
    t = wspace.sample(space, generator=generator)
    before = observed(module)

    def loss(m: nn.Module) -> Tensor:
        out = m(*args, **kwargs)
        return (out[0] if isinstance(out, tuple) else out).sin().mean()

    found = barrier(module, a, wspace.act(t, a, space), loss, transform=wspace.inverse(t), points=3)
    assert found.aligned is not None
    assert gap([found.aligned.losses[:1].expand(3)], [found.aligned.losses]) < EXACT
    assert observed(module) == before
    assert found.straight.losses[1] != found.straight.losses[0]


class Times(nn.Module):
    """Multiplies by a whole number that is a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("times", torch.tensor(1))

    def forward(self) -> Tensor:
        return (self.weight * self.times).sum()


def test_integers_on_the_way_are_those_of_the_first() -> None:
    module = Times()
    a = {"weight": torch.tensor([1.0, 2.0]), "times": torch.tensor(3)}
    for b in ({"weight": torch.zeros(2)}, {"weight": torch.zeros(2), "times": torch.tensor(8)}):
        path = loss_path(module, a, b, lambda m: m(), points=[0, 0.5, 1])
        assert path.losses.tolist() == [9.0, 4.5, 0.0]
    assert int(module.times) == 1


# --- errors ---------------------------------------------------------------------------


def test_states_of_other_modules_are_refused(generator: torch.Generator) -> None:
    module = mlp(3, 7, 2, norm=True)
    a, b = states(module, generator)
    c = {n: x for n, x in a.items() if "num_batches" not in n}  # counters need not be there
    assert torch.equal(
        loss_path(module, c, c, mse, points=2).losses, loss_path(module, a, a, mse, points=2).losses
    )
    for s in (a, b):
        del s["0.bias"], s["1.running_mean"]
        s["extra"], s["3.bias"] = torch.zeros(2), torch.zeros(3)
    for call in (barrier, loss_path):
        with pytest.raises(MergeError, match="not of this Sequential") as caught:
            call(module, a, b, mse)
        for text in ("no '0.bias'", "no '1.running_mean'", "'extra', which", "'3.bias' of (3,)"):
            assert text in str(caught.value)
    del a["extra"]
    with pytest.raises(MergeError, match="'extra' in state 2"):
        barrier(module, a, b, mse)


@pytest.mark.parametrize(
    ("loss", "match"),
    [
        (lambda m: torch.zeros(2), r"'loss' of shape \(2,\)"),
        (lambda m: {"a": 1.0, "b": torch.zeros(1, 3)}, r"'b' of shape \(1, 3\)"),
        (lambda m: {}, "one number for each metric"),
    ],
)
def test_losses_that_are_no_numbers(loss: Any, match: str, generator: torch.Generator) -> None:
    module = mlp(3, 7, 2)
    a, b = states(module, generator)
    with pytest.raises(MeasureError, match=match):
        loss_path(module, a, b, loss)
    with pytest.raises(MeasureError, match="no points"):
        loss_path(module, a, b, mse, points=[])
    with pytest.raises(MergeError, match="unknown kind"):
        loss_path(module, a, b, mse, kind="cubic")  # type: ignore[arg-type]
    names = iter("ab")
    with pytest.raises(MeasureError, match="other metrics than before"):
        loss_path(module, a, b, lambda m: {next(names): 1.0}, points=2)
