"""Law L5 on every layer for one weight space: equivariance, initial scale, gradients, learning."""

import functools
from collections.abc import Callable, Iterable

import pytest
import torch
from cases import build
from test_basis import perceptron, space_of
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

import wspace
from wspace.errors import SpaceMismatch
from wspace.nn import layers as L
from wspace.nn.attention import WeightSpaceAttention
from wspace.nn.basis import dim_bias
from wspace.nn.dws import DWSNet
from wspace.nn.linear import EquivariantLinear, InvariantPool
from wspace.nn.nfn import NFN
from wspace.nn.unf import UNF
from wspace.space import Group, WeightSpace
from wspace.testing import assert_close, assert_equivariant, assert_invariant, assert_same

FEW = ["mlp", "lenet", "lstm", "encoder_pre_norm", "moe_dispatch", "mpt"]
MORE = [
    "mlp_batchnorm", "mlp_residual", "autoencoder_tied", "graph_attention", "moe_top2", "bilinear",
    "grouped_se", "densenet", "resnet18", "conv_vae", "shufflenet_v1", "language_model_tied",
    "attention_per_head", "attention_gqa", "linear", "rnn_relu", "prelu", "gru", "state_space",
]  # fmt: skip
C = 4


@functools.cache
def space_from(name: str) -> WeightSpace:
    module, args, kwargs = build(name)
    return wspace.trace(module, args, kwargs)


def features(
    space: WeightSpace, generator: torch.Generator, *batch: int, channels: int = C
) -> dict[str, Tensor]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {p.name: normal(*batch, *p.shape, channels) for p in space.params}


def squares(tensors: Iterable[Tensor]) -> Tensor:
    """Sum over tensors of their mean squares."""
    return torch.stack([t.square().mean() for t in tensors]).sum()


def state_from(space: WeightSpace, generator: torch.Generator, *batch: int) -> dict[str, Tensor]:
    return L.from_features(features(space, generator, *batch, channels=1), space)


Made = Callable[[WeightSpace], nn.Module]
MODULES: dict[str, Made] = {
    "linear": lambda s: EquivariantLinear(s, C, 3),
    "linear np": lambda s: EquivariantLinear(s, C, 3, "np", positions=2),
    "pointwise": lambda s: L.Pointwise(nn.Sequential(nn.Linear(C, 5), nn.GELU())),
    "norm": lambda s: L.FeatureNorm(s, C),
    "norm tensor": lambda s: L.FeatureNorm(s, C, over="tensor"),
    "batch norm": lambda s: L.FeatureBatchNorm(s, C),
    "standardize": lambda s: L.Standardize(s, C),
    "scale": lambda s: L.Scale(s, 0.5),
    "attention": lambda s: WeightSpaceAttention(s, C, 2),
    "residual": lambda s: L.Residual(
        L.FeatureNorm(s, C), EquivariantLinear(s, C, C), L.Pointwise(nn.ReLU())
    ),
}
MODELS: dict[str, Callable[..., nn.Module]] = {
    "dws": DWSNet,
    "nfn hnp": NFN,
    "nfn np": functools.partial(NFN, mode="np"),
    "nft": functools.partial(NFN, attention=True),
    "nft np": functools.partial(NFN, attention=True, mode="np"),
    "unf": UNF,
    "unf np": functools.partial(UNF, basis="np"),
}

each_few = pytest.mark.parametrize("name", FEW)
each_module = pytest.mark.parametrize("module", MODULES)
each_model = pytest.mark.parametrize("model", MODELS)


def randomised(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """In float64, with weights and statistics that hide nothing by being 0 or 1."""
    module = module.double()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype), alpha=0.1)
        for name, b in module.named_buffers():
            if name.rsplit(".", 1)[-1] in {"mean", "std", "variance"}:
                b.add_(torch.rand(b.shape, generator=generator, dtype=b.dtype))
    return module


# -------------------------------------------------------------------------- equivariance


@each_module
@each_few
@pytest.mark.parametrize("training", [False, True])
def test_equivariant(name: str, module: str, training: bool, generator: torch.Generator) -> None:
    space = space_from(name)
    layer = randomised(MODULES[module](space), generator).train(training)
    assert_equivariant(layer, space, features(space, generator, 2), channels=True)


