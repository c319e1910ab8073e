"""Faults 22 to 24: a rank that hangs, is gone, leaves a collective out, raises or is slow is named, soon and rightly."""

import os
import random
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from fault_run import Launched, events_of, losses
from sameness import VOCABULARY, Case, Layout, build, rows_of
from tokenyard.checkpoint import saver as saver_module
from tokenyard.checkpoint.saver import Saver
from tokenyard.moe.config import ModelConfig, MoEConfig
from tokenyard.parallel import collective_check as fingerprints
from tokenyard.parallel.collectives import sum_over
from tokenyard.parallel.config import ParallelConfig
from tokenyard.parallel.dispatch.async_collectives import AllToAll
from tokenyard.parallel.failpoints import VARIABLE
from tokenyard.parallel.mesh import Axis, build_mesh
from tokenyard.parallel.progress import PROGRESS, check_before_collectives, collective, in_phase
from tokenyard.parallel.shard import LocalShard, whole
from tokenyard.train import step as step_module
from tokenyard.train.exit import STACKS
from tokenyard.train.fault_tolerance.hang_diagnosis import HangDiagnosis
from tokenyard.train.fault_tolerance.watchdog import Watchdog

TIMEOUT = 0.5


def hang(folder: Path, kind: str, culprit: int) -> tuple[float, HangDiagnosis]:
    """Seconds from the begin of the others' collective to the verdict, and the verdict. Then all go on, for the next test."""
    everyone, second = build_mesh(ParallelConfig()).everyone, dist.new_group()
    PROGRESS.__init__()
    PROGRESS.step, verdicts, rank = 7, [], everyone.rank
    dist.barrier()
    begin = time.monotonic()
    dog = Watchdog(
        folder, rank, everyone.size, TIMEOUT, on_end=lambda verdict: verdicts.append((time.monotonic() - begin, verdict))
    )
    if rank != culprit or kind != "frozen":
        dog.start()
    with in_phase("forward"):
        PROGRESS.layer = 3
        under_way = _misbehave(kind, verdicts, Axis(everyone.size, rank, second)) if rank == culprit else None
        with collective("all_reduce", everyone):
            dist.all_reduce(torch.ones(3))
        under_way = under_way or dist.all_reduce(torch.ones(3), group=second, async_op=True)
        under_way.wait()
    if dog.thread.is_alive():
        dog.thread.join(10)
    return verdicts[0] if verdicts else (0.0, HangDiagnosis([], ""))


def _misbehave(kind: str, verdicts: list[Any], second: Axis) -> Any:
    """Until all others have their verdict. What it has begun, if it has gone on to the second group's collective."""
    if kind == "skips":
        with collective("all_gather", second):
            work = dist.all_reduce(torch.ones(3), group=second.group, async_op=True)
            _wait_for(verdicts)
        PROGRESS.number -= 1
        return work
    if kind == "asleep":
        _wait_for(verdicts)
    else:
        time.sleep(TIMEOUT + 3.0)
    return None


def _wait_for(verdicts: list[Any]) -> None:
    deadline = time.monotonic() + 20
    while not verdicts and time.monotonic() < deadline:
        time.sleep(0.02)


@pytest.mark.fault(22)
def test_the_right_rank_is_named_in_20_of_20(ranks: Any, tmp_path: Path, record_property: Any) -> None:
    """It sleeps, is frozen with all of its threads, or has gone on to another collective."""
    draw, right, slowest = random.Random(22), 0, 0.0
    for trial in range(20):
        kind = ["asleep", "skips", "asleep", "skips", "frozen"][trial % 5]
        culprit, folder = draw.randrange(4), tmp_path / str(trial)
        folder.mkdir()
        results = [result for rank, result in enumerate(ranks(4, hang, folder, kind, culprit)) if rank != culprit]
        right += all(verdict.ranks == [culprit] for _, verdict in results)
        slowest = max(slowest, *(seconds for seconds, _ in results))
        _, verdict = results[0]
        assert (verdict.step, verdict.phase, verdict.layer, verdict.collective) == (7, "forward", 3, "all_reduce over 4 ranks")
        stacks = sorted(path.name for path in (folder / STACKS).glob("*.txt"))
        assert stacks == [f"rank_{rank}.txt" for rank in range(4) if rank != culprit or kind != "frozen"]
        assert "in hang" in (folder / STACKS / stacks[0]).read_text()
        assert events_of(folder, "hang")[0]["ranks"] == [culprit]
    assert right == 20, str(results)
    assert slowest <= TIMEOUT + 10
    record_property("measured", f"right rank {right}/20 on gloo, at most {slowest - TIMEOUT:.1f} s after the timeout")


