"""A load holds the model in memory once, an import and an export never as a whole."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenyard.checkpoint.store import save_checkpoint
from tokenyard.interop.export import export_checkpoint
from tokenyard.moe.config import ModelConfig, MoEConfig
from tokenyard.moe.model import Transformer
from tokenyard.parallel.shard import LocalShard, whole
from tokenyard.train.config.serialize import plain_config

MODEL = ModelConfig(layers=12, width=512, heads=8, kv_heads=8, vocabulary=1024, moe=MoEConfig(8, 2, 256))
GROWTH = """
import sys
from pathlib import Path
import torch
from tokenyard.interop.import_ import import_folder
from tokenyard.interop.load_weights import load_folder
from tokenyard.interop.export import export_checkpoint
from torch.distributed.checkpoint.state_dict_saver import save

def largest():
    # Not ru_maxrss, which begins with the parent's.
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

folder, before = Path(sys.argv[1]), largest()
match sys.argv[2]:
    case "import": import_folder(folder / "theirs", folder / "again")
    case "load": load_folder(folder / "theirs")
    case "export": export_checkpoint(folder / "ours", folder / "new")
print(largest() - before)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in `ours`, and the same weights in one Hugging Face file in `theirs`."""
    folder = tmp_path_factory.mktemp("memory")
    held = {f"model.{name}": LocalShard(whole(shape), torch.randn(shape)) for name, shape in shapes().items()}
    save_checkpoint(folder / "ours", 0, held, {"config": {"model": plain_config(MODEL)}})
    assert len(export_checkpoint(folder / "ours", folder / "theirs").files) == 1
    return folder


def shapes() -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in Transformer(MODEL).state_dict().items()}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("what", "least", "most"), [("import", 0.0, 0.5), ("load", 0.8, 1.4), ("export", 0.0, 0.5)])
def test_growth_of_the_process(what: str, least: float, most: float, folder: Path) -> None:
    size = sum(4 * math.prod(shape) for shape in shapes().values())
    assert size > 190e6
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, str(folder), what], capture_output=True, text=True, timeout=240, check=True
    )
    assert least * size < int(done.stdout) < most * size
