"""From a recipe to a zoo on disk: whatever is missing is made."""

import os
import platform
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch

from wspace.errors import ZooError, message
from wspace.zoo.cluster import run_on_ray
from wspace.zoo.collection import Zoo
from wspace.zoo.engine import commit_cohort, in_processes
from wspace.zoo.format import (
    FOLDERS,
    HEADER,
    Header,
    clean,
    is_ours,
    listed,
    read_architecture,
    read_header,
    write_header,
)
from wspace.zoo.opening import open_zoo
from wspace.zoo.recipe import Recipe, described, grouping, grown, recipe_from
from wspace.zoo.shard import HALVES, check_size, committed, read_marker

Progress = Callable[[int, int], object]
"""(cohorts committed, cohorts in all), called after each."""


def build(
    recipe: Recipe | str,
    path: str | Path,
    *,
    engine: Literal["local", "ray"] = "local",
    workers: int = 1,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> Zoo:
    """Builds a zoo, or what is missing of it: after a kill, or when the recipe has grown.

    Args:
        recipe: What to build; or a name, as `recipe_from` takes it.
        path: Folder of the zoo; made if it is not there.
        engine: ``"local"``, or ``"ray"`` for a cluster (extra ``ray``).
        workers: Processes; 1 is this one. With ray, cohorts at a time. 0 for as many as there are
            processors.
        dtype: ``"float16"`` or ``"bfloat16"`` to store floats so.
        progress: Called with the numbers of cohorts committed and in all.

    Returns:
        The zoo, opened.

    Raises:
        ZooError: If the folder holds another zoo, a cohort does not fit its weight space, a worker
            keeps dying, or the disk is full. What is committed stays.
        MissingExtra: If ray is asked for and not installed.
    """
    recipe = recipe_from(recipe) if isinstance(recipe, str) else recipe
    folder = Path(path)
    if engine not in {"local", "ray"} or dtype not in {None, *HALVES} or workers < 0:
        expected = f"engine local or ray, workers >= 0, dtype {' or '.join(HALVES)} or None"
        got = f"engine {engine!r}, workers {workers}, dtype {dtype!r}"
        raise ZooError(message("zoo: build takes other options", expected=expected, got=got))
    _make_folders(folder)
    with _alone(folder):
        clean(folder)
        header = _prepare(recipe, folder, dtype)
        known: set[str] = set()
        missing = [k for k in range(header.cohorts) if not _intact(folder, k, known)]
        todo = [*header.stale, *(k for k in missing if k not in header.stale)]
        done = header.cohorts - len(todo)
        made = _made(recipe, folder, todo, engine, workers, dtype)
        for count, _ in enumerate(made, done + 1):
            if progress:
                progress(count, header.cohorts)
        if header.stale:
            write_header(folder, replace(header, stale=()))
    return open_zoo(folder)


# --- what there is --------------------------------------------------------------------------------


def _make_folders(folder: Path) -> None:
    stray = [item.name for item in listed(folder) if not is_ours(item.name)]
    if stray and not (folder / HEADER).exists():
        expected = "a new or empty folder, or a zoo"
        raise ZooError(message(f"zoo: {folder} is in use", expected=expected, got=stray[:5]))
    try:
        for name in FOLDERS:
            (folder / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ZooError(message(f"zoo: {folder} cannot be made", got=str(error))) from error


@contextmanager
def _alone(folder: Path) -> Generator[None]:
    """Context in which no other build writes to the folder; the lock dies with the process."""
    try:
        import fcntl
    except ImportError:  # not on this system
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            help = "wait for it, or stop it"
            raise ZooError(message(f"zoo: {folder} is being built", help=help)) from error
        except OSError:
            pass  # some network file systems know no locks
        yield
    finally:
        os.close(descriptor)


def _prepare(recipe: Recipe, folder: Path, dtype: str | None) -> Header:
    """The header of what is to be built, written; it notes a short last cohort that grows."""
    wanted = described(recipe)
    shards = committed(folder)
    if not shards:  # so what a build that failed at once has written binds nobody
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        versions["wspace"] = _version()
        now = datetime.now(UTC).isoformat(timespec="seconds")
        header = Header(wanted, recipe.cohorts, dtype, versions, now, grouped_by=grouping(recipe))
        write_header(folder, header)
        return header
    if not (folder / HEADER).exists():
        text = f"zoo: {folder / HEADER} is missing beside its shards"
        raise ZooError(message(text, help="restore it from a copy, or empty the folder"))
    header = read_header(folder)
    if header.dtype != dtype:
        got = f"{header.dtype or 'its own type'} in the zoo, {dtype or 'its own type'} now"
        raise ZooError(message(f"zoo: {folder} stores floats otherwise", got=got))
    grows = getattr(type(recipe), "grows", ("count",))
    larger = grown(header.recipe, wanted, grows)
    if recipe.cohorts < header.cohorts or (not larger and recipe.cohorts != header.cohorts):
        got = f"{header.cohorts} cohorts in the zoo, {recipe.cohorts} now"
        raise ZooError(message(f"zoo: {folder} was cut otherwise", got=got))
    if header.grouped_by != grouping(recipe):  # it was begun before the recipe said so
        header = replace(header, grouped_by=grouping(recipe))
        write_header(folder, header)
    if larger:
        last = {header.cohorts - 1} & {*shards}
        stale = tuple(sorted({*header.stale, *last}))
        header = replace(header, recipe=wanted, cohorts=recipe.cohorts, stale=stale)
        write_header(folder, header)
    return header


def _version() -> str:
    try:
        return metadata.version("wspace")
    except metadata.PackageNotFoundError:
        return "unknown"


def _intact(folder: Path, number: int, known: set[str]) -> bool:
    """Whether a shard is committed and whole, and its architecture too; else it is made again."""
    try:
        marker = read_marker(folder, number)
        if marker.architecture not in known:
            read_architecture(folder, marker.architecture)
            known.add(marker.architecture)
        for suffix in marker.files:
            check_size(folder, marker, suffix)
    except ZooError:
        return False
    return True


# --- engines --------------------------------------------------------------------------------------


def _made(
    recipe: Recipe, folder: Path, todo: list[int], engine: str, workers: int, dtype: str | None
) -> Iterable[int]:
    """Numbers of cohorts as they are committed."""
    if engine == "ray":
        return run_on_ray(recipe, folder, todo, workers, dtype)
    workers = workers or os.cpu_count() or 1
    if workers > 1 and len(todo) > 1:
        return in_processes(recipe, folder, todo, workers, dtype)
    return (commit_cohort(recipe, k, folder, dtype) for k in todo)
