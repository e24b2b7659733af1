"""Which models each tool gets right, judged by the function the model computes.

Every tool gets the same module, in float64 and evaluation mode, with constant tensors (fresh
BatchNorm statistics, zero biases) replaced by random ones, since a wrong coupling of constants
shows nothing. A relative change of the output above 1e-6 is wrong.

- wspace: `trace`, then `verify` (random group elements, all at once and one by one, and controls).
- rebasin: the permutations it declared are given random values and applied to the model by its own
  code; the output must not change.
- torch-pruning: its pruner, used as its documentation says (`example_inputs`, the output layer in
  `ignored_layers`, `num_heads` of attention layers, whole heads pruned and head counts updated by
  hand), removes 30 % group by group. Before each removal everything that it is about to remove is
  set to zero in a copy, so that these units are dead by its own account; the copy and the pruned
  model must then agree. Where a norm runs over the removed units (LayerNorm, RMSNorm, GroupNorm)
  they need not, and the group counts as run, not as judged.
"""

import copy
import signal
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from harness import finish, ms, peer, start, table, timed
from torch import Tensor, nn

import wspace
from wspace.errors import NotASymmetry

MODELS = """
mlp autoencoder_tied siren mlp_batchnorm lstm vgg lenet resnet18 densenet mobilenet_v3
shufflenet_v2 grouped_se depth_multiplier group_norm instance_norm pixel_shuffle unet
encoder_pre_norm attention_unbind attention_gqa swiglu mlp_mixer convnext swin vit bert gpt2 llama
mamba mixtral t5
""".split()
WRONG = 1e-6
SECONDS = 8
NORMS_OVER_UNITS = ("LayerNorm", "RMSNorm", "GroupNorm", "LlamaRMSNorm", "T5LayerNorm")


# The cases have sizes with no common factors, so that no mistake can hide; tools that expect
# width = heads * head size are asked about models of that kind, too.


def usual_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_SIZES))


def usual_mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(**_SIZES, num_local_experts=4, experts_implementation="eager")
    )


def usual_shufflenet() -> nn.Module:
    import cases_conv as conv

    return nn.Sequential(
        conv.conv_bn(3, 24, 3, 2), nn.ReLU(), conv.ShuffleUnit(24, 116, 2),
        conv.ShuffleUnit(116, 116, 1), conv.ShuffleUnit(116, 232, 2), conv.head(232),
    )  # fmt: skip


class UsualAttention(nn.Module):
    """Attention with a fused projection, laid out as timm's, on embedded tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 4, 6
        self.embed, self.qkv = nn.Linear(5, 24), nn.Linear(24, 72)
        self.proj, self.head = nn.Linear(24, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        b, n, _ = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        weights = (q * self.head_dim**-0.5 @ k.transpose(-2, -1)).softmax(-1)
        x = x + self.proj((weights @ v).transpose(1, 2).reshape(b, n, -1))
        return self.head(x.mean(1))


_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}
USUAL: dict[str, Callable[[], nn.Module]] = {
    "shufflenet_usual_sizes": usual_shufflenet,
    "llama_usual_sizes": usual_llama,
    "mixtral_usual_sizes": usual_mixtral,
    "attention_timm_layout": UsualAttention,
}


class Plain(nn.Module):
    """A model that takes tensors by position and returns one tensor, as the peers expect."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.names = [k for k, v in kwargs.items() if isinstance(v, Tensor)]
        self.rest = {k: v for k, v in kwargs.items() if k not in self.names}
        self.count = len(args)

    def forward(self, *inputs: Tensor) -> Tensor:
        named = dict(zip(self.names, inputs[self.count :], strict=True))
        out = self.model(*inputs[: self.count], **named, **self.rest)
        if isinstance(out, Mapping):
            out = out["logits"] if "logits" in out else next(iter(out.values()))
        return out[0] if isinstance(out, tuple) else out


