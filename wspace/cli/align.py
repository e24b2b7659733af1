"""`wspace align`: a network moved onto another, its function unchanged.

The matching reads the checkpoints from their files, and the result is computed while it is written,
tensor by tensor.
"""

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from wspace.action import moved
from wspace.align import Matching
from wspace.cli import screen
from wspace.cli.fits import fits_of, summed
from wspace.cli.matching import check_finite, check_kinds, check_options, matched, matching_options
from wspace.cli.networks import Networks, change_of_function, open_networks
from wspace.cli.target import check_target, layout_at, refuse_inputs
from wspace.io import LazyState, save_checkpoint
from wspace.testing import TOLERANCE

NOTE = "wspace-align"
"""Entry of the file's metadata that says how it was made."""
LARGE = 10**9
"""Bytes of weights above which the function is not run unless asked for: it needs several times as
much memory."""
EXACT = ("permutation", "sign")


def align_options(it: argparse.ArgumentParser) -> None:
    """Adds the options of ``wspace align``, other than those of the network's code."""
    it.add_argument("a", metavar="A", help="checkpoint to align to")
    it.add_argument("b", metavar="B", help="checkpoint that is moved")
    it.add_argument(
        "--out",
        metavar="FILE",
        help="B aligned to A: a .safetensors file, or a new folder if B is one",
    )
    it.add_argument(
        "--check",
        action=argparse.BooleanOptionalAction,
        help=f"run B before and after (the default up to {screen.size(LARGE)} of weights)",
    )
    matching_options(it)


def align(args: argparse.Namespace, out: Console) -> int:
    """Brings `args.b` to `args.a`; 0 if it keeps its function, 1 if it does not."""
    paths = (Path(args.a), Path(args.b))
    check_options("align", args)
    if args.out:
        target = Path(args.out)
        such = f"{paths[1].stem}_aligned.safetensors"
        check_target("align", target, paths[1], force=args.force, such=such)
        refuse_inputs("align", target, paths)
    found = open_networks(
        "align", (args.a, args.b), model=args.model, key=args.key, inputs=args.inputs
    )
    a, b = found.states
    check_kinds("align", found, args)
    check_finite("align", dict(zip(paths, found.states, strict=True)))
    start = time.perf_counter()
    matching = matched(a, b, found.space, args, what=f"{args.b} to {args.a}")
    seconds = time.perf_counter() - start
    aligned = LazyState(b, lambda name: moved(matching, name, b, found.space))
    data = _plain(found, matching, args) | {"seconds": seconds}
    with screen.working("comparing"):
        fits = {"before": fits_of(found.space, a, b), "after": fits_of(found.space, a, aligned)}
        data |= summed(found.space, matching, fits)
    data["check"] = _checked(found, aligned, args)
    held = data["check"]["ok"] is not False
    if args.out and held:
        with screen.working(f"writing {args.out}"):
            note = {key: data[key] for key in ("a", "b", "kinds", "objective")}
            layout = layout_at(Path(args.out), b, {NOTE: note})
            save_checkpoint(aligned, args.out, like=layout)
    if args.json != "-":
        _show(out, found, data, everything=args.all)
        if args.out and held:
            out.print(Text(f"wrote {args.out}", "bold"), soft_wrap=True)
    if args.json:
        screen.write_json(out, args.json, data)
    return 0 if held else 1


# ------------------------------------------------------------------------- figures


def _plain(found: Networks, matching: Matching, args: argparse.Namespace) -> dict[str, Any]:
    return {
        "a": str(found.paths[0]),
        "b": str(found.paths[1]),
        "out": args.out,
        "network": found.code,
        "kinds": list(args.kinds),
        "objective": float(matching.objective),
        "start_objective": float(matching.start_objective),
        "sweeps": int(matching.sweeps),
        "converged": bool(matching.converged),
    }


def _checked(found: Networks, aligned: LazyState, args: argparse.Namespace) -> dict[str, Any]:
    """Whether B computes what it did; None if that was not run."""
    check = found.size <= LARGE if args.check is None else args.check
    if not check:
        why = "--no-check" if args.check is False else f"{screen.size(found.size)} of weights"
        return {"ok": None, "why": why}
    exact = set(args.kinds) <= set(EXACT)
    dtypes = [x.dtype for x in aligned.outline.values() if x.is_floating_point()]
    rounding = max((TOLERANCE.get(dtype, 0.0) for dtype in dtypes), default=0.0)
    allowed = TOLERANCE[torch.float64] if exact else rounding  # factors round the weights
    with screen.working("running the network"):
        change = change_of_function(found.build(), found.states[1], aligned)
    return {"ok": change <= allowed, "change": change, "allowed": allowed}


# ------------------------------------------------------------------------- showing


def _show(out: Console, found: Networks, data: dict[str, Any], *, everything: bool) -> None:
    before, after = data["before"], data["after"]
    search = screen.plural(data["sweeps"], "sweep")
    search += ", converged" if data["converged"] else ", not converged: --sweeps allows more"
    screen.facts(
        out,
        f"{data['b']} → {data['a']}",
        [
            ("network", found.code),
            ("space", found.summary),
            ("moved by", ", ".join(data["kinds"])),
            ("search", f"{search}, {data['seconds']:.2f} s"),
            ("objective", f"{before['objective']:.5g} → {after['objective']:.5g}, "
             f"cosine {_number(before['cosine'])} → {_number(after['cosine'])}"),
            ("distance", f"{before['distance']:.5g} → {after['distance']:.5g}; "
             f"A has norm {before['size']:.5g}"),
            ("function", _verdict(data["check"])),
        ],
    )  # fmt: skip
    out.print()
    rows = [
        [
            Text(row["name"], "cyan"),
            f"{row['size']:,}",
            f"each {'*'.join(row['own_for'])}" if row["own_for"] else "",
            str(row["tensors"]),
            f"{100 * row['moved']:.0f}%",
            _said(row["factors"]),
            f"{row['before']['objective']:.4g}",
            f"{row['after']['objective']:.4g}",
            f"{row['before']['distance']:.4g}",
            f"{row['after']['distance']:.4g}",
        ]
        for row in data["groups"]
    ]
    columns = ["group", ">size", "own for", ">tensors", ">moved", "factors"]
    columns += [">objective", ">aligned", ">distance", ">aligned"]
    screen.table(out, columns, rows, everything=everything)


def _verdict(check: Mapping[str, Any]) -> Text:
    if check["ok"] is None:
        return Text(f"not run ({check['why']}); --check does", "yellow")
    change = f"largest relative change of an output {check['change']:.1e}, in float64"
    if check["ok"]:
        return Text(f"unchanged: {change}", "green")
    return Text(f"CHANGED: {change}; nothing was written", "bold red")


def _said(factors: Mapping[str, Any]) -> str:
    words: list[str] = []
    if "scale" in factors:
        low, high = factors["scale"]
        words.append(f"×{low:.2g}–{high:.2g}")
    words += [f"{100 * factors['sign']:.0f}% flipped"] if "sign" in factors else []
    words += [f"{100 * factors['phase']:.0f}% shifted"] if "phase" in factors else []
    return ", ".join(words)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
