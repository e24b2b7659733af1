"""A trained task from its file, and what it says of networks."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wspace.errors import CheckpointError, SpaceMismatch, WSpaceError, ZooError, message
from wspace.graph import ParameterGraph, encode
from wspace.lit.checkpoint import read
from wspace.lit.contrastive import Contrastive
from wspace.lit.data import SpaceBatches
from wspace.lit.models import Seen, without_files
from wspace.lit.modules import Classification, Editing, Prediction
from wspace.lit.task import Optimization, Task
from wspace.space import WeightSpace
from wspace.zoo import Zoo

TASKS: dict[str, type[Task]] = {
    c.__name__: c for c in (Classification, Prediction, Editing, Contrastive)
}
"""Tasks by name, as checkpoints call them."""


def load_task(
    path: str | Path, *, metanet: nn.Module | None = None, trust: Sequence[str] = ()
) -> Task:
    """The task in a checkpoint, its metanet in evaluation mode on the CPU.

    No code that the file names is run, except functions of `wspace`, `datasets_zoo` and of the
    packages that `trust` names, and those only for a metanet with probes or an editing task.

    Args:
        path: A file that `wspace fit` wrote.
        metanet: The metanet, for a task that was given a module rather than a name; its weights
            are replaced.
        trust: Packages whose functions the file may name.

    Returns:
        The task.

    Raises:
        CheckpointError: If the file is damaged or something else, or the weights do not fit.
        WSpaceError: If the metanet cannot be made; a ZooError if an architecture comes from a
            package that is not trusted.
    """
    header, tensors = read(path)
    found = header.get("wspace")
    found = found if isinstance(found, dict) else {}
    kind = TASKS.get(str(found.get("task")))
    if kind is None:
        raise CheckpointError(
            message(
                f"checkpoint: {path} is of an unknown task",
                expected=f"one of {', '.join(TASKS)}",
                got=repr(found.get("task")),
            )
        )
    if found.get("module") and metanet is None:
        raise CheckpointError(
            message(
                f"checkpoint: {path} was trained with a module of your own",
                got=found["config"]["metanet"],
                help="pass it as load_task(path, metanet=...)",
            )
        )
    try:
        task = _made(kind, found, metanet, trust)
    except WSpaceError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            message(f"checkpoint: the header of {path} is damaged", got=repr(error))
        ) from error
    wrong = task.load_state_dict(tensors, strict=False)
    if wrong.missing_keys or wrong.unexpected_keys:
        raise CheckpointError(
            message(
                f"checkpoint: the weights of {path} do not fit its options",
                got=[f"missing {k}" for k in wrong.missing_keys[:4]]
                + [f"unexpected {k}" for k in wrong.unexpected_keys[:4]],
            )
        )
    task.fitted = True
    return task.eval()


def _made(
    kind: type[Task], found: Mapping[str, Any], metanet: nn.Module | None, trust: Sequence[str]
) -> Task:
    """The task that a header describes, its metanet with fresh weights."""
    options = dict(found["config"])
    options.pop("pretrained", None)  # the weights are here
    options["options"] = without_files(options["options"])
    how = dict(options.pop("optimization"))
    how["betas"] = tuple(how["betas"])
    options["optimization"] = Optimization(**how)
    options["trust"] = tuple(trust)
    if metanet is not None:
        options |= {"metanet": metanet, "options": None}
    task = kind(**options)
    task.restore(found["learned"])
    task.seen = Seen.from_list(found["seen"])
    task.others = Seen.from_list(found.get("others", []))
    task.build()
    return task


def predict(task: Task, graphs: ParameterGraph | Sequence[ParameterGraph]) -> dict[str, Tensor]:
    """What a task says of networks.

    Args:
        task: From `load_task`, or after training.
        graphs: A graph, whose batch axes stand for several networks, or a list.

    Returns:
        Columns by name, one row for each network in order; for example ``label`` and
        ``probability``.

    Raises:
        SpaceMismatch: If the metanet reads one architecture, and this is another.
    """
    graphs = [graphs] if isinstance(graphs, ParameterGraph) else list(graphs)
    device = next((p.device for p in task.parameters()), torch.device("cpu"))
    moved = [
        encode(g.space, {name: _row(x, g).float().to(device) for name, x in g.values.items()})
        for g in graphs
    ]
    before = task.training
    task.eval()
    try:
        with torch.no_grad():
            return {name: x.cpu() for name, x in task.columns(task(moved)).items()}
    finally:
        task.train(before)


def _row(x: Tensor, graph: ParameterGraph) -> Tensor:
    """A parameter with a batch axis."""
    return x if graph.batch else x[None]


def predict_zoo(task: Task, zoo: Zoo, *, batch_size: int = 128) -> dict[str, Tensor]:
    """What a task says of all networks of a zoo, in the order of the zoo.

    Args:
        task: As in `predict`.
        zoo: A zoo, or a part of one; of trajectories the last states are taken.
        batch_size: Networks at once.

    Returns:
        Columns by name, one row for each network.

    Raises:
        ZooError: If the zoo is empty.
        SpaceMismatch: As in `predict`.
    """
    if not len(zoo):
        raise ZooError("predict: the zoo holds no networks")
    time = None if zoo.steps is None else -1
    places: list[Tensor] = []
    found: list[dict[str, Tensor]] = []
    for rows in SpaceBatches(zoo.kind, batch_size):
        index = torch.as_tensor(rows)
        found.append(predict(task, zoo.batch(index, time=time).graphs))
        places.append(index)
    return in_order([{"index": i, **f} for i, f in zip(places, found, strict=True)])


def in_order(outputs: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Columns of several batches as one, rows sorted by the column ``index``, which is left out.

    Args:
        outputs: What `Task.predict_step` returned.

    Returns:
        Columns by name.

    Raises:
        WSpaceError: If there is no batch.
    """
    parts = list(outputs)
    if not parts:
        raise WSpaceError("predict: there are no predictions")
    index = torch.cat([p["index"] for p in parts])
    order = index.argsort()
    return {
        name: torch.cat([p[name] for p in parts])[order] for name in parts[0] if name != "index"
    }


def space_for(task: Task, state: Mapping[str, Tensor]) -> WeightSpace | None:
    """The weight space, among those of the zoo that a task was trained on, that a state fits.

    Args:
        task: From `load_task`.
        state: Tensors by name.

    Returns:
        The space; None if none fits.

    Raises:
        SpaceMismatch: If several fit, so that the names and shapes do not tell which is meant.
    """
    names = {name for name, x in state.items() if x.is_floating_point()}
    fits = [
        (architecture, space)
        for architecture, space in ([] if task.known is None else task.known.pairs())
        if names <= set(space.by_name)
        and all(p.name in state and tuple(state[p.name].shape) == p.shape for p in space.params)
    ]
    if len({space for _, space in fits}) > 1:
        shown = [str(architecture) for architecture, _ in fits[:8]]
        raise SpaceMismatch(
            message(
                "predict: names and shapes of the state fit several architectures of the zoo",
                got=[*shown, *([f"{len(fits) - 8} more"] if fits[8:] else [])],
                help="say which by a function of no arguments that returns the network, and its "
                "inputs: --model py:file.py:function on the command line; in Python, "
                "predict(task, encode(space, state))",
            )
        )
    return fits[0][1] if fits else None
