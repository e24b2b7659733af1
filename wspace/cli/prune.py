"""`wspace prune`: a network with fewer units, as a file or as a Hugging Face folder.

A file holds the weights and how many units each group has left: `wspace.prune.load` puts them into
the network's own code. A folder holds a smaller config as well, and needs no wspace to be read.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from rich.console import Console
from rich.text import Text
from torch import nn

from wspace.cli import screen
from wspace.cli.subject import Subject, open_subject
from wspace.cli.target import check_file, refuse_inputs
from wspace.errors import WSpaceError, message
from wspace.prune import Pruner, Restriction, Selection, prunable, save
from wspace.prune.huggingface.rebuild import has_config
from wspace.prune.importance.weights import Importance, importance_of
from wspace.prune.learned.predicted import Predicted
from wspace.prune.learned.predictor import SHIPPED
from wspace.prune.select import Of, Scope
from wspace.reference.python import load_function

CODE = "name the network: hf:…, torchvision:…, timm:…, py:…, or a checkpoint with --model"
TEXTS = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "*processor_config.json",
         "chat_template*", "generation_config.json", "*.model", "LICENSE*")  # fmt: skip
"""Small files of a Hugging Face folder that belong to the small model as well."""


@dataclass(frozen=True)
class Pruned:
    """What is kept of a network, and the network.

    Attributes:
        subject: The network as it was.
        pruner: What is known of it.
        few: What is kept.
        small: The small network; None in a dry run.
        seconds: Time that choosing and making took.
    """

    subject: Subject
    pruner: Pruner
    few: Restriction
    small: nn.Module | None
    seconds: float


def prune_options(it: argparse.ArgumentParser) -> None:
    """Adds the options of ``wspace prune``, other than those of the network's code."""
    it.add_argument("network", metavar="NETWORK", help="model reference, or checkpoint")
    it.add_argument(
        "out",
        metavar="OUT",
        nargs="?",
        help="a .safetensors file; or, of a Hugging Face model, a new folder for from_pretrained",
    )
    it.add_argument("--amount", metavar="SHARE", type=float, help="share to remove, as 0.5")
    it.add_argument("--of", choices=get_args(Of), default="units", help="of what (%(default)s)")
    it.add_argument(
        "--scope",
        choices=get_args(Scope),
        default="global",
        help="one threshold for all groups, or the same share of each (%(default)s)",
    )
    it.add_argument(
        "--importance",
        metavar="NAME",
        default="magnitude",
        help="magnitude, magnitude_l1, bn_scale, lamp, fpgm, random, "
        + "".join(f"predicted:{name}, " for name in SHIPPED)
        + "or py:<file.py>:<function> of the network and its space (%(default)s)",
    )
    it.add_argument(
        "--ratio",
        metavar="GROUP=SHARE",
        action="append",
        default=[],
        help="a share of its own for groups of this name or glob; once for each",
    )
    it.add_argument("--round-to", metavar="N", type=int, default=1, help="keep multiples of N")
    it.add_argument("--at-most", metavar="SHARE", type=float, default=1.0, help="of one group")
    it.add_argument(
        "--ignore",
        metavar="GLOB",
        action="append",
        default=[],
        help="groups, or parameters, that stay whole; once for each",
    )
    it.add_argument("--no-check", dest="check", action="store_false", help="do not run the result")
    it.add_argument("--dry-run", action="store_true", help="say what would go, and write nothing")
    it.add_argument("--force", action="store_true", help="replace the file if it is there")
    it.add_argument("--seed", type=int, default=0, help="of random weights")
    it.add_argument("--all", action="store_true", help="show all rows of long tables")
    it.add_argument("--json", metavar="FILE", help="write the findings as JSON; - for stdout")


