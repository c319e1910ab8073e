"""The schema of the fields of a TrainJob that we set, from the CRD of Kubeflow Trainer 2.2 (trainer.kubeflow.org/v1alpha1)."""

import re
from typing import Any

QUANTITY = r"\d+(\.\d+)?([KMGTPE]i|[numkMGTPE])?"
NAME = {"type": str, "pattern": r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?"}


def obj(required: tuple[str, ...] = (), **fields: Any) -> dict[str, Any]:
    return {"type": dict, "required": required, "fields": fields}


def items(of: dict[str, Any], most: int) -> dict[str, Any]:
    return {"type": list, "of": of, "most": most}


TEXT = {"type": str, "longest": 1048576}
RESOURCES = {"type": dict, "each": {"type": str, "pattern": QUANTITY}}
SIZE = {"type": str, "pattern": QUANTITY}
MEMORY = obj(medium={"type": str, "pattern": "|Memory"}, sizeLimit=SIZE)
VOLUME = obj(("name",), name=NAME, persistentVolumeClaim=obj(("claimName",), claimName=NAME), emptyDir=MEMORY)
MOUNT = obj(("name", "mountPath"), name=NAME, mountPath={"type": str, "pattern": r"/[^:]*"})
CONTAINER = obj(("name",), name=NAME, volumeMounts=items(MOUNT, 128))
TOLERATION = obj(key=NAME | {"pattern": r"([-a-z0-9.]+/)?[-\w.]+"}, operator={"type": str, "pattern": "Exists|Equal"})
POD = obj(volumes=items(VOLUME, 128), containers=items(CONTAINER, 64), tolerations=items(TOLERATION, 1024))
JOB = obj(("name",), name=NAME, template=obj(spec=obj(template=obj(spec=POD))))
PATCH = obj(
    ("manager",),
    manager={"type": str, "longest": 253},
    trainingRuntimeSpec=obj(template=obj(spec=obj(replicatedJobs=items(JOB, 100)))),
)
SECRET = obj(("key",), name=NAME, key={"type": str, "pattern": r"[-._a-zA-Z0-9]{1,253}"})
TRAINER = obj(
    image={"type": str, "longest": 500},
    command=items(TEXT, 128),
    args=items(TEXT, 128),
    env=items(obj(("name",), name=TEXT, value=TEXT, valueFrom=obj(secretKeyRef=SECRET)), 128),
    numNodes={"type": int, "least": 0},
    numProcPerNode={"type": int, "least": 1},
    resourcesPerNode=obj(requests=RESOURCES, limits=RESOURCES),
)
LABELS = {"type": dict, "each": {"type": str, "pattern": r"([a-zA-Z0-9]([-\w.]{0,61}[a-zA-Z0-9])?)?"}}
TRAIN_JOB = obj(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"type": str, "pattern": r"trainer\.kubeflow\.org/v1alpha1"},
    kind={"type": str, "pattern": "TrainJob"},
    metadata=obj(("name",), name={"type": str, "pattern": r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?"}, namespace=NAME, labels=LABELS),
    spec=obj(
        ("runtimeRef",),
        runtimeRef=obj(("name",), name=NAME, apiGroup=TEXT, kind=TEXT),
        trainer=TRAINER,
        runtimePatches=items(PATCH, 16),
    ),
)


def violations(value: Any, schema: dict[str, Any], path: str = "") -> list[str]:
    """The violations of the schema by `value`."""
    if type(value) is not schema["type"]:
        return [f"{path}: {value!r} is no {schema['type'].__name__}"]
    if isinstance(value, list):
        found = [f"{path}: more than {schema['most']}"] if len(value) > schema["most"] else []
        return found + [wrong for place, item in enumerate(value) for wrong in violations(item, schema["of"], f"{path}[{place}]")]
    if isinstance(value, dict):
        return _of_object(value, schema, path)
    wrong = (
        (isinstance(value, str) and not re.fullmatch(schema.get("pattern", r"(?s).*"), value))
        or (isinstance(value, str) and len(value) > schema.get("longest", 1048576))
        or (isinstance(value, int) and value < schema["least"])
    )
    return [f"{path}: {value!r}"] if wrong else []


def _of_object(value: dict[str, Any], schema: dict[str, Any], path: str) -> list[str]:
    fields = schema.get("fields", dict.fromkeys(value, schema.get("each")))
    found = [f"{path}: lacks {name}" for name in schema.get("required", ()) if name not in value]
    found += [f"{path}: has no {name}" for name in value if name not in fields]
    return found + [
        wrong for name, item in value.items() if name in fields for wrong in violations(item, fields[name], f"{path}.{name}")
    ]
