"""Predictors of future states: what holds for all of them, and those that need no graph."""

from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import wspace
from wspace.errors import NowcastError
from wspace.nowcast import (
    WNN,
    Average,
    LinearFit,
    NiNoGraph,
    NiNoMLP,
    NoChange,
    Predictor,
    load_published,
)
from wspace.nowcast.topology import BIAS, CONV, FC, KEY, NORM, POSITION, QUERY, TOKEN, VALUE

PUBLISHED = Path(__file__).parent.parent.parent / "shared" / "data" / "nino"
ON_DISK = ["published"] if (PUBLISHED / "golden.json").exists() else []  # checkpoints: not ours
"""Real checkpoints are tested where they are; the same mathematics is tested everywhere."""

State = dict[str, Tensor]


def randomised(net: nn.Module, seed: int = 0) -> nn.Module:
    """Weights of a size at which every term matters."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(
                torch.randn(p.shape, generator=g, dtype=p.dtype) * (0.3 if p.dim() > 1 else 0.1)
            )
    return net


def predictors() -> dict[str, Predictor]:
    made = {
        "NoChange": NoChange(),
        "LinearFit": LinearFit(),
        "Average": Average(),
        "Average 0.5": Average(0.5),
        "WNN": WNN(8),
        "NiNoMLP": NiNoMLP(8),
        "NiNoGraph": NiNoGraph(8),
    }
    return {k: randomised(p.double()) for k, p in made.items()}  # type: ignore[misc]


ALL = list(predictors())


class Net(nn.Module):
    """Two names for one matrix, a norm with statistics, and a parameter of no dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.norm = nn.BatchNorm1d(7)
        self.last = nn.Linear(7, 5)
        self.same = nn.Linear(5, 7)
        self.same.weight = self.first.weight
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.same(self.last(self.norm(self.first(x)))) * self.scale)


def net() -> Net:
    torch.manual_seed(0)
    return Net().double().eval()


