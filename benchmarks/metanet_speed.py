"""One training step of graph metanetworks on a batch of MNIST INRs, beside the published ones.

128 networks SIREN 2-32-32-1 (1,185 parameters each), ten classes, cross-entropy, forward and
backward pass without the optimizer's step, and the forward pass alone (``eval``, ``no_grad``).
Every candidate runs in a process of its own, so that its peak memory is its own, under the default
allocator and under glibc told to keep its buffers. For ours, making the graph is part of the time.
With as many threads as cores, one busy process beside slows a step by up to 25 times (threads wait
for each other at every operation): calls wait for a quiet machine, and disturbed ones are dropped.

The peers' code is not part of this repository. ``--peers DIR`` (or WSPACE_PEERS) names a folder
with checkouts of ``neural-graphs``, ``scalegmn`` and ``DWSNets``; see `peers`.

"of the machine" is (multiplications and additions of matrix products in a step, counted by torch,
recomputation included) / (rate of a float32 product of 2048 × 2048 matrices in the same process),
over the time of the step; what is not a matrix product counts as no operation.

``--large`` instead runs a `GraphMetanet` (4 layers, 64 channels) on GPT-2s of 1 M, 10 M and 124 M
parameters, forward only.
"""

import argparse
import gc
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import peers
import torch
from harness import exponent, finish, machine, ms, peak_mib, table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

Run = Callable[[], Tensor]

KEPT = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "20000000000",
    "MALLOC_TOP_PAD_": "268435456",
}
ALLOCATORS: dict[str, dict[str, str]] = {"default": {}, "kept": KEPT}
METANETS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gmn": ("gmn", "GraphMetanet", {"channels": 64}),
    "ng_gnn": ("neural_graph", "NeuralGraphGNN", {"channels": 32}),
    "ng_t": ("neural_graph", "NeuralGraphTransformer", {"channels": 64, "heads": 8}),
    "scale_gmn": ("scale_gmn", "ScaleGMN", {"channels": 128, "bidirectional": False}),
    "scale_gmn_bi": ("scale_gmn", "ScaleGMN", {"channels": 128, "bidirectional": True}),
    "dws": ("dws", "DWSNet", {"hidden": 32, "layers": 5}),
}
"""Module, class and options of ours: width, layers (4 if not said) and heads of the peer.

Graph metanets have dropout 0.2, as their peers' configurations do; `DWSNet` has none, as its peer.
"""
NOISE = 0.08
"""Cores' worth of other processes' work up to which a call counts as undisturbed."""
WIDTHS = {"1M": 72, "10M": 216, "124M": 768}
"""Width of a GPT-2 of so many parameters; vocabulary and positions shrink as the width does."""


# -------------------------------------------------------------------- the children


class Siren(nn.Sequential):
    """sin(30 (W x + b)), twice, and a linear layer."""

    def __init__(self) -> None:
        sizes = peers.LAYOUT
        super().__init__(*(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False)))

    def forward(self, x: Tensor) -> Tensor:
        """The value at points ``(n, 2)``."""
        *hidden, last = self
        for layer in hidden:
            x = torch.sin(30 * layer(x))
        return last(x)


def states(batch: int) -> dict[str, Tensor]:
    """So many states, drawn as SIRENs are initialised."""
    torch.manual_seed(0)
    out = {}
    for name, p in Siren().named_parameters():
        bound = (6 / 32) ** 0.5 / 30 if p.dim() == 2 and name[0] != "0" else 0.5
        out[name] = torch.empty(batch, *p.shape).uniform_(-bound, bound)
    return out


def ours(key: str, state: dict[str, Tensor]) -> tuple[nn.Module, Run]:
    """Our module, and a call that makes the graph and runs it."""
    import wspace

    module, name, options = METANETS[key]
    make = getattr(importlib.import_module(f"wspace.nn.{module}"), name)
    space = wspace.trace(Siren(), torch.zeros(1, 2))
    if key == "dws":
        model = make(space, out=10, **options)
        return model, lambda: model(state)
    model = make(out=10, layers=4, dropout=0.2, **options)
    return model, lambda: model(wspace.encode(space, state))


