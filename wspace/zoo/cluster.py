"""Building a zoo on a Ray cluster: tasks that may die, and are tried again.

A task writes its shard itself where it sees the folder of the zoo (one machine, or a shared disk);
elsewhere it sends the cohort back, and the driver writes it. The driver alone decides what is still
to do, so a task that was run twice writes the same bits twice.
"""

from collections.abc import Generator
from pathlib import Path
from typing import Any

from wspace.errors import MissingExtra, ZooError, message
from wspace.zoo.engine import RETRIES, commit_cohort, make_cohort
from wspace.zoo.format import HEADER
from wspace.zoo.recipe import Cohort, Recipe
from wspace.zoo.shard import write_shard


def run_on_ray(
    recipe: Recipe, folder: Path, todo: list[int], workers: int, dtype: str | None
) -> Generator[int]:
    """Makes cohorts as Ray tasks of one processor each.

    Ray is started on this machine unless it runs, or ``RAY_ADDRESS`` names a cluster.

    Args:
        recipe: What to build.
        folder: Of the zoo.
        todo: Numbers of the cohorts.
        workers: How many are under way at a time; 0 for as many as the cluster has processors.
        dtype: As for `build`.

    Returns:
        Numbers, as their shards are committed.

    Raises:
        MissingExtra: If ray is not installed.
    """
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise MissingExtra(
            message("zoo: building on a cluster needs ray", help="pip install 'wspace[ray]'")
        ) from error
    return _run(ray, recipe, folder.resolve(), todo, (workers, dtype))


def _run(
    ray: Any, recipe: Recipe, folder: Path, todo: list[int], options: tuple[int, str | None]
) -> Generator[int]:
    workers, dtype = options
    ours = not ray.is_initialized()
    if ours:
        ray.init(include_dashboard=False, log_to_driver=False)
    try:
        workers = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        task = ray.remote(num_cpus=1, max_retries=RETRIES)(_task)
        token = (folder / HEADER).read_text(encoding="utf-8")
        shared = ray.put(recipe)
        rest, running = iter(todo), dict[Any, int]()
        while True:
            for number in rest:
                running[task.remote(shared, number, str(folder), token, dtype)] = number
                if len(running) >= workers:
                    break
            if not running:
                return
            (ready,), _ = ray.wait(list(running), num_returns=1)
            number = running.pop(ready)
            cohort = _result(ray, ready, number)
            if cohort is not None:
                write_shard(folder, number, cohort, dtype)
            yield number
    finally:
        if ours:
            ray.shutdown()


def _task(recipe: Recipe, number: int, folder: str, token: str, dtype: str | None) -> Cohort | None:
    """Commits a cohort where the folder is this zoo's; elsewhere returns it."""
    header = Path(folder) / HEADER
    if header.is_file() and header.read_text(encoding="utf-8") == token:
        commit_cohort(recipe, number, Path(folder), dtype)
        return None
    return make_cohort(recipe, number)


def _result(ray: Any, reference: Any, number: int) -> Cohort | None:
    try:
        return ray.get(reference)
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.ObjectLostError) as error:
        raise ZooError(
            message(
                f"zoo: the ray task of cohort {number} died {RETRIES + 1} times",
                got=str(error),
                help="look at ray's log; what is committed stays, so build again",
            )
        ) from error
