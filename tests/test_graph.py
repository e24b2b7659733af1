"""The parameter graph: laws L3 and L4, what it must tell apart, and its ways in and out."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from cases import CASES, build
from oracles_graph import Clamp, assert_each_entry_once, fingerprint, relabelling
from torch import Tensor, nn
from torch.nn import functional as F

import wspace
from wspace.errors import CheckpointError, SpaceMismatch
from wspace.graph import (
    ParameterGraph,
    decode,
    encode,
    from_pyg,
    load_graph,
    save_graph,
    to_networkx,
    to_pyg,
)
from wspace.graph.parameter import window
from wspace.space import WeightSpace

NAMES = sorted(CASES)


@lru_cache(maxsize=8)
def traced(name: str) -> tuple[WeightSpace, dict[str, Tensor]]:
    """Weight space of a case, and a state of it in which no two entries are equal."""
    module, args, kwargs = build(name)
    return wspace.trace(module, args, kwargs), distinct(module)


def distinct(module: nn.Module) -> dict[str, Tensor]:
    """A state of the module's shape in which no two entries are equal; ties kept."""
    state = dict(module.state_dict())
    state |= {n: b for n, b in module.named_buffers() if b.is_floating_point()}
    seen: dict[int, Tensor] = {}
    total = sum(x.numel() for x in state.values())
    order = torch.randperm(total, generator=torch.Generator().manual_seed(1)).double() + 1
    start = 0
    for name, x in state.items():
        if not x.is_floating_point():
            continue
        if x.data_ptr() not in seen or not x.numel():
            new = order[start : start + x.numel()].reshape(x.shape) / total
            start += x.numel()
            seen[x.data_ptr()] = new
        state[name] = seen[x.data_ptr()]
    return state


# --------------------------------------------------------------------------- laws


@pytest.mark.parametrize("name", NAMES)
def test_laws(name: str, generator: torch.Generator) -> None:
    space, state = traced(name)
    graph = encode(space, state)
    assert_decodes(graph, state)
    assert_each_entry_once(graph)
    assert WeightSpace.from_json(space.to_json()) == space
    t = wspace.sample(space, generator=generator)
    moved = encode(space, wspace.act(t, state, space))
    assert all(torch.equal(x, moved.values[k]) for k, x in graph.act(t).values.items())
    if sum(p.numel for p in space.params) < RELABELLED:
        relabelling(graph, moved)


RELABELLED = 60_000
"""Most entries of a case whose two graphs are compared entry by entry, in Python."""


def assert_decodes(graph: ParameterGraph, state: dict[str, Tensor]) -> None:
    """The graph decodes to the state, bit for bit, ties included."""
    again = decode(graph)
    assert state.keys() <= again.keys()
    assert all(torch.equal(x, again[k]) for k, x in state.items())
    for p in graph.space.params:
        assert all(again[t] is again[p.name] for t in p.ties)


def test_assert_decodes_finds_a_changed_value() -> None:
    space, state = traced("mlp")
    name = space.params[0].name
    with pytest.raises(AssertionError):
        assert_decodes(encode(space, state), {**state, name: state[name] + 1})


def test_relabelling_finds_what_is_no_symmetry() -> None:
    space, state = traced("mlp")
    name = next(p.name for p in space.params if len(p.shape) == 2)
    wrong = {**state, name: state[name].flip(0)}
    with pytest.raises(AssertionError):
        relabelling(encode(space, state), encode(space, wrong))


def test_each_entry_once_finds_a_lost_block() -> None:
    space, state = traced("mlp")
    short = replace(space, wiring=replace(space.wiring, blocks=space.wiring.blocks[1:]))
    with pytest.raises(AssertionError, match="not held once"):
        assert_each_entry_once(encode(short, state))


# ------------------------------------------------------------------ right endpoints

DIRECT = [
    "mlp", "vgg", "resnet18", "densenet", "mobilenet_v3", "shufflenet_v2",
    "shufflenet_v1", "squeezenet", "inception", "grouped_se", "depth_multiplier", "pixel_shuffle",
    "attention_unbind", "attention_permute", "attention_chunk",
    "attention_per_head", "attention_gqa", "attention_gqa_repeat", "swiglu", "gpt2", "llama",
]  # fmt: skip


