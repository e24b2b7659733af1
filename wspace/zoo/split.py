"""Splits that never part what belongs together, and never move anyone.

Where a network falls depends on nothing but a hash of the value that its group shares (the image
that an INR was fitted to, say) and on the split's seed. So all views of one image fall together,
and a network stays where it is when others are added.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from wspace.errors import ZooError, message
from wspace.zoo.format import fail, listed, read_json, write_json

PARTS = ("train", "val", "test")
VERSION = 1
COLUMN = "split"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Split:
    """The rule of a split.

    Attributes:
        fractions: Shares of train, val and test; None if the column ``split`` says it.
        by: Column whose values stay together; None for single networks.
        seed: Of the hash.
        version: Of the hash: another version may put networks elsewhere.
    """

    fractions: tuple[float, float, float] | None = (0.8, 0.1, 0.1)
    by: str | None = None
    seed: int = 0
    version: int = VERSION

    def __post_init__(self) -> None:
        shares = self.fractions
        if shares and not (min(shares) >= 0 and 0 < sum(shares) <= 1 + 1e-9):
            expected = "shares of at least 0 that sum to at most 1"
            raise ZooError(message("split: no such fractions", expected=expected, got=str(shares)))
        if self.version != VERSION:
            got = f"version {self.version}; this wspace knows {VERSION}"
            raise ZooError(message("split: made by another version", got=got))

    def places(self, keys: np.ndarray) -> np.ndarray:
        """Part of every key: 0 train, 1 val, 2 test, 3 none.

        Args:
            keys: Values that decide; equal ones fall together.

        Returns:
            Integers, one for each key.
        """
        bounds = np.cumsum(self.fractions or (0.0, 0.0, 0.0))
        if abs(bounds[-1] - 1) < 1e-9:
            bounds[-1] = 1.0  # the rest would be rounding
        values, back = np.unique(keys, return_inverse=True)
        points = np.array([self._point(value) for value in values.tolist()], dtype=np.float64)
        return np.searchsorted(bounds, points, side="right")[back.reshape(-1)]

    def _point(self, value: object) -> float:
        """A number in [0, 1) that depends on the value and on the rule alone."""
        text = f"{self.version}\0{self.seed}\0{self.by or ''}\0{value!r}"
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
        return int.from_bytes(digest[:6], "big") / 2**48  # exact in a float


def rule_of(
    name: str,
    saved: Split | None,
    asked: Mapping[str, Any],
    table: Mapping[str, np.ndarray],
    grouped_by: str | None,
) -> Split:
    """The rule saved under a name, if it is what is asked for; else a new one.

    Args:
        name: Of the rule.
        saved: What is saved under it.
        asked: Shares by part, `by` and `seed`; those that are not there are left to the rule.
        table: Of the zoo; a column ``split`` that names a part decides unless shares are asked for.
        grouped_by: What the zoo's recipe declares.

    Returns:
        The rule.

    Raises:
        ZooError: If something else is saved.
    """
    by_column = COLUMN in table and bool(np.isin(PARTS, table[COLUMN]).any())
    by_column = by_column and not {*PARTS} & {*asked}
    rule = saved or Split(None if by_column else Split.fractions, grouped_by)
    if {*PARTS} & {*asked}:
        known = dict(zip(PARTS, rule.fractions or Split.fractions or (), strict=True))
        a, b, c = (asked.get(part, known[part]) for part in PARTS)
        rule = replace(rule, fractions=(a, b, c))
    rule = replace(rule, **{key: asked[key] for key in ("by", "seed") if key in asked})
    if saved is not None and rule != saved:
        expected, help = f"what is saved: {saved}", "choose another name"
        raise ZooError(
            message(f"split: {name!r} is taken", expected=expected, got=str(rule), help=help)
        )
    return rule


def leaks(parts: Mapping[str, np.ndarray]) -> list[str]:
    """Values that are in two parts at once, each with the parts it is in.

    Args:
        parts: The grouping column of every part.

    Returns:
        One line for each such value; empty if nothing leaks.
    """
    seen: dict[object, list[str]] = {}
    for name, values in parts.items():
        for value in np.unique(values).tolist():
            seen.setdefault(value, []).append(name)
    return [f"{value!r} in {' and '.join(names)}" for value, names in seen.items() if names[1:]]


def split_names(folder: Path) -> list[str]:
    """Names of the splits that a zoo holds."""
    return [item.stem for item in listed(folder / "splits") if item.suffix == ".json"]


def read_split(folder: Path, name: str) -> Split | None:
    """The rule of a split; None if there is none of this name.

    Args:
        folder: Of the zoo.
        name: Of the split.

    Returns:
        The rule.

    Raises:
        ZooError: If the name is no name, or the file is damaged.
    """
    path = _place(folder, name)
    if not path.exists():
        return None
    data = read_json(path)
    try:
        shares = data["fractions"]
        fractions = None if shares is None else _three(*shares)
        by = None if data["by"] is None else str(data["by"])
        return Split(fractions, by, int(data["seed"]), int(data["version"]))
    except (KeyError, TypeError, ValueError) as error:
        fail(path, f"{type(error).__name__}: {error}", error, help="delete it and split again")


def _three(train: float, val: float, test: float) -> tuple[float, float, float]:
    return float(train), float(val), float(test)


def write_split(folder: Path, name: str, split: Split) -> None:
    """Writes the rule of a split."""
    write_json(_place(folder, name), asdict(split))


def _place(folder: Path, name: str) -> Path:
    if not _NAME.fullmatch(name):
        expected = "letters, digits, '_', '-' and '.'"
        raise ZooError(message(f"split: {name!r} is no name", expected=expected))
    return folder / "splits" / f"{name}.json"
