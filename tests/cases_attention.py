"""Small attention networks written by hand in the styles users write them; table in `cases`."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TokenClassifier(nn.Module):
    """Embeds real-valued tokens, runs a body that keeps their width, averages and classifies."""

    def __init__(self, body: nn.Module, width: int, tokens: int = 7) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Linear(5, width), body, nn.Linear(width, 3)
        self.position = nn.Parameter(torch.randn(1, tokens, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embed(x) + self.position).mean(1))


def encoder(*, norm_first: bool, causal: bool = False) -> nn.Module:
    """nn.TransformerEncoder with GELU."""
    layer = nn.TransformerEncoderLayer(
        12, 3, 20, 0.0, "gelu", batch_first=True, norm_first=norm_first
    )
    body = nn.TransformerEncoder(layer, 2, nn.LayerNorm(12), enable_nested_tensor=False)
    return TokenClassifier(Causal(body, 7) if causal else body, 12)


class Causal(nn.Module):
    """Calls a body with a causal mask."""

    def __init__(self, body: nn.Module, tokens: int) -> None:
        super().__init__()
        self.body = body
        mask = nn.Transformer.generate_square_subsequent_mask(tokens)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x, mask=self.mask)


class Seq2Seq(nn.Module):
    """nn.Transformer between two embeddings; tokens first, as its default layout."""

    def __init__(self) -> None:
        super().__init__()
        self.src, self.tgt, self.out = nn.Linear(5, 12), nn.Embedding(11, 12), nn.Linear(12, 11)
        layer = nn.TransformerEncoderLayer(12, 3, 20, 0.0)
        custom = nn.TransformerEncoder(layer, 2, nn.LayerNorm(12), enable_nested_tensor=False)
        self.body = nn.Transformer(12, 3, 2, 1, 28, 0.0, custom_encoder=custom)

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        y = self.tgt(tgt).transpose(0, 1)
        mask = self.body.generate_square_subsequent_mask(y.shape[0], dtype=y.dtype)
        return self.out(self.body(self.src(src).transpose(0, 1), y, tgt_mask=mask))


class CrossAttention(nn.Module):
    """nn.MultiheadAttention from queries to a memory, possibly of other widths."""

    def __init__(self, kdim: int | None = None, vdim: int | None = None) -> None:
        super().__init__()
        self.query, self.out = nn.Linear(5, 12), nn.Linear(12, 3)
        self.key, self.value = nn.Linear(4, kdim or 12), nn.Linear(4, vdim or 12)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True, kdim=kdim, vdim=vdim)

    def forward(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        key, value = self.key(memory).tanh(), self.value(memory).tanh()
        y, weights = self.attention(self.query(x), key, value)
        return self.out(y), weights


class EinsumAttention(nn.Module):
    """Attention with separate (heads, width, d) parameters and einsum."""

    def __init__(self, width: int = 12, heads: int = 3, d: int = 5) -> None:
        super().__init__()
        shape = heads, width, d
        self.q, self.k, self.v, self.o = (
            nn.Parameter(torch.randn(shape) / width**0.5) for _ in range(4)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (torch.einsum("btc,hcd->bhtd", h, w) for w in (self.q, self.k, self.v))
        weights = (torch.einsum("bhid,bhjd->bhij", q, k) / q.shape[-1] ** 0.5).softmax(-1)
        return x + torch.einsum("bhij,bhjd,hcd->bic", weights, v, self.o)


class FusedAttention(nn.Module):
    """Fused qkv split in one of the usual ways: unbind, permute (timm), chunk, reshape by head."""

    def __init__(self, style: str, width: int = 12, heads: int = 2, d: int = 5) -> None:
        super().__init__()
        self.style, self.heads, self.d, self.norm = style, heads, d, nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * heads * d), nn.Linear(heads * d, width)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, each (B, H, T, D)."""
        b, t, _ = x.shape
        qkv, h, d = self.qkv(x), self.heads, self.d
        if self.style == "unbind":
            return tuple(a.transpose(1, 2) for a in qkv.view(b, t, 3, h, d).unbind(2))
        if self.style == "permute":
            qkv = qkv.reshape(b, t, 3, h, d).permute(2, 0, 3, 1, 4)
            return qkv[0], qkv[1], qkv[2]
        if self.style == "chunk":
            return tuple(a.view(b, t, h, d).transpose(1, 2) for a in qkv.chunk(3, -1))
        return qkv.view(b, t, h, 3 * d).transpose(1, 2).split(d, dim=-1)  # per head, as GPT-NeoX

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.norm(x))
        if self.style == "permute":
            weights = (q * self.d**-0.5) @ k.transpose(-2, -1)
            y = weights.softmax(dim=-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.style == "chunk")
        return x + self.proj(y.transpose(1, 2).reshape(*x.shape[:2], self.heads * self.d))


