"""Weights of one task as the beginning of another: the body of its metanet, without its head.

Owns what of a checkpoint may go into a metanet that is made for another task. The head is what
depends on the length of the answer, found by making the checkpoint's metanet for the new length.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wspace.errors import CheckpointError, WSpaceError, message
from wspace.lit.checkpoint import read
from wspace.lit.models import Seen, build_metanet, differing, without_files

PREFIX = "metanet."


@dataclass(frozen=True)
class Start:
    """What a metanet began with.

    Attributes:
        path: The checkpoint.
        task: Task that it was trained for.
        loaded: Names of the tensors that were taken from it, statistics among them.
        fresh: Names of those that were left as they were drawn.
        numbers: How many numbers were taken.
    """

    path: Path
    task: str
    loaded: tuple[str, ...]
    fresh: tuple[str, ...]
    numbers: int

    def __str__(self) -> str:
        left = f"{', '.join(self.fresh[:4])}{' …' if len(self.fresh) > 4 else ''}"
        return (
            f"pretrained: {len(self.loaded)} tensors ({self.numbers:,} numbers) of {self.path} "
            f"({self.task}); fresh: {left or 'none'}"
        )


def start_from(
    path: str | Path,
    metanet: nn.Module,
    name: str,
    options: Mapping[str, Any],
    *,
    out: int | None,
    trust: Sequence[str] = (),
) -> Start:
    """Copies the weights of a trained metanet into a fresh one, but for a head of another size.

    Args:
        path: A checkpoint of any task.
        metanet: From `build_metanet`; changed in place.
        name: Its name.
        options: Its options.
        out: Length of its answer; None for parameters.
        trust: Packages whose functions the checkpoint may name.

    Returns:
        What was taken and what was not.

    Raises:
        CheckpointError: If the file is damaged or something else, or its metanet is another.
        WSpaceError: If the checkpoint's metanet cannot be made.
    """
    path = Path(path)
    if not path.is_file():
        help = "the checkpoint of a run, such as runs/NAME/version_0/checkpoints/last.safetensors"
        raise CheckpointError(message(f"pretrained: there is no file {path}", help=help))
    header, tensors = read(path)
    found: Any = header.get("wspace")
    weights = {k.removeprefix(PREFIX): x for k, x in tensors.items() if k.startswith(PREFIX)}
    try:
        _check(path, found, name, options)
        kinds = Seen.from_list(found["seen"]) + Seen.from_list(found.get("others", []))
        with torch.random.fork_rng(devices=[]):
            given = without_files(found["config"]["options"])
            theirs = build_metanet(name, given, kinds, out=out, trust=trust)
    except WSpaceError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        text = f"pretrained: the header of {path} is damaged"
        raise CheckpointError(message(text, got=repr(error))) from error
    body = {
        k for k, x in theirs.state_dict().items() if k in weights and x.shape == weights[k].shape
    }
    ours = metanet.state_dict()
    _check_body(path, {k: weights[k] for k in body}, ours, {*theirs.state_dict()} - body)
    metanet.load_state_dict({**ours, **{k: weights[k] for k in body}})
    fresh = tuple(k for k in ours if k not in body)
    loaded = tuple(k for k in ours if k in body)
    numbers = sum(weights[k].numel() for k in loaded)
    return Start(path, str(found.get("task")), loaded, fresh, numbers)


def _check(path: Path, found: Any, name: str, options: Mapping[str, Any]) -> None:
    """Raises unless a header is of a metanet with this name and these options."""
    config: Mapping[str, Any] = found["config"]
    if found.get("module") or config["metanet"] != name:
        own = ", a module of your own" if found.get("module") else ""
        raise CheckpointError(
            message(
                f"pretrained: {path} holds another metanet",
                expected=name,
                got=f"{config['metanet']}{own}",
            )
        )
    if wrong := differing(name, options, config["options"]):
        raise CheckpointError(
            message(
                f"pretrained: the {name} of {path} has other options",
                expected=", ".join(f"{key} = {a!r}" for key, (a, _) in wrong.items()),
                got=", ".join(f"{key} = {b!r}" for key, (_, b) in wrong.items()),
                help="take the options that it was trained with; only dropout may differ",
            )
        )


def _check_body(
    path: Path, body: Mapping[str, Tensor], ours: Mapping[str, Tensor], head: set[str]
) -> None:
    """Raises unless everything but the head has its place."""
    wrong = [f"no {k}" for k in body if k not in ours]
    wrong += [f"{k} {tuple(ours[k].shape)}, there {tuple(x.shape)}" for k, x in body.items()
              if k in ours and x.shape != ours[k].shape]  # fmt: skip
    wrong += [f"no {k} there" for k in ours if k not in body and k not in head]
    if wrong or not body:
        raise CheckpointError(
            message(
                f"pretrained: the metanet of {path} was made for other networks",
                got=[*wrong[:4], *([f"{len(wrong) - 4} more"] if wrong[4:] else [])],
                help="this metanet reads one architecture, the same in both trainings",
            )
        )
