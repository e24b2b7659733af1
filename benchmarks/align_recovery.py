"""How often does matching undo a random permutation exactly? By start, restarts and network.

``match(θ, act(t, θ + noise))`` for many random `t` and noises at once, as one batch. The noise is
normal, with the standard deviation of each tensor times ``--noise``. Matching succeeds if its
objective is at least that of the inverse of `t`: without noise this is exact recovery, with noise
`t` itself need not be the best. Coordinate ascent finds local optima, so it may fail. The restarts
are random: what a number of them gives is read off one run with the most.

Trained networks are those of `align_models`, if ``--networks`` names their folder.
"""

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from align_models import FAMILIES, ResNet, load
from harness import machine, table
from torch import Tensor, nn

import wspace
from wspace.align import match, objective

STARTS = ("identity", "forward", "sinkhorn")
State = dict[str, Tensor]


def mlp(depth: int, width: int = 32) -> nn.Module:
    """16, hidden layers, 10."""
    layers: list[nn.Module] = []
    sizes = [16, *[width] * depth]
    for a, b in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


class Residual(nn.Module):
    """A stream of `width` units, to which two MLPs of `inner` units add."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, width), nn.Linear(width, 10)
        self.up = nn.ModuleList(nn.Linear(width, inner) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(inner, width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(up(x).relu())
        return self.last(x)


class Square(nn.Module):
    """A stream on both axes of its inner matrices, the network of git-re-basin's issue 8."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, width), nn.Linear(width, 10)
        self.inner = nn.ModuleList(nn.Linear(width, width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.inner:
            x = x + layer(x).relu()
        return self.last(x)


def cnn() -> nn.Module:
    """Two convolutions, average, a linear layer."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


ROWS, IMAGE = torch.zeros(2, 16), torch.zeros(2, 3, 16, 16)
UNTRAINED: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    **{f"MLP, hidden layers: {d} of 32": (lambda d=d: mlp(d), ROWS) for d in range(1, 6)},
    "MLP, hidden layers: 3 of 128": (lambda: mlp(3, 128), ROWS),
    "residual MLP, stream 24, inner 40": (lambda: Residual(24, 40), ROWS),
    "square residual MLP, stream 30": (lambda: Square(30), ROWS),
    "square residual MLP, stream 50": (lambda: Square(50), ROWS),
    "CNN, 16 and 32 channels": (cnn, IMAGE),
    "ResNet-8 with BatchNorm, width 16": (lambda: ResNet(16), IMAGE),
    "GPT-2, 3 blocks of 128": (FAMILIES["gpt2"].make, torch.zeros(2, 64, dtype=torch.long)),
}
TRAINED = {"mlp-64": torch.zeros(2, 1, 28, 28), "resnet-16": IMAGE, "gpt2": UNTRAINED["GPT-2, 3 blocks of 128"][1]}  # fmt: skip  # noqa: E501


def networks(folder: Path | None) -> Iterator[tuple[str, str, wspace.WeightSpace, State]]:
    """Name, kind of weights, space and state of every network."""
    for name, (make, x) in UNTRAINED.items():
        torch.manual_seed(1)
        module = make().eval()
        yield name, "random", wspace.trace(module, (x,)), module.state_dict()
    for name, x in TRAINED.items():
        if folder is not None and (folder / f"{name}-0.json").exists():
            space = wspace.trace(FAMILIES[name].make().eval(), (x,))
            yield name, "trained", space, load(folder, name, 0)


def recovered(
    space: wspace.WeightSpace, state: State, start: str, noise: float, options: argparse.Namespace
) -> dict[str, Any]:
    """Shares of successes after each number of restarts, of bits restored, of units; seconds."""
    draws, restarts, chunk = options.draws, options.restarts, options.chunk
    generator = torch.Generator().manual_seed(2)
    exact: list[Tensor] = []
    bits, right, units, seconds = 0, 0, 0, 0.0
    for first in range(0, draws, chunk):
        n = min(chunk, draws - first)
        t = wspace.sample(space, batch=(n,), generator=generator)
        rows = {k: x.detach().expand(n, *x.shape) for k, x in state.items()}
        other = {k: blurred(x, noise, generator) for k, x in rows.items()}
        moved = wspace.act(t, other, space)
        begin = time.perf_counter()
        found = match(rows, moved, space, start=start, restarts=restarts, generator=generator)
        seconds += time.perf_counter() - begin
        exact.append(found.restarts >= objective(rows, other, space) * (1 - 1e-9))
        back = wspace.act(found, moved, space)
        same = [(back[p.name] == other[p.name]).flatten(1).all(1) for p in space.params]
        bits += int(torch.stack(same).all(0).sum())
        for group, p in wspace.inverse(t).permutations.items():
            right += int((found.permutations[group] == p).sum())
            units += p.numel()
    hits = torch.cat(exact, 1).cummax(0).values.double().mean(1).tolist()
    shares = {"bits": bits / draws, "units": right / units, "seconds": seconds / draws}
    return {"noise": noise, "start": start, "hits": hits, **shares}


def blurred(x: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """A tensor with noise, another for each row."""
    if not noise or not x.is_floating_point():
        return x
    size = x[0].std() if x[0].numel() > 1 else 0.0
    return x + noise * size * torch.randn(x.shape, generator=generator)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", type=Path, help="folder of trained ones")
    parser.add_argument("--only", nargs="*", help="names")
    parser.add_argument("--starts", nargs="*", choices=STARTS, default=list(STARTS))
    parser.add_argument("--draws", type=int, default=50)
    parser.add_argument("--restarts", type=int, default=20)
    parser.add_argument("--noise", nargs="*", type=float, default=[0.0, 0.5, 1.0])
    parser.add_argument("--chunk", type=int, default=10, help="matched at once")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    print(f"# {(__doc__ or '').splitlines()[0]}\n\n{machine()}\n", flush=True)
    figures, lines = [], []
    steps = [k for k in (0, 5, 20) if k <= options.restarts]
    for name, weights, space, state in networks(options.networks):
        if options.only and name not in options.only:
            continue
        for noise in options.noise:
            cells = []
            found = [recovered(space, state, s, noise, options) for s in options.starts]
            for f in found:
                figures.append({"network": name, "weights": weights, **f})
                print(json.dumps(figures[-1]), file=sys.stderr, flush=True)
                cells.append(" / ".join(f"{100 * f['hits'][k]:.0f}" for k in steps))
            units = " / ".join(f"{100 * f['units']:.1f}" for f in found)
            lines.append([name, weights, noise, *cells, units, f"{found[0]['seconds']:.2f}"])
    print(f"Of {options.draws}, after {' / '.join(map(str, steps))} restarts\n")
    head = ["network", "weights", "noise", *(f"{s}, %" for s in options.starts)]
    table([*head, "units in place, %", "s for one, with restarts"], lines)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
