"""Small fully connected, recurrent, graph and routed networks; table in `cases`."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm


def mlp(*widths: int, act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers with an activation between them."""
    layers: list[nn.Module] = []
    for a, b in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(a, b), act()]
    return nn.Sequential(*layers[:-1])


def norm_mlp(norm: type[nn.Module], act: type[nn.Module]) -> nn.Module:
    """Two hidden layers, each normalised."""
    return nn.Sequential(
        nn.Linear(5, 12), norm(12), act(), nn.Linear(12, 20), norm(20), act(), nn.Linear(20, 3)
    )


def weight_normed() -> nn.Module:
    """Weight norm as a parametrization, so that weights are computed in the forward."""
    return nn.Sequential(
        weight_norm(nn.Linear(5, 12)), nn.ReLU(), weight_norm(nn.Linear(12, 20)), nn.ReLU(),
        nn.Linear(20, 3),
    )  # fmt: skip


class TiedAutoEncoder(nn.Module):
    """The decoder multiplies by the transposed encoder weights."""

    def __init__(self) -> None:
        super().__init__()
        self.enc1, self.enc2 = nn.Linear(15, 12), nn.Linear(12, 4)
        self.bias1, self.bias2 = nn.Parameter(torch.randn(12)), nn.Parameter(torch.randn(15))

    def forward(self, x: Tensor) -> Tensor:
        code = torch.tanh(self.enc2(torch.tanh(self.enc1(x))))
        h = torch.tanh(F.linear(code, self.enc2.weight.t(), self.bias1))
        return h @ self.enc1.weight + self.bias2


