"""`wspace nowcast`: from the last checkpoints of a run, the one that a predictor expects later.

Nothing is trained or run: weights in, weights out. Whether the result is better than the last
checkpoint is for an evaluation to say.
"""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor, nn

from wspace.cli import screen
from wspace.cli.series import NOTE, Series, find_series, read_series
from wspace.cli.subject import Subject, open_subject
from wspace.cli.target import check_file, refuse_inputs, single_file
from wspace.errors import CheckpointError, WSpaceError, message
from wspace.io import Checkpoint, fit_checkpoint, save_checkpoint
from wspace.io.layout import TORCH_SUFFIXES
from wspace.nowcast import SHIPPED, Average, LinearFit, Predictor, load, load_published
from wspace.nowcast.forecast import predictable
from wspace.nowcast.predictor import TOPOLOGIES, pieces, ties_of

BUILT_IN = ("linear", "average")
CONTEXT = 5
"""Checkpoints that a built-in predictor takes out of a folder."""
STATISTICS = ("running_mean", "running_var")
"""Last words of the names of floating-point buffers that training changes."""


@dataclass(frozen=True)
class Nowcast:
    """What was predicted.

    Attributes:
        series: From what, under the names of the network's code if that is known.
        predictor: By what.
        horizon: How far, in spacings.
        state: The new state, all tensors.
        names: Tensors that were predicted, ties once.
        wiring: What the predictor knew of the network, beyond names and shapes.
        left: Tensors that are those of the last checkpoint, and why.
    """

    series: Series
    predictor: Predictor
    horizon: int
    state: dict[str, Tensor]
    names: tuple[str, ...]
    wiring: str
    left: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def step(self) -> int | None:
        """Step that the prediction is for, if the steps are known and equally far apart."""
        steps, spacing = self.series.steps, self.series.spacing
        return None if steps is None or spacing is None else steps[-1] + self.horizon * spacing


def nowcast_options(it: argparse.ArgumentParser) -> None:
    """Adds the options of ``wspace nowcast``, other than those of a checkpoint's code."""
    shipped = "".join(f"{name}, " for name in SHIPPED)
    it.add_argument(
        "checkpoints",
        metavar="CHECKPOINT",
        nargs="+",
        help="the last ones of a run, oldest first; or its folder, or a pattern in quotes",
    )
    it.add_argument("--out", metavar="FILE", required=True, help="the .safetensors file to write")
    it.add_argument(
        "--predictor",
        metavar="NAME",
        default="linear",
        help=f"{', '.join(BUILT_IN)}, {shipped}or a file: trained here (.safetensors) or "
        "published (.pt) (%(default)s)",
    )
    it.add_argument(
        "--horizon",
        metavar="K",
        type=int,
        help="how far to go, in spacings of the checkpoints; all predictors but average need it",
    )
    it.add_argument(
        "--context", metavar="N", type=int, help="how many checkpoints a built-in predictor sees"
    )
    it.add_argument(
        "--topology",
        choices=TOPOLOGIES,
        default="traced",
        help="wiring as the network computes, or as published code has it (%(default)s)",
    )
    it.add_argument("--allow-uneven", action="store_true", help="steps may be unequally far apart")
    it.add_argument("--force", action="store_true", help="replace the file if it is there")
    it.add_argument("--all", action="store_true", help="show all rows of long tables")
    it.add_argument("--json", metavar="FILE", help="write the findings as JSON; - for stdout")


def nowcast(args: argparse.Namespace, out: Console) -> int:
    """Predicts from `args.checkpoints` and writes `args.out`."""
    target = Path(args.out)
    check_file("nowcast", target, force=args.force, such="ahead.safetensors")
    predictor = _predictor(args)
    listed = find_series(args.checkpoints, predictor.context)
    horizon = _horizon(args, predictor)
    series = read_series(listed, key=args.key, uneven=args.allow_uneven)
    refuse_inputs("nowcast", target, series.paths)
    found = _predicted(args, series, predictor, horizon)
    with screen.working(f"writing {target}"):
        like = single_file(found.series.states[-1], target, {NOTE: _note(found)})
        save_checkpoint(found.state, target, like=like)
    data = _plain(found, target)
    if args.json != "-":
        _show(out, found, data, everything=args.all)
        size = screen.size(target.stat().st_size)
        out.print(Text(f"wrote {target}", "bold").append(f" ({size})"), soft_wrap=True)
    if args.json:
        screen.write_json(out, args.json, data)
    return 0


# ---------------------------------------------------------------------- what to do


