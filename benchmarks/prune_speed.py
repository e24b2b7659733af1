"""Seconds and memory to prune by magnitude, beside torch-pruning; growth.

Half of the units of every group go (``scope="group"``), by the L2 norm of everything coupled to
them. Both libraries start from the same module; torch-pruning prunes in place (its copies are made
outside the clock), wspace returns a new module, and compares it with the masked one on the example
input unless told not to; "of a copy" is torch-pruning when the network is to stay, too. GPT-2s are
made anew from a smaller config, where only what the config can say is pruned, or copied. "Known" is
with the axes known already: wspace has a `WeightSpace`, torch-pruning a pruner with its graph.

Seconds are taken in turns in one process. Memory is the peak of resident memory over what the
process had when it had the module (and the axes, where they are known), in a process for each.
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import models
import torch
from align_speed import resident
from harness import clock, exponent, machine, ms, peer, table
from torch import Tensor, nn

import wspace
from wspace.prune import Pruner, Selection
from wspace.prune.pruner import Rebuild

HALF = Selection(amount=0.5, scope="group")
NETWORKS = {
    "resnet50-224": "ResNet-50, 224 x 224",
    "resnet50-32": "ResNet-50, 32 x 32",
    "gpt2-12-768": "GPT-2 124M",
}
GROWTH = {
    "ResNets, 64 x 64": ("resnet18-64", "resnet50-64", "resnet152-64"),
    "GPT-2s": ("gpt2-4-256", "gpt2-6-512", "gpt2-12-768"),
}
RESNETS = {
    "resnet18": models.resnet18,
    "resnet50": models.resnet50,
    "resnet152": lambda: models.ResNet(models.Bottleneck, (3, 8, 36, 3)).eval(),
}


def made(name: str) -> tuple[nn.Module, Tensor]:
    """A module with random weights, and an input."""
    torch.manual_seed(0)
    kind, *sizes = name.split("-")
    if kind in RESNETS:
        return RESNETS[kind](), torch.randn(1, 3, int(sizes[0]), int(sizes[0]))
    from transformers import GPT2Config, GPT2LMHeadModel

    layers, width = map(int, sizes)
    config = GPT2Config(n_layer=layers, n_embd=width, n_head=width // 64, use_cache=False)
    return GPT2LMHeadModel(config).eval(), torch.arange(16)[None]


class Tiny(nn.Module):
    """Loads what the libraries load when they are first used."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.bn(self.conv(x)).relu().mean((2, 3)))


# -------------------------------------------------------------------- candidates


class Candidate(NamedTuple):
    """A way to prune.

    Attributes:
        prepare: Outside the clock; (module, input) → what `run` takes.
        run: Gives the pruned module.
        changes: Whether the module is changed, so that it needs a copy first.
    """

    prepare: Callable[[nn.Module, Tensor], Any]
    run: Callable[[Any], nn.Module]
    changes: bool = False


def ours(check: bool = True, rebuild: Rebuild = "auto") -> Candidate:
    def run(given: tuple[nn.Module, wspace.WeightSpace]) -> nn.Module:
        pruner = Pruner(*given, rebuild=rebuild)
        return pruner.prune(pruner.choose("magnitude", HALF), check=check)

    return Candidate(lambda module, x: (module, wspace.trace(module, (x,))), run)


def ours_again() -> Candidate:
    """With a pruner that has pruned before."""

    def prepare(module: nn.Module, x: Tensor) -> Pruner:
        pruner = Pruner(module, wspace.trace(module, (x,)))
        pruner.prune(pruner.choose("magnitude", HALF))
        return pruner

    return Candidate(prepare, lambda p: p.prune(p.choose("magnitude", HALF)))


def ours_whole() -> Candidate:
    def run(given: tuple[nn.Module, Tensor]) -> nn.Module:
        module, x = given
        return ours().run((module, wspace.trace(module, (x,))))

    return Candidate(lambda *given: given, run)


def their_pruner(module: nn.Module, x: Tensor) -> Any:
    pruning = peer("torch_pruning")
    if pruning is None:
        raise ImportError("torch_pruning")
    last = module.fc if hasattr(module, "fc") else module.lm_head
    return pruning.pruner.BasePruner(
        module,
        x,
        importance=pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=[last],
        in_channel_groups={},
        out_channel_groups={},
    )


def their_step(pruner: Any) -> nn.Module:
    pruner.step()
    return pruner.model


CANDIDATES: dict[str, Candidate] = {
    "wspace, known": ours(),
    "wspace, known, not compared": ours(check=False),
    "wspace, known, second time": ours_again(),
    "wspace, known, a copy": ours(rebuild="copy"),
    "torch-pruning, known": Candidate(their_pruner, their_step, True),
    "wspace": ours_whole(),
    "torch-pruning": Candidate(
        lambda *given: given, lambda given: their_step(their_pruner(*given)), True
    ),
    "torch-pruning, of a copy": Candidate(
        lambda *given: given, lambda given: their_step(their_pruner(*copy.deepcopy(given)))
    ),
}
PEER = {"wspace": "torch-pruning"} | {
    n: "torch-pruning, known" for n in CANDIDATES if n.startswith("wspace, ")
}
"""What each of ours is compared with."""


