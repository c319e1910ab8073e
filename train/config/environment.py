"""What a launcher tells a rank through its environment."""

import os

from .config import ConfigError


def world_size() -> int:
    """How many ranks the launcher started; 1 without a launcher. ConfigError if that, or the ranks of this host, is no number."""
    local_world_size()
    return _positive("WORLD_SIZE") or 1


def local_world_size() -> int | None:
    """Ranks of this host, if the launcher says so. ConfigError if it is no number."""
    return _positive("LOCAL_WORLD_SIZE")


def restarted() -> bool:
    """Whether torch's launcher has started the ranks again."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def started_again() -> bool:
    """Whether a launcher or a cluster has started the same job again."""
    return restarted() or os.environ.get("SLURM_RESTART_COUNT", "0") != "0"


def launch_id() -> str:
    """The same in all starts of one launch; empty if nothing says which it is."""
    return os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID", "")


def may_find_the_dead() -> bool:
    """Whether ranks that are started again would find, in torchrun's own store, the addresses of those that were killed."""
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return shared and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"


def _positive(name: str) -> int | None:
    value = os.environ.get(name)
    if value is None:
        return None
    if not value.isdecimal() or int(value) < 1:
        raise ConfigError.of(name, value, "must be a positive integer in the environment", f"{name}=1")
    return int(value)
