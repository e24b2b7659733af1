"""Reading batches of networks from a zoo, beside one file per network; opening; growth.

Networks are sine perceptrons 2-32-32-1 (1,185 parameters), in cohorts of 1,000. Candidates read the
same 128 networks at random and end with stacked float32 tensors: `Zoo.batch` (graphs and table),
and dictionaries saved by `torch.save`, one `torch.load` each, then `torch.stack`. All files are in
the page cache. The last two tables change one size at a time: networks, and cohorts.
"""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from harness import exponent, finish, interleaved, ms, start, table
from torch import Tensor, nn

from wspace import zoo
from wspace.zoo import Architecture, Cohort, InputSpec, generator_of

BATCH = 128
SIZES = (1_000, 10_000, 100_000)


def network() -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
    )


ARCHITECTURE = Architecture("zoo_speed:network", {}, [InputSpec((4, 2))])


@dataclass(frozen=True)
class Random:
    """Untrained networks."""

    count: int = 10_000
    size: int = 1_000
    seed: int = 0

    @property
    def cohorts(self) -> int:
        return self.count // self.size

    def cohort(self, index: int) -> Cohort:
        g = generator_of(self.seed, index)
        space = ARCHITECTURE.space(("zoo_speed",))
        state = {p.name: torch.randn(self.size, *p.shape, generator=g) for p in space.params}
        at = torch.arange(index * self.size, (index + 1) * self.size)
        table = {"image": at, "label": at % 10, "loss": torch.rand(self.size, generator=g)}
        return Cohort(ARCHITECTURE, state, table)


def batches(count: int) -> list[list[int]]:
    """Ten random batches; the same in every call."""
    g = torch.Generator().manual_seed(0)
    return [torch.randperm(count, generator=g)[:BATCH].tolist() for _ in range(10)]


def read_zoo(made: zoo.Zoo) -> None:
    for places in batches(len(made)):
        made.batch(places)


def read_in_order(made: zoo.Zoo) -> None:
    for k in range(10):
        made.batch(slice(k * BATCH % len(made), (k * BATCH % len(made)) + BATCH))


def read_files(folder: Path, count: int) -> None:
    for places in batches(count):
        states = [torch.load(folder / f"{i}.pt", weights_only=True) for i in places]
        _: dict[str, Tensor] = {k: torch.stack([s[k] for s in states]) for k in states[0]}


def beside_files(folder: Path, rounds: int) -> dict[str, float]:
    made = zoo.build(Random(), folder / "zoo")
    files = folder / "files"
    files.mkdir()
    for i, (_, state) in enumerate(made):
        torch.save({name: x.clone() for name, x in state.items()}, files / f"{i}.pt")
    loaded = zoo.open(made.path).load()
    runs: dict[str, Callable[[], object]] = {
        "Zoo.batch, random": lambda: read_zoo(made),
        "Zoo.batch, in order": lambda: read_in_order(made),
        "Zoo.batch, loaded": lambda: read_zoo(loaded),
        "one torch.load per network": lambda: read_files(files, len(made)),
    }
    times = interleaved(runs, rounds)
    slow = times["one torch.load per network"]
    print(f"\n## A batch of {BATCH} of {len(made):,} networks\n")
    table(
        ("how", "ms per batch", "times faster"),
        [(n, ms(t.median / 10), f"{slow.ratio(t):.1f}") for n, t in times.items()],
    )
    return {name: slow.ratio(t) for name, t in times.items()}


def growth(folder: Path, rounds: int, sizes: dict[str, Random]) -> dict[str, float]:
    made = {name: zoo.build(recipe, folder / name) for name, recipe in sizes.items()}
    counts = [len(item) for item in made.values()]
    shards = [item.cohorts for item in made.values()]
    grown = counts if counts[0] != counts[-1] else shards
    read = interleaved({n: lambda z=z: read_zoo(z) for n, z in made.items()}, rounds)
    opened = interleaved({n: lambda n=n: zoo.open(folder / n) for n in made}, max(1, rounds // 3))
    rows = [
        (f"{len(z):,}", z.cohorts, ms(read[n].median / 10), ms(opened[n].median))
        for n, z in made.items()
    ]
    slopes = {
        "batch": exponent(grown, [t.median for t in read.values()]),
        "open": exponent(grown, [t.median for t in opened.values()]),
    }
    by = "networks" if grown is counts else "cohorts"
    print(f"\n## Growth with the number of {by}\n")
    table(("networks", "cohorts", "ms per batch", "ms to open"), rows)
    print(f"\nExponents: batch {slopes['batch']:.2f}, opening {slopes['open']:.2f}.")
    return slopes


def main() -> None:
    options = start(__doc__ or "")
    folder = Path(tempfile.mkdtemp(prefix="zoo-speed-"))
    try:
        figures = {
            "faster": beside_files(folder, options.rounds),
            "networks": growth(folder, options.rounds, {f"n{n}": Random(n) for n in SIZES}),
            "cohorts": growth(
                folder,
                options.rounds,
                {f"c{k}": Random(10_000, 10_000 // k) for k in (1, 10, 100)},
            ),
        }
    finally:
        shutil.rmtree(folder)
    finish(options, figures)


if __name__ == "__main__":
    # under its own name, which zoos refer to
    import zoo_speed

    zoo_speed.main()
