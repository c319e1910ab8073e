"""What a wheel has: the modules, and the files beside them that are read or that type checkers look for."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = shutil.ignore_patterns(".*", "build", "dist", "runs", "tests", "docs", "*.egg-info", "__pycache__", "wandb")


def test_a_wheel_has_all_files_of_the_package(tmp_path: Path) -> None:
    copied = shutil.copytree(ROOT, tmp_path / "source", ignore=LEFT_OUT)
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=copied, check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("tokenyard/")}
    files = [
        file.relative_to(copied)
        for kind in ("*.py", "*.yaml", "*.json", "*.js", "*.css", "py.typed")
        for file in copied.rglob(kind)
    ]
    wanted = {f"tokenyard/{file.as_posix()}" for file in files if file.parts[0] != "build"}
    assert "tokenyard/py.typed" in wanted and len(wanted) > 200
    assert wanted - held == set()
