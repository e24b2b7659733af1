"""What the benchmarks share: interleaved timing, peak memory, tables, JSON, and the peers.

Machines are noisy, so figures are compared only within one run: candidates take turns (A B A B …)
on one thread, and a ratio is the median of the ratios round by round. Seconds are processor time
of the main thread (user and system), which other work on the machine disturbs least; on an idle
machine it equals the time on the wall. With several threads (``--threads``) it is the wall clock.
"""

import argparse
import gc
import importlib
import json
import os
import platform
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "tests"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

PEERS = {"torch_pruning": "torch-pruning", "rebasin": "rebasin"}


@dataclass
class Timing:
    """Seconds of one candidate, round by round; `first` is the uncounted first call."""

    name: str
    first: float
    samples: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def ratio(self, other: "Timing") -> float:
        """Median over rounds of this candidate's time in units of the other's."""
        return statistics.median(a / b for a, b in zip(self.samples, other.samples, strict=True))


def clock() -> float:
    """Seconds: of the processor with one thread, of the wall with several.

    The thread's clock, since a limit on the process's (`which_models`) makes that one coarse.
    """
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def timed(run: Callable[[], object]) -> float:
    start = clock()
    run()
    return clock() - start


def interleaved(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    """One uncounted call of each candidate, then `rounds` rounds in which each runs once."""
    out = {name: Timing(name, timed(run)) for name, run in runs.items()}
    for _ in range(rounds):
        for name, run in runs.items():
            gc.collect()
            out[name].samples.append(timed(run))
    return out


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Slope of log seconds over log size, by least squares: 1 is linear, 0 is flat."""
    x, y = (torch.tensor(v, dtype=torch.float64).log() for v in (sizes, seconds))
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x * x).sum())


def peak_mib() -> float:
    """Peak resident memory of this process so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def peer(name: str) -> ModuleType | None:
    """A package we compare with, or None where it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except ImportError as error:
            print(f"{PEERS[name]}: skipped, {error} (pip install 'wspace[bench]')")
            return None


def machine() -> str:
    """One line: processor, cores, versions, threads."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [x for x in info.read_text(encoding="utf-8").splitlines() if "model name" in x]
        cpu = names[0].split(":")[1].strip() if names else cpu
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{cpu}, {os.cpu_count()} cores, {versions}, torch threads: {torch.get_num_threads()}"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints a Markdown table, so that a page can quote the output as it is."""
    cells = [[str(c) for c in row] for row in (head, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    print("\n".join(lines), flush=True)


def ms(seconds: float) -> str:
    """Milliseconds with three figures."""
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:.0f}"


def start(description: str, *, rounds: int = 9, only: bool = False) -> argparse.Namespace:
    """Command line of a benchmark; one thread, no warnings, and the machine's line."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--rounds", type=int, default=rounds, help="rounds in turn (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (%(default)s)")
    if only:
        parser.add_argument("--only", nargs="*", help="only these rows")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    print(f"# {description.splitlines()[0]}\n\n{machine()}", flush=True)
    return options


def finish(options: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Writes the figures where they were asked for."""
    if options.json:
        text = json.dumps({"machine": machine(), **figures}, indent=1, allow_nan=False)
        options.json.write_text(text + "\n", encoding="utf-8")