def prune(args: argparse.Namespace, out: Console) -> int:
    """Prunes `args.network` and writes `args.out`."""
    selection = _selection(args)
    importance = _importance(args.importance)
    target = _target(args)
    subject = open_subject(
        args.network, model=args.model, key=args.key, inputs=args.inputs, seed=args.seed
    )
    found = _pruned(args, subject, importance, selection, target)
    data = _plain(found, args) | {"amount": selection.amount}
    if target is not None and found.small is not None:
        with screen.working(f"writing {target}"):
            _write(found, found.small, target)
    if args.json != "-":
        _show(out, data, everything=args.all)
        if found.small is None:
            out.print(Text("nothing was written: this was a dry run", "yellow"))
        else:
            out.print(Text(f"wrote {target}", "bold"), soft_wrap=True)
    if args.json:
        screen.write_json(out, args.json, data)
    return 0


# ---------------------------------------------------------------------- what to do


def _selection(args: argparse.Namespace) -> Selection:
    ratios: dict[str, float] = {}
    for text in args.ratio:
        group, _, share = text.rpartition("=")
        try:
            ratios[group or "="] = float(share)
        except ValueError:
            group = ""
        if not group:
            raise WSpaceError(
                message(f"--ratio: {text!r} is no ratio", expected="GROUP=SHARE, as h1=0.3")
            )
    return Selection(
        amount=args.amount if args.amount is not None or ratios else 0.5,
        of=args.of,
        scope=args.scope,
        ratios=ratios,
        round_to=args.round_to,
        at_most=args.at_most,
        ignore=tuple(args.ignore),
    )


def _importance(name: str) -> Importance:
    if name.startswith("py:"):
        return importance_of(load_function(name))
    kind, _, which = name.partition(":")
    return Predicted(which or SHIPPED[0]) if kind == "predicted" else importance_of(name)


def _target(args: argparse.Namespace) -> Path | None:
    """Where the result goes, checked before any work; None in a dry run without a place."""
    if args.out is None:
        if args.dry_run:
            return None
        raise WSpaceError(
            message("prune: where to?", expected="OUT, or --dry-run", help="see wspace prune -h")
        )
    target = Path(args.out)
    refuse_inputs("prune", target, [Path(args.network.removeprefix("hf:"))])
    if target.suffix:
        check_file("prune", target, force=args.force, such="pruned.safetensors")
    elif not target.parent.is_dir():
        raise WSpaceError(message(f"prune: {target} is in a folder that is not there"))
    elif target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise WSpaceError(
            message(f"prune: {target} is in use", expected="a new or empty folder, or a file")
        )
    return target


def _pruned(
    args: argparse.Namespace,
    subject: Subject,
    importance: Importance,
    selection: Selection,
    target: Path | None,
) -> Pruned:
    if subject.module is None or subject.space is None:
        raise WSpaceError(
            message(f"prune: {subject.name} comes without code", got=subject.note, help=CODE)
        )
    folder = target is not None and not target.suffix
    if folder and not has_config(subject.module):
        raise WSpaceError(
            message(
                f"prune: {target} is a folder, and {subject.name} has no config to put there",
                expected="a file, such as pruned.safetensors",
            )
        )
    by_config = folder or (target is None and has_config(subject.module))
    rebuild: Literal["config", "copy"] = "config" if by_config else "copy"
    start = time.perf_counter()
    pruner = Pruner(subject.module, subject.space, subject.args, subject.kwargs, rebuild=rebuild)
    with screen.working("choosing"):
        few = pruner.choose(importance, selection)
    small = None
    if not args.dry_run:
        with screen.working("pruning"):
            small = pruner.prune(few, check=args.check)
    return Pruned(subject, pruner, few, small, time.perf_counter() - start)


def _write(found: Pruned, small: nn.Module, target: Path) -> None:
    """Writes the file or the folder, all of it or nothing."""
    if target.suffix:
        save(small, found.few, target)
        return
    saved: Any = small
    source = Path(found.subject.name.removeprefix("hf:").partition(" as ")[0])
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as name:
        made = Path(name) / target.name
        with _quiet():
            saved.save_pretrained(made)
        if source.is_dir():
            for pattern in TEXTS:
                for file in source.glob(pattern):
                    if file.is_file() and not (made / file.name).exists():
                        shutil.copy2(file, made / file.name)
        if target.is_dir():
            target.rmdir()  # empty, or there would have been an error
        made.rename(target)


