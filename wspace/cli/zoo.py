"""`wspace zoo`: build, show, prove and split model zoos; list recipes."""

import argparse
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from wspace import zoo
from wspace.cli import screen
from wspace.errors import ZooError, message
from wspace.zoo.architecture import TRUSTED
from wspace.zoo.recipe import recipe_class

Run = Callable[[argparse.Namespace, Console], int]


def zoo_options(it: argparse.ArgumentParser) -> None:
    """Adds the commands below ``wspace zoo``."""
    commands = it.add_subparsers(metavar="command", required=True, parser_class=type(it))

    def command(name: str, run: Run, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        sub.set_defaults(run=run, parser=sub)
        return sub

    sub = command("build", _build, "build a zoo, or what is missing of it")
    sub.add_argument("recipe", metavar="RECIPE", help="its name, or package.module:Class")
    sub.add_argument("path", metavar="PATH", help="folder of the zoo")
    sub.add_argument(
        "--set",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="options of the recipe",
    )
    sub.add_argument("--workers", type=int, help="processes (1; with ray, all it has); 0 for all")
    sub.add_argument("--engine", choices=("local", "ray"), default="local", help="%(default)s")
    sub.add_argument("--dtype", choices=("float16", "bfloat16"), help="store floats so")
    sub = command("info", _info, "show the card of a zoo")
    sub.add_argument("path", metavar="PATH", help="folder of the zoo")
    sub = command("verify", _verify, "check the files of a zoo, and prove its weight spaces")
    sub.add_argument("path", metavar="PATH", help="folder of the zoo")
    sub.add_argument("--networks", type=int, default=4, help="how many are proved (%(default)s)")
    sub.add_argument("--checksums", action="store_true", help="read every file")
    sub.add_argument(
        "--trust", metavar="PACKAGE", nargs="+", default=[], help="import its factories"
    )
    command("recipes", _recipes, "list the recipes and their options")
    sub = command("split", _split, "split a zoo, and save the rule")
    sub.add_argument("path", metavar="PATH", help="folder of the zoo")
    by = "stays whole (what the saved rule or the recipe says); '' for none"
    sub.add_argument("--by", metavar="COLUMN", help=by)
    for part, share in zip(("train", "val", "test"), (0.8, 0.1, 0.1), strict=True):
        sub.add_argument(f"--{part}", type=float, help=f"share ({share} unless saved)")
    sub.add_argument("--seed", type=int, help="0 unless saved")
    sub.add_argument("--name", default="default", help="of the rule (%(default)s)")


def _build(args: argparse.Namespace, out: Console) -> int:
    workers = int(args.engine == "local") if args.workers is None else args.workers
    with _importable_here():
        recipe = zoo.recipe_from(args.recipe, _pairs(args.set))
        columns = (TextColumn("building"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        errors = screen.console(stderr=True)
        hidden = not errors.is_terminal
        with Progress(*columns, console=errors, transient=True, disable=hidden) as bar:
            task = bar.add_task("", total=recipe.cohorts)
            made = zoo.build(
                recipe,
                args.path,
                engine=args.engine,
                workers=workers,
                dtype=args.dtype,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
    out.print(Text(made.card()), soft_wrap=True)
    return 0


def _info(args: argparse.Namespace, out: Console) -> int:
    out.print(Text(zoo.open(args.path, damaged="skip").card()), soft_wrap=True)
    return 0


def _verify(args: argparse.Namespace, out: Console) -> int:
    """0 if everything holds; 1 if a shard is damaged or a symmetry is not there."""
    opened = zoo.open(args.path, checksums=args.checksums, damaged="skip")
    for text in opened.damaged:
        out.print(Text(text, "red"), soft_wrap=True)
    known = {*TRUSTED, *args.trust}
    if unknown := sorted({it.package for it in opened.architectures} - known):
        text = f"zoo: its networks are built by code of {', '.join(unknown)}, which is not run"
        help = f"if you trust it, say --trust {' '.join(unknown)}"
        raise ZooError(message(text, help=help))
    try:
        with _importable_here():
            reports = opened.verify(args.networks, trust=args.trust)
    except ZooError as error:
        out.print(Text(f"NOT PROVED  {error}", "bold red"), soft_wrap=True)
        return 1
    worst = max((report.max_error for report in reports), default=0.0)
    control = min((report.control_error for report in reports), default=0.0)
    checked = "checksums of all files" if args.checksums else "sizes and headers of all files"
    rows = [
        ("checked", f"{checked}, {screen.plural(opened.cohorts, 'cohort')}"),
        ("proved", f"{screen.plural(len(reports), 'network')}, largest change {worst:.1e}"),
        ("controls", f"change the output by {control:.1e} or more" if reports else ""),
        ("damaged", screen.plural(len(opened.damaged), "cohort") if opened.damaged else ""),
    ]
    screen.facts(out, args.path, rows)
    return 1 if opened.damaged else 0


def _recipes(args: argparse.Namespace, out: Console) -> int:
    rows: list[Sequence[str | Text]] = []
    for name in sorted(zoo.recipe_names()):
        kind = recipe_class(name)
        first = (kind.__doc__ or "").strip().splitlines()[:1]
        options = ", ".join(_option(item) for item in fields(kind) if item.init)
        rows.append([Text(name, "cyan"), *(first or [""]), options])
    screen.table(out, ["recipe", "makes", "options"], rows, everything=True)
    return 0


def _option(item: Any) -> str:
    return item.name if item.default is MISSING else f"{item.name}={item.default!r}"


def _split(args: argparse.Namespace, out: Console) -> int:
    opened = zoo.open(args.path)
    shares = (args.train, args.val, args.test)
    parts = opened.split(*shares, by=args.by, seed=args.seed, name=args.name)
    rows = [(name, screen.plural(len(part), "network")) for name, part in parts.items()]
    screen.facts(out, f"{args.path}: split {args.name!r}", rows)
    return 0


def _pairs(words: Sequence[str]) -> dict[str, str]:
    wrong = [word for word in words if not word.partition("=")[1]]
    if wrong:
        raise ZooError(message("zoo: --set takes key=value", got=[repr(word) for word in wrong]))
    return {key: value for key, _, value in (word.partition("=") for word in words)}


@contextmanager
def _importable_here() -> Generator[None]:
    """Context in which the user's own modules are found too, after all that is installed."""
    here = str(Path.cwd())
    sys.path.append(here)
    try:
        yield
    finally:
        sys.path.remove(here)