def hang_in_a_stage(folder: Path, case: Case) -> tuple[HangDiagnosis, bool]:
    """Rank 1 comes to a collective in the second stage that rank 0 does not begin. The verdict; whether the step then ends."""
    parallel, verdicts = build(Layout(2, pipeline=2), case.config), []
    rank, forward_stage, rows = parallel.mesh.rank, step_module.forward_stage, rows_of(parallel, 0, case)

    def hangs(*arguments: Any) -> Any:
        if rank == 1 and any(each is rows[1] for each in arguments):
            with collective("all_reduce", parallel.mesh.everyone):
                _wait_for(verdicts)
        return forward_stage(*arguments)

    PROGRESS.__init__()
    dist.barrier()
    dog = Watchdog(folder, rank, 2, TIMEOUT, on_end=verdicts.append)
    dog.place = rank
    dog.start()
    totals = step_module.count_totals(parallel, rows)
    with mock.patch.object(step_module, "forward_stage", hangs):
        step_module.accumulate(parallel, step_module.StepInput(rows, 0.0, None), totals)
    dog.thread.join(10)
    return verdicts[0], PROGRESS.in_schedule


@pytest.mark.fault(22)
def test_stage_and_micro_batch_of_a_hang_are_named(ranks: Any, tmp_path: Path) -> None:
    """Rank 0 has begun fewer collectives, and is not blamed."""
    sizes: dict[str, Any] = {"layers": 2, "width": 16, "heads": 2, "kv_heads": 2, "vocabulary": VOCABULARY}
    model = ModelConfig(**sizes, moe=MoEConfig(experts=4, hidden=8))
    for verdict, in_schedule in ranks(2, hang_in_a_stage, tmp_path, Case(model, micro_batches=2)):
        assert verdict.ranks == [1] and not in_schedule
        assert "rank 1 (step 0, forward of micro-batch 1 through stage 1, all_reduce over 2 ranks" in verdict.text
        assert verdict.collective == "gradients of micro-batch 1 for stage 0"


@pytest.mark.fault(22)
def test_a_hung_run_ends_with_its_own_exit_code(tmp_path: Path, record_property: Any) -> None:
    folder = tmp_path / "run"
    options = ["steps=50", "parallel.timeout_seconds=3", "parallel.expert=2"]
    with Launched(folder, *options, failpoints="step.begin:rank=1:step=5:sleep=300") as run:
        begin = run.until_step(4)
        assert run.wait() == 69
        seconds = time.monotonic() - begin
        assert "tokenyard: hang: rank 1 (step 5, " in run.log.read_text()
    (event,) = events_of(folder, "hang")
    assert (event["ranks"], event["step"], event["phase"]) == ([1], 5, "count")
    assert [path.name for path in sorted((folder / STACKS).glob("*.txt"))] == ["rank_0.txt", "rank_1.txt"]
    assert "train_step" in (folder / STACKS / "rank_0.txt").read_text()
    assert seconds <= 13
    record_property("measured", f"exit 69, {seconds - 3:.1f} s after the timeout, the launcher included")


def awaited_save(folder: Path, kind: str) -> tuple[str | None, list[HangDiagnosis]]:
    """The error of a save that rank 1's writer makes long, if it ended, and what the hang guard said meanwhile."""
    rank, verdicts = dist.get_rank(), []
    held, saver = {f"x.{rank}": LocalShard(whole((4,)), torch.ones(4))}, Saver(folder / "checkpoints", limit_seconds=3 * TIMEOUT)
    slow = f"checkpoint.shard_begun:rank=1:sleep={60 if kind == 'stuck writer' else 2 * TIMEOUT}"
    PROGRESS.__init__()
    dist.barrier()
    dog = Watchdog(folder, rank, 2, TIMEOUT, on_end=verdicts.append).start()
    with mock.patch.dict(os.environ, {VARIABLE: slow, "RANK": str(rank)}), mock.patch.object(saver_module, "EXIT_SECONDS", 0.1):
        saver.start(1, held, {}, asynchronous=False)
        if kind == "frozen rank" and rank == 1:
            _wait_for(verdicts)
        outcome = saver.wait()
    dog.close()
    assert outcome is not None
    return outcome.error, verdicts


