"""The graph predictor: its formulas edge by edge, its wirings, and what permutations do to it."""

import json
from collections.abc import Callable
from pathlib import Path

import cases
import pytest
import torch
from test_nowcast_predictors import ON_DISK, PUBLISHED, State, randomised, walk
from torch import Tensor, nn
from torch.nn import functional as F

import wspace
from wspace.errors import CheckpointError, NowcastError
from wspace.nowcast import NiNoGraph, load_published
from wspace.nowcast.published import published_topology
from wspace.nowcast.topology import Topology
from wspace.nowcast.wiring import traced

Edge = tuple[int, int, int, list[Tensor]]
"""Source, target, kind, and windows (5,) of its features; entries of the flat parameter beside."""


# ----------------------------------------------------------------- the formulas, naively


def published_graph(width: int, seed: int) -> dict[str, Tensor]:
    """Tensors of the published layout, with random weights; the dead convolution among them."""
    g = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"layer_embed.weight": (15, width)}

    def linear(name: str, out: int, size: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, size), (out,)

    linear("node_proj.fc.0", width, 8)
    linear("edge_proj.fc.0", width, 45)
    for i in range(3):
        linear(f"gnn.convs.{i}.edge_encoder", 2 * width, width)
        linear(f"gnn.convs.{i}.pre_nns.0.0", width, 2 * width)
        linear(f"gnn.convs.{i}.post_nns.0.0", width, 2 * width)
        linear(f"gnn.convs.{i}.lin", width, width)
    for i in range(2):
        for part in ("lin_e", "lin_s", "lin_t", "lin1"):
            linear(f"gnn.edge_update.{i}.{part}", width, width)
    linear("edge_out.fc.0", width, width)
    linear("edge_out.fc.2", 360, width)
    return {
        n: torch.randn(s, generator=g, dtype=torch.float64) * (0.35 if len(s) > 1 else 0.2)
        for n, s in shapes.items()
    }


def naive(s: dict[str, Tensor], edges: list[Edge], nodes: int, codes: Tensor | None) -> Tensor:
    """Section 1.5 of the notes over a list of edges: changes ``(edges, 9, 40)``."""

    def lin(name: str, x: Tensor) -> Tensor:
        return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]

    source, target, kind = (torch.tensor([e[i] for e in edges]) for i in range(3))
    x = torch.zeros(len(edges), 9, 5, dtype=torch.float64)
    for row, e in zip(x, edges, strict=True):
        for feature, window in enumerate(e[3]):
            row[feature] = window
    h = s["layer_embed.weight"][kind] + lin("edge_proj.fc.0", x.flatten(1))
    p = torch.zeros(nodes, 8, dtype=torch.float64) if codes is None else codes
    v = lin("node_proj.fc.0", p)
    count = torch.zeros(nodes, dtype=torch.float64).index_add(
        0, target, torch.ones(len(edges)).double()
    )
    for i in range(2):
        a, b = lin(f"gnn.convs.{i}.edge_encoder", h).chunk(2, 1)
        m = a * lin(f"gnn.convs.{i}.pre_nns.0.0", torch.cat([v[target], v[source]], 1)) + b
        g = torch.zeros_like(v).index_add(0, target, m) / count[:, None]
        v = F.silu(
            lin(f"gnn.convs.{i}.lin", lin(f"gnn.convs.{i}.post_nns.0.0", torch.cat([v, g], 1)))
        )
        e = f"gnn.edge_update.{i}"
        inner = lin(f"{e}.lin_e", h) + lin(f"{e}.lin_s", v)[source] + lin(f"{e}.lin_t", v)[target]
        h = lin(f"{e}.lin1", F.silu(inner))
    return lin("edge_out.fc.2", F.silu(lin("edge_out.fc.0", h))).view(-1, 9, 40)


