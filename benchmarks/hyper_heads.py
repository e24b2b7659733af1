"""Heads of hypernetworks: weights per sample, memory of chunks, what a head costs, activations.

``--only`` chooses parts: samples, memory, cost, activations.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import harness
import torch
from torch import Tensor, nn

from wspace.hyper import (
    ChunkedHead,
    ComponentHead,
    FiLMHead,
    FullHead,
    Head,
    HyperNetwork,
    LowRankHead,
    MaskHead,
    PerTensorHead,
    RecurrentHead,
    TaskEmbedding,
    TiledHead,
    activation_variance,
)
from wspace.hyper.initialize import Scheme

BATCH = 64
HEADS: dict[str, Callable[[], Head]] = {
    "FullHead()": FullHead,
    "FullHead([])": partial(FullHead, []),
    "FullHead(steady=True)": partial(FullHead, steady=True),
    "PerTensorHead()": PerTensorHead,
    "PerTensorHead(own=[50])": partial(PerTensorHead, own=[50]),
    "PerTensorHead(own=[50], steady=True)": partial(PerTensorHead, own=[50], steady=True),
    "ChunkedHead(1000)": partial(ChunkedHead, 1000),
    "ChunkedHead(20)": partial(ChunkedHead, 20),
    "RecurrentHead(1000)": partial(RecurrentHead, 1000),
    "ComponentHead()": ComponentHead,
    'ComponentHead(by="role")': partial(ComponentHead, by="role"),
    'ComponentHead([200], embedding=64, by="row")': partial(
        ComponentHead, [200], embedding=64, by="row"
    ),
    "LowRankHead(16)": partial(LowRankHead, 16),
    "LowRankHead(16, steady=True)": partial(LowRankHead, 16, steady=True),
    "FiLMHead()": FiLMHead,
    "MaskHead()": MaskHead,
    "MaskHead(hard=True)": partial(MaskHead, hard=True),
    "TiledHead()": TiledHead,
}
SCHEMES: tuple[Scheme, ...] = (
    "hyperfan_in",
    "hyperfan_out",
    "hyperfan_harmonic",
    "residual",
    "bias",
)


# ----------------------------------------------------------------- weights per sample


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(),
                         nn.Linear(64, 10))  # fmt: skip


def cnn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                         nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(16, 10))  # fmt: skip


def samples(rounds: int) -> list[dict[str, Any]]:
    """A network for every sample of a batch, forward and backward: at once, or in a loop."""
    found: list[dict[str, Any]] = []
    cases = {"MLP 64-64-64-10": (mlp(), torch.randn(BATCH, 64)),
             "CNN 8-16, 8 × 8 pixels": (cnn(), torch.randn(BATCH, 1, 8, 8))}  # fmt: skip
    for name, (net, x) in cases.items():
        hyper = HyperNetwork(net, TaskEmbedding(BATCH, 16), ChunkedHead(1000, [64]))
        cond = torch.arange(BATCH)
        made = {n: v.detach().requires_grad_() for n, v in hyper.generate(cond).items()}

        def target(
            method: Any, hyper: HyperNetwork = hyper, made: Any = made, x: Tensor = x
        ) -> None:
            hyper.run_with(made, x, inputs="samples", method=method).square().sum().backward()

        def whole(
            method: Any, hyper: HyperNetwork = hyper, cond: Tensor = cond, x: Tensor = x
        ) -> None:
            hyper.run(cond, x, inputs="samples", method=method).square().sum().backward()

        def alone(hyper: HyperNetwork = hyper, cond: Tensor = cond, x: Tensor = x) -> None:
            """What is written where a library has no weights for each sample."""
            found = [hyper.run(c, y[None]) for c, y in zip(cond, x, strict=True)]
            torch.cat(found).square().sum().backward()

        runs = {f"{part} {method}": partial(run, method)
                for part, run in (("target", target), ("whole", whole))
                for method in ("vmap", "loop")}  # fmt: skip
        timings = harness.interleaved({**runs, "sample by sample loop": alone}, rounds)
        timings["sample by sample vmap"] = timings["whole vmap"]
        for part in ("target", "whole", "sample by sample"):
            fast, slow = timings[f"{part} vmap"], timings[f"{part} loop"]
            found.append({"network": name, "part": part, "vmap_s": fast.median,
                          "loop_s": slow.median, "ratio": slow.ratio(fast)})  # fmt: skip
    harness.table(
        ["network", "measured", "vmap, ms", "loop, ms", "loop / vmap"],
        [(f["network"], f["part"], harness.ms(f["vmap_s"]), harness.ms(f["loop_s"]),
          f"{f['ratio']:.1f}") for f in found],
    )  # fmt: skip
    return found


# --------------------------------------------------------------------------- memory

PROGRAM = """
import json, sys
from pathlib import Path
import torch
from torch import nn
from wspace.hyper import *

