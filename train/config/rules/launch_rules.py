"""The rules of launch.*: values that a cluster would refuse, or that a shell on the way would change."""

import re
from collections.abc import Iterator

from ..config import Config
from ..launch import Launcher
from .rule import Violation

HOST = r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?"
RENDEZVOUS = rf"(?P<host>{HOST}|\[[0-9A-Fa-f:]+\]):(?P<port>\d{{1,5}})"
SHORT_TIME = r"(?:(?P<days>\d+)-)?(?P<hours>\d{1,2}):(?P<minutes>[0-5]\d):(?P<seconds>[0-5]\d)"
PLAIN_PATH = r"[\w./@+=,:-]+"
"""Has no special meaning for sbatch, a shell or srun's names of log files."""
WORD = r"[\w.,@+:-]+"
DNS_LABEL = r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?"
IMAGE = r"[\w./:@+-]+"
SLURM_IMAGE = r"[\w./:@+#-]+"
"""With # as enroot writes a registry: nvcr.io#nvidia/pytorch:26.06-py3."""
MOUNT = r"/[\w./@+-]*:/[\w./@+-]*(:\w+)?"
SECRET = r"[A-Za-z_]\w*=[a-z0-9][-a-z0-9.]*/[-.\w]+"
TAINT = r"([a-z0-9][-a-z0-9.]*/)?[A-Za-z0-9][-.\w]*"

OPTIONS_FROM_SETTINGS = {
    "--no-kill": "launch.slurm.spares",
    "--nodes": "launch.nodes",
    "-N": "launch.nodes",
    "--ntasks": "launch.nodes",
    "-n": "launch.nodes",
    "--ntasks-per-node": "launch.ranks",
    "--cpus-per-task": "launch.cores",
    "-c": "launch.cores",
    "--gpus-per-node": "launch.gpus",
    "--time": "launch.slurm.time",
    "-t": "launch.slurm.time",
    "--signal": "launch.slurm.warning",
    "--partition": "launch.slurm.partition",
    "-p": "launch.slurm.partition",
    "--account": "launch.slurm.account",
    "-A": "launch.slurm.account",
    "--job-name": "run.name",
    "-J": "run.name",
    "--output": "run.dir",
    "-o": "run.dir",
    "--wrap": "the overrides",
    "--mem": "launch.memory_gib",
    "--container-image": "launch.slurm.container",
    "--container-mounts": "launch.slurm.mounts",
}
"""Options of sbatch that follow from settings, which launch.slurm.lines may not repeat."""


def launchers(config: Config, world: int) -> Iterator[Violation]:
    """Checks the settings of the chosen launcher. Those that need the environment are in launch/launchers/torchrun.py."""
    c = config.launch
    if c.kind is Launcher.inline and world == 1:
        for key, count in (("launch.ranks", c.ranks), ("launch.nodes", c.nodes)):
            if count > 1:
                yield Violation(key, "launch=inline starts no ranks, launch=torchrun does", [1])
    yield from [*_rendezvous(config), *_elastic(config)]
    match c.kind:
        case Launcher.slurm:
            yield from [*_slurm(config), *_shared_folder(config), *_resume(config)]
        case Launcher.kubernetes:
            yield from [*_kubernetes(config), *_shared_folder(config), *_resume(config)]
        case Launcher.deepspeed:
            yield from _deepspeed(config)
        case _:
            pass


def seconds(time: str) -> int | None:
    """Seconds of a time limit in Slurm's format; None if it is not valid."""
    match = re.fullmatch(SHORT_TIME, time)
    if match is None:
        return None
    days, hours, minutes, rest = (int(part or 0) for part in match.group("days", "hours", "minutes", "seconds"))
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


def _rendezvous(config: Config) -> Iterator[Violation]:
    text, kind = config.launch.rendezvous, config.launch.kind
    if text is None:
        return
    if kind in (Launcher.slurm, Launcher.kubernetes):
        yield Violation("launch.rendezvous", f"launch={kind.name} finds the hosts itself", [None])
    match = re.fullmatch(RENDEZVOUS, text)
    if match is None or not 0 < int(match["port"]) < 65536:
        host = match["host"] if match else text.partition(":")[0]
        known = host if re.fullmatch(HOST, host) else "HOST"
        yield Violation("launch.rendezvous", "must be HOST:PORT with a port below 65536", [f"{known}:29500"])


def _elastic(config: Config) -> Iterator[Violation]:
    c = config.launch
    if c.min_nodes is None:
        return
    if c.min_nodes > c.nodes:
        yield Violation("launch.min_nodes", f"must be at most launch.nodes={c.nodes}", [c.nodes])
    if c.kind is not Launcher.torchrun or c.rendezvous is None:
        yield Violation(
            "launch.min_nodes", "needs launch=torchrun and launch.rendezvous=HOST:PORT, where hosts may come and go", [None]
        )
    if c.min_nodes < c.nodes and not c.max_restarts:
        yield Violation("launch.max_restarts", "must be at least 1 with launch.min_nodes: a lost host starts all ranks again", [1])


