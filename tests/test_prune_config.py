"""Hugging Face models made anew from a smaller config: what it can say, and that it is exact."""

import copy
import functools
import tempfile
from collections.abc import Callable, Mapping
from typing import NamedTuple

import pytest
import torch
from cases import CASES, Double, build
from cases_hf import BUILDERS
from oracles import gap, outputs, state_of
from torch import Tensor, nn

import wspace
from wspace.action import shape_of
from wspace.errors import PruneError
from wspace.prune import Mask, Pruner, Restriction, prunable
from wspace.prune.huggingface.rebuild import (
    config_fields,
    config_pinned,
    config_ties,
    from_config,
    has_config,
    smaller_config,
)
from wspace.space import WeightSpace
from wspace.trace.sizes import Sizes

EXACT = 1e-10
CONTROL = 1e-6
HF = [n for n, c in CASES.items() if n in BUILDERS and not n.startswith("lora") and not c.float32]


class Known(NamedTuple):
    """A case with generic weights in float64, and what is known of it."""

    module: nn.Module
    args: tuple[object, ...]
    kwargs: dict[str, object]
    space: WeightSpace
    sizes: Sizes
    ties: list[list[str]]
    pins: dict[str, str]

    def group(self, name: str, dim: int = 0, place: int = 0) -> str:
        """Name of the group at a dimension of a tensor."""
        free = [g.name for g in self.space[name].axes[dim].groups() if not g.fixed]
        return free[place]

    def family(self, *places: tuple[str, int, int]) -> list[str]:
        """All groups that the config ties to one of these."""
        found = [self.group(*p) for p in places]
        return [g for f in found for g in next((t for t in self.ties if f in t), [f])]

    def few(self, counts: Mapping[str, int], seed: int = 1) -> Restriction:
        """Random units of groups, this many of each."""
        generator = torch.Generator().manual_seed(seed)
        keep = {}
        for name, n in counts.items():
            shape = shape_of(self.space.groups[name], self.space)
            keep[name] = torch.rand(shape, generator=generator).argsort(-1) < n
        return Restriction(self.space, keep)


@pytest.fixture(scope="session")
def known() -> Callable[[str], Known]:
    """Builds and traces a case, once per session."""

    @functools.cache
    def of(name: str) -> Known:
        module, args, kwargs = build(name)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for x in module.parameters():
                noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
                fan = x[0].numel() if x.dim() > 1 else 1
                x.copy_(noise / fan**0.5 if x.dim() > 1 else x + 0.1 * noise)
        with Double():
            space = wspace.trace(module, args, kwargs)
            sizes = Pruner(module, space, rebuild="copy").sizes
        ties, pins = config_ties(module, space, sizes), config_pinned(module, space, sizes)
        return Known(module, args, kwargs, space, sizes, ties, pins)

    return of


def small_of(k: Known, few: Restriction) -> nn.Module:
    """The small model by its config."""
    return from_config(k.module, few, sizes=k.sizes)


def run(k: Known, module: nn.Module) -> list[Tensor]:
    """Outputs on the inputs of the case."""
    return outputs(module, state_of(module), k.args, k.kwargs, mode=Double())


def assert_of_space(small: nn.Module, few: Restriction) -> None:
    """The tensors of the small space, tied where they should be, with the values that stay."""
    state = small.state_dict()
    for p in few.small.params:
        for name in (p.name, *p.ties):
            assert tuple(state[name].shape) == p.shape, name
            assert state[name].data_ptr() == state[p.name].data_ptr(), name


def assert_masked(k: Known, few: Restriction, small: nn.Module) -> None:
    """The small model computes what the masked one does, and not what the whole one does."""
    whole = run(k, k.module)
    with Mask(k.module, k.space, few.keep):
        wanted = run(k, k.module)
    assert gap(wanted, run(k, small)) < EXACT
    assert gap(wanted, whole) > CONTROL


# -------------------------------------------------------------------------- what fields size

SLOW = pytest.mark.slow
NEURONS = {
    "gpt2": ("transformer.h.0.mlp.c_fc.weight", 1, "n_inner"),
    "llama": ("model.layers.0.mlp.gate_proj.weight", 0, "intermediate_size"),
    "bert": ("bert.encoder.layer.0.intermediate.dense.weight", 0, "intermediate_size"),
    "t5": ("encoder.block.0.layer.1.DenseReluDense.wi.weight", 0, "d_ff"),
    "mixtral": ("model.layers.0.mlp.experts.gate_up_proj", 1, "intermediate_size"),
}


