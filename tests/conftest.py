"""Fixtures for all tests."""

import functools
import os
import re
import resource
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

# Where modules are that tests import, as sameness.py, their_weights.py, cuda_double.py, cluster_schema.py; ranks inherit the path.
FOLDERS = ("checkpoint", ".", "distributed", "moe", "parallel", "launch", "faults", "report", "cuda_lane", "interop", "plan")
os.environ["TRITON_INTERPRET"] = "1"  # kernels run on the CPU; triton reads this when it is imported
sys.path += [str(Path(__file__).parent / folder) for folder in FOLDERS]

import composed_once  # noqa: E402  found on the path
import pool  # noqa: E402

composed_once.install()


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[..., list[Any]]]:
    """`ranks(4, function, *args, **kwargs)` calls a top-level function on 4 gloo ranks; see tests/distributed/pool.py."""
    pools = pool.Pools()
    yield pools.run
    pools.close()


@pytest.fixture(scope="session")
def apart() -> Iterator[Callable[..., Any]]:
    """`apart(function, *args)`: what a function of a module on the path returns in a process that has the stand-in for a GPU.

    Once there, it stays that process's accelerator, which no other test wants. Errors are raised here.
    """
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        yield lambda function, *args: process.submit(function, *args).result(timeout=500)


@pytest.fixture
def child_seconds() -> Callable[[], float]:
    """Processor time of child processes that ended since: on a busy machine the clock on the wall measures the others."""

    def total() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    start = total()
    return lambda: total() - start


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The number of a fault travels with the reports of its tests, to the scorecard; so does what the mark says that it shows."""
    for item in items:
        for mark in item.iter_markers("fault"):
            item.user_properties += zip(("fault", "measured"), mark.args, strict=False)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    import scorecard

    scorecard.report(terminalreporter)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With several workers (-n 2), a file stays on one of them, and so do all files that need ranks: these are started once."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "ranks" if _needs_ranks(config.rootpath / file) else file

    return ByFile(config, log)


@functools.cache
def _needs_ranks(file: Path) -> bool:
    """By a test or a fixture that takes the fixture `ranks`."""
    return re.search(r"^(@pytest\.fixture.*\n)?def (?(1)\w|test_)\w*\([^)]*\branks\b", file.read_text(), re.M) is not None