@pytest.mark.parametrize("name", MORE)
def test_linear_equivariant(name: str, generator: torch.Generator) -> None:
    space = space_from(name)
    layer = randomised(EquivariantLinear(space, C, 2), generator)
    assert_equivariant(layer, space, features(space, generator), channels=True)
    pool = InvariantPool(space, C, moments=2)
    assert_invariant(pool, space, features(space, generator, 2), channels=True)


@pytest.mark.parametrize("name", ["mlp", "lstm", "language_model_tied", "moe_dispatch"])
@pytest.mark.parametrize("attention", [False, True])
def test_np_is_equivariant_to_more(name: str, attention: bool, generator: torch.Generator) -> None:
    space = space_from(name)
    if attention:
        layer = WeightSpaceAttention(space, C, 2, basis="np")
    else:
        layer = EquivariantLinear(space, C, 2, "np")
    layer = randomised(layer, generator)
    free = layer.acting
    assert isinstance(free, WeightSpace)
    assert len(free.groups) > len(space.groups)
    assert_equivariant(layer, free, features(space, generator, 2), channels=True)
    with pytest.raises(AssertionError, match="not equivariant"):
        full = randomised(EquivariantLinear(space, C, 2), generator)
        assert_equivariant(full, free, features(space, generator, 2), channels=True)


@each_model
@pytest.mark.parametrize("name", ["lenet", "lstm", "moe_dispatch", "language_model_tied"])
def test_models(name: str, model: str, generator: torch.Generator) -> None:
    space = space_from(name)
    state = state_from(space, generator, 3)
    make = MODELS[model]
    head = randomised(make(space, 8, 2, 3), generator)
    assert_invariant(head, space, state)
    assert head(state).shape == (3, 3)
    change = randomised(make(space, 8, 2, None, head="parameters"), generator)
    assert_equivariant(change, space, state)
    assert change(state).keys() == state.keys()


@torch.no_grad()
def test_sensitive_to_every_axis_alone(generator: torch.Generator) -> None:
    """Moving one axis of one tensor, without what is coupled to it, is noticed."""
    space = perceptron(3, 4, 5, 2)
    layer = EquivariantLinear(space, C, 2).double()
    x = features(space, generator)
    y = layer(x)
    for p in space.params:
        for d in range(len(p.axes)):
            moved = layer({**x, p.name: x[p.name].roll(1, d)})
            expected = {**y, p.name: y[p.name].roll(1, d)}
            gaps = [(moved[k] - expected[k]).abs().max().item() for k in y]
            assert max(gaps) > 1e-2


def test_values_by_hand() -> None:
    """One square matrix whose axes are tied: all fifteen maps, each by its index formula."""
    space = space_of({"a": (Group("g", 4, ("permutation",)),) * 2})
    layer = EquivariantLinear(space, 1, 1, bias=False).double()
    eye = torch.eye(4).double()
    x = torch.randn(4, 4).double()
    d, r, c, t, s = x.diagonal(), x.mean(1), x.mean(0), x.diagonal().mean(), x.mean()
    one = torch.ones(4).double()
    vectors = [d, r, c]
    expected = [x, x.T, t * eye, s * eye, t * one.outer(one), s * one.outer(one)]
    for v in vectors:
        expected += [v.diag(), v.outer(one), one.outer(v)]
    found = []
    for w in layer.parameters():
        for i in range(w.numel()):
            with torch.no_grad():
                for other in layer.parameters():
                    other.zero_()
                w.view(-1)[i] = 1
                found.append(layer({"a": x[..., None]})["a"][..., 0])
    assert len(found) == len(expected) == 15
    for want in expected:
        assert sum(bool(torch.allclose(want, got)) for got in found) == 1


# ------------------------------------------------------------------------ initial scale


@pytest.mark.parametrize("width", [2, 16, 128, 512])
@pytest.mark.parametrize("depth", [1, 2, 6])
@pytest.mark.parametrize("basis", ["full", "np"])
@torch.no_grad()
def test_initial_variance(width: int, depth: int, basis: str) -> None:
    widths = (2, *[width] * (depth - 1), 3)
    space = perceptron(*widths)
    layer = EquivariantLinear(space, 8, 64 if width < 512 else 16, basis)
    noise = layer({p.name: torch.randn(*p.shape, 8) for p in space.params})
    constant = layer({p.name: torch.ones(*p.shape, 8) for p in space.params})
    for p in space.params:
        assert 0.3 < float(noise[p.name].square().mean()) < 3
        assert 0.3 < float(constant[p.name].square().mean()) < 3


