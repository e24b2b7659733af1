"""Spaces derived by hand, for architectures whose symmetry is known; up to the names of groups.

Letters are groups, `15!` is fixed, `h*d` a product, `(q + k)` a concatenation; `over` says on the
index of which groups a permutation may depend. Sizes follow from the parameters' shapes.
"""

from collections.abc import Mapping

import pytest
import torch
from cases import build
from cases_mlp import mlp
from oracles import disagreements, parse
from torch import Tensor, nn
from torch.nn import functional as F

import wspace
from wspace.space import WeightSpace


def check(
    space: WeightSpace, params: Mapping[str, str], over: Mapping[str, str] | None = None
) -> None:
    wrong = disagreements(space, params, over)
    assert not wrong, "\n".join(["", *wrong])


def traced(name: str) -> WeightSpace:
    module, args, kwargs = build(name)
    return wspace.trace(module, args, kwargs)


def batch_norm(name: str, axis: str) -> dict[str, str]:
    return dict.fromkeys((f"{name}.{n}" for n in BATCH_NORM), axis)


BATCH_NORM = "weight bias running_mean running_var".split()


# ------------------------------------------------------------------------------ feed-forward


def test_mlp() -> None:
    check(
        traced("mlp"),
        {
            "0.weight": "a,5!", "0.bias": "a", "2.weight": "b,a", "2.bias": "b",
            "4.weight": "c,b", "4.bias": "c", "6.weight": "3!,c", "6.bias": "3!",
        },
    )  # fmt: skip


def test_equal_widths_are_separate_groups() -> None:
    space = wspace.trace(mlp(5, 5, 5, 5), torch.zeros(1, 5))
    check(
        space,
        {
            "0.weight": "a,5!", "0.bias": "a", "2.weight": "b,a", "2.bias": "b",
            "4.weight": "5!,b", "4.bias": "5!",
        },
    )  # fmt: skip


def test_tied_autoencoder() -> None:
    """The decoder is the transposed encoder: both uses move with one pair of groups."""
    check(
        traced("autoencoder_tied"),
        {
            "enc1.weight": "a,15!", "enc1.bias": "a", "enc2.weight": "b,a", "enc2.bias": "b",
            "bias1": "a", "bias2": "15!",
        },
    )  # fmt: skip


def test_shared_block_joins_what_it_is_applied_to() -> None:
    """One block applied again and again: its output is its input, so both are one group."""
    check(
        traced("shared_block"),
        {
            "inp.weight": "a,5!", "inp.bias": "a", "block.0.weight": "b,a", "block.0.bias": "b",
            "block.2.weight": "a,b", "block.2.bias": "a", "out.weight": "3!,a", "out.bias": "3!",
        },
    )  # fmt: skip


def test_gated_mlp_is_two_parts_of_one_group() -> None:
    space = traced("swiglu")
    check(
        space,
        {
            "embed.weight": "e,5!", "embed.bias": "e", "position": "1,7!,e",
            "body.norm.weight": "e", "body.gate_up.weight": "(h + h),e",
            "body.down.weight": "e,h", "head.weight": "3!,e", "head.bias": "3!",
        },
    )  # fmt: skip


# ----------------------------------------------------------------------------- convolutional


def test_vgg() -> None:
    """Buffers of batch norm move with the channels; flatten is channels × 6 positions."""
    params = {
        "0.0.0.weight": "a,3!,3!,3!", "0.3.0.weight": "b,a,3!,3!", "0.5.0.weight": "c,b,3!,3!",
        "2.0.weight": "d,c*6!", "2.0.bias": "d", "2.3.weight": "e,d", "2.3.bias": "e",
        "2.4.weight": "7!,e", "2.4.bias": "7!",
    }  # fmt: skip
    for layer, axis in (("0.0.1", "a"), ("0.3.1", "b"), ("0.5.1", "c")):
        params |= batch_norm(layer, axis)
    check(traced("vgg"), params)


def test_resnet() -> None:
    """One stream group for each stage, and one inner group for each block."""
    params = {"conv1.weight": "s0,3!,7!,7!", "fc.weight": "7!,s3", "fc.bias": "7!"}
    params |= batch_norm("bn1", "s0")
    for stage in range(4):
        for block in range(2):
            name, stream, inner = f"layers.{stage}.{block}", f"s{stage}", f"i{stage}{block}"
            source = f"s{stage - 1}" if block == 0 and stage else stream
            params[f"{name}.conv1.weight"] = f"{inner},{source},3!,3!"
            params[f"{name}.conv2.weight"] = f"{stream},{inner},3!,3!"
            params |= batch_norm(f"{name}.bn1", inner) | batch_norm(f"{name}.bn2", stream)
            if source != stream:
                params[f"{name}.downsample.0.weight"] = f"{stream},{source},1,1"
                params |= batch_norm(f"{name}.downsample.1", stream)
    check(traced("resnet18"), params)