class Wired:
    """Edges of a model, one by one, with where each value comes from."""

    def __init__(self, states: list[State]) -> None:
        self.states, self.nodes = states, 0
        self.edges: list[Edge] = []
        self.owners: list[tuple[str, list[int]]] = []
        self.scales: dict[str, tuple[float, float]] = {}
        self.rows: dict[str, Tensor] = {}
        for name in states[0]:
            x = torch.stack([s[name].flatten() for s in states], 1).double()
            std = float(x.std()) if x.numel() > 1 else 0.0
            self.scales[name] = (float(x.mean()), std)
            self.rows[name] = (x - x.mean()) / (std + 1e-6)

    def new(self, count: int) -> list[int]:
        self.nodes += count
        return list(range(self.nodes - count, self.nodes))

    def value(self, source: int, target: int, kind: int, name: str, entries: list[int]) -> None:
        self.edges.append((source, target, kind, [self.rows[name][i] for i in entries]))
        self.owners.append((name, entries))

    def constant(self, source: int, target: int, kind: int, value: float) -> None:
        self.edges.append((source, target, kind, [torch.full((5,), value, dtype=torch.float64)]))
        self.owners.append(("", []))

    def predict(self, weights: dict[str, Tensor], k: int, codes: Tensor | None = None) -> State:
        made = naive(weights, self.edges, self.nodes, codes)[..., k - 1]
        total = {n: torch.zeros(len(x), dtype=torch.float64) for n, x in self.rows.items()}
        times = {n: torch.zeros(len(x)) for n, x in self.rows.items()}
        for row, (name, entries) in zip(made, self.owners, strict=True):
            for feature, i in enumerate(entries):
                total[name][i] += row[feature]
                times[name][i] += 1
        out: State = {}
        for name, x in self.states[-1].items():
            assert bool((times[name] > 0).all())
            mean, std = self.scales[name]
            y = self.rows[name][:, -1] + total[name] / times[name]
            out[name] = (y * std + mean).view(x.shape)
        return out


def unrolled(topology: Topology, states: list[State]) -> Wired:
    """The edges of a topology, one by one."""
    wired = Wired(states)
    wired.nodes = topology.nodes
    for b in topology.blocks:
        p, t, s, q, _ = b.sizes
        target, source = b.target.view(p, t), b.source.view(p, s)
        for i, j, k, n in torch.cartesian_prod(*map(torch.arange, (p, t, s, q))).tolist():
            ends = int(source[i, k]), int(target[i, j])
            if b.param:
                wired.value(*ends, b.kind, b.param, b.entries[i, j, k, n].tolist())
            else:
                wired.constant(*ends, b.kind, b.value)
    return wired


def chain(module: nn.Module, states: list[State]) -> Wired:
    """Section 1.2 of the notes: layers in the order of the parameters."""
    wired, units = Wired(states), []
    for name, p in module.named_parameters():
        if p.dim() == 1:
            node = wired.new(1)[0]
            for j, unit in enumerate(units):
                wired.value(node, unit, 4 if name.endswith("weight") else 2, name, [j])
            continue
        units = units or wired.new(p.shape[1])
        fresh, taps = wired.new(p.shape[0]), p[0, 0].numel()
        for j, target in enumerate(fresh):
            for i, source in enumerate(units):
                start = (j * p.shape[1] + i) * taps
                kind = 3 if p.dim() == 4 else 1
                wired.value(source, target, kind, name, list(range(start, start + taps)))
        units = fresh
    for node in range(wired.nodes):
        wired.constant(node, node, 13, 2.0)
    return wired


