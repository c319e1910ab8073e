"""Fails on any import between folders that points the wrong way: launch -> train -> {parallel, data}, parallel -> moe."""

import ast
import functools
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]

ALLOWED = {
    "": {"launch", "train", "interop", "moe"},
    "launch": {"train", "interop", "parity", "plan", "report", "checkpoint", "data"},
    "report": {"train", "checkpoint"},
    "parity": {"train", "parallel", "data", "moe"},
    "plan": {"train", "parallel", "moe"},
    "interop": {"train.config", "checkpoint", "parallel", "data", "moe"},
    "bench": {"parity", "plan", "train", "checkpoint", "parallel", "data", "moe"},
    "train": {"interop.load_weights", "interop.upcycle", "plan.own_layout", "checkpoint", "parallel", "data", "moe"},
    "checkpoint": {"parallel", "moe"},
    "parallel": {"moe"},
    "data": set(),
    "moe": set(),
    "conf": set(),
}
"""From each folder ("" is the root) to the folders or modules that it may import, besides itself."""

SPINE = (
    *(
        "config",
        "learning_rate",
        "allocator",
        "busy_cores",
        "stored_config",
        "saved_run",
        "tokenizer_source",
        "weight_source",
        "run_folder",
        "preflight",
        "derive",
        "moments",
        "lean_adamw",
        "state",
        "step_flags",
        "matrix_owners",
        "muon",
        "optimizer",
    ),
    *(
        "loss",
        "batch",
        "forward_only",
        "exit",
        "attention_logits",
        "step",
        "cuda_graph",
        "engine",
        "deepspeed",
        "session",
        "checkpointing",
        "evaluation",
        "downstream",
        "show",
    ),
    *("logging", "resume", "local_saves", "initial_weights", "setup", "load", "fault_tolerance", "run", "rank_command", "__main__"),
)
"""The folders and modules of train/ from the ground up: each may import those before it."""
ONE_FILE_EACH = ("deepspeed", "wandb", "tensorboard", "trackio", "datasets", "transformers", "lm_eval")
FORBIDDEN = {"pickle", "cloudpickle", "dill", "torch.load", "torch.save", "hydra.utils.instantiate", "hydra.utils.call"}
FORBIDDEN_ARGUMENTS = {"allow_pickle", "trust_remote_code"}
"""May be written as False only."""


class Import(NamedTuple):
    """`module` is dotted and, for our own, begins with `tokenyard`; `top` is whether importing the file imports it."""

    module: str
    top: bool


def test_arrows_point_one_way() -> None:
    assert [arrow for path in sources() for arrow in wrong_arrows(path.relative_to(ROOT), path.read_text())] == []


def test_no_circle_of_imports() -> None:
    """Not in functions and not for type checkers either."""
    assert circles(import_graph()) == []


def test_train_points_down_its_spine() -> None:
    assert {unit(file) for file in import_graph() if file.startswith("train/")} == {*SPINE, "__init__"}
    assert upward_arrows(import_graph()) == []


def test_what_train_imports_of_the_planner_knows_of_train_only_the_configuration() -> None:
    reached, waiting = set[str](), ["plan/own_layout.py"]
    while waiting:
        name = waiting.pop()
        reached.add(name)
        waiting += [file for file in import_graph()[name] if file.startswith("plan/") and file not in reached]
    known = {file for name in reached for file in import_graph()[name] if file.startswith("train/")}
    assert {unit(file) for file in known} <= {"__init__", "config"}
    assert "plan/rank_memory.py" in reached and "plan/step_time.py" in reached
    assert "torch" not in third_party_at_top(reachable("plan/own_layout.py"))


def test_every_folder_is_in_the_package() -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert set(packages) == {".".join(("tokenyard", *path.relative_to(ROOT).parent.parts)) for path in sources()}
    assert all((path.parent / "__init__.py").is_file() for path in sources())


def test_heavy_libraries_have_one_file_each() -> None:
    for library in ONE_FILE_EACH:
        users = {path.relative_to(ROOT).as_posix() for path in sources() if library in third_party(path)}
        assert len(users) <= 1, f"{library} is imported in {sorted(users)}"


