"""`wspace merge`: one network of several, in one frame, computed while it is written."""

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor

from wspace.action import Transform, identity, moved
from wspace.align import match_many
from wspace.align.combine import NEEDS_BASE, Method, Name, merged
from wspace.align.merge import merging
from wspace.cli import screen
from wspace.cli.fits import products, share_moved, summed_up
from wspace.cli.matching import check_finite, check_kinds, check_options, matched, matching_options
from wspace.cli.networks import Networks, open_networks
from wspace.cli.target import check_target, layout_at, refuse_inputs
from wspace.errors import WSpaceError, message
from wspace.io import Checkpoint, LazyState, save_checkpoint
from wspace.space import WeightSpace

NOTE = "wspace-merge"
"""Entry of the file's metadata that says how it was made."""
STATISTICS = ("running_mean", "running_var")
"""Last words of the names of buffers that BatchNorm estimates."""


def merge_options(it: argparse.ArgumentParser) -> None:
    """Adds the options of ``wspace merge``, other than those of the network's code."""
    it.add_argument("a", metavar="A", help="checkpoint; without a base, what others are aligned to")
    it.add_argument("others", metavar="B", nargs="+", help="further checkpoints")
    it.add_argument(
        "--out", metavar="FILE", required=True, help="a .safetensors file, or a folder as A is one"
    )
    it.add_argument("--method", choices=get_args(Name), default="average", help="%(default)s")
    it.add_argument("--base", metavar="FILE", help="common ancestor, for task and ties")
    it.add_argument("--weights", metavar="W", nargs="+", type=float, help="of A, B, …; else equal")
    it.add_argument("--density", type=float, help="share of each change that ties keeps (0.2)")
    it.add_argument("--scale", type=float, help="of the change that task and ties add (1)")
    it.add_argument("--no-align", dest="align", action="store_false", help="take them as they are")
    it.add_argument(
        "--many", action="store_true", help="align all to each other, not each to the first"
    )
    matching_options(it)


def merge(args: argparse.Namespace, out: Console) -> int:
    """Merges `args.a` and `args.others` and writes `args.out`."""
    names = [args.a, *args.others, *([args.base] if args.base else [])]
    paths, target = [Path(name) for name in names], Path(args.out)
    method = _method(args)
    check_target("merge", target, paths[0], force=args.force, such="merged.safetensors")
    refuse_inputs("merge", target, paths)
    found = open_networks("merge", names, model=args.model, key=args.key, inputs=args.inputs)
    states = found.states[: method.models]
    base = found.states[-1] if args.base else None
    if args.align:
        check_kinds("merge", found, args)
    check_finite("merge", dict(zip(paths, found.states, strict=True)))
    plan = merging(
        states, found.space, method=method.name, weights=args.weights, base=base, align=False
    )  # checks what the matching does not
    start = time.perf_counter()
    transforms = _transforms(found, states, base, args)
    seconds = time.perf_counter() - start
    made = Made(states, base, found.space, method, transforms)
    result = LazyState(states[0], made, ties=plan.ties)
    data = {
        "out": args.out,
        "networks": names[: method.models],
        "base": args.base,
        "method": method.name,
        "weights": list(method.shares),
        "aligned": args.align,
        "kinds": list(args.kinds) if args.align else [],
    }
    with screen.working(f"merging into {target}"):
        save_checkpoint(result, target, like=layout_at(target, states[0], {NOTE: data}))
    data |= {"network": found.code, "seconds": seconds, "fits": made.figures(names)}
    if args.json != "-":
        _show(out, found, data)
        out.print(Text(f"wrote {target}", "bold"), soft_wrap=True)
    if args.json:
        screen.write_json(out, args.json, data)
    return 0


