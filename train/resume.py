"""Resumes a run: chooses a checkpoint, checks that it belongs to the same run, and restores the state."""

import logging
from collections.abc import Callable
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

from ..checkpoint.folder import checkpoints_in, checkpoints_of
from ..checkpoint.manifest import DamagedCheckpoint, read_manifest
from ..checkpoint.store import checkpoint_at, load_checkpoint, newest_verified
from ..parallel.object_collectives import from_first
from ..parallel.process_group import is_first
from ..parallel.shard import LocalShard
from .config.config import Config, ConfigError
from .config.own_files import write_whole, writing_to
from .config.schema import written
from .config.serialize import config_from_plain
from .logging.journal import Journal
from .preflight import changes, refuse_another_run, refuse_difference
from .run_folder import goes_on, keep_begin, set_aside
from .session import Session
from .state import random_state, restore_random

log = logging.getLogger("tokenyard")


def find_resume(config: Config, folder: Path) -> Path | None:
    """Returns the checkpoint to resume from, None for a new run. Every byte of it was read and verified. Collective.

    In a run folder it is the newest intact one; damaged ones are reported. Raises ConfigError if none is intact, or if the
    requested one is not. Ranks that the launcher restarts resume from the newest that they wrote, whatever was requested.
    """
    setting = config.checkpoint.resume
    again = from_first(lambda: goes_on(setting, folder))
    if setting == "never" and not again:
        if found := from_first(lambda: checkpoints_in(folder / "checkpoints")):
            nearest = "checkpoint.resume=auto or a new run.dir"
            raise ConfigError.of("checkpoint.resume", "never", f"would overwrite {found[0]}", nearest)
        return None
    found = from_first(lambda: candidates(setting, folder, again))
    chosen, refused = first_intact(found, folder)
    if chosen is None and setting not in ("auto", "never") and not found:
        raise ConfigError(f"{setting}: is neither a checkpoint nor a run folder with one")
    if chosen is None and found:
        rest = "" if len(found) == 1 else f" (and none of the {len(found) - 1} before it is whole)"
        raise ConfigError(f"checkpoint.resume={setting}: {refused[0]}{rest}; nearest valid: a new run.dir, or another checkpoint")
    return chosen


def candidates(setting: str, folder: Path, again: bool) -> list[Path]:
    """Returns the checkpoints that a run in `folder` may resume from, the preferred one first."""
    own = checkpoints_in(folder / "checkpoints") if again or setting == "auto" else []
    return own or (checkpoints_of(Path(setting)) if setting not in ("auto", "never") else [])


def keep_timeline(session: Session) -> None:
    """Moves the checkpoints that do not precede the one this run resumes from out of the way, on rank 0. Collective."""
    folder, found = session.folder, session.checkpoint

    def keep() -> None:
        with writing_to(folder):
            aside = set_aside(folder, found) if found is not None else None
            if aside is not None:
                names = ", ".join(path.name for path in checkpoints_in(aside)[::-1])
                text = f"this run goes on from {found}: {names} of another timeline set aside in {aside}"
                announce(folder, "set_aside", text, path=str(aside), goes_on_from=str(found), checkpoints=names.split(", "))
            keep_begin(session.config.checkpoint.resume, folder)

    from_first(keep)


def newest_intact(session: Session) -> Path | None:
    """Returns the newest verified checkpoint of the run; damaged ones are reported. Collective.

    If the run has written none, it is the one that it started from.
    """
    found = from_first(lambda: checkpoints_in(session.folder / "checkpoints"))
    return first_intact(found or [path for path in [session.checkpoint] if path is not None], session.folder)[0]


def first_intact(found: list[Path], folder: Path) -> tuple[Path | None, list[DamagedCheckpoint]]:
    """Returns the first intact checkpoint, and what is wrong with those before it, which is logged too. Collective."""
    refused: list[DamagedCheckpoint] = []

    def refuse(path: Path, error: DamagedCheckpoint) -> None:
        refused.append(error)
        if len(found) > 1:
            text = f"{path} is refused, the checkpoint before it is tried: {error}"
            announce(folder, "checkpoint_refused", text, path=str(path), file=str(error.file), reason=str(error))

    return newest_verified(found, refuse), refused


def as_checkpoint(path: Path) -> Path:
    """Returns `path` itself if it is a checkpoint, otherwise the newest intact one of the run folder `path`."""
    try:
        return checkpoint_at(path)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def resume(session: Session, path: Path) -> None:
    """Restores the state of a verified checkpoint of any layout; on the same layout bit for bit. Collective."""
    manifest = from_first(lambda: read_manifest(path))
    load = partial(load_checkpoint, path, verify=False, optional="random.")
    generators = {name.split(".")[1] for name in manifest.tensors if name.startswith("random.")}
    restore(session, manifest.facts, generators, load, path)
    session.checkpoint = path


def restore(
    session: Session, facts: dict[str, Any], generators: set[str], load: Callable[[dict[str, LocalShard]], object], path: Path
) -> None:
    """Restores the state that `load` fills into the tensors in use. `generators`: kinds of random states in it. Collective.

    `path` is where it comes from, for messages.
    """
    refuse_another_run(session.config, facts, path)
    refuse_other_data(session, facts, path)
    session.saver.wait_for_copies()
    states = config_from_plain(facts["config"]).optimizer.states
    held, same_ranks = session.engine.state_to_load(states), facts["ranks"] == session.parallel.mesh.world
    random = {name: one for name, one in random_state().items() if same_ranks and name.split(".")[1] in generators}
    load(held | random)
    restore_random(random)
    session.extra = facts.get("extra", {})
    session.engine.restore(held, states, facts["step"] - session.extra.get("guard", {}).get("skipped", 0))
    session.step, session.tokens = facts["step"], facts["tokens"]
    data_state = {"rows": [], "since": [], "ended": [], "sources": [], **(facts.get("data_state") or {})}
    session.data.train.restore({**data_state, "step": session.step})
    session.data.validation.restore(data_state)
    identity = session.folder / "run_id"
    if is_first() and facts.get("run_id") and path.parent.parent == session.folder and not identity.exists():
        write_whole(identity, facts["run_id"] + "\n")  # trackers know the run by it, and its file was lost
    session.start = f"resumed after step {session.step} from {path}"
    say_changes(session, facts)


def refuse_other_data(session: Session, facts: dict[str, Any], path: Path) -> None:
    """Raises ConfigError for another tokenizer or corpus, which would not be the same run."""
    now = session.data.facts
    same = {"tokenizer": (facts["tokenizer_hash"], now.tokenizer_hash)}
    if not session.config.data.allow_change:
        same["data"] = (facts["data_fingerprint"], now.train_fingerprint)
    refuse_difference(same, path)


def say_changes(session: Session, facts: dict[str, Any]) -> None:
    """Logs the settings that differ from those of the checkpoint."""
    changed = changes(facts, session.config)
    if changed:
        words = ", ".join(f"{key} {written(before)} -> {written(now)}" for key, (before, now) in changed.items())
        plain = {key: {"before": before, "now": now} for key, (before, now) in changed.items()}
        announce(session.folder, "settings_changed", f"settings changed since step {session.step}: {words}", changed=plain)


def announce(folder: Path, kind: str, text: str, **facts: Any) -> None:
    """Logs a line on the console and in events.jsonl, if that can be written; rank 0 only."""
    if is_first():
        log.warning("%s", text)
        with suppress(OSError), closing(Journal(folder / "events.jsonl")) as events:
            events.event(kind, **facts)
