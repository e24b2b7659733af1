"""Networks that `align_quality` merges: trained here from several seeds, and read back.

A network is a family and a seed, `mlp-512-0`. The seed sets the initial weights and the order of
the data; `gpt2-shared` has the same initial weights and the same batches for the first tenth of
training, then each seed its own. All train with AdamW, a rate that rises for a tenth of the steps
and falls along a cosine; nothing was tuned for merging.

`python benchmarks/align_models.py FOLDER` trains whatever is missing: for each network a
safetensors file and a JSON file with losses, accuracies and processor seconds.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from harness import machine
from nowcast_tasks import Logits, Residual
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from datasets_zoo.images import standardised
from datasets_zoo.language import fixed_windows, tokens_of, windows

CONTEXT = 64
SHARED_SEED = 1000
Pair = tuple[Tensor, Tensor]


class Data(NamedTuple):
    """Examples.

    Attributes:
        batches: (steps, batch, generator) → random batches for training.
        train: Training examples on which losses are measured, not augmented.
        test: Test examples.
    """

    batches: Callable[[int, int, torch.Generator], Iterator[Pair]]
    train: Pair
    test: Pair


@dataclass(frozen=True)
class Family:
    """How networks of one kind are made and trained.

    Attributes:
        make: Makes the network from torch's global random numbers.
        data: (root) → its data.
        steps: Steps of training.
        batch: Examples in a step.
        rate: Highest learning rate.
        decay: Weight decay, decoupled.
        seeds: How many networks.
        half: Whether matrix products are computed in bfloat16.
        shared: Part of training with the weights and batches of one seed for all.
    """

    make: Callable[[], nn.Module]
    data: Callable[[str], Data]
    steps: int
    batch: int
    rate: float
    decay: float
    seeds: int = 2
    half: bool = False
    shared: float = 0.0


# -------------------------------------------------------------------------- data


@lru_cache(maxsize=2)
def images(name: str, augment: bool, root: str) -> Data:
    """Images; 10,000 for training losses. Augmented: crops of padded and mirrored images."""
    x, y, test_x, test_y = standardised(name, root)
    x, test_x = (z.contiguous(memory_format=torch.channels_last) for z in (x, test_x))
    size, pad = x.shape[-1], 2
    padded = F.pad(x, (pad,) * 4).permute(0, 2, 3, 1) if augment else x

    def pick(rows: Tensor, generator: torch.Generator) -> Tensor:
        if not augment:
            return x[rows]
        n, span = len(rows), torch.arange(size)
        offsets = torch.randint(2 * pad + 1, (2, n, 1), generator=generator)
        i, j = offsets + span
        mirrored = torch.rand(n, 1, generator=generator) < 0.5
        j = torch.where(mirrored, j.flip(1), j)
        return padded[rows[:, None, None], i[:, :, None], j[:, None, :]].permute(0, 3, 1, 2)

    def batches(steps: int, batch: int, generator: torch.Generator) -> Iterator[Pair]:
        order = torch.empty(0, dtype=torch.long)
        for _ in range(steps):
            if len(order) < batch:
                order = torch.cat([order, torch.randperm(len(y), generator=generator)])
            rows, order = order[:batch], order[batch:]
            yield pick(rows, generator), y[rows]

    return Data(batches, (x[:10_000], y[:10_000]), (test_x, test_y))


@lru_cache(maxsize=1)
def shakespeare(root: str) -> Data:
    """Characters of Shakespeare; the last tenth of the text is for testing."""
    train, test, _ = tokens_of("tinyshakespeare", root)

    def batches(steps: int, batch: int, generator: torch.Generator) -> Iterator[Pair]:
        for _ in range(steps):
            starts = torch.randint(len(train) - CONTEXT - 1, (batch,), generator=generator)
            chosen = windows(train, starts, CONTEXT)
            yield chosen[:, :-1], chosen[:, 1:]

    return Data(batches, fixed_windows(train, 256, CONTEXT), fixed_windows(test, 256, CONTEXT))


# ---------------------------------------------------------------------- networks


def mlp(width: int) -> nn.Module:
    """784, three hidden layers of ReLU, 10."""
    layers: list[nn.Module] = [nn.Flatten()]
    for a in (784, width, width):
        layers += [nn.Linear(a, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


class ResNet(nn.Module):
    """ResNet-8 with BatchNorm: a stem, three residual blocks, average, a linear layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(
            Residual(width, width, 1),
            Residual(width, 2 * width, 2),
            Residual(2 * width, 4 * width, 2),
        )
        self.head = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.norm(self.stem(x)).relu()).mean((2, 3)))