def _predictor(args: argparse.Namespace) -> Predictor:
    name = args.predictor
    if name not in BUILT_IN:
        if args.context is not None:
            raise WSpaceError(
                message(
                    "nowcast: --context is for built-in predictors",
                    got=f"--predictor {name}, which was made for a number of its own",
                )
            )
        if name not in SHIPPED and not Path(name).is_file():
            published = name.endswith(TORCH_SUFFIXES)
            raise WSpaceError(
                message(
                    f"nowcast: there is no predictor {name!r}",
                    expected=f"{', '.join((*BUILT_IN, *SHIPPED))}, or a file",
                    help="nothing is downloaded: published predictors are files of "
                    "github.com/SamsungSAILMontreal/nino, to be fetched by you"
                    if published
                    else "",
                )
            )
        return load_published(name) if name.endswith(TORCH_SUFFIXES) else load(name)
    words = args.checkpoints
    given = len(words) if len(words) > 1 else CONTEXT
    context = given if args.context is None else args.context
    least = 2 if name == "linear" else 1
    if context < least:
        raise WSpaceError(
            message(f"nowcast: {name} needs {least} checkpoints or more", got=f"{context}")
        )
    if name == "average":
        return Average(context=context)
    return LinearFit(context=context, longest=max(40, args.horizon or 0))


def _horizon(args: argparse.Namespace, predictor: Predictor) -> int:
    """Number of spacings; an average is the same for all of them."""
    if isinstance(predictor, Average):
        return 0 if args.horizon == 0 else 1
    if args.horizon is None or not 0 <= args.horizon <= predictor.longest:
        most = "" if isinstance(predictor, LinearFit) else f", at most {predictor.longest}"
        got = "none" if args.horizon is None else str(args.horizon)
        expected = f"--horizon K: how many spacings of the checkpoints to go{most}"
        help = "" if args.horizon else "only --predictor average does without"
        raise WSpaceError(message("nowcast: how far?", expected=expected, got=got, help=help))
    return args.horizon


# ---------------------------------------------------------------------- prediction


class _Tensors(nn.Module):
    """Stands for a network of which nothing but the names and values of its tensors is known."""

    def __init__(self, held: dict[str, Tensor]) -> None:
        super().__init__()
        self.held = held

    def named_parameters(  # type: ignore[override]
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Any]]:
        del prefix, recurse, remove_duplicate
        yield from self.held.items()


def _predicted(
    args: argparse.Namespace, series: Series, predictor: Predictor, horizon: int
) -> Nowcast:
    subject = _subject(args, series, predictor)
    last = series.states[-1]
    if subject.module is None:
        module: nn.Module = _bare(last)
    else:
        module = subject.module
        states = tuple(fit_checkpoint(state, module) for state in series.states)
        series, last = replace(series, states=states), states[-1]
    ties = ties_of(module)
    left = {name: _why(name, x, ties) for name, x in last.items()}
    names = [name for name, why in left.items() if not why]
    if not names:
        raise CheckpointError(message("nowcast: there is nothing to predict", got=_listed(left)))
    with screen.working("predicting"):
        state = predictor.predict(
            module,
            series.states,
            horizon=horizon,
            topology=args.topology,
            space=subject.space,
            names=names,
        )
    once = tuple(dict.fromkeys(ties[name] for name in names))
    there = {ties[name]: name for name in reversed(names)}
    left = {name: why for name, why in left.items() if why}
    shown = tuple(there[name] for name in once)
    return Nowcast(series, predictor, horizon, state, shown, _wiring(args, subject), left)


def _subject(args: argparse.Namespace, series: Series, predictor: Predictor) -> Subject:
    """The network's code, if it is named, or needed and can be found."""
    path = str(series.paths[-1])
    if not args.model and isinstance(predictor, LinearFit | Average):
        return Subject(path)

    def opened() -> Subject:
        return open_subject(path, model=args.model, key=args.key, inputs=args.inputs)

    if args.model:
        return opened()
    if not predictor.graphical:
        with suppress(WSpaceError):
            return opened()
        return Subject(path)
    subject = opened()
    if subject.module is None:
        raise WSpaceError(
            message(
                f"nowcast: {args.predictor} reads the wiring of a network, which is not known",
                got=subject.note,
                help="name the code with --model",
            )
        )
    return subject


def _bare(last: Checkpoint) -> nn.Module:
    held: dict[str, Tensor] = dict(last)
    for group in last.layout.ties:
        held |= dict.fromkeys(group, last[group[0]])
    some = {k: x for k, x in held.items() if k.rpartition(".")[2] not in STATISTICS}
    return _Tensors(some)


def _why(name: str, x: Tensor, ties: dict[str, str]) -> str:
    """Why a tensor is not predicted; empty if it is."""
    if not x.is_floating_point():
        return predictable(x)
    return predictable(x) if name in ties else "a buffer"


def _wiring(args: argparse.Namespace, subject: Subject) -> str:
    if subject.space is None:
        return ""
    if args.topology == "published":
        return "as published code has it"
    return subject.note or f"traced from {args.model or subject.name}"


# ------------------------------------------------------------------------- writing


def _note(found: Nowcast) -> dict[str, Any]:
    return {
        "predictor": _name(found.predictor),
        "horizon": found.horizon,
        "step": found.step,
        "checkpoints": [path.name for path in found.series.paths],
    }


