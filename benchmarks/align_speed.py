"""Seconds to match two networks, beside rebasin and a port of Git Re-Basin; growth, and memory.

The pairs are independent random initialisations, another pair in every round. Each candidate looks
for its axes (wspace traces, rebasin traces both models, the port has a specification written by
hand), which is timed apart, then matches. All results are judged by one objective: the inner
product of A with B as moved, over all parameters, from `wspace.align.objective`.

rebasin is imported if it is installed, or from the folder ``rebasin`` of the checkouts; the port,
github.com/themrzmaster/git-re-basin-pytorch, from the folder of its name there (``--peers`` or
WSPACE_PEERS). It prints a line at every step, which goes to memory. Seconds are of the wall clock,
with two threads (``--threads``).
"""

import argparse
import contextlib
import copy
import gc
import importlib
import io
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from align_models import mlp
from harness import exponent, machine, peer, table
from models import resnet18
from torch import Tensor, nn

import wspace
from wspace.align import match, objective

State = dict[str, Tensor]
Find = Callable[[], State]
"""Matches, and gives B as moved."""
Candidate = Callable[[str, nn.Module, nn.Module, Tensor], Find]
"""Looks for the axes of a network of this name, given A, B and an input."""

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP 784-512-512-512-10": (lambda: mlp(512), (1, 784)),
    "ResNet-18": (resnet18, (1, 3, 224, 224)),
}
GROWTH: dict[str, tuple[str, ...]] = {
    "MLP of 3 hidden layers": ("mlp:256", "mlp:512", "mlp:1024", "mlp:2048"),
    "GPT-2": ("gpt2:4:256", "gpt2:6:512", "gpt2:12:768"),
}


# -------------------------------------------------------------------- candidates


def ours(start: str, name: str, a: nn.Module, b: nn.Module, x: Tensor) -> Find:
    space = wspace.trace(a, (x,))
    state_a, state_b = state_of(a), state_of(b)

    def find() -> State:
        return wspace.act(match(state_a, state_b, space, start=start), state_b, space)

    return find


def rebasin(name: str, a: nn.Module, b: nn.Module, x: Tensor) -> Find:
    moved = copy.deepcopy(b)
    descent = importlib.import_module("rebasin").PermutationCoordinateDescent(a, moved, x)

    def find() -> State:
        descent.rebasin()
        return state_of(moved)

    return find


def port(name: str, a: nn.Module, b: nn.Module, x: Tensor) -> Find:
    theirs = importlib.import_module("utils.weight_matching")
    axes = mlp_axes(a) if name.startswith("MLP") else resnet_axes(a)
    spec = theirs.permutation_spec_from_axes_to_perm(axes)
    state_a, state_b = ({k: s[k] for k in axes} for s in (state_of(a), state_of(b)))
    rest = {k: v for k, v in state_of(b).items() if k not in axes}

    def find() -> State:
        with contextlib.redirect_stdout(io.StringIO()):
            found = theirs.weight_matching(spec, state_a, state_b)
        return rest | theirs.apply_permutation(spec, found, state_b)

    return find


def state_of(module: nn.Module) -> State:
    return {k: x.detach() for k, x in module.state_dict().items()}


Axes = dict[str, tuple[str | None, ...]]


def mlp_axes(module: nn.Module) -> Axes:
    """The MLP in the port's grammar: for each tensor the permutation of each of its axes."""
    layers = [name for name, m in module.named_modules() if isinstance(m, nn.Linear)]
    between: list[str | None] = [None, *(f"P{i}" for i in range(len(layers) - 1)), None]
    out: Axes = {}
    for name, before, after in zip(layers, between, between[1:], strict=False):
        out |= {f"{name}.weight": (after, before), f"{name}.bias": (after,)}
    return out


