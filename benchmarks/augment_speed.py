"""What do augmentations cost beside a training step of a metanet? 128 INRs (2-32-32-1).

The step is that of `configs/inr_classification_gmn.yaml` (`GraphMetanet`, 64 channels, 4 layers):
forward, backward, AdamW. Each augmentation takes the same batch of random SIRENs; aligned MixUp
matches 128 pairs of networks, by permutations and signs, which is most of its time. The last rows
are whole steps, with the augmentation before.
"""

from collections.abc import Callable
from typing import Any

import torch
from harness import finish, interleaved, ms, start, table
from torch.nn import functional as F

from wspace.augment import (
    AlignedMixUp,
    Augmentation,
    Compose,
    Drop,
    Flip,
    MixUp,
    Noise,
    PermutedMixUp,
    Quantile,
    Rotate,
    SelfMixUp,
    Symmetry,
    Translate,
    Zoom,
)
from wspace.graph import ParameterGraph, encode
from wspace.lit import build_metanet
from wspace.zoo import Architecture, InputSpec

ROWS = 128
SIREN = Architecture(
    "datasets_zoo.inr:siren", {"sizes": [2, 32, 32, 1], "omega": 30.0}, (InputSpec((1, 2)),)
)
AUGMENTATIONS: dict[str, Augmentation] = {
    "Symmetry, permutations": Symmetry(),
    "Symmetry, permutations and signs": Symmetry(("permutation", "sign")),
    "Symmetry, permutations, signs, phases": Symmetry(("permutation", "sign", "phase")),
    "Translate": Translate(),
    "Rotate": Rotate(),
    "Zoom": Zoom(),
    "Flip": Flip(),
    "Noise": Noise(),
    "Drop": Drop(),
    "Quantile": Quantile(),
    "MixUp": MixUp(),
    "PermutedMixUp": PermutedMixUp(),
    "AlignedMixUp, permutations": AlignedMixUp(kinds=("permutation",)),
    "AlignedMixUp": AlignedMixUp(),
    "SelfMixUp": SelfMixUp(),
}


def graph() -> ParameterGraph:
    """A batch of networks as their module initialises them."""
    space = SIREN.space()
    states = []
    for seed in range(ROWS):
        torch.manual_seed(seed)
        states.append(SIREN.module(device="cpu").state_dict())
    return encode(space, {n: torch.stack([s[n] for s in states]) for n in states[0]})


class Step:
    """A training step of the metanet, after an augmentation or none."""

    def __init__(self, networks: ParameterGraph) -> None:
        self.networks = networks
        torch.manual_seed(0)
        options = {"channels": 64, "layers": 4, "dropout": 0.1}
        self.metanet: Any = build_metanet("GraphMetanet", options, out=10)
        self.metanet.fit_statistics([networks])
        self.optimizer = torch.optim.AdamW(self.metanet.parameters())
        self.labels = torch.arange(ROWS) % 10

    def __call__(self, change: Augmentation | None = None) -> None:
        target, networks = F.one_hot(self.labels, 10).float(), self.networks
        if change is not None:
            networks, mixture = change.apply(networks, torch.Generator().manual_seed(0))
            target = target if mixture is None else mixture.classes(self.labels, 10)
        loss = F.cross_entropy(self.metanet([networks]), target)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def main() -> None:
    options = start(__doc__ or "", rounds=7)
    networks = graph()
    step = Step(networks)

    def alone(change: Augmentation) -> Callable[[], object]:
        return lambda: change.apply(networks, torch.Generator().manual_seed(0))

    aligned = AlignedMixUp()
    combined = Compose([Translate(), Noise(), Symmetry(("permutation", "sign")), aligned])
    runs: dict[str, Callable[[], object]] = {"training step": step}
    runs |= {name: alone(change) for name, change in AUGMENTATIONS.items()}
    runs |= {
        "step with AlignedMixUp": lambda: step(aligned),
        "step with Translate, Noise, Symmetry, AlignedMixUp": lambda: step(combined),
    }
    found = interleaved(runs, options.rounds)
    plain = found["training step"]
    rows = [
        [name, ms(t.first), ms(t.median), f"{100 * t.ratio(plain):.1f} %"]
        for name, t in found.items()
    ]
    table(["what", "first ms", "median ms", "of a training step"], rows)
    figures = {n: {"ms": 1e3 * t.median, "of_a_step": t.ratio(plain)} for n, t in found.items()}
    finish(options, figures)


if __name__ == "__main__":
    main()
