"""How ranks are started, and what a cluster is asked for."""

from dataclasses import dataclass, field
from enum import Enum

from ...ranges import within


class Launcher(Enum):
    inline = "inline"
    torchrun = "torchrun"
    deepspeed = "deepspeed"
    slurm = "slurm"
    kubernetes = "kubernetes"


@dataclass
class SlurmConfig:
    partition: str | None = None
    """Partition; null is the cluster's default."""
    account: str | None = None
    """Account that is charged; null is the user's default."""
    time: str = "24:00:00"
    """Limit of one run of the job, HH:MM:SS or DAYS-HH:MM:SS; the job is requeued and goes on before it is reached."""
    warning: int = field(default=300, metadata=within("[1, 65535]"))
    """Seconds before the limit at which the ranks are stopped and the job is requeued."""
    lines: list[str] = field(default_factory=list)
    """Further options of sbatch, as ["--constraint=h100"]."""


@dataclass
class KubernetesConfig:
    image: str | None = None
    """Container image with tokenyard in it."""
    namespace: str | None = None
    """Namespace; null is that of kubectl's context."""
    runtime: str = "torch-distributed"
    """ClusterTrainingRuntime of Kubeflow Trainer."""
    claim: str | None = None
    """PersistentVolumeClaim that holds run.dir and data.cache; null if the runtime mounts what they need."""
    mount: str = "/shared"
    """Where the claim is mounted in the containers."""


@dataclass
class LaunchConfig:
    kind: Launcher = Launcher.inline
    """inline: this process is one rank (the environment says which); torchrun, deepspeed: start the ranks through that launcher;
    slurm, kubernetes: show a job for the cluster."""
    nodes: int = field(default=1, metadata=within("[1, inf)"))
    """Hosts."""
    ranks: int = field(default=1, metadata=within("[1, inf)"))
    """Ranks on each host that the launcher starts."""
    max_restarts: int = field(default=0, metadata=within("[0, inf)"))
    """How often torch's elastic launcher starts the ranks again after one failed."""
    rendezvous: str | None = None
    """torchrun and deepspeed on several hosts: HOST:PORT where the ranks meet, HOST being one of the hosts; null takes MASTER_ADDR,
    MASTER_PORT and NODE_RANK from the environment (torchrun) or the first of launch.hosts (deepspeed)."""
    hosts: list[str] = field(default_factory=list)
    """launch=deepspeed: the names of the hosts, launch.nodes of them, reachable through ssh."""
    gpus: int | None = field(default=None, metadata=within("[0, inf)"))
    """GPUs of each host that Slurm or Kubernetes is asked for; null: launch.ranks, or none with device=cpu."""
    cores: int = field(default=4, metadata=within("[1, inf)"))
    """CPU cores for each rank that Slurm or Kubernetes is asked for."""
    submit: bool = False
    """slurm, kubernetes, deepspeed on several hosts: start what is shown."""
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    kubernetes: KubernetesConfig = field(default_factory=KubernetesConfig)

    def gpus_of_host(self, device: str) -> int:
        """What a cluster is asked for with this setting of `device`."""
        return (0 if device == "cpu" else self.ranks) if self.gpus is None else self.gpus