class Made:
    """Makes the tensors of a merge, and keeps how far the networks are from it and each other."""

    def __init__(
        self,
        states: Sequence[Checkpoint],
        base: Checkpoint | None,
        space: WeightSpace,
        method: Method,
        transforms: Sequence[Transform],
    ) -> None:
        self.states, self.base, self.space, self.method = states, base, space, method
        self.transforms = transforms
        self._fits: dict[tuple[int, str], dict[str, Tensor]] = {}

    def __call__(self, name: str) -> Tensor:
        """The merged tensor of a name; what is not of floating point is the first network's."""
        raw = [state[name] for state in self.states]
        if not (raw[0].is_floating_point() or raw[0].is_complex()):
            return raw[0]
        some = [
            moved(t, name, x, self.space) for t, x in zip(self.transforms, self.states, strict=True)
        ]
        base = None if self.base is None else self.base[name]
        out = merged(some, self.method, base)
        param = self.space.by_name.get(name)
        if param is not None and not param.buffer and out.is_floating_point():
            for i, (before, after) in enumerate(zip(raw, some, strict=True)):
                before_to, after_to = (raw[0], some[0]) if base is None else (base, base)
                pairs = {"before": (before_to, before), "after": (after_to, after)}
                for when, (x, y) in (pairs | {"result": (out, after)}).items():
                    self._fits.setdefault((i, when), {})[param.name] = products(x, y)
        return out

    def figures(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Of each network: how much of it moved, its fit to the frame, and to the result."""
        return [
            {
                "name": names[i],
                "weight": self.method.shares[i],
                "moved": _moved(t, self.space),
                **{
                    when: asdict(summed_up(self._fits.get((i, when), {}).values()))
                    for when in ("before", "after", "result")
                },
            }
            for i, t in enumerate(self.transforms)
        ]


def _method(args: argparse.Namespace) -> Method:
    """The method with its options; one that it does not have is an error."""
    needs = args.method in NEEDS_BASE
    wrong = [f"--base, which is for {' and '.join(NEEDS_BASE)}"] if args.base and not needs else []
    wrong += ["no --base"] if needs and not args.base else []
    wrong += ["--density, which is for ties"] if args.density and args.method != "ties" else []
    wrong += ["--scale, which is for task and ties"] if args.scale is not None and not needs else []
    wrong += ["--many with --base"] if args.many and args.base else []
    wrong += ["--many with --no-align"] if args.many and not args.align else []
    if wrong:
        raise WSpaceError(message(f"merge: options that do not fit {args.method}", got=wrong))
    check_options("merge", args)
    return Method(
        args.method,
        1 + len(args.others),
        None if args.weights is None else tuple(args.weights),
        density=0.2 if args.density is None else args.density,
        scale=1.0 if args.scale is None else args.scale,
    )


def _transforms(
    found: Networks,
    states: Sequence[Checkpoint],
    base: Checkpoint | None,
    args: argparse.Namespace,
) -> list[Transform]:
    """What brings each network into the frame: of the base, of the first, or of nobody."""
    space, stays = found.space, identity(found.space)
    if not args.align:
        return [stays] * len(states)
    if args.many:
        generator = torch.Generator().manual_seed(args.seed)
        with screen.working("matching all"):
            return list(match_many(states, space, kinds=tuple(args.kinds), generator=generator))
    frame, rest = (states[0], states[1:]) if base is None else (base, states)
    first = [stays] if base is None else []
    names = [args.base, args.a, *args.others] if args.base else [args.a, *args.others]
    return first + [
        matched(frame, state, space, args, what=f"{name} to {names[0]}")
        for name, state in zip(names[1:], rest, strict=True)
    ]


def _moved(transform: Transform, space: WeightSpace) -> float:
    """Share of all units that change their place."""
    sizes = {name: group.size for name, group in space.groups.items()}
    total = sum(sizes[name] * share_moved(transform, name) for name in sizes)
    return total / max(sum(sizes.values()), 1)


# ------------------------------------------------------------------------- showing


def _show(out: Console, found: Networks, data: dict[str, Any]) -> None:
    frame = data["base"] or data["networks"][0]
    aligned = f"by {', '.join(data['kinds'])}, in {data['seconds']:.2f} s"
    statistics = [p for p in found.space.params if p.name.endswith(STATISTICS)]
    warning = "those of BatchNorm are averaged: estimate them anew before you use the network"
    screen.facts(
        out,
        data["out"],
        [
            ("network", found.code),
            ("space", found.summary),
            ("method", data["method"]),
            ("base", data["base"] or ""),
            ("aligned", aligned if data["aligned"] else Text("no", "yellow")),
            ("statistics", Text(warning, "yellow") if statistics else ""),
        ],
    )
    out.print()
    rows = [
        [
            Text(fits["name"]),
            f"{fits['weight']:g}",
            f"{100 * fits['moved']:.0f}%",
            f"{fits['before']['distance']:.5g}",
            f"{fits['after']['distance']:.5g}",
            f"{fits['result']['distance']:.5g}",
        ]
        for fits in data["fits"]
    ]
    columns = ["checkpoint", ">weight", ">moved", f">from {Path(frame).name}", ">aligned"]
    screen.table(out, [*columns, ">from the result"], rows, everything=True)
