"""Convolutions of stacked networks are those of each network; so are gradients of whole modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

from datasets_zoo import architectures
from wspace.testing import assert_close
from wspace.zoo import convolve as engine
from wspace.zoo.convolve import SideBySide, side_by_side
from wspace.zoo.stacked import Stacked
from wspace.zoo.train import cross_entropy, evaluate_many, initial_states

pytestmark = pytest.mark.usefixtures("float64")

N, B = 5, 3
GEOMETRIES: list[dict[str, Any]] = [
    {"kernel": (3, 3), "stride": 2, "padding": 1},
    {"kernel": (3, 3)},
    {"kernel": (1, 1)},
    {"kernel": (1, 1), "stride": (1, 2), "groups": 2},
    {"kernel": (5, 5), "padding": 2},
    {"kernel": (4, 4), "stride": 4},
    {"kernel": (2, 3), "stride": (1, 2), "padding": (0, 3)},
    {"kernel": (3, 2), "padding": (2, 1), "dilation": (2, 3)},
    {"kernel": (3, 3), "stride": 2, "padding": 1, "groups": 2},
    {"kernel": (3, 3), "stride": 3, "padding": 1, "dilation": 2, "groups": 4},
]


def tensors(how: dict[str, Any], generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    inside = 4 // how.get("groups", 1)
    x = torch.randn(N, B, 4, 9, 8, generator=generator)
    w = torch.randn(N, 16, inside, *how["kernel"], generator=generator)
    return x, w, torch.randn(N, 16, generator=generator)


def options(how: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in how.items() if name != "kernel"}


def one(how: dict[str, Any]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """One network, as it stands under `vmap`."""
    with torch.device("meta"):
        module = side_by_side(nn.Conv2d(4, 16, how["kernel"], **options(how)))
    return lambda x, w, b: functional_call(module, {"weight": w, "bias": b}, (x,))


def together(x: Tensor, w: Tensor, b: Tensor, how: dict[str, Any]) -> Tensor:
    return vmap(one(how))(x, w, b)


def alone(x: Tensor, w: Tensor, b: Tensor, how: dict[str, Any]) -> Tensor:
    return torch.stack([F.conv2d(x[i], w[i], b[i], **options(how)) for i in range(N)])


def with_gradients(
    run: Callable[..., Tensor], values: tuple[Tensor, ...], how: dict[str, Any]
) -> list[Tensor]:
    """Answers, and gradients of a function of them whose gradient is not constant."""
    leaves = [v.clone().requires_grad_() for v in values]
    y = run(*leaves, how)
    return [y.detach(), *torch.autograd.grad(y.sin().sum(), leaves)]


@pytest.mark.parametrize("cache", [1, 1 << 14, 1 << 20])  # one network at a time, some, all
@pytest.mark.parametrize("how", GEOMETRIES)
def test_stacked_convolutions_are_those_of_each_network(
    how: dict[str, Any], cache: int, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "CACHE", cache)
    values = tensors(how, generator)
    got, want = with_gradients(together, values, how), with_gradients(alone, values, how)
    for a, b in zip(got, want, strict=True):
        assert_close(a, b)
    values[1][0] += 1e-3  # of one network only
    moved = together(*values, how)
    assert (moved[0] - want[0][0]).abs().max() > 1e-6
    assert_close(moved[1:], want[0][1:])


@pytest.mark.parametrize("how", GEOMETRIES)
def test_in_single_precision_too(how: dict[str, Any], generator: torch.Generator) -> None:
    values = tuple(v.float() for v in tensors(how, generator))
    got, want = with_gradients(together, values, how), with_gradients(alone, values, how)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.float32
        assert float((a - b).abs().max() / b.abs().max()) < 1e-5


def test_another_geometry_is_another_convolution(generator: torch.Generator) -> None:
    """The comparison above would see an exchange of height and width, or a shift."""
    how = {"kernel": (3, 3), "stride": (1, 1), "padding": (2, 1), "dilation": (2, 1)}
    values = tensors(how, generator)
    want = alone(*values, how)
    for other in ({"padding": (1, 2), "dilation": (1, 2)}, {"padding": (1, 1), "dilation": 1}):
        got = together(*values, how | other)
        rows, columns = min(got.shape[3], want.shape[3]), min(got.shape[4], want.shape[4])
        parts = [v[..., :rows, :columns] for v in (got, want)]
        assert (parts[0] - parts[1]).abs().max() > 0.1


@pytest.mark.parametrize("groups", [1, 2])
def test_networks_may_share_images_or_kernels(groups: int, generator: torch.Generator) -> None:
    how = {"kernel": (3, 3), "stride": 2, "padding": 1, "groups": groups}
    x, w, b = tensors(how, generator)

    def run(dims: tuple[int | None, ...]) -> Callable[..., Tensor]:
        def runs(x: Tensor, w: Tensor, b: Tensor, how: dict[str, Any]) -> Tensor:
            return vmap(one(how), in_dims=dims)(x, w, b)

        return runs

    for dims, values in (((None, 0, 0), (x[0], w, b)), ((0, None, None), (x, w[0], b[0]))):

        def want(x: Tensor, w: Tensor, b: Tensor, how: dict[str, Any], dims: Any = dims) -> Tensor:
            parts = zip((x, w, b), dims, strict=True)
            x, w, b = (v.expand(N, *v.shape) if d is None else v for v, d in parts)
            return alone(x, w, b, how)

        pairs = zip(
            with_gradients(run(dims), values, how), with_gradients(want, values, how), strict=True
        )
        for a, c in pairs:
            assert_close(a, c)


def test_one_image_is_a_batch_of_one(generator: torch.Generator) -> None:
    x, w, b = tensors(GEOMETRIES[0], generator)
    assert_close(together(x[:, 0], w, b, GEOMETRIES[0]), alone(x, w, b, GEOMETRIES[0])[:, 0])


@pytest.mark.parametrize(
    ("options", "here"),
    [
        ({}, True),
        ({"groups": 2}, True),
        ({"groups": 8}, False),  # narrow groups are PyTorch's
        ({"padding": "same"}, False),
        ({"padding": 1, "padding_mode": "circular"}, False),
    ],
)
def test_which_convolutions_are_run_here(options: dict[str, Any], here: bool) -> None:  # noqa: FBT001
    class Other(nn.Conv2d):
        pass

    module = nn.Sequential(nn.ReLU(), nn.ModuleList([nn.Conv2d(8, 16, 3, **options)]))
    made = side_by_side(module)
    kinds = [type(child) for child in made.modules()]
    assert (SideBySide in kinds) == here and (nn.Conv2d in kinds) != here
    assert [n for n, _ in made.named_parameters()] == [n for n, _ in module.named_parameters()]
    assert not any(isinstance(child, SideBySide) for child in module.modules())
    other = Other(8, 16, 3)
    assert side_by_side(other) is other


# ------------------------------------------------------------------------- whole modules

FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: architectures.mlp(3 * 64, [7, 5], activation="gelu"),
    "cnn": lambda: architectures.cnn(3, [6, 8], kernel=5),
    "tanh": lambda: architectures.cnn(3, [6, 8], activation="tanh"),
    "batch_norm": lambda: architectures.cnn(3, [6, 5], norm=True, activation="leaky_relu"),
    "residual": lambda: architectures.residual(3, 6, 2),
    "depthwise": lambda: architectures.depthwise(3, 6, 1, activation="silu"),
    "vit": lambda: architectures.vit(3, 8, width=8, blocks=1),
    "tokens": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 2, 2),
        nn.Flatten(2),
        nn.Linear(16, 5),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(20, 10),
    ),
    "padded": lambda: nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3, padding="same", padding_mode="circular"), nn.MaxPool2d(2)),
        nn.ELU(),
        nn.Flatten(),
        nn.Linear(64, 10, bias=False),
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_stacks_are_those_of_each_network(
    family: str, generator: torch.Generator
) -> None:
    make = FAMILIES[family]
    state = initial_states(make, N, generator)
    x = torch.randn(N, B + 1, 3, 8, 8, generator=generator)
    y = torch.randint(10, (N, B + 1), generator=generator)
    module = make().train()
    names = [name for name, _ in module.named_parameters()]
    stack = {name: v.clone() for name, v in state.items()}
    losses, slopes = Stacked(module).gradient(stack, x, lambda out: cross_entropy(out, y))
    assert set(slopes) == set(names)
    for i in range(N):
        own = {name: v[i].clone() for name, v in state.items()}
        leaves = {name: own[name].requires_grad_() for name in names}
        loss = F.cross_entropy(functional_call(module, own, (x[i],)), y[i])
        assert_close(losses[i], loss.detach())
        for name, g in zip(names, torch.autograd.grad(loss, list(leaves.values())), strict=True):
            assert_close(slopes[name][i], g)
        for name in state:  # buffers as this network's own batch has changed them
            assert_close(stack[name][i], own[name].detach())
        assert (slopes[names[0]][i] - slopes[names[0]][i - 1]).abs().max() > 1e-6
    module.eval()
    shared = Stacked(module, shared=True)(state, x[0])
    for i in range(N):
        own = {name: v[i] for name, v in state.items()}
        assert_close(shared[i].detach(), functional_call(module, own, (x[0],)).detach())


def test_evaluation_does_not_depend_on_how_many_inputs_run_at_once(
    generator: torch.Generator,
) -> None:
    x = torch.randn(B, 3, 8, 8, generator=generator)
    make = FAMILIES["batch_norm"]
    state = initial_states(make, N, generator)

    def answers(module: nn.Module, some: int | None) -> Tensor:
        return evaluate_many(module, state, x, lambda out: out.sum(1), inputs_at_once=some)

    assert_close(answers(make().eval(), 2), answers(make().eval(), None))
    parts, whole = answers(make().train(), 2), answers(make().train(), None)
    assert (parts - whole).abs().max() > 1e-3  # statistics of the batch: not each by itself
