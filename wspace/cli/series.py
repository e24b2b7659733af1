"""The last checkpoints of a run: found, ordered by the steps in their names, and read.

A step is the number after ``step``; else after ``checkpoint``, ``ckpt``, ``iter`` or ``epoch``;
else the one that a name ends with. A file whose name has none has that of its folder, as
``checkpoint-200/model.safetensors``.
"""

import glob
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from wspace.cli.headers import notes_of
from wspace.cli.screen import working
from wspace.errors import CheckpointError, message
from wspace.io import Checkpoint, load_checkpoint
from wspace.io.layout import INDEX, TORCH_SUFFIXES, WIDE
from wspace.nowcast.forecast import finite

SUFFIXES = (".safetensors", *TORCH_SUFFIXES)
WORDS = (r"steps?[=_-]?(\d+)", r"(?:checkpoint|ckpt|iter|iteration|epoch)[=_-]?(\d+)")
PATTERNS = tuple(re.compile(text, re.IGNORECASE) for text in (*WORDS, r"(\d+)$"))


NOTE = "wspace-nowcast"
"""Entry in the header of a file that the command wrote."""


@dataclass(frozen=True)
class Series:
    """Checkpoints of one run, oldest first.

    Attributes:
        paths: Where they are.
        steps: Their steps; None if the names do not say.
        states: What they hold, read by memory map.
    """

    paths: tuple[Path, ...]
    steps: tuple[int, ...] | None
    states: tuple[Checkpoint, ...]

    @property
    def spacing(self) -> int | None:
        """Steps from one to the next; None if they differ, or are not known."""
        gaps = _gaps(self.steps or ())
        return gaps[0] if len(set(gaps)) == 1 else None


def read_series(
    words: Sequence[str], count: int, *, key: str | None = None, uneven: bool = False
) -> Series:
    """The checkpoints that the words of a command name.

    Args:
        words: Paths, oldest first; or one folder or pattern, of which the last are taken.
        count: How many are needed.
        key: Which of several states in a torch file.
        uneven: Take them although their steps are not equally far apart.

    Returns:
        As many as are needed, of the same names, shapes and types, with finite values.

    Raises:
        CheckpointError: If there are not as many, or they do not belong together.
    """
    paths, steps = _listed(words, count)
    if len(paths) != count:
        raise CheckpointError(
            message(
                "nowcast: this is not the number of checkpoints that the predictor needs",
                expected=f"{count}, oldest first",
                got=f"{len(paths)}",
                help="one folder, or a pattern in quotes, stands for its last ones"
                if len(paths) > count
                else "",
            )
        )
    _check_steps(paths, steps, uneven=uneven)
    if made := [str(path) for path in paths if path.is_file() and NOTE in notes_of(path)]:
        raise CheckpointError(
            message(
                "nowcast: a prediction is no state of the run",
                expected="checkpoints that training wrote",
                got=made,
                help="write predictions to another folder, or name the checkpoints one by one",
            )
        )
    with working("reading checkpoints"):
        states = tuple(load_checkpoint(path, key=key) for path in paths)
        _check_states(paths, states)
    return Series(paths, steps, states)


def step_of(path: Path) -> tuple[int, int] | None:
    """How sure a step is (0 for the word itself), and the step; None if the name has none."""
    own = path.name
    for suffix in (INDEX, *SUFFIXES):
        own = own.removesuffix(suffix)
    for text, known in ((own, PATTERNS), (path.absolute().parent.name, PATTERNS[:2])):
        for rank, pattern in enumerate(known):
            if found := pattern.findall(text):
                return rank, int(found[-1])
    return None


# ------------------------------------------------------------------------ finding


def _listed(words: Sequence[str], count: int) -> tuple[tuple[Path, ...], tuple[int, ...] | None]:
    first = Path(words[0])
    if len(words) == 1 and first.is_dir():
        return _last([item for item in first.iterdir() if _is_checkpoint(item)], words[0], count)
    if len(words) == 1 and glob.has_magic(words[0]) and not first.exists():
        return _last([Path(name) for name in glob.glob(words[0])], words[0], count)  # noqa: PTH207
    paths = tuple(map(Path, words))
    if lost := [str(path) for path in paths if not path.exists()]:
        help = "paths of checkpoints; nothing is ever downloaded"
        raise CheckpointError(message("nowcast: there are no such files", got=lost, help=help))
    found = [step_of(path) for path in paths]
    known = [item for item in found if item is not None]
    same = len(known) == len(paths) and len({rank for rank, _ in known}) == 1
    steps = tuple(step for _, step in known)
    return paths, steps if same and (len(set(steps)) > 1 or len(steps) == 1) else None


