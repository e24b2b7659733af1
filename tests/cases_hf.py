"""Tiny transformers and peft models, built from configurations; table in `cases`."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, tuple[object, ...], dict[str, object]]
VOCAB = 37


def _ids(length: int = 7) -> Tensor:
    return torch.randint(5, VOCAB, (2, length))


_SHAPES: dict[str, tuple[str, tuple[int, ...]]] = {
    "audio": ("input_values", (400,)),
    "spectrogram": ("input_values", (16, 8)),
    "video": ("pixel_values", (4, 3, 8, 8)),
    "series": ("past_values", (16, 3)),
    "whisper": ("input_features", (8, 20)),
    "image16": ("pixel_values", (3, 16, 16)),
    "image32": ("pixel_values", (3, 32, 32)),
    "image64": ("pixel_values", (3, 64, 64)),
}


def _inputs(kind: str) -> dict[str, Tensor]:
    """Example inputs of one kind: batch 2, and one decoder's length other than the encoder's."""
    inputs = {}
    if kind in _SHAPES:
        key, shape = _SHAPES[kind]
        inputs[key] = torch.randn(2, *shape)
    else:
        inputs["input_ids"] = _ids()
    if kind == "pair":
        inputs["pixel_values"] = torch.randn(2, 3, 16, 16)
    elif kind in ("seq2seq", "whisper"):
        inputs["decoder_input_ids"] = _ids(5)
    elif kind == "padded":
        inputs["attention_mask"] = torch.ones(2, 7, dtype=torch.long)
        inputs["attention_mask"][1, 5:] = 0
    elif kind not in (*_SHAPES, "ids"):
        raise ValueError(f"unknown kind of input {kind!r}")
    return inputs


def hf(
    name: str, task: str, kind: str, config_name: str = "", **config: object
) -> Callable[[], Built]:
    """A builder of `<name><task>` from a `<config_name or name>Config` with these values."""

    def build() -> Built:
        import transformers

        made = getattr(transformers, f"{config_name or name}Config")(**config)
        return getattr(transformers, name + task)(made), (), _inputs(kind)

    return build


def _lm(name: str, kind: str = "ids", **config: object) -> Callable[[], Built]:
    """A decoder-only language model with the configuration names most families share."""
    common = {
        "vocab_size": VOCAB, "hidden_size": 20, "intermediate_size": 28, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6,
        "max_position_embeddings": 16, "use_cache": False, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2,
    }  # fmt: skip
    values = {k: v for k, v in (common | config).items() if v is not ...}
    return hf(name, "ForCausalLM", kind, **values)


def _bert(
    name: str, task: str = "ForMaskedLM", kind: str = "padded", **config: object
) -> Callable[[], Built]:
    """An encoder with the configuration names of BERT."""
    common = {
        "vocab_size": VOCAB, "hidden_size": 15, "intermediate_size": 28, "num_hidden_layers": 2,
        "num_attention_heads": 3, "max_position_embeddings": 16, "type_vocab_size": 2,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 0,
    }  # fmt: skip
    values = {k: v for k, v in (common | config).items() if v is not ...}
    return hf(name, task, kind, **values)


def _vit(name: str, task: str = "ForImageClassification", **config: object) -> Callable[[], Built]:
    """A vision transformer with the configuration names of ViT."""
    common = {
        "hidden_size": 15, "intermediate_size": 28, "num_hidden_layers": 2,
        "num_attention_heads": 3, "image_size": 16, "patch_size": 4, "num_labels": 7,
    }  # fmt: skip
    values = {k: v for k, v in (common | config).items() if v is not ...}
    return hf(name, task, "image16", **values)


def _cnn(name: str, size: int = 32, **config: object) -> Callable[[], Built]:
    """A convolutional image classifier."""
    return hf(name, "ForImageClassification", f"image{size}", num_labels=7, **config)


def _lora_mlp() -> Built:
    from cases_mlp import mlp
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=3, target_modules=["0", "2"], init_lora_weights=False)
    return get_peft_model(mlp(5, 12, 20, 3), config), (torch.randn(4, 5),), {}


def _lora_gpt2() -> Built:
    from peft import LoraConfig, get_peft_model

    model, args, kwargs = BUILDERS["gpt2"]()
    config = LoraConfig(
        r=3, target_modules=["c_attn", "c_fc"], init_lora_weights=False, fan_in_fan_out=True
    )
    with warnings.catch_warnings():  # peft reads a name that transformers has deprecated
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(model, config), args, kwargs


_TOKENS = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2}
_EXPERTS = {
    "moe_intermediate_size": 10,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "experts_implementation": "eager",
}
_DEEPSEEK = {
    "num_key_value_heads": 4, "head_dim": ..., "q_lora_rank": 11, "kv_lora_rank": 10,
    "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 7, "n_routed_experts": 4,
    "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
    "moe_intermediate_size": 10, "first_k_dense_replace": 1, "experts_implementation": "eager",
}  # fmt: skip
_SWIN = {
    "image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 4],
    "window_size": 4,
}  # fmt: skip
_BART = {
    "vocab_size": VOCAB, "d_model": 12, "encoder_layers": 1, "decoder_layers": 2,
    "encoder_attention_heads": 3, "decoder_attention_heads": 2, "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 28, "use_cache": False, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
_T5 = {
    "vocab_size": VOCAB, "d_model": 20, "d_kv": 6, "d_ff": 28, "num_layers": 2, "num_heads": 3,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12,
    "use_cache": False, "decoder_start_token_id": 0,
}  # fmt: skip
_TEXT_TOWER = {
    "vocab_size": VOCAB, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 16, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_VISION_TOWER = {
    "hidden_size": 15, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 3,
    "image_size": 16, "patch_size": 4,
}  # fmt: skip
_PVT = {
    "depths": [1, 1, 2, 1],
    "hidden_sizes": [8, 12, 20, 28],
    "num_attention_heads": [1, 2, 4, 7],
}

# fmt: off
BUILDERS: dict[str, Callable[[], Built]] = {
    # convolutional
    "resnet": _cnn(
        "ResNet", embedding_size=12, hidden_sizes=[12, 20, 28], depths=[2, 1, 1], layer_type="basic"
    ),
    "resnet_bottleneck": _cnn(
        "ResNet", embedding_size=12, hidden_sizes=[16, 24, 40], depths=[1, 2, 1],
        layer_type="bottleneck",
    ),
    "mobilenet_v1": _cnn("MobileNetV1", depth_multiplier=0.1, min_depth=6),
    "mobilenet_v2": _cnn("MobileNetV2", depth_multiplier=0.1, min_depth=4, depth_divisible_by=4),
    "efficientnet": _cnn(
        "EfficientNet", width_coefficient=0.4, depth_coefficient=1.0, depth_divisor=4,
        kernel_sizes=[3, 5], in_channels=[32, 16], out_channels=[16, 40], strides=[1, 2],
        num_block_repeats=[1, 2], expand_ratios=[1, 3], hidden_dim=512, depthwise_padding=[],
    ),
    "convnext": _cnn("ConvNext", hidden_sizes=[12, 20, 28], depths=[1, 2, 1], num_stages=3),
    "convnext_v2": _cnn("ConvNextV2", hidden_sizes=[12, 20, 28], depths=[1, 2, 1], num_stages=3),
    "regnet": _cnn(
        "RegNet", embedding_size=10, hidden_sizes=[12, 24, 36], depths=[1, 2, 1], groups_width=6,
        layer_type="y",
    ),
    "regnet_x": _cnn(
        "RegNet", embedding_size=10, hidden_sizes=[12, 20, 28], depths=[1, 1, 2], groups_width=4,
        layer_type="x",
    ),
    "poolformer": _cnn(
        "PoolFormer", hidden_sizes=[8, 12, 20, 28], depths=[1, 1, 2, 1], mlp_ratio=2.0
    ),
    "bit": _cnn(
        "Bit", embedding_size=8, hidden_sizes=[16, 32, 64], depths=[1, 2, 1], num_groups=4,
    ),
    "focalnet": _cnn(
        "FocalNet", image_size=32, embed_dim=12, depths=[1, 2], focal_levels=[2, 2],
        focal_windows=[3, 3], patch_size=4,
    ),
    # vision transformers
    "vit": _vit("ViT"),
    "deit": _vit("DeiT"),
    "beit": _vit("Beit", use_relative_position_bias=True),
    "data2vec_vision": _vit("Data2VecVision", use_shared_relative_position_bias=True),
    "dinov2": _vit("Dinov2", mlp_ratio=2, use_swiglu_ffn=False),
    "dinov2_swiglu": _vit("Dinov2WithRegisters", mlp_ratio=2, use_swiglu_ffn=True),
    "dinov3": _vit("DINOv3ViT", task="Model", hidden_size=24, num_register_tokens=2),
    "vit_msn": _vit("ViTMSN"),
    "hiera": hf(
        "Hiera", "ForImageClassification", "image32", embed_dim=8, image_size=[32, 32],
        patch_size=[7, 7], patch_stride=[4, 4], patch_padding=[3, 3], depths=[1, 1], num_heads=[1,
        2],
        query_stride=[2, 2], num_query_pool=1, masked_unit_size=[4, 4],
        masked_unit_attention=[True, False], num_labels=7,
    ),
    "clip_vision": _vit("CLIPVision", task="Model"),
    "siglip_vision": _vit("SiglipVision", task="Model"),
    "swin": hf("Swin", "ForImageClassification", "image16", num_labels=7, **_SWIN),
    "swinv2": hf("Swinv2", "ForImageClassification", "image16", num_labels=7, **_SWIN),
    "segformer": hf(
        "Segformer", "ForSemanticSegmentation", "image32", depths=[1, 1, 1, 1],
        hidden_sizes=[8, 12, 20, 28], num_attention_heads=[1, 2, 4, 7], sr_ratios=[4, 2, 1, 1],
        decoder_hidden_size=18, mlp_ratios=[2, 2, 2, 2], num_labels=7,
    ),
    "pvt": _cnn(
        "Pvt", image_size=32, sequence_reduction_ratios=[4, 2, 1, 1], mlp_ratios=[2, 2, 2, 2],
        **_PVT,
    ),
    "pvt_v2": _cnn("PvtV2", image_size=32, sr_ratios=[4, 2, 1, 1], mlp_ratios=[2, 2, 2, 2], **_PVT),
    "levit": _cnn(
        "Levit", 32, image_size=32, hidden_sizes=[16, 24, 32], num_attention_heads=[2, 3, 4],
        depths=[1, 1, 1], key_dim=[5, 5, 5], attention_ratio=[2, 2, 2], mlp_ratio=[2, 2, 2],
        down_ops=[["Subsample", 5, 3, 4, 2, 2], ["Subsample", 5, 5, 4, 2, 2]],
    ),
    "mobilevit": _cnn(
        "MobileViT", 64, image_size=64, hidden_sizes=[12, 15, 18], num_attention_heads=3,
        neck_hidden_sizes=[8, 12, 16, 20, 24, 28, 36],
    ),
    "mobilevit_v2": _cnn(
        "MobileViTV2", 64, image_size=64, width_multiplier=0.1, n_attn_blocks=[1, 1, 1],
        base_attn_unit_dims=[128, 192, 256],
    ),
    "cvt": _cnn(
        "Cvt", embed_dim=[8, 12, 20], num_heads=[1, 2, 4], depth=[1, 2, 3], mlp_ratio=[2.0, 2.0,
        2.0],
        drop_path_rate=[0.0, 0.0, 0.0],
    ),
    "clip": hf(
        "CLIP", "Model", "pair", projection_dim=9,
        text_config=_TEXT_TOWER, vision_config=_VISION_TOWER,
    ),
    "siglip_classify": hf(
        "Siglip", "ForImageClassification", "image16", num_labels=7,
        text_config=_TEXT_TOWER, vision_config=_VISION_TOWER,
    ),
    "clip_classify": hf(
        "CLIP", "ForImageClassification", "image16", num_labels=7,
        text_config=_TEXT_TOWER, vision_config=_VISION_TOWER,
    ),
    "dpt": _vit(
        "DPT", task="ForDepthEstimation", num_hidden_layers=2, backbone_out_indices=[0, 1],
        neck_hidden_sizes=[8, 12], reassemble_factors=[2, 1], fusion_hidden_size=10,
        neck_ignore_stages=[], readout_type="project", head_in_index=-1,
    ),
    "videomae": hf(
        "VideoMAE", "ForVideoClassification", "video", hidden_size=15, intermediate_size=28,
        num_hidden_layers=2, num_attention_heads=3, image_size=8, patch_size=4, num_frames=4,
        num_labels=7,
    ),
    "timesformer": hf(
        "Timesformer", "ForVideoClassification", "video", hidden_size=15, intermediate_size=28,
        num_hidden_layers=2, num_attention_heads=3, image_size=8, patch_size=4, num_frames=4,
        num_labels=7,
    ),
    # encoders
    "bert": _bert("Bert"),
    "bert_classify": _bert(
        "Bert", "ForSequenceClassification", num_labels=7, attn_implementation="eager",
    ),
    "roberta": _bert("Roberta"),
    "camembert": _bert("Camembert"),
    "distilbert": hf(
        "DistilBert", "ForMaskedLM", "padded", vocab_size=VOCAB, dim=15, n_layers=2, n_heads=3,
        hidden_dim=28, max_position_embeddings=16,
    ),
    "albert": _bert("Albert", embedding_size=10, intermediate_size=88),
    "electra": _bert("Electra", embedding_size=10),
    "deberta": _bert(
        "Deberta", relative_attention=True, pos_att_type=["c2p", "p2c"], max_relative_positions=8,
    ),
    "deberta_v2": _bert(
        "DebertaV2", relative_attention=True, pos_att_type=["c2p", "p2c"],
        max_relative_positions=8, share_att_key=True, position_buckets=4,
    ),
    "mpnet": _bert("MPNet", type_vocab_size=...),
    "mobilebert": _bert(
        "MobileBert", "ForSequenceClassification", hidden_size=20, intra_bottleneck_size=12,
        embedding_size=10, num_attention_heads=4, num_feedforward_networks=2, num_labels=7,
    ),
    "convbert": _bert(
        "ConvBert", embedding_size=10, hidden_size=20, num_attention_heads=4, head_ratio=2,
        conv_kernel_size=3,
    ),
    "squeezebert": _bert(
        "SqueezeBert", intermediate_size=44, hidden_size=16, embedding_size=16,
        num_attention_heads=4,
    ),
    "roformer": _bert(
        "RoFormer", intermediate_size=44, hidden_size=12, num_attention_heads=3, embedding_size=12,
    ),
    "nystromformer": _bert("Nystromformer", kind="ids", num_landmarks=7, segment_means_seq_len=7),
    "fnet": _bert("FNet", intermediate_size=44, kind="ids"),
    "funnel": hf(
        "Funnel", "ForMaskedLM", "ids", vocab_size=VOCAB, block_sizes=[1, 1], num_decoder_layers=1,
        d_model=12, n_head=3, d_head=5, d_inner=28,
    ),
    "xlnet": hf(
        "XLNet", "LMHeadModel", "ids", vocab_size=VOCAB, d_model=12, n_layer=2, n_head=3,
        d_inner=28, use_mems_eval=False,
    ),
    "modernbert": _bert(
        "ModernBert", type_vocab_size=..., hidden_size=18, num_attention_heads=3,
        global_attn_every_n_layers=2, local_attention=4, pad_token_id=0, cls_token_id=1,
        sep_token_id=2, bos_token_id=1, eos_token_id=2,
    ),
    "esm": _bert(
        "Esm", intermediate_size=44, hidden_size=12, position_embedding_type="rotary",
        mask_token_id=4, emb_layer_norm_before=True,
    ),
    "perceiver": hf(
        "Perceiver", "ForMaskedLM", "ids", vocab_size=VOCAB, max_position_embeddings=7, d_model=16,
        num_latents=5, d_latents=20, num_blocks=1, num_self_attends_per_block=1,
        num_self_attention_heads=4, num_cross_attention_heads=2, qk_channels=8, v_channels=20,
    ),
    # decoders
    "gpt2": hf(
        "GPT2", "LMHeadModel", "ids", **_TOKENS, n_embd=15, n_layer=2, n_head=3, n_inner=28,
        n_positions=16, use_cache=False,
    ),
    "gpt_neo": hf(
        "GPTNeo", "ForCausalLM", "ids", **_TOKENS, hidden_size=15, num_layers=2, num_heads=3,
        intermediate_size=28, attention_types=[[["global", "local"], 1]], window_size=4,
        max_position_embeddings=16, use_cache=False,
    ),
    "gptj": hf(
        "GPTJ", "ForCausalLM", "ids", **_TOKENS, n_embd=24, n_layer=2, n_head=4, n_inner=28,
        rotary_dim=4, n_positions=16, use_cache=False,
    ),
    "codegen": hf(
        "CodeGen", "ForCausalLM", "ids", **_TOKENS, n_embd=24, n_layer=2, n_head=4, n_inner=28,
        rotary_dim=4, n_positions=16, use_cache=False,
    ),
    "gpt_bigcode": hf(
        "GPTBigCode", "ForCausalLM", "ids", **_TOKENS, n_embd=15, n_layer=2, n_head=3, n_inner=28,
        n_positions=16, use_cache=False,
    ),
    "gpt_neox": _lm(
        "GPTNeoX", hidden_size=24, rotary_pct=0.5, head_dim=..., num_key_value_heads=...,
    ),
    "opt": hf(
        "OPT", "ForCausalLM", "ids", vocab_size=VOCAB, hidden_size=15, ffn_dim=28,
        num_hidden_layers=2, num_attention_heads=3, word_embed_proj_dim=10,
        max_position_embeddings=16, use_cache=False, dropout=0.0,
    ),
    "bloom": hf(
        "Bloom", "ForCausalLM", "ids", vocab_size=VOCAB, hidden_size=15, n_layer=2, n_head=3,
        use_cache=False,
    ),
    "falcon": hf(
        "Falcon", "ForCausalLM", "ids", vocab_size=VOCAB, hidden_size=24, num_hidden_layers=2,
        num_attention_heads=4, ffn_hidden_size=28, multi_query=True, alibi=False, use_cache=False,
    ),
    "falcon_gqa": hf(
        "Falcon", "ForCausalLM", "ids", vocab_size=VOCAB, hidden_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_kv_heads=2, new_decoder_architecture=True, ffn_hidden_size=28,
        alibi=False, use_cache=False,
    ),
    "falcon_alibi": hf(
        "Falcon", "ForCausalLM", "ids", vocab_size=VOCAB, hidden_size=18, num_hidden_layers=2,
        num_attention_heads=3, ffn_hidden_size=28, multi_query=False, parallel_attn=False,
        alibi=True, bias=True, use_cache=False,
    ),
    "mpt": hf(
        "Mpt", "ForCausalLM", "ids", vocab_size=VOCAB, d_model=20, n_heads=4, n_layers=2,
        expansion_ratio=2, max_seq_len=16, use_cache=False,
    ),
    "llama": _lm("Llama"),
    "llama_eager": _lm(
        "Llama", kind="padded", attn_implementation="eager", attention_bias=True,
        tie_word_embeddings=True,
    ),
    "mistral": _lm("Mistral", sliding_window=4),
    "qwen2": _lm("Qwen2"),
    "qwen3": _lm("Qwen3"),
    "gemma": _lm("Gemma"),
    "gemma2": _lm("Gemma2", sliding_window=4, query_pre_attn_scalar=6),
    "gemma3": _lm("Gemma3", config_name="Gemma3Text", sliding_window=4, query_pre_attn_scalar=6),
    "phi": _lm("Phi", hidden_size=32, head_dim=..., partial_rotary_factor=0.5),
    "phi3": _lm("Phi3", hidden_size=24, head_dim=...),
    "stablelm": _lm(
        "StableLm", hidden_size=32, head_dim=..., partial_rotary_factor=0.5, qk_layernorm=True,
    ),
    "persimmon": _lm(
        "Persimmon", hidden_size=32, head_dim=..., num_key_value_heads=...,
        partial_rotary_factor=0.5,
    ),
    "olmo": _lm("Olmo", hidden_size=24, head_dim=...),
    "olmo2": _lm("Olmo2", hidden_size=24, head_dim=...),
    "starcoder2": _lm(
        "Starcoder2", hidden_size=24, head_dim=..., residual_dropout=0.0, embedding_dropout=0.0,
    ),
    "cohere": _lm("Cohere", hidden_size=24, head_dim=..., use_qk_norm=True),
    "cohere2": _lm("Cohere2", sliding_window=4),
    "granite": _lm("Granite", hidden_size=24, head_dim=..., residual_multiplier=0.5),
    "nemotron": _lm("Nemotron", partial_rotary_factor=0.5, head_dim=8),
    "glm": _lm("Glm", head_dim=8),
    "glm4": _lm("Glm4", head_dim=8),
    "smollm3": _lm("SmolLM3", hidden_size=24, head_dim=..., no_rope_layer_interval=2),
    "helium": _lm("Helium", hidden_size=24),
    "diffllama": _lm("DiffLlama", hidden_size=24, head_dim=...),
    "mixtral": _lm("Mixtral", num_local_experts=3, experts_implementation="eager"),
    "mixtral_batched": _lm("Mixtral", num_local_experts=3, experts_implementation="batched_mm"),
    "qwen2_moe": _lm(
        "Qwen2Moe", hidden_size=24, head_dim=..., shared_expert_intermediate_size=18, **_EXPERTS,
    ),
    "qwen3_moe": _lm("Qwen3Moe", **_EXPERTS),
    "olmoe": _lm(
        "Olmoe", hidden_size=24, head_dim=..., num_experts=3, num_experts_per_tok=2,
        experts_implementation="eager",
    ),
    "gpt_oss": _lm(
        "GptOss", num_local_experts=3, num_experts_per_tok=2, sliding_window=4,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4}, experts_implementation="eager",
    ),
    "deepseek_v2": _lm("DeepseekV2", **_DEEPSEEK),
    "deepseek_v3": _lm("DeepseekV3", **_DEEPSEEK),
    "granite_moe": _lm(
        "GraniteMoe", hidden_size=24, head_dim=..., num_local_experts=3, num_experts_per_tok=2,
        experts_implementation="eager",
    ),
    "phimoe": _lm(
        "Phimoe", hidden_size=24, head_dim=..., num_local_experts=3, num_experts_per_tok=2,
        experts_implementation="eager",
    ),
    "exaone4": _lm(
        "Exaone4", hidden_size=24, head_dim=..., sliding_window=4, sliding_window_pattern=2,
    ),
    "arcee": _lm("Arcee"),
    "apertus": _lm(
        "Apertus", hidden_size=24, head_dim=..., rope_parameters={"rope_type": "default",
        "rope_theta": 1e4},
    ),
    "ernie4_5": _lm("Ernie4_5"),
    "lfm2": _lm(
        "Lfm2", hidden_size=24, head_dim=..., block_auto_adjust_ff_dim=False, layer_types=["conv",
        "full_attention"],
    ),
    "seed_oss": _lm("SeedOss"),
    "olmo3": _lm("Olmo3", hidden_size=24, head_dim=..., sliding_window=4),
    # recurrent and hybrid
    "mamba": hf(
        "Mamba", "ForCausalLM", "ids", vocab_size=VOCAB, hidden_size=10, state_size=4,
        num_hidden_layers=2, expand=2, time_step_rank=3, use_cache=False,
    ),
    "mamba2": hf(
        "Mamba2", "ForCausalLM", "ids", vocab_size=VOCAB, hidden_size=10, state_size=5,
        num_hidden_layers=2, expand=2, head_dim=4, num_heads=5, n_groups=1, chunk_size=4,
        use_cache=False,
    ),
    "recurrent_gemma": _lm(
        "RecurrentGemma", lru_width=20, attention_window_size=4, block_types=["recurrent",
        "attention"], head_dim=..., max_position_embeddings=..., num_key_value_heads=1,
    ),
    "rwkv": hf(
        "Rwkv", "ForCausalLM", "ids", vocab_size=VOCAB, hidden_size=12, attention_hidden_size=12,
        intermediate_size=28, num_hidden_layers=2, use_cache=False,
    ),
    "jamba": _lm(
        "Jamba", head_dim=..., max_position_embeddings=..., num_experts=2, num_experts_per_tok=1,
        attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
        mamba_d_state=4, mamba_dt_rank=3, experts_implementation="eager",
    ),
    # encoder and decoder
    "t5": hf("T5", "ForConditionalGeneration", "seq2seq", **_T5),
    "t5_gated": hf(
        "T5", "ForConditionalGeneration", "seq2seq", feed_forward_proj="gated-gelu", **_T5,
    ),
    "umt5": hf("UMT5", "ForConditionalGeneration", "seq2seq", **_T5),
    "switch": hf(
        "SwitchTransformers", "ForConditionalGeneration", "seq2seq", num_decoder_layers=2,
        num_experts=3, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
        router_z_loss_coef=0.0, **_T5,
    ),
    "bart": hf("Bart", "ForConditionalGeneration", "seq2seq", max_position_embeddings=16, **_BART),
    "pegasus": hf(
        "Pegasus", "ForConditionalGeneration", "seq2seq", max_position_embeddings=16, **_BART,
    ),
    "whisper": hf(
        "Whisper", "ForConditionalGeneration", "whisper", num_mel_bins=8, max_source_positions=10,
        max_target_positions=9, **_BART,
    ),
    "wav2vec2": hf(
        "Wav2Vec2", "ForCTC", "audio", vocab_size=VOCAB, hidden_size=12, num_hidden_layers=2,
        num_attention_heads=3, intermediate_size=56, conv_dim=[10, 14], conv_stride=[5, 4],
        conv_kernel=[10, 4], num_feat_extract_layers=2, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    ),
    "hubert": hf(
        "Hubert", "ForSequenceClassification", "audio", hidden_size=12, num_hidden_layers=2,
        num_attention_heads=3, intermediate_size=28, conv_dim=[10, 14], conv_stride=[5, 4],
        conv_kernel=[10, 4], num_feat_extract_layers=2, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, do_stable_layer_norm=True, feat_extract_norm="layer",
        num_labels=7, classifier_proj_size=18,
    ),
    "ast": hf(
        "AST", "ForAudioClassification", "spectrogram", hidden_size=15, intermediate_size=28,
        num_hidden_layers=2, num_attention_heads=3, patch_size=4, frequency_stride=4,
        time_stride=4, max_length=16, num_mel_bins=8, num_labels=7,
    ),
    "patchtst": hf(
        "PatchTST", "ForPrediction", "series", num_input_channels=3, context_length=16,
        patch_length=4, patch_stride=4, d_model=12, num_attention_heads=3, num_hidden_layers=2,
        ffn_dim=28, prediction_length=5, scaling=None, dropout=0.0, head_dropout=0.0,
        use_cls_token=False, loss="mse",
    ),
    "patchtsmixer": hf(
        "PatchTSMixer", "ForPrediction", "series", num_input_channels=3, context_length=16,
        patch_length=4, patch_stride=4, d_model=12, num_layers=2, expansion_factor=2,
        prediction_length=5, scaling=None, loss="mse",
    ),
    # adapters
    "lora_mlp": _lora_mlp,
    "lora_gpt2": _lora_gpt2,
}
# fmt: on