def _name(predictor: Predictor) -> str:
    form = type(predictor).__name__
    return f"{form} ({predictor.origin})" if predictor.origin else form


# ------------------------------------------------------------------------- showing


def _plain(found: Nowcast, target: Path) -> dict[str, Any]:
    """All that is known of a prediction, as plain data."""
    rows = [_moved(found, name) for name in found.names]
    total = sum(row["size"] ** 2 for row in rows) ** 0.5
    steps = found.series.steps or [None] * len(found.series.paths)
    shown = zip(found.series.paths, steps, strict=True)
    return {
        "out": str(target),
        "predictor": _name(found.predictor),
        "horizon": found.horizon,
        "step": found.step,
        "checkpoints": [{"path": str(path), "step": step} for path, step in shown],
        "relative": _ratio(sum(row["moved"] ** 2 for row in rows) ** 0.5, total),
        "last_spacing": _ratio(sum(row["before"] ** 2 for row in rows) ** 0.5, total),
        "largest": max((row["largest"] for row in rows), default=0.0),
        "tensors": [
            {
                "name": row["name"],
                "elements": row["elements"],
                "relative": _ratio(row["moved"], row["size"]),
                "last_spacing": _ratio(row["before"], row["size"]),
                "largest": row["largest"],
            }
            for row in rows
        ],
        "left_alone": found.left,
    }


def _moved(found: Nowcast, name: str) -> dict[str, Any]:
    """How large a tensor is, how far it moved, and how far it had in the last spacing."""
    states = found.series.states
    last, before = states[-1][name], states[-2 if len(states) > 1 else -1][name]
    squares, largest = torch.zeros(3, dtype=torch.float64), 0.0
    for x, y, z in pieces(found.state[name], last, before):  # the files may be larger than memory
        now, new, old = y.double(), x.double() - y.double(), y.double() - z.double()
        squares += torch.stack([now.dot(now), new.dot(new), old.dot(old)])
        largest = max(largest, float(new.abs().max()))
    size, moved, old = squares.sqrt().tolist()
    return {
        "name": name,
        "elements": last.numel(),
        "size": size,
        "moved": moved,
        "before": old,
        "largest": largest,
    }


def _ratio(part: float, whole: float) -> float | None:
    """One to another; None if it is not a number that JSON has."""
    return part / whole if whole else None


def _show(out: Console, found: Nowcast, data: dict[str, Any], *, everything: bool) -> None:
    series, horizon = found.series, found.horizon
    moved = [row for row in data["tensors"] if row["largest"]]
    every = len(found.names) + len(found.left)  # not all names: some are of one tensor
    what = f"{len(moved)} of {screen.plural(every, 'tensor')}, "
    what += screen.plural(sum(row["elements"] for row in moved), "element")
    ahead = screen.plural(horizon, "spacing")
    if isinstance(found.predictor, Average):
        ahead = "of the average" if horizon else "none"
    elif found.step is not None and series.spacing is not None:
        ahead += f" of {screen.plural(series.spacing, 'step')}, to step {found.step:,}"
    largest = max(data["tensors"], key=lambda row: row["largest"])
    screen.facts(
        out,
        str(series.paths[-1]),
        [
            ("from", _from(series)),
            ("predictor", data["predictor"]),
            ("wiring", found.wiring),
            ("ahead", ahead),
            ("moved", what),
            ("as before", _listed(found.left)),
            ("by", f"{_percent(data['relative'])} of their size; "
             f"{_percent(data['last_spacing'])} in the last spacing"),
            ("at most", f"{largest['largest']:.3g}, in {largest['name']}"),
        ],
    )  # fmt: skip
    out.print()
    rows = [
        [
            Text(screen.fold(row["name"], 36 if out.width < 100 else 10**4)),
            screen.count(row["elements"]),
            _percent(row["relative"]),
            _percent(row["last_spacing"]),
            f"{row['largest']:.2e}",
        ]
        for row in data["tensors"]
    ]
    columns = ["tensor", ">elements", ">moved by", ">last spacing", ">at most"]
    screen.table(out, columns, rows, everything=everything)


def _from(series: Series) -> str:
    many, steps = screen.plural(len(series.paths), "checkpoint"), list(series.steps or [])
    if not steps:
        return f"{many}, taken to be equally far apart: their names have no steps"
    if series.spacing is None and len(steps) > 1:
        return f"{many}, steps {', '.join(map(str, steps))}, taken to be equally far apart"
    return f"{many}, steps {steps[0]:,} to {steps[-1]:,}"


def _listed(left: dict[str, str]) -> str:
    """Tensors that stayed, by reason."""
    names: dict[str, list[str]] = {}
    for name, why in left.items():
        names.setdefault(why, []).append(name)
    return "\n".join(f"{_few(some)} ({why})" for why, some in names.items())


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{', '.join(names[:4])}{more}"


def _percent(ratio: float | None) -> str:
    return "–" if ratio is None else f"{100 * ratio:.3g}%"
