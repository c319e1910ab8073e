"""launch=kubernetes: a TrainJob (trainer.kubeflow.org/v1alpha1, Kubeflow Trainer 2.2) that runs torchrun on each host."""

from typing import Any

from ...train.config.compose import Arguments
from ...train.config.config import Config
from .cluster import cluster_arguments, job_name, print_not_started, submit, without_secrets


def start_train_job(config: Config, arguments: Arguments) -> int:
    """Prints the TrainJob, and creates it with kubectl if launch.submit=true. Returns the exit code."""
    text = as_yaml(train_job(config, arguments))
    print(without_secrets(text), end="", flush=True)
    if config.launch.submit:
        return submit(["kubectl", "create", "-f", "-"], text)
    print_not_started("pipe this into kubectl create -f -")
    return 0


def train_job(config: Config, arguments: Arguments) -> dict[str, Any]:
    """Returns the TrainJob as an object. Its schema is pkg/apis/trainer/v1alpha1 of https://github.com/kubeflow/trainer."""
    c = config.launch.kubernetes
    metadata = {"name": job_name(config), **({"namespace": c.namespace} if c.namespace else {})}
    spec = {"runtimeRef": {"name": c.runtime}, "trainer": _trainer(config, arguments)}
    if c.claim:
        spec["runtimePatches"] = [_mounted(c.claim, c.mount)]
    return {"apiVersion": "trainer.kubeflow.org/v1alpha1", "kind": "TrainJob", "metadata": metadata, "spec": spec}


def as_yaml(job: dict[str, Any]) -> str:
    """Returns YAML, with the keys in the order of the object."""
    import yaml

    return yaml.safe_dump(job, sort_keys=False, width=120)


def _trainer(config: Config, arguments: Arguments) -> dict[str, Any]:
    """One container per host. The runtime's torch plugin gives torchrun its rank and address in PET_* variables."""
    c, gpus = config.launch, config.launch.gpus_of_host(config.device.value)
    words = [f"--max-restarts={c.max_restarts}", "-m", "tokenyard.train", *cluster_arguments(config, arguments)]
    resources: dict[str, Any] = {"requests": {"cpu": str(c.ranks * c.cores)}}
    if gpus:
        resources["limits"] = {"nvidia.com/gpu": str(gpus)}
    return {
        "image": c.kubernetes.image,
        "command": ["torchrun"],
        "args": [word.replace("$", "$$") for word in words],  # Kubernetes expands $(NAME) and reads $$ as $
        "env": [{"name": "OMP_NUM_THREADS", "value": str(c.cores)}],
        "numNodes": c.nodes,
        "numProcPerNode": c.ranks,
        "resourcesPerNode": resources,
    }


def _mounted(claim: str, mount: str) -> dict[str, Any]:
    """Returns a patch that mounts the claim in the container `node` of the job `node`, the names of Trainer's torch runtimes."""
    pod = {
        "volumes": [{"name": "shared", "persistentVolumeClaim": {"claimName": claim}}],
        "containers": [{"name": "node", "volumeMounts": [{"name": "shared", "mountPath": mount}]}],
    }
    job = {"name": "node", "template": {"spec": {"template": {"spec": pod}}}}
    return {"manager": "tokenyard.org/launch", "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [job]}}}}
