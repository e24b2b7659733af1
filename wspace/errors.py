"""The errors wspace raises: one class per kind of failure, each also the matching builtin.

Every message has the form *verb and named thing · expected · got · help* (see `message`).
"""

from collections.abc import Iterable


class WSpaceError(Exception):
    """Any failure that wspace itself reports."""


class TraceError(WSpaceError, RuntimeError):
    """The module could not be run symbolically, so no weight space was derived."""


class UnknownOp(TraceError):
    """An operator has no rule and `on_unknown="raise"` was asked for."""


class NotASymmetry(WSpaceError, RuntimeError):
    """A group element of the space changed the module's output."""


class SpaceMismatch(WSpaceError, ValueError):
    """A state, transform or graph does not fit its weight space."""


class CheckpointError(WSpaceError, ValueError):
    """A checkpoint is damaged, unsafe, or does not fit the model it is loaded for."""


class ZooError(WSpaceError, ValueError):
    """A model zoo on disk is damaged or inconsistent."""


class NowcastError(WSpaceError, RuntimeError):
    """A state could not be predicted, or a prediction may not be used."""


class MergeError(WSpaceError, ValueError):
    """States cannot be combined: they do not agree, or the options make no sense."""


class MeasureError(WSpaceError, RuntimeError):
    """A module could not be measured: a loss that is not a number, or no data."""


class PruneError(WSpaceError, ValueError):
    """A network cannot be pruned as asked: nothing would be left, or its code fixes a size."""


class HyperError(WSpaceError, ValueError):
    """A hypernetwork does not fit its target, its condition, or the weights asked of it."""


class MissingExtra(WSpaceError, ImportError):
    """An optional package is needed; the message names the extra that installs it."""


def message(what: str, *, expected: str = "", got: str | Iterable[str] = "", help: str = "") -> str:
    """Four-line error text: what failed, what was expected, what was found, what to do.

    Args:
        what: Verb and named thing, e.g. ``act: parameter '2.weight' does not fit``.
        expected: What would have been right; omitted when empty.
        got: What was found; several findings are listed one per line.
        help: What the reader can do about it; omitted when empty.

    Returns:
        The text, its lines indented under the first.
    """
    lines = [what]
    if expected:
        lines.append(f"  expected {expected}")
    if isinstance(got, str):
        if got:
            lines.append(f"  got {got}")
    else:
        lines.extend(f"  got {item}" for item in got)
    if help:
        lines.append(f"  help: {help}")
    return "\n".join(lines)