def structural(graph: ParameterGraph) -> dict[int, set[int]]:
    """Units that every unit reaches through one structural block."""
    ahead: dict[int, set[int]] = {}
    s = graph.structure
    for i, b in enumerate(s.blocks):
        if b.structural and b.source is not None:
            ends = (
                s.source(i) + s.offsets[b.source.nodes],
                s.target(i) + s.offsets[b.target.nodes],
            )
            pairs = zip(*(e.expand(b.sizes).reshape(-1).tolist() for e in ends), strict=True)
            for u, v in pairs:
                ahead.setdefault(u, set()).add(v)
    return ahead


def reached(ahead: dict[int, set[int]], units: set[int]) -> set[int]:
    """These units and all that they reach through structural blocks."""
    out, todo = set(units), list(units)
    while todo:
        new = ahead.get(todo.pop(), set()) - out
        out |= new
        todo += new
    return out


def _entry_units(
    graph: ParameterGraph, name: str
) -> tuple[set[tuple[int, int]], set[tuple[int, int]]]:
    """(input channel, source unit) and (output channel, target unit) of a contraction's weight."""
    s = graph.structure
    weight = graph.space[f"{name}.weight"]
    module = MODULES[name]
    ins: set[tuple[int, int]] = set()
    outs: set[tuple[int, int]] = set()
    for i, b in enumerate(s.blocks):
        if b.param != weight.name or b.source is None:
            continue
        grid = torch.arange(weight.numel).reshape(weight.shape)
        entry = window(grid, b).reshape(-1)
        where = torch.unravel_index(entry, weight.shape)
        source = (s.source(i) + s.offsets[b.source.nodes]).expand(b.sizes).reshape(-1)
        target = (s.target(i) + s.offsets[b.target.nodes]).expand(b.sizes).reshape(-1)
        o, c = (where[1], where[0]) if type(module).__name__ == "Conv1D" else where[:2]
        if isinstance(module, nn.Conv2d):
            c = o // (weight.shape[0] // module.groups) * weight.shape[1] + c
        ins |= set(map(tuple, torch.stack((c, source), 1).unique(dim=0).tolist()))
        outs |= set(map(tuple, torch.stack((o, target), 1).unique(dim=0).tolist()))
    return ins, outs


MODULES: dict[str, nn.Module] = {}


@pytest.mark.parametrize("name", DIRECT)
def test_endpoints_against_clamped_runs(name: str) -> None:
    module, args, kwargs = build(name)
    space = wspace.trace(module, args, kwargs)
    graph = encode(space, distinct(module))
    clamp = Clamp(module, args, kwargs)
    MODULES.clear()
    MODULES.update(clamp.parts)
    known = {
        n
        for n in clamp.parts
        if n in clamp.outputs and not space[f"{n}.weight"].ties  # a tied one has two places
    }
    ends = {n: _entry_units(graph, n) for n in known}
    ahead = structural(graph)
    checked = 0
    for n in sorted(known):
        width = clamp.outputs[n][0].shape[clamp.channel(n)]
        for unit in {1 % width, width - 1}:
            reach = reached(ahead, {u for c, u in ends[n][1] if c == unit})
            for consumer, channels in clamp.reached(n, unit).items():
                if consumer not in known or consumer == n:
                    continue
                expected = {c for c, u in ends[consumer][0] if u in reach}
                assert channels == expected, f"{n}[{unit}] → {consumer}: {channels} {expected}"
                checked += len(channels)
    assert checked


# ---------------------------------------------------------------- what it tells apart


class Attention(nn.Module):
    """One attention layer; `order` says which projection plays which part."""

    def __init__(self, order: str = "qkv", heads: int = 2) -> None:
        super().__init__()
        self.order, self.heads = order, heads
        self.a, self.b, self.c = (nn.Linear(5, 6, bias=False) for _ in range(3))
        self.o = nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        parts = dict(zip(self.order, (self.a, self.b, self.c), strict=True))
        q, k, v = (
            parts[n](x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for n in ("q", "k", "v")
        )
        y = F.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(1, 2).flatten(2))


def graph_of(module: nn.Module, *args: Tensor, state: dict[str, Tensor] | None = None) -> str:
    space = wspace.trace(module, args)
    return fingerprint(encode(space, state or module.state_dict()))


TOKENS = torch.zeros(2, 7, 5)


