"""Fixtures for all tests."""

import importlib.util
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Where modules are that tests import, as sameness.py, their_weights.py, cluster_schema.py; ranks inherit the path.
sys.path += [str(Path(__file__).parent / folder) for folder in ("distributed", "moe", "launch")]


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[..., list[Any]]]:
    """`ranks(4, function, *args, **kwargs)` calls a top-level function on 4 gloo ranks; see tests/distributed/pool.py."""
    pools = _pool_module().Pools()
    yield pools.run
    pools.close()


@pytest.fixture
def child_seconds() -> Callable[[], float]:
    """Processor time of child processes that ended since: on a busy machine the clock on the wall measures the others."""

    def total() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    start = total()
    return lambda: total() - start


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With several workers, a file stays on one of them, and so does all that needs ranks, which are started once."""
    for item in items:
        needs_ranks = "ranks" in getattr(item, "fixturenames", ())
        item.add_marker(pytest.mark.xdist_group("ranks" if needs_ranks else str(item.path)))


def _pool_module() -> Any:
    """By path: with importlib import mode no folder of tests is on the import path."""
    path = Path(__file__).parent / "distributed" / "pool.py"
    spec = importlib.util.spec_from_file_location("tokenyard_test_pool", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
