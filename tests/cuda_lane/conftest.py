"""A process that has the stand-in for a GPU: once there, it stays that process's accelerator, which no other test wants."""

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest


@pytest.fixture(scope="session")
def apart() -> Iterator[Callable[..., Any]]:
    """`apart(function, *args)`: what a function of a module on the path returns there. Errors are raised here."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        yield lambda function, *args: process.submit(function, *args).result(timeout=500)