@pytest.mark.parametrize(
    "name", [n if n in ("gpt2", "llama") else pytest.param(n, marks=SLOW) for n in NEURONS]
)
def test_one_field_sizes_the_neurons_of_all_layers(known: Callable[[str], Known], name: str):
    k = known(name)
    tensor, dim, field = NEURONS[name]
    group = k.group(tensor, dim)
    holders = {
        (p.name, d)
        for g in k.family((tensor, dim, 0))
        for p in k.space.params
        for d, axis in enumerate(p.axes)
        if g in [x.name for x in axis.groups()]
    }
    fields = config_fields(k.module, k.space, k.sizes)
    assert set(fields[field]) == holders
    assert group not in k.pins


@pytest.mark.parametrize(
    "name", [n if n in ("gpt2", "llama") else pytest.param(n, marks=SLOW) for n in NEURONS]
)
def test_fewer_neurons(known: Callable[[str], Known], name: str):
    k = known(name)
    tensor, dim, field = NEURONS[name]
    few = k.few(dict.fromkeys(k.family((tensor, dim, 0)), 17))
    small = small_of(k, few)
    assert getattr(small.config, field) == 17
    assert_of_space(small, few)
    assert_masked(k, few, small)


Q, V = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.v_proj.weight"
FUSED = "transformer.h.0.attn.c_attn.weight"
T5Q = "encoder.block.0.layer.0.SelfAttention.q.weight"
SETS = {
    "queries": ("llama", (Q, 0, 1), 1, {"num_attention_heads": 2, "num_key_value_heads": 2}),
    "kv heads": ("llama", (Q, 0, 0), 1, {"num_attention_heads": 2, "num_key_value_heads": 1}),
    "heads": ("t5", (T5Q, 0, 0), 2, {"num_heads": 2}),
    "head dims": ("t5", (T5Q, 0, 1), 4, {"d_kv": 4}),
    "vit heads": ("vit", ("vit.layers.0.attention.q_proj.weight", 0, 0), 2, {}),
    "vit head dims": ("vit", ("vit.layers.0.attention.q_proj.weight", 0, 1), 3, {}),
    "channels": ("resnet", ("resnet.embedder.embedder.convolution.weight", 0, 0), 7, {}),
}


def place(k: Known, wanted: tuple[str, int, int]) -> tuple[str, int, int]:
    """A tensor by its name, or the first whose name ends alike."""
    name, d, i = wanted
    end = name.partition("attention")[2] if name not in k.space.by_name else name
    first = next(p.name for p in k.space.params if p.name.endswith(end))
    return first, d, i


@pytest.mark.parametrize(
    "what",
    [w if w in ("kv heads", "head dims") else pytest.param(w, marks=SLOW) for w in SETS],
)
def test_fewer_of(known: Callable[[str], Known], what: str):
    name, wanted, count, values = SETS[what]
    k = known(name)
    few = k.few(dict.fromkeys(k.family(place(k, wanted)), count))
    small = small_of(k, few)
    assert {f: getattr(small.config, f) for f in values} == values
    assert_of_space(small, few)
    assert_masked(k, few, small)


@pytest.mark.slow
def test_fewer_experts(known: Callable[[str], Known]):
    k = known("mixtral")
    few = k.few(dict.fromkeys(k.family(("model.layers.0.mlp.gate.weight", 0, 0)), 2))
    small = small_of(k, few)
    assert small.config.num_local_experts == 2
    assert_of_space(small, few)  # the router counts experts, so there is no zero-unit law
    assert gap(run(k, Pruner(k.module, k.space, rebuild="copy").prune(few)), run(k, small)) < EXACT


def test_everything_at_once(known: Callable[[str], Known]):
    k = known("llama")
    stream = k.group(Q, 1)
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        counts: dict[str, int] = {}
        for g, group in prunable(k.space).items():
            if g in k.pins or g in counts:
                continue
            n = int(torch.randint(1, group.size + 1, (), generator=generator))
            n = 16 if g == stream else n  # LlamaConfig wants a multiple of the heads
            counts |= dict.fromkeys(next((t for t in k.ties if g in t), [g]), n)
        few = k.few(counts, seed)
        small = small_of(k, few)
        assert_of_space(small, few)
        copied = Pruner(k.module, k.space, rebuild="copy").prune(few)
        assert gap(run(k, copied), run(k, small)) < EXACT


# ------------------------------------------------- what a constructor makes of a size


def joint(k: Known) -> Restriction:
    """Fewer head dims, and as many fewer of the residual stream: n_embd is heads x head dims."""
    dims = k.family((FUSED, 1, 1))
    return k.few({k.group(FUSED, 0): 12, **dict.fromkeys(dims, 4)})