class MultiQuery(nn.Module):
    """Grouped-query attention by `enable_gqa` or repeat_interleave, with rotary pairs."""

    def __init__(self, *, native: bool, width: int = 12, heads: int = 4, kv: int = 2) -> None:
        super().__init__()
        self.native, self.heads, self.kv, self.d, self.norm = (
            native,
            heads,
            kv,
            6,
            nn.RMSNorm(width),
        )
        self.q, self.k = (
            nn.Linear(width, heads * 6, bias=False),
            nn.Linear(width, kv * 6, bias=False),
        )
        self.v, self.o = nn.Linear(width, kv * 6), nn.Linear(heads * 6, width, bias=False)

    def rotate(self, x: Tensor) -> Tensor:
        """Rotary embedding with interleaved pairs."""
        freq = 10.0 ** -(torch.arange(self.d // 2, dtype=x.dtype) / 3)
        angle = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * freq
        even, odd = x[..., ::2], x[..., 1::2]
        real = even * angle.cos() - odd * angle.sin()
        imag = even * angle.sin() + odd * angle.cos()
        return torch.stack([real, imag], dim=-1).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        h = self.norm(x)
        q = self.rotate(self.q(h).view(b, t, self.heads, self.d).transpose(1, 2))
        k = self.rotate(self.k(h).view(b, t, self.kv, self.d).transpose(1, 2))
        v = self.v(h).view(b, t, self.kv, self.d).transpose(1, 2)
        if not self.native:
            k, v = (a.repeat_interleave(self.heads // self.kv, dim=1) for a in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.native)
        return x + self.o(y.transpose(1, 2).flatten(2))


class LinearAttention(nn.Module):
    """Attention with the feature map elu + 1 and no softmax, computed by cumulative sums."""

    def __init__(self, width: int = 12, heads: int = 2, d: int = 5) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = (
            heads,
            nn.Linear(width, 3 * heads * d),
            nn.Linear(heads * d, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        state = torch.cumsum(torch.einsum("bthd,bthe->bthde", k, v), dim=1)
        total = torch.einsum("bthd,bthd->bth", q, k.cumsum(1))
        y = torch.einsum("bthd,bthde->bthe", q, state) / total.unsqueeze(-1)
        return x + self.out(y.flatten(2))


class RelativeAttention(nn.Module):
    """A learned bias per head and distance, query and key norms, and per-head gates."""

    def __init__(self, width: int = 12, heads: int = 3, d: int = 5, tokens: int = 7) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = (
            heads,
            nn.Linear(width, 3 * heads * d),
            nn.Linear(heads * d, width),
        )
        self.q_norm, self.k_norm = nn.LayerNorm(d), nn.LayerNorm(d)
        self.bias = nn.Embedding(2 * tokens - 1, heads)
        self.gate, self.temperature = nn.Linear(width, heads), nn.Parameter(torch.ones(heads, 1, 1))
        distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
        self.register_buffer("distance", distance + tokens - 1, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        score = self.q_norm(q) @ self.k_norm(k).mT * self.temperature
        score = score + self.bias(self.distance).permute(2, 0, 1)
        mask = torch.ones(t, t, dtype=torch.bool).tril()
        y = score.masked_fill(~mask, -math.inf).softmax(-1) @ v
        y = y * self.gate(x).sigmoid().mT.unsqueeze(-1)
        return x + self.out(y.transpose(1, 2).reshape(b, t, -1))


class TalkingHeads(nn.Module):
    """Attention logits and weights mixed across heads by learned matrices."""

    def __init__(self, width: int = 12, heads: int = 3, d: int = 5) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = (
            heads,
            nn.Linear(width, 3 * heads * d),
            nn.Linear(heads * d, width),
        )
        self.before, self.after = nn.Linear(heads, heads), nn.Linear(heads, heads)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        score = self.before((q @ k.mT).permute(0, 2, 3, 1)).softmax(-2)
        y = self.after(score).permute(0, 3, 1, 2) @ v
        return x + self.out(y.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """Gated MLP with a fused gate and up projection."""

    def __init__(self, width: int = 12, hidden: int = 20) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(self.norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class TiedLM(nn.Module):
    """Language model whose output matrix is its embedding; positions from a table."""

    def __init__(self, vocab: int = 37, width: int = 12) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(vocab, width), nn.Embedding(16, width)
        self.blocks = nn.Sequential(FusedAttention("chunk", width), SwiGLU(width))
        self.norm, self.head = nn.LayerNorm(width, bias=False), nn.Linear(width, vocab, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        position = self.position(torch.arange(ids.shape[1], device=ids.device))
        return self.head(self.norm(self.blocks(self.embed(ids) * math.sqrt(12) + position)))


class DiT(nn.Module):
    """Diffusion transformer: patches, adaLN-zero blocks conditioned on a vector, unpatchify."""

    def __init__(self, width: int = 12, heads: int = 2, depth: int = 2) -> None:
        super().__init__()
        self.heads, self.patch = heads, nn.Conv2d(3, width, 4, 4)
        self.cond = nn.Sequential(nn.Linear(5, 14), nn.SiLU(), nn.Linear(14, width))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        make = nn.ModuleList
        self.ada = make(nn.Linear(width, 6 * width) for _ in range(depth))
        self.qkv = make(nn.Linear(width, 3 * width) for _ in range(depth))
        self.proj = make(nn.Linear(width, width) for _ in range(depth))
        self.mlp = make(
            nn.Sequential(nn.Linear(width, 20), nn.GELU("tanh"), nn.Linear(20, width))
            for _ in range(depth)
        )
        self.ada_out, self.out = nn.Linear(width, 2 * width), nn.Linear(width, 48)

    def block(self, i: int, x: Tensor, c: Tensor) -> Tensor:
        """One adaLN-zero block."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.ada[i](c).unsqueeze(1).chunk(6, -1)
        b, t, w = x.shape
        h = self.norm(x) * (1 + scale1) + shift1
        q, k, v = self.qkv[i](h).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, w)
        x = x + gate1 * self.proj[i](y)
        return x + gate2 * self.mlp[i](self.norm(x) * (1 + scale2) + shift2)

    def forward(self, image: Tensor, cond: Tensor) -> Tensor:
        x, c = self.patch(image).flatten(2).transpose(1, 2), F.silu(self.cond(cond))
        for i in range(len(self.ada)):
            x = self.block(i, x, c)
        shift, scale = self.ada_out(c).chunk(2, dim=1)
        x = self.out(self.norm(x) * (1 + scale[:, None]) + shift[:, None])
        h, w = image.shape[2] // 4, image.shape[3] // 4
        x = torch.einsum("nhwpqc->nchpwq", x.reshape(-1, h, w, 4, 4, 3))
        return x.reshape(image.shape)


class MlpMixer(nn.Module):
    """Patches, then MLPs across tokens and across channels."""

    def __init__(self, width: int = 12, tokens: int = 16, depth: int = 2) -> None:
        super().__init__()
        self.patch, self.head = nn.Conv2d(3, width, 4, 4), nn.Linear(width, 7)
        self.norm1 = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.norm2 = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.tokens = nn.ModuleList(
            nn.Sequential(nn.Linear(tokens, 10), nn.GELU(), nn.Linear(10, tokens))
            for _ in range(depth)
        )
        self.channels = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 28), nn.GELU(), nn.Linear(28, width))
            for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).mT
        for norm1, tokens, norm2, channels in zip(
            self.norm1, self.tokens, self.norm2, self.channels, strict=True
        ):
            x = x + tokens(norm1(x).transpose(1, 2)).transpose(1, 2)
            x = x + channels(norm2(x))
        return self.head(x.mean(dim=1))


class AttentionPool(nn.Module):
    """Learned queries attend to tokens (Perceiver, Hopfield pooling), seeds stay apart."""

    def __init__(self, width: int = 12, seeds: int = 4) -> None:
        super().__init__()
        self.embed, self.query = nn.Linear(5, width), nn.Parameter(torch.randn(seeds, width))
        self.key, self.value = nn.Linear(width, 9), nn.Linear(width, 20)
        self.project, self.out = nn.Linear(width, 9, bias=False), nn.Linear(20 * seeds, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.embed(x))
        score = self.project(self.query) @ self.key(x).transpose(1, 2) / 3
        return self.out((score.softmax(-1) @ self.value(x)).flatten(1))


class SlotTokens(nn.Module):
    """Class token and register tokens prepended, position table, class token read out."""

    def __init__(self, width: int = 12, tokens: int = 7) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(5, width), nn.Linear(width, 3)
        self.cls, self.registers = (nn.Parameter(torch.randn(1, n, width)) for n in (1, 2))
        self.position = nn.Parameter(torch.randn(1, tokens + 3, width))
        self.body = nn.Sequential(FusedAttention("unbind"), SwiGLU(), FusedAttention("permute"))

    def forward(self, x: Tensor) -> Tensor:
        extra = [self.cls.expand(len(x), -1, -1), self.registers.repeat(len(x), 1, 1)]
        x = self.body(torch.cat([*extra, self.embed(x)], dim=1) + self.position)
        return self.head(x[:, 0])


class ConvAttention(nn.Module):
    """Diffusion U-Net attention block: group norm, 1x1 convolutions, spatial attention."""

    def __init__(self, c: int = 12) -> None:
        super().__init__()
        self.stem, self.norm, self.out = (
            nn.Conv2d(3, c, 3, 2, 1),
            nn.GroupNorm(4, c),
            nn.Conv2d(c, 3, 1),
        )
        self.q, self.k, self.v, self.proj = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, c, h, w = x.shape
        y = self.norm(x)
        q, k, v = (m(y).reshape(b, c, h * w) for m in (self.q, self.k, self.v))
        weights = torch.bmm(q.permute(0, 2, 1), k).mul(c**-0.5).softmax(dim=2)
        return self.out(x + self.proj(torch.bmm(v, weights.permute(0, 2, 1)).view(b, c, h, w)))