def gpt2() -> nn.Module:
    """GPT-2 of transformers: 3 blocks, width 128, 4 heads, the head tied, no dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    options: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    options |= {"bos_token_id": None, "eos_token_id": None}
    sizes = {"vocab_size": 65, "n_positions": CONTEXT, "n_embd": 128, "n_layer": 3, "n_head": 4}
    return Logits(GPT2LMHeadModel(GPT2Config(**sizes, **options)))


def resnet(width: int) -> nn.Module:
    return ResNet(width).to(memory_format=torch.channels_last)


def _mlp(width: int, seeds: int) -> Family:
    return Family(partial(mlp, width), partial(images, "mnist", False), 2400, 256, 1e-3, 0.0, seeds)


def _resnet(width: int, seeds: int) -> Family:
    data = partial(images, "cifar10_16x16", True)
    return Family(partial(resnet, width), data, 2340, 256, 4e-3, 0.05, seeds, half=True)


FAMILIES = {
    "mlp-64": _mlp(64, 4),
    "mlp-512": _mlp(512, 4),
    "resnet-16": _resnet(16, 4),
    "resnet-64": _resnet(64, 2),
    "gpt2": Family(gpt2, shakespeare, 2400, 32, 2e-3, 0.1),
    "gpt2-shared": Family(gpt2, shakespeare, 2400, 32, 2e-3, 0.1, shared=0.1),
}
"""MNIST MLPs by width (10 epochs), CIFAR-10 ResNets by width of the stem (12 epochs), GPT-2s."""


# ---------------------------------------------------------------------- training


def loss_of(module: nn.Module, pair: Pair) -> Tensor:
    """Mean cross-entropy over examples and positions, nats."""
    return F.cross_entropy(module(pair[0]).flatten(0, -2).float(), pair[1].flatten())


@torch.no_grad()
def judged(module: nn.Module, pair: Pair, batch: int = 500) -> tuple[float, float]:
    """Mean loss in nats and share of right answers, in evaluation mode."""
    module.eval()
    loss, right = 0.0, 0
    for x, y in zip(*(z.split(batch) for z in pair), strict=True):
        logits = module(x)
        flat = logits.flatten(0, -2)
        loss += float(F.cross_entropy(flat, y.flatten(), reduction="sum"))
        right += int((flat.argmax(-1) == y.flatten()).sum())
    return loss / pair[1].numel(), right / pair[1].numel()


def batches_of(family: Family, data: Data, seed: int) -> Iterator[Pair]:
    """The batches of a run: those that all seeds share, then its own."""
    first = int(family.shared * family.steps)
    yield from data.batches(first, family.batch, torch.Generator().manual_seed(SHARED_SEED))
    rest = family.steps - first
    yield from data.batches(rest, family.batch, torch.Generator().manual_seed(seed))


def trained(family: Family, root: str, seed: int) -> tuple[nn.Module, dict[str, Any]]:
    """One network and its figures."""
    data = family.data(root)
    torch.manual_seed(SHARED_SEED if family.shared else seed)
    module = family.make().train()
    adam = torch.optim.AdamW(module.parameters(), lr=family.rate, weight_decay=family.decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        adam, family.rate, family.steps, pct_start=0.1, cycle_momentum=False
    )
    start = time.process_time()
    for pair in batches_of(family, data, seed):
        adam.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=family.half):
            loss = loss_of(module, pair)
        loss.backward()
        adam.step()
        schedule.step()
    seconds = time.process_time() - start
    figures: dict[str, Any] = {"parameters": sum(p.numel() for p in module.parameters())}
    for part, pair in (("train", data.train), ("test", data.test)):
        figures[f"{part}_loss"], figures[f"{part}_accuracy"] = judged(module, pair)
    return module, figures | {"cpu_seconds": round(seconds, 1)}


def load(folder: Path, name: str, seed: int) -> dict[str, Tensor]:
    """The state of a network, tied tensors under all of their names."""
    module = FAMILIES[name].make()
    module.load_state_dict(load_file(folder / f"{name}-{seed}.safetensors"), strict=False)
    return {key: x.detach() for key, x in module.state_dict().items()}


def save(folder: Path, name: str, seed: int, module: nn.Module, figures: dict[str, Any]) -> None:
    once = {x.data_ptr(): key for key, x in reversed(module.state_dict().items())}
    state = {k: x.contiguous() for k, x in module.state_dict().items() if once[x.data_ptr()] == k}
    save_file(state, folder / f"{name}-{seed}.safetensors")
    text = json.dumps({"family": name, "seed": seed, **figures})
    (folder / f"{name}-{seed}.json").write_text(text + "\n", encoding="utf-8")


def main() -> None:
    shared = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the networks are kept")
    parser.add_argument("--only", nargs="*", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--data", default=os.environ.get("WSPACE_DATA", str(shared)))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.folder.mkdir(parents=True, exist_ok=True)
    print(machine(), flush=True)
    for name in options.only:
        for seed in range(FAMILIES[name].seeds):
            if not (options.folder / f"{name}-{seed}.json").exists():
                module, figures = trained(FAMILIES[name], options.data, seed)
                save(options.folder, name, seed, module, figures)
                print(f"{name}-{seed} {json.dumps(figures)}", flush=True)


if __name__ == "__main__":
    main()
