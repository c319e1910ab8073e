"""Settings of launch: how ranks are started, and what to request from a cluster."""

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
    """Partition; null: the cluster's default."""
    account: str | None = None
    """Account to charge; null: the user's default."""
    time: str = "24:00:00"
    """Time limit of the job, HH:MM:SS or DAYS-HH:MM:SS; shortly before it the run is saved and the job requeued."""
    warning: int = field(default=300, metadata=within("[1, 65535]"))
    """Seconds before the limit at which the ranks save and stop and the job is requeued."""
    spares: int = field(default=0, metadata=within("[0, inf)"))
    """Hosts to request beyond launch.nodes: those that fail a check are left out, and one that fails later is replaced."""
    lines: list[str] = field(default_factory=list)
    """Further options of sbatch, such as ["--constraint=h100"]."""
    setup: list[str] = field(default_factory=list)
    """Lines of bash before the ranks start, such as ["module load cuda/12.8"]; they hold no secrets, which the job inherits."""
    container: str | None = None
    """Container image in which pyxis (--container-image) runs the ranks, with tokenyard installed; null: on the hosts."""
    mounts: list[str] = field(default_factory=list)
    """Folders to mount in the container, as ["/shared:/shared"]."""


@dataclass
class KubernetesConfig:
    image: str | None = None
    """Container image with tokenyard installed."""
    namespace: str | None = None
    """Namespace; null: that of kubectl's context."""
    runtime: str = "torch-distributed"
    """ClusterTrainingRuntime of Kubeflow Trainer."""
    claim: str | None = None
    """PersistentVolumeClaim for run.dir and data.cache; null if the runtime mounts their folders."""
    mount: str = "/shared"
    """Where the claim is mounted in the containers."""
    shared_memory_gib: int | None = field(default=None, metadata=within("[1, inf)"))
    """GiB of /dev/shm, which NCCL and symmetric exchanges use and which counts as memory of the container; null: the 64 MiB of
    the container runtime."""
    secrets: list[str] = field(default_factory=list)
    """Variables from secrets of the cluster, as ["WANDB_API_KEY=wandb/api_key"]: VARIABLE=SECRET/KEY."""
    queue: str | None = None
    """Local queue of Kueue that admits the job; null: it starts at once."""
    tolerations: list[str] = field(default_factory=list)
    """Taints of nodes that the pods tolerate, by key, such as ["nvidia.com/gpu"]."""


@dataclass
class LaunchConfig:
    kind: Launcher = Launcher.inline
    """inline: this process is one rank (the environment says which); torchrun, deepspeed: start the ranks with that launcher;
    slurm, kubernetes: print a job for the cluster."""
    nodes: int = field(default=1, metadata=within("[1, inf)"))
    """Hosts."""
    ranks: int = field(default=1, metadata=within("[1, inf)"))
    """Ranks that the launcher starts on each host."""
    max_restarts: int = field(default=0, metadata=within("[0, inf)"))
    """How often torch's elastic launcher restarts the ranks after one failed."""
    min_nodes: int | None = field(default=None, metadata=within("[1, inf)"))
    """launch=torchrun with launch.rendezvous: after hosts were lost the run goes on with as few as this many, at the same global
    batch, and with all again when they are back; null: launch.nodes."""
    rendezvous: str | None = None
    """torchrun and deepspeed on several hosts: HOST:PORT where the ranks meet; HOST is one of the hosts. null: MASTER_ADDR,
    MASTER_PORT and NODE_RANK from the environment (torchrun) or the first of launch.hosts (deepspeed)."""
    hosts: list[str] = field(default_factory=list)
    """launch=deepspeed: the names of the launch.nodes hosts, reachable by ssh."""
    gpus: int | None = field(default=None, metadata=within("[0, inf)"))
    """GPUs per host to request from Slurm or Kubernetes; null: launch.ranks, or none with device=cpu."""
    cores: int = field(default=4, metadata=within("[1, inf)"))
    """CPU cores per rank to request from Slurm or Kubernetes."""
    memory_gib: int | None = field(default=None, metadata=within("[1, inf)"))
    """Memory per host to request from Slurm or Kubernetes, GiB; null: the cluster's default."""
    submit: bool = False
    """slurm, kubernetes, deepspeed on several hosts: start what is printed."""
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    kubernetes: KubernetesConfig = field(default_factory=KubernetesConfig)

    def gpus_of_host(self, device: str) -> int:
        """GPUs per host to request, with this value of the setting `device`."""
        return (0 if device == "cpu" else self.ranks) if self.gpus is None else self.gpus
