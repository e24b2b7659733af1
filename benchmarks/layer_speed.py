"""Layers for one weight space, beside the `nfn` package and the published figures of UNF.

First the example of the README of `nfn` (two linear layers of 32 channels, ReLU, pool, ten classes)
on a batch of 128 networks 2-32-32-1, forward, and forward and backward, with its layers and ours.
Then two layers 1 → 16 → 16 with ReLU on a batch of 8, for a recurrent network and a transformer
with everything permutable; JAX took 49 and 18 ms for a step on two cores that multiplied matrices
at 165 GFLOP/s, so the rate of this machine, measured between the rounds, is printed with them.
"""

from collections.abc import Callable
from statistics import median
from types import ModuleType
from typing import Any

import harness
import torch
import torch.nn.functional as F
from harness import finish, interleaved, ms, start, table, timed
from torch import Tensor, nn

from wspace.nn.layers import Pointwise
from wspace.nn.linear import EquivariantLinear, InvariantPool
from wspace.space import Axis, Group, Param, WeightSpace

BATCH, CHANNELS, CLASSES = 128, 32, 10
WIDTHS = (2, 32, 32, 1)
PUBLISHED = {"recurrent": 0.0491, "transformer": 0.0181}
RATE = 165.0
harness.PEERS.update({"nfn.layers": "nfn", "nfn.common": "nfn"})
Runs = dict[str, Callable[[], object]]


def space_of(shapes: dict[str, str], groups: dict[str, Group]) -> WeightSpace:
    """A space from one letter for each axis of each parameter."""
    return WeightSpace(
        tuple(Param(n, tuple(Axis((groups[c],)) for c in text)) for n, text in shapes.items())
    )


def free(**sizes: int) -> dict[str, Group]:
    return {name: Group(name, n, ("permutation",)) for name, n in sizes.items()}


def perceptron() -> WeightSpace:
    fixed = {"x": Group("x", WIDTHS[0]), "y": Group("y", WIDTHS[3])}
    groups = free(a=WIDTHS[1], b=WIDTHS[2]) | fixed
    shapes = {"0.w": "ax", "0.b": "a", "1.w": "ba", "1.b": "b", "2.w": "yb", "2.b": "y"}
    return space_of(shapes, groups)


def recurrent() -> WeightSpace:
    shapes = {"ih": "xh", "hh": "hh", "bh": "h", "ho": "hy", "bo": "y"}
    return space_of(shapes, free(x=32, h=64, y=10))


def transformer() -> WeightSpace:
    shapes = {"embed": "td", "q": "dk", "k": "dk", "v": "dv", "o": "vd", "norm1": "d"}
    shapes |= {"w1": "df", "b1": "f", "w2": "fd", "b2": "d", "norm2": "d", "head": "dt"}
    return space_of(shapes, free(t=32, d=32, k=32, v=32, f=64))


def ours(space: WeightSpace, basis: str) -> nn.Module:
    return nn.Sequential(
        EquivariantLinear(space, 1, CHANNELS, basis),
        Pointwise(nn.ReLU()),
        EquivariantLinear(space, CHANNELS, CHANNELS, basis),
        Pointwise(nn.ReLU()),
        InvariantPool(space, CHANNELS, CLASSES),
    )


def theirs(nfn: ModuleType, layer: Any, spec: Any, **options: Any) -> nn.Module:
    return nn.Sequential(
        layer(spec, 1, CHANNELS, **options),
        nfn.TupleOp(nn.ReLU()),
        layer(spec, CHANNELS, CHANNELS, **options),
        nfn.TupleOp(nn.ReLU()),
        nfn.HNPPool(spec),
        nn.Flatten(-2),
        nn.Linear(CHANNELS * nfn.HNPPool.get_num_outs(spec), CLASSES),
    )


def step(net: nn.Module, x: Any, loss: Callable[[Any], Tensor]) -> Callable[[], None]:
    def run() -> None:
        net.zero_grad(set_to_none=True)
        loss(net(x)).backward()

    return run


def forward(net: nn.Module, x: Any) -> Callable[[], None]:
    @torch.no_grad()
    def run() -> None:
        net(x)

    return run


