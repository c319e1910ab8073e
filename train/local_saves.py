"""The node-local tier of a run: opens it, resumes from it if it has a newer step than the run folder, and saves to it.

`RUN/local.json` names the timeline of the run: a run that goes back to an earlier checkpoint begins another one, so that no later
start takes what the first one saved.
"""

import hashlib
import json
import os
import secrets
import shutil
from contextlib import suppress
from functools import partial
from pathlib import Path

from ..checkpoint.hosts import Hosts, meet_hosts
from ..checkpoint.local_restore import LocalSave, fill_from_local, find_local
from ..checkpoint.local_tier import LocalOutcome, LocalTier
from ..checkpoint.manifest import DamagedCheckpoint
from ..parallel.object_collectives import from_all, from_first
from .checkpointing import facts_of, finite_state
from .config.complain import say
from .config.config import Config, ConfigError
from .config.own_files import write_whole
from .resume import announce, restore
from .run_folder import goes_on
from .session import Session
from .state import random_state

TIMELINE = "local.json"


def open_local_tier(config: Config, run_folder: Path) -> LocalTier | None:
    """Returns the tier, None without checkpoint.local.folder. Collective. Raises ConfigError if a host cannot write the folder."""
    setting = config.checkpoint.local.folder
    if setting is None:
        return None
    name = from_first(lambda: _timeline(run_folder, config.checkpoint.resume))
    hosts = meet_hosts()
    base = Path(setting).expanduser()
    folder, error = base / name / hosts.name, None
    try:
        base.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.is_symlink() or folder.stat().st_uid != os.getuid() or not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(f"{folder} is not a folder of this user that can be written")
    except OSError as caught:
        error = f"cannot be written on {hosts.name}: {' '.join(str(caught).split())}"
    if failures := [each for each in from_all(error) if each is not None]:
        raise ConfigError.of("checkpoint.local.folder", setting, failures[0], "checkpoint.local.folder=/dev/shm/tokenyard or null")
    if hosts.first:
        for other in base.glob(f"{name.split('-')[0]}-*"):  # of timelines of this run that are over
            if other.name != name:
                shutil.rmtree(other, ignore_errors=True)
    if hosts.alone and hosts.rank == 0:
        say(f"checkpoint.local: no copies on other hosts, because {hosts.alone}: a lost host goes back to a durable checkpoint")
    return LocalTier(folder, hosts, config.checkpoint.timeout_seconds)


def find_newer(tier: LocalTier | None, run_folder: Path, step: int) -> LocalSave | None:
    """Returns the newest local save that all ranks can read, if it is after `step`. Collective."""
    if tier is None:
        return None
    return find_local(tier.folder, tier.hosts, step, partial(_refuse, run_folder, tier.hosts))


def resume_locally(session: Session, save: LocalSave) -> None:
    """Restores the state of a local save. Collective. What `save` was found by stays on the hosts, and all other saves go."""
    assert session.local is not None
    restore(session, save.facts, save.generators, partial(fill_from_local, save), save.folder)
    hosts = session.local.hosts
    moved = len({hosts.names[provider] for provider in save.providers})
    session.start = f"resumed after step {session.step} from the local saves of {moved} hosts"
    announce(session.folder, "resume_local", session.start, step=session.step, ranks=len(save.providers), hosts=moved)


def save_locally(session: Session) -> LocalOutcome | None:
    """Starts a local save of this step. Returns the outcome of the one before. Collective.

    Raises RunStop, without a save, if a weight or a moment is not finite.
    """
    tier = session.local
    assert tier is not None
    outcome = tier.finish()
    tier.start(session.step, finite_state(session) | random_state(), facts_of(session))
    return outcome


def _timeline(folder: Path, resume: str) -> str:
    """Returns the name of this run's folder in those of the hosts: the same as before if the run goes on, else a new one."""
    key = hashlib.sha256(os.path.realpath(folder).encode()).hexdigest()[:12]
    path, found = folder / TIMELINE, None
    with suppress(OSError, ValueError):
        found = json.loads(path.read_text())
    if not isinstance(found, str) or not found.isalnum() or not (resume == "auto" or goes_on(resume, folder)):
        found = secrets.token_hex(8)
        write_whole(path, json.dumps(found))
    return f"{key}-{found}"


def _refuse(folder: Path, hosts: Hosts, error: DamagedCheckpoint) -> None:
    say(f"rank {hosts.rank}: {error}")
    announce(folder, "local_refused", str(error), file=str(error.file))
