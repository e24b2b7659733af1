"""`wspace fit|validate|test|predict`: training on zoos, and what a trained metanet says.

The options of the first three, and of `predict --config`, are LightningCLI's (`wspace.lit.cli`).
`predict --ckpt` needs no configuration: it takes zoos, checkpoints, graph files and references.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text
from torch import Tensor

from wspace.cli import screen
from wspace.cli.headers import is_graph
from wspace.cli.subject import is_reference, open_subject
from wspace.errors import WSpaceError, message
from wspace.graph import ParameterGraph, decode, encode, load_graph
from wspace.io import load_checkpoint, save_checkpoint

if TYPE_CHECKING:
    from wspace.lit import Task

TRAINING = {
    "fit": "train a metanet on a zoo, as a configuration says",
    "validate": "evaluate a trained metanet on validation networks",
    "test": "evaluate a trained metanet on test networks",
}
"""Commands whose options are all LightningCLI's."""

CONFIGURED = ("-c", "--config", "--ckpt_path", "--data", "--trainer", "--print_config")


def is_lightning(words: Sequence[str]) -> bool:
    """Whether the words of a command are for LightningCLI."""
    if words[0] == "predict":
        return any(w.split("=")[0].split(".")[0] in CONFIGURED for w in words[1:])
    return words[0] in TRAINING


def train(args: argparse.Namespace, out: Console) -> int:
    """Runs `args.words`, a command with options of LightningCLI."""
    from wspace.lit.cli import run

    del out
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)  # devices, tips, thanks
    return run(args.words)


def predict(args: argparse.Namespace, out: Console) -> int:
    """Shows what the metanet in `args.ckpt` says of every subject."""
    from wspace.lit import load_task

    if args.json == "-" and args.out:
        raise WSpaceError(message("predict: --json - prints nothing but JSON", help="name a file"))
    task = load_task(args.ckpt, trust=args.trust)
    if args.out:
        _check_out(task, args.subjects, Path(args.out))
    rows: list[dict[str, Any]] = []
    for text in args.subjects:
        if (Path(text) / "zoo.json").is_file():
            rows += _of_zoo(task, text)
        else:
            rows.append(_of_network(task, text, args))
    if args.json != "-":
        out.print(Text(f"{args.ckpt}: {type(task).__name__} by {task.name}", "bold"))
        _show(out, rows, everything=args.all)
    if args.json:
        data = {"ckpt": args.ckpt, "task": type(task).__name__, "predictions": rows}
        screen.write_json(out, args.json, data)
    return 0


def _check_out(task: "Task", subjects: Sequence[str], folder: Path) -> None:
    """Raises unless every subject has an edited network, and a file of its own that is no input."""
    from wspace.lit import Editing

    if not isinstance(task, Editing):
        got = f"a task of {type(task).__name__}"
        raise WSpaceError(message("predict: --out is for editing", got=got))
    given, seen = {Path(text).resolve() for text in subjects}, set[Path]()
    for text in subjects:
        if (Path(text) / "zoo.json").is_file():
            raise WSpaceError(message("predict: --out takes networks", got=f"the zoo {text}"))
        target = _edited_file(text, folder)
        if target.resolve() in given or target in seen:
            raise WSpaceError(
                message(f"predict: {target} would be written over", help="choose another --out")
            )
        seen.add(target)


def _edited_file(text: str, folder: Path) -> Path:
    return folder / f"{Path(text).stem}.safetensors"


def _of_zoo(task: "Task", text: str) -> list[dict[str, Any]]:
    import wspace.zoo
    from wspace.lit import predict_zoo

    zoo = wspace.zoo.open(text)
    with screen.working(f"reading {text}"):
        columns = predict_zoo(task, zoo)
    rows = _rows([f"{text} {i}" for i in zoo.ids.tolist()], columns)
    known = [name for name in columns if name in zoo.table]
    for name in known:
        for row, value in zip(rows, zoo.table[name].tolist(), strict=True):
            row[f"{name} in zoo"] = value
    return rows


def _of_network(task: "Task", text: str, args: argparse.Namespace) -> dict[str, Any]:
    from wspace.lit import predict as ask

    graph, note = _graph(task, text, args)
    bad = {n: int((~x.isfinite()).sum()) for n, x in graph.values.items()}
    if any(bad.values()):
        found = [f"{number:,} in {name}" for name, number in bad.items() if number]
        raise WSpaceError(
            message(f"predict: {text} has weights that are NaN or infinite", got=found)
        )
    with screen.working(f"asking about {text}"):
        (row,) = _rows([text], ask(task, graph))
    if args.out:
        row["written"] = _write_edited(task, graph, text, Path(args.out))
    return {**row, "note": note} if note else row


def _graph(task: "Task", text: str, args: argparse.Namespace) -> tuple[ParameterGraph, str]:
    """The graph of a graph file, a checkpoint, or a reference, and how it was found if guessed."""
    from wspace.lit.predict import space_for

    path = Path(text)
    if is_graph(path):
        return load_graph(path), ""
    if path.exists() and not args.model:
        state = load_checkpoint(path, key=args.key)
        space = space_for(task, state)
        if space is not None:
            return encode(space, {name: x for name, x in state.items()}), ""  # noqa: C416
    subject = open_subject(text, model=args.model if path.exists() else "", key=args.key,
                           inputs=args.inputs, seed=args.seed)  # fmt: skip
    if subject.space is None:
        raise WSpaceError(
            message(
                f"predict: {text} comes without code, so its graph is not known",
                expected="a checkpoint of an architecture that the metanet was trained on",
                got=subject.note,
                help="name the code with --model",
            )
        )
    state = subject.state
    if subject.weights is None and is_reference(text) and subject.module is not None:
        state = {k: x.detach() for k, x in subject.module.state_dict().items()}
    return encode(subject.space, state), subject.note


def _write_edited(task: "Task", graph: ParameterGraph, text: str, folder: Path) -> str:
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    target = _edited_file(text, folder)
    with torch.no_grad():
        (edited,) = task([encode(graph.space, {k: x.float() for k, x in graph.values.items()})])
    state = {k: x.contiguous() for k, x in decode(graph.replace(edited)).items()}
    save_checkpoint(state, target)
    return str(target)


def _rows(names: Sequence[str], columns: dict[str, Tensor]) -> list[dict[str, Any]]:
    plain = {name: x.tolist() for name, x in columns.items()}
    return [
        {"network": name, **{key: values[i] for key, values in plain.items()}}
        for i, name in enumerate(names)
    ]


def _show(out: Console, rows: Sequence[dict[str, Any]], *, everything: bool) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row if key != "note"))
    cells = [[_cell(row.get(key, "")) for key in columns] for row in rows]
    heads = [key if key in {"network", "written"} else f">{key}" for key in columns]
    screen.table(out, heads, cells, everything=everything)
    for row in rows:
        if "note" in row:
            out.print(Text(f"{row['network']}: {row['note']}", "yellow"), soft_wrap=True)


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return f"{len(value)} numbers"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
