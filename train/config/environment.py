"""The environment variables that launchers set for a rank."""

import os

from .config import ConfigError


def world_size() -> int:
    """Returns the number of ranks that the launcher started; 1 without a launcher.

    Raises ConfigError if a number of ranks is none.
    """
    local_world_size()
    return _positive("WORLD_SIZE") or 1


def local_world_size() -> int | None:
    """Returns the number of ranks on this host; None if the launcher does not set it. Raises ConfigError if it is no number."""
    return _positive("LOCAL_WORLD_SIZE")


def ranks_restarted() -> bool:
    """Whether torch's launcher has restarted the ranks."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def job_restarted() -> bool:
    """Whether a launcher or a cluster has restarted the job."""
    return ranks_restarted() or os.environ.get("SLURM_RESTART_COUNT", "0") != "0"


def launch_id() -> str:
    """Returns an id that all restarts of a job share; empty if there is none."""
    return os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID", "")


def restarts_share_store() -> bool:
    """Whether restarted ranks would find the addresses of killed ranks in the store of torchrun."""
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return shared and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"


def _positive(name: str) -> int | None:
    value = os.environ.get(name)
    if value is None:
        return None
    if not value.isdecimal() or int(value) < 1:
        raise ConfigError.of(name, value, "must be a positive integer in the environment", f"{name}=1")
    return int(value)
