"""Initialisation: the rules by arithmetic, what heads make of them, and how activations fare."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import weight_norm

from wspace.errors import HyperError
from wspace.hyper import (
    ChunkedHead,
    ComponentHead,
    FiLMHead,
    FullHead,
    Head,
    HyperNetwork,
    LowRankHead,
    MaskHead,
    PerTensorHead,
    RecurrentHead,
    TaskEmbedding,
    TiledHead,
    Weight,
    activation_variance,
    initialize,
)
from wspace.hyper.initialize import (
    RESIDUAL,
    Scheme,
    centre,
    hyperfan_harmonic,
    hyperfan_in,
    hyperfan_out,
    variances,
)
from wspace.space import Role
from wspace.testing import assert_close, assert_same

pytestmark = pytest.mark.usefixtures("float64")

OWN: dict[str, Callable[[], Head]] = {
    "full": FullHead,
    "linear": lambda: FullHead([]),
    "tensor": PerTensorHead,
    "own": lambda: PerTensorHead(own=[50]),
    "low": lambda: LowRankHead(16),
}
SHARED: dict[str, Callable[[], Head]] = {
    "chunk": lambda: ChunkedHead(1000),
    "recurrent": lambda: RecurrentHead(1000, 128),
    "shape": ComponentHead,
    "role": lambda: ComponentHead(by="role"),
    "row": lambda: ComponentHead([200], embedding=64, by="row"),
}
CHANGES: dict[str, Callable[[], Head]] = {
    "film": FiLMHead,
    "mask": MaskHead,
    "hard": lambda: MaskHead(hard=True),
    "unit": lambda: MaskHead(by="unit"),
}
HEADS = OWN | SHARED | CHANGES
STEADY: dict[str, Callable[[], Head]] = {
    "full": lambda: FullHead(steady=True),
    "tensor": lambda: PerTensorHead(steady=True),
    "own": lambda: PerTensorHead(own=[50], steady=True),
    "low": lambda: LowRankHead(16, steady=True),
}
ONE_FACTOR = ("recurrent", "row")
"""Heads in which one random factor, that of a map that all layers share, returns in every layer.

