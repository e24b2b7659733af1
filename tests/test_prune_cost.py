"""What a network costs at any sizes, and which of its groups are counted.

Two recounts that know nothing of groups: the elements of `module.parameters()` with PyTorch's own
`FlopCounterMode`, and a smaller network of the same factory. Whether a group is counted is checked
by what it means: zeros in the place of a unit are the same as no unit.
"""

from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from cases import CASES, build
from cases_attention import SwiGLU, TokenClassifier
from cases_conv import ResNet18
from cases_mlp import DenseMoE, LoopMoE, TopMoE, mlp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import wspace
from wspace.action import shape_of
from wspace.errors import PruneError, SpaceMismatch
from wspace.prune.cost import Cost, latency
from wspace.prune.pruner import Pruner
from wspace.prune.restriction import Restriction, prunable
from wspace.prune.select import Selection
from wspace.space import Axis, Group, WeightSpace
from wspace.trace.sandbox import dense_experts, without_onednn
from wspace.trace.work import CONTRACTIONS, survey

NOT_COUNTED_BY_TORCH = {"_trilinear", "mv", "addmv", "dot", "vdot", "_cdist_forward"}
"""Contractions that `FlopCounterMode` counts as nothing."""
HF = [name for name in CASES if CASES[name].build.__module__ == "cases_hf"]
FEW = {"gpt2", "llama", "mixtral", "t5"}
ALL = [
    pytest.param(name, marks=pytest.mark.slow if name in HF and name not in FEW else ())
    for name in CASES
]


