"""Starts `make gpu`: makes `tokenyard` importable without installation and runs it. Uses only the standard library.

A temporary folder holds a link `tokenyard` to the repository, whatever the name of its folder, and the packages of the wheels in
`.gpu/` that are missing here. Nothing is written elsewhere.
"""

import importlib.util
import os
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WHEELS = ROOT / ".gpu"


def main() -> int:
    """Returns the exit code of `python -m tokenyard.bench.gpu` with the same arguments."""
    with tempfile.TemporaryDirectory(prefix="tokenyard-gpu-") as name:
        folder = Path(name)
        (folder / "tokenyard").symlink_to(ROOT, target_is_directory=True)
        taken = unpack(WHEELS, folder)
        path = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "TOKENYARD_GPU_WHEELS": " ".join(taken)}
        return os.spawnve(
            os.P_WAIT, sys.executable, [sys.executable, "-P", "-m", "tokenyard.bench.gpu", *sys.argv[1:]], environment
        )


def unpack(wheels: Path, folder: Path) -> list[str]:
    """Extract the wheels whose packages this Python lacks into `folder`. Returns their names."""
    taken = []
    for wheel in sorted(wheels.glob("*.whl")):
        if fits(wheel.name):
            with zipfile.ZipFile(wheel) as archive:
                # A part of a namespace package counts as installed too.
                if all(importlib.util.find_spec(name) is None for name in packages(archive)):
                    archive.extractall(folder)
                    taken.append("-".join(wheel.name.split("-")[:2]))
    return taken


def fits(name: str) -> bool:
    """Whether the wheel is for any Python 3, or for this Python and processor."""
    python, _, platform = name.removesuffix(".whl").split("-")[-3:]
    if platform == "any":
        return "py3" in python.split(".")
    return python == f"cp{sys.version_info.major}{sys.version_info.minor}" and platform.endswith(os.uname().machine)


def packages(archive: zipfile.ZipFile) -> set[str]:
    """The top-level packages and modules in a wheel."""
    names = {name.partition("/")[0] for name in archive.namelist()}
    return {name.removesuffix(".py") for name in names if not name.endswith((".dist-info", ".data", ".so"))}


if __name__ == "__main__":
    sys.exit(main())