class Siren(nn.Module):
    """Implicit representation with sine activations of frequency 30."""

    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        widths = (2, hidden, hidden, 1)
        self.layers = nn.ModuleList(
            nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = torch.sin(30 * layer(x))
        return self.layers[-1](x)


class NeRF(nn.Module):
    """Fourier features, a skip concatenation of the input, density and colour outputs."""

    def __init__(self, bands: int = 3, hidden: int = 20) -> None:
        super().__init__()
        self.register_buffer("freq", 2.0 ** torch.arange(bands))
        d = 3 * 2 * bands
        self.first, self.skip = mlp(d, hidden, hidden), nn.Linear(hidden + d, 28)
        self.density, self.colour = nn.Linear(28, 1), mlp(28, 12, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        phase = (x[..., None] * self.freq).flatten(-2)
        code = torch.cat([phase.sin(), phase.cos()], -1)
        h = F.relu(self.skip(torch.cat([F.relu(self.first(code)), code], -1)))
        return F.softplus(self.density(h)).squeeze(-1), self.colour(h).sigmoid()


class ResidualMLP(nn.Module):
    """Blocks around one residual stream, with learned per-channel layer scale."""

    def __init__(self, width: int = 20, depth: int = 2) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(5, width), nn.Linear(width, 3)
        self.blocks = nn.ModuleList(
            mlp(width, 12 + 16 * i, width, act=nn.GELU) for i in range(depth)
        )
        self.scale = nn.Parameter(torch.randn(depth, width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for block, scale in zip(self.blocks, self.scale, strict=True):
            x = x + scale * block(F.layer_norm(x, x.shape[-1:]))
        return self.out(x)


class Highway(nn.Module):
    """Each layer carries a gated share of its input on."""

    def __init__(self, width: int = 12, depth: int = 2) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(5, width), nn.Linear(width, 3)
        self.plain = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.gate = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for plain, gate in zip(self.plain, self.gate, strict=True):
            t = torch.sigmoid(gate(x))
            x = t * F.relu(plain(x)) + (1 - t) * x
        return self.out(x)


class Maxout(nn.Module):
    """Units are the maximum of three linear pieces."""

    def __init__(self, pieces: int = 3) -> None:
        super().__init__()
        self.pieces, self.out = pieces, nn.Linear(20, 4)
        self.fc1, self.fc2 = nn.Linear(5, 12 * pieces), nn.Linear(12, 20 * pieces)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x).view(-1, 12, self.pieces).amax(-1)
        x = self.fc2(x).view(-1, self.pieces, 20).max(dim=1).values
        return self.out(x)


class BilinearNet(nn.Module):
    """Two encoders joined by `nn.Bilinear`, and a cosine similarity as second output."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(5, 12), nn.Linear(4, 20)
        self.join, self.out = nn.Bilinear(12, 20, 28), nn.Linear(28, 3)
        self.project = nn.Linear(20, 12, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        a, b = torch.tanh(self.left(x)), torch.tanh(self.right(y))
        return self.out(F.relu(self.join(a, b))), F.cosine_similarity(a, self.project(b), dim=-1)


class HyperNet(nn.Module):
    """A network whose output is the weight of a second layer, applied to its input."""

    def __init__(self, hidden: int = 12) -> None:
        super().__init__()
        self.hidden, self.first, self.out = hidden, nn.Linear(5, hidden), nn.Linear(20, 3)
        self.weights = mlp(4, 28, 20 * hidden + 20)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        w, b = self.weights(z).split([20 * self.hidden, 20], dim=-1)
        h = torch.baddbmm(
            b.unsqueeze(-1), w.view(-1, 20, self.hidden), self.first(x).relu().unsqueeze(-1)
        )
        return self.out(h.squeeze(-1).relu())


class DeepSets(nn.Module):
    """Encode each element, sum, decode."""

    def __init__(self) -> None:
        super().__init__()
        self.phi, self.rho = mlp(5, 12, 20), mlp(20, 28, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.rho(self.phi(x).sum(dim=1))


class GraphConv(nn.Module):
    """Two graph convolutions with a fixed normalised adjacency, and a readout."""

    def __init__(self, nodes: int = 6) -> None:
        super().__init__()
        adjacency = (torch.rand(nodes, nodes) < 0.5).float() + torch.eye(nodes)
        self.register_buffer("adjacency", adjacency / adjacency.sum(1, keepdim=True))
        self.conv1, self.conv2, self.out = nn.Linear(5, 12), nn.Linear(12, 20), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(torch.matmul(self.adjacency, self.conv1(x)))
        x = F.relu(self.conv2(torch.einsum("nm,bmc->bnc", self.adjacency, x)))
        return self.out(x.mean(1))


class GraphAttention(nn.Module):
    """GAT by edge index: gather, softmax over incoming edges by scatter, sum by index_add."""

    def __init__(self, heads: int = 2, d: int = 14) -> None:
        super().__init__()
        self.heads, self.d = heads, d
        self.register_buffer("edges", torch.tensor([[0, 1, 2, 3, 4, 0, 2], [1, 2, 3, 4, 0, 3, 1]]))
        self.proj, self.out = nn.Linear(5, heads * d), nn.Linear(heads * d, 3)
        self.att = nn.Parameter(torch.randn(2, heads, d))

    def forward(self, x: Tensor) -> Tensor:
        h = self.proj(x).view(-1, self.heads, self.d)
        src, dst = self.edges
        score = (h[src] * self.att[0]).sum(-1) + (h[dst] * self.att[1]).sum(-1)
        score = F.leaky_relu(score, 0.2).exp()
        total = torch.zeros(h.shape[0], self.heads, dtype=h.dtype).index_add(0, dst, score)
        message = h.index_select(0, src) * (score / total[dst]).unsqueeze(-1)
        return self.out(torch.zeros_like(h).index_add(0, dst, message).flatten(1).relu())


class DenseMoE(nn.Module):
    """Expert MLPs in a list, mixed by a softmax over all of them."""

    def __init__(self, experts: int = 3) -> None:
        super().__init__()
        self.inp, self.out, self.gate = nn.Linear(5, 12), nn.Linear(12, 4), nn.Linear(12, experts)
        self.experts = nn.ModuleList(mlp(12, 20, 12) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        weight = self.gate(x).softmax(-1)
        mixed = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            mixed = mixed + weight[:, i : i + 1] * expert(x)
        return self.out(x + mixed)


class StackedMoE(DenseMoE):
    """The same experts stacked and weighted by position, or averaged in any order."""

    def __init__(self, *, ordered: bool) -> None:
        super().__init__()
        self.ordered = ordered

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        every = torch.stack([expert(x) for expert in self.experts], 1)
        if self.ordered:
            return self.out((every * self.gate(x)[:, :, None]).sum(1))
        return self.out(every.mean(1) * self.gate(x).sum(1, keepdim=True))


class SummedMoE(DenseMoE):
    """The same mixture by Python's `sum`, which starts with the number 0."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        weight = self.gate(x).softmax(-1)
        return self.out(sum(weight[:, i : i + 1] * e(x) for i, e in enumerate(self.experts)))


class TopMoE(nn.Module):
    """Stacked expert parameters, routed to the two best experts of each token."""

    def __init__(self, experts: int = 5, width: int = 12, hidden: int = 20) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(7, width), nn.Linear(width, 4)
        self.gate = nn.Linear(width, experts, bias=False)
        self.w1 = nn.Parameter(torch.randn(experts, hidden, width) / width**0.5)
        self.b1 = nn.Parameter(torch.randn(experts, hidden))
        self.w2 = nn.Parameter(torch.randn(experts, width, hidden) / hidden**0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        value, index = torch.topk(self.gate(x), 2, dim=-1)
        weight = torch.zeros(x.shape[0], self.w1.shape[0], dtype=x.dtype)
        weight = weight.scatter(1, index, value.softmax(-1))
        h = F.silu(torch.einsum("bi,ehi->ebh", x, self.w1) + self.b1[:, None])
        y = torch.bmm(h, self.w2.mT)
        return self.out(x + torch.einsum("ebo,be->bo", y, weight))


class LoopMoE(nn.Module):
    """Tokens are dispatched to their two experts by masks and put back by index_add."""

    def __init__(self, experts: int = 3, width: int = 12) -> None:
        super().__init__()
        self.inp, self.out, self.gate = (
            nn.Linear(7, width),
            nn.Linear(width, 4),
            nn.Linear(width, experts),
        )
        self.experts = nn.ModuleList(mlp(width, 20, width) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        value, index = self.gate(x).softmax(-1).topk(2, dim=-1)
        value = value / value.sum(-1, keepdim=True)
        total = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            token, slot = torch.where(index == i)
            total.index_add_(0, token, value[token, slot, None] * expert(x[token]))
        return self.out(x + total)


class Recurrent(nn.Module):
    """Two layers of a recurrent module and a linear readout of every step."""

    def __init__(self, kind: str, *, bidirectional: bool, **options: object) -> None:
        super().__init__()
        rnn = getattr(nn, kind)
        self.rnn = rnn(5, 12, 2, batch_first=True, bidirectional=bidirectional, **options)
        width = options.get("proj_size", 12) * (2 if bidirectional else 1)
        self.out = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0])


class CellLoop(nn.Module):
    """LSTM and GRU cells stepped by a Python loop."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru, self.out = nn.LSTMCell(5, 12), nn.GRUCell(12, 20), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        state, g = None, x.new_zeros(x.shape[0], 20)
        for step in range(x.shape[1]):
            state = self.lstm(x[:, step], state)
            g = self.gru(state[0], g)
        return self.out(g)


class HandLSTM(nn.Module):
    """A layer-normalised LSTM written out, with one fused gate matrix."""

    def __init__(self, d: int = 12) -> None:
        super().__init__()
        self.d, self.out = d, nn.Linear(d, 3)
        self.x2h, self.h2h = nn.Linear(5, 4 * d), nn.Linear(d, 4 * d, bias=False)
        self.norm = nn.LayerNorm(d)

    def forward(self, x: Tensor) -> Tensor:
        h = c = torch.zeros(x.shape[0], self.d, dtype=x.dtype)
        outputs = []
        for x_t in x.unbind(1):
            i, f, g, o = (self.x2h(x_t) + self.h2h(h)).chunk(4, dim=-1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * self.norm(c).tanh()
            outputs.append(h)
        return self.out(torch.stack(outputs, dim=1))


class ControlFlow(nn.Module):
    """The branch taken depends on an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(5, 12), nn.Linear(20, 3)
        self.yes, self.no = nn.Linear(12, 20), nn.Linear(12, 20)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.inp(x))
        h = self.yes(h) if h.sum() > 0 else self.no(h).sigmoid()
        return self.out(h.relu())


class Spare(nn.Module):
    """Parameters and buffers that the forward never reads (an EMA copy, an unused head)."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.unused = mlp(5, 12, 20, 3), nn.Linear(20, 9)
        self.register_buffer("ema", self.net[0].weight.detach().clone())
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.scalar = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scalar * self.net(x)


class Kan(nn.Module):
    """Kolmogorov-Arnold layers: a learned mixture of Gaussian bumps on every edge."""

    def __init__(self, *widths: int, bumps: int = 4) -> None:
        super().__init__()
        self.register_buffer("centres", torch.linspace(-1, 1, bumps))
        pairs = list(zip(widths, widths[1:], strict=False))
        self.spline = nn.ParameterList(nn.Parameter(torch.randn(b, a, bumps) / a) for a, b in pairs)
        self.base = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in pairs)

    def forward(self, x: Tensor) -> Tensor:
        for spline, base in zip(self.spline, self.base, strict=True):
            bumps = torch.exp(-((x.unsqueeze(-1) - self.centres) ** 2) * 4)
            x = base(F.silu(x)) + torch.einsum("big,oig->bo", bumps, spline)
        return x


class MultiOutput(nn.Module):
    """A shared trunk with heads of different kinds, returned as a nested structure."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = mlp(5, 12, 20)
        self.mean, self.log_std, self.value = nn.Linear(20, 2), nn.Linear(20, 2), mlp(20, 28, 1)

    def forward(self, x: Tensor) -> dict[str, object]:
        h = F.elu(self.trunk(x))
        policy = self.mean(h).tanh(), self.log_std(h).clamp(-4, 1).exp()
        return {"policy": policy, "value": self.value(h)[..., 0], "best": [policy[0].max()]}


class SharedBlock(nn.Module):
    """One block applied three times (a deep equilibrium's unrolled iterations)."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.inp, self.block, self.out = (
            nn.Linear(5, width),
            mlp(width, 20, width),
            nn.Linear(width, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        u = self.inp(x)
        z = torch.zeros_like(u)
        for _ in range(3):
            z = F.normalize(torch.tanh(self.block(z) + u), dim=-1)
        return self.out(z)


class StateSpace(nn.Module):
    """Diagonal linear state-space model (S4D): a long convolution by FFT, with a skip."""

    def __init__(self, width: int = 12, state: int = 4) -> None:
        super().__init__()
        self.inp, self.mix, self.out = (
            nn.Linear(5, width),
            nn.Linear(width, 2 * width),
            nn.Linear(width, 3),
        )
        self.log_a = nn.Parameter(torch.log(0.5 + torch.arange(state).float()).repeat(width, 1))
        self.c, self.skip = (
            nn.Parameter(torch.randn(width, state)),
            nn.Parameter(torch.randn(width)),
        )

    def forward(self, x: Tensor) -> Tensor:
        u = self.inp(x).transpose(1, 2)
        length = u.shape[-1]
        time = torch.arange(length, dtype=u.dtype)
        kernel = (self.c[..., None] * torch.exp(-self.log_a.exp()[..., None] * time)).sum(1)
        freq = torch.fft.rfft(u, n=2 * length) * torch.fft.rfft(kernel, n=2 * length)
        y = torch.fft.irfft(freq, n=2 * length)[..., :length] + u * self.skip[:, None]
        return self.out(F.glu(self.mix(F.gelu(y).transpose(1, 2)), dim=-1))


class WideDeep(nn.Module):
    """Recommender: embedding bag, field embeddings, pairwise products, wide linear term."""

    def __init__(self, d: int = 6) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(11, d), nn.Embedding(13, d)
        self.tags, self.bias = nn.EmbeddingBag(9, d, mode="mean"), nn.Embedding(13, 1)
        self.deep = mlp(3 * d, 20, 12, 1)

    def forward(self, user: Tensor, item: Tensor, tags: Tensor) -> Tensor:
        fields = torch.stack([self.user(user), self.item(item), self.tags(tags)], dim=1)
        pair = 0.5 * (fields.sum(1).square() - fields.square().sum(1)).sum(-1, keepdim=True)
        return torch.sigmoid(self.deep(fields.flatten(1)) + pair + self.bias(item))


class MixtureDensity(nn.Module):
    """Mixture of Gaussians' log-likelihood of a target, by logsumexp."""

    def __init__(self, parts: int = 3) -> None:
        super().__init__()
        self.trunk, self.parts = mlp(5, 12, 20, act=nn.Tanh), nn.Linear(20, 3 * parts)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        logit, mean, log_std = self.parts(self.trunk(x).tanh()).chunk(3, dim=-1)
        z = (y - mean) / log_std.exp()
        log = -0.5 * (z.square() + math.log(2 * math.pi)) - log_std
        return torch.logsumexp(logit.log_softmax(-1) + log, dim=-1)
