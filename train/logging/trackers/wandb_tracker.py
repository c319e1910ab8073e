"""Writes a run to Weights & Biases; without an account offline, for `wandb sync`. No other file imports wandb."""

import configparser
import netrc
import os
import shlex
import shutil
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
from ..journal import readable
from .base import AbstractTracker
from .sections import is_index, sectioned

Records = list[dict[str, Any]]

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
        self._hidden = set[str]()
        self._earlier = earlier_folders(run_dir, run_id)
        """Offline folders of this run's earlier starts. A new one takes their place, with their records."""
        self._before = [readable(run_dir / f"{name}.jsonl") for name in ("metrics", "telemetry", "events")] if self._earlier else []
        """The journals now, as the run resumes: what is logged from here on comes through the queue."""

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
        if self._before and self._run.offline:
            self._repeat(*self._before)
            for folder in self._earlier:
                shutil.rmtree(folder)
        self._before = []

    def _repeat(self, metrics: Records, telemetry: Records, events: Records) -> None:
        """Logs what earlier starts have logged, up to the step from which the run goes on, so that one folder has all."""
        pictures = {record["step"]: record for record in telemetry if record.keys() & {"classes", "attention_logit_AH"}}
        for record in metrics:
            self.log(record)
            if record["step"] in pictures:
                self.telemetry(pictures[record["step"]])
        last = metrics[-1]["step"] if metrics else 0
        for event in events:
            step = event.get("step", 0)
            if event.get("event") == "alert" and step <= last:
                self.alert(event["alert"], event["text"])
            elif event.get("event") == "sample" and step <= last:
                self.sample(step, event["prompt"], event["text"])

    def log(self, record: Mapping[str, Any]) -> None:
        for key in filter(is_index, record.keys() - self._hidden):
            self._run.define_metric(sectioned(key), step_metric="global_step", hidden=True)
            self._hidden.add(key)
        # an axis of our own: wandb's never goes back, so after a resume it would refuse the steps since the checkpoint
        self._run.log({"global_step" if key == "step" else sectioned(key): value for key, value in record.items()})

    def console(self, text: str) -> None:
        if hasattr(self._run, "write_logs"):  # not before wandb 0.26
            self._run.write_logs(text)

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
        self._run.summary.update({sectioned(key): value for key, value in summary.items()})
        self._run.finish(exit_code=exit_code)

    def hint(self) -> str | None:
        """How to send an offline run."""
        if self._run is None or not self._run.offline:
            return None
        return f"to send it to W&B: wandb sync {shlex.quote(str(Path(self._run.dir).parent))}"


def earlier_folders(run_dir: Path, run_id: str) -> list[Path]:
    """Returns the offline folders of a run that were not sent; those that were stay, because W&B has their records."""
    found = [path.parent for path in sorted(run_dir.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb"))]
    return [folder for folder in found if not any(folder.glob("*.synced"))]


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