@pytest.mark.fault(22)
def test_a_long_save_that_is_awaited_is_no_hang(ranks: Any, tmp_path: Path) -> None:
    """It lasts twice as long as a collective may."""
    assert ranks(2, awaited_save, tmp_path, "slow writer") == [(None, [])] * 2


@pytest.mark.fault(22)
def test_a_writer_that_is_stuck_ends_by_the_limit_of_saves(ranks: Any, tmp_path: Path) -> None:
    text = f"rank 0: TimeoutError: the save took longer than checkpoint.timeout_seconds={3 * TIMEOUT:g}"
    assert ranks(2, awaited_save, tmp_path, "stuck writer") == [(text, [])] * 2


@pytest.mark.fault(22)
def test_a_rank_that_does_not_wait_for_the_save_with_the_others_hangs(ranks: Any, tmp_path: Path) -> None:
    for _, verdicts in ranks(2, awaited_save, tmp_path, "frozen rank"):
        assert [verdict.ranks for verdict in verdicts] == [[1]]


def disagree(kind: str, culprit: int) -> str:
    """What each rank raises."""
    everyone = build_mesh(ParallelConfig()).everyone
    PROGRESS.__init__()
    PROGRESS.step, PROGRESS.layer = 4, 2
    check_before_collectives(fingerprints.compare)
    try:
        with in_phase("forward"):
            PROGRESS.layer = 2
            if kind == "skips":
                if everyone.rank != culprit:
                    sum_over(torch.ones(2), everyone)
                PROGRESS.layer = 3
                sum_over(torch.ones(2), everyone)
            else:
                send = [1 + (everyone.rank == culprit)] + [1] * (everyone.size - 1)
                AllToAll(send, [1] * everyone.size, everyone).start(torch.ones(sum(send), 2)).wait()
    except fingerprints.CollectiveMismatch as error:
        return str(error)
    finally:
        check_before_collectives(None)
    return ""


@pytest.mark.fault(22)
@pytest.mark.parametrize("kind", ["skips", "rows"])
def test_fingerprints_name_the_rank_before_the_collective(kind: str, ranks: Any) -> None:
    for text in ranks(4, disagree, kind, 2):
        assert text.startswith("rank 2 is about to do another" if kind == "skips" else "all_to_all at step 4"), text
        assert kind == "skips" or "rank 2 sends 2 rows to rank 0, which expects 1" in text


@pytest.mark.fault(23)
def test_one_rank_raises(tmp_path: Path, record_property: Any) -> None:
    """The others end too, its error is said first, and nobody is left."""
    folder = tmp_path / "run"
    with Launched(folder, "steps=50", "parallel.expert=2", failpoints="step.begin:rank=1:step=5:raise") as run:
        begin = run.until_step(4)
        processes = run.ranks()
        assert run.wait() == 1
        seconds = time.monotonic() - begin
        said = [line for line in run.log.read_text().splitlines() if line.startswith("tokenyard: rank")]
        assert said[0].startswith("tokenyard: rank 1, step 5") and "failpoint step.begin" in said[0], run.output()
    assert seconds <= 10 and not any(Path(f"/proc/{pid}").exists() for pid in processes)
    assert [event["step"] for event in events_of(folder, "failed")] == [4]
    record_property("measured", f"{seconds:.1f} s to the end of the launcher, its error first, no rank left")


@pytest.mark.fault(24)
def test_a_slow_rank_is_named(tmp_path: Path, record_property: Any) -> None:
    folder = tmp_path / "run"
    with Launched(folder, "steps=21", "parallel.expert=2", failpoints="step.begin:rank=1:sleep=0.05") as run:
        assert run.wait() == 0, run.output()
    first = events_of(folder, "straggler")[0]
    assert first["rank"] == 1 and first["step"] <= 20 and first["lost_share"] > 0.2
    assert losses(folder)[-1][0] == 21
    record_property("measured", f"named at step {first['step']} with {first['lost_share']:.0%} of the time lost")