def test_the_scale_of_attention_is_undone(known: Callable[[str], Known]):
    k = known("gpt2")
    few = joint(k)
    small = small_of(k, few)
    assert_of_space(small, few)
    assert (small.config.n_embd, small.config.n_head) == (12, 3)
    copied = Pruner(k.module, k.space, rebuild="copy").prune(few)
    assert gap(run(k, copied), run(k, small)) < EXACT
    plain = copy.deepcopy(small)
    plain.load_state_dict(few.state(dict(k.module.state_dict())))
    assert gap(run(k, copied), run(k, plain)) > CONTROL


@pytest.mark.slow
def test_float32_does_not_hide_what_has_to_be_undone(known: Callable[[str], Known]):
    k = known("gpt2")
    module = copy.deepcopy(k.module).float()
    with torch.no_grad():
        for n, x in module.named_parameters():
            x.mul_(0.02 if "attn.c_attn" in n else 1.0)  # attention is nearly uniform
    few = joint(k)
    small = from_config(module, few, sizes=k.sizes)
    cut = few.state(dict(module.state_dict()))["transformer.h.0.attn.c_attn.weight"]
    assert not torch.equal(small.state_dict()["transformer.h.0.attn.c_attn.weight"], cut)


@pytest.mark.slow
def test_heads_with_the_stream(known: Callable[[str], Known]):
    k = known("gpt2")
    heads = k.family((FUSED, 1, 0))
    few = k.few({k.group(FUSED, 0): 10, **dict.fromkeys(heads, 2)})
    small = small_of(k, few)
    assert (small.config.n_embd, small.config.n_head) == (10, 2)
    assert_of_space(small, few)


@pytest.mark.slow
def test_what_weights_cannot_undo_is_an_error(known: Callable[[str], Known]):
    k = known("gemma")  # multiplies embeddings by the root of their width, and ties them
    few = k.few({k.group("model.embed_tokens.weight", 1): 14})
    with pytest.raises(PruneError, match="GemmaForCausalLM built from its config is not the mask"):
        small_of(k, few)


# ------------------------------------------------------------------------ as any other model


