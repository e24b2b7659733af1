"""The command `wspace`: models, their symmetry, and all that is made of it.

Exit codes: 0 done, 1 a claim did not hold, 2 wrong use or bad input, 130 interrupted.
"""

import argparse
import difflib
import importlib.metadata
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from rich.console import Console
from rich.text import Text

from wspace.cli.align import align, align_options
from wspace.cli.convert import convert
from wspace.cli.hyper import hyper_options
from wspace.cli.inspect import inspect
from wspace.cli.interpolate import interpolate, interpolate_options
from wspace.cli.merge import merge, merge_options
from wspace.cli.networks import network_options
from wspace.cli.nowcast import nowcast, nowcast_options
from wspace.cli.prune import prune, prune_options
from wspace.cli.screen import console
from wspace.cli.train import TRAINING, is_lightning, predict, train
from wspace.cli.verify import verify
from wspace.cli.zoo import zoo_options
from wspace.errors import WSpaceError

Command = Callable[[argparse.Namespace, Console], int]

REF = "hf:<folder|config.json>, torchvision:<name>, timm:<name>, py:<module|file.py>:<factory>"
EXAMPLES = """examples:
  wspace inspect hf:gpt2/config.json       groups and parameters of a model, from its config
  wspace inspect model.safetensors         what a checkpoint holds
  wspace inspect py:net.py:build --plot net.svg
  wspace verify torchvision:resnet18       prove the symmetry on the weights
  wspace convert model.safetensors model.graph.safetensors
  wspace align a.safetensors b.safetensors --model py:net.py:build --out b_aligned.safetensors
  wspace merge a.safetensors b.safetensors --model py:net.py:build --out merged.safetensors
  wspace prune torchvision:resnet18 small.safetensors --amount 0.5 --of flops
  wspace nowcast runs/mine --horizon 10 --out ahead.safetensors
  wspace fit --config configs/inr_classification_gmn.yaml --data.path zoos/mnist
  wspace predict --ckpt last.safetensors model.safetensors
  wspace hyper show hf:gpt2/config.json --select "*.mlp.*"
  wspace zoo build digits zoos/digits      train a zoo of small networks
  wspace demo                              see it all at work; writes demo/report.html

A model is named as its users name it: """


