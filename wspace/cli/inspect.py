"""`wspace inspect`: a network or a checkpoint, with its symmetry, on one screen."""

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from wspace.cli import screen
from wspace.cli.subject import Subject, open_subject
from wspace.errors import WSpaceError, message
from wspace.graph import encode
from wspace.io import Checkpoint

PICTURES = (".png", ".svg", ".pdf", ".html")


NOTE = 160
"""Characters of an entry of a file's metadata that are shown."""


def inspect(args: argparse.Namespace, out: Console) -> int:
    """Shows what `args.ref` names, and writes the picture and the JSON that were asked for."""
    subject = open_subject(
        args.ref, model=args.model, key=args.key, inputs=args.inputs, meta=args.meta, seed=args.seed
    )
    if args.plot:
        _check_plot(subject, Path(args.plot))
    if args.json != "-":
        if subject.space is None:
            _show_weights(out, subject, everything=args.all)
        else:
            _show_space(out, subject, args)
    if args.plot:
        _plot(screen.console(stderr=True) if args.json == "-" else out, subject, Path(args.plot))
    if args.json:
        screen.write_json(out, args.json, summary(subject))
    return 0


def summary(subject: Subject) -> dict[str, Any]:
    """All that is known of a subject, as plain data for JSON."""
    space, state = subject.space, subject.state
    data: dict[str, Any] = {
        "name": subject.name,
        "elements": sum(t.numel() for t in state.values()),
        "nonfinite": subject.nonfinite,
        "tensors": [
            {"name": name, "shape": list(t.shape), "dtype": _dtype(t)} for name, t in state.items()
        ],
        "space": None,
    }
    if subject.note:
        data["note"] = subject.note
    if space is not None:
        total = sum(p.numel for p in space.params if not p.buffer)
        data |= {
            "elements": total,
            "coverage": space.coverage,
            "capture": space.capture,
            "seconds": subject.seconds,
            "groups": [
                {
                    "name": g.name,
                    "size": g.size,
                    "kinds": screen.kinds_of(space, g).split(", "),
                    "own_for": list(g.over),
                    "tensors": screen.elements_moved(space, g.name)[0],
                    "elements": screen.elements_moved(space, g.name)[1],
                }
                for g in space.groups.values()
            ],
            "opaque": [{"op": o.op, "source": o.source} for o in space.opaque],
            "space": json.loads(space.to_json()),
        }
    return data


def _show_space(out: Console, subject: Subject, args: argparse.Namespace) -> None:
    space = subject.space
    assert space is not None
    params = [p for p in space.params if not p.buffer]
    buffers = len(space.params) - len(params)
    moved = sum(not p.fixed or p.at is not None for p in params)
    dtypes = ", ".join(dict.fromkeys(p.dtype for p in space.params))
    tied = sum(len(p.ties) for p in space.params)
    what = f"{screen.count(sum(p.numel for p in params))} in {screen.plural(len(params), 'tensor')}"
    frozen = [f"{o.op}{f' at {o.source}' if o.source else ''}" for o in space.opaque]
    rows: list[tuple[str, str | Text]] = [
        ("parameters", f"{what}, {dtypes}"),
        ("tied", f"{screen.plural(tied, 'name')} for a tensor that has another" if tied else ""),
        ("buffers", str(buffers) if buffers else ""),
        ("groups", f"{len(space.groups)}; they move {moved} of {len(params)} tensors"),
        ("coverage", f"{100 * space.coverage:.2f}% of the elements"),
        ("frozen by", Text("\n".join(frozen), "yellow")),
        ("captured", "without reading a weight" if space.capture == "abstract" else
         "on the real weights: their values decide what is run"),
        ("traced in", f"{subject.seconds:.2f} s"),
        ("non-finite", screen.nonfinite_text(subject.nonfinite)),
        ("network", subject.note),
        *_files(subject.weights),
    ]  # fmt: skip
    screen.facts(out, subject.name, rows)
    out.print()
    if args.groups:
        screen.by_group(out, space, everything=args.all)
        return
    if space.groups:
        screen.groups_table(out, space, everything=args.all)
    screen.params_table(out, space, everything=args.all)
    out.print(Text("! fixed   * row-major product   + concatenation", "dim"))


def _show_weights(out: Console, subject: Subject, *, everything: bool) -> None:
    weights = subject.weights
    assert weights is not None
    elements = sum(t.numel() for t in weights.values())
    dtypes = ", ".join(dict.fromkeys(_dtype(t) for t in weights.values()))
    size = sum(t.numel() * t.element_size() for t in weights.values())
    nonfinite = subject.nonfinite
    what = f"{screen.count(elements)} elements in {screen.plural(len(weights), 'tensor')}, {dtypes}"
    rows: list[tuple[str, str | Text]] = [
        ("weights", f"{what}, {screen.size(size)}"),
        ("non-finite", screen.nonfinite_text(nonfinite)),
        ("space", Text(f"none, without code: {_first_line(subject.note)}", "yellow")),
        ("code", "--model hf:<config.json> or --model py:<file.py>:<factory> names it"),
        *_files(weights),
    ]
    screen.facts(out, subject.name, rows)
    out.print()
    ties = {name: group for group in weights.layout.ties for name in group}
    table = [
        [
            screen.fold(name, 36 if out.width < 100 else 10**4),
            " × ".join(map(str, t.shape)) or "scalar",
            _dtype(t),
            screen.count(t.numel()),
            ", ".join(f"= {other}" for other in ties.get(name, ()) if other != name),
            Text(f"{nonfinite[name]:,} non-finite" if name in nonfinite else "", "bold red"),
        ]
        for name, t in weights.items()
    ]
    columns = ["tensor", "shape", "dtype", ">elements", "tied", "values"]
    screen.table(out, columns, table, everything=everything)


def _files(weights: Checkpoint | None) -> list[tuple[str, str | Text]]:
    if weights is None:
        return []
    layout = weights.layout
    notes = {k: v for data in layout.metadata.values() for k, v in data.items()}
    plain = [
        f"{k}: {v if len(v) <= NOTE else v[:NOTE] + ' …'}"
        for k, v in notes.items()
        if isinstance(v, str)
    ]
    number = len(set(layout.shards.values())) or 1
    return [
        ("files", f"{layout.kind}, {screen.plural(number, 'file')}"),
        ("inside of", " → ".join(layout.nesting)),
        ("left out", ", ".join(layout.left_out)),
        ("metadata", ", ".join(plain[:6]) if layout.kind == "safetensors" else ""),
    ]


def _check_plot(subject: Subject, path: Path) -> None:
    if path.suffix not in PICTURES:
        raise WSpaceError(
            message(f"--plot: {path} names no format", expected=f"one of {', '.join(PICTURES)}")
        )
    if subject.space is None:
        raise WSpaceError(
            message(
                "--plot: there is no graph without code",
                got=subject.note,
                help="name it with --model",
            )
        )


def _plot(out: Console, subject: Subject, path: Path) -> None:
    from wspace.report import plot_graph

    assert subject.space is not None
    with screen.working(f"drawing {path}"):
        meta = any(t.is_meta for t in subject.state.values())
        graph = subject.space if meta else encode(subject.space, subject.state)
        plot_graph(graph, path, title=subject.name)
    out.print(Text(f"wrote {path}"), soft_wrap=True)


def _first_line(text: str) -> str:
    return text.partition("\n")[0].partition(": ")[2] or text


def _dtype(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")