def test_depthwise_has_the_channels_of_its_input() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 5, 1), nn.Conv2d(5, 5, 3, groups=5), nn.ReLU(), nn.Conv2d(5, 2, 1)
    )
    check(
        wspace.trace(net, torch.zeros(1, 3, 4, 4)),
        {
            "0.weight": "a,3!,1,1", "0.bias": "a", "1.weight": "a,1,3!,3!", "1.bias": "a",
            "3.weight": "2!,a,1,1", "3.bias": "2!",
        },
    )  # fmt: skip


def test_depth_multiplier_is_a_wreath() -> None:
    """Each of the 10 channels has 3 outputs of its own, in an order of its own."""
    check(
        traced("depth_multiplier"),
        {
            "0.weight": "a,3!,3!,3!", "0.bias": "a", "2.weight": "a*m,1,3!,3!", "2.bias": "a*m",
            "4.2.weight": "7!,a*m", "4.2.bias": "7!",
        },
        {"m": "a"},
    )  # fmt: skip


class Grouped(nn.Module):
    """Two grouped convolutions in a row, both of three groups."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(2, 6, 1), nn.Conv2d(15, 7, 1)
        self.one, self.two = nn.Conv2d(6, 12, 1, groups=3), nn.Conv2d(12, 15, 1, groups=3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.one(self.stem(x)).relu()).relu())


def test_grouped_convolutions_are_a_wreath() -> None:
    """Groups may be permuted, and within each group its channels, in its own way."""
    check(
        wspace.trace(Grouped(), torch.zeros(1, 2, 4, 4)),
        {
            "stem.weight": "g*a,2!,1,1", "stem.bias": "g*a", "one.weight": "g*b,a,1,1",
            "one.bias": "g*b", "two.weight": "g*c,b,1,1", "two.bias": "g*c",
            "head.weight": "7!,g*c,1,1", "head.bias": "7!",
        },
        {"a": "g", "b": "g", "c": "g"},
    )  # fmt: skip


class Shuffled(nn.Module):
    """A channel shuffle between two grouped convolutions (ShuffleNet v1), sizes 3 × 4."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(2, 12, 1), nn.Conv2d(12, 8, 1, groups=4, bias=False)
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x).relu()
        h = h.view(-1, 3, 4, *h.shape[2:]).transpose(1, 2).reshape(h.shape)
        return self.head(self.two(h).relu())


def test_channel_shuffle_keeps_both_factors() -> None:
    """After the shuffle the 4 groups are the fast index of the convolution before it."""
    check(
        wspace.trace(Shuffled(), torch.zeros(1, 2, 4, 4)),
        {
            "one.weight": "a*g,2!,1,1", "one.bias": "a*g", "two.weight": "g*b,a,1,1",
            "head.weight": "5!,g*b,1,1", "head.bias": "5!",
        },
        {"a": "g", "b": "g"},
    )  # fmt: skip


def test_group_norm_is_a_wreath() -> None:
    net = nn.Sequential(nn.Conv2d(2, 12, 1), nn.GroupNorm(3, 12), nn.ReLU(), nn.Conv2d(12, 5, 1))
    check(
        wspace.trace(net, torch.zeros(1, 2, 4, 4)),
        {
            "0.weight": "g*a,2!,1,1", "0.bias": "g*a", "1.weight": "g*a", "1.bias": "g*a",
            "3.weight": "5!,g*a,1,1", "3.bias": "5!",
        },
        {"a": "g"},
    )  # fmt: skip


class Concatenated(nn.Module):
    """DenseNet's concatenation of a map and what is computed from it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 5), nn.Linear(5, 7)
        self.norm, self.out = nn.BatchNorm1d(12), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x)
        return self.out(self.norm(torch.cat([h, self.two(h.relu())], 1)).relu())


def test_concatenation() -> None:
    check(
        wspace.trace(Concatenated(), torch.zeros(1, 3)),
        {
            "one.weight": "a,3!", "one.bias": "a", "two.weight": "b,a", "two.bias": "b",
            "out.weight": "2!,(a + b)", "out.bias": "2!",
        } | batch_norm("norm", "(a + b)"),
    )  # fmt: skip


class Prepended(nn.Module):
    """A learned token before the others: a concatenation along tokens joins the features."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.embed = nn.Parameter(torch.randn(1, 1, 12)), nn.Linear(5, 12)
        self.out = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), self.embed(x)], 1)
        return self.out(x.tanh())