def resident() -> float:
    """MiB of resident memory now; 0 where the system does not say."""
    statm = Path("/proc/self/statm")
    pages = int(statm.read_text().split()[1]) if statm.exists() else 0
    return pages * os.sysconf("SC_PAGESIZE") / 2**20


def busy() -> float:
    """Processor seconds that all cores have worked since the start of the machine."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _, _, irq, soft, steal = map(int, stat.read_text().split()[1:9])
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


def quiet(seconds: float) -> None:
    """Waits until other work takes less than `NOISE` of a core, at most so many seconds."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        before, start = busy(), time.perf_counter()
        time.sleep(0.5)
        if busy() - before < NOISE * (time.perf_counter() - start):
            return


def measured(run: Callable[[], object], rounds: int, budget: float, wait: float) -> dict[str, Any]:
    """First call apart, then up to `rounds` calls, none after so many seconds; at least one.

    Calls during which other processes were at work count only if all were such.
    """

    def once() -> tuple[float, float]:
        gc.collect()
        quiet(wait)
        work, own, start = busy(), time.process_time(), time.perf_counter()
        run()
        wall = time.perf_counter() - start
        return wall, max(0.0, busy() - work - (time.process_time() - own)) / wall

    (first, _), calls = once(), []
    begin = time.perf_counter()
    while not calls or (len(calls) < rounds and time.perf_counter() - begin < budget):
        calls.append(once())
    tick = 2 / os.sysconf("SC_CLK_TCK")  # a short call reads the machine's clock too coarsely
    clean = [t for t, other in calls if other * t < NOISE * t + tick]
    samples = clean or [t for t, _ in calls]
    return {
        "first_s": first,
        "samples_s": samples,
        "median_s": statistics.median(samples),
        "clean": len(clean),
        "other_cores": statistics.median(other for _, other in calls),
    }