@contextmanager
def _quiet() -> Generator[None]:
    """Within it, transformers draws no progress bars."""
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            logging.enable_progress_bar()


# ------------------------------------------------------------------------- showing


def _plain(found: Pruned, args: argparse.Namespace) -> dict[str, Any]:
    """All that is known of a pruning, as plain data."""
    pruner, few = found.pruner, found.few
    counts, counted = few.counts(), pruner.counted(few)
    bundle = {g: i for i, names in enumerate(pruner.ties) for g in names if len(names) > 1}
    cost = pruner.cost
    return {
        "network": found.subject.name,
        "out": None if found.small is None else args.out,
        "importance": args.importance,
        "of": args.of,
        "scope": args.scope,
        "rebuilt": "from a smaller config" if pruner.by_config else "as a copy",
        "seconds": found.seconds,
        "parameters": {"before": cost.parameters(), "after": cost.parameters(counts)},
        "macs": {"before": cost.macs(), "after": cost.macs(counts)},
        "groups": [
            {
                "name": name,
                "own_for": list(group.over),
                "before": group.size,
                "after": counts[name],
                "bundle": bundle.get(name),
                "pinned": pruner.pinned.get(name),
                "counted_by": list(counted.get(name, ())),
            }
            for name, group in prunable(found.subject.space or few.large).items()
        ],
    }


def _show(out: Console, data: Mapping[str, Any], *, everything: bool) -> None:
    screen.facts(
        out,
        data["network"],
        [
            ("importance", data["importance"]),
            ("parameters", _change(data["parameters"])),
            ("MACs", _change(data["macs"])),
            ("rebuilt", f"{data['rebuilt']}, {data['seconds']:.2f} s"),
            ("exact", _exact(data["groups"])),
            ("pinned", _pinned(data["groups"])),
        ],
    )  # fmt: skip
    out.print()
    rows = [
        [
            Text(row["name"], "cyan"),
            f"each {'*'.join(row['own_for'])}" if row["own_for"] else "",
            f"{row['before']:,}",
            f"{row['after']:,}",
            f"{100 * (1 - row['after'] / row['before']):.0f}%" if not row["pinned"] else "pinned",
            "" if row["bundle"] is None else f"#{row['bundle'] + 1}",
            _operators(row["counted_by"]),
        ]
        for row in data["groups"]
    ]
    columns = ["group", "own for", ">before", ">after", ">gone", "equal", "counted by"]
    screen.table(out, columns, rows, everything=everything)


def _operators(sources: Iterable[str]) -> str:
    """Operators that count units, without the modules that they are in."""
    return ", ".join(dict.fromkeys(source.rpartition(": ")[2] for source in sources))


def _exact(rows: list[dict[str, Any]]) -> str | Text:
    """Whether the small network computes what the large one does with zeros in it."""
    if all(row["after"] == row["before"] for row in rows):
        return Text("nothing goes: the amount is too small, or all groups are held", "yellow")
    counted = [row for row in rows if row["counted_by"]]
    if not counted:
        return "as if the units that go were zero: no operator counts them"
    by = _operators(op for row in counted for op in row["counted_by"])
    text = f"the units of {_names(counted)} are counted by {by}: there, more changes than the "
    return Text(f"{text}units' own part, and training on is advised", "yellow")


def _change(numbers: Mapping[str, int]) -> str:
    before, after = numbers["before"], numbers["after"]
    share = f" ({100 * after / before:.1f}%)" if before else ""
    return f"{screen.count(before)} → {screen.count(after)}{share}"


def _pinned(rows: list[dict[str, Any]]) -> str:
    """Groups that cannot lose units, by reason."""
    some: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["pinned"]:
            some.setdefault(row["pinned"], []).append(row)
    return "\n".join(f"{_names(held)}: {why}" for why, held in some.items())


def _names(rows: list[dict[str, Any]]) -> str:
    names = [row["name"] for row in rows]
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{', '.join(names[:4])}{more}"