class Parser(argparse.ArgumentParser):
    """Argument parser that says what was probably meant."""

    def error(self, message: str) -> NoReturn:
        """Prints the usage and the mistake on stderr, and exits with 2."""
        wrong = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        if wrong:
            known = [item.strip(" '") for item in wrong[2].split(",")]
            near = difflib.get_close_matches(wrong[1], known, n=1)
            message = f"unknown command {wrong[1]!r}; there are {', '.join(known)}"
            message += f"\n  help: did you mean {near[0]!r}?" if near else ""
        elif message.startswith("unrecognized arguments: -"):
            given = message.split(": ", 1)[1].split()[0].partition("=")[0]
            known = [name for action in self._actions for name in action.option_strings]
            near = difflib.get_close_matches(given, known, n=1)
            message += f"\n  help: did you mean {near[0]}?" if near else ""
        self.print_usage(sys.stderr)
        sys.stderr.write(f"{self.prog}: {message}\n")
        sys.exit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: Its words; those of the process when None.

    Returns:
        The exit code.

    Raises:
        WSpaceError: With ``--debug`` only; without it the message is printed.
        OSError: Likewise.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        args = _parse(argv)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    errors = console(stderr=True)
    try:
        return args.run(args, console())
    except SystemExit as stop:  # LightningCLI read the words
        return stop.code if isinstance(stop.code, int) else 2
    except (WSpaceError, OSError) as error:
        if args.debug:
            raise
        if isinstance(error, BrokenPipeError):
            _discard_output()
            return 0
        errors.print(Text(str(error), "red"), soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        errors.print("interrupted")
        return 130


def parser() -> Parser:
    """The parser of all commands."""
    top = Parser(
        prog="wspace",
        description="Weight-space symmetry and parameter graphs of any PyTorch module.",
        epilog=EXAMPLES + REF,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"wspace {_version()}")
    commands = top.add_subparsers(metavar="command", required=True, parser_class=Parser)

    def command(name: str, run: Command, help: str) -> Parser:
        it = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        it.add_argument("--debug", action="store_true", help="show the traceback of an error")
        it.set_defaults(run=run, parser=it)
        return it

    _inspect_options(command("inspect", inspect, "show a model or a checkpoint with its symmetry"))
    _verify_options(command("verify", verify, "prove the symmetry of a model on its weights"))
    _convert_options(command("convert", convert, "checkpoint to graph file, or back, bit for bit"))
    for name, run, options, help in (
        ("align", align, align_options, "move a network onto another, its function unchanged"),
        ("merge", merge, merge_options, "make one network of several, aligned first"),
        ("interpolate", interpolate, interpolate_options, "walk from a network to another"),
    ):
        it = command(name, run, help)
        options(it)
        _code_options(it)
        network_options(it)
    it = command("prune", prune, "take units out of a network, and write the smaller one")
    prune_options(it)
    _code_options(it)
    it = command("nowcast", nowcast, "predict a later checkpoint from the last ones of a run")
    nowcast_options(it)
    _code_options(it)
    _demo_options(command("demo", _demo, "train, convert, move and prove small networks"))
    for name, help in TRAINING.items():
        command(name, train, help)
    _predict_options(command("predict", predict, "ask a trained metanet about networks"))
    zoo_options(command("zoo", _no_command, "build, show, prove and split model zoos"))
    hyper_options(command("hyper", _no_command, "show and write what hypernetworks generate"))
    it = command("trace", _trace, "show what the tracer knows")
    it.add_argument("--ops", action="store_true", required=True, help="list operators with a rule")
    return top


def _inspect_options(it: Parser) -> None:
    _model_options(it)
    it.add_argument("--meta", action="store_true", help="allocate no weights: for huge models")
    it.add_argument("--groups", action="store_true", help="list what each group indexes")
    it.add_argument("--plot", metavar="FILE", help="draw the graph: .png, .svg, .pdf or .html")


def _verify_options(it: Parser) -> None:
    _model_options(it)
    it.set_defaults(meta=False)


def _convert_options(it: Parser) -> None:
    it.add_argument("src", metavar="SRC", help="checkpoint, folder, or graph file")
    it.add_argument("dst", metavar="DST", help="what to write")
    _code_options(it)
    it.add_argument(
        "--format",
        choices=("graph", "pyg"),
        default="graph",
        help="graph (can be converted back) or torch_geometric's Data as a dict",
    )
    it.add_argument("--no-check", dest="check", action="store_false", help="do not read it again")
    it.set_defaults(seed=0)


def _demo_options(it: Parser) -> None:
    it.add_argument("--out", metavar="DIR", default="demo", help="where its pages go")
    it.add_argument("--fast", action="store_true", help="train less and prove less")


def _predict_options(it: Parser) -> None:
    it.add_argument("subjects", metavar="NETWORK", nargs="+", help=f"zoo, checkpoint, or {REF}")
    it.add_argument("--ckpt", metavar="FILE", required=True, help="what `wspace fit` wrote")
    _code_options(it)
    it.add_argument("--seed", type=int, default=0, help="of random weights")
    it.add_argument("--all", action="store_true", help="show all rows of long tables")
    it.add_argument("--json", metavar="FILE", help="write the predictions as JSON; - for stdout")
    it.add_argument("--out", metavar="DIR", help="where edited networks go, for editing tasks")
    it.add_argument(
        "--trust",
        metavar="PACKAGE",
        action="append",
        default=[],
        help="import factories that the checkpoint names from this package; once for each",
    )


def _model_options(it: Parser) -> None:
    it.add_argument("ref", metavar="REF", help=f"model reference, or path of a checkpoint ({REF})")
    _code_options(it)
    it.add_argument("--seed", type=int, default=0, help="of random weights and transforms")
    it.add_argument("--all", action="store_true", help="show all rows of long tables")
    it.add_argument("--json", metavar="FILE", help="write the findings as JSON; - for stdout")


def _code_options(it: Parser) -> None:
    it.add_argument("--model", metavar="REF", default="", help="code of a checkpoint's network")
    it.add_argument("--key", default=None, help="which of several states in a torch file")
    it.add_argument(
        "--inputs",
        metavar="SIZES",
        action="append",
        default=[],
        help="example input, as 2x3x32x32 or int:2x9; once for each",
    )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    top = parser()
    words = list(sys.argv[1:] if argv is None else argv)
    if not words:
        top.print_help()
        sys.exit(2)
    if is_lightning(words):
        rest = [word for word in words if word != "--debug"]
        return argparse.Namespace(run=train, words=rest, debug=len(rest) < len(words))
    args, rest = top.parse_known_args(words)
    if rest:
        args.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def _demo(args: argparse.Namespace, out: Console) -> int:
    from wspace.demo import demo

    return demo(args.out, out, fast=args.fast)


def _no_command(args: argparse.Namespace, out: Console) -> NoReturn:
    raise AssertionError("argparse has asked for a command")


def _trace(args: argparse.Namespace, out: Console) -> int:
    from rich.columns import Columns

    from wspace.trace.rules import RULES

    by_file: dict[str, list[str]] = {}
    for name, rule in sorted(RULES.items()):
        by_file.setdefault(rule.__module__, []).append(name)
    for module, names in sorted(by_file.items()):
        out.print(Text(f"{module}: {len(names)} operators", "bold"))
        out.print(Columns([Text(name) for name in names], padding=(0, 2)))
        out.print()
    out.print(Text(f"{len(RULES)} operators have a rule; all pointwise ones share another."))
    out.print(Text("Others are decomposed and, where that fails, freeze what they touch."))
    return 0


def _version() -> str:
    try:
        return importlib.metadata.version("wspace")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _discard_output() -> None:
    """Points stdout at nothing, so that the interpreter's last flush does not fail too."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
