"""`wspace interpolate`: networks on the line from one to another, aligned first; losses there."""

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor

from wspace.action import Transform, moved
from wspace.align import Barrier, barrier
from wspace.align.combine import Kind, interpolated
from wspace.align.merge import combines, interpolating
from wspace.cli import screen
from wspace.cli.matching import check_finite, check_kinds, check_options, matched, matching_options
from wspace.cli.networks import Networks, open_networks, set_state
from wspace.cli.target import check_file, refuse_inputs, single_file
from wspace.errors import WSpaceError, message
from wspace.io import LazyState, save_checkpoint
from wspace.reference import load_function

NOTE = "wspace-interpolate"
"""Entry of the file's metadata that says how it was made."""
POINTS = 11
PICTURES = (".png", ".svg", ".pdf")


def interpolate_options(it: argparse.ArgumentParser) -> None:
    """Adds the options of ``wspace interpolate``, other than those of the network's code."""
    it.add_argument("a", metavar="A", help="checkpoint at 0")
    it.add_argument("b", metavar="B", help="checkpoint at 1, aligned to A first")
    it.add_argument("--t", type=float, help="where: 0.5 is half way")
    it.add_argument("--points", metavar="N", type=int, help="or N points, evenly from A to B")
    it.add_argument("--out", metavar="PATH", help="a .safetensors file; with --points a folder")
    it.add_argument(
        "--loss",
        metavar="REF",
        help="py:<file.py>:<function> that takes the network and returns its loss, or several "
        f"numbers by name: measured at {POINTS} or --points, with alignment and without",
    )
    it.add_argument(
        "--refresh",
        metavar="REF",
        help="py:<file.py>:<function> that returns batches, with which BatchNorm's statistics are "
        "estimated before each loss",
    )
    it.add_argument("--plot", metavar="FILE", help="draw the losses: .png, .svg or .pdf")
    it.add_argument(
        "--kind",
        choices=("linear", "spherical"),
        default="linear",
        help="along a line, or along an arc for each tensor (%(default)s)",
    )
    it.add_argument("--no-align", dest="align", action="store_false", help="take B as it is")
    matching_options(it)


def interpolate(args: argparse.Namespace, out: Console) -> int:
    """Writes networks between `args.a` and `args.b`, and measures the loss there."""
    check_options("interpolate", args)
    targets = _targets(args)
    loss, refresh = _functions(args)
    names = (args.a, args.b)
    found = open_networks("interpolate", names, model=args.model, key=args.key, inputs=args.inputs)
    for target in targets.values():
        refuse_inputs("interpolate", target, found.paths)
    if args.align:
        check_kinds("interpolate", found, args)
    check_finite("interpolate", dict(zip(found.paths, found.states, strict=True)))
    a, b = found.states
    plan = interpolating(a, b, 0.5, kind=args.kind)  # checks what the matching does not
    start = time.perf_counter()
    transform = None
    if args.align:
        transform = matched(a, b, found.space, args, what=f"{args.b} to {args.a}")
    data: dict[str, Any] = {
        "a": args.a,
        "b": args.b,
        "network": found.code,
        "kind": args.kind,
        "kinds": list(args.kinds) if args.align else [],
        "seconds": time.perf_counter() - start,
        "files": [{"t": t, "path": str(target)} for t, target in targets.items()],
    }
    for t, target in targets.items():
        target.parent.mkdir(exist_ok=True)
        note = {key: data[key] for key in ("a", "b", "kind", "kinds")} | {"t": t}
        state = LazyState(a, _between(found, transform, t, args.kind), ties=plan.ties)
        with screen.working(f"writing {target}"):
            save_checkpoint(state, target, like=single_file(a, target, {NOTE: note}))
    if loss is not None:
        measured = _measured(found, transform, args, (loss, refresh))
        data |= _numbers(measured)
        _plot(measured, args)
    if args.json != "-":
        _show(out, found, data, everything=args.all)
        wrote = [f"{file['path']} (t = {file['t']:g})" for file in data["files"]]
        for text in [*wrote, *([args.plot] if args.plot else [])]:
            out.print(Text(f"wrote {text}", "bold"), soft_wrap=True)
    if args.json:
        screen.write_json(out, args.json, data)
    return 0


# ---------------------------------------------------------------------- what to do


