"""`tokenyard train --layout-only`: golden pictures, every cell against the grids of ranks, and nothing is started."""

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tokenyard.launch.main import main
from tokenyard.parallel.config import ParallelConfig
from tokenyard.parallel.layout import DENSE, EXPERTS, mesh_sizes
from tokenyard.parallel.layout_diagram import NAMES, layout_diagram

GOLDEN = Path(__file__).parents[1] / "golden" / "layouts"
PICTURES = {
    "1_rank": "",
    "4_ranks_dense": "model=dense parallel.tensor=2 parallel.shard=2",
    "8_ranks": "parallel.tensor=2 parallel.shard=2 parallel.expert=4 launch=torchrun launch.ranks=8",
    "8_ranks_2_nodes": "parallel.tensor=2 parallel.shard=2 parallel.expert=2 parallel.expert_tensor=2"
    " launch.nodes=2 launch.ranks=4",
    "12_ranks_rest": "parallel.tensor=2 launch.ranks=8",
    "16_ranks_experts_over_nodes": "parallel.expert=8 launch.nodes=4 launch.ranks=4",
    "64_ranks": "model=deepseek_v3 parallel.expert=32 parallel.tensor=2 parallel.shard=32 launch.nodes=8 launch.ranks=8",
    "1000_ranks": "model=mixtral_8x7b parallel.tensor=4 parallel.shard=125 parallel.expert=4 parallel.expert_tensor=2"
    " launch.nodes=125 launch.ranks=8",
    "8_ranks_pipeline": "parallel.pipeline=4 parallel.tensor=2 batch.micro=2 model.layers=7 launch.ranks=8",
    "4_ranks_interleaved": "parallel.pipeline=2 parallel.pipeline_schedule=interleaved parallel.expert=2 batch.micro=2"
    " model.tie_embeddings=true launch.ranks=4",
    "3_ranks_zbv": "parallel.pipeline=3 parallel.pipeline_schedule=zbv batch.sequences=5 batch.micro=1 model.layers=6"
    " launch.ranks=3",
}
LAYOUTS = [
    # tensor, shard, expert, expert_tensor, world, ranks of a node, context (1)
    (1, 1, 1, 1, 1, 1),
    (2, 2, 4, 1, 8, 8),
    (2, 2, 2, 2, 8, 4),
    (1, 2, 1, 4, 12, 8),
    (4, 1, 4, 2, 16, 16),
    (2, 3, 4, 3, 24, 6),
    (8, 4, 8, 8, 64, 8),
    (1, 1, 1, 1, 64, 64),
    (1, 1, 8, 1, 40, 7),
    (2, 4, 4, 1, 32, 8, 2),
    (1, 1, 2, 1, 16, 4, 4),
]


@pytest.mark.parametrize("name", PICTURES)
def test_golden(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "12_ranks_rest":
        monkeypatch.setenv("WORLD_SIZE", "12")
    assert drawn(PICTURES[name], capsys) == (GOLDEN / f"{name}.txt").read_text()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_cell_is_the_place_in_the_grids(layout: tuple[int, ...]) -> None:
    """And a bar is where, and only where, the ranks on both sides differ in more than the neighbours' dimensions."""
    tensor, shard, expert, expert_tensor, world, node, context = layout if len(layout) == 7 else (*layout, 1)
    config = ParallelConfig(tensor=tensor, shard=shard, expert=expert, expert_tensor=expert_tensor, context=context)
    sizes, lines = mesh_sizes(config, world), layout_diagram(config, world, node, experts=8 * expert)
    expected = {"rank": [str(rank) for rank in range(world)], "batch": [str(rank // tensor // context) for rank in range(world)]}
    for dims in (DENSE, EXPERTS):
        columns = zip(*itertools.product(*(range(sizes[dim]) for dim in dims)), strict=True)
        expected |= {dim: [str(place) for place in column] for dim, column in zip(dims, columns, strict=True)}
    expected["experts"] = [f"{8 * int(place)}-{8 * int(place) + 7}" for place in expected["expert"]]
    found: dict[str, str] = {}
    for line in lines:
        if re.match(r"[a-z_ =]+(, of \d+)? *[|<]", line):
            name = re.split(r",| =|  ", line)[0]
            found[name] = found.get(name, "") + line[NAMES:]
    found.pop("", None)
    assert {name: re.findall(r"[\d-]+", text) for name, text in found.items()} == {name: expected[name] for name in found}
    assert {name for name in (*DENSE, *EXPERTS) if sizes[name] > 1} - set(found) <= {"expert", *same_as_batch(lines)}
    for name, run in (("rank", tensor), ("experts", expert * expert_tensor)):
        assert cut(found[name], world) == [rank for rank in range(1, world + 1) if rank % run == 0]
        assert found[name].count("<") == found[name].count(">")
    if sizes["expert_tensor"] == 1:
        assert ":" not in found["experts"]


def same_as_batch(lines: list[str]) -> list[str]:
    return re.findall(r"= (\w+),", "\n".join(lines))


def cut(text: str, world: int) -> list[int]:
    """After how many ranks there is a bar."""
    marks, ranks = [], 0
    for token in re.findall(r"[\d-]+|\|", text):
        if token != "|":
            ranks += 1
        elif ranks and (not marks or marks[-1] != ranks):
            marks.append(ranks)
    return marks


@pytest.mark.parametrize("world", [1, 2, 7, 64, 65, 1000, 4096])
@pytest.mark.parametrize("node", [1, 8, 72])
def test_it_is_readable_at_any_size(world: int, node: int) -> None:
    lines = layout_diagram(ParallelConfig(), world, min(node, world), experts=256)
    assert max(map(len, lines)) <= 132 and len(lines) <= 90
    assert lines[-1] and lines[0] and not any("\n" in line for line in lines)


def test_the_ranks_of_a_node_come_from_the_launcher(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert drawn("", capsys).startswith("8 ranks on 1 node,")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert drawn("", capsys).startswith("8 ranks on 4 nodes,")
    assert drawn("launch.ranks=4 launch.nodes=2", capsys).startswith("8 ranks on 2 nodes,")


def test_a_layout_that_does_not_fit_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--layout-only", "parallel.expert=3"]) == 2
    out, error = capsys.readouterr()
    assert (out, error.count("\n")) == ("", 1) and "must divide model.moe.experts=8" in error


def test_nothing_is_started_and_torch_is_not_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from tokenyard.launch.main import main;"
        "main(['train', '--layout-only', 'launch=torchrun', 'launch.ranks=4', 'parallel.expert=4']); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("4 ranks on 1 node") and done.stdout.endswith("False\n")
    assert list(tmp_path.iterdir()) == []


def drawn(overrides: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["train", "--layout-only", *overrides.split()]) == 0
    out, error = capsys.readouterr()
    assert error == ""
    return out