def prepared(c: Candidate, module: nn.Module, x: Tensor) -> Any:
    return c.prepare(copy.deepcopy(module) if c.changes else module, x)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# -------------------------------------------------------------------------- time


def timings(name: str, names: list[str], rounds: int) -> tuple[dict[str, list[float]], set[int]]:
    """Seconds of each candidate round by round (the first is not counted), and sizes."""
    module, x = made(name)
    seconds: dict[str, list[float]] = {n: [] for n in names}
    sizes: set[int] = set()
    for i in range(rounds + 1):
        for n in names:
            c = CANDIDATES[n]
            given = prepared(c, module, x)
            start = clock()
            small = c.run(given)
            spent = clock() - start
            sizes.add(count(small))
            if i:
                seconds[n].append(spent)
            del given, small
    return seconds, sizes


def alone(name: str, candidate: str) -> dict[str, float]:
    """Peak memory of one candidate in this process, in MiB, the second time too."""
    c = CANDIDATES[candidate]
    c.run(prepared(c, Tiny(), torch.randn(1, 3, 8, 8)))  # imports on first use
    module, x = made(name)
    with torch.no_grad():
        module(x)  # buffers of the libraries
    own = resident("VmRSS")
    given = prepared(c, module, x)
    if c.changes:
        del module
    before = resident("VmRSS", forget=True)
    start = clock()
    small = c.run(given)
    spent = clock() - start
    peak = resident("VmHWM")
    return {
        "seconds": spent, "above": peak - before, "peak": peak, "own": own,
        "parameters": count(small), "small_mib": sum(p.nbytes for p in small.parameters()) / 2**20,
    }  # fmt: skip


def child(name: str, candidate: str) -> dict[str, float]:
    command = [sys.executable, "-W", "ignore", *LAUNCH, "--alone", name, candidate]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


LAUNCH = [__file__]


def compare(name: str, rounds: int) -> dict[str, Any]:
    """One network: seconds and memory of all candidates."""
    names = [n for n in CANDIDATES if works(n, name)]
    seconds, sizes = timings(name, names, rounds)
    out: dict[str, Any] = {"parameters left": sorted(sizes)}
    rows = []
    for n in names:
        memory = child(name, n)
        median, other = statistics.median(seconds[n]), PEER.get(n, "")
        out[n] = {"median_s": median, "min_s": min(seconds[n]), **memory}
        ratio = ""
        if other in names:
            pairs = zip(seconds[n], seconds[other], strict=True)
            ratio = f"{statistics.median(a / b for a, b in pairs):.2f}"
        rows.append([n, ms(median), ms(min(seconds[n])), ratio, f"{memory['above']:.0f}"])
    print(f"\n## {NETWORKS[name]}: {rounds} rounds in turn\n")
    table(["what", "median ms", "min ms", "× torch-pruning", "MiB above the module"], rows)
    print(f"\nParameters: {count(made(name)[0]):,}, left: {', '.join(f'{s:,}' for s in sizes)}.")
    return out


def works(candidate: str, name: str) -> bool:
    """Whether a candidate is for a network.

    torch-pruning finds no group in a GPT-2 of transformers, whose layers it does not know. A copy
    is what wspace makes of networks that have no config anyway.
    """
    if candidate.endswith("a copy") and candidate.startswith("wspace"):
        return name.startswith("gpt2")
    return not (candidate.startswith("torch-pruning") and name.startswith("gpt2"))


def growth(rounds: int) -> dict[str, Any]:
    out: dict[str, Any] = {}
    rows = []
    for title, sizes in GROWTH.items():
        names = [n for n in ("wspace, known", "torch-pruning, known") if works(n, sizes[0])]
        found = {size: timings(size, names, rounds)[0] for size in sizes}
        counts = [count(made(size)[0]) for size in sizes]
        for n in names:
            memory = [child(size, n)["above"] for size in sizes]
            seconds = [min(found[size][n]) for size in sizes]
            out[f"{title}, {n}"] = {"parameters": counts, "seconds": seconds, "mib": memory}
            rows += [
                [size, n, f"{k / 1e6:.1f}", ms(s), f"{m:.0f}"]
                for size, k, s, m in zip(sizes, counts, seconds, memory, strict=True)
            ]
            slopes = [f"{exponent(counts, y):.2f}" for y in (seconds, memory)]
            rows.append([f"exponent of {title}", n, "", *slopes])
    print("\n## Growth (axes known; the fastest round)\n")
    table(["network", "what", "10⁶ parameters", "ms", "MiB above the module"], rows)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", choices=[*NETWORKS, "growth"])
    parser.add_argument("--alone", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if options.alone:
        print(json.dumps(alone(*options.alone)))
        return
    print(f"# {(__doc__ or '').splitlines()[0]}\n\n{machine()}", flush=True)
    if peer("torch_pruning") is None:
        for n in [n for n in CANDIDATES if n.startswith("torch-pruning")]:
            del CANDIDATES[n]
    chosen = options.only or [*NETWORKS, "growth"]
    figures = {n: compare(n, options.rounds) for n in NETWORKS if n in chosen}
    if "growth" in chosen:
        figures["growth"] = growth(max(2, options.rounds // 2))
    if options.json:
        text = json.dumps({"machine": machine(), **figures}, indent=1, allow_nan=False)
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