Under the fan-out rule square layers have no bias, and under the harmonic one a smaller one, so that
six layers multiply it by itself: its mean is then far above 1 (a factor of deviation 0.3 has a
sixth power of mean 3.8). The biases of the fan-in rule hold it in check."""
SCHEMES: tuple[Scheme, ...] = (
    "hyperfan_in",
    "hyperfan_out",
    "hyperfan_harmonic",
    "residual",
    "bias",
)


def mlp(width: int = 64, depth: int = 6, inputs: int = 30) -> nn.Sequential:
    """Layers with rectified answers; weights as He et al., for those that are kept."""
    sizes = [inputs, *[width] * depth]
    layers: list[nn.Module] = []
    for n, m in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(n, m), nn.ReLU()]
    return as_he(nn.Sequential(*layers))


def convolutions(width: int = 32, depth: int = 6, inputs: int = 3) -> nn.Sequential:
    sizes = [inputs, *[width] * depth]
    layers: list[nn.Module] = []
    for n, m in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Conv2d(n, m, 3, padding=1, padding_mode="circular"), nn.ReLU()]
    return as_he(nn.Sequential(*layers))


def as_he(net: nn.Sequential) -> nn.Sequential:
    for m in net:
        if isinstance(m, nn.Linear | nn.Conv2d):
            nn.init.kaiming_normal_(m.weight)
            nn.init.zeros_(m.bias)
    return net


def ratios(
    net: Callable[[], nn.Sequential],
    head: Callable[[], Head],
    scheme: Scheme,
    x: Tensor,
    seeds: int,
    **options: Any,
) -> Tensor:
    """Second moment behind every rectifier over that of the inputs, mean over seeds and tasks."""
    found: list[Tensor] = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        made = head()
        kept = scheme in {"residual", "bias"} or made.needs_base
        condition = options.get("condition", TaskEmbedding(8, 32))
        cond = None if condition is None else torch.arange(8)
        hyper = HyperNetwork(net(), condition, made, "frozen" if kept else None, init=scheme,
                             select=options.get("select", "*"))  # fmt: skip
        seen = activation_variance(hyper, cond, x)
        layers = [v for n, v in seen.items() if isinstance(hyper.target.get_submodule(n), nn.ReLU)]
        found.append(torch.stack(layers).reshape(len(layers), -1).mean(1) / x.square().mean())
    every = torch.stack(found)
    return every.log().mean(0).exp() if options.get("geometric") else every.mean(0)


# --------------------------------------------------------------------------- the rules


def test_rules_by_hand() -> None:
    w = Weight("w", (20, 30), Role.MATRIX, 30, 20, bias=True)
    b = replace(w, name="b", shape=(20,), role=Role.SHIFT)
    assert (hyperfan_in(w), hyperfan_in(b)) == (1 / 30, 1.0)
    assert hyperfan_in(replace(w, bias=False)) == 2 / 30
    assert (hyperfan_out(w), hyperfan_out(b)) == (2 / 20, 0.0)
    assert hyperfan_out(replace(b, fan_in=20, fan_out=30)) == pytest.approx(2 / 3)
    assert hyperfan_harmonic(w) == pytest.approx(2 / (30 + 10))
    assert hyperfan_harmonic(b) == pytest.approx(2 - 30 * 2 / 40)
    alone = replace(w, bias=False)
    assert hyperfan_harmonic(alone) == pytest.approx(4 / (30 + 20))  # Glorot and Bengio, times 2


@pytest.mark.parametrize("rule", [hyperfan_in, hyperfan_out, hyperfan_harmonic])
@pytest.mark.parametrize(("fan_in", "fan_out"), [(30, 30), (20, 70), (40, 41)])
def test_rules_keep_the_second_moment(
    rule: Callable[[Weight], float], fan_in: int, fan_out: int
) -> None:
    """Inputs of moment 1 give fan_in var_w + var_b = 2 before, and 1 behind, a rectifier."""
    w = Weight("w", (fan_out, fan_in), Role.MATRIX, fan_in, fan_out, bias=True)
    b = replace(w, role=Role.SHIFT)
    assert fan_in * rule(w) + rule(b) == pytest.approx(2)


def test_fan_out_grows_where_layers_narrow() -> None:
    """No bias can take away what a narrowing layer adds: fan_in / fan_out, by arithmetic."""
    w = Weight("w", (20, 60), Role.MATRIX, 60, 20, bias=True)
    b = replace(w, role=Role.SHIFT)
    assert (60 * hyperfan_out(w) + hyperfan_out(b)) / 2 == pytest.approx(60 / 20)
    assert (60 * hyperfan_harmonic(w) + hyperfan_harmonic(b)) / 2 == pytest.approx(1)
    alone = replace(w, bias=False)
    assert 60 * hyperfan_harmonic(alone) / 2 == pytest.approx(2 * 60 / (60 + 20))


def test_moments_of_every_role() -> None:
    matrix = Weight("w", (4, 5), Role.MATRIX, 5, 4)
    every = [matrix, replace(matrix, name="t", role=Role.TABLE),
             Weight("s", (4,), Role.SCALE), Weight("b", (4,), Role.SHIFT),
             Weight("c", (4,), Role.SHIFT, 1, 4),  # of a layer with one input
             Weight("l", (4, 1), Role.SCALE, 5, 4, spans=5),
             Weight("o", (4, 5), Role.OTHER, 5, 4), Weight("p", (4,), Role.OTHER)]  # fmt: skip
    small = 1e-4
    expected = {
        "w": 0.4,
        "t": 1.0,
        "s": small,
        "b": small,
        "c": 1.0,
        "l": small,
        "o": 0.4,
        "p": small,
    }
    assert variances(every, "hyperfan_in") == pytest.approx(expected)
    tenth = {n: x * RESIDUAL**2 for n, x in expected.items()}
    assert variances(every, "residual") == pytest.approx(tenth)
    assert [centre(w) for w in every] == pytest.approx([0, 0, 1, 0, 0, 2**0.5, 0, 0])


def test_unknown_scheme() -> None:
    head = FullHead()
    head.bind([Weight("w", (2, 3))], 4)
    with pytest.raises(HyperError, match="unknown init 'he'"):
        initialize(head, "he")  # pyright: ignore
    before = head.last.weight.clone()
    initialize(head, "default")
    assert_same(before, head.last.weight)
    assert set(SCHEMES) | {"default"} == set(get_args(Scheme))


# --------------------------------------------------------------- what heads make of them


@pytest.mark.parametrize("name", OWN | SHARED)
def test_generated_variances(name: str) -> None:
    """Each tensor within 5 % of the rule where rows are its own, within 12 % where shared."""
    found: list[list[Tensor]] = []
    for seed in range(4):
        torch.manual_seed(seed)
        hyper = HyperNetwork(mlp(depth=3), TaskEmbedding(32, 32), HEADS[name]())
        wanted = variances(hyper.weights, "hyperfan_in")
        made = hyper.generate(torch.arange(32))
        matrices = [w.name for w in hyper.weights if len(w.shape) == 2]
        found.append([made[n].detach().square().mean() / wanted[n] for n in matrices])
    error = (torch.tensor(found).mean(0) - 1).abs().max()
    assert error < (0.05 if name in OWN else 0.12)


def test_variances_of_tiles() -> None:
    select = ["2.weight", "4.weight", "6.weight"]
    hyper = HyperNetwork(convolutions(), None, TiledHead(64), select=select)
    wanted = variances(hyper.weights, "hyperfan_in")
    made = hyper.generate()
    assert (
        max(abs(float(x.detach().square().mean()) / wanted[n] - 1) for n, x in made.items()) < 0.12
    )


def test_default_is_far_from_the_rule() -> None:
    """The control: without a scheme, a chunk has moment 1, and not 1 / fan-in."""
    hyper = HyperNetwork(mlp(depth=3), TaskEmbedding(8, 32), ChunkedHead(1000), init="default")
    made = hyper.generate(torch.arange(8))["2.weight"].detach()
    assert float(made.square().mean()) > 10 * 2 / 64


def test_film_begins_at_a_tenth() -> None:
    hyper = HyperNetwork(mlp(), TaskEmbedding(64, 32), FiLMHead(), "frozen")
    gamma = torch.cat([x.flatten(1) for x in hyper.head.made(hyper.embed(torch.arange(64)))], -1)
    assert abs(float(gamma.detach().square().mean()) / 0.01 - 1) < 0.1


# -------------------------------------------------------------------- activations


@pytest.mark.parametrize("name", HEADS)
def test_activations_keep_their_size(name: str) -> None:
    """[0.5, 2] behind each of six rectified layers: geometric mean over 3 heads, 8 networks each.

    The slow tests take the mean, which is what the rules set, over more heads and wider networks.
    """
    x = torch.randn(16, 30)
    for scheme in ("hyperfan_in", "residual"):
        found = ratios(lambda: mlp(40), HEADS[name], scheme, x, 3, geometric=True)
        assert found.min() > 0.5 and found.max() < 2, (scheme, found)


@pytest.mark.slow
@pytest.mark.parametrize("net", [mlp, convolutions])
@pytest.mark.parametrize("name", HEADS)
def test_activations_keep_their_size_under_every_rule(
    name: str, net: Callable[[], nn.Sequential]
) -> None:
    x = torch.randn(32, 30) if net is mlp else torch.randn(4, 3, 6, 6)
    for scheme in SCHEMES:
        strict = scheme in {"hyperfan_out", "hyperfan_harmonic"}  # biases small, or none
        if strict and name in ONE_FACTOR:
            continue
        head = (STEADY if strict else HEADS).get(name, HEADS[name])
        found = ratios(net, head, scheme, x, 16 if net is mlp else 8)
        assert found.min() > 0.5 and found.max() < 2, (scheme, found)


def test_steady_heads_give_all_conditions_one_size() -> None:
    cond, sizes = torch.arange(32), []
    for steady in (True, False):
        hyper = HyperNetwork(mlp(depth=2), TaskEmbedding(32, 8), FullHead(steady=steady))
        made = hyper.generate(cond)["2.weight"].detach()
        sizes.append(made.square().mean((1, 2)) * 64)
    assert (sizes[0] - 1).abs().max() < 0.1
    assert (sizes[1] - 1).abs().max() > 0.2  # the control


@pytest.mark.parametrize("scheme", ["hyperfan_in", "residual", "bias"])
def test_activations_keep_their_size_behind_tiles(scheme: Scheme) -> None:
    def kernels(_: str, owner: nn.Module, p: Tensor) -> bool:
        return p.dim() == 4 and p.shape[1] > 3

    found = ratios(convolutions, TiledHead, scheme, torch.randn(4, 3, 6, 6), 4,
                   condition=None, select=kernels)  # fmt: skip
    assert found.min() > 0.5 and found.max() < 2, found


def test_activations_explode_by_default() -> None:
    """The control, as in hypernetworks that nobody initialised."""
    found = ratios(mlp, lambda: ChunkedHead(1000), "default", torch.randn(16, 30), 1)
    assert found.max() > 1e3


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "weight norm": lambda: weight_norm(nn.Linear(48, 48)),
    "weight norm without bias": lambda: weight_norm(nn.Linear(48, 48, bias=False)),
    "of columns": lambda: weight_norm(nn.Linear(48, 48), dim=1),
    "of convolutions": lambda: weight_norm(nn.Conv1d(48, 48, 3, padding=1)),
    "grouped": lambda: nn.Conv1d(48, 48, 3, padding=1, groups=3),
    "transposed": lambda: nn.ConvTranspose1d(48, 48, 4, stride=2, padding=1),
    "transposed, grouped": lambda: nn.ConvTranspose1d(48, 48, 4, stride=2, padding=1, groups=3),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_of_every_kind_keep_their_size(kind: str) -> None:
    def net() -> nn.Sequential:
        return nn.Sequential(*[m for _ in range(4) for m in (LAYERS[kind](), nn.ReLU())])

    x = torch.randn(4, 48) if kind in list(LAYERS)[:3] else torch.randn(2, 48, 6)
    found = ratios(net, lambda: FullHead([30]), "hyperfan_in", x, 4)
    assert found.min() > 0.5 and found.max() < 2, found


def test_activation_variance_is_what_a_module_says() -> None:
    net = nn.Sequential(
        nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 2)
    )
    net[4] = net[4]
    hyper = HyperNetwork(net, TaskEmbedding(3, 4), FullHead([5]))
    x, cond = torch.randn(7, 3), torch.tensor([2, 0])
    buffers = {n: b.clone() for n, b in hyper.target.named_buffers() if b.isfinite().all()}
    seen = activation_variance(hyper, cond, x)
    assert list(seen) == ["0", "1", "2", "3", "4"] and seen["0"].shape == (2,)
    for i in range(2):
        state = {n: v[i].detach() for n, v in hyper.generate(cond).items()}
        out = functional_call(net, state, (x,))
        assert_close(out.square().mean(), seen["4"][i])
        first = nn.functional.linear(x, state["0.weight"], state["0.bias"])
        assert_close(first.square().mean(), seen["0"][i])
    for n, b in buffers.items():
        assert_same(b, hyper.target.get_buffer(n))
    assert not any(m._forward_hooks for m in hyper.target.modules())
    assert activation_variance(hyper, 2, x)["4"].shape == ()
    assert_close(seen["4"][0], activation_variance(hyper, 2, x)["4"])
    with pytest.raises(RuntimeError):
        activation_variance(hyper, cond, torch.randn(7, 4))
    assert not any(m._forward_hooks for m in hyper.target.modules())


def test_attention_and_parametrised_layers_are_looked_at() -> None:
    layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))
    target = nn.Sequential(layer, normed)
    hyper = HyperNetwork(target, TaskEmbedding(3, 4), FullHead([16]))
    before = torch.get_rng_state()
    found = activation_variance(hyper, torch.tensor([0, 2]), torch.randn(5, 3, 6))
    assert {"0.self_attn", "0.linear1", "1"} <= set(found)
    assert not any("parametrizations" in name for name in found)
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    torch.randn(5, 3, 6)
    assert torch.equal(torch.get_rng_state(), after)  # dropout drew nothing that stayed drawn


def test_a_silent_head_cannot_be_scaled() -> None:
    target = nn.Linear(6, 4)
    hyper = HyperNetwork(target, TaskEmbedding(3, 4), ChunkedHead(9), "frozen", init="bias")
    with pytest.raises(HyperError, match="ChunkedHead makes nothing to be scaled"):
        initialize(hyper.head, "residual")


def test_a_base_is_changed_by_little_unless_asked() -> None:
    target = nn.Linear(60, 40)
    made = HyperNetwork(target, TaskEmbedding(3, 4), FullHead([64]), "frozen")
    change = made.cache(torch.arange(3))["weight"] - target.weight.detach()
    assert float(change.std()) == pytest.approx(0.1 * (1 / 60) ** 0.5, rel=0.2)