def gpt2_graph(  # noqa: C901
    states: list[State], layers: int, heads: int, d: int
) -> Wired:
    """Section 1.3 of the notes: keys transposed, their bias on the stream, heads, residuals."""
    w, root = Wired(states), "transformer."

    def matrix(name: str, kind: int, source: list[int], target: list[int], offset: int = 0) -> None:
        width = states[0][name].shape[1]
        for i, a in enumerate(source):
            for j, b in enumerate(target):
                w.value(a, b, kind, name, [i * width + j + offset])

    def vector(name: str, kind: int, target: list[int], offset: int = 0) -> None:
        node = w.new(1)[0]
        for j, b in enumerate(target):
            w.value(node, b, kind, name, [j + offset])

    def linear(name: str, source: list[int]) -> list[int]:
        target = w.new(states[0][f"{name}.weight"].shape[1])
        matrix(f"{name}.weight", 1, source, target)
        vector(f"{name}.bias", 2, target)
        return target

    def norm(name: str, stream: list[int]) -> None:
        vector(f"{name}.weight", 4, stream)
        vector(f"{name}.bias", 2, stream)

    def link(source: list[int], target: list[int]) -> None:
        for a, b in zip(source, target, strict=True):
            w.constant(a, b, 10, 1.0)

    stream = w.new(d)
    for name, kind in (("wte", 5), ("wpe", 6)):
        table = states[0][f"{root}{name}.weight"]
        matrix(f"{root}{name}.weight", kind, w.new(len(table)), stream)
    for n in range(layers):
        at = f"{root}h.{n}."
        norm(f"{at}ln_1", stream)
        q, v, head = w.new(d), w.new(d), w.new(heads)
        name = f"{at}attn.c_attn"
        matrix(f"{name}.weight", 7, stream, q)
        for i, r in enumerate(stream):
            for j, unit in enumerate(q):
                w.value(unit, r, 8, f"{name}.weight", [i * 3 * d + d + j])
        matrix(f"{name}.weight", 9, stream, v, 2 * d)
        for i, target in enumerate((q, stream, v)):
            vector(f"{name}.bias", 2, target, i * d)
        for j in range(d):
            w.constant(head[j * heads // d], q[j], 11, 1.0)
            w.constant(head[j * heads // d], v[j], 11, 1.0)
        after = linear(f"{at}attn.c_proj", v)
        link(stream, after)
        norm(f"{at}ln_2", after)
        stream, before = linear(f"{at}mlp.c_proj", linear(f"{at}mlp.c_fc", after)), after
        link(before, stream)
    norm(f"{root}ln_f", stream)
    for node in range(w.nodes):
        w.constant(node, node, 13, 2.0)
    return w


def from_checkpoint(state: dict[str, Tensor], folder: Path, **options: object) -> NiNoGraph:
    width = state["layer_embed.weight"].shape[1]
    held = {"state_dict": state, "model_args": {"wte_pos_enc": False, "hid": width}}
    torch.save(held, folder / "some.pt")
    predictor = load_published(folder / "some.pt", **options).double()  # type: ignore[arg-type]
    assert isinstance(predictor, NiNoGraph)
    predictor.load_state_dict({n: x.double() for n, x in predictor.state_dict().items()})
    return predictor


def exact_checkpoint(
    seed: int, folder: Path, **options: object
) -> tuple[dict[str, Tensor], NiNoGraph]:
    """Random weights that float32 holds exactly, and the predictor loaded from their file."""
    state = {n: x.float() for n, x in published_graph(10, seed).items()}
    predictor = from_checkpoint(state, folder, **options)
    return {n: x.double() for n, x in state.items()}, predictor


def assert_close(made: State, want: State, last: State, tolerance: float = 1e-10) -> None:
    """The same up to a share of the update."""
    size = max(float((want[n] - last[n]).abs().max()) for n in want)
    assert size > 1e-3
    worst = max(float((made[n] - want[n]).abs().max()) for n in want)
    assert worst <= tolerance * size, f"{worst / size:.1e} of the update"


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(3, 5), nn.LayerNorm(5), nn.ReLU(), nn.Linear(5, 4), nn.Linear(4, 2)
    )


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, bias=False), nn.BatchNorm2d(5), nn.Conv2d(5, 4, 1), nn.Flatten(),
        nn.Linear(4, 3),
    )  # fmt: skip


@pytest.mark.parametrize("make", [mlp, cnn])
@pytest.mark.parametrize("seed", range(3))
def test_published_wiring_of_chains(
    make: Callable[[], nn.Module], seed: int, tmp_path: Path
) -> None:
    module = make().double().eval()
    weights, predictor = exact_checkpoint(seed, tmp_path)
    states = [{n: s[n] for n, _ in module.named_parameters()} for s in walk(module, seed=seed)]
    k = 1 + 13 * seed
    want = chain(module, states).predict(weights, k)
    out = predictor.predict(module, states, horizon=k, topology="published")
    assert_close(out, want, states[-1])


def gpt2(seed: int = 0) -> nn.Module:
    import transformers

    torch.manual_seed(seed)
    config = transformers.GPT2Config(n_embd=6, n_layer=2, n_head=2, vocab_size=23, n_positions=7)
    return transformers.GPT2LMHeadModel(config).double().eval()


IDS = {"input_ids": torch.zeros(1, 4, dtype=torch.int64)}


@pytest.mark.parametrize("seed", range(2))
def test_published_wiring_of_gpt2(seed: int, tmp_path: Path) -> None:
    module = gpt2(seed)
    weights, predictor = exact_checkpoint(seed, tmp_path, chunk=31)
    states = [{n: s[n] for n, _ in module.named_parameters()} for s in walk(module, seed=seed)]
    want = gpt2_graph(states, 2, 2, 6).predict(weights, 9)
    out = predictor.predict(module, states, horizon=9, topology="published")
    assert_close(out, want, states[-1])


@pytest.mark.parametrize(
    "name", ["mlp", "lstm", "lenet", "depth_multiplier", "attention_gqa", "attention_relative"]
)
def test_traced_wiring_edge_by_edge(name: str, tmp_path: Path) -> None:
    """Streamed, merged and fused is what a list of edges gives, whatever the chunks."""
    module, args, kwargs = cases.build(name)
    space = wspace.trace(module, args, kwargs)
    names = [p.name for p in space.params if not p.buffer]
    states = [{n: s[n] for n in names} for s in walk(module)]
    weights, predictor = exact_checkpoint(1, tmp_path)
    want = unrolled(traced(space), states).predict(weights, 5)
    for predictor.chunk in (3, 50, 2048):
        out = predictor.predict(module, states, horizon=5, space=space)
        assert_close(out, want, states[-1])


def test_laplacian_codes_and_chunks(tmp_path: Path) -> None:
    module = mlp().double()
    space = wspace.trace(module, (torch.zeros(1, 3, dtype=torch.float64),))
    states = walk(module)
    weights, predictor = exact_checkpoint(2, tmp_path, laplacian=True)
    codes = traced(space).laplacian(8)
    want = unrolled(traced(space), states).predict(weights, 5, codes)
    for predictor.chunk in (1, 7, 2048):
        out = predictor.predict(module, states, horizon=5, space=space)
        assert_close(out, want, states[-1])
    predictor.laplacian = False
    plain = predictor.predict(module, states, horizon=5, space=space)
    with pytest.raises(AssertionError, match="of the update"):
        assert_close(plain, want, states[-1])
    n = len(codes)
    a = torch.zeros(n, n, dtype=torch.float64)
    for b in traced(space).blocks:
        p, t, s, _, _ = b.sizes
        a[b.target.view(p, t, 1).expand(p, t, s), b.source.view(p, 1, s).expand(p, t, s)] = 1
    a = ((a + a.T) > 0).double()
    d = a.sum(1).rsqrt()
    laplacian = torch.eye(n, dtype=torch.float64) - d[:, None] * a * d
    values = torch.linalg.eigvalsh(laplacian)[1:9]
    assert (laplacian @ codes - codes * values).abs().max() <= 1e-12


@pytest.mark.parametrize("name", ["mlp", "lenet", "gpt2", "attention_relative", "lstm"])
@pytest.mark.parametrize("laplacian", [False, True])
def test_training_pass_agrees_with_the_streamed_one(name: str, laplacian: bool) -> None:
    module, args, kwargs = cases.build(name)
    space = wspace.trace(module, args, kwargs)
    names = [p.name for p in space.params if not p.buffer]
    runs = [[{n: s[n] for n in names} for s in walk(module, seed=i)] for i in range(2)]
    predictor = randomised(NiNoGraph(8, laplacian=laplacian).double())
    assert isinstance(predictor, NiNoGraph)
    x = {n: torch.stack([torch.stack([s[n] for s in run]) for run in runs]) for n in names}
    flat = {n: y.flatten(1) for n, y in x.items()}
    mean = {n: y.mean(1).view(-1, *[1] * (x[n].dim() - 1)) for n, y in flat.items()}
    std = {n: y.std(1).view(-1, *[1] * (x[n].dim() - 1)) for n, y in flat.items()}
    scaled = {n: (x[n] - mean[n]) / (std[n] + 1e-6) for n in names}
    changes = predictor(traced(space), scaled)
    loss = sum((y.abs().mean() for y in changes.values()), start=torch.zeros(()))
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for n, p in
               predictor.named_parameters() if laplacian or n != "place.weight")  # fmt: skip
    for i, run in enumerate(runs):
        for k in (1, 17, 40):
            out = predictor.predict(module, run, horizon=k, space=space)
            want = {
                n: run[-1][n] + changes[n][i, k - 1].detach() * (std[n][i, 0] + 1e-6) for n in names
            }
            assert_close(out, want, run[-1])


