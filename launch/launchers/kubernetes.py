"""launch=kubernetes: a TrainJob (trainer.kubeflow.org/v1alpha1, Kubeflow Trainer 2.2) that runs torchrun on each host."""

from typing import Any

from ...train.config.compose import Arguments
from ...train.config.config import Config
from ...train.config.launch import KubernetesConfig
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
    labels = {"labels": {"kueue.x-k8s.io/queue-name": c.queue}} if c.queue else {}
    metadata = {"name": job_name(config), **({"namespace": c.namespace} if c.namespace else {}), **labels}
    spec = {"runtimeRef": {"name": c.runtime}, "trainer": _trainer(config, arguments)}
    if pod := _pod(c):
        job = {"name": "node", "template": {"spec": {"template": {"spec": pod}}}}
        template = {"template": {"spec": {"replicatedJobs": [job]}}}
        spec["runtimePatches"] = [{"manager": "tokenyard.org/launch", "trainingRuntimeSpec": template}]
    return {"apiVersion": "trainer.kubeflow.org/v1alpha1", "kind": "TrainJob", "metadata": metadata, "spec": spec}


def as_yaml(job: dict[str, Any]) -> str:
    """Returns YAML, with the keys in the order of the object."""
    import yaml

    return yaml.safe_dump(job, sort_keys=False, width=120)


def _trainer(config: Config, arguments: Arguments) -> dict[str, Any]:
    """One container per host. The runtime's torch plugin gives torchrun its rank and address in PET_* variables."""
    c, gpus = config.launch, config.launch.gpus_of_host(config.device.value)
    words = [f"--max-restarts={c.max_restarts}", "-m", "tokenyard.train", *cluster_arguments(config, arguments)]
    memory = {"memory": f"{c.memory_gib}Gi"} if c.memory_gib else {}
    resources: dict[str, Any] = {"requests": {"cpu": str(c.ranks * c.cores), **memory}}
    if gpus:
        resources["limits"] = {"nvidia.com/gpu": str(gpus)}
    return {
        "image": c.kubernetes.image,
        "command": ["torchrun"],
        "args": [word.replace("$", "$$") for word in words],  # Kubernetes expands $(NAME) and reads $$ as $
        "env": [{"name": "OMP_NUM_THREADS", "value": str(c.cores)}, *map(_secret, c.kubernetes.secrets)],
        "numNodes": c.nodes,
        "numProcPerNode": c.ranks,
        "resourcesPerNode": resources,
    }


def _secret(text: str) -> dict[str, Any]:
    """Returns the variable of VARIABLE=SECRET/KEY, whose value only the cluster knows."""
    variable, _, source = text.partition("=")
    name, _, key = source.partition("/")
    return {"name": variable, "valueFrom": {"secretKeyRef": {"name": name, "key": key}}}


def _pod(c: KubernetesConfig) -> dict[str, Any]:
    """Returns the patch of the pods: tolerations, and mounts in the container, which Trainer's torch runtimes call `node`."""
    pod, volumes, mounts = dict[str, Any](), list[dict[str, Any]](), list[dict[str, Any]]()
    if c.claim:
        volumes.append({"name": "shared", "persistentVolumeClaim": {"claimName": c.claim}})
        mounts.append({"name": "shared", "mountPath": c.mount})
    if c.shared_memory_gib:
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{c.shared_memory_gib}Gi"}})
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})
    if volumes:
        pod = {"volumes": volumes, "containers": [{"name": "node", "volumeMounts": mounts}]}
    if c.tolerations:
        pod["tolerations"] = [{"key": key, "operator": "Exists"} for key in c.tolerations]
    return pod