def flops_of(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> Counter:
    """Multiply-accumulates by operator as PyTorch counts them, with the kernels of a trace."""
    with sdpa_kernel(SDPBackend.MATH), without_onednn(), dense_experts(module):  # noqa: SIM117
        with FlopCounterMode(display=False) as counter:
            module(*args, **kwargs)
    found = Counter(
        {str(op).rpartition(".")[2]: n for op, n in counter.flop_counts["Global"].items()}
    )
    assert all(n % 2 == 0 for n in found.values())
    return Counter({op: n // 2 for op, n in found.items()})


def macs_by_operator(cost: Cost) -> Counter:
    """Multiply-accumulates by operator as we count them, at full size."""
    sizes = {n: g.size for n, g in cost.space.groups.items()}
    found: Counter = Counter()
    for work in cost.survey.works:
        found[work.op] += work.macs(sizes)
    return found


@pytest.mark.parametrize("name", ALL)
def test_dense_network_recounted(name: str) -> None:
    module, args, kwargs = build(name)
    space = wspace.trace(module, args, kwargs)
    cost = Cost.measured(module, space, args, kwargs)
    assert cost.parameters() == sum(p.numel() for p in module.parameters())
    ours, theirs = macs_by_operator(cost), flops_of(module, args, kwargs)
    assert cost.macs() == sum(ours.values())
    assert not set(theirs) & NOT_COUNTED_BY_TORCH
    known = sum(n for op, n in ours.items() if op not in NOT_COUNTED_BY_TORCH)
    assert known == sum(theirs.values()), (ours, theirs)


def test_recount_sees_an_operator_that_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    module, args, kwargs = build("vgg")
    space = wspace.trace(module, args, kwargs)
    monkeypatch.delitem(CONTRACTIONS, "convolution")
    less = macs_by_operator(Cost.measured(module, space, args, kwargs))
    assert sum(less.values()) < sum(flops_of(module, args, kwargs).values())


def test_bilinear_by_hand() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 5), nn.Bilinear(5, 7, 11), nn.Linear(11, 2)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.c(self.b(self.a(x), y))

    module, args = Net(), (torch.randn(13, 3), torch.randn(13, 7))
    cost = Cost.measured(module, wspace.trace(module, args), args)
    assert cost.macs() == 13 * (3 * 5 + 5 * 7 * 11 + 11 * 2)


# --------------------------------------------------------------------------- other sizes


@pytest.mark.parametrize("name", [n for n in CASES if n not in HF])
def test_parameters_of_what_is_left(name: str, generator: torch.Generator) -> None:
    module, args, kwargs = build(name)
    space = wspace.trace(module, args, kwargs)
    keep = {}
    for group in prunable(space).values():
        kept = int(torch.randint(1, group.size + 1, (), generator=generator))
        keep[group.name] = torch.arange(group.size) < kept
    left = Restriction(space, keep)
    shapes = [p.shape for p in left.small.params if not p.buffer]
    count = sum(torch.Size(shape).numel() for shape in shapes)
    assert Cost.of(space).parameters(left.counts()) == count
    assert count == Cost.of(left.small).parameters()


def counts_between(large: WeightSpace, small: WeightSpace) -> dict[str, int]:
    """Sizes that the groups of one space have in another of the same architecture."""
    found: dict[str, int] = {}

    def visit(a: Axis, b: Axis) -> None:
        for x, y in zip(a.factors, b.factors, strict=True):
            if isinstance(x, Group):
                if not x.fixed:
                    assert found.setdefault(x.name, y.size) == y.size
            else:
                for p, q in zip(x.parts, y.parts, strict=True):
                    visit(p, q)

    for p in small.params:
        for a, b in zip(large[p.name].axes, p.axes, strict=True):
            visit(a, b)
    return found


def conv_net(a: int, b: int, c: int) -> nn.Module:
    """Convolutions: plain, depthwise, dilated and transposed, then a flatten."""
    return nn.Sequential(
        nn.Conv2d(2, a, 3, 2, 1), nn.BatchNorm2d(a), nn.ReLU(),
        nn.Conv2d(a, a, 3, groups=a), nn.Conv2d(a, b, 3, dilation=2), nn.ReLU(),
        nn.ConvTranspose2d(b, b, 2, 2), nn.Flatten(), nn.Linear(b * 100, c), nn.Linear(c, 2),
    )  # fmt: skip


def transformer(width: int, heads: int, hidden: int) -> nn.Module:
    """Two layers of PyTorch's encoder."""
    layer = nn.TransformerEncoderLayer(width, heads, hidden, 0.0, "gelu", batch_first=True)
    body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return TokenClassifier(body, width)


class Loops(nn.Module):
    """A recurrent layer read by a linear one."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.rnn, self.out = nn.LSTM(5, hidden, bidirectional=True), nn.Linear(2 * hidden, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0])


SIZES: dict[str, tuple[Callable[..., nn.Module], tuple, tuple, tuple[int, ...]]] = {
    "mlp": (mlp, (5, 12, 20, 28, 3), (5, 7, 2, 13, 3), (4, 5)),
    "conv": (conv_net, (12, 20, 28), (7, 11, 13), (3, 2, 22, 22)),
    "resnet": (ResNet18, ((12, 16, 20, 28),), ((7, 5, 11, 13),), (2, 3, 32, 32)),
    "transformer": (transformer, (20, 4, 28), (9, 3, 13), (2, 7, 5)),
    "swiglu": (lambda w, h: TokenClassifier(SwiGLU(w, h), w), (12, 20), (7, 11), (2, 7, 5)),
    "lstm": (Loops, (12,), (7,), (2, 7, 5)),
    "moe_dense": (DenseMoE, (5,), (3,), (6, 5)),
    "moe_top2": (TopMoE, (5, 12, 20), (3, 7, 11), (6, 7)),
    "moe_dispatch": (LoopMoE, (5,), (3,), (6, 7)),
}


@pytest.mark.parametrize("name", SIZES)
def test_cost_of_a_smaller_network_built_directly(name: str) -> None:
    make, large_sizes, small_sizes, shape = SIZES[name]
    x = torch.randn(shape)
    costs = []
    for sizes in (large_sizes, small_sizes):
        module = make(*sizes).eval()
        costs.append(Cost.measured(module, wspace.trace(module, x), x))
    large, small = costs
    counts = counts_between(large.space, small.space)
    assert large.parameters(counts) == small.parameters() < large.parameters()
    assert large.macs(counts) == small.macs() <= large.macs()
    for group in counts:  # and every group matters, but for experts that each token chooses from
        less = {**counts, group: large.space.groups[group].size}
        if counts[group] < large.space.groups[group].size and name != "moe_dispatch":
            assert large.macs(less) > small.macs()


QUICK = {"vgg", "densenet", "lstm", "moe_dense", "attention_gqa", "swiglu", "language_model_tied"}
ROUTED = {"switch"}  # how many tokens reach an expert depends on the weights
WHOLE = {"linear", "attention_conv", "cross_attention"}  # no units, or their code fixes all sizes


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in CASES
        if name not in ROUTED | WHOLE
    ],
)
def test_pruned_network_recounted(name: str, generator: torch.Generator) -> None:
    module, args, kwargs = build(name)
    space = wspace.trace(module, args, kwargs)
    pruner = Pruner(module, space, args, kwargs, rebuild="copy")
    scores = {
        n: torch.rand(shape_of(g, space), generator=generator) for n, g in prunable(space).items()
    }
    few = pruner.restrict(scores, Selection(amount=0.25, ignore=list(pruner.pinned)))
    small, left = pruner.prune(few, check=False), few.counts()
    sizes = {n: g.size for n, g in space.groups.items()} | left
    known = [w for w in pruner.cost.survey.works if w.op not in NOT_COUNTED_BY_TORCH]
    assert pruner.cost.parameters(left) == sum(p.numel() for p in small.parameters())
    assert sum(w.macs(sizes) for w in known) == sum(flops_of(small, args, kwargs).values())
    assert pruner.cost.parameters(left) < pruner.cost.parameters()


def test_errors_name_what_is_wrong() -> None:
    module, args, kwargs = build("mlp")
    space = wspace.trace(module, args, kwargs)
    cost = Cost.of(space)
    for counts in ({"h1": 0}, {"h1": 13}, {"h9": 1}, {"5": 4}):
        with pytest.raises(PruneError, match=next(iter(counts))):
            cost.parameters(counts)
    with pytest.raises(PruneError, match="multiplications were not counted"):
        cost.macs()
    with pytest.raises(SpaceMismatch, match="is not a module of this space"):
        Cost.measured(mlp(5, 4, 3), space, args)


# ------------------------------------------------------------------------------- counted


class Between(nn.Module):
    """Two linear layers with some function of the hidden units between them."""

    def __init__(self, width: int, between: nn.Module | Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.between, self.b = nn.Linear(3, width), between, nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x)))


def per_unit(make: Callable[[int], nn.Module]) -> Callable[[int], nn.Module]:
    """A network with a module of the width of its hidden units."""
    return lambda width: Between(width, make(width))


def through(function: Callable[[Tensor], Tensor]) -> Callable[[int], nn.Module]:
    """A network with a function of its hidden units."""
    return lambda width: Between(width, function)


class Channels(nn.Module):
    """A network of convolutions with a norm; the width of channels may differ."""

    def __init__(self, width: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv1d(3, width, 3), norm(width), nn.Conv1d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.a(x.unsqueeze(-1).expand(-1, -1, 5) * torch.arange(5))))


class Attends(nn.Module):
    """Attention whose queries and keys have `width` dimensions."""

    def __init__(self, width: int, scale: float | None = None) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(3, width), nn.Linear(3, width), nn.Linear(3, 2)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x)[None] for f in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(q, k, v, scale=self.scale)


class Slots(nn.Module):
    """Queries of the input look at `width` learned slots."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.k, self.v = nn.Parameter(torch.randn(width, 3)), nn.Parameter(torch.randn(width, 2))

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x[None], self.k[None], self.v[None])


COUNTED: dict[str, Callable[[int], nn.Module]] = {
    "layer_norm": per_unit(nn.LayerNorm),
    "rms_norm": per_unit(nn.RMSNorm),
    "rms_norm_by_hand": through(lambda x: x * x.pow(2).mean(-1, keepdim=True).add(1e-6).rsqrt()),
    "layer_norm_by_hand": through(lambda x: x / x.var(-1, keepdim=True).add(1e-5).sqrt()),
    "softmax": through(lambda x: x.softmax(-1)),
    "log_softmax": through(lambda x: x.log_softmax(-1)),
    "mean": through(lambda x: x - x.mean(-1, keepdim=True)),
    "logsumexp": through(lambda x: x - x.logsumexp(-1, keepdim=True)),
    "largest": through(lambda x: x - (-x.abs()).amax(-1, keepdim=True)),
    "smallest": through(lambda x: x + x.abs().min(-1, keepdim=True).values),
    "median": through(lambda x: x + (x + 9.0).median(-1, keepdim=True).values),
    "sort": through(lambda x: x + (-x.abs()).sort(-1).values[:, -1:]),
    "topk": through(lambda x: x + (-x.abs()).topk(2, -1).values.sum(-1, keepdim=True)),
    "prod": through(lambda x: x + x.prod(-1, keepdim=True)),
    "group_norm": lambda width: Channels(width, lambda n: nn.GroupNorm(1, n)),
    "batch_norm_across": through(
        lambda x: F.batch_norm(x[:, None], None, None, training=True)[:, 0]
    ),
    "sum_of_exp": through(lambda x: x + x.exp().sum(-1, keepdim=True)),
    "attention": Attends,
    "slots": Slots,
}
NOT_COUNTED: dict[str, Callable[[int], nn.Module]] = {
    "relu": per_unit(lambda n: nn.ReLU()),
    "gelu": per_unit(lambda n: nn.GELU()),
    "sigmoid": per_unit(lambda n: nn.Sigmoid()),
    "dropout": per_unit(lambda n: nn.Dropout()),
    "batch_norm": per_unit(nn.BatchNorm1d),
    "batch_norm_of_the_batch": per_unit(lambda n: nn.BatchNorm1d(n, track_running_stats=False)),
    "batch_norm_across_that_knows": through(
        lambda x: F.batch_norm(x[:, None], torch.zeros(1), torch.ones(1))[:, 0]
    ),
    "sum": through(lambda x: x + x.sum(-1, keepdim=True)),
    "length": through(lambda x: x / x.norm(dim=-1, keepdim=True)),
    "normalize": through(lambda x: F.normalize(x, dim=-1)),
    "mean_that_is_dropped": through(lambda x: (x, x.mean(-1))[0]),
    "mean_of_rows": through(lambda x: x - x.mean(0, keepdim=True)),
    "softmax_of_rows": through(lambda x: x * x.softmax(0)),
    "larger_of_two": through(lambda x: torch.maximum(x, x.tanh())),
    "instance_norm": lambda width: Channels(width, nn.InstanceNorm1d),
    "group_per_channel": lambda width: Channels(width, lambda n: nn.GroupNorm(n, n)),
    "attention_with_its_scale": lambda width: Attends(width, 0.3),
}


def zeroed_and_gone(make: Callable[[int], nn.Module]) -> tuple[str, Tensor, Tensor]:
    """A group, the outputs with zeros for two units of seven, and those of a network without."""
    large, small, x = make(7).eval(), make(5).eval(), torch.randn(4, 3)
    space = wspace.trace(large, x)
    (name,) = prunable(space)
    few = Restriction(space, {name: torch.tensor([1, 0, 1, 1, 0, 1, 1], dtype=torch.bool)})
    state = large.state_dict()
    small.load_state_dict(few.state(state))
    large.load_state_dict(few.masked(state))
    return name, large(x), small(x)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", [*COUNTED, *NOT_COUNTED])
def test_counted_means_zeros_are_not_nothing(name: str) -> None:
    make = (COUNTED | NOT_COUNTED)[name]
    group, zeroed, gone = zeroed_and_gone(make)
    module, x = make(7).eval(), torch.randn(4, 3)
    found = survey(wspace.trace(module, x), module, x)
    gap = float((zeroed - gone).detach().abs().max())
    if name in COUNTED:
        assert list(found.counted) == [group]
        assert gap > 1e-3
    else:
        assert found.counted == {}
        assert gap < 1e-12


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("encoder_pre_norm", {"h1", "h3", "h7"}),  # the stream; dimensions of queries, no values
        ("attention_linear", {"h3"}),  # a sum of elu(q) + 1 times elu(k) + 1, which is 1 at zero
        ("cross_attention", {"h3", "h4"}),  # it returns the mean of its weights over heads
        ("moe_dense", {"h2"}),  # experts, by the softmax of their gate
        ("deep_sets", set()),
        ("maxout", {"h3", "h4"}),
    ],
)
def test_counted_groups_of_networks(name: str, groups: set[str]) -> None:
    module, args, kwargs = build(name)
    found = survey(wspace.trace(module, args, kwargs), module, args, kwargs)
    assert set(found.counted) == groups
    assert all(labels for labels in found.counted.values())


# ------------------------------------------------------------------------------- latency


class Remembers(nn.Module):
    """Counts its runs, keeps the last input and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(3, 3), nn.Dropout()
        self.register_buffer("runs", torch.zeros(()))
        self.last: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        self.runs += 1
        self.last.append(x)
        return self.drop(self.linear(x)) + torch.randn(3)


def states(module: nn.Module) -> Iterator[object]:
    yield from (m.training for m in module.modules())
    yield from (x.tolist() for x in module.state_dict().values())
    yield torch.get_rng_state().tolist()


def test_latency_leaves_the_module_as_it_was() -> None:
    module, x = Remembers(), torch.randn(2, 3)
    before = list(states(module))
    took = latency(module, x, repeats=3, warmup=1)
    assert took.median > 0
    assert took.spread >= 0
    assert "ms" in str(took)
    assert module.last == []
    assert list(states(module)) == before
    with pytest.raises(PruneError, match="repeats=0"):
        latency(module, torch.randn(2, 3), repeats=0)