def build(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    import cases  # of the tests; `harness` has put them on the path

    if name in USUAL:
        torch.manual_seed(0)
        module, args, kwargs = USUAL[name]().double().eval(), (), {}
        if hasattr(module, "config"):
            kwargs["input_ids"] = torch.arange(14).reshape(2, 7)
        else:
            shape = (2, 3, 32, 32) if isinstance(module, nn.Sequential) else (2, 7, 5)
            args = (torch.randn(shape, dtype=torch.float64),)
    else:
        module, args, kwargs = cases.build(name)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for t in (*module.parameters(), *module.buffers()):
            if t.is_floating_point() and t.numel() > 1 and bool((t == t.flatten()[0]).all()):
                noise = torch.rand(t.shape, generator=generator, dtype=t.dtype)
                value = float(t.flatten()[0])
                t.copy_(value * (0.5 + noise) if value else 0.4 * (noise - 0.5))
    if (config := getattr(module, "config", None)) is not None:
        config.use_cache = False
    plain = Plain(module, args, kwargs).eval()
    inputs = (*args, *(kwargs[n] for n in plain.names))
    return plain, inputs


def change(before: Tensor, after: Tensor) -> float:
    if before.shape != after.shape:
        return float("inf")
    return float((before - after).abs().max() / before.abs().max())


@torch.no_grad()
def run(model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    torch.manual_seed(0)
    return model(*inputs)


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Stops a block after so many seconds of processor time, however busy the machine is."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {seconds} s")

    previous = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)


