"""Importance measured with data, against gradients by hand, quadratics and hooks."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import build
from test_prune_importance import moved
from torch import Tensor, nn

import wspace
from wspace.action import shape_of
from wspace.errors import PruneError
from wspace.prune.importance.measured import ActivationNorm, HessianDiagonal, Taylor
from wspace.prune.importance.weights import Magnitude
from wspace.prune.restriction import prunable
from wspace.space import WeightSpace
from wspace.trace.sandbox import tensors_in

TIGHT = {"rtol": 1e-10, "atol": 1e-12}
FEW = [
    "mlp_batchnorm",
    "autoencoder_tied",
    "lstm",
    "moe_dense",
    "attention_gqa",
    "grouped_se",
    "fno",
]
Batch = tuple[tuple[Any, ...], dict[str, Any]]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def square(module: nn.Module, batch: Batch) -> Tensor:
    out = tensors_in(module(*batch[0], **batch[1]))[0]
    return (torch.view_as_real(out) if out.is_complex() else out).square().mean()


def mean_square(module: nn.Module, x: Tensor) -> Tensor:
    return module(x).square().mean()


def mlp() -> tuple[nn.Module, WeightSpace, list[Tensor]]:
    module = nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 2)).double()
    data = [torch.randn(5, 3, dtype=torch.float64) for _ in range(3)]
    return module, wspace.trace(module, data[0]), data


def gradients(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """By central differences, entry by entry."""
    out: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, p in module.named_parameters():
            flat, found = p.view(-1), torch.zeros(p.numel(), dtype=p.dtype)
            for i in range(p.numel()):
                before = flat[i].item()
                flat[i] = before + 1e-5
                up = mean_square(module, x)
                flat[i] = before - 1e-5
                found[i] = (up - mean_square(module, x)) / 2e-5
                flat[i] = before
            out[name] = found.view(p.shape)
    return out


@pytest.mark.parametrize("absolute", ["unit", "entry"])
def test_taylor_is_what_gradients_by_hand_give(absolute: Any) -> None:
    module, space, data = mlp()
    found = Taylor(data, mean_square, absolute)(module, space)["h1"]
    expected = torch.zeros(7, dtype=torch.float64)
    weights = dict(module.named_parameters())
    for x in data:
        change = {n: (g * weights[n]).detach() for n, g in gradients(module, x).items()}
        for u in range(7):
            entries = torch.cat(
                [change["0.weight"][u], change["0.bias"][u : u + 1], change["2.weight"][:, u]]
            )
            expected[u] += entries.abs().sum() if absolute == "entry" else entries.sum().abs()
    torch.testing.assert_close(found, expected / 3, rtol=1e-6, atol=1e-8)


def test_taylor_is_the_effect_of_a_small_step() -> None:
    """Exact where the loss is linear in the weights that go: a unit read linearly."""
    module, space, data = mlp()
    with torch.no_grad():
        module[0].weight[2], module[0].bias[2] = 0.0, 0.3
    module = nn.Sequential(module[0], nn.Identity(), module[2])
    found = Taylor(data[:1], lambda m, x: m(x).mean())(module, space)["h1"]
    # loss = c · (w·x + b) + …: each of the incoming and outgoing slices is the whole effect
    with torch.no_grad():
        hidden = module[0](data[0]).mean(0)
        expected = 2 * (module[2].weight.mean(0) * hidden).abs()
    torch.testing.assert_close(found, expected, **TIGHT)


class Quadratic(nn.Module):
    """Two units; the loss is a quadratic in the weights of the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 5, bias=False), nn.Linear(5, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


def test_the_hessian_is_exact_on_a_quadratic() -> None:
    module = Quadratic().double()
    space = wspace.trace(module, torch.zeros(1, 3, dtype=torch.float64))
    c = torch.rand(5, 3, dtype=torch.float64)
    d = torch.rand(2, 5, dtype=torch.float64) - 0.5  # also curved downwards

    def loss(m: nn.Module, scale: float) -> Tensor:
        a, b = m.a.weight, m.b.weight  # type: ignore[union-attr]
        return scale * ((c * a**2).sum() + (d * b**2).sum() + 3 * a.sum()) / 2

    found = HessianDiagonal([1.0, 3.0], loss, "hutchinson", samples=2)(module, space)["h1"]
    expected = (c * module.a.weight**2).sum(1) + (d * module.b.weight**2).sum(0)  # mean scale 2
    torch.testing.assert_close(found, expected.detach(), **TIGHT)
    fisher = HessianDiagonal([1.0, 3.0], loss, "fisher")(module, space)["h1"]
    by_hand = torch.zeros(5, dtype=torch.float64)
    for scale in (1.0, 3.0):
        a, b = module.a.weight.detach(), module.b.weight.detach()
        by_hand += ((scale * (c * a + 1.5)) ** 2 * a**2).sum(1) / 4
        by_hand += ((scale * d * b) ** 2 * b**2).sum(0) / 4
    torch.testing.assert_close(fisher, by_hand, **TIGHT)


def test_signs_estimate_a_full_hessian() -> None:
    module, space, data = mlp()
    generator = torch.Generator().manual_seed(0)
    found = HessianDiagonal(data[:1], mean_square, "hutchinson", 600, generator)(module, space)
    names = list(dict(module.named_parameters()))
    weights = tuple(x.detach() for x in module.parameters())

    def at(*values: Tensor) -> Tensor:
        return (
            torch.func.functional_call(module, dict(zip(names, values, strict=True)), (data[0],))
            .square()
            .mean()
        )

    blocks = torch.autograd.functional.hessian(at, weights)
    saliency = {}
    for i, (name, w) in enumerate(zip(names, weights, strict=True)):
        h = blocks[i][i].reshape(w.numel(), w.numel()).diagonal().reshape(w.shape)
        saliency[name] = h * w**2 / 2
    expected = saliency["0.weight"].sum(1) + saliency["0.bias"] + saliency["2.weight"].sum(0)
    assert float((found["h1"] - expected).norm() / expected.norm()) < 0.25  # falls as 1/√n
    fisher = HessianDiagonal(data[:1], mean_square)(module, space)["h1"]
    assert float((fisher - expected).norm() / expected.norm()) > 0.5  # control


@pytest.mark.parametrize("statistic", ["mean_abs", "rms"])
def test_activations_are_what_hooks_see(statistic: Any) -> None:
    module, space, data = mlp()
    data.append(torch.randn(11, 3, dtype=torch.float64))  # batches of unequal sizes
    seen: list[Tensor] = []
    hook = module[1].register_forward_hook(lambda m, a, out: seen.append(out.detach()))
    with torch.no_grad():
        for x in data:
            module(x)
    hook.remove()
    every = torch.cat(seen)
    expected = every.abs().mean(0) if statistic == "mean_abs" else every.square().mean(0).sqrt()
    for batches in (data, lambda: [(x, "label") for x in data]):
        found = ActivationNorm(batches, statistic, kinds=("nonlinearity",))(module, space)["h1"]
        torch.testing.assert_close(found, expected, **TIGHT)


@pytest.mark.parametrize("name", FEW)
def test_permuted_networks_have_permuted_scores(name: str, generator: torch.Generator) -> None:
    module, args, kwargs = build(name)
    space = wspace.trace(module, args, kwargs)
    t = wspace.sample(space, generator=generator)
    twin = build(name)[0]
    twin.load_state_dict(wspace.act(t, module.state_dict(), space))
    data: list[Batch] = [(args, kwargs)]
    for importance in (
        Taylor(data, square),
        Taylor(data, square, "entry"),
        HessianDiagonal(data, square),
        ActivationNorm(data, inputs=lambda b: b, otherwise=Magnitude()),
        ActivationNorm(data, "rms", inputs=lambda b: b, otherwise=0.0),
    ):
        one, two = importance(module, space), importance(twin, space)
        assert one.keys() == prunable(space).keys()
        for g, x in moved(one, t, space).items():
            assert x.shape == shape_of(space.groups[g], space) and x.dtype == torch.float64
            scale = float(x.abs().max())
            torch.testing.assert_close(two[g], x, rtol=1e-9, atol=1e-10 * scale)
        assert any(not torch.allclose(two[g], one[g]) for g in one)  # control


def test_what_gradients_say_does_not_depend_on_scales(generator: torch.Generator) -> None:
    """A ReLU network may be rescaled unit by unit: magnitudes change, effects do not."""
    module, args, kwargs = build("mlp")
    space = wspace.trace(module, args, kwargs)
    t = wspace.sample(space, generator=generator, kinds=("scale",))
    twin = build("mlp")[0]
    twin.load_state_dict(wspace.act(t, module.state_dict(), space))
    data: list[Batch] = [(args, kwargs)]
    signs = torch.Generator()
    for importance in (
        Taylor(data, square),
        Taylor(data, square, "entry"),
        HessianDiagonal(data, square),
        HessianDiagonal(data, square, "hutchinson", generator=signs),
    ):
        signs.manual_seed(1)
        one = importance(module, space)
        signs.manual_seed(1)
        two = importance(twin, space)
        for g, x in one.items():
            torch.testing.assert_close(two[g], x, rtol=1e-9, atol=1e-10)
    a, b = Magnitude()(module, space), Magnitude()(twin, space)
    assert all(not torch.allclose(a[g], b[g]) for g in a)  # control


def noisy() -> nn.Module:
    return nn.Sequential(
        nn.Linear(3, 7), nn.BatchNorm1d(7), nn.Dropout(0.5), nn.ReLU(), nn.Linear(7, 2)
    ).double()


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        Taylor,
        HessianDiagonal,
        lambda b, f: HessianDiagonal(b, f, "hutchinson"),
        lambda b, f: ActivationNorm(b),
    ],
)
def test_the_module_is_left_as_it_was(make: Callable[..., Any], fails: bool) -> None:
    module = noisy()
    x = torch.randn(5, 3, dtype=torch.float64)
    space = wspace.trace(module, x)
    module.train()
    module[1].eval()
    module[0].bias.requires_grad_(False)
    module[4].weight.grad = torch.ones_like(module[4].weight)
    state = {n: (v, v.data_ptr(), v.clone()) for n, v in module.state_dict(keep_vars=True).items()}
    modes = [m.training for m in module.modules()]
    drawn, python = torch.get_rng_state(), random.getstate()

    def loss(m: nn.Module, x: Tensor) -> Tensor:
        assert not any(part.training for part in m.modules())
        torch.rand(()), random.random()
        m[1].running_mean.add_(1)  # type: ignore[index]
        if fails:
            raise KeyError("mine")
        return m(x).square().mean()

    def bad() -> Iterator[Tensor]:
        yield x
        if fails:
            raise KeyError("mine")

    importance = make(bad, loss)
    if fails:
        with pytest.raises(KeyError, match="mine"):
            importance(module, space)
    else:
        importance(module, space)
    assert [m.training for m in module.modules()] == modes
    assert torch.equal(torch.get_rng_state(), drawn) and random.getstate() == python
    for n, v in module.state_dict(keep_vars=True).items():
        assert v is state[n][0] and v.data_ptr() == state[n][1] and torch.equal(v, state[n][2])
    frozen = [n for n, p in module.named_parameters() if not p.requires_grad]
    assert frozen == ["0.bias"]
    assert [n for n, p in module.named_parameters() if p.grad is not None] == ["4.weight"]
    assert bool((module[4].weight.grad == 1).all())