def _slurm(config: Config) -> Iterator[Violation]:
    c = config.launch.slurm
    for key, text in (("launch.slurm.partition", c.partition), ("launch.slurm.account", c.account)):
        if text is not None and not re.fullmatch(WORD, text):
            yield Violation(key, "must be a name, without spaces", [None])
    limit = seconds(c.time)
    if not limit:
        yield Violation("launch.slurm.time", "must be HH:MM:SS or DAYS-HH:MM:SS and not zero", ["24:00:00"])
    elif c.warning >= limit:
        yield Violation("launch.slurm.warning", f"must be below launch.slurm.time={c.time}, in seconds", [limit - 1])
    for line in c.lines:
        option = re.match(r"--[a-z][a-z0-9-]*|-[A-Za-z]", line)
        others = [other for other in c.lines if other != line]
        if option is None or not line.isprintable():
            yield Violation("launch.slurm.lines", f"{line!r} must be one option of sbatch, as --qos=high", [others])
        elif option[0] in OPTIONS_FROM_SETTINGS:
            yield Violation("launch.slurm.lines", f"{option[0]} comes from {OPTIONS_FROM_SETTINGS[option[0]]}", [others])

    if c.container is not None and not re.fullmatch(SLURM_IMAGE, c.container):
        yield Violation("launch.slurm.container", "must be the name or the file of a container image", [None])
    if c.mounts and c.container is None:
        yield Violation("launch.slurm.mounts", "must be [], only launch.slurm.container mounts folders", [[]])
    yield from _each("launch.slurm.mounts", c.mounts, MOUNT, "FOLDER:FOLDER")
    yield from _each("launch.slurm.setup", c.setup, r"[^\x00-\x1f\x7f]+", "a line of bash")


def _each(key: str, values: list[str], pattern: str, what: str) -> Iterator[Violation]:
    """Checks each of a list; what is right is the nearest valid value."""
    wrong = [value for value in values if not re.fullmatch(pattern, value)]
    if wrong:
        yield Violation(key, f"{wrong[0]!r} is not {what}", [[value for value in values if value not in wrong]])


def _kubernetes(config: Config) -> Iterator[Violation]:
    c = config.launch.kubernetes
    yield from _each("launch.kubernetes.secrets", c.secrets, SECRET, "VARIABLE=SECRET/KEY")
    yield from _each("launch.kubernetes.tolerations", c.tolerations, TAINT, "the key of a taint, as nvidia.com/gpu")
    if c.image is None or not re.fullmatch(IMAGE, c.image):
        yield Violation(
            "launch.kubernetes.image", "must be the name of a container image with tokenyard in it", ["REGISTRY/NAME:TAG"]
        )
    names = (
        ("namespace", c.namespace, None),
        ("queue", c.queue, None),
        ("runtime", c.runtime, "torch-distributed"),
        ("claim", c.claim, None),
    )
    for key, text, instead in names:
        if text is not None and not re.fullmatch(DNS_LABEL, text):
            yield Violation(f"launch.kubernetes.{key}", "must be lower-case letters, digits and -", [instead])
    if not c.mount.startswith("/") or not re.fullmatch(PLAIN_PATH, c.mount):
        yield Violation("launch.kubernetes.mount", "must be an absolute path", ["/shared"])
    folder, mount = config.run.dir, c.mount.rstrip("/") if c.claim else ""
    if folder is not None and not folder.startswith(f"{mount}/"):
        rule = f"must lie under launch.kubernetes.mount={c.mount}" if mount else "must be an absolute path in the containers"
        yield Violation("run.dir", rule, [f"{c.mount.rstrip('/')}/{folder.rpartition('/')[2]}"])


def _deepspeed(config: Config) -> Iterator[Violation]:
    c = config.launch
    named = f"[{','.join(f'host{index}' for index in range(c.nodes))}]"
    if c.nodes > 1 and (len(c.hosts) != c.nodes or len(set(c.hosts)) != len(c.hosts)):
        yield Violation("launch.hosts", f"must name the launch.nodes={c.nodes} hosts, each once", [named.strip("[]").split(",")])
    wrong = [host for host in c.hosts if not re.fullmatch(HOST, host)]
    if wrong:
        yield Violation("launch.hosts", f"{wrong[0]!r} is no name of a host", [[host for host in c.hosts if host not in wrong]])
    if c.max_restarts:
        yield Violation("launch.max_restarts", "launch=deepspeed starts no ranks again, launch=torchrun does", [0])
    if c.nodes > 1:
        yield from _shared_folder(config)


def _shared_folder(config: Config) -> Iterator[Violation]:
    kind, folder = config.launch.kind.name, config.run.dir
    if folder is None:
        yield Violation("run.dir", f"must be a folder that all hosts see with launch={kind}", ["/shared/runs/NAME"])
    elif not re.fullmatch(PLAIN_PATH, folder):
        rule = f"may hold letters, digits and _./@+=,:- with launch={kind}"
        yield Violation("run.dir", rule, [re.sub(r"[^\w./@+=,:-]+", "_", folder)])


def _resume(config: Config) -> Iterator[Violation]:
    if config.checkpoint.resume != "auto":
        rule = f"must be auto with launch={config.launch.kind.name}, or a job that is started again would begin anew"
        yield Violation("checkpoint.resume", rule, ["auto"])
