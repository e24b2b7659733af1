"""`wspace convert`: a checkpoint as a graph file, and back to the checkpoint it was.

What the checkpoint's files know beyond the tensors (its layout) travels in the graph file's header,
so the way back restores shards, metadata, nesting, ties, and the small files of a folder. Every
file is written beside its place, read again and compared, and only then moved there.
"""

import argparse
import shutil
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor

from wspace.cli import screen
from wspace.cli.headers import add_notes, is_graph, notes_of, packed, unpacked
from wspace.cli.subject import Subject, is_reference, open_subject
from wspace.errors import WSpaceError, message
from wspace.graph import ParameterGraph, decode, encode, load_graph, save_graph
from wspace.io import load_checkpoint, save_checkpoint

NOTE = "wspace-layout"


def convert(args: argparse.Namespace, out: Console) -> int:
    """Converts `args.src` to `args.dst`, in the direction that the source asks for."""
    source, target = Path(args.src), Path(args.dst)
    if not target.parent.is_dir():
        raise WSpaceError(message(f"convert: there is no folder {target.parent}", help="create it"))
    if target.exists() and source.exists() and target.samefile(source):
        raise WSpaceError(message(f"convert: {target} is the source", help="name another file"))
    if is_graph(source):
        if args.format == "pyg":
            graph = load_graph(source)
            _write_pyg(out, graph, target, check=args.check)
        else:
            _write_checkpoint(out, source, target, check=args.check)
        return 0
    subject = open_subject(
        args.src, model=args.model, key=args.key, inputs=args.inputs, seed=args.seed
    )
    graph = _graph(subject, args.src)
    if bad := subject.nonfinite:
        out.print(screen.nonfinite_text(bad), soft_wrap=True)
    if args.format == "pyg":
        _write_pyg(out, graph, target, check=args.check)
    else:
        _write_graph(out, subject, graph, target, check=args.check)
    return 0


def _graph(subject: Subject, source: str) -> ParameterGraph:
    if subject.space is None:
        raise WSpaceError(
            message(
                f"convert: {source} comes without code, so its graph is not known",
                got=subject.note,
                help="name the code with --model",
            )
        )
    state = subject.state
    if subject.weights is None and is_reference(source) and subject.module is not None:
        state = {k: t.detach() for k, t in subject.module.state_dict().items()}
    return encode(subject.space, state)


def _write_graph(
    out: Console, subject: Subject, graph: ParameterGraph, target: Path, *, check: bool
) -> None:
    if target.suffix != ".safetensors":
        raise WSpaceError(
            message(
                f"convert: {target} does not end in .safetensors",
                expected="a name such as model.graph.safetensors",
                help="a graph file is a safetensors file with the space in its header",
            )
        )
    dropped: list[str] = []
    with _staged(target) as staging, screen.working(f"writing {target}"):
        save_graph(graph, staging)
        if subject.weights is not None:
            note, dropped = packed(subject.weights.layout)
            add_notes(staging, {NOTE: note})
        if check:
            _compare(decode(graph), decode(load_graph(staging)), target)
    _said(out, target, graph, check=check)
    for item in dropped:
        out.print(Text(f"  not kept: {item}", "yellow"), soft_wrap=True)


def _write_checkpoint(out: Console, source: Path, target: Path, *, check: bool) -> None:
    graph = load_graph(source)
    state = decode(graph)
    note = notes_of(source).get(NOTE)
    with tempfile.TemporaryDirectory() as folder, screen.working(f"writing {target}"):
        like = unpacked(note, Path(folder)) if note else None
        if like is not None and not like.folder and target.suffix != like.file.suffix:
            like = None  # another format was asked for
        save_checkpoint(state, target, like=like)
    if check:
        implied = like.implied if like is not None else ()  # a tie that the files leave out
        written = {name: tensor for name, tensor in state.items() if name not in implied}
        _compare(written, load_checkpoint(target), target)
    _said(out, target, graph, check=check)
    if note and like is None:
        out.print(Text(f"  in the format that {target.suffix} says, not that of the original"))


def _write_pyg(out: Console, graph: ParameterGraph, target: Path, *, check: bool) -> None:
    from wspace.graph.interop import to_pyg

    if target.suffix != ".pt":
        raise WSpaceError(
            message(
                f"convert: {target} does not end in .pt", expected="a .pt file for --format pyg"
            )
        )
    data: dict[str, Any] = to_pyg(graph).to_dict()
    with _staged(target) as staging, screen.working(f"writing {target}"):
        torch.save(data, staging)
        if check:
            again = torch.load(staging, weights_only=True)
            _compare(_tensors(data), _tensors(again), target)
    _said(out, target, graph, check=check)
    out.print(Text("  read it with Data.from_dict(torch.load(path, weights_only=True))"))


def _tensors(data: Mapping[str, object]) -> dict[str, Tensor]:
    return {name: item for name, item in data.items() if isinstance(item, Tensor)}


@contextmanager
def _staged(target: Path) -> Generator[Path]:
    """A file beside the target that takes its place if all goes well, and is gone if not."""
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield folder / target.name
        (folder / target.name).replace(target)
    finally:
        shutil.rmtree(folder)


def _compare(before: Mapping[str, Tensor], after: Mapping[str, Tensor], target: Path) -> None:
    bad = [f"{name} is missing" for name in before.keys() - after.keys()]
    bad += [f"{name} is new" for name in after.keys() - before.keys()]
    bad += [f"{k} differs" for k in before.keys() & after.keys() if not _same(before[k], after[k])]
    if bad:
        raise WSpaceError(
            message(f"convert: {target} does not read back as it was written", got=sorted(bad))
        )


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits: NaN equals itself, and -0 differs from 0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(*(t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))


def _said(out: Console, target: Path, graph: ParameterGraph, *, check: bool) -> None:
    files = [f for f in target.rglob("*") if f.is_file()] if target.is_dir() else [target]
    number = sum(f.stat().st_size for f in files)
    out.print(Text(f"wrote {target}", "bold").append(f" ({screen.size(number)})"), soft_wrap=True)
    out.print(Text(f"  {graph!r}"), soft_wrap=True)
    if check:
        out.print(Text("  read again: equal bit for bit", "green"))
