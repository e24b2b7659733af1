"""Probes: answers equal those of a plain run, and activations move with the units."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import build
from oracles_graph import relabelling
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

import wspace
from wspace.errors import SpaceMismatch
from wspace.graph import ParameterGraph, encode
from wspace.nn.probes import Probes
from wspace.space import WeightSpace
from wspace.testing import assert_close, assert_invariant

COUNT = 3
EQUIVARIANT = [
    "mlp",
    "siren",
    "mlp_batchnorm",
    "mlp_residual",
    "shared_block",
    "autoencoder_tied",
    "multi_output",
    "lenet",
    "grouped_se",
    "unet",
    "pixel_shuffle",
    "depth_multiplier",
    "conv3d",
    "encoder_pre_norm",
    "attention_per_head",
    "language_model_tied",
    "moe_dense",
    "bert",
    "lstm",
]
LOOPED = {"bert", "lstm"}  # control flow on values; a fused kernel


def state_of(space: WeightSpace, *batch: int, seed: int = 0) -> dict[str, Tensor]:
    """A random positive state (variances must be), ties kept."""
    generator = torch.Generator().manual_seed(seed)
    out: dict[str, Tensor] = {}
    for p in space.params:
        x = torch.rand(*batch, *p.shape, generator=generator, dtype=torch.float64) - 0.4
        x = x.abs() + 0.1 if p.buffer else x
        out |= dict.fromkeys((p.name, *p.ties), x)
    return out


def probes_of(name: str) -> tuple[Probes, nn.Module, WeightSpace]:
    """Probes whose inputs are random where they are floats, and examples where they are not."""
    module, args, kwargs = build(name)

    def several(x: object) -> object:
        if not isinstance(x, Tensor):
            return x
        shape = (COUNT, *x.shape[1:])
        return torch.randn(shape, dtype=x.dtype) if x.is_floating_point() else x[:1].expand(shape)

    inputs = {k: several(x) for k, x in kwargs.items()} or [several(x) for x in args]
    space = wspace.trace(module, args, kwargs)
    return Probes(module, space, inputs=inputs, loop=name in LOOPED), module, space


def mlp() -> tuple[nn.Module, WeightSpace]:
    module = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)).double()
    return module, wspace.trace(module, torch.zeros(1, 5, dtype=torch.float64))


@pytest.mark.parametrize("name", EQUIVARIANT)
def test_outputs_stay_and_activations_move(name: str, generator: torch.Generator) -> None:
    probes, _, space = probes_of(name)
    graph = encode(space, state_of(space))
    moved = graph.act(wspace.sample(space, generator=generator))
    before, after = probes(graph), probes(moved)
    assert_close(before.outputs, after.outputs)
    assert_close(before.more, after.more)
    images, offsets = relabelling(graph, moved), graph.structure.offsets
    place = torch.full((graph.structure.total, COUNT), torch.nan, dtype=torch.float64)
    for n, x in after.nodes.items():
        place[offsets[n] : offsets[n] + len(x)] = x.detach()
    seen = False
    for n, x in before.nodes.items():
        units = [u for u in range(len(x)) if offsets[n] + u in images]
        expected = place[[images[offsets[n] + u] for u in units]]
        assert_close(expected, x.detach()[units])
        seen = seen or any(images[offsets[n] + u] != offsets[n] + u for u in units)
    assert seen or name == "lstm"  # a fused recurrent kernel is no layer with a hook


def test_laws_of_outputs() -> None:
    probes, _, space = probes_of("unet")
    assert_invariant(lambda state: probes(state).outputs, space, state_of(space, 2))
    with pytest.raises(AssertionError, match="not invariant"):
        assert_invariant(lambda state: probes(state).nodes[3], space, state_of(space, 2))


@pytest.mark.parametrize("name", ["mlp", "mlp_batchnorm", "lenet", "multi_output", "unet"])
def test_outputs_are_those_of_a_plain_run(name: str) -> None:
    probes, module, space = probes_of(name)
    state = state_of(space, 2, 3)
    got = probes(encode(space, state))
    for i, j in ((0, 0), (1, 2)):
        one = {k: x[i, j] for k, x in state.items()}
        out = functional_call(module, one, (probes.input_0,))
        first, *more = tree_leaves(out)
        assert_close(first, got.outputs[i, j])
        for x, y in zip(more, got.more, strict=True):
            if x.dim():  # what is averaged over examples is so over each probe alone
                assert_close(x, y[i, j])
        assert_close(probes(one).nodes, {n: x[i, j] for n, x in got.nodes.items()})
    assert got.outputs.shape == (2, 3, *probes.shape)


def test_activations_of_a_perceptron() -> None:
    module, space = mlp()
    probes = Probes(module, space, count=4)
    state, x = state_of(space), probes.input_0
    hidden = x @ state["0.weight"].mT + state["0.bias"]
    out = hidden.relu() @ state["2.weight"].mT + state["2.bias"]
    nodes = probes(state).nodes
    assert probes.covered == (1, 2, 3) == tuple(nodes)
    assert_close([x.mT, hidden.mT, out.mT], list(nodes.values()))


def test_activations_of_a_convolution_are_averages_over_space() -> None:
    module = nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(45, 3)).double()
    x = torch.randn(4, 2, 5, 5, dtype=torch.float64)
    space = wspace.trace(module, x)
    probes = Probes(module, space, inputs=x, learn=False)
    nodes = probes(module.state_dict()).nodes
    hidden = module[0](x)
    assert_close([x.mean((2, 3)).mT, hidden.mean((2, 3)).mT, module(x).mT], list(nodes.values()))


def test_a_loop_computes_the_same() -> None:
    probes, module, space = probes_of("lenet")
    looped = Probes(module, space, inputs=probes.input_0, loop=True)
    for batch in ((), (2, 2)):
        state = state_of(space, *batch)
        a, b = probes(state), looped(state)
        assert_close(a.outputs, b.outputs)
        assert_close(a.nodes, b.nodes)


def test_gradients_reach_inputs_and_states_and_nothing_else() -> None:
    module, space = mlp()
    probes = Probes(module, space, count=4)
    assert [name for name, _ in probes.named_parameters()] == ["input_0"]
    state = {k: x.requires_grad_() for k, x in state_of(space, 2).items()}
    got = probes(state)
    (got.outputs.sum() + got.nodes[2].square().sum()).backward()
    for x in (probes.input_0, *state.values()):
        assert x.grad is not None
        assert bool((x.grad != 0).any())
    assert all(p.grad is None for p in module.parameters())


def test_given_inputs_may_be_fixed() -> None:
    module, space = mlp()
    x = torch.randn(6, 5, dtype=torch.float64)
    assert not list(Probes(module, space, inputs=x, learn=False).parameters())
    probes = Probes(module, space, inputs=x)
    assert (probes.count, probes.shape) == (6, (6, 3))
    assert_close(probes(module.state_dict()).outputs, module(x))
    assert probes.input_0.data_ptr() != x.data_ptr()
    tokens, _, _ = probes_of("language_model_tied")
    assert not list(tokens.parameters())


def test_only_shapes_of_the_architecture_are_needed() -> None:
    module, space = mlp()
    with torch.device("meta"):
        bare = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    x = torch.randn(6, 5, dtype=torch.float64)
    state = state_of(space, 2)
    assert_close(*(Probes(m, space, inputs=x)(state).outputs for m in (bare, module)))


def test_the_module_is_left_alone() -> None:
    module, args, _ = build("mlp_batchnorm")
    module.train()
    before = {k: x.clone() for k, x in module.state_dict().items()}
    space = wspace.trace(module, args)
    probes = Probes(module, space, example=args)
    probes(state_of(space, 2))
    assert all(m.training and not m._forward_hooks for m in module.modules())
    assert all(torch.equal(before[k], x) for k, x in module.state_dict().items())


class Fourier(nn.Module):
    """A layer on cosines at frequencies that no checkpoint holds."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rates", torch.tensor([1.0, 2.0, 4.0]), persistent=False)
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer((x * self.rates).cos())


