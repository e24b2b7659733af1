"""What a training step of HyperLSTM costs beside the fused LSTM of torch, and beside autograd.

128 units, a small cell of 32, embeddings of 8, 64 steps of a batch of 32 one-hot characters (65):
forward, backward and a step of AdamW. The loop by hand is beside the same loop left to autograd,
with and without layer normalisation; "kept" is what a graph keeps for the way back, parameters left
out. ``--threads 2`` measures with two threads, on the wall clock.
"""

from collections.abc import Callable
from typing import Any

import torch
from harness import finish, interleaved, ms, start, table
from torch import Tensor, nn
from torch.nn import functional as F

from wspace.hyper.cells.hyper_lstm import HyperLSTM
from wspace.hyper.cells.layer_norm_lstm import LayerNormLSTM

STEPS, BATCH, INPUTS, UNITS, SMALL, EMBEDDING = 64, 32, 65, 128, 32, 8
TARGET = 6.0
"""HyperLSTM in units of the fused LSTM: at most."""


def characters() -> Tensor:
    drawn = torch.randint(INPUTS, (STEPS, BATCH), generator=torch.Generator().manual_seed(0))
    return F.one_hot(drawn, INPUTS).float()


def kept_mib(net: nn.Module) -> float:
    """What the graph of a forward pass holds in memory; nn.LSTM hides what it holds."""
    own = {p.data_ptr() for p in net.parameters()}
    held: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if x.data_ptr() not in own:
            held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = net(characters())
    del out
    return sum(held.values()) / 2**20


def step(net: nn.Module) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(net.parameters())
    x = characters()

    def run() -> None:
        optimizer.zero_grad()
        net(x)[0].square().mean().backward()
        optimizer.step()

    return run


def nets() -> dict[str, nn.Module]:
    sizes = INPUTS, UNITS, SMALL, EMBEDDING
    made: dict[str, nn.Module] = {"nn.LSTM": nn.LSTM(INPUTS, UNITS)}
    for name, normed in (("", False), ("LN-", True)):
        for how, fused in (("", True), (", autograd", False)):
            options: dict[str, Any] = {"layer_norm": normed, "fused": fused}
            made[f"{name}HyperLSTM{how}"] = HyperLSTM(*sizes, **options)
            if normed:
                made[f"LN-LSTM{how}"] = LayerNormLSTM(INPUTS, UNITS, **options)
    return made


def main() -> None:
    options = start(__doc__ or "", rounds=25)
    torch.manual_seed(0)
    made = nets()
    timings = interleaved({name: step(net) for name, net in made.items()}, options.rounds)
    base = timings["nn.LSTM"]
    rows, out = [], {}
    for name, t in timings.items():
        weights = sum(p.numel() for p in made[name].parameters())
        ratio = t.ratio(base)
        kept = kept_mib(made[name])
        seen = "" if name == "nn.LSTM" else f"{kept:.0f}"
        times = ms(t.median), ms(min(t.samples)), f"{ratio:.2f}"
        rows.append([name, f"{weights:,}", *times, seen])
        out[name] = {"median_s": t.median, "samples": t.samples, "ratio": ratio, "kept": kept}
    print(f"\n## {STEPS} steps of {BATCH}, {UNITS} units; target {TARGET:g} ×\n")
    table(["model", "weights", "median ms", "min ms", "× nn.LSTM", "kept MiB"], rows)
    finish(options, out)


if __name__ == "__main__":
    main()
