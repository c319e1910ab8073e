"""Fixtures for all tests."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# tests/distributed/parity.py, which tests import; ranks inherit the path, so they find it too.
sys.path.append(str(Path(__file__).parent / "distributed"))
# tests/launch/cluster_schema.py.
sys.path.append(str(Path(__file__).parent / "launch"))


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[..., list[Any]]]:
    """`ranks(4, function, *args, **kwargs)` calls a top-level function on 4 gloo ranks; see tests/distributed/pool.py."""
    pools = _pool_module().Pools()
    yield pools.run
    pools.close()


def _pool_module() -> Any:
    """By path: with importlib import mode no folder of tests is on the import path."""
    path = Path(__file__).parent / "distributed" / "pool.py"
    spec = importlib.util.spec_from_file_location("tokenyard_test_pool", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