def test_a_token_before_the_others() -> None:
    check(
        wspace.trace(Prepended(), torch.zeros(2, 4, 5)),
        {
            "token": "1,1,e", "embed.weight": "e,5!", "embed.bias": "e", "out.weight": "3!,e",
            "out.bias": "3!",
        },
    )  # fmt: skip


# ---------------------------------------------------------------------------------- attention


def test_gpt2() -> None:
    """One residual stream, tied to the head; qk and v dims in an order of each head's own."""
    params = {
        "transformer.wte.weight": "37!,e", "transformer.wpe.weight": "16!,e",
        "transformer.ln_f.weight": "e", "transformer.ln_f.bias": "e",
    }  # fmt: skip
    over = {}
    for i in range(2):
        h, heads, qk, v, inner = f"transformer.h.{i}", f"heads{i}", f"qk{i}", f"v{i}", f"inner{i}"
        fused = f"({heads}*{qk} + {heads}*{qk} + {heads}*{v})"
        params |= {
            f"{h}.ln_1.weight": "e", f"{h}.ln_1.bias": "e", f"{h}.ln_2.weight": "e",
            f"{h}.ln_2.bias": "e", f"{h}.attn.c_attn.weight": f"e,{fused}",
            f"{h}.attn.c_attn.bias": fused, f"{h}.attn.c_proj.weight": f"{heads}*{v},e",
            f"{h}.attn.c_proj.bias": "e", f"{h}.mlp.c_fc.weight": f"e,{inner}",
            f"{h}.mlp.c_fc.bias": inner, f"{h}.mlp.c_proj.weight": f"{inner},e",
            f"{h}.mlp.c_proj.bias": "e",
        }  # fmt: skip
        over |= {qk: heads, v: heads}
    space = traced("gpt2")
    check(space, params, over)
    assert space["lm_head.weight"] is space["transformer.wte.weight"]


def test_llama() -> None:
    """Grouped queries; rotary pairs move together, the same in every head; v within each group.

    ``q`` and ``k`` are ``head_dim = 6`` as two halves of 3 pairs. What rotates a pair is its
    frequency, which is a constant, so pairs are fixed.
    """
    params = {"model.embed_tokens.weight": "37!,e", "lm_head.weight": "37!,e"}
    params["model.norm.weight"] = "e"
    over = {}
    for i in range(2):
        at, kv, repeat, v, inner = f"model.layers.{i}", f"kv{i}", f"r{i}", f"v{i}", f"inner{i}"
        params |= {
            f"{at}.self_attn.q_proj.weight": f"{kv}*{repeat}*6!,e",
            f"{at}.self_attn.k_proj.weight": f"{kv}*6!,e",
            f"{at}.self_attn.v_proj.weight": f"{kv}*{v},e",
            f"{at}.self_attn.o_proj.weight": f"e,{kv}*{repeat}*{v}",
            f"{at}.mlp.gate_proj.weight": f"{inner},e",
            f"{at}.mlp.up_proj.weight": f"{inner},e",
            f"{at}.mlp.down_proj.weight": f"e,{inner}",
            f"{at}.input_layernorm.weight": "e",
            f"{at}.post_attention_layernorm.weight": "e",
        }
        over |= {repeat: kv, v: kv}
    check(traced("llama"), params, over)


def test_grouped_queries_by_hand() -> None:
    """`MultiQuery`, both ways of repeating: heads in 2 groups of 2, rotary dims fixed."""
    for name in ("attention_gqa", "attention_gqa_repeat"):
        check(
            traced(name),
            {
                "position": "1,7!,e", "embed.weight": "e,5!", "embed.bias": "e",
                "body.norm.weight": "e", "body.q.weight": "g*r*6!,e", "body.k.weight": "g*6!,e",
                "body.v.weight": "g*v,e", "body.v.bias": "g*v", "body.o.weight": "e,g*r*v",
                "head.weight": "3!,e", "head.bias": "3!",
            },
            {"r": "g", "v": "g"},
        )  # fmt: skip


FUSED = {
    "attention_unbind": "(h*qk + h*qk + h*v)",
    "attention_permute": "(h*qk + h*qk + h*v)",
    "attention_chunk": "(h*qk + h*qk + h*v)",
    "attention_per_head": "h*(qk + qk + v)",
}


@pytest.mark.parametrize("name", FUSED)
def test_fused_attention_in_every_style(name: str) -> None:
    check(
        traced(name),
        {
            "position": "1,7!,e", "embed.weight": "e,5!", "embed.bias": "e",
            "body.norm.weight": "e", "body.norm.bias": "e", "body.qkv.weight": f"{FUSED[name]},e",
            "body.qkv.bias": FUSED[name], "body.proj.weight": "e,h*v", "body.proj.bias": "e",
            "head.weight": "3!,e", "head.bias": "3!",
        },
        {"qk": "h", "v": "h"},
    )  # fmt: skip


