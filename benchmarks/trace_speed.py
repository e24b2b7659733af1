"""From module to space: seconds beside torch-pruning, rebasin and torch.export, and growth.

Each candidate starts from the same module and the same example input, and ends with what it needs
to say which axes are coupled: wspace with a `WeightSpace`, torch-pruning with a built
`DependencyGraph`, rebasin with a constructed `PermutationCoordinateDescent` (which traces two
models, as its interface demands), torch.export with a program and no symmetry yet.

The peers run the module for real, wspace on shapes only, so the size of the input matters to them:
the small input is the harder comparison.
"""

import importlib
from collections.abc import Callable

import models
import torch
from harness import Timing, exponent, finish, interleaved, ms, peer, start, table, timed
from torch import nn

import wspace

Runs = dict[str, Callable[[], object]]


def runs(make: Callable[[], nn.Module], size: int) -> Runs:
    x = torch.randn(1, 3, size, size)
    module, real = make(), make()
    with torch.device("meta"):
        meta = make()
    pruning, rebasin = peer("torch_pruning"), peer("rebasin")
    out: Runs = {
        "wspace.trace": lambda: wspace.trace(module, x),
        "wspace.trace (meta weights)": lambda: wspace.trace(meta, x),
        "wspace.trace and its wiring": lambda: wspace.trace(module, x).wiring.nodes,
        "torch.export alone": lambda: torch.export.export(module, (x,), strict=False),
        "one forward pass": lambda: forward(real, x),
    }
    if pruning:
        graph = pruning.DependencyGraph
        out["torch-pruning build_dependency"] = lambda: graph().build_dependency(
            module, example_inputs=x, verbose=False
        )
    if rebasin:
        out["rebasin constructor"] = lambda: rebasin.PermutationCoordinateDescent(module, real, x)
    return out


def forward(module: nn.Module, x: torch.Tensor) -> None:
    with torch.no_grad():
        module(x)


def compare(name: str, make: Callable[[], nn.Module], size: int, rounds: int) -> dict[str, object]:
    timings = interleaved(runs(make, size), rounds)
    ours = timings["wspace.trace"]
    print(f"\n## {name}, input 1x3x{size}x{size}, {rounds} rounds in turn\n")
    table(
        ["what", "first ms", "median ms", "min ms", "wspace takes × of it"],
        [
            [t.name, ms(t.first), ms(t.median), ms(min(t.samples)), f"{ours.ratio(t):.2f}"]
            for t in timings.values()
        ],
    )
    return {t.name: summary(t) | {"ratio": ours.ratio(t)} for t in timings.values()}


def summary(t: Timing) -> dict[str, object]:
    return {"first_s": t.first, "median_s": t.median, "min_s": min(t.samples), "n": len(t.samples)}


def stages(rounds: int) -> dict[str, float]:
    """Medians of the stages of `wspace.trace`, by a clock around each function it calls."""
    trace = importlib.import_module("wspace.trace")
    spent: dict[str, float] = {}
    found = [n for n in STAGES if callable(getattr(trace, n, None))]
    kept = {n: getattr(trace, n) for n in found}

    def clocked(name: str) -> Callable[..., object]:
        def run(*args: object, **kwargs: object) -> object:
            result: list[object] = []
            spent[name] = spent.get(name, 0.0) + timed(
                lambda: result.append(kept[name](*args, **kwargs))
            )
            return result[0]

        return run

    module, x = models.resnet50(), torch.randn(1, 3, 224, 224)
    wspace.trace(module, x)
    samples: dict[str, list[float]] = {n: [] for n in (*found, "rest")}
    try:
        for n in found:
            setattr(trace, n, clocked(n))
        for _ in range(rounds):
            spent.clear()
            total = timed(lambda: wspace.trace(module, x).wiring.nodes)
            for n in found:
                samples[n].append(spent.get(n, 0.0))
            samples["rest"].append(total - sum(spent.values()))
    finally:
        for n in found:
            setattr(trace, n, kept[n])
    out = {n: sorted(v)[len(v) // 2] for n, v in samples.items()}
    print("\n## Stages of wspace.trace, wiring included, on ResNet-50\n")
    rows = [[STAGES.get(n, n), ms(v), f"{v / sum(out.values()):.0%}"] for n, v in out.items()]
    table(["stage", "median ms", "share"], rows)
    return out


STAGES = {
    "capture": "capture: run the module on shapes, record calls",
    "find_families": "families of stacked modules",
    "solve": "rules and solving",
    "Naming": "derive: groups and dependences",
    "build_params": "derive: parameters",
    "roles_of": "derive: roles",
    "derive_gauges": "scale, sign and phase",
    "wire": "wiring of the graph (on first use)",
    "rest": "everything else",
}


def growth(rounds: int) -> dict[str, object]:
    """Time over depth (operators) and over width (parameters), with fitted exponents."""
    out: dict[str, object] = {}
    depths, widths = [3, 6, 12, 24], [1, 10, 100]
    ids = torch.arange(16)[None]
    deep = {f"GPT-2, {n} layers": _traced(_gpt2(n), ids) for n in depths}
    wide = {f"MLP, width {8 * n}": _traced(_mlp(8 * n), torch.randn(2, 8)) for n in widths}
    rows = []
    for title, group, sizes in (("depth", deep, depths), ("width", wide, widths)):
        timings = interleaved(group, rounds)
        seconds = [t.median for t in timings.values()]
        first = seconds[0]
        rows += [
            [name, ms(t.median), ms(min(t.samples)), f"{t.median / first:.2f}"]
            for name, t in timings.items()
        ]
        slope = exponent(sizes, [min(t.samples) for t in timings.values()])
        rows.append([f"exponent over {title}", f"{slope:.2f}", "", ""])
        out[title] = {"sizes": sizes, "median_s": seconds, "exponent": slope}
    print("\n## Growth (exponent 1 is linear, 0 is flat; fitted to the minima)\n")
    table(["traced", "median ms", "min ms", "× of the first"], rows)
    return out


def _traced(module: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    return lambda: wspace.trace(module, x)


def _gpt2(layers: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        return GPT2LMHeadModel(GPT2Config(n_layer=layers, use_cache=False)).eval()


def _mlp(width: int) -> nn.Module:
    sizes = [8, *[width] * 8, 8]
    layers = [
        f for a, b in zip(sizes, sizes[1:], strict=False) for f in (nn.Linear(a, b), nn.ReLU())
    ]
    return nn.Sequential(*layers[:-1]).eval()


def main() -> None:
    options = start(__doc__, rounds=7)
    rounds = options.rounds
    figures = {
        "resnet50_224": compare("ResNet-50", models.resnet50, 224, rounds),
        "resnet50_32": compare("ResNet-50", models.resnet50, 32, rounds),
        "resnet18_224": compare("ResNet-18", models.resnet18, 224, rounds),
        "stages": stages(rounds),
        "growth": growth(max(3, rounds // 2)),
    }
    finish(options, figures)


if __name__ == "__main__":
    main()