def _is_checkpoint(item: Path) -> bool:
    """Whether an entry of a run's folder is a weight file, or a folder that holds one."""
    ends = (*SUFFIXES, INDEX)
    if item.is_dir():
        return any(file.name.endswith(ends) for file in item.iterdir())
    return item.name.endswith(ends)


def _last(
    items: Sequence[Path], where: str, count: int
) -> tuple[tuple[Path, ...], tuple[int, ...]]:
    """The last checkpoints by step, of those whose names say it most plainly."""
    found = [(*step, item) for item in items if (step := step_of(item)) is not None]
    best = min((rank for rank, _, _ in found), default=0)
    rows = sorted((step, item) for rank, step, item in found if rank == best)[-count:]
    if len(rows) < count:
        raise CheckpointError(
            message(
                f"nowcast: {where} has too few checkpoints with a step in their names",
                expected=f"{count}, such as step_100.safetensors, checkpoint-100/ or step=100.ckpt",
                got=[str(item) for _, item in rows] or "none",
            )
        )
    return tuple(item for _, item in rows), tuple(step for step, _ in rows)


# ----------------------------------------------------------------------- checking


def _gaps(steps: Sequence[int]) -> list[int]:
    return [b - a for a, b in zip(steps[:-1], steps[1:], strict=True)]


def _check_steps(paths: Sequence[Path], steps: Sequence[int] | None, *, uneven: bool) -> None:
    gaps = _gaps(steps or ())
    wrong, help = "", ""
    if any(gap <= 0 for gap in gaps):
        wrong = "oldest first, each of another step"
        help = "one folder, or a pattern in quotes, is put in order"
    elif len(set(gaps)) > 1 and not uneven:
        wrong = "equally far apart, as predictors take them to be"
        help = "name others, or say --allow-uneven to go on as if they were"
    if wrong:
        raise CheckpointError(
            message(
                "nowcast: the steps of the checkpoints do not follow each other",
                expected=wrong,
                got=[f"step {s} of {p}" for s, p in zip(steps or (), paths, strict=True)],
                help=help,
            )
        )


def _check_states(paths: Sequence[Path], states: Sequence[Checkpoint]) -> None:
    """Raises unless all hold the same tensors, and nothing but finite numbers."""
    last, wrong = states[-1], list[str]()
    for path, state in zip(paths, states, strict=True):
        wrong += [f"no {name!r} in {path}" for name in last if name not in state]
        wrong += [f"{name!r} in {path} only" for name in state if name not in last]
        for name in (name for name in state if name in last):
            here, there = state[name], last[name]
            if here.shape != there.shape:
                wrong.append(f"{name!r} of shape {tuple(here.shape)} in {path}")
            elif here.dtype != there.dtype:
                wrong.append(f"{name!r} of {here.dtype} in {path}")
    if wrong:
        raise CheckpointError(
            message(
                "nowcast: the checkpoints are not of one network",
                expected=f"the names, shapes and types of {paths[-1]}",
                got=_some(wrong),
            )
        )
    bad = [
        f"{number:,} of {name!r} in {path}"
        for path, state in zip(paths, states, strict=True)
        if not all(finite(x) for x in state.values() if x.dtype in WIDE)
        for name, number in state.nonfinite.items()
    ]
    if bad:
        raise CheckpointError(
            message(
                "nowcast: the past of the run is not finite",
                got=[f"NaN or infinite: {item}" for item in _some(bad)],
                help="name earlier checkpoints, from before it went wrong",
            )
        )


def _some(items: Sequence[str], most: int = 8) -> list[str]:
    more = [f"{len(items) - most} more"] if len(items) > most else []
    return [*items[:most], *more]
