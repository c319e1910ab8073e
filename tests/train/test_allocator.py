"""The command starts itself once more, with the allocator's settings, and only once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenyard.train.allocator import CUDA_VARIABLES, SETTINGS

PROGRAM = """
import os, sys
from tokenyard.train.allocator import SETTINGS, restart_with_kept_memory
print("start", sys.argv[1:], flush=True)
restart_with_kept_memory()
print("works with", {name: os.environ.get(name) for name in SETTINGS})
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc has these settings")
@pytest.mark.parametrize("own", [{}, {"MALLOC_TOP_PAD_": "7"}], ids=["unset", "set by the user"])
def test_restarts_once_unless_the_user_decided(tmp_path: Path, own: dict[str, str]) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS} | own
    done = subprocess.run([sys.executable, str(program), "a b"], env=environment, capture_output=True, text=True, check=True)
    starts = 1 if own else 2
    expected = {name: own.get(name) for name in SETTINGS} if own else SETTINGS
    assert done.stdout.splitlines() == ["start ['a b']"] * starts + [f"works with {expected}"]


@pytest.mark.skipif(sys.platform != "linux", reason="as above")
@pytest.mark.parametrize("malloc", [{}, {"MALLOC_TOP_PAD_": "7"}], ids=["restarted", "not restarted"])
@pytest.mark.parametrize("own", [{}, {"PYTORCH_ALLOC_CONF": "backend:native"}, {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}])
def test_a_gpus_memory_is_mapped_where_it_is_needed_unless_the_user_decided(own: dict[str, str], malloc: dict[str, str]) -> None:
    """The ranks of every launcher and generated job begin with this call."""
    program = (
        "import os\nfrom tokenyard.train.allocator import *\nrestart_with_kept_memory()\n"
        "print({name: os.environ[name] for name in CUDA_VARIABLES if name in os.environ})"
    )
    rest = {name: value for name, value in os.environ.items() if name not in (*SETTINGS, *CUDA_VARIABLES)}
    done = subprocess.run([sys.executable, "-c", program], env=rest | own | malloc, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(own or {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})