@torch.no_grad()
def test_initial_variance_of_a_stack() -> None:
    space = perceptron(2, 32, 64, 32, 3)
    net = nn.Sequential(*(EquivariantLinear(space, 32, 32) for _ in range(6)))
    y = net({p.name: torch.randn(4, *p.shape, 32) for p in space.params})
    assert all(0.3 < float(t.square().mean()) < 3 for t in y.values())


@each_few
@torch.no_grad()
def test_initial_variance_of_traced_spaces(name: str, generator: torch.Generator) -> None:
    space = space_from(name)
    y = EquivariantLinear(space, C, 64).double()(features(space, generator, 4))
    assert all(0.3 < float(t.square().mean()) < 3 for t in y.values())


# ----------------------------------------------------------------------------- training


@each_model
@pytest.mark.parametrize("head", ["invariant", "parameters"])
def test_every_parameter_has_a_gradient(model: str, head: str, generator: torch.Generator) -> None:
    space = space_from("encoder_pre_norm")
    state = state_from(space, generator, 3)
    net = MODELS[model](space, 8, 2, 3 if head == "invariant" else None, head=head).double()
    out = net(state)
    tensors = [out] if isinstance(out, Tensor) else [*out.values()]
    squares(tensors).backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_gradients_are_right(generator: torch.Generator) -> None:
    """In-place sums and shared views do not disturb the derivative."""
    space = space_from("lstm")
    small = space_of({"a": (Group("g", 3, ("permutation",)),) * 2, "b": (Group("2", 2),)})
    for s in (small, space):
        layer = EquivariantLinear(s, 1, 1).double()
        x = features(s, generator, 1, channels=1)
        names = [*x][:3]
        inputs = [x[n].requires_grad_() for n in names]

        def run(*tensors: Tensor, layer: nn.Module = layer, x: dict[str, Tensor] = x) -> Tensor:
            y = layer({**x, **dict(zip([*x][:3], tensors, strict=False))})
            return torch.stack([t.tanh().sum() for t in y.values()])

        assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


def test_samples_do_not_mix(generator: torch.Generator) -> None:
    space = space_from("encoder_pre_norm")
    x = features(space, generator, 2, 3)
    for make in MODULES.values():
        layer = make(space).double().eval()
        alone = layer({name: t[1, 2] for name, t in x.items()})
        assert_close({name: t[1, 2] for name, t in layer(x).items()}, alone)


@pytest.mark.parametrize("name", ["mlp", "rnn_tanh"])
def test_identity_can_be_learned(name: str) -> None:
    """Two equivariant layers learn to copy their input, from the initial weights."""
    space = space_from(name)
    net = nn.Sequential(EquivariantLinear(space, 1, C), EquivariantLinear(space, C, 1))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    loss = torch.tensor(torch.inf)
    for _ in range(300):
        x = {p.name: torch.randn(8, *p.shape, 1) for p in space.params}
        loss = squares(y - x[n] for n, y in net(x).items()) / len(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 1e-3


@each_model
def test_models_learn_to_change_nothing(model: str, generator: torch.Generator) -> None:
    space = perceptron(2, 5, 3)
    net = MODELS[model](space, 8, 2, None, head="parameters").double()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.003)
    state = state_from(space, generator, 16)
    first = gap = torch.tensor(torch.inf)
    for step in range(60):
        out = net(state)
        gap = squares(out[n] - t for n, t in state.items())
        first = gap if step == 0 else first
        optimizer.zero_grad()
        gap.backward()
        optimizer.step()
    assert 0 < float(first.detach()) < 1e-2
    assert float(gap.detach()) < 0.05 * float(first.detach())


# ------------------------------------------------------------------------ other layers


def test_features_round_trip(generator: torch.Generator) -> None:
    space = space_from("language_model_tied")
    state = state_from(space, generator, 2)
    assert "head.weight" in state
    assert "head.weight" not in L.to_features(state, space)
    assert_same(state, L.from_features(L.to_features(state, space), space))


def test_dropout(generator: torch.Generator) -> None:
    space = perceptron(3, 4, 2)
    x = features(space, generator, 50)
    for over in ("channels", "entries"):
        layer = L.Dropout(space, 0.5, over=over)
        assert_same(x, layer.eval()(x))
        kept = {name: (y / x[name]).round() for name, y in layer.train()(x).items()}
        assert {float(v) for y in kept.values() for v in y.unique()} == {0.0, 2.0}
        whole = all(bool((y == y[:, :1]).all()) for y in kept.values())
        assert whole == (over == "channels")