def test_training_gradient() -> None:
    """Of the loss with respect to every weight, by finite differences."""
    module = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    space = wspace.trace(module, (torch.zeros(1, 2, dtype=torch.float64),))
    predictor = randomised(NiNoGraph(3, longest=2).double())
    x = {n: torch.randn(1, 5, *p.shape).double() for n, p in module.named_parameters()}

    def loss() -> Tensor:
        return sum((y.sin().sum() for y in predictor(traced(space), x).values()), torch.zeros(()))

    loss().backward()
    g = torch.Generator().manual_seed(0)
    for name, p in predictor.named_parameters():
        if name == "place.weight":  # of codes that are zero
            continue
        assert p.grad is not None
        way = torch.randn(p.shape, generator=g, dtype=p.dtype)
        with torch.no_grad():
            p.add_(way, alpha=1e-5)
            up = float(loss())
            p.sub_(way, alpha=2e-5)
            down = float(loss())
            p.add_(way, alpha=1e-5)
        want = float((p.grad * way).sum())
        assert abs((up - down) / 2e-5 - want) <= 1e-6 * (1 + abs(want))


# ----------------------------------------------------------------------- checkpoints


def test_the_dead_convolution_is_left_out(tmp_path: Path) -> None:
    module = mlp().double()
    states = walk(module)
    outs = []
    for seed in (0, 1):
        state = {n: x.float() for n, x in published_graph(10, 0).items()}
        other = published_graph(10, seed)
        state |= {n: other[n].float() for n in state if n.startswith("gnn.convs.2.")}
        predictor = from_checkpoint(state, tmp_path)
        assert sum(p.numel() for p in predictor.parameters()) == sum(
            x.numel() for n, x in state.items() if not n.startswith("gnn.convs.2.")
        )
        outs.append(predictor.predict(module, states, horizon=3, topology="published"))
    assert all(torch.equal(x, outs[1][n]) for n, x in outs[0].items())
    state = {n: x.float() for n, x in published_graph(10, 0).items() if "convs.1.lin" not in n}
    with pytest.raises(CheckpointError, match=r"'rounds\.1\.lift\.bias': missing"):
        from_checkpoint(state, tmp_path)


