"""What a drift costs: steps of Adam with and without it, and how its own work grows with size.

Two copies of a network train in turns of `TURN` steps in one process, one with `Drift` (jumps from
the first turn on) and one without; the medians of all turns are compared, processor time. The
networks are those of `nowcast_quality`, and GPT-2s of growing width, for which the drift's own work
is also timed by itself: an update of the averages, and a jump.

`--at-once` asks something else: the held loss right before and after jumps, every hundred steps of
runs on the tuning tasks (1,000 steps, seed 1000), of the parameters and of the average.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from harness import machine, table
from nowcast_tasks import HELD_OUT, TUNING, Data, Logits, Task, loss_of
from torch import Tensor, nn

from wspace.nowcast import Drift, Drifting, Nowcaster
from wspace.nowcast.guard import measured

TURN = 50


def gpt2(width: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=4096, n_positions=64, n_embd=width, n_layer=4, n_head=8,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return Logits(GPT2LMHeadModel(config))


Draw = Callable[[], tuple[Tensor, Tensor]]


def both(make: Callable[[], nn.Module], draw: Draw, rounds: int) -> list[str]:
    """Milliseconds of a step without and with, and the difference."""
    steps: list[Callable[[], None]] = []
    for drift in (False, True):
        torch.manual_seed(0)
        module = make()
        optimizer: torch.optim.Optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
        if drift:
            optimizer = Nowcaster(optimizer, module, predictor=Drift(begin=0))

        def step(module: nn.Module = module, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad()
            loss_of(module, draw()).backward()
            optimizer.step()

        steps.append(step)
    times: tuple[list[float], list[float]] = [], []
    for turn in range(rounds):
        for step, found in zip(steps, times, strict=True):
            start = time.process_time()
            for _ in range(TURN):
                step()
            if turn:
                found.append(1000 * (time.process_time() - start) / TURN)
    plain, drifting = (median(x) for x in times)
    change = [100 * (b / a - 1) for a, b in zip(*times, strict=True)]
    return [f"{plain:.2f}", f"{drifting:.2f}", f"{median(change):.1f} %"]


def alone(width: int, rounds: int) -> list[str]:
    """Milliseconds of an update and of a jump, and what they are for a step and a parameter."""
    module = gpt2(width)
    base = torch.optim.Adam(module.parameters(), lr=1e-3)
    optimizer = Nowcaster(base, module, predictor=Drift(begin=0))
    core = optimizer.core
    assert isinstance(core, Drifting)
    size = sum(p.numel() for p in module.parameters())
    core.averages.update(core.movable())
    core.averages.update(core.movable())
    found: list[float] = []
    for work in (lambda: core.averages.update(core.movable()), core._jump):
        times: list[float] = []
        for _ in range(rounds):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        found.append(median(times))
    update, jump = found
    each = update / core.drift.every + jump / core.settings.interval
    return [f"{size / 1e6:.1f} M", f"{1000 * update:.2f}", f"{1000 * jump:.2f}",
            f"{1000 * each:.3f}", f"{1e9 * each / size:.2f}"]  # fmt: skip


RATES = dict(zip(TUNING, (4e-3, 8e-3, 4e-3), strict=True))
"""Adam's best of those of `nowcast_tasks`, in runs of 1,000 steps."""


def at_once(name: str, task: Task, data: Data) -> list[list[str]]:
    """Held loss of the parameters and of the average, before and after every tenth jump."""
    torch.manual_seed(1000)
    module, drawn = task.make(), torch.Generator().manual_seed(1000)
    adam = torch.optim.Adam(module.parameters(), lr=RATES[name])
    optimizer = Nowcaster(adam, module, predictor=Drift(), on_error="raise")
    core, rows = optimizer.core, list[list[str]]()

    def losses() -> tuple[float, float]:
        own = measured(module, lambda: loss_of(module, data.held))
        with optimizer.averaged():
            return own, measured(module, lambda: loss_of(module, data.held))

    jump = core._jump

    def watched() -> None:
        before = losses() if core.step % 100 == 0 else None
        jump()
        if before is not None:
            pairs = zip(before, losses(), strict=True)
            rows.append([name, str(core.step), *(f"{x:.4f}" for pair in pairs for x in pair)])

    core._jump = watched
    for _ in range(1000):
        optimizer.zero_grad()
        loss_of(module, data.draw(task.batch, drawn)).backward()
        optimizer.step()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    shared = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
    parser.add_argument("--data", type=Path, default=shared)
    parser.add_argument("--rounds", type=int, default=13)
    parser.add_argument("--widths", nargs="*", type=int, default=[128, 384, 1024])
    parser.add_argument("--at-once", action="store_true", help="the loss right after jumps")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"# {(__doc__ or '').splitlines()[0]}\n\n{machine()}\n", flush=True)
    if options.at_once:
        head = ["task", "step", "before", "after", "average before", "after"]
        table(
            head, [r for n, t in TUNING.items() for r in at_once(n, t, t.data(str(options.data)))]
        )
        return
    rows: list[list[str]] = []
    for name, task in HELD_OUT.items():
        draw = partial(
            task.data(str(options.data)).draw, task.batch, torch.Generator().manual_seed(0)
        )
        rows.append([name, *both(task.make, draw, options.rounds)])
    x = torch.randint(4096, (8, 64))
    rows.append(["GPT-2, width 128", *both(lambda: gpt2(128), lambda: (x, x), 5)])
    table(["network", "step, ms", "with drift, ms", "more"], rows)
    print()
    head = ["parameters", "update, ms", "jump, ms", "both for a step, ms", "ns for a parameter"]
    table(head, [alone(width, 15) for width in options.widths])


if __name__ == "__main__":
    main()
