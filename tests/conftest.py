"""Fixtures shared by all tests, and the ground rules: reproducible, one thread per worker.

A test that needs random numbers asks for `generator`. What draws from the global generators instead
(the initialisation of a module, say) is seeded before each test, so that neither the order of the
tests nor the number of workers changes a result.
"""

import os
import random
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import settings

settings.register_profile("quick", deadline=None, derandomize=True, database=None, max_examples=25)
settings.register_profile("slow", settings.get_profile("quick"), max_examples=500)
settings.load_profile("quick")  # `--hypothesis-profile=slow` chooses the other

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores
    torch.set_num_threads(1)


def seed_of(request: pytest.FixtureRequest) -> int:
    """Seed that depends on the name of the test alone (`hash` changes from process to process)."""
    return zlib.crc32(request.node.nodeid.encode())


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """Random generator of this test, the same in every run."""
    return torch.Generator().manual_seed(seed_of(request))


@pytest.fixture
def float64() -> Iterator[None]:
    """Default dtype float64 for the duration of the test: new modules and tensors are double."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    """Seed the global generators of Python, NumPy and torch."""
    seed = seed_of(request)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
