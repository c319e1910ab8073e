"""Losses of small runs in fp64 do not change from one version to the next; `make golden` writes them anew.

tests/golden/NAME.txt: one `step loss` a line.
"""

import os
from pathlib import Path

import pytest
from tokenyard.train.config.compose import compose
from tokenyard.train.logging.journal import read_journal
from tokenyard.train.run import run

GOLDEN = Path(__file__).parent / "golden"
COMMON = (
    "optimizer.lr=2e-3 debug=default precision=fp64 steps=10"
    " checkpoint.every=0 sample.prompt='' schedule.warmup=3 data.synthetic_documents=64"
)
RUNS = {
    "default": "",
    "capacity": "model.moe.capacity.factor=0.9 model.moe.capacity.scope=batch model.moe.balance.scope=batch batch.micro=2",
    "shared_dense_first": "model.moe.shared_hidden=32 model.dense_first=1 model.tie_embeddings=true model.moe.top_k=1",
}


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_the_golden_ones(name: str, tmp_path: Path) -> None:
    overrides = [word.replace("''", "") for word in f"{COMMON} {RUNS[name]}".split()]
    assert run(compose([*overrides, f"run.dir={tmp_path / 'run'}", f"data.cache={tmp_path / 'cache'}"])) == 0
    found = [(record["step"], record["loss"]) for record in read_journal(tmp_path / "run" / "metrics.jsonl")]
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("TOKENYARD_GOLDEN") == "write":
        path.write_text("".join(f"{step} {loss:.12f}\n" for step, loss in found))
    lines = [line.split() for line in path.read_text().splitlines()]
    assert [(int(step), pytest.approx(float(loss), rel=1e-9)) for step, loss in lines] == found
