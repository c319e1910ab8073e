"""launch=kubernetes: a TrainJob (trainer.kubeflow.org/v1alpha1, Kubeflow Trainer 2.2) that starts torchrun on its hosts."""

from typing import Any

from ...train.config.compose import Arguments
from ...train.config.config import Config
from .cluster import handed_to_cluster, job_name, say_not_started, shown, submit


def start_train_job(config: Config, arguments: Arguments) -> int:
    """Prints the TrainJob, and with launch.submit=true creates it through kubectl. Returns the exit code."""
    text = as_yaml(train_job(config, arguments))
    print(shown(text), end="", flush=True)
    if config.launch.submit:
        return submit(["kubectl", "create", "-f", "-"], text)
    say_not_started("pipe this into kubectl create -f -")
    return 0


def train_job(config: Config, arguments: Arguments) -> dict[str, Any]:
    """The object, as https://github.com/kubeflow/trainer describes it in pkg/apis/trainer/v1alpha1."""
    c = config.launch.kubernetes
    metadata = {"name": job_name(config), **({"namespace": c.namespace} if c.namespace else {})}
    spec = {"runtimeRef": {"name": c.runtime}, "trainer": _trainer(config, arguments)}
    if c.claim:
        spec["runtimePatches"] = [_mounted(c.claim, c.mount)]
    return {"apiVersion": "trainer.kubeflow.org/v1alpha1", "kind": "TrainJob", "metadata": metadata, "spec": spec}


def as_yaml(thing: dict[str, Any]) -> str:
    """In the order in which it was built."""
    import yaml

    return yaml.safe_dump(thing, sort_keys=False, width=120)


def _trainer(config: Config, arguments: Arguments) -> dict[str, Any]:
    """One container a host. The runtime's plugin for torch tells torchrun through PET_* who is where."""
    c, gpus = config.launch, config.launch.gpus_of_host(config.device.value)
    words = [f"--max-restarts={c.max_restarts}", "-m", "tokenyard.train", *handed_to_cluster(config, arguments)]
    resources: dict[str, Any] = {"requests": {"cpu": str(c.ranks * c.cores)}}
    if gpus:
        resources["limits"] = {"nvidia.com/gpu": str(gpus)}
    return {
        "image": c.kubernetes.image,
        "command": ["torchrun"],
        "args": [_literal(word) for word in words],
        "env": [{"name": "OMP_NUM_THREADS", "value": str(c.cores)}],
        "numNodes": c.nodes,
        "numProcPerNode": c.ranks,
        "resourcesPerNode": resources,
    }


def _literal(word: str) -> str:
    """Kubernetes puts variables in the place of $(NAME) in the words of a command, and reads $$ as $."""
    return word.replace("$", "$$")


def _mounted(claim: str, mount: str) -> dict[str, Any]:
    """The claim in the container `node` of the job `node`, which is what Trainer's runtimes for torch call them."""
    pod = {
        "volumes": [{"name": "shared", "persistentVolumeClaim": {"claimName": claim}}],
        "containers": [{"name": "node", "volumeMounts": [{"name": "shared", "mountPath": mount}]}],
    }
    job = {"name": "node", "template": {"spec": {"template": {"spec": pod}}}}
    return {"manager": "tokenyard.org/launch", "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [job]}}}}
