"""A published zoo as a recipe, so that it is built, resumed and checked as any other."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from datasets_zoo.published import inr, model_zoo, small_cnn, wild_park
from datasets_zoo.published.files import Group
from wspace.errors import ZooError, message
from wspace.zoo.build import build
from wspace.zoo.collection import Zoo
from wspace.zoo.recipe import Cohort

READERS: dict[str, Callable[[Path, bool], list[Group]]] = {
    "dws_inr": inr.dws_groups,
    "nfn_siren": inr.nfn_groups,
    "small_cnn_zoo": small_cnn.groups,
    "model_zoo": model_zoo.groups,
    "cnn_wild_park": wild_park.groups,
}
"""(folder, only last checkpoints) → groups of networks, by kind."""

GROUPED = {
    "nfn_siren": "image",
    "small_cnn_zoo": "network",
    "model_zoo": "network",
    "cnn_wild_park": "network",
}
"""Column whose values belong together, by kind; DWSNets' images have one network each."""


@dataclass(frozen=True)
class Published:
    """A published zoo in a local folder; see `datasets_zoo.published`.

    Attributes:
        kind: One of `READERS`.
        source: The folder.
        last: Whether to leave out all but the last checkpoint of every network, where a zoo has
            several.
        size: Networks in one cohort.
        seed: Without meaning: nothing is drawn.
    """

    kind: str
    source: str = field(compare=False)
    last: bool = False
    size: int = 1000
    seed: int = 0

    grows: ClassVar[tuple[str, ...]] = ()

    @property
    def grouped_by(self) -> str | None:
        """Column whose values no split parts unless it is told to."""
        return GROUPED.get(self.kind)

    @property
    def cohorts(self) -> int:
        """Number of cohorts."""
        return len(self._parts())

    def cohort(self, index: int) -> Cohort:
        """Reads the networks of one cohort.

        Args:
            index: Which.

        Returns:
            Networks with the columns that the reader of their kind documents.
        """
        group, rows = self._parts()[index]
        state, table = group.load(rows)
        return Cohort(group.architecture, state, table)

    def _parts(self) -> list[tuple[Group, range]]:
        return [
            (group, range(start, min(start + self.size, group.count)))
            for group in _groups(self.kind, self.source, self.last, _changed(Path(self.source)))
            for start in range(0, group.count, self.size)
        ]


@lru_cache(maxsize=4)
def _groups(kind: str, source: str, last: bool, changed: tuple[int, ...]) -> list[Group]:
    del changed  # of what was listed before, nothing is known any more
    if kind not in READERS:
        raise ZooError(
            message(
                "published: no such kind", expected=f"one of {', '.join(READERS)}", got=repr(kind)
            )
        )
    return READERS[kind](Path(source).expanduser(), last)


def _changed(root: Path) -> tuple[int, ...]:
    """When files were last put into or taken out of a folder, and its lists were written."""
    root = root.expanduser()
    return tuple(p.stat().st_mtime_ns for p in (root, *sorted(root.glob("*.json"))) if p.exists())


def import_zoo(kind: str, source: str | Path, path: str | Path, **options: Any) -> Zoo:
    """Copies a published zoo into wspace's format.

    Args:
        kind: One of the table of `datasets_zoo.published`.
        source: Folder of the unpacked zoo.
        path: Folder to write.
        **options: Other fields of `Published`.

    Returns:
        The zoo.

    Raises:
        ZooError: If the folder holds no such zoo, or a file of it cannot be read.
    """
    return build(Published(kind, str(source), **options), path)