def walk(module: nn.Module, count: int = 5, seed: int = 0) -> list[State]:
    """States that wander, ties tied; integers and buffers as they are."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(count):
        moved: dict[int, Tensor] = {}
        for p in module.parameters():
            moved[id(p)] = p.detach() + 0.1 * torch.randn(p.shape, generator=g, dtype=p.dtype)
        named = dict(module.named_parameters(remove_duplicate=False))
        state = module.state_dict()
        out.append({n: moved[id(named[n])] if n in named else x for n, x in state.items()})
    return out


INPUT = (torch.zeros(2, 5, dtype=torch.float64),)


# ------------------------------------------------------------- what holds for all


@pytest.mark.parametrize("name", ALL)
def test_a_whole_new_state(name: str) -> None:
    """All names, new memory everywhere, ties equal, buffers as they were, inputs untouched."""
    module, predictor = net(), predictors()[name]
    states = walk(module)
    kept = [{n: x.clone() for n, x in s.items()} for s in states]
    rng = torch.get_rng_state()
    before = {n: x.clone() for n, x in module.state_dict().items()}
    out = predictor.predict(module, states, horizon=3, args=INPUT)
    assert list(out) == list(states[-1])
    assert len({x.untyped_storage().data_ptr() for x in out.values()}) == len(out)
    theirs = {x.untyped_storage().data_ptr() for s in states for x in s.values()}
    assert not theirs & {x.untyped_storage().data_ptr() for x in out.values()}
    assert torch.equal(out["first.weight"], out["same.weight"])
    for n in ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked"):
        assert torch.equal(out[n], states[-1][n])
    for a, b in zip(states, kept, strict=True):
        assert all(torch.equal(a[n], b[n]) for n in a)
    assert all(torch.equal(x, before[n]) for n, x in module.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state())
    assert all(out[n].dtype == x.dtype and out[n].shape == x.shape for n, x in states[-1].items())
    if name != "NoChange":
        moved = [n for n, p in module.named_parameters() if not torch.equal(out[n], states[-1][n])]
        assert moved == [n for n, _ in module.named_parameters()]


@pytest.mark.parametrize("name", ALL)
def test_horizon_0_and_constant_history_do_not_move(name: str) -> None:
    module, predictor = net(), predictors()[name]
    states = walk(module)
    out = predictor.predict(module, states, horizon=0)
    assert all(torch.equal(out[n], x) for n, x in states[-1].items())
    out = predictor.predict(module, [states[0]] * 5, horizon=40, args=INPUT)
    assert all(torch.equal(out[n], x) for n, x in states[0].items())


@pytest.mark.parametrize("name", ["NiNoMLP", "NiNoGraph"])
def test_still_entries_stay_and_others_do_not_notice(name: str) -> None:
    """Freezing entries is a policy on the result; switched off, the published drift is there."""
    module, predictor = net(), predictors()[name]
    states = walk(module)
    for s in states:
        s["last.weight"] = s["last.weight"].clone()
        s["last.weight"][:, 2] = 0.25
    out = predictor.predict(module, states, horizon=9, args=INPUT)
    predictor.still = False
    drifting = predictor.predict(module, states, horizon=9, args=INPUT)
    assert bool((out["last.weight"][:, 2] == 0.25).all())
    assert bool((drifting["last.weight"][:, 2] != 0.25).all())
    out["last.weight"][:, 2] = drifting["last.weight"][:, 2]
    assert all(torch.equal(out[n], drifting[n]) for n in out)


@pytest.mark.parametrize("name", ALL)
def test_names_restrict_what_is_predicted(name: str) -> None:
    module, predictor = net(), predictors()[name]
    states = walk(module)
    whole = predictor.predict(module, states, horizon=5, args=INPUT)
    some = predictor.predict(module, states, horizon=5, args=INPUT, names=["same.weight", "scale"])
    for n, x in states[-1].items():
        wanted = n in {"first.weight", "same.weight", "scale"}
        assert torch.equal(some[n], whole[n] if wanted else x)


@pytest.mark.parametrize("name", [n for n in ALL if n not in {"NoChange"}])
@pytest.mark.parametrize("seed", range(5))
def test_affine_covariance(name: str, seed: int) -> None:
    """A tensor scaled and shifted is predicted scaled and shifted."""
    module, predictor = net(), predictors()[name]
    states = walk(module, seed=seed)
    g = torch.Generator().manual_seed(seed)
    ab = {n: torch.rand(2, generator=g).add(0.5).tolist() for n, _ in module.named_parameters()}
    ab["same.weight"] = ab["first.weight"]
    moved = [{n: x * ab[n][0] + ab[n][1] if n in ab else x for n, x in s.items()} for s in states]
    out = predictor.predict(module, states, horizon=5, args=INPUT)
    other = predictor.predict(module, moved, horizon=5, args=INPUT)
    for n, (a, b) in ab.items():
        error = (other[n] - (out[n] * a + b)).abs().max()
        assert error <= 1e-3 * (out[n] - states[-1][n]).abs().max()  # eps is 1e-6 of no scale


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_of_the_states(name: str, dtype: torch.dtype) -> None:
    module, predictor = net().to(dtype), predictors()[name].float()
    states = walk(module)
    args = (torch.zeros(2, 5, dtype=dtype),)
    out = predictor.predict(module, states, horizon=2, args=args)
    exact = [{n: x.double() for n, x in s.items()} for s in states]
    want = predictor.double().predict(net(), exact, horizon=2, args=INPUT)
    for n, _ in module.named_parameters():
        assert out[n].dtype == dtype
        size = (want[n] - exact[-1][n]).abs().max() + want[n].abs().max()
        assert (out[n].double() - want[n]).abs().max() <= 8 * torch.finfo(dtype).eps * size


def test_memory_layout_does_not_matter() -> None:
    module = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 2, 3)).double()
    args = (torch.zeros(1, 3, 8, 8, dtype=torch.float64),)
    states = walk(module)
    turned = [{n: x.mT.contiguous().mT for n, x in s.items() if x.dim() == 4} for s in states]
    for predictor in predictors().values():
        a = predictor.predict(module, states, horizon=2, args=args)
        b = predictor.predict(
            module, [{**s, **t} for s, t in zip(states, turned, strict=True)], horizon=2, args=args
        )
        assert all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_history_is_refused_by_name(value: float) -> None:
    module = net()
    states = walk(module)
    states[2]["last.bias"] = states[2]["last.bias"].clone()
    states[2]["last.bias"][1] = value
    for predictor in predictors().values():
        with pytest.raises(NowcastError, match=r"not finite in 'last\.bias'"):
            predictor.predict(module, states, horizon=1, args=INPUT)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_prediction_is_refused_by_name(value: float) -> None:
    module, predictor = net(), NiNoMLP(8).double()
    with torch.no_grad():
        predictor.layers[-1].bias[7] = value
    states = walk(module)
    predictor.predict(module, states, horizon=7)
    predictor.predict(module, states, horizon=8, names=[])
    with pytest.raises(NowcastError, match=r"prediction of 'norm\.bias' is not finite"):
        predictor.predict(module, states, horizon=8, names=["norm.bias"])


def test_what_does_not_fit_is_refused() -> None:
    module = net()
    states = walk(module)
    fit = LinearFit()
    with pytest.raises(NowcastError, match=r"expected 5 past states.*\n.*got 4"):
        fit.predict(module, states[1:], horizon=1)
    with pytest.raises(NowcastError, match=r"0 to 40 spacings\n.*got 41"):
        fit.predict(module, states, horizon=41)
    for horizon in (2.5, True, "2", torch.tensor(2)):
        with pytest.raises(NowcastError, match="a whole number of spacings"):
            fit.predict(module, states, horizon=horizon)  # type: ignore[arg-type]
    fit.predict(module, states, horizon=numpy.int64(2))  # type: ignore[arg-type]
    with pytest.raises(NowcastError, match="'guessed'"):
        fit.predict(module, states, horizon=1, topology="guessed")
    with pytest.raises(NowcastError, match="'nothing'"):
        fit.predict(module, states, horizon=1, names=["nothing"])
    with pytest.raises(NowcastError, match=r"'norm\.running_mean'"):
        fit.predict(module, states, horizon=1, names=["norm.running_mean"])
    with pytest.raises(NowcastError, match="none of the module's parameters"):
        fit.predict(module, [{"other": torch.zeros(1)}] * 5, horizon=1)
    lost = [{n: x for n, x in s.items() if i or n != "scale"} for i, s in enumerate(states)]
    with pytest.raises(NowcastError, match="'scale' is missing in 1 states"):
        fit.predict(module, lost, horizon=1)
    short = [{**s, "last.bias": s["last.bias"][: 5 - (i == 1)]} for i, s in enumerate(states)]
    with pytest.raises(NowcastError, match=r"'last\.bias' has shapes"):
        fit.predict(module, short, horizon=1)
    sparse = [{**s, "last.weight": s["last.weight"].to_sparse()} for s in states]
    with pytest.raises(NowcastError, match=r"'last\.weight' is torch\.sparse_coo"):
        fit.predict(module, sparse, horizon=1)
    with pytest.raises(NowcastError, match="context=0"):
        LinearFit(context=0)
    with pytest.raises(NowcastError, match="0 < decay"):
        Average(0.0)


@pytest.mark.parametrize("name", ["WNN", "NiNoMLP", "LinearFit"])
def test_parts_of_tensors_with_reduced_moments(name: str) -> None:
    """Two ranks with a part each predict what one with all does."""
    module, predictor = nn.Linear(6, 8, bias=False).double(), predictors()[name]
    states = walk(module)
    whole = predictor.predict(module, states, horizon=4)["weight"]
    seen: list[Tensor] = []
    parts = [[{"weight": s["weight"][rows]} for s in states] for rows in (slice(0, 3), slice(3, 8))]

    def collect(x: Tensor) -> Tensor:
        seen.append(x)
        return x

    for part in parts:
        predictor.predict(module, part, horizon=4, moments=collect)
    total = seen[0] + seen[1]
    made = [predictor.predict(module, p, horizon=4, moments=lambda _: total) for p in parts]
    joined = torch.cat([m["weight"] for m in made])
    assert (joined - whole).abs().max() <= 1e-12 * whole.abs().max()


# -------------------------------------------------------------- without a network


@pytest.mark.parametrize("context", [2, 3, 5, 8])
@pytest.mark.parametrize("horizon", [1, 7, 40])
def test_linear_fit_is_exact_on_lines_and_least_squares_elsewhere(
    context: int, horizon: int
) -> None:
    module, fit = nn.Linear(4, 6).double(), LinearFit(context=context)
    start, slope = walk(module, 2)
    line = [{n: start[n] + t * slope[n] for n in start} for t in range(context + horizon)]
    out = fit.predict(module, line[:context], horizon=horizon)
    want = line[context - 1 + horizon]
    assert all((out[n] - want[n]).abs().max() <= 1e-12 * want[n].abs().max() for n in want)
    states = walk(module, context)
    t = torch.stack([torch.ones(context), torch.arange(context)], 1).double()
    y = torch.stack([s["weight"].flatten() for s in states])
    a, b = torch.linalg.lstsq(t, y).solution
    out = fit.predict(module, states, horizon=horizon)
    want_w = (a + b * (context - 1 + horizon)).view(6, 4)
    assert (out["weight"] - want_w).abs().max() <= 1e-12 * want_w.abs().max()


def test_averages() -> None:
    module = nn.Linear(4, 6).double()
    states = walk(module)
    stack = torch.stack([s["weight"] for s in states])
    for decay in (1.0, 0.5, 0.9):
        w = torch.tensor([decay**i for i in (4, 3, 2, 1, 0)], dtype=torch.float64)
        want = torch.tensordot(w / w.sum(), stack, 1)
        for horizon in (1, 40):
            out = Average(decay).predict(module, states, horizon=horizon)["weight"]
            assert (out - want).abs().max() <= 1e-14


def test_wnn_by_hand() -> None:
    """Two streams of relative values and differences, a tanh, in units of twice the range."""
    wnn = randomised(WNN(6).double())
    for i, kind in enumerate((CONV, FC, BIAS)):
        x = torch.randn(50, 5, dtype=torch.float64)
        size = 2 * (x.max(1).values - x.min(1).values)
        v = (x - x[:, :1]) / size[:, None]
        d = v[:, 1:] - v[:, :-1]
        a = F.relu(v @ wnn.values[i].weight.T + wnn.values[i].bias)  # type: ignore[union-attr, operator]
        b = F.relu(d @ wnn.steps[i].weight.T + wnn.steps[i].bias)  # type: ignore[union-attr, operator]
        h = F.relu(wnn.hidden[i](torch.cat([a, b], 1)))
        want = torch.tanh(wnn.heads[i](h)) * size[:, None]
        assert (wnn(x, kind) - want).abs().max() <= 1e-14  # type: ignore[operator]


# ------------------------------------------------------------------- NiNo, entrywise


def published_mlp(width: int, seed: int) -> dict[str, object]:
    """A checkpoint of the published layout, with random weights."""
    g = torch.Generator().manual_seed(seed)
    shapes = {"layer_embed.weight": (15, width), "edge_proj.fc.0.weight": (width, 5)}
    shapes["edge_proj.fc.0.bias"] = (width,)
    for i in (0, 2, 4):
        shapes |= {f"edge_mlp.fc.{i}.weight": (width, width), f"edge_mlp.fc.{i}.bias": (width,)}
    shapes |= {"edge_mlp.fc.6.weight": (40, width), "edge_mlp.fc.6.bias": (40,)}
    state = {k: torch.randn(s, generator=g) * 0.4 for k, s in shapes.items()}
    return {"state_dict": state, "model_args": {"gnn": False, "hid": width}}


def naive_mlp(s: dict[str, Tensor], states: list[Tensor], kind: Tensor, k: int) -> Tensor:
    """Section 1.5 of the notes, literally, on one tensor in float64."""
    s = {n: x.double() for n, x in s.items()}
    x = torch.stack([t.flatten() for t in states], 1)
    mean, std = x.mean(), x.std()
    x = (x - mean) / (std + 1e-6)
    h = x @ s["edge_proj.fc.0.weight"].T + s["edge_proj.fc.0.bias"]
    h = h + s["layer_embed.weight"][kind.flatten()]
    for i in (0, 2, 4):
        h = F.silu(h @ s[f"edge_mlp.fc.{i}.weight"].T + s[f"edge_mlp.fc.{i}.bias"])
    y = h @ s["edge_mlp.fc.6.weight"].T + s["edge_mlp.fc.6.bias"]
    return ((x[:, -1] + y[:, k - 1]) * std + mean).view(states[0].shape)


@pytest.mark.parametrize("seed", range(4))
def test_nino_mlp_is_the_published_formula(seed: int, tmp_path: Path) -> None:
    held = published_mlp(12, seed)
    torch.save(held, tmp_path / "some.pt")
    predictor = load_published(tmp_path / "some.pt").double()
    assert isinstance(predictor, NiNoMLP)
    assert predictor.origin == ""
    module = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(5, 4, bias=False)
    ).double()
    kinds = {"0.weight": CONV, "0.bias": BIAS, "1.weight": NORM, "1.bias": BIAS, "3.weight": FC}
    states = walk(module, seed=seed)
    k = 1 + 13 * seed
    for chunk in (7, 8192):
        predictor.chunk = chunk
        out = predictor.predict(module, states, horizon=k, topology="published")
        for n, kind in kinds.items():
            past = [s[n] for s in states]
            want = naive_mlp(held["state_dict"], past, torch.full(past[0].shape, kind), k)  # type: ignore[arg-type]
            assert (out[n] - want).abs().max() <= 1e-10 * (want - past[-1]).abs().max()


def test_nino_mlp_kinds_of_a_gpt2() -> None:
    """Fused queries, keys and values get their own kinds, by names and by the weight space."""
    import transformers

    config = transformers.GPT2Config(n_embd=6, n_layer=2, n_head=2, vocab_size=23, n_positions=7)
    module = transformers.GPT2LMHeadModel(config).double().eval()
    space = wspace.trace(module, (), {"input_ids": torch.zeros(1, 4, dtype=torch.int64)})
    states = [{n: x for n, x in s.items() if n != "lm_head.weight"} for s in walk(module)]
    predictor = randomised(NiNoMLP(8, drift=True).double())
    a = predictor.predict(module, states, horizon=3, topology="published")
    b = predictor.predict(module, states, horizon=3, space=space)
    weights = {n: x.double() for n, x in predictor.state_dict().items()}
    ours = {n.replace("layers.", "edge_mlp.fc."): x for n, x in weights.items()}
    ours |= {"layer_embed.weight": weights["kind.weight"]}
    ours |= {f"edge_proj.fc.0.{n}": weights[f"enter.{n}"] for n in ("weight", "bias")}
    for name, p in module.named_parameters():
        kind = torch.full(p.shape, {1: BIAS, 2: FC}[p.dim()])
        if name.endswith("c_attn.weight"):
            kind = torch.tensor([QUERY, KEY, VALUE]).repeat_interleave(6).expand(6, 18)
        for ending, k in (("wte.weight", TOKEN), ("wpe.weight", POSITION)):
            kind = torch.full(p.shape, k) if name.endswith(ending) else kind
        if p.dim() == 1 and name.endswith("weight"):
            kind = torch.full(p.shape, NORM)
        want = naive_mlp(ours, [s[name] for s in states], kind, 3)
        size = (want - states[-1][name]).abs().max()
        assert (a[name] - want).abs().max() <= 1e-10 * size
        assert (b[name] - want).abs().max() <= 1e-10 * size


def test_bfloat16_stays_within_a_hundredth_of_the_update() -> None:
    module = nn.Linear(64, 64).float()
    states = walk(module)
    exact, low = NiNoMLP(128), NiNoMLP(128, precision="bfloat16")
    for net_ in (exact, low):
        for p in net_.parameters():
            with torch.no_grad():
                g = torch.Generator().manual_seed(p.numel())
                p.copy_(torch.randn(p.shape, generator=g) / p.shape[-1] ** 0.5)
    a, b = (p.predict(module, states, horizon=3) for p in (exact, low))
    moved = (a["weight"] - states[-1]["weight"]).norm()
    error = (a["weight"] - b["weight"]).norm()
    assert 0 < error <= 1e-2 * moved
