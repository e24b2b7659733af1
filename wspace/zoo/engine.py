"""How cohorts are made: one by one, or in several processes.

The bits of a cohort depend on the recipe and on its number only. Each is made by one thread, with
the global random generators seeded from both (and restored afterwards), so that neither the engine
nor the number of workers nor an interruption can be seen in the files.
"""

import ctypes
import multiprocessing
import os
import random
import threading
from collections import Counter
from collections.abc import Generator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from wspace.errors import WSpaceError, ZooError, message
from wspace.zoo.recipe import Cohort, Recipe, check_grouping, generator_of
from wspace.zoo.shard import write_shard

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Options of glibc's ``mallopt``."""

RETRIES = 3
"""How often a process may die of a cohort before that is given up."""


def make_cohort(recipe: Recipe, index: int) -> Cohort:
    """One cohort, made by one thread under seeded global generators, all of it restored.

    Args:
        recipe: Of the zoo.
        index: Number of the cohort.

    Returns:
        The cohort.
    """
    with _reproducible(recipe.seed, index):
        return recipe.cohort(index)


def commit_cohort(recipe: Recipe, index: int, folder: Path, dtype: str | None) -> int:
    """Makes a cohort and writes its shard; returns its number."""
    with _reproducible(recipe.seed, index):
        cohort = recipe.cohort(index)
        check_grouping(recipe, cohort.table)
        write_shard(folder, index, cohort, dtype)
    return index


def in_processes(
    recipe: Recipe, folder: Path, todo: list[int], workers: int, dtype: str | None
) -> Generator[int]:
    """Commits cohorts in several processes; those whose worker died are tried again, alone.

    Args:
        recipe: What to build.
        folder: Of the zoo.
        todo: Numbers of the cohorts.
        workers: Number of processes.
        dtype: As for `build`.

    Yields:
        Numbers, as their shards are committed.

    Raises:
        ZooError: If workers keep dying.
    """
    left, suspects, deaths = list(todo), list[int](), Counter[int]()
    while left:
        turn = list(suspects or left)
        at_once = 1 if suspects else workers
        try:
            for number in _one_pool(recipe, folder, turn, at_once, dtype):
                left.remove(number)
                yield number
            suspects = []
        except BrokenProcessPool as error:  # all of its processes are gone, not only the one
            if suspects:
                deaths[next(k for k in turn if k in left)] += 1
            _give_up(deaths, error)
            suspects = [k for k in turn if k in left][: len(suspects) or workers + 1]


def _give_up(deaths: Counter[int], error: Exception) -> None:
    for number, count in deaths.items():
        if count == RETRIES:
            raise ZooError(
                message(
                    f"zoo: cohort {number} cannot be made",
                    got=f"its process died {count} times, when it was the only one",
                    help="out of memory? look at the system's log; what is committed stays",
                )
            ) from error


def _one_pool(
    recipe: Recipe, folder: Path, todo: list[int], workers: int, dtype: str | None
) -> Generator[int]:
    pool = ProcessPoolExecutor(
        min(workers, len(todo)), multiprocessing.get_context("spawn"), initializer=_start_worker
    )
    rest = iter(list(todo))
    running: set[Future[int]] = set()
    try:
        while True:
            for number in rest:
                running.add(pool.submit(commit_cohort, recipe, number, folder, dtype))
                if len(running) > workers:  # one waits for the next that is free
                    break
            if not running:
                return
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for future in sorted(finished, key=lambda it: it.exception() is not None):
                yield future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    """One thread, memory that is kept, and an end when the builder ends, however it does."""
    torch.set_num_threads(1)
    _keep_memory()
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _keep_memory() -> None:
    """Freed memory stays with the process, where the C library is glibc.

    Every training step asks for the same buffers. Given back to the system and asked for again,
    they are fresh pages, and making those takes about as long as the arithmetic of small networks.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    for option in (TRIM_THRESHOLD, MMAP_THRESHOLD):
        mallopt(option, 1 << 30)


@contextmanager
def _reproducible(seed: int, index: int) -> Generator[None]:
    threads = torch.get_num_threads()
    python, numpy = random.getstate(), np.random.get_state()
    fixed = generator_of(seed, index).initial_seed()
    try:
        torch.set_num_threads(1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(fixed)
            random.seed(fixed)
            np.random.seed(fixed % 2**32)
            yield
    except WSpaceError:
        raise
    except Exception as error:
        error.add_note(f"while cohort {index} of a zoo was made")
        raise
    finally:
        torch.set_num_threads(threads)
        random.setstate(python)
        np.random.set_state(numpy)