def test_help_needs_no_library() -> None:
    reached = reachable("launch/main.py")
    assert "launch/main.py" in reached
    assert third_party_at_top(reached) == set()


def test_the_configuration_needs_no_torch() -> None:
    reached = set[str]().union(*map(reachable, ("launch/train.py", "launch/params.py", "train/show.py", "train/__main__.py")))
    assert {"train/config/validate.py", "train/config/config.py", "moe/config.py", "data/config.py"} <= reached
    assert third_party_at_top(reached) == set()


def test_nothing_unpickles_or_instantiates() -> None:
    assert [what for path in sources() for what in forbidden(path.relative_to(ROOT), path.read_text())] == []


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("moe/x.py", "from ..parallel.mesh import Mesh"),
        ("moe/x.py", "from ..train import config"),
        ("moe/x.py", "from .. import train"),
        ("moe/x.py", "import tokenyard.parallel"),
        ("moe/deep/x.py", "from ...parallel.mesh import Mesh"),
        ("moe/x.py", "def f():\n    from ..train.config import Config"),
        ("data/x.py", "from ..moe.config import ModelConfig"),
        ("parallel/x.py", "from tokenyard.train.config.config import Config"),
        ("train/x.py", "from ..launch.main import main"),
        ("launch/x.py", "from ..moe.config import ModelConfig"),
        ("interop/x.py", "from ..train.run import run"),
        ("bench/x.py", "from ..launch.main import main"),
    ],
)
def test_a_wrong_arrow_is_found(file: str, code: str) -> None:
    assert wrong_arrows(Path(file), code)


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("launch/x.py", "from ..train.config import Config\nfrom .main import main\nfrom ..version import __version__"),
        ("interop/x.py", "from ..checkpoint import diff\nfrom ..checkpoint.manifest import read_manifest"),
        ("train/x.py", "import torch\nfrom ..moe.model import Model\nfrom . import step"),
    ],
)
def test_a_right_arrow_is_not(file: str, code: str) -> None:
    assert not wrong_arrows(Path(file), code)


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "def f():\n    from pickle import loads",
        "import torch\ntorch.load('x')",
        "from torch import save",
        "import torch as t\nt.save",
        "np.load(f, allow_pickle=True)",
        "f(trust_remote_code=True)",
        "load(path, weights_only=False)",
        "f(trust_remote_code=chosen)",
        "from hydra.utils import instantiate",
        "import hydra\nhydra.utils.instantiate(c)",
    ],
)
def test_a_forbidden_call_is_found(code: str) -> None:
    assert forbidden(Path("train/x.py"), code)


def test_a_refusal_is_not_forbidden() -> None:
    assert not forbidden(Path("data/x.py"), "np.load(f, allow_pickle=False)")


def wrong_arrows(file: Path, code: str) -> list[str]:
    """Each import in `file` (relative to the root) of a folder that its own may not know."""
    own = folder_of(file)
    targets = [
        item.module.partition(".")[2] for item in imports(file, code) if item.module.partition(".")[0] in ("tokenyard", "tests")
    ]
    return [f"{file} imports {target}" for target in targets if not may(own, target)]


def may(own: str, target: str) -> bool:
    folder = target.partition(".")[0]
    return folder in ("", "version", "ranges", own) or any(
        target == allowed or target.startswith(f"{allowed}.") for allowed in ALLOWED[own]
    )


def forbidden(file: Path, code: str) -> list[str]:
    """What `file` uses of FORBIDDEN, under whatever name, and of FORBIDDEN_ARGUMENTS."""
    tree = ast.parse(code)
    found = {item.module for item in imports(file, code)} | {item.module.partition(".")[0] for item in imports(file, code)}
    names = {
        alias.asname or alias.name: alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            head, _, rest = ast.unparse(node).partition(".")
            found.add(f"{names.get(head, head)}.{rest}")
        if isinstance(node, ast.Call):
            found |= {keyword.arg for keyword in node.keywords if keyword.arg and ast.unparse(keyword.value) != "False"}
            found |= {"weights_only=False" for keyword in node.keywords if keyword.arg == "weights_only" and not _is_true(keyword)}
    return [f"{file} uses {name}" for name in sorted(found & (FORBIDDEN | FORBIDDEN_ARGUMENTS | {"weights_only=False"}))]


def _is_true(keyword: ast.keyword) -> bool:
    return ast.unparse(keyword.value) == "True"


def imports(file: Path, code: str) -> Iterator[Import]:
    """Every module that `file` imports, and as a module every name that it imports from one."""
    tree = ast.parse(code)
    at_top = {id(node) for node in top_nodes(tree)}
    package = ["tokenyard", *file.parent.parts]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, id(node) in at_top) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1], *filter(None, [node.module])] if node.level else [node.module or ""]
            yield from (Import(".".join([*base, alias.name]), id(node) in at_top) for alias in node.names)


