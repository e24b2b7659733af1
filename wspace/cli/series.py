"""The last checkpoints of a run: found, put in order or checked to be, and read.

A step is the number after ``step``; else after ``checkpoint``, ``ckpt``, ``iter`` or ``epoch``;
else the one that a name ends with. A file whose name has none has that of its folder, as
``checkpoint-200/model.safetensors``. Where the names of files that are listed do not say it, the
files may: Lightning's and wspace's hold their ``global_step``.
"""

import glob
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from wspace.cli.headers import notes_of
from wspace.cli.screen import working
from wspace.errors import CheckpointError, message
from wspace.io import Checkpoint, load_checkpoint
from wspace.io.layout import INDEX, TORCH_SUFFIXES, WIDE
from wspace.nowcast.forecast import finite

SUFFIXES = (".safetensors", *TORCH_SUFFIXES)
RESUME = ".resume.pt"
WORDS = (r"steps?[=_-]?(\d+)", r"(?:checkpoint|ckpt|iter|iteration|epoch)[=_-]?(\d+)")
PATTERNS = tuple(re.compile(text, re.IGNORECASE) for text in (*WORDS, r"(\d+)$"))


NOTE = "wspace-nowcast"
"""Entry in the header of a file that the command wrote."""


@dataclass(frozen=True)
class Series:
    """Checkpoints of one run, oldest first.

    Attributes:
        paths: Where they are.
        steps: Their steps; None if neither names nor files say.
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


class Listed(NamedTuple):
    """Checkpoints that are there, not read yet.

    Attributes:
        paths: Where they are.
        steps: Their steps, if names alone put all of them in order.
    """

    paths: tuple[Path, ...]
    steps: tuple[int, ...] | None


def find_series(words: Sequence[str], count: int) -> Listed:
    """The checkpoints that the words of a command name.

    Args:
        words: Paths, oldest first; or one folder or pattern, of which the last are taken.
        count: How many are needed.

    Returns:
        As many as are needed.

    Raises:
        CheckpointError: If there are not as many, or they are of several kinds.
    """
    found = _listed(words, count)
    if len(found.paths) != count:
        raise CheckpointError(
            message(
                "nowcast: this is not the number of checkpoints that the predictor needs",
                expected=f"{count}, oldest first",
                got=f"{len(found.paths)}",
                help="one folder, or a pattern in quotes, stands for its last ones"
                if len(found.paths) > count
                else "",
            )
        )
    return found


def read_series(listed: Listed, *, key: str | None = None, uneven: bool = False) -> Series:
    """What the checkpoints hold.

    Args:
        listed: From `find_series`.
        key: Which of several states in a torch file.
        uneven: Take them although their steps are not equally far apart.

    Returns:
        States of the same names, shapes and types, with finite values.

    Raises:
        CheckpointError: If they do not belong together, or nothing says in which order.
    """
    paths, steps = listed
    if made := [str(path) for path in paths if path.is_file() and NOTE in notes_of(path)]:
        raise CheckpointError(
            message(
                "nowcast: a prediction is no state of the run",
                expected="checkpoints that training wrote",
                got=made,
                help="write predictions to another folder, or name the checkpoints one by one",
            )
        )
    if steps is not None:
        _check_steps(paths, steps, uneven=uneven)  # before what may take long
    with working("reading checkpoints"):
        states = tuple(load_checkpoint(path, key=key) for path in paths)
        if steps is None:
            steps = _steps_within(paths, states)
            _check_steps(paths, steps or (), uneven=uneven)
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


def _listed(words: Sequence[str], count: int) -> Listed:
    first = Path(words[0])
    if len(words) == 1 and first.is_dir():
        return _last([item for item in first.iterdir() if _is_checkpoint(item)], words[0], count)
    if len(words) == 1 and glob.has_magic(words[0]) and not first.exists():
        items = [Path(name) for name in glob.glob(words[0])]  # noqa: PTH207
        return _last([item for item in items if not _is_half(item)], words[0], count)
    paths = tuple(map(Path, words))
    if lost := [str(path) for path in paths if not path.exists()]:
        help = "paths of checkpoints; nothing is ever downloaded"
        raise CheckpointError(message("nowcast: there are no such files", got=lost, help=help))
    found = [step for path in paths if (step := step_of(path)) is not None]
    steps = tuple(step for _, step in found)
    same = len(found) == len(paths) and len({rank for rank, _ in found}) == 1
    return Listed(paths, steps if same and _says_order(steps, found[0][0]) else None)


def _says_order(steps: Sequence[int], rank: int) -> bool:
    """Whether numbers are steps: those of one word, or else such as differ."""
    return rank == 0 or len(steps) == 1 or len(set(steps)) > 1


def _is_checkpoint(item: Path) -> bool:
    """Whether an entry of a run's folder is a weight file, or a folder that holds one."""
    ends = (*SUFFIXES, INDEX)
    if item.is_dir():
        return any(file.name.endswith(ends) for file in item.iterdir())
    return item.name.endswith(ends) and not _is_half(item)


