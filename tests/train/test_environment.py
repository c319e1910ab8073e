"""Variables of launchers; those with numbers of ranks are tested in test_parallel_rules.py."""

import pytest
from tokenyard.train.config.environment import ranks_restarted, restarts_share_store


@pytest.mark.parametrize(("shared", "restarts", "expected"), [("True", "3", True), ("True", "0", False), ("False", "3", False)])
def test_a_store_that_outlives_the_ranks(shared: str, restarts: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", shared)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    assert restarts_share_store() is expected


def test_without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    assert not restarts_share_store() and not ranks_restarted()