def top_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """What runs when the module is imported: not functions, not blocks for type checkers."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from top_nodes(child)


def reachable(start: str) -> set[str]:
    """Our files that importing `start` imports."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        name = waiting.pop()
        if name in found or not (ROOT / name).is_file():
            continue
        found.add(name)
        ours = [
            item.module
            for item in imports(Path(name), (ROOT / name).read_text())
            if item.top and item.module.startswith("tokenyard")
        ]
        waiting += [file for module in ours for file in files_of(module)]
    return found


def files_of(module: str) -> list[str]:
    """The files that `module`, or the name inside a module that it may be, can come from, packages included."""
    parts = module.split(".")[1:]
    heads = ["/".join(parts[:count]) for count in range(len(parts) + 1)]
    return [f"{head}.py" for head in heads if head] + [f"{head}/__init__.py".lstrip("/") for head in heads]


def third_party_at_top(files: set[str]) -> set[str]:
    """Libraries beyond the standard one that importing all of `files` imports."""
    names = {item.module.partition(".")[0] for name in files for item in imports(Path(name), (ROOT / name).read_text()) if item.top}
    return names - set(sys.stdlib_module_names) - {"tokenyard"}


def third_party(path: Path) -> set[str]:
    return {item.module.partition(".")[0] for item in imports(path.relative_to(ROOT), path.read_text())}


def sources() -> list[Path]:
    return [*ROOT.glob("*.py"), *(path for folder in ALLOWED if folder for path in sorted((ROOT / folder).rglob("*.py")))]


def folder_of(file: Path) -> str:
    return file.parts[0] if len(file.parts) > 1 else ""


@functools.cache
def import_graph() -> dict[str, set[str]]:
    """From each file to the files that it imports, in functions and for type checkers too."""
    names = {path.relative_to(ROOT).as_posix() for path in sources()}
    return {
        name: {file for item in imports(Path(name), (ROOT / name).read_text()) if (file := file_of(item.module, names))} - {name}
        for name in sorted(names)
    }


def file_of(module: str, names: set[str]) -> str | None:
    """The file that a dotted name, or the name in a module that it may be, is in; None if it is not ours."""
    top, *parts = module.split(".")
    for count in range(len(parts), -1, -1) if top == "tokenyard" else ():
        path = "/".join(parts[:count])
        for file in (f"{path}.py", f"{path}/__init__.py".lstrip("/")):
            if file in names:
                return file
    return None


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Sets of files each of which reaches all others (Tarjan's components of more than one)."""

    def reach(start: str) -> set[str]:
        seen, waiting = set[str](), [start]
        while waiting:
            for node in graph[waiting.pop()] - seen:
                seen.add(node)
                waiting.append(node)
        return seen

    reached = {node: reach(node) for node in graph}
    found: list[set[str]] = []
    for node in graph:
        ring = {other for other in reached[node] if node in reached[other]}
        if len(ring) > 1 and ring not in found:
            found.append(ring)
    return found


def upward_arrows(graph: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Imports inside train/ of what comes later in SPINE."""
    ours = {file: unit(file) for file in graph if file.startswith("train/") and unit(file) in SPINE}
    return [
        (file, target)
        for file in ours
        for target in sorted(graph[file] & set(ours))
        if SPINE.index(ours[target]) > SPINE.index(ours[file])
    ]


def unit(file: str) -> str:
    """The folder or module directly in train/ that a file is in."""
    return file.split("/")[1].removesuffix(".py")