def _is_half(item: Path) -> bool:
    """Whether a file is what `wspace fit` writes beside a checkpoint, to resume from."""
    beside = item.name.removesuffix(RESUME) + SUFFIXES[0]
    return item.name.endswith(RESUME) and item.with_name(beside).exists()


def _kind(item: Path) -> str:
    """What an entry is, in words."""
    if item.is_dir():
        return "folders"
    return next((end for end in (INDEX, *SUFFIXES) if item.name.endswith(end)), item.suffix)


def _last(items: Sequence[Path], where: str, count: int) -> Listed:
    """The last checkpoints by step, of those whose names say it most plainly."""
    found = [(*step, item) for item in items if (step := step_of(item)) is not None]
    best = min((rank for rank, _, _ in found), default=0)
    rows = sorted((step, item) for rank, step, item in found if rank == best)
    kinds = Counter(_kind(item) for _, item in rows)
    if len(kinds) > 1:
        folder = Path(where) if Path(where).is_dir() else Path(where).parent
        one = next((kind for kind, _ in kinds.most_common() if kind != "folders"), "")
        raise CheckpointError(
            message(
                f"nowcast: {where} has checkpoints of several kinds",
                expected="one kind, as a training run writes them",
                got=", ".join(f"{number} {kind}" for kind, number in kinds.most_common()),
                help=f"choose by a pattern in quotes, such as '{folder / ('*' + one)}'",
            )
        )
    rows = rows[-count:]
    if len(rows) < count:
        raise CheckpointError(
            message(
                f"nowcast: {where} has too few checkpoints with a step in their names",
                expected=f"{count}, such as step_100.safetensors, checkpoint-100/ or step=100.ckpt",
                got=[str(item) for _, item in rows] or "none",
            )
        )
    return Listed(tuple(item for _, item in rows), tuple(step for step, _ in rows))


# ------------------------------------------------------------------------- order


def _steps_within(paths: Sequence[Path], states: Sequence[Checkpoint]) -> tuple[int, ...] | None:
    """Steps by the plainest names and by what the files hold; None if nothing says any."""
    named = [step_of(path) for path in paths]
    plain = [found[1] if found and found[0] == 0 else None for found in named]
    steps = [x if x is not None else _held(y) for x, y in zip(plain, states, strict=True)]
    known = [step for step in steps if step is not None]
    if len(known) == len(steps):
        return tuple(known)
    loose = [found for found in named if found is not None]
    some = len({step for _, step in loose}) > 1 or len(loose) not in {0, len(named)}
    if not known and not some:
        return None
    got = [
        f"{'no step' if step is None else f'step {step}'} of {path}"
        for path, step in zip(paths, steps, strict=True)
    ]
    raise CheckpointError(
        message(
            "nowcast: nothing says in which order these checkpoints are",
            expected="all of them with a step, in their names or as global_step inside; or none",
            got=got,
            help="rename them, such as step_100.ckpt, step_200.ckpt; a folder or a pattern in "
            "quotes leaves out those without a step",
        )
    )


def _held(state: Checkpoint) -> int | None:
    """The step that a training checkpoint says it is of: Lightning's, or one of wspace."""
    for level in (*state.layout.siblings[:1], *state.layout.metadata.values()):
        found: Any = level.get("global_step")
        if isinstance(found, str):
            with suppress(ValueError):
                found = int(found)
        if isinstance(found, int) and not isinstance(found, bool):
            return found
    return None


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