def mib(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith(key)).split()[1]) / 1024

def step(hyper):
    made = hyper.generate(1)
    sum(x.square().sum() for x in made.values()).backward()

torch.set_num_threads(1)
side, make = json.loads(sys.argv[1])
net = nn.Linear(side, side, bias=False)
small = HyperNetwork(nn.Linear(9, 9, bias=False), TaskEmbedding(4, 32), eval(make), init="default")
step(small)  # what the first pass of a process takes is not counted
hyper = HyperNetwork(net, TaskEmbedding(4, 32), eval(make), init="default")
parameters = sum(p.numel() for p in hyper.head.parameters())
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = mib("VmRSS:")
step(hyper)
print(json.dumps([parameters, mib("VmHWM:") - before]))
"""


def peak(side: int, make: str) -> tuple[int, float]:
    """Parameters of a head, and MiB that a training pass adds to the memory of a process.

    Tensors of 64 KiB and more are given back to the system at once, so that the peak is theirs.
    """
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([side, make])], cwd=harness.ROOT, check=True,
        capture_output=True, text=True, env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
    )  # fmt: skip
    parameters, mib = json.loads(run.stdout)
    return int(parameters), float(mib)


def memory() -> list[dict[str, Any]]:
    """Parameters and peak memory of a training pass: chunks, targets, and batches of chunks."""
    cases: list[tuple[int, str]] = []
    cases += [(1000, f"ChunkedHead({c}, [500])") for c in (4000, 8000, 16000, 32000)]
    cases += [(side, "ChunkedHead(4000, [500])") for side in (1000, 2000, 4000)]
    cases += [(2000, f"ChunkedHead(250, [1000]{o})") for o in ("", ", at_once=256")]
    cases += [(side, "FullHead([100])") for side in (250, 500, 1000)]
    found = []
    for side, make in dict.fromkeys(cases):
        parameters, mib = peak(side, make)
        own = side * side * 4 / 2**20
        rest = mib - parameters * 4 / 2**20 - own
        found.append({"target": side * side, "head": make, "parameters": parameters,
                      "mib": mib, "generated_mib": own, "rest_mib": rest})  # fmt: skip
    harness.table(
        ["generated", "head", "parameters", "added by a pass, MiB",
         "less gradients and generated weights, MiB"],
        [(f"{f['target']:,}", f["head"], f"{f['parameters']:,}", f"{f['mib']:.0f}",
          f"{f['rest_mib']:.0f}") for f in found],
    )  # fmt: skip
    return found


# ----------------------------------------------------------------------------- costs


def convolutions(width: int = 32, depth: int = 6) -> nn.Sequential:
    sizes = [3, *[width] * depth]
    layers: list[nn.Module] = []
    for n, m in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Conv2d(n, m, 3, padding=1, padding_mode="circular"), nn.ReLU()]
    return as_he(nn.Sequential(*layers))


def perceptron(width: int = 96, depth: int = 6) -> nn.Sequential:
    sizes = [30, *[width] * depth]
    layers: list[nn.Module] = []
    for n, m in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(n, m), nn.ReLU()]
    return as_he(nn.Sequential(*layers))


def as_he(net: nn.Sequential) -> nn.Sequential:
    for m in net:
        if isinstance(m, nn.Linear | nn.Conv2d):
            nn.init.kaiming_normal_(m.weight)
            nn.init.zeros_(m.bias)
    return net


def kernels(_: str, owner: nn.Module, p: Tensor) -> bool:
    return p.dim() == 4 and p.shape[1] > 3


def hypernetwork(name: str, net: nn.Module, scheme: Scheme) -> HyperNetwork:
    head = HEADS[name]()
    kept = head.needs_base or scheme in {"residual", "bias"}
    tiled = isinstance(head, TiledHead)
    condition = None if tiled else TaskEmbedding(8, 32)
    return HyperNetwork(net, condition, head, "frozen" if kept else None, init=scheme,
                        select=kernels if tiled else "*")  # fmt: skip


def cost(rounds: int) -> list[dict[str, Any]]:
    """Parameters, and time of one set of weights, forward and backward."""
    found: list[dict[str, Any]] = []
    runs: dict[str, Callable[[], object]] = {}
    for name in HEADS:
        hyper = hypernetwork(name, convolutions(), "residual")

        def run(hyper: HyperNetwork = hyper) -> None:
            made = hyper.generate(None if hyper.condition is None else 1)
            sum(x.square().sum() for x in made.values()).backward()  # pyright: ignore

        parameters = sum(p.numel() for p in hyper.head.parameters())
        found.append({"head": name, "generated": hyper.generated, "parameters": parameters})
        runs[name] = run
    for f, timing in zip(found, harness.interleaved(runs, rounds).values(), strict=True):
        f["seconds"] = timing.median
    harness.table(
        ["head", "generated", "parameters", "parameters / generated", "ms"],
        [(f["head"], f"{f['generated']:,}", f"{f['parameters']:,}",
          f"{f['parameters'] / f['generated']:.2f}", harness.ms(f["seconds"])) for f in found],
    )  # fmt: skip
    return found


# ----------------------------------------------------------------------- activations


def activations(seeds: int = 8) -> list[dict[str, Any]]:
    """Second moment behind six rectified layers, over that of the inputs."""
    found: list[dict[str, Any]] = []
    for kind, net, x in (("MLP", perceptron, torch.randn(32, 30)),
                         ("CNN", convolutions, torch.randn(4, 3, 6, 6))):  # fmt: skip
        for name in HEADS:
            if kind == "MLP" and name == "TiledHead()":
                continue
            row: dict[str, Any] = {"network": kind, "head": name}
            for scheme in SCHEMES:
                ends: list[Tensor] = []
                for seed in range(seeds):
                    torch.manual_seed(seed)
                    hyper = hypernetwork(name, net(), scheme)
                    cond = None if hyper.condition is None else torch.arange(8)
                    last = list(activation_variance(hyper, cond, x).values())[-1]
                    ends.append(last.reshape(-1) / x.square().mean())
                every = torch.cat(ends)
                row[scheme] = {
                    "mean": float(every.mean()),
                    "geometric": float(every.log().mean().exp()),
                }
            found.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
    harness.table(
        ["network", "head", *SCHEMES],
        [(f["network"], f["head"],
          *(f"{f[s]['mean']:.2f} ({f[s]['geometric']:.2f})" for s in SCHEMES)) for f in found],
    )  # fmt: skip
    return found


def main() -> None:
    options = harness.start(__doc__ or "", rounds=9, only=True)
    parts: dict[str, Callable[[], Any]] = {
        "samples": partial(samples, options.rounds),
        "memory": memory,
        "cost": partial(cost, options.rounds),
        "activations": activations,
    }
    figures: dict[str, Any] = {}
    for name, run in parts.items():
        if not options.only or name in options.only:
            print(f"\n## {name}\n", flush=True)
            figures[name] = run()
    harness.finish(options, figures)


if __name__ == "__main__":
    main()
