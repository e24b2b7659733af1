"""One jump of the nowcast predictors, beside the published code, on GPT-2s.

GPT-2s of three layers, 24 and 64 wide (1.25 M and 3.4 M parameters, vocabulary 50,257), five past
states that drift, horizon 10, the published weights, zero Laplacian codes on both sides, and
``topology="published"``, so both sides compute the same function: the distance of the predictions
over the length of the update is part of the table ("bf16" is ours in bfloat16). A call of ours
includes wiring the graph; the peer's graph is made beforehand, and shown apart. Every candidate
runs in a process of its own; extra memory is the peak of resident memory in the first call over
what held model and states before.

The peer's code is not part of this repository: ``--peers DIR`` (or WSPACE_PEERS) names a folder
with a checkout of ``nino`` (github.com/SamsungSAILMontreal/nino, MIT), and ``--weights DIR`` one
with its checkpoints. Without the checkout only ours runs. ``--large`` adds a GPT-2 of 124 M
parameters, ours only; ``--traced`` uses the true wiring instead, ours only.
"""

import argparse
import contextlib
import gc
import io
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import exponent, finish, machine, table
from peers import provide
from torch import Tensor, nn

CHECKPOINTS = {"graph": "nino_no_posw.pt", "mlp": "nino_mlp.pt"}
MODELS = {"24": (3, 24, 3), "64": (3, 64, 4), "192": (3, 192, 4), "768": (12, 768, 12)}
"""Layers, width and heads."""
HORIZON = 10
State = dict[str, Tensor]


# -------------------------------------------------------------------- the children


def model(width: str) -> nn.Module:
    """A GPT-2, the same in every process."""
    from transformers import GPT2Config, GPT2LMHeadModel

    layers, size, heads = MODELS[width]
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=layers, n_embd=size, n_head=heads)).eval()


def history(module: nn.Module) -> list[State]:
    """Five states along a line, with noise of a third of a step."""
    g = torch.Generator().manual_seed(0)
    states: list[State] = [{} for _ in range(5)]
    for name, p in module.named_parameters():
        drift = torch.randn(p.shape, generator=g) * 0.01
        for t, state in enumerate(states):
            noise = torch.randn(p.shape, generator=g)
            state[name] = noise.mul_(0.003).add_(drift, alpha=t).add_(p.detach())
    return states


def ours(task: dict[str, Any]) -> tuple[Callable[[], State], float]:
    """A call that jumps; seconds that preparing took."""
    from wspace.nowcast.published import load_published

    net = load_published(
        Path(task["weights"]) / CHECKPOINTS[task["form"]], precision=task["precision"]
    )
    module = model(task["width"])
    states = history(module)
    space, spent = None, 0.0
    if task["topology"] == "traced":
        import wspace

        start = time.perf_counter()
        space = wspace.trace(module, (), dict(module.dummy_inputs))
        spent = time.perf_counter() - start
    how = {"horizon": HORIZON, "topology": task["topology"], "space": space}
    return lambda: net.predict(module, states, **how), spent


def peer(task: dict[str, Any]) -> tuple[Callable[[], State], float]:
    """The published optimizer's own step on the fifth state; seconds that its graph took."""
    module = model(task["width"])  # before stand-ins are seen
    sys.path.insert(0, str(Path(task["peers"]) / "nino"))
    for name in ("torchvision", "torchvision.models", "torchvision.transforms", "psutil"):
        provide(name, VisionTransformer=type("VisionTransformer", (), {}), Process=_Process)
    sys.modules["torchvision"].models = sys.modules["torchvision.models"]
    sys.modules["torchvision"].transforms = sys.modules["torchvision.transforms"]
    with contextlib.redirect_stdout(io.StringIO()):
        from optim.nino import NiNo

        weights = str(Path(task["weights"]) / CHECKPOINTS[task["form"]])
        optimizer = NiNo(None, None, ckpt=weights, verbose=0)
        start = time.perf_counter()
        optimizer.set_model(module, lpe=0)
        spent = time.perf_counter() - start
    graph = optimizer.graph.pyg_graph
    graph.pos = torch.zeros(graph.num_nodes, 8)
    edges = {k: v.clone() for k, v in graph.to_dict().items() if isinstance(v, Tensor)}
    states = history(module)
    rows = [torch.cat([x.flatten() for x in state.values()]) for state in states]
    del states
    fresh = [x.clone() for x in rows]

    def run() -> State:
        for key, value in edges.items():
            optimizer.graph.pyg_graph[key] = value
        optimizer.states = fresh
        with contextlib.redirect_stdout(io.StringIO()):
            optimizer.step(k=HORIZON)
        return {n: p.detach() for n, p in module.named_parameters()}

    return run, spent


class _Process:
    """Stands in for psutil's, which the peer only reports memory with."""

    def __init__(self, *_: object) -> None: ...

    def memory_info(self) -> Any:
        return argparse.Namespace(rss=0)


