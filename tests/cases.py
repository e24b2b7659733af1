"""Small architectures for the law tests: one row each, in evaluation mode, float64 by `build`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cases_attention as attention
import cases_conv as conv
import cases_hf as hf
import cases_mlp as plain
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

_Input = tuple[int, ...] | Callable[[], Tensor]
Built = tuple[nn.Module, tuple[object, ...], dict[str, object]]


@dataclass(frozen=True)
class Case:
    """One architecture, and what a law test may expect of it."""

    name: str
    build: Callable[[], Built]
    coverage: float = 0.99  # least share of parameter elements that some free group should move
    why: str = ""  # the reason, if coverage < 0.99
    slow: bool = False
    float32: bool = False  # computes partly in float32 whatever its dtype, so exact to 1e-6


def _case(name: str, make: Callable[[], nn.Module], *shapes: _Input, **more: object) -> Case:
    """A case of positional inputs: normal tensors of these shapes, or what a function returns."""

    def made() -> Built:
        args = tuple(torch.randn(s) if isinstance(s, tuple) else s() for s in shapes)
        return make(), args, {}

    return Case(name, made, **more)


def _ids(high: int, *shape: int) -> Callable[[], Tensor]:
    """Random integers below `high`."""
    return lambda: torch.randint(high, shape)


_IMAGE, _SMALL, _TOKENS, _ROWS = (2, 3, 32, 32), (2, 3, 8, 8), (2, 7, 5), (4, 5)

_PLAIN = [
    _case("mlp", lambda: plain.mlp(5, 12, 20, 28, 3), _ROWS),
    _case("linear", lambda: plain.mlp(5, 3), _ROWS, coverage=0.0, why="no hidden units"),
    _case("mlp_batchnorm", lambda: plain.norm_mlp(nn.BatchNorm1d, nn.ReLU), _ROWS),
    _case("mlp_layernorm_tanh", lambda: plain.norm_mlp(nn.LayerNorm, nn.Tanh), _ROWS),
    _case("mlp_rmsnorm_gelu", lambda: plain.norm_mlp(nn.RMSNorm, nn.GELU), _ROWS),
    _case("mlp_weight_norm", plain.weight_normed, _ROWS),
    _case(
        "autoencoder_tied", plain.TiedAutoEncoder, (4, 15), coverage=0.94,
        why="the bias of the 15 outputs is 15 of 271 elements",
    ),
    _case("siren", plain.Siren, (9, 2)),
    _case("nerf", plain.NeRF, (9, 3)),
    _case("mlp_residual", plain.ResidualMLP, _ROWS),
    _case("highway", plain.Highway, _ROWS),
    _case("maxout", plain.Maxout, _ROWS),
    _case("bilinear", plain.BilinearNet, _ROWS, (4, 4)),
    _case("hypernet", plain.HyperNet, _ROWS, (4, 4)),
    _case("deep_sets", plain.DeepSets, (2, 6, 5)),
    _case("graph_conv", plain.GraphConv, (2, 6, 5)),
    _case("graph_attention", plain.GraphAttention, (5, 5)),
    _case("moe_dense", plain.DenseMoE, (6, 5)),
    _case("moe_ordered", lambda: plain.StackedMoE(ordered=True), (6, 5)),
    _case("moe_summed", plain.SummedMoE, (6, 5)),
    _case("moe_averaged", lambda: plain.StackedMoE(ordered=False), (6, 5)),
    _case("moe_top2", plain.TopMoE, (6, 7)),
    _case("moe_dispatch", plain.LoopMoE, (6, 7)),
    _case("lstm", lambda: plain.Recurrent("LSTM", bidirectional=True), _TOKENS),
    _case("lstm_proj", lambda: plain.Recurrent("LSTM", bidirectional=False, proj_size=8), _TOKENS),
    _case("gru", lambda: plain.Recurrent("GRU", bidirectional=True), _TOKENS),
    _case("rnn_tanh", lambda: plain.Recurrent("RNN", bidirectional=False), _TOKENS),
    _case(
        "rnn_relu",
        lambda: plain.Recurrent("RNN", bidirectional=True, nonlinearity="relu", bias=False),
        _TOKENS,
    ),
    _case("cell_loop", plain.CellLoop, _TOKENS),
    _case("lstm_by_hand", plain.HandLSTM, _TOKENS),
    _case(
        "control_flow", plain.ControlFlow, _ROWS, coverage=0.58,
        why="the branch not taken holds 260 of 655 elements, and no trace sees it",
    ),
    _case(
        "unused_parameters", plain.Spare, _ROWS, coverage=0.65,
        why="the unused head is 189 of 585 elements, and freedom of what is never read is trivial",
    ),
    _case("kan", lambda: plain.Kan(5, 12, 3), _ROWS),
    _case("multi_output", plain.MultiOutput, _ROWS),
    _case("shared_block", plain.SharedBlock, _ROWS),
    _case("state_space", plain.StateSpace, _TOKENS),
    _case(
        "wide_deep", plain.WideDeep, _ids(11, 4), _ids(13, 4), _ids(9, 4, 3), coverage=0.98,
        why="the scalar bias of each of 13 items has no hidden axis",
    ),
    _case("mixture_density", plain.MixtureDensity, _ROWS, (4, 1)),
]  # fmt: skip

_CONV = [
    _case("vgg", conv.vgg, _IMAGE),
    _case("resnet18", conv.ResNet18, _IMAGE),
    _case("densenet", conv.DenseNet, _IMAGE),
    _case("mobilenet_v3", conv.mobilenet_v3, _IMAGE),
    _case("shufflenet_v2", conv.shufflenet_v2, _IMAGE),
    _case(
        "shufflenet_v1",
        conv.GroupedShuffle,
        _SMALL,
        coverage=0.67,
        why="24 channels in 3 groups before the shuffle and 3 others after it, and 3 does not "
        "divide 8: the two groupings leave no block of channels in common",
    ),
    _case("squeezenet", conv.squeezenet, _IMAGE),
    _case("inception", conv.Inception, _SMALL),
    _case("unet", conv.UNet, _SMALL),
    _case("unet_upsample", conv.UNetUpsample, _SMALL),
    _case("grouped_se", conv.grouped_se, _IMAGE),
    _case("depth_multiplier", conv.depth_multiplier, _SMALL),
    _case("pixel_shuffle", conv.pixel_shuffle, (2, 1, 8, 8)),
    _case("group_norm", conv.group_norm, _SMALL),
    _case("instance_norm", conv.instance_norm, (2, 3, 16, 16)),
    _case("film", conv.FiLM, _SMALL, (2, 5)),
    _case(
        "wavenet",
        conv.WaveNet,
        (2, 1, 16),
        coverage=0.95,
        why="the last residual mix runs, and its result is dropped",
    ),
    _case("conv3d", conv.conv3d, (2, 2, 2, 4, 12)),
    _case("prelu", conv.prelu, _SMALL),
    _case("avg_max_pool", conv.AvgMaxPool, _SMALL),
    _case("lenet", conv.lenet, (2, 1, 28, 28)),
    _case("dynamic_conv", conv.DynamicConv, _SMALL),
    _case("fno", conv.FNO, (2, 16, 2)),
    _case("conv_mixer", conv.ConvMixer, _IMAGE),
    _case("conv_vae", conv.AutoEncoder, (2, 1, 8, 8)),
    _case("attention_conv", attention.ConvAttention, _SMALL),
]


def _tokens(name: str, body: Callable[[], nn.Module], **more: object) -> Case:
    """A case of seven real-valued tokens around a body of width 12."""
    return _case(name, lambda: attention.TokenClassifier(body(), 12), _TOKENS, **more)


_ATTENTION = [
    _case("encoder_post_norm", lambda: attention.encoder(norm_first=False), _TOKENS),
    _case("encoder_pre_norm", lambda: attention.encoder(norm_first=True), _TOKENS),
    _case("encoder_causal", lambda: attention.encoder(norm_first=True, causal=True), _TOKENS),
    _case("transformer_seq2seq", attention.Seq2Seq, (2, 6, 5), _ids(11, 2, 4)),
    _case("cross_attention", attention.CrossAttention, _TOKENS, (2, 6, 4)),
    _case("cross_attention_dims", lambda: attention.CrossAttention(9, 10), _TOKENS, (2, 6, 4)),
    _tokens("attention_einsum", attention.EinsumAttention),
    _tokens("attention_unbind", lambda: attention.FusedAttention("unbind")),
    _tokens("attention_permute", lambda: attention.FusedAttention("permute")),
    _tokens("attention_chunk", lambda: attention.FusedAttention("chunk")),
    _tokens("attention_per_head", lambda: attention.FusedAttention("per_head")),
    _tokens("attention_gqa", lambda: attention.MultiQuery(native=True)),
    _tokens("attention_gqa_repeat", lambda: attention.MultiQuery(native=False)),
    _tokens("attention_linear", attention.LinearAttention),
    _tokens("attention_relative", attention.RelativeAttention),
    _tokens("attention_talking_heads", attention.TalkingHeads),
    _tokens("swiglu", attention.SwiGLU),
    _case("language_model_tied", attention.TiedLM, _ids(37, 2, 7)),
    _case("dit", attention.DiT, _SMALL, (2, 5)),
    _case(
        "mlp_mixer",
        attention.MlpMixer,
        (2, 3, 16, 16),
        coverage=0.98,
        why="biases over the 16 tokens, whose order is fixed",
    ),
    _case("attention_pool", attention.AttentionPool, _TOKENS),
    _case("class_token", attention.SlotTokens, _TOKENS),
]

_STREAM = "the encoder's residual stream is an output, and the tied embedding has no other axis"
_VISION = "the residual stream is an output"
_LESS: dict[str, tuple[float, str]] = {
    "clip_vision": (0.74, _VISION),
    "siglip_vision": (0.80, _VISION),
    "dinov3": (0.80, _VISION),
    "clip": (
        0.67,
        "both towers return their residual streams, and both projections end in outputs",
    ),
    "videomae": (
        0.66,
        "positions are a fixed sinusoid added to the stream, which no weight can undo",
    ),
    "funnel": (0.87, "fixed sinusoids of the relative positions meet the stream's own axis"),
    "patchtsmixer": (0.63, "the residual stream is an output, so gates over channels are fixed"),
    "t5": (0.92, _STREAM),
    "t5_gated": (0.93, _STREAM),
    "umt5": (0.93, _STREAM),
    "switch": (0.93, _STREAM),
    "bart": (0.79, _STREAM),
    "pegasus": (0.79, _STREAM),
    "whisper": (0.83, _STREAM),
    "dpt": (0.88, "one residual layer of the neck and the last norm never run"),
    "siglip_classify": (0.72, "the pooling head runs, and its result is dropped"),
    "squeezebert": (0.91, "the pooler runs, and its result is dropped"),
    "fnet": (0.93, "the pooler runs, and its result is dropped"),
    "xlnet": (0.96, "parameters of segments and masks are not used by these inputs"),
    "roformer": (0.97, "the rotary table is a parameter"),
    "esm": (0.98, "the contact head is unused, and the bias over the vocabulary is 1 %"),
}
_FLOAT32 = frozenset(
    """
    deberta gpt_neo gptj codegen bloom mpt funnel rwkv llama llama_eager mistral
    qwen2 qwen3 gemma gemma2 gemma3 phi3 olmo olmo2 olmo3 cohere cohere2 granite glm glm4
    smollm3 helium diffllama mixtral mixtral_batched qwen2_moe qwen3_moe olmoe gpt_oss
    deepseek_v2 deepseek_v3 granite_moe exaone4 arcee apertus ernie4_5 lfm2 seed_oss
    mamba mamba2 recurrent_gemma jamba t5 t5_gated umt5 switch
    """.split()
)


def _transformers(name: str, make: Callable[[], Built]) -> Case:
    """The case of a builder in `cases_hf`."""
    coverage, why = _LESS.get(name, (0.99, ""))
    return Case(name, make, coverage, why, float32=name in _FLOAT32)


_HF = [_transformers(name, make) for name, make in hf.BUILDERS.items()]
_ALL = [*_PLAIN, *_CONV, *_ATTENTION, *_HF]
CASES: dict[str, Case] = {case.name: case for case in _ALL}
if len(CASES) != len(_ALL):
    raise ValueError("two cases of one name")

FEW = frozenset(case.name for case in _HF[::6]) | frozenset(CASES) - {case.name for case in _HF}
"""Every architecture of our own, and one in six of transformers: the others in slow tests."""


def build(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Built:
    """The module of a case in evaluation mode, and its example inputs, in `dtype`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module, args, kwargs = CASES[name].build()

    def cast(leaf: object) -> object:
        floating = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return leaf.to(dtype) if floating else leaf

    module = module.eval()._apply(cast)
    return module, *pytree.tree_map(cast, (args, kwargs))


class Double(TorchFunctionMode):
    """Promotes float32 to float64 inside code that asks for float32 by name (RMSNorm, rotary).

    Measured on a tiny Llama under a permutation of its stream: 3e-7 without, 7e-16 with it.
    Run only the forwards to be compared under it, not the trace.
    """

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        """Call `func` with float64 wherever it says float32."""
        func = torch.Tensor.double if func is torch.Tensor.float else func
        args, kwargs = pytree.tree_map(_promote, (args, kwargs or {}))
        return func(*args, **kwargs)


def _promote(leaf: object) -> object:
    return torch.float64 if leaf is torch.float32 else leaf