def test_frozen_parameters_count() -> None:
    module, space, data = mlp()
    before = Taylor(data, mean_square)(module, space)["h1"]
    module.requires_grad_(False)
    with torch.no_grad():
        after = Taylor(data, mean_square)(module, space)["h1"]
    assert torch.equal(before, after)


def test_sparse_gradients_count_like_dense_ones() -> None:
    ids = torch.tensor([[1, 2, 3]])
    module = nn.Sequential(nn.Embedding(9, 5), nn.Linear(5, 2)).double()
    space = wspace.trace(module, ids)
    for estimate in ("fisher", "hutchinson"):
        scores = []
        for module[0].sparse in (False, True):
            generator = torch.Generator().manual_seed(0)
            scores.append(
                [
                    Taylor([ids], mean_square)(module, space),
                    HessianDiagonal([ids], mean_square, estimate, generator=generator)(
                        module, space
                    ),
                ]
            )
        for dense, sparse in zip(*scores, strict=True):
            assert dense["h1"].any() and torch.equal(dense["h1"], sparse["h1"])


def test_refusals() -> None:
    module, space, data = mlp()
    for importance in (
        Taylor([], mean_square),
        HessianDiagonal(list, mean_square),
        ActivationNorm([]),
    ):
        with pytest.raises(PruneError, match="no batches"):
            importance(module, space)
    with pytest.raises(PruneError, match=r"Taylor: the loss is not one number"):
        Taylor(data, lambda m, x: m(x))(module, space)
    with pytest.raises(PruneError, match="does not depend on any parameter"):
        Taylor(data, lambda m, x: x.sum())(module, space)
    with pytest.raises(PruneError, match="no such absolute"):
        Taylor(data, mean_square, "both")  # type: ignore[arg-type]
    with pytest.raises(PruneError, match="no such estimate"):
        HessianDiagonal(data, mean_square, "exact")  # type: ignore[arg-type]
    with pytest.raises(PruneError, match="no such statistic"):
        ActivationNorm(data, "mean")  # type: ignore[arg-type]
    with pytest.raises(PruneError, match="too few samples"):
        HessianDiagonal(data, mean_square, samples=0)
    with pytest.raises(PruneError, match="not finite"):
        Taylor(data, lambda m, x: m(x).mean() * torch.inf)(module, space)
    with torch.no_grad():
        module[2].weight[0, 0] = torch.nan
    for importance in (Taylor(data, mean_square), HessianDiagonal(data, mean_square)):
        with pytest.raises(PruneError, match=r"2\.weight"):
            importance(module, space)


def test_operators_without_a_second_derivative_are_an_error() -> None:
    module, args, kwargs = build("mobilenet_v3")
    space = wspace.trace(module, args, kwargs)
    with pytest.raises(PruneError, match=r"no second derivative\n.*hardsigmoid"):
        HessianDiagonal([(args, kwargs)], square, "hutchinson")(module, space)


def test_groups_that_no_activation_shows_are_an_error() -> None:
    module, args, kwargs = build("attention_pool")
    space = wspace.trace(module, args, kwargs)
    data: list[Batch] = [(args, kwargs)]
    with pytest.raises(PruneError, match=r"nothing for 'h2'"):
        ActivationNorm(data, inputs=lambda b: b)(module, space)
    found = ActivationNorm(data, inputs=lambda b: b, otherwise=-1.0)(module, space)
    assert bool((found.pop("h2") == -1).all()) and all(bool((x >= 0).all()) for x in found.values())
    weights = Magnitude()(module, space)["h2"]
    found = ActivationNorm(data, inputs=lambda b: b, otherwise=Magnitude())(module, space)
    assert torch.equal(found["h2"], weights)
