"""`wspace hyper`: what a hypernetwork would generate of a model, and the weights that one makes.

Training is `wspace fit --config configs/hyper/…`.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from wspace.cli import screen
from wspace.cli.headers import notes_of
from wspace.errors import HyperError, message
from wspace.io import save_checkpoint

if TYPE_CHECKING:
    from wspace.hyper.graph import GraphHyperNetwork

Run = Callable[[argparse.Namespace, Console], int]


def hyper_options(it: argparse.ArgumentParser) -> None:
    """Adds the commands below ``wspace hyper``."""
    commands = it.add_subparsers(metavar="command", required=True, parser_class=type(it))

    def command(name: str, run: Run, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        sub.set_defaults(run=run, parser=sub)
        return sub

    sub = command("show", _show, "list what would be generated, shared and left alone")
    sub.add_argument("ref", metavar="REF", help="model reference, as for `wspace inspect`")
    glob = "globs on parameters' names, or type:ClassName (%(default)s)"
    sub.add_argument(
        "--select", nargs="+", metavar="GLOB", default=["*"], help=f"generated: {glob}"
    )
    sub.add_argument(
        "--share", nargs="*", metavar="GLOB", default=["*"], help="of the rest, trained"
    )
    sub.add_argument("--all", action="store_true", help="show all rows of long tables")
    sub.add_argument("--json", metavar="FILE", help="write the findings as JSON; - for stdout")
    sub = command("generate", _generate, "write the weights that a trained hypernetwork makes")
    sub.add_argument("ckpt", metavar="CKPT", help="what `wspace fit` wrote")
    sub.add_argument("--cond", type=int, metavar="N", help="number of the task")
    sub.add_argument("--out", metavar="FILE", required=True, help="checkpoint to write")
    _trust_option(sub)
    sub = command("predict", _predict, "predict the parameters of a model from its graph")
    sub.add_argument("ref", metavar="REF", help="model reference, as for `wspace inspect`")
    ghn = "graph hypernetwork: a name, or what `wspace fit` or `save_ghn` wrote"
    sub.add_argument("--ghn", metavar="FILE", required=True, help=ghn)
    sub.add_argument("--out", metavar="FILE", required=True, help="checkpoint to write")
    sub.add_argument(
        "--batchnorm",
        choices=("reset", "keep"),
        help="running statistics, which are not predicted: 0 and 1, or as the model has them",
    )
    sub.add_argument("--inputs", metavar="SIZES", action="append", default=[],
                     help="example input, as 2x3x32x32 or int:2x9; once for each")  # fmt: skip
    _trust_option(sub)


def _trust_option(it: argparse.ArgumentParser) -> None:
    it.add_argument(
        "--trust",
        metavar="PACKAGE",
        action="append",
        default=[],
        help="import factories that the checkpoint names from this package; once for each",
    )


def _show(args: argparse.Namespace, out: Console) -> int:
    import wspace
    from wspace.hyper import coverage_of

    model = wspace.resolve(args.ref, meta=True, weights=False)
    found = coverage_of(model.module, _patterns(args.select), _patterns(args.share) or None)
    parts = {"generated": found.generated, "shared": found.shared, "untouched": found.untouched}
    if args.json:
        screen.write_json(
            out, args.json, {"ref": args.ref, **{k: dict(v) for k, v in parts.items()}}
        )
        if args.json == "-":
            return 0
    total = sum(sum(part.values()) for part in parts.values())
    rows = [
        (kind, f"{screen.plural(len(part), 'tensor')}, {screen.count(sum(part.values()))} entries, "
               f"{100 * sum(part.values()) / total:.1f} %")
        for kind, part in parts.items()
    ]  # fmt: skip
    screen.facts(out, args.ref, rows)
    shapes = {n: x.shape for n, x in model.module.state_dict().items()}
    cells = [
        [name, "x".join(map(str, shapes.get(name, ()))) or "1", screen.count(n), kind]
        for kind, part in parts.items()
        for name, n in part.items()
    ]
    screen.table(out, ["tensor", "shape", ">entries", "what"], cells, everything=args.all)
    return 0


def _patterns(words: Sequence[str]) -> str | list[str]:
    return "*" if list(words) == ["*"] else list(words)


def _generate(args: argparse.Namespace, out: Console) -> int:
    from wspace.lit.hyper.loading import generate, load_hyper

    target = Path(args.out)
    if target.resolve() == Path(args.ckpt).resolve():
        raise HyperError(message(f"generate: {target} would be written over", help="another --out"))
    task = load_hyper(args.ckpt, trust=args.trust)
    state = generate(task, args.cond)
    save_checkpoint(state, target)
    entries = sum(x.numel() for x in state.values())
    what = f"{screen.plural(len(state), 'tensor')}, {screen.count(entries)} entries"
    out.print(Text(f"wrote {target}: {what}"), soft_wrap=True)
    return 0


def _predict(args: argparse.Namespace, out: Console) -> int:
    from wspace.cli.subject import open_subject
    from wspace.hyper.graph import predict_into

    ghn = _graph_hypernetwork(args.ghn, args.trust)
    subject = open_subject(args.ref, inputs=args.inputs)
    if subject.module is None or subject.space is None:
        raise HyperError(
            message("predict: the code of the model is needed", got=args.ref,
                    help="py:file.py:factory, hf:config.json, torchvision:name")
        )  # fmt: skip
    with screen.working(f"predicting {args.ref}"):
        found = predict_into(ghn, subject.module, subject.space, batchnorm=args.batchnorm)
    save_checkpoint(dict(subject.module.state_dict()), args.out)
    out.print(Text(str(found)), soft_wrap=True)
    out.print(Text(f"wrote {args.out}"), soft_wrap=True)
    return 0


def _graph_hypernetwork(name: str, trust: Sequence[str]) -> "GraphHyperNetwork":
    """A graph hypernetwork by name, or from a file of `save_ghn` or `wspace fit`."""
    from wspace.hyper.graph import GraphHyperNetwork, load_ghn
    from wspace.lit.checkpoint import FORMAT
    from wspace.lit.hyper.loading import load_hyper

    path = Path(name)
    if not path.is_file() or notes_of(path).get("format") != FORMAT:
        return load_ghn(name)
    found = [m for m in load_hyper(path, trust=trust).modules() if isinstance(m, GraphHyperNetwork)]
    if not found:
        raise HyperError(message(f"predict: {name} has no graph hypernetwork"))
    return found[0]
