"""Writes a run to Weights & Biases; without an account offline, for `wandb sync`. No other file imports wandb."""

import configparser
import netrc
import os
import sys
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from ...config.config import TrackerConfig
from ...config.redact import redact, redact_plain
from ..expert_stats.alerts import ERRORS, TITLES
from ..expert_stats.heatmap import load_map, load_ratio
from .base import AbstractTracker

LARGEST_TABLE = 1024
"""The most experts, of all layers together, that a table lists: more take longer to write than a picture is worth."""
TABLE_COLUMNS: list[Any] = ["layer", "expert", "tokens", "load over even", "dead"]


class WandbTracker(AbstractTracker):
    """A W&B run in `run_dir`/wandb.

    tracker.project and run.name, where they are set, take precedence over wandb's environment variables of the same meaning.
    """

    name = "wandb"

    def __init__(self, config: TrackerConfig, run_dir: Path, run_id: str, run_name: str | None = None):
        self._config, self._run_dir, self._run_id, self._run_name = config, run_dir, run_id, run_name
        self._run: Any = None

    def start(self, facts: Mapping[str, Any]) -> None:
        arguments = redact_plain(init_arguments(self._config, self._run_dir, self._run_id, self._run_name))
        if arguments["mode"] == "offline":
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read at import; offline means that nothing leaves the machine
        os.environ.setdefault("WANDB_SILENT", "true")  # the setting below does not reach what login prints
        import wandb

        # The metadata contains the command line.
        secret = redact(" ".join(sys.argv)) != " ".join(sys.argv)
        # console=off: capturing stdout would put wandb between training and its terminal. The time limits stay below those of
        # Trackers.finish, so that a server out of reach is named as the cause and does not hold up the end of the process.
        settings = wandb.Settings(silent=True, console="off", x_disable_meta=secret, init_timeout=45.0, finish_timeout=45.0)
        self._run = wandb.init(**arguments, config=dict(facts), settings=settings)
        self._run.define_metric("global_step", hidden=True)
        self._run.define_metric("*", step_metric="global_step")

    def log(self, record: Mapping[str, Any]) -> None:
        # an axis of our own: wandb's never goes back, so after a resume it would refuse the steps since the checkpoint
        self._run.log({"global_step" if key == "step" else key: value for key, value in record.items()})

    def telemetry(self, record: Mapping[str, Any]) -> None:
        """Shows load and gradient norms, layer x expert, as a picture, a table and histograms."""
        import wandb

        load = load_ratio(record["counts_LE"])
        logged: dict[str, Any] = {"global_step": record["step"]}
        logged["experts/load"] = wandb.Image(load_map(record["counts_LE"]), caption="load: layers down, experts across")
        logged["experts/load_over_even"] = wandb.Histogram(np_histogram=np.histogram(load, bins=32))
        if "grad_norm_LE" in record:
            logged["experts/grad_norm"] = wandb.Histogram(np_histogram=np.histogram(record["grad_norm_LE"], bins=32))
        if load.size <= LARGEST_TABLE:
            logged["experts/table"] = wandb.Table(columns=TABLE_COLUMNS, data=table_rows(record))
        self._run.log(logged)

    def alert(self, kind: str, text: str) -> None:
        from wandb.sdk.wandb_alerts import AlertLevel

        level = AlertLevel.ERROR if kind in ERRORS else AlertLevel.WARN
        self._run.alert(title=TITLES.get(kind, kind), text=text, level=level)

    def sample(self, step: int, prompt: str, text: str) -> None:
        import wandb

        html = f"<pre><b>{escape(prompt)}</b>{escape(text)}</pre>"
        self._run.log({"global_step": step, "sample": wandb.Html(html, inject=False)})

    def finish(self, exit_code: int, summary: Mapping[str, Any]) -> None:
        self._run.summary.update(dict(summary))
        self._run.finish(exit_code=exit_code)


def table_rows(record: Mapping[str, Any]) -> list[Any]:
    """Returns a row for each expert of each layer."""
    loads = load_ratio(record["counts_LE"]).tolist()
    rows = zip(record["layers"], record["counts_LE"], loads, record["dead_LE"], strict=True)
    return [
        [layer, expert, count, load, dead]
        for layer, counts_E, load_E, dead_E in rows
        for expert, (count, load, dead) in enumerate(zip(counts_E, load_E, dead_E, strict=True))
    ]


def init_arguments(config: TrackerConfig, run_dir: Path, run_id: str, run_name: str | None) -> dict[str, Any]:
    """Returns the arguments of `wandb.init`, which reads entity, group and tags from the environment.

    Raises ValueError: see `mode`.
    """
    defaults, environment = TrackerConfig(), os.environ
    return {
        "mode": mode(),
        "dir": str(run_dir),
        "id": run_id,
        "resume": "allow",
        "reinit": "create_new",  # a sweep runs several jobs in one process
        "project": config.project if config.project != defaults.project else environment.get("WANDB_PROJECT") or defaults.project,
        "name": run_name or environment.get("WANDB_NAME") or run_dir.name,
        "job_type": environment.get("WANDB_JOB_TYPE") or "train",
    }


def mode() -> str | None:
    """Returns offline if no account is configured, else None: wandb's own settings (WANDB_MODE, `wandb offline`) decide.

    Raises ValueError where wandb would ask for an account on the terminal.
    """
    chosen = os.environ.get("WANDB_MODE")
    if account():
        return chosen
    if chosen in ("online", "shared", "run"):
        raise ValueError(f"WANDB_MODE is {chosen}, which needs an account: set WANDB_API_KEY, run `wandb login`, or use offline")
    return chosen or "offline"


def account() -> bool:
    """Whether an API key is in the environment, or in netrc for W&B's host."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    paths = (Path(os.environ.get("NETRC", "~/.netrc")).expanduser(), Path("~/_netrc").expanduser())
    try:
        known = netrc.netrc(next((path for path in paths if path.exists()), paths[0])).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return not _hosts().isdisjoint(known)


def _hosts() -> set[str]:
    """Returns the server of a company, from the environment or where `wandb login --host` stores it; else W&B's own two names."""
    settings = configparser.ConfigParser()
    folder = os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb")
    settings.read(Path(folder).expanduser() / "settings")
    server = os.environ.get("WANDB_BASE_URL") or settings.get("default", "base_url", fallback="")
    return {urlsplit(server).netloc} if server else {"api.wandb.ai", "api.forge.coreweave.com"}
