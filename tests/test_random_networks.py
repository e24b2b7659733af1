"""Networks that hypothesis makes up: each must satisfy L1 and L12, whatever it combines.

A network is a list of blocks around vectors, images or token sequences. Widths are distinct within
a network (up to what residuals and concatenations force), so that a swapped axis cannot pass.
"""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_laws import changes, observed
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

import wspace

WIDTHS = [8, 12, 20, 24, 28, 36, 40, 16, 32, 44]  # all divisible by 4: groups, heads, halves
Block = Callable[[int, int], tuple[nn.Module, int]]


class Fn(nn.Module):
    """A forward of its own over submodules and parameters."""

    def __init__(self, forward: Callable[..., Tensor], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.run = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


ACTIVATIONS = [nn.ReLU, nn.Tanh, nn.GELU, nn.SiLU, nn.LeakyReLU, nn.Softplus, nn.Hardswish, nn.ELU]
act = st.sampled_from(ACTIVATIONS)

# --------------------------------------------------------------------------------- vectors
# A block takes the width it gets and a width it may choose, and returns a module and its width.


def linear(a: int, b: int) -> tuple[nn.Module, int]:
    return nn.Sequential(nn.Linear(a, b), nn.ReLU()), b


def linear_no_bias(a: int, b: int) -> tuple[nn.Module, int]:
    return nn.Sequential(nn.Linear(a, b, bias=False), nn.Tanh()), b


def normed(a: int, b: int) -> tuple[nn.Module, int]:
    return weight_norm(nn.Linear(a, b)), b


def layer_norm(a: int, b: int) -> tuple[nn.Module, int]:
    return nn.LayerNorm(a), a


def rms_norm(a: int, b: int) -> tuple[nn.Module, int]:
    return nn.RMSNorm(a), a


def residual(a: int, b: int) -> tuple[nn.Module, int]:
    return Fn(
        lambda m, x: x + m.scale * m.two(F.gelu(m.one(x))),
        one=nn.Linear(a, b), two=nn.Linear(b, a), scale=nn.Parameter(torch.randn(a)),
    ), a  # fmt: skip


def gated(a: int, b: int) -> tuple[nn.Module, int]:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        gate, up = m.fused(x).chunk(2, -1)
        return gate.sigmoid() * up

    return Fn(run, fused=nn.Linear(a, 2 * b)), b


def joined(a: int, b: int) -> tuple[nn.Module, int]:
    return Fn(lambda m, x: torch.cat([x, m.one(x).relu()], -1), one=nn.Linear(a, b)), a + b


def halves(a: int, b: int) -> tuple[nn.Module, int]:
    """One part goes through a layer, the other passes by; then both meet again."""

    def run(m: nn.Module, x: Tensor) -> Tensor:
        left, right = x.split([a // 4, a - a // 4], -1)
        return torch.cat([right, m.one(left).tanh()], -1)

    return Fn(run, one=nn.Linear(a // 4, b)), a - a // 4 + b


def tied(a: int, b: int) -> tuple[nn.Module, int]:
    return Fn(
        lambda m, x: F.linear(m.one(x).relu(), m.one.weight.t()) + m.bias,
        one=nn.Linear(a, b), bias=nn.Parameter(torch.randn(a)),
    ), a  # fmt: skip


def blocks(a: int, b: int) -> tuple[nn.Module, int]:
    """A block-diagonal matrix, as a batched product over a view."""

    def run(m: nn.Module, x: Tensor) -> Tensor:
        return torch.einsum("...gi,gij->...gj", x.unflatten(-1, (4, -1)), m.w).flatten(-2).relu()

    return Fn(run, w=nn.Parameter(torch.randn(4, a // 4, b // 4) / a**0.5)), b


def pooled(a: int, b: int) -> tuple[nn.Module, int]:
    """Units in fours, of which the largest counts (maxout), and then a layer."""
    return Fn(lambda m, x: m.one(x.unflatten(-1, (-1, 4)).amax(-1)), one=nn.Linear(a // 4, b)), b


def gathered(a: int, b: int) -> tuple[nn.Module, int]:
    """Half of the units, scaled; the rest added to them in reverse roles."""

    def run(m: nn.Module, x: Tensor) -> Tensor:
        pair = x.view(*x.shape[:-1], 2, -1)
        return m.one(pair[..., 0, :] * m.gain + pair[..., 1, :].relu())

    return Fn(run, one=nn.Linear(a // 2, b), gain=nn.Parameter(torch.randn(a // 2))), b


def bilinear(a: int, b: int) -> tuple[nn.Module, int]:
    return Fn(
        lambda m, x: F.normalize(m.one(x), dim=-1) * m.two(x).softmax(-1),
        one=nn.Linear(a, b), two=nn.Linear(a, b),
    ), b  # fmt: skip


VECTOR: list[Block] = [
    linear, linear_no_bias, normed, layer_norm, rms_norm, residual, gated, joined, halves, tied,
    blocks, pooled, gathered, bilinear,
]  # fmt: skip

# ---------------------------------------------------------------------------------- images


def conv(a: int, b: int) -> tuple[nn.Module, int]:
    return nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.ReLU(inplace=True)), b


def conv_bn(a: int, b: int) -> tuple[nn.Module, int]:
    return nn.Sequential(nn.Conv2d(a, b, 1, bias=False), nn.BatchNorm2d(b), nn.SiLU()), b


def group_norm(a: int, b: int) -> tuple[nn.Module, int]:
    return nn.GroupNorm(4, a), a


def instance_norm(a: int, b: int) -> tuple[nn.Module, int]:
    return nn.InstanceNorm2d(a, affine=True), a


def grouped(a: int, b: int) -> tuple[nn.Module, int]:
    return nn.Sequential(nn.Conv2d(a, b, 3, padding=1, groups=4), nn.ReLU()), b


def depthwise(a: int, b: int) -> tuple[nn.Module, int]:
    return nn.Conv2d(a, a, 3, padding=1, groups=a), a


def multiplied(a: int, b: int) -> tuple[nn.Module, int]:
    return nn.Sequential(nn.Conv2d(a, 2 * a, 3, padding=1, groups=a), nn.Conv2d(2 * a, b, 1)), b


def residual_conv(a: int, b: int) -> tuple[nn.Module, int]:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        out = m.norm(m.two(m.one(x).relu_()))
        out += x
        return out.relu_()

    parts = nn.Conv2d(a, b, 3, padding=1), nn.Conv2d(b, a, 1), nn.BatchNorm2d(a)
    return Fn(run, one=parts[0], two=parts[1], norm=parts[2]), a


def dense(a: int, b: int) -> tuple[nn.Module, int]:
    return Fn(
        lambda m, x: torch.cat([x, m.one(m.norm(x).relu())], 1),
        norm=nn.BatchNorm2d(a), one=nn.Conv2d(a, b, 3, padding=1),
    ), a + b  # fmt: skip


def squeeze(a: int, b: int) -> tuple[nn.Module, int]:
    return Fn(
        lambda m, x: x * m.two(m.one(x.mean((2, 3), keepdim=True)).relu()).sigmoid(),
        one=nn.Conv2d(a, b, 1), two=nn.Conv2d(b, a, 1),
    ), a  # fmt: skip


def shuffle(a: int, b: int) -> tuple[nn.Module, int]:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return m.one(x.view(n, 4, c // 4, h, w).transpose(1, 2).reshape(n, c, h, w))

    return Fn(run, one=nn.Conv2d(a, b, 1, groups=4)), b


def prelu(a: int, b: int) -> tuple[nn.Module, int]:
    return nn.PReLU(a), a


def upsample(a: int, b: int) -> tuple[nn.Module, int]:
    return nn.Sequential(nn.ConvTranspose2d(a, b, 2, 2), nn.MaxPool2d(2)), b


IMAGE: list[Block] = [
    conv, conv_bn, group_norm, instance_norm, grouped, depthwise, multiplied, residual_conv, dense,
    squeeze, shuffle, prelu, upsample,
]  # fmt: skip

# ---------------------------------------------------------------------------------- tokens


def attention(style: str) -> Block:
    def make(a: int, b: int) -> tuple[nn.Module, int]:
        d = b // 4 if style != "odd" else b // 4 + 1

        def run(m: nn.Module, x: Tensor) -> Tensor:
            n, t, _ = x.shape
            qkv = m.qkv(m.norm(x))
            if style == "chunk":
                q, k, v = (y.view(n, t, 4, d).transpose(1, 2) for y in qkv.chunk(3, -1))
            elif style == "per_head":
                q, k, v = qkv.view(n, t, 4, 3 * d).transpose(1, 2).chunk(3, -1)
            else:
                q, k, v = qkv.view(n, t, 3, 4, d).permute(2, 0, 3, 1, 4).unbind(0)
            if style == "by_hand":
                y = (q @ k.mT / d**0.5).softmax(-1) @ v
            else:
                y = F.scaled_dot_product_attention(q, k, v, is_causal=style == "chunk")
            return x + m.out(y.transpose(1, 2).reshape(n, t, 4 * d))

        return Fn(run, qkv=nn.Linear(a, 12 * d), out=nn.Linear(4 * d, a), norm=nn.LayerNorm(a)), a

    return make


def multi_query(a: int, b: int) -> tuple[nn.Module, int]:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q = m.q(x).view(n, t, 4, b // 4).transpose(1, 2)
        k, v = (y(x).view(n, t, 2, b // 4).transpose(1, 2) for y in (m.k, m.v))
        k, v = (y.repeat_interleave(2, dim=1) for y in (k, v))
        return x + m.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    return Fn(
        run, q=nn.Linear(a, b), k=nn.Linear(a, b // 2), v=nn.Linear(a, b // 2), out=nn.Linear(b, a)
    ), a


def recurrent(kind: str, *, bidirectional: bool = False) -> Block:
    def make(a: int, b: int) -> tuple[nn.Module, int]:
        rnn = getattr(nn, kind)(a, b, batch_first=True, bidirectional=bidirectional)
        return Fn(lambda m, x: m.rnn(x)[0], rnn=rnn), b * (1 + bidirectional)

    return make


def convolved(a: int, b: int) -> tuple[nn.Module, int]:
    return Fn(
        lambda m, x: m.one(x.transpose(1, 2)).relu().transpose(1, 2),
        one=nn.Conv1d(a, b, 3, padding=1),
    ), b


def positions(a: int, b: int) -> tuple[nn.Module, int]:
    table = nn.Embedding(16, a)
    return Fn(lambda m, x: x + m.table(torch.arange(x.shape[1])), table=table), a


TOKENS: list[Block] = [
    *(attention(style) for style in ("chunk", "per_head", "unbind", "by_hand", "odd")),
    multi_query, recurrent("LSTM"), recurrent("GRU"), recurrent("RNN", bidirectional=True),
    recurrent("LSTM", bidirectional=True), convolved, positions, linear, layer_norm, rms_norm,
    residual, gated, joined, tied,
]  # fmt: skip

# -------------------------------------------------------------------------------- networks


@st.composite
def networks(draw: st.DrawFn, depth: int = 4) -> tuple[nn.Module, Tensor]:
    """A module in float64 and an input for it."""
    kind = draw(st.sampled_from(["vector", "image", "tokens"]))
    widths = iter(draw(st.permutations(WIDTHS)))
    torch.manual_seed(draw(st.integers(0, 1000)))
    first, pool = next(widths), {"vector": VECTOR, "image": IMAGE, "tokens": TOKENS}[kind]
    body: list[nn.Module] = [nn.Conv2d(3, first, 3) if kind == "image" else nn.Linear(5, first)]
    width = first
    for _ in range(draw(st.integers(1, depth))):
        if width % 4:  # what needs a multiple of four may come next
            body.append(nn.Conv2d(width, 8, 1) if kind == "image" else nn.Linear(width, 8))
            width = 8
        block, width = draw(st.sampled_from(pool))(width, next(widths))
        body.append(block)
        if draw(st.booleans()):
            body.append(draw(act)())
    if kind == "image":
        if draw(st.booleans()):
            body += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        else:
            body += [nn.AdaptiveMaxPool2d((2, 3)), nn.Flatten()]
            width *= 6
    elif kind == "tokens" and draw(st.booleans()):
        body.append(Fn(lambda m, x: x.mean(1)))
    body.append(nn.Linear(width, 7))
    x = {"vector": (4, 5), "image": (2, 3, 8, 8), "tokens": (2, 6, 5)}[kind]
    return nn.Sequential(*body).double().eval(), torch.randn(x, dtype=torch.float64)


def assert_lawful(module: nn.Module, x: Tensor) -> None:
    before = observed(module, (x,), {})
    space = wspace.trace(module, x)
    assert changes(before, observed(module, (x,), {})) == []
    report = wspace.verify(space, module, x)
    assert report.ok
    assert space.opaque == ()
    assert space.capture == "abstract"
    assert space.coverage > 0


@given(networks())
@settings(max_examples=60)
def test_random_networks(network: tuple[nn.Module, Tensor]) -> None:
    assert_lawful(*network)


@pytest.mark.slow
@given(networks(depth=7))
@settings(max_examples=1000)
def test_random_deep_networks(network: tuple[nn.Module, Tensor]) -> None:
    assert_lawful(*network)


@pytest.mark.parametrize("pool", [VECTOR, IMAGE, TOKENS], ids=["vector", "image", "tokens"])
def test_every_block_alone(pool: list[Block], float64: None) -> None:
    """Between two layers, each block leaves some freedom on most of its parameters."""
    for block in pool:
        inner, width = block(12, 20)
        if pool is IMAGE:
            net = nn.Sequential(nn.Conv2d(3, 12, 1), inner, nn.Flatten(), nn.LazyLinear(7))
            x = torch.randn(2, 3, 4, 4)
        else:
            net = nn.Sequential(nn.Linear(5, 12), inner, nn.Linear(width, 7))
            x = torch.randn((2, 6, 5) if pool is TOKENS else (4, 5))
        net(x)
        net.eval()
        assert_lawful(net, x)
        assert wspace.trace(net, x).coverage > 0.9, block