@pytest.mark.parametrize("order", ["vkq", "qvk", "kqv"])
def test_query_key_and_value_are_told_apart(order: str) -> None:
    module = Attention()
    swapped = Attention(order)
    swapped.load_state_dict(module.state_dict())
    assert graph_of(module, TOKENS) != graph_of(swapped, TOKENS)


@pytest.mark.parametrize("part", ["a", "c"])
def test_permutation_across_heads_of_one_part_is_seen(part: str) -> None:
    module = Attention()
    state = dict(module.state_dict())
    whole = graph_of(module, TOKENS, state=state)
    order = torch.tensor([3, 1, 2, 0, 4, 5])
    moved = {**state, f"{part}.weight": state[f"{part}.weight"][order]}
    assert graph_of(module, TOKENS, state=moved) != whole
    if part == "c":  # across heads is no symmetry even if the output weights follow
        moved["o.weight"] = state["o.weight"][:, order]
        assert graph_of(module, TOKENS, state=moved) != whole
        within = torch.tensor([2, 1, 0, 3, 4, 5])
        fine = {
            **state,
            "c.weight": state["c.weight"][within],
            "o.weight": state["o.weight"][:, within],
        }
        assert graph_of(module, TOKENS, state=fine) == whole


def test_number_of_heads_is_seen() -> None:
    one, two = Attention(heads=2), Attention(heads=3)
    two.load_state_dict(one.state_dict())
    assert graph_of(one, TOKENS) != graph_of(two, TOKENS)


def test_running_mean_is_seen() -> None:
    module = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3))
    x = torch.zeros(2, 5)
    before = graph_of(module, x)
    assert isinstance(module[1], nn.BatchNorm1d)
    module[1].running_mean[2] += 1
    assert graph_of(module, x) != before


def _mlp(act: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), act, nn.Linear(7, 3))


@pytest.mark.parametrize(
    "act",
    [nn.Tanh(), nn.Identity(), nn.LeakyReLU(0.2), nn.LeakyReLU(0.1), nn.GELU("tanh"), nn.GELU()],
)
def test_activation_is_seen(act: nn.Module) -> None:
    module = _mlp(nn.ReLU())
    others = [nn.LeakyReLU(0.3), nn.SiLU(), nn.ReLU()]
    state = module.state_dict()
    seen = [graph_of(_mlp(a), torch.zeros(2, 5), state=state) for a in (act, *others)]
    assert len(set(seen)) == 4


def test_last_activation_is_seen() -> None:
    body = nn.Linear(5, 3)
    ends = [nn.Identity(), nn.Sigmoid(), nn.Softmax(-1)]
    assert len({graph_of(nn.Sequential(body, end), torch.zeros(2, 5)) for end in ends}) == 3


def test_stride_and_padding_are_seen() -> None:
    x = torch.zeros(2, 2, 9, 9)
    state = None
    seen = set()
    for options in ({"padding": 2}, {"padding": 1, "dilation": 2}, {"stride": 2}):
        module = nn.Sequential(nn.Conv2d(2, 5, 3, **options), nn.AdaptiveAvgPool2d(1))
        state = state or module.state_dict()
        seen.add(graph_of(module, x, state=state))
    assert len(seen) == 3