def test_standardize(generator: torch.Generator) -> None:
    space = space_from("moe_dispatch")
    data = [{n: 3 * t + 5 for n, t in features(space, generator, k).items()} for k in (3, 4, 5)]
    layer = L.Standardize(space, C).double()
    layer.fit(iter(data))
    y = layer({n: torch.cat([x[n] for x in data]) for n in data[0]})
    experts = torch.cat([y[f"experts.{i}.0.weight"].flatten(0, -2) for i in range(3)])
    assert_close(1 + experts.mean(0), torch.ones(C).double())
    assert_close(experts.std(0, correction=0), torch.ones(C).double())
    assert_close(layer.inverse(layer(data[0])), data[0])
    with pytest.raises(SpaceMismatch, match="no data"):
        layer.fit([])


def test_constant_parameters_are_only_shifted() -> None:
    space = perceptron(2, 3)
    layer = L.Standardize(space)
    x = {p.name: torch.full((4, *p.shape, 1), 0.1) for p in space.params}
    layer.fit([x])
    assert float(layer(x)["0.bias"].abs().max()) < 1e-6


@torch.no_grad()
def test_norms_normalise(generator: torch.Generator) -> None:
    space = space_from("mlp")
    x = {n: 3 * t + 5 for n, t in features(space, generator, 6).items()}
    over = {"channels": (-1,), "tensor": (1, 2, -1)}
    for name, dims in over.items():
        y = L.FeatureNorm(space, C, over=name, eps=1e-9).double()(x)["2.weight"]
        assert float(y.mean(dims).abs().max()) < 1e-10
        assert float((y.var(dims, correction=0) - 1).abs().max()) < 1e-4
    norm = L.FeatureBatchNorm(space, C).double()
    y = norm(x)["2.weight"]
    assert float(y.mean((0, 1, 2)).abs().max()) < 1e-10
    for _ in range(200):
        norm(x)
    assert float((norm.eval()(x)["2.weight"] - y).abs().max()) < 1e-2


@pytest.mark.parametrize("width", [8, 512])
def test_attention_does_not_depend_on_width(width: int) -> None:
    """Tokens that repeat themselves along the group attend as those of a narrow layer."""
    narrow, wide = perceptron(3, 8, 2), perceptron(3, width, 2)
    torch.manual_seed(0)
    layer = WeightSpaceAttention(narrow, C, 2)
    torch.manual_seed(0)
    other = WeightSpaceAttention(wide, C, 2)
    x = {p.name: torch.randn(*p.shape, C) for p in narrow.params}
    repeats = {"0.weight": 0, "0.bias": 0, "1.weight": 1}
    k = width // 8
    y = {n: t.repeat_interleave(k, repeats[n]) if n in repeats else t for n, t in x.items()}
    a, b = layer(x), other(y)
    expected = {n: t.repeat_interleave(k, repeats[n]) if n in repeats else t for n, t in a.items()}
    assert_close(expected, b)


# ---------------------------------------------------------------------- torch's machinery


def test_autocast() -> None:
    space = space_from("encoder_pre_norm")
    net = UNF(space, 8, 2, 3)
    state = {n: torch.randn(2, *p.shape) for n, p in space.by_name.items()}
    exact = net(state)
    with torch.autocast("cpu", torch.bfloat16):
        rough = net(state)
    assert bool(((exact - rough.float()).abs() < 0.1 * (1 + exact.abs().max())).all())
    rough.float().sum().backward()


def test_half_precision_averages_large_tensors() -> None:
    """Sums of float16 would overflow."""
    space = perceptron(300, 300, 2)
    pool = InvariantPool(space, 1).half()
    x = {p.name: torch.full((*p.shape, 1), 50.0).half() for p in space.params}
    assert torch.allclose(pool(x).float(), torch.tensor(50.0), rtol=1e-2)