@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(n, marks=SLOW) for n in ("bert", "resnet"))]
)
def test_saves_and_loads(known: Callable[[str], Known], name: str):
    import transformers

    k = known(name)
    counts: dict[str, int] = {}
    for tie in k.ties:
        if not set(tie) & set(k.pins):
            counts |= dict.fromkeys(tie, max(1, k.space.groups[tie[0]].size // 2))
    small = copy.deepcopy(small_of(k, k.few(counts))).float()
    auto = {
        "llama": transformers.AutoModelForCausalLM,
        "bert": transformers.AutoModelForMaskedLM,
        "resnet": transformers.AutoModelForImageClassification,
    }[name]
    with tempfile.TemporaryDirectory() as folder:
        small.save_pretrained(folder)
        loaded = copy.deepcopy(auto.from_pretrained(folder))  # aligned in memory, as `small` is
    args, kwargs = ([x.float() if torch.is_floating_point(x) else x for x in k.args], {})
    kwargs = {n: x.float() if torch.is_floating_point(x) else x for n, x in k.kwargs.items()}
    assert type(loaded) is type(small)
    a, b = (outputs(m, state_of(m), args, kwargs) for m in (small, loaded))
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


def test_is_as_the_large_one_was(known: Callable[[str], Known]):
    k = known("llama_eager")
    module = copy.deepcopy(k.module)
    module.model.layers[1].train()
    module.model.embed_tokens.weight.requires_grad_(False)
    module.generation_config.max_new_tokens = 5
    few = k.few(dict.fromkeys(k.family(("model.layers.0.mlp.gate_proj.weight", 0, 0)), 9))
    small = from_config(module, few, sizes=k.sizes)
    assert small.lm_head.weight is small.model.embed_tokens.weight
    assert [n for n, x in small.named_parameters() if not x.requires_grad] == [
        "model.embed_tokens.weight"
    ]
    assert [m.training for m in small.modules()] == [m.training for m in module.modules()]
    assert {x.dtype for x in small.parameters()} == {torch.float64}
    assert small.generation_config.max_new_tokens == 5
    assert small.config._attn_implementation == "eager"


def test_needs_no_weights(known: Callable[[str], Known]):
    k = known("llama")
    few = k.few(dict.fromkeys(k.family(("model.layers.0.mlp.gate_proj.weight", 0, 0)), 9))
    small = from_config(copy.deepcopy(k.module).to("meta"), few, sizes=k.sizes)
    assert small.model.layers[0].mlp.gate_proj.weight.is_meta
    assert small.config.intermediate_size == 9


def test_an_open_field_is_stated():
    import transformers

    config = transformers.GPT2Config(vocab_size=11, n_embd=6, n_layer=1, n_head=2, n_positions=8)
    module = transformers.GPT2LMHeadModel(config).eval().double()
    space = wspace.trace(module, (), {"input_ids": torch.arange(5)[None]})
    neurons = next(g for g, x in space.groups.items() if x.size == 24)
    few = Restriction(space, {neurons: torch.arange(24) < 7})
    assert (config.n_inner, from_config(module, few).config.n_inner) == (None, 7)
    assert config.n_inner is None


# ------------------------------------------------------------------------------------- errors


def test_layers_that_differ_are_refused(known: Callable[[str], Known]):
    k = known("llama")
    before = {n: x.clone() for n, x in k.module.state_dict().items()}
    text, rng = k.module.config.to_json_string(), torch.get_rng_state()
    first, second = k.family(("model.layers.0.mlp.gate_proj.weight", 0, 0))
    with pytest.raises(PruneError, match=r"intermediate_size would be .* and .* for 'model"):
        small_of(k, k.few({first: 9, second: 11}))
    assert all(torch.equal(x, before[n]) for n, x in k.module.state_dict().items())
    assert k.module.config.to_json_string() == text
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize(
    ("name", "wanted", "count", "match"),
    [
        ("llama", (V, 0, 1), 4, r"head_dim would be 6 .* and 4 for"),
        ("gpt2", (FUSED, 0, 0), 4, r"n_embd would be (4 .* and 15|15 .* and 4) for"),
        ("gpt2", (FUSED, 1, 0), 2, r"n_embd would be (10 .* and 15|15 .* and 10) for"),
    ],
)
def test_what_the_config_cannot_say(
    known: Callable[[str], Known], name: str, wanted: tuple[str, int, int], count: int, match: str
):
    k = known(name)
    family = k.family(wanted)
    assert set(family) <= set(k.pins)
    with pytest.raises(PruneError, match=match):
        small_of(k, k.few(dict.fromkeys(family, count)))


def test_what_a_config_refuses_to_load_is_refused(known: Callable[[str], Known]):
    k = known("llama")
    with pytest.raises(PruneError, match=r"hidden size \(13\) is not a multiple"):
        small_of(k, k.few({k.group(Q, 1): 13}))


def test_only_for_models_with_a_config():
    mlp = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    space = wspace.trace(mlp, torch.zeros(1, 3))
    few = Restriction(space, {"h1": torch.arange(5) < 3})
    assert not has_config(mlp)
    with pytest.raises(PruneError, match="Sequential has no config"):
        smaller_config(mlp, few)
    with pytest.raises(PruneError, match="Sequential has no config"):
        config_ties(mlp, space)


def test_a_changed_model_is_refused(known: Callable[[str], Known]):
    k = known("llama")
    module = copy.deepcopy(k.module)
    module.model.layers = module.model.layers[:1]
    with Double():
        space = wspace.trace(module, k.args, k.kwargs)
        few = Restriction(space, {"h1": torch.arange(20) < 16})
        with pytest.raises(PruneError, match="does not come out of its config"):
            from_config(module, few)
        assert config_ties(module, space) == []
        assert set(config_pinned(module, space)) == set(space.groups)


def test_weights_that_differ_are_noticed(known: Callable[[str], Known]):
    k = known("llama")
    few = k.few(dict.fromkeys(k.family(("model.layers.0.mlp.gate_proj.weight", 0, 0)), 9))
    wrong = small_of(k, few)
    with torch.no_grad():
        wrong.lm_head.weight[0, 0] += 1
    with pytest.raises(PruneError, match="built from its config is not the masked one"):
        from_config(k.module, few, reference=wrong, sizes=k.sizes)


# --------------------------------------------------------------------------------- every case


@pytest.mark.slow
@pytest.mark.parametrize("name", HF)
def test_every_set_is_exact_or_refused(known: Callable[[str], Known], name: str):
    k = known(name)
    pruner = Pruner(k.module, k.space, rebuild="copy")
    done: set[str] = set()
    for g, group in prunable(k.space).items():
        tie = next((t for t in k.ties if g in t), [g])
        if g in done:
            continue
        done |= set(tie)
        few = k.few(dict.fromkeys(tie, max(1, 2 * group.size // 3)))
        try:
            small = small_of(k, few)
        except PruneError:
            continue
        assert_of_space(small, few)
        if not pruner.counted(few):
            assert_masked(k, few, small)