def test_buffers_that_no_checkpoint_holds_come_from_the_module() -> None:
    module, x = Fourier(), torch.randn(4, 1)
    space = wspace.trace(module, x)
    probes = Probes(module, space, inputs=x)
    assert_close(probes(module.state_dict()).outputs, module(x))
    with pytest.raises(SpaceMismatch, match="meta device"):
        Probes(Fourier().to("meta"), space, inputs=x)


def test_first_values_follow_the_generator() -> None:
    module, space = mlp()
    a, b, c = (
        Probes(module, space, generator=torch.Generator().manual_seed(s)).input_0 for s in (1, 1, 2)
    )
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert float(a.detach().abs().max()) <= 1


def test_copies_and_saved_states_give_the_same() -> None:
    module, space = mlp()
    probes, state = Probes(module, space), state_of(space, 2)
    other = Probes(module, space)
    other.load_state_dict(probes.state_dict())
    for same in (copy.deepcopy(probes), other):
        assert torch.equal(same(state).outputs, probes(state).outputs)


def test_precision_follows_the_state() -> None:
    module, space = mlp()
    probes = Probes(module, space)
    single = {k: x.float() for k, x in state_of(space).items()}
    got = probes(single)
    assert {got.outputs.dtype, *(x.dtype for x in got.nodes.values())} == {torch.float32}


def test_errors_say_what_is_needed() -> None:
    module, space = mlp()
    conv = nn.Sequential(nn.Conv2d(2, 5, 3), nn.Flatten(), nn.Linear(45, 3))
    image = torch.zeros(1, 2, 5, 5)
    of_conv = wspace.trace(conv, image)
    with pytest.raises(SpaceMismatch, match="shape of the inputs is unknown"):
        Probes(conv, of_conv)
    with pytest.raises(SpaceMismatch, match="does not run on probes"):
        Probes(conv, of_conv, example=torch.zeros(1, 2, 7, 7))
    with pytest.raises(SpaceMismatch, match="integer inputs cannot be drawn"):
        Probes(module, space, example=torch.zeros(1, 5, dtype=torch.long))
    with pytest.raises(SpaceMismatch, match="how many probes"):
        Probes(module, space, inputs=[torch.zeros(2, 5), torch.zeros(3, 5)])
    with pytest.raises(SpaceMismatch, match="not in the weight space"):
        Probes(nn.Sequential(module, nn.Linear(3, 2)), space)
    with pytest.raises(SpaceMismatch, match="another weight space"):
        Probes(module, space)(encode(of_conv, conv.state_dict()))
    with pytest.raises(SpaceMismatch, match=r"2\.weight"):
        Probes(module, space)({"0.weight": torch.zeros(7, 5)})


def test_graphs_and_states_answer_alike() -> None:
    module, space = mlp()
    probes, state = Probes(module, space), state_of(space, 2)
    graph = encode(space, state)
    assert isinstance(graph, ParameterGraph)
    assert torch.equal(probes(graph).outputs, probes(state).outputs)
