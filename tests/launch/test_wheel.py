"""The wheel has all files of the package's folders and no others, and works where the repository is not."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = [
    name.partition(".")[2] for name in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
]
FOLDERS = {name.partition(".")[0] for name in PACKAGES} - {""}
BUILD = "import sys; from setuptools.build_meta import build_wheel; print(build_wheel(sys.argv[1]))"
METADATA = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt", "LICENSE"}


def files_below(folder: Path, start: Path) -> set[str]:
    return {
        path.relative_to(start).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc"
    }


def at_the_root(path: Path) -> bool:
    return path.is_file() and (path.suffix == ".py" or path.name == "py.typed")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel that setuptools makes of a copy, since it would leave files in the repository."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in (*FOLDERS, "tests/launch"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if at_the_root(path) or path.name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(path, source)
    made = subprocess.run([sys.executable, "-c", BUILD, out], cwd=source, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    return zipfile.ZipFile(next(out.iterdir()))


def test_nothing_is_missing_and_nothing_more_is_there(wheel: zipfile.ZipFile) -> None:
    wanted = set[str]().union(*(files_below(ROOT / name, ROOT) for name in FOLDERS))
    wanted |= {path.name for path in ROOT.iterdir() if at_the_root(path)}
    found = {name.removeprefix("tokenyard/") for name in wheel.namelist() if name.startswith("tokenyard/")}
    assert found == wanted and {"conf/model/tiny.yaml", "report/page/main.js", "plan/coefficients.json"} <= found
    others = {name for name in wheel.namelist() if not name.startswith("tokenyard/")}
    assert {Path(name).name for name in others} == METADATA and len({name.partition("/")[0] for name in others}) == 1


def test_it_works_alone(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path / "installed")
    (tmp_path / "empty").mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment = {**kept, "PYTHONPATH": str(tmp_path / "installed"), "PYTHONDONTWRITEBYTECODE": "1"}
    script = (
        "import tokenyard.launch.main as main, sys; print(main.__file__); "
        "sys.exit(main.main(['params', 'model=tiny']) or main.main(['plan', 'serve', 'mixtral_8x7b']) or "
        "main.main(['train', '--cfg', 'job', 'experiment=fine_grained', 'tracker=none']))"
    )
    command = [sys.executable, "-P", "-c", script]
    ended = subprocess.run(command, cwd=tmp_path / "empty", env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith(str(tmp_path / "installed")) and "tracker:" in ended.stdout and "GPUs" in ended.stdout
