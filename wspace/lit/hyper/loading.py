"""A trained hypernetwork from its file, and the weights that it makes."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import wspace.lit.hyper
from wspace.action import State
from wspace.errors import CheckpointError, HyperError, WSpaceError, message
from wspace.hyper import HyperNetwork
from wspace.lit.checkpoint import SafeCheckpoints
from wspace.lit.hyper.task import HyperTask
from wspace.lit.task import Optimization


def tasks() -> dict[str, type[HyperTask]]:
    """Lightning modules of hypernetworks by name, as checkpoints call them."""
    found = vars(wspace.lit.hyper).items()
    return {
        name: kind
        for name, kind in found
        if isinstance(kind, type) and issubclass(kind, HyperTask) and kind is not HyperTask
    }


def load_hyper(path: str | Path, *, trust: Sequence[str] = ()) -> HyperTask:
    """The task in a checkpoint, in evaluation mode on the CPU.

    No code that the file names is run, except factories of `wspace`, `datasets_zoo` and of the
    packages that `trust` names.

    Args:
        path: A file that `wspace fit` wrote.
        trust: Packages whose factories the file may name.

    Returns:
        The task.

    Raises:
        CheckpointError: If the file is damaged or something else, or the weights do not fit.
        WSpaceError: If the task cannot be made of its options.
    """
    if not Path(path).is_file():
        raise CheckpointError(message(f"checkpoint: there is no {path}"))
    checkpoint = SafeCheckpoints().load_checkpoint(path)
    found = checkpoint.get("wspace")
    found = found if isinstance(found, dict) else {}
    known = tasks()
    kind = known.get(str(found.get("task")))
    if kind is None:
        raise CheckpointError(
            message(
                f"checkpoint: {path} is of no hypernetwork",
                expected=f"a task among {', '.join(sorted(known))}",
                got=repr(found.get("task")),
                help="wspace.lit.load_task reads metanets",
            )
        )
    try:
        options: dict[str, Any] = dict(found["config"])
        if "trust" in options:  # a file does not say whom to trust
            options["trust"] = tuple(trust)
        if isinstance(options.get("optimization"), dict):
            options["optimization"] = _optimization(options["optimization"])
        task = kind(**options)
        task.on_load_checkpoint(checkpoint)
    except WSpaceError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            message(f"checkpoint: the header of {path} is damaged", got=repr(error))
        ) from error
    try:
        task.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        lines = str(error).splitlines()[1:5]
        raise CheckpointError(
            message(f"checkpoint: the weights of {path} do not fit its options",
                    got=[line.strip() for line in lines])
        ) from error  # fmt: skip
    return task.eval()


def _optimization(options: dict[str, Any]) -> Optimization:
    known = {f.name for f in fields(Optimization)}
    how: dict[str, Any] = {k: v for k, v in options.items() if k in known}
    how["betas"] = tuple(how.get("betas", Optimization().betas))
    return Optimization(**how)


def hypernetwork_of(task: HyperTask) -> HyperNetwork:
    """The hypernetwork of a task.

    Args:
        task: The task.

    Returns:
        The hypernetwork.

    Raises:
        HyperError: If it has none, or more than one.
    """
    found = [m for m in task.modules() if isinstance(m, HyperNetwork)]
    if len(found) != 1:
        raise HyperError(
            message(
                f"generate: {type(task).__name__} has {len(found)} hypernetworks",
                expected="one that makes the weights of one target",
                help="recurrent cells make their weights as they run; wspace hyper predict is for "
                "graph hypernetworks",
            )
        )
    return found[0]


@torch.no_grad()
def generate(task: HyperTask, cond: int | None = None) -> State:
    """The state that a task's hypernetwork makes.

    Args:
        task: From `load_hyper`, or after training.
        cond: Number of the task; None if there is no condition.

    Returns:
        Tensors by name, as in the target's ``state_dict``.

    Raises:
        HyperError: If the condition is not a number, there is none of this number, or none is
            given where one is needed.
    """
    hyper = hypernetwork_of(task)
    count = _conditions(hyper)
    if (cond is None) != (count is None) or (cond is not None and not 0 <= cond < (count or 0)):
        raise HyperError(
            message(
                f"generate: condition {cond}",
                expected="none: there is no condition" if count is None
                else f"a number from 0 to {count - 1}",
                help="--cond N chooses the task",
            )
        )  # fmt: skip
    where: Tensor | None = None if cond is None else torch.tensor(cond)
    with task.with_state_of(cond):
        return hyper.cache(where)


def _conditions(hyper: HyperNetwork) -> int | None:
    """How many conditions there are to choose from; None if there is no condition."""
    if hyper.condition is None:
        return None
    count = getattr(hyper.condition, "count", None)
    if not isinstance(count, int):
        raise HyperError(
            message(
                f"generate: a {type(hyper.condition).__name__} is no number",
                help="call hyper.cache(cond) from Python with what it takes",
            )
        )
    return count