def _targets(args: argparse.Namespace) -> dict[float, Path]:
    """Files to write, by where on the line they are."""
    if args.points is not None and args.points < 2:
        got = str(args.points)
        raise WSpaceError(message("interpolate: a line has two points or more", got=got))
    if not args.out and not args.loss:
        help = "--out names a file, --loss a function"
        raise WSpaceError(message("interpolate: nothing is asked for", help=help))
    if not args.out:
        return {}
    if (args.t is None) == (args.points is None):
        expected = "--t 0.5 for one point, or --points 11 for a row of them"
        raise WSpaceError(message("interpolate: where?", expected=expected))
    path = Path(args.out)
    if args.points is None:
        check_file("interpolate", path, force=args.force, such="half.safetensors")
        return {args.t: path}
    if path.suffix == ".safetensors" or (path.exists() and not path.is_dir()):
        help = "--points writes one file each"
        raise WSpaceError(message(f"interpolate: {path} is no folder", help=help))
    if not path.parent.is_dir():
        raise WSpaceError(message(f"interpolate: there is no folder {path.parent}"))
    places = torch.linspace(0, 1, args.points, dtype=torch.float64).tolist()
    digits = max(2, len(str(args.points - 1)))
    targets = {t: path / f"t{t:.{digits}f}.safetensors" for t in places}
    if path.exists():
        for target in targets.values():
            check_file("interpolate", target, force=args.force, such="half.safetensors")
    return targets


Functions = tuple[Callable[..., Any] | None, Callable[..., Any] | None]


def _functions(args: argparse.Namespace) -> Functions:
    """The loss and the batches, if they are named."""
    alone = [f"--{name}" for name in ("refresh", "plot") if getattr(args, name) and not args.loss]
    if alone:
        expected = "--loss py:<file.py>:<function>"
        raise WSpaceError(message("interpolate: no loss", expected=expected, got=alone))
    if args.plot and Path(args.plot).suffix not in PICTURES:
        expected = f"one of {', '.join(PICTURES)}"
        raise WSpaceError(message(f"--plot: {args.plot} names no format", expected=expected))
    if args.loss and args.t is not None and args.points is not None:
        raise WSpaceError(message("interpolate: where?", got="--t and --points"))
    loss, refresh = (load_function(ref) if ref else None for ref in (args.loss, args.refresh))
    return loss, refresh


def _between(
    found: Networks, transform: Transform | None, t: float, kind: Kind
) -> Callable[[str], Tensor]:
    """What computes the tensors of a network on the line."""
    (a, b), space = found.states, found.space

    def compute(name: str) -> Tensor:
        x = a[name]
        if not combines(x):
            return x
        y = b[name] if transform is None else moved(transform, name, b, space)
        return interpolated(x, y, t, kind=kind)

    return compute


def _measured(
    found: Networks, transform: Transform | None, args: argparse.Namespace, functions: Functions
) -> Barrier:
    """Losses along the line, and along that to the aligned network."""
    (a, b), runnable = found.states, found.build()
    set_state(runnable.module, a)
    loss, refresh = functions
    assert loss is not None
    with screen.working("measuring losses"):
        return barrier(
            runnable.module,
            a,
            b,
            loss,
            transform=transform,
            points=args.points or POINTS,
            refresh=refresh,
            kind=args.kind,
        )


def _numbers(measured: Barrier) -> dict[str, Any]:
    paths = {"straight": measured.straight, "aligned": measured.aligned}
    return {
        "points": measured.points.tolist(),
        "paths": {
            name: {
                "metrics": {key: values.tolist() for key, values in path.metrics.items()},
                "heights": dict(path.heights),
                "depths": dict(path.depths),
            }
            for name, path in paths.items()
            if path is not None
        },
    }


def _plot(measured: Barrier, args: argparse.Namespace) -> None:
    if args.plot:
        from wspace.report import plot_losses

        with screen.working(f"drawing {args.plot}"):
            plot_losses(measured, args.plot, ends=(args.a, args.b))


# ------------------------------------------------------------------------- showing


def _show(out: Console, found: Networks, data: Mapping[str, Any], *, everything: bool) -> None:
    aligned = f"by {', '.join(data['kinds'])}, in {data['seconds']:.2f} s"
    rows: list[tuple[str, str | Text]] = [
        ("network", found.code),
        ("space", found.summary),
        ("along", "a line" if data["kind"] == "linear" else "an arc for each tensor"),
        ("aligned", aligned if data["kinds"] else Text("no", "yellow")),
    ]
    paths: Mapping[str, Any] = data.get("paths", {})
    for metric in paths["straight"]["metrics"] if paths else ():
        heights = [
            f"{name} {path['heights'][metric]:.4g} above and {path['depths'][metric]:.4g} below"
            for name, path in paths.items()
        ]
        rows.append((metric, f"{'; '.join(heights)} the line between its ends"))
    screen.facts(out, f"{data['a']} … {data['b']}", rows)
    out.print()
    if paths:
        _show_losses(out, data, paths, everything=everything)


def _show_losses(
    out: Console, data: Mapping[str, Any], paths: Mapping[str, Any], *, everything: bool
) -> None:
    several = len(paths["straight"]["metrics"]) > 1
    values = {
        f">{name} {metric}" if several else f">{name}": numbers
        for name, path in paths.items()
        for metric, numbers in path["metrics"].items()
    }
    rows = [
        [f"{t:.3g}", *(f"{numbers[i]:.4g}" for numbers in values.values())]
        for i, t in enumerate(data["points"])
    ]
    screen.table(out, [">t", *values], rows, everything=everything)
