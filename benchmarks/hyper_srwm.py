"""How the cost of self-referential cells grows with steps, the width of a head, and heads.

A call, or a step (forward and backward), on a batch of 32 float32 sequences. The exponent is the
slope of log seconds over log size, over the three sizes of a sweep: 1 is linear, 2 quadratic.
`SRWM` is a loop over time of batched products with matrices of (3 D + 4) × D for each batch
element and head, so the work grows as T · heads · D². "autograd" is the same loop without the
hand-written gradient. `nn.LSTM` has as many units as the cell is wide.
"""

from collections.abc import Callable
from typing import Any

import torch
from harness import exponent, finish, interleaved, ms, start, table
from torch import nn

from wspace.hyper.cells.self_reference import SRWM, DeltaNet, FakeSR

BATCH = 32
SWEEPS = {
    "steps T": [(t, 16, 4) for t in (16, 64, 256)],
    "width of a head D": [(32, d, 4) for d in (8, 16, 32)],
    "heads H": [(32, 16, h) for h in (2, 4, 8)],
}
CELLS: dict[str, Callable[[int, int], nn.Module]] = {
    "SRWM": SRWM,
    "SRWM, autograd": lambda width, heads: SRWM(width, heads, fused=False),
    "FakeSR": FakeSR,
    "DeltaNet": DeltaNet,
    "nn.LSTM": lambda width, heads: nn.LSTM(width, width, batch_first=True),
}


def runs_of(size: tuple[int, int, int]) -> dict[tuple[str, str], Callable[[], object]]:
    steps, d, heads = size
    x = torch.randn(BATCH, steps, d * heads, requires_grad=True)
    out: dict[tuple[str, str], Callable[[], object]] = {}
    for name, make in CELLS.items():
        cell = make(d * heads, heads)

        def call(cell: nn.Module = cell) -> None:
            with torch.no_grad():
                cell(x)

        def step(cell: nn.Module = cell) -> None:
            cell.zero_grad(set_to_none=True)
            cell(x)[0].square().sum().backward()

        out[name, "call"], out[name, "step"] = call, step
    return out


def main() -> None:
    options = start(__doc__ or "", rounds=9)
    figures: dict[str, Any] = {}
    for what, sizes in SWEEPS.items():
        timings = [interleaved(runs_of(s), options.rounds) for s in sizes]  # type: ignore[arg-type]
        values = [s[{"s": 0, "w": 1, "h": 2}[what[0]]] for s in sizes]
        rows: list[list[object]] = []
        for key in timings[0]:
            medians = [t[key].median for t in timings]
            rows.append([*key, *map(ms, medians), f"{exponent(values, medians):.2f}"])
            figures[" ".join((what, *key))] = {"sizes": values, "median_s": medians}
        ratios = [t["SRWM, autograd", "step"].ratio(t["SRWM", "step"]) for t in timings]
        rows.append(["SRWM against autograd", "step", *[f"{r:.2f} ×" for r in ratios], ""])
        rest = ", ".join(f"{n} {v}" for n, v in zip("TDH", sizes[0], strict=True) if n != what[-1])
        print(f"\n## ms over {what}, {rest}\n")
        table(["cell", "what", *map(str, values), "exponent"], rows)
    finish(options, figures)


if __name__ == "__main__":
    main()