def resident(key: str) -> float:
    """MiB of resident memory: now (``VmRSS``), or the peak (``VmHWM``)."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    return 0.0


def child(task: dict[str, Any]) -> None:
    """Runs one candidate, prints its figures, leaves its prediction."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(task["threads"])
    run, prepared = (peer if task["who"] == "peer" else ours)(task)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins here
    before = resident("VmRSS")
    wall, own, out = [], [], None
    for _ in range(task["rounds"]):
        out = None
        gc.collect()
        start, spent = time.perf_counter(), time.process_time()
        out = run()
        wall.append(time.perf_counter() - start)
        own.append(time.process_time() - spent)
        if len(wall) == 1:
            extra = resident("VmHWM") - before
    assert out is not None
    figures = {"wall_s": wall, "cpu_s": own, "extra_mib": extra, "prepared_s": prepared}
    figures["parameters"] = sum(x.numel() for x in out.values())
    if task["out"]:
        torch.save(out, task["out"])
    print("RESULT " + json.dumps(figures), flush=True)


# --------------------------------------------------------------------- the parent


def launch(task: dict[str, Any]) -> dict[str, Any] | None:
    """Figures of a candidate in a fresh process; None if it failed."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps(task)],
        capture_output=True, text=True, check=False, timeout=7200,
        env={**os.environ, "OMP_NUM_THREADS": str(task["threads"])},
    )  # fmt: skip
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    print(f"{task['who']} {task['form']} {task['width']}: failed\n{done.stderr[-2000:]}")
    return None


def difference(a: Path, b: Path, width: str) -> float:
    """Distance of two predictions over the length of the update."""
    last = history(model(width))[-1]
    one, two = torch.load(a, weights_only=True), torch.load(b, weights_only=True)
    apart = sum(float((one[k] - two[k]).double().square().sum()) for k in last)
    moved = sum(float((one[k] - last[k]).double().square().sum()) for k in last)
    return (apart / moved) ** 0.5


def compare(options: argparse.Namespace, form: str, width: str) -> dict[str, Any]:
    """Ours and the peer's, on one model."""
    who = ["ours", "bf16"]
    if options.peers and width in {"24", "64"} and not options.traced:
        who.append("peer")
    found: dict[str, Any] = {}
    files = {w: options.scratch / f"{form}-{width}-{w}.pt" for w in who}
    for w in who:
        task = {
            "who": w, "form": form, "width": width, "threads": options.threads,
            "peers": str(options.peers), "weights": str(options.weights),
            "precision": "bfloat16" if w == "bf16" else "float32",
            "topology": "traced" if options.traced else "published",
            "rounds": 1 if width == "768" else options.rounds,
            "out": "" if width == "768" else str(files[w]),
        }  # fmt: skip
        figures = launch(task)
        if figures is not None:
            found[w] = figures
    for w in who[1:]:
        if w in found and "ours" in found and files[w].exists():
            found[w]["difference"] = difference(files["ours"], files[w], width)
    for file in files.values():
        file.unlink(missing_ok=True)
    return found


def report(rows: dict[str, dict[str, Any]], threads: int) -> None:
    """The table: seconds are the processor's with one thread, of the wall with several."""
    key = "cpu_s" if threads == 1 else "wall_s"
    lines = []
    for name, found in rows.items():
        best = {w: statistics.median(f[key]) for w, f in found.items()}
        for w, f in found.items():
            ratio = f"{best['peer'] / best[w]:.1f}" if "peer" in best else ""
            less = f"{found['peer']['extra_mib'] / f['extra_mib']:.0f}" if "peer" in found else ""
            differs = f"{f['difference']:.1e}" if "difference" in f else ""
            each = 1e6 * best[w] / f["parameters"]
            lines.append([
                name, w, f["parameters"], f"{best[w]:.2f}", f"{each:.2f}",
                f"{f['extra_mib']:.0f}", ratio, less, differs, f"{f['prepared_s']:.1f}",
            ])  # fmt: skip
    head = ["model", "who", "parameters", "s", "µs/parameter", "extra MiB"]
    table([*head, "× faster", "× less", "difference", "prepared s"], lines)


def main() -> None:
    """Everything, in turn."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--peers", type=Path, default=os.environ.get("WSPACE_PEERS"))
    parser.add_argument("--weights", type=Path, default=Path("../shared/data/nino"))
    parser.add_argument("--scratch", type=Path, default=Path("/tmp"))
    parser.add_argument("--forms", nargs="*", default=list(CHECKPOINTS))
    parser.add_argument("--widths", nargs="*", default=["24", "64", "192"])
    parser.add_argument("--large", action="store_true", help="a GPT-2 of 124 M parameters as well")
    parser.add_argument("--traced", action="store_true", help="the true wiring, ours only")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.child:
        child(json.loads(options.child))
        return
    torch.set_num_threads(options.threads)
    print(f"# {(__doc__ or '').splitlines()[0]}\n\n{machine()}\n", flush=True)
    widths = [*options.widths, *(["768"] if options.large else [])]
    rows = {
        f"{form} {width}": found
        for form in options.forms
        for width in widths
        if (found := compare(options, form, width))
    }
    report(rows, options.threads)
    key = "cpu_s" if options.threads == 1 else "wall_s"
    for form in options.forms:
        some = [f["ours"] for n, f in rows.items() if n.startswith(form) and "ours" in f]
        if len(some) > 2:
            sizes = [f["parameters"] for f in some]
            slope = exponent(sizes, [statistics.median(f[key]) for f in some])
            print(f"\n{form}: seconds grow as parameters to the power {slope:.2f}")
    finish(options, {"rows": rows})


if __name__ == "__main__":
    main()
