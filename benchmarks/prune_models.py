"""Networks that `prune_quality` prunes: trained here from several seeds, and read back.

ResNets with BatchNorm on CIFAR-10 at 16 x 16: a stem, three stages of two residual blocks,
average, a linear layer. Trained as those of `align_models`.

`python benchmarks/prune_models.py FOLDER` trains whatever is missing: for each network a
safetensors file and a JSON file with losses, accuracies and processor seconds.
"""

import argparse
import json
import os
from functools import partial
from pathlib import Path

import torch
from align_models import Family, images, trained
from harness import machine
from nowcast_tasks import Residual
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data"


class ResNet(nn.Module):
    """A stem, three stages of two residual blocks, average, a linear layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(
            Residual(width, width, 1),
            Residual(width, width, 1),
            Residual(width, 2 * width, 2),
            Residual(2 * width, 2 * width, 1),
            Residual(2 * width, 4 * width, 2),
            Residual(4 * width, 4 * width, 1),
        )
        self.head = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.norm(self.stem(x)).relu()).mean((2, 3)))


def resnet(width: int = 16) -> nn.Module:
    return ResNet(width).to(memory_format=torch.channels_last)


data = partial(images, "cifar10_16x16", True)
FAMILY = Family(resnet, data, 2340, 256, 4e-3, 0.05, seeds=3, half=True)
"""12 passes with AdamW, crops and mirrored images."""


def load(folder: Path, seed: int) -> nn.Module:
    """A trained network, in evaluation mode."""
    module = resnet()
    module.load_state_dict(load_file(folder / f"resnet-{seed}.safetensors"))
    return module.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the networks are kept")
    parser.add_argument("--data", default=os.environ.get("WSPACE_DATA", str(SHARED)))
    parser.add_argument("--seeds", type=int, nargs="*", default=list(range(FAMILY.seeds)))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    print(machine(), flush=True)
    for seed in options.seeds:
        path = options.folder / f"resnet-{seed}.json"
        if not path.exists():
            module, figures = trained(FAMILY, options.data, seed)
            state = {k: x.contiguous() for k, x in module.state_dict().items()}
            save_file(state, options.folder / f"resnet-{seed}.safetensors")
            path.write_text(json.dumps({"seed": seed, **figures}) + "\n", encoding="utf-8")
            print(f"resnet-{seed} {json.dumps(figures)}", flush=True)


if __name__ == "__main__":
    main()
