"""The saver plans once, copies before an update, and is loud about a change that came too early."""

import random
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread

import cuda_double
import numpy as np
import pytest
import torch
from tokenyard.checkpoint import saver as saver_module
from tokenyard.checkpoint.host_staging import HostStaging
from tokenyard.checkpoint.saver import Saver
from tokenyard.checkpoint.store import read_whole
from tokenyard.parallel.shard import LocalShard, whole
from tokenyard.train.state import random_state, restore_random


def held(value: float = 1.0, size: int = 64) -> dict[str, LocalShard]:
    return {"model.x": LocalShard(whole((size,)), torch.full((size,), value))}


def test_the_plan_is_made_once_while_the_layout_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    plan = saver_module.make_save_plan
    monkeypatch.setattr(saver_module, "make_save_plan", lambda *told: made.append(1) or plan(*told))
    saver = Saver(tmp_path)
    for step, size, times in ((1, 64, 1), (2, 64, 1), (3, 32, 2), (4, 32, 2)):
        assert saver.start(step, held(step, size), {}) is None
        outcome = saver.wait()
        assert outcome is not None and outcome.error is None and outcome.path == saver.path_of(step)
        assert len(made) == times
    assert [read_whole(saver.path_of(step))["x"][0] for step in (1, 2, 3, 4)] == [1, 2, 3, 4]
    assert saver.poll_all() is None and saver.wait() is None and saver.flags() == (False, False)


def slow_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    copy = HostStaging._copy_tensor
    monkeypatch.setattr(HostStaging, "_copy_tensor", lambda *call: time.sleep(0.3) or copy(*call))


def test_an_update_waits_for_the_copies_and_is_not_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_copies(monkeypatch)
    state, saver = held(), Saver(tmp_path)
    saver.start(1, state, {})
    saver.wait_for_copies()
    state["model.x"].tensor.add_(1)
    outcome = saver.wait()
    assert outcome is not None and outcome.error is None and 0.2 < outcome.blocked_seconds <= outcome.seconds
    assert read_whole(outcome.path)["x"].eq(1).all()


def test_a_change_that_did_not_wait_fails_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_copies(monkeypatch)
    state, saver = held(), Saver(tmp_path)
    saver.start(1, state, {})
    time.sleep(0.1)
    state["model.x"].tensor.add_(1)
    outcome = saver.wait()
    assert outcome is not None and outcome.error is not None
    assert "RuntimeError: tensor 'model.x' changed while it was copied" in outcome.error
    assert list(tmp_path.iterdir()) == []


def returns(wait: Callable[[], object]) -> bool:
    """Whether it does within seconds."""
    thread = Thread(target=wait, daemon=True)
    thread.start()
    thread.join(5)
    return not thread.is_alive()


@pytest.mark.parametrize("kind", [MemoryError, SystemExit])
def test_an_update_does_not_wait_for_a_thread_that_died(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    def no_memory(*_: object) -> None:
        raise kind

    monkeypatch.setattr(HostStaging, "copy", no_memory)
    saver = Saver(tmp_path)
    saver.start(1, held(), {})
    assert returns(saver.wait_for_copies)
    outcome = saver.wait()
    assert outcome is not None and outcome.error is not None and kind.__name__ in outcome.error


def test_nor_for_one_that_could_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_thread(_: object) -> None:
        raise RuntimeError("can't start new thread")

    saver = Saver(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Thread, "start", no_thread)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            saver.start(1, held(), {})
    assert returns(saver.wait_for_copies) and saver.wait() is None
    saver.close()


def on_second_gpu(monkeypatch: pytest.MonkeyPatch) -> tuple[cuda_double.CudaDouble, cuda_double.OnCuda]:
    """A rank whose device is cuda:1, and a tensor there that is 0 until the work on it is done and then 1 to 4."""
    cuda = cuda_double.installed(monkeypatch)
    cuda.set_device(1)
    x = cuda.tensor(torch.zeros(4), 1)
    plain = x.as_subclass(
        torch.Tensor
    ).data  # with a version of its own: on a GPU it changes when work is given, not when it is done
    cuda.current_stream().give(lambda: plain.add_(torch.arange(1.0, 5.0)))
    return cuda, x


def test_a_copy_of_another_gpu_than_the_first_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer's thread begins on cuda:0; the file must have what cuda:1 has computed before the save, also at the next save."""
    cuda, x = on_second_gpu(monkeypatch)
    saver = Saver(tmp_path)
    for step in (1, 2):
        cuda.calls.clear()
        assert saver.start(step, {"model.x": LocalShard(whole((4,)), x)}, {}) is None
        outcome = saver.wait()
        assert outcome is not None and outcome.error is None
        assert read_whole(outcome.path)["x"].tolist() == [1.0, 2.0, 3.0, 4.0]
        assert cuda.of("MainThread") == [("record", "cuda:1 default")]
        assert cuda.of("checkpoint") == cuda_double.COPIED_ASIDE
    assert len(cuda.pinned) == 1


def test_a_synchronous_save_reads_behind_the_computation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if that is not on the default stream, which is the thread's."""
    cuda, x = on_second_gpu(monkeypatch)
    plain, saver = x.as_subclass(torch.Tensor).data, Saver(tmp_path)
    with cuda.stream(cuda.Stream()):
        cuda.current_stream().give(lambda: plain.add_(10))
        assert saver.start(1, {"model.x": LocalShard(whole((4,)), x)}, {}, asynchronous=False) is None
    outcome = saver.wait()
    assert outcome is not None and outcome.error is None
    assert read_whole(outcome.path)["x"].min() >= 10
    assert cuda.of("checkpoint")[:2] == [("set_device", 1), ("wait_event", "cuda:1 default")]


def test_what_was_made_for_the_save_is_gone_when_it_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As DeepSpeed's moments, which are gathered on the device for it."""
    gathered, begun, gone = torch.zeros(4), Event(), []
    made, saver = weakref.ref(gathered), Saver(tmp_path)
    monkeypatch.setattr(saver_module, "write_part", lambda job, held, staged: (begun.wait(10), gone.append(made() is None)))
    saver.start(1, {"model.x": LocalShard(whole((4,)), gathered)}, {})
    del gathered
    begun.set()
    saver.wait()
    assert gone == [True]


def test_all_generators_are_put_back() -> None:
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    saved = {name: LocalShard(shard, tensor.clone()) for name, (shard, tensor) in random_state().items()}
    expected = [random.random(), np.random.rand(), torch.rand(()).item()]
    restore_random(saved)
    assert [random.random(), np.random.rand(), torch.rand(()).item()] == expected
