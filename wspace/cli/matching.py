"""Matchings as the commands make them: their options, and the search itself."""

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from wspace.action import KINDS
from wspace.align import Matching, match
from wspace.align.matching.match import STARTS
from wspace.cli import screen
from wspace.cli.networks import Networks
from wspace.errors import WSpaceError, message
from wspace.io import Checkpoint
from wspace.space import WeightSpace


def matching_options(it: argparse.ArgumentParser) -> None:
    """Adds the options of a matching."""
    it.add_argument(
        "--kinds",
        metavar="KIND",
        nargs="+",
        choices=KINDS,
        default=["permutation"],
        help=f"what may move: {', '.join(KINDS)} (permutation)",
    )
    it.add_argument(
        "--start", choices=STARTS, default="forward", help="of the search (%(default)s)"
    )
    it.add_argument("--restarts", metavar="N", type=int, default=0, help="further random starts")
    it.add_argument("--sweeps", metavar="N", type=int, default=100, help="at most (%(default)s)")
    it.add_argument("--seed", type=int, default=0, help="of random starts")


def check_options(verb: str, args: argparse.Namespace) -> None:
    """Refuses numbers that mean no search.

    Args:
        verb: The command, for the message.
        args: With the options of `matching_options`.

    Raises:
        WSpaceError: Naming them.
    """
    if args.restarts < 0 or args.sweeps < 1:
        got = f"--restarts {args.restarts} --sweeps {args.sweeps}"
        expected = "no restart or more, and a sweep or more"
        raise WSpaceError(message(f"{verb}: this is no search", expected=expected, got=got))


def check_finite(verb: str, states: Mapping[Path, Checkpoint]) -> None:
    """Refuses states with NaN or infinite values: nothing is near to them.

    Args:
        verb: The command, for the message.
        states: Checkpoints by where they are from.

    Raises:
        WSpaceError: Listing all such tensors.
    """
    bad = [
        f"{number:,} in {name} of {path}"
        for path, state in states.items()
        for name, number in state.nonfinite.items()
    ]
    if bad:
        raise WSpaceError(
            message(
                f"{verb}: weights that are NaN or infinite",
                got=bad,
                help="nothing is near to them; repair or retrain the network",
            )
        )


def check_kinds(verb: str, found: Networks, args: argparse.Namespace) -> None:
    """Refuses kinds that the network does not have, or of which one cannot know.

    Args:
        verb: The command, for the message.
        found: The networks.
        args: With the options of `matching_options`.

    Raises:
        WSpaceError: Naming the kinds.
    """
    known = {kind for g in found.space.groups.values() for kind in g.kinds}
    known |= {gauge.kind for gauge in found.space.gauges}
    more = [kind for kind in args.kinds if kind != "permutation"]
    if found.guessed and more:
        raise WSpaceError(
            message(
                f"{verb}: {', '.join(more)} depend on the activations, which no checkpoint tells",
                got=found.code,
                help="name the code with --model, or leave them out",
            )
        )
    if absent := [kind for kind in args.kinds if kind not in known]:
        expected = f"kinds among {', '.join(k for k in KINDS if k in known)}"
        what = f"{verb}: no group of this network moves by {' or '.join(absent)}"
        raise WSpaceError(message(what, expected=expected))


def matched(
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    space: WeightSpace,
    args: argparse.Namespace,
    *,
    what: str,
) -> Matching:
    """What brings `b` to `a`, by the options of `matching_options`; `what` is told meanwhile."""
    with screen.working(f"matching {what}"):
        return match(
            a,
            b,
            space,
            kinds=tuple(args.kinds),
            start=args.start,
            restarts=args.restarts,
            sweeps=args.sweeps,
            generator=torch.Generator().manual_seed(args.seed),
        )
