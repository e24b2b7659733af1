"""Laws of the graph metanets: equivariance, streaming, sensitivity, learnability, initial scale."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import cases
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

import wspace
from wspace.errors import SpaceMismatch
from wspace.nn import GraphMetanet, NeuralGraphGNN, NeuralGraphTransformer, Probes, ScaleGMN
from wspace.nn.gauge_types import gauge_types
from wspace.nn.metanet import Head, Metanet

pytestmark = pytest.mark.usefixtures("float64")

Maker = Callable[..., Metanet]
MODELS: dict[str, Maker] = {
    "gmn": GraphMetanet,
    "gnn": NeuralGraphGNN,
    "transformer": lambda *a, **k: NeuralGraphTransformer(*a, heads=2, **k),
    "scale": ScaleGMN,
    "scale_forward": lambda *a, **k: ScaleGMN(*a, bidirectional=False, **k),
}
ARCHITECTURES = (
    "mlp", "siren", "mlp_layernorm_tanh", "vgg", "mobilenet_v3", "shufflenet_v2", "lstm",
    "encoder_pre_norm", "attention_gqa", "moe_top2", "autoencoder_tied", "grouped_se",
)  # fmt: skip
MORE = (
    "gpt2", "llama", "mixtral", "t5", "vit", "swin", "resnet18", "unet", "pixel_shuffle",
    "bilinear",
    "depth_multiplier", "dynamic_conv", "lora_mlp", "mamba", "densenet", "conv3d", "timesformer",
)  # fmt: skip


@lru_cache(maxsize=64)
def network(name: str) -> tuple[wspace.WeightSpace, Mapping[str, Tensor]]:
    """A space and a random state of it, of the usual size and with no constant tensor."""
    module, args, kwargs = cases.build(name)
    space = wspace.trace(module, args, kwargs)
    return space, state_of(space, seed=0)


def state_of(
    space: wspace.WeightSpace, seed: int, batch: tuple[int, ...] = ()
) -> dict[str, Tensor]:
    """A random state, its matrices over the root of their fan-in."""
    draw = torch.Generator().manual_seed(seed)
    out: dict[str, Tensor] = {}
    for p in space.params:
        fan = max(1, p.numel // max(p.shape, default=1))
        x = torch.randn(*batch, *p.shape, generator=draw, dtype=torch.float64) / fan**0.5
        if p.name.endswith("running_var"):
            x = x.abs() + 0.1
        out.update(dict.fromkeys((p.name, *p.ties), x))
    return out


def graph_of(name: str) -> wspace.ParameterGraph:
    return wspace.encode(*network(name))


def moved(name: str, generator: torch.Generator, *, gauges: bool) -> wspace.Transform:
    """A random element; scales log-uniform in [1e-3, 1e3], of the gauges that ScaleGMN serves."""
    space, _ = network(name)
    kinds = ("permutation", "scale", "sign") if gauges else ("permutation",)
    t = wspace.sample(space, generator=generator, kinds=kinds)
    factors = {}
    for i, f in t.factors.items():
        if i in gauge_types(space).served:
            u = torch.rand(f.shape, generator=generator, dtype=torch.float64)
            factors[i] = 10 ** (6 * u - 3) if space.gauges[i].kind == "scale" else f
    return dataclasses.replace(t, factors=factors)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> bool:
    return float((a - b).detach().abs().max()) <= tolerance * float(a.detach().abs().max())


def sorted_rows(x: Tensor) -> Tensor:
    return x.sort(-2).values


def assert_moves_along(net: Metanet, name: str, t: wspace.Transform) -> None:
    """L5 or L6, as the head has it."""
    graph = graph_of(name)
    before, after = net(graph), net(graph.act(t))
    if net.kind == "graph":
        assert close(before, after)
    elif net.kind == "neuron":
        assert set(before) == set(after)
        assert all(close(sorted_rows(before[n]), sorted_rows(after[n]), 1e-9) for n in before)
    else:
        want = wspace.act(t, before, graph.space)
        for key, x in want.items():
            wspace.testing.assert_close({key: x.detach()}, {key: after[key].detach()})


@pytest.mark.parametrize("head", ["graph", "neuron", "parameter"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equivariant(model: str, name: str, head: Any, generator: torch.Generator) -> None:
    net = MODELS[model](3, channels=8, layers=2, head=head)
    assert_moves_along(net, name, moved(name, generator, gauges=model.startswith("scale")))


@pytest.mark.slow
@pytest.mark.parametrize("head", ["graph", "neuron", "parameter"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", MORE)
def test_equivariant_more(model: str, name: str, head: Any, generator: torch.Generator) -> None:
    net = MODELS[model](3, channels=8, layers=2, head=head)
    assert_moves_along(net, name, moved(name, generator, gauges=model.startswith("scale")))


@pytest.mark.parametrize("model", ["gmn", "scale"])
def test_the_neuron_head_moves_units_as_the_state(model: str, generator: torch.Generator) -> None:
    name = "mlp"
    space, _ = network(name)
    t = moved(name, generator, gauges=False)
    net, graph = MODELS[model](3, channels=8, layers=2, head="neuron"), graph_of(name)
    before, after = net(graph), net(graph.act(t))
    for n, nodes in enumerate(space.wiring.nodes):
        p = t.permutations.get(nodes.groups[0]) if nodes.groups else None
        assert close(before[n] if p is None else before[n][p], after[n])


@pytest.mark.parametrize("model", ["gmn", "gnn", "transformer"])
def test_others_do_not_respect_scale(model: str, generator: torch.Generator) -> None:
    """Negative control: the scale test can fail."""
    net, graph = MODELS[model](3, channels=8, layers=2), graph_of("mlp")
    t = moved("mlp", generator, gauges=True)
    assert not close(net(graph), net(graph.act(t)), 1e-3)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("name", ["mlp", "siren", "vgg"])
def test_scale_with_zeros_in_the_weights(
    name: str, bidirectional: bool, generator: torch.Generator
) -> None:
    space, state = network(name)
    zeroed = {k: torch.where(x.abs() < x.abs().median(), 0.0, x) for k, x in state.items()}
    first = next(iter(zeroed))
    zeroed[first] = torch.cat([torch.zeros_like(zeroed[first][:2]), zeroed[first][2:]])
    net = ScaleGMN(3, channels=8, layers=3, bidirectional=bidirectional)
    graph = wspace.encode(space, zeroed)
    t = moved(name, generator, gauges=True)
    assert close(net(graph), net(graph.act(t)))
    leaf = {k: x.clone().requires_grad_() for k, x in zeroed.items()}
    net(wspace.encode(space, leaf)).sum().backward()
    assert all(x.grad is not None and bool(x.grad.isfinite().all()) for x in leaf.values())


def test_what_scale_gmn_ignores_is_said() -> None:
    space, _ = network("siren")
    assert {space.gauges[i].kind for i in ScaleGMN.ignored(space)} == {"phase"}
    assert ScaleGMN.ignored(network("mlp")[0]) == ()


# ------------------------------------------------------------------------ sensitivity


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", ["mlp", "vgg", "attention_gqa"])
def test_uncoupled_axes_matter(model: str, name: str, generator: torch.Generator) -> None:
    """Permuting one axis of one tensor alone is no symmetry, and the answer changes."""
    space, state = network(name)
    net = MODELS[model](3, channels=16, layers=3)
    want = net(wspace.encode(space, state))
    for p in space.params:
        for d, n in enumerate(p.shape):
            if n < 2 or "num_batches" in p.name:
                continue
            other = dict(state)
            turn = torch.roll(state[p.name], 1, d)
            other.update(dict.fromkeys((p.name, *p.ties), turn))
            assert not close(want, net(wspace.encode(space, other)), 1e-9), (p.name, d)


@pytest.mark.parametrize("model", MODELS)
def test_query_and_key_are_told_from_value(model: str) -> None:
    space, state = network("attention_unbind")
    name = next(p.name for p in space.params if "qkv" in p.name and len(p.axes) == 2)
    q, k, v = state[name].chunk(3)
    net = MODELS[model](3, channels=16, layers=3)
    want = net(wspace.encode(space, state))
    other = net(wspace.encode(space, {**state, name: torch.cat([v, k, q])}))
    assert not close(want, other, 1e-9)


def test_wiring_alone_matters() -> None:
    """Equal shapes and values, another activation."""

    def graph(act: nn.Module) -> wspace.ParameterGraph:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 5), act, nn.Linear(5, 2))
        return wspace.encode(wspace.trace(net, torch.zeros(1, 3)), net.state_dict())

    net = GraphMetanet(3, channels=16, layers=2)
    assert not close(net(graph(nn.ReLU())), net(graph(nn.GELU())), 1e-6)


# -------------------------------------------------------------- streaming and batches


@pytest.mark.parametrize("head", ["graph", "parameter"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", ["mlp", "mobilenet_v3", "attention_gqa"])
def test_streamed_is_unstreamed(model: str, name: str, head: Any) -> None:
    """Values and gradients, for parameters of the metanet and for the weights it reads."""
    space, state = network(name)
    net = MODELS[model](3, channels=8, layers=3, head=head)
    results = []
    for stream, chunk in ((False, 1 << 40), (True, 53), (True, 1 << 40), (False, 53)):
        net.stream, net.chunk = stream, chunk
        leaf = {k: x.clone().requires_grad_() for k, x in state.items()}
        for p in space.params:
            leaf.update(dict.fromkeys(p.ties, leaf[p.name]))
        out = net(wspace.encode(space, leaf))
        values = [out] if head == "graph" else [out[p.name] for p in space.params]
        total = sum((v * torch.linspace(-1, 1, v.numel()).view_as(v)).sum() for v in values)
        inputs = [*net.parameters(), *(leaf[p.name] for p in space.params)]
        grads = torch.autograd.grad(total, inputs, allow_unused=True)
        results.append([*(v.detach() for v in values), *(g for g in grads if g is not None)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            peak = max(float(x.abs().max()) for x in results[0])
            assert float((a - b).abs().max()) <= 1e-10 * peak


@pytest.mark.parametrize("model", MODELS)
def test_rows_of_a_batch_do_not_see_one_another(model: str) -> None:
    space, _ = network("mlp")
    net = MODELS[model](3, channels=8, layers=2)
    many = state_of(space, 1, (2, 3))
    whole = net(wspace.encode(space, many))
    assert whole.shape == (2, 3, 3)
    one = net(wspace.encode(space, {k: x[1, 2] for k, x in many.items()}))
    assert close(whole[1, 2], one)


@pytest.mark.parametrize("model", MODELS)
def test_mixed_architectures(model: str) -> None:
    net = MODELS[model](3, channels=8, layers=2)
    space, _ = network("mlp")
    pair = wspace.encode(space, state_of(space, 1, (2,)))
    graphs = [graph_of("vgg"), pair, graph_of("siren"), graph_of("mlp")]
    rows = net(graphs)
    assert rows.shape == (5, 3)
    assert close(rows[0], net(graphs[0]))
    assert close(rows[1:3], net(pair))
    assert close(rows[4], net(graphs[3]))


def test_mixed_architectures_with_other_heads() -> None:
    space, state = network("vgg")
    count = torch.tensor(7)  # what the space does not know comes back as it was
    graphs = [wspace.encode(space, {**state, "1.num_batches_tracked": count}), graph_of("mlp")]
    heads: tuple[Head, ...] = ("neuron", "parameter")
    for head in heads:
        net = GraphMetanet(3, channels=8, layers=2, head=head)
        for one, graph in zip(net(graphs), graphs, strict=True):
            alone = net(graph)
            assert alone.keys() == one.keys()
            assert all(close(alone[k].double(), one[k].double()) for k in alone)


# ---------------------------------------------------------------------------- training


@pytest.mark.parametrize("head", ["graph", "neuron", "parameter"])
@pytest.mark.parametrize("model", MODELS)
def test_every_parameter_gets_a_gradient(model: str, head: Any) -> None:
    """On networks with norms, structural connections, and ends of all types."""
    net = MODELS[model](3, channels=8, layers=2, head=head)
    for name in ("encoder_pre_norm", "mobilenet_v3"):
        out = net(graph_of(name))
        values = [out] if head == "graph" else list(out.values())
        total = sum((v * torch.linspace(-1, 1, v.numel()).view_as(v)).sum() for v in values)
        assert isinstance(total, Tensor)
        total.backward()
    idle = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


@pytest.mark.parametrize("model", MODELS)
def test_the_identity_can_be_learned(model: str) -> None:
    """With no help from the residual path: its gain starts at 0, and training finds 1."""
    space, _ = network("mlp_layernorm_tanh")
    net = MODELS[model](channels=8, layers=1, head="parameter")
    head: Any = net.head
    gain = getattr(head, "plain", head).gain
    with torch.no_grad():
        gain.zero_()
    state = state_of(space, 3, (4,))
    graph = wspace.encode(space, state)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    losses = []
    for _ in range(150):
        out = net(graph)
        loss = sum(((out[k] - x) ** 2).sum() for k, x in state.items()) / sum(
            (x**2).sum() for x in state.values()
        )
        assert isinstance(loss, Tensor)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.5
    assert losses[-1] < 2e-2


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layers", [1, 3, 6])
def test_outputs_start_with_unit_variance(model: str, layers: int) -> None:
    for width in (2, 32, 512) if layers == 3 else (2, 64):
        net = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        space = wspace.trace(net, torch.zeros(1, width))
        variance = []
        for seed in range(3):
            torch.manual_seed(seed)
            model_ = MODELS[model](64, channels=16, layers=layers)
            with torch.no_grad():
                variance.append(model_(wspace.encode(space, state_of(space, seed))).var().item())
        assert 0.3 < sum(variance) / 3 < 3, (width, variance)


def test_dropout_rests_in_evaluation() -> None:
    net, graph = GraphMetanet(3, channels=8, layers=2, dropout=0.5), graph_of("mlp")
    assert not close(net(graph), net(graph), 1e-6)
    net.eval()
    assert torch.equal(net(graph), net(graph))


# ------------------------------------------------------------------ other ways to run


@pytest.mark.parametrize("model", MODELS)
def test_vmap_and_functional_call(model: str) -> None:
    space, _ = network("mlp")
    net = MODELS[model](3, channels=8, layers=2)
    many = state_of(space, 1, (3,))
    weights = dict(net.named_parameters())

    def run(state: Mapping[str, Tensor]) -> Tensor:
        return functional_call(net, weights, (wspace.encode(space, state),))

    assert close(net(wspace.encode(space, many)), vmap(run)(many))


@pytest.mark.parametrize("model", MODELS)
def test_autocast(model: str) -> None:
    space, _ = network("mlp")
    net = MODELS[model](3, channels=16, layers=2).float()
    graph = wspace.encode(space, {k: x.float() for k, x in state_of(space, 1, (3,)).items()})
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = net(graph)
    full = net(graph)
    assert half.isfinite().all()
    assert float((half - full).detach().abs().max() / full.detach().abs().max()) < 0.2
    with torch.autocast("cpu", torch.bfloat16):
        net(graph).float().sum().backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in net.parameters())


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", ["mlp", "vgg"])
def test_probes(model: str, name: str, generator: torch.Generator) -> None:
    """Activations move, scale and change sign with their units, so the answer stays."""
    module, args, _ = cases.build(name)
    space, _ = network(name)
    probes = Probes(module, space, count=4, example=args[0][:1], generator=generator)
    net = MODELS[model](3, channels=8, layers=2, probes=probes).eval()
    graph = graph_of(name)
    before = net(graph)
    assert close(before, net(graph.act(moved(name, generator, gauges=model.startswith("scale")))))
    before.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in probes.parameters())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch's own modules, while it compiles
@pytest.mark.parametrize("model", MODELS)
def test_compile(model: str) -> None:
    space, _ = network("mlp")
    net = MODELS[model](3, channels=8, layers=2)
    graph = wspace.encode(space, state_of(space, 1, (2,)))
    assert close(net(graph), torch.compile(net)(graph))


def test_unknown_heads_and_empty_graphs() -> None:
    with pytest.raises(ValueError, match="unknown head"):
        GraphMetanet(3, head="nothing")  # type: ignore[arg-type]
    with pytest.raises(SpaceMismatch, match="empty list"):
        GraphMetanet(3)([])
    with pytest.raises(ValueError, match="do not divide"):
        NeuralGraphTransformer(3, channels=10, heads=4)


@pytest.mark.parametrize("head", ["graph", "parameter"])
def test_statistics_make_the_size_of_the_data_irrelevant(head: str) -> None:
    """Fitted to data of any size, a metanet sees the same; symmetry and identity are kept."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    space = wspace.trace(net, torch.zeros(1, 3, dtype=torch.float64))
    state = {n: torch.randn(6, *x.shape, dtype=x.dtype) for n, x in net.state_dict().items()}
    factors = {n: 10.0 ** (i - 1) for i, n in enumerate(state)}
    large = {n: x * factors[n] for n, x in state.items()}
    metanet = GraphMetanet(3, channels=8, layers=2, head=head).double()
    answers = []
    for some in (state, large):
        metanet.fit_statistics(wspace.encode(space, some))
        answers.append(metanet(wspace.encode(space, some)))
    if head == "graph":
        wspace.testing.assert_close(answers[0], answers[1])
        other = metanet(wspace.encode(space, state))  # now of the wrong size
        assert (other - answers[0]).abs().max() > 1e-3
        return
    for name in state:
        wspace.testing.assert_close(answers[1][name], answers[0][name] * factors[name])
    element = wspace.sample(space, generator=torch.Generator().manual_seed(1))
    moved = metanet(wspace.encode(space, large).act(element))
    wspace.testing.assert_close(moved, wspace.act(element, answers[1], space))