def test_vmap_over_states_and_over_models(generator: torch.Generator) -> None:
    space = space_from("lstm")
    x = features(space, generator, 3)
    nets = [EquivariantLinear(space, C, 2).double() for _ in range(3)]
    assert_close(nets[0](x), vmap(nets[0])(x))
    params, buffers = stack_module_state(nets)

    def run(p: dict[str, Tensor], b: dict[str, Tensor], t: dict[str, Tensor]) -> dict[str, Tensor]:
        return functional_call(nets[0], (p, b), (t,))

    many = vmap(run)(params, buffers, x)
    for i, net in enumerate(nets):
        assert_close(net({n: t[i] for n, t in x.items()}), {n: t[i] for n, t in many.items()})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compile(generator: torch.Generator) -> None:
    space = space_from("lstm")
    layer = EquivariantLinear(space, C, 2).double()
    x = features(space, generator, 3)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert_close(layer(x), compiled(x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda(generator: torch.Generator) -> None:
    space = space_from("lenet")
    net = UNF(space, 8, 2, 3).double()
    state = state_from(space, generator, 2)
    expected = net(state)
    assert_close(expected, net.cuda()({n: t.cuda() for n, t in state.items()}).cpu())


def test_meta_device(generator: torch.Generator) -> None:
    """Built without memory, then given memory and weights."""
    space = space_from("mlp")

    def make() -> tuple[EquivariantLinear, InvariantPool]:
        return EquivariantLinear(space, C, 2, "np", positions=2), InvariantPool(space, 2, 3)

    with torch.device("meta"):
        bare = make()
    real = make()
    x = {n: t.float() for n, t in features(space, generator).items()}
    for a, b in zip(bare, real, strict=True):
        a.to_empty(device="cpu").reset_parameters()
        a.load_state_dict(b.state_dict())
        expected = b(x)
        assert_close(expected, a(x))
        x = expected


def test_saves_and_loads(generator: torch.Generator) -> None:
    space = space_from("lenet")
    a, b = (DWSNet(space, 8, 2, 3).double().eval() for _ in range(2))
    b.load_state_dict(a.state_dict())
    state = state_from(space, generator, 2)
    assert_same(a(state), b(state))


# --------------------------------------------------------------------------------- errors


def test_errors(generator: torch.Generator) -> None:
    space = perceptron(3, 4, 2)
    layer = EquivariantLinear(space, C, 2).double()
    x = features(space, generator)
    with pytest.raises(SpaceMismatch, match="no tensor '0.bias'"):
        layer({n: t for n, t in x.items() if n != "0.bias"})
    with pytest.raises(SpaceMismatch, match=r"'1.weight' of shape \(2, 5, 4\)"):
        layer({**x, "1.weight": torch.zeros(2, 5, C)})
    with pytest.raises(SpaceMismatch, match="basis 'ring'"):
        EquivariantLinear(space, 1, 1, "ring")
    with pytest.raises(SpaceMismatch, match="positions only with 'np'"):
        EquivariantLinear(space, 1, 1, positions=2)
    with pytest.raises(SpaceMismatch, match="5 channels, 2 heads"):
        WeightSpaceAttention(space, 5, 2)
    with pytest.raises(SpaceMismatch, match="head 'invariant' with out=None"):
        DWSNet(space, out=None)
    with pytest.raises(SpaceMismatch, match="mode 'full'"):
        NFN(space, mode="full")
    with pytest.raises(SpaceMismatch, match="over 'rows'"):
        L.Dropout(space, over="rows")
    with pytest.raises(SpaceMismatch, match="over 'rows'"):
        L.FeatureNorm(space, C, over="rows")
    with pytest.raises(SpaceMismatch, match="'0.weight' of shape"):
        L.from_features(x, space)


def test_large_fixed_axes_are_refused() -> None:
    h, vocabulary = Group("h", 64, ("permutation",)), Group("50257", 50257)
    space = space_of({"table": (vocabulary, h), "head": (vocabulary, h)})
    with pytest.raises(SpaceMismatch, match='pass basis="np"'):
        EquivariantLinear(space, 1, 1)
    assert sum(p.numel() for p in EquivariantLinear(space, 1, 1, "np").parameters()) == 18


def test_channels_may_differ(generator: torch.Generator) -> None:
    space = perceptron(3, 4, 2)
    channels = {p.name: i + 1 for i, p in enumerate(space.params)}
    x = {p.name: torch.randn(*p.shape, channels[p.name], generator=generator) for p in space.params}
    layer = EquivariantLinear(space, channels, 2)
    assert {t.shape[-1] for t in layer(x).values()} == {2}
    assert InvariantPool(space, channels)(x).shape == (3 * 1 + 1 * 2 + 2 * 3 + 2 * 4,)
    assert dim_bias(space) == 8