def test_attention_by_einsum() -> None:
    check(
        traced("attention_einsum"),
        {
            "position": "1,7!,e", "embed.weight": "e,5!", "embed.bias": "e",
            "body.norm.weight": "e", "body.norm.bias": "e", "body.q": "h,e,qk", "body.k": "h,e,qk",
            "body.v": "h,e,v", "body.o": "h,e,v", "head.weight": "3!,e", "head.bias": "3!",
        },
        {"qk": "h", "v": "h"},
    )  # fmt: skip


class HeadNorm(nn.Module):
    """A norm over the dims of a head, whose gain is shared by all heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(5, 14, bias=False) for _ in range(3))
        self.norm, self.out = nn.LayerNorm(7, bias=False), nn.Linear(14, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).view(*x.shape[:2], 2, 7).transpose(1, 2) for m in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(self.norm(q), self.norm(k), v)
        return self.out(y.transpose(1, 2).flatten(2))


def test_a_norm_per_head_ends_the_wreath_of_what_it_scales() -> None:
    check(
        wspace.trace(HeadNorm(), torch.zeros(1, 4, 5)),
        {
            "q.weight": "h*d,5!", "k.weight": "h*d,5!", "v.weight": "h*v,5!", "norm.weight": "d",
            "out.weight": "3!,h*v", "out.bias": "3!",
        },
        {"v": "h"},
    )  # fmt: skip


# --------------------------------------------------------------------- recurrent and routed


GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


@pytest.mark.parametrize("kind", GATES)
def test_gates_are_parts_of_one_group(kind: str) -> None:
    class Readout(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.out = getattr(nn, kind)(5, 12), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.rnn(x)[0])

    gates = f"({' + '.join(['h'] * GATES[kind])})" if GATES[kind] > 1 else "h"
    check(
        wspace.trace(Readout(), torch.zeros(4, 2, 5)),
        {
            "rnn.weight_ih_l0": f"{gates},5!", "rnn.weight_hh_l0": f"{gates},h",
            "rnn.bias_ih_l0": gates, "rnn.bias_hh_l0": gates, "out.weight": "3!,h",
            "out.bias": "3!",
        },
    )  # fmt: skip


def test_every_layer_and_direction_of_an_lstm_has_its_own_group() -> None:
    params = {"out.weight": "3!,(l1 + l1_reverse)", "out.bias": "3!"}
    for layer, source in (("l0", "5!"), ("l1", "(l0 + l0_reverse)")):
        for h in (layer, f"{layer}_reverse"):
            gates = f"({h} + {h} + {h} + {h})"
            params |= {
                f"rnn.weight_ih_{h}": f"{gates},{source}", f"rnn.weight_hh_{h}": f"{gates},{h}",
                f"rnn.bias_ih_{h}": gates, f"rnn.bias_hh_{h}": gates,
            }  # fmt: skip
    check(traced("lstm"), params)


def test_stacked_experts() -> None:
    """Experts may be permuted, and the hidden units of each in its own way."""
    check(
        traced("moe_top2"),
        {
            "inp.weight": "e,7!", "inp.bias": "e", "gate.weight": "x,e", "w1": "x,u,e",
            "b1": "x,u", "w2": "x,e,u", "out.weight": "4!,e", "out.bias": "4!",
        },
        {"u": "x"},
    )  # fmt: skip


# ------------------------------------------------------------------------------- the checker


def test_parse() -> None:
    assert parse("h*d") == ("h", "d")
    assert parse("15!") == (15,)
    assert parse("1") == ()
    assert parse("3#2!") == (3,)
    assert parse("h*(a + (b + c*2!))") == ("h", [("a",), ("b",), ("c", 2)])
    with pytest.raises(ValueError, match="cannot read"):
        parse("a b")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"0.weight": "a,a"}, "0.weight: expected"),
        ({"2.weight": "b,c"}, "should be apart"),
        ({"0.bias": "b"}, "2.weight: expected"),
        ({"4.weight": "b,3!"}, "4.weight"),
        ({"none": "a"}, "none: not in the space"),
    ],
)
def test_disagreements_are_found(change: dict[str, str], says: str) -> None:
    space = wspace.trace(mlp(5, 12, 20, 3), torch.zeros(1, 5))
    right = {"0.weight": "a,5!", "0.bias": "a", "2.weight": "b,a", "2.bias": "b"}
    right |= {"4.weight": "3!,b", "4.bias": "3!"}
    assert disagreements(space, right) == []
    assert says in "\n".join(disagreements(space, right | change))
    assert disagreements(space, {k: v for k, v in right.items() if k != "2.bias"})
    assert disagreements(space, right, {"a": "b"})