def perceptrons(rounds: int) -> dict[str, Any]:
    """The README example, ours and theirs in turn."""
    space = perceptron()
    x = {p.name: torch.randn(BATCH, *p.shape, 1) for p in space.params}
    nets: dict[str, tuple[nn.Module, Any]] = {
        "wspace full": (ours(space, "full"), x),
        "wspace np": (ours(space, "np"), x),
    }
    nfn = harness.peer("nfn.layers")
    common = harness.peer("nfn.common")
    if nfn is not None and common is not None:
        parts = ([x[f"{i}.{kind}"].movedim(-1, 1).contiguous() for i in range(3)] for kind in "wb")
        theirs_x = common.WeightSpaceFeatures(*parts)
        spec = common.network_spec_from_wsfeat(theirs_x)
        nets["nfn HNP"] = (theirs(nfn, nfn.HNPLinear, spec), theirs_x)
        nets["nfn NP"] = (theirs(nfn, nfn.NPLinear, spec, io_embed=True), theirs_x)
    labels = torch.randint(CLASSES, (BATCH,))
    runs: Runs = {}
    for name, (net, data) in nets.items():
        runs[f"{name}, forward"] = forward(net, data)
        runs[f"{name}, step"] = step(net, data, lambda y: F.cross_entropy(y, labels))
    timings = interleaved(runs, rounds)
    rows, out = [], {}
    for name, t in timings.items():
        model, what = name.split(", ")
        peer = timings.get(f"nfn {'NP' if model.endswith('np') else 'HNP'}, {what}")
        against = "" if peer is None or model.startswith("nfn") else f"{t.ratio(peer):.2f}"
        weights = sum(p.numel() for p in nets[model][0].parameters())
        rows.append([model, what, weights, ms(t.median), ms(min(t.samples)), against])
        out[name] = {"median_s": t.median, "samples": t.samples, "ratio": against}
    print(f"\n## {BATCH} networks {'-'.join(map(str, WIDTHS))}, {CHANNELS} channels\n")
    table(["model", "what", "weights", "median ms", "min ms", "× nfn"], rows)
    return out


def universal(rounds: int) -> dict[str, Any]:
    """Two layers on a recurrent network and on a transformer."""
    runs: Runs = {}
    weights: dict[str, int] = {}
    for name, space in (("recurrent", recurrent()), ("transformer", transformer())):
        first, second = EquivariantLinear(space, 1, 16), EquivariantLinear(space, 16, 16)
        net = nn.Sequential(first, Pointwise(nn.ReLU()), second)
        x = {p.name: torch.randn(8, *p.shape, 1) for p in space.params}
        weights[name] = sum(p.numel() for p in net.parameters())
        runs[f"{name}, forward"] = forward(net, x)
        runs[f"{name}, step"] = step(
            net, x, lambda y: torch.stack([t.square().sum() for t in y.values()]).sum()
        )
    a = torch.randn(2048, 2048)
    runs["matrix product"] = lambda: a @ a
    timed(runs["matrix product"])
    timings = interleaved(runs, rounds)
    rate = 2 * 2048**3 / median(timings.pop("matrix product").samples) / 1e9
    rows: list[list[object]] = []
    out: dict[str, Any] = {"gflops": rate}
    for name, t in timings.items():
        spec, what = name.split(", ")
        unf = f"{1e3 * PUBLISHED[spec]:.0f}" if what == "step" else ""
        rows.append([spec, what, weights[spec], ms(t.median), ms(min(t.samples)), unf])
        out[name] = {"median_s": t.median, "samples": t.samples}
    print(f"\n## 1 → 16 → 16 channels, batch 8; this machine: {rate:.0f} GFLOP/s\n")
    table(["spec", "what", "weights", "median ms", "min ms", f"UNF ms at {RATE:.0f} GFLOP/s"], rows)
    return out


def main() -> None:
    options = start(__doc__ or "", rounds=15)
    figures = {"perceptrons": perceptrons(options.rounds), "universal": universal(options.rounds)}
    finish(options, figures)


if __name__ == "__main__":
    main()
