"""`tokenyard parity` from its words to its exit code, with ranks that it starts itself."""

import json

import pytest
from tokenyard.launch.main import main
from tokenyard.parity import rank_pool

BUGGY = "import bugs, sys; from tokenyard.parity import rank_worker; bugs.install({!r}); rank_worker.main(sys.argv[1:])"


def test_equal_layouts(capsys: pytest.CaptureFixture[str]) -> None:
    layouts = "parity.layouts=[expert=2, tensor=2 expert=2 recompute, replicate=2 accumulation=2, recompute]"
    assert main(["parity", "model=tiny_gpt_oss", layouts, "parity.steps=2", "--json"]) == 0
    out, table = capsys.readouterr()
    found = json.loads(out)
    assert found["equal"] and all(layout["equal"] and layout["first"] is None for layout in found["layouts"])
    named = ["replicate=2 expert=2", "tensor=2 expert=2 recompute=block", "replicate=2 accumulation=2", "recompute=block"]
    assert [layout["layout"] for layout in found["layouts"]] == named
    assert all(layout["differences"]["gradient"] < 1e-9 for layout in found["layouts"])
    assert "all 4 layouts give the numbers of one process" in table
    assert all(name in table for name in named)


def test_a_difference_and_a_rank_that_raises(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    program = BUGGY.replace("rank_worker.main", "bugs.install('raised_on_tensor_ranks'); rank_worker.main")
    monkeypatch.setattr(rank_pool, "WORKER", ["-c", program.format("averaged_over_expert_ranks")])
    monkeypatch.setattr(rank_pool, "GRACE_SECONDS", 0.5)
    assert main(["parity", "model=tiny_mixtral", "parity.layouts=[tensor=2, expert=2, shard=2]", "parity.steps=1"]) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "DIFFERS" in text and "FAILED" in text
    assert "first in step 1 the gradient of layers.1.moe.experts.down (layer 1) differs by 0.5 on rank" in text
    assert "exactly 1/2 of what one process has, 1 / parallel.expert: averaged where it must be summed?" in text
    assert "data ranks" not in text, "shard=2 has them too, and is equal"
    assert "rank 1: ArithmeticError: the last rank's reason" in text
    assert "2 of 3 layouts differ from one process" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["parity.stepps=2"], "parity.stepps=2: there is no such setting in `parity`; nearest valid: parity.steps=3"),
        (["parity.steps=0"], "parity.steps=0: must be an integer from 1 on; nearest valid: parity.steps=3"),
        (["parity.ranks=6"], "parity.ranks=6: must be a power of two; nearest valid: parity.ranks=4"),
        (["parity.shrink=maybe"], "parity.shrink=maybe: must be true or false; nearest valid: parity.shrink=true"),
        (
            ["parity.layouts=4"],
            "parity.layouts=4: must be auto or a list of layouts; nearest valid: parity.layouts='[shard=2, expert=2]'",
        ),
        (["parity.layouts=[shards=2]"], "parity.layouts=[shards=2]: parallel.shards=2: there is no such setting in `parallel`"),
        (["model=tiny_mixtral", "parity.layouts=[expert=3]"], "parallel.expert=3: must divide model.moe.experts=8"),
        (["model=tiny_mixtral", "parity.layouts=[tensor=4]"], "parallel.tensor=4: must divide model.kv_heads=2"),
        (["model.moe.top_k=9"], "model.moe.top_k=9: must be at most model.moe.experts=8; nearest valid: model.moe.top_k=8"),
        (["model.moe.balance.scope=rank"], "model.moe.balance.scope=rank: counts what one rank has, so no two layouts can agree"),
        (["model.moe.capacity.scope=rank", "model.moe.capacity.factor=1"], "model.moe.capacity.scope=rank: counts what one rank"),
        (["--jason"], "--jason: there is no such flag"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parity", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tokenyard: ") and error.count("\n") == 1
    assert message in error
