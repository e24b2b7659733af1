"""`wspace verify`: the proof on the real weights, group by group."""

import argparse
import math
import time
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from wspace import VerifyReport, WeightSpace
from wspace import verify as prove
from wspace.cli import screen
from wspace.cli.subject import open_subject
from wspace.errors import NotASymmetry, WSpaceError, message


def verify(args: argparse.Namespace, out: Console) -> int:
    """Proves the space of what `args.ref` names; 0 if it holds, 1 if it does not."""
    subject = open_subject(
        args.ref, model=args.model, key=args.key, inputs=args.inputs, seed=args.seed
    )
    if subject.module is None or subject.space is None:
        raise WSpaceError(
            message(
                f"verify: {args.ref} has no code, so there is no function to preserve",
                got=subject.note,
                help="name the code with --model",
            )
        )
    if bad := subject.nonfinite:
        raise WSpaceError(
            message(
                f"verify: {subject.name} has weights that are NaN or infinite",
                got=[f"{number:,} in {name}" for name, number in bad.items()],
                help="outputs that are NaN prove nothing; repair or retrain the network",
            )
        )
    generator = torch.Generator().manual_seed(args.seed)
    start = time.perf_counter()
    data: dict[str, Any] = {"name": subject.name, "seed": args.seed, "ok": False}
    try:
        with screen.working(f"verifying {subject.name}"):
            report = prove(
                subject.space, subject.module, subject.args, subject.kwargs, generator=generator
            )
    except NotASymmetry as error:
        if args.json != "-":
            screen.facts(out, subject.name, [("space", subject.space.summary())])
            out.print(Text(f"NOT PROVED  {error}", "bold red"), soft_wrap=True)
        data["message"] = str(error)
        code = 1
    else:
        seconds = time.perf_counter() - start
        data |= _plain(report, seconds)
        code = 0 if report.ok else 1
        if args.json != "-":
            _show(out, subject.space, report, everything=args.all)
            _conclude(out, subject.name, report, (subject.seconds, seconds))
    if args.json:
        screen.write_json(out, args.json, data)
    return code


def _show(out: Console, space: WeightSpace, report: VerifyReport, *, everything: bool) -> None:
    rows: list[list[str | Text]] = []
    for g in space.groups.values():
        gauges = [
            f"{kind} {report.errors[key]:.1e}"
            for kind in ("scale", "sign", "phase")
            if (key := f"{kind} {g.name}") in report.errors
        ]
        control = report.controls.get(g.name)
        rows.append(
            [
                Text(g.name, "cyan"),
                f"{g.size:,}",
                f"each {'*'.join(g.over)}" if g.over else "",
                screen.kinds_of(space, g),
                _error(report.errors.get(g.name, math.nan)),
                ", ".join(gauges),
                "" if control is None else _control(control),
            ]
        )
    everywhere = [_error(report.errors["*"]), "", ""] if "*" in report.errors else ["", "", ""]
    rows.append([Text("all at once", "cyan"), "", "", "", *everywhere])
    columns = ["group", ">size", "own for", "kinds", ">error", "gauges", ">control"]
    screen.table(out, columns, rows, everything=everything)


def _conclude(out: Console, name: str, report: VerifyReport, seconds: tuple[float, float]) -> None:
    verdict = Text("PROVED  ", "bold green") if report.ok else Text("NOT PROVED  ", "bold red")
    verdict.append(name, "bold")
    out.print(verdict, soft_wrap=True)
    groups = screen.plural(len(report.moved), "group")
    moved = (
        f"{groups} moved in float64; largest relative change of an output {report.max_error:.1e}"
        if report.moved
        else "no free group: nothing may be moved"
    )
    control = (
        f"permutations outside of the group change it by {report.control_error:.1e} or more"
        if math.isfinite(report.control_error)
        else ""
    )
    for line in (moved, control, f"traced in {seconds[0]:.2f} s, proved in {seconds[1]:.2f} s"):
        if line:
            out.print(Text(f"  {line}"), soft_wrap=True)


def _plain(report: VerifyReport, seconds: float) -> dict[str, Any]:
    def number(x: float) -> float | None:
        return x if math.isfinite(x) else None

    return {
        "ok": report.ok,
        "max_error": number(report.max_error),
        "control_error": number(report.control_error),
        "moved": list(report.moved),
        "errors": {k: number(v) for k, v in report.errors.items()},
        "controls": {k: number(v) for k, v in report.controls.items()},
        "seconds": seconds,
    }


def _error(value: float) -> Text:
    return Text("" if math.isnan(value) else f"{value:.1e}", "green")


def _control(value: float) -> Text:
    return Text(f"{value:.1e}", "" if value > 0 else "yellow")
