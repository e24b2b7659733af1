"""Where kinds of parameters and the wiring come from, and what is kept of them."""

import warnings

import pytest
import torch
from test_nowcast_predictors import State, randomised, walk
from torch import Tensor, nn
from torch.nn import functional as F

import wspace
from wspace.errors import NowcastError
from wspace.nowcast import WNN, NiNoGraph, NiNoMLP, wiring
from wspace.nowcast.mlp import kinds_of
from wspace.nowcast.predictor import Past
from wspace.nowcast.topology import FC, KEY, POSITION, QUERY, TOKEN, VALUE
from wspace.nowcast.wiring import traced


class Fused(nn.Module):
    """Attention with one matrix for queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 18, bias=False), nn.Linear(6, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).view(*x.shape[:2], 3, 2, 3).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(parts[0], parts[1], parts[2])
        return self.out(y.transpose(1, 2).flatten(2))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.p = nn.Embedding(9, 4), nn.Parameter(torch.zeros(8, 4))
        self.o = nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.o(self.e(ids) + self.p)


def mlp_of(width: int = 8) -> NiNoMLP:
    net = randomised(NiNoMLP(width))
    assert isinstance(net, NiNoMLP)
    return net


def graph_of(**options: bool) -> NiNoGraph:
    net = randomised(NiNoGraph(8, **options))  # type: ignore[arg-type]
    assert isinstance(net, NiNoGraph)
    return net


def history(module: nn.Module) -> list[State]:
    like = module.state_dict()
    return [{n: x.to(like[n].dtype) for n, x in s.items()} for s in walk(module)]


def summed(changes: dict[str, Tensor]) -> Tensor:
    return sum((x.square().sum() for x in changes.values()), torch.zeros(()))


def gpt2() -> nn.Module:
    import transformers

    config = transformers.GPT2Config(n_embd=6, n_layer=1, n_head=2, vocab_size=23, n_positions=7)
    return transformers.GPT2LMHeadModel(config).eval()


# --------------------------------------------------------------------- parts of tensors


def test_rows_of_a_fused_matrix_whose_rows_are_alike() -> None:
    """A process with some rows of the fused matrix of a GPT-2 predicts these as one with all."""
    module, net, name = gpt2(), mlp_of(), "transformer.h.0.attn.c_attn.weight"
    ids = {"input_ids": torch.zeros(1, 4, dtype=torch.int64)}
    space = wspace.trace(module, (), ids)
    states = [{name: s[name]} for s in history(module)]
    whole = net.predict(module, states, horizon=2, names=[name], space=space)[name]
    table = torch.stack([s[name].double() for s in states])
    sums = [table.numel(), table.sum(), table.square().sum()]
    total = torch.tensor([[float(x) for x in sums]], dtype=torch.float64)
    for rows in (slice(0, 4), slice(4, 6), slice(6, 6)):
        part = [{name: s[name][rows]} for s in states]
        made = net.predict(
            module, part, horizon=2, names=[name], space=space, moments=lambda _: total
        )
        assert made[name].shape == part[0][name].shape
        error = (made[name] - whole[rows]).abs()
        assert not error.numel() or error.max() <= 1e-5 * (whole - states[-1][name]).abs().max()


def test_rows_of_a_fused_matrix_whose_rows_differ_are_refused_by_name() -> None:
    module, net = Fused(), mlp_of()
    space = wspace.trace(module, (torch.zeros(1, 3, 6),))
    names = ("qkv.weight", "out.weight")
    windows = {n: (p.detach(),) for n, p in module.named_parameters()}
    found = kinds_of(Past(module, windows, names, "traced", space))
    assert [k for k, _ in found["qkv.weight"]] == [QUERY, KEY, VALUE]
    assert found["out.weight"] == [(FC, None)]
    part = [{n: x[:4] for n, x in s.items()} for s in history(module)]
    how = {"horizon": 2, "space": space, "moments": lambda x: x}  # type: ignore[var-annotated]
    with pytest.raises(NowcastError, match=r"part of 'qkv\.weight'.*\n.*\(18, 6\)"):
        net.predict(module, part, **how)
    net.predict(module, part, names=["out.weight"], **how)


# ------------------------------------------------------------------- without a space


@pytest.mark.parametrize("form", [NiNoMLP, WNN])
def test_kinds_are_traced_without_a_space(form: type[NiNoMLP] | type[WNN]) -> None:
    module, net = Words(), randomised(form(8))
    assert isinstance(net, NiNoMLP | WNN)
    ids = torch.zeros(1, 8, dtype=torch.int64)
    space = wspace.trace(module, (ids,))
    names = ("e.weight", "p", "o.weight")
    windows = {n: (p.detach(),) for n, p in module.named_parameters()}
    for past in (
        Past(module, windows, names, "traced", space),
        Past(module, windows, names, "traced"),
        Past(module, windows, names, "traced", example=((ids,), None)),
    ):
        found = kinds_of(past)
        assert [found[n] for n in names] == [[(TOKEN, None)], [(POSITION, None)], [(FC, None)]]
    assert kinds_of(Past(module, windows, names, "published"))["e.weight"] == [(FC, None)]
    states = history(module)
    want = net.predict(module, states, horizon=2, space=space)
    out = net.predict(module, states, horizon=2)
    assert all(torch.equal(out[n], x) for n, x in want.items())


def test_a_module_that_cannot_be_traced_is_told_once() -> None:
    module, net = nn.Bilinear(2, 3, 4), mlp_of()
    states = history(module)
    with pytest.warns(UserWarning, match="kinds of the parameters of Bilinear are guessed"):
        want = net.predict(module, states, horizon=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = net.predict(module, states, horizon=2)
        named = net.predict(nn.Bilinear(2, 3, 4), states, horizon=2, topology="published")
    assert all(torch.equal(again[n], x) and torch.equal(named[n], x) for n, x in want.items())


def test_a_guess_is_traced_once_until_the_module_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    module, calls = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), []
    old = wiring.trace

    def trace(*args: object) -> object:
        calls.append(1)
        return old(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(wiring, "trace", trace)
    for net in (mlp_of(), graph_of(), graph_of()):
        net.predict(module, history(module), horizon=1)
    assert len(calls) == 1
    module.append(nn.Linear(2, 2, bias=False))
    graph_of().predict(module, history(module), horizon=1)
    assert len(calls) == 2


def test_a_transformers_model_whose_dummy_inputs_do_not_fit() -> None:
    """A vision transformer takes images, though it offers numbers of tokens."""
    import transformers

    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        image_size=32, patch_size=8,
    )  # fmt: skip
    module = transformers.ViTForImageClassification(config).eval()
    states = history(module)
    space = wspace.trace(module, (torch.zeros(1, 3, 32, 32),))
    for net in (mlp_of(), graph_of()):
        out = net.predict(module, states, horizon=1)
        want = net.predict(module, states, horizon=1, space=space)
        assert all(torch.equal(out[n], x) for n, x in want.items())


def test_the_space_is_found_or_asked_for() -> None:
    module = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    predictor = randomised(NiNoGraph(8).double())
    assert isinstance(predictor, NiNoGraph)
    states = walk(module)
    args = (torch.zeros(4, 3, dtype=torch.float64),)
    space = wspace.trace(module, args)
    want = predictor.predict(module, states, horizon=2, space=space)
    for out in (
        predictor.predict(module, states, horizon=2),
        predictor.predict(module, states, horizon=2, args=args),
        predictor.predict(space, states, horizon=2),
    ):
        assert all(torch.equal(out[n], x) for n, x in want.items())
    with pytest.raises(NowcastError, match="space = wspace.trace"):
        predictor.predict(nn.Bilinear(2, 3, 4).double(), walk(nn.Bilinear(2, 3, 4)), horizon=1)
    other = wspace.trace(nn.Linear(3, 2), (torch.zeros(1, 3),))
    with pytest.raises(NowcastError, match=r"'0\.weight' on one side only"):
        predictor.predict(module, states, horizon=1, space=other)


# ---------------------------------------------------------------------- what is kept


@pytest.mark.parametrize("laplacian", [False, True])
@pytest.mark.parametrize("how", ["predict", "forward"])
def test_training_after_inference_mode(laplacian: bool, how: str) -> None:
    """What is kept of a topology that was first seen in inference mode can be trained with."""
    module, net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)), graph_of()
    net.laplacian = laplacian
    space, states = wspace.trace(module, (torch.zeros(1, 3),)), history(module)
    g = torch.Generator().manual_seed(0)
    x = {n: torch.randn(2, 5, *p.shape, generator=g) for n, p in module.named_parameters()}
    traced.cache_clear()
    with torch.inference_mode():
        if how == "predict":
            out = net.predict(module, states, horizon=2, space=space)
            assert not any(y.is_inference() for y in out.values())
        else:
            net(traced(space), x)
    summed(net(traced(space), x)).backward()
    assert all(bool(p.grad.isfinite().all()) for p in net.parameters() if p.grad is not None)
    with torch.inference_mode():
        inside = [{n: y.clone() for n, y in s.items()} for s in states]
    want = net.predict(module, states, horizon=2, space=space)
    out = net.predict(module, inside, horizon=2, space=space)
    assert all(torch.equal(out[n], y) for n, y in want.items())


def test_entries_are_not_kept() -> None:
    module = Fused()
    space = wspace.trace(module, (torch.zeros(1, 3, 6),))
    traced.cache_clear()
    for net in (mlp_of(), graph_of()):
        net.predict(module, history(module), horizon=1, space=space)
    net = graph_of()
    net(traced(space), {n: torch.randn(1, 5, *p.shape) for n, p in module.named_parameters()})
    part = (slice(0, 1), slice(1, 3), slice(0, 2), slice(0, 1))
    for topology in (traced(space), traced(space).merged):
        for b in topology.blocks:
            assert set(vars(b)) == set(b.__dataclass_fields__)
            if b.param:
                assert torch.equal(b.entries_of(part), b.entries[part])


def test_buffers_are_not_shared_between_devices() -> None:
    """A model on two devices, here one without numbers."""
    net = mlp_of()
    windows = {
        "a": tuple(torch.randn(3, 2) for _ in range(5)),
        "b": tuple(torch.empty(3, 2, device="meta") for _ in range(5)),
    }
    past = Past(nn.Identity(), windows, ("a", "b", "a"), "published")
    past.moments.update(dict.fromkeys(windows, (0.0, 1.0)))
    with torch.no_grad():
        made = list(net._ahead(past, 3))
    assert [x.device.type for _, x in made] == ["cpu", "meta", "cpu"]
    assert torch.equal(made[0][1], made[2][1])
