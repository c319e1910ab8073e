"""`make gpu-bundle`: downloads wheels that a machine without a network may lack into `.gpu/`. Runs pip, which needs a network.

omegaconf needs antlr4-python3-runtime, which is published only as source, so its wheel is built here. PyYAML is compiled, so there
is a wheel for each Python and processor.
"""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WHEELS = ROOT / ".gpu"

PURE = ["hydra-core", "omegaconf", "antlr4-python3-runtime", "packaging", "rich", "markdown-it-py", "mdurl", "pygments"]
COMPILED = ["PyYAML"]
PYTHONS, PROCESSORS = ["3.11", "3.12", "3.13"], ["x86_64", "aarch64"]
MOST_BYTES = 40 * 10**6


def main() -> int:
    """Returns the exit code."""
    shutil.rmtree(WHEELS, ignore_errors=True)
    pip("wheel", f"--wheel-dir={WHEELS}", *PURE)
    for version in PYTHONS:
        for processor in PROCESSORS:
            platforms = [f"--platform=manylinux{kind}_{processor}" for kind in ("2014", "_2_17", "_2_28")]
            pip("download", f"--dest={WHEELS}", "--only-binary=:all:", f"--python-version={version}", *platforms, *COMPILED)
    sizes = [path.stat().st_size for path in WHEELS.iterdir()]
    print(f"{len(sizes)} wheels, {sum(sizes) / 1e6:.1f} MB, in {WHEELS}")
    return 0 if sum(sizes) <= MOST_BYTES else 1


def pip(command: str, *words: str) -> None:
    """Runs pip with the versions of constraints.txt."""
    program = [sys.executable, "-m", "pip", command, "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*program, "-c", str(ROOT / "constraints.txt"), *words], check=True)


if __name__ == "__main__":
    sys.exit(main())