class Skip(nn.Module):
    """Two linear maps, wired in one of several ways."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.style = style
        self.a, self.b, self.c = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        y = self.b(h)
        match self.style:
            case "before":
                y = (y + h).relu()
            case "after":
                y = y.relu() + h
            case "minus":
                y = (y - h).relu()
            case "times":
                y = (y * h).relu()
            case "rolled":
                y = (y + h.roll(1, -1)).relu()
            case _:
                y = y.relu()
        return self.c(y)


def test_wiring_is_seen() -> None:
    styles = ["plain", "before", "after", "minus", "times", "rolled"]
    first = Skip("plain")
    seen = [graph_of(Skip(s), torch.zeros(2, 5), state=first.state_dict()) for s in styles]
    assert len(set(seen)) == len(styles)


def test_fingerprint_ignores_order(generator: torch.Generator) -> None:
    for name in ("mlp", "resnet18", "attention_unbind"):
        space, state = traced(name)
        t = wspace.sample(space, generator=generator)
        moved = wspace.act(t, state, space)
        assert fingerprint(encode(space, state)) == fingerprint(encode(space, moved)), name


# ----------------------------------------------------------------------------- views


def test_blocks_are_views_with_batch_axes() -> None:
    space, state = traced("resnet18")
    batched = {k: torch.stack([x, -x]) for k, x in state.items()}
    graph = encode(space, batched)
    assert graph.batch == (2,)
    for i, b in enumerate(graph.structure.blocks):
        if not b.structural:
            view = graph.block(i)
            assert tuple(view.shape) == (2, *b.sizes)
            assert (
                view.untyped_storage().data_ptr() == batched[b.param].untyped_storage().data_ptr()
            )
    assert all(x is batched[k] for k, x in decode(graph).items())


def test_replaced_values_are_decoded() -> None:
    space, state = traced("gpt2")
    graph = encode(space, state)
    name = space.params[0].name
    changed = graph.replace({name: state[name] + 1})
    assert torch.equal(decode(changed)[name], state[name] + 1)
    for tie in space.params[0].ties:
        assert decode(changed)[tie] is decode(changed)[name]
    holders = [i for i in graph.structure.edges if graph.structure.blocks[i].param]
    index = next(i for i in holders if not graph.structure.blocks[i].again)
    block = graph.structure.blocks[index]
    other = graph.replace_blocks({index: graph.block(index) * 2})
    assert torch.equal(other.block(index), graph.block(index) * 2)
    assert torch.equal(graph.values[block.param], state[block.param])


def test_wrong_states_are_refused() -> None:
    space, state = traced("mlp")
    name = space.params[0].name
    with pytest.raises(SpaceMismatch, match=name):
        encode(space, {k: x for k, x in state.items() if k != name})
    with pytest.raises(SpaceMismatch, match=name):
        encode(space, state).replace({name: state[name][:1]})
    tied, values = traced("language_model_tied")
    tie = next(t for p in tied.params for t in p.ties)
    with pytest.raises(SpaceMismatch, match=tie):
        encode(tied, {**values, tie: values[tie] + 1})
    with pytest.raises(SpaceMismatch, match="no wiring"):
        encode(WeightSpace(space.params), state)


# ------------------------------------------------------------------------ other forms


@pytest.mark.parametrize(
    "name", ["mlp", "lenet", "attention_gqa", "mlp_batchnorm", "language_model_tied"]
)
@pytest.mark.parametrize("hetero", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_pyg_round_trip(name: str, hetero: bool) -> None:
    space, state = traced(name)
    graph = encode(space, state)
    data = to_pyg(graph, hetero=hetero)
    back = from_pyg(data, encode(space, {k: x * 0 for k, x in state.items()}))
    assert all(torch.equal(x, state[k]) for k, x in back.values.items())
    if not hetero:
        data.validate()
        held = (~data.edge_again & ~data.edge_structural).sum() + (~data.x_again).sum()
        repeated = sum(any(d < 0 for d in b.of) for b in space.wiring.blocks if b.param)
        assert repeated or held == sum(p.numel for p in space.params)


def test_networkx_has_every_entry() -> None:
    space, state = traced("mlp")
    graph = to_networkx(encode(space, state))
    weights = sum(p.numel for p in space.params if len(p.shape) == 2)
    assert graph.number_of_edges() == weights
    features = sum(len(f) for _, f in graph.nodes(data="features"))
    assert features == sum(p.numel for p in space.params if len(p.shape) == 1)
    with pytest.raises(SpaceMismatch, match="batch axes"):
        to_networkx(encode(space, {k: x[None] for k, x in state.items()}))


@pytest.mark.parametrize("name", ["mlp_batchnorm", "language_model_tied"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_store_round_trip(name: str, dtype: torch.dtype, tmp_path) -> None:
    space, state = traced(name)
    state = {k: x.to(dtype) if x.is_floating_point() else x for k, x in state.items()}
    for p in space.params:
        state |= dict.fromkeys(p.ties, state[p.name])
    path = tmp_path / "graph.safetensors"
    save_graph(encode(space, state), path)
    graph = load_graph(path)
    again = decode(graph)
    assert graph.space == space
    assert again.keys() == state.keys()
    assert all(torch.equal(x, again[k]) and x.dtype == again[k].dtype for k, x in state.items())
    assert all(again[t] is again[p.name] for p in space.params for t in p.ties)
    content = path.read_bytes()
    for damaged in (
        content[:-3],
        content[: len(content) // 2],
        b"",
        content.replace(b'\\"format\\"', b'\\"farmot\\"'),
    ):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="graph.safetensors"):
            load_graph(path)
