"""Gradients that layers write out, against autograd on their own `step`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_metanets import MODELS, network, state_of
from torch import Tensor, nn
from torch.nn import functional as F

import wspace
from wspace.nn import GraphMetanet, explicit, message
from wspace.nn.edge_kernel import EdgeKernel
from wspace.nn.gmn import GMNEdges, GMNLayer
from wspace.nn.metanet import Head, Metanet

pytestmark = pytest.mark.usefixtures("float64")


def none(layer: Any) -> None:
    """No layer has a kernel: the path that any layer takes."""
    del layer


def results(net: Metanet, name: str, *, again: bool = False) -> list[Tensor]:
    """Answers, their gradients by all weights, and, if wanted, gradients of those."""
    space, state = network(name)
    leaf = {k: x.clone().requires_grad_() for k, x in state.items()}
    for p in space.params:
        leaf.update(dict.fromkeys(p.ties, leaf[p.name]))
    out = net(wspace.encode(space, leaf))
    values = [out] if isinstance(out, Tensor) else [out[p.name] for p in space.params]
    total = sum((v * torch.linspace(-1, 1, v.numel()).view_as(v)).sum() for v in values)
    assert isinstance(total, Tensor)
    whole = net.layers if again else net  # torch's table of words has no second derivative
    inputs = [*whole.parameters(), *(leaf[p.name] for p in space.params)]
    grads: Any = torch.autograd.grad(total, inputs, create_graph=again, allow_unused=True)
    made = [*values, *(g for g in grads if g is not None)]
    if again:
        norm = torch.stack([g.square().sum() for g in made[1:]]).sum()
        more: Any = torch.autograd.grad(norm, inputs, allow_unused=True)
        made += [g for g in more if g is not None]
    return [x.detach() for x in made]


def worst(a: list[Tensor], b: list[Tensor]) -> float:
    """Largest difference, in units of the largest number of its tensor or 1e-3 of all."""
    floor = 1e-3 * max(float(x.abs().max()) for x in a)
    return max(
        float((x - y).abs().max()) / max(float(x.abs().max()), floor)
        for x, y in zip(a, b, strict=True)
    )


def assert_as_autograd(
    net: Metanet, name: str, patch: pytest.MonkeyPatch, *, again: bool = False
) -> None:
    """The written-out gradients are those of `step`, whether products are kept or not."""
    with patch.context() as p:
        p.setattr(message, "kernel_of", none)
        want = results(net, name, again=again)
    for keep in (1, 1 << 20):
        with patch.context() as p:
            p.setattr(message, "KEEP", keep)
            assert worst(want, results(net, name, again=again)) < 1e-10


@pytest.mark.parametrize(("stream", "chunk"), [(False, 1 << 13), (False, 53), (True, 53)])
@pytest.mark.parametrize("head", ["graph", "parameter"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", ["siren", "mobilenet_v3", "attention_gqa"])
def test_gradients(
    model: str, name: str, head: Head, stream: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For layers of all parts, ends of all types, blocks with many taps and with no value."""
    torch.manual_seed(len(name) + chunk)
    net = MODELS[model](3, channels=8, layers=3, head=head, stream=stream, chunk=chunk)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    assert all(explicit.kernel_of(layer) is not None for layer in net.layers)
    assert_as_autograd(net, name, monkeypatch)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_gradients_of_gradients(model: str, stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    net = MODELS[model](3, channels=8, layers=2, stream=stream, chunk=53)
    assert_as_autograd(net, "mlp", monkeypatch, again=True)


@pytest.mark.parametrize("model", MODELS)
def test_ties_share_the_gradient(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal weights give equal messages: maxima are attained more than once."""
    space, _ = network("mlp")
    net = MODELS[model](3, channels=8, layers=2)
    graph = wspace.encode(space, {k: torch.ones_like(x) for k, x in state_of(space, 1).items()})

    def grads() -> list[Tensor]:
        found: Any = torch.autograd.grad(net(graph).sum(), [*net.parameters()], allow_unused=True)
        return [g for g in found if g is not None]

    with monkeypatch.context() as p:
        p.setattr(message, "kernel_of", none)
        want = grads()
    assert worst(want, grads()) < 1e-9


class Wrong(GMNEdges):
    """One hundredth too much of what the messages give."""

    def update_back(self, e: Any, before: Tensor, ahead: Any, grad: Any) -> Any:
        """Wrong where messages were sent."""
        return super().update_back(e, before, ahead, None if grad is None else 1.01 * grad)


def test_a_wrong_gradient_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    net = GraphMetanet(3, channels=8, layers=3)
    want = results(net, "mlp")
    monkeypatch.setattr(message, "kernel_of", lambda layer: Wrong)
    assert worst(want[:1], results(net, "mlp")[:1]) < 1e-10
    assert worst(want, results(net, "mlp")) > 1e-3


@pytest.mark.parametrize("model", MODELS)
def test_bfloat16(model: str) -> None:
    """Gradients in mixed precision point where those in full precision do."""
    space, _ = network("mlp")
    net = MODELS[model](3, channels=64, layers=3).float()
    graph = wspace.encode(space, {k: x.float() for k, x in state_of(space, 1, (3,)).items()})
    found = []
    for on in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            total = net(graph).float().square().sum()
        grads: Any = torch.autograd.grad(total, list(net.parameters()), allow_unused=True)
        found.append(torch.cat([g.flatten() for g in grads if g is not None]))
    assert float(F.cosine_similarity(*found, dim=0)) > 0.98


class Doubled(GMNLayer):
    """Has another `step` and no kernel for it."""

    def step(self, e: Tensor, ps: Tensor, pt: Tensor) -> Any:
        """Messages twice as large."""
        e, (into,), (back,) = super().step(e, ps, pt)
        return e, (2 * into,), (2 * back,)


def _hooked(layer: GMNLayer) -> None:
    layer.edge_in.register_forward_hook(lambda *_: None)


def _replaced(layer: GMNLayer) -> None:
    layer.edge_in = nn.Sequential(layer.edge_in)  # type: ignore[assignment]


def test_kernels_stand_only_for_what_they_know() -> None:
    assert explicit.kernel_of(GMNLayer(8)) is GMNEdges
    assert explicit.kernel_of(Doubled(8)) is None
    changes: tuple[Callable[[GMNLayer], None], ...] = (_hooked, _replaced)
    for change in changes:
        layer = GMNLayer(8)
        change(layer)
        assert explicit.kernel_of(layer) is None
    assert issubclass(GMNEdges, EdgeKernel)


def test_forward_mode() -> None:
    """Takes the layers' own methods, as `vmap` and `torch.func` do."""
    space, state = network("mlp")
    net = GraphMetanet(3, channels=8, layers=2).requires_grad_(False)
    tangent = {k: torch.ones_like(x) for k, x in state.items()}

    def run(s: dict[str, Tensor]) -> Tensor:
        return net(wspace.encode(space, s))

    slope: Tensor = torch.func.jvp(run, (dict(state),), (tangent,))[1]
    with torch.autograd.forward_ad.dual_level():
        dual = {k: torch.autograd.forward_ad.make_dual(x, tangent[k]) for k, x in state.items()}
        found = torch.autograd.forward_ad.unpack_dual(run(dual)).tangent
    assert found is not None
    assert torch.allclose(slope, found, rtol=1e-10)
    h = 1e-6
    two = [run({k: x + s * h * tangent[k] for k, x in state.items()}) for s in (1, -1)]
    assert torch.allclose(slope, (two[0] - two[1]) / (2 * h), rtol=1e-5, atol=1e-7)
