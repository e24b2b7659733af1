"""Training many small networks: side by side, beside loops that train one after the other.

Candidates for INRs (SIREN 2-32-32-1 on the 784 pixels of MNIST-sized images) and for classifiers
(the CNN of the Small CNN Zoo on batches of 64 images of 16 × 16 in colour): a plain loop
(`nn.Module`, `Adam`); a lean loop (functional forward, one flat optimizer state, nothing else);
`train_many` with `vmapped`; and for INRs `train_many` with the gradient by hand, as the recipe uses
it. First on one thread, in processor time; then on the whole machine, in wall time: loops with all
threads, `train_many` in one process per core, as `wspace zoo build --workers` runs it. Every
candidate takes the same steps, and keeps freed memory.
"""

import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import torch
from harness import finish, interleaved, start, table
from torch import Tensor, nn
from torch.nn import functional as F

from datasets_zoo.architectures import cnn
from datasets_zoo.inr import Siren, SirenGradient, grid, siren_init
from wspace.zoo import engine
from wspace.zoo.train import Training, cross_entropy, initial_states, train_many, vmapped

NETWORKS, STEPS, RATE = 32, 30, 1e-3
SIZES = (2, 32, 32, 1)


def pixels(count: int) -> Tensor:
    return torch.rand(count, 784, 1, generator=torch.Generator().manual_seed(0))


def batch(count: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(count, 64, 3, 16, 16, generator=g), torch.randint(
        10, (count, 64), generator=g
    )


def mean_square(out: Tensor, y: Tensor) -> Tensor:
    return (out - y).square().mean((1, 2))


def plain(make: Callable[[], nn.Module], x: Tensor, y: Tensor, loss: Callable[..., Tensor]) -> None:
    """What one writes first."""
    net = make()
    optimizer = torch.optim.Adam(net.parameters(), lr=RATE)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(net(x), y).backward()
        optimizer.step()


def lean(make: Callable[[], nn.Module], x: Tensor, y: Tensor, loss: Callable[..., Tensor]) -> None:
    """The same with as little around the arithmetic as PyTorch allows."""
    net = make()
    flat = nn.utils.parameters_to_vector(net.parameters()).detach().requires_grad_()
    at = 0
    for module in net.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            setattr(module, name, flat[at : at + p.numel()].view_as(p))
            at += p.numel()
    leaves = flat.detach()
    first, second, root = (torch.zeros_like(leaves) for _ in range(3))
    for step in range(1, STEPS + 1):
        (slope,) = torch.autograd.grad(loss(net(x), y), flat, retain_graph=True)
        first.lerp_(slope, 0.1)
        second.mul_(0.999).addcmul_(slope, slope, value=1e-3)
        torch.sqrt(second / (1 - 0.999**step), out=root).add_(1e-8)
        leaves.addcdiv_(first, root, value=-RATE / (1 - 0.9**step))


def inr_loops(which: Callable[..., None], count: int) -> None:
    x, y = grid(28, 28), pixels(count)
    for i in range(count):
        which(lambda: Siren(SIZES), x, y[i], F.mse_loss)


def cnn_loops(which: Callable[..., None], count: int) -> None:
    x, y = batch(count)
    for i in range(count):
        which(lambda: cnn(3), x[i], y[i], F.cross_entropy)


def inr_vmap(count: int) -> None:
    x, y = grid(28, 28), pixels(count)
    state = siren_init(count, SIZES, 30.0, torch.Generator().manual_seed(0))
    slope = vmapped(Siren(SIZES), lambda step, rows: (x, y[rows]), mean_square, shared=True)
    train_many(state, slope, Training(STEPS, RATE))


def inr_hand(count: int) -> None:
    state = siren_init(count, SIZES, 30.0, torch.Generator().manual_seed(0))
    slope = SirenGradient(grid(28, 28), pixels(count), 3, 30.0)
    train_many(state, slope, Training(STEPS, RATE))


def cnn_vmap(count: int) -> None:
    x, y = batch(count)
    state = initial_states(lambda: cnn(3), count, torch.Generator().manual_seed(0))
    slope = vmapped(cnn(3), lambda step, rows: (x[rows], y[rows]), cross_entropy)
    train_many(state, slope, Training(STEPS, RATE))


LOOPS = {
    "INR": {"plain loop": (inr_loops, plain), "lean loop": (inr_loops, lean)},
    "CNN": {"plain loop": (cnn_loops, plain), "lean loop": (cnn_loops, lean)},
}
TOGETHER: dict[str, dict[str, Callable[[int], None]]] = {
    "INR": {"train_many": inr_vmap, "train_many, by hand": inr_hand},
    "CNN": {"train_many": cnn_vmap},
}


def on_one_thread(kind: str, rounds: int) -> dict[str, float]:
    """Milliseconds of processor per network and step."""
    runs: dict[str, Callable[[], object]] = {}
    for name, (loop, which) in LOOPS[kind].items():
        runs[name] = lambda loop=loop, which=which: loop(which, NETWORKS)
    for name, run in TOGETHER[kind].items():
        runs[name] = lambda run=run: run(NETWORKS)
    timed = interleaved(runs, rounds)
    return {name: 1e3 * t.median / NETWORKS / STEPS for name, t in timed.items()}


def on_all_cores(kind: str, rounds: int) -> dict[str, float]:
    """Milliseconds on the wall per network and step, with the whole machine."""
    cores = os.cpu_count() or 1
    count, out = NETWORKS * cores, {}
    context = multiprocessing.get_context("spawn")
    torch.set_num_threads(cores)
    with ProcessPoolExecutor(cores, context, initializer=engine._start_worker) as pool:
        runs: dict[str, Callable[[], object]] = {}
        for name, (loop, which) in LOOPS[kind].items():
            runs[name] = lambda loop=loop, which=which: loop(which, count)
        for name, run in TOGETHER[kind].items():
            runs[name] = lambda run=run: list(pool.map(run, [NETWORKS] * cores))
        for run in runs.values():
            run()
        samples: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                begin = time.perf_counter()
                run()
                samples[name].append(time.perf_counter() - begin)
    torch.set_num_threads(1)
    for name, some in samples.items():
        out[name] = 1e3 * sorted(some)[len(some) // 2] / count / STEPS
    return out


def main() -> None:
    options = start(__doc__ or "", rounds=5)
    engine._keep_memory()  # loops get what workers have
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for kind, loops in LOOPS.items():
        figures[kind] = {
            "one thread": on_one_thread(kind, options.rounds),
            "machine": on_all_cores(kind, options.rounds),
        }
        head = [
            "candidate",
            "one thread ms",
            "× plain",
            "× lean",
            "machine ms",
            "× plain",
            "× lean",
        ]
        rows = []
        for name in figures[kind]["one thread"]:
            row = [name]
            for where in figures[kind].values():
                ratios = [f"{where[other] / where[name]:.2f}" for other in loops]
                row += [f"{where[name]:.3f}", *ratios]
            rows.append(row)
        print(f"\n### {kind}: per network and step; × faster than a loop\n")
        table(head, rows)
    finish(options, figures)


if __name__ == "__main__":
    main()
