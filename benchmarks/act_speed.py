"""A group element on the weights of GPT-2 (124 M), and encoding it as a graph, beside a clone.

`act` moves every group at once and is compared with a plain clone of the same state, which copies
each tensor once. `encode` must take views: what it allocates is counted twice, as storages that
torch operators create (a dispatch mode) and as growth of resident memory.
"""

import gc
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import finish, interleaved, ms, start, table, timed
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import wspace

MIB = 2**20


class Allocated(TorchDispatchMode):
    """Counts the bytes of every storage that an operator creates."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.kept = [t.untyped_storage() for t in known]  # keeps addresses from being reused
        self.seen = {s.data_ptr() for s in self.kept}
        self.bytes = 0
        self.result: object = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and not leaf.is_meta:
                storage = leaf.untyped_storage()
                if storage.data_ptr() not in self.seen:
                    self.seen.add(storage.data_ptr())
                    self.kept.append(storage)
                    self.bytes += storage.nbytes()
        return out


def resident() -> int:
    """Bytes of resident memory now; 0 where the system does not say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGESIZE") if statm.exists() else 0


def gpt2() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(use_cache=False)).eval().requires_grad_(False)
    return model, dict(model.named_parameters(remove_duplicate=False))


def clone(state: dict[str, Tensor]) -> dict[str, Tensor]:
    copies: dict[int, Tensor] = {}
    return {k: copies.setdefault(id(v), v.clone()) if id(v) not in copies else copies[id(v)]
            for k, v in state.items()}  # fmt: skip


def allocations(run: Callable[[], object], known: list[Tensor]) -> tuple[int, int]:
    """Bytes that a call allocates: in torch storages, and in resident memory."""
    gc.collect()
    before = resident()
    kept = run()
    grown = resident() - before
    del kept
    counter = Allocated(known)
    with counter:
        counter.result = run()
    return counter.bytes, grown


def acting(space: wspace.WeightSpace, state: dict[str, Tensor], rounds: int) -> dict[str, object]:
    t = wspace.sample(space, generator=torch.Generator().manual_seed(0))
    runs = {"clone": lambda: clone(state), "act": lambda: wspace.act(t, state, space)}
    runs["sample"] = lambda: wspace.sample(space)
    timings = interleaved(runs, rounds)
    base = timings["clone"]
    print(f"\n## act with all {len(t.permutations)} groups, {rounds} rounds in turn\n")
    table(
        ["what", "median ms", "min ms", "× a clone"],
        [[n, ms(x.median), ms(min(x.samples)), f"{x.ratio(base):.2f}"] for n, x in timings.items()],
    )
    return {n: {"median_s": x.median, "ratio": x.ratio(base)} for n, x in timings.items()}


def encoding(
    space: wspace.WeightSpace, state: dict[str, Tensor], rounds: int
) -> dict[str, object] | None:
    try:
        graph = importlib.import_module("wspace.graph")
        encode, decode = graph.encode, graph.decode
    except (ImportError, AttributeError):
        print("\nencode: skipped, wspace.graph is not there yet")
        return None
    first = timed(lambda: encode(space, state))
    encoded = encode(space, state)
    runs = {
        "clone": lambda: clone(state),
        "encode (cached space)": lambda: encode(space, state),
        "decode": lambda: decode(encoded),
    }
    timings = interleaved(runs, rounds)
    base = timings["clone"]
    known = list(state.values())
    size = sum(t.numel() * t.element_size() for t in {id(t): t for t in known}.values())
    back = decode(encoded)
    exact = all(torch.equal(back[n], t) for n, t in state.items())
    rows, out = [], {"parameter_bytes": size, "first_encode_s": first, "exact": exact}
    for n, run in runs.items():
        counted, grown = allocations(run, known)
        t = timings[n]
        rows.append(
            [n, ms(t.median), ms(min(t.samples)), f"{t.ratio(base):.4f}"]
            + [f"{counted / MIB:.2f}", f"{counted / size:.3%}", f"{grown / MIB:.1f}"]
        )
        out[n] = {"median_s": t.median, "allocated": counted, "resident_growth": grown}
    print(f"\n## encode and decode; parameters are {size / MIB:.0f} MiB\n")
    head = "what, median ms, min ms, × a clone, storages MiB, of parameters, resident growth MiB"
    table(head.split(", "), rows)
    print(f"\nfirst encode {ms(first)} ms; decode returns the same bits: {exact}")
    return out


def main() -> None:
    options = start(__doc__)
    model, state = gpt2()
    space = wspace.trace(model, torch.arange(8)[None])
    figures = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "groups": len(space.groups),
        "act": acting(space, state, options.rounds),
        "encode": encoding(space, state, options.rounds),
    }
    finish(options, figures)


if __name__ == "__main__":
    main()