def resnet_axes(module: nn.Module) -> Axes:
    """torchvision's ResNet-18 in the port's grammar; running statistics left out, as it does."""
    out: Axes = {}

    def conv_norm(conv: str, norm: str, after: str, before: str | None) -> None:
        out[f"{conv}.weight"] = (after, before, None, None)
        out[f"{norm}.weight"] = out[f"{norm}.bias"] = (after,)

    conv_norm("conv1", "bn1", "P0", None)
    before = "P0"
    for stage in range(1, 5):
        stream = "P0" if stage == 1 else f"P{stage}"
        for j, block in enumerate(module.get_submodule(f"layer{stage}")):  # type: ignore[arg-type]
            name, inner = f"layer{stage}.{j}", f"P{stage}.{j}"
            conv_norm(f"{name}.conv1", f"{name}.bn1", inner, before)
            conv_norm(f"{name}.conv2", f"{name}.bn2", stream, inner)
            if block.downsample is not None:
                conv_norm(f"{name}.downsample.0", f"{name}.downsample.1", stream, before)
            before = stream
    return out | {"fc.weight": (None, before), "fc.bias": (None,)}


def candidates(peers: Path | None) -> dict[str, Candidate]:
    """All that can run; a line for those that cannot."""
    found: dict[str, Candidate] = {
        "wspace": partial(ours, "forward"),
        "wspace, from the identity": partial(ours, "identity"),
    }
    if peers is not None:
        sys.path += [str(peers / "git-re-basin-pytorch"), str(peers / "rebasin")]
    if peer("rebasin"):
        found["rebasin"] = rebasin
    if peers is not None and (peers / "git-re-basin-pytorch").is_dir():
        found["git-re-basin-pytorch"] = port
    else:
        print("git-re-basin-pytorch: skipped, no folder of it (--peers or WSPACE_PEERS)")
    return found


# --------------------------------------------------------------------- comparison


@dataclass
class Row:
    """Figures of one candidate, round by round."""

    axes: list[float] = field(default_factory=list[float])
    seconds: list[float] = field(default_factory=list[float])
    objective: list[float] = field(default_factory=list[float])


def pair(make: Callable[[], nn.Module], seed: int) -> tuple[nn.Module, nn.Module]:
    """Two independent initialisations, in evaluation mode."""
    torch.manual_seed(seed)
    return make().eval(), make().eval()


def compare(name: str, found: dict[str, Candidate], rounds: int) -> dict[str, Row]:
    """Every candidate on the same pairs, in turn; the first round is not counted."""
    make, shape = NETWORKS[name]
    rows = {key: Row() for key in found}
    x = torch.randn(shape)
    for seed in range(-1, rounds):
        a, b = pair(make, 100 + seed)
        space = wspace.trace(a, (x,))
        for key, candidate in found.items():
            gc.collect()
            start = time.perf_counter()
            find = candidate(name, a, b, x)
            ready = time.perf_counter()
            moved = find()
            done = time.perf_counter()
            if seed >= 0:
                rows[key].axes.append(ready - start)
                rows[key].seconds.append(done - ready)
                rows[key].objective.append(float(objective(state_of(a), moved, space)))
    return rows


def show(name: str, rows: dict[str, Row], rounds: int) -> None:
    """One network's table."""
    print(f"\n## {name}, {rounds} pairs, each in turn\n")
    head = ["what", "axes ms", "matching s: median", "min", "× wspace", "objective, mean"]
    head += ["of wspace's: mean", "least", "most"]
    mine, lines = rows["wspace"], []
    for key, row in rows.items():
        pairs = [a / b for a, b in zip(row.seconds, mine.seconds, strict=True)]
        share = [a / b for a, b in zip(row.objective, mine.objective, strict=True)]
        lines.append(
            [key, f"{1e3 * statistics.median(row.axes):.3g}"]
            + [f"{statistics.median(row.seconds):.3f}", f"{min(row.seconds):.3f}"]
            + [f"{statistics.median(pairs):.2f}", f"{statistics.fmean(row.objective):.2f}"]
            + [f"{x:.4f}" for x in (statistics.fmean(share), min(share), max(share))]
        )
    table(head, lines)


# ------------------------------------------------------------------------- growth