def attempt(judge: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a judge found; an exception or a time-out is a finding too."""
    try:
        with limited(SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return judge()
    except TimeoutError as error:
        return {"verdict": f"stopped: {error}", "right": False}
    except Exception as error:
        return {"verdict": f"crashes: {type(error).__name__}", "right": False, "error": str(error)}


def median_of(call: Callable[[], object], rounds: int) -> float:
    return statistics.median(timed(call) for _ in range(rounds))


# ------------------------------------------------------------------------- judges


def judge_wspace(model: nn.Module, inputs: tuple[Tensor, ...], rounds: int) -> dict[str, Any]:
    space = wspace.trace(model, inputs)
    seconds = median_of(lambda: wspace.trace(model, inputs), rounds)
    out = {"seconds": seconds, "groups": len(space.groups), "coverage": space.coverage}
    try:
        report = wspace.verify(space, model, inputs)
    except NotASymmetry as error:
        return out | {"verdict": "WRONG: NotASymmetry", "right": False, "error": str(error)}
    return out | {"verdict": f"right, {report.max_error:.0e}", "right": True}


def judge_rebasin(
    rebasin: ModuleType, model: nn.Module, inputs: tuple[Tensor, ...], rounds: int
) -> dict[str, Any]:
    other = copy.deepcopy(model)
    data = inputs[0] if len(inputs) == 1 else list(inputs)

    def trace() -> Any:
        return rebasin.PermutationCoordinateDescent(model, other, data)

    descent = trace()
    seconds = median_of(trace, rounds)
    found = descent.pinit.model_graph.permutation_to_info
    before = run(other, inputs)
    generator = torch.Generator().manual_seed(0)
    moved: dict[int, int] = {}
    for permutation, places in found:
        size = len(permutation)
        permutation.perm_indices = torch.randperm(size, generator=generator)
        moved.update({id(p.parameter_b): p.parameter_b.numel() for p in places})
    descent.apply_permutations()
    total = sum(p.numel() for p in other.parameters())
    gap = change(before, run(other, inputs))
    out = {"seconds": seconds, "groups": len(found), "coverage": sum(moved.values()) / total}
    if not found:
        return out | {"verdict": "finds none", "right": False}
    word = "right" if gap <= WRONG else "WRONG"
    return out | {"verdict": f"{word}, {gap:.0e}", "right": gap <= WRONG, "change": gap}


def judge_pruning(
    pruning: ModuleType, model: nn.Module, inputs: tuple[Tensor, ...], rounds: int
) -> dict[str, Any]:
    def trace() -> Any:
        return pruning.DependencyGraph().build_dependency(model, inputs, verbose=False)

    model.requires_grad_(True)
    trace()
    seconds = median_of(trace, rounds)
    heads = heads_of(model)
    pruner = pruning.pruner.BasePruner(
        model,
        inputs,
        importance=pruning.importance.RandomImportance(),
        pruning_ratio=0.3,
        ignored_layers=[output_layer(model, inputs)],
        num_heads=dict(heads),
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=0.5,
    )
    owners = {id(p): type(m).__name__ for m in model.modules() for p in m.parameters(recurse=False)}
    judged = wrong = ran = 0
    worst = 0.0
    for group in pruner.step(interactive=True):
        over_norm = any(_is_norm_over_units(dep.target.module, owners) for dep, _ in group)
        try:
            gap = _prune(model, inputs, group, pruner)
        except TimeoutError:
            raise
        except Exception as error:
            where = f"crashes after {ran} groups: {type(error).__name__}"
            return {
                "seconds": seconds, "groups": ran, "verdict": where, "right": False,
                "error": str(error),
            }  # fmt: skip
        ran += 1
        if not over_norm:
            judged, wrong, worst = judged + 1, wrong + (gap > WRONG), max(worst, gap)
    out = {"seconds": seconds, "groups": ran, "judged": judged, "wrong": wrong, "change": worst}
    if not ran:
        return out | {"verdict": "prunes nothing", "right": False}
    if wrong:
        return out | {"verdict": f"WRONG in {wrong} of {judged}, {worst:.0e}", "right": False}
    rest = f"{ran - judged} of {ran} runs, not judged"
    if not judged:
        return out | {"verdict": rest, "right": None}
    more = f"; {rest}" if ran > judged else ""
    return out | {"verdict": f"right in {judged} of {judged}{more}", "right": True}


def _is_norm_over_units(module: object, owners: dict[int, str]) -> bool:
    name = owners.get(id(module), "") if isinstance(module, nn.Parameter) else type(module).__name__
    return any(norm in name for norm in NORMS_OVER_UNITS)


def _prune(model: nn.Module, inputs: tuple[Tensor, ...], group: Any, pruner: Any) -> float:
    """Change of the output between a copy whose removed entries are zero and the pruned model.

    What is removed is read off the model: every tensor is filled with the positions of its
    entries, the group is pruned, and the positions that are left are the entries that were kept.
    """
    dead = copy.deepcopy(model)
    values = {n: t.detach().clone() for n, t in tensors(model).items()}
    with torch.no_grad():
        for t in tensors(model).values():
            t.copy_(torch.arange(t.numel()).reshape(t.shape))
    group.prune()
    left = tensors(model)
    kept = {name: t.long().flatten() for name, t in left.items()}
    zeroed = tensors(dead)
    with torch.no_grad():
        for name, t in left.items():
            gone = torch.ones(values[name].numel(), dtype=torch.bool)
            gone[kept[name]] = False
            zeroed[name].view(-1)[gone] = 0
            t.copy_(values[name].flatten()[kept[name]].reshape(t.shape))
    update_heads(model, pruner)
    return change(run(dead, inputs), run(model, inputs))


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and float buffers by name; tied ones under each of their names."""
    out = dict(model.named_parameters(remove_duplicate=False))
    out |= {n: b for n, b in model.named_buffers() if b.is_floating_point()}
    return out


def output_layer(model: nn.Module, inputs: tuple[Tensor, ...]) -> nn.Module:
    """The last convolution or linear layer that runs: users name it in `ignored_layers`."""
    order: list[nn.Module] = []
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)
    hooks = [
        m.register_forward_hook(lambda m, *_: order.append(m))
        for m in model.modules()
        if isinstance(m, kinds)
    ]
    run(model, inputs)
    for hook in hooks:
        hook.remove()
    return order[-1]