def test_token_codes(tmp_path: Path) -> None:
    """A table of token codes, as in `nino.pt`, adds to the nodes that are tokens."""
    module, weights = gpt2(), published_graph(10, 3)
    state = {n: x.float() for n, x in weights.items()}
    state["wte_pos_enc_layer.weight"] = torch.randn(24, 10)
    predictor = from_checkpoint(state, tmp_path)
    states = [{n: s[n] for n, _ in module.named_parameters()} for s in walk(module)]
    out = predictor.predict(module, states, horizon=2, topology="published")
    order = torch.randperm(23)
    with torch.no_grad():
        assert predictor.token is not None
        predictor.token.weight[1:] = predictor.token.weight[1:][order]
    name = "transformer.wte.weight"
    moved = [{**s, name: s[name][order]} for s in states]
    other = predictor.predict(module, moved, horizon=2, topology="published")
    assert_close(other, {**out, name: out[name][order]}, moved[-1])
    state["wte_pos_enc_layer.weight"] = torch.randn(23, 10)
    with pytest.raises(NowcastError, match="more tokens"):
        from_checkpoint(state, tmp_path).predict(module, states, horizon=2, topology="published")


@pytest.mark.parametrize("_", ON_DISK)
def test_published_graph_meets_the_golden_numbers(_: str) -> None:
    golden = json.loads((PUBLISHED / "golden.json").read_text())
    predictor = load_published(PUBLISHED / "nino_no_posw.pt")
    assert predictor.origin == "nino_no_posw.pt"
    modules = {
        "Linear(3,4)-Linear(4,2)": nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)),
        "Conv2d(2,3,3)-Linear(3,2)": nn.Sequential(nn.Conv2d(2, 3, 3), nn.Linear(3, 2)),
    }
    for what, module in modules.items():
        shapes = {n: p.shape for n, p in module.named_parameters()}
        i = torch.arange(sum(s.numel() for s in shapes.values()), dtype=torch.float64)
        states = []
        for t in range(5):
            row = (0.1 * torch.sin(0.7 * i) + 0.01 * t * torch.cos(1.3 * i)).float()
            parts = row.split([s.numel() for s in shapes.values()])
            states.append({n: x.view(s) for (n, s), x in zip(shapes.items(), parts, strict=True)})
        for k in (1, 40):
            want = golden[f"nino_no_posw zero-LPE|{what}|k={k}"]
            out = predictor.predict(module, states, horizon=k, topology="published")
            y = torch.cat([x.flatten() for x in out.values()]).double()
            assert (y[:8] - torch.tensor(want["first8"])).abs().max() <= 1e-5
            assert abs(float(y.sum()) - want["sum"]) <= 1e-5
            assert abs(float(y.norm()) - want["l2"]) <= 1e-5


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.LSTM(3, 4), "which is no plain layer"),
        (nn.Sequential(nn.Conv2d(3, 4, 5)), "kernel of more than 9"),
        (nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), "'0' \\(Conv2d\\) of 2 inputs"),
        (
            nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 2)),
            "'2' .* after 4 outputs",
        ),
        (nn.Sequential(nn.TransformerEncoderLayer(4, 2)), "order of layers is not known"),
        (nn.Sequential(nn.ReLU()), "without layers"),
    ],
)
def test_other_modules_have_no_published_topology(module: nn.Module, reason: str) -> None:
    with pytest.raises(NowcastError, match=reason):
        published_topology(module)


def test_shared_layers_have_no_published_topology() -> None:
    layer = nn.Linear(3, 3)
    other = nn.Linear(3, 3)
    other.weight = layer.weight
    with pytest.raises(NowcastError, match="shared"):
        published_topology(nn.Sequential(layer, other))