def made(text: str) -> tuple[Callable[[], nn.Module], Tensor]:
    """A network by its text: ``mlp:width`` or ``gpt2:layers:width``; and an input."""
    kind, *sizes = text.split(":")
    if kind == "mlp":
        return lambda: mlp(int(sizes[0])), torch.zeros(1, 784)
    from transformers import GPT2Config, GPT2LMHeadModel

    layers, width = map(int, sizes)
    config = GPT2Config(n_layer=layers, n_embd=width, n_head=width // 64, use_cache=False)
    return lambda: GPT2LMHeadModel(config), torch.zeros(1, 8, dtype=torch.long)


def alone(text: str, threads: int) -> dict[str, float]:
    """Matches one pair in this process."""
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    make, x = made(text)
    a, b = pair(make, 0)
    start = time.perf_counter()
    space = wspace.trace(a, (x,))
    traced = time.perf_counter() - start
    before = resident("VmRSS", forget=True)
    start, processor = time.perf_counter(), time.process_time()
    found = match(state_of(a), state_of(b), space)
    return {
        "parameters": sum(p.numel() for p in a.parameters()),
        "groups": sum(not g.fixed for g in space.groups.values()),
        "trace": traced,
        "seconds": time.perf_counter() - start,
        "processor": time.process_time() - processor,
        "sweeps": found.sweeps,
        "above": resident("VmHWM") - before,
        "peak": resident("VmHWM"),
        "first": float(found.start_objective),
        "objective": float(found.objective),
    }


def resident(what: str, *, forget: bool = False) -> float:
    """Resident memory of this process in MiB, from Linux: ``VmRSS`` is now, ``VmHWM`` the peak.

    Not `resource.getrusage`, whose peak a child inherits from the process that started it.
    """
    if forget:  # the peak so far
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(x.split()[1]) / 2**10 for x in lines if x.startswith(f"{what}:"))


def growth(kinds: dict[str, tuple[str, ...]], threads: int) -> dict[str, Any]:
    """Every size in a fresh process, for its memory."""
    print("\n## Growth\n")
    out: dict[str, Any] = {}
    lines: list[list[str]] = []
    for title, texts in kinds.items():
        for text in texts:
            command = [sys.executable, __file__, "--alone", text, "--threads", str(threads)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            f = out[text] = json.loads(done.stdout.splitlines()[-1])
            numbers = [f"{f['parameters'] / 1e6:.2f}", f"{f['groups']}", f"{f['trace']:.3f}"]
            numbers += [f"{f['seconds']:.2f}", f"{f['processor']:.2f}"]
            numbers += [f"{f['sweeps']}", f"{f['above']:.0f}"]
            numbers += [f"{f['peak']:.0f}", f"{f['first']:.1f} → {f['objective']:.1f}"]
            lines.append([f"{title}, {text.partition(':')[2]}", *numbers])
        sizes = [out[t]["parameters"] for t in texts]
        slope = exponent(sizes, [out[t]["seconds"] for t in texts])
        lines.append([f"{title}: exponent", *[""] * 3, f"{slope:.2f}", *[""] * 5])
    head = ["network", "10⁶ parameters", "groups", "trace s", "matching s", "CPU s", "sweeps"]
    head += ["MiB above the models", "peak MiB", "objective"]
    table(head, lines)
    return out


def parsed() -> argparse.Namespace:
    default = os.environ.get("WSPACE_PEERS")
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--rounds", type=int, default=7, help="pairs (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (%(default)s)")
    parser.add_argument("--peers", type=Path, default=Path(default) if default else None)
    parser.add_argument("--only", nargs="*", default=["compare", "growth"])
    parser.add_argument("--networks", nargs="*", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--largest", type=int, help="only so many sizes of each kind")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parsed()
    if options.alone:
        print(json.dumps(alone(options.alone, options.threads)))
        return
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    print(f"# {(__doc__ or '').splitlines()[0]}\n\n{machine()}", flush=True)
    figures: dict[str, Any] = {"machine": machine()}
    if "compare" in options.only:
        found = candidates(options.peers)
        for name in options.networks:
            rows = compare(name, found, options.rounds)
            show(name, rows, options.rounds)
            figures[name] = {key: vars(row) for key, row in rows.items()}
    if "growth" in options.only:
        kinds = {k: v[: options.largest] for k, v in GROWTH.items()}
        figures["growth"] = growth(kinds, options.threads)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