def gemm_rate(size: int = 2048, rounds: int = 5) -> float:
    """Floating-point operations per second of a float32 matrix product, best of several."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def step(model: nn.Module, run: Run, labels: Tensor, context: Callable[[], Any]) -> None:
    """Forward and backward pass."""
    model.zero_grad(set_to_none=True)
    with context():
        loss = F.cross_entropy(run().float(), labels)
    loss.backward()


def forward(run: Run, context: Callable[[], Any]) -> None:
    with torch.no_grad(), context():
        run()


def small(task: dict[str, Any]) -> dict[str, Any]:
    """Time and memory of one candidate."""
    who, key = task["who"], task["key"]
    state = states(task["batch"])
    labels = torch.randint(10, (task["batch"],))
    if who == "peer":
        weights = [t.mT.unsqueeze(-1) for n, t in state.items() if n.endswith("weight")]
        biases = [t.unsqueeze(-1) for n, t in state.items() if n.endswith("bias")]
        model, run = peers.build(key, Path(task["peers"]), weights, biases)
    else:
        model, run = ours(key, state)
    half = partial(torch.autocast, "cpu", torch.bfloat16)
    context = half if who == "bf16" else nullcontext
    out: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad)
    }
    base = resident()
    fwd, train = partial(forward, run, context), partial(step, model, run, labels, context)
    for name, call in (("forward", fwd), ("step", train)):
        model.train(name == "step")
        out[name] = measured(call, task["rounds"], task["budget"], task["wait"])
        out[name]["peak_mib"] = peak_mib() - base
    quiet(task["wait"])
    out["gemm_per_s"] = gemm_rate()
    if who != "peer":
        for name, call in (("forward", fwd), ("step", train)):
            with FlopCounterMode(display=False) as counter:
                call()
            out[name]["operations"] = counter.get_total_flops()
        ideal = out["step"]["operations"] / out["gemm_per_s"]
        out["times_ideal"] = out["step"]["median_s"] / ideal
    return out


def large(task: dict[str, Any]) -> dict[str, Any]:
    """Time and memory of a forward pass on a GPT-2."""
    from transformers import GPT2Config, GPT2LMHeadModel

    import wspace
    from wspace.nn.gmn import GraphMetanet

    width = WIDTHS[task["key"]]
    shape = {"n_embd": width, "n_layer": 12, "n_head": 12, "n_positions": 1024 * width // 768}
    config = GPT2Config(vocab_size=50257 * width // 768, use_cache=False, **shape)
    with torch.no_grad():
        gpt2 = GPT2LMHeadModel(config).eval().requires_grad_(False)
    state = dict(gpt2.named_parameters(remove_duplicate=False))
    start = time.perf_counter()
    space = wspace.trace(gpt2, torch.arange(8)[None])
    out: dict[str, Any] = {"trace_s": time.perf_counter() - start}
    model = GraphMetanet(10, channels=64, layers=4).eval()
    unique = {id(t): t for t in state.values()}.values()
    out["parameters"] = sum(t.numel() for t in unique)
    out["weights_mib"] = sum(t.numel() * t.element_size() for t in unique) / 2**20
    gc.collect()
    quiet(task["wait"])
    out["before_mib"] = resident()
    work, own, start = busy(), time.process_time(), time.perf_counter()
    with torch.no_grad():
        answer = model(wspace.encode(space, state))
    out |= {"seconds": time.perf_counter() - start, "total_mib": peak_mib()}
    other = busy() - work - (time.process_time() - own)
    out["other_cores"] = max(0.0, other) / out["seconds"]
    out["above_mib"] = out["total_mib"] - out["before_mib"]
    out["finite"] = bool(answer.isfinite().all())
    out["gemm_per_s"] = gemm_rate()
    return out


# ---------------------------------------------------------------------- the parent


def child(task: dict[str, Any], allocator: str) -> dict[str, Any]:
    """Runs one task in a fresh process; what it prints last is the answer."""
    command = [sys.executable, __file__, "--child", json.dumps(task)]
    environment = os.environ | ALLOCATORS[allocator]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        why = lines[-1] if lines else f"killed by signal {-done.returncode}"
        return {"error": why[:200]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def name_of(key: str, who: str) -> str:
    _, name, options = METANETS[key]
    more = " bidirectional" if options.get("bidirectional") else ""
    if who == "peer":
        folder, _, config = peers.PEERS[key]
        return f"peer: {folder} {config}"
    return name + more + (", bfloat16" if who == "bf16" else "")


def row(name: str, found: dict[str, Any]) -> list[object]:
    """One line of the table."""
    if "error" in found:
        return [name, found["error"], *[""] * 9]
    fwd, train = found["forward"], found["step"]
    times = [
        f"{ms(x['median_s'])} ({ms(min(x['samples_s']))}–{ms(max(x['samples_s']))})"
        + ("" if x["clean"] else " DISTURBED")
        for x in (fwd, train)
    ]
    memory = [f"{x['peak_mib']:.0f}" for x in (fwd, train)]
    counted = ["", "", ""]
    if "times_ideal" in found:
        counted = [
            f"{train['operations'] / 1e9:.1f}",
            f"{found['times_ideal']:.1f}",
            f"{1 / found['times_ideal']:.0%}",
        ]
    rate, others = f"{found['gemm_per_s'] / 1e9:.0f}", f"{train['other_cores']:.2f}"
    return [name, f"{found['parameters']:,}", *times, *memory, *counted, rate, others]


def ratios(key: str, found: dict[str, dict[str, Any]]) -> list[object] | None:
    """The peer over ours: forward, step and memory."""
    mine, theirs = found.get("ours"), found.get("peer")
    if not mine or not theirs or "error" in mine or "error" in theirs:
        return None
    out: list[object] = [name_of(key, "ours"), name_of(key, "peer").removeprefix("peer: ")]
    for phase in ("forward", "step"):
        one, other = mine[phase], theirs[phase]
        clean = one["clean"] and other["clean"]
        out.append(f"{other['median_s'] / one['median_s']:.1f}" if clean else "disturbed")
        out.append(f"{other['peak_mib'] / one['peak_mib']:.1f}")
    return out


HEAD = (
    "candidate, parameters, forward ms, step ms, forward MiB, step MiB, Gops a step, × ideal, "
    "of the machine, GEMM Gop/s, other work (cores)"
).split(", ")
LARGE = (
    "model, parameters, trace s, forward s, weights MiB, above MiB, total MiB, other work (cores)"
).split(", ")
RATIO = "ours, peer, forward ×, forward memory ×, step ×, step memory ×".split(", ")


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Every candidate, ours and the peer's one after the other, under each allocator."""
    for key in options.only:
        if (
            key in peers.PEERS
            and "peer" in options.who
            and (why := peers.absent(key, options.peers))
        ):
            print(f"\n{name_of(key, 'peer')}: {why}", flush=True)
    figures: dict[str, Any] = {}
    for allocator in options.allocators:
        print(f"\n## {allocator} allocator, batch {options.batch}\n", flush=True)
        rows, compared = [], []
        kept = figures.setdefault(allocator, {})
        for key in options.only:
            found = kept[key] = {}
            for who in options.who:
                no_peer = key not in peers.PEERS or bool(peers.absent(key, options.peers))
                if who == "peer" and no_peer:
                    continue
                task = {"key": key, "who": who, "peers": str(options.peers)}
                names = ("rounds", "budget", "wait", "threads", "batch")
                task |= {n: getattr(options, n) for n in names}
                found[who] = child(task, allocator)
                rows.append(row(name_of(key, who), found[who]))
                print(f"{rows[-1][0]}: {rows[-1][3] or rows[-1][1]}", file=sys.stderr, flush=True)
            if line := ratios(key, found):
                compared.append(line)
        table(HEAD, rows)
        if compared:
            print("\nThe peer's figures in units of ours:\n")
            table(RATIO, compared)
    return {"small": figures}