_QUERY, _KEY_VALUE = ("q_proj", "query", "q", "qkv", "c_attn"), ("k_proj", "v_proj", "key",
                                                                 "value", "k", "v")  # fmt: skip
_HEADS, _KV_HEADS = ("num_heads", "num_attention_heads", "n_heads", "heads"), (
    "num_key_value_heads", "kv")  # fmt: skip


def heads_of(model: nn.Module) -> dict[nn.Module, int]:
    """Head counts of attention projections, as users list them in `num_heads`."""
    out: dict[nn.Module, int] = {}
    for m in model.modules():
        count = _attribute(m, _HEADS)
        if count is None:
            continue
        if isinstance(m, nn.MultiheadAttention):
            out[m] = count
        for name in _QUERY:
            if isinstance(layer := getattr(m, name, None), nn.Module):
                out[layer] = count
        for name in _KEY_VALUE:
            if isinstance(layer := getattr(m, name, None), nn.Module):
                out[layer] = _attribute(m, _KV_HEADS) or count
    return out


def _attribute(m: nn.Module, names: tuple[str, ...]) -> int | None:
    for owner in (m, getattr(m, "config", None)):
        for name in names:
            if isinstance(value := getattr(owner, name, None), int):
                return value
    return None


def update_heads(model: nn.Module, pruner: Any) -> None:
    """What the documentation asks of users after heads were pruned: correct the stored counts."""

    def first(m: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
        layers = (getattr(m, n, None) for n in names)
        return next((x for x in layers if isinstance(x, nn.Module) and x in pruner.num_heads), None)

    for m in model.modules():
        query, key = first(m, _QUERY), first(m, _KEY_VALUE)
        if query is None:
            continue
        heads = int(pruner.num_heads[query])
        correct(m, _HEADS, heads)
        if isinstance(query, nn.Linear):
            correct(m, ("all_head_size", "embed_dim", "inner_dim"), query.out_features)
        if key is not None:
            correct(m, _KV_HEADS, int(pruner.num_heads[key]))
            correct(m, ("num_key_value_groups",), heads // int(pruner.num_heads[key]))


def correct(m: nn.Module, names: tuple[str, ...], value: int) -> None:
    """Sets those of the attributes that the module has."""
    for name in names:
        if isinstance(getattr(m, name, None), int):
            setattr(m, name, value)


# --------------------------------------------------------------------------- main


def main() -> None:
    options = start(__doc__, rounds=3, only=True)
    pruning, rebasin = peer("torch_pruning"), peer("rebasin")
    absent = {"verdict": "not installed", "right": "unknown"}
    rows, figures = [], {}
    for name in options.only or [*MODELS, *USUAL]:
        found = {"wspace": attempt(lambda n=name: judge_wspace(*build(n), options.rounds))}
        found["rebasin"] = (
            attempt(lambda n=name: judge_rebasin(rebasin, *build(n), options.rounds))
            if rebasin
            else absent
        )
        found["torch-pruning"] = (
            attempt(lambda n=name: judge_pruning(pruning, *build(n), options.rounds))
            if pruning
            else absent
        )
        figures[name] = found
        row: list[object] = [name]
        for tool in found.values():
            row += [ms(tool["seconds"]) if "seconds" in tool else "", tool["verdict"]]
        rows.append(row)
    head = ["model", *(f"{t}{u}" for t in TOOLS for u in (" ms", ""))]
    print()
    table(head, rows)
    print()
    rows = [
        [word, *(sum(f[t]["right"] is value for f in figures.values()) for t in TOOLS)]
        for word, value in (("right", True), ("runs, not judged", None), ("neither", False))
    ]
    table([f"of {len(figures)}", *TOOLS], rows)
    finish(options, {"models": figures})


TOOLS = ("wspace", "rebasin", "torch-pruning")


if __name__ == "__main__":
    main()