def growth(options: argparse.Namespace) -> dict[str, Any]:
    """The forward pass on GPT-2s, and how it grows with their parameters."""
    figures: dict[str, Any] = {}
    for allocator in options.allocators:
        found = figures.setdefault(allocator, {})
        rows = []
        for size in options.large:
            got = found[size] = child(
                {"key": size, "threads": options.threads, "wait": options.wait}, allocator
            )
            if "error" in got:
                rows.append([size, got["error"], *[""] * 6])
                continue
            memory = [f"{got[n]:.0f}" for n in ("weights_mib", "above_mib", "total_mib")]
            seconds = [f"{got[n]:.2f}" for n in ("trace_s", "seconds")]
            rows.append(
                [size, f"{got['parameters']:,}", *seconds, *memory, f"{got['other_cores']:.2f}"]
            )
        print(f"\n## GraphMetanet on GPT-2, forward, {allocator} allocator\n")
        table(LARGE, rows)
        whole = [x for x in found.values() if "error" not in x]
        if len(whole) > 1:
            sizes = [x["parameters"] for x in whole]
            slopes = {n: exponent(sizes, [x[n] for x in whole]) for n in ("seconds", "above_mib")}
            found["exponents"] = slopes
            print(f"\ngrowth with parameters: seconds n^{slopes['seconds']:.2f}, "
                  f"memory above the weights n^{slopes['above_mib']:.2f}")  # fmt: skip
    return {"large": figures}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    where = os.environ.get("WSPACE_PEERS")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--peers", type=Path, default=where and Path(where), help="checkouts")
    parser.add_argument("--only", nargs="*", choices=METANETS, default=list(METANETS))
    every = ("ours", "bf16", "peer")
    parser.add_argument("--who", nargs="*", choices=every, default=every, help="which candidates")
    parser.add_argument("--allocators", nargs="*", choices=ALLOCATORS, default=list(ALLOCATORS))
    parser.add_argument("--large", nargs="*", choices=WIDTHS, help="GPT-2s instead (all sizes)")
    parser.add_argument("--rounds", type=int, default=5, help="timed calls at most (%(default)s)")
    parser.add_argument("--budget", type=float, default=30, help="seconds of them (%(default)s)")
    parser.add_argument("--wait", type=float, default=60, help="for a quiet machine (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (%(default)s)")
    parser.add_argument("--batch", type=int, default=128, help="networks (%(default)s)")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parsed()
    warnings.simplefilter("ignore")
    if options.child:
        torch.set_num_threads(options.child["threads"])
        found = small(options.child) if "who" in options.child else large(options.child)
        print(json.dumps(found))
        return
    torch.set_num_threads(options.threads)
    print(f"# {(__doc__ or '').splitlines()[0]}\n\n{machine()}", flush=True)
    if options.large is not None:
        options.large = options.large or list(WIDTHS)
        finish(options, growth(options))
    else:
        finish(options, compare(options))


if __name__ == "__main__":
    main()
